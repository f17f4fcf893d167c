"""A LoRA adapter in memory, and its way from and to a PEFT folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from vllm_vlora.adapters.module_names import (
    Layer,
    inverse,
    layer_shapes,
    renamed,
    shared_prefixes,
)
from vllm_vlora.adapters.peft_config import (
    OF_NEW_FACTORS,
    base_name,
    lora_rank,
    lora_scale,
    rank_options,
)
from vllm_vlora.adapters.peft_folder import KINDS, Adapter, Factors, open_adapter, write_adapter
from vllm_vlora.adapters.peft_targets import full_targets, selects_all
from vllm_vlora.errors import AdapterError
from vllm_vlora.quantize import is_finite


@dataclass
class LoRAWeights:
    """One adapter: for each layer ``delta_W = scale * B A``.

    Attributes:
        layer_names: paths of the adapted layers in the base model.
        lora_a: layer -> A, (r, d_in). lora_b: layer -> B, (d_out, r). Unscaled, of one floating dtype or
            several; r may differ between layers.
        rank: the largest r.
        metadata: ``adapter_config.json`` as read; {} where nothing is known, and the scale is then 1.
        kinds: layer -> "embedding" where it is not linear.
        extra: tensors that are not LoRA (classifier heads, ...) under PEFT's names.
        name: what errors call it; empty where nothing gives one.

    Raises:
        AdapterError: a layer lacks a factor, shapes disagree, ``rank`` is not the largest, or a value is
            NaN or infinite.

    Examples:
        >>> a, b = torch.ones(2, 12), torch.ones(8, 2)
        >>> weights = LoRAWeights(["q_proj"], {"q_proj": a}, {"q_proj": b}, rank=2)
        >>> weights.scale("q_proj")
        1.0
    """

    layer_names: list[str]
    lora_a: dict[str, Tensor]
    lora_b: dict[str, Tensor]
    rank: int
    metadata: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        _check_names(self)
        for layer in self.layer_names:
            _check_layer(layer, self.lora_a[layer], self.lora_b[layer])
        for key, tensor in self.extra.items():
            _check_finite(f"extra tensor {key!r}", tensor)
        largest = max(a.shape[0] for a in self.lora_a.values())
        if self.rank != largest:
            raise AdapterError(
                f"the adapter's rank is given as {self.rank}, but the largest of its layers is "
                f"{largest}; give rank={largest}"
            )

    def __repr__(self) -> str:
        return f"LoRAWeights(rank={self.rank}, layers={len(self.layer_names)})"

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> LoRAWeights:
        """Read all weights of an opened adapter.

        Raises:
            AdapterError: a value is NaN or infinite, or the file changed since it was opened.

        Examples:
            >>> LoRAWeights.from_adapter(open_adapter(adapter_dirs[0]))
            LoRAWeights(rank=2, layers=2)
        """
        factors = dict(adapter.iter_factors())
        return cls(
            list(factors),
            {name: a for name, (a, _) in factors.items()},
            {name: b for name, (_, b) in factors.items()},
            max(module.rank for module in adapter.modules.values()),
            dict(adapter.config),
            {m.name: m.kind for m in adapter.modules.values() if m.kind != "linear"},
            adapter.extra_tensors(),
            adapter.name,
        )

    @property
    def has_scale(self) -> bool:
        """Whether the metadata gives an alpha; without one every scale is 1."""
        return has_alpha(self.metadata)

    def scale(self, layer: str) -> float:
        """alpha / r of a layer by PEFT's rules (``use_rslora`` and ``alpha_pattern`` honoured).

        Raises:
            KeyError: no such layer.

        Examples:
            >>> adapters[0].scale("layers.0.q_proj")
            2.0
        """
        rank = self.lora_a[layer].shape[0]
        return lora_scale(self.metadata, layer, rank)[1] if self.has_scale else 1.0

    def under_names(self, prefixes: Mapping[str, str]) -> LoRAWeights:
        """The adapter with these prefixes in its layers' names: new prefix -> the one it has.

        Ranks and alphas that its config gives by name are given by the new ones.
        """
        old = {renamed(name, inverse(prefixes)): name for name in self.layer_names}
        metadata = dict(self.metadata)
        if self.has_scale:
            pairs = _rank_pairs(self)
            metadata |= rank_options({new: pairs[name] for new, name in old.items()})
        return LoRAWeights(
            list(old),
            {new: self.lora_a[name] for new, name in old.items()},
            {new: self.lora_b[name] for new, name in old.items()},
            self.rank,
            metadata,
            {new: self.kinds[name] for new, name in old.items() if name in self.kinds},
            self.extra,
            self.name,
        )

    def scaled(self, layer: str) -> Factors:
        """(A (r, d_in), scale * B (d_out, r)) in float32, so that delta_W = B A.

        Raises:
            KeyError: no such layer.

        Examples:
            >>> a, b = adapters[0].scaled("layers.0.q_proj")
            >>> tuple((b @ a).shape)
            (8, 12)
        """
        return self.lora_a[layer].float(), self.scale(layer) * self.lora_b[layer].float()


def has_alpha(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's config gives its alpha, so that its scale is known."""
    return config.get("lora_alpha") is not None


def base_models(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The base models that adapters' configs name, each once."""
    return list(dict.fromkeys(str(name) for config in configs if (name := base_name(config))))


Update: TypeAlias = LoRAWeights | Adapter
"""An adapter in memory, or an opened one that is read module by module."""
_AnUpdate = TypeVar("_AnUpdate", LoRAWeights, Adapter, Update)


def in_memory(adapters: Iterable[Update]) -> list[LoRAWeights]:
    """The adapters, the opened ones of them read.

    Raises:
        AdapterError: a value is NaN or infinite, or a file changed since it was opened.
    """
    return [
        LoRAWeights.from_adapter(adapter) if isinstance(adapter, Adapter) else adapter
        for adapter in adapters
    ]


@dataclass(frozen=True)
class LayerShape:
    """One layer of one adapter; ``kind`` is "linear" or "embedding"."""

    d_in: int
    d_out: int
    rank: int
    kind: str


def shapes_of(adapter: Update) -> dict[str, LayerShape]:
    """Shape of every layer of an adapter, by name."""
    if isinstance(adapter, Adapter):
        return {
            name: LayerShape(module.d_in, module.d_out, module.rank, module.kind)
            for name, module in adapter.modules.items()
        }
    return {
        name: LayerShape(
            adapter.lora_a[name].shape[1],
            adapter.lora_b[name].shape[0],
            adapter.lora_a[name].shape[0],
            adapter.kinds.get(name, "linear"),
        )
        for name in sorted(adapter.layer_names)
    }


def called(adapter: Update, place: int) -> str:
    """What an error calls one of several adapters: by its name, or else by its place among them."""
    return f"adapter {adapter.name!r}" if adapter.name else f"adapter {place}"


def under_shared_names(
    adapters: Sequence[_AnUpdate], known: Mapping[str, Layer] | None = None
) -> list[_AnUpdate]:
    """The adapters with one name for each layer, where there is no doubt that it is one.

    Args:
        known: layers whose names stay, as those of a subspace.
    """
    shapes = [layer_shapes(shapes_of(adapter)) for adapter in adapters]
    found = shared_prefixes(shapes, layer_shapes(known or {}))
    return [
        adapter.under_names(prefixes) if prefixes else adapter
        for adapter, prefixes in zip(adapters, found)
    ]


def load_adapter(path: str | Path) -> LoRAWeights:
    """Read a PEFT adapter: a local folder, or a Hub id ("org/name", "org/name@revision").

    Raises:
        AdapterError: it cannot be found or read, contradicts itself, or is not plain LoRA.

    Examples:
        >>> load_adapter(adapter_dirs[0]).layer_names
        ['layers.0.q_proj', 'layers.0.v_proj']
    """
    return LoRAWeights.from_adapter(open_adapter(path))


def load_adapter_from_hub(repo_id: str, revision: str | None = None) -> LoRAWeights:
    """Read a PEFT adapter from the Hugging Face Hub.

    Args:
        repo_id: "org/name". revision: a branch, tag or commit.

    Raises:
        AdapterError: no such repository or revision, no access, offline, or not plain LoRA.

    Examples:
        >>> load_adapter_from_hub("no id")
        Traceback (most recent call last):
          ...
        vllm_vlora.errors.AdapterError: adapter 'no id': no such folder, and not a Hub id ...
    """
    return load_adapter(repo_id if revision is None else f"{repo_id}@{revision}")


def save_adapter(weights: LoRAWeights, path: str | Path, *, force: bool = False) -> Path:
    """Write a PEFT folder, atomically, that PEFT and vLLM load.

    Its config is the adapter's metadata where that describes the factors exactly. Otherwise ranks and
    alphas are set such that PEFT's scale of each layer is :meth:`LoRAWeights.scale`, with a
    ``rank_pattern`` where ranks differ, and the layers are named in full.

    Args:
        path: the folder to publish. force: replace a folder that holds a PEFT adapter and nothing else.

    Returns:
        The folder's absolute path.

    Raises:
        AdapterError: values that PEFT's format cannot hold (float64), or metadata that is not plain LoRA.
        OutputError: the folder exists and may not be replaced, or cannot be written.

    Examples:
        >>> saved = save_adapter(adapters[0], folder / "adapter")
        >>> torch.equal(load_adapter(saved).lora_a["layers.0.q_proj"],
        ...             adapters[0].lora_a["layers.0.q_proj"])
        True
    """
    factors = {name: (weights.lora_a[name], weights.lora_b[name]) for name in weights.layer_names}
    return write_adapter(
        path, exact_config(weights), factors, weights.kinds, weights.extra, force=force
    )


def exact_config(weights: LoRAWeights) -> dict[str, Any]:
    """An ``adapter_config.json`` whose ranks and scales are those of the weights."""
    return described(weights.metadata, _rank_pairs(weights))


def described(
    metadata: Mapping[str, Any], pairs: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """The metadata as an ``adapter_config.json``, with ranks and alphas where it says others or none.

    Args:
        pairs: layer -> (rank, alpha).
    """
    config = {"task_type": None, "bias": "none", **plain_json(metadata)}
    config["peft_type"] = config.get("peft_type") or "LORA"
    if not _describes(config, pairs):
        config = of_new_factors(config | rank_options(pairs))
    return config if selects_all(config, pairs) else {**config, **full_targets(pairs)}


def of_new_factors(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what it says of how a training began, which was with other factors."""
    return {name: OF_NEW_FACTORS.get(name, value) for name, value in config.items()}


def plain_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as JSON has it; sets, which PEFT's config object holds, become sorted lists.

    Raises:
        AdapterError: a value that JSON cannot hold.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(metadata), default=_plain_value))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the adapter's metadata is not JSON ({error}); correct it") from error
    return copy


def _plain_value(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} of type {type(value).__name__}")


def _describes(config: Mapping[str, Any], pairs: Mapping[str, tuple[int, float]]) -> bool:
    if not isinstance(config.get("r"), int) or not has_alpha(config):
        return False
    return all(lora_rank(config, name) == rank for name, (rank, _) in pairs.items())


def own_rank_options(weights: LoRAWeights) -> dict[str, Any]:
    """The options of a config that give its ranks and scales."""
    return rank_options(_rank_pairs(weights))


def _rank_pairs(weights: LoRAWeights) -> dict[str, tuple[int, float]]:
    ranks = {name: weights.lora_a[name].shape[0] for name in weights.layer_names}
    return {name: (rank, weights.scale(name) * rank) for name, rank in ranks.items()}


def _check_names(weights: LoRAWeights) -> None:
    names = weights.layer_names
    if not names:
        raise AdapterError("the adapter has no layers; give at least one")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AdapterError(f"layer {twice!r} is named twice; name each layer once")
    for side, factors in (("lora_a", weights.lora_a), ("lora_b", weights.lora_b)):
        for name in names:
            if name not in factors:
                raise AdapterError(f"layer {name!r} has no {side}; give both factors of a layer")
        for name in factors:
            if name not in names:
                raise AdapterError(
                    f"{side} has layer {name!r}, which layer_names lacks; name it or leave it out"
                )
    for name, kind in weights.kinds.items():
        if name not in names or kind not in KINDS:
            raise AdapterError(
                f"kinds has {name!r}: {kind!r}; name layers of the adapter, with one of {KINDS}"
            )


def _check_layer(layer: str, a: Tensor, b: Tensor) -> None:
    shown = f"layer {layer!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape):
        raise AdapterError(f"{shown}, not two matrices (r, d_in) and (d_out, r)")
    if a.shape[0] != b.shape[1]:
        raise AdapterError(f"{shown}, whose ranks differ; give (r, d_in) and (d_out, r)")
    for side, tensor in (("lora_A", a), ("lora_B", b)):
        if not tensor.is_floating_point():
            raise AdapterError(f"{side} of layer {layer!r} is {tensor.dtype}; give floats")
        _check_finite(f"{side} of layer {layer!r}", tensor)


def _check_finite(what: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise AdapterError(f"{what} holds NaN or infinite values; leave the adapter out")
