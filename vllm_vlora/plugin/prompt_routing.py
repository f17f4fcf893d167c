"""``model="auto"`` in an API server: the router of the served state, asked for a request's text.

The text is what the client wrote, before any chat template: the user's messages of a chat, or the
prompt. Token ids are decoded with the server's tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_vlora.blending.text_router import Pick, RoutePolicy, TextRouter
from vllm_vlora.checkpoint.router_files import ROUTER_FILE, RouterRecord, read_router_weights
from vllm_vlora.plugin.counters import OTHER
from vllm_vlora.plugin.settings import read_settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# Where the kinds of requests have what is asked.
_FIELDS = ("messages", "prompt", "input", "token_ids")
# So many from each end of longer ones, since no client is to wait for another's text to be decoded: of a
# prompt in token ids about as much as is looked at, and of prompts, messages and their parts.
_TOKENS = 1024
_PARTS = 8
_Item = TypeVar("_Item")
TASK, BLEND, BASE = "task", "blend", "base"


class Routing:
    """A state's router and how it is used."""

    def __init__(self, file: Path, record: RouterRecord, router: TextRouter, policy: RoutePolicy):
        self.file, self.record = file, record
        self._router, self._policy = router, policy

    @classmethod
    def read(cls, folder: Path, record: RouterRecord, policy: RoutePolicy) -> Routing:
        """That of a checkpoint's folder.

        Raises:
            CheckpointError: its network is not there, or damaged.
        """
        weights = read_router_weights(folder, record)
        router = TextRouter(record.tasks, record.temperature, weights)
        # They are there with the router, before it is first asked.
        _metrics()
        return cls(folder / ROUTER_FILE, record, router, policy)

    def pick(self, models: Any, request: Any, tasks: Container[str]) -> Pick:
        """What is to answer a request of vLLM's; counted.

        Args:
            models: vLLM's ``OpenAIServingModels``, for its tokenizer. tasks: those that are there.
        """
        pick = self._router.pick(prompt_text(models, request), tasks, self._policy)
        kind = BASE if pick.blend is None else TASK if len(pick.blend) == 1 else BLEND
        _metrics().count(kind, pick)
        return pick


def prompt_text(models: Any, request: Any) -> str:
    """What a request asks, as its client wrote it; empty where it holds no text."""
    found = next((getattr(request, name) for name in _FIELDS if getattr(request, name, None)), "")
    return "\n".join(_texts(models, found))


def _texts(models: Any, found: Any) -> Iterator[str]:
    """The texts in a prompt, in several, in a chat's messages or in several chats."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, list | tuple) and found:
        if isinstance(found[0], int):
            yield _decoded(models, found)
        else:
            # Of a chat what the user says; who sends no such message means all of it.
            said = [item for item in found if _field(item, "role") == "user"]
            for item in _ends(said or found, _PARTS):
                yield from _texts(models, item)
    elif (content := _field(found, "content")) is not None:
        yield from _texts(models, content)
    elif isinstance(text := _field(found, "text"), str):
        yield text


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else getattr(item, name, None)


def _ends(found: Sequence[_Item], most: int) -> Sequence[_Item]:
    """What is at most so far from one of the ends."""
    return found if len(found) <= 2 * most else [*found[:most], *found[-most:]]


def _decoded(models: Any, tokens: Sequence[int]) -> str:
    try:
        return models.renderer.get_tokenizer().decode([*_ends(tokens, _TOKENS)])
    except (AttributeError, ValueError, OverflowError, IndexError):
        # No tokenizer (--skip-tokenizer-init), or no tokens of it, which vLLM refuses next.
        return ""


class RoutingMetrics:
    """What is counted of an API server's routing; with several vLLM adds them up.

    Args:
        registry: of prometheus_client; its own one by default.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Counter, Histogram

        shown = registry or REGISTRY
        self._requests = Counter(
            "vllm_vlora:routed_requests",
            'Requests of model="auto", by what the router picked: a task, a blend, or the base model.',
            ("picked",),
            registry=shown,
        )
        for kind in (TASK, BLEND, BASE):
            self._requests.labels(kind)
        self._tasks = Counter(
            "vllm_vlora:routed_task_requests",
            f'Requests of model="auto" by the task that was picked, each of a blend, others as {OTHER}.',
            ("task",),
            registry=shown,
        )
        self._confidence = Histogram(
            "vllm_vlora:route_confidence",
            'The weight that the router gave what was likeliest, of each request of model="auto".',
            buckets=[n / 10 for n in range(1, 11)],
            registry=shown,
        )
        self._most, self._named = read_settings().metrics_tasks, set[str]()
        # It is there before anything is routed, as the others are.
        self._tasks.labels(OTHER)

    def count(self, kind: str, pick: Pick) -> None:
        """One request more."""
        self._requests.labels(kind).inc()
        self._confidence.observe(pick.confidence)
        for task, _ in pick.blend or ():
            # Series of files that processes share stay for good, so the first ones keep their places.
            if len(self._named) < self._most:
                self._named.add(task)
            self._tasks.labels(task if task in self._named else OTHER).inc()


_metrics = functools.cache(RoutingMetrics)
"""Those of this API server."""
