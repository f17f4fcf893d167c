"""Files that travel with an adapter and are not its weights: tokenizer, added tokens, chat templates.

A trainer saves them where the adapter needs other ones than its base model has (a chat template, new
special tokens), and often where it does not. The names are those that transformers writes and reads.
"""

from __future__ import annotations

import os
from pathlib import Path

from vllm_vlora.errors import AdapterError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.regular_files import JSON_BYTES

COMPANION_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)

TEMPLATES_FOLDER = "additional_chat_templates"
"""Where transformers keeps the chat templates beside the default one, ``NAME.jinja``."""
COMPANION_PATTERNS = [*sorted(COMPANION_FILES), f"{TEMPLATES_FOLDER}/*.jinja"]
"""What is downloaded of an adapter on the Hub, beside its weights."""


def companion_files(folder: Path) -> dict[str, Path]:
    """Name within the adapter's folder, with ``/`` between its parts -> the file.

    Raises:
        AdapterError: one of these names is no regular file, or the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
        if TEMPLATES_FOLDER in names:
            names += [
                f"{TEMPLATES_FOLDER}/{path.name}"
                for path in folder.glob(f"{TEMPLATES_FOLDER}/*.jinja")
            ]
    except OSError as error:
        raise AdapterError(f"{folder}: {error.strerror}") from error
    files = {name: folder / name for name in sorted(names) if is_companion(name)}
    for path in files.values():
        refuse_link_out(path, folder, AdapterError)
        if not path.is_file():
            raise AdapterError(
                f"{path} is no regular file; put the tokenizer's file there or take the name away"
            )
        if path.stat().st_size > JSON_BYTES:
            raise AdapterError(f"{path} has {path.stat().st_size} bytes, which no tokenizer has")
    return files


def is_companion(name: str) -> bool:
    """Whether a name within an adapter's folder is one of such a file."""
    folder, slash, file = name.rpartition("/")
    if not slash:
        return file in COMPANION_FILES
    return folder == TEMPLATES_FOLDER and file.endswith(".jinja") and file != ".jinja"
