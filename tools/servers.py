"""A running server: its address as users have it at hand, and what it answers there."""

from __future__ import annotations

import urllib.parse
import urllib.request
from collections.abc import Mapping

from vllm_vlora.errors import OptionError

# What users have at hand: the address that clients are given, or that of the metrics.
_ROUTES = ("/metrics", "/v1")


def server_url(url: str) -> str:
    """The root of a server: of ``host:port``, of itself, of ``/v1`` or of ``/metrics``.

    Raises:
        OptionError: it is no address of a server.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(full)
        usable = parts.scheme in ("http", "https") and parts.hostname and full.isprintable()
        _ = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:
        usable = False
    if not usable or " " in full:
        raise OptionError(f"{url!r} is no address of a server; give http://HOST:PORT")
    path = parts.path.rstrip("/")
    for route in _ROUTES:
        path = path.removesuffix(route)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def headers_with(key: str | None) -> dict[str, str]:
    """What is asked with, where there is an API key.

    Raises:
        OptionError: no header can hold it.
    """
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise OptionError("the API key holds characters that no header can have")
    return {"Authorization": f"Bearer {key}"}


def fetch(url: str, headers: Mapping[str, str], seconds: float, most_bytes: int) -> bytes:
    """What is at an address.

    Args:
        headers: not for whoever the server may send us on to.
        seconds: that each step may take. most_bytes: of the answer that are read.

    Raises:
        OSError, HTTPException, ValueError: it does not answer, answers with an error (``HTTPError``), or
            sends on to what is no address.
    """
    request = urllib.request.Request(url)
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return bytes(answer.read(most_bytes))
