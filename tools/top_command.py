"""``top``: what a running server does with its tasks, live."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.errors import VLoRAError
from vllm_vlora.tools.terminal import (
    AsJson,
    Verbose,
    open_console,
    print_json,
    reported,
    signalled_code,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

Reading = dict[str, Any]


def top(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="The server: http://HOST:PORT, with or without /v1."),
    ],
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time between two readings.", min=0.2)
    ] = 2.0,
    tasks: Annotated[
        int, typer.Option(metavar="N", help="Show the N tasks that are asked for most.", min=0)
    ] = 20,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_API_KEY",
            metavar="KEY",
            help="Sent as a bearer token. On a shared machine use the variable: options can be seen.",
            show_default=False,
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show one reading and end.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Watch what a running server does with its tasks.

    Reads the server's /metrics: where tasks are and what they take, requests,
    loads, evictions, refusals, and the busiest tasks. Ends with Ctrl-C. With
    --json, and where the output is no terminal, one reading is shown.

    Examples:
        vllm-vlora top http://localhost:8000
        vllm-vlora top localhost:8000 --once
        vllm-vlora top https://models.example.org/v1 --json
    """
    with reported(verbose):
        from vllm_vlora.tools.server_metrics import metrics_url

        where = metrics_url(url)
        first = _read(where, api_key)
    if as_json:
        print_json(first)
        return
    console = open_console()
    if once or not console.is_terminal:
        for part in _parts(first, None, tasks):
            console.print(part)
        return
    try:
        _watch(console, where, api_key, first, interval, tasks)
    except KeyboardInterrupt:
        if code := signalled_code():
            raise typer.Exit(code) from None


def _read(where: str, key: str | None) -> Reading:
    from vllm_vlora.tools.server_metrics import ask, read_metrics

    return {**read_metrics(ask(where, key), where), "read_at": time.time()}


def _watch(
    console: Console, where: str, key: str | None, reading: Reading, interval: float, tasks: int
) -> None:
    """Show reading after reading; one that fails leaves the last one there and says why."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    before: Reading | None = None
    failed = ""
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            said = [Text(failed, style="red")] if failed else []
            live.update(Group(*_parts(reading, before, tasks), *said), refresh=True)
            time.sleep(interval)
            try:
                before, reading, failed = reading, _read(where, key), ""
            except VLoRAError as error:
                failed = str(error)


def _parts(reading: Reading, before: Reading | None, tasks: int) -> Iterable[RenderableType]:
    from rich.text import Text

    from vllm_vlora.wording import shown

    yield Text(shown(f"{reading['url']}   model {reading['model']}"), style="bold")
    yield _engines_table(reading, before)
    if tasks:
        yield _tasks_table(reading, before, tasks)


def _engines_table(reading: Reading, before: Reading | None) -> Table:
    from vllm_vlora.tools.summary import make_table

    earlier = {engine["engine"]: engine for engine in before["engines"]} if before else {}
    columns = [_engine_rows(e, earlier.get(e["engine"]), _span(reading, before))
               for e in reading["engines"]]  # fmt: skip
    table = make_table([""], [f"engine {engine['engine']}" for engine in reading["engines"]])
    for name in columns[0]:
        table.add_row(name, *(column.get(name, "-") for column in columns))
    return table


def _engine_rows(
    engine: dict[str, Any], before: dict[str, Any] | None, span: float
) -> dict[str, str]:
    """What is said of an engine core, line by line: the same lines of each."""

    def rate(key: str) -> str:
        total = sum(engine[key].values())
        earlier = None if before is None else sum(before[key].values())
        return _with_rate(total, earlier, span)

    capacity = engine["capacity"]
    asked, on_device = sum(engine["requests"].values()), engine["requests"].get("device", 0)
    return {
        "tasks on the device": f"{engine['tasks'].get('device', 0)} of {_or_dash(capacity)}",
        "bytes on the device": _share(engine, "device"),
        "tasks in host memory": str(engine["tasks"].get("host", 0)),
        "bytes in host memory": _share(engine, "host"),
        "tasks that may be asked for": _or_dash(engine["tasks"].get("catalogue")),
        "of them on no disk yet": _or_dash(engine["tasks"].get("remote")),
        "requests": rate("requests"),
        "of them on the device": f"{on_device / asked:.1%}" if asked else "-",
        "waiting for a load": _or_dash(engine["waiting"]),
        "loads from disk": _mean(engine["loads"].get("load")),
        "loads from host memory": _mean(engine["loads"].get("activate")),
        "fetched": _mean(engine["loads"].get("fetch")),
        "gave way": rate("evictions"),
        "refused": rate("refusals"),
        "state of the checkpoint": engine["state"] or "-",
        "states taken, refused": f"{_or_dash(engine['reloads'])}, "
        f"{sum(engine['checkpoint_refusals'].values())}",
        "heard of": f"{engine['age_seconds']:.1f} s ago",
    }


def _tasks_table(reading: Reading, before: Reading | None, most: int) -> Table:
    from vllm_vlora.tools.summary import make_table

    earlier = {row["task"]: row["requests"] for row in before["tasks"]} if before else {}
    table = make_table(["task"], ["requests"], title="Asked for most")
    for row in reading["tasks"][:most]:
        if row["requests"]:
            table.add_row(
                row["task"],
                _with_rate(row["requests"], earlier.get(row["task"]), _span(reading, before)),
            )
    return table


def _span(reading: Reading, before: Reading | None) -> float:
    return 0.0 if before is None else reading["read_at"] - before["read_at"]


def _with_rate(total: int, before: int | None, span: float) -> str:
    """A count, and how many a second there were since the reading before."""
    if before is None or span <= 0 or total < before:
        return f"{total}"
    return f"{total}  {(total - before) / span:.1f}/s"


def _share(engine: dict[str, Any], tier: str) -> str:
    from vllm_vlora.checkpoint.card import format_bytes

    used, budget = engine["bytes"].get(tier), engine["budget_bytes"].get(tier)
    if used is None:
        return "-"
    return format_bytes(used) + (f" of {format_bytes(budget)}" if budget is not None else "")


def _mean(loads: dict[str, Any] | None) -> str:
    if not loads or not loads["count"]:
        return "0"
    if loads["seconds"] is None:
        return str(loads["count"])
    return f"{loads['count']}, {1000 * loads['seconds'] / loads['count']:.1f} ms each"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
