"""Options and arguments that several commands have, with one wording each."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_vlora.errors import OptionError
from vllm_vlora.urls import is_url
from vllm_vlora.wording import without_secrets

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ki|mi|gi|ti|[kmgt])?b?\s*", re.IGNORECASE)


class Quantize(str, Enum):
    """Number format of factors, bases and cores."""

    auto = "auto"
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class Codes(str, Enum):
    """What private factors of 4 bits and less are in."""

    nf4 = "nf4"
    trellis = "trellis"


# A parameter that typer reads off an annotation.
_Parameter = Any
_ADAPTERS = "PEFT folders, Hub ids, URLs, or a folder whose sub-folders are adapters"


def adapters_argument(more: str = "") -> _Parameter:
    """One adapter at least."""
    return typer.Argument(metavar="ADAPTER", help=f"{_ADAPTERS}{more}.")


def output_option(help: str = "The folder to write.", metavar: str = "DIR") -> _Parameter:
    """``--output`` and ``-o``."""
    return typer.Option(
        "--output", "-o", metavar=metavar, help=help, show_default=False, parser=_local
    )


def _local(text: str) -> Path:
    """As a path ``s3://bucket/x`` would be the folder ``s3:`` of the working one."""
    if is_url(text):
        # Of our own errors that are built-in ones too, click would keep the type alone.
        raise typer.BadParameter(
            f"{without_secrets(text)} is a URL; name a folder of this machine, and copy that to the store"
        )
    return Path(text)


def force_option(what: str) -> _Parameter:
    """``--force``; ``what`` is what it replaces."""
    return typer.Option("--force", help=f"Replace {what}.")


def all_option(what: str) -> _Parameter:
    """``--all``, in place of names."""
    return typer.Option("--all", help=f"Take every {what} out.")


def base_option(namer: str, use: str = "") -> _Parameter:
    """``--base``, for what runs the model; ``namer`` records one."""
    return typer.Option(
        metavar="MODEL",
        help=f"The base model's folder or Hub id{use}. Default: the one the {namer}.",
        show_default=False,
    )


def quantize_option(what: str) -> _Parameter:
    """``--quantize``."""
    return typer.Option(help=f"Number format of {what}.")


AdapterRefs = Annotated[
    list[str] | None,
    typer.Argument(metavar="ADAPTER", help=f"{_ADAPTERS}.", show_default=False),
]


def names_option(what: str) -> Any:
    """``--name ID=PATH``."""
    return typer.Option(
        "--name", metavar="ID=PATH", help=f"{what} May be repeated.", show_default=False
    )


Names = Annotated[
    list[str] | None,
    names_option("Give the adapter at PATH the task id ID instead of its folder's name."),
]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable",
        help="Leave adapters out that cannot be opened, and say which; without it nothing is done.",
    ),
]
Originals = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="With --rebuild: the original adapters, in sub-folders named as the tasks or as when "
        "they were compressed.",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write figures as FILE.html or FILE.png; needs matplotlib.",
        show_default=False,
    ),
]
Tokenizers = Annotated[
    bool,
    typer.Option(
        "--tokenizers/--no-tokenizers",
        help="Keep tokenizer files and chat templates that lie beside the adapters; the same file "
        "of many tasks is kept once.",
    ),
]
MaxBytes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Take at most this: 500MB, 1.5GiB, or bytes.", show_default=False
    ),
]
AllowLargeError = Annotated[
    bool,
    typer.Option(
        "--allow-large-error",
        help="Store tasks with a relative error above 1 too: leaving them out would lose less.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="Wait at most this long for another run that writes the same folder. Default: as long "
        "as it takes.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(metavar="N", help="Rows of text in a pass of the model.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.",
        show_default=False,
    ),
]
ModelDtype = Annotated[
    str | None,
    typer.Option(
        metavar="FLOAT",
        help="The base model's: float32, float16 or bfloat16. Default: float32 on CPU, bfloat16 "
        "elsewhere.",
        show_default=False,
    ),
]


def parse_size(text: str) -> int:
    """Bytes of ``500MB``, ``1.5 GiB`` or ``12345``; units with i count in 1024s.

    Raises:
        OptionError: not a size.
    """
    found = _SIZE.fullmatch(text)
    if not found:
        raise OptionError(f"{text!r} is not a size; give bytes, or a number with kB, MB, GB or GiB")
    unit = (found[2] or "").lower()
    scale = 1024 ** ("kmgt".index(unit[0]) + 1) if unit.endswith("i") else _UNITS[unit]
    return int(float(found[1]) * scale)
