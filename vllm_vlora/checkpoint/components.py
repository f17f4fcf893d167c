"""How many components the bases of a checkpoint were asked for, beside the weights, for the next fit.

    CKPT/components.json   {"version": 1, "num_components": 16, "adaptive_k": false,
                            "variance_threshold": 0.6, "kept_variance": 0.95}

It is there where the bases do not say it: more were asked for than there were, or as many as hold a share
of the variance. Nothing of it is needed to decode a task, and whoever does not fit on need not look.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec

from vllm_vlora.checkpoint.beside import VERSION, decode_beside, read_beside

COMPONENTS_FILE = "components.json"

_Share: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Asked(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """What was asked for; None is not said.

    Attributes:
        num_components: k; "auto": as many as hold ``kept_variance``.
        adaptive_k, variance_threshold: as of ``SharedSubspace``.
        kept_variance: ``variance_threshold`` of ``SHAREModel``.
    """

    num_components: Annotated[int, msgspec.Meta(ge=1)] | Literal["auto"] | None = None
    adaptive_k: bool = False
    variance_threshold: _Share | None = None
    kept_variance: _Share | None = None


class _File(Asked, frozen=True, kw_only=True):
    version: int


def asked_elsewhere(
    num_components: int,
    adaptive_k: bool = False,
    variance_threshold: float | None = None,
    kept_variance: float | None = None,
) -> Asked:
    """What another package's checkpoint says, without numbers that no fit could go by."""

    def share(value: float | None) -> float | None:
        return value if value is not None and 0 < value <= 1 else None

    k = num_components if num_components >= 1 else None
    return Asked(k, adaptive_k, share(variance_threshold), share(kept_variance))


def read_asked(checkpoint: Path) -> Asked:
    """What a checkpoint's folder says; nothing where it has no such file.

    Raises:
        CheckpointError: the file is damaged or newer.
    """
    file = checkpoint / COMPONENTS_FILE
    data = read_beside(file)
    found: Asked = Asked() if data is None else decode_beside(file, data, _File)
    return found


def write_asked(checkpoint: Path, asked: Asked) -> None:
    """Put it into a checkpoint's folder, in the place of what is there; nothing is no file."""
    file = checkpoint / COMPONENTS_FILE
    if asked == Asked():
        file.unlink(missing_ok=True)
        return
    said = {name: getattr(asked, name) for name in Asked.__struct_fields__}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(_File(version=VERSION, **said))))
