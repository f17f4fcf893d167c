"""Compress a collection of adapters into one checkpoint, under a budget, by measured error.

The adapters are streamed: every pass reads them module by module (or task by task) and keeps
numbers only. Fitted bases and encoded cores wait in the unpublished output folder, not in memory.

    measure   error of every (task, module) at every rank and format, stored privately
    fit       a shared basis of every module, and the error of every task at every width of it
    plan      ranks, widths and formats that meet the budget, for each representation
    encode    the best joint plan for real, with its real errors
    write     the better plan, task by task, with errors measured on the packed numbers
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from vllm_vlora.adapters import Adapter
from vllm_vlora.atomic import publish_folder
from vllm_vlora.card import model_card
from vllm_vlora.checkpoint import (
    BASIS_SHARD_BYTES,
    EXTRA_PREFIX,
    Basis,
    BasisSpec,
    CheckpointWriter,
    ModuleSpec,
    Segment,
    StoredModule,
    TaskRecord,
    basis_nbytes,
    is_checkpoint,
    safetensors_nbytes,
    task_tensor_sizes,
)
from vllm_vlora.errors import AdapterError, BudgetError, OptionError
from vllm_vlora.fit import Factors, fit_bases
from vllm_vlora.plan import (
    JointMeter,
    JointOption,
    Point,
    PrivateCurve,
    PrivateOption,
    build_path,
    cheapest_within,
    component_grid,
    core_shape,
    dual_rows,
    fit_to_budget,
    joint_losses,
    joint_nbytes,
    measure_private,
    shortest_prefix,
    squared_norm,
    trim,
)
from vllm_vlora.quantize import FLOAT_DTYPES, PackedMatrix, pack, row_nbytes
from vllm_vlora.representations import (
    balanced_svd,
    encode_joint,
    encode_private,
    relative_error,
)
from vllm_vlora.task_ids import validate_task_id

Progress = Callable[[str, int, int], None]

REPRESENTATION_CHOICES = ("auto", "joint", "private")
QUANTIZE_CHOICES = ("auto", "none", "int8", "nf4")
DEFAULT_RATIO = 3.5
"""The ratio when nothing is asked for: NF4 at full rank, 4.5 bits for 16, fits with its headers."""

_OWN = "own"
_MIXED = "mixed"
_FORMAT_OF_DTYPE = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
# Fits are made somewhat wider than a module's even share of the budget, since a module that gains
# more per byte than the others gets more than its share.
_SHARE_SLACK = 4
# Planned errors equal measured ones up to float64 rounding; the margin keeps a promise exact.
_MARGIN = 1e-6
_ENCODE_ATTEMPTS = 8
_CLEARLY = 0.98
# Generous for the four entries by which an nf4-dq task file's header exceeds an nf4 one's.
_DOUBLE_QUANTIZE_HEADER = 2048


# --- options and report --------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressOptions:
    """What to compress to. At most one of ``ratio``, ``max_error``, ``num_components``.

    Attributes:
        representation: ``joint``, ``private``, or ``auto``, which plans both, measures both and
            keeps the better: the lower root-mean-square error of the tasks, or under ``max_error``
            the fewer bytes.
        ratio: the originals' LoRA weights at 16 bits each over all bytes of the checkpoint's
            safetensors files (without classifier heads and the like) is to be at least this. One or
            less sets no limit. Default 3.5, unless one of the others is given.
        max_error: ||delta_W' - delta_W||_F / ||delta_W||_F of the worst task is to be at most this,
            in as few bytes as possible.
        num_components: k of every shared basis, cut to what a module can have; implies ``joint``.
            Sets no limit on bytes, so that ``quantize`` auto then means none.
        quantize: number format of private factors and shared bases. ``none`` is the adapters' own
            dtype; ``auto`` chooses by measured error among that, bfloat16, int8 and NF4.
        double_quantize: NF4 may store its scales in 8 bits.
        dtype: ``float32``, ``float16`` or ``bfloat16`` in place of the adapters' own dtype, and for
            the cores of ``joint``.
        seed: of the fit's random start.

    Raises:
        OptionError: unknown, out of range or contradictory values.
    """

    representation: str = "auto"
    ratio: float | None = None
    max_error: float | None = None
    num_components: int | None = None
    quantize: str = "auto"
    double_quantize: bool = True
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("representation", self.representation, REPRESENTATION_CHOICES)
        _check_choice("quantize", self.quantize, QUANTIZE_CHOICES)
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, tuple(FLOAT_DTYPES))
        budgets = {
            "ratio": self.ratio,
            "max_error": self.max_error,
            "num_components": self.num_components,
        }
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} contradict each other; give only one of them")
        if self.ratio is not None and not (math.isfinite(self.ratio) and self.ratio > 0):
            raise OptionError(f"ratio must be a positive number, got {self.ratio}")
        if self.max_error is not None and not (
            math.isfinite(self.max_error) and self.max_error >= 0
        ):
            raise OptionError(f"max_error must be zero or more, got {self.max_error}")
        if self.num_components is not None and self.num_components < 1:
            raise OptionError(f"num_components must be at least 1, got {self.num_components}")
        if self.num_components is not None and self.representation == "private":
            raise OptionError(
                "num_components is the width of a shared basis, which private has none of; "
                "use joint, or give a ratio"
            )
        if (
            self.dtype is not None
            and self.representation == "private"
            and self.quantize in ("int8", "nf4")
        ):
            raise OptionError(
                f"dtype {self.dtype} has no effect on private factors in {self.quantize}; "
                "leave it out, or quantize none"
            )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"unknown {name} {value!r}; use one of {', '.join(allowed)}")


class Candidate(NamedTuple):
    """A plan that was considered: its exact bytes, and the tasks' relative errors under it.

    ``format`` is that of private factors or of the bases: a number format, ``own`` where adapters
    of several dtypes each keep theirs, or ``mixed`` where every module has the one that suits it.
    """

    representation: str
    format: str
    nbytes: int
    mean_error: float
    worst_error: float


@dataclass
class TaskReport:
    """What became of one task.

    ``ranks`` is the least and the greatest rank kept of its modules, ``nbytes`` its file without
    extra tensors, ``error`` the measured ||delta_W' - delta_W||_F / ||delta_W||_F over all modules.
    """

    task_id: str
    source: str
    ranks: tuple[int, int]
    original_nbytes: int
    nbytes: int
    error: float
    representation: str
    format: str


@dataclass
class CompressReport:
    """What ``compress`` did: sizes of the files, and errors measured on what they hold."""

    path: Path
    tasks: list[TaskReport]
    representation: str
    format: str
    original_nbytes: int
    nbytes: int
    basis_nbytes: int
    candidates: list[Candidate]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """``original_nbytes / nbytes``."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.inf

    @property
    def mean_error(self) -> float:
        """Mean of the tasks' errors."""
        return sum(task.error for task in self.tasks) / len(self.tasks)

    @property
    def worst_error(self) -> float:
        """The greatest of the tasks' errors."""
        return max(task.error for task in self.tasks)

    @property
    def rms_error(self) -> float:
        """Root mean square of the tasks' errors, which ``auto`` compares."""
        return math.sqrt(sum(task.error**2 for task in self.tasks) / len(self.tasks))


def compress(
    adapters: Mapping[str, Adapter],
    output: str | Path,
    options: CompressOptions | None = None,
    *,
    force: bool = False,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress adapters (task id -> opened adapter) into the checkpoint folder ``output``.

    Memory is one module's factors and bases, one task and planning numbers; the adapters are read
    several times. The folder appears complete or not at all.

    Args:
        adapters: in the order in which the checkpoint is to list them.
        force: replace an existing checkpoint.
        base_model: overrides what the adapters' configs name.
        progress: called with (stage, done, total); stages are measure, fit, encode and write.

    Raises:
        AdapterError: no adapters, two that contradict each other, or weights that are not finite.
        BudgetError: no allowed plan meets the budget; says how near one can get.
        OutputError: ``output`` exists and is not to be replaced, or cannot be written.
        TaskIdError: a task id that is not allowed.
    """
    started = time.monotonic()
    options = options or CompressOptions()
    collection = _Collection(adapters)
    warnings: list[str] = []
    base_model = base_model or _common_base_model(adapters, warnings)
    with publish_folder(output, force=force, owned=is_checkpoint) as folder:
        scratch = folder / ".scratch"
        scratch.mkdir()
        job = _Compression(collection, options, scratch, progress or (lambda *_: None))
        chosen = job.choose()
        report = job.write(chosen, folder, base_model, Path(output), warnings)
        report.seconds = time.monotonic() - started
        shutil.rmtree(scratch)
        job.finish(report, base_model)
    report.seconds = time.monotonic() - started
    return report


def _common_base_model(adapters: Mapping[str, Adapter], warnings: list[str]) -> str | None:
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for task_id, adapter in adapters.items():
        if adapter.base_model is not None:
            counts[adapter.base_model] += 1
            first.setdefault(adapter.base_model, task_id)
    if not counts:
        return None
    common = counts.most_common(1)[0][0]
    if len(counts) > 1:
        named = ", ".join(f"{model} (task {first[model]!r})" for model in list(counts)[:5])
        warnings.append(
            f"the adapters name different base models: {named}; recorded as {common}. If they are "
            "not copies of one model, compress them apart"
        )
    return common


# --- the collection ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """A module that some tasks adapt; ``tasks`` and ``ranks`` run in parallel."""

    index: int
    name: str
    d_in: int
    d_out: int
    kind: str
    tasks: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def original_nbytes(self) -> int:
        return 2 * sum(self.ranks) * (self.d_in + self.d_out)

    @property
    def total_rank(self) -> int:
        return sum(min(rank, self.d_in, self.d_out) for rank in self.ranks)


class _Collection:
    """The adapters by number, and the union of their modules by name."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        if not adapters:
            raise AdapterError("there are no adapters to compress; name at least one")
        self.task_ids = [validate_task_id(task_id) for task_id in adapters]
        self.adapters = list(adapters.values())
        self.original_nbytes = sum(adapter.original_nbytes for adapter in self.adapters)
        self.modules = self._unite()

    def _unite(self) -> dict[str, _Module]:
        holders: dict[str, list[int]] = {}
        for task, adapter in enumerate(self.adapters):
            if not adapter.modules:
                raise AdapterError(
                    f"task {self.task_ids[task]!r} has no LoRA modules; leave it out"
                )
            for name in adapter.modules:
                holders.setdefault(name, []).append(task)
        return {
            name: self._module(index, name, holders[name])
            for index, name in enumerate(sorted(holders))
        }

    def _module(self, index: int, name: str, tasks: list[int]) -> _Module:
        parts = [self.adapters[task].modules[name] for task in tasks]
        first, dtype = parts[0], parts[0].dtype
        for task, part in zip(tasks, parts):
            if (part.d_in, part.d_out, part.kind) != (first.d_in, first.d_out, first.kind):
                raise AdapterError(
                    f"module {name} is a {first.d_out} x {first.d_in} {first.kind} in task "
                    f"{self.task_ids[tasks[0]]!r} and a {part.d_out} x {part.d_in} {part.kind} in "
                    f"task {self.task_ids[task]!r}; compress adapters of one base model only"
                )
            dtype = torch.promote_types(dtype, part.dtype)
        return _Module(
            index,
            name,
            first.d_in,
            first.d_out,
            first.kind,
            tuple(tasks),
            tuple(part.rank for part in parts),
            dtype,
        )

    def read_module(self, module: _Module) -> Iterator[Factors]:
        """Every task's (A, B, scale) of one module, in the order of ``module.tasks``."""
        for task in module.tasks:
            adapter = self.adapters[task]
            a, b = adapter.factors(module.name)
            yield a, b, adapter.modules[module.name].scale

    def read_task(self, task: int, names: Sequence[str]) -> Iterator[tuple[str, Factors]]:
        """(module name, (A, B, scale)) of one task, in the order of ``names``."""
        adapter = self.adapters[task]
        for name, (a, b) in adapter.iter_factors(names):
            yield name, (a, b, adapter.modules[name].scale)

    @contextmanager
    def naming(self, task: int, module: str) -> Iterator[None]:
        """Turn a value that cannot be packed into an error that names where it stands."""
        try:
            yield
        except ValueError as error:
            raise AdapterError(f"task {self.task_ids[task]!r}, module {module}: {error}") from error


# --- plans ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PrivateEntry:
    """A thing to choose: how one module of one task is stored privately."""

    task: int
    module: _Module
    curves: Sequence[PrivateCurve]
    weight: float

    def option(self, number: int) -> PrivateOption:
        """The options of all curves, one curve after another."""
        for curve in self.curves:
            if number < curve.count:
                return curve.option(number)
            number -= curve.count
        raise IndexError(number)

    def points(self) -> list[Point]:
        return [point for curve in self.curves for point in curve.points(self.weight)]

    def best(self) -> int:
        """The option that loses least; the adapter's own factors where nothing loses less."""
        options = [self.option(number) for number in range(sum(c.count for c in self.curves))]
        return min(range(len(options)), key=lambda i: (options[i].loss, not options[i].original, i))

    def add_losses(self, option: int, losses: list[float]) -> None:
        losses[self.task] += self.option(option).loss * self.weight

    def put(self, option: int, plan: Plan) -> int:
        chosen = self.option(option)
        plan.private[self.task, self.module.name] = chosen
        return chosen.nbytes


@dataclass(frozen=True)
class _JointEntry:
    """A thing to choose: the width of one module's basis.

    ``losses`` is (tasks of the module, options), relative to each task's whole delta_W.
    """

    module: _Module
    joint_options: Sequence[JointOption]
    core_format: str
    losses: torch.Tensor

    def _nbytes(self, option: JointOption) -> int:
        module = self.module
        return joint_nbytes(option, module.d_out, module.d_in, module.ranks, self.core_format)

    def points(self) -> list[Point]:
        losses = self.losses.sum(dim=0).tolist()
        return [(self._nbytes(o), loss) for o, loss in zip(self.joint_options, losses)]

    def best(self) -> int:
        points = self.points()
        return min(range(len(points)), key=lambda i: (points[i][1], points[i][0]))

    def add_losses(self, option: int, losses: list[float]) -> None:
        for task, loss in zip(self.module.tasks, self.losses[:, option].tolist()):
            losses[task] += loss

    def put(self, option: int, plan: Plan) -> int:
        chosen = self.joint_options[option]
        plan.joint[self.module.name] = (chosen, self.core_format)
        return self._nbytes(chosen)


_Entry = _PrivateEntry | _JointEntry


@dataclass
class Plan:
    """A choice for every module of every task.

    Attributes:
        private: (task number, module name) -> option. joint: module name -> (basis, core format).
        losses: of each task, ||delta_W' - delta_W||_F^2 / ||delta_W||_F^2.
        data_nbytes: of the tensors. nbytes: of the files, headers included.
    """

    representation: str
    format: str
    private: dict[tuple[int, str], PrivateOption] = field(default_factory=dict)
    joint: dict[str, tuple[JointOption, str]] = field(default_factory=dict)
    losses: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    data_nbytes: int = 0
    nbytes: int = 0

    @property
    def rms_error(self) -> float:
        """Root mean square of the tasks' relative errors."""
        return math.sqrt(float(self.losses.mean()))

    @property
    def worst_error(self) -> float:
        """The greatest relative error of a task."""
        return math.sqrt(float(self.losses.max()))

    def candidate(self) -> Candidate:
        """The plan's line in the report."""
        return Candidate(
            self.representation,
            self.format,
            self.nbytes,
            float(self.losses.sqrt().mean()),
            self.worst_error,
        )


@dataclass
class _Chosen:
    plan: Plan
    candidates: list[Candidate]
    cores: _CoreSpool | None = None


class _CoreSpool:
    """Encoded cores on disk: written module by module, read back task by task."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._entries: dict[int, list[tuple[str, int, StoredModule]]] = {}

    def append(self, task: int, module: str, stored: StoredModule) -> None:
        data = safetensors.torch.save(
            {side: matrix.parts["values"] for side, matrix in stored.matrices.items()}
        )
        with (self._folder / str(task)).open("ab") as file:
            file.write(data)
        bare = replace(stored, matrices={})
        self._entries.setdefault(task, []).append((module, len(data), bare))

    def read(self, task: int) -> dict[str, StoredModule]:
        entries = self._entries.get(task)
        if not entries:
            return {}
        modules = {}
        with (self._folder / str(task)).open("rb") as file:
            for module, size, bare in entries:
                tensors = safetensors.torch.load(file.read(size))
                matrices = {
                    side: PackedMatrix(
                        bare.format, values.shape[0], values.shape[1], {"values": values}
                    )
                    for side, values in tensors.items()
                }
                modules[module] = replace(bare, matrices=matrices)
        return modules


# --- the work ------------------------------------------------------------------------------------


class _Compression:
    """One run: measures, plans, encodes and writes."""

    def __init__(
        self, collection: _Collection, options: CompressOptions, scratch: Path, progress: Progress
    ) -> None:
        self.collection = collection
        self.options = options
        self.scratch = scratch
        self.progress = progress
        self.labels = self._format_labels()
        self.representation = options.representation
        if options.num_components is not None:
            self.representation = "joint"
        self.joint_modules = self._find_joint_modules()
        self.curves: dict[tuple[int, str], list[tuple[str, PrivateCurve]]] = {}
        self.norms: dict[tuple[int, str], float] = {}
        self.joint_losses: dict[tuple[str, str], torch.Tensor] = {}
        self.grids: dict[str, list[int]] = {}
        self.widths: dict[str, tuple[int, int]] = {}
        self._weights: list[float] | None = None
        self._failures: list[tuple[float, str]] = []

    # -- what there is to choose from

    def _format_labels(self) -> list[str]:
        """The formats to try. The label ``own`` stands for each module's own dtype."""
        nf4 = self._nf4_formats()
        quantize = self.options.quantize
        if quantize == "auto" and self.options.num_components is not None:
            quantize = "none"
        labels = {"none": [_OWN], "int8": ["int8"], "nf4": nf4}.get(
            quantize, [_OWN, "bfloat16", "int8", *nf4]
        )
        own = {self._resolve(_OWN, module.dtype) for module in self.collection.modules.values()}
        if len(own) == 1:
            labels = [own.copy().pop() if label == _OWN else label for label in labels]
        return list(dict.fromkeys(labels))

    def _nf4_formats(self) -> list[str]:
        """The NF4 formats worth a try.

        Scales in 8 bits cost next to no error, but their file headers name two parts more a side:
        plain NF4 is only the smaller for tiny adapters or narrow matrices.
        """
        if not self.options.double_quantize:
            return ["nf4"]
        saved = sum(
            sum(module.ranks) * (row_nbytes("nf4", d) - row_nbytes("nf4-dq", d))
            for module in self.collection.modules.values()
            for d in (module.d_in, module.d_out)
        )
        if saved > _DOUBLE_QUANTIZE_HEADER * len(self.collection.adapters):
            return ["nf4-dq"]
        return ["nf4-dq", "nf4"]

    def _resolve(self, label: str, dtype: torch.dtype) -> str:
        """The number format that a label means for factors of this dtype."""
        if label != _OWN:
            return label
        return self.options.dtype or _FORMAT_OF_DTYPE[dtype]

    def _core_format(self, basis_format: str) -> str:
        if self.options.dtype is not None:
            return self.options.dtype
        return "float32" if basis_format == "float32" else "bfloat16"

    def _find_joint_modules(self) -> list[_Module]:
        """Linear modules that two tasks adapt: of one task a basis is a detour over its factors.

        Whoever asks for joint, or for a number of components, gets bases all the same.
        """
        if self.representation == "private":
            return []
        linear = [m for m in self.collection.modules.values() if m.kind == "linear"]
        shared = [module for module in linear if len(module.tasks) > 1]
        if self.representation == "auto":
            return shared
        chosen = linear if self.options.num_components is not None or not shared else shared
        if not chosen:
            raise OptionError(
                "joint needs a linear module, and these adapters have none; use private"
            )
        return chosen

    @property
    def _byte_limit(self) -> int | None:
        """Bytes that all files may take; None without a limit."""
        if self.options.max_error is not None or self.options.num_components is not None:
            return None
        ratio = DEFAULT_RATIO if self.options.ratio is None else self.options.ratio
        return None if ratio <= 1 else math.floor(self.collection.original_nbytes / ratio)

    @property
    def _loss_limit(self) -> float | None:
        if self.options.max_error is None:
            return None
        return (self.options.max_error * (1 - _MARGIN)) ** 2

    # -- choosing

    def choose(self) -> _Chosen:
        """Measure, plan and pick; raises BudgetError when nothing meets the budget."""
        self._measure()
        plans: list[Plan] = []
        best: Plan | None = None
        cores: _CoreSpool | None = None
        if self.representation != "joint":
            plans += self._plans("private")
            best = min(plans, key=self._rank_of, default=None)
        if self.joint_modules and not (best and self._is_perfect(best)):
            self._fit(best)
            joint = self._plans("joint")
            encoded, cores = self._encode_best(joint, best)
            plans += joint
            if encoded is not None and (
                best is None or self._rank_of(encoded) < self._rank_of(best)
            ):
                best = encoded
        if best is None:
            raise BudgetError(min(self._failures)[1])
        candidates = [plan.candidate() for plan in plans]
        return _Chosen(best, candidates, cores if best.representation == "joint" else None)

    def _rank_of(self, plan: Plan) -> tuple[float, float]:
        if self.options.max_error is not None:
            return plan.nbytes, plan.rms_error
        return plan.rms_error, plan.nbytes

    def _is_clearly_better(self, plan: Plan, other: Plan) -> bool:
        if self.options.max_error is not None:
            return plan.nbytes < other.nbytes
        return plan.rms_error < other.rms_error * _CLEARLY

    def _is_perfect(self, plan: Plan) -> bool:
        """Whether no joint plan can be better, so that fitting one would be wasted."""
        return self.options.max_error is None and plan.worst_error == 0

    # -- measuring and fitting

    def _measure(self) -> None:
        """Private curves of every (task, module) that may be stored privately."""
        shared = {module.name for module in self.joint_modules}
        skip = shared if self.representation == "joint" else set()
        wanted = [
            [name for name in adapter.modules if name not in skip]
            for adapter in self.collection.adapters
        ]
        total, done = sum(len(names) for names in wanted), 0
        for task, names in enumerate(wanted):
            for name, (a, b, scale) in self.collection.read_task(task, names):
                with self.collection.naming(task, name):
                    self._measure_one(task, name, a, b, scale)
                done += 1
                self.progress("measure", done, total)

    def _measure_one(
        self, task: int, name: str, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> None:
        dtype = self.collection.adapters[task].modules[name].dtype
        formats = [self._resolve(label, dtype) for label in self.labels]
        distinct = list(dict.fromkeys(formats))
        curves = measure_private(a, b, scale, distinct, _FORMAT_OF_DTYPE[dtype])
        by_format = dict(zip(distinct, curves))
        self.curves[task, name] = [
            (label, by_format[format]) for label, format in zip(self.labels, formats)
        ]
        self.norms[task, name] = squared_norm(a, b, scale)

    def _fit(self, private: Plan | None) -> None:
        """Fit every joint module as wide as it could be wanted, and measure every width."""
        limit = self._byte_limit
        if self.options.max_error is not None:
            # A joint plan is only wanted if it is smaller than the private one.
            limit = private.nbytes if private else self.collection.original_nbytes
        (self.scratch / "fit").mkdir()
        for done, module in enumerate(self.joint_modules):
            self.progress("fit", done, len(self.joint_modules))
            most = self._most_components(module, limit)
            u_t, v = fit_bases(
                lambda module=module: self.collection.read_module(module),  # type: ignore[misc]
                module.d_in,
                module.d_out,
                most,
                seed=self.options.seed,
            )
            safetensors.torch.save_file({"u": u_t, "v": v}, self._fit_path(module))
            self.widths[module.name] = u_t.shape[0], v.shape[0]
            most = min(most, max(u_t.shape[0], v.shape[0]))
            self.grids[module.name] = (
                component_grid(most) if self.options.num_components is None else [most]
            )
            self._measure_joint(module, u_t, v)
        self.progress("fit", len(self.joint_modules), len(self.joint_modules))
        self._weights = None

    def _fit_path(self, module: _Module) -> Path:
        return self.scratch / "fit" / f"{module.index}.safetensors"

    def _most_components(self, module: _Module, limit: int | None) -> int:
        most = min(max(module.d_in, module.d_out), module.total_rank)
        if self.options.num_components is not None:
            return min(most, self.options.num_components)
        if limit is None:
            return most
        share = limit * module.original_nbytes / self.collection.original_nbytes * _SHARE_SLACK
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if min(self._joint_nbytes(module, label, middle) for label in self.labels) <= share:
                low = middle
            else:
                high = middle - 1
        return low

    def _joint_nbytes(self, module: _Module, label: str, components: int) -> int:
        format = self._resolve(label, module.dtype)
        option = JointOption(format, min(components, module.d_out), min(components, module.d_in))
        return joint_nbytes(
            option, module.d_out, module.d_in, module.ranks, self._core_format(format)
        )

    def _measure_joint(self, module: _Module, u_t: torch.Tensor, v: torch.Tensor) -> None:
        grid = self.grids[module.name]
        formats = [self._resolve(label, module.dtype) for label in self.labels]
        meters = [JointMeter(pack(u_t, format), pack(v, format), grid) for format in formats]
        losses = torch.zeros(len(formats), len(module.tasks), len(grid), dtype=torch.float64)
        for place, (a, b, scale) in enumerate(self.collection.read_module(module)):
            norm = squared_norm(a, b, scale)
            self.norms[module.tasks[place], module.name] = norm
            for number, (format, meter) in enumerate(zip(formats, meters)):
                captured = meter.captured(a, b, scale)
                losses[number, place] = joint_losses(captured, norm, self._core_format(format))
        for label, table in zip(self.labels, losses):
            self.joint_losses[module.name, label] = table

    # -- planning

    def _task_weights(self) -> list[float]:
        """1 / ||delta_W||_F^2 of each task, so that every task counts alike."""
        if self._weights is None:
            totals = [0.0] * len(self.collection.adapters)
            for (task, _), norm in self.norms.items():
                totals[task] += norm
            self._weights = [1 / total if total > 0 else 0.0 for total in totals]
        return self._weights

    def _plans(self, representation: str) -> list[Plan]:
        """One plan for each format, and for private one that mixes them; only those that fit."""
        plans = []
        sets = [(label, [label]) for label in self.labels]
        if representation == "private" and len(self.labels) > 1:
            sets.append((_MIXED, self.labels))
        misses: list[tuple[float, str]] = []
        for label, labels in sets:
            entries = self._entries(representation, labels)
            chosen = self._allocate(representation, label, entries, misses, self._loss_limit)
            if chosen is not None:
                plans.append(self._make_plan(representation, label, entries, chosen))
        if not plans and misses:
            self._failures.append(min(misses))
        return plans

    def _entries(self, representation: str, labels: list[str]) -> list[_Entry]:
        weights = self._task_weights()
        joint = self.joint_modules if representation == "joint" else []
        entries: list[_Entry] = [self._joint_entry(module, labels[0], weights) for module in joint]
        shared = {module.name for module in joint}
        # Beside bases, factors may take whichever format suits them best.
        allowed = set(self.labels if representation == "joint" else labels)
        for (task, name), curves in self.curves.items():
            if name not in shared:
                usable = [curve for label, curve in curves if label in allowed]
                module = self.collection.modules[name]
                entries.append(_PrivateEntry(task, module, usable, weights[task]))
        return entries

    def _joint_entry(self, module: _Module, label: str, weights: list[float]) -> _JointEntry:
        format = self._resolve(label, module.dtype)
        k_out, k_in = self.widths[module.name]
        joint_options = [
            JointOption(format, min(k, k_out), min(k, k_in)) for k in self.grids[module.name]
        ]
        scale = torch.tensor([weights[task] for task in module.tasks], dtype=torch.float64)
        losses = self.joint_losses[module.name, label] * scale[:, None]
        return _JointEntry(module, joint_options, self._core_format(format), losses)

    def _allocate(
        self,
        representation: str,
        label: str,
        entries: list[_Entry],
        misses: list[tuple[float, str]],
        loss_limit: float | None,
    ) -> list[int] | None:
        """The option of every entry, or None and a line about the nearest miss."""

        def planned(chosen: list[int]) -> Plan:
            return self._make_plan(representation, label, entries, chosen)

        if loss_limit is not None:
            chosen = self._cheapest(representation, entries, loss_limit)
            if chosen is None:
                worst = planned([entry.best() for entry in entries]).worst_error
                misses.append((worst, self._error_miss(worst)))
            return chosen
        limit = self._byte_limit
        if limit is None:
            return [entry.best() for entry in entries]
        path = build_path(len(entries), lambda number: entries[number].points())

        def sizes(options: list[int]) -> tuple[int, int]:
            plan = planned(options)
            return plan.data_nbytes, plan.nbytes

        chosen = fit_to_budget(path, sizes, limit)
        if chosen is None:
            least = planned(path.start).nbytes
            misses.append((least, self._ratio_miss(least)))
        return chosen

    def _error_miss(self, worst: float) -> str:
        advice = "allow a larger error"
        if self.options.quantize not in ("auto", "none"):
            advice += ", or quantize none or auto"
        elif self.representation == "joint":
            advice += ", or use representation auto or private"
        return (
            f"no {self.representation} plan with quantize {self.options.quantize} keeps every task "
            f"within a relative error of {self.options.max_error}; the least reachable for the "
            f"worst task is {worst:.3g}; {advice}"
        )

    def _ratio_miss(self, least: int) -> str:
        best = math.floor(self.collection.original_nbytes / least * 100) / 100
        advice = "ask for a smaller ratio"
        if self.options.quantize not in ("auto", "nf4"):
            advice += ", or quantize auto or nf4"
        if self.representation == "joint":
            advice += ", or use representation auto"
        ratio = DEFAULT_RATIO if self.options.ratio is None else self.options.ratio
        return (
            f"a ratio of {ratio:g} is out of reach for {self.representation} plans with quantize "
            f"{self.options.quantize}: the smallest, of rank 1, reaches {best:g} ({least} bytes); "
            f"{advice}"
        )

    def _cheapest(
        self, representation: str, entries: list[_Entry], limit: float
    ) -> list[int] | None:
        """The fewest bytes with every task's loss within the limit."""
        if representation == "private":
            return self._cheapest_by_task(entries, limit)
        path = build_path(len(entries), lambda number: entries[number].points())
        count = shortest_prefix(
            path, lambda chosen: float(self._task_losses(entries, chosen).max()) <= limit
        )
        if count is None:
            return None
        chosen = path.prefix(count)

        def good(chain: int, option: int) -> bool:
            changed = [*chosen[:chain], option, *chosen[chain + 1 :]]
            return float(self._task_losses(entries, changed).max()) <= limit

        trim(path, count, chosen, good)
        return chosen

    def _cheapest_by_task(self, entries: list[_Entry], limit: float) -> list[int] | None:
        """Private tasks share nothing, so each is a problem of its own."""
        by_task: dict[int, list[int]] = {}
        for number, entry in enumerate(entries):
            assert isinstance(entry, _PrivateEntry)
            by_task.setdefault(entry.task, []).append(number)
        chosen = [0] * len(entries)
        for numbers in by_task.values():
            found = cheapest_within([entries[number].points() for number in numbers], limit)
            if found is None:
                return None
            for number, option in zip(numbers, found):
                chosen[number] = option
        return chosen

    def _task_losses(self, entries: list[_Entry], chosen: list[int]) -> torch.Tensor:
        losses = [0.0] * len(self.collection.adapters)
        for entry, option in zip(entries, chosen):
            entry.add_losses(option, losses)
        return torch.tensor(losses, dtype=torch.float64)

    def _make_plan(
        self, representation: str, label: str, entries: list[_Entry], chosen: list[int]
    ) -> Plan:
        plan = Plan(representation, label, losses=self._task_losses(entries, chosen))
        plan.data_nbytes = sum(entry.put(option, plan) for entry, option in zip(entries, chosen))
        plan.nbytes = self._file_nbytes(plan)
        return plan

    def _file_nbytes(self, plan: Plan) -> int:
        """Bytes of every safetensors file that the plan makes, extra tensors' data left out."""
        specs = [self._module_spec(module, plan) for module in self.collection.modules.values()]
        basis = basis_nbytes(specs)
        # Each further shard has a header of its own: a length word, padding and two braces.
        total = basis + 64 * (basis // BASIS_SHARD_BYTES)
        for task, adapter in enumerate(self.collection.adapters):
            segments = [self._segment(plan, task, name) for name in adapter.modules]
            tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
                name: (dtype, (count,))
                for name, (dtype, count) in task_tensor_sizes(segments, specs).items()
            }
            extra = {EXTRA_PREFIX + name: spec for name, spec in adapter.extra.items()}
            total += safetensors_nbytes(tensors | extra)
            total -= sum(math.prod(shape) * dtype.itemsize for dtype, shape in extra.values())
        return total

    def _module_spec(self, module: _Module, plan: Plan) -> ModuleSpec:
        spec = ModuleSpec(module.name, module.d_in, module.d_out, module.kind)
        if module.name in plan.joint:
            option = plan.joint[module.name][0]
            spec.basis = BasisSpec(option.k_out, option.k_in, option.format)
        return spec

    def _segment(self, plan: Plan, task: int, name: str) -> Segment:
        index = self.collection.modules[name].index
        if name not in plan.joint:
            private = plan.private[task, name]
            return Segment(index, "private", private.format, private.rank)
        option, core_format = plan.joint[name]
        rank = self.collection.adapters[task].modules[name].rank
        core, kept, _ = core_shape(rank, option.k_out, option.k_in)
        return Segment(index, "joint", core_format, kept, core=core)

    # -- encoding

    def _encode_best(
        self, plans: list[Plan], rival: Plan | None
    ) -> tuple[Plan | None, _CoreSpool | None]:
        """Encode the best joint plan and put its measured losses in place of the planned ones.

        Not where the rival is better by more than measuring could change: sizes are known exactly,
        and losses up to the rounding of the cores.

        Planned losses know the rounding of the cores only nearly. Where that breaks a promised
        error, the plan is made again for a slightly smaller one.
        """
        if not plans:
            return None, None
        plan = min(plans, key=self._rank_of)
        if rival is not None and self._is_clearly_better(rival, plan):
            return None, None
        place, limit = plans.index(plan), self._loss_limit
        for attempt in range(_ENCODE_ATTEMPTS):
            cores = self._encode(plan, attempt)
            plans[place] = plan
            if limit is None:
                return plan, cores
            excess = float(plan.losses.max()) - limit
            if excess <= 0:
                return plan, cores
            shutil.rmtree(self.scratch / f"cores{attempt}")
            target = limit - 2 ** (attempt + 1) * excess
            entries = self._entries("joint", [plan.format])
            chosen = self._cheapest("joint", entries, target) if target > 0 else None
            if chosen is None:
                break
            plan = self._make_plan("joint", plan.format, entries, chosen)
        worst = plans[place].worst_error
        self._failures.append((worst, self._error_miss(worst)))
        del plans[place]
        return None, None

    def _encode(self, plan: Plan, attempt: int) -> _CoreSpool:
        """Encode every core; ``plan.losses`` become measured ones."""
        cores = _CoreSpool(self.scratch / f"cores{attempt}")
        losses = torch.zeros(len(self.collection.adapters), dtype=torch.float64)
        weights = self._task_weights()
        total = sum(len(self.collection.modules[name].tasks) for name in plan.joint)
        done = 0
        for name, (_, core_format) in plan.joint.items():
            module = self.collection.modules[name]
            basis = self._basis(module, plan)
            dual_u, dual_v = dual_rows(basis.u), dual_rows(basis.v)
            for task, (a, b, scale) in zip(module.tasks, self.collection.read_module(module)):
                with self.collection.naming(task, name):
                    stored = encode_joint(a, b, scale, dual_u, dual_v, core_format)
                lost, norm = relative_error(a, b, scale, stored, basis)
                cores.append(task, name, replace(stored, error=_relative(lost, norm)))
                losses[task] += lost * weights[task]
                done += 1
                self.progress("encode", done, total)
        for (task, _), option in plan.private.items():
            losses[task] += option.loss * weights[task]
        plan.losses = losses
        return cores

    def _basis(self, module: _Module, plan: Plan) -> Basis:
        option = plan.joint[module.name][0]
        fitted = safetensors.torch.load_file(self._fit_path(module))
        return Basis(
            pack(fitted["u"][: option.k_out], option.format),
            pack(fitted["v"][: option.k_in], option.format),
        )

    # -- writing

    def write(
        self,
        chosen: _Chosen,
        folder: Path,
        base_model: str | None,
        output: Path,
        warnings: list[str],
    ) -> CompressReport:
        """Write bases and tasks; the manifest waits for ``finish``."""
        plan = chosen.plan
        self._writer = CheckpointWriter(folder, base_model)
        for module in self.collection.modules.values():
            basis = self._basis(module, plan) if module.name in plan.joint else None
            self._writer.add_module(module.name, module.d_in, module.d_out, module.kind, basis)
        tasks = []
        for task, task_id in enumerate(self.collection.task_ids):
            tasks.append(self._write_task(chosen, task, task_id))
            self.progress("write", task + 1, len(self.collection.task_ids))
        basis_total = basis_nbytes(self._writer.modules)
        return CompressReport(
            output,
            tasks,
            plan.representation,
            plan.format,
            self.collection.original_nbytes,
            basis_total + sum(task.nbytes for task in tasks),
            basis_total,
            chosen.candidates,
            warnings,
        )

    def finish(self, report: CompressReport, base_model: str | None) -> None:
        """Write the model card and the manifest."""
        self._writer.finish(model_card(base_model, report))

    def _write_task(self, chosen: _Chosen, task: int, task_id: str) -> TaskReport:
        adapter = self.collection.adapters[task]
        joint = chosen.cores.read(task) if chosen.cores else {}
        lost_total = norm_total = 0.0
        for name, stored in joint.items():
            norm = self.norms[task, name]
            lost_total += stored.error**2 * norm
            norm_total += norm
        private, lost, norm = self._encode_private(chosen.plan, task, joint)
        modules = {
            name: joint[name] if name in joint else private[name] for name in adapter.modules
        }
        error = _relative(lost_total + lost, norm_total + norm)
        record = self._writer.add_task(
            task_id,
            modules,
            original_nbytes=adapter.original_nbytes,
            error=error,
            adapter_config=adapter.config,
            source=adapter.name,
            extra=adapter.extra_tensors(),
        )
        return _task_report(task_id, adapter, record)

    def _encode_private(
        self, plan: Plan, task: int, joint: Mapping[str, StoredModule]
    ) -> tuple[dict[str, StoredModule], float, float]:
        """Stored modules, and the sums of ||delta_W' - delta_W||_F^2 and of ||delta_W||_F^2."""
        names = [name for name in self.collection.adapters[task].modules if name not in joint]
        encoded, lost_total, norm_total = {}, 0.0, 0.0
        for name, (a, b, scale) in self.collection.read_task(task, names):
            option = plan.private[task, name]
            with self.collection.naming(task, name):
                stored = _encode_option(a, b, scale, option)
            lost, norm = 0.0, self.norms[task, name]
            # Zero is only ever planned where the stored numbers are the adapter's own.
            if not (option.original and option.loss == 0):
                lost, norm = relative_error(a, b, scale, stored, None)
            encoded[name] = replace(stored, error=_relative(lost, norm))
            lost_total += lost
            norm_total += norm
        return encoded, lost_total, norm_total


def _encode_option(
    a: torch.Tensor, b: torch.Tensor, scale: float, option: PrivateOption
) -> StoredModule:
    if option.original:
        return encode_private(a, b, scale, option.format)
    svd_a, svd_b, _ = balanced_svd(a, b, scale)
    return encode_private(svd_a[: option.rank], svd_b[:, : option.rank], 1.0, option.format)


def _relative(lost: float, norm: float) -> float:
    # A delta_W of zero is stored as zero, so there is nothing to divide.
    return math.sqrt(lost / norm) if norm > 0 else math.sqrt(lost)


def _summary(values: Iterable[str]) -> str:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else _MIXED


def _task_report(task_id: str, adapter: Adapter, record: TaskRecord) -> TaskReport:
    ranks = [segment.rank for segment in record.segments]
    heads = sum(math.prod(shape) * dtype.itemsize for dtype, shape in adapter.extra.values())
    return TaskReport(
        task_id,
        adapter.name,
        (min(ranks), max(ranks)),
        adapter.original_nbytes,
        record.nbytes - heads,
        record.error,
        _summary(segment.representation for segment in record.segments),
        _summary(segment.format for segment in record.segments),
    )
