"""Which CUDA graph serves a batch: one without adapters, one for direct tasks alone, one for all.

A captured graph launches what it was captured with, whatever the batch is. vLLM captures one graph for
batches without adapters and one for the others, in which every layer would run punica also for batches
that hold direct tasks alone. So a third is captured, under a key that vLLM itself has for batches with
one active adapter and uses only with ``--specialize-active-lora``, which direct tasks refuse:

=================== ============================ ==============================================
active adapters     graph                        batches that it is replayed for
=================== ============================ ==============================================
0                   ``NOTHING``                  base model alone
1                   ``DIRECT_ONLY``              direct tasks, and the base model
``max_loras + 1``   ``EVERYTHING``               whatever holds an adapter that stands in a slot
=================== ============================ ==============================================

A graph of the lower rows serves the batches of the upper ones too, and never the other way round: what
is not known to run direct counts as in a slot. Without ``cudagraph_specialize_lora``, or where vLLM has
changed, there is no third graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm.lora.layers import LoRAMappingType
from vllm.lora.request import LoRARequest

from vllm_vlora.errors import IncompatibleVLLMError
from vllm_vlora.plugin.events import logger
from vllm_vlora.plugin.idle_steps import is_idle
from vllm_vlora.plugin.layer_calls import DIRECT_ONLY, EVERYTHING, NOTHING, Kinds
from vllm_vlora.plugin.manager import TaskLoRAManager
from vllm_vlora.plugin.seam_table import RUNNER_SEAMS, Place

ONE_ADAPTER = 1
"""vLLM's number of active adapters in the key of ``DIRECT_ONLY``."""
# vLLM's two model runners, by what only the one has.
_TOLD_BY = {"v1": "cudagraph_dispatcher", "v2": "lora_capture_cases"}
_COUNT = "get_num_active_loras_for_dispatch"


def capture_by_kind(places: Mapping[str, Place]) -> list[tuple[Any, str, Any]]:
    """The patches that capture a graph of each kind and tell which one is captured.

    Args:
        places: the seams by name, as ``find_seams`` finds them.
    """
    load = places["LoRAModelRunnerMixin.load_lora_model"]
    select = places["LoRAModelRunnerMixin.maybe_select_dummy_loras"]
    patches = [(load, _load_lora_model), (select, _maybe_select_dummy_loras)]
    return [(place.owner, place.attribute, wrap(place.value)) for place, wrap in patches]


def _load_lora_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        model = original(self, model, vllm_config, device)
        manager = self.lora_manager._adapter_manager
        path = manager.vlora_store.direct
        if path is not None and path.layers:
            manager.direct_apart = capture_direct_apart(self, manager)
        return model

    return load


def _maybe_select_dummy_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    @contextmanager
    def select(
        self: Any,
        lora_config: Any,
        num_scheduled_tokens: Any,
        mapping_type: LoRAMappingType = LoRAMappingType.LANGUAGE,
        num_sampled_tokens: Any = None,
        num_active_loras: int = 0,
    ) -> Iterator[None]:
        dummies = original(
            self,
            lora_config,
            num_scheduled_tokens,
            mapping_type,
            num_sampled_tokens,
            num_active_loras,
        )
        if lora_config is None or mapping_type != LoRAMappingType.LANGUAGE:
            with dummies:
                yield
            return
        manager = self.lora_manager._adapter_manager
        kinds = kinds_of_graph(num_active_loras, manager.direct_apart)
        # With --max-loras 1 the number of direct tasks is also that by which the second runner measures
        # memory and warms punica up, before it captures anything.
        empty = not kinds.stock and num_active_loras < lora_config.max_loras
        with manager.warm_up(kinds, empty), dummies:
            yield

    return select


def kinds_of_graph(num_active_loras: int, direct_apart: bool) -> Kinds:
    """What a graph that is captured under this number of active adapters must serve."""
    if num_active_loras == 0:
        return NOTHING
    return DIRECT_ONLY if direct_apart and num_active_loras == ONE_ADAPTER else EVERYTHING


def active_loras(
    manager: TaskLoRAManager, requests: Collection[LoRARequest], max_loras: int
) -> int:
    """The number of active adapters under which a batch with these requests finds its graph."""
    if not requests:
        return 0
    return ONE_ADAPTER if manager.all_direct(requests) else max_loras + 1


def capture_direct_apart(runner: Any, manager: TaskLoRAManager) -> bool:
    """Have a model runner of vLLM capture and use the third graph; False where it will not.

    Before it makes its list of graphs, which it does when it knows its attention backends.
    """
    if not runner.compilation_config.cudagraph_specialize_lora:
        return False
    version = next((v for v, name in _TOLD_BY.items() if hasattr(runner, name)), None)
    try:
        if version is None:
            raise IncompatibleVLLMError(
                f"{type(runner).__name__} is a model runner of another kind"
            )
        for seam in RUNNER_SEAMS[version]:
            seam.find()
    except IncompatibleVLLMError as error:
        logger.info("vllm-vlora: batches of direct tasks alone use the graphs of all (%s)", error)
        return False
    adapt = _adapt_v1 if version == "v1" else _adapt_v2
    adapt(runner, manager, runner.lora_config.max_loras)
    return True


def _cases(max_loras: int) -> list[int]:
    return [0, ONE_ADAPTER, max_loras + 1]


def _adapt_v1(runner: Any, manager: TaskLoRAManager, max_loras: int) -> None:
    dispatcher = runner.cudagraph_dispatcher
    dispatcher._get_lora_cases = lambda: _cases(max_loras)
    # So that it looks for the smallest captured number that is enough instead of the largest one.
    dispatcher.specialize_lora_count = True
    original = runner._determine_batch_execution_and_padding

    @functools.wraps(original)
    def determine(*args: Any, **kwargs: Any) -> Any:
        # Dummy runs say for which graph they are.
        if kwargs.get("force_num_active_loras") is None:
            requests = runner.input_batch.lora_id_to_lora_request.values()
            kwargs["force_num_active_loras"] = active_loras(manager, requests, max_loras)
        return original(*args, **kwargs)

    runner._determine_batch_execution_and_padding = determine


def _adapt_v2(runner: Any, manager: TaskLoRAManager, max_loras: int) -> None:
    runner.lora_capture_cases = _cases(max_loras)
    runner.lora_state._vlora_count = functools.partial(active_loras, manager, max_loras=max_loras)
    place = next(seam for seam in RUNNER_SEAMS["v2"] if seam.name == _COUNT).find()
    if not hasattr(place.value, "_vlora_patched"):
        setattr(place.owner, place.attribute, _count_by_kind(place.value))


def _count_by_kind(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def count(lora_config: Any, lora_state: Any, req_ids: list[str], dummy_run: bool) -> int:
        ours = lora_state.__dict__.get("_vlora_count")
        if ours is not None and dummy_run and is_idle(lora_state):
            return 0
        if ours is None or dummy_run:
            return original(lora_config, lora_state, req_ids, dummy_run)
        return int(ours(lora_state.get_activate_loras(req_ids)))

    count._vlora_patched = True  # type: ignore[attr-defined]
    return count
