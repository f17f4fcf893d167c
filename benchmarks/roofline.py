"""Print the least time of every LoRA path on a named GPU, beside what was measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import floors
from harness import count, table, write_json
from plots import draw_panels

DESCRIPTION = """\
Print what each path must move and compute over all linear layers of a model, and how long that takes
at least on a device: max(bytes / bandwidth, operations / rate, host bytes / PCIe rate). Forward paths: of
one step, and of one of the model's layers; "beside" is what is left of a layer's where the launches that
need x alone (in brackets) run beside the base layer, as in an engine's graphs.

  base                 the model's linear layers themselves
  punica               stock vLLM's shrink and expand, from slots padded to the slots' rank
  direct-joint         V, cores and U: shared bases, read once whatever the number of tasks
  direct-private       packed factors, each task at its own rank
  activate-stock       a task into a slot, copied from pinned host memory
  materialize-private  a task into a slot, from packed factors on the device
  materialize-joint    a task into a slot, from packed bases and cores on the device
  activate-direct      a task's records into the slot table

A device's rates are its data sheet's peaks (sources in floors.py), which no kernel reaches: give
measured ones with --bandwidth, --flops and --pcie for a fair ratio. --launch-us adds a latency for each
kernel launch, of which CUDA graphs take most away, and --load-us one for each load whose address another
load gives. With --bandwidth 3000 --launch-us 0.7 --load-us 0.5 direct-joint is predicted about as an H100
measures it. With --tp these are the shapes and the bytes of one rank; the sums over ranks come on top.
"""
EXAMPLES = """\
  python benchmarks/run.py roofline                                     llama-7b on an H100
  python benchmarks/run.py roofline --model llama-70b --device h200 --tokens 64 4096 --tasks 1 64
  python benchmarks/run.py roofline --model llama-70b --tp 4 --launch-us 0.7 --load-us 0.5
  python benchmarks/run.py roofline --bandwidth 2.9e3 --measured kernels.json
  python benchmarks/run.py roofline --model custom --layers 8 --hidden 1024 --intermediate 2816
"""
_MEASURED_FIELDS = ("op", "us_p50")


def run(args: argparse.Namespace) -> int:
    """Predict, or put floors beside what was measured; print and write."""
    device, model = make_device(args), make_model(args)
    if args.measured:
        rows = list(compare(args, device))
    else:
        rows = list(predict(args, model, device))
    print_head(device, args)
    (print_measured if args.measured else print_predicted)(rows)
    write_json(
        args.json,
        {
            "device": vars(device),
            "launch_us": args.launch_us,
            "load_us": args.load_us,
            "rows": rows,
        },
    )
    if args.plot:
        plot(args.plot, rows, f"{model.name}, rank {args.rank}, k {args.k}, {device.name}")
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The device, the work, and what was measured."""
    add_device_options(parser)
    add_work_options(parser)
    parser.add_argument(
        "--measured",
        metavar="FILE",
        type=Path,
        help="JSON with rows of op, us_p50, model, module, rank, k, tokens, tasks, format; prints "
        "each beside its floor instead of the predictions",
    )


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The slots' rank; ends the program where the options make no sense."""
    if args.plot and args.measured:
        parser.error("--plot draws predictions; leave --measured out")
    if args.measured and not args.measured.is_file():
        parser.error(f"--measured {args.measured}: no such file")
    for option in ("bandwidth", "flops", "pcie"):
        if getattr(args, option) is not None and getattr(args, option) <= 0:
            parser.error(f"--{option} must be above 0")
    if min(args.launch_us, args.load_us) < 0:
        parser.error("--launch-us and --load-us must not be negative")
    custom = (args.layers, args.hidden, args.intermediate)
    if (args.model == "custom") != all(custom) or (args.model != "custom" and any(custom)):
        parser.error("--model custom needs --layers, --hidden and --intermediate, others none")
    try:
        make_model(args)
        args.slot_rank = floors.slot_rank(max(args.rank, args.slot_rank or 1))
    except ValueError as error:
        parser.error(str(error))


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """The device's rates and the launch latency."""
    parser.add_argument(
        "--device", choices=floors.DEVICES, default="h100", help="data sheet (default: h100)"
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the device's memory")
    parser.add_argument("--flops", type=float, metavar="TFLOP/s", help="dense, in the dtype")
    parser.add_argument("--pcie", type=float, metavar="GB/s", help="from pinned host memory")
    parser.add_argument(
        "--launch-us", type=float, default=0.0, metavar="US", help="for each launch (default: 0)"
    )
    parser.add_argument(
        "--load-us",
        type=float,
        default=0.0,
        metavar="US",
        help="for each dependent load (default: 0)",
    )


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """The model's shape and what the batch is."""
    parser.add_argument("--model", choices=[*floors.MODELS, "custom"], default="llama-7b")
    parser.add_argument("--tp", type=count, default=1, help="tensor-parallel ranks (default: 1)")
    parser.add_argument("--layers", type=count, help="of a custom model")
    parser.add_argument("--hidden", type=count, help="of a custom model")
    parser.add_argument("--intermediate", type=count, help="of a custom model")
    parser.add_argument("--kv-width", type=count, help="rows of its k_proj (default: hidden)")
    parser.add_argument("--rank", type=count, default=16, help="of every task (default: 16)")
    parser.add_argument(
        "--slot-rank", type=count, metavar="R", help="vLLM's --max-lora-rank (default: holds rank)"
    )
    parser.add_argument("--k", type=count, default=64, help="components of a basis (default: 64)")
    parser.add_argument(
        "--tokens",
        type=count,
        nargs="+",
        default=[1, 64, 2048],
        help="a batch (default: 1 64 2048)",
    )
    parser.add_argument(
        "--tasks", type=count, nargs="+", default=[1, 32], help="distinct ones (default: 1 32)"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=floors.FORMATS,
        default=["bfloat16", "int8", "nf4"],
        help="of packed factors and bases (default: bfloat16 int8 nf4)",
    )
    parser.add_argument(
        "--dtype", choices=floors.FLOAT_BYTES, default="bfloat16", help="of x, y and slots"
    )


def make_device(args: argparse.Namespace) -> floors.Device:
    """The named device, with the rates given in place of the data sheet's."""
    known = floors.DEVICES[args.device]
    measured = args.bandwidth or args.flops or args.pcie
    return floors.Device(
        known.name + (", rates given" if measured else ", data sheet"),
        args.bandwidth * 1e9 if args.bandwidth else known.bandwidth,
        args.flops * 1e12 if args.flops else known.flops,
        args.pcie * 1e9 if args.pcie else known.pcie,
    )


def make_model(args: argparse.Namespace) -> floors.Model:
    """One rank of the named model or of the custom one."""
    if args.model != "custom":
        return floors.MODELS[args.model].on_rank(args.tp)
    kv_width = args.kv_width or args.hidden
    whole = floors.llama("custom", args.layers, args.hidden, args.intermediate, kv_width)
    return whole.on_rank(args.tp)


def make_work(args: argparse.Namespace, **values: Any) -> floors.Work:
    """The command line's work, with some of its parameters replaced."""
    settings = {
        "rank": args.rank,
        "slot_rank": args.slot_rank,
        "k": args.k,
        "itemsize": floors.FLOAT_BYTES[args.dtype],
    }
    return floors.Work(**{**settings, **values})


# --- predictions ----------------------------------------------------------------------------------


def predict(
    args: argparse.Namespace, model: floors.Model, device: floors.Device
) -> Iterator[dict[str, Any]]:
    """A row for each path, format and batch over the whole model."""
    for op in floors.FORWARD:
        for tokens in args.tokens:
            for tasks in args.tasks if op != "base" else [1]:
                if tasks > tokens:
                    continue
                for format in floors.formats_of(op, args.format):
                    work = make_work(args, tokens=tokens, tasks=tasks, format=format)
                    yield make_row(op, model, work, device, args)
    for op in floors.READY:
        for format in floors.formats_of(op, args.format):
            yield make_row(op, model, make_work(args, format=format), device, args)


def make_row(
    op: str,
    model: floors.Model,
    work: floors.Work,
    device: floors.Device,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """A path's cost and floor as JSON data."""
    cost = floors.model_cost(op, model, work)
    forward = op in floors.FORWARD
    waits = 1e-6 * args.launch_us, 1e-6 * args.load_us
    alone, beside = (1e6 * floors.seconds(cost, device, *waits, beside=b) for b in (False, True))
    return {
        "op": op,
        "model": model.name,
        "tp": args.tp,
        "rank": work.rank,
        "slot_rank": work.slot_rank,
        "k": work.k,
        "tokens": work.tokens if forward else None,
        "tasks": work.tasks if forward and op != "base" else None,
        "format": work.format if op in floors.USES_FORMAT else None,
        **asdict(cost),
        "bound": floors.bound(cost, device),
        "us": alone,
        "us_layer": alone / model.repeats if forward else None,
        "us_layer_beside": beside / model.repeats if forward else None,
    }


def print_head(device: floors.Device, args: argparse.Namespace) -> None:
    print(
        f"{device.name}: {device.bandwidth / 1e9:,.0f} GB/s, {device.flops / 1e12:,.0f} TFLOP/s, PCIe "
        f"{device.pcie / 1e9:,.0f} GB/s; {args.launch_us:g} us a launch, "
        f"{args.load_us:g} a dependent load"
    )


def print_predicted(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    part = f", one of {first['tp']} ranks" if first["tp"] > 1 else ""
    print(
        f"{first['model']}{part}, all linear layers; rank {first['rank']} in slots of "
        f"{first['slot_rank']}, k {first['k']}\n"
    )
    head = ["path", "format", "tokens", "tasks", "MB", "GFLOP", "launches", "loads", "bound", "us"]
    lines = (
        [
            row["op"],
            *(str(row[name] or "") for name in ("format", "tokens", "tasks")),
            f"{(row['bytes'] + row['host_bytes']) / 1e6:,.2f}",
            f"{row['flops'] / 1e9:,.2f}",
            *(_with_early(row, name) for name in ("launches", "loads")),
            row["bound"],
            f"{row['us']:,.2f}",
            *(
                "" if row[name] is None else f"{row[name]:,.2f}"
                for name in ("us_layer", "us_layer_beside")
            ),
        ]
        for row in rows
    )
    print(table([*head, "a layer", "beside"], lines, left=2))


def _with_early(row: dict[str, Any], name: str) -> str:
    """How many, and in brackets those that need x alone."""
    early = row[f"early_{name}"]
    return f"{row[name]} ({early})" if early else str(row[name])


# --- beside measurements --------------------------------------------------------------------------


def compare(args: argparse.Namespace, device: floors.Device) -> Iterator[dict[str, Any]]:
    """Each measured row with its floor and the ratio to it; None where there is no such floor."""
    for number, row in enumerate(read_measured(args.measured)):
        missing = [name for name in _MEASURED_FIELDS if name not in row]
        if missing:
            sys.exit(f"{args.measured}: row {number} has no {', '.join(missing)}")
        cost, reason = measured_cost(args, row)
        waits = 1e-6 * args.launch_us, 1e-6 * args.load_us
        floor = None if cost is None else 1e6 * floors.seconds(cost, device, *waits)
        ratio = row["us_p50"] / floor if floor else None
        yield {**row, "floor_us": floor, "ratio_to_floor": ratio, "no_floor": reason}


def read_measured(path: Path) -> list[dict[str, Any]]:
    """The list under ``rows``; ends the program with a line when there is none."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: not a benchmark's JSON with a list under 'rows' ({error!r})")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        sys.exit(f"{path}: 'rows' is no list of objects")
    return rows


def measured_cost(
    args: argparse.Namespace, row: dict[str, Any]
) -> tuple[floors.Cost | None, str | None]:
    """The cost of a measured row, of one layer or of the whole model, or why there is none."""
    if row["op"] not in floors.PATHS:
        return None, "unknown op"
    names = ("rank", "slot_rank", "k", "tokens", "tasks", "format")
    values = {name: row[name] for name in names if row.get(name) is not None}
    if "rank" in values and "slot_rank" not in values:
        # A rank beyond vLLM's is still one that runs direct, where the slot does not matter.
        allowed = min(values["rank"], floors.SLOT_RANKS[-1])
        values["slot_rank"] = floors.slot_rank(allowed)
    work = make_work(args, **values)
    if work.format not in floors.FORMATS:
        return None, f"unknown format {work.format}"
    shape = row.get("shape")
    if isinstance(shape, list) and len(shape) == 2:
        d_in, d_out = shape
        return floors.PATHS[row["op"]](floors.Layer("shape", d_in, (d_out,)), work), None
    model = floors.MODELS.get(row.get("model") or shape or args.model)
    if model is None:
        return None, "unknown model"
    model = model.on_rank(args.tp)
    if row.get("module") in (None, "all"):
        return floors.model_cost(row["op"], model, work), None
    try:
        return floors.PATHS[row["op"]](model.layer(row["module"]), work), None
    except KeyError:
        return None, "unknown module"


def print_measured(rows: list[dict[str, Any]]) -> None:
    names = ["op", "module", "format", "rank", "k", "tokens", "tasks"]
    head = ["path", *names[1:], "us p50", "floor us", "x floor"]
    lines = (
        [
            *("" if row.get(name) is None else str(row[name]) for name in names),
            f"{row['us_p50']:,.2f}",
            "none: " + row["no_floor"] if row["no_floor"] else f"{row['floor_us']:,.2f}",
            f"{row['ratio_to_floor']:.2f}" if row["ratio_to_floor"] else "",
        ]
        for row in rows
    )
    print("\n" + table(head, lines, left=3))


# --- drawing --------------------------------------------------------------------------------------


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw the forward paths' floors over the number of distinct tasks, a panel a batch size."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in sorted(rows, key=lambda row: (row["tokens"] or 0, row["tasks"] or 1)):
        if row["tokens"] is not None:
            label = row["op"] + (f" {row['format']}" if row["format"] else "")
            curves = panels.setdefault(f"{row['tokens']} tokens", {})
            curves.setdefault(label, []).append((row["tasks"] or 1, row["us"]))
    draw_panels(panels, title, "floor, us", path)
