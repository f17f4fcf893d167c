"""From samples to rows, and from rows to the table, the sums over a layer and the aims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import floors
from clock import Rates
from harness import table

from vllm_vlora.timing import spread

Row = dict[str, Any]
AIM_TASKS = 64
# (tokens, tasks) of the prefill that the overhead's aim looks at.
AIM_PREFILL = (2048, 8)


@dataclass(frozen=True)
class Floors:
    """The least times that the measured rates allow."""

    device: floors.Device

    @classmethod
    def of(cls, name: str, rates: Rates) -> Floors:
        """Of a device with these rates."""
        return cls(floors.Device(name, rates.memory, rates.flops, rates.host))

    def layer_floor(self, op: str, layer: floors.Layer, work: floors.Work) -> tuple[float, str]:
        """(seconds, the resource that sets them) of an operation on one layer."""
        return self.floor(floors.PATHS[op](layer, work))

    def floor(self, cost: floors.Cost) -> tuple[float, str]:
        """(seconds, the resource that sets them)."""
        return floors.seconds(cost, self.device), floors.bound(cost, self.device)


def make_row(
    op: str,
    work: floors.Work,
    floor: tuple[float, str],
    seconds: Sequence[float],
    *,
    model: str,
    module: str,
    phase: str,
    mode: str,
    copies: int,
    error: float | None,
) -> Row:
    """A measurement as JSON data, as ``roofline.py --measured`` reads it."""
    forward = op in floors.FORWARD
    times = {f"us_{name}": us for name, us in spread(seconds, 1e6).items()}
    return {
        "op": op,
        "model": model,
        "module": module,
        "phase": phase,
        "mode": mode,
        "rank": None if op == "base" else work.rank,
        "slot_rank": work.slot_rank,
        "k": work.k if op in ("direct-joint", "materialize-joint", "activate-direct") else None,
        "format": work.format if op in floors.USES_FORMAT else None,
        "tokens": work.tokens if forward else None,
        "tasks": work.tasks if forward else None,
        **times,
        "floor_us": 1e6 * floor[0],
        "bound": floor[1],
        "ratio_to_floor": times["us_p50"] / (1e6 * floor[0]),
        "samples": len(seconds),
        "copies": copies,
        "error": error,
    }


def label(row: Row) -> str:
    """The operation with what tells it from others of its kind."""
    return " ".join(
        str(part)
        for part in (row["op"], row["k"] and f"k={row['k']}", row["format"])
        if part is not None
    )


# --- sums -----------------------------------------------------------------------------------------

Key = tuple[str, str, int, int, str]


def layer_sums(rows: Iterable[Row], modules: dict[str, set[str]]) -> dict[Key, dict[str, float]]:
    """Microseconds (p50) of one layer of the model: the sum over its linear modules.

    Args:
        modules: model -> the modules of its layer; an operation that lacks one of them is left out.

    Returns:
        (model, phase, tokens, tasks, mode) -> label -> microseconds.
    """
    found: dict[Key, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["op"] in floors.FORWARD:
            key = (row["model"], row["phase"], row["tokens"], row["tasks"], row["mode"])
            by_label = found.setdefault(key, {})
            by_label.setdefault(label(row), {})[row["module"]] = row["us_p50"]
    return {
        key: {
            name: sum(parts.values())
            for name, parts in by_label.items()
            if parts.keys() == modules[key[0]]
        }
        for key, by_label in found.items()
    }


# --- aims -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """What a ratio should be at most or at least; ``ratio`` is None where it was not measured."""

    text: str
    ratio: float | None
    limit: float
    at_least: bool

    @property
    def verdict(self) -> str:
        """pass, fail or not measured."""
        if self.ratio is None:
            return "not measured"
        met = self.ratio >= self.limit if self.at_least else self.ratio <= self.limit
        return "pass" if met else "fail"

    def __str__(self) -> str:
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        sign = ">=" if self.at_least else "<="
        return f"{self.verdict:12} {ratio:>7} (aim {sign} {self.limit:g})  {self.text}"


def find_aims(
    rows: Sequence[Row], modules: dict[str, set[str]], formats: dict[str, str]
) -> list[Aim]:
    """The project's aims for every measured model.

    Args:
        modules: as :func:`layer_sums` takes them.
        formats: the format that stands for "bf16" and for "nf4".
    """
    sums = layer_sums(rows, modules)
    aims: list[Aim] = []
    for model in modules:
        aims += _materialize_aims([row for row in rows if row["model"] == model], model, formats)
        aims += _forward_aims(sums, model, formats)
    return aims


def _materialize_aims(rows: Sequence[Row], model: str, formats: dict[str, str]) -> Iterator[Aim]:
    host = next((row["us_p50"] for row in rows if row["op"] == "copy-pinned"), None)
    wanted = [(formats["bf16"], 1.3), (formats["nf4"], 1.6)]
    for format, limit in wanted:
        chosen = [
            row for row in rows if row["op"].startswith("materialize") and row["format"] == format
        ]
        if not chosen:
            yield Aim(f"{model}: materialize {format}", None, limit, at_least=False)
        for row in chosen:
            name = f"{model}: {label(row)}"
            if row["mode"] == "graph":
                text = f"{name}, device time over its floor"
                yield Aim(text, row["ratio_to_floor"], limit, at_least=False)
            elif host is not None:
                text = f"{name}, faster than a copy from pinned host memory, host time included"
                yield Aim(text, host / row["us_p50"], 10, at_least=True)


def _forward_aims(
    sums: dict[Key, dict[str, float]], model: str, formats: dict[str, str]
) -> Iterator[Aim]:
    decode = sums.get((model, "decode", AIM_TASKS, AIM_TASKS, "graph"), {})
    prefill = sums.get((model, "prefill", *AIM_PREFILL, "graph"), {})
    labels = dict.fromkeys([*decode, *prefill])
    joint = [name for name in labels if name.startswith("direct-joint")] or ["direct-joint"]
    batch = f"decode, {AIM_TASKS} tasks"
    for name in joint:
        yield _faster(decode, name, 3, f"{model}: {name}, {batch}")
    name = f"direct-private {formats['nf4']}"
    yield _faster(decode, name, 2, f"{model}: {name}, {batch}")
    where = f"prefill, {AIM_PREFILL[0]} tokens of {AIM_PREFILL[1]} tasks"
    for found, what in ((decode, batch), (prefill, where)):
        for name in joint:
            base = found.get("base")
            ratio = found[name] / base if base and name in found else None
            yield Aim(f"{model}: {name} over the base linears, {what}", ratio, 0.15, at_least=False)


def _faster(found: dict[str, float], name: str, limit: float, text: str) -> Aim:
    ratio = found["punica"] / found[name] if {"punica", name} <= found.keys() else None
    return Aim(f"{text}, faster than punica", ratio, limit, at_least=True)


def aim_data(aim: Aim) -> dict[str, Any]:
    """An aim as JSON data."""
    return {**asdict(aim), "verdict": aim.verdict}


# --- tables ---------------------------------------------------------------------------------------


def print_forward(rows: Sequence[Row]) -> None:
    """A block a cell; the figures of a graph where there is one, and the eager p50 beside them."""
    cells: dict[tuple[Any, ...], list[tuple[Row, Row]]] = {}
    for row, eager in _main_rows([row for row in rows if row["op"] in floors.FORWARD]):
        here = (row["model"], row["module"], row["phase"], row["tokens"], row["tasks"], row["mode"])
        cells.setdefault(here, []).append((row, eager))
    head = ["", "p20", "p50", "p80", "floor", "x floor", "eager", "of base", "x punica"]
    for (model, module, phase, tokens, tasks, mode), pairs in cells.items():
        print(f"\n{model} {module}, {phase}, {tokens} tokens, {tasks} tasks; {mode}, us")
        ratios = _ratios({label(row): row["us_p50"] for row, _ in pairs})
        lines = (
            [label(row), *_times(row), f"{eager['us_p50']:.2f}", *ratios[label(row)]]
            for row, eager in pairs
        )
        print(table(head, lines))


def _ratios(us: dict[str, float]) -> dict[str, tuple[str, str]]:
    """Of each operation's time: its part of the base linears', and how often it fits punica's."""
    base, punica = us.get("base"), us.get("punica")
    return {
        name: (
            f"{time / base:.1%}" if base and name != "base" else "",
            f"{punica / time:.2f}" if punica and name != "punica" else "",
        )
        for name, time in us.items()
    }


def _main_rows(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Each measurement once: (the graph's row or else the eager one, the eager row)."""
    graph: Row | None = None
    for row in rows:
        if row["mode"] == "graph":
            graph = row
        else:
            yield graph or row, row
            graph = None


def print_sums(sums: dict[Key, dict[str, float]]) -> None:
    """A line a batch and operation, for the whole layer."""
    print(
        "\none layer, all its linear modules; us p50, of the base linears, times faster than punica"
    )
    for (model, phase, tokens, tasks, mode), found in sums.items():
        if mode == "eager" and (model, phase, tokens, tasks, "graph") in sums:
            continue
        print(f"  {model} {phase}, {tokens} tokens, {tasks} tasks; {mode}")
        ratios = _ratios(found)
        lines = ([name, f"{us:.2f}", *ratios[name]] for name, us in found.items())
        print(table(["", "us", "of base", "x punica"], lines))


def print_activation(rows: Sequence[Row]) -> None:
    """A line a way to make a whole task ready."""
    print("\na whole task made ready; us")
    head = ["model", "", "mode", "p20", "p50", "p80", "floor", "x floor"]
    chosen = [row for row in rows if row["op"] not in floors.FORWARD]
    print(table(head, ([row["model"], label(row), row["mode"], *_times(row)] for row in chosen), 3))


def _times(row: Row) -> list[str]:
    names = ("us_p20", "us_p50", "us_p80", "floor_us", "ratio_to_floor")
    return [f"{row[name]:.2f}" for name in names]
