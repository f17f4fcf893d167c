"""Names of an adapter's tensors: what wrappers of training add to them, and what PEFT calls them.

PEFT writes ``base_model.model.MODULE.lora_A.weight``. A state dict saved past PEFT's own saving has more
in its names, which means nothing to the model and which neither PEFT nor vLLM finds again:

- ``_orig_mod`` of torch.compile, ``_fsdp_wrapped_module`` and ``_fpw_module`` of FSDP,
  ``_checkpoint_wrapped_module`` of activation checkpointing, each anywhere in a name;
- ``module.`` of DDP and DeepSpeed, and PEFT's own prefix twice, each at the beginning. (No model of
  transformers calls a part of its own just below the top ``module``.)
- the adapter's name: ``lora_A.default.weight``, ``score.modules_to_save.default.weight``.

Without these every name has exactly one meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model's modules."""

_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\."
)
_OUTER = re.compile(r"(?:module\.|base_model\.model\.)+")
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
_SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)(?=\.)")


@dataclass(frozen=True)
class LoRAName:
    """A LoRA tensor's name.

    Attributes:
        module: path of the module in the base model.
        trained: its path in the model that was trained, wrappers among it; patterns of the config may
            have been written for it.
        kind: "linear" or "embedding". side: "A" or "B".
        adapter: the adapter's name, where the tensor's has it.
    """

    module: str
    trained: str
    kind: str
    side: str
    adapter: str | None


@lru_cache(maxsize=4096)  # The next adapter, or the next step of training, has the same names.
def parse_lora(key: str) -> LoRAName | None:
    """The parts of a LoRA tensor's name; None where it is no such name."""
    match = _LORA.fullmatch(key)
    if match is None:
        return None
    return LoRAName(
        _unwrap(match["module"]),
        match["module"].partition(PREFIX)[2] or match["module"],
        "embedding" if match["embedding"] else "linear",
        match["side"],
        match["adapter"],
    )


def parse_whole(key: str) -> tuple[str, str | None]:
    """PEFT's name of a tensor that is not LoRA, and the adapter's name where the key has it."""
    saved = _SAVED.search(key)
    return PREFIX + _unwrap(_SAVED.sub("", key)), saved and saved["adapter"]


def _unwrap(name: str) -> str:
    plain = _WRAPPERS.sub("", name)
    outer = _OUTER.match(plain)
    return plain[outer.end() :] if outer else plain
