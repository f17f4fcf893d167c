"""A signal that asks the program to end, kept in mind until it has.

The handler raises KeyboardInterrupt, but an exception can get lost: raised while the garbage collector
closes a generator it is only printed, and a library that was called back may make another of it. What
takes long or publishes something therefore asks here before it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[int] = []
_kept_whole: list[None] = []


def stop(number: int, frame: FrameType | None) -> None:
    """A handler for ``signal.signal``: notes the signal and raises KeyboardInterrupt."""
    _received.append(number)
    if not _kept_whole:
        raise KeyboardInterrupt


@contextmanager
def kept_whole() -> Iterator[None]:
    """A short block that a signal interrupts at its end, not within."""
    _kept_whole.append(None)
    try:
        yield
    finally:
        _kept_whole.pop()
    check_not_stopped()


def stopped_by(number: int) -> bool:
    """Whether this signal has come."""
    return number in _received


def is_stopped() -> bool:
    """Whether any signal has come that :func:`stop` handles."""
    return bool(_received)


def check_not_stopped() -> None:
    """Raise KeyboardInterrupt, once more, if the program was asked to end."""
    if _received:
        raise KeyboardInterrupt
