"""Time how long a vLLM worker takes to make a task ready that is not loaded: stock and vllm-vlora."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Time what a vLLM worker does when a request names a task that is not loaded: its LoRA manager's
add_adapter, from the call until A and B of every module are in a slot. One real engine (vllm.LLM,
in this process) takes the same adapters in turn (A B C A B C ...), so that a drift of the machine
hits all alike, and each task is removed again before its next turn, so that every call loads:

  stock, PEFT folder   vLLM's own path: read the folder (from the page cache), convert, fill a slot
  stock, in host RAM   only vLLM's slot write, of an adapter already converted in host memory; such a
                       task is loaded, so this is a reference and no rival
  private bfloat16     vllm-vlora: fill a slot from a resident checkpoint of the adapters as they are
  private int8, nf4    the same, from quantised factors, dequantised on the way
  joint k=64           the same, from shared bases and small cores, multiplied on the way
  direct joint k=64,   vllm-vlora's direct mode, which fills no slot: a row of addresses, in an engine
  direct private nf4   of its own in the same process, started with that checkpoint

The adapters are random, of rank 16 on all seven linears of a layer, bfloat16, with nonzero B, and lie
near a common subspace of 64 dimensions, so that a joint checkpoint is not mere error. The plugin is
installed while stock code runs; --startup also times stock code in processes with and without it.

In the same engine slots are then poisoned with NaN, filled by each method with each task and
compared: stock and private bfloat16 with the adapter's own factors, bit for bit; the others with the
checkpoint's decoded factors, and their delta_W with the adapter's, whose relative error must be the
one that the checkpoint records. Direct tasks must add to random inputs, in every layer, what the decoded
factors add. When anything is wrong, no figure is printed and the exit status
is 1.

In turn, each call finds what the others left in the caches and the allocator, as a server would; by
itself, each method runs again and again alone, which favours small working sets. The byte floor is
the time to read the stored factors once and to write the slot once, zeros of layers that the adapter
leaves out included, at the copy bandwidth that this run measures.
"""
EPILOG = """\
examples:
  python benchmarks/bench_activation.py                        a Llama of 8 layers, about a minute
  python benchmarks/bench_activation.py --model DIR            the shapes and weights of a real model
  python benchmarks/bench_activation.py --rounds 60 --device-note "idle, 2 vCPU" --json result.json
  python benchmarks/bench_activation.py --startup              also the engine's start, 5 minutes more

Other work on the machine spoils the figures: the load average is printed and stored with them.
"""
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STOCK, CACHED = "stock, PEFT folder", "stock, in host RAM"
# A quiet machine has less than this many runnable processes, the benchmark itself included.
QUIET_LOAD = 1.5
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


class WrongResultError(Exception):
    """A slot does not hold what it should, or a call that should have loaded did not."""


def main() -> int:
    args = parse_arguments()
    if args.startup_child:
        return startup_child(json.loads(args.startup_child))
    os.environ.update(ENVIRONMENT)
    # Only this plugin, and no checkpoint preloaded: the run loads four of its own.
    os.environ["VLLM_PLUGINS"] = "vlora"
    os.environ.pop("VLLM_VLORA_CHECKPOINT", None)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report = describe(args)
    print_header(report)
    with tempfile.TemporaryDirectory(prefix="bench-activation-") as folder:
        work = Work(args, Path(folder))
        try:
            report |= measure_activation(work)
        except WrongResultError as error:
            print(f"wrong result, no figures: {error}", file=sys.stderr)
            return 1
        print_activation(report)
        if args.startup:
            gc.collect()  # The engine's memory, before others start.
            report["startup"] = measure_startup(work)
            print_startup(report["startup"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["peak_memory_bytes"] = peak
    report["load_average_at_end"] = os.getloadavg()[0]
    print(f"\npeak memory of this process {peak / 2**30:.2f} GiB")
    warn_of_load(report)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a Llama-like model's folder, with weights (default: a generated config, hidden 1024, "
        "8 layers, dummy weights)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the engine and its slots; the adapters are bfloat16 always (default: float32)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        choices=[8, 16, 32, 64],
        default=16,
        help="of every adapter (default: 16)",
    )
    parser.add_argument(
        "--k", type=int, default=64, help="components of the joint checkpoint's bases (default: 64)"
    )
    parser.add_argument("--tasks", type=int, default=8, help="number of adapters (default: 8)")
    parser.add_argument(
        "--rounds", type=int, default=40, help="timed calls a method, 15 or more (default: 40)"
    )
    parser.add_argument("--warmup", type=int, default=4, help="untimed rounds (default: 4)")
    parser.add_argument(
        "--startup",
        action="store_true",
        help="also time the engine's start with the plugin and a private nf4 checkpoint, against "
        "VLLM_PLUGINS='' (A B A B, each a fresh process)",
    )
    parser.add_argument(
        "--startup-rounds", type=int, default=2, help="starts of each kind (default: 2)"
    )
    parser.add_argument(
        "--startup-tasks", type=int, default=64, help="tasks of that checkpoint (default: 64)"
    )
    parser.add_argument("--device-note", metavar="TEXT", help="kept with the device's description")
    parser.add_argument("--json", metavar="FILE", help="also write everything to FILE")
    parser.add_argument("--startup-child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for option in ("k", "tasks", "startup_rounds", "startup_tasks"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if args.rounds < 15 or args.warmup < 1:
        parser.error("--rounds must be at least 15 and --warmup at least 1")
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there; give a model's folder")
    return args


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions that a figure depends on, and the command."""
    import torch
    from vllm.platforms import current_platform

    import vllm_vlora
    from vllm_vlora.plugin import check_version

    device = current_platform.get_device_name() if not current_platform.is_cpu() else cpu_name()
    cores = len(os.sched_getaffinity(0))
    return {
        "device": f"{device}, {cores} cores"
        + (f" ({args.device_note})" if args.device_note else ""),
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vllm": check_version(),
            "vllm-vlora": vllm_vlora.__version__,
        },
        "command": shlex.join(["python", *sys.argv]),
        "arguments": {k: v for k, v in vars(args).items() if k != "startup_child"},
    }


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else None
    return f"{found[1] if found else 'CPU'} ({platform.machine()})"


# --- model, adapters, checkpoints ------------------------------------------------------------------


@dataclass
class Work:
    """Where everything lies, and how an engine is made of it."""

    args: argparse.Namespace
    folder: Path

    @property
    def model(self) -> Path:
        """The model's folder; a generated one has a config and no weights."""
        if self.args.model:
            return Path(self.args.model).absolute()
        folder = self.folder / "model"
        if not folder.exists():
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
        return folder

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``; plain values, so that a child process can take them."""
        return {
            "model": str(self.model),
            "load_format": "auto" if self.args.model else "dummy",
            "skip_tokenizer_init": True,
            "dtype": self.args.dtype,
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "enable_lora": True,
            "max_lora_rank": self.args.rank,
            "max_loras": 1,
            "max_cpu_loras": self.args.tasks + 2,
        }

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (d_in, d_out) of the model's seven linears a layer."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model))
        shapes = {
            name: (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in LINEARS
        }
        if not shapes:
            raise SystemExit(f"{self.model}: no layers named {', '.join(LINEARS)}; use a Llama")
        return shapes

    @property
    def adapter_folder(self) -> Path:
        """Where the PEFT folders lie, named by number."""
        return self.folder / "adapters"

    @property
    def startup_checkpoint(self) -> Path:
        """The checkpoint that engines start with."""
        return self.folder / "startup"

    def make_adapters(self, count: int) -> dict[str, Any]:
        """Write PEFT folders 0 to ``count`` - 1, where they are not there, and open all of them."""
        from vllm_vlora import open_adapter, write_adapter

        shapes, rank = self.shapes(), self.args.rank
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.model),
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(LINEARS),
        }
        opened = {}
        for number in range(count):
            path = self.adapter_folder / str(number)
            if not path.exists():
                write_adapter(path, config, random_factors(shapes, rank, number))
            opened[f"task-{number}"] = open_adapter(path)
        return opened


def random_factors(
    shapes: dict[str, tuple[int, int]], rank: int, seed: int
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """A and B in bfloat16 for every module, near subspaces that all seeds share."""
    import torch

    own = torch.Generator().manual_seed(1 + seed)
    shared = torch.Generator().manual_seed(0)

    def factor(width: int) -> Any:
        common = torch.randn(64, width, generator=shared) / 8
        mixed = torch.randn(rank, 64, generator=own) @ common
        return (mixed + 0.1 * torch.randn(rank, width, generator=own)).mul(0.02).bfloat16()

    for name, (d_in, d_out) in shapes.items():
        yield name, (factor(d_in), factor(d_out).T.contiguous())


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


def in_another_process(function: Callable[[Work], None], work: Work) -> None:
    """Run what a server would not do elsewhere, so that it leaves the engine's process as it is."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=(work,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed; its error is above")


def make_checkpoints(work: Work) -> None:
    from vllm_vlora import compress

    adapters = work.make_adapters(work.args.tasks)
    for name, options in checkpoint_options(work.args.k).items():
        compress(adapters, work.folder / name, options)


def make_startup_checkpoint(work: Work) -> None:
    from vllm_vlora import CompressOptions, compress

    options = CompressOptions(representation="private", quantize="nf4", ratio=0.1)
    compress(work.make_adapters(work.args.startup_tasks), work.startup_checkpoint, options)


def start_engine(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**arguments)


def worker_manager(llm: Any) -> Any:
    """The worker's LoRA manager; possible because the worker lives in this process."""
    (manager,) = llm.collective_rpc(lambda worker: worker.model_runner.lora_manager)
    manager.remove_all_adapters()
    return manager


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
    for index in range(warmup + rounds):
        number = index % tasks
        for method in methods:
            synchronise(device)
            started = time.perf_counter()
            loaded = method.activate(number)
            synchronise(device)
            seconds = time.perf_counter() - started
            if not loaded:
                raise WrongResultError(f"{method.name}: a task was loaded before its turn")
            method.evict(number)
            if index >= warmup:
                method.times.append(seconds)


def back_to_back(methods: list[Method], tasks: int, rounds: int, device: Any) -> None:
    """Time each method by itself: nothing else used the caches or the allocator meanwhile."""
    for method in methods:
        alone = replace(method, times=[])
        interleave([alone], tasks, tasks, rounds, device)
        method.times_alone = alone.times


def synchronise(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: Any) -> float:
    """Bytes read plus bytes written a second, of a large copy on the device."""
    import torch

    source = torch.ones(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        synchronise(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        times.append(time.perf_counter() - started)
    return 2 * source.numel() / percentile(times[3:], 50)


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


def percentile(values: list[float], percent: int) -> float:
    import torch

    return torch.tensor(values, dtype=torch.float64).quantile(percent / 100).item()


def summarise(method: Method, stock: Method, bandwidth: float, tasks: int) -> dict[str, Any]:
    sizes, p50 = method.sizes, percentile(method.times, 50)
    alone = percentile(method.times_alone, 50)
    moved = sizes.read + sizes.written
    return {
        "method": method.name,
        **{f"p{percent}": 1e3 * percentile(method.times, percent) for percent in (20, 50, 80)},
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


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def print_header(report: dict[str, Any]) -> None:
    print(f"device: {report['device']}, {report['threads']} torch threads")
    print(", ".join(f"{name} {value}" for name, value in report["versions"].items()))
    print(f"command: {report['command']}", flush=True)


def print_activation(report: dict[str, Any]) -> None:
    args = report["arguments"]
    print(
        f"\n{args['tasks']} adapters of rank {args['rank']} on {report['linears']} linears, slots "
        f"{report['slot_dtype']}; {args['rounds']} interleaved rounds; every slot checked\n"
    )
    print("Time to make a task ready that is not loaded, in ms:")
    print(f"  {'':19} {'------ in turn with the others -------':>38}   {'-- by itself --':>17}")
    print(
        f"  {'':19} {'p20':>8} {'p50':>8} {'p80':>8} {'stock/this':>11}   {'p50':>6} {'stock/this':>10} "
        f"{'delta_W error':>14} {'byte floor':>11} {'x floor':>8} {'GB/s':>6}"
    )
    for row in report["results"]:
        print(
            f"  {row['method']:19} {row['p20']:8.3f} {row['p50']:8.3f} {row['p80']:8.3f} "
            f"{row['stock_over_this']:10.2f}x   {row['p50_alone']:6.3f} "
            f"{row['stock_over_this_alone']:9.2f}x {row['worst_error']:14.4f} {row['floor']:11.3f} "
            f"{row['ratio_to_floor']:8.2f} {row['bytes_per_s'] / 1e9:6.2f}"
        )
    print(
        f"  (GB/s: bytes read from the stored factors and written into the slot over the first p50; "
        f"a plain copy on this device moves {report['copy_bytes_per_s'] / 1e9:.2f} GB/s: the floor)"
    )
    print("\nBytes, in MB (10^6):")
    print(
        f"  {'':19} {'task file':>10} {'basis files':>12} {'disk/task':>10} {'resident/task':>14} "
        f"{'basis resident':>15} {'read':>8} {'slot':>8}"
    )
    for row in report["results"]:
        size = {name: count / 1e6 for name, count in row["bytes"].items()}
        print(
            f"  {row['method']:19} {size['file']:10.3f} {size['basis_files']:12.3f} "
            f"{size['disk_share']:10.3f} {size['resident']:14.3f} {size['basis_resident']:15.3f} "
            f"{size['read']:8.3f} {size['written']:8.3f}"
        )
    print(
        f"  (disk/task is the task's file and its share of the basis among {args['tasks']} tasks; "
        "basis and slot are there once, whatever the number of tasks)",
        flush=True,
    )


def warn_of_load(report: dict[str, Any]) -> None:
    # At the end the load contains this run's own threads.
    load = report["load_average_at_start"]
    print(f"load average {load:.2f} at the start, {report['load_average_at_end']:.2f} at the end")
    if load > QUIET_LOAD:
        print(f"the machine was not quiet ({load:.2f} > {QUIET_LOAD}): do not quote these figures")


# --- start-up --------------------------------------------------------------------------------------


def measure_startup(work: Work) -> dict[str, Any]:
    """Seconds from spawning a process to a ready engine, stock and with a checkpoint, in turn."""
    args = work.args
    say(f"making a private nf4 checkpoint of {args.startup_tasks} tasks")
    in_another_process(make_startup_checkpoint, work)
    checkpoint = work.startup_checkpoint
    job = {
        "engine": work.engine_arguments(),
        "folders": [str(work.adapter_folder / str(i)) for i in range(args.tasks)],
        "rounds": args.warmup + args.rounds,
        "warmup": args.warmup,
    }
    starts: dict[str, list[dict[str, Any]]] = {"stock": [], "plugin": []}
    for turn in range(args.startup_rounds):
        for arm, runs in starts.items():
            say(f"start {turn + 1} of {args.startup_rounds}, {arm}")
            runs.append(start_once(job, checkpoint if arm == "plugin" else None))
    size = sum(f.stat().st_size for f in checkpoint.rglob("*.safetensors"))
    return {
        "tasks": args.startup_tasks,
        "checkpoint_bytes": size,
        "unit": "s",
        **starts,
    }


def start_once(job: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """One fresh process; its own account, the wall time until it was ready, and the plugin's log."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "PYTHONUNBUFFERED": "1"}
    environment["VLLM_PLUGINS"] = "vlora" if checkpoint else ""
    if checkpoint:
        environment["VLLM_VLORA_CHECKPOINT"] = str(checkpoint)
    command = [sys.executable, __file__, "--startup-child", json.dumps(job)]
    started = time.perf_counter()
    lines: list[str] = []
    account: dict[str, Any] = {}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("READY "):
                account |= {"ready": time.perf_counter() - started}
            if line.startswith(("READY ", "DONE ")):
                account |= json.loads(line.split(" ", 1)[1])
    if process.returncode or "ready" not in account:
        raise SystemExit("the engine did not start:\n" + "".join(lines[-30:]))
    log = "".join(lines)
    if checkpoint:
        preload = re.search(r"(\d+) tasks resident on .*?, ([\d.]+) MiB, loaded in ([\d.]+) s", log)
        if preload is None:
            raise SystemExit("the plugin logged no preload:\n" + "".join(lines[-30:]))
        account |= {"preload": float(preload[3]), "resident_mib": float(preload[2])}
    return account


def startup_child(job: dict[str, Any]) -> int:
    """In the fresh process: start the engine, say so, and time stock code alone there."""
    began = time.perf_counter()
    import vllm  # noqa: F401
    from vllm import LLM  # noqa: F401  (the name that loads the rest)

    account = {"import_vllm": time.perf_counter() - began}
    plugin = os.environ["VLLM_PLUGINS"] != ""
    if plugin:
        # vLLM would call it itself, a little later; it does nothing the second time.
        began = time.perf_counter()
        from vllm_vlora.plugin import register

        register()
        account["plugin_import"] = time.perf_counter() - began
    began = time.perf_counter()
    llm = start_engine(job["engine"])
    account["engine"] = time.perf_counter() - began
    print("\nREADY " + json.dumps(account), flush=True)
    times = time_stock(worker_manager(llm), job["folders"], job["rounds"])[job["warmup"] :]
    print("\nDONE " + json.dumps({"stock_activation_ms": 1e3 * percentile(times, 50)}))
    llm.llm_engine.engine_core.shutdown()
    return 0


def time_stock(manager: Any, folders: list[str], rounds: int) -> list[float]:
    from vllm.lora.request import LoRARequest

    times = []
    for index in range(rounds):
        number = index % len(folders)
        request = LoRARequest(f"task-{number}", 1 + number, folders[number])
        synchronise(manager.device)
        started = time.perf_counter()
        manager.add_adapter(request)
        synchronise(manager.device)
        times.append(time.perf_counter() - started)
        manager.remove_adapter(request.lora_int_id)
    return times


def print_startup(startup: dict[str, Any]) -> None:
    print(
        f"\nStart of the engine in a fresh process, in s, to ready; checkpoint of {startup['tasks']} "
        f"private nf4 tasks, {startup['checkpoint_bytes'] / 1e6:.0f} MB:"
    )
    for arm, label in (("stock", "VLLM_PLUGINS=''"), ("plugin", "with plugin")):
        runs = startup[arm]
        print(f"  {label:16} " + " ".join(f"{run['ready']:7.2f}" for run in runs))
    print(
        "  within it: vLLM's import, plugin's import and install, engine with preload (as logged); "
        "then a PEFT folder's\n  activation by stock code, p50 in ms"
    )
    for arm, label in (("stock", "VLLM_PLUGINS=''"), ("plugin", "with plugin")):
        for run in startup[arm]:
            print(
                f"  {label:16} {run['import_vllm']:7.2f} {run.get('plugin_import', 0):7.2f} "
                f"{run['engine']:7.2f} ({run.get('preload', 0):.2f})   "
                f"{run['stock_activation_ms']:7.3f}"
            )
    print(f"  the plugin logged {startup['plugin'][0]['resident_mib']:.1f} MiB resident")


if __name__ == "__main__":
    sys.exit(main())
