"""Turn checkpoints of vlora and of lorashare into ours, without losing anything.

A vlora checkpoint is our ``flat`` representation: components and loadings are taken over as they are,
B and its components transposed. A lorashare checkpoint is our ``joint`` one with cores in factor form:
components become the basis, loadings the factors, and alpha / r of each adapter its scale. Every
number is kept bit for bit; what is reconstructed differs from the other package's answer only by the
order in which float32 products are summed.

Components that vlora packed in NF4 are stored as float32 values, which hold ``codebook value * scale``
exactly: its codebook is rounded to four digits, its blocks run across the rows of our matrices, and its
means are not packed at all, so that no packed format of ours means the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_vlora.adapters.collection import Progress
from vllm_vlora.adapters.peft_config import rank_options
from vllm_vlora.atomic import check_apart, publish_folder
from vllm_vlora.checkpoint.card import format_bytes, model_card
from vllm_vlora.checkpoint.carried import keep_beside
from vllm_vlora.checkpoint.components import write_asked
from vllm_vlora.checkpoint.layout import basis_nbytes
from vllm_vlora.checkpoint.losses import Losses
from vllm_vlora.checkpoint.manifest import is_checkpoint
from vllm_vlora.checkpoint.own_files import checkpoint_files
from vllm_vlora.checkpoint.report import report_contents
from vllm_vlora.checkpoint.sources import checkpoint_folder
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import CheckpointError, OptionError
from vllm_vlora.foreign.lorashare_files import CONFIG_FILE as SHARE_CONFIG_FILE
from vllm_vlora.foreign.lorashare_files import LoraShareFiles, ShareAdapter
from vllm_vlora.foreign.vlora_files import META_FILE, VLoRAFiles
from vllm_vlora.quantize import FORMAT_OF_DTYPE, pack
from vllm_vlora.representations.flat import encode_flat
from vllm_vlora.representations.spec import fits_float32
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule
from vllm_vlora.wording import some_of


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion found and wrote.

    Attributes:
        kind: ``vlora`` or ``lorashare``. path: the checkpoint written.
        task_ids: its tasks. modules: how many modules they adapt.
        representation: ``flat`` or ``joint``. format: of the numbers, ``mixed`` if there are several.
        source_nbytes, nbytes: the safetensors files before and after, classifier heads left out.
        original_nbytes: the adapters' LoRA weights at 16 bits each.
        warnings: one line each. losses: tasks that must be named; a conversion itself loses nothing.
    """

    kind: str
    path: Path
    task_ids: list[str]
    modules: int
    representation: str
    format: str
    source_nbytes: int
    nbytes: int
    original_nbytes: int
    warnings: list[str] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)


def detect_kind(folder: str | Path) -> str | None:
    """``vlora``, ``lorashare`` or ``vllm-vlora`` by the files in a folder; None for anything else."""
    folder = Path(folder)
    if is_checkpoint(folder):
        return "vllm-vlora"
    if (folder / META_FILE).is_file():
        return "vlora"
    return "lorashare" if (folder / SHARE_CONFIG_FILE).is_file() else None


def convert(
    source: str | Path,
    output: str | Path,
    *,
    alpha: float | None = None,
    base_model: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a checkpoint of vlora (0.3, 1.0) or lorashare (0.1) into ours, losslessly.

    Each delta_W (d_out x d_in) is what the other package's factors give, times the scale of the task:
    of lorashare the adapter's own alpha / r; of vlora ``alpha`` / rank, or 1, as it keeps no alpha.
    Holds one layer's basis and one task in memory.

    Args:
        source: a folder or a Hub id. output: the checkpoint folder to publish.
        alpha: for vlora: the ``lora_alpha`` that its adapters were trained with.
        base_model: recorded as the base model; vlora does not say, lorashare may.
        force: replace a checkpoint of ours at ``output``.
        progress: called with (stage, done, total).

    Raises:
        CheckpointError: there is no checkpoint of either package, or it is damaged.
        AdapterError: an adapter's config has no exact low-rank form.
        OptionError: an alpha that is no number, or one for lorashare.
        OutputError: ``output`` may not be replaced or cannot be written.
        TaskIdError: a task's name is not allowed.

    Examples:
        >>> report = convert(vlora_checkpoint, folder / "ckpt", alpha=32)
        >>> report.kind, report.representation, report.task_ids
        ('vlora', 'flat', ['cola', 'mrpc', 'rte', 'team/wnli'])
    """
    folder = checkpoint_folder(source, foreign=True)
    kind = detect_kind(folder)
    if kind not in ("vlora", "lorashare"):
        raise CheckpointError(_nothing_to_convert(folder, kind))
    if alpha is not None and (kind == "lorashare" or not fits_float32(alpha) or alpha == 0):
        raise OptionError(
            f"alpha is {alpha}, but lorashare keeps each adapter's own; leave alpha out"
            if kind == "lorashare"
            else f"alpha must be a number other than zero that float32 holds, got {alpha}"
        )
    check_apart(output, [folder])
    with publish_folder(output, force=force, owned=checkpoint_files) as target:
        conversion: _FromVLoRA | _FromLoraShare
        if kind == "vlora":
            conversion = _FromVLoRA(VLoRAFiles.open(folder), alpha, base_model)
        else:
            conversion = _FromLoraShare(LoraShareFiles.open(folder), base_model)
        writer = CheckpointWriter(target, conversion.base_model)
        conversion.write(writer, progress or (lambda *_: None))
        contents = report_contents(
            target, writer.tasks, writer.modules, basis_nbytes(writer.modules)
        )
        writer.finish(model_card(writer.base_model, contents) + _card_note(kind))
        keep_beside(Path(output).expanduser(), target, writer.tasks)
        write_asked(target, conversion.asked)
    return ConvertReport(
        kind,
        Path(output),
        list(writer.tasks),
        len(writer.modules),
        contents.representation,
        contents.format,
        conversion.nbytes,
        contents.nbytes,
        contents.original_nbytes,
        conversion.warnings(contents.nbytes),
        contents.losses,
    )


def _nothing_to_convert(folder: Path, kind: str | None) -> str:
    if kind is not None:
        return f"{folder} is a vllm-vlora checkpoint already; there is nothing to convert"
    return (
        f"{folder} is no checkpoint of vlora ({META_FILE}) or lorashare ({SHARE_CONFIG_FILE}); to "
        "store adapters, use `vllm-vlora compress`"
    )


def _card_note(kind: str) -> str:
    return (
        f"\n## Converted\n\nFrom a {kind} checkpoint, without loss. The errors above are measured "
        "against that checkpoint; what compressing had lost before is not recorded.\n"
    )


class _FromVLoRA:
    """vlora's components and loadings as flat bases and flat tasks."""

    def __init__(self, files: VLoRAFiles, alpha: float | None, base_model: str | None) -> None:
        if not files.task_ids:
            raise CheckpointError(f"{files.path} has no tasks; there is nothing to convert")
        self.base_model = base_model
        self.asked = files.asked
        self._files, self._alpha = files, alpha
        self._ranks: dict[str, int] = {}
        self._original_nbytes = 0

    @property
    def nbytes(self) -> int:
        """Of the source."""
        return self._files.nbytes

    def write(self, writer: CheckpointWriter, progress: Progress) -> None:
        """Write modules and tasks."""
        files = self._files
        for done, name in enumerate(files.layer_names, 1):
            self._write_module(writer, name)
            progress("bases", done, len(files.layer_names))
        config = self._config()
        for done, task_id in enumerate(files.task_ids, 1):
            writer.add_task(
                task_id,
                {name: self._stored(name, *pair) for name, pair in files.loadings(task_id).items()},
                original_nbytes=self._original_nbytes,
                error=0.0,
                adapter_config=config,
            )
            progress("tasks", done, len(files.task_ids))

    def warnings(self, nbytes: int) -> list[str]:
        """What the user should know; ``nbytes`` were written."""
        found = []
        if self._alpha is None:
            found.append(
                "vlora keeps no alpha, so delta_W is B A as it reconstructs it; if the adapters had "
                "alpha other than rank, convert the folder with it: vllm-vlora convert --alpha ALPHA"
            )
        if self._files.packed:
            found.append(
                f"the NF4-packed components ({format_bytes(self.nbytes)} in all) are kept exactly, as "
                f"float32 ({format_bytes(nbytes)}); for a small checkpoint, compress the original "
                "adapters"
            )
        return found

    def _write_module(self, writer: CheckpointWriter, name: str) -> None:
        layer = self._files.layer(name)
        v = torch.cat([layer.mean_a[None], layer.components_a]).flatten(0, 1)
        u = torch.cat([layer.mean_b[None], layer.components_b]).flatten(0, 1)
        format = _common_format([v, u])
        flat = FlatBasis(pack(u, format), pack(v, format), layer.rank)
        writer.add_module(name, v.shape[1], u.shape[1], flat=flat)
        self._ranks[name] = layer.rank
        self._original_nbytes += 2 * layer.rank * (v.shape[1] + u.shape[1])

    def _stored(self, name: str, a: torch.Tensor, b: torch.Tensor) -> StoredModule:
        rank = self._ranks[name]
        stored = encode_flat(a, b, _common_format([a, b]), rank)
        return stored if self._alpha is None else replace(stored, scale=self._alpha / rank)

    def _config(self) -> dict[str, Any]:
        """An ``adapter_config.json`` that describes the factors; vlora keeps none."""
        pairs = {n: (r, r if self._alpha is None else self._alpha) for n, r in self._ranks.items()}
        return rank_options(pairs) | {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "target_modules": self._files.layer_names,
        }


class _FromLoraShare:
    """lorashare's components as bases, its loadings as cores in factor form."""

    def __init__(self, files: LoraShareFiles, base_model: str | None) -> None:
        self.base_model = base_model or files.base_model
        self.asked = files.asked
        self._files = files
        # (what, why) -> the adapters that lost it.
        self._lost: dict[tuple[str, str], list[str]] = {}

    @property
    def nbytes(self) -> int:
        """Of the source."""
        return self._files.nbytes

    def write(self, writer: CheckpointWriter, progress: Progress) -> None:
        """Write modules and tasks."""
        files, shapes = self._files, dict[str, tuple[int, int]]()
        for done, name in enumerate(files.layer_names, 1):
            u, v = files.components(name)
            format = _common_format([u, v])
            shapes[name] = (v.shape[1], u.shape[1])
            writer.add_module(name, *shapes[name], basis=Basis(pack(u, format), pack(v, format)))
            progress("bases", done, len(files.layer_names))
        for done, name in enumerate(files.adapter_names, 1):
            adapter = files.adapter(name)
            self._note_losses(name, adapter)
            modules = {
                layer: _core(a, b, adapter.scales[layer])
                for layer, (a, b) in adapter.loadings.items()
            }
            writer.add_task(
                name,
                modules,
                original_nbytes=_original_nbytes(adapter, shapes),
                error=0.0,
                adapter_config=adapter.config,
                source=Path(adapter.source).name,
                extra=adapter.extra,
            )
            progress("tasks", done, len(files.adapter_names))

    def warnings(self, nbytes: int) -> list[str]:
        """What the user should know."""
        return [
            f"{lost} of {some_of(map(repr, names))} is missing: {reason}; compress the original "
            "adapters to have them whole"
            for (lost, reason), names in self._lost.items()
        ]

    def _note_losses(self, name: str, adapter: ShareAdapter) -> None:
        """What lorashare dropped in silence when it wrote the checkpoint."""
        targets = adapter.config.get("target_modules")
        for target in targets if isinstance(targets, list) else []:
            if not any(f".{layer}".endswith(f".{target}") for layer in self._files.layer_names):
                reason = "lorashare drops LoRA on embeddings"
                self._lost.setdefault((f"LoRA on {target}", reason), []).append(name)
        saved = adapter.config.get("modules_to_save")
        if saved and not adapter.extra:
            reason = "lorashare 0.1.0 drops classifier heads"
            heads = ", ".join([saved] if isinstance(saved, str) else map(str, saved))
            self._lost.setdefault((f"module {heads}", reason), []).append(name)


def _core(a: torch.Tensor, b: torch.Tensor, scale: float) -> StoredModule:
    """Loadings (k_in, r) and (k_out, r) as the factors of a core, bit for bit."""
    format = _common_format([a, b])
    matrices = {"A": pack(a.T.contiguous(), format), "B": pack(b.T.contiguous(), format)}
    return StoredModule("joint", format, a.shape[1], matrices, scale, core="factors")


def _original_nbytes(adapter: ShareAdapter, shapes: Mapping[str, tuple[int, int]]) -> int:
    return 2 * sum(a.shape[1] * sum(shapes[layer]) for layer, (a, _) in adapter.loadings.items())


def _common_format(tensors: Sequence[torch.Tensor]) -> str:
    """The number format that holds all of these exactly."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return FORMAT_OF_DTYPE[dtype]
