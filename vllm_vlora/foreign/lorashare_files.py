"""Checkpoints of lorashare (0.1): the files of ``SHAREModel.save_pretrained``.

    CKPT/share_config.json                     adapter names, base model, statistics
    CKPT/shared_components.safetensors         "LAYER:A" (d_in x k) and "LAYER:B" (d_out x k)
    CKPT/adapters/NAME/loadings.safetensors    "LAYER:A" and "LAYER:B", each (k x r)
    CKPT/adapters/NAME/adapter_meta.json       the adapter's own adapter_config.json, and its path
    CKPT/adapters/NAME/classifier_head.safetensors    tensors that are not LoRA, if there are any

Components are the columns of an orthonormal basis a side, and

    A = (components_A loadings_A)^T        B = components_B loadings_B

with no mean: data are centred to find the components, and not to project on them. That is a core in
factor form on a shared basis. alpha / r is not folded in; it is the original config's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from vllm_vlora.adapters.peft_config import (
    check_config,
    check_extra_key,
    check_extra_shape,
    lora_rank,
    lora_scale,
)
from vllm_vlora.checkpoint.components import asked_elsewhere
from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import CheckpointError
from vllm_vlora.foreign.files import TensorFile, inside, read_json
from vllm_vlora.representations.spec import rank_fault

CONFIG_FILE = "share_config.json"
_COMPONENTS_FILE = "shared_components.safetensors"
_LOADINGS_FILE = "loadings.safetensors"
_META_FILE = "adapter_meta.json"
_HEADS_FILE = "classifier_head.safetensors"
# How far from orthonormal rounding to a dtype takes columns that were.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class _Config(msgspec.Struct):
    adapter_names: list[str]
    base_model_name_or_path: str | None = None
    num_components: int = 0
    variance_threshold: float = 0.0


class _AdapterMeta(msgspec.Struct):
    original_config: dict[str, Any]
    original_adapter_path: str = ""


@dataclass(frozen=True)
class ShareAdapter:
    """One adapter of a lorashare checkpoint.

    Attributes:
        config: its original ``adapter_config.json``. source: the path or Hub id it came from.
        loadings: layer -> (loadings_A (k, r), loadings_B (k, r)).
        scales: layer -> alpha / r, as PEFT has it.
        extra: tensors that are not LoRA (classifier heads), under PEFT's names.
    """

    config: dict[str, Any]
    source: str
    loadings: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scales: Mapping[str, float]
    extra: Mapping[str, torch.Tensor]


class LoraShareFiles:
    """A lorashare checkpoint opened for reading, layer by layer and adapter by adapter.

    The adapters are those that the config names: folders that a removed adapter left behind are no
    part of the checkpoint, and a name with a slash is found in its nested folder. lorashare itself
    goes by the folders.

    Attributes:
        base_model: as the config names it, or None. asked: how many components it says.
        adapter_names: in the config's order. layer_names: sorted.

    Raises:
        CheckpointError: a file is missing or damaged, or a layer lacks a side.
    """

    def __init__(self, path: Path, config: _Config) -> None:
        self.path = path
        self.base_model = config.base_model_name_or_path or None
        self.asked = asked_elsewhere(config.num_components, kept_variance=config.variance_threshold)
        self.adapter_names = config.adapter_names
        twice = [name for name, count in Counter(self.adapter_names).items() if count > 1]
        if twice or not self.adapter_names:
            problem = f"adapter {twice[0]!r} is listed twice" if twice else "it names no adapters"
            raise CheckpointError(f"{path / CONFIG_FILE}: {problem}; correct adapter_names")
        self._components = TensorFile(path / _COMPONENTS_FILE)
        self.layer_names = _layers(self._components)
        for name in self._components.names:
            if len(self._components.shape(name)) != 2:
                raise CheckpointError(f"{self._components.path}: tensor {name!r} is no matrix")

    @classmethod
    def open(cls, path: str | Path) -> LoraShareFiles:
        """Open a folder."""
        path = Path(path)
        return cls(path, read_json(path / CONFIG_FILE, _Config))

    @property
    def nbytes(self) -> int:
        """Bytes of its safetensors files, classifier heads left out."""
        files = [self._components.path]
        files += [self._folder(name) / _LOADINGS_FILE for name in self.adapter_names]
        return sum(file.stat().st_size for file in files)

    def components(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(U transposed (k_out, d_out), V (k_in, d_in)) of a layer, rows orthonormal.

        Raises:
            CheckpointError: a tensor is damaged, or its columns are not orthonormal.
        """
        v, u = (self._side(layer, side) for side in "AB")
        return u, v

    def adapter(self, name: str) -> ShareAdapter:
        """Read one adapter.

        Raises:
            CheckpointError: a file is missing or damaged, or contradicts the others.
            AdapterError: its config, or a tensor beside its loadings, has no exact low-rank form.
        """
        folder = self._folder(name)
        meta = read_json(folder / _META_FILE, _AdapterMeta)
        config = meta.original_config
        check_config(config, str(folder / _META_FILE))
        file = TensorFile(folder / _LOADINGS_FILE)
        loadings = {layer: self._loadings(file, layer, config) for layer in _layers(file)}
        scales = {
            layer: lora_scale(config, layer, a.shape[1])[1] for layer, (a, _) in loadings.items()
        }
        return ShareAdapter(
            config, meta.original_adapter_path, loadings, scales, self._heads(folder, config)
        )

    def widths(self, layer: str) -> tuple[int, int]:
        """(k_out, k_in), the components of a layer's two sides."""
        k_in, k_out = (self._components.shape(f"{layer}:{side}")[1] for side in "AB")
        return k_out, k_in

    def _side(self, layer: str, side: str) -> torch.Tensor:
        name = f"{layer}:{side}"
        rows = self._components.floats(name, (None, None)).T.contiguous()
        # More rows than columns are never orthonormal, and their Gram matrix has no bound.
        if len(rows) > rows.shape[1]:
            raise CheckpointError(
                f"{self._components.path}: {name!r} has {len(rows)} components of "
                f"{rows.shape[1]} numbers; {copy_again(self._components.path)}"
            )
        gram = rows.double() @ rows.double().T
        distance = float((gram - torch.eye(len(rows), dtype=gram.dtype)).abs().max())
        if distance > _ROUNDING[rows.dtype]:
            raise CheckpointError(
                f"{self._components.path}: the components of {name!r} are not orthonormal (off by "
                f"{distance:.2g}); {copy_again(self._components.path)}"
            )
        return rows

    def _loadings(
        self, file: TensorFile, layer: str, config: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if f"{layer}:A" not in self._components.names:
            raise CheckpointError(
                f"{file.path}: layer {layer!r} has no components in {_COMPONENTS_FILE}"
            )
        k_out, k_in = self.widths(layer)
        d_in, d_out = (self._components.shape(f"{layer}:{side}")[0] for side in "AB")
        a = file.floats(f"{layer}:A", (k_in, None))
        b = file.floats(f"{layer}:B", (k_out, a.shape[1]))
        wrong = rank_fault(a.shape[1], d_in, d_out)
        if wrong:
            raise CheckpointError(f"{file.path}: layer {layer!r}: {wrong}; {copy_again(file.path)}")
        if a.shape[1] != lora_rank(config, layer):
            raise CheckpointError(
                f"{file.path}: layer {layer!r} has rank {a.shape[1]}, but {_META_FILE} says "
                f"{lora_rank(config, layer)}; correct r or rank_pattern there"
            )
        return a, b

    def _heads(self, folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        path = folder / _HEADS_FILE
        if not path.exists():
            return {}
        file = TensorFile(path)
        for name in file.names:
            check_extra_key(name, config, str(path))
        heads = {name: file.tensor(name) for name in sorted(file.names)}
        for name, head in heads.items():
            check_extra_shape(name, head.shape, str(path))
        return heads

    def _folder(self, name: str) -> Path:
        return inside(self.path, "adapters", name)


def _layers(file: TensorFile) -> list[str]:
    """The layers of tensors named LAYER:A and LAYER:B, of which each has both."""
    sides: dict[str, set[str]] = {}
    for name in file.names:
        layer, colon, side = name.rpartition(":")
        if not layer or not colon or side not in ("A", "B"):
            raise CheckpointError(f"{file.path}: tensor {name!r} is not named LAYER:A or LAYER:B")
        sides.setdefault(layer, set()).add(side)
    for layer, found in sides.items():
        if len(found) < 2:
            raise CheckpointError(
                f"{file.path}: layer {layer!r} has side {found.pop()} only; the file is incomplete"
            )
    if not sides:
        raise CheckpointError(f"{file.path}: it holds no tensors; {copy_again(file.path)}")
    return sorted(sides)
