"""vLLM's LoRA manager beside direct tasks: what is resident, which slot holds what, the batch's mapping.

With ``seams``, ``layers``, ``experts``, ``layer_calls``, ``head_calls``, ``steps``,
``limits`` and ``graph_cases`` the only file that knows vLLM's internals.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from vllm_vlora.adapters.saved_tensors import is_base_copy
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.serving import CHECKPOINT_VARIABLE, extra_obstacle
from vllm_vlora.downloads import Parts
from vllm_vlora.errors import ModelMismatchError, TaskLoadError, VLoRAError
from vllm_vlora.plugin.arrivals import FAR, Brought
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.direct_slots import DirectSlots
from vllm_vlora.plugin.events import facts, logger
from vllm_vlora.plugin.experts import (
    ExpertWriter,
    check_experts,
    is_fused_moe,
    make_expert_writer,
)
from vllm_vlora.plugin.far_tasks import FarTasks
from vllm_vlora.plugin.following import Follower, State, WorkerState
from vllm_vlora.plugin.head_calls import HeadPunica
from vllm_vlora.plugin.identity import TaskPath, parse_task_path
from vllm_vlora.plugin.layer_calls import EVERYTHING, Kinds, LayerPunica, begin_ahead
from vllm_vlora.plugin.layers import (
    EngineNames,
    is_embedding,
    is_full_head,
    is_logits,
    read_direct_layouts,
    read_elsewhere,
    read_layouts,
    read_unserved,
    slot_nbytes,
)
from vllm_vlora.plugin.polling import Poller, polled
from vllm_vlora.plugin.residency import Held
from vllm_vlora.plugin.resident import ResidentStore, ResidentTask
from vllm_vlora.plugin.settings import Settings
from vllm_vlora.plugin.slot_updates import update_seldom, without_adapters
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.plugin.steps import adapt_steps
from vllm_vlora.wording import count_of, shown, some_of

# As bytes over a budget: whatever gives way may help.
_ALL = sys.maxsize
# vLLM's checks of a classification head: two in 0.31 and 0.32, one from 0.33 on, none before.
_HEAD_CHECKS = (
    "_validate_modules_to_save",
    "_validate_token_classification_lora",
    "_validate_classification_head_lora",
)
# Stands for factors where they are only asked whether they are there.
_NAMED: Any = object()


@dataclass(frozen=True)
class Setup:
    """What the plugin was installed with: the checkpoint to preload, if any, and the settings."""

    checkpoint: str | None
    settings: Settings

    @property
    def direct(self) -> bool:
        """Whether tasks may run direct: it takes the bases' places before the engine starts."""
        return self.checkpoint is not None and self.settings.direct


class _WarmUp(NamedTuple):
    """See ``TaskLoRAManager.warm_up``."""

    in_graph: Kinds
    empty: bool


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
    # None where all tasks were fetched before they were served.
    _far: FarTasks | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._max_distinct = kwargs["lora_config"].max_loras
        kwargs["lora_config"] = _config_of_slots(kwargs["lora_config"], self.setup)
        self._vllm_config = kwargs["vllm_config"]
        super().__init__(*args, **kwargs)
        self.elsewhere = read_elsewhere(self)
        self._writer: SlotWriter | None = None
        self._engine_name = EngineNames(self)
        self.vlora_store = ResidentStore(
            self.device,
            self._engine_name,
            self._check,
            only_direct=self.setup.settings.mode == "direct",
            elsewhere=self.elsewhere,
            narrow_rows=self.setup.settings.narrow_rows,
            budget=self.setup.settings.budget(self.device),
            exchanges=self.setup.settings.exchange,
        )
        if self.setup.settings.fetch is Parts.TASKS_LATER:
            self._far = FarTasks()
        self.follower: Follower | None = None
        self._poller: Poller | None = None
        self._direct_models: dict[int, TaskLoRAModel] = {}
        self._direct_slots: DirectSlots | None = None
        self._routed_version = -1
        # Adapters' ids and paths that are known to have direct slots, as long as no slot changes.
        self._ready: set[tuple[int, str]] = set()
        self._ready_version = -1
        for wrapper in self.punica_wrapper_mapping.values():
            update_seldom(wrapper)
        # Read by the layers; see ``layer_calls.Batch``.
        self.in_batch, self.in_graph = Kinds(stock=True, direct=False), EVERYTHING
        # What the graph of a warm-up batch must serve, while one is set up; None for other batches.
        self._warm_up: _WarmUp | None = None
        # Whether batches of direct tasks alone have graphs of their own; see ``graph_cases``.
        self.direct_apart = False

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
        # Only then are embeddings looked up outside of compiled graphs.
        some = self._vllm_config.model_config.enable_prompt_embeds
        for module in self.modules.values():
            if is_logits(module) or (some and is_embedding(module)):
                module.set_mapping(HeadPunica(module.punica_wrapper))
        adapt_steps()

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
                self.experts.forget(self.lora_index_to_id.index(lora_id))
            return activated
        # Stock code keeps the books (slots, LRU order) and is shown only the layers that the writer does
        # not fill: to set classification heads, and to reset what another adapter left in the slot.
        filled = self.experts.filled(model.task)
        layers, self.modules = self.modules, _layers_left_to_stock(self.modules, filled)
        try:
            activated = super().activate_adapter(lora_id)
        finally:
            self.modules = layers
        if activated:
            self.writer.write(self.lora_index_to_id.index(lora_id), model.task)
            self.experts.write(self.lora_index_to_id.index(lora_id), model.task)
        return activated

    @property
    def writer(self) -> SlotWriter:
        """The writer over this model's layers but fused experts, made on first use."""
        if self._writer is None:
            self._writer = SlotWriter(
                read_layouts(self),
                self.lora_config.max_lora_rank,
                others=self.experts.layouts,
                elsewhere=self.elsewhere,
            )
        return self._writer

    @functools.cached_property
    def experts(self) -> ExpertWriter:
        """The writer over this model's fused experts."""
        max_rank = self.lora_config.max_lora_rank
        return make_expert_writer(self.modules, self.packed_modules, max_rank)

    def task_model(self, request: LoRARequest) -> TaskLoRAModel:
        """The model of one of our requests, from resident memory wherever possible."""
        return self._make_model(request.lora_int_id, self.vlora_store.task(_path_of(request)))

    def _make_model(self, lora_id: int, task: ResidentTask) -> TaskLoRAModel:
        model = TaskLoRAModel(lora_id, task)
        heads = _full_heads(task)
        if heads:
            model.modules_to_save = heads
        try:
            self._validate_head(task, heads)
        except ValueError as error:
            raise ModelMismatchError(f"{task.path}: task {task.task_id!r}: {error}") from error
        return model

    def _validate_head(self, task: ResidentTask, heads: dict[str, Any]) -> None:
        """vLLM's own checks of an adapter's classification head, under the names that each version has.

        They ask for names alone where an adapter has factors, so the task is shown as one with its names.
        """
        checks = [getattr(self, name) for name in _HEAD_CHECKS if hasattr(self, name)]
        if heads and not checks:
            raise ValueError(
                "this vLLM checks heads in a way that is not known; leave the task out"
            )
        if checks:
            shown = LoRAModel(1, task.rank, dict.fromkeys(task.sources, _NAMED))
            shown.modules_to_save = heads
            for check in checks:
                check(shown)

    # --- what the engine core asks for ---

    def bring(
        self,
        requests: Sequence[LoRARequest],
        hold: int,
        instead_of: Sequence[str] = (),
        fetch: Collection[int] = (),
    ) -> list[Brought]:
        """Have tasks read into host memory, beside the steps, and on the device once that is done.

        Nothing is raised, as of ``hold``: an error is in the answer of its task.

        Args:
            hold: how many of them, the first, may come to the device.
            instead_of: paths of tasks whose places there may be given up for them, the first first.
            fetch: which of them may be fetched, where they are on no disk here.

        Returns:
            For each what ``hold`` says of it; or whether it is read, where it may not or need not yet;
            None for one that waits for bases that are to be exchanged first, and ``FAR`` for one that is
            to be fetched and may not be yet.
        """
        left = list(instead_of)
        answers: list[Brought] = []
        for number, request in enumerate(requests):
            read = self._read(request, number in fetch)
            if read is not True or number >= hold:
                answers.append(read)
                continue
            held = self.hold(request, left)
            answers.append(held)
            del left[: held.gave_way]
            if held.over:
                hold = 0  # Who comes later must not take its place.
        return answers

    def _read(self, request: LoRARequest, fetched: bool) -> Brought:
        """Have a task read into host memory; as ``bring`` of one that may not be held."""
        try:
            path = _path_of(request)
            if not fetched and self._is_far(path):
                return FAR
            return self.vlora_store.stage(path, fetched)
        except Exception as error:  # noqa: BLE001 - it is in the answer
            return _failure(request, error)

    def hold(self, request: LoRARequest, instead_of: Sequence[str] = ()) -> Held:
        """Have a task on the device; an error is in the answer.

        Nothing is raised: with several workers, each must answer.

        Args:
            instead_of: paths of tasks whose places there may be given up for it, the first first.
        """
        gave_way = 0
        try:
            path, before = _path_of(request), self.vlora_store.held(request.lora_path)
            # Where that was not done: who is interrupted while it is fetched leaves a thread behind.
            self.vlora_store.stage(path, fetched=True)
            while over := self.vlora_store.place(path):
                if gave_way == len(instead_of):
                    return Held(over=over, gave_way=gave_way)
                self.forget(instead_of[gave_way])
                gave_way += 1
            self._prepare(self.task_model(request).task)
        except torch.OutOfMemoryError:
            return Held(over=_ALL, gave_way=gave_way)
        except Exception as error:  # noqa: BLE001 - it is in the answer
            return _failure(request, error, gave_way)
        nbytes = self.vlora_store.nbytes_of(request.lora_path)
        direct = self.runs_direct(request)
        return Held(nbytes=nbytes if before is None else 0, direct=direct, gave_way=gave_way)

    def _prepare(self, task: ResidentTask) -> None:
        """Arrange a task's writes now and not in its first step."""
        if task.direct is None:
            self.writer.prepare(task)
            self.experts.prepare(task)

    def _is_far(self, path: TaskPath) -> bool:
        return self._far is not None and self._far.has(self.vlora_store.state, path)

    def far_tasks(self) -> int | None:
        """How many tasks are on no disk here yet; None where all were fetched before they were served."""
        return None if self._far is None else self._far.count(self.vlora_store.state)

    def held_paths(self) -> dict[str, bool]:
        """The tasks on the device, and which of them run direct."""
        return {task.path: task.direct is not None for task in self.vlora_store.tasks()}

    def state(self) -> WorkerState:
        """What is served, and what could be."""
        if self.follower is None:
            return WorkerState("", "")
        if self._poller is not None:
            self._poller.start()
        return self.follower.state()

    def adopt(self, digest: str) -> bool:
        """Serve a state from now on; False where it is not the one that is offered."""
        follower, before = self.follower, self.vlora_store.state
        if follower is None or before is None or not follower.adopt(digest):
            return False
        self.vlora_store.serve(follower.served)
        _log_change(before, follower.served)
        return True

    def exchange_bases(self) -> list[str]:
        """Put the bases of the state that is served into the layers; what lost its place for that."""
        store = self.vlora_store
        assert store.state is not None
        ended = store.ended()
        self._remove_adapters_of(set(ended))
        for path in ended:
            self._forget(path, wholly=True)
        store.exchange()
        logger.info(
            "vllm-vlora: the layers hold the bases of %s now, whose tasks on them run direct",
            shown(str(store.state.checkpoint.path)),
        )
        return ended

    def forget(self, path: str, wholly: bool = False) -> None:
        """Give up a task's place on the device, and the adapters that stand for it.

        Args:
            wholly: with what the host keeps of it.
        """
        self._remove_adapters_of({path})
        self._forget(path, wholly)

    def _remove_adapters_of(self, paths: set[str]) -> None:
        for adapter_id, model in list(self.list_adapters().items()):
            if isinstance(model, TaskLoRAModel) and model.task.path in paths:
                self.remove_adapter(adapter_id)

    def _forget(self, path: str, wholly: bool) -> None:
        # Both are made on first use.
        for writer in (self._writer, vars(self).get("experts")):
            if writer is not None:
                writer.drop(path)
        if wholly:
            self.vlora_store.drop(path)
        else:
            self.vlora_store.forget(path)

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

    def in_slots(self, requests: Collection[LoRARequest | None]) -> set[LoRARequest]:
        """Have a batch's direct tasks in their slots; the requests of the others, which stand in vLLM's.

        Most batches have the tasks of the one before, which is found out without asking for each: 0.2 ms
        for 1,024, and 0.95 otherwise.
        """
        slots = self._direct_slots
        if slots is None:
            return set(filter(None, requests))
        asked, ready = _keys(requests), self._known_ready()
        if asked <= ready:
            return set()
        before = slots.version
        rest = {
            r
            for r in requests
            if r and (r.lora_int_id, r.lora_path) not in ready and not self.add_direct(r)
        }
        if slots.version != before:
            # Who came may have taken the slot of one that was not asked for.
            if any(r.lora_int_id not in slots for r in requests if r and r not in rest):
                rest = {r for r in requests if r and not self.add_direct(r)}
            ready = set()
        self._ready = ready | (asked - _keys(rest))
        self._ready_version = slots.version
        return rest

    def _known_ready(self) -> set[tuple[int, str]]:
        slots = self._direct_slots
        return self._ready if slots and slots.version == self._ready_version else set()

    def all_direct(self, requests: Collection[LoRARequest]) -> bool:
        """Whether all requests of a batch are for tasks that are loaded and run direct."""
        return _keys(requests) <= self._known_ready() or all(map(self.runs_direct, requests))

    def add_direct_dummy(self, request: LoRARequest) -> None:
        """Register a warm-up adapter that adds nothing."""
        assert self.vlora_store.direct is not None
        empty = self.vlora_store.direct.empty
        task = ResidentTask(request.lora_name, request.lora_path, 0, {}, {}, empty)
        self._ready_version = -1
        self._direct_models[request.lora_int_id] = TaskLoRAModel(request.lora_int_id, task)

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
        # vLLM calls this too when weights were reloaded after a sleep that lost the slots' content. The
        # writers are made on first use.
        for writer in (self._writer, vars(self).get("experts")):
            for slot in range(self.lora_slots):
                if writer is not None:
                    writer.forget(slot)

    def pin_adapter(self, lora_id: int) -> bool:
        if lora_id not in self._direct_models:
            return super().pin_adapter(lora_id)
        # The engine core keeps the task on the device. A step that needs it gives it a slot; one that it
        # kept would be missing to a batch of others, of which the scheduler allows as many as slots.
        return True

    def is_direct(self, lora_id: int) -> bool:
        """Whether the adapter of an id is a task that runs direct, so that it needs no slot."""
        return lora_id in self._direct_models

    def runs_direct(self, request: LoRARequest) -> bool:
        """Whether a request is for a task that is loaded and runs direct."""
        task = self.vlora_store.held(request.lora_path)
        return task is not None and task.direct is not None

    @contextmanager
    def warm_up(self, in_graph: Kinds, empty: bool) -> Iterator[None]:
        """Take a mapping that is set now as a warm-up batch's, whose graph serves such batches.

        Args:
            empty: punica sees no adapter in it, so that none of its launches is captured.
        """
        self._warm_up = _WarmUp(in_graph, empty)
        try:
            yield
        finally:
            self._warm_up = None

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        slots = self._direct_slots
        warm_up = self._warm_up is not None
        if slots is not None and (warm_up or slots.version != self._routed_version):
            # A slot holds another task, or the batch before was of another kind: the same mapping
            # means something else.
            self._last_mapping = None
        super().set_adapter_mapping(mapping)

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        slots = self._direct_slots
        if slots is None:
            super()._set_adapter_mapping(mapping)
            return
        if mapping.type != LoRAMappingType.LANGUAGE:
            # A tower's or connector's: no direct task adapts those, and punica knows of none.
            tokens = np.asarray(mapping.index_mapping, dtype=np.int64)
            direct = np.isin(tokens, list(self._direct_models))
            mapping = _without_direct(mapping, tokens, direct, slots)
            super()._set_adapter_mapping(mapping)
            return
        if self._warm_up is not None and self._warm_up.empty:
            mapping = _of_the_base_model(mapping)
        tokens = np.asarray(mapping.index_mapping, dtype=np.int64)
        direct = slots.route(tokens)
        self._routed_version = slots.version
        stock = bool((tokens[~direct] > 0).any())
        super()._set_adapter_mapping(
            _without_direct(mapping, tokens, direct, slots)
            if stock
            else _of_the_base_model(mapping)
        )
        self.in_batch, self.in_graph = Kinds(stock, bool(direct.any())), EVERYTHING
        if self._warm_up is not None:
            self._set_warm_up(self._warm_up.in_graph, len(tokens))

    def _set_warm_up(self, in_graph: Kinds, tokens: int) -> None:
        """Run everything and in every slot: memory is measured then, and kernels are compiled.

        Only what is captured is limited to what the graph must serve.
        """
        assert self._direct_slots is not None
        self._direct_slots.spread(tokens)
        self._routed_version = -1
        self.in_batch, self.in_graph = EVERYTHING, in_graph

    # --- the start ---

    def preload(self, folder: str) -> None:
        """Load the engine's checkpoint at start-up and say what it takes."""
        store = self.vlora_store
        make_path = self._make_direct_path if self.setup.direct else None
        checkpoint = store.preload(folder, make_path)
        assert store.state is not None
        if self.setup.settings.follow:
            templates = self.setup.settings.chat_templates
            self.follower = Follower(folder, store.state, store.check, logger, templates)
            self._poller = _make_poller(self.follower, self.setup.settings)
        for task in store.tasks():
            self._make_model(1, task)  # A head that does not fit is refused here and not in a step.
            self._prepare(task)
        if store.direct is not None:
            self._direct_slots = DirectSlots(store.direct)
            self._attach(store.direct)
            started = time.monotonic()
            store.direct.warm_up(self.setup.settings.overlap)
            if self.device.type != "cpu":
                logger.info("vllm-vlora: kernels ready in %.1f s", time.monotonic() - started)
        _warn_of_base_model(checkpoint, self)
        logger.info(
            "vllm-vlora: %s: %d of %s resident on %s, %.1f MiB, loaded in %.2f s; tasks may take "
            "%.1f MiB there",
            shown(str(checkpoint.path)),
            len(store),
            count_of(len(checkpoint.tasks), "task"),
            self.device,
            store.nbytes / 2**20,
            store.seconds,
            store.arena_nbytes / 2**20,
            extra=facts(
                "start",
                digest=store.state.digest,
                tasks=len(checkpoint.tasks),
                resident=len(store),
                bytes=store.nbytes,
                seconds=round(store.seconds, 6),
            ),
        )
        if store.direct is not None:
            _log_direct(self, store.direct)

    def _make_direct_path(self, checkpoint: Checkpoint) -> DirectPath:
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
            basis_rows=self.setup.settings.basis_rows,
            narrow_rows=self.setup.settings.narrow_rows,
            elsewhere=self.elsewhere,
        )

    def _attach(self, path: DirectPath) -> None:
        """Put ourselves between the layers and punica."""
        for name, module in self.modules.items():
            layer = path.layers.get(name)
            if layer is not None or (current_platform.is_cpu() and not is_full_head(module)):
                calls = LayerPunica(self, module, layer)
                module.set_mapping(calls)
                if layer is not None and self.setup.settings.overlap and self.device.type == "cuda":
                    begin_ahead(module, calls)

    def _check(self, checkpoint: Checkpoint, task_ids: Iterable[str], direct: bool) -> None:
        task_ids = list(task_ids)
        packed = self.packed_modules
        parallel = self._vllm_config.parallel_config
        placement = getattr(parallel, "expert_placement_strategy", "linear")
        check_experts(self.modules, packed, checkpoint, task_ids, self._engine_name, placement)
        # A direct task has its own rank, whatever --max-lora-rank is.
        writer = replace(self.writer, max_rank=sys.maxsize) if direct else self.writer
        writer.check(checkpoint, task_ids, self._engine_name)
        for task_id in task_ids:
            _check_extra(checkpoint, task_id, self)
            _check_unserved(checkpoint, task_id, self._unserved, self._engine_name)

    @functools.cached_property
    def _unserved(self) -> dict[str, str]:
        """A look at every module of the model, which stays as it is."""
        return read_unserved(self)


def _keys(requests: Iterable[LoRARequest | None]) -> set[tuple[int, str]]:
    return {(request.lora_int_id, request.lora_path) for request in requests if request}


def _path_of(request: LoRARequest) -> TaskPath:
    path = parse_task_path(request.lora_path)
    assert path is not None
    return path


def _failure(request: LoRARequest, error: Exception, gave_way: int = 0) -> Held:
    """What is said of a task that cannot be loaded; what a user cannot mend is in the log as well."""
    if not isinstance(error, VLoRAError):
        logger.error("vllm-vlora: %s cannot be loaded", shown(request.lora_path), exc_info=error)
        error = TaskLoadError(f"{request.lora_path}: {error}")
    return Held(error=error, gave_way=gave_way)


def _make_poller(follower: Follower, settings: Settings) -> Poller | None:
    """What asks the place that the followed folder comes from, where that is asked for."""
    seconds = settings.poll_seconds
    where = polled(os.environ.get(CHECKPOINT_VARIABLE, "")) if seconds else None
    if where is None:
        return None
    return Poller(
        where, seconds, follower.sound_state, follower.count_refusal, logger, settings.fetch
    )


def _log_change(before: State, now: State) -> None:
    """Say what a state that is served from now on changes."""
    old, new = before.paths, now.paths
    came, gone = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    changed = sorted(task for task in new.keys() & old.keys() if new[task] != old[task])
    logger.info(
        "vllm-vlora: %s was published again and is served now: %s, %d of them new%s, %d changed%s; "
        "%d gone%s%s",
        shown(str(now.checkpoint.path)),
        count_of(len(new), "task"),
        len(came),
        _named(came),
        len(changed),
        _named(changed),
        len(gone),
        _named(gone),
        _changed_beside(before, now),
        extra=facts(
            "publication",
            digest=now.digest,
            tasks=len(new),
            new=len(came),
            changed=len(changed),
            gone=len(gone),
        ),
    )


def _changed_beside(before: State, now: State) -> str:
    """What was published beside the tasks, which is all of it where somebody only moves an alias."""
    old, new = before.aliases, now.aliases
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    said = f"; {len(names)} of the aliases changed{_named(names)}" if names else ""
    if before.router == now.router:
        return said
    return f"{said}; the router was {'trained' if now.router else 'taken away'}"


def _named(tasks: list[str]) -> str:
    return f" ({shown(some_of(tasks, 3))})" if tasks else ""


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


def _of_the_base_model(mapping: LoRAMapping) -> LoRAMapping:
    return without_adapters(mapping, len(mapping.index_mapping), len(mapping.prompt_mapping))


def _log_direct(manager: TaskLoRAManager, path: DirectPath) -> None:
    """Say which tasks run direct, which do not and why, and what each part takes."""
    tasks = manager.vlora_store.tasks()
    others = [task for task in tasks if task.direct is None]
    # One task of each reason.
    reasons = {task.obstacle: task.task_id for task in reversed(others)}
    why = some_of((f"{task!r}: {why}" for why, task in reversed(reasons.items())), 3)
    logger.info(
        "vllm-vlora: mode %s: %d of %s direct, up to %d in one batch; %d materialized%s",
        manager.setup.settings.mode,
        len(tasks) - len(others),
        count_of(len(tasks), "task"),
        path.table.slots,
        len(others),
        f" ({shown(why)})" if others else "",
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


# --- classification heads --------------------------------------------------------------------------


def _layers_left_to_stock(modules: dict[str, Any], filled: list[Any]) -> dict[str, Any]:
    """The layers that stock code sets or resets when a task of ours takes a slot.

    ``filled`` are the layers of fused experts that the task's own writes fill.
    """
    ours = set(map(id, filled))
    return {
        name: layer
        for name, layer in modules.items()
        if is_full_head(layer) or (is_fused_moe(layer) and id(layer) not in ours)
    }


def _full_heads(task: ResidentTask) -> dict[str, Any]:
    """A task's classification head as vLLM wants it: module name -> whole weights."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in task.extra.items():
        if not is_base_copy(name):
            *_, module, part = name.split(".")
            tensors.setdefault(module, {})[part] = tensor
    if not tensors:
        return {}
    from vllm.lora.lora_weights import LoRAFullModuleWeights  # not there before 0.31

    return {
        module: LoRAFullModuleWeights(module, parts["weight"], parts.get("bias"))
        for module, parts in tensors.items()
    }


def _check_extra(checkpoint: Checkpoint, task_id: str, manager: TaskLoRAManager) -> None:
    """Refuse tensors beside the LoRA weights that this model or this vLLM cannot apply."""
    reason = extra_obstacle(checkpoint.record(task_id))
    if reason is not None:
        raise ModelMismatchError(
            f"{checkpoint.path}: task {task_id!r} cannot be served: {reason}; leave it out of the served "
            "checkpoint"
        )
    for name in checkpoint.record(task_id).extra:
        if is_base_copy(name):
            continue  # Stock vLLM leaves it out as well.
        module = name.split(".")[-2] if "." in name else name
        if manager.elsewhere:
            raise ModelMismatchError(
                f"{checkpoint.path}: task {task_id!r} carries {name}, a head, which is not served with "
                "pipeline parallel, where the last rank alone has it; use tensor parallel instead"
            )
        supported: set[str] = getattr(manager, "supported_modules_to_save", set())
        if module not in supported:
            raise ModelMismatchError(
                f"{checkpoint.path}: task {task_id!r} carries {name}, which this vLLM "
                "cannot serve with this model; leave the task out of the served checkpoint"
            )


def _check_unserved(
    checkpoint: Checkpoint,
    task_id: str,
    unserved: dict[str, str],
    engine_name: Callable[[str], str],
) -> None:
    """Refuse an update that would have no effect, or another one's: stock vLLM says no word of it."""
    for segment in checkpoint.record(task_id).segments if unserved else ():
        module = checkpoint.modules[segment.module].name
        why = unserved.get(engine_name(module))
        if why is not None:
            raise ModelMismatchError(
                f"{checkpoint.path}: task {task_id!r} adapts {module}, which {why} the task out of the "
                "served checkpoint"
            )


# --- what is refused or warned of at start-up ------------------------------------------------------


def _refuse_direct_config(vllm_config: Any) -> None:
    """Refuse what direct tasks were not made for, with the way out."""
    from vllm import envs

    otherwise = "leave it out, or set VLLM_VLORA_MODE=materialize"
    if vllm_config.lora_config.fully_sharded_loras:
        raise ModelMismatchError(
            "vllm-vlora does not run tasks direct with --fully-sharded-loras, whose layers gather what "
            f"every rank shrank before they expand it, and the direct pass has no such half; {otherwise}"
        )
    if vllm_config.lora_config.specialize_active_lora:
        raise ModelMismatchError(
            "vllm-vlora does not run tasks direct with --specialize-active-lora, which captures graphs "
            f"by the number of adapters in a batch and counts direct tasks with them; {otherwise}"
        )
    in_parts = next((option for option, on in _options_of_parts(vllm_config).items() if on), None)
    if in_parts is not None:
        raise ModelMismatchError(
            f"vllm-vlora does not run tasks direct with {in_parts}, under which layers see a part of a "
            "batch's tokens and adapters are known by all of them, also in vLLM's own LoRA; leave it out"
        )
    if envs.VLLM_BATCH_INVARIANT:
        # How the kernels cut a sum depends on the batch.
        raise ModelMismatchError(
            f"vllm-vlora does not run tasks direct with VLLM_BATCH_INVARIANT; {otherwise}"
        )


def _options_of_parts(vllm_config: Any) -> dict[str, bool]:
    """Options under which layers do not see all of a batch's tokens -> whether they are on."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    return {
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--enable-dbo or --ubatch-size": parallel.use_ubatching,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-expert-parallel with tensor and data parallel": parallel.use_sequence_parallel_moe,
    }


def _warn_of_base_model(checkpoint: Checkpoint, manager: TaskLoRAManager) -> None:
    trained_on = checkpoint.base_model
    served = getattr(getattr(manager.model, "config", None), "_name_or_path", "")
    if trained_on and served and trained_on != served:
        logger.warning(
            "vllm-vlora: the adapters were trained on %s, the engine serves %s; their shapes agree, "
            "their weights are not compared",
            shown(trained_on),
            shown(served),
        )
