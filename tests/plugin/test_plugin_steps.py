"""What is put into vLLM's model runners, on stand-ins of both."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

SEED = 7
MIXIN = "vllm.v1.worker.lora_model_runner_mixin"


@pytest.fixture
def steps() -> Any:
    return importlib.import_module("vllm_vlora.plugin.steps")


class Model:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def compute_logits(self, rows: torch.Tensor) -> None:
        head_calls = importlib.import_module("vllm_vlora.plugin.head_calls")
        self.seen.append(head_calls._TOKENS.get())

    def embed_input_ids(self, input_ids: torch.Tensor) -> None:
        self.compute_logits(input_ids)


def _runner_class() -> Any:
    class GPUModelRunner:
        """As vLLM's first model runner: the model's own method, once a request."""

        def __init__(self, lora: bool = True) -> None:
            self.model = Model()
            self.lora_config = object() if lora else None
            self.num_prompt_logprobs = {"request": 1}
            self.enable_prompt_embeds = True
            self.is_token_ids = SimpleNamespace(np=np.ones(8, dtype=bool))
            self.discard_request_mask = SimpleNamespace(np=np.zeros(8, dtype=bool))
            self.input_batch = SimpleNamespace(num_reqs=3, generators={})

        def _get_prompt_logprobs_dict(
            self, hidden_states: torch.Tensor, num_scheduled_tokens: Any
        ) -> Any:
            return self.model.compute_logits(hidden_states[2:5])

        def _preprocess(self, scheduler_output: Any, num_input_tokens: int) -> Any:
            count = scheduler_output.total_num_scheduled_tokens
            (positions,) = np.nonzero(self.is_token_ids.np[:count])
            return self.model.embed_input_ids(input_ids=torch.from_numpy(positions) + 100)

        def sample_tokens(self, grammar_output: Any) -> list[float]:
            """A draw a request; what is thrown away is taken back as vLLM does."""
            batch = self.input_batch
            drawn = [
                float(torch.rand((), generator=batch.generators.get(i)))
                for i in range(batch.num_reqs)
            ]
            for i in np.nonzero(self.discard_request_mask.np[: batch.num_reqs])[0]:
                generator = batch.generators.get(int(i))
                if generator is not None:
                    generator.set_offset(generator.get_offset() - 4)
            return drawn

    return GPUModelRunner


def _worker_class() -> Any:
    class PromptLogprobsWorker:
        """As vLLM's second one's worker: a function that it is given, once a piece of the batch."""

        def compute_prompt_logprobs(
            self, logits_fn: Any, hidden_states: torch.Tensor, more: int
        ) -> Any:
            return logits_fn(hidden_states[2:5])

    return PromptLogprobsWorker


def _second_runner_classes() -> dict[str, Any]:
    class LoraState:
        def make_lora_inputs(
            self, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray
        ) -> Any:
            ids = np.array([7, 0, 9])[idx_mapping]
            return tuple(ids), tuple(ids.repeat(num_scheduled_tokens)), {"requests"}

    class GPUModelRunner:
        def __init__(self) -> None:
            self.lora_state = LoraState()

        def prepare_inputs(self, scheduler_output: Any, more: int) -> Any:
            return SimpleNamespace(cu_num_logits_np=np.cumsum([0, *scheduler_output]))

    return {"GPUModelRunner": GPUModelRunner, "LoraState": LoraState}


class Worker:
    """As vLLM's worker, whose step of a rank without requests is a dummy batch."""

    model_runner: Any

    def execute_dummy_batch(self) -> Any:
        return self.model_runner._dummy_run()


def _idle_runner(second: bool) -> Any:
    """A runner of vLLM's with adapters: its first, or as its second one."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    class Runner(LoRAModelRunnerMixin):
        def __init__(self) -> None:
            self.lora_config = SimpleNamespace(max_loras=3, max_lora_rank=8)
            self.lora_manager = Adapters()
            if second:
                self.lora_state = SimpleNamespace()

        def _dummy_run(self) -> Any:
            scheduled = np.array([3, 4], dtype=np.int32)
            told = (None, True, 3) if second else (np.ones(2, dtype=np.int32), True, 0)
            with self.maybe_dummy_run_with_lora(self.lora_config, scheduled, *told):
                self.lora_manager.done.append("step")
                return idle_steps().is_idle(self.lora_state) if second else None

    return Runner()


def idle_steps() -> Any:
    return importlib.import_module("vllm_vlora.plugin.idle_steps")


class Adapters:
    """What a worker's adapters are told."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def get_dummy_lora_warmup_rank(self, rank: int) -> int:
        return rank

    def dummy_lora_cache(self) -> Any:
        return contextlib.nullcontext()

    def add_dummy_lora(self, request: Any, rank: int) -> None:
        self.done.append("add")

    def remove_all_adapters(self) -> None:
        self.done.append("remove all")

    def set_active_adapters(self, requests: Any, mapping: Any) -> None:
        counted = (len(requests), mapping.index_mapping, mapping.prompt_mapping)
        self.done.append(counted)


@pytest.fixture
def classes(steps: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Both, patched; the function of later versions is in neither."""
    v1, v2 = _runner_class(), _worker_class()
    others = {"PromptLogprobsWorker": v2, **_second_runner_classes(), "Worker": Worker}
    for name in {seam.module for seam in steps.STEP_SEAMS} - {MIXIN}:
        holder = {"GPUModelRunner": v1} if name.endswith("gpu_model_runner") else others
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**holder))
    for _ in range(2):
        steps.adapt_steps()
    return v1, v2


@pytest.mark.parametrize("second", [False, True])
def test_a_rank_without_requests_leaves_adapters_as_they_are(
    classes: tuple[Any, Any], second: bool
) -> None:
    worker = Worker()
    runner = worker.model_runner = _idle_runner(second)
    assert worker.execute_dummy_batch() is (True if second else None)
    base_model = [(0, (0,) * 7, (0, 0)), "step"]
    assert runner.lora_manager.done == base_model
    # The start's dummy batches are vLLM's, also after an idle step.
    runner.lora_manager.done.clear()
    assert runner._dummy_run() is (False if second else None)
    assert runner.lora_manager.done.count("add") == 3
    assert runner.lora_manager.done[-1] == "remove all"
    runner.lora_manager.set_active_adapters = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        worker.execute_dummy_batch()
    assert "maybe_dummy_run_with_lora" not in vars(runner)
    runner.lora_config = None
    runner.lora_manager.done.clear()
    worker.execute_dummy_batch()
    assert runner.lora_manager.done == ["step"]


def test_drafts_have_the_adapter_of_their_request(classes: tuple[Any, Any]) -> None:
    runner = sys.modules["vllm.v1.worker.gpu.model_runner"].GPUModelRunner()
    tokens = np.array([4, 6])
    for logits, want in (([1, 1], (9, 7)), ([4, 2], (9, 9, 9, 9, 7, 7)), ([1, 0], (9,))):
        runner.prepare_inputs(logits, 1)
        found = runner.lora_state.make_lora_inputs(["a", "b"], np.array([2, 0]), tokens)
        assert found == (want, (9,) * 4 + (7,) * 6, {"requests"})


def test_both_model_runners_tell_whose_rows_they_score(classes: tuple[Any, Any]) -> None:
    runner, worker = classes
    hidden, first, second, without = torch.randn(8, 4), runner(), Model(), runner(lora=False)
    first._get_prompt_logprobs_dict(hidden, {})
    assert "compute_logits" not in vars(first.model)
    worker().compute_prompt_logprobs(second.compute_logits, hidden, 1)
    without._get_prompt_logprobs_dict(hidden, {})
    assert [first.model.seen, second.seen, without.model.seen] == [
        [slice(2, 5)], [slice(2, 5)], [None]
    ]  # fmt: skip


def test_embeddings_of_some_tokens_are_told_apart(classes: tuple[Any, Any]) -> None:
    runner, output = classes[0](), SimpleNamespace(total_num_scheduled_tokens=5)
    runner._preprocess(output, 8)
    runner.is_token_ids.np[[0, 3, 6]] = False
    runner._preprocess(output, 8)
    every, some = runner.model.seen
    assert every is None
    assert some.tolist() == [1, 2, 4]
    assert "embed_input_ids" not in vars(runner.model)


def test_a_seed_draws_nothing_for_what_is_thrown_away(classes: tuple[Any, Any]) -> None:
    """The first kept draw is the seed's first; what belongs to others goes on."""
    runner = classes[0]()
    make = lambda: torch.Generator().manual_seed(SEED)  # noqa: E731
    runner.input_batch.generators.update({1: make(), 2: make()})
    want = [float(torch.rand((), generator=g)) for g in [make()] for _ in range(3)]
    runner.discard_request_mask.np[1] = True
    runner.discard_request_mask.np[5] = True  # of a batch before
    assert runner.sample_tokens(None)[2] == want[0]
    assert runner.sample_tokens(None)[2] == want[1]
    runner.discard_request_mask.np[1] = False
    assert runner.sample_tokens(None)[1:] == [want[0], want[2]]
    assert sorted(runner.input_batch.generators) == [1, 2]


def test_a_runner_that_works_otherwise_is_said(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_vlora.errors import IncompatibleVLLMError

    class GPUModelRunner:
        def _get_prompt_logprobs_dict(self, hidden_states: Any) -> None: ...

    monkeypatch.setitem(
        sys.modules,
        "vllm.v1.worker.gpu_model_runner",
        SimpleNamespace(GPUModelRunner=GPUModelRunner, __name__="stand-in"),
    )
    with pytest.raises(IncompatibleVLLMError, match=r"sample_tokens|_get_prompt_logprobs_dict"):
        steps.adapt_steps()
