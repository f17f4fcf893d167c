"""``adapter_config.json``: PEFT's rules for rank and scale, and which features are refused.

An adapter is accepted if it is plain LoRA, W + s B A; one with a feature that has no such form is
refused by name. PEFT's rules: ``peft.tuners.lora.LoraConfig`` and ``get_pattern_key``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_vlora.errors import AdapterError

CONFIG_FILE = "adapter_config.json"

_LORA_BIAS_KEY = re.compile(r".+\.lora_B(?:\.default)?\.bias")
_LORA_LIKE_KEY = re.compile(r"(^|.*\.)lora[_.].*")

# Options that change the forward pass, the modules or the base weights into something other than
# W + s B A. A falsy value means the option is off.
_REFUSED_OPTIONS = {
    "use_dora": "DoRA rescales the whole weight",
    "lora_bias": "a bias on lora_B is not a low-rank weight update",
    "use_qalora": "QALoRA pools the input of lora_A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "alora_invocation_tokens": "aLoRA applies the adapter to some tokens only",
    "layer_replication": "layer replication changes the model's layers",
    "target_parameters": (
        "LoRA on bare parameters is not a module's update; vllm_vlora.split_experts makes a plain "
        "adapter of one of fused experts"
    ),
    "trainable_token_indices": "trained tokens replace rows of the embedding",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA truncates the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA is not supported",
}
# These only choose the first values of A and B, so a saved adapter is plain LoRA. The others
# (pissa, olora, corda, loftq) also change the base weights. The rule is vLLM's and PEFT's.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# PEFT trains these heads along with any adapter of the task type, listed or not.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the adapter in ``folder``, as it stands there."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder}: no {CONFIG_FILE}; give a folder that PEFT's save_pretrained wrote"
        ) from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise AdapterError(f"{path}: not valid JSON ({error}); copy the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: holds no JSON object; copy the adapter again")
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that is not plain LoRA or whose values make no sense."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(
            f"{where}: peft_type is {peft_type!r}; only 'LORA' adapters have the form s B A"
        )
    for option, reason in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise AdapterError(
                f"{where}: {option} is set, which is not supported: {reason}; "
                "use a plain LoRA adapter"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise AdapterError(
            f"{where}: init_lora_weights={init!r} changes the base weights; convert the adapter "
            "with PEFT's path_initial_model_for_weight_conversion, or set it to true if the base "
            "model already holds the changed weights"
        )
    _check_rank_value(config.get("r"), "r", where)
    _check_alpha_value(config.get("lora_alpha"), "lora_alpha", where)
    for option, check in (
        ("rank_pattern", _check_rank_value),
        ("alpha_pattern", _check_alpha_value),
    ):
        pattern = config.get(option) or {}
        if not isinstance(pattern, Mapping):
            raise AdapterError(f"{where}: {option} is not an object; correct {CONFIG_FILE}")
        for key, value in pattern.items():
            check(value, f"{option}[{key!r}]", where)
            try:
                _pattern(key)
            except re.error as error:
                raise AdapterError(
                    f"{where}: {option} has the key {key!r}, which is no regular expression: "
                    f"{error}; correct {CONFIG_FILE}"
                ) from error


def _check_rank_value(value: Any, option: str, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise AdapterError(
            f"{where}: {option} is {_shown(value)}, but a rank is a whole number above 0; "
            f"correct {CONFIG_FILE}"
        )


def _check_alpha_value(value: Any, option: str, where: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(
            f"{where}: {option} is {_shown(value)}, but alpha is a number; correct {CONFIG_FILE}"
        )


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)


def lora_scale(config: Mapping[str, Any], name: str, rank: int) -> tuple[float, float]:
    """Return (alpha, s) of the module ``name`` with ``rank``, by PEFT's rules.

    s = alpha / rank, or alpha / sqrt(rank) with ``use_rslora``; alpha is that of the first key of
    ``alpha_pattern`` that matches the name, else ``lora_alpha``.
    """
    alpha = _match_pattern(config.get("alpha_pattern"), name)
    alpha = float(config["lora_alpha"] if alpha is None else alpha)
    return alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def lora_rank(config: Mapping[str, Any], name: str) -> int:
    """Return the rank PEFT gives the module ``name``: by ``rank_pattern``, else ``r``."""
    rank = _match_pattern(config.get("rank_pattern"), name)
    return int(config["r"] if rank is None else rank)


def rank_options(pairs: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The options of a config that give every module its rank and alpha.

    The most common pair is the default, others stand in patterns under full names. PEFT lets the first
    key win that matches the *end* of a module's name, so longer names come first, and a module with the
    default pair is named where a shorter key would match it.

    Args:
        pairs: module name -> (rank, alpha).
    """
    rank, alpha = Counter(pairs.values()).most_common(1)[0][0]
    special = {name for name, pair in pairs.items() if pair != (rank, alpha)}
    shadowed = {name for name in pairs if any(name.endswith(f".{key}") for key in special)}
    ordered = sorted(special | shadowed, key=lambda name: (-len(name), name))
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {name: pairs[name][0] for name in ordered},
        "alpha_pattern": {name: _number(pairs[name][1]) for name in ordered},
        "use_rslora": False,
    }


def _number(value: float) -> int | float:
    """PEFT declares alpha as a whole number, and usually it is one."""
    return int(value) if value == int(value) else value


def _match_pattern(pattern: Mapping[str, Any] | None, name: str) -> Any:
    """PEFT's ``get_pattern_key``: a key is a regular expression for the end of a dotted name."""
    for key, value in (pattern or {}).items():
        if _pattern(key).match(name):
            return value
    return None


# EVA writes one key per module, more than re's own cache of 512 holds for a large model.
@lru_cache(maxsize=8192)
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def check_extra_key(key: str, config: Mapping[str, Any], where: str) -> None:
    """Refuse a tensor that is neither plain LoRA nor a module saved whole."""
    if "lora_magnitude_vector" in key:
        raise AdapterError(f"{where}: tensor {key!r} belongs to DoRA, which is not supported")
    if _LORA_BIAS_KEY.fullmatch(key):
        raise AdapterError(f"{where}: tensor {key!r} is a LoRA bias, which is not supported")
    if "trainable_tokens" in key:
        raise AdapterError(
            f"{where}: tensor {key!r} belongs to trainable tokens, which are not supported"
        )
    if _LORA_LIKE_KEY.fullmatch(key):
        raise AdapterError(
            f"{where}: tensor {key!r} is no PEFT LoRA tensor this version knows; "
            "convert the adapter to PEFT's names (lora_A, lora_B)"
        )
    bias = config.get("bias") or "none"
    if bias != "none" and key.endswith(".bias") and not is_saved_module(key, config):
        raise AdapterError(
            f"{where}: bias={bias!r} and tensor {key!r}: trained biases of the base model are not "
            "supported; train with bias='none'"
        )


def is_saved_module(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor lies in one of ``modules_to_save`` (PEFT matches the end of a name)."""
    saved = config.get("modules_to_save") or []
    heads = [saved] if isinstance(saved, str) else [*saved]
    heads += _TASK_HEADS.get(str(config.get("task_type")), ())
    parts = key.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(parent.endswith(head) for parent in parents for head in heads)
