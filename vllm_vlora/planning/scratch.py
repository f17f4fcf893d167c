"""What waits on disk between the passes of a compression, so that memory stays small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from vllm_vlora.adapters.collection import Module
from vllm_vlora.quantize import PackedMatrix, pack
from vllm_vlora.representations.spec import BasisSpec
from vllm_vlora.representations.stored import Basis, StoredModule


class FittedBases:
    """Fitted bases by module and group, each as wide as it may be wanted; packed when read back."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def save(self, module: Module, group: int, u_t: torch.Tensor, v: torch.Tensor) -> None:
        """Keep U transposed (k_out, d_out) and V (k_in, d_in)."""
        safetensors.torch.save_file({"u": u_t, "v": v}, self._path(module, group))

    def read(self, module: Module, group: int, spec: BasisSpec) -> Basis:
        """The first components of a group's basis, in the number and format of ``spec``."""
        fitted = safetensors.torch.load_file(self._path(module, group))
        return Basis(
            pack(fitted["u"][: spec.k_out], spec.format),
            pack(fitted["v"][: spec.k_in], spec.format),
        )

    def save_flat(self, module: Module, u: torch.Tensor, v: torch.Tensor) -> None:
        """Keep a flat basis' stacked rows."""
        safetensors.torch.save_file({"u": u, "v": v}, self.folder / f"{module.index}.flat")

    def read_flat(self, module: Module) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of U transposed and of V of a flat basis, as wide as it was fitted."""
        fitted = safetensors.torch.load_file(self.folder / f"{module.index}.flat")
        return fitted["u"], fitted["v"]

    def _path(self, module: Module, group: int) -> Path:
        return self.folder / f"{module.index}.{group}.safetensors"


class CoreSpool:
    """Encoded cores: written module by module, read back task by task."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._entries: dict[int, list[tuple[str, int, StoredModule]]] = {}

    def append(self, task: int, module: str, stored: StoredModule) -> None:
        """Keep one task's core of one module."""
        data = safetensors.torch.save(
            {
                f"{side}.{part}": tensor
                for side, matrix in stored.matrices.items()
                for part, tensor in matrix.parts.items()
            }
        )
        with (self._folder / str(task)).open("ab") as file:
            file.write(data)
        shapes = {
            side: PackedMatrix(
                m.format, 0, m.cols, {name: part[:0] for name, part in m.parts.items()}
            )
            for side, m in stored.matrices.items()
        }
        bare = replace(stored, matrices=shapes)
        self._entries.setdefault(task, []).append((module, len(data), bare))

    def read(self, task: int) -> dict[str, StoredModule]:
        """Module name -> core of one task."""
        entries = self._entries.get(task)
        if not entries:
            return {}
        modules = {}
        with (self._folder / str(task)).open("rb") as file:
            for module, size, bare in entries:
                tensors = safetensors.torch.load(file.read(size))
                modules[module] = replace(bare, matrices=_matrices(bare, tensors))
        return modules


def _matrices(bare: StoredModule, tensors: dict[str, torch.Tensor]) -> dict[str, PackedMatrix]:
    matrices = {}
    for side, shape in bare.matrices.items():
        parts = {name: tensors[f"{side}.{name}"] for name in shape.parts}
        rows = len(next(iter(parts.values())))
        matrices[side] = PackedMatrix(shape.format, rows, shape.cols, parts)
    return matrices
