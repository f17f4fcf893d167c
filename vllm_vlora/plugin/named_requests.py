"""An API server's requests by name: tasks and ordinary adapters, aliases, and blends as they come.

``TaskRequests`` takes the place of the dictionary that vLLM looks names up in. What a name means may
depend on the client (a canary), and who asks must be told which tasks answered: the ``Asked`` of a
request has both, from the headers to the lookup and back. vLLM answers with the name in the
``LoRARequest``, which is the task's, or the blend's in its one form; ``X-VLora-Tasks`` says it where
another name was asked for. A request of ``auto`` becomes one of what its router picks before vLLM looks
the name up.
"""

from __future__ import annotations

import functools
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, NamedTuple
from urllib.parse import quote

from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from vllm_vlora.blend_names import Blend, blend_text, is_alone, task_alone
from vllm_vlora.blending.resolving import expand, resolve
from vllm_vlora.blending.text_router import AUTO
from vllm_vlora.checkpoint.aliases import Aliases
from vllm_vlora.errors import BlendError, TaskIdError
from vllm_vlora.plugin.blend_paths import blend_path, is_blend_path
from vllm_vlora.plugin.identity import FIRST_ID, ID_SPAN, TaskPath, parse_task_path
from vllm_vlora.plugin.prompt_routing import Routing
from vllm_vlora.plugin.refusals import callers_error
from vllm_vlora.plugin.seam_table import NAME_SEAMS
from vllm_vlora.plugin.settings import BLENDS_VARIABLE, ROUTE_VARIABLE

KEY_HEADER, TASKS_HEADER = b"x-vlora-key", b"x-vlora-tasks"
CONFIDENCE_HEADER = b"x-vlora-confidence"
# Blends that a server remembers. One more forgets the least recently asked for; making it anew is cheap.
_MOST_BLENDS = 256
_NO_ROUTER = (
    f"The served checkpoint has no router (`vllm-vlora router train`), or {ROUTE_VARIABLE} is off."
)
# Of a key, which clients choose: more of it would only be hashed.
_KEY_LENGTH = 256


class Asked:
    """One request: whose it is, and what the names in it have turned out to mean.

    Args:
        header: that has its client's key. by_http: it came by HTTP, and is over with that.
    """

    def __init__(self, header: str | None, by_http: bool = True) -> None:
        self._header, self.by_http = header, by_http
        self.user: str | None = None
        self._random = secrets.token_hex(8)
        self.answered: dict[str, LoRARequest] = {}
        # Of a routed one: how sure the router was, and the base model's name, where that answers.
        self.confidence: float | None = None
        self.base: str | None = None

    @property
    def key(self) -> str:
        """The header, else the body's ``user``, else one that no other request has."""
        return (self._header or self.user or self._random)[:_KEY_LENGTH]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What its client is told beside the answer."""
        names = [request.lora_name for request in self.answered.values()]
        names += [] if self.base is None else [self.base]
        if not names:
            return []
        value = ",".join(quote(name, safe="*+-./ ") for name in dict.fromkeys(names))
        sure = [] if self.confidence is None else [(CONFIDENCE_HEADER, b"%.3f" % self.confidence)]
        return [(TASKS_HEADER, value.encode()), *sure]


_asked: ContextVar[Asked | None] = ContextVar("vlora_asked", default=None)
# A name is to be an adapter's, whatever could be read into it.
_naming: ContextVar[bool] = ContextVar("vlora_naming", default=False)


class TaskRequests(dict[str, LoRARequest]):
    """Name -> request, where a name may also be an alias or a blend.

    Iteration, ``len`` and ``values`` have tasks, ordinary adapters, aliases and ``auto``; an alias stands
    there under its own name, and is looked up as what it stands for.

    Attributes:
        routing: what picks a task for ``auto``, where nothing else is called so; None for nothing.

    Args:
        requests: of tasks and ordinary adapters.
        aliases: names that no request has.
        blends: understand blends that no alias names.
        is_model: whether a name is a served model's, which vLLM looks for after it looked here.
    """

    def __init__(
        self,
        requests: Mapping[str, LoRARequest],
        aliases: Aliases,
        blends: bool = True,
        is_model: Callable[[str], bool] = lambda name: False,
    ) -> None:
        super().__init__(requests)
        self._takes_blends, self._is_model = blends, is_model
        self._blends: OrderedDict[str, _Blended] = OrderedDict()
        # How many requests have each number: looking through a hundred thousand tasks takes milliseconds.
        self._numbers = Counter(request.lora_int_id for request in requests.values())
        self.aliases: Aliases = aliases
        self.routing: Routing | None = None

    @property
    def routes(self) -> bool:
        """Whether ``auto`` has a task picked, and is no name of something."""
        if self.routing is None or self._is_model(AUTO):
            return False
        return self.own(AUTO) is None and AUTO not in self.aliases

    def route(self, models: Any, request: Any) -> tuple[LoRARequest | None, float]:
        """What is to answer a request of ``auto``, None being the base model, and how sure that is."""
        assert self.routing is not None
        picked, confidence = self.routing.pick(models, request, _Labels(self))
        asked = _asked.get()
        key = secrets.token_hex(8) if asked is None else asked.key
        # Where they cannot be blended, as of other checkpoints, the first is the likeliest.
        for blend in () if picked is None else (picked, task_alone(picked[0].task)):
            with suppress(BlendError):
                meant = expand(blend, _Tasks(self), self.aliases, key)
                return self._request(meant), confidence
        return None, confidence

    def own(self, name: str) -> LoRARequest | None:
        """The request that a name has itself: a task's or an ordinary adapter's."""
        return super().get(name)

    def own_items(self) -> list[tuple[str, LoRARequest]]:
        """Every name that has a request itself, and that request."""
        return list(super().items())

    def is_checkpoints(self, name: str) -> bool:
        """Whether a name is a task's of ours or an alias."""
        return self._path(name) is not None or (self.own(name) is None and name in self.aliases)

    def is_adapters(self, name: str) -> bool:
        """Whether a name is an ordinary adapter's."""
        return self.own(name) is not None and self._path(name) is None

    def meaning(self, name: str) -> LoRARequest:
        """The request that a name which is not in the dictionary stands for.

        Raises:
            BlendError: none.
        """
        asked = _asked.get()
        if asked is not None and name in asked.answered:
            return asked.answered[name]
        if self._is_model(name):
            raise BlendError("it is the served model's name")
        if _naming.get():
            raise BlendError("it is to be an adapter's name")
        if not self._takes_blends and name not in self.aliases:
            raise BlendError(f"no task is called so, and blends are off ({BLENDS_VARIABLE})")
        key = secrets.token_hex(8) if asked is None else asked.key
        blend = resolve(name, _Tasks(self), self.aliases, key)
        # Not an ordinary adapter either, which has the name of one that is not served.
        gone = [task for task, _ in blend if self._path(task) is None]
        if gone:
            raise BlendError(f"{name!r} stands for task {gone[0]!r}, which is not served")
        request = self._request(blend)
        if asked is not None:
            asked.answered[name] = request
        return request

    def newest(self, request: LoRARequest) -> LoRARequest | None:
        """What one asks for is to be asked for so by now: a task of its id, or a blend of its tasks.

        None where that is not there, or may be another blend.
        """
        path, own = parse_task_path(request.lora_path), self.own(request.lora_name)
        if path is None or not is_blend_path(path):
            # What was a task's id may read as a blend by now.
            return own or self._found(self._read(request.lora_name))
        # In its one form its name may be a task's id, or read as another blend.
        held = self._blends.get(request.lora_path)
        if held is not None:
            return self._found(held.blend)
        found = self._found(self._read(request.lora_name))
        newer = None if found is None else parse_task_path(found.lora_path)
        return None if newer is None or newer.file != path.file else found

    def _read(self, name: str) -> Blend:
        """What a name means without aliases; nothing where that is nothing."""
        try:
            return resolve(name, _Tasks(self), {}, "")
        except BlendError:
            return ()

    def _found(self, blend: Blend) -> LoRARequest | None:
        """The request for a blend, as far as that can be made."""
        if not blend or any(self._path(task) is None for task, _ in blend):
            return None
        try:
            return self._request(blend)
        except BlendError:
            return None

    def _request(self, blend: Blend) -> LoRARequest:
        if is_alone(blend):
            return dict.__getitem__(self, blend[0].task)
        paths = {task: path for task, _ in blend if (path := self._path(task)) is not None}
        path = blend_path(paths, blend)
        held = self._blends.get(str(path))
        if held is None:
            made = LoRARequest(blend_text(blend), self._free_id(path), str(path))
            held = self._blends[str(path)] = _Blended(self._numbered(made), blend)
            if len(self._blends) > _MOST_BLENDS:
                self._forgotten(self._blends.popitem(last=False)[1].request)
        self._blends.move_to_end(str(path))
        return held.request

    def _free_id(self, path: TaskPath) -> int:
        """As a task's (``identity``), and no other's here, whoever made up the blend for that."""
        offset = int(path.digest, 16) % ID_SPAN
        while FIRST_ID + offset in self._numbers:
            offset = (offset + 1) % ID_SPAN
        return FIRST_ID + offset

    def _numbered(self, request: LoRARequest) -> LoRARequest:
        self._numbers[request.lora_int_id] += 1
        return request

    def _forgotten(self, request: LoRARequest | None) -> None:
        if request is not None:
            self._numbers[request.lora_int_id] -= 1
            if not self._numbers[request.lora_int_id]:
                del self._numbers[request.lora_int_id]

    def _path(self, name: str) -> TaskPath | None:
        """The path of a task of ours; None for ordinary adapters and what is not there."""
        request = self.own(name)
        return None if request is None else parse_task_path(request.lora_path)

    # --- what vLLM asks of a dictionary ---

    def __setitem__(self, name: str, request: LoRARequest) -> None:
        self._forgotten(self.own(name))
        super().__setitem__(name, self._numbered(request))

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        try:
            return isinstance(name, str) and self.meaning(name) is not None
        except BlendError:
            return False

    def __missing__(self, name: str) -> LoRARequest:
        try:
            return self.meaning(name)
        except BlendError as error:
            raise KeyError(name) from error

    def get(self, name: str, default: Any = None) -> Any:
        """The request of a name, or the default."""
        try:
            return self[name]
        except KeyError:
            return default

    def __delitem__(self, name: str) -> None:
        # vLLM's unload route takes any name that is looked up; one of the checkpoint's stays until it is
        # published again.
        if super().__contains__(name):
            self._forgotten(self.own(name))
            super().__delitem__(name)
        elif name in self.aliases:
            self.aliases = {n: routes for n, routes in self.aliases.items() if n != name}
        else:
            held = self._blends.pop(self[name].lora_path, None)
            self._forgotten(held and held.request)

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        yield from self._beside()

    def _beside(self) -> Iterator[str]:
        """Names that are listed and have no request of their own."""
        yield from (name for name in self.aliases if self._stands(name))
        if self.routes:
            yield AUTO

    def __len__(self) -> int:
        return super().__len__() + sum(1 for _ in self._beside())

    def keys(self) -> Any:
        """Names of tasks, ordinary adapters and aliases, and ``auto``."""
        return list(self)

    def items(self) -> Any:
        """Pairs of ``keys`` and ``values``."""
        return list(zip(self, self.values()))

    def values(self) -> Any:
        """A request for each of ``keys``, whose name is that."""
        # vLLM goes through them with each chat to the base model: of very many tasks none is looked up.
        return [*super().values(), *map(self._card, self._beside())]

    def _stands(self, alias: str) -> bool:
        """Whether an alias is to be listed: it is no adapter's name by now, and its tasks are there."""
        tasks = (term.task for route in self.aliases[alias] for term in route.blend)
        return self.own(alias) is None and all(self._path(task) is not None for task in tasks)

    def _card(self, name: str) -> LoRARequest:
        if name == AUTO and self.routes:
            assert self.routing is not None
            return LoRARequest(AUTO, FIRST_ID, str(self.routing.file))
        # What a canary answers with most; listed, and not looked up.
        most = max(self.aliases[name], key=lambda route: route.share).blend
        target = self._request(most)
        return LoRARequest(name, target.lora_int_id, target.lora_path)


class _Blended(NamedTuple):
    """The request for a blend, and the blend."""

    request: LoRARequest
    blend: Blend


class _Tasks:
    """The tasks of ours among requests."""

    def __init__(self, requests: TaskRequests) -> None:
        self._requests = requests

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._requests._path(name) is not None


class _Labels:
    """What a router may pick: tasks of ours, and aliases whose tasks are all there."""

    def __init__(self, requests: TaskRequests) -> None:
        self._requests, self._tasks = requests, _Tasks(requests)

    def __contains__(self, name: object) -> bool:
        if name in self._tasks:
            return True
        return name in self._requests.aliases and self._requests._stands(str(name))


def meaning_for(key: str, name: str, requests: TaskRequests) -> LoRARequest:
    """What a name stands for to a client with this key.

    Raises:
        BlendError: none.
    """
    token = _asked.set(Asked(key))
    try:
        return requests.own(name) or requests.meaning(name)
    finally:
        _asked.reset(token)


# --- the API server -------------------------------------------------------------------------------


def answering(name: str, requests: TaskRequests) -> LoRARequest | None:
    """What answers a request of a name, as far as this HTTP request has looked it up."""
    asked = _asked.get()
    found = None if asked is None else asked.answered.get(name)
    return requests.own(name) if found is None else found


class NameHeaders:
    """ASGI middleware that brings a client's key to the lookup, and what it found to the client."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = dict(scope["headers"]).get(KEY_HEADER)
        asked = Asked(None if header is None else header.decode("latin-1"))

        async def with_tasks(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *asked.headers]}
            await send(message)

        token = _asked.set(asked)
        try:
            await self._app(scope, receive, with_tasks)
        finally:
            _asked.reset(token)


def _check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def check(self: Any, request: Any) -> Any:
        asked = _asked.get()
        if asked is None or not asked.by_http:
            # Of `vllm run-batch`, which has no middleware. The one before it may have had this context.
            asked = Asked(None, by_http=False)
            _asked.set(asked)
        if isinstance(user := getattr(request, "user", None), str):
            asked.user = user
        _route(self.models, request, asked)
        refused = await original(self, request)
        requests = self.models.lora_requests
        if refused is not None and isinstance(requests, TaskRequests):
            refused.error.message += _why_unknown(request.model, requests)
        return refused

    return check


def _check_pooling_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """``PoolingBaseServing._check_model``, which leaves it to a later lookup to raise its 404."""
    checked = _check_model(original)

    @functools.wraps(original)
    async def check(self: Any, request: Any) -> None:
        await checked(self, request)
        name, requests = request.model, self.models.lora_requests
        if not isinstance(requests, TaskRequests) or self._is_model_supported(name):
            return
        if name not in requests:
            why = _why_unknown(name, requests)
            raise VLLMNotFoundError(f"The model `{name}` does not exist.{why}")

    return check


def _route(models: Any, request: Any, asked: Asked) -> None:
    """Make a request of ``auto`` one of what is to answer it."""
    requests = getattr(models, "lora_requests", None)
    if request.model != AUTO or not isinstance(requests, TaskRequests) or not requests.routes:
        return
    found, confidence = requests.route(models, request)
    request.model = models.base_model_paths[0].name if found is None else found.lora_name
    asked.confidence = confidence
    if found is None:
        asked.base = request.model
    else:
        asked.answered[found.lora_name] = found


def _load_lora_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """``OpenAIServingModels.load_lora_adapter`` that leaves names of the checkpoint to it.

    In the place of a task or alias an adapter would get the task's number, by which the engine knows it,
    and both would answer for either. What reads as a blend is a free name.
    """

    @functools.wraps(original)
    async def load(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        requests, name = self.lora_requests, request.lora_name
        if isinstance(requests, TaskRequests) and requests.is_checkpoints(name):
            raise callers_error(
                TaskIdError,
                f"{name!r} is a task or an alias of the served checkpoint; give the adapter another name",
            )
        token = _naming.set(True)
        try:
            return await original(self, request, *args, **kwargs)
        finally:
            _naming.reset(token)

    return load


def _get_active_default_mm_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    """``BaseServing._get_active_default_mm_loras`` that knows ordinary adapters only.

    A chat to the base model is answered by the adapter whose name is the kind of a part of its messages
    (``--default-mm-loras``): by a task that happens to be called ``text`` or ``image``, too.
    """

    @functools.wraps(original)
    def active(self: Any, request: Any) -> LoRARequest | None:
        requests = self.models.lora_requests
        if not isinstance(requests, TaskRequests):
            return original(self, request)
        kinds = {kind for kind in self._get_message_types(request) if requests.is_adapters(kind)}
        return requests.own(kinds.pop()) if len(kinds) == 1 else None

    return active


def _why_unknown(name: str, requests: TaskRequests) -> str:
    """For the end of a 404: what is wrong with a blend, where a name begins like one, and what ``auto``
    needs."""
    if name == AUTO:
        return f" {_NO_ROUTER}"
    try:
        requests.meaning(name)
    except BlendError as error:
        if "no task is called" not in str(error):
            return f" {error}"
    return ""


class _HeaderPlugin:
    """What vLLM takes for one of its endpoint plugins, which has no routes of its own."""

    name, required_tasks = "vlora-names", None

    def attach_router(self, app: Any) -> None:
        """Put the middleware around the routes."""
        app.add_middleware(NameHeaders)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing more is needed."""


def _load_endpoint_plugins(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(supported_tasks: Any = None) -> list[Any]:
        return [*original(supported_tasks), _HeaderPlugin()]

    return load


def name_patches() -> list[tuple[Any, str, Any]]:
    """What is put into vLLM's API server: (owner, attribute, new value).

    Raises:
        IncompatibleVLLMError: a place is missing or changed.
    """
    places = {seam.name: seam.find() for seam in NAME_SEAMS}
    return [
        (place.owner, place.attribute, _WRAPPERS[name](place.value))
        for name, place in places.items()
    ]


_WRAPPERS = {
    "BaseServing._check_model": _check_model,
    "PoolingBaseServing._check_model": _check_pooling_model,
    "BaseServing._get_active_default_mm_loras": _get_active_default_mm_loras,
    "OpenAIServingModels.load_lora_adapter": _load_lora_adapter,
    "load_endpoint_plugins": _load_endpoint_plugins,
}
