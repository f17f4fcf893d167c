"""From recorded runs to rows, tables and JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from harness import table

from serving.configurations import BASE, STOCK, Configuration
from serving.figures import Trace, spread, spread_of_ratios, spread_of_rounds
from serving.loads import Job, Load

SCHEMA_VERSION = 1
PREFILL, DECODE, OUTPUT, REQUESTS = RATES = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "output_tokens_per_s",
    "requests_per_s",
)


@dataclass
class Cell:
    """What one configuration did under one load: one number a round, and every gap.

    Attributes:
        rates: name of ``RATES`` -> a rate for every round.
        gaps: seconds between neighbouring tokens of a request.
    """

    configuration: str
    load: Load
    requests: int
    concurrency: int
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    gaps: list[float] = field(default_factory=list)

    def add_prefill(self, job: Job, trace: Trace) -> None:
        """Take a round's run of long prompts and one new token each."""
        self.rates[PREFILL].append(job.prompt_tokens / trace.seconds)

    def add_decode(self, trace: Trace) -> None:
        """Take a round's run of short prompts and long outputs."""
        tokens = sum(len(times) for times in trace.arrivals)
        rate = trace.decode_rate()
        assert rate is not None
        self.rates[DECODE].append(rate)
        self.rates[OUTPUT].append(tokens / trace.seconds)
        self.rates[REQUESTS].append(len(trace.arrivals) / trace.seconds)
        self.gaps += trace.gaps()


@dataclass
class Latencies:
    """First-token times of one configuration on an idle engine, in seconds, in pairs.

    Attributes:
        cold: of tasks that the engine was never asked for. warm: of the same, asked again.
    """

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)


class Measurements:
    """Everything that was measured, by configuration."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, Load], Cell] = {}
        self.latencies: dict[str, Latencies] = defaultdict(Latencies)
        self.memory: dict[str, list[int]] = defaultdict(list)
        self.starts: dict[str, list[float]] = defaultdict(list)
        self.checks: dict[str, dict[str, Any]] = {}
        # Engine -> kernels, in the order in which they came.
        self.compiled: dict[str, dict[str, None]] = defaultdict(dict)
        self.not_run: dict[str, str] = {}
        self.wrong: list[str] = []

    def cell(
        self, configuration: Configuration, load: Load, requests: int, concurrency: int
    ) -> Cell:
        """The cell of a configuration and a load, made on first use."""
        key = (configuration.name, load)
        if key not in self.cells:
            self.cells[key] = Cell(configuration.name, load, requests, concurrency)
        return self.cells[key]

    def drop(self, configuration: str, reason: str) -> None:
        """Forget a configuration that failed: figures of some rounds compare with nothing."""
        self.not_run[configuration] = reason
        for key in [key for key in self.cells if key[0] == configuration]:
            del self.cells[key]
        for held in (self.latencies, self.memory, self.starts):
            held.pop(configuration, None)

    def rows(self) -> list[dict[str, Any]]:
        """A row a cell, with ratios to the base model and to stock vLLM under the same load."""
        return [self._row(cell) for cell in self.cells.values()]

    def _row(self, cell: Cell) -> dict[str, Any]:
        row: dict[str, Any] = {
            "configuration": cell.configuration,
            "tasks": cell.load.tasks,
            "popularity": cell.load.popularity,
            "requests": cell.requests,
            "concurrency": cell.concurrency,
            "inter_token_ms": spread([1e3 * gap for gap in cell.gaps]),
        }
        for rate in RATES:
            row[rate] = spread_of_rounds(cell.rates[rate])
        for label, name in (("to_base", BASE), ("to_stock", STOCK)):
            reference = self.cells.get((name, cell.load))
            row[label] = reference and {
                rate: spread_of_ratios(cell.rates[rate], reference.rates[rate]) for rate in RATES
            }
        return row

    def engine_rows(self) -> list[dict[str, Any]]:
        """A row a configuration: memory above the base model's, first-token times, start."""
        base = self.memory.get(BASE)
        names = dict.fromkeys(name for name, _ in self.cells)
        return [self._engine_row(name, base) for name in names]

    def _engine_row(self, name: str, base: list[int] | None) -> dict[str, Any]:
        held = self.latencies.get(name, Latencies())
        row: dict[str, Any] = {"configuration": name}
        row["memory_bytes"] = spread_of_rounds(self.memory[name]) if name in self.memory else None
        row["memory_above_base_bytes"] = None
        if base and row["memory_bytes"]:
            row["memory_above_base_bytes"] = row["memory_bytes"]["p50"] - spread(base)["p50"]
        row["start_s"] = self.starts.get(name) or None
        row["first_token_cold_ms"] = _milliseconds(held.cold)
        row["first_token_warm_ms"] = _milliseconds(held.warm)
        # A warm task's request does everything that the cold one's did but the activation.
        row["activation_ms"] = _milliseconds([c - w for c, w in zip(held.cold, held.warm)])
        return row

    def results(self) -> dict[str, Any]:
        """The part of the JSON report that was measured."""
        return {
            "schema_version": SCHEMA_VERSION,
            "units": {
                "inter_token_ms": "ms",
                "first_token_*_ms, activation_ms": "ms",
                "memory_bytes, memory_above_base_bytes": "bytes",
                "start_s": "s",
                "to_base, to_stock": "ratio of the round's rates",
            },
            "rows": self.rows(),
            "engines": self.engine_rows(),
            "checks": self.checks,
            "not_run": self.not_run,
            "compiled_while_serving": {n: list(k) for n, k in self.compiled.items() if k},
        }


def _milliseconds(seconds: list[float]) -> dict[str, Any] | None:
    return spread_of_rounds([1e3 * s for s in seconds]) if seconds else None


# --- printing --------------------------------------------------------------------------------------


def print_results(results: dict[str, Any]) -> None:
    """The tables: one for each load, one for the engines, then what did not run."""
    loads: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        loads.setdefault((row["tasks"], row["popularity"]), []).append(row)
    for (tasks, popularity), rows in sorted(loads.items()):
        _print_load(Load(tasks, popularity), rows)
    _print_engines(results["engines"])
    for name, reason in results["not_run"].items():
        print(f"NOT RUN {name}: {reason}")
    for name, kernels in results["compiled_while_serving"].items():
        print(f"compiled while serving, {name}: {', '.join(kernels)}")


def _print_load(load: Load, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{load}: {rows[0]['requests']} requests, {rows[0]['concurrency']} at a time; rates p50 "
        "(p20 to p80) of the rounds"
    )
    head = ["", "prefill tokens/s", "/base", "/stock", "decode tokens/s", "/base", "/stock"]
    head += ["output tokens/s", "requests/s", "between tokens, ms: p20", "p50", "p80"]
    print(table(head, map(_load_cells, rows)))


def _load_cells(row: dict[str, Any]) -> list[str]:
    gaps = row["inter_token_ms"]
    return [
        row["configuration"],
        *_rate(row, PREFILL),
        *_rate(row, DECODE),
        f"{row[OUTPUT]['p50']:.1f}",
        f"{row[REQUESTS]['p50']:.2f}",
        *(f"{gaps[name]:.1f}" for name in ("p20", "p50", "p80")),
    ]


def _rate(row: dict[str, Any], rate: str) -> list[str]:
    """A rate, its ratio to the base model and its ratio to stock vLLM."""
    values = row[rate]
    text = f"{values['p50']:.1f} ({values['p20']:.0f}-{values['p80']:.0f})"
    ratios = [row[key][rate]["p50"] if row[key] else None for key in ("to_base", "to_stock")]
    return [text, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]


def _print_engines(rows: Iterable[dict[str, Any]]) -> None:
    print("\nFirst token of one request on an idle engine, ms, p50 (p20 to p80), and memory:")
    head = ["", "cold task", "warm task", "cold - warm", "MiB above base", "start, s"]
    print(table(head, map(_engine_cells, rows)))
    print(
        "  (a cold task was never asked for; the same task asked again is warm. Memory is the worker's "
        "after every task\n  was served once: resident on CPU, tensors without the KV cache on a GPU)"
    )


def _engine_cells(row: dict[str, Any]) -> list[str]:
    memory, start, activation = (
        row[name] for name in ("memory_above_base_bytes", "start_s", "activation_ms")
    )
    return [
        row["configuration"],
        _latency(row["first_token_cold_ms"]),
        _latency(row["first_token_warm_ms"]),
        "-" if activation is None else f"{activation['p50']:.2f}",
        "-" if memory is None else f"{memory / 2**20:.0f}",
        "-" if start is None else f"{start[0]:.1f}",
    ]


def _latency(values: dict[str, Any] | None) -> str:
    if values is None:
        return "-"
    return f"{values['p50']:.1f} ({values['p20']:.1f}-{values['p80']:.1f})"
