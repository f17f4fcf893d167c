"""Gather a calibration: one pass of text through the base model, with transformers.

Hooks on the linear modules add up what enters and, in the backward pass of the language-model loss,
the gradients that come back to their outputs. The weights are frozen, so no gradient of a weight is
ever computed; that the embeddings' output asks for one is what carries the pass through the model.
"""

from __future__ import annotations

import itertools
import platform
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_vlora._version import __version__
from vllm_vlora.adapters.collection import Progress, common_base_model
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.atomic import publish_folder
from vllm_vlora.errors import DataError, OptionError
from vllm_vlora.evaluation.base_model import check_dtype, load_base_model, resolve
from vllm_vlora.evaluation.texts import (
    IGNORED,
    Batch,
    Row,
    data_digest,
    make_batches,
    padding_id,
    read_examples,
    tokenize_windows,
)
from vllm_vlora.fitting.calibration import (
    Calibration,
    ModuleRecord,
    Settings,
    Source,
    calibration_files,
)
from vllm_vlora.fitting.moments import FullSum, LowRankMoment, Moment, SketchSum, new_sum
from vllm_vlora.quantize import FLOAT_DTYPES, is_finite

Advance = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class GatherOptions:
    """How a calibration is gathered.

    Attributes:
        max_tokens: stop after the example that reaches so many; None for all of the text.
        max_length: tokens of a row: longer plain texts are cut into several, other examples end.
        batch_size: rows in a pass. The logits of a batch are held three times over:
            batch_size x max_length x vocabulary numbers each.
        gradients: whether output gradients are gathered too; twice the time and more.
        full: the widest moment that is kept whole.
        directions: strong directions kept of wider ones, beside a diagonal.
        device: torch's name; None for the first GPU, or the CPU.
        dtype: the model's, a float format; None for float32 on CPU and bfloat16 elsewhere.

    Raises:
        OptionError: a value is out of range or unknown.
    """

    max_tokens: int | None = 65536
    max_length: int = 512
    batch_size: int = 4
    gradients: bool = True
    full: int = 2048
    directions: int = 256
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        least = {"max_length": 2, "batch_size": 1, "full": 0, "directions": 1}
        if self.max_tokens is not None:
            least["max_tokens"] = 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise OptionError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        check_dtype(self.dtype)


def calibrate(
    model: str | Path,
    data: Sequence[str | Path],
    options: GatherOptions | None = None,
    advance: Advance = lambda stage, done, total: None,
) -> Calibration:
    """Gather the moments of a base model on text.

    Args:
        model: folder or Hub id of the base model, as transformers loads it.
        data: files of text (see ``vllm_vlora.evaluation.texts`` for their forms); several take turns.
        options: how.
        advance: is told of the progress.

    Raises:
        OptionError: an option is wrong, or the model cannot be loaded.
        DataError: a file cannot be read, no token of it carries a loss, or a moment is not finite.
    """
    options = options or GatherOptions()
    device, dtype = resolve(options.device, options.dtype)
    digest = data_digest(data)
    advance("Load the model", 0, 1)
    tokenizer, network = load_base_model(str(model), device, FLOAT_DTYPES[dtype])
    rows = _select_rows(data, tokenizer, options)
    settings = Settings(
        options.max_tokens,
        options.max_length,
        options.batch_size,
        options.gradients,
        options.full,
        options.directions,
        dtype,
    )
    source = Source(
        base_model=str(model),
        data=[Path(path).name for path in data],
        data_sha256=digest,
        examples=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        gradient_tokens=sum(map(_reached, rows)) if options.gradients else 0,
        settings=settings,
        versions=_versions(),
    )
    if options.gradients and not source.gradient_tokens:
        raise DataError(
            "no token of the data carries a loss within max_length; raise it, or leave the "
            "gradients out"
        )
    return gather(network, rows, source, padding_id(tokenizer), advance)


def gather(
    model: Any,
    rows: Sequence[Row],
    source: Source,
    pad_id: int,
    advance: Advance = lambda stage, done, total: None,
) -> Calibration:
    """As ``calibrate``, of a causal language model of transformers and rows of tokens.

    ``source`` carries the settings and the counts of the rows. The model is left as it was, but for
    its parameters, which no longer ask for gradients, and for being in evaluation mode.

    Raises:
        DataError: a moment is not finite, or two modules share an input in some batches only.
    """
    model.requires_grad_(False).eval()
    watch = _Watch(model, source.settings)
    done = 0
    with watch.hooks():
        for batch in make_batches(rows, source.settings.batch_size, pad_id):
            advance("Gather moments (tokens)", done, source.tokens)
            watch.run(batch.to(model.get_input_embeddings().weight.device))
            done += int(batch.attention_mask.sum())
    advance("Gather moments (tokens)", done, source.tokens)
    assert done == source.tokens
    modules, moments = watch.finish(source, advance)
    return Calibration(source, modules, moments)


# --- one pass -------------------------------------------------------------------------------------


class _Watch:
    """The sums of one model's modules, and the hooks that fill them."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self._model = model
        self._settings = settings
        self._modules = dict(_linear_modules(model))
        self._inputs: dict[str, FullSum | SketchSum] = {}
        self._outputs: dict[str, FullSum | SketchSum] = {}
        # Module -> the module whose input it shares, which is itself where it shares none.
        self._leaders: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._entered: dict[tuple[Any, ...], tuple[Any, str]] = {}
        self._mask = torch.empty(0)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """The model's modules are watched inside the block."""
        handles = []
        # The head's gradient is as wide as the vocabulary, and hardly any adapter touches the head.
        head = self._model.get_output_embeddings()
        try:
            for name, module in self._modules.items():
                handles.append(module.register_forward_hook(self._hook(name, module is not head)))
            if self._settings.gradients:
                embeddings = self._model.get_input_embeddings()
                handles.append(
                    embeddings.register_forward_hook(lambda _, __, y: y.requires_grad_(True))
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batch: Batch) -> None:
        """Send one batch through, forwards and, for gradients, backwards."""
        self._entered.clear()
        self._mask = batch.attention_mask.bool()
        gradients = self._settings.gradients
        with torch.set_grad_enabled(gradients):
            logits = self._model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
            # A batch of prompts cut off before their answers has no loss to send back.
            if gradients and bool((batch.labels[:, 1:] != IGNORED).any()):
                summed_loss(logits, batch.labels).backward()

    def finish(self, source: Source, advance: Advance) -> tuple[list[ModuleRecord], list[Moment]]:
        """The modules that were seen and the moments; the sums are given up one by one."""
        modules: list[ModuleRecord] = []
        moments: list[Moment] = []
        shared: dict[str, int] = {}
        total = len(self._inputs) + len(self._outputs)

        def add(name: str, sums: dict[str, FullSum | SketchSum], count: int) -> int:
            advance("Finish moments", len(moments), total)
            moments.append(_finite(name, sums.pop(name).moment(count), source.settings.dtype))
            return len(moments) - 1

        for name, module in self._modules.items():
            leader = self._leaders.get(name)
            if leader is None:
                continue
            if self._calls[name] != self._calls[leader]:
                raise _unsteady(name, leader)
            if leader not in shared:
                shared[leader] = add(leader, self._inputs, source.tokens)
            has_output = name in self._outputs
            output = add(name, self._outputs, source.gradient_tokens) if has_output else None
            modules.append(ModuleRecord(name, *_shape(module), shared[leader], output))
        advance("Finish moments", total, total)
        return modules, moments

    def _hook(self, name: str, with_output: bool) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if args[0].numel():
                with torch.no_grad():
                    self._add_input(name, args[0])
                if with_output and output.requires_grad:
                    output.register_hook(lambda gradient: self._add_output(name, gradient))

        return hook

    def _add_input(self, name: str, x: torch.Tensor) -> None:
        met = self._same_tensor(name, x)
        leader = self._leaders.setdefault(name, met)
        if leader not in (met, name):
            raise _unsteady(name, leader)
        self._calls[name] = self._calls.get(name, 0) + 1
        if leader == name:
            rows = x[self._mask] if x.shape[:-1] == self._mask.shape else self._flat_rows(x)
            self._sum(self._inputs, name, rows).add(rows)

    def _same_tensor(self, name: str, x: torch.Tensor) -> str:
        """The first module of this pass that ``x`` entered, unchanged since."""
        # The address alone would not do: it is given out again when a tensor is gone. So a tensor
        # counts as met only while it lives.
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        known = self._entered.get(key)
        if known is not None and known[0]() is not None:
            return known[1]
        self._entered[key] = (weakref.ref(x), name)
        return name

    def _flat_rows(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        # Experts get the tokens that were routed to them, of which none says where it came from.
        return flat[self._mask.reshape(-1)] if len(flat) == self._mask.numel() else flat

    def _add_output(self, name: str, gradient: torch.Tensor) -> None:
        # Positions without a gradient, padding among them, add zeros.
        rows = gradient.reshape(-1, gradient.shape[-1])
        self._sum(self._outputs, name, rows).add(rows)

    def _sum(
        self, sums: dict[str, FullSum | SketchSum], name: str, rows: torch.Tensor
    ) -> FullSum | SketchSum:
        if name not in sums:
            settings = self._settings
            sums[name] = new_sum(rows.shape[-1], settings.full, settings.directions, rows.device)
        return sums[name]


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of every label by what stands before it, summed, in nats.

    A sum, so that a token's gradient does not depend on what else is in its batch.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length), IGNORED where no loss is wanted.
    """
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def _finite(name: str, moment: Moment, dtype: str) -> Moment:
    tensor = moment.rest if isinstance(moment, LowRankMoment) else moment.matrix
    if not is_finite(tensor):
        raise DataError(f"module {name}: numbers overflow in {dtype}; give --dtype float32")
    return moment


def _unsteady(name: str, leader: str) -> DataError:
    return DataError(
        f"module {name} shares its input with {leader} in some batches only, which cannot be "
        "gathered; report the model"
    )


# --- the model and its text -----------------------------------------------------------------------


def _linear_modules(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        # GPT-2 and its kin have linear modules of a class of their own, with transposed weights.
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def _shape(module: Any) -> tuple[int, int]:
    """(d_in, d_out) of a linear module."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf


def _select_rows(data: Sequence[str | Path], tokenizer: Any, options: GatherOptions) -> list[Row]:
    rows: list[Row] = []
    tokens = 0
    # In turns, so that the bound leaves some of every file.
    for example in _interleave([read_examples(path) for path in data]):
        for row in tokenize_windows(example, tokenizer, options.max_length):
            if options.max_tokens is not None and tokens >= options.max_tokens:
                return rows
            rows.append(row)
            tokens += len(row.input_ids)
    return rows


def _interleave(lists: Iterable[list[Any]]) -> Iterator[Any]:
    for group in itertools.zip_longest(*lists):
        yield from (item for item in group if item is not None)


def _reached(row: Row) -> int:
    """Positions of a row that a gradient reaches: those before its last token with a loss."""
    return max((i for i, label in enumerate(row.labels) if label != IGNORED), default=0)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"python": platform.python_version(), "vllm-vlora": __version__, **packages}


def calibration_folder(
    given: Path, base: str | None, adapters: Mapping[str, Adapter], progress: Progress
) -> Path:
    """The calibration folder that ``given`` is, or that belongs to the text file ``given``.

    Of a text file ``text.jsonl`` it is ``text.jsonl.calibration`` beside it: taken as it is when it was
    gathered from the same text and model, gathered and saved otherwise.

    Raises:
        OptionError: text, but no base model is named.
        DataError: neither a calibration nor readable text.
    """
    if given.is_dir():
        return given
    base = base or common_base_model(adapters)[0]
    if base is None:
        raise OptionError("the adapters name no base model to calibrate; give it with --base MODEL")
    folder = given.with_name(f"{given.name}.calibration")
    if _serves(folder, given, base):
        return folder

    with publish_folder(folder, force=True, owned=calibration_files) as target:
        calibrate(base, [given], advance=progress).write(target)
    return folder


def _serves(folder: Path, text: Path, base: str) -> bool:
    digest = data_digest([text])
    try:
        source = Calibration.open(folder, verify=False).source
    except DataError:
        return False
    return source.data_sha256 == digest and source.base_model == base
