"""Every touch of vLLM's internals, but for reading its layers, which is in ``layers``.

Checked on vLLM 0.28, 0.30 and 0.32 (``make compat`` runs the engine tests on each); 0.29 and 0.31 lie
between them. What is patched, and why there:

* ``WorkerLoRAManager._load_adapter``: a path of ours becomes a ``TaskLoRAModel`` without weights.
* ``LRUCacheWorkerLoRAManager._manager_cls``: the manager below holds direct tasks, and fills slots from
  resident memory for the others.
* ``LRUCacheWorkerLoRAManager.create_lora_manager``: loads the checkpoint before vLLM sizes the KV cache.
* ``LRUCacheWorkerLoRAManager.add_adapter``: an integer id that comes with another path is reloaded.
* ``LRUCacheWorkerLoRAManager._apply_adapters``: a batch's direct tasks are not counted against slots.
* ``WorkerLoRAManager.add_dummy_lora``: warm-up adapters beyond the slots are direct tasks.
* ``Scheduler.add_request``, ``finish_requests``, ``update_from_output``: adapters that need a slot stay
  within the slots; ``EngineCore.add_request`` asks the workers which of our tasks do.
* ``OpenAIServingModels.init_static_loras``: lists every task in ``/v1/models``.
* ``LLMEngine.add_request``, ``AsyncLLM.add_request``: load a task not seen before outside the step,
  where a bad checkpoint is an error for its caller and not the end of the engine.
* ``LoRARequest.__eq__``: requests were equal when their names were, and a batch's requests are a set, so
  that an old and a new state of one task in one batch ended the engine with a KeyError.
* ``kv_cache_utils._gen_lora_extra_hash_keys``: before 0.32 the prefix cache's key was the adapter's
  name alone; for our tasks it also gets the path, which carries the content's digest.

They are attributes of classes and of one module, so names that vLLM bound at import see them too. A
layer's ``punica_wrapper`` is replaced through its own ``set_mapping``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import is_base_embedding_weights
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from vllm_vlora._version import __version__
from vllm_vlora.checkpoint import Checkpoint
from vllm_vlora.errors import CheckpointError, IncompatibleVLLMError, ModelMismatchError
from vllm_vlora.plugin.admission import Admission
from vllm_vlora.plugin.direct import DirectPath, DirectSlots
from vllm_vlora.plugin.identity import parse_task_path
from vllm_vlora.plugin.layers import (
    engine_name,
    is_fused_moe,
    read_direct_layouts,
    read_layouts,
    slot_nbytes,
)
from vllm_vlora.plugin.resident import ResidentStore, ResidentTask
from vllm_vlora.plugin.settings import Settings, read_settings
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.triton_kernels.direct import DirectLayer, add_direct

# A name below "vllm", so that vLLM's own handlers and format apply.
logger = init_logger("vllm.plugins.vlora")

_PATCHED = "_vlora_patched"


@dataclass(frozen=True)
class Setup:
    """What the plugin was installed with: the checkpoint to preload, if any, and the settings."""

    checkpoint: str | None
    settings: Settings

    @property
    def direct(self) -> bool:
        """Whether tasks may run direct: it takes the bases' places before the engine starts."""
        return self.checkpoint is not None and self.settings.direct


# --- the worker ------------------------------------------------------------------------------------


class TaskLoRAModel(LoRAModel):
    """A task as vLLM's managers hold it: an id and no weights of its own."""

    def __init__(self, lora_id: int, task: ResidentTask) -> None:
        super().__init__(lora_id, task.rank, {})
        self.task = task


class TaskLoRAManager(LRUCacheLoRAModelManager):
    """vLLM's manager beside direct tasks, whose slots are filled from resident tasks where one is ours.

    Ordinary PEFT adapters take the stock path throughout. With direct tasks, stock code sees few
    slots: those of ordinary adapters and of materialized tasks.
    """

    setup: ClassVar[Setup] = Setup(None, Settings("materialize"))
    _creating = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._max_distinct = kwargs["lora_config"].max_loras
        kwargs["lora_config"] = _config_of_slots(kwargs["lora_config"], self.setup)
        self._vllm_config = kwargs["vllm_config"]
        super().__init__(*args, **kwargs)
        self._writer: SlotWriter | None = None
        self._engine_name = functools.cache(functools.partial(engine_name, self))
        self.vlora_store = ResidentStore(
            self.device,
            self._engine_name,
            self._check,
            only_direct=self.setup.settings.mode == "direct",
        )
        self._direct_models: dict[int, TaskLoRAModel] = {}
        self._direct_slots: DirectSlots | None = None
        self._routed_version = -1
        self._stock_free: tuple[Any, ...] | None = None
        # What the batch holds; read by the layers on CPU only, since a captured graph cannot look.
        self.stock_in_batch, self.direct_in_batch = True, False

    @property
    def lora_slots(self) -> int:
        # punica for CPU indexes slot -1 for "no LoRA", the last slot, so that base requests in a mixed
        # batch get the last adapter's weights (seen on 0.28 to 0.32). One slot more, which nobody ever
        # fills, makes that index harmless, for ordinary adapters too.
        return super().lora_slots + int(self._creating and current_platform.is_cpu())

    def _create_lora_modules(self) -> None:
        self._creating = True
        try:
            super()._create_lora_modules()
        finally:
            self._creating = False

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if not isinstance(lora_model, TaskLoRAModel):
            super()._create_merged_loras_inplace(lora_model)

    # --- materialized tasks ---

    def activate_adapter(self, lora_id: int) -> bool:
        direct = self._direct_models.get(lora_id)
        if direct is not None:
            return self._activate_direct(lora_id, direct)
        model = super().get_adapter(lora_id)
        if not isinstance(model, TaskLoRAModel):
            activated = super().activate_adapter(lora_id)
            if activated and self._writer is not None:
                self._writer.forget(self.lora_index_to_id.index(lora_id))
            return activated
        # Stock code keeps the books (slots, LRU order) and is shown only the layers that the writer does
        # not fill: to set classification heads, and to reset what another adapter left in the slot.
        layers, self.modules = self.modules, _layers_left_to_stock(self.modules)
        try:
            activated = super().activate_adapter(lora_id)
        finally:
            self.modules = layers
        if activated:
            self.writer.write(self.lora_index_to_id.index(lora_id), model.task)
        return activated

    @property
    def writer(self) -> SlotWriter:
        """The writer over this model's layers, made on first use."""
        if self._writer is None:
            self._writer = SlotWriter(read_layouts(self), self.lora_config.max_lora_rank)
        return self._writer

    def task_model(self, request: LoRARequest) -> TaskLoRAModel:
        """The model of one of our requests, from resident memory wherever possible."""
        path = parse_task_path(request.lora_path)
        assert path is not None
        return self._make_model(request.lora_int_id, self.vlora_store.task(path))

    def _make_model(self, lora_id: int, task: ResidentTask) -> TaskLoRAModel:
        model = TaskLoRAModel(lora_id, task)
        heads = _full_heads(task)
        if heads:
            model.modules_to_save = heads
            try:
                self._validate_modules_to_save(model)
            except ValueError as error:
                raise ModelMismatchError(f"{task.path}: task {task.task_id!r}: {error}") from error
        return model

    # --- direct tasks ---

    def add_direct(self, request: LoRARequest) -> bool:
        """Activate the request's task if it is one of ours that runs direct; False otherwise."""
        model = self._direct_models.get(request.lora_int_id)
        if model is None or model.task.path != request.lora_path:
            if self._direct_slots is None or parse_task_path(request.lora_path) is None:
                return False
            model = self.task_model(request)
            if model.task.direct is None:
                return False
            self._direct_models[request.lora_int_id] = model
        self._activate_direct(request.lora_int_id, model)
        return True

    def add_direct_dummy(self, request: LoRARequest) -> None:
        """Register a warm-up adapter that adds nothing."""
        assert self.vlora_store.direct is not None
        empty = self.vlora_store.direct.empty
        task = ResidentTask(request.lora_name, request.lora_path, 0, {}, {}, empty)
        self._direct_models[request.lora_int_id] = TaskLoRAModel(request.lora_int_id, task)

    def direct_paths(self) -> set[str]:
        """Paths of the tasks that run direct."""
        return {task.path for task in self.vlora_store.tasks() if task.direct is not None}

    def _activate_direct(self, lora_id: int, model: TaskLoRAModel) -> bool:
        assert self._direct_slots is not None
        assert model.task.direct is not None
        return self._direct_slots.activate(lora_id, model.task.direct)

    def list_adapters(self) -> dict[int, LoRAModel]:
        return {**super().list_adapters(), **self._direct_models}

    def get_adapter(self, adapter_id: int) -> LoRAModel | None:
        return self._direct_models.get(adapter_id) or super().get_adapter(adapter_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        if self._direct_models.pop(adapter_id, None) is None:
            return super().remove_adapter(adapter_id)
        assert self._direct_slots is not None
        self._direct_slots.remove(adapter_id)
        return True

    def remove_all_adapters(self) -> None:
        for adapter_id in list(self._direct_models):
            self.remove_adapter(adapter_id)
        super().remove_all_adapters()

    def pin_adapter(self, lora_id: int) -> bool:
        if lora_id not in self._direct_models:
            return super().pin_adapter(lora_id)
        assert self._direct_slots is not None
        self.activate_adapter(lora_id)
        self._direct_slots.pin(lora_id)
        return True

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        slots = self._direct_slots
        if slots is not None and slots.version != self._routed_version:
            self._last_mapping = (
                None  # A slot holds another task: the same mapping means other slots.
            )
        super().set_adapter_mapping(mapping)

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        slots = self._direct_slots
        if slots is None or mapping.type != LoRAMappingType.LANGUAGE:
            super()._set_adapter_mapping(mapping)
            return
        tokens = np.asarray(mapping.index_mapping, dtype=np.int64)
        direct = slots.route(tokens)
        self._routed_version = slots.version
        self.direct_in_batch = bool(direct.any())
        self.stock_in_batch = bool((tokens[~direct] > 0).any())
        # Two batches of equal size without stock adapters mean the same to punica.
        shape = (len(tokens), len(mapping.prompt_mapping), mapping.is_prefill)
        if self.stock_in_batch or shape != self._stock_free:
            super()._set_adapter_mapping(_without_direct(mapping, tokens, direct, slots))
        self._stock_free = None if self.stock_in_batch else shape

    # --- the start ---

    def preload(self, folder: str) -> None:
        """Load the engine's checkpoint at start-up and say what it takes."""
        store = self.vlora_store
        make_path = self._make_direct_path if self.setup.direct else None
        checkpoint = store.preload(folder, make_path)
        for task in store.tasks():
            self._make_model(1, task)  # A head that does not fit is refused here and not in a step.
            if task.direct is None:
                self.writer.prepare(task)
        if store.direct is not None:
            self._direct_slots = DirectSlots(store.direct)
            self._attach(store.direct)
        _warn_of_base_model(checkpoint, self)
        logger.info(
            "vllm-vlora: %s: %d tasks resident on %s, %.1f MiB, loaded in %.2f s",
            checkpoint.path,
            len(store),
            self.device,
            store.nbytes / 2**20,
            store.seconds,
        )
        if store.direct is not None:
            _log_direct(self, store.direct)

    def _make_direct_path(self, checkpoint: Checkpoint) -> DirectPath:
        _refuse_config(self)
        _refuse_direct_config(self._vllm_config)
        return DirectPath(
            checkpoint,
            read_direct_layouts(self),
            self._engine_name,
            slots=self._max_distinct,
            max_tokens=_longest_batch(self.max_num_batched_tokens, self._vllm_config),
            device=self.device,
            dtype=self._vllm_config.model_config.dtype,
            packed_basis=self.setup.settings.packed_basis,
            ignored_extra=is_base_embedding_weights,
        )

    def _attach(self, path: DirectPath) -> None:
        """Put ourselves between the layers and punica."""
        for name, module in self.modules.items():
            layer = path.layers.get(name)
            if layer is not None or (current_platform.is_cpu() and not _is_full_head(module)):
                module.set_mapping(LayerPunica(self, module, layer))

    def _check(self, checkpoint: Checkpoint, task_ids: Iterable[str], direct: bool) -> None:
        _refuse_config(self)
        task_ids = list(task_ids)
        # A direct task has its own rank, whatever --max-lora-rank is.
        writer = replace(self.writer, max_rank=sys.maxsize) if direct else self.writer
        writer.check(checkpoint, task_ids, self._engine_name)
        for task_id in task_ids:
            _check_extra(checkpoint, task_id, self)


def _config_of_slots(config: Any, setup: Setup) -> Any:
    """vLLM's LoRA configuration with ``max_loras`` as the number of slots that stock code sees."""
    if not setup.direct:
        return config
    config = copy.copy(config)
    config.max_loras = min(config.max_loras, setup.settings.slots)
    return config


def _longest_batch(max_num_batched_tokens: int, vllm_config: Any) -> int:
    """Tokens of the longest batch; graphs may pad a batch to the largest captured size."""
    captured = getattr(vllm_config.compilation_config, "max_cudagraph_capture_size", None) or 0
    return max(max_num_batched_tokens, captured)


def _without_direct(
    mapping: LoRAMapping, tokens: np.ndarray, direct: np.ndarray, slots: DirectSlots
) -> LoRAMapping:
    """The mapping as punica should see it: tokens of direct tasks use no adapter."""
    prompts = tuple(0 if adapter in slots else adapter for adapter in mapping.prompt_mapping)
    return LoRAMapping(
        tuple(np.where(direct, 0, tokens).tolist()),
        prompts,
        is_prefill=mapping.is_prefill,
        type=mapping.type,
    )


class LayerPunica:
    """What a LoRA layer calls instead of its punica wrapper, which sees everything else.

    ``PunicaWrapperGPU`` is final, so this forwards instead of inheriting.
    """

    def __init__(self, manager: TaskLoRAManager, module: Any, layer: DirectLayer | None) -> None:
        self._inner = module.punica_wrapper
        self._manager = manager
        self._module = module
        self._layer = layer
        self._on_cpu = current_platform.is_cpu()
        self._handle = next(_HANDLES)
        _LAYERS[self._handle] = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
    ) -> None:
        """Add ordinary adapters' and direct tasks' updates to y in place."""
        assert scale == 1.0
        if torch.compiler.is_compiling():
            # One opaque call: nothing of what the batch holds is burnt into the compiled graph.
            torch.ops.vllm_vlora.add_lora_linear(y, x, self._handle)
        else:
            self.run(y, x)

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """The addition itself, with a look at the batch on CPU only."""
        manager, module = self._manager, self._module
        if manager.stock_in_batch or not self._on_cpu:
            self._inner.add_lora_linear(
                y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, module.output_slices
            )
        if self._layer is None or (self._on_cpu and not manager.direct_in_batch):
            return
        path = manager.vlora_store.direct
        assert path is not None
        add_direct(y, x, self._layer, path.table, path.routing)

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> Any:
        """Stock, but not for a batch on CPU that holds no ordinary adapter."""
        if self._manager.stock_in_batch or not self._on_cpu:
            return self._inner.add_lora_logits(*args, **kwargs)
        # It gathers a slot's B (vocabulary x rank) once a token, also for tokens without an adapter.
        return None

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> Any:
        """As ``add_lora_logits``."""
        if self._manager.stock_in_batch or not self._on_cpu:
            return self._inner.add_lora_embedding(*args, **kwargs)
        return None


# Compiled graphs name a layer by its number. They do not keep it alive: an engine that was shut down
# must be collected.
_HANDLES = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, LayerPunica] = weakref.WeakValueDictionary()


@torch.library.custom_op("vllm_vlora::add_lora_linear", mutates_args=("y",))
def _add_lora_linear(y: torch.Tensor, x: torch.Tensor, handle: int) -> None:
    _LAYERS[handle].run(y, x)


@_add_lora_linear.register_fake
def _add_lora_linear_fake(y: torch.Tensor, x: torch.Tensor, handle: int) -> None:
    return None


def _log_direct(manager: TaskLoRAManager, path: DirectPath) -> None:
    """Say which tasks run direct, which do not and why, and what each part takes."""
    tasks = manager.vlora_store.tasks()
    others = [task for task in tasks if task.direct is None]
    why = f" ({others[0].task_id!r}: {others[0].obstacle})" if others else ""
    logger.info(
        "vllm-vlora: mode %s: %d of %d tasks run direct, up to %d in one batch; %d materialized%s",
        manager.setup.settings.mode,
        len(tasks) - len(others),
        len(tasks),
        path.table.slots,
        len(others),
        why,
    )
    memory, mib = path.memory(), 2**20
    logger.info(
        "vllm-vlora: memory on %s: bases %.1f MiB, cores %.1f MiB, private factors %.1f MiB, "
        "materialized tasks %.1f MiB, slot table and routing %.1f MiB; %d slots for ordinary adapters "
        "and materialized tasks %.1f MiB",
        manager.device,
        memory.bases / mib,
        memory.cores / mib,
        memory.factors / mib,
        manager.vlora_store.materialized_nbytes / mib,
        memory.table / mib,
        manager.lora_slots,
        slot_nbytes(manager) / mib,
    )


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
        direct = _manager(self).add_direct
        original(self, {r for r in lora_requests if r and not direct(r)})

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


def _create_lora_manager(original: Callable[..., Any], checkpoint: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(self: Any, model: Any, vllm_config: Any) -> Any:
        model = original(self, model, vllm_config)
        # Before vLLM measures free memory, so that the KV cache is sized around it.
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
        vllm_config.additional_config["vllm_vlora"] = f"{__version__} direct {digest}"


# --- the scheduler ---------------------------------------------------------------------------------


def _schedule_by_kind(setup: Setup) -> list[tuple[Any, str, Any]]:
    """The patches that keep adapters that need a slot within the slots; see ``admission``."""
    add = _seam(Scheduler, "add_request", ["self", "request"])
    finish = _seam(Scheduler, "finish_requests", ["self", "request_ids", "finished_status"])
    update = _seam(
        Scheduler, "update_from_output", ["self", "scheduler_output", "model_runner_output"]
    )
    core_add = _seam(EngineCore, "add_request", ["self", "request", "request_wave"])

    def admission(scheduler: Any) -> Admission[Any]:
        held = scheduler.__dict__.get("_vlora_admission")
        if held is None:
            slots = min(setup.settings.slots, scheduler.lora_config.max_loras)
            held = Admission(slots, scheduler.requests.__contains__)
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
        if self.lora_config and lora and not inside and not _kinds(self).get(lora.lora_path):
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
            and lora.lora_path not in _kinds(self.scheduler)
        ):
            _learn_kinds(self, lora.lora_path)
        core_add(self, request, request_wave)

    return [
        (Scheduler, "add_request", add_request),
        (Scheduler, "finish_requests", finish_requests),
        (Scheduler, "update_from_output", update_from_output),
        (EngineCore, "add_request", add_to_core),
    ]


def _kinds(scheduler: Any) -> dict[str, bool]:
    """Paths of our tasks that were asked for -> whether they run direct."""
    return scheduler.__dict__.setdefault("_vlora_kinds", {})


def _learn_kinds(core: Any, path: str) -> None:
    """Ask the workers, which decided it when they loaded the tasks."""
    kinds = _kinds(core.scheduler)
    kinds.update(dict.fromkeys(core.model_executor.collective_rpc(_direct_paths)[0], True))
    kinds.setdefault(path, False)


def _direct_paths(worker: Any) -> set[str]:
    return worker.model_runner.lora_manager._adapter_manager.direct_paths()


# --- classification heads --------------------------------------------------------------------------


def _layers_left_to_stock(modules: dict[str, Any]) -> dict[str, Any]:
    """The layers that stock code sets or resets when a task of ours takes a slot."""
    return {n: layer for n, layer in modules.items() if _is_full_head(layer) or is_fused_moe(layer)}


def _is_full_head(layer: Any) -> bool:
    return hasattr(type(layer), "set_module_to_save")


def _full_heads(task: ResidentTask) -> dict[str, Any]:
    """A task's classification head as vLLM 0.32 wants it: module name -> whole weights."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in task.extra.items():
        if not is_base_embedding_weights(name):
            *_, module, part = name.split(".")
            tensors.setdefault(module, {})[part] = tensor
    if not tensors:
        return {}
    from vllm.lora.lora_weights import LoRAFullModuleWeights  # not there before 0.32

    return {
        module: LoRAFullModuleWeights(module, parts["weight"], parts.get("bias"))
        for module, parts in tensors.items()
    }


def _check_extra(checkpoint: Checkpoint, task_id: str, manager: TaskLoRAManager) -> None:
    """Refuse tensors beside the LoRA weights that this model or this vLLM cannot apply."""
    for name in checkpoint.record(task_id).extra:
        if is_base_embedding_weights(name):
            continue  # An unchanged copy of base weights; stock vLLM leaves it out as well.
        module = name.split(".")[-2] if "." in name else name
        supported: set[str] = getattr(manager, "supported_modules_to_save", set())
        if module not in supported:
            raise ModelMismatchError(
                f"{checkpoint.path}: task {task_id!r} carries {name}, which this vLLM "
                "cannot serve with this model; leave the task out of the served checkpoint"
            )


# --- what is refused or warned of at start-up ------------------------------------------------------


def _refuse_config(manager: TaskLoRAManager) -> None:
    if manager.lora_config.fully_sharded_loras:
        raise ModelMismatchError(
            "vllm-vlora does not serve --fully-sharded-loras; start vLLM without it"
        )
    from vllm.distributed import get_pp_group

    if get_pp_group().world_size > 1:
        raise ModelMismatchError(
            "vllm-vlora does not serve pipeline parallel yet; use tensor parallel instead"
        )


def _refuse_direct_config(vllm_config: Any) -> None:
    """Refuse what direct tasks were not made for, with the way out."""
    from vllm import envs

    otherwise = "leave it out, or set VLLM_VLORA_MODE=materialize"
    if vllm_config.lora_config.specialize_active_lora:
        raise ModelMismatchError(
            f"vllm-vlora does not run tasks direct with --specialize-active-lora; {otherwise}"
        )
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise ModelMismatchError(
            f"vllm-vlora does not run tasks direct with VLLM_LORA_ENABLE_DUAL_STREAM; {otherwise}"
        )


def _warn_of_base_model(checkpoint: Checkpoint, manager: TaskLoRAManager) -> None:
    trained_on = checkpoint.base_model
    served = getattr(getattr(manager.model, "config", None), "_name_or_path", "")
    if trained_on and served and trained_on != served:
        logger.warning(
            "vllm-vlora: the adapters were trained on %s, the engine serves %s; their shapes agree, "
            "their weights are not compared",
            trained_on,
            served,
        )


# --- the API server and the offline engine ---------------------------------------------------------


def _init_static_loras(
    original: Callable[..., Any], requests: Callable[[], list[LoRARequest]]
) -> Callable[..., Any]:
    @functools.wraps(original)
    async def init(self: Any) -> None:
        await original(self)
        if self.engine_client.vllm_config.lora_config is None:
            raise CheckpointError(
                "VLLM_VLORA_CHECKPOINT is set, but vLLM runs without LoRA; start it with --enable-lora"
            )
        for request in requests():
            if self.is_base_model(request.lora_name) or request.lora_name in self.lora_requests:
                raise CheckpointError(
                    f"task {request.lora_name!r} has the name of a served model or --lora-modules "
                    "adapter; give one of them another name"
                )
            self.lora_requests[request.lora_name] = request
            _loaded_paths(self.engine_client).add(request.lora_path)

    return init


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = signature.bind(self, *args, **kwargs).arguments.get("lora_request")
        path = _new_path(self, request)
        if path is not None:
            self.add_lora(request)
            _loaded_paths(self).add(path)
        return original(self, *args, **kwargs)

    return add_request


def _add_request_async(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = signature.bind(self, *args, **kwargs).arguments.get("lora_request")
        path = _new_path(self, request)
        if path is not None:
            await self.add_lora(request)
            _loaded_paths(self).add(path)
        return await original(self, *args, **kwargs)

    return add_request


def _new_path(engine: Any, request: LoRARequest | None) -> str | None:
    """The path of a request for a task of ours that this engine was not seen to load."""
    if request is None or parse_task_path(request.lora_path) is None:
        return None
    return None if request.lora_path in _loaded_paths(engine) else request.lora_path


def _loaded_paths(engine: Any) -> set[str]:
    """Paths of tasks that the workers hold; they never drop one."""
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


def _equal_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def equal(self: LoRARequest, value: object) -> bool:
        if not original(self, value):
            return False
        assert isinstance(value, LoRARequest)
        ours = parse_task_path(self.lora_path) or parse_task_path(value.lora_path)
        return ours is None or self.lora_path == value.lora_path

    return equal


# --- installing ------------------------------------------------------------------------------------


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
        requests: makes the requests of the tasks to list in ``/v1/models``.
        settings: how to run them; by default as the environment says.

    Raises:
        IncompatibleVLLMError: a seam is not as it was when the plugin was checked.
    """
    if getattr(LRUCacheWorkerLoRAManager, _PATCHED, False):
        return
    setup = Setup(checkpoint, settings or read_settings())
    patches = _patches(setup, requests)
    for target, name, value in patches:
        setattr(target, name, value)
    TaskLoRAManager.setup = setup
    setattr(LRUCacheWorkerLoRAManager, _PATCHED, True)


def _patches(setup: Setup, requests: Callable[[], list[LoRARequest]]) -> list[tuple[Any, str, Any]]:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    lru = LRUCacheWorkerLoRAManager
    load = _seam(WorkerLoRAManager, "_load_adapter", ["self", "lora_request"])
    add = _seam(lru, "add_adapter", ["self", "lora_request"])
    apply = _seam(lru, "_apply_adapters", ["self", "lora_requests"])
    dummy = _seam(WorkerLoRAManager, "add_dummy_lora", ["self", "lora_request", "rank"])
    create = _seam(lru, "create_lora_manager", ["self", "model", "vllm_config"])
    init = _seam(OpenAIServingModels, "init_static_loras", ["self"])
    add_request = _seam(LLMEngine, "add_request", None)
    add_request_async = _seam(AsyncLLM, "add_request", None)
    keys = _seam(kv_cache_utils, "_gen_lora_extra_hash_keys", ["request"])
    equal = _seam(LoRARequest, "__eq__", ["self", "value"])
    _check_manager_seams()
    for function in (add_request, add_request_async):
        if "lora_request" not in inspect.signature(function).parameters:
            raise IncompatibleVLLMError(f"{function.__qualname__} has no lora_request argument")
    patches: list[tuple[Any, str, Any]] = [
        (WorkerLoRAManager, "_load_adapter", _load_adapter(load)),
        (lru, "add_adapter", _add_adapter(add)),
        (lru, "_manager_cls", TaskLoRAManager),
        (LLMEngine, "add_request", _add_request(add_request)),
        (AsyncLLM, "add_request", _add_request_async(add_request_async)),
        (LoRARequest, "__eq__", _equal_requests(equal)),
        (kv_cache_utils, "_gen_lora_extra_hash_keys", _lora_hash_keys(keys)),
    ]
    if setup.direct:
        patches += [
            (lru, "_apply_adapters", _apply_adapters(apply)),
            (WorkerLoRAManager, "add_dummy_lora", _add_dummy_lora(dummy)),
            *_schedule_by_kind(setup),
        ]
    if setup.checkpoint is not None:
        patches.append((lru, "create_lora_manager", _create_lora_manager(create, setup.checkpoint)))
        patches.append(
            (OpenAIServingModels, "init_static_loras", _init_static_loras(init, requests))
        )
    return patches


def _check_manager_seams() -> None:
    manager = LRUCacheLoRAModelManager
    _seam(manager, "_create_lora_modules", ["self"])
    _seam(manager, "_create_merged_loras_inplace", ["self", "lora_model"])
    _seam(manager, "activate_adapter", ["self", "lora_id"])
    _seam(manager, "get_adapter", ["self", "adapter_id"])
    _seam(manager, "remove_adapter", ["self", "adapter_id"])
    _seam(manager, "set_adapter_mapping", ["self", "mapping"])
    _seam(manager, "_set_adapter_mapping", ["self", "mapping"])
    if LRUCacheWorkerLoRAManager.__dict__.get("_manager_cls") is not manager:
        raise IncompatibleVLLMError(
            "LRUCacheWorkerLoRAManager._manager_cls is not vLLM's own (another plugin?)"
        )
    if not isinstance(inspect.getattr_static(manager, "lora_slots", None), property):
        raise IncompatibleVLLMError("LoRAModelManager.lora_slots is no longer a property")


def _seam(owner: Any, name: str, parameters: list[str] | None) -> Callable[..., Any]:
    """The function at a seam, checked to have the parameters it was read with."""
    where = f"{getattr(owner, '__name__', owner)}.{name}"
    function = getattr(owner, name, None)
    if function is None:
        raise IncompatibleVLLMError(f"{where} does not exist")
    found = list(inspect.signature(function).parameters)
    if parameters is not None and found != parameters:
        raise IncompatibleVLLMError(f"{where} takes {found}, expected {parameters}")
    return function
