"""How messages, tables, pages and lines to paste show what they say.

Names come from whoever made an adapter or a checkpoint, and may hold what a terminal obeys or what turns
the text around it: :func:`shown` is how such text is shown anywhere, :func:`quoted` how it enters a line
for the shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable


def shown(text: str) -> str:
    r"""Text with everything that is no visible character written as its escape, as ``repr`` does.

    That is control, format, bidi and separator characters, lone surrogates and unassigned ones; the
    blank stays. What was shown already stays as it is.

    Examples:
        >>> shown("red \x1b[31m, reversed \u202e")
        'red \\x1b[31m, reversed \\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_URL_PARTS = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<user>[^\s/?#]*@(?!sha256:))?(?P<path>[^\s?#]*)"
    r"(?P<query>[?#]\S*)?",
    re.IGNORECASE,
)
# There a container stands before the @.
_CONTAINERS = ("abfs://", "abfss://", "az://")
# What is the sentence's at the end of a query, and the digest that a reference may end with.
_AFTER_QUERY = re.compile(r"(@sha256:[0-9a-f]{64})?['\"})\]]*[:;,.]?$")


def without_secrets(text: str) -> str:
    """Text whose URLs have no user, password, query or fragment: these may be keys to what they name.

    Examples:
        >>> without_secrets("https://me:key@host/tasks?sig=abc: no such folder")
        'https://host/tasks?...: no such folder'
    """
    if "://" not in text:
        return text
    return _URL_PARTS.sub(_without_secrets, text)


def _without_secrets(url: re.Match[str]) -> str:
    # What was shown already stays as it is.
    after = _AFTER_QUERY.search((url["query"] or "").removeprefix("?..."))
    query = f"?...{after[0]}" if url["query"] and after else ""
    # What has a colon is a password.
    user = url["user"] or ""
    container = user if url["scheme"].lower() in _CONTAINERS and ":" not in user else ""
    return f"{url['scheme']}{container}{url['path']}{query}"


def quoted(words: Iterable[str]) -> str:
    """Words as a line that a shell (bash, zsh) reads back, with nothing in it that is not visible."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in _bytes(word)
    )
    return "$'" + "".join(escaped) + "'"


def _bytes(word: str) -> bytes:
    """Of a file's name those that it has; other lone surrogates, which no name has, as they are."""
    try:
        return word.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return word.encode("utf-8", "surrogatepass")


def first_line(error: BaseException) -> str:
    """Of an error's text; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def some_of(names: Iterable[object], most: int = 5) -> str:
    """``a, b, c and 7 more``: the first names of many; ``none`` of none."""
    listed = [str(name) for name in names]
    left = len(listed) - most
    return (", ".join(listed[:most]) or "none") + (f" and {left} more" if left > 0 else "")


def count_of(count: int, what: str) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
