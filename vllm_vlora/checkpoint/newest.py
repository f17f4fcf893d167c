"""What a Hub branch or a URL has now, as a folder that servers follow as they follow any other.

That folder is a link in the cache to the newest state of those that are there. A state is fetched and
checked whole before the link names it, and states do not change, so that a publication far away is to
a server on this machine what a folder in its folder's place is. All servers and workers that share a
cache share the link, and one of them looks for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vllm_vlora.checkpoint.sources import newest_folder
from vllm_vlora.downloads import Parts, cache_written, followed_folder
from vllm_vlora.errors import LockedError
from vllm_vlora.locking import beside, locked, waiting_at_most


def follow_state(where: str, state: Path) -> Path:
    """Have the link name a state, and return the link.

    Raises:
        OutputError: the cache cannot be written.
    """
    link = followed_folder(where)
    with cache_written(link.parent):
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = beside(link, f"{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(state.absolute())
        os.replace(temporary, link)
    return link


def state_of(link: Path) -> Path | None:
    """The folder that the link names, if it is there."""
    try:
        state = link.readlink()
    except OSError:
        return None
    return state if state.is_dir() else None


def look(
    where: str, seconds: float, check: Callable[[Path], object], parts: Parts = Parts.WHOLE
) -> None:
    """Ask a Hub id or a URL what it has now, fetch it, and have the link name it.

    Nothing is done where somebody did within this time, or is about it.

    Args:
        check: called with the folder of another state; raises where it is not to be followed.
        parts: how much of a state is fetched.

    Raises:
        CheckpointError: it cannot be asked or fetched. OutputError: the cache cannot be written.
    """
    link = followed_folder(where)
    with cache_written(link.parent):
        link.parent.mkdir(parents=True, exist_ok=True)
    with _held_alone(link) as alone:
        if not alone or _age(link) < seconds:
            return
        # For the others, whatever comes of it; by the clock that they read.
        with suppress(OSError):
            os.utime(link, (time.time(),) * 2, follow_symlinks=False)
        before = state_of(link)
        found = newest_folder(where, before, parts)
        if found != before:
            check(found)
            follow_state(where, found)


@contextmanager
def _held_alone(link: Path) -> Iterator[bool]:
    """Whether nobody else is about it."""
    with ExitStack() as held:
        try:
            with waiting_at_most(0):
                held.enter_context(locked(link))
        except LockedError:
            yield False
            return
        yield True


def _age(link: Path) -> float:
    """Seconds since somebody looked.

    A clock that was set back makes a time that is to come of it; that counts as any other distance.
    """
    try:
        return abs(time.time() - link.lstat().st_mtime)
    except OSError:
        return float("inf")
