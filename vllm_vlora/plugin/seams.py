"""Every touch of vLLM's internals.

Checked on vLLM 0.28, 0.30 and 0.32 (``make compat`` runs the engine tests on each); 0.29 and 0.31 lie
between them. What is patched, and why there:

* ``WorkerLoRAManager._load_adapter``: a path of ours becomes a ``TaskLoRAModel`` without weights.
* ``LRUCacheWorkerLoRAManager._manager_cls``: the manager below fills slots from resident memory.
* ``LRUCacheWorkerLoRAManager.create_lora_manager``: loads the checkpoint before vLLM sizes the KV cache.
* ``LRUCacheWorkerLoRAManager.add_adapter``: an integer id that comes with another path is reloaded.
* ``OpenAIServingModels.init_static_loras``: lists every task in ``/v1/models``.
* ``LLMEngine.add_request``, ``AsyncLLM.add_request``: load a task not seen before outside the step,
  where a bad checkpoint is an error for its caller and not the end of the engine.
* ``LoRARequest.__eq__``: requests were equal when their names were, and a batch's requests are a set, so
  that an old and a new state of one task in one batch ended the engine with a KeyError.
* ``kv_cache_utils._gen_lora_extra_hash_keys``: before 0.32 the prefix cache's key was the adapter's
  name alone; for our tasks it also gets the path, which carries the content's digest.

They are attributes of classes and of one module, so names that vLLM bound at import see them too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.platforms import current_platform

from vllm_vlora.checkpoint import Checkpoint
from vllm_vlora.errors import CheckpointError, IncompatibleVLLMError, ModelMismatchError
from vllm_vlora.plugin.identity import parse_task_path
from vllm_vlora.plugin.resident import ResidentStore, ResidentTask
from vllm_vlora.plugin.slots import Run, SliceLayout, SlotWriter, View, index_runs

# A name below "vllm", so that vLLM's own handlers and format apply.
logger = init_logger("vllm.plugins.vlora")

_PATCHED = "_vlora_patched"


# --- the worker ------------------------------------------------------------------------------------


class TaskLoRAModel(LoRAModel):
    """A task as vLLM's managers hold it: an id and no weights of its own."""

    def __init__(self, lora_id: int, task: ResidentTask) -> None:
        super().__init__(lora_id, task.rank, {})
        self.task = task


class TaskLoRAManager(LRUCacheLoRAModelManager):
    """vLLM's manager, whose slots are filled from resident tasks where the adapter is one.

    Ordinary PEFT adapters take the stock path throughout.
    """

    _creating = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writer: SlotWriter | None = None
        self.vlora_store = ResidentStore(
            self.device, functools.partial(_engine_name, self), self._check
        )

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

    def activate_adapter(self, lora_id: int) -> bool:
        model = self.get_adapter(lora_id)
        if not isinstance(model, TaskLoRAModel):
            return super().activate_adapter(lora_id)
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
            self._writer = SlotWriter(_read_layouts(self), self.lora_config.max_lora_rank)
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

    def preload(self, folder: str) -> None:
        """Load the engine's checkpoint at start-up and say what it takes."""
        store = self.vlora_store
        checkpoint = store.preload(folder)
        for task in store.tasks():
            self._make_model(1, task)  # A head that does not fit is refused here and not in a step.
        _warn_of_base_model(checkpoint, self)
        logger.info(
            "vllm-vlora: %s: %d tasks resident on %s, %.1f MiB, loaded in %.2f s",
            checkpoint.path,
            len(store),
            self.device,
            store.nbytes / 2**20,
            store.seconds,
        )

    def _check(self, checkpoint: Checkpoint, task_ids: Iterable[str]) -> None:
        _refuse_config(self)
        task_ids = list(task_ids)
        self.writer.check(checkpoint, task_ids, functools.partial(_engine_name, self))
        for task_id in task_ids:
            _check_extra(checkpoint, task_id, self)


def _load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any, lora_request: LoRARequest) -> LoRAModel:
        if parse_task_path(lora_request.lora_path) is None:
            return original(self, lora_request)
        return self._adapter_manager.task_model(lora_request)

    return load


def _add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add(self: LRUCacheWorkerLoRAManager, lora_request: LoRARequest) -> bool:
        held = self._adapter_manager.get_adapter(lora_request.lora_int_id)
        path = held.task.path if isinstance(held, TaskLoRAModel) else None
        ours = parse_task_path(lora_request.lora_path) is not None
        if held is not None and (path or ours) and path != lora_request.lora_path:
            self.remove_adapter(lora_request.lora_int_id)
        return original(self, lora_request)

    return add


def _create_lora_manager(original: Callable[..., Any], checkpoint: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        # Before vLLM measures free memory, so that the KV cache is sized around it.
        self._adapter_manager.preload(checkpoint)
        return model

    return create


# --- reading vLLM's layers -------------------------------------------------------------------------


def _read_layouts(manager: TaskLoRAManager) -> list[SliceLayout]:
    """Describe every slice of every LoRA layer of this rank."""
    layouts: list[SliceLayout] = []
    for module_name, layer in manager.modules.items():
        kind = type(layer).__name__
        if _is_fused_moe(layer):
            continue  # No job can fill one; a checkpoint with such modules is refused by name.
        parts = manager.packed_modules.get(module_name, [module_name])
        if kind == "LogitsProcessorWithLoRA":
            layouts.append(_logits_layout(parts[0], layer))
        elif kind == "VocabParallelEmbeddingWithLoRA":
            layouts.append(_embedding_layout(parts[0], layer))
        else:
            layouts += _linear_layouts(parts, layer)
    return layouts


def _layers_left_to_stock(modules: dict[str, Any]) -> dict[str, Any]:
    """The layers that stock code sets or resets when a task of ours takes a slot."""
    return {
        n: layer for n, layer in modules.items() if _is_full_head(layer) or _is_fused_moe(layer)
    }


def _is_fused_moe(layer: Any) -> bool:
    return type(layer).__name__.startswith("FusedMoE")


def _engine_name(manager: TaskLoRAManager, name: str) -> str:
    """An adapters' module name as this model class has it, by vLLM's own rules."""
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        rename = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper
        mapper = rename()
    try:
        mapped, _ = parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", mapper)
    except ValueError as error:
        raise ModelMismatchError(f"the served model has no module {name} ({error})") from error
    if manager.is_pooling_model and not _has_module(manager, mapped):
        # Adapters of a bare backbone lack the prefix that vLLM's pooling models have.
        prefixed = f"model.{mapped}"
        return prefixed if _has_module(manager, prefixed) else mapped
    return mapped


def _has_module(manager: TaskLoRAManager, name: str) -> bool:
    packed = manager.packed_modules
    return any(name in packed.get(module, [module]) for module in manager.modules)


def _linear_layouts(names: list[str], layer: Any) -> list[SliceLayout]:
    if len(names) != layer.n_slices:
        # A group such as in_proj_qkv + in_proj_z over four slices; no checkpoint module is matched to
        # it, so a checkpoint that adapts one is refused by name.
        names = [f"{names[0]}.slice_{i}" for i in range(layer.n_slices)]
    stacks = list(zip(layer.lora_a_stacked, layer.lora_b_stacked))
    full = [_full_shape(layer, i, a.shape[3], b.shape[2]) for i, (a, b) in enumerate(stacks)]
    kept_a, kept_b = _kept_columns(layer, full)
    return [
        SliceLayout(
            name,
            functools.partial(_slot_rows, a),
            functools.partial(_slot_columns, b),
            d_in,
            d_out,
            index_runs(kept_a[i]),
            index_runs(kept_b[i]),
        )
        for i, (name, (a, b), (d_in, d_out)) in enumerate(zip(names, stacks, full))
    ]


def _slot_rows(stack: torch.Tensor, slot: int) -> torch.Tensor:
    return stack[slot, 0]


def _slot_columns(stack: torch.Tensor, slot: int) -> torch.Tensor:
    return stack[slot, 0].T


def _full_shape(layer: Any, index: int, width_in: int, width_out: int) -> tuple[int, int]:
    """(d_in, d_out) of a slice over all tensor-parallel ranks."""
    if layer.tp_size == 1:
        return width_in, width_out
    base = layer.base_layer
    if type(layer).__name__.startswith("RowParallel"):
        return width_in * layer.tp_size, width_out
    if type(layer).__name__.startswith("Replicated"):
        return width_in, width_out
    replicas = getattr(base, "num_kv_head_replicas", 1) if index > 0 else 1
    return width_in, width_out * layer.tp_size // replicas


def _kept_columns(
    layer: Any, full: list[tuple[int, int]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ask the layer itself which columns of A and rows of B it keeps, by slicing their numbers."""
    a = [torch.arange(d_in).view(1, -1) for d_in, _ in full]
    b = [torch.arange(d_out).view(-1, 1) for _, d_out in full]
    if layer.tp_size > 1:
        many = len(full) > 1
        a = layer.slice_lora_a(a) if many else [layer.slice_lora_a(a[0])]
        b = layer.slice_lora_b(b) if many else [layer.slice_lora_b(b[0])]
    return [t.reshape(-1) for t in a], [t.reshape(-1) for t in b]


def _logits_layout(name: str, layer: Any) -> SliceLayout:
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    return _whole_layout(name, functools.partial(_slot_rows, a), b, a.shape[3])


def _embedding_layout(name: str, layer: Any) -> SliceLayout:
    # vLLM keeps an embedding's A transposed, (vocabulary, rank), to look rows up.
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    return _whole_layout(name, lambda slot: a[slot].T, b, a.shape[1])


def _whole_layout(name: str, view_a: View, b: torch.Tensor, d_in: int) -> SliceLayout:
    """A layer that every rank holds whole and whose vocabulary may be padded."""
    d_out = b.shape[2]
    return SliceLayout(
        name,
        view_a,
        functools.partial(_slot_columns, b),
        d_in,
        d_out,
        (Run(0, 0, d_in),),
        (Run(0, 0, d_out),),
        at_most=True,
    )


# --- classification heads --------------------------------------------------------------------------


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


def install(checkpoint: str | None, requests: Callable[[], list[LoRARequest]]) -> None:
    """Patch this process; does nothing the second time.

    Everything is looked up and checked first and set afterwards, so that a changed vLLM is left as
    it was.

    Args:
        checkpoint: folder of the checkpoint to preload, or None.
        requests: makes the requests of the tasks to list in ``/v1/models``.

    Raises:
        IncompatibleVLLMError: a seam is not as it was when the plugin was checked.
    """
    if getattr(LRUCacheWorkerLoRAManager, _PATCHED, False):
        return
    for target, name, value in _patches(checkpoint, requests):
        setattr(target, name, value)
    setattr(LRUCacheWorkerLoRAManager, _PATCHED, True)


def _patches(
    checkpoint: str | None, requests: Callable[[], list[LoRARequest]]
) -> list[tuple[Any, str, Any]]:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    lru = LRUCacheWorkerLoRAManager
    load = _seam(WorkerLoRAManager, "_load_adapter", ["self", "lora_request"])
    add = _seam(lru, "add_adapter", ["self", "lora_request"])
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
    if checkpoint is not None:
        patches.append((lru, "create_lora_manager", _create_lora_manager(create, checkpoint)))
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
