"""What the engine cores count, in vLLM's own ``/metrics``.

Every API server asks every engine core behind it (``refresh``) and shows the newest answers, so one
scrape of any of them is the whole: nothing is added up among API servers. The names that begin with
``vllm:`` are those that vLLM's open proposal (pull request 54830) has for LoRA adapters, and that
llm-d's router reads; ``vllm_vlora:`` are ours.

prometheus_client is imported when something is to be shown: it comes with vLLM.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from vllm_vlora.errors import VLoRAError
from vllm_vlora.plugin.counters import (
    DEVICE,
    DISK,
    ENDING,
    HOST,
    LOAD_SECONDS,
    METRICS_METHOD,
    OTHER,
    REMOTE,
    reason_of,
)
from vllm_vlora.plugin.events import happened, logger

if TYPE_CHECKING:
    from prometheus_client import Metric

Rows = Iterable[tuple[tuple[str, ...], float]]
"""Values of a family's labels beside the model's and the engine core's, and the number."""

INTERVAL = 1.0
"""Seconds between two questions to the engine cores."""
# Of a state's digest: enough to tell states apart.
_DIGITS = 12
# Where an engine's client has that it is to end.
_ENDS = "_vlora_ends"
# Until one that is not answered is no longer waited for.
_PATIENCE = 2.0
# What vLLM's proposal calls the tiers, and the ways between them.
_LEVELS = {DEVICE: "gpu", HOST: "cpu"}
_TRANSITIONS = {DISK: "load", HOST: "activate", REMOTE: "fetch"}


@dataclass(frozen=True)
class Answer:
    """What one engine core said last.

    Attributes:
        snapshot: of ``ServingCounters``, its residents filled in.
        at: when it came, by this process's monotonic clock.
        max_loras: ``--max-loras`` of the engine.
    """

    snapshot: dict[str, Any]
    at: float
    max_loras: int

    def tasks(self, tier: str) -> int:
        return self.snapshot["tiers"].get(tier, {"tasks": 0})["tasks"]

    def residents(self, tier: str) -> list[tuple[str, bool]]:
        """Tasks of a tier that are named, and whether each never gives way."""
        return self.snapshot["residents"].get(tier, [])


class TaskMetrics:
    """A Prometheus collector of what the engine cores said last; one in each API server.

    Attributes:
        model_name: the first name of the served model, as vLLM's own metrics have it.
        max_loras: ``--max-loras``.
    """

    def __init__(self) -> None:
        self.model_name = ""
        self.max_loras = 0
        self._answers: dict[int, Answer] = {}
        # What this API server refused, by reason, and has told no engine core yet.
        self._refused: Counter[str] = Counter()

    def seen(self, engine: int) -> int:
        """The version of the residents that are known of an engine core; -1 for none."""
        held = self._answers.get(engine)
        return -1 if held is None else held.snapshot["version"]

    def update(self, engine: int, snapshot: dict[str, Any]) -> None:
        """Take an engine core's answer to ``seen``."""
        if snapshot["residents"] is None:
            known = self._answers[engine].snapshot
            snapshot = {**snapshot, **{name: known[name] for name in ("residents", "materialized")}}
        self._answers[engine] = Answer(snapshot, time.monotonic(), self.max_loras)

    def refused(self, reason: type[VLoRAError], task: str) -> None:
        """This API server refused a request itself; an engine core is to count it."""
        word = reason_of(reason)
        self._refused[word] += 1
        happened("refusal", task=task, reason=word, why=word)

    def take_refused(self) -> dict[str, int]:
        """Requests that were refused since this was asked last, by reason."""
        taken = dict(self._refused)
        self._refused.clear()
        return taken

    def keep(self, engines: Iterable[int]) -> None:
        """Forget the engine cores that are not among these: elastic ones come and go."""
        kept = set(engines)
        self._answers = {rank: held for rank, held in self._answers.items() if rank in kept}

    def tier_of(self) -> dict[str, str]:
        """Task -> the best tier that any engine core has it in, of the tasks that are named."""
        answers = self._answers.values()
        return {
            name: tier
            for tier in (HOST, DEVICE)
            for answer in answers
            for name, _ in answer.residents(tier)
        }

    def any_far(self) -> bool:
        """Whether some tasks are on no disk of an engine core's machine."""
        return any(answer.tasks(REMOTE) for answer in self._answers.values())

    def form_of(self) -> dict[str, str | None]:
        """Task -> why it needs a slot, None where it runs direct, of the tasks named as on a device."""
        found: dict[str, str | None] = {}
        for answer in self._answers.values():
            why = answer.snapshot["materialized"]
            for name, _ in answer.residents(DEVICE):
                found[name] = why.get(name) or found.get(name)
        return found

    def all_listed(self) -> bool:
        """Whether every task that is on a device or in host memory is known by name."""
        answers = self._answers.values()
        return bool(answers) and not any(n for answer in answers for _, n in _unlisted(answer))

    def describe(self) -> list[Metric]:
        """Nothing: the registry then lets the same collector be registered again."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics of all engine cores; none before the first answer."""
        answers = sorted(self._answers.items())
        if answers:
            yield from (self._family(family, answers) for family in FAMILIES)
            yield self._load_seconds(answers)

    def _family(self, family: Family, answers: list[tuple[int, Answer]]) -> Metric:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        kind = CounterMetricFamily if family.counts else GaugeMetricFamily
        found = kind(family.name, family.text, labels=("model_name", "engine", *family.labels))
        for rank, answer in answers:
            for values, number in family.rows(answer):
                found.add_metric((self.model_name, str(rank), *values), number)
        return found

    def _load_seconds(self, answers: list[tuple[int, Answer]]) -> Metric:
        from prometheus_client.core import HistogramMetricFamily

        found = HistogramMetricFamily(
            "vllm:lora_adapter_load_seconds",
            "Seconds to bring an adapter from disk (load), from host memory (activate), or from the Hub "
            "or a URL (fetch).",
            labels=("model_name", "engine", "transition"),
        )
        ends = [*map(str, LOAD_SECONDS), "+Inf"]
        for rank, answer in answers:
            for source, transition in _TRANSITIONS.items():
                seconds = answer.snapshot["load_seconds"][source]
                found.add_metric(
                    (self.model_name, str(rank), transition),
                    list(zip(ends, accumulate(seconds["counts"]))),
                    seconds["sum"],
                )
        return found


# --- the families ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: without the ``_total`` of a counter.
        text: its help line.
        rows: what an engine core's answer has of it.
        labels: its labels beside the model's and the engine core's.
        counts: it is a counter; otherwise a gauge.
    """

    name: str
    text: str
    rows: Callable[[Answer], Rows]
    labels: tuple[str, ...] = ()
    counts: bool = False


def _single(key: str) -> Callable[[Answer], Rows]:
    return lambda answer: [((), answer.snapshot[key])]


def _labelled(key: str) -> Callable[[Answer], Rows]:
    return lambda answer: [((label,), n) for label, n in answer.snapshot[key].items()]


def _of_tiers(key: str) -> Callable[[Answer], Rows]:
    return lambda answer: [
        ((tier,), values[key])
        for tier, values in answer.snapshot["tiers"].items()
        if values[key] is not None
    ]


def _loaded(answer: Answer) -> Rows:
    for tier, level in _LEVELS.items():
        for name, pinned in answer.residents(tier):
            yield (name, level, "true" if pinned else "false"), 1


def _unlisted(answer: Answer) -> Rows:
    for tier in _LEVELS:
        yield (tier,), answer.tasks(tier) - len(answer.residents(tier))


def _busiest(answer: Answer) -> Rows:
    busiest = answer.snapshot["busiest"]
    for task, requests in busiest["tasks"].items():
        yield (task,), requests
    yield (OTHER,), busiest["other"]


def _capacity(answer: Answer) -> Rows:
    held = answer.snapshot["tiers"].get(DEVICE)
    if not held or not held["tasks"]:
        fit = answer.max_loras
    elif held["budget"] is None or not held["bytes"]:
        fit = max(held["tasks"], answer.max_loras)
    else:
        free = max(0, held["budget"] - held["bytes"])
        fit = held["tasks"] + free * held["tasks"] // held["bytes"]
    yield (), fit


FAMILIES: tuple[Family, ...] = (
    Family(
        "vllm:lora_adapter_loaded",
        "1 for every adapter that is loaded, where it is, and whether it never gives way.",
        _loaded,
        ("adapter_name", "level", "pinned"),
    ),
    Family(
        "vllm:num_gpu_loaded_lora_adapters",
        "Adapters on the device.",
        lambda answer: [((), answer.tasks(DEVICE))],
    ),
    Family(
        "vllm:num_cpu_loaded_lora_adapters",
        "Adapters in host memory and not on the device.",
        lambda answer: [((), answer.tasks(HOST))],
    ),
    Family(
        "vllm:max_gpu_lora_adapters",
        "Adapters that the device can hold: those there, and as many more of their mean size as "
        "its budget has room for; --max-loras while none is there.",
        _capacity,
    ),
    Family(
        "vllm_vlora:tasks",
        "Tasks on the device, in host memory, on no disk yet, and in all that may be asked for.",
        _of_tiers("tasks"),
        ("tier",),
    ),
    Family("vllm_vlora:bytes", "Bytes that a tier's tasks take.", _of_tiers("bytes"), ("tier",)),
    Family(
        "vllm_vlora:budget_bytes",
        "Bytes that a tier's tasks may take.",
        _of_tiers("budget"),
        ("tier",),
    ),
    Family(
        "vllm_vlora:unlisted_tasks",
        "Tasks of a tier without a series of their own in vllm:lora_adapter_loaded.",
        _unlisted,
        ("tier",),
    ),
    Family(
        "vllm_vlora:direct_tasks",
        "Tasks on the device that run direct; the others there stand in slots when they run.",
        _single("direct_tasks"),
    ),
    Family(
        "vllm_vlora:requests_waiting_for_load",
        "Requests that wait for their task to be loaded.",
        _single("waiting"),
    ),
    Family(
        "vllm_vlora:checkpoint_info",
        "1 for the published state of the checkpoint that is served, by the digest of its content.",
        lambda answer: (
            [((answer.snapshot["state"][:_DIGITS],), 1)] * bool(answer.snapshot["state"])
        ),
        ("digest",),
    ),
    Family(
        "vllm_vlora:snapshot_age_seconds",
        "Seconds since the engine core was last heard of.",
        lambda answer: [((), time.monotonic() - answer.at)],
    ),
    Family(
        "vllm_vlora:requests",
        "Requests for tasks, by where the task was when the request came.",
        _labelled("requests"),
        ("tier",),
        counts=True,
    ),
    Family(
        "vllm_vlora:task_requests",
        f"Requests of the busiest tasks, each since it has a series, and of all others as {OTHER}.",
        _busiest,
        ("task",),
        counts=True,
    ),
    Family(
        "vllm_vlora:loaded_bytes",
        "Bytes of the tasks that were brought, by where they lay.",
        _labelled("loaded_bytes"),
        ("source",),
        counts=True,
    ),
    Family(
        "vllm_vlora:evictions",
        "Tasks that gave way to others.",
        _labelled("evictions"),
        ("tier",),
        counts=True,
    ),
    Family(
        "vllm_vlora:refusals",
        "Requests that were refused for their task.",
        _labelled("refusals"),
        ("reason",),
        counts=True,
    ),
    Family(
        "vllm_vlora:checkpoint_reloads",
        "Published states of the checkpoint that were taken.",
        _single("reloads"),
        counts=True,
    ),
    Family(
        "vllm_vlora:basis_exchanges",
        "Published states whose shared bases took the place of those that the layers held.",
        _single("basis_exchanges"),
        counts=True,
    ),
    Family(
        "vllm_vlora:checkpoint_refusals",
        "Published states of the checkpoint that were not taken.",
        _labelled("reload_refusals"),
        ("reason",),
        counts=True,
    ),
)
"""All but ``vllm:lora_adapter_load_seconds``, which is a histogram."""

METRICS = TaskMetrics()
"""This API server's."""


# --- asking the engine cores -----------------------------------------------------------------------


async def refresh(engine_client: Any) -> None:
    """Ask every engine core behind a client what it counted; for a loop, about once a second.

    Never raises and never waits long: who does not answer in time is not asked again until it did, and
    ``vllm_vlora:snapshot_age_seconds`` says for how long. That one stays silent is logged once.
    """
    client = engine_client.engine_core
    model = engine_client.vllm_config.model_config
    METRICS.model_name = str(model.served_model_name)
    METRICS.max_loras = engine_client.vllm_config.lora_config.max_loras
    asked = _questions(engine_client)
    # An identity is the engine core's rank, in two bytes.
    ranks = {int.from_bytes(engine, "little"): engine for engine in client.core_engines}
    METRICS.keep(ranks)
    for rank in asked.keys() - ranks.keys():
        asked.pop(rank).cancel()
    for rank, engine in ranks.items():
        if rank not in asked:
            arguments = METRICS.seen(rank), METRICS.take_refused()
            question = client._call_utility_async(METRICS_METHOD, *arguments, engine=engine)
            asked[rank] = asyncio.ensure_future(question)
    if asked:
        await asyncio.wait(asked.values(), timeout=_PATIENCE)
    for rank, question in list(asked.items()):
        if question.done():
            del asked[rank]
            _take_answer(engine_client, rank, question)


def _take_answer(engine_client: Any, rank: int, question: asyncio.Future[dict[str, Any]]) -> None:
    silent: set[int] = engine_client.__dict__.setdefault("_vlora_silent_engines", set())
    error = None if question.cancelled() else question.exception()
    if error is None and not question.cancelled():
        METRICS.update(rank, question.result())
        silent.discard(rank)
    elif ENDING in str(error):
        engine_client.__dict__[_ENDS] = True
    elif rank not in silent:
        silent.add(rank)
        logger.warning(
            "vllm-vlora: engine core %d does not say what it counted, and /metrics shows what it said "
            "last: %s", rank, error,
        )  # fmt: skip


def _questions(engine_client: Any) -> dict[int, asyncio.Future[dict[str, Any]]]:
    """What was asked and not answered yet, by engine core."""
    return engine_client.__dict__.setdefault("_vlora_metrics_asked", {})


def refresh_after(original: Callable[..., Any]) -> Callable[..., Any]:
    """``OpenAIServingModels.init_static_loras`` that then asks every ``INTERVAL`` seconds."""

    @functools.wraps(original)
    async def init(self: Any) -> None:
        await original(self)
        # A scrape finds it from the start.
        await refresh(self.engine_client)
        # The event loop keeps no strong reference to a task.
        loop = asyncio.ensure_future(_keep_refreshing(self.engine_client))
        self.engine_client.__dict__["_vlora_metrics_loop"] = loop

    return init


async def _keep_refreshing(engine_client: Any) -> None:
    while not engine_client.__dict__.get(_ENDS, False):
        await asyncio.sleep(INTERVAL)
        await refresh(engine_client)


# --- vLLM's /metrics -------------------------------------------------------------------------------


def show_in_metrics(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``instrumentator.metrics.attach_router`` whose ``/metrics`` has ours too.

    With one API server vLLM shows the process's own registry. With several, the values of all lie in
    files, and each scrape is answered from a registry that is made for it and knows the files alone: a
    route of our own, which is asked first, then answers from one that has the files and ours.
    """

    @functools.wraps(original)
    def attach_router(app: Any) -> None:
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        registry = get_prometheus_registry()
        registry.register(METRICS)
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            _answer_metrics_from(registry, app)
        original(app)

    return attach_router


def _answer_metrics_from(registry: Any, app: Any) -> None:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.responses import Response
    from starlette.routing import Route

    # Not a coroutine, so it runs beside the event loop: reading the files takes a while.
    def metrics(_request: Any) -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.router.routes.append(Route("/metrics", metrics, include_in_schema=False))
