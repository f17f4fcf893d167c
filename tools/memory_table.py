"""What ``plan`` says: the memory of each mode as plain data for ``--json`` and as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vllm_vlora.tools.summary import line, make_table
from vllm_vlora.wording import count_of, some_of

if TYPE_CHECKING:
    from vllm_vlora.plugin.memory import MemoryPlan, ModeMemory

_MIB = 1 << 20
_GIB = 1 << 30
_HEADINGS = {"stock": "stock vLLM"}
# A collection may have a thousand tasks with one and the same obstacle.
_NAMED_TASKS = 10


def describe(plan: MemoryPlan, checkpoint: str, gpu_nbytes: int | None) -> dict[str, Any]:
    """Everything ``plan`` shows, as JSON data; sizes in bytes."""
    return {
        "checkpoint": checkpoint,
        "tasks": plan.tasks,
        "tp": plan.tp,
        "dtype": plan.dtype,
        "max_loras": plan.max_loras,
        "max_lora_rank": plan.max_lora_rank,
        "layers_from": plan.layers_from,
        "slices": plan.slices,
        "gpu_bytes": gpu_nbytes,
        "modes": [_describe_mode(mode) for mode in plan.modes],
        "not_direct": plan.not_direct,
        "assumptions": plan.assumptions,
    }


def _describe_mode(mode: ModeMemory) -> dict[str, Any]:
    return {
        "mode": mode.mode,
        "obstacle": mode.obstacle,
        "slots": mode.slots,
        "slot_rank": mode.slot_rank,
        "bytes": {
            "slots": mode.slots_nbytes,
            "bases": mode.bases_nbytes,
            "cores": mode.cores_nbytes,
            "factors": mode.factors_nbytes,
            "table": mode.table_nbytes,
            "records": mode.records_nbytes,
            "buffers": mode.buffers_nbytes,
            "total": mode.total_nbytes,
        },
        "host_bytes": mode.host_nbytes,
        "direct_tasks": mode.direct_tasks,
        "materialized_tasks": mode.materialized_tasks,
        "distinct_tasks": mode.distinct_tasks,
        "switch_host_bytes": mode.switch_host_nbytes,
        "switch_device_bytes": mode.switch_device_nbytes,
        "fits": mode.fits
        and {"batch_tasks": mode.fits.batch_tasks, "resident_tasks": mode.fits.resident_tasks},
    }


def print_plan(console: Console, data: dict[str, Any]) -> None:
    """The table, a column a mode, and what a reader must know beside it."""
    modes = [_HEADINGS.get(mode["mode"], mode["mode"]) for mode in data["modes"]]
    where = f" on each of {data['tp']} devices" if data["tp"] > 1 else ""
    table = make_table([""], modes, title=f"Memory in MiB{where}")
    for name in ("slots", "bases", "cores", "factors"):
        _add_row(table, data, name.capitalize(), _part(name))
    _add_row(table, data, "Table, buffers", _table_and_buffers)
    table.add_section()
    totals = [
        "cannot run" if mode["obstacle"] else _mib(mode["bytes"]["total"]) for mode in data["modes"]
    ]
    table.add_row("Total", *totals, style="bold")
    if data["gpu_bytes"]:
        _add_row(table, data, "Of the GPU", lambda m: _share(m["bytes"]["total"], data))
    table.add_section()
    _add_row(table, data, "Slots x rank", lambda m: f"{m['slots']} x {m['slot_rank']}")
    _add_row(table, data, "Tasks in a batch", lambda m: str(m["distinct_tasks"]))
    _add_row(table, data, "  run direct", lambda m: str(m["direct_tasks"]))
    _add_row(table, data, "Task switch, host", lambda m: _mib(m["switch_host_bytes"]))
    _add_row(table, data, "Task switch, device", lambda m: _mib(m["switch_device_bytes"]))
    _add_row(table, data, "Pinned host memory", lambda m: _mib(m["host_bytes"]))
    if any(mode["fits"] for mode in data["modes"]):
        table.add_section()
        _add_row(table, data, "Fit: tasks in a batch", lambda m: f"{m['fits']['batch_tasks']:,}")
        _add_row(table, data, "Fit: resident tasks", lambda m: f"{m['fits']['resident_tasks']:,}")
    console.print(table)
    _print_notes(console, data)


def _add_row(
    table: Table, data: dict[str, Any], name: str, cell: Callable[[dict[str, Any]], str]
) -> None:
    cells = ["" if mode["obstacle"] else cell(mode) for mode in data["modes"]]
    table.add_row(name, *cells)


def _part(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda mode: _mib(mode["bytes"][name])


def _table_and_buffers(mode: dict[str, Any]) -> str:
    return _mib(sum(mode["bytes"][name] for name in ("table", "records", "buffers")))


def _mib(count: int) -> str:
    if count == 0:
        return "-"
    value = count / _MIB
    return f"{value:,.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.005 else "<0.01"


def _share(count: int, data: dict[str, Any]) -> str:
    return f"{count / data['gpu_bytes']:.1%}"


def _print_notes(console: Console, data: dict[str, Any]) -> None:
    source = data["layers_from"] or "the checkpoint's modules"
    line(
        console,
        f"{count_of(data['tasks'], 'task')}, max_loras {data['max_loras']}, dtype {data['dtype']}, "
        f"tensor parallel {data['tp']}; {count_of(data['slices'], 'layer slice')} of {source}.",
    )
    line(
        console,
        "Task switch: what a task not in a slot moves before its first token, for the task that moves "
        "most. Pinned host memory: all adapters, as stock vLLM keeps them.",
        style="dim",
    )
    for mode in data["modes"]:
        if mode["obstacle"]:
            heading = _HEADINGS.get(mode["mode"], mode["mode"])
            line(console, f"Cannot run {heading}: {mode['obstacle']}.", style="yellow")
    _print_not_direct(console, data)
    for sentence in data["assumptions"]:
        line(console, f"Note: {sentence}", style="yellow")


def _print_not_direct(console: Console, data: dict[str, Any]) -> None:
    reasons: dict[str, list[str]] = {}
    for task, reason in data["not_direct"].items():
        reasons.setdefault(reason, []).append(task)
    for reason, tasks in reasons.items():
        names = some_of(tasks, _NAMED_TASKS)
        names += " (--json)" if len(tasks) > _NAMED_TASKS else ""
        line(
            console,
            f"Cannot run direct, materialized instead in auto: {len(tasks)} of "
            f"{count_of(data['tasks'], 'task')}, {reason}: {names}",
            style="yellow",
        )


def gib(value: float) -> int:
    """Bytes of ``value`` GiB."""
    return int(value * _GIB)
