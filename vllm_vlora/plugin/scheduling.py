"""Adapters that need a slot stay within the slots, whatever the scheduler counts; see ``admission``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vllm_vlora.plugin.admission import Admission, kinds_of, pinned_of
from vllm_vlora.plugin.manager import Setup
from vllm_vlora.plugin.seam_table import Place


def schedule_by_kind(setup: Setup, places: Mapping[str, Place]) -> list[tuple[Any, str, Any]]:
    """The patches that keep adapters that need a slot within the slots; see ``admission``.

    Args:
        places: the seams by name, as ``find_seams`` finds them.
    """
    add = places["Scheduler.add_request"].value
    finish = places["Scheduler.finish_requests"].value
    update = places["Scheduler.update_from_output"].value

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

    patches = {
        "Scheduler.add_request": add_request,
        "Scheduler.finish_requests": finish_requests,
        "Scheduler.update_from_output": update_from_output,
    }
    return [(places[name].owner, places[name].attribute, new) for name, new in patches.items()]
