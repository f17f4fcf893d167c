"""The chat templates among the files that a checkpoint keeps with its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from vllm_vlora.checkpoint.attachments import Attached
from vllm_vlora.checkpoint.manifest import FileRef, read_checked
from vllm_vlora.errors import CheckpointError
from vllm_vlora.strict_json import decode

KeptFile: TypeAlias = tuple[str, FileRef]
"""What a file was called in an adapter's folder, and where it is kept."""
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


def template_file(files: Attached) -> KeptFile | None:
    """Which of the files kept with a task is to have its default chat template; None for none."""
    return next(((name, files[name]) for name in (_FILE, _CONFIG) if name in files), None)


def read_template(checkpoint: Path, name: str, ref: FileRef) -> str | None:
    """The default chat template in such a file, or None.

    Raises:
        CheckpointError: the file is missing or damaged, or is no text.
    """
    data = read_checked(checkpoint / ref.file, ref)
    try:
        if name == _FILE:
            return data.decode()
        config = decode(data, object)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint / ref.file}: this {name} is none ({error}); mend it in the adapters and add "
            "the tasks again"
        ) from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
