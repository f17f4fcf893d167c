"""Checkpoints of vlora (the package vlora-dev, 0.3 and 1.0): the files of ``SharedSubspace.save``.

    CKPT/subspace_meta.json           layers, task ids and their file names, rank, shapes
    CKPT/subspace.safetensors         LAYER.components_a, .mean_a, .sv_a, and the same of b
    CKPT/subspace_nf4.safetensors     instead, from save_quantized: LAYER.packed_a, .scales_a ...
    CKPT/subspace_float.safetensors   ... and means and singular values
    CKPT/task_NAME.safetensors        LAYER.loadings_a (k,), LAYER.loadings_b (k,)

A component is a whole factor flattened row by row: of A (rank x d_in), and of B (d_out x rank), which
is turned here, so that both sides have ``rank`` rows as in our ``flat`` representation. vlora keeps no
alpha: what it reconstructs is B A, and whoever runs it multiplies with alpha / r.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import torch

from vllm_vlora.checkpoint.components import Asked, asked_elsewhere
from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import CheckpointError
from vllm_vlora.foreign.files import TensorFile, inside, read_json
from vllm_vlora.representations.spec import rank_fault

META_FILE = "subspace_meta.json"
# vlora rounds the codebook of QLoRA to four digits; what its files mean is a product with these.
_CODEBOOK = (
    -1.0,
    -0.6962,
    -0.5251,
    -0.3949,
    -0.2844,
    -0.1848,
    -0.0911,
    0.0,
    0.0796,
    0.1609,
    0.2461,
    0.3379,
    0.4407,
    0.5626,
    0.7230,
    1.0,
)


class _Meta(msgspec.Struct):
    layer_names: list[str]
    task_ids: list[str]
    rank: int
    num_components: int
    task_filenames: dict[str, str] = {}
    shapes_a: dict[str, tuple[int, int]] | None = None
    shapes_b: dict[str, tuple[int, int]] | None = None
    adaptive_k: bool = False
    variance_threshold: float = 0.6
    format: str = "float32"
    nf4_block_size: int = 64


@dataclass(frozen=True)
class VLoRALayer:
    """What the tasks of one layer share, in the dtype that the file has (packed ones: float32).

    A = mean_a + sum_j loadings_a[j] components_a[j], and B transposed alike.

    Attributes:
        mean_a: (rank, d_in). components_a: (k_a, rank, d_in).
        mean_b: (rank, d_out). components_b: (k_b, rank, d_out); B transposed.
        singular_values_a, singular_values_b: of the centred collection, by falling value; as many as
            when the basis was fitted.
    """

    mean_a: torch.Tensor
    components_a: torch.Tensor
    mean_b: torch.Tensor
    components_b: torch.Tensor
    singular_values_a: torch.Tensor
    singular_values_b: torch.Tensor

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.mean_a.shape[0]


class VLoRAFiles:
    """A vlora checkpoint opened for reading, layer by layer and task by task.

    Opening reads and checks the JSON and the headers; tensors are checked as they are read.

    Attributes:
        layer_names, task_ids, rank, num_components, adaptive_k, variance_threshold: as vlora has them.
        packed: whether the components are packed in NF4.

    Raises:
        CheckpointError: a file is missing or contradicts the others, or two tasks share a file.
    """

    def __init__(self, path: Path, meta: _Meta) -> None:
        self.path = path
        self.layer_names, self.task_ids = meta.layer_names, meta.task_ids
        self.rank, self.num_components = meta.rank, meta.num_components
        self.adaptive_k, self.variance_threshold = meta.adaptive_k, meta.variance_threshold
        self.packed = meta.format == "nf4_packed"
        self._meta = meta
        self._check_meta()
        self._task_files = self._find_task_files()

    @classmethod
    def open(cls, path: str | Path) -> VLoRAFiles:
        """Open a folder."""
        path = Path(path)
        return cls(path, read_json(path / META_FILE, _Meta))

    @property
    def asked(self) -> Asked:
        """How vlora chooses k again."""
        return asked_elsewhere(self.num_components, self.adaptive_k, self.variance_threshold)

    @property
    def nbytes(self) -> int:
        """Bytes of its safetensors files."""
        paths = [self._shared.path, self._floats.path, *self._task_files.values()]
        return sum(path.stat().st_size for path in set(paths))

    def layer(self, name: str) -> VLoRALayer:
        """What the tasks of a layer share.

        Raises:
            CheckpointError: a tensor is missing, damaged or of another shape.
        """
        (rank, d_in), (d_out, _) = self._shapes(name)
        k_a, k_b = self.widths(name)
        read = self._packed_components if self.packed else self._float_components
        flat_a = read(name, "a", k_a, rank * d_in)
        flat_b = read(name, "b", k_b, rank * d_out)
        mean_a = self._floats.floats(f"{name}.mean_a", (rank * d_in,))
        mean_b = self._floats.floats(f"{name}.mean_b", (rank * d_out,))
        return VLoRALayer(
            mean_a.view(rank, d_in),
            flat_a.view(k_a, rank, d_in),
            mean_b.view(d_out, rank).T.contiguous(),
            flat_b.view(k_b, d_out, rank).mT.contiguous(),
            self._floats.floats(f"{name}.sv_a", (None,)),
            self._floats.floats(f"{name}.sv_b", (None,)),
        )

    def loadings(self, task_id: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Layer name -> (loadings_a (k_a,), loadings_b (k_b,)) of a task.

        Raises:
            CheckpointError: a tensor is missing or damaged, or has another length than its basis has
                components.
        """
        file = TensorFile(self._task_files[task_id])
        found = {}
        for name in self.layer_names:
            k_a, k_b = self.widths(name)
            for side, k in (("a", k_a), ("b", k_b)):
                count = file.shape(f"{name}.loadings_{side}")
                if count != (k,):
                    raise CheckpointError(
                        f"{file.path}: task {task_id!r} has {list(count)} loadings in layer {name}, "
                        f"whose basis has {k} components: vlora grew the basis (num_expand) for "
                        f"another task only; remove {task_id!r} from task_ids in {META_FILE}"
                    )
            found[name] = (
                file.floats(f"{name}.loadings_a", (k_a,)),
                file.floats(f"{name}.loadings_b", (k_b,)),
            )
        return found

    def widths(self, name: str) -> tuple[int, int]:
        """(k_a, k_b), the components of a layer."""
        if self.packed:
            return self._packed_widths[name]
        shapes = (self._shared.shape(f"{name}.components_{side}") for side in "ab")
        k_a, k_b = (shape[0] if shape else 0 for shape in shapes)
        return k_a, k_b

    # --- files -----------------------------------------------------------------------------------

    @cached_property
    def _shared(self) -> TensorFile:
        name = "subspace_nf4.safetensors" if self.packed else "subspace.safetensors"
        return TensorFile(self.path / name)

    @cached_property
    def _floats(self) -> TensorFile:
        return TensorFile(self.path / "subspace_float.safetensors") if self.packed else self._shared

    @cached_property
    def _packed_widths(self) -> dict[str, tuple[int, int]]:
        """Packed tensors do not say how many components they hold; the loadings do."""
        holders = [(path, "loadings") for path in self._task_files.values()]
        widths = dict.fromkeys(self.layer_names, (0, 0))
        for path, what in holders or [(self._floats.path, "sv")]:
            file = TensorFile(path)
            for name, (k_a, k_b) in widths.items():
                found_a, found_b = (math.prod(file.shape(f"{name}.{what}_{s}")) for s in "ab")
                widths[name] = max(k_a, found_a), max(k_b, found_b)
        return widths

    def _check_meta(self) -> None:
        meta, file = self._meta, self.path / META_FILE
        if meta.format not in ("float32", "nf4_packed"):
            raise CheckpointError(
                f"{file}: unknown format {meta.format!r}; load it with vlora and save it again with "
                "SharedSubspace.save"
            )
        if not meta.layer_names:
            raise CheckpointError(f"{file}: it names no layers; there is nothing to read")
        for what, names in (("layer", meta.layer_names), ("task", meta.task_ids)):
            twice = [n for n, count in Counter(names).items() if not n or count > 1]
            if twice:
                raise CheckpointError(f"{file}: {what} {twice[0]!r} is listed twice or unnamed")
        if meta.rank < 1 or meta.nf4_block_size < 1:
            raise CheckpointError(f"{file}: rank and nf4_block_size must be positive")
        for name in meta.layer_names:
            (rank, d_in), (d_out, _) = self._shapes(name)
            wrong = rank_fault(rank, d_in, d_out)
            if wrong:
                raise CheckpointError(f"{file}: layer {name}: {wrong}; {copy_again(file)}")

    def _shapes(self, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A (rank, d_in) and of B (d_out, rank)."""
        meta = self._meta
        if meta.shapes_a is None or meta.shapes_b is None:
            return self._derived_shapes(name)
        shape_a, shape_b = meta.shapes_a.get(name), meta.shapes_b.get(name)
        if shape_a is None or shape_b is None:
            raise CheckpointError(f"{self.path / META_FILE}: layer {name} has no shape")
        if min(*shape_a, *shape_b) < 1 or shape_a[0] != shape_b[1]:
            raise CheckpointError(
                f"{self.path / META_FILE}: layer {name} has A {list(shape_a)} and B "
                f"{list(shape_b)}, which do not multiply"
            )
        return shape_a, shape_b

    def _derived_shapes(self, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes as early versions leave them to be found out: every layer has the same rank."""
        numels = [math.prod(self._floats.shape(f"{name}.mean_{side}")) for side in "ab"]
        if any(numel == 0 or numel % self.rank for numel in numels):
            raise CheckpointError(
                f"{self._floats.path}: layer {name} has means of {numels} elements, which are not "
                f"factors of rank {self.rank}"
            )
        return (self.rank, numels[0] // self.rank), (numels[1] // self.rank, self.rank)

    def _find_task_files(self) -> dict[str, Path]:
        """Task id -> file. vlora's names are not injective: a later task overwrites an earlier one."""
        owners: dict[Path, str] = {}
        for task_id in self.task_ids:
            name = self._meta.task_filenames.get(task_id, task_id)
            path = inside(self.path, f"task_{name}.safetensors")
            if path in owners:
                raise CheckpointError(
                    f"{path}: tasks {owners[path]!r} and {task_id!r} share this file, so vlora kept "
                    f"the weights of the latter only; remove {owners[path]!r} from task_ids in "
                    f"{META_FILE}, and add its adapter afterwards"
                )
            owners[path] = task_id
        return {task_id: path for path, task_id in owners.items()}

    # --- components ------------------------------------------------------------------------------

    def _float_components(self, name: str, side: str, k: int, numel: int) -> torch.Tensor:
        return self._shared.floats(f"{name}.components_{side}", (k, numel))

    def _packed_components(self, name: str, side: str, k: int, numel: int) -> torch.Tensor:
        """(k, numel) float32: codebook value times the scale of its block, one float32 product."""
        file, block = self._shared, self._meta.nf4_block_size
        # The flattened tensor is padded to whole blocks, and to an even number of codes.
        unit = block if block % 2 == 0 else 2 * block
        padded = -(-k * numel // unit) * unit
        packed = file.tensor(f"{name}.packed_{side}")
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (padded // 2,):
            raise CheckpointError(
                f"{file.path}: tensor '{name}.packed_{side}' is {packed.dtype} "
                f"{list(packed.shape)}, expected torch.uint8 [{padded // 2}] for {k} components"
            )
        scales = file.floats(f"{name}.scales_{side}", (padded // block,))
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
        values = torch.tensor(_CODEBOOK)[codes].view(-1, block) * scales[:, None]
        return values.flatten()[: k * numel].view(k, numel)
