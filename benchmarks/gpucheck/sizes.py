"""Microseconds of the private kernels with other sizes than they choose, in the graph of a long batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import floors
import torch
from clock import capture, l2_nbytes

from gpucheck.profile import profile_kernels
from gpucheck.smoke import TOLERANCE
from gpucheck.world import World, make_world, spread_slots
from vllm_vlora.triton_kernels import device as choices
from vllm_vlora.triton_kernels import private_kernel

FORMATS = ("nf4", "float", "trellis")


@dataclass(frozen=True)
class Sizes:
    """Other arguments of both launches, the parts of d_in, and how long a batch has small tiles."""

    name: str
    shrink: dict[str, int] = field(default_factory=dict)
    expand: dict[str, int] = field(default_factory=dict)
    parts: int | None = None
    small_tiles: int | None = None


AS_CHOSEN = Sizes("as chosen")
VARIANTS = (
    AS_CHOSEN,
    Sizes("shrink D 64", {"BLOCK_D": 64}),
    Sizes("shrink D 256", {"BLOCK_D": 256}),
    Sizes("shrink D 256, 8 warps", {"BLOCK_D": 256, "num_warps": 8}),
    Sizes("shrink 1 stage", {"num_stages": 1}),
    Sizes("shrink one 512", {"ONE_COLS": 512}),
    Sizes("shrink one 512, 8 warps", {"ONE_COLS": 512, "num_warps": 8}),
    Sizes("expand D 64", expand={"BLOCK_D": 64}),
    Sizes("expand D 256", expand={"BLOCK_D": 256}),
    Sizes("expand one 2048, 8 warps", expand={"ONE_COLS": 2048, "num_warps": 8}),
    Sizes("expand one 512", expand={"ONE_COLS": 512}),
    Sizes("expand 8 rows", expand={"ONE_ROWS": 8}),
    Sizes("8 parts", parts=8),
    Sizes("1 part", parts=1),
    Sizes("tiles of 64", small_tiles=0),
    Sizes("tiles of 64, shrink D 128", {"BLOCK_D": 128}, small_tiles=0),
)


def search(
    shape: floors.Layer,
    tokens: int,
    tasks: tuple[int, ...],
    variants: tuple[Sizes, ...],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row a format, variant and number of tasks: both kernels' times, and whether the result is right.

    All variants of a format run on the same tasks; a result is right that is the first variant's up to
    rounding. What does not compile is a row, too, and wrong where it is what the kernels choose.
    """
    flush = torch.empty(max(2 * l2_nbytes(device) // 4, 1), device=device)
    for format in FORMATS:
        world = make_world(
            shape, dtype, device, slots=tokens, tokens=tokens, joint=False, private=(format,)
        )
        x, before = world.batch(tokens)
        wanted: dict[int, torch.Tensor] = {}
        for sizes in variants:
            row = {
                "check": "sizes", "layer": shape.name, "tokens": tokens, "kind": format,
                "what": sizes.name,
            }  # fmt: skip
            y = before.clone()
            try:
                run = _graph(world, sizes, x, y)
            except Exception as error:  # noqa: BLE001 (of the compiler, whatever it is)
                row["failure"] = f"{type(error).__name__}: {error}"[:300]
                yield row | ({"right": False} if sizes == AS_CHOSEN else {})
                continue
            for count in tasks:
                world.routing.update(spread_slots(tokens, count, 0))
                y.copy_(before)
                run()
                added = y.double() - before.double()
                error = (added - wanted.setdefault(count, added)).norm() / wanted[count].norm()
                yield row | {
                    "tasks": count, "us": profile_kernels(run, flush, repeats), "error": float(error),
                    "right": bool(error <= TOLERANCE),
                }  # fmt: skip


def _graph(world: World, sizes: Sizes, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """A replay of the layer's work with these sizes; without a GPU the call itself."""

    def run() -> None:
        with _chosen(sizes):
            world.run(y, x)

    # Every slot is asked for: what the graph launches is compiled now.
    world.routing.update(spread_slots(len(x), world.routing.slots, 0))
    run()
    return capture(run) if x.is_cuda else run


@contextmanager
def _chosen(sizes: Sizes) -> Iterator[None]:
    def changed(choose: Callable[..., dict[str, Any]], other: dict[str, int]) -> Callable[..., Any]:
        return lambda *given: choose(*given) | other

    def into_parts(cols: int, *_: int) -> tuple[int, int]:
        return choices.cut_columns(cols, programs=1, least=1, wanted=parts or 1)

    kernel, parts = private_kernel, sizes.parts
    small = choices.SMALL_TILE_TOKENS if sizes.small_tiles is None else sizes.small_tiles
    with (
        # What was chosen is kept by the layer.
        patch.object(kernel, "_PLANS", {}),
        patch.object(kernel, "shrink_config", changed(kernel.shrink_config, sizes.shrink)),
        patch.object(kernel, "expand_config", changed(kernel.expand_config, sizes.expand)),
        patch.object(kernel, "cut_columns", into_parts if parts else kernel.cut_columns),
        patch.object(choices, "SMALL_TILE_TOKENS", small),
    ):
        yield
