"""Names of a package that are imported on first use, so that naming it costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def names_on_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The module-level ``__getattr__`` (PEP 562) of a package.

    Args:
        package: its dotted name. homes: public name -> dotted name of the module that defines it.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


def is_installed(package: str) -> bool:
    """Whether a package could be imported; nothing of it is."""
    try:
        return find_spec(package) is not None
    except ImportError:
        return False
