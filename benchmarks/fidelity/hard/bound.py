"""What private tasks would keep with codes as good as codes can be, beside what they keep.

    python benchmarks/fidelity/hard/bound.py                     measure what is missing, then the table
    python benchmarks/fidelity/hard/bound.py prose-unrelated --ratios 8 16

An update is stored as its singular directions, sqrt(s_i) u_i and sqrt(s_i) v_i. For Gaussian numbers
no code of R bits a number loses less than 2^(-2R) of their energy, so that a code that knows nothing of
the model cannot spend given bytes better than by reverse water-filling: each direction and side gets the
bits that lower the sum of the errors of all tasks, relative to their norms, most, and what is not worth
its bits is left out. What such a code would give back is drawn at random (the forward test channel:
y = (1 - D) x + noise of variance D (1 - D) s), written as an adapter and judged as all others are.

``codes``: in as many bytes as the private checkpoint's numbers take. ``whole file``: in as many as all of
its files take, as if headers cost nothing. ``trellis``: as ``codes``, of codes that need so many bits a
number more as a trellis with a table of 256 did at 3 bits (`python benchmarks/run.py distortion`).
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from fidelity.hard.command_tables import kept_cell  # noqa: E402
from fidelity.hard.forms import WEIGHTS  # noqa: E402
from fidelity.hard.table import RATIOS, opened, options_parser, records_of  # noqa: E402
from vllm_vlora import CompressOptions, export_all, open_adapter  # noqa: E402
from vllm_vlora.adapters.collection import Collection  # noqa: E402
from vllm_vlora.checkpoint.reader import Checkpoint  # noqa: E402
from vllm_vlora.compression.pipeline import Compression  # noqa: E402
from vllm_vlora.representations.factors import balanced_svd  # noqa: E402

RESULTS = Path("benchmarks/results/hard-bound-cpu.jsonl")
# Bits a number above the bound, of each form.
GAPS = {"codes": 0.0, "whole file": 0.0, "trellis": 0.33}
# Halvings of the interval in which the price of a bit lies.
_HALVINGS = 100


class Directions(NamedTuple):
    """The singular directions of one module of one task: delta_W = B A, rows of A and columns of B.

    ``energies`` are squared singular values over the squared norm of the task.
    """

    task: str
    module: str
    a: torch.Tensor
    b: torch.Tensor
    energies: torch.Tensor


def directions_of(adapters: Mapping[str, Any]) -> list[Directions]:
    """Those of all modules of all tasks, each factor with half of a singular value."""
    found = []
    for task, adapter in adapters.items():
        parts = {
            name: balanced_svd(a, b, adapter.modules[name].scale)
            for name, (a, b) in adapter.iter_factors()
        }
        norm = sum(float(sigma.double().square().sum()) for _, _, sigma in parts.values())
        for name, (a, b, sigma) in parts.items():
            found.append(Directions(task, name, a, b, sigma.double().square() / norm))
    return found


def distortions(
    energies: torch.Tensor, d_in: int, d_out: int, price: float, gap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is lost of each direction on both sides, between 0 and 1, when a bit costs ``price``.

    A direction of energy e costs e (1 - (1 - p)(1 - q)) + price (d_in log2(1/p) + d_out log2(1/q)) / 2
    when p and q of its sides are lost. Where the derivatives are zero, p (1 - q) = alpha and
    q (1 - p) = beta, with alpha = price d_in / (2 ln 2 e) and beta alike; where that costs more than
    leaving it out, both are 1.
    """
    # Of no energy, none is worth a bit.
    per_bit = price / (2 * math.log(2)) / energies.clamp(min=1e-300)
    alpha, beta = d_in * per_bit, d_out * per_bit
    half = 1 + alpha - beta
    rest = half.square() - 4 * alpha
    p = (half - rest.clamp(min=0).sqrt()) / 2
    q = p - alpha + beta
    sound = (rest >= 0) & (p > 0) & (q > 0) & (p < 1) & (q < 1)
    p, q = torch.where(sound, p, 1.0), torch.where(sound, q, 1.0)
    cost = energies * (1 - (1 - p) * (1 - q)) + price * bits(p, q, d_in, d_out, gap)
    worth = cost < energies
    return torch.where(worth, p, 1.0), torch.where(worth, q, 1.0)


def bits(p: torch.Tensor, q: torch.Tensor, d_in: int, d_out: int, gap: float = 0.0) -> torch.Tensor:
    """The bits of each direction, ``gap`` a number more than the bound where it is stored at all."""
    return -(d_in * p.log2() + d_out * q.log2()) / 2 + gap * (d_in + d_out) * (p < 1)


def water_filled(
    directions: Sequence[Directions], budget: float, gap: float = 0.0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What is lost of each direction when all together have ``budget`` bits."""

    def at(price: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [distortions(d.energies, d.a.shape[1], d.b.shape[0], price, gap) for d in directions]

    low, high = -60.0, 10.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        spent = sum(
            float(bits(p, q, d.a.shape[1], d.b.shape[0], gap).sum())
            for d, (p, q) in zip(directions, at(2.0**middle))
        )
        low, high = (middle, high) if spent > budget else (low, middle)
    return at(2.0**high)


def through_channel(
    rows: torch.Tensor, lost: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Rows as an ideal code of these distortions gives them back."""
    lost = lost.to(rows.dtype)
    noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    spread = (lost * (1 - lost)).sqrt() * rows.square().mean(1).sqrt()
    return (1 - lost)[:, None] * rows + spread[:, None] * noise


def write(
    directions: Sequence[Directions],
    nbytes: int,
    gap: float,
    originals: Mapping[str, Path],
    folder: Path,
) -> dict[str, Path]:
    """Task -> a PEFT folder of what a code of so many bytes gives back."""
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for found, (p, q) in zip(directions, water_filled(directions, 8 * nbytes, gap)):
        a = through_channel(found.a, p, generator)
        b = through_channel(found.b.T.contiguous(), q, generator).T
        factors.setdefault(found.task, {})[found.module] = a, b
    return {
        task: _replaced(originals[task], parts, folder / task) for task, parts in factors.items()
    }


def _replaced(
    original: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], folder: Path
) -> Path:
    """An adapter with other factors of the same ranks."""
    shutil.copytree(original, folder)
    scales = {name: module.scale for name, module in open_adapter(original).modules.items()}
    tensors = load_file(folder / WEIGHTS)
    for key in tensors:
        (name,) = (name for name in factors if f".{name}.lora_" in key)
        a, b = factors[name]
        tensors[key] = (a if ".lora_A." in key else b / scales[name]).float().contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def measure(
    folder: Path, ratios: Sequence[float], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A record for every size."""
    opening = opened(folder, options)
    collection, adapters, shown, _ = opening
    directions = directions_of(adapters)
    for ratio in ratios:
        with tempfile.TemporaryDirectory(prefix="bench-hard-") as work:
            scratch, target = Path(work, "scratch"), Path(work, "out")
            scratch.mkdir()
            target.mkdir()
            asked = CompressOptions(
                "private", ratio=ratio, executor="serial", allow_large_error=True
            )
            compression = Compression(Collection(adapters), asked, scratch)
            chosen = compression.choose()
            compression.write(target, chosen, trial=True)
            checkpoint, data = Checkpoint.open(target), chosen.plan.data_nbytes
            forms = {"private": export_all(checkpoint, shown, scratch / "p", dtype=torch.float32)}
            for name, gap in GAPS.items():
                nbytes = checkpoint.nbytes if name == "whole file" else data
                forms[name] = write(directions, nbytes, gap, collection.in_basis, scratch / name)
            yield {
                "collection": collection.name,
                "ratio": ratio,
                "examples": options.examples,
                "nbytes": checkpoint.nbytes,
                "data_nbytes": data,
                "kept": opening.kept(forms),
            }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """KL kept and recovered, means of tasks, a row for each collection and size."""
    forms = ("private", *GAPS)
    lines = [
        f"| collection | size | numbers' share | {' | '.join(forms)} |",
        "|" + "---|" * (3 + len(forms)),
    ]
    for record in records:
        cells = [kept_cell(record["kept"][form]) for form in forms]
        share = record["data_nbytes"] / record["nbytes"]
        lines.append(
            f"| {record['collection']} | {record['ratio']:g}x | {share:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is named, or all that is there, as far as it is missing; print the table."""
    options = options_parser(__doc__, RATIOS, RESULTS).parse_args(arguments)
    print(table(records_of(options, measure)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
