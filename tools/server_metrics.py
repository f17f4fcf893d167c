"""A server's ``/metrics``, asked over HTTP and read as plain data."""

from __future__ import annotations

import http.client
import urllib.error
from collections import Counter
from collections.abc import Iterable
from typing import Any

from vllm_vlora.connections import why_unreachable
from vllm_vlora.errors import OptionError, ServerError
from vllm_vlora.tools.servers import fetch, headers_with, server_url
from vllm_vlora.wording import first_line

_OURS = "vllm_vlora:"
# Seconds for an answer, and the most that is read of one: a thousand tasks make some 200 KB.
_PATIENCE = 10.0
_MOST_BYTES = 64 * 2**20

Labels = dict[str, str]


def metrics_url(url: str) -> str:
    """The address of a server's metrics, of any that ``servers.server_url`` takes.

    Raises:
        OptionError: it is no address of a server.
    """
    return server_url(url) + "/metrics"


def ask(url: str, key: str | None) -> str:
    """The text at an address, asked with an API key if there is one.

    Raises:
        OptionError: no header can hold the key.
        ServerError: nothing answers there, or it answers with an error.
    """
    headers = headers_with(key)
    try:
        return fetch(url, headers, _PATIENCE, _MOST_BYTES).decode("utf-8", errors="replace")
    except urllib.error.HTTPError as error:
        advice = (
            "give the server's API key in VLLM_API_KEY"
            if error.code in (401, 403)
            else "give the address that vLLM listens on"
        )
        raise ServerError(f"{url} answers {error.code} {error.reason}; {advice}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = why_unreachable(error) or first_line(error)
        raise ServerError(
            f"{url} does not answer ({why}); is the server up, and is that its address?"
        ) from error


def read_metrics(text: str, url: str) -> dict[str, Any]:
    """What a scrape says of tasks, for ``--json``: numbers as they are, nothing per second.

    Raises:
        OptionError: prometheus-client is not installed.
        ServerError: it is no scrape, or none of a server with this plugin.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise OptionError(
            "top needs prometheus-client; pip install 'vllm-vlora[monitor]'"
        ) from error
    try:
        samples = _Samples(text_string_to_metric_families(text))
    except (ValueError, KeyError, IndexError) as error:
        raise ServerError(
            f"{url} does not answer with metrics; give the address that vLLM listens on"
        ) from error
    if not samples.of("vllm_vlora:snapshot_age_seconds"):
        raise ServerError(
            f"{url} has no metrics of vllm-vlora; start the server with VLLM_VLORA_CHECKPOINT, and wait "
            "until it is ready"
        )
    engines = [_engine(samples, engine) for engine in samples.engines()]
    requests: Counter[str] = Counter()
    for labels, value in samples.of("vllm_vlora:task_requests_total"):
        requests[labels.get("task", "")] += round(value)
    return {
        "url": url,
        "model": samples.of("vllm_vlora:snapshot_age_seconds")[0][0].get("model_name"),
        "engines": engines,
        "tasks": [{"task": task, "requests": n} for task, n in requests.most_common()],
    }


class _Samples:
    """Samples by name; values that are no number are left out."""

    def __init__(self, families: Iterable[Any]) -> None:
        self._samples: dict[str, list[tuple[Labels, float]]] = {}
        for family in families:
            for sample in family.samples:
                if sample.value == sample.value and abs(sample.value) != float("inf"):
                    found = self._samples.setdefault(sample.name, [])
                    found.append((sample.labels, sample.value))

    def of(self, name: str) -> list[tuple[Labels, float]]:
        return self._samples.get(name, [])

    def engines(self) -> list[str]:
        found = {labels.get("engine", "") for labels, _ in self.of(f"{_OURS}snapshot_age_seconds")}
        return sorted(found, key=lambda name: (len(name), name))

    def single(self, name: str, engine: str) -> float | None:
        return next((v for labels, v in self.of(name) if labels.get("engine") == engine), None)

    def by(self, label: str, name: str, engine: str) -> dict[str, int]:
        return {
            labels.get(label, ""): round(value)
            for labels, value in self.of(name)
            if labels.get("engine") == engine
        }


def _engine(samples: _Samples, engine: str) -> dict[str, Any]:
    """One engine core: counts since it started, bytes, seconds."""

    def whole(name: str) -> int | None:
        found = samples.single(name, engine)
        return None if found is None else round(found)

    def by(label: str, name: str) -> dict[str, int]:
        return samples.by(label, f"{_OURS}{name}", engine)

    loads = "vllm:lora_adapter_load_seconds"
    seconds = {
        labels.get("transition", ""): value
        for labels, value in samples.of(f"{loads}_sum")
        if labels.get("engine") == engine
    }
    counts = samples.by("transition", f"{loads}_count", engine)
    return {
        "engine": engine,
        "age_seconds": samples.single(f"{_OURS}snapshot_age_seconds", engine),
        "state": next(iter(by("digest", "checkpoint_info")), None),
        "capacity": whole("vllm:max_gpu_lora_adapters"),
        "waiting": whole(f"{_OURS}requests_waiting_for_load"),
        "tasks": by("tier", "tasks"),
        "bytes": by("tier", "bytes"),
        "budget_bytes": by("tier", "budget_bytes"),
        "requests": by("tier", "requests_total"),
        "evictions": by("tier", "evictions_total"),
        "refusals": by("reason", "refusals_total"),
        "reloads": whole(f"{_OURS}checkpoint_reloads_total"),
        "checkpoint_refusals": by("reason", "checkpoint_refusals_total"),
        "loads": {
            transition: {"count": count, "seconds": seconds.get(transition)}
            for transition, count in counts.items()
        },
    }
