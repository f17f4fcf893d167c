"""Push a checkpoint to the Hugging Face Hub, and pull one, checked before and after.

A push is one commit: whoever downloads the repository gets the old checkpoint or the new one. The token
is huggingface_hub's own business (``HF_TOKEN``, or ``hf auth login``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    validate_repo_id,
)

from vllm_vlora.atomic import check_apart, link_or_copy, publish_folder, scratch_beside
from vllm_vlora.checkpoint.aliases import ALIASES_FILE
from vllm_vlora.checkpoint.attachments import ATTACHMENTS_FILE, ATTACHMENTS_FOLDER
from vllm_vlora.checkpoint.card import model_card
from vllm_vlora.checkpoint.components import COMPONENTS_FILE
from vllm_vlora.checkpoint.manifest import BASIS_INDEX_FILE, CONFIG_FILE, TASKS_FOLDER
from vllm_vlora.checkpoint.own_files import CARD_FILE, DESCRIPTIONS, checkpoint_files
from vllm_vlora.checkpoint.pinning import check_content
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import report_contents
from vllm_vlora.checkpoint.router_files import NETWORK_GLOB, ROUTER_FILE
from vllm_vlora.checkpoint.task_entry import task_files
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.connections import why_unreachable
from vllm_vlora.errors import CheckpointError, OptionError, OutputError
from vllm_vlora.links import refuse_link_out
from vllm_vlora.regular_files import JSON_BYTES, copy_regular
from vllm_vlora.wording import first_line

# Files of an earlier checkpoint that the new one does not have.
_REPLACED = [
    *sorted(DESCRIPTIONS),
    f"{TASKS_FOLDER}/*.safetensors",
    "basis*.safetensors",
    f"{ATTACHMENTS_FOLDER}/*",
    NETWORK_GLOB,
]


@dataclass(frozen=True)
class PushReport:
    """What was pushed: the repository, the revision that was written to and the page of the commit."""

    repo_id: str
    revision: str
    url: str
    commit: str
    tasks: int
    nbytes: int


def push_checkpoint(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    message: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PushReport:
    """Upload a checkpoint and its model card as one commit; make the repository where there is none.

    Only the checkpoint's own files and a licence are uploaded, as they are when this begins, whatever
    edits do meanwhile; files of an earlier checkpoint in the repository are removed in the same commit.

    Args:
        checkpoint: a folder. repo_id: ``org/name``.
        private: of a repository that is made; None leaves it to the organisation.
        message: of the commit. revision: a branch, made where there is none; ``main`` by default.
        token: in place of huggingface_hub's own.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged; nothing was uploaded.
        OptionError: ``repo_id`` is no Hub id.
        OutputError: the Hub refuses or cannot be reached, or the files cannot be put aside for it.

    Examples:
        >>> push_checkpoint(checkpoint, "not a Hub id")
        Traceback (most recent call last):
        ...
        vllm_vlora.errors.OptionError: 'not a Hub id' is no Hub id of the form org/name ...
    """
    _check_repo_id(repo_id)
    path = Path(checkpoint).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r}: no such folder")
    with _staged(path, _files(Checkpoint.open(path))) as folder:
        _check_sound(folder, path)
        return _upload(folder, repo_id, private, message, revision, _api(token))


def _upload(
    folder: Path,
    repo_id: str,
    private: bool | None,
    message: str | None,
    revision: str | None,
    api: Any,
) -> PushReport:
    opened = Checkpoint.open(folder)
    count = len(opened.tasks)
    words = message or f"{count} LoRA {'task' if count == 1 else 'tasks'} (vllm-vlora)"
    try:
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=words,
            revision=revision,
            delete_patterns=_REPLACED,
        )
        if not (folder / CARD_FILE).exists():
            api.upload_file(
                path_or_fileobj=_card(opened),
                path_in_repo=CARD_FILE,
                repo_id=repo_id,
                revision=revision,
                commit_message="Model card",
            )
    # The transport's errors differ between versions of huggingface_hub (requests, httpx), and a
    # failed upload of any kind is the same to the user.
    except Exception as problem:
        raise OutputError(f"cannot push to {repo_id}: {_explain(problem)}") from problem
    return PushReport(
        repo_id, revision or "main", url, str(commit.commit_url), count, opened.nbytes
    )


def pull_checkpoint(ref: str, output: str | Path, *, force: bool = False) -> Checkpoint:
    """Download a checkpoint into a folder that appears whole and checked, or not at all.

    Args:
        ref: ``org/name`` or ``org/name@revision``, and ``@sha256:...`` for its content.
        output: the folder to publish.
        force: replace a checkpoint at ``output``.

    Returns:
        The checkpoint in its new place, opened.

    Raises:
        CheckpointError: no such repository, no checkpoint in it, or a file that is damaged.
        OutputError: ``output`` may not be replaced or cannot be written.

    Examples:
        >>> pull_checkpoint(str(checkpoint), folder / "copy").tasks.keys()
        dict_keys(['task_0', 'task_1', 'task_2', 'task_3'])
    """
    opened = Checkpoint.open(ref)
    snapshot = opened.path
    check_apart(output, [snapshot])
    with publish_folder(output, force=force, owned=checkpoint_files) as folder:
        for name, most in _files(opened).items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                # The Hub's cache holds links to its blobs; the copy is the file itself.
                copy_regular(snapshot / name, target, most)
            except OSError as error:
                if error.filename != str(snapshot / name):
                    raise
                reason = error.strerror
                if isinstance(error, FileNotFoundError):
                    reason = "missing; it was not pushed whole"
                raise CheckpointError(f"{ref}: {name} is {reason}") from error
        # Of what was copied: nobody finds this folder, and at ``output`` may be the one before.
        _check_sound(folder, snapshot)
        check_content(snapshot, Checkpoint.open(folder).content_digest, opened.content_digest)
    return Checkpoint.open(output)


@contextmanager
def _staged(path: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder with these files alone: what else lies in theirs is nobody's to publish.

    As patterns of what to upload the Hub's library would compare each name with each. An upload takes
    minutes, and a lock would hold up who edits meanwhile. Edits put other files in the old ones' places
    and write into none, so second names keep what there was.

    Raises:
        OutputError: a file cannot be put there.
    """
    with scratch_beside(path) as folder:
        for name in names:
            aside = folder / name
            aside.parent.mkdir(parents=True, exist_ok=True)
            try:
                # What is missing is said where the whole is checked.
                with suppress(FileNotFoundError):
                    link_or_copy((path / name).resolve(), aside)
            except OSError as error:
                raise OutputError(
                    f"cannot put {path / name} aside to upload it: {error.strerror}; nothing was "
                    "published"
                ) from error
        yield folder


def _api(token: str | None) -> Any:
    return huggingface_hub.HfApi(token=token)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OptionError(
            f"{repo_id!r} is no Hub id of the form org/name ({first_line(error).rstrip('.')})"
        ) from error


def _check_sound(path: Path, said: Path) -> None:
    """Raise CheckpointError unless every file of the checkpoint is as its manifest says.

    Args:
        said: what the error calls the folder.
    """
    problems = validate(path)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        first = problems[0].replace(str(path), str(said))
        raise CheckpointError(f"{first}{more}; nothing was published")


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    """The checkpoint's files, and what describes it, each with the most bytes that it may have.

    None of them is a link to something outside.

    Raises:
        CheckpointError: one is, or what no manifest gives a size is larger than it can be.
    """
    refs = [*checkpoint.files, *task_files(checkpoint.tasks)]
    refs += [ref for refs in checkpoint.attachments.values() for ref in refs.values()]
    refs += [checkpoint.router.weights] if checkpoint.router is not None else []
    files = {CONFIG_FILE: JSON_BYTES, **{ref.file: ref.nbytes for ref in refs}}
    beside = [BASIS_INDEX_FILE, ATTACHMENTS_FILE, ALIASES_FILE, ROUTER_FILE]
    beside += [COMPONENTS_FILE, CARD_FILE]
    beside += [entry.name for entry in checkpoint.path.glob("LICENSE*") if entry.is_file()]
    files |= {name: JSON_BYTES for name in beside if (checkpoint.path / name).is_file()}
    for name in files:
        refuse_link_out(checkpoint.path / name, checkpoint.path, CheckpointError)
    for name in beside:
        path = checkpoint.path / name
        # A file is grown to any size without a byte written, and uploaded with all of them.
        if path.is_file() and path.stat().st_size > JSON_BYTES:
            raise CheckpointError(f"{path} has more than {JSON_BYTES} bytes; remove it")
    return files


def _card(checkpoint: Checkpoint) -> bytes:
    contents = report_contents(
        checkpoint.path, checkpoint.tasks, checkpoint.modules, checkpoint.basis_nbytes
    )
    return model_card(checkpoint.base_model, contents).encode()


def _explain(problem: Exception) -> str:
    response = getattr(problem, "response", None)
    status = getattr(response, "status_code", None)
    denied = isinstance(problem, HfHubHTTPError) and status in (401, 403)
    if denied or isinstance(problem, RepositoryNotFoundError):
        return "the Hub denies access: set HF_TOKEN to a token that may write there"
    if isinstance(problem, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that nothing is sent to the Hub; unset it and push again"
    why = why_unreachable(problem)
    said = f"{type(problem).__name__}: {first_line(problem)}"
    said = f"the Hub cannot be reached ({why})" if why else said
    return f"{said}; check the network and push again"
