"""The code on the pages of vlora and lorashare, and small real adapters under the names that it reads.

``tests/data/seed_pages`` has the code as it stands there. The adapters are trained and saved by
PEFT, each on a task of its own, of a Llama that was trained before.
"""

from __future__ import annotations

import re
from pathlib import Path

import cipher_tasks
import pytest
import torch
from places import DATA

TASKS = [f"task_{number}" for number in range(10)] + ["new_task", "another_task"]
TARGETS, RANK, STEPS = ["q_proj", "v_proj"], 16, 25
_BLOCK = re.compile(r"^## ([^\n]+)\n\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: str, language: str) -> dict[str, str]:
    """Heading -> code, of a page's blocks in one language, with the imports as they are here."""
    text = (DATA / "seed_pages" / f"{page}.md").read_text(encoding="utf-8")
    found = {title: code for title, kind, code in _BLOCK.findall(text) if kind == language}
    return {title: renamed(code) for title, code in found.items()}


def renamed(code: str) -> str:
    """Code of a page as ``docs/migration.md`` says to change it: the import, and the command's name."""
    code = re.sub(r"^from (?:vlora|peft_share)\b", "from vllm_vlora", code, flags=re.MULTILINE)
    return re.sub(r"^(?:vlora|lorashare) ", "vllm-vlora ", code, flags=re.MULTILINE)


def write_world(folder: Path) -> None:
    """A base model as ``model-name``, and its adapters in ``adapters/``: rank 16, alpha 32."""
    # The shift and the script that every adapter teaches; the first of all the model can do as it is.
    tasks = [(s, k) for s in range(cipher_tasks.SHIFTS) for k in range(cipher_tasks.SCRIPTS)][1:]
    model = cipher_tasks.make_model()
    cipher_tasks.pretrain(model, 150)
    model.save_pretrained(folder / "model-name")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cipher_tasks, "TARGETS", TARGETS)
        for seed, name in enumerate(TASKS):
            task, place = tasks[seed % len(tasks)], folder / "adapters" / name
            cipher_tasks.train_adapter(model, task, place, STEPS, seed, RANK)


def write_classifiers(folder: Path, names: list[str]) -> None:
    """A tiny ``roberta-base``, and adapters of it with classifier heads, under these names."""
    from peft import LoraConfig, get_peft_model
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder / "roberta-base")
    ids = torch.randint(2, 64, (32, 12))
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        base = RobertaForSequenceClassification.from_pretrained(folder / "roberta-base")
        lora = LoraConfig(
            task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]
        )
        model = get_peft_model(base, lora)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
        for _ in range(10):
            loss = model(input_ids=ids, labels=ids[:, seed] % 2).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(str(folder / name))
