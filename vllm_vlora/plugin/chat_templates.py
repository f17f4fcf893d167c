"""Chats rendered with the chat template that a task brought along, where the operator asks for it.

vLLM renders every chat with the base model's template, whatever adapter the request names. A template is
a program (Jinja, which transformers runs sandboxed) from whoever made the adapter, so this is a setting.
Only the text is the task's: vLLM has one tokenizer, so tokens that a task added to it are not known.

Templates are read in the folder, which may have another state than the one that is served: a later one,
or one that was refused. Of a task that is not there as it is served, what was read before stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin.events import logger
from vllm_vlora.plugin.identity import MEMORY, TaskPath, parse_task_path, task_paths
from vllm_vlora.plugin.kept_templates import KeptFile, read_template, template_file
from vllm_vlora.plugin.named_requests import TaskRequests, answering
from vllm_vlora.wording import some_of

_File: TypeAlias = tuple[str, str]
"""What a file is called in an adapter's folder, and its SHA-256."""


class Templates(NamedTuple):
    """The templates of one state.

    Attributes:
        held: task -> its path, of those that are in files.
        texts: task -> its template.
        files: what was found in each file.
        faults: why which tasks have none, to be said.
    """

    held: Mapping[str, TaskPath] = {}
    texts: Mapping[str, str] = {}
    files: Mapping[_File, str | None] = {}
    faults: frozenset[str] = frozenset()


class TaskTemplates:
    """The chat templates of a checkpoint's tasks, in an API server.

    Args:
        ref: the checkpoint, as ``Checkpoint.open`` takes it.
    """

    def __init__(self, ref: str | Path) -> None:
        self._ref = ref
        self._used = Templates()
        self._requests: TaskRequests | None = None

    def read(self, held: Mapping[str, TaskPath]) -> Templates:
        """Those of a state, for :meth:`use`; a file that was read for the state before is not read again.

        Args:
            held: the paths of the tasks that are served.

        Raises:
            CheckpointError: it is the first state, and the folder has not all of its tasks.
        """
        # A task from memory brought no template, and stands before the checkpoint's of its name.
        own = {task: path for task, path in held.items() if path.checkpoint != MEMORY}
        there, kept, why = self._folder()
        kept = {task: file for task, file in kept.items() if there[task] == own.get(task)}
        files, faults = _read(own, kept, self._used.files)
        texts = {task: files.get(_key(file)) for task, file in kept.items()}
        unknown = []
        for task in (task for task, path in own.items() if there.get(task) != path):
            if self._used.held.get(task) == own[task]:
                texts[task] = self._used.texts.get(task)
            else:
                unknown.append(task)
        if unknown and self._requests is None:
            raise CheckpointError(f"{why} while the server started; start it again")
        if unknown:
            faults.append(_fault(unknown, why))
        found = {task: text for task, text in texts.items() if text is not None}
        return Templates(own, found, files, frozenset(faults))

    def use(self, templates: Templates, requests: TaskRequests) -> None:
        """Render by these from now on what is asked of these requests."""
        for fault in sorted(templates.faults - self._used.faults):
            logger.error("vllm-vlora: %s", fault)
        self._used, self._requests = templates, requests

    def _folder(self) -> tuple[dict[str, TaskPath], dict[str, KeptFile], str]:
        """What lies in the folder: its tasks' paths, their files, and why others are not there."""
        try:
            checkpoint = Checkpoint.open(self._ref)
            attached = checkpoint.attachments
        except CheckpointError as error:
            if self._requests is None:
                raise
            return {}, {}, str(error)
        found = {task: template_file(files) for task, files in attached.items()}
        kept = {task: file for task, file in found.items() if file is not None}
        return task_paths(checkpoint), kept, f"{checkpoint.path} was published again"

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``build_chat_params`` of a request, with its task's template in place of the server's."""

        @functools.wraps(original)
        def build(self_: Any, default_template: str | None, *args: Any, **kwargs: Any) -> Any:
            return original(self_, self._of(self_.model) or default_template, *args, **kwargs)

        return build

    def _of(self, name: str) -> str | None:
        """The template of the task that answers a name: an adapter of a task's name has none."""
        request = None if self._requests is None else answering(name, self._requests)
        if request is None or request.lora_name not in self._used.texts:
            return None
        path = parse_task_path(request.lora_path)
        return (
            self._used.texts[request.lora_name]
            if path == self._used.held[request.lora_name]
            else None
        )


def _read(
    paths: Mapping[str, TaskPath],
    kept: Mapping[str, KeptFile],
    before: Mapping[_File, str | None],
) -> tuple[dict[_File, str | None], list[str]]:
    """What is in the files of tasks, each read once, and what is to be said of those that cannot be."""
    whose: dict[_File, list[str]] = {}
    for task, file in kept.items():
        whose.setdefault(_key(file), []).append(task)
    files, faults = {}, []
    for key, tasks in whose.items():
        try:
            known = key in before
            files[key] = (
                before[key] if known else read_template(paths[tasks[0]].checkpoint, *kept[tasks[0]])
            )
        except CheckpointError as error:
            faults.append(_fault(tasks, error))
    return files, faults


def _key(file: KeptFile) -> _File:
    name, ref = file
    return name, ref.sha256


def _fault(tasks: list[str], why: object) -> str:
    return (
        f"chats to {some_of(map(repr, tasks))} are rendered with the base model's template: {why}"
    )
