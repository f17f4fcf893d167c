"""``/v1/vlora/tasks``: the tasks of a server page by page, with what is known of each.

An endpoint plugin of vLLM, which loads such only where ``VLLM_PLUGINS`` names them: routes are for the
operator to open. ``/v1/models`` lists the same tasks, all at once.
"""

from __future__ import annotations

import heapq
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request

from vllm_vlora.plugin.counters import DISK
from vllm_vlora.plugin.identity import parse_task_path
from vllm_vlora.plugin.metrics import METRICS

ROUTE = "/v1/vlora/tasks"
_MOST = 1000


class TaskRoutes:
    """The plugin, as ``vllm.endpoint_plugins`` wants it."""

    name = "vlora_tasks"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the route to an API server."""
        app.get(ROUTE, tags=["vlora"])(list_tasks)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing: the route reads what the server has of its models."""


# Not a coroutine, so it runs beside the event loop: sorting a hundred thousand names takes a while.
def list_tasks(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=_MOST, description="Tasks on a page.")] = 100,
    after: Annotated[str, Query(description="The last task of the page before.")] = "",
) -> dict[str, Any]:
    """The tasks that requests may name, aliases not among them, in the order of their names.

    A page's form is that of OpenAI's lists. Each task has its `digest`, which changes with its content,
    and its `tier`: the best one that any engine core has it in (`device`, `host` or `disk`), or null
    where that is not known. `runs` is `direct` or `materialized` (it needs one of the few slots, and
    `why` says what it is that the direct path cannot do), or null while it is on no device that names it.
    A task that comes or goes meanwhile moves no other from one page to the next.
    """
    models = getattr(request.app.state, "openai_serving_models", None)
    requests: dict[str, Any] = getattr(models, "lora_requests", {})
    known = METRICS.all_listed() and not METRICS.any_far()
    tier_of, elsewhere = METRICS.tier_of(), DISK if known else None
    form_of = METRICS.form_of()
    page: list[dict[str, Any]] = []
    for name, digest in _tasks(requests, after):
        if len(page) == limit:
            return _answer(page, has_more=True)
        tier = tier_of.get(name, elsewhere)
        described = {"id": name, "object": "vlora.task", "digest": digest, "tier": tier}
        page.append({**described, **_form(name, form_of)})
    return _answer(page, has_more=False)


def _tasks(requests: dict[str, Any], after: str) -> Iterator[tuple[str, str]]:
    """Names behind ``after``, in order, and digests, of what is ours."""
    # A copy, which the event loop cannot change meanwhile: taken past what else a ``TaskRequests``
    # iterates over, which are aliases and ``auto`` and run as Python.
    found = dict(dict.items(requests))
    names = [name for name in found if name > after]
    heapq.heapify(names)
    while names:
        name = heapq.heappop(names)
        path = parse_task_path(found[name].lora_path)
        if path:
            yield name, path.digest


def _form(name: str, form_of: Mapping[str, str | None]) -> dict[str, str | None]:
    if name not in form_of:
        return {"runs": None, "why": None}
    why = form_of[name]
    return {"runs": "direct" if why is None else "materialized", "why": why}


def _answer(page: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": has_more,
    }
