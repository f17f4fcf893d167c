"""``adapter_config.json``: PEFT's rules for rank and scale, and which features are refused.

An adapter is accepted if it is plain LoRA, W + s B A; one with a feature that has no such form is
refused by name. PEFT's rules: ``peft.tuners.lora.LoraConfig`` and ``get_pattern_key``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_vlora.adapters.lookalikes import describe_content, describe_folder
from vllm_vlora.adapters.patterns import EndPatterns, PatternError
from vllm_vlora.errors import AdapterError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.representations.spec import fits_float32
from vllm_vlora.strict_json import JSONError, decode
from vllm_vlora.wording import some_of

CONFIG_FILE = "adapter_config.json"

GATHER = (
    "sharded training (DeepSpeed ZeRO-3, FSDP) must gather the weights before it saves them: set "
    "stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on its checkpoint, and save again"
)
"""What to do about tensors that sharded training left empty."""

# Of factors that no training made as the others say. No trained bias is ever stored, and vLLM refuses an
# adapter that says that it has one; PEFT's "orthogonal" cannot even begin with an odd rank.
OF_NEW_FACTORS: Mapping[str, Any] = {
    "bias": "none",
    "init_lora_weights": True,
    "eva_config": None,
    "lora_ga_config": None,
}

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
    "enable_lora": "factors of PEFT 0.1's merged projections have groups",
}
_KNOWN_OPTIONS = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "merge_weights",
})  # fmt: skip
# PEFT calls its variants of LoRA so: use_dora, velora_config. Of other names that it does not know it
# says that they are ignored.
_VARIANT = re.compile(r"use_.*|.*_config")
# These only choose the first values of A and B, so a saved adapter is plain LoRA. The others
# (pissa, olora, corda, loftq) also change the base weights. The rule is vLLM's and PEFT's.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# Every tensor is compared with each of them.
_MOST_NAMES = 4096
_LAYERS = ("layers_to_transform", int)
# PEFT trains these heads along with any adapter of the task type, listed or not.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the adapter in ``folder``, as it stands there."""
    path = folder / CONFIG_FILE
    refuse_link_out(path, folder, AdapterError)
    try:
        content = read_regular(path, JSON_BYTES)
        # Which number is infinite is said with its option's name.
        config = decode(content, object, infinite=True)
    except FileNotFoundError as error:
        found = describe_folder(folder) or "give a folder that PEFT's save_pretrained wrote"
        raise AdapterError(f"{folder}: no {CONFIG_FILE}; {found}") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
    except JSONError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise AdapterError(f"{path}: not Unicode ({error}); save it as UTF-8") from error
        advice = describe_content(content) or "copy the adapter again"
        raise AdapterError(f"{path}: not valid JSON ({error}); {advice}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: holds no JSON object; copy the adapter again")
    return config


def check_extra_shape(name: str, shape: Sequence[int], where: str) -> None:
    """Refuse a tensor without elements: what a rank of a sharded training holds of another's."""
    if 0 in shape:
        raise AdapterError(f"{where}: tensor {name!r} is empty, shape {list(shape)}; {GATHER}")


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
    for option, value in config.items():
        if value and option not in _KNOWN_OPTIONS and _VARIANT.fullmatch(option):
            raise AdapterError(
                f"{where}: {option} is set, which this version does not know and which may change "
                f"what the adapter computes; take it out of {CONFIG_FILE} if it does not"
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
    check_values(config, where)
    for option in _PATTERNS:
        try:
            EndPatterns(config.get(option) or {}).check()
        except PatternError as error:
            raise AdapterError(
                f"{where}: {option} has the key {error}; correct {CONFIG_FILE}"
            ) from error


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Refuse values of what is read here that have another type than PEFT gives them; all may be absent.

    For configs that a checkpoint keeps: not all came from an adapter.

    Raises:
        AdapterError: names the option.
    """
    _check_types(config, where)
    for option, check in _NUMBERS.items():
        if config.get(option) is not None:
            check(config[option], option, where)
    for option, check in _PATTERNS.items():
        pattern = config.get(option) or {}
        if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
            raise AdapterError(f"{where}: {option} is not an object; correct {CONFIG_FILE}")
        for key, value in pattern.items():
            check(value, f"{option}[{key!r:.100}]", where)


def _check_types(config: Mapping[str, Any], where: str) -> None:
    model = config.get("base_model_name_or_path")
    if model is not None and not isinstance(model, str):
        raise AdapterError(
            f"{where}: base_model_name_or_path is {_shown(model)}, but a model is named by text; "
            f"correct {CONFIG_FILE}"
        )
    for option, kind in (("modules_to_save", str), ("layers_pattern", str), _LAYERS):
        value = config.get(option)
        listed = list(value) if isinstance(value, list | tuple | set) else [value]
        fits = len(listed) <= _MOST_NAMES and all(type(item) is kind for item in listed)
        if value is not None and not fits:
            raise AdapterError(f"{where}: {option} is {_shown(value)}; correct {CONFIG_FILE}")


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base model that a config names, with its revision, where that is not the main branch."""
    model, revision = config.get("base_model_name_or_path"), _base_revision(config)
    return model and (model if revision is None else f"{model}@{revision:.100}")


def _base_revision(config: Mapping[str, Any]) -> str | None:
    revision = config.get("revision")
    return None if revision in (None, "", "main") else str(revision)


def config_warnings(config: Mapping[str, Any]) -> list[str]:
    """What a config says that is not followed, one line each."""
    found = []
    unknown = sorted(o for o, v in config.items() if v and o not in _KNOWN_OPTIONS)
    if unknown:
        named = some_of(f"{option}={config[option]!r:.40}" for option in unknown)
        found.append(f"{CONFIG_FILE} sets {named}, which is not known and ignored, as PEFT does")
    revision = _base_revision(config)
    if revision is not None:
        found.append(
            f"the base model's revision {revision!r:.100} stands in {CONFIG_FILE} and is not followed: "
            "give it to vLLM as --revision, and a folder with that revision to what runs the base model"
        )
    if str(config.get("init_lora_weights")).lower() == "lora_ga":
        found.append(
            "init_lora_weights='lora_ga' trains against changed base weights; unless the adapter was "
            "saved with PEFT's path_initial_model_for_weight_conversion it does not fit the "
            "original ones"
        )
    return found


def _check_rank_value(value: Any, option: str, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise AdapterError(
            f"{where}: {option} is {_shown(value)}, but a rank is a whole number above 0; "
            f"correct {CONFIG_FILE}"
        )


def _check_alpha_value(value: Any, option: str, where: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not fits_float32(value):
        raise AdapterError(
            f"{where}: {option} is {_shown(value)}, but alpha is a number that float32 holds; "
            f"correct {CONFIG_FILE}"
        )


_NUMBERS = {"r": _check_rank_value, "lora_alpha": _check_alpha_value}
_PATTERNS = {"rank_pattern": _check_rank_value, "alpha_pattern": _check_alpha_value}


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return "missing" if value is None else f"{value!r:.200}"


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
    shadowed = {name for name in pairs if any(end in special for end in name_ends(name))}
    ordered = sorted(special | shadowed, key=lambda name: (-len(name), name))
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {name: pairs[name][0] for name in ordered},
        "alpha_pattern": {name: _number(pairs[name][1]) for name in ordered},
        "use_rslora": False,
    }


def name_ends(name: str) -> Iterator[str]:
    """What follows each dot of a name."""
    place = name.find(".")
    while place >= 0:
        yield name[place + 1 :]
        place = name.find(".", place + 1)


def _number(value: float) -> int | float:
    """PEFT declares alpha as a whole number; written as one only where that is exact."""
    return int(value) if abs(value) < 1 << 53 and value == int(value) else value


def _match_pattern(pattern: dict[str, Any] | None, name: str) -> Any:
    """PEFT's ``get_pattern_key``: a key is a regular expression for the end of a dotted name."""
    if not pattern:
        return None
    try:
        key = _end_patterns(pattern).first(name)
    except PatternError as error:
        raise AdapterError(f"the pattern {error}; correct {CONFIG_FILE}") from error
    return None if key is None else pattern[key]


_prepared: dict[int, tuple[dict[str, Any], int, str, EndPatterns]] = {}
_MOST_PREPARED = 16


def _end_patterns(pattern: dict[str, Any]) -> EndPatterns:
    """Its keys, prepared; kept for the mappings that were asked for last, as each is for every module."""
    # A mapping whose keys were changed has another number of them or another last one.
    size, last = len(pattern), next(reversed(pattern))
    found = _prepared.get(id(pattern))
    if found is not None and found[0] is pattern and found[1:3] == (size, last):
        return found[3]
    ready = EndPatterns(pattern)
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[id(pattern)] = pattern, size, last, ready
    return ready


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
    """Whether a tensor lies in one of ``modules_to_save`` or in a head of the task type."""
    heads = [*saved_modules(config), *_TASK_HEADS.get(str(config.get("task_type")), ())]
    return any(_lies_in(key, head) for head in heads)


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """The names of ``modules_to_save``."""
    saved = config.get("modules_to_save") or []
    return [saved] if isinstance(saved, str) else [*saved]


def _lies_in(key: str, module: str) -> bool:
    """Whether a tensor belongs to a module of that name (PEFT matches the end of a name)."""
    parts = key.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts)))


def check_saved_modules(config: Mapping[str, Any], keys: Iterable[str], where: str) -> list[str]:
    """Warnings of ``modules_to_save`` that a file lacks.

    PEFT cannot load an adapter that lacks a module which the model has; names that the model has not are
    ignored, and of a task's heads it lists several.

    Raises:
        AdapterError: the file has none of them.
    """
    keys = list(keys)
    saved = saved_modules(config)
    missing = [name for name in saved if not any(_lies_in(key, name) for key in keys)]
    if saved and len(missing) == len(saved):
        raise AdapterError(
            f"{where}: modules_to_save names {some_of(saved)}, of which the file holds no tensor; "
            "save the adapter again (under ZeRO-3 or FSDP gather it first), or correct "
            f"{CONFIG_FILE} if nothing else was trained"
        )
    heads = {head for names in _TASK_HEADS.values() for head in names}
    lost = [name for name in missing if name not in heads]
    return [f"modules_to_save names {some_of(lost)}, which the file lacks"] if lost else []
