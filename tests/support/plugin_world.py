"""A checkpoint of random tasks, and the direct path and the resident store over it, without vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.direct_slots import DirectSlots
from vllm_vlora.plugin.layouts import LayerLayout, Run, SliceLayout
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.settings import Budget
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_narrow, encode_private, encode_trellis
from vllm_vlora.representations.stored import Basis
from vllm_vlora.triton_kernels.direct import add_direct

CPU = torch.device("cpu")
# d_in, d_out, and (k_out, k_in) of the basis, if there is one.
MODULES: dict[str, tuple[int, int, tuple[int, int] | None]] = {
    "q": (80, 256, (6, 5)),
    "k": (80, 40, (3, 4)),
    "v": (80, 40, None),
    "o": (96, 80, (7, 7)),
    "merged": (80, 96, None),
    "lm_head": (80, 100, None),
}
# Task -> module -> "joint" or "private", and the rank. On these bases the cores of rank 1 are kept as
# factors and the others dense.
TASKS: dict[str, dict[str, tuple[str, int]]] = {
    "joint": {"q": ("joint", 1), "k": ("joint", 9), "o": ("joint", 3)},
    "private": {"q": ("private", 3), "v": ("private", 1), "o": ("private", 5)},
    "mixed": {"q": ("joint", 4), "k": ("private", 2), "v": ("private", 6), "o": ("joint", 1)},
    "one": {"o": ("private", 2)},
}
LAYERS = {"qkv": ("q", "k", "v"), "o_proj": ("o",)}
# Two more, which need a slot.
STORED = {
    **TASKS,
    "head": {"q": ("joint", 2), "lm_head": ("private", 2)},
    "plain head": {"lm_head": ("private", 1)},
}


def build(
    folder: Path,
    tasks: dict[str, dict[str, tuple[str, int]]] = TASKS,
    *,
    basis: str = "float32",
    private: str = "nf4",
    seed: int = 0,
    extra: dict[str, dict[str, torch.Tensor]] | None = None,
    widths: Mapping[str, tuple[int, int]] | None = None,
) -> Checkpoint:
    """A checkpoint of these tasks with random weights, of which x of order 1 makes y of order 1.

    ``private``: a number format, or "narrow" for nf4-dq with rows of 4, 3 and 2 bits (``bits_of_rank``),
    which "trellis" has too. ``widths``:
    of bases, in place of those of ``MODULES``.
    """
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    writer = CheckpointWriter(folder, None)
    bases: dict[str, Basis] = {}
    for name, (d_in, d_out, k) in MODULES.items():
        k = (widths or {}).get(name, k)
        if k is not None:
            u, v = (
                torch.linalg.qr(torch.randn(d, rows, generator=generator))[0].T.contiguous()
                for d, rows in ((d_out, k[0]), (d_in, k[1]))
            )
            bases[name] = Basis(pack(u, basis), pack(v, basis))
        writer.add_module(name, d_in, d_out, basis=bases.get(name))
    for task, parts in tasks.items():
        stored = {}
        for name, (kind, rank) in parts.items():
            d_in, d_out, _ = MODULES[name]
            a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            b = torch.randn(d_out, rank, generator=generator)
            if kind == "joint":
                u, v = unpack(bases[name].u), unpack(bases[name].v)
                stored[name] = replace(encode_joint(8 * a, b, 2.0, u, v, "float32"), scale=-0.5)
            elif private == "narrow":
                stored[name] = encode_narrow(a, b, 1.5, bits_of_rank(rank))
            elif private == "trellis":
                (found,) = encode_trellis([a], [b.T], [bits_of_rank(rank)])
                stored[name] = replace(found, scale=1.5)
            else:
                stored[name] = encode_private(a, b, 1.5, private)
        writer.add_task(
            task, stored, original_nbytes=1, error=0.0, adapter_config={},
            extra=(extra or {}).get(task),
        )  # fmt: skip
    writer.finish("card")
    return Checkpoint.open(folder)


def bits_of_rank(rank: int) -> tuple[int, int, int]:
    """Rows of 4, 3 and 2 bits in the tasks of ``build``; one of 4 alone in a task of rank 1."""
    return (1, 0, 0) if rank == 1 else (rank // 3, rank - rank // 3 - rank // 2, rank // 2)


def nothing(slot: int) -> torch.Tensor:
    raise AssertionError("a direct task looked at a slot")


def layout(name: str, runs_a: tuple[Run, ...], runs_b: tuple[Run, ...]) -> SliceLayout:
    d_in, d_out, _ = MODULES[name]
    return SliceLayout(name, nothing, nothing, d_in, d_out, runs_a, runs_b)


def layouts(rank: int = 0, ranks: int = 1) -> list[LayerLayout]:
    """qkv column-parallel and o_proj row-parallel, as tensor-parallel rank ``rank`` has them.

    With two ranks q is cut at 128, a multiple of NF4's blocks, k and v at 20 and o at 48.
    """

    def share(width: int) -> tuple[Run, ...]:
        return (Run(width // ranks * rank, 0, width // ranks),)

    found = []
    for layer, names in LAYERS.items():
        slices = []
        for name in names:
            d_in, d_out, _ = MODULES[name]
            if layer == "o_proj":
                slices.append(layout(name, share(d_in), (Run(0, 0, d_out),)))
            else:
                slices.append(layout(name, (Run(0, 0, d_in),), share(d_out)))
        found.append(LayerLayout(layer, tuple(slices)))
    return found


def make_path(
    checkpoint: Checkpoint, described: list[LayerLayout] | None = None, **options: Any
) -> DirectPath:
    arguments: dict[str, Any] = {
        "slots": 5,
        "max_tokens": 64,
        "device": CPU,
        "dtype": torch.float32,
    }
    return DirectPath(
        checkpoint, layouts() if described is None else described, str, **(arguments | options)
    )


def activate_all(path: DirectPath, checkpoint: Checkpoint, tasks: list[str]) -> DirectSlots:
    """Slots with these tasks in them, whose ids count from 1."""
    slots = DirectSlots(path)
    for number, task in enumerate(tasks, 1):
        slots.activate(number, path.make_task(checkpoint.load_task(task, narrow=path.narrow_rows)))
    return slots


class Store:
    """A store over a checkpoint, and what its check was asked."""

    def __init__(self, only_direct: bool = False, budget: Budget | None = None) -> None:
        self.checked: list[tuple[list[str], bool]] = []
        self.store = ResidentStore(CPU, str, self._check, only_direct, budget=budget)

    def _check(self, checkpoint: Checkpoint, task_ids: Iterable[str], direct: bool) -> None:
        self.checked.append((list(task_ids), direct))


@dataclass(frozen=True)
class Answer:
    """A layer's update of a batch by the direct operation, and in float64 from the decoded weights."""

    got: torch.Tensor
    want: torch.Tensor


def run(checkpoint: Checkpoint, paths: list[DirectPath], tokens: np.ndarray) -> dict[str, Answer]:
    """Run a batch through every layer of every rank's path, and put the ranks' results together.

    The checkpoint's tasks have the numbers from 1 on.
    """
    tasks = list(checkpoint.tasks)
    for path in paths:
        activate_all(path, checkpoint, tasks).route(tokens)
    bases = dict(checkpoint.bases())
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, modules in LAYERS.items():
        x = torch.randn(len(tokens), MODULES[modules[0]][0], generator=generator)
        pieces = []
        for rank, path in enumerate(paths):
            layer = path.layers[name]
            columns = slice(rank * layer.d_in, (rank + 1) * layer.d_in)
            part = x if name == "qkv" else x[:, columns].contiguous()
            y = torch.zeros(len(tokens), layer.width)
            add_direct(y, part, layer, path.table, path.routing)
            pieces.append(y.split([s.width for s in layer.slices], dim=1))
        joined = [
            torch.cat(parts, dim=1) if name == "qkv" else sum(parts) for parts in zip(*pieces)
        ]
        want = []
        for module in modules:
            wide = torch.zeros(len(tokens), MODULES[module][1], dtype=torch.float64)
            for number, task in enumerate(tasks, 1):
                stored = checkpoint.load_task(task).modules.get(module)
                if stored is not None:
                    a, b = decode(stored, bases.get(module))
                    rows = torch.from_numpy(tokens == number)
                    wide[rows] += x[rows].double() @ a.double().T @ b.double().T
            want.append(wide)
        found[name] = Answer(torch.cat(joined, dim=1), torch.cat(want, dim=1))
    return found


TOKENS = np.array([1, 0, 2, 2, 3, 3, 3, 0, 4, 1, 99, 2, *[3] * 12, *[1] * 9, 4, 2])
