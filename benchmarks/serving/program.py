"""Throughput and latency of a real vLLM engine against the number of distinct tasks it serves."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    WrongResultError,
    comma_list,
    cores,
    count,
    count_list,
    cpu_name,
    end_record,
    in_another_process,
    print_record,
    record,
    say,
    write_json,
)

from serving import configurations as names
from serving.configurations import Configuration, configuration
from serving.correctness import (
    BFLOAT16_TIE,
    MAX_TOKENS,
    NEAR_TIE,
    PROMPT_LEN,
    check_calls,
    check_job,
    check_reference,
    compare,
    reference_job,
)
from serving.engine import WORKER_EXTENSION, Engine, EngineFailedError, EngineSpec
from serving.figures import Trace
from serving.loads import (
    POPULARITIES,
    Call,
    Job,
    Load,
    choose_tasks,
    generator_for,
    make_calls,
)
from serving.plot import plot_ratios
from serving.report import Measurements, print_results
from serving.settings import CPU_KV_BLOCK, Settings, engine_nbytes, kv_nbytes, pack, resolved
from serving.world import CHECKED_TASKS, MODELS, World, WorldPlan

DESCRIPTION = """\
Measure what it costs to serve many tasks: a real vLLM engine for each configuration below, asked by
one driver for 1, 8, 32, 128 (and with --full 1024) distinct tasks at a time.

  base            vLLM without --enable-lora: what the ratios refer to
  stock-8, ...    stock vLLM without plugins, ordinary PEFT adapters, 8 slots (--max-loras), swapped
                  from host memory when there are more tasks; stock-1 runs with one task only
  stock-N         stock vLLM with a slot for every task
  punica-runs     CPU only: stock-N, with one matrix product a run of equal adapters in place of
                  punica's copy of A and B for every token; what stock vLLM could be on CPU
  materialize-8   vllm-vlora writes each task into one of 8 slots when it is asked for (bfloat16)
  direct-k32      vllm-vlora, tasks on shared bases of 32 (64) components, without slots
  direct-nf4      vllm-vlora, private factors in nf4 (int8, bf16), read where they lie
  ...-overlap     either with VLLM_VLORA_OVERLAP=on
  base-compiled   CPU only: the base model compiled; vLLM compiles nothing on CPU with LoRA on, so
                  everything else runs eagerly there

Every round gives every configuration the same requests, one configuration after the other, so that a
drift of the machine hits all alike. Engines stay up as long as memory lasts; otherwise each round
starts them anew, group by group. A ratio is taken round by round.

  prefill         prompts of --prefill-len and one new token each: prompt tokens a second
  decode          short prompts, --output-len new tokens each: tokens a second over the engine's steps
                  in which every request was past its first token; output tokens and requests a second
                  are over the whole of that run
  first token     one request on an idle engine: for a task never asked for before (cold), and for the
                  same task again (warm); the difference is what the user waits for its activation
  memory          the worker's, above that of base, after every task was served once

Before any figure of a configuration is taken, its greedy tokens are compared with those of stock
vLLM, which serves the same adapters, or the checkpoint's tasks exported as PEFT folders. When a token
differs, that one has no figures and the exit status is 1. It is 2 when a configuration could not run.
"""
EXAMPLES = """\
  python benchmarks/run.py serving --quick                    about a minute, on CPU
  python benchmarks/run.py serving --json result.json         within 15 minutes, on two CPU cores
  python benchmarks/run.py serving --configurations base,stock-N,direct-k32 --tasks 128
  python benchmarks/run.py serving --model 7b --full --json result.json --plot result.png
                                                                on a GPU; no weights are needed

Adapters and checkpoints are made once in --work and found there again. Other work on the machine
spoils the figures: the load average is printed and stored with them.
"""
# Of the memory that is free, how much engines may take together.
MEMORY_SHARE = 0.9
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CPU_ENVIRONMENT = {
    # Engine and worker in the driver's process: the other two would compete for the same cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
WARM_UP_TOKENS = 4
REFERENCE, REFERENCE_GIB = "reference", 0.5


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit status.

    It is 2 when a configuration did not run, 1 when one's tokens differ from stock vLLM's.
    """
    # So that engines are stopped when the run is.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ.update(ENVIRONMENT)
    # It would overrule the size that every engine is given.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    device = in_another_process(probe_device)
    settings = resolved(args, gpu=device["type"] != "cpu")
    refuse_impossible(settings, args.keep_gib, args.together)
    report = describe(args, settings, device)
    print_header(report)
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as temporary:
        bench = Bench(
            args, settings, Path(args.work or temporary), partial(keep, report, args.json)
        )
        try:
            measurements = bench.run()
        except EngineFailedError as error:
            print(f"stock vLLM, the reference, does not run: {error}", file=sys.stderr)
            return 2
    report |= measurements.results()
    print_results(report)
    end_record(report)
    write_json(args.json, report)
    if args.plot:
        plot_ratios(report, args.plot)
    if measurements.wrong:
        return 1
    return 2 if measurements.not_run else 0


def keep(report: dict[str, Any], path: Path | None, measurements: Measurements) -> None:
    """Write what there is so far, in case the run is ended."""
    write_json(path, report | measurements.results())


# --- the command line ------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model, the loads, the engines and the files."""
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        help="tiny, small (hidden 1024, 8 layers), 7b, 8b (Llama-2-7B's and Llama-3-8B's shapes, dummy "
        "weights), 7b-16, 8b-16 (16 of their layers), or the folder of a Llama-like model (default: "
        "small on CPU, 7b on a GPU)",
    )
    add("--full", action="store_true", help="all configurations, 1024 tasks, Zipf, long outputs")
    add("--configurations", type=comma_list, metavar="A,B", help="only these, in this order")
    add("--base-compiled", action="store_true", help="CPU: also the base model, compiled")
    add("--tasks", type=count_list, metavar="N,N", help="distinct tasks (default: 1,8,32,128)")
    add(
        "--popularity",
        type=comma_list,
        metavar="A,B",
        help="uniform and zipf, exponent 1 (default: uniform; both with --full)",
    )
    add(
        "--prefill-len", type=count, help="prompt of a prefill-only run (default: 32; 512 on a GPU)"
    )
    add("--prompt-len", type=count, help="prompt of the other runs (default: 16; 128 on a GPU)")
    add(
        "--output-len",
        type=count,
        help="their new tokens, two or more (default: 128; 32 on CPU without --full)",
    )
    add(
        "--concurrency",
        type=count,
        help="requests at a time (default: as many as distinct tasks, up to --max-num-seqs)",
    )
    add("--cold", type=count, default=3, help="cold tasks a round (default: 3)")
    add(
        "--rank",
        type=int,
        choices=[8, 16, 32, 64],
        default=16,
        help="of the adapters (default: 16)",
    )
    add(
        "--distinct",
        type=count,
        default=8,
        help=f"adapters with weights of their own, {CHECKED_TASKS} or more; beyond them the weights "
        "repeat under other names, since compression takes seconds an adapter (default: 8)",
    )
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32; bfloat16 on a GPU")
    add("--max-num-seqs", type=count, help="vLLM's (default: 128; 256 on a GPU)")
    add("--max-num-batched-tokens", type=count, help="vLLM's (default: 2048; vLLM's own on a GPU)")
    add("--gpu-memory-utilization", type=float, default=0.9, help="vLLM's, on a GPU (default: 0.9)")
    add(
        "--capture-sizes",
        type=count_list,
        metavar="N,N",
        help="GPU: batch sizes that are captured as graphs (default: vLLM's some fifty, which take long)",
    )
    add(
        "--no-jit-warmup",
        action="store_true",
        help="GPU: start sooner; vLLM's own kernels are then compiled when they are first used",
    )
    add("--eager", action="store_true", help="GPU: neither compile nor capture graphs")
    add(
        "--keep-gib",
        type=float,
        help="CPU: memory that engines may hold at a time; 0 starts each anew in each round, as on a "
        f"GPU (default: {100 * MEMORY_SHARE:.0f} %% of what is free)",
    )
    add(
        "--together",
        type=float,
        metavar="GIB",
        help="GPU: all engines are up at once, each with a KV cache of GIB, so that they take turns as "
        "on CPU; they start side by side (--gpu-memory-utilization: a part that is free at each start)",
    )
    add("--work", metavar="DIR", help="keep model, adapters, checkpoints and logs there")
    add(
        "--profile",
        metavar="FILE",
        help="also write where a decode step's time goes: calls (cProfile), on a GPU kernels and graphs",
    )


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where the options cannot be run; sizes depend on the device, see ``resolved``."""
    if args.quick and args.full:
        parser.error("--quick and --full contradict each other; give one of them")
    if args.model and args.model not in MODELS and not (Path(args.model) / "config.json").is_file():
        parser.error(
            f"--model {args.model}: neither {', '.join(MODELS)} nor a folder with a config.json"
        )
    for name in args.configurations or ():
        try:
            configuration(name)
        except ValueError as error:
            parser.error(f"--configurations: {error}")
    for name in args.popularity or ():
        if name not in POPULARITIES:
            parser.error(f"--popularity {name}: use {' or '.join(POPULARITIES)}")
    if args.distinct < CHECKED_TASKS:
        parser.error(f"--distinct must be at least {CHECKED_TASKS}: so many tasks are checked")
    if args.output_len == 1:
        parser.error("--output-len must be at least 2: the first token is not decoding")
    if args.together is not None and args.together <= 0:
        parser.error("--together must be positive")
    if not 0 < args.gpu_memory_utilization <= 1:
        parser.error("--gpu-memory-utilization must be above 0 and at most 1")
    if args.keep_gib is not None and args.keep_gib < 0:
        parser.error("--keep-gib must not be negative")


def refuse_impossible(settings: Settings, keep_gib: float | None, together: float | None) -> None:
    """End with one line where the device rules out what was asked for."""
    cpu_only = [name for name in settings.configurations if name in names.CPU_ONLY]
    if settings.gpu and cpu_only:
        raise SystemExit(f"{cpu_only[0]} is for CPU only; leave it out of --configurations")
    if settings.gpu and keep_gib is not None:
        raise SystemExit("--keep-gib is for CPU only: on a GPU use --together")
    if together is not None and not settings.gpu:
        raise SystemExit("--together is for a GPU only: on CPU engines stay up anyway")
    if not any(
        configuration(name).runs(load)
        for name in settings.configurations
        for load in settings.loads
    ):
        raise SystemExit("none of these configurations runs any of these loads; add --tasks 1")


# --- the machine -----------------------------------------------------------------------------------


def probe_device() -> dict[str, str]:
    """The kind and the name of the device that vLLM would use."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return {"type": "cpu", "name": cpu_name()}
    return {"type": current_platform.device_type, "name": current_platform.get_device_name()}


def available_nbytes() -> int:
    """Memory that is free or can be freed, in bytes."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def describe(
    args: argparse.Namespace, settings: Settings, device: dict[str, str]
) -> dict[str, Any]:
    """The machine, the versions that a figure depends on, and the command."""
    from vllm_vlora.plugin import check_version

    check_version()
    threads = "" if settings.gpu else f", {cpu_environment()['OMP_NUM_THREADS']} threads"
    name = f"{device['name']}, {cores()} cores{threads}"
    return {
        **record(args, name, "torch", "triton", "vllm"),
        "settings": settings.as_dict(),
    }


def print_header(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print_record(report)
    print(
        f"model {settings['model']}, {settings['dtype']}, adapters of rank {settings['rank']}; "
        f"{settings['rounds']} rounds; prefill of {settings['prefill_len']} tokens a prompt; decode of "
        f"{settings['output_len']} tokens after {settings['prompt_len']}",
        flush=True,
    )


# --- the run ---------------------------------------------------------------------------------------


def make_world(world: World, checkpoints: list[str]) -> dict[str, int]:
    """Write everything; how many weights a task and the model have, and the ranks that stock needs."""
    import torch

    from vllm_vlora import open_adapter
    from vllm_vlora.checkpoint.serving import serving_rank

    # Compression's products are small: on a busy machine of two cores, two threads that waited for
    # each other took 130 s of processor time where one took 6 (8 adapters, k=32, hidden 1024).
    torch.set_num_threads(1)
    world.make(checkpoints)
    exported = [open_adapter(folder) for name in checkpoints for folder in world.exports(name)]
    ranks = [module.rank for adapter in exported for module in adapter.modules.values()]
    rank = serving_rank(max([world.plan.rank, *ranks]))
    if rank is None:
        raise SystemExit("vLLM serves no adapter of the rank of these checkpoints' tasks")
    return {
        "lora_weights": world.lora_weights(),
        "model_weights": world.model_weights(),
        "reference_rank": rank,
    }


class Bench:
    """One run: the world, the engines that are up, and what was measured."""

    def __init__(
        self,
        args: argparse.Namespace,
        settings: Settings,
        folder: Path,
        keep: Callable[[Measurements], None],
    ) -> None:
        self._keep = keep
        self.args, self.settings = args, settings
        self.folder = folder.absolute()
        self.configurations = [configuration(name) for name in settings.configurations]
        self.measurements = Measurements()
        plan = WorldPlan(
            settings.model,
            settings.all_tasks,
            min(settings.distinct, settings.all_tasks),
            settings.rank,
        )
        self.world = World(self.folder, plan)
        self._engines: dict[str, Engine] = {}
        self._starting: dict[str, Future[Engine]] = {}
        self._references: dict[str, Trace] = {}

    def run(self) -> Measurements:
        """Make the world, check, measure.

        Raises:
            WrongResultError: tokens differ from stock vLLM's.
        """
        checkpoints = list(dict.fromkeys(c.checkpoint for c in self.configurations if c.checkpoint))
        say(
            f"making {self.settings.all_tasks} adapters, checkpoints {', '.join(checkpoints) or '-'}"
        )
        self.sizes = in_another_process(make_world, self.world, checkpoints)
        self.config = self.world.config
        self.vocabulary = self.config["vocab_size"]
        self.calls = check_calls(self.args.seed, self.vocabulary)
        try:
            if self.args.together:
                self._start_together()
            self._take_references(checkpoints)
            self._measure(self._groups())
            if self.args.profile:
                self._profile()
        finally:
            self._stop([*self._engines, *self._starting])
        return self.measurements

    # --- references ---

    def _take_references(self, checkpoints: list[str]) -> None:
        """Stock vLLM's tokens for the adapters and for every checkpoint's exported tasks."""
        say("taking stock vLLM's tokens for the adapters and the exported tasks")
        sources = {"adapters": [self.world.adapter(n) for n in range(CHECKED_TASKS)]}
        sources |= {name: self.world.exports(name) for name in checkpoints}
        folders = [folder for group in sources.values() for folder in group]
        stock = configuration(f"stock-{CHECKED_TASKS}")
        engine = Engine(self._spec(stock, REFERENCE, folders, self.sizes["reference_rank"]))
        try:
            base = engine.run(reference_job(self.calls, None))
            for place, name in enumerate(sources):
                trace = engine.run(reference_job(self.calls, place * CHECKED_TASKS))
                check_reference(name, trace, base)
                self._references[name] = trace
        finally:
            engine.stop()

    def _check(self, chosen: Configuration, engine: Engine) -> None:
        """Compare a configuration's tokens with the reference's; once in a run."""
        if not chosen.uses_tasks or chosen.name in self.measurements.checks:
            return
        found = engine.run(check_job(self.calls))
        exact = not self.settings.gpu and self.settings.dtype == "float32"
        reference = self._references[chosen.reference]
        try:
            self.measurements.checks[chosen.name] = compare(
                chosen.name, found, reference, exact, self._near_tie
            )
        except WrongResultError as error:
            # The others' figures stand, and what they cost on a GPU is not thrown away.
            self.measurements.wrong.append(str(error))
            raise EngineFailedError(f"wrong result, no figures: {error}") from error

    @property
    def _near_tie(self) -> float:
        return BFLOAT16_TIE if self.settings.dtype == "bfloat16" else NEAR_TIE

    # --- engines ---

    def _groups(self) -> list[list[Configuration]]:
        """Configurations whose engines are up at the same time."""
        engines: dict[str, list[Configuration]] = {}
        for chosen in self.configurations:
            engines.setdefault(chosen.engine, []).append(chosen)
        if self.settings.gpu:
            each = list(engines.values())
            return [[chosen for one in each for chosen in one]] if self.args.together else each
        available = available_nbytes()
        sizes = {name: self._engine_nbytes(members[0]) for name, members in engines.items()}
        for name in [name for name, size in sizes.items() if size > available]:
            reason = f"needs {sizes.pop(name) / 2**30:.1f} GiB, {available / 2**30:.1f} are free"
            for chosen in engines[name]:
                self.measurements.drop(chosen.name, reason)
        keep = self.args.keep_gib
        groups = pack(sizes, int(MEMORY_SHARE * available if keep is None else keep * 2**30))
        return [[chosen for name in group for chosen in engines[name]] for group in groups]

    def _engine_nbytes(self, chosen: Configuration) -> int:
        return engine_nbytes(
            self.settings,
            chosen,
            self.config,
            self.sizes["model_weights"],
            self.sizes["lora_weights"],
        )

    def _spec(
        self, chosen: Configuration, name: str, adapters: list[Path], rank: int
    ) -> EngineSpec:
        settings = self.settings
        arguments: dict[str, Any] = {
            "model": str(self.world.model),
            "load_format": self.world.load_format,
            "dtype": settings.dtype,
            "skip_tokenizer_init": True,
            "enforce_eager": self.args.eager if settings.gpu else not chosen.compiled,
            # Equal prompts would otherwise be prefilled once.
            "enable_prefix_caching": False,
            "max_model_len": max(settings.max_model_len, PROMPT_LEN + MAX_TOKENS),
            "max_num_seqs": settings.max_num_seqs,
            "worker_extension_cls": WORKER_EXTENSION,
            **chosen.engine_arguments(len(adapters), rank),
        }
        if settings.max_num_batched_tokens is not None:
            arguments["max_num_batched_tokens"] = settings.max_num_batched_tokens
        if settings.gpu:
            arguments["gpu_memory_utilization"] = self.args.gpu_memory_utilization
            if self.args.no_jit_warmup:
                arguments["kernel_config"] = {"enable_jit_warmup": False}
            if self.args.capture_sizes:
                sizes = {"cudagraph_capture_sizes": list(self.args.capture_sizes)}
                arguments["compilation_config"] = sizes
            if self.args.together:
                # The reference's requests come one at a time, while the other engines start.
                gib = min(self.args.together, REFERENCE_GIB if name == REFERENCE else math.inf)
                arguments["kv_cache_memory_bytes"] = int(gib * 2**30)
        else:
            arguments["kv_cache_memory_bytes"] = kv_nbytes(settings, self.config)
            arguments["block_size"] = CPU_KV_BLOCK
        checkpoint = None
        if chosen.checkpoint is not None:
            checkpoint = str(self.world.checkpoint(chosen.checkpoint))
        environment = chosen.environment({chosen.checkpoint or "": checkpoint or ""})
        return EngineSpec(
            name=name,
            arguments=arguments,
            environment=environment | ({} if settings.gpu else cpu_environment()),
            adapters=[str(folder) for folder in adapters],
            checkpoint=checkpoint,
            initialise=self.world.load_format == "dummy",
            log=self.folder / "logs" / f"{name}.log",
        )

    def _start(self, chosen: Configuration) -> Engine:
        """The engine of a configuration; started, warmed and weighed where it is not up."""
        if chosen.engine not in self._engines:
            say(f"starting the engine of {chosen.engine}")
            started = self._starting.pop(chosen.engine, None)
            engine = started.result() if started else self._make_engine(chosen)
            self._engines[chosen.engine] = engine
            self.measurements.starts[chosen.name].append(engine.start_seconds)
            self._warm_up(chosen, engine)
            self.measurements.memory[chosen.name].append(engine.call_worker("bench_memory"))
        return self._engines[chosen.engine]

    def _make_engine(self, chosen: Configuration) -> Engine:
        folders = [self.world.adapter(n) for n in range(self.settings.all_tasks)]
        return Engine(self._spec(chosen, chosen.engine, folders, self.settings.rank))

    def _start_together(self) -> None:
        """Begin to start every engine, each from a thread that waits for it."""
        chosen = {one.engine: one for one in reversed(self.configurations)}
        pool = ThreadPoolExecutor(len(chosen))
        self._starting = {n: pool.submit(self._make_engine, one) for n, one in chosen.items()}
        pool.shutdown(wait=False)

    def _warm_up(self, chosen: Configuration, engine: Engine) -> None:
        """Serve every task once, so that what is allocated or compiled at first use is there."""
        tasks = range(1 if chosen.slots == 1 else self.settings.tasks)
        calls = make_calls(
            list(tasks), self.settings.prompt_len, self.vocabulary, generator_for(self.args.seed)
        )
        jobs = [Job(calls, WARM_UP_TOKENS, self.settings.max_num_seqs)]
        if self.settings.gpu:
            # Triton compiles kernels for the sizes that it meets.
            loads = [load for load in self.settings.loads if chosen.runs(load)]
            jobs += [job for load in loads for job in self._jobs(0, load)]
        for job in jobs:
            engine.run(self._for(chosen, job))

    def _stop(self, engines: list[str]) -> None:
        for name in engines:
            if name in self._engines:
                engine = self._engines.pop(name)
                engine.stop()
                self.measurements.compiled[name].update(dict.fromkeys(engine.compiled_late()))
            elif name in self._starting:
                with contextlib.suppress(EngineFailedError):
                    self._starting.pop(name).result().stop()

    # --- measuring ---

    def _measure(self, groups: list[list[Configuration]]) -> None:
        for number in range(self.settings.rounds):
            for group in groups:
                which = ", ".join(chosen.name for chosen in group)
                say(f"round {number + 1} of {self.settings.rounds}: {which}")
                self._run_round(group, number)
                if len(groups) > 1:
                    self._stop([chosen.engine for chosen in group])

    def _run_round(self, group: list[Configuration], number: int) -> None:
        """Every load, and within it every configuration, one after the other."""
        for chosen in group:
            self._attempt(chosen, partial(self._prepare, chosen))
        for load in self.settings.loads:
            for chosen in group:
                if chosen.runs(load):
                    self._attempt(chosen, partial(self._run_cell, chosen, load, number))
                    self._keep(self.measurements)
        for chosen in group:
            self._attempt(chosen, partial(self._run_latencies, chosen, number))
            self._keep(self.measurements)

    def _attempt(self, chosen: Configuration, action: Callable[[], None]) -> None:
        """Do something with a configuration; when its engine fails it is left out from then on."""
        if chosen.name in self.measurements.not_run:
            return
        try:
            action()
        except EngineFailedError as error:
            say(str(error))
            for other in self.configurations:
                if other.engine == chosen.engine:
                    self.measurements.drop(other.name, str(error).splitlines()[0])
            self._stop([chosen.engine])

    def _prepare(self, chosen: Configuration) -> None:
        engine = self._start(chosen)
        self._switch(chosen, engine)
        self._check(chosen, engine)

    def _switch(self, chosen: Configuration, engine: Engine) -> None:
        """Two configurations may share an engine: see that it runs as this one says."""
        if any(c.punica_runs and c.engine == chosen.engine for c in self.configurations):
            engine.call_worker("bench_use_punica_runs", chosen.punica_runs)

    def _run_cell(self, chosen: Configuration, load: Load, number: int) -> None:
        engine = self._engines[chosen.engine]
        self._switch(chosen, engine)
        prefill, decode = (self._for(chosen, job) for job in self._jobs(number, load))
        traces = engine.run(prefill), engine.run(decode)
        cell = self.measurements.cell(chosen, load, len(decode.calls), decode.concurrency)
        cell.add_prefill(prefill, traces[0])
        cell.add_decode(traces[1])

    def _jobs(self, number: int, load: Load) -> tuple[Job, Job]:
        """The prefill and the decode run of a round and a load, for every configuration alike."""
        settings, place = self.settings, self.settings.loads.index(load)

        def calls(kind: int, count: int, prompt_len: int) -> list[Call]:
            generator = generator_for(self.args.seed, number, place, kind)
            tasks = choose_tasks(load, count, generator)
            return make_calls(tasks, prompt_len, self.vocabulary, generator)

        requests = settings.requests(load)
        prefill_requests = max(requests, settings.prefill_requests)
        return (
            Job(calls(0, prefill_requests, settings.prefill_len), 1, settings.max_num_seqs),
            Job(
                calls(1, requests, settings.prompt_len),
                settings.output_len,
                settings.concurrent(load),
            ),
        )

    def _for(self, chosen: Configuration, job: Job) -> Job:
        """The job as a configuration gets it: the base model's requests name no task."""
        if chosen.uses_tasks:
            return job
        calls = [Call(None, call.prompt) for call in job.calls]
        return Job(calls, job.max_tokens, job.concurrency, job.logprobs, job.profile)

    def _run_latencies(self, chosen: Configuration, number: int) -> None:
        """First tokens of tasks that were never asked for, and of the same tasks again."""
        engine, held = self._engines[chosen.engine], self.measurements.latencies[chosen.name]
        self._switch(chosen, engine)
        for place in range(self.settings.cold):
            task = self.settings.tasks + number * self.settings.cold + place
            generator = generator_for(self.args.seed, number, place, 2)
            for place_in_pair, call in enumerate(
                make_calls([task, task], self.settings.prompt_len, self.vocabulary, generator)
            ):
                trace = engine.run(self._for(chosen, Job([call], 1, 1)))
                cold = place_in_pair == 0
                # The base model has no tasks, and the comparator shares an engine that met them.
                if not cold or (chosen.uses_tasks and not chosen.punica_runs):
                    (held.cold if cold else held.warm).extend(trace.first_token_times())

    # --- profile ---

    def _profile(self) -> None:
        """One decode run a configuration and load, every call of the worker recorded."""
        texts: list[str] = []
        for chosen in self.configurations:
            for load in filter(chosen.runs, self.settings.loads):
                say(f"profiling {chosen.name}, {load}")
                self._attempt(chosen, partial(self._profile_one, chosen, load, texts))
                Path(self.args.profile).write_text("\n".join(texts))
            if self.settings.gpu:
                self._stop([chosen.engine])

    def _profile_one(self, chosen: Configuration, load: Load, texts: list[str]) -> None:
        engine = self._start(chosen)
        self._switch(chosen, engine)
        decode = self._jobs(0, load)[1]
        job = Job(decode.calls, decode.max_tokens, decode.concurrency, profile=True)
        trace = engine.run(self._for(chosen, job))
        texts.append(
            f"=== {chosen.name}, {load}, {decode.concurrency} at a time: a decode run of "
            f"{decode.max_tokens} tokens, without its prefill\n{trace.profile}"
        )


def cpu_environment() -> dict[str, str]:
    """As many threads as cores, unless the user says otherwise."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(cores())
    return {**CPU_ENVIRONMENT, "OMP_NUM_THREADS": threads}
