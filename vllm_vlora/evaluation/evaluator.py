"""Runs a base model with adapters over held-out text; hands sums to ``vllm_vlora.evaluation.fidelity``.

What is judged is what the checkpoint holds: a task is exported to a PEFT folder in float32 and loaded
with PEFT, as its original is. One base model is in memory; adapters are added to it and taken off again.
"""

from __future__ import annotations

import inspect
import math
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vllm_vlora._version import __version__
from vllm_vlora.adapters.module_names import find_name
from vllm_vlora.adapters.peft_folder import Adapter, as_peft_folder, open_adapter
from vllm_vlora.adapters.saved_tensors import saved_tensors
from vllm_vlora.checkpoint.export import export_all
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_entry import has_no_update
from vllm_vlora.errors import AdapterError, ModelMismatchError, OptionError
from vllm_vlora.evaluation.base_model import check_dtype, load_base_model, resolve
from vllm_vlora.evaluation.fidelity import (
    NO_ORIGINAL,
    Divergences,
    EvaluationReport,
    ExampleLosses,
    Fraction,
    GreedyAgreement,
    TaskFidelity,
    compare_weights,
    divergences,
    greedy_agreement,
    kl_kept,
    recovered_fraction,
    total_error,
)
from vllm_vlora.evaluation.kept import kept
from vllm_vlora.evaluation.model_names import under_model_names
from vllm_vlora.evaluation.task_text import TOKENIZER_CONFIG, TaskText, tokenizer_digest
from vllm_vlora.evaluation.texts import (
    IGNORED,
    Batch,
    Row,
    data_digest,
    make_batches,
    padding_id,
    read_examples,
)
from vllm_vlora.evaluation.vocabulary import fit_vocabulary, resize_vocabulary, tokens_of
from vllm_vlora.merging.analysis import cosines, inner_products
from vllm_vlora.merging.spectra import SpectrumCollector
from vllm_vlora.model.heads import vocabulary_layers
from vllm_vlora.quantize import FLOAT_DTYPES, is_finite
from vllm_vlora.wording import first_line

Progress = Callable[[str, int, int], None]

SIMILARITY_LIMIT = 100
"""Tasks in the similarity matrix; its Gram matrices grow with the square of their ranks' sum."""
# Exported folders lie on the disk together, and the bases are read once for so many tasks.
_EXPORTED_AT_ONCE = 16
# Logits are turned to probabilities in float32 so many at a time.
_LOGITS_AT_ONCE = 1 << 24
# A text that ends early leaves room for others, so many times.
_SAMPLED_ROUNDS = 4
LOSSES_ONLY = "not asked for: losses only"


@dataclass(frozen=True)
class EvaluationOptions:
    """How models are run.

    Attributes:
        max_length: tokens to which an example is cut, or the model's positions if they are fewer.
        batch_size: examples in a forward pass. Two passes' logits at supervised positions are held
            together: batch_size x max_length x vocabulary numbers each, at most.
        max_examples: of each data file, its first; None for all.
        device: torch's name; None for the first GPU, or the CPU.
        dtype: the base model's, a float format; None for float32 on CPU and bfloat16 elsewhere.
        greedy_tokens: tokens to generate for the comparison of free-running answers; 0 for none.

    Raises:
        OptionError: a value is out of range or unknown.
    """

    max_length: int = 1024
    batch_size: int = 4
    max_examples: int | None = None
    device: str | None = None
    dtype: str | None = None
    greedy_tokens: int = 16

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("batch_size", 1), ("greedy_tokens", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_examples is not None and self.max_examples < 1:
            raise OptionError(f"max_examples must be at least 1, got {self.max_examples}")
        check_dtype(self.dtype)

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype that the model gets."""
        device, name = resolve(self.device, self.dtype)
        return device, FLOAT_DTYPES[name]


@dataclass(frozen=True)
class TaskScores:
    """What one adapter does on a task's data: losses, and greedy answers if they were asked for."""

    losses: ExampleLosses
    answers: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Comparison:
    """A compressed task beside its original and the base; see ``TaskFidelity`` for the figures."""

    base: ExampleLosses
    original: ExampleLosses | None
    compressed: ExampleLosses
    recovered: Fraction
    kl_kept: Fraction
    agreement: float | None = None
    divergences: Divergences | None = None
    greedy: GreedyAgreement | None = None

    @property
    def kl(self) -> float | None:
        """KL(original || compressed) in nats per supervised token."""
        return None if self.divergences is None else self.divergences.kl

    @property
    def kl_base(self) -> float | None:
        """KL(original || base) in nats per supervised token."""
        return None if self.divergences is None else self.divergences.kl_base


@dataclass(frozen=True)
class _Loaded:
    """Adapters on the model.

    Attributes:
        use: makes one of them active, by name.
        as_base: a context in which the model is the base, without any.
    """

    use: Callable[[str], None]
    as_base: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class _Seen:
    """One batch: logits before each supervised token (tokens, vocabulary), and these tokens."""

    batch: Batch
    targets: torch.Tensor
    owners: torch.Tensor
    theirs: torch.Tensor
    ours: Mapping[str, torch.Tensor]
    base: torch.Tensor | None

    def divergences(self, others: torch.Tensor) -> torch.Tensor:
        """KL(original || others) of every token."""
        pairs = zip(_in_chunks(self.theirs), _in_chunks(others))
        return torch.cat([divergences(*pair) for pair in pairs])

    def agreed(self, others: torch.Tensor) -> int:
        """Tokens that the original and another find most likely alike."""
        pairs = zip(_in_chunks(self.theirs), _in_chunks(others))
        return sum(int((first.argmax(-1) == second.argmax(-1)).sum()) for first, second in pairs)


class Evaluator:
    """One base model and the held-out data of its tasks.

    Data files are read and the base is scored on them once, also where tasks share a file; scores of
    originals are kept by task and folder.

    Args:
        model: folder or Hub id of the base model, as transformers loads it.
        data: task id -> its data files (see ``vllm_vlora.evaluation.texts`` for their forms).
        options: how models are run.
        progress: called with (stage, done, total).

    Raises:
        OptionError: an option is wrong, or the model cannot be loaded.
        DataError: a data file cannot be read, or has no supervised token.
    """

    def __init__(
        self,
        model: str | Path,
        data: Mapping[str, Sequence[str | Path]],
        options: EvaluationOptions | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.options = options or EvaluationOptions()
        self.model_name = str(model)
        self.data = {task: tuple(Path(path) for path in files) for task, files in data.items()}
        self._progress = progress
        # Mistakes in small files show before a large model is loaded.
        examples = {path: read_examples(path) for files in self.data.values() for path in files}
        self.device, self.dtype = self.options.resolve()
        tokenizer, self._model = _load_model(self.model_name, self.device, self.dtype)
        self._takes_logits_to_keep = (
            "logits_to_keep" in inspect.signature(self._model.forward).parameters
        )
        self._pad_id = padding_id(tokenizer)
        self._start_id: int | None = tokenizer.bos_token_id
        # Beyond its positions a model fails, or answers nonsense.
        self._positions: int = getattr(self._model.config, "max_position_embeddings", 1 << 62)
        chosen = {path: found[: self.options.max_examples] for path, found in examples.items()}
        length = min(self.options.max_length, self._positions)
        self._text = TaskText(tokenizer, chosen, length)
        self._readers: dict[tuple[str, Path], TaskText | None] = {}
        # By the content of its files, which many adapters have in common.
        self._own: dict[str, TaskText] = {}
        self._texts: dict[str, TaskText] = {}
        self._base: dict[tuple[Path, Path | None], ExampleLosses] = {}
        self._scores: dict[tuple[str, Path], TaskScores] = {}
        self._from_base: dict[tuple[str, Path], torch.Tensor] = {}

    def choose_tokenizer(self, task: str, *folders: str | Path) -> Path | None:
        """Read a task's data as its adapter does, and the base model's losses on it too.

        Args:
            folders: PEFT folders of the task. The first that holds a tokenizer counts, if it reads the
                task's data otherwise than the base model's does.

        Returns:
            The folder whose tokenizer is used; None for the base model's.

        Raises:
            OptionError: no data was given for the task.
            AdapterError: a folder's tokenizer cannot be loaded.
            DataError: the data has no token to be scored.
        """
        files = self._files(task)
        found = ((self._reader(task, Path(folder)), Path(folder)) for folder in folders)
        text, folder = next((own for own in found if own[0] is not None), (self._text, None))
        assert text is not None
        for path in files:
            text.prepared(path)
        self._texts[task] = text
        return None if text is self._text else folder

    def base(self, task: str) -> ExampleLosses:
        """Losses of the base model on a task's data.

        Tokens that it lacks get rows around the mean of the others, as a vocabulary that is resized does.

        Raises:
            OptionError, DataError: no data was given for the task, or none that can be scored.
        """
        text, found = self._text_of(task), []
        for path in self._files(task):
            key = path, text.folder
            if key not in self._base:
                rows = text.prepared(path).rows
                with self._wide_enough(rows, text):
                    self._base[key] = self._losses(rows, "base model")
            found.append(self._base[key])
        return ExampleLosses(
            torch.cat([part.nll for part in found]), torch.cat([part.tokens for part in found])
        )

    def adapter(self, task: str, folder: str | Path, *, losses_only: bool = False) -> TaskScores:
        """Scores of the adapter in a PEFT folder on a task's data; not kept.

        Args:
            losses_only: no greedy answers.

        Raises:
            OptionError: no data was given for the task.
            AdapterError, ModelMismatchError: the adapter cannot be read, or is of another model.
        """
        rows = self._rows(task)
        with self._loaded({"only": Path(folder)}):
            self._check_tokens(rows, str(folder))
            losses = self._losses(rows, str(folder))
            answers = None
            if self.options.greedy_tokens and not losses_only:
                answers = self._answers(rows, task)
        return TaskScores(losses, answers)

    def compare(
        self,
        task: str,
        compressed: str | Path,
        original: str | Path | None = None,
        *,
        losses_only: bool = False,
    ) -> Comparison:
        """Judge a compressed task, exported to a PEFT folder, against its original's folder.

        Args:
            losses_only: the recovered fraction and nothing else. The original is then run once, however
                many compressed forms of it are judged.

        Raises:
            As :meth:`adapter`.
        """
        self.choose_tokenizer(task, *([compressed] if original is None else [original, compressed]))
        base = self.base(task)
        if original is None:
            losses = self.adapter(task, compressed, losses_only=True).losses
            unknown = Fraction(None, reason=NO_ORIGINAL)
            return Comparison(base, None, losses, unknown, unknown)
        if losses_only:
            theirs = self._original(task, Path(original)).losses
            losses = self.adapter(task, compressed, losses_only=True).losses
            recovered = recovered_fraction(base, theirs, losses)
            return Comparison(base, theirs, losses, recovered, Fraction(None, reason=LOSSES_ONLY))
        return self._compare_tokens(task, base, Path(compressed), Path(original))

    def files(self, task: str) -> tuple[Path, ...]:
        """A task's data files."""
        return self._files(task)

    def tokenizer(self, task: str) -> str | None:
        """The adapter's folder whose tokenizer reads a task's data; None for the base model's."""
        folder = self._text_of(task).folder
        return None if folder is None else str(folder)

    def left_out(self, task: str) -> int:
        """Examples of a task that have no supervised token within ``max_length``."""
        text = self._text_of(task)
        return sum(text.prepared(path).left_out for path in self._files(task))

    def check_modules(self, modules: Mapping[str, tuple[int, int]], where: str) -> None:
        """Refuse modules, name -> (d_out, d_in), that the base model lacks or has otherwise.

        Raises:
            ModelMismatchError: naming ``where``, the module and the model.
        """
        present = dict(self._model.named_modules())
        vocabulary = vocabulary_layers(self._model)
        for name, shape in modules.items():
            weight = getattr(find_name(name, present.get), "weight", None)
            if weight is None:
                raise ModelMismatchError(
                    f"{where}: adapts module {name}, which the model {self.model_name} lacks; "
                    "give the adapters' own base model"
                )
            # An adapter may bring other tokens along.
            fits = name in vocabulary and weight.shape[1] in shape
            # Embeddings and GPT-2's layers hold their weight transposed.
            if not fits and sorted(weight.shape) != sorted(shape):
                raise ModelMismatchError(
                    f"{where}: module {name} is {shape[0]} x {shape[1]}, in the model "
                    f"{self.model_name} it is {' x '.join(map(str, weight.shape))}; give the "
                    "adapters' own base model"
                )

    def _files(self, task: str) -> tuple[Path, ...]:
        if task not in self.data:
            raise OptionError(f"no data for task {task!r}; give it with --data TASK=FILE")
        return self.data[task]

    def _rows(self, task: str) -> list[Row]:
        text = self._text_of(task)
        return [row for path in self._files(task) for row in text.prepared(path).rows]

    def _reader(self, task: str, folder: Path) -> TaskText | None:
        """What reads a task's data by the tokenizer in a folder; None where it has none."""
        key = task, folder
        if key not in self._readers:
            self._readers[key] = self._new_reader(task, folder)
        return self._readers[key]

    def _new_reader(self, task: str, folder: Path) -> TaskText | None:
        content = tokenizer_digest(folder)
        if content is None:
            return None
        own = self._own.get(content) or self._text.own_of(folder)
        # One that reads alike is not held: it takes as much memory as a small model.
        if own.reads_as(self._text, self._files(task)):
            return self._text
        self._own[content] = own
        return own

    def _text_of(self, task: str) -> TaskText:
        return self._texts.get(task, self._text)

    @contextmanager
    def _wide_enough(self, rows: Sequence[Row], text: TaskText, least: int = 0) -> Iterator[None]:
        """The base model with rows for all tokens of the text, and for ``least`` at least."""
        highest = max(max(row.input_ids) for row in rows)
        wanted = max(highest + 1, len(text.tokenizer)) if highest >= tokens_of(self._model) else 0
        wanted = max(wanted, least)
        if wanted <= tokens_of(self._model):
            yield
            return
        with kept(self._model):
            resize_vocabulary(self._model, wanted, mean=True)
            yield

    def _check_tokens(self, rows: Sequence[Row], where: str) -> None:
        highest, tokens = max(max(row.input_ids) for row in rows), tokens_of(self._model)
        if highest >= tokens:
            raise AdapterError(
                f"{where}: the text has the token {highest}, the model with this adapter has {tokens} "
                "tokens; give the adapter its embeddings, or take its tokenizer away"
            )

    def _original(self, task: str, folder: Path) -> TaskScores:
        key = task, folder.absolute()
        if key not in self._scores:
            self._scores[key] = self.adapter(task, folder, losses_only=True)
        return self._scores[key]

    def sample(self, folder: str | Path, tokens: int, length: int, seed: int = 0) -> list[Row]:
        """Text that the model writes with an adapter, from nothing, at temperature 1.

        Args:
            folder: of PEFT. tokens: to be scored, about so many in all. length: the most of a text.

        Raises:
            As :meth:`adapter`.
        """
        length = min(length, self._positions)
        rows: list[Row] = []
        with self._loaded({"only": Path(folder)}), torch.random.fork_rng():
            torch.manual_seed(seed)
            # Texts that end early are made up for; a model that ends at once writes nothing.
            for _ in range(_SAMPLED_ROUNDS):
                missing = tokens - sum(row.supervised for row in rows)
                if missing <= 0:
                    break
                rows += self._samples(math.ceil(missing / (length - 1)), length)
        return rows

    def _samples(self, count: int, length: int) -> list[Row]:
        config = self._model.generation_config
        ends = config.eos_token_id or []
        start = self._start_id if self._start_id is not None else next(iter(ends), 0)
        texts = self._generate([[start]] * count, set(ends), length - 1, do_sample=True, top_k=0)
        return [Row([start, *text], [start, *text]) for text in texts]

    def distances(
        self, rows: Sequence[Row], original: str | Path, compressed: Sequence[str | Path]
    ) -> list[Divergences]:
        """How far forms of a task, and the base, are from its original on some text.

        Args:
            rows: every label counts that is not IGNORED.
            compressed: PEFT folders.

        Raises:
            As :meth:`adapter`.
        """
        forms = {str(number): Path(folder) for number, folder in enumerate(compressed)}
        base, sums = _Sums(rows), {name: _Sums(rows) for name in forms}
        with self._loaded({"original": Path(original), **forms}) as loaded:
            for seen in self._side_by_side(loaded, rows, self._text, list(forms)):
                assert seen.base is not None
                base.add(seen.batch, seen.owners, seen.divergences(seen.base))
                for name, ours in seen.ours.items():
                    sums[name].add(seen.batch, seen.owners, seen.divergences(ours))
        known = base.finish(f"{original} beside the base")
        return [
            Divergences(known.nll, sums[name].finish(str(folder)).nll, known.tokens)
            for name, folder in forms.items()
        ]

    def _compare_tokens(
        self, task: str, base: ExampleLosses, compressed: Path, original: Path
    ) -> Comparison:
        rows, text, key = self._rows(task), self._text_of(task), (task, original.absolute())
        losses = {"original": _Sums(rows), "compressed": _Sums(rows)}
        distances = {"base": _Sums(rows), "compressed": _Sums(rows)}
        agreed, greedy = 0, None
        with self._loaded({"original": original, "compressed": compressed}) as loaded:
            self._check_tokens(rows, str(original))
            with_base = key not in self._from_base
            for seen in self._side_by_side(loaded, rows, text, ["compressed"], with_base):
                batch, owners, ours = seen.batch, seen.owners, seen.ours["compressed"]
                losses["original"].add(batch, owners, _nll(seen.theirs, seen.targets))
                losses["compressed"].add(batch, owners, _nll(ours, seen.targets))
                distances["compressed"].add(batch, owners, seen.divergences(ours))
                if seen.base is not None:
                    distances["base"].add(batch, owners, seen.divergences(seen.base))
                agreed += seen.agreed(ours)
            if self.options.greedy_tokens:
                greedy = self._compare_answers(loaded.use, rows, task)
        theirs_losses = losses["original"].finish(str(original))
        ours_losses = losses["compressed"].finish(str(compressed))
        self._scores[key] = TaskScores(theirs_losses)
        if key not in self._from_base:
            self._from_base[key] = distances["base"].finish(f"{original} beside the base").nll
        apart = Divergences(
            self._from_base[key],
            distances["compressed"].finish(str(compressed)).nll,
            theirs_losses.tokens,
        )
        return Comparison(
            base,
            theirs_losses,
            ours_losses,
            recovered_fraction(base, theirs_losses, ours_losses),
            kl_kept(apart),
            agreed / int(base.tokens.sum()),
            apart,
            greedy,
        )

    def _side_by_side(
        self,
        loaded: _Loaded,
        rows: Sequence[Row],
        text: TaskText,
        forms: Sequence[str],
        with_base: bool = True,
    ) -> Iterator[_Seen]:
        """Original, compressed forms and base batch by batch: no logits outlive their batch."""
        tokens = tokens_of(self._model)
        for batch in self._batches(rows):
            loaded.use("original")
            theirs, targets, owners = self._scored_logits(batch)
            ours = {}
            for name in forms:
                loaded.use(name)
                ours[name] = self._scored_logits(batch)[0]
            base = None
            if with_base:
                with loaded.as_base(), self._wide_enough(rows, text, tokens):
                    base = self._scored_logits(batch)[0][:, : theirs.shape[-1]]
            yield _Seen(batch, targets, owners, theirs, ours, base)

    def _compare_answers(
        self, use: Callable[[str], None], rows: Sequence[Row], task: str
    ) -> GreedyAgreement:
        use("original")
        theirs = self._answers(rows, task)
        use("compressed")
        return greedy_agreement(theirs, self._answers(rows, task), self.options.greedy_tokens)

    @contextmanager
    def _loaded(self, folders: Mapping[str, Path]) -> Iterator[_Loaded]:
        """Adapters on the model, the first one active."""
        layers = [name for name, _ in self._model.named_modules()]
        with tempfile.TemporaryDirectory(prefix="vllm-vlora-") as scratch:
            named = {
                name: under_model_names(folder, layers, Path(scratch) / str(number))
                for number, (name, folder) in enumerate(folders.items())
            }
            with self._on_model(named) as loaded:
                yield loaded

    @contextmanager
    def _on_model(self, folders: Mapping[str, Path]) -> Iterator[_Loaded]:
        adapters = {name: open_adapter(folder) for name, folder in folders.items()}
        _check_base_weights(list(adapters.values()))
        saved = [
            tensor.name
            for adapter in adapters.values()
            for tensor in saved_tensors(adapter.extra, adapter.config)
            if not tensor.whole
        ]
        # PEFT leaves its layers behind where loading fails, and base weights that a file brings always.
        with kept(self._model, saved) as as_it_was:
            for adapter in adapters.values():
                self._check_adapter(adapter)
            fit_vocabulary(self._model, list(adapters.values()))
            use = self._add(adapters)
            use(next(iter(adapters)))
            self._model.eval()
            yield _Loaded(use, as_it_was)

    def _add(self, adapters: Mapping[str, Adapter]) -> Callable[[str], None]:
        """Put PEFT's layers into the model; returns the function that makes an adapter active."""
        import peft

        adapted: Any = None
        for name, adapter in adapters.items():
            try:
                with as_peft_folder(adapter) as folder:
                    if adapted is None:
                        adapted = peft.PeftModel.from_pretrained(
                            self._model, str(folder), adapter_name=name
                        )
                    else:
                        _keep_tied(adapted, str(folder), name)
                        adapted.load_adapter(str(folder), name)
            except (ValueError, RuntimeError, KeyError) as error:
                raise AdapterError(
                    f"{adapter.path}: PEFT cannot load it onto {self.model_name}: {first_line(error)}"
                ) from error
        use: Callable[[str], None] = adapted.set_adapter
        return use

    def _check_adapter(self, adapter: Adapter) -> None:
        shapes = {m.name: (m.d_out, m.d_in) for m in adapter.modules.values()}
        self.check_modules(shapes, str(adapter.path))
        own = self._model.state_dict()
        for saved in saved_tensors(adapter.extra, adapter.config):
            # PEFT leaves out what it finds no place for, and says nothing.
            if saved.name not in own:
                raise ModelMismatchError(
                    f"{adapter.path}: brings {saved.key}, which the model {self.model_name} lacks: it is "
                    "run as a causal language model, without heads of other kinds"
                )

    def _batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        for batch in make_batches(rows, self.options.batch_size, self._pad_id):
            yield batch.to(self.device)

    def _losses(self, rows: Sequence[Row], what: str) -> ExampleLosses:
        sums = _Sums(rows)
        for batch in self._batches(rows):
            logits, targets, owners = self._scored_logits(batch)
            sums.add(batch, owners, _nll(logits, targets))
        return sums.finish(what)

    @torch.no_grad()
    def _scored_logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits before each supervised token (tokens, vocabulary), these tokens, and their rows."""
        targets = batch.labels[:, 1:]
        scored = targets != IGNORED
        columns = scored.any(0).nonzero()[:, 0]
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self._takes_logits_to_keep:
            logits = self._model(**inputs, use_cache=False, logits_to_keep=columns).logits
        else:
            logits = self._model(**inputs, use_cache=False).logits[:, columns]
        kept = scored[:, columns]
        return logits[kept], targets[:, columns][kept], kept.nonzero()[:, 0]

    @torch.no_grad()
    def _answers(self, rows: Sequence[Row], task: str) -> tuple[tuple[int, ...], ...]:
        """Greedy answers to the prompts of ``rows``, each up to its end-of-sequence token."""
        answers: dict[int, tuple[int, ...]] = {}
        room = max(1, self._positions - self.options.greedy_tokens)
        prompts = [prompt_of(row)[-room:] for row in rows]
        ends = set(self._model.generation_config.eos_token_id or ())
        own_end = self._text_of(task).tokenizer.eos_token_id
        ends |= set() if own_end is None else {own_end}
        order = sorted(range(len(rows)), key=lambda index: -len(prompts[index]))
        for start in range(0, len(order), self.options.batch_size):
            chosen = order[start : start + self.options.batch_size]
            asked = [prompts[index] for index in chosen]
            generated = self._generate(asked, ends, self.options.greedy_tokens)
            answers.update(zip(chosen, generated, strict=True))
        return tuple(answers[index] for index in range(len(rows)))

    def _generate(
        self, prompts: Sequence[Sequence[int]], ends: set[int], tokens: int, **how: Any
    ) -> list[tuple[int, ...]]:
        longest = max(map(len, prompts))
        padded = [[self._pad_id] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        out = self._model.generate(
            input_ids=torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=tokens,
            eos_token_id=sorted(ends) or None,
            **how,
        )
        return [_until(row[longest:].tolist(), ends) for row in out]


def _keep_tied(adapted: Any, folder: str, name: str) -> None:
    """Say of a further adapter which saved modules are tied: PEFT sees ties before the first alone.

    The weights of ``ensure_weight_tying`` stand in the file under both names.
    """
    import peft

    first = next(iter(adapted.peft_config.values()))
    tied = getattr(first, "modules_to_tie", None)
    if tied:
        config = peft.PeftConfig.from_pretrained(folder)
        config.ensure_weight_tying = False
        config.modules_to_save = [*(config.modules_to_save or ()), *tied]
        adapted.add_adapter(name, config)


def _check_base_weights(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that need different base weights: one model is under them."""
    first = adapters[0]
    wanted = {saved.key: saved for saved in saved_tensors(first.extra, first.config)}
    for other in adapters[1:]:
        keys = [saved.key for saved in saved_tensors(other.extra, other.config) if not saved.whole]
        keys += [key for key, saved in wanted.items() if not saved.whole and key not in keys]
        ours, theirs = first.extra_tensors() if keys else {}, other.extra_tensors() if keys else {}
        for key in keys:
            if key not in ours or key not in theirs or not torch.equal(ours[key], theirs[key]):
                raise AdapterError(
                    f"{other.path}: its {key}, a weight of the base model, is not that of {first.path}; "
                    "give the original that the task was made from"
                )


class _Sums:
    """What each scored token costs, summed by example while batches come in any order."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._nll = torch.zeros(len(rows), dtype=torch.float64)
        self._tokens = torch.tensor([row.supervised for row in rows])

    def add(self, batch: Batch, owners: torch.Tensor, costs: torch.Tensor) -> None:
        places = torch.tensor(batch.indices)[owners.cpu()]
        self._nll.index_add_(0, places, costs.double().cpu())

    def finish(self, what: str) -> ExampleLosses:
        if not is_finite(self._nll):
            raise AdapterError(
                f"{what}: the loss is not finite; run with --dtype float32, and look for NaN in its "
                "weights if that does not help"
            )
        return ExampleLosses(self._nll, self._tokens)


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, (tokens,), in nats."""
    parts = [
        torch.nn.functional.cross_entropy(chunk.float(), wanted, reduction="none")
        for chunk, wanted in zip(_in_chunks(logits), targets.split(_chunk_rows(logits)))
    ]
    return torch.cat(parts)


def prompt_of(row: Row) -> list[int]:
    """What stands before the first supervised token; of a plain text its first half."""
    if row.labels[0] != IGNORED:
        return row.input_ids[: max(1, len(row.input_ids) // 2)]
    first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    return row.input_ids[:first]


def _until(tokens: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    """The tokens up to and with the first end; what follows it is padding."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: last + 1])


def _chunk_rows(logits: torch.Tensor) -> int:
    return max(1, _LOGITS_AT_ONCE // logits.shape[-1])


def _in_chunks(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return logits.split(_chunk_rows(logits))


def _load_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"evaluation needs peft ({error}); install it: pip install 'vllm-vlora[evaluate]'"
        ) from error
    tokenizer, model = load_base_model(name, device, dtype)
    import transformers

    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    # Nothing else of the model's own settings (penalties, sampling) belongs in a comparison.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(end for end in ends if end is not None) or None,
        pad_token_id=padding_id(tokenizer),
    )
    return tokenizer, model.eval()


# --- a whole checkpoint ---------------------------------------------------------------------------


def evaluate_checkpoint(
    evaluator: Evaluator,
    checkpoint: Checkpoint,
    originals: Mapping[str, str | Path],
    *,
    losses_only: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> EvaluationReport:
    """Judge every task that the evaluator has data for.

    Args:
        originals: task id -> PEFT folder of the adapter that it was made from.
        losses_only: recovered fractions and weights only: no divergence, no agreement.
        command: what was called, for the report.
        progress: called with (stage, tasks done, all tasks).

    Raises:
        TaskNotFoundError: data or an original is given for a task that the checkpoint lacks.
        ModelMismatchError: the base model is another than that of the checkpoint.
        AdapterError, CheckpointError, OutputError: something cannot be read or exported.
    """
    started = time.monotonic()
    for task in [*evaluator.data, *originals]:
        checkpoint.record(task)
    evaluator.check_modules(
        {module.name: (module.d_out, module.d_in) for module in checkpoint.modules},
        str(checkpoint.path),
    )
    opened = {task: open_adapter(originals[task]) for task in evaluator.data if task in originals}
    wanted = [task for task in checkpoint.tasks if task in evaluator.data]
    for task in wanted:
        # Data that cannot be read is said before anything is run; by a kept tokenizer it is read later.
        if task in opened or TOKENIZER_CONFIG not in checkpoint.attachments.get(task, {}):
            evaluator.choose_tokenizer(task, *([opened[task].path] if task in opened else []))
    spectra = SpectrumCollector()
    tasks: list[TaskFidelity] = []
    for task, folder in _exported(checkpoint, wanted):
        if progress is not None:
            progress("evaluate", len(tasks), len(wanted))
        tasks.append(
            _judge(evaluator, checkpoint, task, folder, opened.get(task), spectra, losses_only)
        )
    if progress is not None:
        progress("compare tasks", 0, 1)
    return EvaluationReport(
        checkpoint=str(checkpoint.path),
        base_model=evaluator.model_name,
        nbytes=checkpoint.nbytes,
        original_nbytes=checkpoint.original_nbytes,
        basis_nbytes=checkpoint.basis_nbytes,
        tasks=tuple(tasks),
        not_evaluated=tuple(task for task in checkpoint.tasks if task not in evaluator.data),
        spectra=tuple(spectra.spectra()),
        similarity=_similarity({task: opened[task] for task in wanted if task in opened}),
        setting=describe_setting(evaluator, command, checkpoint.base_model),
        seconds=time.monotonic() - started,
    )


def _exported(checkpoint: Checkpoint, tasks: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield (task, its PEFT folder in float32); the folder goes when the next ones come."""
    for start in range(0, len(tasks), _EXPORTED_AT_ONCE):
        with tempfile.TemporaryDirectory(prefix="vllm-vlora-") as root:
            chosen = tasks[start : start + _EXPORTED_AT_ONCE]
            yield from export_all(
                checkpoint, chosen, Path(root) / "tasks", dtype=torch.float32
            ).items()


def _judge(
    evaluator: Evaluator,
    checkpoint: Checkpoint,
    task: str,
    folder: Path,
    original: Adapter | None,
    spectra: SpectrumCollector,
    losses_only: bool,
) -> TaskFidelity:
    record = checkpoint.record(task)
    # As the original and the export have them.
    names = {s.module: record.own_name(checkpoint.modules[s.module].name) for s in record.segments}
    errors: dict[str, float | None] = {names[s.module]: s.error for s in record.segments}
    error: float | None = record.error
    if original is not None:
        modules = compare_weights(original, open_adapter(folder))
        errors = {module.name: module.error for module in modules}
        error = total_error(modules)
        spectra.add(modules, {names[s.module]: s.rank for s in record.segments})
    found = evaluator.compare(
        task, folder, None if original is None else original.path, losses_only=losses_only
    )
    files, tokenizer = evaluator.files(task), evaluator.tokenizer(task)
    return TaskFidelity(
        task_id=task,
        data=tuple(map(str, files)),
        data_digest=data_digest(files),
        examples=len(found.base.nll),
        tokens=int(found.base.tokens.sum()),
        left_out=evaluator.left_out(task),
        base_loss=found.base.loss,
        adapter_loss=None if found.original is None else found.original.loss,
        compressed_loss=found.compressed.loss,
        kl_kept=found.kl_kept,
        recovered=found.recovered,
        agreement=found.agreement,
        kl=found.kl,
        kl_base=found.kl_base,
        greedy=found.greedy,
        modules=errors,
        error=error,
        original=None if original is None else str(original.path),
        # The export is gone when the report is read.
        tokenizer=str(checkpoint.path) if tokenizer == str(folder) else tokenizer,
        nbytes=checkpoint.lora_nbytes(task),
        original_nbytes=record.original_nbytes,
        stored_as=dict(
            Counter(f"{s.representation} {s.format}" for s in record.segments).most_common()
        ),
        no_update=has_no_update(record),
    )


def _similarity(
    adapters: Mapping[str, Adapter],
) -> tuple[tuple[str, ...], tuple[tuple[float, ...], ...]] | None:
    tasks = tuple(adapters)[:SIMILARITY_LIMIT]
    if len(tasks) < 2:
        return None
    found = cosines(inner_products([adapters[task] for task in tasks]))
    return tasks, tuple(tuple(row) for row in found.tolist())


def describe_setting(
    evaluator: Evaluator, command: str, recorded_base: str | None = None
) -> dict[str, str]:
    """Versions, machine, command and options that a figure must carry."""
    import peft
    import transformers

    device = evaluator.device
    setting = {
        "command": command,
        "base model the checkpoint names": recorded_base or "",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "vllm-vlora": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu_name()}, "
        f"{torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(evaluator.dtype).removeprefix("torch."),
    }
    options = asdict(evaluator.options)
    for name in ("max_length", "batch_size", "max_examples", "greedy_tokens"):
        setting[name] = "all" if options[name] is None else str(options[name])
    return {name: value for name, value in setting.items() if value}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    # Elsewhere than on Linux there is no such file.
    except OSError:
        return platform.processor() or "unknown processor"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")
