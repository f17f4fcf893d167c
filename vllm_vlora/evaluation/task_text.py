"""Data files in the tokens of a tokenizer: the base model's, or one that an adapter brings along."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vlora.adapters.companions import companion_files
from vllm_vlora.checkpoint.manifest import hash_file
from vllm_vlora.errors import AdapterError, DataError
from vllm_vlora.evaluation.texts import Example, Row, tokenize
from vllm_vlora.wording import first_line

TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Prepared:
    """A data file in tokens; ``left_out`` examples have no supervised token."""

    rows: tuple[Row, ...]
    left_out: int


class TaskText:
    """Data files as one tokenizer reads them; each is tokenised once.

    Args:
        tokenizer: of transformers.
        examples: data file -> its examples.
        max_length: tokens to which an example is cut.

    Attributes:
        folder: where the tokenizer was read, if it is an adapter's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        examples: Mapping[Path, Sequence[Example]],
        max_length: int,
        folder: Path | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.folder = folder
        self._examples = examples
        self._max_length = max_length
        self._prepared: dict[Path, Prepared] = {}

    def prepared(self, path: Path) -> Prepared:
        """A data file in tokens.

        Raises:
            DataError: none of its examples has a token to be scored.
        """
        if path not in self._prepared:
            rows = [tokenize(one, self.tokenizer, self._max_length) for one in self._examples[path]]
            scored = tuple(row for row in rows if row.supervised)
            if not scored:
                raise DataError(
                    f"{path}: no token to be scored within the first {self._max_length} of any "
                    "example; give a greater --max-length"
                )
            self._prepared[path] = Prepared(scored, len(rows) - len(scored))
        return self._prepared[path]

    def own_of(self, folder: Path) -> TaskText:
        """The same files read by the tokenizer in an adapter's folder.

        Raises:
            AdapterError: it cannot be loaded.
        """
        return TaskText(_load(folder), self._examples, self._max_length, folder)

    def reads_as(self, other: TaskText, files: Sequence[Path]) -> bool:
        """Whether files have the same tokens as another reads, as far as that can read them at all.

        Raises:
            DataError: as ``prepared``, of this tokenizer.
        """
        ours = [self.prepared(path) for path in files]
        try:
            return ours == [other.prepared(path) for path in files]
        except DataError:
            # A base model often has no chat template.
            return False


def tokenizer_digest(folder: Path) -> str | None:
    """SHA-256 of the files in an adapter's folder that make its tokenizer, with their names.

    None where it has none.

    Raises:
        AdapterError: one of the files is no regular one.
    """
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    files = sorted(companion_files(folder).items())
    named = [f"{name} {hash_file(path)[0]}" for name, path in files]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def _load(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    # Whatever is wrong with its files, also a bare Exception or KeyError of the parsers, is the folder's.
    except Exception as error:
        raise AdapterError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            f"repair it, or take {TOKENIZER_CONFIG} away to use the base model's"
        ) from error
