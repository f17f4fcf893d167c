"""What takes the place of vLLM's own functions, and how it is put there.

What is patched, and why there, is in ``seam_table``, with everything else that the plugin relies on. What
is put there is below and in ``manager``, ``steps``, ``limits`` and ``graph_cases``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_vlora._version import __version__
from vllm_vlora.blending.text_router import RoutePolicy
from vllm_vlora.errors import (
    CheckpointError,
    ModelStateError,
    SettingError,
    TaskLoadError,
    VLoRAError,
)
from vllm_vlora.plugin.chat_templates import TaskTemplates
from vllm_vlora.plugin.combinations import keep_newest
from vllm_vlora.plugin.core_metrics import metrics_snapshot
from vllm_vlora.plugin.counters import METRICS_METHOD
from vllm_vlora.plugin.endings import end_requests
from vllm_vlora.plugin.engine_core import (
    ALIASES_METHOD,
    FOLLOW_METHOD,
    ROUTER_METHOD,
    TASKS_METHOD,
    advance_after_abort,
    ensure_in_process,
    finish_who_waits,
    follow,
    keep_what_is_pinned,
    load_before_add_lora,
    load_before_add_request,
    release_what_is_removed,
    served_aliases,
    served_router,
    served_tasks,
    work_while_some_wait,
)
from vllm_vlora.plugin.events import logger
from vllm_vlora.plugin.graph_cases import capture_by_kind
from vllm_vlora.plugin.identity import TaskPath, parse_task_path
from vllm_vlora.plugin.limits import limit_tasks
from vllm_vlora.plugin.listing import (
    NAME_TAKEN,
    Listing,
    refuse_without_lora,
    say_which_weigh_nothing,
)
from vllm_vlora.plugin.manager import Setup, TaskLoRAManager, TaskLoRAModel
from vllm_vlora.plugin.metrics import refresh_after, show_in_metrics
from vllm_vlora.plugin.named_requests import TaskRequests, name_patches
from vllm_vlora.plugin.published import (
    ADOPT_METHOD,
    OFFER_METHOD,
    UNPUBLISH_METHOD,
    WITHDRAW_METHOD,
    adopt,
    leave_devices,
    offer,
    release_first,
    return_to_devices,
    unpublish,
    withdraw,
)
from vllm_vlora.plugin.refusals import raise_refusals
from vllm_vlora.plugin.renewal import renew_requests
from vllm_vlora.plugin.seam_table import CHAT_REQUESTS, find_seams
from vllm_vlora.plugin.settings import TEMPLATES_VARIABLE, Settings, read_settings
from vllm_vlora.plugin.tracing import add_task, say_task

_PATCHED = "_vlora_patched"
_ABSENT = object()
# Linux takes 128 KiB for one argument of a command; the other options of ``vllm serve`` travel in it too.
_LONGEST_ARGUMENT = 120 * 1024


# --- the worker -----------------------------------------------------------------------------------


def _manager(worker: Any) -> TaskLoRAManager:
    """The manager of vLLM's WorkerLoRAManager, which is ours."""
    manager = worker._adapter_manager
    assert isinstance(manager, TaskLoRAManager)
    return manager


def _load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any, lora_request: LoRARequest) -> LoRAModel:
        if parse_task_path(lora_request.lora_path) is None:
            return original(self, lora_request)
        return _manager(self).task_model(lora_request)

    return load


def _add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add(self: LRUCacheWorkerLoRAManager, lora_request: LoRARequest) -> bool:
        manager = _manager(self)
        held = manager.get_adapter(lora_request.lora_int_id)
        path = held.task.path if isinstance(held, TaskLoRAModel) else None
        ours = parse_task_path(lora_request.lora_path) is not None
        if held is not None and (path or ours) and path != lora_request.lora_path:
            self.remove_adapter(lora_request.lora_int_id)
        return manager.add_direct(lora_request) or original(self, lora_request)

    return add


def _apply_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply(self: LRUCacheWorkerLoRAManager, lora_requests: set[LoRARequest]) -> None:
        # The original copies the list of adapters once per adapter and step, and counts every adapter
        # of the batch against the slots.
        original(self, _manager(self).in_slots(lora_requests))

    return apply


def _add_dummy_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add(self: WorkerLoRAManager, lora_request: LoRARequest, rank: int) -> bool:
        manager = _manager(self)
        # The first warm-up adapters are stock ones, so that a graph is captured with the calls that
        # ordinary adapters need; the others stand for direct tasks.
        if manager.vlora_store.direct is None or lora_request.lora_int_id <= manager.lora_slots:
            return original(self, lora_request, rank)
        manager.add_direct_dummy(lora_request)
        return True

    return add


def _create_lora_manager(
    original: Callable[..., Any], checkpoint: str | None
) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(self: Any, model: Any, vllm_config: Any) -> Any:
        model = original(self, model, vllm_config)
        # Before vLLM measures free memory, so that the KV cache is sized around it.
        if checkpoint is None:
            _manager(self).vlora_store.seal()
        else:
            _manager(self).preload(checkpoint)
            _name_graphs(vllm_config, _manager(self))
        return model

    return create


def _name_graphs(vllm_config: Any, manager: TaskLoRAManager) -> None:
    """Keep vLLM's cache of compiled graphs from mixing ours with stock ones, or with another mode's."""
    path = manager.vlora_store.direct
    if path is not None and isinstance(vllm_config.additional_config, dict):
        layers = sorted(path.layers)
        digest = hashlib.sha256("".join(layers).encode()).hexdigest()[:16]
        # What is begun ahead of a layer is another operation in its graph.
        way = "overlap" if manager.setup.settings.overlap else "direct"
        vllm_config.additional_config["vllm_vlora"] = f"{__version__} {way} {digest}"


# --- the engine core ------------------------------------------------------------------------------


def _sleep(original: Callable[..., Any], checkpoint: str | None) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["level"] >= 2:
            # The tasks lie with the model's weights. vLLM loads those anew, and knows nothing of ours.
            if checkpoint is not None:
                raise ModelStateError(
                    "sleep level 2 would lose the tasks of VLLM_VLORA_CHECKPOINT; use level 1, which "
                    "keeps them in host memory, or end the engine and start another"
                )
            _around_sleep(
                self.model_executor,
                functools.partial(leave_devices, self),
                functools.partial(return_to_devices, self),
            )
        return original(self, *args, **kwargs)

    return sleep


def _around_sleep(executor: Any, leave: Callable[[], None], come: Callable[[], None]) -> None:
    """Have something done once the workers lose their memory, and once they have all of it again.

    The first is not now: requests in flight may be waited for. The second is before steps go on.
    """
    original, wake = executor.sleep, executor.wake_up

    @functools.wraps(original)
    def sleep(*args: Any, **kwargs: Any) -> Any:
        executor.sleep, executor.wake_up = original, wake_up
        leave()
        return original(*args, **kwargs)

    @functools.wraps(wake)
    def wake_up(*args: Any, **kwargs: Any) -> Any:
        done = wake(*args, **kwargs)
        # Weights and cache may be woken one after the other.
        if not executor.is_sleeping:
            executor.wake_up = wake
            come()
        return done

    executor.sleep = sleep


# --- the API server and the offline engine ---------------------------------------------------------


def _init_static_loras(
    original: Callable[..., Any],
    templates: TaskTemplates | None,
    follows: bool,
    blends: bool = True,
    policy: RoutePolicy | None = None,
    weights: Iterable[str] = (),
) -> Callable[..., Any]:
    @functools.wraps(original)
    async def init(self: Any) -> None:
        await original(self)
        refuse_without_lora(self.engine_client.vllm_config.lora_config)
        self.lora_requests = TaskRequests(self.lora_requests, {}, blends, self.is_base_model)
        listing = Listing(self, templates, policy)
        await listing.start()
        say_which_weigh_nothing(weights, self)
        if follows:
            listing.follow()

    return init


def _policy(settings: Settings) -> RoutePolicy | None:
    if not settings.route_terms:
        return None
    return RoutePolicy(settings.route_terms, settings.route_threshold)


def _rust_frontend(
    original: Callable[..., Any],
    requests: Callable[[], list[LoRARequest]],
    chat_templates: bool = False,
) -> Callable[..., Any]:
    """The start of vLLM's Rust frontend, which asks no Python for adapters, with every task beside
    ``--lora-modules``: it loads those before it listens."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.entrypoints.openai.models.protocol import LoRAModulePath

        bound = signature.bind(self, *args, **kwargs)
        options = bound.arguments["args"]
        refuse_without_lora(options.enable_lora)
        if chat_templates:
            raise SettingError(
                f"{TEMPLATES_VARIABLE}=on, but vLLM's Rust frontend renders chats itself; start it "
                "without VLLM_USE_RUST_FRONTEND, or turn the setting off"
            )
        served = options.served_model_name or [options.model]
        modules = {module.name: module for module in options.lora_modules or ()}
        for request in requests():
            name = request.lora_name
            if name in served or name in modules:
                logger.error(NAME_TAKEN, f"task {name!r}")
                continue
            modules[name] = LoRAModulePath(name, request.lora_path)
        passed = json.dumps([dataclasses.asdict(module) for module in modules.values()])
        if len(passed) > _LONGEST_ARGUMENT:
            raise CheckpointError(
                f"{len(modules)} tasks and adapters are more than vLLM can hand to its Rust frontend on "
                "one command line; start it without VLLM_USE_RUST_FRONTEND"
            )
        listed = argparse.Namespace(**vars(options) | {"lora_modules": [*modules.values()]})
        bound.arguments["args"] = listed
        original(*bound.args, **bound.kwargs)

    return init


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = signature.bind(self, *args, **kwargs).arguments.get("lora_request")
        path = _new_path(self, request)
        if path is not None:
            with _as_the_callers_error(request):
                self.add_lora(request)
            loaded_paths(self).add(str(path))
        elif request is not None:
            # An engine core in this process raises, which must be before the request is in the books.
            ensure_in_process(self.engine_core, request)
        return original(self, *args, **kwargs)

    return add_request


@contextlib.contextmanager
def _as_the_callers_error(request: Any) -> Iterator[None]:
    """A load that failed in another process, of which only the text came back, as an error of ours."""
    try:
        yield
    except (VLoRAError, EngineDeadError):
        raise
    except Exception as error:
        raise TaskLoadError(f"task {request.lora_name!r}: {error}") from error


def _new_path(engine: Any, request: LoRARequest | None) -> TaskPath | None:
    """The path of a request for a task of ours that this engine was not seen to load."""
    if request is None or request.lora_path in loaded_paths(engine):
        return None
    return parse_task_path(request.lora_path)


def loaded_paths(engine: Any) -> set[str]:
    """Paths of tasks that the workers were asked to hold.

    One that has given way since is loaded again by the engine core; see ``residency``.
    """
    return engine.__dict__.setdefault("_vlora_loaded_paths", set())


def _lora_hash_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def keys(request: Any) -> list[Any]:
        found = original(request)
        lora = request.lora_request
        if lora is not None and parse_task_path(lora.lora_path) is not None:
            found = [*found, lora.lora_path]
        return found

    return keys


def _mm_identifier(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def identifier(self: Any, mm_hash: str, lora_request: LoRARequest | None) -> str:
        found = original(self, mm_hash, lora_request)
        # vLLM puts the adapter's name before the hash where its tower has adapters.
        if lora_request is None or found == mm_hash:
            return found
        path = parse_task_path(lora_request.lora_path)
        return found if path is None else f"{path.digest}:{found}"

    return identifier


def _equal_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def equal(self: LoRARequest, value: object) -> bool:
        if not original(self, value):
            return False
        assert isinstance(value, LoRARequest)
        # A model runner compares every request of a step with another of its task: 0.1 us, where the
        # parts of a path take 10.
        if self.lora_path == value.lora_path:
            return True
        return all(parse_task_path(path) is None for path in (self.lora_path, value.lora_path))

    return equal


# --- installing ------------------------------------------------------------------------------------


def is_installed() -> bool:
    """Whether this process runs vLLM with the plugin."""
    return bool(getattr(LRUCacheWorkerLoRAManager, _PATCHED, False))


def install(
    checkpoint: str | None,
    requests: Callable[[], list[LoRARequest]],
    settings: Settings | None = None,
) -> None:
    """Patch this process; does nothing the second time.

    Everything is looked up and checked first and set afterwards, so that a changed vLLM is left as
    it was.

    Args:
        checkpoint: folder of the checkpoint to preload, or None.
        requests: makes the requests of the tasks that the Rust frontend is to load.
        settings: how to run them; by default as the environment says.

    Raises:
        IncompatibleVLLMError: a seam is not as it was when the plugin was checked.
    """
    if is_installed():
        return
    setup = Setup(checkpoint, settings or read_settings())
    patches = _patches(setup, requests)
    before = [(target, name, vars(target).get(name, _ABSENT)) for target, name, _ in patches]
    for target, name, value in patches:
        setattr(target, name, value)
    TaskLoRAManager.setup = setup
    setattr(LRUCacheWorkerLoRAManager, _PATCHED, before)


def uninstall() -> None:
    """Undo ``install`` in this process, whose next engine may then run with other settings."""
    for target, name, value in reversed(getattr(LRUCacheWorkerLoRAManager, _PATCHED, [])):
        if value is _ABSENT:
            delattr(target, name)
        else:
            setattr(target, name, value)
    setattr(LRUCacheWorkerLoRAManager, _PATCHED, [])


def _patches(setup: Setup, requests: Callable[[], list[LoRARequest]]) -> list[tuple[Any, str, Any]]:
    seams = find_seams(direct=setup.direct, limits=setup.settings.limited or setup.direct)
    lru = "LRUCacheWorkerLoRAManager"
    wrappers: dict[str, Callable[[Any], Any]] = {
        "WorkerLoRAManager._load_adapter": _load_adapter,
        f"{lru}.add_adapter": _add_adapter,
        f"{lru}._manager_cls": lambda _: TaskLoRAManager,
        "LLMEngine.add_request": _add_request,
        "LoRARequest.__eq__": _equal_requests,
        "_gen_lora_extra_hash_keys": _lora_hash_keys,
        "InputProcessor._get_mm_identifier": _mm_identifier,
        "OutputProcessor.process_outputs": raise_refusals,
        "AsyncLLM.generate": renew_requests,
        "AsyncLLM.encode": renew_requests,
        "AsyncLLM.shutdown": end_requests,
        "OutputProcessor.do_tracing": say_task,
        "PrometheusStatLogger.__init__": keep_newest,
        "instrument_manual": add_task,
        "EngineCore.add_lora": load_before_add_lora,
        "EngineCore.add_request": lambda f: release_first(load_before_add_request(f)),
        "EngineCore.abort_requests": lambda f: release_first(advance_after_abort(f)),
        "EngineCoreProc.has_work": work_while_some_wait,
        "EngineCore.pin_lora": lambda f: keep_what_is_pinned(
            f, setup.settings.slots if setup.direct else 0
        ),
        "EngineCore.remove_lora": release_what_is_removed,
        "EngineCore.sleep": lambda f: _sleep(f, setup.checkpoint),
        f"{lru}.create_lora_manager": lambda f: _create_lora_manager(f, setup.checkpoint),
    }
    if setup.direct:
        wrappers[f"{lru}._apply_adapters"] = _apply_adapters
        wrappers["WorkerLoRAManager.add_dummy_lora"] = _add_dummy_lora
    if setup.checkpoint is not None:
        checkpoint = setup.checkpoint
        wrappers["attach_router"] = show_in_metrics
        templates = TaskTemplates(checkpoint) if setup.settings.chat_templates else None
        wrappers["OpenAIServingModels.init_static_loras"] = lambda f: refresh_after(
            _init_static_loras(
                f,
                templates,
                setup.settings.follow,
                setup.settings.blends,
                _policy(setup.settings),
                setup.settings.weights,
            )
        )
        if templates is not None:
            for _, owner in CHAT_REQUESTS:
                wrappers[f"{owner}.build_chat_params"] = templates.wrap
        wrappers["RustFrontendProcessManager.__init__"] = lambda f: _rust_frontend(
            f, requests, setup.settings.chat_templates
        )
    patches = [
        (seams[name].owner, seams[name].attribute, wrap(seams[name].value))
        for name, wrap in wrappers.items()
    ]
    graphs = capture_by_kind(seams) if setup.direct else []
    core, finish = seams["EngineCore.add_request"].owner, seams["Scheduler.finish_requests"]
    own = [
        (
            finish.owner,
            finish.attribute,
            finish_who_waits(finish.value, seams["Scheduler.add_request"].value),
        ),
        (core, TASKS_METHOD, served_tasks),
        (core, ALIASES_METHOD, served_aliases),
        (core, ROUTER_METHOD, served_router),
        (core, FOLLOW_METHOD, follow),
        (core, METRICS_METHOD, metrics_snapshot),
        (core, OFFER_METHOD, offer),
        (core, ADOPT_METHOD, adopt),
        (core, WITHDRAW_METHOD, withdraw),
        (core, UNPUBLISH_METHOD, unpublish),
    ]
    names = name_patches() if setup.checkpoint is not None else []
    return limit_tasks([*patches, *graphs, *own, *names], setup.settings, seams, setup.direct)
