"""Finding a place in vLLM that the plugin relies on, with the parameters it was read with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vllm_vlora.errors import IncompatibleVLLMError


def find_seam(owner: Any, name: str, parameters: list[str] | None) -> Callable[..., Any]:
    """The function at a seam, checked to have the parameters it was read with."""
    where = f"{getattr(owner, '__name__', owner)}.{name}"
    function = getattr(owner, name, None)
    if function is None:
        raise IncompatibleVLLMError(f"{where} does not exist")
    found = list(inspect.signature(function).parameters)
    if parameters is not None and found != parameters:
        raise IncompatibleVLLMError(f"{where} takes {found}, expected {parameters}")
    return function
