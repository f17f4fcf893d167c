"""Slots of the direct path: which task stands in which, and what waits."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.triton_kernels.direct import DirectTask


class DirectSlots:
    """Which adapter id has which slot of the table; the least recently used gives way.

    A batch has no more direct tasks than there are slots, and every one of them is activated for it, so
    that none of its own gives way. No slot can be kept beyond that, not for an adapter that is pinned
    either: the scheduler counts a batch's adapters alone.
    """

    def __init__(self, path: DirectPath) -> None:
        self._path = path
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(path.table.slots))[::-1]
        # Free ones in which the record of a task was left.
        self._left: set[int] = set()
        self.version = 0

    def __contains__(self, adapter: int) -> bool:
        return adapter in self._slots

    def activate(self, adapter: int, task: DirectTask) -> bool:
        """Give an adapter a slot and put its task there; False when it is there already."""
        table, held = self._path.table, self._slots.get(adapter)
        if held is not None:
            self._slots.move_to_end(adapter)
            if table.tasks[held] is task:
                return False
            self._free.append(held)  # The id was given to another task.
        elif not self._free:
            _, oldest = self._slots.popitem(last=False)
            self._free.append(oldest)
        slot = self._free.pop()
        table.set(slot, task)
        self._left.discard(slot)
        self._slots[adapter] = slot
        self.version += 1
        return True

    def remove(self, adapter: int) -> None:
        """Give an adapter's slot back, if it has one. The device is told nothing: it may be asleep."""
        slot = self._slots.pop(adapter, None)
        if slot is not None:
            self._free.append(slot)
            self._left.add(slot)
            self._path.table.release(slot)
            self.version += 1

    def route(self, token_adapters: np.ndarray) -> np.ndarray:
        """Tell the routing each token's slot, from its adapter's id.

        Returns:
            Whether each token has a direct task.
        """
        adapters, where = np.unique(token_adapters, return_inverse=True)
        none = self._path.table.slots
        slots = np.array([self._slots.get(int(a), none) for a in adapters], dtype=np.int32)
        token_slots = slots[where] if len(slots) else np.zeros(0, dtype=np.int32)
        self._path.routing.update(token_slots)
        return token_slots != none

    def spread(self, tokens: int) -> None:
        """Route so many tokens over all slots in turn: a warm-up's worst case.

        Records that were left in free slots go first: memory that they name may hold other things by now.
        """
        for slot in self._left:
            self._path.table.set(slot, self._path.empty)
        self._left.clear()
        self._path.routing.update(np.arange(tokens) % self._path.table.slots)
