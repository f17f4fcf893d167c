"""Every place of vLLM that the plugin replaces, overrides, calls or reads, in one table.

``seams.install`` checks it before it patches anything; ``python -m vllm_vlora.plugin`` prints it.
Checked on vLLM 0.28, 0.30, 0.32 and 0.33 (``make compat`` runs the engine tests on each); 0.29 and 0.31
lie between them. What each release changed at these places is in ``docs/versions.md``. Nothing of vLLM is
imported here before a seam is looked up, so that the table can be read whatever vLLM there is.

What is replaced are attributes of classes and of one module, so names that vLLM bound at import see
the new ones too. A layer's ``punica_wrapper`` is replaced through its own ``set_mapping``.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vllm_vlora.errors import IncompatibleVLLMError

CHAT_REQUESTS = (
    ("openai.chat_completion", "ChatCompletionRequest"),
    ("openai.responses", "ResponsesRequest"),
    ("pooling.base", "ChatRequestOptionsMixin"),
    ("serve.tokenize", "TokenizeChatRequest"),
)
"""Where requests that hold a chat are defined, and their classes."""


class MissingSeamError(IncompatibleVLLMError):
    """A seam, or the module or class that had it, is not there."""


@dataclass(frozen=True)
class Place:
    """Where a seam was found: ``getattr(owner, attribute)`` is ``value``.

    ``value`` is None for what only an instance holds.
    """

    owner: Any
    attribute: str
    value: Any


@dataclass(frozen=True)
class Seam:
    """One place of vLLM.

    Attributes:
        module: dotted name of the module.
        name: what of it: ``Class``, ``Class.attribute`` or ``function``. An attribute may also be one
            that the class's methods set on its instances.
        why: what the plugin does there.
        takes: names of all its parameters, in order; None where they do not matter.
        accepts: names of parameters that must be among them.
        is_property: it must be a property.
        is_class: ``module.Class`` that it must be.
        direct: only direct tasks need it.
        limits: only limits, fair sharing and slots that are fewer than adapters need it.
        optional: a supported version may lack it.
    """

    module: str
    name: str
    why: str
    takes: tuple[str, ...] | None = None
    accepts: tuple[str, ...] = ()
    is_property: bool = False
    is_class: str = ""
    direct: bool = False
    limits: bool = False
    optional: bool = False

    def __str__(self) -> str:
        if self.takes is not None:
            return f"{self.name}({', '.join(self.takes)})"
        return f"{self.name}(..., {', '.join(self.accepts)})" if self.accepts else self.name

    def find(self) -> Place:
        """The seam in the installed vLLM, checked.

        Raises:
            MissingSeamError: it is not there.
            IncompatibleVLLMError: it is there, and is not what the plugin was written for.
        """
        *path, attribute = self.name.split(".")
        owner = self._owner(path)
        if not hasattr(owner, attribute):
            if path and self.takes is None and _instances_hold(owner, attribute):
                return Place(owner, attribute, None)
            raise MissingSeamError(f"{_name(owner)}.{attribute} does not exist")
        place = Place(owner, attribute, getattr(owner, attribute))
        self._check(place)
        return place

    def _owner(self, path: list[str]) -> Any:
        try:
            owner: Any = import_module(self.module)
        except ImportError as error:
            raise MissingSeamError(f"{self.module} cannot be imported ({error})") from error
        for part in path:
            if not hasattr(owner, part):
                raise MissingSeamError(f"{_name(owner)}.{part} does not exist")
            owner = getattr(owner, part)
        return owner

    def _check(self, place: Place) -> None:
        where = f"{_name(place.owner)}.{place.attribute}"
        if self.takes is not None:
            found = list(inspect.signature(place.value).parameters)
            if found != list(self.takes):
                raise IncompatibleVLLMError(f"{where} takes {found}, expected {list(self.takes)}")
        if self.accepts:
            parameters = inspect.signature(place.value).parameters
            for name in self.accepts:
                if name not in parameters:
                    raise IncompatibleVLLMError(f"{where} has no {name} argument")
        if self.is_property and not isinstance(
            inspect.getattr_static(place.owner, place.attribute), property
        ):
            raise IncompatibleVLLMError(f"{where} is no longer a property")
        if self.is_class and _dotted(place.value) != self.is_class:
            raise IncompatibleVLLMError(f"{where} is not vLLM's own (another plugin?)")


def find_seams(direct: bool, limits: bool = False) -> dict[str, Place]:
    """The place of every seam by its name; those that only direct tasks or limits need where these are
    wanted.

    Raises:
        IncompatibleVLLMError: the first that is missing or changed.
    """
    wanted = [
        seam
        for seam in SEAMS
        if (direct or not seam.direct) and (limits or not seam.limits) and not seam.optional
    ]
    return {seam.name: seam.find() for seam in wanted}


def _name(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)


def _dotted(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def _instances_hold(owner: Any, attribute: str) -> bool:
    """Whether a class declares an attribute for its instances, or a method of it sets one."""
    for kind in inspect.getmro(owner) if inspect.isclass(owner) else ():
        if attribute in inspect.get_annotations(kind) or any(
            step.opname == "STORE_ATTR" and step.argval == attribute
            for function in vars(kind).values()
            if inspect.isfunction(function)
            for step in dis.get_instructions(inspect.unwrap(function))
        ):
            return True
    return False


# --- the table ------------------------------------------------------------------------------------

_LAYERS = "vllm.lora.layers"
_LINEAR = "vllm.lora.layers.base_linear"
_MOE_CONFIG = "vllm.model_executor.layers.fused_moe.config"
_MANAGER = "vllm.lora.model_manager"
_WORKER = "vllm.lora.worker_manager"
_REQUEST = "vllm.lora.request"
_RESOLVER = "vllm.lora.resolver"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_CORE = "vllm.v1.engine.core"
_CLIENT = "vllm.v1.engine.core_client"
_SERVING = "vllm.entrypoints.openai.models.serving"
_BASE_SERVING = "vllm.entrypoints.serve.engine.serving"
_PUNICA = "vllm.lora.punica_wrapper.punica_base"
_MIXIN = "vllm.v1.worker.lora_model_runner_mixin"
_GPU_WORKER = "vllm.v1.worker.gpu_worker"
_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"


def _replaced() -> Iterator[Seam]:
    """What is patched, whose parameters are those that the new function has."""
    yield Seam(
        _WORKER,
        "WorkerLoRAManager._load_adapter",
        "a path of ours becomes a model without weights",
        ("self", "lora_request"),
    )
    yield Seam(
        _WORKER,
        "LRUCacheWorkerLoRAManager._manager_cls",
        "our manager holds direct tasks, and fills slots from resident memory for the others",
        is_class=f"{_MANAGER}.LRUCacheLoRAModelManager",
    )
    yield Seam(
        _WORKER,
        "LRUCacheWorkerLoRAManager.create_lora_manager",
        "the checkpoint is loaded before vLLM sizes the KV cache",
        ("self", "model", "vllm_config"),
    )
    yield Seam(
        _WORKER,
        "LRUCacheWorkerLoRAManager.add_adapter",
        "an integer id that comes with another path is reloaded",
        ("self", "lora_request"),
    )
    yield Seam(
        _WORKER,
        "LRUCacheWorkerLoRAManager._apply_adapters",
        "a batch's direct tasks are not counted against slots",
        ("self", "lora_requests"),
    )
    yield Seam(
        _WORKER,
        "WorkerLoRAManager.add_dummy_lora",
        "warm-up adapters beyond the slots are direct tasks",
        ("self", "lora_request", "rank"),
    )
    why = "ends requests whose task is on its way too"
    yield Seam(_SCHEDULER, "Scheduler.add_request", why, ("self", "request"))
    yield Seam(
        _SCHEDULER, "Scheduler.finish_requests", why, ("self", "request_ids", "finished_status")
    )
    yield Seam(
        _CORE,
        "EngineCore.add_request",
        "waits for its task",
        ("self", "request", "request_wave"),
    )
    yield Seam(
        _CORE,
        "EngineCore.add_lora",
        "its task is brought to the device before it",
        ("self", "lora_request"),
    )
    yield Seam(
        _CORE,
        "EngineCore.abort_requests",
        "lets requests in whose task has come: it is what wakes the loop",
        ("self", "request_ids"),
    )
    yield Seam(
        _CORE,
        "EngineCoreProc.has_work",
        "an engine core that is told to end serves those whose task is on its way",
        ("self",),
    )
    for name in ("pin_lora", "remove_lora"):
        yield Seam(
            _CORE, f"EngineCore.{name}", "a pinned task does not give way", ("self", "lora_id")
        )
    for name in ("generate", "encode"):
        yield Seam(
            "vllm.v1.engine.async_llm",
            f"AsyncLLM.{name}",
            "asks again for a task that was published while the request was on its way",
            accepts=("prompt", "request_id", "lora_request"),
        )
    yield Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor._get_mm_identifier",
        "what a task's tower made of an image is kept under its content's digest too",
        ("self", "mm_hash", "lora_request"),
    )
    yield Seam(
        _CORE,
        "EngineCore.sleep",
        "level 2, which would lose the checkpoint's tasks, is refused; others leave the device first",
        accepts=("level",),
    )
    yield Seam(
        _MIXIN,
        "LoRAModelRunnerMixin.load_lora_model",
        "the runner is told of a third graph",
        ("self", "model", "vllm_config", "device"),
        direct=True,
    )
    yield Seam(
        _MIXIN,
        "LoRAModelRunnerMixin.maybe_select_dummy_loras",
        "for which kind of batches a graph is captured",
        ("self", "lora_config", "num_scheduled_tokens", "mapping_type", "num_sampled_tokens",
         "num_active_loras"),
        direct=True,
    )  # fmt: skip
    yield Seam(
        _SERVING,
        "OpenAIServingModels.init_static_loras",
        "lists in /v1/models every task that the workers hold",
        ("self",),
    )
    yield Seam(
        "vllm.entrypoints.serve.instrumentator.metrics",
        "attach_router",
        "/metrics shows what the engine cores count of our tasks",
        ("app",),
    )
    yield Seam(
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger.__init__",
        "a series for each of the newest combinations of running adapters, not for all that ever were",
        ("self", "vllm_config", "engine_indexes"),
    )
    processor = "vllm.v1.engine.output_processor"
    yield Seam(
        processor,
        "OutputProcessor.do_tracing",
        "a request's span names its task",
        ("self", "engine_core_output", "req_state", "iteration_stats"),
    )
    yield Seam(
        processor, "instrument_manual", "a request's span names its task", accepts=("attributes",)
    )
    for module, owner in CHAT_REQUESTS:
        yield Seam(
            f"vllm.entrypoints.{module}.protocol",
            f"{owner}.build_chat_params",
            "renders a chat with its task's template, where that is asked for",
            accepts=("default_template",),
        )
    yield Seam(
        "vllm.v1.utils",
        "RustFrontendProcessManager.__init__",
        "the Rust frontend lists every task, which it is given as --lora-modules",
        accepts=("args",),
    )
    # Inside the step a bad checkpoint would be the end of the engine.
    yield Seam(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.add_request",
        "a new task is loaded outside the step, where a bad checkpoint is its caller's error",
        accepts=("lora_request",),
    )
    # A batch's requests are a set, so that two states of one task ended the engine with a KeyError.
    yield Seam(
        _REQUEST,
        "LoRARequest.__eq__",
        "requests of one name and two states of a task are not equal",
        ("self", "value"),
    )
    yield Seam(
        "vllm.v1.core.kv_cache_utils",
        "_gen_lora_extra_hash_keys",
        "our tasks' prefix-cache keys get the content's digest; before 0.31 a key was the name alone",
        ("request",),
    )


def _overridden() -> Iterator[Seam]:
    """Methods of vLLM's manager that ours has under the same name, and what it asks of its parent."""
    methods: dict[str, tuple[str, ...]] = {
        "_create_lora_modules": ("self",),
        "_create_merged_loras_inplace": ("self", "lora_model"),
        "activate_adapter": ("self", "lora_id"),
        "get_adapter": ("self", "adapter_id"),
        "remove_adapter": ("self", "adapter_id"),
        "set_adapter_mapping": ("self", "mapping"),
        "_set_adapter_mapping": ("self", "mapping"),
        "list_adapters": ("self",),
        "remove_all_adapters": ("self",),
        "pin_adapter": ("self", "lora_id"),
    }
    for name, takes in methods.items():
        yield Seam(_MANAGER, f"LRUCacheLoRAModelManager.{name}", "direct tasks beside slots", takes)
    yield Seam(
        _MANAGER,
        "LRUCacheLoRAModelManager.__init__",
        "stock code is given few slots",
        accepts=("lora_config", "vllm_config"),
    )
    yield Seam(
        _MANAGER,
        "LoRAModelManager.lora_slots",
        "one slot more on CPU, where punica takes -1 for the last one",
        is_property=True,
    )
    yield Seam(
        _RESOLVER,
        "LoRAResolver.resolve_lora",
        "finds tasks that were published later",
        ("self", "base_model_name", "lora_name"),
    )

    interface = "vllm.plugins.endpoint_plugins.interface"
    for name, takes in (
        ("attach_router", ("self", "app")),
        ("init_state", ("self", "engine_client", "state", "args")),
    ):
        yield Seam(interface, f"EndpointPlugin.{name}", "/v1/vlora/tasks", takes, optional=True)


def _called() -> Iterator[Seam]:
    """Functions and classes that are called or asked for."""
    adapter_ids = ("self", "adapter_id")
    yield Seam(_WORKER, "LRUCacheWorkerLoRAManager.remove_adapter", "reloads an id", adapter_ids)
    yield Seam(
        "vllm.lora.lora_model",
        "LoRAModel",
        "what a task is to vLLM's managers",
        accepts=("lora_model_id", "rank", "loras"),
    )
    for name in ("lora_name", "lora_int_id", "lora_path"):
        yield Seam(_REQUEST, f"LoRARequest.{name}", "a task's name, number and path")
    yield Seam(
        _BASE_SERVING,
        "BaseServing._get_message_types",
        "the kinds of parts that a chat has",
        ("self", "request"),
    )
    yield Seam(
        _BASE_SERVING,
        "BaseServing._is_model_supported",
        "whether a name is for no adapter to answer",
        ("self", "model_name"),
    )
    yield Seam(
        _LAYERS,
        "LoRAMapping",
        "the batch's mapping without its direct tasks",
        ("index_mapping", "prompt_mapping", "is_prefill", "type"),
    )
    yield Seam(_LAYERS, "LoRAMappingType.LANGUAGE", "direct tasks are the language model's alone")
    yield Seam(
        "vllm.lora.utils",
        "parse_fine_tuned_lora_name",
        "a module's name as the served model has it",
        ("name", "weights_mapper"),
    )
    yield Seam(
        "vllm.entrypoints.openai.models.protocol",
        "LoRAModulePath",
        "a task for the Rust frontend",
        accepts=("name", "path"),
    )
    yield Seam(_RESOLVER, "LoRAResolverRegistry.get_supported_resolvers", "is ours there?", ())
    yield Seam(
        _RESOLVER,
        "LoRAResolverRegistry.register_resolver",
        "our resolver",
        ("resolver_name", "resolver"),
    )
    yield Seam(
        _SERVING,
        "OpenAIServingModels.is_base_model",
        "names that are taken",
        ("self", "model_name"),
    )
    for module, owner in (("llm_engine", "LLMEngine"), ("async_llm", "AsyncLLM")):
        yield Seam(
            f"vllm.v1.engine.{module}",
            f"{owner}.add_lora",
            "loads a task in the workers",
            ("self", "lora_request"),
        )
    yield Seam(
        "vllm.v1.executor.abstract",
        "Executor.collective_rpc",
        "asks the workers; for a task nobody waits for the answer while steps go on",
        accepts=("method", "args", "non_block"),
    )
    yield Seam(
        "vllm.v1.engine.exceptions", "EngineDeadError", "is not taken for a load that failed"
    )
    yield Seam(
        _CLIENT,
        "AsyncMPClient._call_utility_async",
        "asks each engine core which tasks its workers serve, and whether others were published",
        accepts=("method", "engine"),
    )
    yield Seam(
        _CLIENT,
        "SyncMPClient.call_utility",
        "gives an engine core a task from memory",
        accepts=("method",),
    )
    yield Seam(
        "vllm.v1.engine",
        "EngineCoreRequestType.ABORT",
        "wakes an engine core's loop",
    )
    yield Seam(_CORE, "EngineCoreProc.is_running", "does it accept requests, or end?", ("self",))
    yield Seam("vllm.v1.executor.abstract", "Executor.is_sleeping", "is there memory for tasks?")
    yield Seam("vllm.v1.executor.abstract", "Executor.sleep", "when is it lost?", ("self", "level"))
    yield Seam(
        "vllm.v1.executor.abstract", "Executor.wake_up", "when is it there?", ("self", "tags")
    )
    yield Seam("vllm.v1.executor.abstract", "Executor.uses_ray", "does it keep its promises?")
    yield Seam("vllm.v1.executor.multiproc_executor", "MultiprocExecutor", "on Ray, too?")
    yield Seam(_CORE, "EngineCore.batch_queue", "do steps go on?")
    yield Seam(_SCHEDULER, "Scheduler.has_requests", "do steps go on?", ("self",))
    yield Seam(
        _CORE,
        "EngineCoreProc.input_queue",
        "where it is woken; an engine core without one is its caller's",
    )
    yield Seam(
        "vllm.renderers.base",
        "BaseRenderer.get_tokenizer",
        "the text of a prompt in token ids, for a router",
        ("self",),
    )
    yield Seam(
        "vllm.v1.metrics.prometheus",
        "get_prometheus_registry",
        "where vLLM's own metrics are",
        (),
    )
    yield Seam("vllm.distributed", "get_pp_group", "what other pipeline ranks have", ())
    yield Seam("vllm.platforms", "current_platform.is_cpu", "what is done on CPU alone", ())
    yield Seam("vllm.utils.gpu_sync_debug", "gpu_sync_allowed", "finds the rows of a slot")
    yield Seam("vllm.envs", "VLLM_BATCH_INVARIANT", "refused in direct mode", direct=True)
    yield Seam("vllm.envs", "environment_variables", "ours are entered: vLLM warns of others")
    yield Seam(
        "vllm.lora.lora_weights",
        "LoRAFullModuleWeights",
        "classification heads; from 0.31 on",
        ("module_name", "weight", "bias"),
        optional=True,
    )
    for name in ("get_rename_mapper", "get_unstacked_mapper"):
        yield Seam(
            "vllm.model_executor.models.utils",
            f"WeightsMapper.{name}",
            "a module's name as the served model has it; one of the two is enough",
            ("self",),
            optional=True,
        )
    for name, since in (
        ("_validate_modules_to_save", "in 0.31 and 0.32"),
        ("_validate_token_classification_lora", "in 0.31 and 0.32"),
        ("_validate_classification_head_lora", "from 0.33 on"),
    ):
        yield Seam(
            _MANAGER,
            f"LoRAModelManager.{name}",
            f"checks of classification heads; {since}",
            ("self", "lora_model"),
            optional=True,
        )


def _layers() -> Iterator[Seam]:
    """LoRA layers, which ``layers`` reads and tells apart, and punica, which they call."""
    yield Seam(_LINEAR, "BaseLinearLayerWithLoRA", "layers that may run direct")
    kinds = {
        "RowParallelLinearWithLoRA": "its A is cut among tensor-parallel ranks",
        "ReplicatedLinearWithLoRA": "nothing of it is cut",
        "LogitsProcessorWithLoRA": "lm_head, materialized",
        "VocabParallelEmbeddingWithLoRA": "embeddings, materialized",
        "FusedMoEWithLoRA": "fused experts, materialized",
        "FusedMoE3DWithLoRA": "fused experts with gate and up as one, refused",
    }
    for name, why in kinds.items():
        yield Seam(_LAYERS, name, why)
    for name in (
        "w13_lora_a_stacked",
        "w13_lora_b_stacked",
        "w2_lora_a_stacked",
        "w2_lora_b_stacked",
    ):
        yield Seam(_LAYERS, f"FusedMoEWithLoRA.{name}", "slots of experts")
    for name, takes in (("_slice_w13_b", "w13_lora_b"), ("_slice_w2_a", "w2_lora_a")):
        yield Seam(_LAYERS, f"FusedMoEWithLoRA.{name}", "what a rank keeps", ("self", takes))
    yield Seam(
        _LAYERS, "FusedMoEWithLoRA.reset_lora", "empties a slot of experts", ("self", "index")
    )
    yield Seam(_LAYERS, "FusedMoEWithLoRA.adapter_enabled", "says which slots adapt experts")
    for name in ("enable_moe_shared_loras", "fully_sharded"):
        yield Seam(_LAYERS, f"FusedMoEWithLoRA.{name}", "refused for experts")
    for name in ("ep_rank", "global_num_experts", "local_num_experts", "moe_config", "tp_size"):
        yield Seam(_LAYERS, f"FusedMoEWithLoRA.{name}", "shapes of experts")
    yield Seam(_MOE_CONFIG, "FusedMoEConfig.moe_parallel_config", "which experts a rank has")
    yield Seam(
        "vllm.config",
        "ParallelConfig.expert_placement_strategy",
        "refused for experts",
        optional=True,
    )
    for name in ("hidden_dim", "intermediate_size_per_partition"):
        for suffix in ("", "_unpadded"):
            yield Seam(_MOE_CONFIG, f"FusedMoEConfig.{name}{suffix}", "shapes of experts")
    column = "ColumnParallelLinearWithLoRA"
    for name in ("lora_a_stacked", "lora_b_stacked"):
        yield Seam(_LINEAR, f"BaseLinearLayerWithLoRA.{name}", "slots")
        for owner in ("LogitsProcessorWithLoRA", "VocabParallelEmbeddingWithLoRA"):
            yield Seam(_LAYERS, f"{owner}.{name}", "slots")
    for name, takes in (("slice_lora_a", "lora_a"), ("slice_lora_b", "lora_b")):
        yield Seam(_LAYERS, f"{column}.{name}", "what a rank keeps", ("self", takes))
    for name in ("n_slices", "output_slices", "output_size", "tp_size", "base_layer"):
        yield Seam(_LAYERS, f"{column}.{name}", "shapes")
    yield Seam(
        _LAYERS,
        "BaseLayerWithLoRA.set_mapping",
        "puts us before punica",
        ("self", "punica_wrapper"),
    )
    yield Seam(_LAYERS, "BaseLayerWithLoRA.punica_wrapper", "what we forward to")
    yield Seam(
        _PUNICA,
        "PunicaWrapperBase.add_lora_linear",
        "stock adapters, then direct tasks",
        accepts=("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
    )
    yield Seam(
        _PUNICA,
        "PunicaWrapperBase.add_lora_embedding",
        "left out on CPU without stock adapters",
    )
    yield Seam(
        _PUNICA,
        "PunicaWrapperBase.add_lora_logits",
        "an own one on CPU, and wherever prompts are scored",
        accepts=("y", "x", "lora_a_stacked", "lora_b_stacked", "scale"),
    )
    for name in ("token_lora_indices", "sampler_indices", "_embeddings_indices"):
        yield Seam(_PUNICA, f"PunicaWrapperBase.{name}", "whose row it is")
    why = "batches without adapters in slots are told once"
    yield Seam(
        _PUNICA, "PunicaWrapperBase.update_metadata", why, accepts=("mapping", "lora_index_to_id")
    )
    for name in ("indices_len", "is_prefill", "_token_lora_indices", "_sampler_indices"):
        yield Seam(_PUNICA, f"PunicaWrapperBase.{name}", why)
    gpu = "vllm.lora.punica_wrapper.punica_gpu"
    yield Seam(gpu, "PunicaWrapperGPU.token_mapping_meta", why)


def _held() -> Iterator[Seam]:
    """What instances hold and is read or set."""
    for name in ("device", "is_pooling_model", "lora_config", "lora_index_to_id", "_last_mapping",
                 "max_num_batched_tokens", "mm_mapping", "model", "modules", "packed_modules",
                 "punica_wrapper_mapping", "supports_mm"):  # fmt: skip
        yield Seam(_MANAGER, f"LoRAModelManager.{name}", "read by our manager")
    yield Seam(
        _MANAGER, "LoRAModelManager.supported_modules_to_save", "heads; from 0.31 on", optional=True
    )
    yield Seam(
        "vllm.lora.lora_model", "LoRAModel.modules_to_save", "heads; from 0.31 on", optional=True
    )
    yield Seam(
        "vllm.model_executor.models.module_mapping",
        "MultiModelKeys.language_model",
        "the language model's punica",
    )
    yield Seam(_MANAGER, "DEFAULT_LANGUAGE_WRAPPER_KEY", "the language model's punica")
    yield Seam(_WORKER, "WorkerLoRAManager._adapter_manager", "our manager")
    for name in ("engine_client", "lora_requests"):
        yield Seam(_SERVING, f"OpenAIServingModels.{name}", "lists every task in /v1/models")
    for name in ("base_model_paths", "renderer"):
        yield Seam(_SERVING, f"OpenAIServingModels.{name}", "what a router's request becomes")
    yield Seam(_SCHEDULER, "Scheduler.lora_config", "slots", limits=True)
    yield Seam(_SCHEDULER, "Scheduler.requests", "requests inside")
    yield Seam(
        "vllm.v1.engine.llm_engine", "LLMEngine.engine_core", "its client of the engine core"
    )
    yield Seam("vllm.v1.engine.async_llm", "AsyncLLM.engine_core", "its client of the engine cores")
    yield Seam("vllm.v1.engine.llm_engine", "LLMEngine.vllm_config", "has it LoRA?")
    yield Seam("vllm.entrypoints.llm", "LLM.llm_engine", "the engine that is given a task")
    yield Seam(
        _CLIENT, "EngineCoreClient.shutdown", "ends one that has answered", ("self", "timeout")
    )
    yield Seam(_CLIENT, "MPClient.core_engines", "the engine cores that are asked for their tasks")
    yield Seam(_CLIENT, "InprocClient.engine_core", "an engine core in process")
    for name in ("scheduler", "model_executor"):
        yield Seam(_CORE, f"EngineCore.{name}", "asks the workers")
    yield Seam("vllm.v1.engine.output_processor", "RequestState.lora_request", "whose span it is")
    for name in ("request_id", "lora_request", "client_index"):
        yield Seam("vllm.v1.request", f"Request.{name}", "whose request it is")
    yield Seam("vllm.config", "CacheConfig.kv_cache_memory_bytes", "is memory measured?")
    yield Seam(
        _MIXIN,
        "LoRAModelRunnerMixin.lora_manager",
        "our manager, in a worker",
    )
    yield Seam(
        "vllm.config",
        "CompilationConfig.cudagraph_specialize_lora",
        "whether there are graphs without adapters",
        direct=True,
    )
    yield Seam("vllm.v1.worker.worker_base", "WorkerBase.model_runner", "our manager, in a worker")
    for name in ("max_loras", "max_lora_rank", "fully_sharded_loras", "specialize_active_lora"):
        yield Seam("vllm.config", f"LoRAConfig.{name}", "slots, ranks, what is refused")
    for name in (
        "additional_config",
        "cache_config",
        "compilation_config",
        "lora_config",
        "model_config",
        "parallel_config",
    ):
        yield Seam("vllm.config", f"VllmConfig.{name}", "what the engine was started with")
    why = "which layers see all of a batch's tokens"
    for name in ("prefill_context_parallel_size", "use_sequence_parallel_moe", "use_ubatching"):
        yield Seam("vllm.config", f"ParallelConfig.{name}", why, direct=True)
    yield Seam("vllm.config", "CacheConfig.kv_sharing_fast_prefill", why, direct=True)
    yield Seam("vllm.config", "ModelConfig.is_encoder_decoder", why)
    for name in ("supports_multimodal", "SupportsMultiModal.get_language_model"):
        yield Seam("vllm.model_executor.models.interfaces", name, why)
    mixer = "vllm.model_executor.layers.mamba.mamba_mixer"
    for name in ("x_proj", "dt_proj"):
        yield Seam(mixer, f"MambaMixer.{name}", why, optional=True)
    yield Seam("vllm.config", "ModelConfig.dtype", "dtype of the bases on the device")
    yield Seam(
        "vllm.config", "ModelConfig.served_model_name", "names the model in metrics and weights"
    )
    yield Seam(
        "vllm.config",
        "CompilationConfig.max_cudagraph_capture_size",
        "the longest batch",
        optional=True,
    )
    yield Seam("vllm.v1.engine.async_llm", "AsyncLLM.vllm_config", "is there --enable-lora?")
    for name in ("world_size", "cpu_group"):
        yield Seam(
            "vllm.distributed.parallel_state",
            f"GroupCoordinator.{name}",
            "what other pipeline ranks have",
        )


def _runner_v1() -> Iterator[Seam]:
    """What gives batches of direct tasks alone a graph of their own in vLLM's first model runner."""
    dispatcher = "vllm.v1.cudagraph_dispatcher"
    why = "a third graph, for direct tasks alone"
    takes = {"_get_lora_cases": ("self",), "specialize_lora_count": None}
    for name, parameters in takes.items():
        yield Seam(dispatcher, f"CudagraphDispatcher.{name}", why, parameters, optional=True)
    yield Seam(
        _RUNNER_V1,
        "GPUModelRunner._determine_batch_execution_and_padding",
        "which graph a batch uses",
        accepts=("force_num_active_loras",),
        optional=True,
    )
    for name in ("cudagraph_dispatcher", "input_batch"):
        yield Seam(_RUNNER_V1, f"GPUModelRunner.{name}", why, optional=True)
    yield Seam(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.lora_id_to_lora_request",
        "which graph a batch uses",
        optional=True,
    )


def _runner_v2() -> Iterator[Seam]:
    """The same in its second one."""
    why = "a third graph, for direct tasks alone"
    for name in ("lora_capture_cases", "lora_state"):
        yield Seam(_RUNNER_V2, f"GPUModelRunner.{name}", why, optional=True)
    yield Seam(
        _RUNNER_V2,
        "get_num_active_loras_for_dispatch",
        "which graph a batch uses",
        ("lora_config", "lora_state", "req_ids", "dummy_run"),
        optional=True,
    )
    yield Seam(
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState.get_activate_loras",
        "which graph a batch uses",
        ("self", "req_ids"),
        optional=True,
    )


def _steps() -> Iterator[Seam]:
    yield Seam(
        _RUNNER_V1,
        "GPUModelRunner.sample_tokens",
        "on CPU, a seed is kept over the pieces of a prompt",
        ("self", "grammar_output"),
        optional=True,
    )
    yield Seam(
        _RUNNER_V1,
        "GPUModelRunner.discard_request_mask",
        "whose sample is thrown away",
        optional=True,
    )
    yield Seam(
        _RUNNER_V1,
        "GPUModelRunner._preprocess",
        "embeddings of some tokens of a batch are mapped to adapters as these tokens are",
        accepts=("scheduler_output",),
        optional=True,
    )
    for name in ("enable_prompt_embeds", "is_token_ids"):
        yield Seam(_RUNNER_V1, f"GPUModelRunner.{name}", "which tokens are embedded", optional=True)
    why = "a step of a rank without requests is the base model's"
    yield Seam(_GPU_WORKER, "Worker.execute_dummy_batch", why, ("self",), optional=True)
    for name in ("lora_config", "_set_active_loras"):
        yield Seam(_MIXIN, f"LoRAModelRunnerMixin.{name}", why, optional=True)
    yield Seam(
        _MIXIN,
        "LoRAModelRunnerMixin.maybe_dummy_run_with_lora",
        why,
        accepts=("lora_config", "num_scheduled_tokens", "num_sampled_tokens"),
        optional=True,
    )
    why = "rows of drafts' logits are mapped to adapters as their requests are"
    for module, name, accepts in (
        (_RUNNER_V2, "GPUModelRunner.prepare_inputs", ("scheduler_output",)),
        ("vllm.v1.worker.gpu.lora_utils", "LoraState.make_lora_inputs", ("idx_mapping",)),
    ):
        yield Seam(module, name, why, accepts=accepts, optional=True)
    yield Seam("vllm.v1.worker.gpu.input_batch", "InputBatch.cu_num_logits_np", why, optional=True)
    why = "rows of prompts' logits are mapped to adapters as their tokens are"
    yield Seam(
        _RUNNER_V1,
        "GPUModelRunner._get_prompt_logprobs_dict",
        why,
        ("self", "hidden_states", "num_scheduled_tokens"),
        optional=True,
    )
    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        yield Seam(
            "vllm.v1.worker.gpu.sample.prompt_logprob",
            f"PromptLogprobsWorker.{name}",
            why,
            accepts=("logits_fn", "hidden_states"),
            optional=True,
        )


def _refusals() -> Iterator[Seam]:
    """How a request is refused with a reason; see ``refusals``."""
    yield Seam(_CORE, "EngineCoreProc.output_queue", "a refusal, to its client")
    engine = "vllm.v1.engine"
    yield Seam(
        engine,
        "EngineCoreOutput",
        "a refusal",
        accepts=("request_id", "new_token_ids", "finish_reason", "stop_reason"),
    )
    yield Seam(engine, "EngineCoreOutputs", "a refusal", accepts=("outputs", "finished_requests"))
    yield Seam(engine, "FinishReason.ERROR", "a refusal")
    processor = "vllm.v1.engine.output_processor"
    yield Seam(
        processor,
        "OutputProcessor.process_outputs",
        "a refusal becomes its caller's error",
        accepts=("engine_core_outputs",),
    )
    yield Seam(
        processor,
        "OutputProcessor.abort_requests",
        "a refused request and those that came with it are forgotten",
        ("self", "request_ids", "internal"),
    )
    yield Seam(processor, "OutputProcessor.request_states", "whose refusal it is")
    for name in ("queue", "parent_req", "detokenizer"):
        yield Seam(processor, f"RequestState.{name}", "whose refusal it is")
    yield Seam(processor, "OutputProcessorOutput.reqs_to_abort", "ends the others")
    for name, takes in {"put": ("self", "output"), "close": ("self",)}.items():
        yield Seam(
            processor, f"RequestOutputCollector.{name}", "a refusal, to its caller", takes
        )  # fmt: skip
    why = "requests are told that their server ends"
    yield Seam("vllm.v1.engine.async_llm", "AsyncLLM.shutdown", why)
    for name in ("output_handler", "output_processor"):
        yield Seam("vllm.v1.engine.async_llm", f"AsyncLLM.{name}", why)
    yield Seam(processor, "OutputProcessor.propagate_error", why, ("self", "e"))
    yield Seam("vllm.exceptions", "VLLMClientError", "an error of the caller's")
    yield Seam("vllm.exceptions", "VLLMNotFoundError", "the 404 of a pooling model's name")
    yield Seam(
        "vllm.exceptions",
        "GracefulHTTPError",
        "one with a status of its own; from 0.29 or 0.30 on",
        accepts=("message", "http_status"),
        optional=True,
    )


def _limits() -> Iterator[Seam]:
    """What limits tasks, shares the engine and keeps adapters within the slots; see ``limits``."""
    why = "its queue of waiting requests becomes one that knows tenants"
    yield Seam(_SCHEDULER, "Scheduler.__init__", why, limits=True)
    for name in ("waiting", "policy", "running", "max_num_running_reqs"):
        yield Seam(_SCHEDULER, f"Scheduler.{name}", why, limits=True)
    yield Seam(_SCHEDULER, "Scheduler.skipped_waiting", f"{why}; up to 0.30 or 0.31", optional=True)
    yield Seam(
        _SCHEDULER,
        "Scheduler._select_waiting_queue_for_scheduling",
        "which of its two queues is next; up to 0.30 or 0.31",
        ("self",),
        optional=True,
    )
    for name, takes in {
        "add_request": ("self", "request"),
        "pop_request": ("self",),
        "peek_request": ("self",),
        "prepend_request": ("self", "request"),
        "prepend_requests": ("self", "requests"),
        "remove_request": ("self", "request"),
        "remove_requests": ("self", "requests"),
    }.items():
        yield Seam(
            "vllm.v1.core.sched.request_queue",
            f"RequestQueue.{name}",
            "the methods that our queue has under the same name",
            takes,
            limits=True,
        )
    yield Seam(
        _SCHEDULER,
        "Scheduler.schedule",
        "whose requests run before a step, and which prompts were found in the prefix cache",
        ("self", "throttle_prefills"),
        limits=True,
    )
    why = "requests that go on without asking our queue; from 0.31 or 0.32 on"
    yield Seam(_SCHEDULER, "Scheduler.kv_holding_waiting", why, optional=True)
    why = "data-parallel ranks that compute prompts in the same steps; from 0.31 or 0.32 on"
    for name in ("prefill_capacity_bound", "deferred_waiting"):
        yield Seam(_SCHEDULER, f"Scheduler.{name}", why, optional=True)
    yield Seam(
        _SCHEDULER,
        "Scheduler.update_from_output",
        "tokens served",
        ("self", "scheduler_output", "model_runner_output"),
        limits=True,
    )
    output = "vllm.v1.core.sched.output"
    yield Seam(output, "SchedulerOutput.scheduled_new_reqs", "prefix-cache hits", limits=True)
    for name in ("req_id", "num_computed_tokens"):
        yield Seam(output, f"NewRequestData.{name}", "prefix-cache hits", limits=True)
    for name in ("req_id_to_index", "sampled_token_ids"):
        yield Seam("vllm.v1.outputs", f"ModelRunnerOutput.{name}", "tokens served", limits=True)
    for name in ("status", "num_tokens", "num_computed_tokens", "priority", "arrival_time"):
        yield Seam("vllm.v1.request", f"Request.{name}", "a request's price and rank", limits=True)
    for name in ("WAITING", "PREEMPTED"):
        yield Seam("vllm.v1.request", f"RequestStatus.{name}", "can it begin?", limits=True)
    yield Seam(_CORE, "EngineCore.vllm_config", "has it one caller?", limits=True)
    yield Seam(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.__init__",
        "it has one caller, who is refused nothing",
        accepts=("vllm_config",),
        limits=True,
    )
    why = "a stream is refused before it is answered"
    yield Seam(
        _BASE_SERVING, "BaseServing._maybe_get_adapters", why, accepts=("request",), limits=True
    )  # fmt: skip
    yield Seam(_BASE_SERVING, "BaseServing.models", why, limits=True)
    output_processor = "vllm.v1.engine.output_processor"
    yield Seam(output_processor, "RequestState.lora_name", why, limits=True)
    for owner, name in {
        "SchedulerConfig": "max_num_seqs",
        "ParallelConfig": "data_parallel_size",
    }.items():
        yield Seam("vllm.config", f"{owner}.{name}", why, limits=True)


RUNNER_SEAMS: dict[str, tuple[Seam, ...]] = {"v1": tuple(_runner_v1()), "v2": tuple(_runner_v2())}
"""What a model runner must have for a third graph. It is looked up in the worker that has one, which has
imported these modules; without, batches of direct tasks alone use the graphs of all."""

STEP_SEAMS: tuple[Seam, ...] = tuple(_steps())
"""Parts of a step, in the first model runner and in the second: like ``RUNNER_SEAMS``, they are looked up
in the worker. The last is there from 0.32 on."""

NAME_SEAMS: tuple[Seam, ...] = (
    Seam(
        _BASE_SERVING,
        "BaseServing._check_model",
        "whose request it is, for canaries, and what is wrong with a blend's name",
        ("self", "request"),
    ),
    Seam(
        "vllm.entrypoints.pooling.base.serving",
        "PoolingBaseServing._check_model",
        "the same for pooling models, whose 404 comes from a later lookup",
        ("self", "request"),
    ),
    Seam(
        _SERVING,
        "OpenAIServingModels.load_lora_adapter",
        "an adapter takes no name of the checkpoint's",
        ("self", "request", "base_model_name"),
    ),
    Seam(
        _BASE_SERVING,
        "BaseServing._get_active_default_mm_loras",
        "a task that is called `text` or `image` answers no request that did not ask for it",
        ("self", "request"),
    ),
    Seam(
        "vllm.plugins",
        "load_endpoint_plugins",
        "a middleware reads the client's key and says which tasks answered",
        ("supported_tasks",),
    ),
)
"""Where an API server looks names up; with a checkpoint."""

GROUPS: dict[str, tuple[Seam, ...]] = {
    "replaced": tuple(_replaced()),
    "overridden": tuple(_overridden()),
    "names": NAME_SEAMS,
    "called": tuple(_called()),
    "layers": tuple(_layers()),
    "read": tuple(_held()),
    "refusals": tuple(_refusals()),
    "limits": tuple(_limits()),
    "steps": STEP_SEAMS,
    "graphs": RUNNER_SEAMS["v1"] + RUNNER_SEAMS["v2"],
}
"""The seams by what is done with them, in the order in which they are checked."""

SEAMS: tuple[Seam, ...] = tuple(seam for group in GROUPS.values() for seam in group)
"""All of them."""
