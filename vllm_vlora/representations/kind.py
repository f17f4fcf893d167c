"""Which representation something has, by name."""

from __future__ import annotations


class HasRepresentation:
    """Something with a ``representation``: a segment of the manifest, or a module in memory."""

    __slots__ = ()
    representation: str

    @property
    def is_private(self) -> bool:
        """Whether nothing is shared: the factors are the task's own."""
        return self.representation == "private"

    @property
    def is_joint(self) -> bool:
        """Whether it is a core on the module's basis."""
        return self.representation == "joint"

    @property
    def is_flat(self) -> bool:
        """Whether it is loadings on the module's flat basis."""
        return self.representation == "flat"
