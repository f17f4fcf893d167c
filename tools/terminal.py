"""What every command shares: consoles, progress, JSON, and errors as one line and an exit code."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from vllm_vlora.errors import BudgetError, VLoRAError
from vllm_vlora.locking import waiting_at_most
from vllm_vlora.stopping import check_not_stopped, is_stopped, stop, stopped_by
from vllm_vlora.wording import shown, without_secrets

if TYPE_CHECKING:
    from rich.progress import Progress

_Data = TypeVar("_Data")

EXIT_CHECK_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
_EXIT_SIGNALLED = {signal.SIGHUP: 129, signal.SIGTERM: 143}
# Tables in a file or a pipe are as wide as they need to be: nothing is cut.
_UNLIMITED_WIDTH = 10_000

Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        envvar="VLLM_VLORA_DEBUG",
        help="Show the traceback of an error.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
CheckpointRef = Annotated[
    str, typer.Argument(metavar="CKPT", help="The checkpoint: a folder, a Hub id or a URL.")
]


def prepare_process() -> None:
    """Signals become exceptions that clean up, and no task's name can end the output."""
    # Docker and schedulers end a program with SIGTERM; as an exception it removes half a folder.
    signal.signal(signal.SIGTERM, stop)
    # A shell ignores them for what is to go on in the background, and nohup for what outlives a terminal.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        # A task may be called anything; a terminal that cannot show it must not end the program.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _open_missing_streams() -> None:
    """``>&-`` leaves Python without the stream, and its number to the next file that is opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


@contextmanager
def reported(verbose: bool, timeout: float | None = None) -> Iterator[None]:
    """Turn an error that the user can mend into one red line and an exit code.

    ``timeout`` is of a command that writes: how long it waits for another one (``locking``).
    """
    try:
        with waiting_at_most(timeout), _downloads_shown():
            yield
            check_not_stopped()
    except KeyboardInterrupt as error:
        _exit_stopped(error, verbose)
    except Exception as error:
        # A library that was called back when the signal came may have turned the exception into an
        # error of its own: safetensors makes a ValueError of it.
        if is_stopped():
            _exit_stopped(error, verbose)
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            _exit_unread(error)
        if not isinstance(error, (VLoRAError, OSError)):
            raise
        if verbose:
            _print_traceback(error)
        _fail(_in_words(error))
        code = EXIT_CHECK_FAILED if isinstance(error, BudgetError) else EXIT_WRONG_INPUT
        raise typer.Exit(code) from error


def _in_words(error: VLoRAError | OSError) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    # Writing to a stream that is full names no file.
    return f"{error.filename or 'cannot write the output'}: {error.strerror}"


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has gone, as ``head`` does."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _exit_unread(error: BaseException) -> NoReturn:
    """End as a program that the signal ends, with no more said: code 1 would mean a check that failed."""
    # What is left to write goes nowhere, since Python would complain of it at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(EXIT_BROKEN_PIPE) from error


def _exit_stopped(error: BaseException, verbose: bool) -> NoReturn:
    if verbose:
        _print_traceback(error)
    # It may be the terminal that has gone, and then nobody is told.
    with suppress(OSError) if stopped_by(signal.SIGHUP) else nullcontext():
        _fail("interrupted; nothing was left half written")
    raise typer.Exit(signalled_code() or EXIT_INTERRUPTED) from error


def signalled_code() -> int:
    """The exit code of a program that another one's signal ended; 0 where none has come but Ctrl-C."""
    return next((code for number, code in _EXIT_SIGNALLED.items() if stopped_by(number)), 0)


def _print_traceback(error: BaseException) -> None:
    console = open_console(stderr=True)
    for part in traceback.format_exception(error):
        for text in part.splitlines():
            console.print(shown(without_secrets(text)), soft_wrap=True)


def _fail(message: str) -> None:
    words = without_secrets(" ".join(message.splitlines()))
    text = Text("Error: " + shown(words), style="red")
    open_console(stderr=True).print(text, soft_wrap=True)


class _Console(Console):
    """Whatever is printed, no text of it is obeyed by the terminal: see ``wording.shown``."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            text = without_secrets(text)
            segment = Segment(text, style, control)
            if control or text.isprintable() or text == "\n":
                yield segment
            else:
                # Where text was broken into lines, they stay lines.
                yield Segment("\n".join(map(shown, text.split("\n"))), style, control)

    def print(self, *objects: Any, crop: bool = False, **options: Any) -> None:
        """Cuts nothing that is wider than the terminal."""
        super().print(*objects, crop=crop, **options)

    def on_broken_pipe(self) -> None:
        # rich would exit with 1, which means a check that failed.
        raise


def open_console(*, stderr: bool = False) -> Console:
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNLIMITED_WIDTH
    return console


class _Advance:
    """Shows the stages of a long run: a bar on a terminal, a line a stage elsewhere."""

    def __init__(self, console: Console, progress: Progress | None) -> None:
        self._console = console
        self._progress = progress
        self._stage: str | None = None
        self._task: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        stage = shown(stage)
        if stage != self._stage:
            self._stage = stage
            if self._progress is None:
                self._console.print(f"{stage} ...")
            else:
                self._task = self._progress.add_task(stage, total=total)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[_Advance]:
    """Progress on ``console``, by default that of stderr."""
    console = console or open_console(stderr=True)
    if not console.is_terminal:
        yield _Advance(console, None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield _Advance(console, progress)


@contextmanager
def _downloads_shown() -> Iterator[None]:
    """Progress of what is fetched from URLs: a bar on a terminal, a line elsewhere."""
    from vllm_vlora.downloads import telling

    console = open_console(stderr=True)
    with ExitStack() as bars, telling(_Downloads(console, bars)):
        yield


class _Downloads:
    """Called with the bytes that are here and those that are to come; has a bar from then on."""

    def __init__(self, console: Console, bars: ExitStack) -> None:
        self._console = console
        self._bars = bars
        self._shown: tuple[Progress, Any] | None = None
        self._total: int | None = None

    def __call__(self, here: int, total: int) -> None:
        if total != self._total:
            self._total = total
            self._begin(total)
        if self._shown is not None:
            progress, task = self._shown
            progress.update(task, completed=here)

    def _begin(self, total: int) -> None:
        if not self._console.is_terminal:
            self._console.print(f"download {total / 1e6:.1f} MB ...")
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        self._bars.close()
        columns = ("download", BarColumn(), DownloadColumn(), TransferSpeedColumn())
        progress = Progress(*columns, console=self._console, transient=True)
        self._shown = self._bars.enter_context(progress), progress.add_task("", total=total)


def print_json(data: Any) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    # Outside of strings stands nothing but ASCII, and in them the escape means the same.
    typer.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def _without_secrets(data: Any) -> Any:
    """The same with no key in any URL: what was typed is shown, and kept where output is."""
    if isinstance(data, str):
        return without_secrets(data)
    if isinstance(data, dict):
        return {key: _without_secrets(value) for key, value in data.items()}
    return [_without_secrets(value) for value in data] if isinstance(data, list) else data


def print_result(data: _Data, draw: Callable[[Console, _Data], None], as_json: bool) -> None:
    """What a command found: JSON, or what ``draw`` makes of it for a person."""
    data = _without_secrets(data)
    if as_json:
        print_json(data)
    else:
        draw(open_console(), data)
