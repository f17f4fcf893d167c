"""A Hub branch or a URL that is asked while an engine runs what it has now (``VLLM_VLORA_POLL_SECONDS``).

Each worker has a thread for it, and of those that share a cache one asks for all (``newest.look``): what
is new is fetched, read and held against the served model, and then takes the place of the folder that
all of them follow (see ``following``). Where it cannot be had, or not be served, that folder stays.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vllm_vlora.checkpoint.newest import follow_state, look, state_of
from vllm_vlora.downloads import Parts, followed_folder
from vllm_vlora.errors import SettingError, VLoRAError
from vllm_vlora.plugin.counters import reason_of
from vllm_vlora.plugin.events import facts
from vllm_vlora.plugin.settings import POLL_VARIABLE
from vllm_vlora.snapshots import names_branch
from vllm_vlora.urls import is_remote

POLLED_VARIABLE = "VLLM_VLORA_POLLED"
"""For the processes that the first one starts: the fixed reference that it found, and the one to ask."""


def begin(where: str, digest: str | None, folder: Path, fixed: str) -> Path:
    """The folder to follow, in the first process of an engine.

    Args:
        where, digest: what the user gave. folder: what it is now. fixed: the reference to just that.

    Raises:
        SettingError: it cannot become another one. OutputError: the cache cannot be written.
    """
    if digest is not None or not (is_remote(where) or names_branch(where)):
        raise SettingError(
            f"{POLL_VARIABLE} is for a branch on the Hub or a URL, without a digest; unset it: a folder "
            "is followed as it is, and a commit or a digest never means anything else"
        )
    os.environ[POLLED_VARIABLE] = json.dumps([fixed, where])
    return follow_state(where, folder)


def polled(reference: str) -> str | None:
    """What to ask in a process that the first one started, whose fixed reference this is."""
    fixed, where = json.loads(os.environ.get(POLLED_VARIABLE) or "[null, null]")
    return where if fixed == reference else None


def join(where: str, folder: Path, parts: Parts = Parts.WHOLE) -> Path:
    """The folder to follow, in a process that the first one started, perhaps on another machine.

    Args:
        folder: what the first one found. parts: how much of a state is fetched.
    """
    link = followed_folder(where)
    if state_of(link) != folder:
        # Of an earlier server, or of another server that has looked since.
        with suppress(VLoRAError):
            look(where, 0.0, lambda state: None, parts)
    return link if state_of(link) is not None else follow_state(where, folder)


class Poller:
    """The thread of one worker.

    Args:
        where: the Hub id or URL to ask. seconds: between two questions.
        check: raises a VLoRAError where the state in a folder cannot be served.
        refused: called with each error once. logger: where they go.
        parts: how much of a state is fetched.
    """

    def __init__(
        self,
        where: str,
        seconds: int,
        check: Callable[[Path], object],
        refused: Callable[[Exception], object],
        logger: logging.Logger,
        parts: Parts = Parts.WHOLE,
    ) -> None:
        self._where, self._seconds, self._parts = where, seconds, parts
        self._check, self._refused, self._logger = check, refused, logger
        self._said = ""
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Ask from now on; does nothing the second time."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vlora-poll", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self.look()

    def look(self) -> None:
        """Ask now, unless another worker did within the time."""
        try:
            # A little less, so that who asked last time does not come just too early.
            look(self._where, 0.9 * self._seconds, self._check, self._parts)
            self._said = ""
        except VLoRAError as error:
            self._say(error, str(error))
        except Exception as error:  # noqa: BLE001 - a thread that ended would ask no more
            self._say(error, f"{type(error).__name__}: {error}")

    def _say(self, error: Exception, why: str) -> None:
        if why != self._said:
            extra = facts("poll_failed", reason=reason_of(error))
            self._logger.error("vllm-vlora: the state that is served stays: %s", why, extra=extra)
            self._refused(error)
        self._said = why
