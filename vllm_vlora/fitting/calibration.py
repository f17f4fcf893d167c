"""A calibration: second moments of a base model's modules on some text, on disk and in use.

    CALIBRATION/calibration.json            what was gathered: modules, moments, data, settings
    CALIBRATION/moments-00001.safetensors   the moments, in files of some hundred megabytes

A module's input moment is H = E[x x^T] over the text's tokens, its output moment G = E[g g^T] over
the gradients of the language-model loss at its outputs. Modules with one and the same input share
one moment. To second order, and with gradients of different tokens taken as independent, an error E
of delta_W changes the loss by 1/2 tr(G E H E^T) a token (Martens and Grosse, 2015, arXiv
1503.05671).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch

from vllm_vlora._version import __version__
from vllm_vlora.adapters.module_names import find_name
from vllm_vlora.atomic import publish_folder
from vllm_vlora.errors import DataError
from vllm_vlora.fitting.moments import FullMoment, LowRankMoment, Moment
from vllm_vlora.fitting.whitening import FROBENIUS, Metric, Whitening
from vllm_vlora.quantize import is_finite
from vllm_vlora.regular_files import JSON_BYTES, open_regular, read_regular
from vllm_vlora.strict_json import JSONError, decode
from vllm_vlora.tensor_files import DamagedFileError, TensorFile

FORMAT_VERSION = 1
HEADER_FILE = "calibration.json"
SHARD_BYTES = 256 << 20
DEFAULT_DAMPING = 1e-2
_SHARD_NAME = re.compile(r"moments-\d{5}\.safetensors")


# --- what the header says -------------------------------------------------------------------------


class MomentRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stored moment; ``mean`` is the mean of its diagonal, ``directions`` is 0 for a full one."""

    file: int
    width: int
    directions: int
    mean: float


class ModuleRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear module of the base model and the indices of its moments."""

    name: str
    d_in: int
    d_out: int
    input: int
    output: int | None = None


class ShardRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of moments, with its SHA-256 and size in bytes."""

    file: str
    sha256: str
    nbytes: int


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the moments were gathered."""

    max_tokens: int | None
    max_length: int
    batch_size: int
    gradients: bool
    full: int
    directions: int
    dtype: str


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the moments were gathered from.

    Attributes:
        base_model: the model's id or folder, as it was given.
        data: names of the data files; ``data_sha256`` is ``texts.data_digest`` of them.
        examples: rows of text that went through the model.
        tokens: their tokens, which H averages over.
        gradient_tokens: those before a token with a loss, which G averages over; 0 without it.
        settings: how.
        versions: of the packages that took part.
    """

    base_model: str
    data: list[str]
    data_sha256: str
    examples: int
    tokens: int
    gradient_tokens: int
    settings: Settings
    versions: dict[str, str]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``calibration.json``."""

    format_version: int
    created_by: str
    source: Source
    modules: list[ModuleRecord]
    moments: list[MomentRecord]
    files: list[ShardRecord]


# --- use ------------------------------------------------------------------------------------------


class Calibration:
    """The moments of a base model's modules, as metrics.

    Moments are read, and their square roots taken, when a module's metric is first asked for; the
    latest ``cached`` square roots are kept, so that modules which share an input share the work.
    May be used from several threads, and pickled: a copy reads the same files.
    """

    def __init__(
        self,
        source: Source,
        modules: Sequence[ModuleRecord],
        moments: Sequence[Moment],
        *,
        damping: float = DEFAULT_DAMPING,
        cached: int = 8,
    ) -> None:
        """Of moments in memory; ``open`` is for those on disk."""
        if damping <= 0:
            raise ValueError(f"damping must be positive, got {damping}")
        self.source = source
        self.damping = damping
        self._modules = {module.name: module for module in modules}
        self._moments = moments
        self._cached = cached
        self._whitening = lru_cache(maxsize=cached)(self._whiten)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        damping: float = DEFAULT_DAMPING,
        cached: int = 8,
        verify: bool = True,
    ) -> Calibration:
        """Read a calibration's header and check its files against their digests.

        Args:
            path: the folder, or its ``calibration.json``.
            damping: added to every direction, as a fraction of the mean; positive. A direction that
                the text never showed would otherwise cost nothing.
            cached: square roots kept in memory.
            verify: whether digests are compared, which reads every file once.

        Raises:
            DataError: no calibration, damaged, of a newer format, or it contradicts itself.
            ValueError: damping not positive.
        """
        folder = Path(path)
        if folder.name == HEADER_FILE:
            folder = folder.parent
        header = _read_header(folder)
        for record in header.files:
            _check_file(folder, record, verify)
        moments = _StoredMoments(folder, tuple(header.moments), tuple(header.files))
        return cls(header.source, header.modules, moments, damping=damping, cached=cached)

    def save(self, path: str | Path, *, force: bool = False) -> int:
        """Write the folder ``path`` in one step; returns its bytes.

        Raises:
            OutputError: it exists and ``force`` is not set or it is no calibration, or it cannot be
                written.
        """
        with publish_folder(path, force=force, owned=calibration_files) as folder:
            return self.write(folder)

    def write(self, folder: Path) -> int:
        """Write the files into an empty folder, the header last; returns their bytes."""
        _write(folder, self.source, list(self._modules.values()), self._moments)
        return sum(file.stat().st_size for file in folder.iterdir())

    @property
    def modules(self) -> list[ModuleRecord]:
        """The modules that were seen, in the order of the model."""
        return list(self._modules.values())

    @property
    def moments(self) -> Sequence[Moment]:
        """The moments; fewer than two a module where inputs are shared. Read when asked for."""
        return self._moments

    def covers(self, name: str) -> bool:
        """Whether the module ``name`` (as in our checkpoints, or in another model class) was seen."""
        return self._seen(name) is not None

    def _seen(self, name: str) -> ModuleRecord | None:
        found = find_name(name, lambda known: known if known in self._modules else None)
        return None if found is None else self._modules[found]

    def _record(self, name: str) -> ModuleRecord:
        found = self._seen(name)
        if found is None:
            raise KeyError(name)
        return found

    def metric(self, name: str) -> Metric:
        """How errors of the module's delta_W are measured; FROBENIUS for a module not seen.

        Moments are scaled to mean one, so metrics of different modules do not compare; ``weight``
        is what was divided out.
        """
        module = self._seen(name)
        if module is None:
            return FROBENIUS
        output = None if module.output is None else self._whitening(module.output)
        return Metric(self._whitening(module.input), output)

    def weight(self, name: str) -> float:
        """What the metric's squared norm must be multiplied by to compare modules.

        With gradients, half of weight * ||S_out^T E S_in||_F^2 is the change of the loss in nats a
        token (see the module); without, all of it is the mean squared change of the output.

        Raises:
            KeyError: the module was not seen.
        """
        module = self._record(name)
        output = 1.0 if module.output is None else self._mean(module.output)
        return self._mean(module.input) * output

    def input_moment(self, name: str) -> Moment:
        """E[x x^T] of the module's inputs.

        Raises:
            KeyError: the module was not seen.
        """
        return self._moments[self._record(name).input]

    def output_moment(self, name: str) -> Moment | None:
        """E[g g^T] at the module's outputs; None where no gradients were gathered.

        Raises:
            KeyError: the module was not seen.
        """
        output = self._record(name).output
        return None if output is None else self._moments[output]

    def check_shapes(self, shapes: Iterable[tuple[str, int, int]]) -> None:
        """Compare (name, d_in, d_out) of modules with those that were seen.

        Raises:
            DataError: a module that was seen has another shape: this is another model's calibration.
        """
        for name, d_in, d_out in shapes:
            module = self._seen(name)
            if module is not None and (module.d_in, module.d_out) != (d_in, d_out):
                raise DataError(
                    f"module {name} is {d_in} -> {d_out} in the adapters, {module.d_in} -> "
                    f"{module.d_out} in the calibration of {self.source.base_model}; calibrate the "
                    "adapters' base model"
                )

    def _whiten(self, index: int) -> Whitening:
        return self._moments[index].whiten(self.damping)

    def _mean(self, index: int) -> float:
        if isinstance(self._moments, _StoredMoments):
            return self._moments.records[index].mean
        return self._moments[index].mean

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_whitening"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._whitening = lru_cache(maxsize=self._cached)(self._whiten)


def calibration_files(path: Path) -> set[str] | None:
    """The calibration's files in a folder, in whatever version; None if it is none of ours.

    With them, and no others, ``force`` may do away.
    """
    try:
        data = decode(read_regular(path / HEADER_FILE, JSON_BYTES), object)
    except (OSError, JSONError):
        return None
    if not isinstance(data, dict) or "format_version" not in data:
        return None
    shards = {entry.name for entry in path.iterdir() if _SHARD_NAME.fullmatch(entry.name)}
    return shards | {HEADER_FILE}


# --- writing --------------------------------------------------------------------------------------


def _write(
    folder: Path, source: Source, modules: list[ModuleRecord], moments: Sequence[Moment]
) -> None:
    records: list[MomentRecord] = []
    files: list[ShardRecord] = []
    shard: dict[str, torch.Tensor] = {}
    for index, moment in enumerate(moments):
        tensors = _tensors(index, moment)
        if shard and sum(t.nbytes for t in [*shard.values(), *tensors.values()]) > SHARD_BYTES:
            files.append(_write_shard(folder, len(files) + 1, shard))
            shard = {}
        shard.update(tensors)
        records.append(_record(moment, len(files)))
    if shard:
        files.append(_write_shard(folder, len(files) + 1, shard))
    header = Header(
        FORMAT_VERSION, f"vllm-vlora {__version__}", source, list(modules), records, files
    )
    text = msgspec.json.format(msgspec.json.encode(header), indent=1)
    (folder / HEADER_FILE).write_bytes(text + b"\n")


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> ShardRecord:
    file = folder / f"moments-{number:05d}.safetensors"
    safetensors.torch.save_file(tensors, file)
    return ShardRecord(file.name, _sha256(file), file.stat().st_size)


def _record(moment: Moment, file: int) -> MomentRecord:
    if isinstance(moment, FullMoment):
        return MomentRecord(file, len(moment.matrix), 0, moment.mean)
    directions, width = moment.directions.shape
    return MomentRecord(file, width, directions, moment.mean)


def _tensors(index: int, moment: Moment) -> dict[str, torch.Tensor]:
    if isinstance(moment, FullMoment):
        return {f"{index}.triangle": moment.matrix[_upper(len(moment.matrix))]}
    return {
        f"{index}.directions": moment.directions,
        f"{index}.values": moment.values,
        f"{index}.rest": moment.rest,
    }


def _upper(width: int) -> torch.Tensor:
    """Mask of the upper triangle with its diagonal, which is read row by row."""
    return torch.ones(width, width, dtype=torch.bool).triu_()


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StoredMoments(Sequence[Moment]):
    """Moments on disk, read when they are asked for."""

    folder: Path
    records: tuple[MomentRecord, ...]
    files: tuple[ShardRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Moment]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        record = self.records[index]
        path = self.folder / self.files[record.file].file
        width = record.width
        try:
            with TensorFile(path) as file:
                if not record.directions:
                    size = width * (width + 1) // 2
                    return _unpack(_tensor(file, path, f"{index}.triangle", (size,)), width)
                shapes = {"directions": (record.directions, width),
                          "values": (record.directions,), "rest": (width,)}  # fmt: skip
                parts = {
                    part: _tensor(file, path, f"{index}.{part}", shape)
                    for part, shape in shapes.items()
                }
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        except DamagedFileError as error:
            raise DataError(f"{path}: {error}; copy the calibration again") from error
        return LowRankMoment(**parts)


def _tensor(file: TensorFile, path: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    entry = file.entries.get(name)
    if entry is None or entry.shape != shape or entry.dtype != "F32":
        found = "missing" if entry is None else f"{entry.dtype} {entry.shape}"
        raise DataError(
            f"{path}: {name} is {found}, the header says float32 {shape}; calibrate again"
        )
    tensor = file.read(name)
    if not is_finite(tensor):
        raise DataError(f"{path}: {name} holds numbers that are not finite; calibrate again")
    return tensor


def _unpack(triangle: torch.Tensor, width: int) -> FullMoment:
    matrix = torch.zeros(width, width)
    matrix[_upper(width)] = triangle
    return FullMoment(matrix + matrix.triu(1).T)


def _read_header(folder: Path) -> Header:
    file = folder / HEADER_FILE
    try:
        data = read_regular(file, JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} is not a calibration: it has no {HEADER_FILE}; make one with "
            "`vllm-vlora calibrate`"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    _check_version(file, data)
    try:
        header = decode(data, Header)
    except JSONError as error:
        raise DataError(f"{file}: {error}; calibrate again") from error
    _check_header(file, header)
    return header


def _check_version(file: Path, data: bytes) -> None:
    try:
        version = decode(data, dict[str, Any]).get("format_version")
    except JSONError as error:
        raise DataError(f"{file}: not a JSON object ({error}); calibrate again") from error
    if type(version) is not int or version < 1:
        raise DataError(f"{file}: format_version must be a whole number, got {version!r}")
    if version > FORMAT_VERSION:
        raise DataError(
            f"{file}: format version {version} is newer than this vllm-vlora reads "
            f"({FORMAT_VERSION}); upgrade vllm-vlora"
        )


def _check_header(file: Path, header: Header) -> None:
    for record in header.files:
        if not _SHARD_NAME.fullmatch(record.file):
            raise DataError(f"{file}: foreign file {record.file!r}; calibrate again")
    for number, moment in enumerate(header.moments):
        possible = (
            0 <= moment.file < len(header.files)
            and 0 <= moment.directions <= moment.width
            and moment.width > 0
            and moment.mean >= 0
        )
        if not possible:
            raise DataError(f"{file}: moment {number} is impossible; calibrate again")
    if len({module.name for module in header.modules}) != len(header.modules):
        raise DataError(f"{file}: a module is listed twice; calibrate again")
    for module in header.modules:
        sides = [(module.input, module.d_in)]
        sides += [] if module.output is None else [(module.output, module.d_out)]
        for index, width in sides:
            if not 0 <= index < len(header.moments) or header.moments[index].width != width:
                raise DataError(
                    f"{file}: module {module.name} has no moment of its width; calibrate again"
                )


def _check_file(folder: Path, record: ShardRecord, verify: bool) -> None:
    file = folder / record.file
    try:
        nbytes = file.stat().st_size
        digest = _sha256(file) if verify and nbytes == record.nbytes else record.sha256
    except FileNotFoundError:
        raise DataError(f"{file}: the file is missing; copy the calibration again") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    if nbytes != record.nbytes:
        raise DataError(
            f"{file}: {nbytes} bytes, the header says {record.nbytes}; copy the calibration again"
        )
    if digest != record.sha256:
        raise DataError(f"{file}: SHA-256 differs from the header's; copy the calibration again")


def _sha256(file: Path) -> str:
    # hashlib.file_digest would do, but only from Python 3.11 on.
    total = hashlib.sha256()
    with open_regular(file) as stream:
        while chunk := stream.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
