"""How the user set the plugin up: environment variables, read once and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_vlora.blend_names import MAX_TERMS
from vllm_vlora.downloads import Parts
from vllm_vlora.errors import SettingError
from vllm_vlora.plugin.events import LOG_VARIABLE, LOGS
from vllm_vlora.strict_json import JSONError, decode

if TYPE_CHECKING:
    import torch

MODES = ("auto", "direct", "materialize")


# Slots for ordinary adapters and materialized tasks beside the direct ones. A slot of rank 16 takes
# 80 MB for a Llama-7B in 16 bits, so that one for each of a thousand tasks would fill a GPU.
DEFAULT_PEFT_SLOTS = 8
UNTESTED_VARIABLE = "VLLM_VLORA_ALLOW_UNTESTED"
MODE_VARIABLE = "VLLM_VLORA_MODE"
SLOTS_VARIABLE = "VLLM_VLORA_SLOTS"
BASIS_VARIABLE = "VLLM_VLORA_BASIS"
LATE_VARIABLE = "VLLM_VLORA_LATE_MIB"
# Beside the checkpoint's tasks, for those that come later. It is kept small: on an 80 GB GPU 0.7 %
# of the memory. A hundred tasks of a 7B model at rank 16 in NF4 fit, or the packed bases of another
# checkpoint (80 MB at 64 components) and two hundred of its tasks; the least recently used give way.
DEFAULT_LATE_MIB = 512
DEVICE_VARIABLE = "VLLM_VLORA_DEVICE_BYTES"
# Of the device's memory, at most, for the tasks of the checkpoint; the rest is the model's and the KV
# cache's. Tasks beyond it come and go.
DEVICE_SHARE = 4
HOST_VARIABLE = "VLLM_VLORA_HOST_BYTES"
DEFAULT_HOST_BYTES = 4 << 30
FOLLOW_VARIABLE = "VLLM_VLORA_FOLLOW"
EXCHANGE_VARIABLE = "VLLM_VLORA_EXCHANGE"
BASIS_WAIT_VARIABLE = "VLLM_VLORA_BASIS_WAIT"
# Seconds. Most generations take less, and a client waits so long.
DEFAULT_BASIS_WAIT = 30
POLL_VARIABLE = "VLLM_VLORA_POLL_SECONDS"
FETCH_VARIABLE = "VLLM_VLORA_FETCH"
FETCHES = {"all": Parts.WHOLE, "asked": Parts.TASKS_LATER}
BASES = ("dense", "packed")
BLENDS_VARIABLE = "VLLM_VLORA_BLENDS"
BASIS_ROWS_VARIABLE = "VLLM_VLORA_BASIS_ROWS"
ROUTE_VARIABLE = "VLLM_VLORA_ROUTE"
ROUTE_THRESHOLD_VARIABLE = "VLLM_VLORA_ROUTE_THRESHOLD"
# Between those of prompts that a router knows, which are near 1, and of others.
DEFAULT_ROUTE_THRESHOLD = 0.5
ROWS_VARIABLE = "VLLM_VLORA_ROWS"
ROWS = ("wide", "narrow")
OVERLAP_VARIABLE = "VLLM_VLORA_OVERLAP"
TEMPLATES_VARIABLE = "VLLM_VLORA_CHAT_TEMPLATES"
METRICS_TASKS_VARIABLE = "VLLM_VLORA_METRICS_TASKS"
METRICS_LISTED_VARIABLE = "VLLM_VLORA_METRICS_LISTED"
# A series each, which Prometheus keeps for weeks.
DEFAULT_METRICS_TASKS = 100
# A line each of a scrape, which a router that looks where a task is reads many times a second.
DEFAULT_METRICS_LISTED = 1000
SWITCH = ("off", "on")
# More than any machine has of anything, and seconds that every clock can wait for.
_MOST, _MOST_SECONDS = 10**15, 10**9
# Counters of what was served are divided by weights, and must stay numbers that differ.
_WEIGHTS = 1e-6, 1e6
CONCURRENCY_VARIABLE = "VLLM_VLORA_TASK_CONCURRENCY"
QUEUE_VARIABLE = "VLLM_VLORA_TASK_QUEUE"
FAIR_VARIABLE = "VLLM_VLORA_FAIR"
WEIGHTS_VARIABLE = "VLLM_VLORA_WEIGHTS"


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    Attributes:
        mode: ``auto`` runs a task direct where it can and materializes it otherwise, ``direct``
            refuses tasks that cannot run direct, ``materialize`` writes every task into a slot.
        slots: slots for adapters that need one, when tasks run direct; ``--max-loras`` caps it.
        packed_basis: keep quantised bases packed on the device instead of in the compute dtype.
        basis_rows: components that a layer with a shared basis has room for, where its own are fewer.
        narrow_rows: hold private rows of 3 and 2 bits as they are stored instead of with 4.
        overlap: in CUDA graphs, run what a layer's direct tasks need of its input beside the base layer.
        chat_templates: render chats with the template that their task brought along.
        blends: take the name of a blend for one; those that aliases name are served either way.
        late_mib: MiB on each device for tasks that are loaded after start-up, beside those that were
            loaded then.
        route_terms: tasks of what ``model="auto"`` becomes, at most; 0 for no such name.
        route_threshold: the weight below which the base model answers it.
        device_bytes: on each device for the tasks of the checkpoint, at most; None for a quarter of it.
        host_bytes: of host memory of each worker for tasks that gave way.
        follow: serve what is published into the checkpoint's folder.
        exchange: whether a published state's shared bases take the place of those before.
        basis_wait: seconds that requests for tasks on a newly published basis wait at most until those on
            the one before have ended; their tasks are materialized then.
        poll_seconds: between two questions what a Hub branch or a URL has now; 0 for none.
        fetch: how much of a checkpoint on the Hub or at a URL is fetched before it is served.
        task_concurrency: requests of one task or ordinary adapter that run at once; 0 for any number.
        task_queue: requests of one that wait; more are refused. 0 for any number.
        fair: whether the task that was served least comes first.
        weights: shares of tasks beside that of the others, which is 1.
        log: for people as vLLM's own lines (``text``), or for programs (``keys``, ``json``).
        metrics_tasks: tasks whose requests are counted under their own name in the metrics.
        metrics_listed: tasks of each tier that the metrics name as being there.
    """

    mode: str = "auto"
    slots: int = DEFAULT_PEFT_SLOTS
    packed_basis: bool = False
    basis_rows: int = 0
    late_mib: int = DEFAULT_LATE_MIB
    overlap: bool = False
    chat_templates: bool = False
    narrow_rows: bool = False
    blends: bool = True
    route_terms: int = 1
    route_threshold: float = DEFAULT_ROUTE_THRESHOLD
    device_bytes: int | None = None
    host_bytes: int = DEFAULT_HOST_BYTES
    follow: bool = True
    exchange: bool = True
    basis_wait: int = DEFAULT_BASIS_WAIT
    poll_seconds: int = 0
    fetch: Parts = Parts.WHOLE
    task_concurrency: int = 0
    task_queue: int = 0
    fair: bool = False
    weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    log: str = LOGS[0]
    metrics_tasks: int = DEFAULT_METRICS_TASKS
    metrics_listed: int = DEFAULT_METRICS_LISTED

    @property
    def direct(self) -> bool:
        """Whether tasks may run direct."""
        return self.mode != "materialize"

    @property
    def limited(self) -> bool:
        """Whether anything is to be limited or shared; vLLM's scheduler is left alone otherwise."""
        return self.fair or self.task_concurrency > 0 or self.task_queue > 0

    def budget(self, device: torch.device) -> Budget:
        """What tasks may take on a worker's device."""
        most = self.device_bytes
        if most is None:
            most = device_memory(device) // DEVICE_SHARE
        return Budget(most, self.late_mib << 20, self.host_bytes)


@dataclass(frozen=True)
class Budget:
    """Bytes that a worker's tasks may take, and with them the bases that are held to materialize some.

    Attributes:
        device: at most so much at start-up; what does not fit comes when it is asked for.
        late: as much beside it, for what comes later.
        host: of images of tasks that are not, or no longer, on the device.
    """

    device: int
    late: int
    host: int


def device_memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    import torch

    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(torch.cuda.mem_get_info(device)[1])


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process; raises SettingError that names the variable and its values."""
    follow = _choice(environment, FOLLOW_VARIABLE, SWITCH[::-1]) == "on"
    return Settings(
        mode=_choice(environment, MODE_VARIABLE, MODES),
        slots=_whole(environment, SLOTS_VARIABLE, DEFAULT_PEFT_SLOTS, least=1),
        packed_basis=_choice(environment, BASIS_VARIABLE, BASES) == "packed",
        basis_rows=_whole(environment, BASIS_ROWS_VARIABLE, 0, least=0),
        late_mib=_whole(environment, LATE_VARIABLE, DEFAULT_LATE_MIB, least=0),
        overlap=_choice(environment, OVERLAP_VARIABLE, SWITCH) == "on",
        chat_templates=_choice(environment, TEMPLATES_VARIABLE, SWITCH) == "on",
        narrow_rows=_choice(environment, ROWS_VARIABLE, ROWS) == "narrow",
        blends=_choice(environment, BLENDS_VARIABLE, SWITCH[::-1]) == "on",
        route_terms=_route(environment),
        route_threshold=_share(environment, ROUTE_THRESHOLD_VARIABLE, DEFAULT_ROUTE_THRESHOLD),
        device_bytes=_size(environment, DEVICE_VARIABLE),
        host_bytes=_whole(environment, HOST_VARIABLE, DEFAULT_HOST_BYTES, least=0),
        follow=follow,
        exchange=_choice(environment, EXCHANGE_VARIABLE, SWITCH[::-1]) == "on",
        basis_wait=_whole(environment, BASIS_WAIT_VARIABLE, DEFAULT_BASIS_WAIT, 0, _MOST_SECONDS),
        poll_seconds=_poll_seconds(environment, follow),
        fetch=FETCHES[_choice(environment, FETCH_VARIABLE, tuple(FETCHES))],
        task_concurrency=_whole(environment, CONCURRENCY_VARIABLE, 0, least=0),
        task_queue=_whole(environment, QUEUE_VARIABLE, 0, least=0),
        fair=_fair(environment),
        weights=_weights(environment),
        log=_choice(environment, LOG_VARIABLE, LOGS),
        metrics_tasks=_whole(environment, METRICS_TASKS_VARIABLE, DEFAULT_METRICS_TASKS, least=0),
        metrics_listed=_whole(
            environment, METRICS_LISTED_VARIABLE, DEFAULT_METRICS_LISTED, least=0
        ),
    )


def _shown(value: str) -> str:
    """What a variable has, for the line that refuses it: not all of a pasted file."""
    return f"{value!r:.80}"


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = environment.get(name) or choices[0]
    if value not in choices:
        raise SettingError(f"{name}={_shown(value)}: use one of {', '.join(choices)}")
    return value


def _whole(
    environment: Mapping[str, str], name: str, default: int, least: int, most: int = _MOST
) -> int:
    text = environment.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,20}", text, re.ASCII) or not least <= int(text) <= most:
        raise SettingError(
            f"{name}={_shown(text)}: use a whole number from {least} on, {most} at most"
        )
    return int(text)


def _route(environment: Mapping[str, str]) -> int:
    value = environment.get(ROUTE_VARIABLE) or "top1"
    named = {"top1": 1, "off": 0, **{f"blend:{n}": n for n in range(2, MAX_TERMS + 1)}}
    if value not in named:
        raise SettingError(
            f"{ROUTE_VARIABLE}={_shown(value)}: use top1, off or blend:K with K from 2 to {MAX_TERMS}"
        )
    return named[value]


def _share(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name) or str(default)
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text, re.ASCII) or not 0 <= float(text) <= 1:
        raise SettingError(f"{name}={_shown(text)}: use a number from 0 to 1, such as {default}")
    return float(text)


def _size(environment: Mapping[str, str], name: str) -> int | None:
    return _whole(environment, name, 0, least=0) if environment.get(name) else None


def _poll_seconds(environment: Mapping[str, str], follow: bool) -> int:
    seconds = _whole(environment, POLL_VARIABLE, 0, 0, _MOST_SECONDS)
    if seconds and not follow:
        raise SettingError(f"{POLL_VARIABLE} does nothing with {FOLLOW_VARIABLE}=off; unset one")
    return seconds


def _fair(environment: Mapping[str, str]) -> bool:
    fair = _choice(environment, FAIR_VARIABLE, SWITCH) == "on"
    if environment.get(WEIGHTS_VARIABLE) and not fair:
        raise SettingError(f"{WEIGHTS_VARIABLE} does nothing without {FAIR_VARIABLE}=on; set both")
    return fair


def _weights(environment: Mapping[str, str]) -> dict[str, float]:
    text = environment.get(WEIGHTS_VARIABLE) or "{}"
    try:
        weights = decode(text.encode(errors="surrogateescape"), dict[str, float])
    except JSONError as error:
        raise SettingError(
            f"{WEIGHTS_VARIABLE}={_shown(text)}: use a JSON object of names and numbers, such as "
            f'{{"sql": 2}} ({error})'
        ) from error
    least, most = _WEIGHTS
    for name, weight in weights.items():
        if not least <= weight <= most:
            raise SettingError(
                f"{WEIGHTS_VARIABLE}: {_shown(name)} has {weight:g}; use a number above 0, "
                f"from {least:g} to {most:g}"
            )
    return weights
