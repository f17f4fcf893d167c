"""What examples in docstrings and on the pages of ``docs/`` find in scope, made when it is named.

* ``torch``, and every public name of ``vllm_vlora``;
* ``adapter_dirs``: four PEFT folders as strings, ``task_0`` to ``task_3``: rank 2, alpha 4, on
  ``layers.0.q_proj`` (d_in 12, d_out 8) and ``layers.0.v_proj`` (12, 6);
* ``adapters``: the same as a list of ``LoRAWeights``;
* ``subspace``, ``joint``: ``SharedSubspace`` of them, flat with 2 components and joint with 4;
* ``checkpoint``: path of a compressed checkpoint of them;
* ``fused_dir``: a PEFT folder of fused experts: rank 2, two experts of ``layers.0.mlp.experts``,
  hidden 6, inner 4;
* ``vlora_checkpoint``: path of a checkpoint that vlora wrote, of tasks cola, mrpc, rte and team/wnli;
* ``base_model``: an ``nn.Module`` with these linears; ``forward(x (B, 12)) -> (B, 14)``;
* ``folder``: an empty ``pathlib.Path``, which is also the working folder.

Every run gets everything anew, so an example may change what it likes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_adapters import ALPHA, RANK, SHAPES, TinyModel
from torch import nn

import vllm_vlora
from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress

TASKS = 4


def write_adapters(root: Path) -> list[str]:
    """The four adapters as PEFT folders: one parent, and something of its own for each."""
    generator = torch.Generator().manual_seed(0)
    parents = {
        name: (
            torch.randn(RANK, d_in, generator=generator),
            torch.randn(d_out, RANK, generator=generator),
        )
        for name, (d_in, d_out) in SHAPES.items()
    }
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "org/tiny",
    }
    folders = []
    for task in range(TASKS):
        factors = {
            name: (
                a + 0.3 * torch.randn(a.shape, generator=generator),
                b + 0.3 * torch.randn(b.shape, generator=generator),
            )
            for name, (a, b) in parents.items()
        }
        folders.append(str(write_adapter(root / f"task_{task}", config, factors)))
    return folders


def write_fused(folder: Path) -> Path:
    """An adapter of a block's two parameters of experts, as PEFT writes it."""
    block = "base_model.model.layers.0.mlp.experts"
    shapes = {
        f"{block}.base_layer.lora_A.weight": (4, 6),
        f"{block}.base_layer.lora_B.weight": (8, 4),
        f"{block}.lora_A.weight": (4, 4),
        f"{block}.lora_B.weight": (6, 4),
    }
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": targets}
    folder.mkdir(parents=True)
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class DocumentedWorld:
    """Makes the names that a source text mentions, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Any] = {}
        self._makers: dict[str, Callable[[], Any]] = {
            "torch": lambda: torch,
            "vllm_vlora": lambda: vllm_vlora,
            "adapter_dirs": lambda: write_adapters(self._folder / "world"),
            "adapters": self._adapters,
            "subspace": self._subspace,
            "joint": self._joint,
            "checkpoint": self._checkpoint,
            "fused_dir": lambda: write_fused(self._folder / "world" / "fused"),
            "vlora_checkpoint": self._vlora_checkpoint,
            "base_model": self._base_model,
            "folder": self._empty,
        }

    def names(self, source: str) -> dict[str, Any]:
        """Name -> thing, for every name of this world and every public one that ``source`` has."""
        words = set(re.findall(r"\w+", source))
        public = {name: getattr(vllm_vlora, name) for name in vllm_vlora.__all__ if name in words}
        return public | {name: self[name] for name in self._makers if name in words}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def _adapters(self) -> list[Any]:
        from vllm_vlora.subspace.weights import load_adapter

        return [load_adapter(folder) for folder in self["adapter_dirs"]]

    def _subspace(self) -> Any:
        from vllm_vlora.subspace.shared import SharedSubspace

        return SharedSubspace.from_adapters(self["adapters"], num_components=2)

    def _joint(self) -> Any:
        from vllm_vlora.subspace.shared import SharedSubspace

        return SharedSubspace.from_adapters(
            self["adapters"], num_components=4, representation="joint"
        )

    def _checkpoint(self) -> Path:
        path = self._folder / "world" / "checkpoint"
        opened = {Path(folder).name: open_adapter(folder) for folder in self["adapter_dirs"]}
        compress(opened, path, CompressOptions(num_components=4))
        return path

    def _vlora_checkpoint(self) -> Path:
        written = Path(__file__).parent.parent / "data" / "seeds" / "vlora-1.0.0-float"
        return Path(shutil.copytree(written, self._folder / "world" / "vlora"))

    def _base_model(self) -> nn.Module:
        torch.manual_seed(0)
        return TinyModel()

    def _empty(self) -> Path:
        path = self._folder / "folder"
        path.mkdir(exist_ok=True)
        return path
