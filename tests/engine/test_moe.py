"""Adapters of a mixture of experts: what our tasks put into a real engine's slots next to stock's.

vLLM has no kernel for LoRA on fused experts on CPU, so what is compared are the slots, byte by byte, and
the flags that the kernel reads; only the answers of adapters without experts are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_forks import run_script
from engine_world import ENGINE_ARGUMENTS, PROMPTS
from moe_world import ADAPTERS, make_moe_adapters, make_moe_model

from vllm_vlora import CompressOptions, compress, open_adapter

pytestmark = pytest.mark.engine

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

def obstacles(worker):
    manager = worker.model_runner.lora_manager._adapter_manager
    return {task.task_id: task.obstacle for task in manager.vlora_store.tasks()}

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_lora=True, max_loras=1, max_lora_rank=8, max_cpu_loras=8,
              **job["arguments"])
    found = {"obstacles": llm.collective_rpc(obstacles)}
    requests = {}
    for number, (name, path) in enumerate(job["adapters"].items(), 1):
        requests[f"stock {name}"] = LoRARequest(f"stock-{name}", number, path)
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
    model: Path, checkpoint: Path, adapters: dict[str, Path], mode: str, **arguments: Any
) -> dict[str, Any]:
    job = {
        "model": str(model),
        "checkpoint": str(checkpoint),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "arguments": {**ENGINE_ARGUMENTS, "dtype": "bfloat16", **arguments},
    }
    return run_script(
        SCRIPT,
        json.dumps(job),
        VLLM_VLORA_CHECKPOINT=str(checkpoint),
        VLLM_VLORA_MODE=mode,
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # To send a function to the workers.
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ],
    ids=["one rank", "two tensor-parallel ranks", "two expert-parallel ranks"],
)
def test_slots_of_experts_hold_what_stock_puts_there(
    moe: tuple[Path, dict[str, Path]], tmp_path: Path, arguments: dict[str, Any]
) -> None:
    model, adapters = moe
    checkpoint = store(tmp_path / "checkpoint", adapters)
    found = fill_slots(model, checkpoint, adapters, "materialize", **arguments)
    ranks = arguments.get("tensor_parallel_size", 1)
    seen = set()
    for name in ADAPTERS:
        stock, *again = found[f"stock {name}"]
        assert len(stock) == ranks
        assert again == [stock, stock]
        for ours in found[f"ours {name}"]:
            assert ours == stock
        for rank in stock:
            experts = [value for key, value in rank.items() if ".experts" in key]
            assert len(experts) == 2 * 7, "six tensors and the flags in each of two layers"
            assert all(nonzero > 0 for _, nonzero in experts) == (name != "attention")
            assert any(nonzero > 0 for _, nonzero in experts) == (name != "attention")
            seen.add(json.dumps(rank))
    assert len(seen) == ranks * len(ADAPTERS)
