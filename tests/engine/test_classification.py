"""Adapters with a classification head of their own, scored by a real engine next to stock vLLM."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from engine_forks import run_script
from engine_world import make_model
from safetensors.torch import load_file, save_file

from vllm_vlora import CompressOptions, compress, open_adapter

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm_vlora import lora_request

def main():
    model, checkpoint, *adapters = sys.argv[1:]
    llm = LLM(model, runner="pooling", enable_lora=True, max_loras=1, max_lora_rank=8,
              dtype="float32", enforce_eager=True, max_model_len=128)
    requests = {"base": None}
    for number, path in enumerate(adapters, 1):
        name = path.rsplit("/", 1)[1]
        requests[f"stock {name}"] = LoRARequest(f"stock-{name}", number, path)
        requests[f"ours {name}"] = lora_request(checkpoint, name)
    scores = {}
    for name in [*requests, *reversed(requests)]:  # through one slot: every head is replaced
        outputs = llm.score("w5 w9 w20", ["w7 w8", "w100 w3 w4"], lora_request=requests[name])
        scores.setdefault(name, []).append([output.outputs.score for output in outputs])
    print("RESULT " + json.dumps(scores), flush=True)

if __name__ == "__main__":
    main()
"""


def _needs_heads() -> None:
    lora_weights = pytest.importorskip("vllm.lora.lora_weights")
    if not hasattr(lora_weights, "LoRAFullModuleWeights"):
        pytest.skip("vLLM serves classification heads of adapters from 0.32 on")


def _make(root: Path) -> tuple[Path, list[Path]]:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    words = make_model(root / "words")
    config = LlamaConfig.from_pretrained(words, num_labels=1, pad_token_id=0)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(root / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(words / name, root / "model" / name)
    folders = []
    for seed in (10, 11):
        torch.manual_seed(seed)
        base = LlamaForSequenceClassification.from_pretrained(root / "model")
        modules = ["q_proj", "v_proj"]
        adapted = get_peft_model(
            base, LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="SEQ_CLS")
        )
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.normal_(0, 0.25)
        adapted.save_pretrained(root / f"head-{seed}")
        folders.append(root / f"head-{seed}")
    return root / "model", folders


def _adapt_the_head(model: Path, folder: Path) -> Path:
    """An adapter with LoRA on the head, which then is the model's own."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(12)
    base = LlamaForSequenceClassification.from_pretrained(model)
    adapted = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "score"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.25)
    adapted.save_pretrained(folder)
    return folder


def test_classification_heads_travel_and_score_as_stock(tmp_path: Path) -> None:
    _needs_heads()
    model, folders = _make(tmp_path)
    folders.append(_adapt_the_head(model, tmp_path / "lora-on-head"))
    checkpoint = tmp_path / "checkpoint"
    compress(
        {folder.name: open_adapter(folder) for folder in folders},
        checkpoint,
        CompressOptions(representation="private", quantize="none", ratio=0.1),
    )
    scores = run_script(
        SCRIPT,
        str(model),
        str(checkpoint),
        *map(str, folders),
        VLLM_VLORA_CHECKPOINT=str(checkpoint),
    )
    seen = []
    for folder in folders:
        stock, ours = scores[f"stock {folder.name}"], scores[f"ours {folder.name}"]
        assert ours == stock
        seen.append(ours[0])
    assert len(set(map(tuple, seen))) == len(folders)
    assert scores["base"][0] == scores["base"][1]
    assert scores["base"][0] not in seen


START = """
import sys
from vllm import LLM

def main():
    LLM(sys.argv[1], runner="pooling", enable_lora=True, max_loras=1, max_lora_rank=8,
        dtype="float32", enforce_eager=True, max_model_len=128)
    print("RESULT true", flush=True)

if __name__ == "__main__":
    main()
"""


def test_a_head_that_does_not_fit_stops_the_start(tmp_path: Path) -> None:
    """Found when the checkpoint is loaded: inside a step it would end a running engine."""
    _needs_heads()
    model, (folder, *_) = _make(tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("score.weight"))
    tensors[name] = torch.zeros(3, tensors[name].shape[1])
    save_file(tensors, file)
    checkpoint = tmp_path / "checkpoint"
    compress({"task": open_adapter(folder)}, checkpoint, CompressOptions(ratio=0.1))
    with pytest.raises(
        AssertionError, match=r"task 'task': Full module .* incompatible weight shape"
    ):
        run_script(START, str(model), VLLM_VLORA_CHECKPOINT=str(checkpoint))
