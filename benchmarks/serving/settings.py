"""Everything that a run's size depends on, resolved from the command line and the device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from serving import configurations as names
from serving.configurations import Configuration
from serving.loads import Load
from serving.world import CHECKED_TASKS, JOINT_CHECKPOINTS

_GIB = 1 << 30
# Tokens of a block of the KV cache on CPU. vLLM's own choice there is 128, more than a sequence of
# this benchmark's is long, and twice the memory.
CPU_KV_BLOCK = 32
# vLLM keeps a block to itself, and a batch being scheduled needs a few more.
_KV_SPARE = 8
# An engine's process on CPU without weights, KV cache and LoRA: code, torch and vLLM. Measured.
_PROCESS_BYTES = int(0.7 * _GIB)


@dataclass(frozen=True)
class Settings:
    """The resolved sizes of a run.

    Attributes:
        model: a name of ``world.MODELS`` or a folder. dtype: of the engines. gpu: whether on one.
        loads: in the order in which they are run. configurations: likewise, by name.
        rounds: how often everything is run. cold: new tasks asked for in each round.
        prefill_len: of the prompts of prefill-only runs. prefill_requests: at least so many.
        prompt_len, output_len: of the other runs.
        concurrency: requests at a time in those; None for as many as distinct tasks.
        max_num_seqs, max_num_batched_tokens: vLLM's; None leaves the latter to vLLM.
        distinct: tasks with weights of their own.
    """

    model: str
    dtype: str
    gpu: bool
    loads: tuple[Load, ...]
    configurations: tuple[str, ...]
    rounds: int
    cold: int
    prefill_len: int
    prefill_requests: int
    prompt_len: int
    output_len: int
    concurrency: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    distinct: int
    rank: int

    @property
    def tasks(self) -> int:
        """Tasks of the largest load."""
        return max(load.tasks for load in self.loads)

    @property
    def all_tasks(self) -> int:
        """Those, and the tasks that are asked for cold, once each; enough for the check."""
        return max(self.tasks + self.rounds * self.cold, CHECKED_TASKS)

    @property
    def max_model_len(self) -> int:
        """The longest sequence."""
        return max(self.prefill_len + 1, self.prompt_len + self.output_len)

    def concurrent(self, load: Load) -> int:
        """Requests at a time under a load."""
        return min(self.concurrency or load.tasks, self.max_num_seqs)

    def requests(self, load: Load) -> int:
        """Requests of one run of a load: every task's turn comes, and every place is used."""
        return max(load.tasks, self.concurrent(load))

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "all_tasks": self.all_tasks}


def resolved(args: Any, gpu: bool) -> Settings:
    """The command line's values, and for those not given the device's and the run's defaults."""
    model = args.model or ("tiny" if args.quick else "7b" if gpu else "small")
    tasks = args.tasks or ((1, 8) if args.quick else (1, 8, 32, 128))
    if args.full and not args.tasks:
        tasks = (*tasks, 1024)
    popularity = args.popularity or (("uniform", "zipf") if args.full else ("uniform",))
    prefill_len = args.prefill_len or (512 if gpu else 32)
    prefill_tokens = 16384 if gpu else 256 if args.quick else 2048
    sizes = (2, 32) if args.quick else (5, 256) if gpu else (3, 128)
    return Settings(
        model=model,
        dtype=args.dtype or ("bfloat16" if gpu else "float32"),
        gpu=gpu,
        loads=_loads(tasks, popularity),
        configurations=args.configurations or _configurations(args, gpu),
        rounds=args.rounds or sizes[0],
        cold=args.cold,
        prefill_len=prefill_len,
        prefill_requests=-(-prefill_tokens // prefill_len),
        prompt_len=args.prompt_len or (128 if gpu else 16),
        output_len=args.output_len or (128 if gpu or args.full else 16 if args.quick else 32),
        concurrency=args.concurrency,
        max_num_seqs=args.max_num_seqs or sizes[1],
        max_num_batched_tokens=args.max_num_batched_tokens or (None if gpu else 2048),
        distinct=args.distinct,
        rank=args.rank,
    )


def _loads(tasks: tuple[int, ...], popularities: tuple[str, ...]) -> tuple[Load, ...]:
    """One task is equally popular under any law."""
    uniform = popularities[0]
    return tuple(
        Load(count, popularity)
        for count in tasks
        for popularity in popularities
        if count > 1 or popularity == uniform
    )


def _configurations(args: Any, gpu: bool) -> tuple[str, ...]:
    chosen: tuple[str, ...] = names.FULL if args.full or gpu else names.DEFAULT_CPU
    if args.quick:
        chosen = names.QUICK
    if gpu:
        return tuple(name for name in chosen if name not in names.CPU_ONLY)
    return (*chosen, names.BASE_COMPILED) if args.base_compiled else chosen


# --- memory on CPU ---------------------------------------------------------------------------------


def kv_nbytes(settings: Settings, config: dict[str, Any]) -> int:
    """Bytes of a KV cache that holds ``max_num_seqs`` of the longest sequences."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    blocks = -(-settings.max_model_len // CPU_KV_BLOCK)
    tokens = (settings.max_num_seqs * blocks + _KV_SPARE) * CPU_KV_BLOCK
    layers = config["num_hidden_layers"]
    return 2 * layers * heads * head_dim * _itemsize(settings) * tokens


def engine_nbytes(
    settings: Settings,
    configuration: Configuration,
    config: dict[str, Any],
    model_weights: int,
    lora_weights: int,
) -> int:
    """An estimate from above of one engine's memory on CPU.

    Stock code holds a task twice, in its slot and in host memory, both in the engine's dtype.
    Materialized tasks are resident in bfloat16 beside the slots; joint tasks are far smaller.
    """
    size = _itemsize(settings)
    total = _PROCESS_BYTES + model_weights * size + kv_nbytes(settings, config)
    if not configuration.uses_tasks:
        return total
    tasks = configuration.slots or settings.all_tasks
    if configuration.checkpoint in JOINT_CHECKPOINTS:
        return total
    resident = settings.all_tasks * lora_weights * (2 if configuration.checkpoint else size)
    if configuration.mode == "direct":
        # Unpacked or converted to the engine's dtype for the CPU.
        return total + settings.all_tasks * lora_weights * size
    return total + tasks * lora_weights * size + resident


def _itemsize(settings: Settings) -> int:
    return 4 if settings.dtype == "float32" else 2


def pack(sizes: dict[str, int], capacity: int) -> list[list[str]]:
    """Names in order, in groups whose sizes add up to at most ``capacity`` each, where one fits."""
    groups: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not groups or used + size > capacity:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
