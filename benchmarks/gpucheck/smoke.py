"""Results of the direct kernels against the operation's definition on real shapes."""

from __future__ import annotations

from collections.abc import Iterator

import floors
import torch

from gpucheck.world import PRIVATE, World, make_world, spread_slots
from vllm_vlora.triton_kernels.direct import add_direct_reference

# (tokens, slots, layer) of what is looked at: decode, its edge, prefill.
BATCHES = ((1, 1), (64, 64), (256, 256), (257, 257), (512, 512), (700, 8))
FEW = ((1, 1), (7, 7), (270, 3))
# Layers whose tasks are all of one format have kernels of their own; in this batch tokens share tasks.
ALONE = ("nf4", "nf4-dq", "trellis")
SHARING = (24, 6)
# ||result - definition|| / ||what is added||: a rounding more or less of 16 bits.
TOLERANCE = 1e-2


def check(
    shape: floors.Layer,
    batches: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[dict[str, object]]:
    """A row a batch: the error of the worst token, and whether it is rounding."""
    cases = [(tokens, slots, PRIVATE) for tokens, slots in batches]
    # Each compiles a kernel of its own, and the run under a memory checker has little time.
    alone = ALONE[:1] if batches == FEW else ALONE
    cases += [(*SHARING, (format,)) for format in alone]
    for tokens, slots, private in cases:
        torch.manual_seed(tokens)
        world = make_world(shape, dtype, device, slots=slots, tokens=tokens + 8, private=private)
        yield {
            "check": "smoke", "layer": shape.name, "tokens": tokens, "slots": slots,
            "formats": list(private), **_compare(world, tokens, slots),
        }  # fmt: skip


def _compare(world: World, tokens: int, slots: int) -> dict[str, object]:
    world.routing.update(spread_slots(tokens, slots, tokens))
    x, y = world.batch(tokens)
    before = y.clone()
    wanted = y.clone()
    world.run(y, x)
    # Token by token, so that only some of many are looked at.
    places = torch.linspace(0, tokens - 1, min(tokens, 40)).long().to(world.device)
    some = world.routing.token_slots[places].cpu().numpy()
    world.routing.update(some)
    few = wanted[places]
    add_direct_reference(few, x[places], world.layer, world.table, world.routing)
    added = (few.float() - before[places].float()).norm(dim=1)
    error = float(((y[places].float() - few.float()).norm(dim=1) / added).max())
    return {"error": error, "right": error <= TOLERANCE}
