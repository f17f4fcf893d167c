"""Chats rendered with the chat template that a task brought along, where the operator asks for it.

vLLM renders every chat with the base model's template, whatever adapter the request names. A template is
a program (Jinja, which transformers runs sandboxed) from whoever made the adapter, so this is a setting.
Only the text is the task's: vLLM has one tokenizer, so tokens that a task added to it are not known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_vlora.checkpoint.attachments import read_attached
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin.identity import MEMORY, TaskPath, task_paths
from vllm_vlora.plugin.named_requests import answering
from vllm_vlora.strict_json import decode

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


class TaskTemplates:
    """The chat templates of a checkpoint's tasks, in an API server."""

    def __init__(self) -> None:
        self._templates: dict[str, str] = {}

    def load(self, ref: str | Path, held: Mapping[str, TaskPath]) -> list[str]:
        """Read those of a checkpoint; returns the tasks that have one.

        Args:
            held: the paths of the tasks that are served.

        Raises:
            CheckpointError: the checkpoint, or a file that is kept with a task, is damaged, or these are
                not its tasks.
        """
        checkpoint = Checkpoint.open(ref)
        # A task from memory brought no template, and stands before the checkpoint's of its name.
        own = {task: path for task, path in held.items() if path.checkpoint != MEMORY}
        hidden = held.keys() - own.keys()
        there = task_paths(checkpoint).items()
        if {task: path for task, path in there if task not in hidden} != own:
            raise CheckpointError(
                f"{checkpoint.path} was published again while the server started; start it again"
            )
        found = {
            task: task_template(checkpoint, task) for task in checkpoint.attachments if task in own
        }
        self._templates = {task: text for task, text in found.items() if text is not None}
        return list(self._templates)

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``build_chat_params`` of a request, with its task's template in place of the server's."""

        @functools.wraps(original)
        def build(self_: Any, default_template: str | None, *args: Any, **kwargs: Any) -> Any:
            own = self._templates.get(answering(self_.model))
            return original(self_, own or default_template, *args, **kwargs)

        return build


def task_template(checkpoint: Checkpoint, task: str) -> str | None:
    """The default chat template among the files kept with a task, or None.

    Raises:
        CheckpointError: the file is damaged, or is no text.
    """
    files = checkpoint.attachments.get(task, {})
    kept = {name: ref for name, ref in files.items() if name in (_FILE, _CONFIG)}
    data = read_attached(checkpoint.path, kept)
    source = _FILE if _FILE in data else _CONFIG
    try:
        if source == _FILE:
            return data[source].decode()
        config = decode(data.get(source, b"{}"), object)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: task {task!r}, its {source}: {error}; mend it in the adapter and add "
            "the task again"
        ) from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
