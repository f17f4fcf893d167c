"""JSON that others wrote: either what it plainly says, or a ``JSONError`` that says what is wrong.

Beyond the grammar, refused are objects and lists nested deeper than ``MOST_DEPTH``, a key twice in one
object, NaN and Infinity (also as a number too large for a double), whole numbers of more than 64 bits
and lone surrogates, which no file or terminal takes. No decoding raises anything else.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, TypeVar

import msgspec

T = TypeVar("T")

MOST_DEPTH = 32
_INT_BITS = 64
_DIGITS = 20


class JSONError(ValueError):
    """What is wrong with a text that was to be JSON."""


def decode(data: bytes, kind: type[T], *, infinite: bool = False) -> T:
    """Any JSON as ``kind``, whatever msgspec converts to; of a struct unknown fields are left out.

    Args:
        data: UTF-8, 16 or 32, with a byte order mark or without.
        infinite: allow NaN and Infinity, as Python's ``json.dump`` writes them.

    Raises:
        JSONError: no such JSON.
    """
    try:
        value = json.loads(
            data.decode(json.detect_encoding(data)),
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=float if infinite else _number,
            parse_constant=float if infinite else _constant,
        )
        check_plain(value, infinite=infinite)
        return msgspec.convert(value, kind)
    except RecursionError as error:
        raise JSONError(f"nested deeper than {MOST_DEPTH}") from error
    except JSONError:
        raise
    except (ValueError, msgspec.MsgspecError) as error:
        raise JSONError(_in_words(error)) from error


def decode_typed(data: bytes, kind: Any, *also: Any) -> Any:
    """UTF-8 JSON straight into ``kind``, several times faster: for large files of our own formats.

    Fields of type Any need :func:`check_plain` after.

    Args:
        also: what else it must decode as.

    Raises:
        JSONError: no such JSON.
    """
    try:
        for other in also:
            msgspec.json.decode(data, type=other)
        value = msgspec.json.decode(data, type=kind)
        # It takes the last of a key that stands twice. What it writes as it was read has none.
        if msgspec.json.encode(msgspec.json.decode(data)) != data:
            decode(data, object)
        return value
    except RecursionError as error:
        raise JSONError(f"nested deeper than {MOST_DEPTH}") from error
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise JSONError(_in_words(error)) from error


def check_plain(value: Any, *, infinite: bool = False) -> None:
    """Refuse decoded values that nest too deep or hold numbers or text that JSON cannot pass on.

    Raises:
        JSONError: what was found.
    """
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inner: list[Any] = []
        for found in level:
            kind = type(found)
            if kind is str:
                _check_text(found)
            elif kind is dict:
                inner += found.keys()
                inner += found.values()
            elif kind is list:
                inner += found
            elif kind is int and found.bit_length() > _INT_BITS:
                raise JSONError(f"a number of {found.bit_length()} bits")
            elif kind is float and not infinite and not math.isfinite(found):
                raise JSONError(f"the number {found}")
        if not inner:
            return
        level = inner
    raise JSONError(f"nested deeper than {MOST_DEPTH}")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise JSONError(f"the lone surrogate U+{ord(text[error.start]):04X} in text") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JSONError(f"the key {twice!a:.60} stands twice in an object")
    return found


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise JSONError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise JSONError(f"the number {text:.40}, too large for a double")
    return found


def _constant(text: str) -> NoReturn:
    raise JSONError(f"{text}, which is no JSON")


def _in_words(error: Exception) -> str:
    """One line, without the characters that a message may quote from the file."""
    return " ".join(str(error).split()).encode("ascii", "backslashreplace").decode()
