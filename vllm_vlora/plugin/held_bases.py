"""Which basis each layer of the engine holds, where a checkpoint has several for one layer.

A checkpoint made of adapters that name one layer differently may have two modules for it, each with a
basis of its own: those made before such names were put together, and those of names that cannot be told
to be one layer without the model. A layer holds one basis, that of the first task that needs it. A task
that needs another one cannot run direct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_vlora.representations.spec import ModuleSpec, Segment

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.reader import Checkpoint


class HeldBases:
    """Whose basis each layer holds.

    Args:
        layer: the layer of a module, by the module's name; anything that is equal for one layer.
    """

    def __init__(self, layer: Callable[[str], str]) -> None:
        self._layer = layer
        self._holders: dict[str, str] = {}

    def holds(self, module: str) -> bool:
        """Whether a module's layer holds that module's basis."""
        return self._holders.get(self._layer(module)) == module

    def holder(self, module: str) -> str | None:
        """The module whose basis a module's layer holds, if it holds one."""
        return self._holders.get(self._layer(module))

    def obstacle(self, module: str) -> str | None:
        """Why a layer has no place for a module's basis; None where it has."""
        holder = self.holder(module)
        if holder in (None, module):
            return None
        return (
            f"module {module} is the same layer of the served model as {holder}, whose basis that "
            "layer holds; compress the adapters again, and they share one"
        )

    def take(self, segments: Iterable[Segment], modules: Sequence[ModuleSpec]) -> str | None:
        """Give a task the bases that it needs, or say why it cannot have them all."""
        needed = [modules[segment.module].name for segment in segments if segment.is_joint]
        for module in needed:
            reason = self.obstacle(module)
            if reason is not None:
                return reason
        self._holders.update((self._layer(module), module) for module in needed)
        return None


@dataclass(frozen=True)
class Bases:
    """The bases of one state of a checkpoint: the digest of all of them, and whose each layer holds."""

    digest: str
    held: HeldBases

    def of(self, checkpoint: Checkpoint) -> HeldBases | None:
        """Whose bases the layers hold of a checkpoint; None where theirs are another one's."""
        return self.held if self.digest == checkpoint.basis_digest else None
