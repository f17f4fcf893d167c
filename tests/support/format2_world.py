"""A checkpoint that uses all of format 2, with the layers of a small model that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.flat import encode_flat
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_narrow, encode_private
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule

# d_in, d_out.
MODULES = {"q": (80, 256), "k": (80, 40), "v": (80, 70), "o": (96, 80)}
# Rows of U transposed and of V. Those of q are two clusters, each with a basis of its own.
WIDTHS = {"q": (12, 10), "o": (7, 7)}
CLUSTERS = ((0, 4, 0, 6), (4, 12, 6, 10))
FLAT = {"q": 3, "v": 2}
K_OUT, K_IN = 2, 4


def normal_rows(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal rows."""
    return torch.linalg.qr(torch.randn(cols, rows, generator=generator))[0].T.contiguous()


def make_bases(generator: torch.Generator, format: str) -> dict[str, Basis]:
    bases = {}
    for name, (k_out, k_in) in WIDTHS.items():
        d_in, d_out = MODULES[name]
        ranges = CLUSTERS if name == "q" else ((0, k_out, 0, k_in),)
        u = torch.cat([normal_rows(r[1] - r[0], d_out, generator) for r in ranges])
        v = torch.cat([normal_rows(r[3] - r[2], d_in, generator) for r in ranges])
        bases[name] = Basis(pack(u, format), pack(v, format))
    return bases


def make_flat(generator: torch.Generator, format: str) -> dict[str, FlatBasis]:
    flat = {}
    for name, rank in FLAT.items():
        d_in, d_out = MODULES[name]
        u = torch.randn((K_OUT + 1) * rank, d_out, generator=generator)
        v = torch.randn((K_IN + 1) * rank, d_in, generator=generator) / d_in**0.5
        flat[name] = FlatBasis(pack(u, format), pack(v, format), rank)
    return flat


def make_tasks(
    generator: torch.Generator, bases: dict[str, Basis]
) -> Iterator[tuple[str, dict[str, StoredModule]]]:
    """Task id, and its modules."""

    def factors(name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        d_in, d_out = MODULES[name]
        a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        return a, torch.randn(d_out, rank, generator=generator)

    def narrow(name: str, *bits: int) -> StoredModule:
        four, three, two = bits
        return encode_narrow(*factors(name, sum(bits)), 1.5, (four, three, two))

    def joint(
        name: str, rank: int, format: str, rows: tuple[int, int, int, int] | None = None
    ) -> StoredModule:
        basis = bases[name]
        u_start, u_stop, v_start, v_stop = rows or (0, basis.u.rows, 0, basis.v.rows)
        u, v = unpack(basis.u)[u_start:u_stop], unpack(basis.v)[v_start:v_stop]
        a, b = factors(name, rank)
        return encode_joint(8 * a, b, 2.0, u, v, format, rows)

    def flat(name: str) -> StoredModule:
        loadings = torch.randn(K_IN, generator=generator), torch.randn(K_OUT, generator=generator)
        return encode_flat(*loadings, "float16", FLAT[name])

    yield (
        "narrow",
        {"q": narrow("q", 2, 1, 2), "v": narrow("v", 0, 3, 1), "o": narrow("o", 1, 0, 0)},
    )
    yield "two bits", {"o": narrow("o", 0, 0, 3), "q": narrow("q", 0, 0, 1)}
    yield (
        "rows",
        {
            # A core of rank 1 is kept as factors, others on few rows dense.
            "q": joint("q", 1, "float32", CLUSTERS[0]),
            "o": joint("o", 3, "float32", (1, 4, 2, 5)),
        },
    )
    yield (
        "other rows",
        {
            "q": joint("q", 7, "bfloat16", CLUSTERS[1]),
            "k": encode_private(*factors("k", 2), 0.5, "nf4"),
        },
    )
    for format in ("int8", "nf4", "nf4-dq"):
        yield f"dense {format}", {"o": joint("o", 4, format), "v": narrow("v", 1, 1, 1)}
        parts = {"o": joint("o", 1, format), "q": joint("q", 2, format, CLUSTERS[0])}
        yield f"factors {format}", parts
    yield "flat", {"v": flat("v"), "q": flat("q"), "o": joint("o", 2, "float16", (0, 7, 0, 3))}
    yield "plain", {"v": encode_private(*factors("v", 3), 1.0, "nf4-dq")}


def write_world(
    folder: Path, *, basis: str = "float32", seed: int = 0, **options: int
) -> dict[str, dict[str, StoredModule]]:
    """Write the checkpoint; its tasks as they were encoded."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    writer = CheckpointWriter(folder, "org/base", **options)
    bases, flat = make_bases(generator, basis), make_flat(generator, basis)
    for name, shape in MODULES.items():
        writer.add_module(name, *shape, basis=bases.get(name), flat=flat.get(name))
    tasks = dict(make_tasks(generator, bases))
    for task_id, modules in tasks.items():
        writer.add_task(task_id, modules, original_nbytes=1000, error=0.25, adapter_config={})
    writer.finish("# card\n")
    return tasks


def bases_of(checkpoint: Checkpoint) -> dict[tuple[str, str], Basis]:
    """What tasks share, by module and representation."""
    return {(name, kind): basis for name, kind, basis in checkpoint.shared()}
