"""Text that a model is measured on: read from files, turned into token rows, put into batches.

A file is one of two kinds, known by the end of its name.

``.jsonl``: one JSON object a line, in one of three forms; other fields are left alone:

- ``{"messages": [{"role": ..., "content": ...}, ...]}``: a chat, rendered by the tokenizer's chat
  template; the assistant's turns carry the loss, and what follows the last of them is left out;
- ``{"prompt": ..., "completion": ...}``: taken as they stand; the completion, closed by the
  end-of-sequence token, carries the loss; ``"references": [...]`` are other right completions;
- ``{"text": ...}``: taken as it stands; every token carries the loss.

``.txt``: paragraphs separated by blank lines; each is a text of its own.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_vlora.errors import DataError
from vllm_vlora.regular_files import TEXT_BYTES, read_regular
from vllm_vlora.strict_json import JSONError, decode_typed

IGNORED = -100
"""The label of a token that carries no loss, as torch and transformers have it."""

_FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One example: a chat, or a prompt (possibly empty) with the text that follows it.

    Attributes:
        place: where it was read, ``file:line``.
        messages: the turns of a chat; empty for the other forms.
        prompt: what precedes ``text`` and carries no loss; None for a plain text.
        text: the completion, or the plain text.
        references: other completions that are right as well; only answers are judged by them.
    """

    place: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    text: str = ""
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Token ids, and labels: the same ids, with IGNORED where a token carries no loss."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """Tokens whose prediction is scored; the first has nothing before it and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length.

    Attributes:
        indices: the place of each row in the list that was batched.
        input_ids, attention_mask, labels: (rows, longest) int64; labels of padding are IGNORED.
    """

    indices: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        tensors = (self.input_ids, self.attention_mask, self.labels)
        return Batch(self.indices, *(tensor.to(device) for tensor in tensors))


# --- reading --------------------------------------------------------------------------------------


def read_examples(path: str | Path) -> list[Example]:
    """Every example of a file, in its order; see the module for the forms.

    Raises:
        DataError: naming the file and the line: missing, unreadable, neither ``.jsonl`` nor
            ``.txt``, empty, no JSON object, or none of the forms.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".txt": _read_paragraphs}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: unknown kind of file; give .jsonl or .txt")
    examples = readers[path.suffix.lower()](path, _read_text(path))
    if not examples:
        raise DataError(f"{path}: holds no example; give lines of the form {_FORMS}")
    return examples


def data_digest(paths: Iterable[str | Path]) -> str:
    """SHA-256 (hex) over the contents of the files in their order; names do not count.

    Raises:
        DataError: a file cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        # Digests have one length, so no two lists of files run together to the same bytes.
        total.update(hashlib.sha256(_read_bytes(Path(path))).digest())
    return total.hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return read_regular(path, TEXT_BYTES)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a file that can be read") from error


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _read_paragraphs(path: Path, text: str) -> list[Example]:
    examples: list[Example] = []
    paragraph: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            place = f"{path}:{number - len(paragraph)}"
            examples.append(Example(place, text="\n".join(paragraph)))
            paragraph = []
    return examples


def _read_jsonl(path: Path, text: str) -> list[Example]:
    # Not splitlines: JSON strings may hold other line separators, such as U+2028, as they are.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_line(f"{path}:{number}", line) for number, line in lines if line.strip()]


def _parse_line(place: str, line: str) -> Example:
    try:
        data = decode_typed(line.encode(), object)
    except JSONError as error:
        raise DataError(f"{place}: not JSON ({error}); write one object a line") from error
    if not isinstance(data, dict):
        raise DataError(f"{place}: not a JSON object; give {_FORMS}")
    forms = [
        ("messages" in data, _parse_messages),
        ("prompt" in data or "completion" in data, _parse_completion),
        ("text" in data, _parse_plain),
    ]
    found = [parse for present, parse in forms if present]
    if len(found) != 1:
        problem = "more than one form" if found else "no known form"
        raise DataError(f"{place}: {problem} (fields {', '.join(data) or 'none'}); give {_FORMS}")
    return found[0](place, data)


def _parse_messages(place: str, data: dict[str, Any]) -> Example:
    turns = data["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: messages must be a list of turns; give {_FORMS}")
    messages = tuple(_parse_turn(f"{place}: message {i + 1}", turn) for i, turn in enumerate(turns))
    return Example(place, messages=messages)


def _parse_turn(place: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f'{place}: not an object; give {{"role": ..., "content": ...}}')
    return Message(_field(place, turn, "role"), _field(place, turn, "content"))


def _parse_completion(place: str, data: dict[str, Any]) -> Example:
    references = data.get("references", [])
    if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
        raise DataError(f"{place}: references is not a list of texts; give other right completions")
    return Example(
        place,
        prompt=_field(place, data, "prompt"),
        text=_field(place, data, "completion"),
        references=tuple(references),
    )


def _parse_plain(place: str, data: dict[str, Any]) -> Example:
    return Example(place, text=_field(place, data, "text"))


def _field(place: str, data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} is not text; give a string")
    return value


# --- tokens ---------------------------------------------------------------------------------------


def tokenize(example: Example, tokenizer: Any, max_length: int) -> Row:
    """Token ids and labels of one example, cut to its first ``max_length`` tokens.

    The parts are tokenised one by one, as at inference, where the prompt is there before its
    answer. A row whose prompt alone fills ``max_length`` has no supervised token left.

    Args:
        example: what ``read_examples`` returned.
        tokenizer: a tokenizer of transformers; a chat needs one with a chat template.
        max_length: the most tokens of the row.

    Raises:
        DataError: the template is missing, refuses the chat or rewrites earlier turns, or the
            example has no token.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, scored, special in _parts(example, tokenizer):
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        input_ids += ids
        labels += ids if scored else [IGNORED] * len(ids)
    if not input_ids:
        raise DataError(f"{example.place}: no token in it; remove the example")
    return Row(input_ids[:max_length], labels[:max_length])


def tokenize_windows(example: Example, tokenizer: Any, max_length: int) -> list[Row]:
    """As ``tokenize``, but a plain text is cut into rows of ``max_length`` and nothing is lost.

    Raises:
        DataError: as ``tokenize``.
    """
    if example.messages or example.prompt is not None:
        return [tokenize(example, tokenizer, max_length)]
    whole = tokenize(example, tokenizer, sys.maxsize)
    starts = range(0, len(whole.input_ids), max_length)
    ids = [whole.input_ids[start : start + max_length] for start in starts]
    return [Row(window, list(window)) for window in ids]


Part = tuple[str, bool, bool]
"""Text, whether it carries the loss, whether the tokenizer adds its special tokens."""


def _parts(example: Example, tokenizer: Any) -> list[Part]:
    if example.messages:
        return _chat_parts(example, tokenizer)
    if example.prompt is None:
        return [(example.text, True, True)]
    answer = example.text + (tokenizer.eos_token or "")
    return [(example.prompt, False, True), (answer, True, False)]


def _chat_parts(example: Example, tokenizer: Any) -> list[Part]:
    """The rendered chat in pieces that alternate between what is given and what is answered."""
    parts: list[Part] = []
    done = ""
    for index, message in enumerate(example.messages):
        if message.role != "assistant":
            continue
        head = _render(example, tokenizer, index, prompted=True)
        whole = _render(example, tokenizer, index + 1, prompted=False)
        if not head.startswith(done) or not whole.startswith(head):
            raise DataError(
                f"{example.place}: the chat template rewrites earlier turns, so that the answers "
                "cannot be told apart; make each answer the last turn of an example"
            )
        answer = _until_end(whole[len(head) :], tokenizer.eos_token)
        parts += [(head[len(done) :], False, False), (answer, True, False)]
        done = head + answer
    if not parts:
        raise DataError(f"{example.place}: no turn of the assistant; add the answer")
    return parts


def _until_end(answer: str, end: str | None) -> str:
    # What templates put after the end token, a line break mostly, no model ever has to say.
    place = answer.rfind(end) if end else -1
    return answer if place < 0 else answer[: place + len(end or "")]


def _render(example: Example, tokenizer: Any, turns: int, *, prompted: bool) -> str:
    import jinja2

    messages = [{"role": m.role, "content": m.content} for m in example.messages[:turns]]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompted
        )
    except (jinja2.TemplateError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{example.place}: the chat template cannot render it: {reason}; use the model that "
            "was tuned for chats, or give prompt and completion"
        ) from error


# --- batches --------------------------------------------------------------------------------------


def make_batches(rows: Sequence[Row], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` rows, longest first, ties in their order.

    Rows of like length share a batch, so that little is padding; the longest come first, so that a
    batch too large for the memory shows at once. The order depends on the lengths alone.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield _collate(tuple(indices), [rows[index] for index in indices], pad_id)


def padding_id(tokenizer: Any) -> int:
    """A token id to pad with; masked everywhere, so any id of the vocabulary will do."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def _collate(indices: tuple[int, ...], rows: Sequence[Row], pad_id: int) -> Batch:
    longest = max(len(row.input_ids) for row in rows)

    def padded(sequences: Iterable[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([ids + [fill] * (longest - len(ids)) for ids in sequences])

    return Batch(
        indices,
        padded((row.input_ids for row in rows), pad_id),
        padded(([1] * len(row.input_ids) for row in rows), 0),
        padded((row.labels for row in rows), IGNORED),
    )
