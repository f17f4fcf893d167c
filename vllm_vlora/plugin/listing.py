"""Which tasks an API server lists, from its start on and while others are published.

It asks the engine cores and never the folder: what they hold may be an older state than what lies there,
or a newer one. Every API server asks for itself; what the engine cores adopt, they adopt once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_vlora.blending.text_router import AUTO, RoutePolicy
from vllm_vlora.checkpoint.aliases import Route, decode_aliases
from vllm_vlora.checkpoint.manifest import task_file
from vllm_vlora.checkpoint.router_files import decode_router
from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin.chat_templates import TaskTemplates
from vllm_vlora.plugin.counters import ENDING
from vllm_vlora.plugin.engine_core import (
    ALIASES_METHOD,
    CHANGED,
    FOLLOW_METHOD,
    ROUTER_METHOD,
    TASKS_METHOD,
)
from vllm_vlora.plugin.events import logger
from vllm_vlora.plugin.identity import MEMORY, TaskPath, parse_task_path
from vllm_vlora.plugin.named_requests import TaskRequests
from vllm_vlora.plugin.prompt_routing import Routing
from vllm_vlora.plugin.renewal import renew_from
from vllm_vlora.plugin.requests import requests_for
from vllm_vlora.plugin.settings import WEIGHTS_VARIABLE
from vllm_vlora.wording import some_of

PERIOD = 0.5
"""Seconds between two questions whether another state is served."""


NAME_TAKEN = (
    "vllm-vlora: %s is not served: it has the name of a served model or --lora-modules adapter, which "
    "goes on answering; give one of them another name"
)


class Listing:
    """The checkpoint's tasks in an API server's list.

    Args:
        models: vLLM's ``OpenAIServingModels``.
        templates: by which their chats are rendered; None where that is the base model's.
        policy: how a router's weights become an answer; None to route nothing.
    """

    def __init__(
        self,
        models: Any,
        templates: TaskTemplates | None = None,
        policy: RoutePolicy | None = None,
    ) -> None:
        self._models, self._templates = models, templates
        self._policy = policy
        self._listed: dict[str, LoRARequest] = {}
        # The checkpoint's, as its paths have it; None while all that is served is from memory.
        self._folder: Path | None = None
        self._state = ""
        # By which the engine cores tell API servers apart.
        self._own_name = uuid.uuid4().hex
        self._following: asyncio.Task[None] | None = None
        # What was said to be not served, and why the list is as it was.
        self._said: set[str] = set()
        self._warned: set[str] = set()
        self._started = False

    async def start(self) -> None:
        """List what the engine cores serve.

        A name that something else has here stays that's, and it is logged, as of a later state: a server
        must not fail to start again after what it serves was published.

        Raises:
            CheckpointError: they do not serve the same.
        """
        await self._take()
        self._started = True

    def follow(self) -> None:
        """List what is served from now on, too, until the engine ends."""
        self._following = asyncio.get_running_loop().create_task(self._follow())
        renew_from(self._models.engine_client, self._models.lora_requests.newest)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self._update()
                self._warned.clear()
            except EngineDeadError:
                return
            except Exception as error:  # noqa: BLE001 - what is listed stays, and the next look comes
                if ENDING in str(error):
                    return
                self._warn(f"the list of tasks is as it was: {error}")

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            logger.warning("vllm-vlora: %s", what)
        self._warned.add(what)

    async def _update(self) -> None:
        states = set(await self._ask(FOLLOW_METHOD, self._own_name, self._state))
        # Engine cores that differ, or workers of one: some have not adopted yet.
        if len(states) > 1 or states == {self._state} or states == {""}:
            return
        await self._take()
        (self._state,) = states

    async def _take(self) -> None:
        """List what every engine core serves now, as far as its names are free."""
        paths, aliases = await self._served(), await self._aliases()
        places = (path.checkpoint for path in paths.values() if path.checkpoint != MEMORY)
        self._folder = next(places, self._folder)
        routing = await self._routing()
        if self._templates is not None:
            templates = await asyncio.to_thread(self._templates.read, paths)
        requests = await asyncio.to_thread(requests_for, paths)
        # From here on nothing is waited for: a request finds all of a state or nothing.
        taken = {name for name in (*paths, *aliases) if self._is_taken(name)}
        self._show([request for request in requests if request.lora_name not in taken])
        shown: TaskRequests = self._models.lora_requests
        shown.aliases = {name: aliases[name] for name in aliases if name not in taken}
        shown.routing = routing
        if self._templates is not None:
            self._templates.use(templates, shown)
        said = [f"task {name!r}" for name in paths if name in taken]
        said += [f"alias {name!r}" for name in aliases if name in taken]
        if routing is not None and not shown.routes:
            said.append(f"the router, which answers to {AUTO!r},")
        self._say(said)

    def _show(self, found: list[LoRARequest]) -> None:
        """List these in place of those that are listed, and of those that vLLM's resolver found."""
        shown: TaskRequests = self._models.lora_requests
        wanted, gone = {request.lora_name: request for request in found}, set()
        for name, own in shown.own_items():
            new = wanted.get(name)
            stays = new is not None and new.lora_path == own.lora_path
            if not (stays and own is self._listed.get(name)) and self._is_ours(name, own):
                del shown[name]
                gone.add(name)
        for name, request in wanted.items():
            before = self._listed.get(name)
            if before is not None and before.lora_path == request.lora_path:
                wanted[name] = before
                # A client unloaded it, where that is allowed.
                if name not in gone:
                    continue
            if shown.own(name) is None:
                shown[name] = wanted[name]
        self._listed = wanted

    def _is_taken(self, name: str) -> bool:
        """Whether a name is something else's here: a served model's or an ordinary adapter's."""
        # Not what it would mean as a blend.
        own = self._models.lora_requests.own(name)
        others = own is not None and not self._is_ours(name, own)
        return others or self._models.is_base_model(name)

    def _is_ours(self, name: str, own: LoRARequest) -> bool:
        """Whether the request that a name has is for the checkpoint's task of that name.

        Where clients may load adapters, vLLM's resolver finds tasks that are not listed yet, or were
        unloaded, and lists them in a request that it makes itself.
        """
        if own is self._listed.get(name):
            return True
        path = parse_task_path(own.lora_path)
        return path is not None and (path.checkpoint, path.file) == (self._folder, task_file(name))

    def _say(self, not_served: list[str]) -> None:
        for what in not_served:
            if what not in self._said:
                logger.error(NAME_TAKEN, what)
        self._said = set(not_served)

    async def _aliases(self) -> dict[str, tuple[Route, ...]]:
        """Other names of what every engine core serves."""
        return decode_aliases((await self._agreed(ALIASES_METHOD)).encode())

    async def _routing(self) -> Routing | None:
        """The router of what every engine core serves, whose network lies in this checkpoint's folder.

        The folder may have another state by now, perhaps one that is refused; the router stays as it was
        then, and no list waits for it.

        Raises:
            CheckpointError: it is not there at the start.
        """
        if self._folder is None or self._policy is None:
            return None
        text = await self._agreed(ROUTER_METHOD)
        if not text:
            return None
        record, held = decode_router(text.encode()), self._models.lora_requests.routing
        if held is not None and held.record == record:
            return held
        try:
            return await asyncio.to_thread(Routing.read, self._folder, record, self._policy)
        except CheckpointError as error:
            if not self._started:
                raise
            self._warn(f"{AUTO!r} is routed as before: {error}")
            return held

    async def _served(self) -> dict[str, TaskPath]:
        """What every engine core serves: task id -> path, in that order."""
        answer = await self._agreed(TASKS_METHOD)
        return await asyncio.to_thread(_parsed, answer)

    async def _agreed(self, method: str) -> Any:
        """What every engine core answers."""
        answers = await self._ask(method)
        if any(other != answers[0] for other in answers):
            raise CheckpointError(CHANGED)
        return answers[0]

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        client = self._models.engine_client.engine_core
        return [
            await client._call_utility_async(method, *arguments, engine=engine)
            for engine in client.core_engines
        ]


def say_which_weigh_nothing(weights: Iterable[str], models: Any) -> None:
    """Warn of names with a share of the engine that no request counts by: an alias, a slip of the pen."""

    def counts(name: str) -> bool:
        request = models.lora_requests.get(name)
        return name == base if request is None else request.lora_name == name

    base = models.base_model_paths[0].name
    nobody = [name for name in weights if not counts(name)]
    if nobody:
        logger.warning(
            "vllm-vlora: %s has a share for %s, and no task, adapter or base model is called so now; an "
            "alias goes by the tasks that it stands for",
            WEIGHTS_VARIABLE,
            some_of(map(repr, nobody)),
        )


# Of very many tasks it takes a second, for which an event loop must not stand still.
def _parsed(answer: list[tuple[str, str]]) -> dict[str, TaskPath]:
    found = {task: parse_task_path(path) for task, path in answer}
    # The workers made these paths.
    return {task: path for task, path in found.items() if path is not None}


def refuse_without_lora(enabled: object) -> None:
    """Raise CheckpointError where a checkpoint is to be served by a vLLM without LoRA."""
    if not enabled:
        raise CheckpointError(
            "VLLM_VLORA_CHECKPOINT is set, but vLLM runs without LoRA; start it with --enable-lora"
        )
