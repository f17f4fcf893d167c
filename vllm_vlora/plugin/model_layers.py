"""The LoRA layers of a served model as vLLM lays them out: shapes, and what one rank holds of them.

vLLM gives every slice of every LoRA layer a slot tensor for A and one for B. Under tensor parallelism
(without ``--fully-sharded-loras``) a column-parallel layer keeps A whole and splits B's rows, a
row-parallel layer splits A's columns and keeps B whole, and ``lm_head`` and embeddings are whole on
every rank. Source: ``create_lora_weights`` of vLLM 0.32's ``vllm/lora/layers``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_vlora.adapters.module_names import find_name
from vllm_vlora.errors import ModelMismatchError, OptionError
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.representations.spec import ModuleSpec
from vllm_vlora.strict_json import JSONError, decode

LM_HEAD = "lm_head"
# By the last component of a module's name.
_COLUMN = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"})
_COLUMN_PREFIX = "in_proj"
_ROW = frozenset({"o_proj", "down_proj", "out_proj", "fc2"})
_KV = frozenset({"k_proj", "v_proj"})
# vLLM runs these modules as one layer: a target module of one makes slots for all.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Llama-like classes whose vLLM 0.32 models name no ``embedding_modules``: no LoRA on lm_head and
# embeddings, so no slots for them.
_WITHOUT_HEADS = frozenset(
    {
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Glm4ForCausalLM",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
    }
)
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class LayerSlice:
    """One slice of a LoRA layer: an adapted module's A (rank x d_in) and B (d_out x rank).

    Attributes:
        name: dotted name of the module.
        d_in, d_out: its shape over all ranks.
        side: ``column``, ``row``, ``whole``, or ``unknown``, which is counted as whole.
        kv_heads: heads that d_out splits into, where fewer heads than ranks are repeated.
    """

    name: str
    d_in: int
    d_out: int
    side: str
    kv_heads: int | None = None

    @property
    def leaf(self) -> str:
        """The last component of the name."""
        return self.name.rsplit(".", 1)[-1]

    def widths(self, tp: int) -> tuple[int, int]:
        """Columns of A and rows of B that one of ``tp`` ranks holds.

        Raises:
            OptionError: ``tp`` does not divide what the layer splits.
        """
        if self.side == "column":
            return self.d_in, self._share("d_out", self.d_out, self._parts(tp), tp)
        if self.side == "row":
            return self._share("d_in", self.d_in, tp, tp), self.d_out
        return self.d_in, self.d_out

    def _parts(self, tp: int) -> int:
        """Into how many different parts ``tp`` ranks split d_out."""
        if self.kv_heads is None:
            return tp
        if self.kv_heads % tp and tp % self.kv_heads:
            raise OptionError(
                f"tensor parallel size {tp} does not divide the {self.kv_heads} KV heads of "
                f"{self.name}, nor they it; choose another"
            )
        return min(self.kv_heads, tp)

    def _share(self, name: str, width: int, parts: int, tp: int) -> int:
        if width % parts:
            raise OptionError(
                f"tensor parallel size {tp} does not divide {name} {width} of {self.name}; "
                "choose another"
            )
        return width // parts


@dataclass(frozen=True)
class ModelShape:
    """What a Llama-like ``config.json`` says about a model's linear layers.

    ``source`` is where it was read; ``heads_have_lora`` whether vLLM puts LoRA on ``lm_head`` and
    the embedding of this class.
    """

    source: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    heads_have_lora: bool = True

    def slices(self) -> list[LayerSlice]:
        """Every slice of every LoRA layer that vLLM makes, without ``--lora-target-modules``."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = [
            ("self_attn.q_proj", hidden, queries),
            ("self_attn.k_proj", hidden, values),
            ("self_attn.v_proj", hidden, values),
            ("self_attn.o_proj", queries, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ]
        found = []
        for layer in range(self.layers):
            for name, d_in, d_out in shapes:
                leaf = name.split(".")[1]
                kv_heads = self.kv_heads if leaf in _KV else None
                full = f"model.layers.{layer}.{name}"
                found.append(LayerSlice(full, d_in, d_out, _side(leaf, "linear"), kv_heads))
        if self.heads_have_lora:
            found.append(LayerSlice("model.embed_tokens", self.vocab_size, hidden, "whole"))
            found.append(LayerSlice(LM_HEAD, hidden, self.vocab_size, "whole"))
        return found

    def check_tp(self, tp: int) -> None:
        """Raise OptionError when ``tp`` ranks cannot share the query heads."""
        if self.heads % tp:
            raise OptionError(
                f"tensor parallel size {tp} does not divide the {self.heads} attention heads of "
                f"{self.source}; choose another"
            )


def read_model_shape(path: str | Path) -> ModelShape:
    """Read the ``config.json`` at ``path``, a file or a model's folder.

    Raises:
        OptionError: there is none, it is no JSON object, or it is not of a dense Llama-like model.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = decode(read_regular(file, JSON_BYTES), object)
    except OSError as error:
        raise OptionError(
            f"{file}: {error.strerror}; give a model's folder or its config.json"
        ) from error
    except JSONError as error:
        raise OptionError(f"{file}: not valid JSON ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise OptionError(f"{file}: holds no JSON object; copy the model again")
    experts = next((field for field in _EXPERT_FIELDS if config.get(field)), None)
    if experts:
        raise OptionError(
            f"{file}: {experts} says that this is a mixture of experts, whose slots are not counted "
            "here; leave the model out to count the checkpoint's modules"
        )
    heads = _field(file, config, "num_attention_heads")
    hidden = _field(file, config, "hidden_size")
    architectures = config.get("architectures") or []
    return ModelShape(
        source=str(file),
        hidden_size=hidden,
        intermediate_size=_field(file, config, "intermediate_size"),
        layers=_field(file, config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_field(file, config, "num_key_value_heads", heads),
        head_dim=_field(file, config, "head_dim", hidden // heads),
        vocab_size=_field(file, config, "vocab_size"),
        heads_have_lora=not _WITHOUT_HEADS.intersection(architectures),
    )


def _field(file: Path, config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(
            f"{file}: {name} is {'missing' if value is None else repr(value)}; only Llama-like "
            "models are read; leave the model out to count the checkpoint's modules"
        )
    return value


def module_slice(module: ModuleSpec) -> LayerSlice:
    """The slice that a checkpoint's module takes, its side told from its name."""
    leaf = module.name.rsplit(".", 1)[-1]
    return LayerSlice(module.name, module.d_in, module.d_out, _side(leaf, module.kind))


def _side(leaf: str, kind: str) -> str:
    if kind != "linear" or leaf == LM_HEAD:
        return "whole"
    if leaf in _COLUMN or leaf.startswith(_COLUMN_PREFIX) or leaf in _FUSED:
        return "column"
    return "row" if leaf in _ROW else "unknown"


def match_modules(modules: Iterable[ModuleSpec], shape: ModelShape) -> list[LayerSlice]:
    """The model's slice of each checkpoint module, with the module's own vocabulary.

    Raises:
        ModelMismatchError: the model has no LoRA layer of that name, or of that shape.
    """
    slices = {item.name: item for item in shape.slices()}
    found = []
    for module in modules:
        item = find_name(module.name, slices.get)
        if item is None:
            raise ModelMismatchError(
                f"{shape.source}: no LoRA layer for module {module.name} of the checkpoint; it is "
                "another model, or not Llama-like"
            )
        # Vocabularies may be padded in the served model.
        fits = (item.d_in, item.d_out) == (module.d_in, module.d_out)
        if item.side == "whole":
            fits = module.d_in <= item.d_in and module.d_out <= item.d_out
        if not fits:
            raise ModelMismatchError(
                f"{shape.source}: module {module.name} is {module.d_out} x {module.d_in} (d_out x "
                f"d_in) in the checkpoint and {item.d_out} x {item.d_in} in the model; the checkpoint "
                "is of another model"
            )
        found.append(replace(item, d_in=module.d_in, d_out=module.d_out))
    return found


def targeted(slices: Iterable[LayerSlice], targets: Iterable[str] | None) -> list[LayerSlice]:
    """The slices that ``--lora-target-modules`` keeps, by vLLM's rule; all for None.

    Raises:
        OptionError: a target names no layer.
    """
    slices = list(slices)
    if targets is None:
        return slices
    wanted, known = set(targets), {name for item in slices for name in _answers_to(item)}
    for target in targets:
        if target not in known:
            raise OptionError(f"target module {target!r} names no LoRA layer of the model")
    return [item for item in slices if not wanted.isdisjoint(_answers_to(item))]


def _answers_to(item: LayerSlice) -> set[str]:
    """The target names that give a slice a slot: its own, its layer's and its neighbours'."""
    names = {item.name, item.leaf}
    for layer, parts in _FUSED.items():
        if item.leaf in parts:
            names |= {layer, *parts}
    return names
