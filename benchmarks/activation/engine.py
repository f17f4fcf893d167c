"""What a vLLM worker does to make a task ready: stock and vllm-vlora, in one real engine."""

from __future__ import annotations

import argparse
import gc
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from clock import synchronise
from harness import (
    WrongResultError,
    cores,
    cpu_name,
    end_record,
    in_another_process,
    print_record,
    record,
    say,
    table,
)

from activation import startup
from activation.work import Work, start_engine, worker_manager
from vllm_vlora.timing import percentile, seconds_of, spread, take_turns

STOCK, CACHED = "stock, PEFT folder", "stock, in host RAM"
# Far above the counter-like ids of the stock requests that are loaded from disk.
CACHED_ID_OFFSET = 1000
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # Engine and worker in this process, to be called directly.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


# --- what is measured ------------------------------------------------------------------------------


@dataclass
class Sizes:
    """Bytes of one task, and of what all tasks of a checkpoint share.

    Attributes:
        file: the task's own file(s). basis_files: the shared basis files, once.
        resident: the task's memory in the worker. basis_resident: the shared bases there, once.
        read: stored bytes that an activation reads. written: bytes of the slot, all of it.
    """

    file: int
    basis_files: int
    resident: int
    basis_resident: int
    read: int
    written: int


@dataclass
class Method:
    """One way to make a task ready; ``activate`` and ``evict`` take the task's number.

    ``expected`` gives the factors (A, B with the scale, float32) that must lie in the slot under the
    engine's module names; ``bound`` says how far each may be off; ``errors`` are the tasks' relative
    errors of delta_W that the checkpoint records.
    """

    name: str
    lora_ids: list[int]
    activate: Callable[[int], bool]
    evict: Callable[[int], object]
    expected: Callable[[int], dict[str, tuple[Any, Any]]]
    exact: bool
    errors: list[float]
    sizes: Sizes
    times: list[float] = field(default_factory=list)
    times_alone: list[float] = field(default_factory=list)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; everything that was measured.

    Raises:
        WrongResultError: something is wrong; there are no figures then.
    """
    os.environ.update(ENVIRONMENT)
    # Only this plugin, and no checkpoint preloaded: the run loads four of its own.
    os.environ["VLLM_PLUGINS"] = "vlora"
    os.environ.pop("VLLM_VLORA_CHECKPOINT", None)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report = describe(args)
    print_record(report)
    with tempfile.TemporaryDirectory(prefix="bench-activation-") as folder:
        work = Work(args, Path(folder))
        report |= measure_activation(work)
        print_activation(report)
        if args.startup:
            gc.collect()  # The engine's memory, before others start.
            report["startup"] = startup.measure(work)
            startup.show(report["startup"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["peak_memory_bytes"] = peak
    print(f"\npeak memory of this process {peak / 2**30:.2f} GiB")
    end_record(report)
    return report


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the command."""
    import torch
    from vllm.platforms import current_platform

    from vllm_vlora.plugin import check_version

    check_version()
    device = cpu_name() if current_platform.is_cpu() else current_platform.get_device_name()
    report = record(args, f"{device}, {cores()} cores", "torch", "vllm")
    return {**report, "threads": torch.get_num_threads()}


# --- model, adapters, checkpoints ------------------------------------------------------------------


def checkpoint_options(k: int) -> dict[str, Any]:
    """Method name -> CompressOptions; the tiny ratios set no limit, so that no rank is cut."""
    from vllm_vlora import CompressOptions

    private: dict[str, Any] = {"representation": "private", "ratio": 0.1}
    return {
        "private bfloat16": CompressOptions(**private, quantize="none"),
        "private int8": CompressOptions(**private, quantize="int8"),
        "private nf4": CompressOptions(**private, quantize="nf4", double_quantize=False),
        f"joint k={k}": CompressOptions(num_components=k, quantize="none"),
    }


# --- activation ------------------------------------------------------------------------------------


def measure_activation(work: Work) -> dict[str, Any]:
    """Time every method in one engine, then check what each of them puts into slots."""
    from vllm_vlora import open_adapter

    args = work.args
    say(f"making {args.tasks} adapters and four checkpoints of them")
    in_another_process(make_checkpoints, work)
    adapters = [open_adapter(work.adapter_folder / str(i)) for i in range(args.tasks)]
    checkpoints = {name: work.folder / name for name in checkpoint_options(args.k)}
    say("starting three engines")
    llm = start_engine(work.engine_arguments())
    engines = [llm]
    try:
        manager = worker_manager(llm)
        methods = make_methods(manager, adapters, checkpoints)
        direct_managers = {}
        for name in direct_checkpoints(args.k):
            engines.append(start_direct_engine(work, checkpoints[name]))
            direct_managers[f"direct {name}"] = worker_manager(engines[-1])
        direct = [
            direct_method(held, name, checkpoints[name.removeprefix("direct ")])
            for name, held in direct_managers.items()
        ]
        filling, methods = methods, [*methods, *direct]
        say(f"timing {args.rounds} rounds in turn, then as many by itself")
        interleave(methods, args.tasks, args.warmup, args.rounds, manager.device)
        back_to_back(methods, args.tasks, args.rounds, manager.device)
        bandwidth = copy_bandwidth(manager.device)
        say("checking every method with every task")
        for number, adapter in enumerate(adapters):
            for method in filling:
                check(manager, method, number, adapter)
            for method in direct:
                check_direct(direct_managers[method.name], method, number)
    finally:
        for engine in engines:
            engine.llm_engine.engine_core.shutdown()
    stock = next(method for method in methods if method.name == STOCK)
    rows = [summarise(method, stock, bandwidth, args.tasks) for method in methods]
    return {
        "linears": len(adapters[0].modules),
        "slot_dtype": args.dtype,
        "copy_bytes_per_s": bandwidth,
        "unit": "ms",
        "results": rows,
    }


def make_checkpoints(work: Work) -> None:
    from vllm_vlora import compress

    adapters = work.make_adapters(work.args.tasks)
    for name, options in checkpoint_options(work.args.k).items():
        compress(adapters, work.folder / name, options)


def direct_checkpoints(k: int) -> tuple[str, str]:
    """The checkpoints that are also run direct."""
    return f"joint k={k}", "private nf4"


def start_direct_engine(work: Work, folder: Path) -> Any:
    """One more engine of this process, whose tasks run direct."""
    from vllm_vlora.plugin.manager import Setup, TaskLoRAManager
    from vllm_vlora.plugin.settings import Settings

    before = TaskLoRAManager.setup
    TaskLoRAManager.setup = Setup(str(folder), Settings("direct"))
    try:
        llm = start_engine(work.engine_arguments())
        worker_manager(llm)._adapter_manager.preload(str(folder))
    finally:
        TaskLoRAManager.setup = before
    return llm


def make_methods(manager: Any, adapters: list[Any], checkpoints: dict[str, Path]) -> list[Method]:
    from vllm_vlora.plugin.manager import TaskLoRAManager

    slots = manager._adapter_manager
    if not isinstance(slots, TaskLoRAManager):
        raise SystemExit("the plugin is not installed in vLLM; its log line above says why")
    written = sum(
        view.numel() * view.element_size()
        for layout in slots.writer.layouts
        for view in (layout.a(0), layout.b(0))
    )
    # The module names of a Llama are the same in the adapters and in the engine.
    missing = set(adapters[0].modules) - {layout.name for layout in slots.writer.layouts}
    if missing:
        raise SystemExit(f"vLLM has another name for {min(missing)}; use a Llama")
    ours = [resident_method(manager, name, folder, written) for name, folder in checkpoints.items()]
    return [*stock_methods(manager, adapters, written), *ours]


def stock_methods(manager: Any, adapters: list[Any], written: int) -> list[Method]:
    """vLLM's own path from the PEFT folder, and its last step alone."""
    from vllm.lora.request import LoRARequest

    slots = manager._adapter_manager

    def requests(first: int) -> list[Any]:
        return [
            LoRARequest(f"{adapter.name}-{first}", first + i, str(adapter.path))
            for i, adapter in enumerate(adapters)
        ]

    def expected(number: int) -> dict[str, tuple[Any, Any]]:
        modules = adapters[number].modules
        factors = {name: adapters[number].factors(name) for name in modules}
        return {
            name: (a.float(), b.float() * modules[name].scale) for name, (a, b) in factors.items()
        }

    disk, kept = requests(1), requests(1 + CACHED_ID_OFFSET)
    for request in kept:
        manager.add_adapter(request)
        slots.deactivate_adapter(request.lora_int_id)
    resident = host_nbytes(slots.get_adapter(kept[0].lora_int_id))
    file = sum(path.stat().st_size for path in adapters[0].path.iterdir())
    errors = [0.0] * len(adapters)
    return [
        Method(
            STOCK,
            [request.lora_int_id for request in disk],
            lambda i: manager.add_adapter(disk[i]),
            lambda i: manager.remove_adapter(disk[i].lora_int_id),
            expected,
            True,
            errors,
            Sizes(file, 0, 0, 0, file, written),
        ),
        Method(
            CACHED,
            [request.lora_int_id for request in kept],
            lambda i: slots.activate_adapter(kept[i].lora_int_id),
            lambda i: slots.deactivate_adapter(kept[i].lora_int_id),
            expected,
            True,
            errors,
            Sizes(file, 0, resident, 0, resident, written),
        ),
    ]


def host_nbytes(model: Any) -> int:
    """Bytes of a stock LoRAModel's tensors in host memory."""
    total = 0
    for layer in model.loras.values():
        for side in (layer.lora_a, layer.lora_b):
            for tensor in side if isinstance(side, list) else [side]:
                total += tensor.numel() * tensor.element_size()
    return total


def resident_method(manager: Any, name: str, folder: Path, written: int) -> Method:
    """vllm-vlora's path from one checkpoint, made resident here."""
    from vllm_vlora import lora_request
    from vllm_vlora.plugin.identity import task_path
    from vllm_vlora.representations.decode import decode

    store = manager._adapter_manager.vlora_store
    held = store.nbytes
    checkpoint = store.preload(folder)
    held = store.nbytes - held
    task_ids = list(checkpoint.tasks)
    requests = [lora_request(checkpoint, task_id) for task_id in task_ids]
    bases = dict(checkpoint.bases())

    def expected(number: int) -> dict[str, tuple[Any, Any]]:
        stored = checkpoint.load_task(task_ids[number]).modules
        return {module: decode(stored[module], bases.get(module)) for module in stored}

    basis = sum(side.nbytes for b in bases.values() for side in (b.u, b.v))
    task = store.task(task_path(checkpoint, task_ids[0]))
    sources = [source for pair in task.sources.values() for source in pair]
    read = sum(s.matrix.nbytes + (0 if s.left is None else s.left.nbytes) for s in sources)
    return Method(
        name,
        [request.lora_int_id for request in requests],
        lambda i: manager.add_adapter(requests[i]),
        lambda i: manager.remove_adapter(requests[i].lora_int_id),
        expected,
        name == "private bfloat16",
        [checkpoint.record(task_id).error for task_id in task_ids],
        Sizes(
            checkpoint.lora_nbytes(task_ids[0]),
            checkpoint.basis_nbytes,
            (held - basis) // len(task_ids),
            basis,
            read,
            written,
        ),
    )


def direct_method(manager: Any, name: str, folder: Path) -> Method:
    """vllm-vlora's direct mode, from the checkpoint that the engine started with."""
    from vllm_vlora import Checkpoint, lora_request
    from vllm_vlora.representations.decode import decode

    checkpoint = Checkpoint.open(folder)
    task_ids = list(checkpoint.tasks)
    requests = [lora_request(checkpoint, task_id) for task_id in task_ids]
    bases = dict(checkpoint.bases())
    path = manager._adapter_manager.vlora_store.direct
    memory, records = path.memory(), path.empty.records.nbytes

    def expected(number: int) -> dict[str, tuple[Any, Any]]:
        stored = checkpoint.load_task(task_ids[number]).modules
        return {module: decode(stored[module], bases.get(module)) for module in stored}

    return Method(
        name,
        [request.lora_int_id for request in requests],
        lambda i: manager.add_adapter(requests[i]),
        lambda i: manager.remove_adapter(requests[i].lora_int_id),
        expected,
        False,
        [checkpoint.record(task_id).error for task_id in task_ids],
        Sizes(
            checkpoint.lora_nbytes(task_ids[0]),
            checkpoint.basis_nbytes,
            (memory.cores + memory.factors) // len(task_ids) + records,
            memory.bases,
            records,
            records,
        ),
    )


def interleave(methods: list[Method], tasks: int, warmup: int, rounds: int, device: Any) -> None:
    """Time the methods in turn; every round activates another task, removed again untimed."""
    clocks = [partial(load_next, method, count(), tasks, device) for method in methods]
    for method, times in zip(methods, take_turns(clocks, rounds, warmup)):
        method.times = times


def load_next(method: Method, calls: Iterator[int], tasks: int, device: Any) -> float:
    """Seconds to make the next task ready."""
    number, loaded = next(calls) % tasks, [False]

    def activate() -> None:
        loaded[0] = method.activate(number)

    seconds = seconds_of(activate, partial(synchronise, device))
    if not loaded[0]:
        raise WrongResultError(f"{method.name}: a task was loaded before its turn")
    method.evict(number)
    return seconds


def back_to_back(methods: list[Method], tasks: int, rounds: int, device: Any) -> None:
    """Time each method by itself: nothing else used the caches or the allocator meanwhile."""
    for method in methods:
        alone = replace(method, times=[])
        interleave([alone], tasks, tasks, rounds, device)
        method.times_alone = alone.times


def copy_bandwidth(device: Any) -> float:
    """Bytes read plus bytes written a second, of a large copy on the device."""
    import torch

    source = torch.ones(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = partial(seconds_of, lambda: target.copy_(source), partial(synchronise, device))
    (times,) = take_turns([clock], rounds=17, warmup=3)
    return 2 * source.numel() / percentile(times, 50)


# --- correctness -----------------------------------------------------------------------------------


def check(manager: Any, method: Method, number: int, adapter: Any) -> None:
    """Activate a task into poisoned slots and compare what lies there.

    Raises:
        WrongResultError: a value is off by more than rounding, or delta_W by more than is recorded.
    """
    import torch

    slots = manager._adapter_manager
    layouts = {layout.name: layout for layout in slots.writer.layouts}
    expected = method.expected(number)
    for slot in range(slots.lora_slots):
        for layout in slots.writer.layouts:
            layout.a(slot).fill_(torch.nan)
            layout.b(slot).fill_(torch.nan)
        slots.writer.forget(slot)
    if not method.activate(number):
        raise WrongResultError(f"{method.name}: task {number} was loaded before it was asked for")
    slot = slots.lora_index_to_id.index(method.lora_ids[number])
    where = f"{method.name}, task {number}"
    for name in layouts.keys() - expected.keys():
        if layouts[name].a(slot).any() or layouts[name].b(slot).any():
            raise WrongResultError(f"{where}: {name}, which the task does not adapt, is not zero")
    difference = total = 0.0
    for name, (a, b) in expected.items():
        slot_a, slot_bt = layouts[name].a(slot), layouts[name].b(slot)
        compare(f"{where}, {name} A", slot_a, a, method.exact)
        compare(f"{where}, {name} B", slot_bt, b.T, method.exact)
        own_a, own_b = adapter.factors(name)
        squares = delta_squares(slot_a, slot_bt, own_a, own_b, adapter.modules[name].scale)
        difference, total = difference + squares[0], total + squares[1]
    method.evict(number)
    error, recorded = (difference / total) ** 0.5, method.errors[number]
    # bfloat16 slots round once more than the checkpoint did.
    slack = 1e-5 if slot_a.dtype == torch.float32 else 2.0**-8
    if not abs(error - recorded) <= 1e-3 * recorded + slack:
        raise WrongResultError(
            f"{where}: delta_W is off by {error:.3g}, the checkpoint records {recorded:.3g}"
        )


def check_direct(manager: Any, method: Method, number: int) -> None:
    """Activate a task and compare what every layer adds to random inputs with its decoded factors.

    Raises:
        WrongResultError: a sum is off by more than rounding.
    """
    import numpy as np
    import torch

    from vllm_vlora.triton_kernels.direct import add_direct

    slots = manager._adapter_manager
    path, expected = slots.vlora_store.direct, method.expected(number)
    method.activate(number)
    slots._direct_slots.route(np.full(4, method.lora_ids[number]))
    for name, layer in path.layers.items():
        x = torch.randn(4, layer.d_in, dtype=path.dtype, device=path.device)
        y = x.new_zeros(4, layer.width)
        add_direct(y, x, layer, path.table, path.routing)
        parts = slots.packed_modules.get(name, [name])
        for part, found in zip(parts, y.split([part.width for part in layer.slices], dim=1)):
            a, b = (factor.to(path.device).double() for factor in expected[part])
            wanted = x.double() @ a.T @ b.T
            slack = 1e-5 if path.dtype == torch.float32 else 2.0**-6
            if not ((found - wanted).abs() <= slack * wanted.abs().amax()).all():
                raise WrongResultError(
                    f"{method.name}, task {number}, {part}: not what it decodes to"
                )
    method.evict(number)


def compare(where: str, slot: Any, expected: Any, exact: bool) -> None:
    """A slot against float32 factors; rows beyond the task's rank must be zero."""
    import torch

    rank = expected.shape[0]
    if slot[rank:].any() or not torch.isfinite(slot).all():
        raise WrongResultError(f"{where}: not filled whole")
    if exact:
        if not torch.equal(slot[:rank], expected.to(slot.dtype)):
            raise WrongResultError(f"{where}: not the adapter's own values")
        return
    # Products of up to a few hundred terms, accumulated in float32 in another order.
    bound = 1e-5 * expected.abs().amax()
    if slot.dtype != torch.float32:
        bound = bound + 2.0**-8 * expected.abs()
    if not ((slot[:rank].float() - expected).abs() <= bound).all():
        raise WrongResultError(f"{where}: not what the checkpoint decodes to")


def delta_squares(slot_a: Any, slot_bt: Any, a: Any, b: Any, scale: float) -> tuple[float, float]:
    """(||B'A' - s B A||_F^2, ||s B A||_F^2) from Gram matrices of the factors, in float64."""
    import torch

    rows_a = torch.cat([slot_a.double(), a.double()])
    rows_b = torch.cat([slot_bt.double(), -scale * b.T.double()])
    products = (rows_a @ rows_a.T) * (rows_b @ rows_b.T)
    own = products[slot_a.shape[0] :, slot_a.shape[0] :].sum()
    return max(products.sum().item(), 0.0), own.item()


# --- figures ---------------------------------------------------------------------------------------


def summarise(method: Method, stock: Method, bandwidth: float, tasks: int) -> dict[str, Any]:
    sizes, p50 = method.sizes, percentile(method.times, 50)
    alone = percentile(method.times_alone, 50)
    moved = sizes.read + sizes.written
    return {
        "method": method.name,
        **spread(method.times, 1e3),
        "stock_over_this": percentile(stock.times, 50) / p50,
        "p50_alone": 1e3 * alone,
        "stock_over_this_alone": percentile(stock.times_alone, 50) / alone,
        "worst_error": max(method.errors),
        "floor": 1e3 * moved / bandwidth,
        "ratio_to_floor": p50 * bandwidth / moved,
        "bytes_per_s": moved / p50,
        "bytes": {**vars(sizes), "disk_share": sizes.file + sizes.basis_files // tasks},
        "times": [round(1e3 * seconds, 4) for seconds in method.times],
    }


def print_activation(report: dict[str, Any]) -> None:
    args = report["arguments"]
    print(
        f"\n{args['tasks']} adapters of rank {args['rank']} on {report['linears']} linears, slots "
        f"{report['slot_dtype']}; {args['rounds']} interleaved rounds; every slot checked\n"
    )
    print(
        "Time to make a task ready that is not loaded, in ms; (1) in turn with the others, (2) by itself:"
    )
    head = ["", "p20 (1)", "p50 (1)", "p80 (1)", "stock/this (1)", "p50 (2)", "stock/this (2)"]
    head += ["delta_W error", "byte floor", "x floor", "GB/s"]
    print(table(head, map(time_cells, report["results"])))
    print(
        f"  (GB/s: bytes read from the stored factors and written into the slot over the first p50; "
        f"a plain copy on this device moves {report['copy_bytes_per_s'] / 1e9:.2f} GB/s: the floor)"
    )
    print("\nBytes, in MB (10^6):")
    head = ["", "task file", "basis files", "disk/task", "resident/task", "basis resident"]
    print(table([*head, "read", "slot"], map(size_cells, report["results"])))
    print(
        f"  (disk/task is the task's file and its share of the basis among {args['tasks']} tasks; "
        "basis and slot are there once, whatever the number of tasks)",
        flush=True,
    )


def time_cells(row: dict[str, Any]) -> list[str]:
    """A method's line of the first table."""
    return [
        row["method"],
        *(f"{row[name]:.3f}" for name in ("p20", "p50", "p80")),
        f"{row['stock_over_this']:.2f}x",
        f"{row['p50_alone']:.3f}",
        f"{row['stock_over_this_alone']:.2f}x",
        f"{row['worst_error']:.4f}",
        f"{row['floor']:.3f}",
        f"{row['ratio_to_floor']:.2f}",
        f"{row['bytes_per_s'] / 1e9:.2f}",
    ]


def size_cells(row: dict[str, Any]) -> list[str]:
    """A method's line of the second table."""
    names = ("file", "basis_files", "disk_share", "resident", "basis_resident", "read", "written")
    return [row["method"], *(f"{row['bytes'][name] / 1e6:.3f}" for name in names)]
