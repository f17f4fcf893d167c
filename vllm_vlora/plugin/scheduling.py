"""Adapters that need a slot stay within the slots, whatever the scheduler counts; see ``admission``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vllm_vlora.plugin.admission import Admission, kinds_of, pinned_of
from vllm_vlora.plugin.identity import parse_task_path
from vllm_vlora.plugin.manager import Setup
from vllm_vlora.plugin.seam_table import Place
from vllm_vlora.plugin.workers import manager_of


def schedule_by_kind(setup: Setup, places: Mapping[str, Place]) -> list[tuple[Any, str, Any]]:
    """The patches that keep adapters that need a slot within the slots; see ``admission``.

    Args:
        places: the seams by name, as ``find_seams`` finds them.
    """
    add = places["Scheduler.add_request"].value
    finish = places["Scheduler.finish_requests"].value
    update = places["Scheduler.update_from_output"].value
    core_add = places["EngineCore.add_request"].value

    def admission(scheduler: Any) -> Admission[Any]:
        held = scheduler.__dict__.get("_vlora_admission")
        if held is None:
            slots = min(setup.settings.slots, scheduler.lora_config.max_loras)
            alive = scheduler.requests.__contains__
            held = Admission(slots, alive, pinned_of(scheduler))
            scheduler.__dict__["_vlora_admission"] = held
        return held

    def release(scheduler: Any) -> None:
        for request in admission(scheduler).release():
            add(scheduler, request)

    @functools.wraps(add)
    def add_request(self: Any, request: Any) -> Any:
        lora = request.lora_request
        # A request that continues one inside is the scheduler's own business.
        inside = request.request_id in self.requests
        if self.lora_config and lora and not inside and not kinds_of(self).get(lora.lora_path):
            entered = admission(self).enter(lora.lora_int_id, request.request_id, request)
            if not entered:
                return None
        return add(self, request)

    @functools.wraps(finish)
    def finish_requests(self: Any, request_ids: Any, finished_status: Any) -> Any:
        if not self.lora_config:
            return finish(self, request_ids, finished_status)
        request_ids = [request_ids] if isinstance(request_ids, str) else request_ids
        request_ids = None if request_ids is None else list(request_ids)
        # The scheduler ends a request properly only when it holds it.
        for request in admission(self).withdraw(request_ids):
            add(self, request)
        done = finish(self, request_ids, finished_status)
        release(self)
        return done

    @functools.wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        done = update(self, scheduler_output, model_runner_output)
        if self.lora_config:
            release(self)
        return done

    @functools.wraps(core_add)
    def add_to_core(self: Any, request: Any, request_wave: int = 0) -> None:
        lora = request.lora_request
        if (
            lora
            and parse_task_path(lora.lora_path)
            and lora.lora_path not in kinds_of(self.scheduler)
        ):
            _learn_kinds(self, lora.lora_path)
        core_add(self, request, request_wave)

    patches = {
        "Scheduler.add_request": add_request,
        "Scheduler.finish_requests": finish_requests,
        "Scheduler.update_from_output": update_from_output,
        "EngineCore.add_request": add_to_core,
    }
    return [(places[name].owner, places[name].attribute, new) for name, new in patches.items()]


def _learn_kinds(core: Any, path: str) -> None:
    """Ask the workers, which decided it when they loaded the tasks."""
    kinds = kinds_of(core.scheduler)
    kinds.update(dict.fromkeys(core.model_executor.collective_rpc(_direct_paths)[0], True))
    kinds.setdefault(path, False)


def _direct_paths(worker: Any) -> set[str]:
    return manager_of(worker).direct_paths()
