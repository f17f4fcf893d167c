"""``SHAREModel``: lorashare's interface to a checkpoint whose tasks share one basis a module.

Every delta_W = s B A of a module is stored as U L_B L_A V on bases that all adapters share (our
``joint`` representation with cores in factor form, after SHARE, arXiv 2602.06043), fitted by the
streamed fit that ``compress`` uses. The differences from lorashare are in ``docs/migration.md``; the
first is that bases are fitted to the weight updates delta_W, and not to each factor by itself, so that
they do not depend on how an adapter splits delta_W into factors.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors.torch import load_file, save_file

from vllm_vlora.adapters.collection import Collection, Module, under_shared_names
from vllm_vlora.adapters.peft_config import CONFIG_FILE, lora_rank, lora_scale
from vllm_vlora.adapters.peft_folder import (
    Adapter,
    Factors,
    open_adapter,
    write_adapter,
)
from vllm_vlora.adapters.weights_files import WEIGHTS_FILE
from vllm_vlora.checkpoint.attachments import read_attached
from vllm_vlora.checkpoint.card import format_bytes
from vllm_vlora.checkpoint.components import read_asked, write_asked
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.hub import pull_checkpoint, push_checkpoint
from vllm_vlora.checkpoint.losses import Losses, describe_losses
from vllm_vlora.checkpoint.reader import Checkpoint, StoredTask
from vllm_vlora.checkpoint.sources import checkpoint_folder
from vllm_vlora.checkpoint.successor import Successor, edited
from vllm_vlora.compression.encoding import CoreProjection
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.editing.adding import check_new
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import AdapterError, OptionError, TaskIdError
from vllm_vlora.fitting.shared_basis import fit_module
from vllm_vlora.fitting.whitening import FROBENIUS
from vllm_vlora.foreign.convert import convert, detect_kind
from vllm_vlora.planning.survey import directions
from vllm_vlora.quantize import FORMAT_OF_DTYPE
from vllm_vlora.representations.decode import decode, relative_error
from vllm_vlora.representations.factors import relative, squared_norm
from vllm_vlora.representations.registry import segment_sides
from vllm_vlora.representations.stored import Basis, StoredModule
from vllm_vlora.subspace.weights import of_new_factors
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.wording import count_of, shown

if TYPE_CHECKING:
    from peft import PeftModel

_DEFAULT_COMPONENTS = 32
_KEPT_VARIANCE = 0.95
# Components that "auto" tries first; it doubles them until they are enough.
_FIRST_WIDTH = 32


class SHAREModel:
    """LoRA adapters of one base model, compressed onto bases that they share.

    Made by :meth:`from_adapters` or :meth:`from_pretrained`. It stands on a checkpoint folder,
    :attr:`checkpoint`, which vLLM serves; adding and removing adapters writes a new one and leaves a
    folder of the user's as it is until :meth:`save_pretrained`.

    Attributes:
        checkpoint: the checkpoint, opened. Unless it is a folder that was opened, it goes with this
            object: save it to keep it.
        variance_threshold: the share of a new adapter's ||delta_W||^2 that the bases must hold for
            :meth:`add_adapter` to leave them as they are.

    Examples:
        >>> share = SHAREModel.from_adapters(adapter_dirs, num_components=8)
        >>> share.adapter_names
        ['task_0', 'task_1', 'task_2', 'task_3']
        >>> share.reconstruction_error("task_1", original_path=adapter_dirs[1])["max"] < 1e-5
        True
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        asked = read_asked(checkpoint.path)
        self.variance_threshold = asked.kept_variance or _KEPT_VARIANCE
        self._wanted: int | str | None = asked.num_components
        self._originals: dict[str, Adapter] = {}
        self._home: TemporaryDirectory[str] | None = None
        self._edits = 0
        self._bases: dict[tuple[str, str], Basis] | None = None
        self._note = ""

    # --- making and keeping ----------------------------------------------------------------------

    @classmethod
    def from_adapters(
        cls,
        adapters: Sequence[str | Path] | Mapping[str, str | Path],
        num_components: int | str = _DEFAULT_COMPONENTS,
        variance_threshold: float = 0.95,
        device: str | None = None,
        layer_by_layer: bool = False,
        chunk_size: int | None = None,
        on_error: str = "raise",
    ) -> SHAREModel:
        """Compress adapters onto shared bases, U (d_out x k) and V (k x d_in) a module.

        Ranks, scales and target modules may differ. Embeddings have no shared basis and keep their own
        factors; classifier heads and other tensors that are not LoRA are kept as they are.

        Args:
            adapters: PEFT folders or Hub ids ("org/name", "org/name@revision"), or name -> those.
                Without names an adapter is called after its folder; a name that is taken gets a number.
            num_components: k, or "auto": the least k that holds ``variance_threshold`` of every
                module's ||delta_W||^2, averaged over the adapters. A module has no more components
                than its adapters have directions; where k is more than that everywhere, all are kept,
                with a warning. Another one names adapters that are predicted to lose over 5 % of their
                gain.
            variance_threshold: of "auto", in (0, 1]; kept for :meth:`add_adapter`.
            device: None, "auto" or "cpu". The fit runs on the CPU; "cuda" is accepted with a warning.
            layer_by_layer, chunk_size: bounds on memory in lorashare. The fit always goes module by
                module and holds one adapter's factors at a time, so that any bound is kept and neither
                changes the result; ``chunk_size`` must be at least 1.
            on_error: "skip" leaves out adapters that cannot be read, with a warning.

        Raises:
            AdapterError: an adapter cannot be read, or fewer than two remain; base models or shapes
                differ.
            OptionError: a value out of range.
            TaskIdError: a name that no task may have.
        """
        _check_memory_options(device, layer_by_layer, chunk_size)
        _check_components(num_components)
        _check_threshold(variance_threshold)
        if on_error not in ("raise", "skip"):
            raise OptionError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        opened = _open_all(adapters, on_error)
        share = cls._fitted(opened, num_components, variance_threshold)
        share.variance_threshold = variance_threshold
        return share

    @classmethod
    def _fitted(
        cls, opened: dict[str, Adapter], num_components: int | str, threshold: float
    ) -> SHAREModel:
        home = TemporaryDirectory(prefix="vllm-vlora-")
        path = Path(home.name) / "0"
        _fit(opened, path, num_components, threshold)
        share = cls(Checkpoint.open(path))
        share._home, share._originals, share._wanted = home, opened, num_components
        share._warn_of_losses(stacklevel=3)
        return share

    def _warn_of_losses(self, stacklevel: int) -> None:
        """Name the adapters that are predicted to lose much, if there are any."""
        losses = Losses.of(self.checkpoint.tasks, self.checkpoint.modules)
        above = Losses(losses.above).to_dict()
        for line in describe_losses(above, "give a larger num_components or variance_threshold"):
            warnings.warn(shown(line), stacklevel=stacklevel + 1)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SHAREModel:
        """Open a checkpoint: ours, lorashare's or vlora's; a folder or a Hub id.

        Another package's checkpoint is converted without loss into a folder of its own, and stays as
        it is.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.

        Examples:
            >>> SHAREModel.from_pretrained(checkpoint).adapter_names
            ['task_0', 'task_1', 'task_2', 'task_3']
        """
        folder = checkpoint_folder(path, foreign=True)
        if detect_kind(folder) not in ("lorashare", "vlora"):
            return cls(Checkpoint.open(folder))
        home = TemporaryDirectory(prefix="vllm-vlora-")
        report = convert(folder, Path(home.name) / "0")
        for line in report.warnings:
            warnings.warn(shown(line), stacklevel=2)
        share = cls(Checkpoint.open(report.path))
        share._home = home
        share._note = f" of what the {report.kind} checkpoint holds; its own loss is not recorded"
        return share

    def save_pretrained(self, output_dir: str | Path, *, force: bool = True) -> None:
        """Write the checkpoint as the folder ``output_dir``, atomically.

        Args:
            force: replace a checkpoint that is there; a folder that holds anything else never is.

        Raises:
            OutputError: the folder may not be replaced or cannot be written.

        Examples:
            >>> SHAREModel.from_adapters(adapter_dirs, num_components=4).save_pretrained(folder / "share")
            >>> sorted(Checkpoint.open(folder / "share").tasks)
            ['task_0', 'task_1', 'task_2', 'task_3']
        """
        self._keep_asked()
        pull_checkpoint(str(self.checkpoint.path), output_dir, force=force)

    def push_to_hub(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool = False,
        *,
        message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload the checkpoint with its model card; see :func:`vllm_vlora.push_checkpoint`.

        Returns:
            The repository's page.

        Raises:
            OptionError: ``repo_id`` is no Hub id. OutputError: the Hub refuses or is out of reach.
        """
        self._keep_asked()
        report = push_checkpoint(
            self.checkpoint.path,
            repo_id,
            private=private,
            message=message,
            revision=revision,
            token=token,
        )
        return report.url

    def _keep_asked(self) -> None:
        """Put what the next fit goes by beside the weights, unless their folder is somebody else's."""
        path = self.checkpoint.path
        if self._owns(path):
            said = {"num_components": self._wanted, "kept_variance": self.variance_threshold}
            write_asked(path, msgspec.structs.replace(read_asked(path), **said))

    # --- what it holds ---------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """The adapters, in their order."""
        return list(self.checkpoint.tasks)

    @property
    def base_model(self) -> str | None:
        """Hub id or path of the base model, as the adapters name it."""
        return self.checkpoint.base_model

    @property
    def num_components(self) -> int:
        """The components of the widest basis; 0 without one."""
        bases = [module.basis for module in self.checkpoint.modules if module.basis is not None]
        return max((max(basis.k_out, basis.k_in) for basis in bases), default=0)

    @property
    def compression_stats(self) -> dict[str, Any]:
        """Sizes and what was kept, under lorashare's names.

        ``compression_ratio`` counts the adapters' LoRA weights at 16 bits each over all bytes of the
        checkpoint's safetensors files; ``*_params`` count numbers. Explained variance of an adapter is
        1 - error^2 with its measured error, ``per_adapter_explained_variance`` each by name.
        """
        checkpoint = self.checkpoint
        shared = sum(_shared_params(module) for module in checkpoint.modules)
        loadings = sum(
            rows * cols
            for record in checkpoint.tasks.values()
            for segment in record.segments
            for rows, cols in segment_sides(segment, checkpoint.modules[segment.module]).values()
        )
        kept = {name: 1 - record.error**2 for name, record in checkpoint.tasks.items()}
        return {
            "original_total_params": checkpoint.original_nbytes // 2,
            "compressed_total_params": shared + loadings,
            "compression_ratio": checkpoint.ratio,
            "shared_component_params": shared,
            "per_adapter_loading_params": loadings,
            "mean_explained_variance": sum(kept.values()) / len(kept),
            "min_explained_variance": min(kept.values()),
            "per_adapter_explained_variance": kept,
        }

    def summary(self) -> None:
        """Print what the checkpoint holds, its sizes, and what it kept of the weight updates.

        Examples:
            >>> SHAREModel.from_adapters(adapter_dirs, num_components=4).summary()
            SHARE checkpoint of 4 adapters: task_0, task_1, task_2, task_3
              Base model:          org/tiny
              Modules:             2
              Components (k):      4
              Ranks:               2 to 2
              ...
        """
        checkpoint, stats = self.checkpoint, self.compression_stats
        ranks = [s.rank for record in checkpoint.tasks.values() for s in record.segments]
        lines = [
            f"SHARE checkpoint of {count_of(len(checkpoint.tasks), 'adapter')}: "
            f"{', '.join(checkpoint.tasks)}",
            f"  Base model:          {self.base_model or 'not recorded'}",
            f"  Modules:             {len(checkpoint.modules)}",
            f"  Components (k):      {self.num_components}",
            f"  Ranks:               {min(ranks)} to {max(ranks)}",
            f"  Original parameters: {stats['original_total_params']:,}",
            f"  Stored parameters:   {stats['compressed_total_params']:,} (shared "
            f"{stats['shared_component_params']:,}, adapters' own "
            f"{stats['per_adapter_loading_params']:,})",
            f"  Original size:       {format_bytes(checkpoint.original_nbytes)} (16 bits each)",
            f"  Stored size:         {format_bytes(checkpoint.nbytes)} (ratio {checkpoint.ratio:.2f})",
            f"  Explained variance:  mean {stats['mean_explained_variance']:.4f}, least "
            f"{stats['min_explained_variance']:.4f}{self._note}",
        ]
        print("\n".join(map(shown, lines)))

    # --- taking adapters out ---------------------------------------------------------------------

    def reconstruct(
        self, adapter_name: str, output_dir: str | Path | None = None, *, force: bool = True
    ) -> dict[str, torch.Tensor]:
        """One adapter as PEFT has it: tensors by PEFT's names, and on request as a folder.

        The factors are float32 and meant for the adapter's own ``adapter_config.json``: of its ranks,
        padded with zeros where fewer are stored, and to be scaled by its alpha / r. Heads come along.

        Args:
            output_dir: also write a PEFT folder, atomically, with the adapter's own config.
            force: replace a folder that holds a PEFT adapter and nothing else.

        Raises:
            TaskNotFoundError: there is no such adapter (a ``KeyError`` as well).
            OutputError: the folder may not be replaced or cannot be written.

        Examples:
            >>> share = SHAREModel.from_adapters(adapter_dirs, num_components=8)
            >>> weights = share.reconstruct("task_0", output_dir=folder / "task_0")
            >>> weights["base_model.model.layers.0.q_proj.lora_A.weight"].shape
            torch.Size([2, 12])
        """
        with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
            target = Path(scratch) / "adapter" if output_dir is None else Path(output_dir)
            written = self._write(adapter_name, target, force)
            return load_file(written / WEIGHTS_FILE)

    def apply(self, base_model: Any, adapter_name: str) -> PeftModel:
        """Put one adapter on a model with PEFT: ``PeftModel.from_pretrained`` of the reconstruction.

        Args:
            base_model: a transformers model. Classifier heads of the adapter replace its own.

        Raises:
            TaskNotFoundError: there is no such adapter.
            OptionError: PEFT is not installed.
        """
        self.checkpoint.record(adapter_name)
        try:
            from peft import PeftModel
        except ImportError as error:
            raise OptionError("apply needs PEFT; pip install 'vllm-vlora[peft]'") from error
        with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
            folder = self._write(adapter_name, Path(scratch) / "adapter", force=False)
            return PeftModel.from_pretrained(base_model, str(folder))

    def reconstruction_error(
        self,
        adapter_name: str,
        original_weights: Mapping[str, torch.Tensor] | None = None,
        original_path: str | Path | None = None,
    ) -> dict[str, Any]:
        """Measure ||delta_W' - delta_W||_F / ||delta_W||_F of every module against the original.

        Of delta_W and not of each factor, since a factor pair may be turned without changing delta_W.

        Args:
            original_weights: tensors by PEFT's names; alpha and ranks are the recorded config's.
            original_path: a PEFT folder or Hub id. Give one of the two.

        Returns:
            ``per_layer``: module -> error; ``mean`` and ``max`` of them.

        Raises:
            AdapterError: the original cannot be read, or adapts other modules.
            OptionError: neither or both were given. TaskNotFoundError: there is no such adapter.
        """
        record = self.checkpoint.record(adapter_name)
        if (original_weights is None) == (original_path is None):
            raise OptionError("give original_weights or original_path, one of them")
        with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
            if original_path is not None:
                original = open_adapter(original_path)
            else:
                assert original_weights is not None
                original = _as_adapter(original_weights, record.adapter_config, Path(scratch))
            original = original.under_names(record.renamed)
            errors = self._errors(self.checkpoint.load_task(adapter_name), original)
        return {
            "per_layer": errors,
            "mean": sum(errors.values()) / len(errors),
            "max": max(errors.values()),
        }

    def _errors(self, task: StoredTask, original: Adapter) -> dict[str, float]:
        if set(task.modules) != set(original.modules):
            name = next(iter(set(task.modules) ^ set(original.modules)))
            raise AdapterError(
                f"{original.path} is not the original of {task.task_id!r}: only one of them adapts "
                f"{name}; name the adapter it was made from"
            )
        errors = {}
        for name, (a, b) in original.iter_factors():
            stored, module = task.modules[name], original.modules[name]
            basis = self._basis(name, stored)
            new_a, new_b = decode(stored, basis)
            if (new_b.shape[0], new_a.shape[1]) != (module.d_out, module.d_in):
                raise AdapterError(
                    f"{original.path}: module {name} is {module.d_out} x {module.d_in}, in the "
                    f"checkpoint {new_b.shape[0]} x {new_a.shape[1]}; name the original adapter"
                )
            lost, norm = relative_error(a, b, module.scale, stored, basis)
            errors[name] = relative(lost, norm)
        return errors

    def _write(self, adapter_name: str, folder: Path, force: bool) -> Path:
        """Write an adapter for its own config where that describes it, else as ``export`` does."""
        record = self.checkpoint.record(adapter_name)
        task = self.checkpoint.load_task(adapter_name)
        config = record.adapter_config
        named = {record.own_name(name): name for name in task.modules}
        if not _fits(config, {own: task.modules[name] for own, name in named.items()}):
            return export_task(
                self.checkpoint, adapter_name, folder, force=force, dtype=torch.float32
            )
        kinds = {module.name: module.kind for module in self.checkpoint.modules}
        factors = {}
        for own, name in named.items():
            stored = task.modules[name]
            factors[own] = _in_config(config, own, *decode(stored, self._basis(name, stored)))
        kinds = {own: kinds[name] for own, name in named.items()}
        kept = read_attached(
            self.checkpoint.path, self.checkpoint.attachments.get(adapter_name, {})
        )
        return write_adapter(
            folder,
            of_new_factors(config),
            factors,
            kinds,
            task.extra,
            companions=kept,
            force=force,
        )

    def _basis(self, name: str, stored: StoredModule) -> Basis | None:
        """What a stored module stands on; the bases are read once and held as they are packed."""
        if stored.is_private:
            return None
        if self._bases is None:
            self._bases = {
                (module, representation): basis
                for module, representation, basis in self.checkpoint.shared()
            }
        return self._bases[name, stored.representation]

    # --- changing adapters -----------------------------------------------------------------------

    def add_adapter(
        self,
        adapter: str | Path,
        name: str | None = None,
        variance_threshold: float | None = None,
        device: str | None = None,
        force_recompute: bool = False,
    ) -> dict[str, Any]:
        """Add an adapter: on the bases as they are if these hold enough of it, else fit anew.

        The new fit starts from the original adapters while this object knows them and they are there,
        and from what is stored otherwise. The others' files stay as they are unless it is made.

        Args:
            adapter: a PEFT folder or Hub id. name: by default the folder's.
            variance_threshold: the least share of ||delta_W||^2 that the bases must hold in every
                module; by default that of :meth:`from_adapters`.
            device: as of :meth:`from_adapters`.
            force_recompute: fit anew in any case.

        Returns:
            ``method``: "projection" or "recompute", ``adapter_name``, and where it was projected
            ``min_explained_variance`` and ``mean_explained_variance`` over the modules.

        Raises:
            AdapterError: it cannot be read, or has another base model or shapes.
            TaskIdError: the name is taken or not allowed.
        """
        _check_memory_options(device, False, None)
        threshold = self.variance_threshold if variance_threshold is None else variance_threshold
        _check_threshold(threshold)
        opened = open_adapter(adapter)
        new = validate_task_id(opened.name if name is None else name)
        check_new(self.checkpoint, [new])
        _check_base_models({"the checkpoint": self.base_model, new: opened.base_model})
        if not force_recompute:
            explained = self._project(new, opened, threshold)
            if explained is not None:
                self._originals[new] = opened
                return {
                    "method": "projection",
                    "adapter_name": new,
                    "min_explained_variance": min(explained),
                    "mean_explained_variance": sum(explained) / len(explained),
                }
        self._refit(new, opened, threshold)
        self._warn_of_losses(stacklevel=2)
        return {"method": "recompute", "adapter_name": new}

    def remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; the bases and the other adapters stay as they are.

        Raises:
            TaskNotFoundError: there is no such adapter. OptionError: it is the last one.

        Examples:
            >>> share = SHAREModel.from_adapters(adapter_dirs, num_components=4)
            >>> share.remove_adapter("task_2")
            >>> share.adapter_names
            ['task_0', 'task_1', 'task_3']
        """
        place = self._place()
        remove_tasks(self.checkpoint.path, [adapter_name], output=place)
        self._originals.pop(adapter_name, None)
        self._adopt(place)

    def _project(self, name: str, adapter: Adapter, threshold: float) -> list[float] | None:
        """Store an adapter's cores and return what each module's basis holds of it; None: too little."""
        [adapter] = under_shared_names([adapter], self.checkpoint.modules)
        cores: dict[str, StoredModule] = {}
        explained, lost, norm = list[float](), 0.0, 0.0
        for module, (a, b) in adapter.iter_factors():
            found = self._core(module, adapter, a, b)
            if found is None:
                return None
            cores[module], module_lost, module_norm = found
            explained.append(1 - module_lost / module_norm if module_norm else 1.0)
            if explained[-1] < threshold:
                return None
            lost, norm = lost + module_lost, norm + module_norm
        place = self._place()
        with edited(self.checkpoint.path, place, force=False) as (old, folder):
            writer = Successor(folder, old)
            writer.keep_bases()
            for task_id in old.tasks:
                writer.copy_task(old, task_id)
            writer.add_task(
                name,
                cores,
                original_nbytes=adapter.original_nbytes,
                error=relative(lost, norm),
                adapter_config=adapter.config,
                source=adapter.name,
                extra=adapter.extra_tensors(),
                renamed=adapter.renamed,
                companions=adapter.companions,
            )
            writer.finish_edited()
        self._adopt(place)
        return explained

    def _core(
        self, name: str, adapter: Adapter, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[StoredModule, float, float] | None:
        """(core, squared loss, squared norm) of a module; None where all tasks share no basis of it."""
        spec = next((s for s in self.checkpoint.modules if s.name == name), None)
        module = adapter.modules[name]
        if (
            spec is None
            or spec.basis is None
            or (spec.d_in, spec.d_out) != (module.d_in, module.d_out)
        ):
            return None
        place = self.checkpoint.modules.index(spec)
        segments = [
            s for r in self.checkpoint.tasks.values() for s in r.segments if s.module == place
        ]
        # Clusters and grown bases: their rows together are no basis that was fitted to all.
        if any(segment.rows is not None for segment in segments):
            return None
        format = FORMAT_OF_DTYPE[module.dtype]
        stored = StoredModule("joint", format, 1, {}, core="factors")
        basis = self._basis(name, stored)
        assert basis is not None
        stored = CoreProjection(basis, FROBENIUS, format, factored=True)(a, b, module.scale)
        return stored, *relative_error(a, b, module.scale, stored, basis)

    def _refit(self, name: str, adapter: Adapter, threshold: float) -> None:
        """Fit all adapters anew, with as many components as were asked for."""
        place = self._place()
        with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
            adapters = {}
            for number, known in enumerate(self.checkpoint.tasks):
                original = self._originals.get(known)
                if original is None or not original.path.is_dir():
                    original = open_adapter(self._write(known, Path(scratch) / str(number), False))
                adapters[known] = original
            adapters[name] = adapter
            wanted = self._wanted or self.num_components or _DEFAULT_COMPONENTS
            _fit(adapters, place, wanted, threshold, self.base_model)
        self._originals[name] = adapter
        self._adopt(place)

    def _place(self) -> Path:
        """A folder for the next checkpoint, which does not exist yet."""
        if self._home is None:
            self._home = TemporaryDirectory(prefix="vllm-vlora-")
        self._edits += 1
        return Path(self._home.name) / str(self._edits)

    def _adopt(self, path: Path) -> None:
        """Go on from the checkpoint at ``path``; an earlier one of this object's own is removed."""
        old = self.checkpoint.path
        self.checkpoint, self._bases = Checkpoint.open(path), None
        if self._owns(old):
            shutil.rmtree(old)

    def _owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this object's own."""
        return self._home is not None and checkpoint.parent == Path(self._home.name)


# --- options --------------------------------------------------------------------------------------


def _check_memory_options(device: str | None, layer_by_layer: bool, chunk_size: int | None) -> None:
    if device not in (None, "auto", "cpu"):
        kind = str(device).partition(":")[0]
        if kind not in ("cuda", "mps", "xpu"):
            raise OptionError(f"unknown device {device!r}; use cpu, or leave it out")
        warnings.warn(
            f"device {device!r} is not used: bases are fitted on the CPU, streaming the adapters",
            stacklevel=3,
        )
    if not isinstance(layer_by_layer, bool):
        raise OptionError(f"layer_by_layer must be True or False, got {layer_by_layer!r}")
    if chunk_size is not None and (not _is_count(chunk_size) or chunk_size < 1):
        raise OptionError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")


def _check_components(num_components: int | str) -> None:
    if num_components != "auto" and (not _is_count(num_components) or int(num_components) < 1):
        raise OptionError(
            f"num_components must be 'auto' or a whole number of at least 1, got {num_components!r}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_threshold(threshold: float) -> None:
    if not (math.isfinite(threshold) and 0 < threshold <= 1):
        raise OptionError(f"variance_threshold must be above 0 and at most 1, got {threshold}")


# --- adapters -------------------------------------------------------------------------------------


def _open_all(
    adapters: Sequence[str | Path] | Mapping[str, str | Path], on_error: str
) -> dict[str, Adapter]:
    """Name -> opened adapter, at least two, of one base model."""
    if isinstance(adapters, str | Path):
        raise OptionError(
            f"adapters is one path ({str(adapters)!r}); give a list or a dict of them"
        )
    named: list[tuple[str | None, str | Path]]
    if isinstance(adapters, Mapping):
        named = list(adapters.items())
    else:
        named = [(None, ref) for ref in adapters]
    opened: dict[str, Adapter] = {}
    for name, ref in named:
        try:
            adapter = open_adapter(ref)
            new = _free_name(adapter.name, opened) if name is None else validate_task_id(name)
        except (AdapterError, TaskIdError) as error:
            if on_error == "raise":
                raise
            warnings.warn(f"left out: {error}", stacklevel=3)
            continue
        opened[new] = adapter
    if len(opened) < 2:
        raise AdapterError(
            f"SHARE needs at least two adapters, got {len(opened)}; one by itself shares nothing"
        )
    _check_base_models({name: adapter.base_model for name, adapter in opened.items()})
    return opened


def _free_name(name: str, taken: Mapping[str, Adapter]) -> str:
    free, number = validate_task_id(name), 1
    while free in taken:
        free = f"{name}_{number}"
        number += 1
    return free


def _check_base_models(models: Mapping[str, str | None]) -> None:
    """Adapters that name different base models do not belong together; no name is no difference."""
    known = {name: model for name, model in models.items() if model is not None}
    first = next(iter(known), None)
    for name, model in known.items():
        if first is not None and model != known[first]:
            raise AdapterError(
                f"{first} is of base model {known[first]!r} and {name} of {model!r}; share adapters "
                "of one base model only"
            )


def _as_adapter(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path
) -> Adapter:
    """Tensors by PEFT's names as an opened adapter with this config."""
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in weights.items()},
              folder / WEIGHTS_FILE)  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(dict(config)), encoding="utf-8")
    return open_adapter(folder)


def _fits(config: Mapping[str, Any], modules: Mapping[str, StoredModule]) -> bool:
    """Whether a config gives every stored module a rank that holds it, and a scale to divide by."""
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        return False
    if not isinstance(config.get("lora_alpha"), int | float):
        return False
    return all(
        stored.rank <= lora_rank(config, name)
        and lora_scale(config, name, lora_rank(config, name))[1]
        for name, stored in modules.items()
    )


def _in_config(config: Mapping[str, Any], name: str, a: torch.Tensor, b: torch.Tensor) -> Factors:
    """delta_W = B A as factors of the config's rank, to be multiplied with its scale."""
    rank = lora_rank(config, name)
    missing, scale = rank - a.shape[0], lora_scale(config, name, rank)[1]
    a = torch.nn.functional.pad(a, (0, 0, 0, missing))
    return a, torch.nn.functional.pad(b / scale, (0, missing))


# --- fitting --------------------------------------------------------------------------------------


def _fit(
    adapters: Mapping[str, Adapter],
    path: Path,
    num_components: int | str,
    threshold: float,
    base_model: str | None = None,
) -> None:
    """Compress adapters onto shared bases into the checkpoint folder ``path``."""
    collection = Collection(adapters)
    linear = [module for module in collection.modules.values() if module.kind == "linear"]
    if not linear:
        raise AdapterError("the adapters have no linear module to share a basis of")
    if isinstance(num_components, str):
        k = max(_enough_components(collection, module, threshold) for module in linear)
    else:
        k = _existing(num_components, linear)
    options = CompressOptions(representation="factored", num_components=k)
    compress(adapters, path, options, base_model=base_model)


def _existing(k: int, modules: Sequence[Module]) -> int:
    """k, or all components that there are where it is more."""
    most = max(map(directions, modules))
    if k > most:
        warnings.warn(
            f"num_components is {k}, but the adapters' updates have {most} directions at most; all "
            "of them are kept, so that nothing is lost",
            stacklevel=5,
        )
    return min(k, most)


def _enough_components(collection: Collection, module: Module, threshold: float) -> int:
    """The least k whose bases hold ``threshold`` of the adapters' unit-normalised energy."""

    def read() -> Any:
        return collection.read_module(module)

    total = sum(squared_norm(a, b, scale) > 0 for a, b, scale in read())
    most = directions(module)
    width = min(_FIRST_WIDTH, most)
    while True:
        captured = fit_module(read, module.d_in, module.d_out, width).energy.cumsum(0).cumsum(1)
        k_out, k_in = captured.shape
        held = [float(captured[min(k, k_out) - 1, min(k, k_in) - 1]) for k in range(1, width + 1)]
        # Energies are float32 sums: all of it may come out a rounding short.
        enough = [k for k, value in enumerate(held, 1) if value >= threshold * total * (1 - 1e-5)]
        if enough or width == most:
            return enough[0] if enough else most
        width = min(2 * width, most)


def _shared_params(module: Any) -> int:
    """Numbers in what the tasks of a module share."""
    basis, flat = module.basis, module.flat
    count = 0
    if basis is not None:
        count += basis.k_out * module.d_out + basis.k_in * module.d_in
    if flat is not None:
        count += flat.rank * ((flat.k_out + 1) * module.d_out + (flat.k_in + 1) * module.d_in)
    return count
