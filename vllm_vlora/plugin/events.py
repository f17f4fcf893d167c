"""What the plugin logs, for programs to read: ``VLLM_VLORA_LOG=keys`` or ``json``.

A line that says what happened (``EVENTS``) carries the facts beside its words (:func:`facts`). Without
the setting the words go where vLLM's own lines go. With it, each line of ours is one of time, level,
process, event, facts and words, written past the prefix that some versions of vLLM put before every
line of a process. What happens to single tasks (loads, evictions) is then logged too; it would be too
much for people.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

LOG_VARIABLE = "VLLM_VLORA_LOG"
TEXT, KEYS, JSON = LOGS = ("text", "keys", "json")
EVENTS = (
    "start",
    "publication",
    "publication_refused",
    "poll_failed",
    "load",
    "eviction",
    "refusal",
    "message",
)
"""Every ``event``; ``message`` is of the lines that have no facts."""

# Below "vllm", so that vLLM's own handlers and format apply.
logger = logging.getLogger("vllm.plugins.vlora")
_OURS = (logger.name, f"{logger.name}.events")
# Has no handler in vLLM's processes.
_LIBRARY = "vllm_vlora"
_PLAIN = re.compile(r"[^\s\"=\\]+")
_events = logging.getLogger(_OURS[1])


def facts(event: str, **fields: Any) -> dict[str, Any]:
    """The ``extra`` of a log call: what happened, and its facts, of numbers and strings."""
    return {"vlora": {"event": event, **fields}}


def happened(event: str, **fields: Any) -> None:
    """Log what happened to one task or request; people see it at level DEBUG alone."""
    level = logging.INFO if _lines() else logging.DEBUG
    if _events.isEnabledFor(level):
        words = " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())
        _events.log(level, "vllm-vlora: %s %s", event, words, extra=facts(event, **fields))


def install(log: str) -> None:
    """Log as a program reads it from now on in this process; ``text`` undoes that."""
    before, library = _lines(), logging.getLogger(_LIBRARY)
    if before is not None:
        library.removeHandler(before)
        library.propagate = True
        for name in _OURS:
            logging.getLogger(name).removeFilter(before.take)
    # In the processes of vLLM 0.28 and 0.30 the root's level is ERROR, and so is that of libraries.
    if library.getEffectiveLevel() > logging.WARNING and not library.level:
        library.setLevel(logging.WARNING)
    if log == TEXT:
        return
    lines = _Lines()
    lines.setFormatter(LineFormatter(log))
    library.addHandler(lines)
    library.propagate = False
    # vLLM takes the handlers of loggers below its own away whenever it sets its logging up.
    for name in _OURS:
        logging.getLogger(name).addFilter(lines.take)


class _Lines(logging.StreamHandler[Any]):
    """Writes to standard error past ``sys.stderr``, which vLLM has write a prefix before each line."""

    def __init__(self) -> None:
        super().__init__(
            open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        )

    def take(self, record: logging.LogRecord) -> bool:
        """As a filter: write a record, and let nobody else have it."""
        self.handle(record)
        return False


def _lines() -> _Lines | None:
    found = logging.getLogger(_LIBRARY).handlers
    return next((handler for handler in found if isinstance(handler, _Lines)), None)


class LineFormatter(logging.Formatter):
    """One line a record, as ``keys`` (logfmt: ``key=value``, quoted as JSON where needed) or ``json``."""

    def __init__(self, log: str) -> None:
        super().__init__()
        self._log = log

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, without its end."""
        fields = self._fields(record)
        if self._log == JSON:
            return json.dumps(fields)
        return " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": record.process,
            **getattr(record, "vlora", {"event": "message"}),
        }
        # The words of the others are the facts once more.
        if record.name != _events.name:
            fields["message"] = record.getMessage().removeprefix("vllm-vlora: ")
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text)
