"""Adapters of a mixture of experts in a real engine: its slots next to stock's, and its answers.

vLLM has no kernel for LoRA on fused experts on CPU. So the slots are compared byte by byte with the flags
that the kernel reads; and for the answers its definition in torch stands in for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_forks import run_script
from engine_world import ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, for_stock, older_vllm
from moe_world import (
    ADAPTERS,
    EXPERTS,
    INNER,
    greedy,
    make_fused_adapter,
    make_gpt_oss,
    make_moe_adapters,
    make_moe_model,
    merge,
)

from vllm_vlora import CompressOptions, compress, open_adapter, split_experts

pytestmark = pytest.mark.engine

LAYER = "model.layers.0.mlp.experts"

SCRIPT = """
import json, sys
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm_vlora import lora_request

def fingerprints(worker, name):
    import hashlib, torch
    manager = worker.model_runner.lora_manager._adapter_manager
    slot = manager.lora_index_to_id.index(name)
    found = {}
    for layer_name, layer in manager.modules.items():
        held = {"enabled": getattr(layer, "adapter_enabled", None)}
        for side in ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked",
                     "w2_lora_b_stacked", "lora_a_stacked", "lora_b_stacked"):
            stacks = getattr(layer, side, ())
            if isinstance(stacks, list):
                continue  # views of the experts' stacks
            stacks = (stacks,) if isinstance(stacks, torch.Tensor) else stacks
            held |= {f"{side} {n}": stack for n, stack in enumerate(stacks)}
        for side, stack in held.items():
            if stack is not None:
                values = stack[slot : slot + 1].contiguous()
                nonzero = int(values.count_nonzero())
                digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
                found[f"{layer_name} {side} {tuple(values.shape)}"] = [digest, nonzero]
    return found

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_lora=True, max_loras=1, max_lora_rank=8, max_cpu_loras=8,
              **job["arguments"])
    found, requests = {}, {}
    for number, (name, path) in enumerate(job["adapters"].items(), 1):
        fields = {"is_3d_lora_weight": True} if name in job["fused"] else {}
        requests[f"stock {name}"] = LoRARequest(f"stock-{name}", number, path, **fields)
        requests[f"ours {name}"] = lora_request(job["checkpoint"], name)
    # Through one slot, so that each finds what another left: stock's, ours, with experts and without.
    for name in [*requests, *reversed(requests), *sorted(requests)]:
        llm.llm_engine.add_lora(requests[name])
        ranks = llm.collective_rpc(fingerprints, args=(requests[name].lora_int_id,))
        found.setdefault(name, []).append(ranks)
    print("RESULT " + json.dumps(found), flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("moe")
    return make_moe_model(root / "model"), make_moe_adapters(root)


def store(folder: Path, adapters: dict[str, Path]) -> Path:
    """A checkpoint that keeps bfloat16 factors bit by bit."""
    opened = {name: open_adapter(path) for name, path in adapters.items()}
    options = CompressOptions(representation="private", quantize="none", ratio=0.1)
    compress(opened, folder, options)
    return folder


def fill_slots(
    model: Path, checkpoint: Path, adapters: dict[str, Path], *fused: str, **arguments: Any
) -> dict[str, Any]:
    job = {
        "model": str(model),
        "checkpoint": str(checkpoint),
        "adapters": {name: str(for_stock(path)) for name, path in adapters.items()},
        "fused": fused,
        "arguments": {**ENGINE_ARGUMENTS, "dtype": "bfloat16", **arguments},
    }
    return run_script(
        SCRIPT,
        json.dumps(job),
        VLLM_VLORA_CHECKPOINT=str(checkpoint),
        VLLM_VLORA_MODE="materialize",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # To send a function to the workers.
    )


TENSOR_PARALLEL = {"tensor_parallel_size": 2}
EXPERT_PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
RANKS = ["one rank", "two tensor-parallel ranks", "two expert-parallel ranks"]


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (EXPERTS, INNER)),
        (TENSOR_PARALLEL, (EXPERTS, INNER // 2)),
        (EXPERT_PARALLEL, (EXPERTS // 2, INNER)),
    ],
    ids=RANKS,
)
def test_slots_of_experts_hold_what_stock_puts_there(
    moe: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    arguments: dict[str, Any],
    shape: tuple[int, int],
) -> None:
    model, adapters = moe
    checkpoint = store(tmp_path / "checkpoint", adapters)
    found = fill_slots(model, checkpoint, adapters, **arguments)
    ranks = arguments.get("tensor_parallel_size", 1)
    seen = set()
    for name in ADAPTERS:
        stock, *again = found[f"stock {name}"]
        assert len(stock) == ranks
        assert again == [stock, stock]
        for ours in found[f"ours {name}"]:
            assert ours == stock
        for rank in stock:
            assert f"{LAYER} w13_lora_b_stacked 0 {(1, *shape, 8)}" in rank
            experts = [value for key, value in rank.items() if ".experts" in key]
            assert len(experts) == 2 * 7, "six tensors and the flags in each of two layers"
            assert all(nonzero > 0 for _, nonzero in experts) == (name != "attention")
            assert any(nonzero > 0 for _, nonzero in experts) == (name != "attention")
            seen.add(json.dumps(rank))
    assert len(seen) == ranks * len(ADAPTERS)


@pytest.mark.parametrize("arguments", [{}, TENSOR_PARALLEL, EXPERT_PARALLEL], ids=RANKS)
def test_adapters_of_fused_parameters_fill_the_same_slots(
    moe: tuple[Path, dict[str, Path]], tmp_path: Path, arguments: dict[str, Any]
) -> None:
    """Stock reads PEFT's own folder, and we the one that it was split into."""
    model, adapters = moe
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    fused, _ = make_fused_adapter(model, tmp_path / "fused", 70, **options)
    split = split_experts(fused, tmp_path / "split", interleaved=False)
    checkpoint = store(tmp_path / "checkpoint", {"fused": split, "experts": adapters["experts"]})
    given = {"fused": fused, "experts": adapters["experts"]}
    found = fill_slots(
        model, checkpoint, given, "fused", enable_mixed_moe_lora_format=True, **arguments
    )
    for name in given:
        assert found[f"ours {name}"] == found[f"stock {name}"]
    assert found["ours fused"] != found["ours experts"]


def test_interleaved_parameters_fill_the_same_slots(tmp_path: Path) -> None:
    """gpt-oss, whose experts stock vLLM cuts among ranks after it told gate and up apart."""
    model = make_gpt_oss(tmp_path / "model")
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    fused, _ = make_fused_adapter(model, tmp_path / "fused", 71, **options)
    names = ("w1", "w3", "w2")
    split = split_experts(fused, tmp_path / "split", interleaved=True, names=names)
    checkpoint = store(tmp_path / "checkpoint", {"fused": split})
    found = fill_slots(
        model,
        checkpoint,
        {"fused": fused},
        "fused",
        enable_mixed_moe_lora_format=True,
        **TENSOR_PARALLEL,
    )
    assert found["ours fused"] == found["stock fused"]
    experts = [value for key, value in found["stock fused"][0][0].items() if LAYER in key]
    assert len(experts) == 7
    assert all(nonzero > 0 for _, nonzero in experts)


ANSWERS = """
import json, sys
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm_vlora import lora_request

def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *args, **kwargs):
    lora = self._lora_context
    slots = lora.punica_wrapper.token_lora_indices
    output.zero_()
    for token, experts in enumerate(topk_ids.tolist()):
        slot = int(slots[token])
        adapted = slot >= 0 and int(lora.adapter_enabled[slot])
        x = hidden_states[token]
        for place, expert in enumerate(experts):
            gate_up = w1[expert] @ x
            if adapted:
                gate_up = gate_up + torch.cat([
                    b[slot, expert] @ (a[slot, expert] @ x)
                    for a, b in zip(lora.w13_lora_a_stacked, lora.w13_lora_b_stacked)])
            gate, up = gate_up.chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            down = w2[expert] @ inner
            if adapted:
                a, b = lora.w2_lora_a_stacked[0], lora.w2_lora_b_stacked[0]
                down = down + b[slot, expert] @ (a[slot, expert] @ inner)
            output[token] += topk_weights[token, place] * down

TritonExperts.apply = apply

def obstacles(worker):
    manager = worker.model_runner.lora_manager._adapter_manager
    return {task.task_id: task.obstacle for task in manager.vlora_store.tasks()}

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_lora=True, max_loras=8, max_lora_rank=8, **job["arguments"])
    requests = {"base": None} | {n: lora_request(job["checkpoint"], n) for n in job["tasks"]}
    items = [(name, n) for name in requests for n in range(len(job["prompts"]))]
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": job["prompts"][n]} for _, n in items], sampling,
                        lora_request=[requests[name] for name, _ in items], use_tqdm=False)
    answers = {}
    for (name, _), output in zip(items, done):
        answers.setdefault(name, []).append(list(output.outputs[0].token_ids))
    found = llm.collective_rpc(obstacles)
    print("RESULT " + json.dumps([answers, found]), flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(older_vllm(0, 32), reason="its CPU build cannot pick experts for LoRA kernels")
def test_attention_runs_direct_beside_materialized_experts(
    moe: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """All in one batch, in float32, next to models that PEFT merged the adapters into."""
    model, adapters = moe
    checkpoint = store(tmp_path / "checkpoint", adapters)
    job = {
        "model": str(model),
        "checkpoint": str(checkpoint),
        "tasks": list(ADAPTERS),
        "arguments": ENGINE_ARGUMENTS,
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
    }
    answers, (obstacles,) = run_script(
        ANSWERS,
        json.dumps(job),
        VLLM_VLORA_CHECKPOINT=str(checkpoint),
        VLLM_VLORA_SLOTS="2",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )
    assert obstacles["attention"] == ""
    for name in ("everything", "experts"):
        assert obstacles[name].endswith(".down_proj is of a fused expert")
    expected = {"base": greedy(model, PROMPTS, MAX_TOKENS)}
    for name, path in adapters.items():
        merged = merge(model, path, tmp_path / f"merged-{name}")
        expected[name] = greedy(merged, PROMPTS, MAX_TOKENS)
    assert len({json.dumps(answer) for answer in expected.values()}) == len(expected)
    assert answers == expected
