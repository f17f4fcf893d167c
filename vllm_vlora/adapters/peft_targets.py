"""Which modules an ``adapter_config.json`` selects, by PEFT's rules.

PEFT takes from a file the tensors of modules that the config selects and ignores all others; vLLM takes
all. Where the two differ an adapter has no single meaning.

Source: ``peft.tuners.tuners_utils.check_target_module_exists``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_vlora.adapters.patterns import PLAIN, PatternError, Work, fullmatch
from vllm_vlora.adapters.peft_config import name_ends, saved_modules

_ALL_LINEAR = "all-linear"
_OUTPUT_LAYER = "lm_head"
# PEFT's ``EMBEDDING_LAYER_NAMES``.
_EMBEDDINGS = frozenset({"embed_tokens", _OUTPUT_LAYER})
_NUMBERED = re.compile(r"\.\d+\.")


def selects(
    config: Mapping[str, Any], name: str, kind: str = "linear", work: Work | None = None
) -> bool | None:
    """Whether PEFT adapts a module; None where that depends on the model.

    Args:
        name: path of the module in the base model. kind: "linear" or "embedding".
        work: is charged with what the patterns take.

    Raises:
        ValueError: an option of the config is no pattern or list; says which.
    """
    selected = _selects(config, name, kind, work)
    # Layers that are tied to an adapted embedding are adapted with it; no numbered layer's is.
    if not selected and not _NUMBERED.search(name) and _ties(config, work):
        return None
    return selected


def _ties(config: Mapping[str, Any], work: Work | None) -> bool:
    """Whether PEFT adapts, on loading, what is tied to an embedding among the targets.

    It knows embeddings by two names. A GPT-2's "wte", which it saves among the targets itself, is none of
    them: what was tied to it in training PEFT leaves out.
    """
    if not config.get("ensure_weight_tying"):
        return False
    if not _EMBEDDINGS.isdisjoint(module.rpartition(".")[2] for module in saved_modules(config)):
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return any(_matches("target_modules", targets, name, work) for name in _EMBEDDINGS)
    if work is not None:
        work.spend(len(targets))
    return not _EMBEDDINGS.isdisjoint(target.rpartition(".")[2] for target in targets)


def _selects(config: Mapping[str, Any], name: str, kind: str, work: Work | None) -> bool | None:
    if _excluded(config, name, work):
        return False
    targets = config.get("target_modules")
    if targets is None:
        # PEFT has a list of names for the model, of which it takes those in the layers.
        return None if _in_layers(config, name) else False
    if isinstance(targets, str):
        if targets.lower() == _ALL_LINEAR:
            return _of_all_linear(name, kind)
        return _matches("target_modules", targets, name, work)
    _check_list("target_modules", targets)
    # A list with that word in it finds no module in PEFT, and can only have meant the word.
    if _ALL_LINEAR in targets:
        return _of_all_linear(name, kind)
    if name in targets:
        return True
    return _ends_with(name, targets) and _in_layers(config, name)


def prepared(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config for many calls of :func:`selects`: lists of names checked and hashed once.

    Raises:
        ValueError: as :func:`selects`.
    """
    ready = dict(config)
    for option in ("target_modules", "exclude_modules"):
        value = config.get(option)
        if value is not None and not isinstance(value, str):
            _check_list(option, value)
            ready[option] = frozenset(value)
    return ready


def selects_all(config: Mapping[str, Any], modules: Iterable[str]) -> bool:
    """Whether PEFT adapts all of these modules by this config, whatever the model."""
    try:
        ready, work = prepared(config), Work()
        return all(selects(ready, name, work=work) for name in modules)
    # A config whose targets are no list and no pattern selects nothing.
    except ValueError:
        return False


def full_targets(modules: Iterable[str]) -> dict[str, Any]:
    """Options that select exactly these modules."""
    return {
        "target_modules": sorted(modules),
        # Full names select the modules; these would select among them a second time.
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def _of_all_linear(name: str, kind: str) -> bool | None:
    """PEFT takes every linear module but the output layer."""
    return None if kind == "linear" and name.rpartition(".")[2] != _OUTPUT_LAYER else False


def _excluded(config: Mapping[str, Any], name: str, work: Work | None) -> bool:
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded and _matches("exclude_modules", excluded, name, work):
        return True
    if excluded and not isinstance(excluded, str):
        _check_list("exclude_modules", excluded)
        if name in excluded or _ends_with(name, excluded):
            return True
    saved = saved_modules(config)
    return any(_matches("modules_to_save", rf"(.*\.)?{m}(\..*)?", name, work) for m in saved)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    """Whether ``layers_to_transform``, where it is set, holds the layer of a module."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # With any pattern the first numbered part counts, below a part that holds the list.
        lead = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if pattern != r"[^.]*" and not PLAIN.fullmatch(pattern):
            raise ValueError(f"layers_pattern {pattern!r:.100} is no name of a list of layers")
        match = re.match(rf"{lead}{pattern}\.(?P<index>\d{{1,9}})\.", name)
        if match is not None:
            index = int(match["index"])
            return index == layers if isinstance(layers, int) else index in layers
    return False


def _ends_with(name: str, ends: Any) -> bool:
    return any(end in ends for end in name_ends(name))


def _matches(option: str, pattern: str, name: str, work: Work | None) -> bool:
    try:
        return fullmatch(pattern, name, work)
    except PatternError as error:
        raise ValueError(f"{option} {pattern!r:.200}: {error}") from error


def _check_list(option: str, value: Any) -> None:
    if isinstance(value, frozenset):
        return
    if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{option} is no list of names")
