"""What kept a connection from being made, in words: the system has numbers for it."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
from collections.abc import Iterator

# The first that fits counts.
_WORDS: tuple[tuple[type[BaseException], str], ...] = (
    (ConnectionRefusedError, "nothing listens there"),
    (socket.gaierror, "no host of that name is known here"),
    (ssl.SSLCertVerificationError, "its certificate is not trusted here"),
    (ssl.SSLError, "it does not speak TLS"),
    (TimeoutError, "it does not answer in time"),
    (ConnectionResetError, "it closed the connection"),
    (http.client.HTTPException, "it does not speak HTTP"),
)

_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


def why_unreachable(problem: BaseException) -> str | None:
    """Why something at an address cannot be reached; None where the error is of another kind.

    Args:
        problem: of any HTTP client. What the system said is among its causes.
    """
    for error in _causes(problem):
        for kind, words in _WORDS:
            if isinstance(error, kind):
                return words
        if isinstance(error, OSError) and error.errno in _NO_WAY:
            return "no network leads there"
    return None


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    """An error, what it wraps and what it was raised for, each once."""
    seen: set[int] = set()
    while problem is not None and id(problem) not in seen:
        seen.add(id(problem))
        yield problem
        # urllib's has it here, and its cause too.
        reason = getattr(problem, "reason", None)
        inner = reason if isinstance(reason, BaseException) else None
        problem = inner or problem.__cause__ or problem.__context__
