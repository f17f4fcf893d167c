"""What is published into the served folder while an engine runs, read and checked beside its steps.

Each worker has a thread that looks at the folder's manifest a few times a second. Another manifest is
read whole, its tasks are held against the served model, and what is new in it is read once to see that
it is there and sound. Only then is the state offered; what is wrong with it is logged once, and the
state that is served stays. Nothing changes before the engine core says so (see ``residency``), since
only it knows that all workers have the same state to offer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from vllm_vlora.checkpoint.aliases import ALIASES_FILE
from vllm_vlora.checkpoint.attachments import ATTACHMENTS_FILE
from vllm_vlora.checkpoint.manifest import CONFIG_FILE, FileRef, check_size, read_checked
from vllm_vlora.checkpoint.pinning import split_pin
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.router_files import ROUTER_FILE, read_router_weights
from vllm_vlora.errors import CheckpointError, VLoRAError
from vllm_vlora.plugin.blend_paths import names_in_blends
from vllm_vlora.plugin.counters import reason_of
from vllm_vlora.plugin.events import facts
from vllm_vlora.plugin.identity import task_paths
from vllm_vlora.plugin.kept_templates import template_file

PERIOD = 0.25
"""Seconds between two looks at the manifest, which is one ``stat``."""
# Seconds until a state that was refused is read again: it may be a copy that is still under way.
_TRY_AGAIN = 2.0
# And where it has long been as it is: such a part of that time, and at most so many.
_PART, _SELDOM = 0.1, 30.0
# What is new is read once before it is served, up to so many bytes, about two seconds' worth; beyond
# them a file's size must do until it is loaded, which then fails for its own requests alone.
READ_NBYTES = 2 << 30
# What changes with a publication, the manifest first.
_WATCHED = (CONFIG_FILE, ALIASES_FILE, ATTACHMENTS_FILE, ROUTER_FILE)
# Refusals that nobody asked for yet.
_MOST_REFUSALS = 100


class State:
    """One state of a checkpoint, with the paths that name its tasks."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        paths = task_paths(checkpoint)
        self.paths: dict[str, str] = {task: str(path) for task, path in paths.items()}
        self.tasks: dict[str, str] = {path: task for task, path in self.paths.items()}
        # Now, as what lies there later may be another state's. The digest is of all that is served,
        # and equal for equal states on every machine.
        self.aliases, self.router = checkpoint.aliases, checkpoint.router
        self.digest = checkpoint.content_digest
        # Of tasks that may be far; here, as many take a while.
        self.in_blends = names_in_blends(checkpoint) if checkpoint.count_far() else {}


class WorkerState(NamedTuple):
    """What a worker serves and could serve.

    Attributes:
        served, offered: digests of the state that is served, and of the newest sound one.
        folder: that is followed; "" where nothing is.
        looked: ``folder_identity`` of it when that was found out; empty where there was no manifest, or
            nobody has looked yet.
        refused: why what was there is not what is offered: another look may find more though nothing was
            published since. Empty where it is.
    """

    served: str
    offered: str
    folder: str = ""
    looked: tuple[int, ...] = ()
    refused: str = ""


def pause(refused_for: float) -> float:
    """Seconds between two looks at what has been refused for so many: files that were late come late."""
    return min(_PART * refused_for, _SELDOM)


class Follower:
    """Offers the newest sound state of a folder.

    Args:
        reference: the folder, as ``Checkpoint.open`` takes it. One whose content is pinned is not
            followed: no other may be served.
        served: the state that is served.
        check: raises a VLoRAError where the served model cannot take these tasks of a checkpoint.
        logger: where refusals go.
        templates: the tasks' chat templates are used, so they must be there, too.
    """

    def __init__(
        self,
        reference: str | Path,
        served: State,
        check: Callable[[Checkpoint, Collection[str]], None],
        logger: logging.Logger,
        templates: bool = False,
    ) -> None:
        folder, self._pin = split_pin(reference)
        self._folder = Path(folder)
        self._check, self._logger, self._templates = check, logger, templates
        # SHA-256 of those that were read in the newest state.
        self._templates_read: set[str] = set()
        self.served = self._offered = served
        # None: of before the served state was read, so that the first look reads the manifest again.
        self._seen: tuple[int, ...] | None = None
        self._seen_at = self._read_again = 0.0
        # What was seen when the newest answer to it was found.
        self._looked: tuple[int, ...] = ()
        self._said = ""
        self._refused: deque[str] = deque(maxlen=_MOST_REFUSALS)
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def state(self) -> WorkerState:
        """What is served, and the newest sound state; starts looking for one when it is first asked."""
        if self._pin is not None:
            return WorkerState(self.served.digest, self._offered.digest)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vlora-follow", daemon=True)
            self._thread.start()
        # In this order: what is offered once that was seen, or later.
        looked, refused = self._looked, self._said
        offered = self._offered.digest
        return WorkerState(self.served.digest, offered, str(self._folder), looked, refused)

    def adopt(self, digest: str) -> bool:
        """Serve the state that is offered; False where another one is by now."""
        offered = self._offered
        if offered.digest != digest:
            return False
        self.served = offered
        return True

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            self.look()
            self._ended.wait(PERIOD)

    def look(self) -> None:
        """Read the manifest where it is another than at the last look."""
        found, now = folder_identity(self._folder), time.monotonic()
        if found == self._seen and now < self._read_again:
            return
        if found != self._seen:
            self._seen, self._seen_at, self._looked = found, now, ()
        self._read_again = float("inf")
        try:
            self._offered = self.sound_state(self._folder)
            self._said = ""
        except VLoRAError as error:
            self._refuse(error, str(error))
        except Exception as error:  # noqa: BLE001 - a thread that ended would follow no more
            self._refuse(error, f"{type(error).__name__}: {error}")
        self._looked = found or ()

    def take_refusals(self) -> list[str]:
        """Why states were not offered since this was asked last, a word each."""
        return [self._refused.popleft() for _ in range(len(self._refused))]

    def count_refusal(self, error: Exception) -> None:
        """Have ``take_refusals`` tell of a state that was not offered."""
        self._refused.append(reason_of(error))

    def _refuse(self, error: Exception, why: str) -> None:
        now = time.monotonic()
        self._read_again = now + max(_TRY_AGAIN, pause(now - self._seen_at))
        if why != self._said:
            self._logger.error(
                "vllm-vlora: what was published is not served, the state before it is: %s",
                why,
                extra=facts("publication_refused", reason=reason_of(error)),
            )
            self.count_refusal(error)
        self._said = why

    def sound_state(self, folder: Path) -> State:
        """The state that a folder has, read and held against the model as far as it is new.

        Raises:
            VLoRAError: it cannot be served.
        """
        checkpoint = Checkpoint.open(folder)
        for known in (self.served, self._offered):
            if known.digest == checkpoint.content_digest:
                return known
        found, served = State(checkpoint), self.served
        new = [task for path, task in found.tasks.items() if path not in served.tasks]
        self._check(checkpoint, new)
        left = READ_NBYTES
        # Those that are far once they are asked for, as the tasks of any other state that is served.
        far = checkpoint.far_tasks()
        here = [task for task in new if task not in far]
        for ref in _new_files(checkpoint, here, served.checkpoint):
            file = checkpoint.path / ref.file
            if ref.nbytes > left:
                check_size(file, ref)
            else:
                left -= ref.nbytes
                read_checked(file, ref)
        if found.router is not None and found.router != served.router:
            read_router_weights(checkpoint.path, found.router)
        if self._templates:
            self._read_templates(checkpoint)
        if checkpoint.was_replaced:
            raise CheckpointError(f"{checkpoint.path} was published again while it was read")
        return found

    def _read_templates(self, checkpoint: Checkpoint) -> None:
        kept = (template_file(files) for files in checkpoint.attachments.values())
        files = {ref.sha256: ref for _, ref in (file for file in kept if file is not None)}
        for digest in files.keys() - self._templates_read:
            # What is in it is for the API servers to judge: of one task, it stops no other's publication.
            read_checked(checkpoint.path / files[digest].file, files[digest])
        self._templates_read = set(files)


def _new_files(
    checkpoint: Checkpoint, tasks: Collection[str], before: Checkpoint
) -> Iterator[FileRef]:
    known = {ref.sha256 for ref in before.config.basis}
    yield from (ref for ref in checkpoint.config.basis if ref.sha256 not in known)
    yield from map(checkpoint.file_of, tasks)


def folder_identity(checkpoint: str | Path) -> tuple[int, ...] | None:
    """What differs between two publications of a checkpoint's manifest, and between two versions of its
    aliases, its attachments and its router, which are written beside it; None where there is no manifest.
    """
    folder, _ = split_pin(checkpoint)
    manifest, *beside = (_file_identity(Path(folder, name)) for name in _WATCHED)
    # Zeros keep what is beside it apart.
    numbers = (number for found in beside for number in (found or (0,) * 4))
    return None if manifest is None else (*manifest, *numbers)


def _file_identity(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
