"""A family of related tasks and a tiny Llama that was trained on them, for tests of training.

A sequence is ``shift script x1 y1 x2 y2 ...``: ten letters x, and y = x + shift (mod 10) written in one
of three scripts. The base model learns to obey the two control tokens; with neutral ones it copies x.
A task of the family is one (shift, script) that the model is to follow under neutral tokens, so that an
adapter turns the model towards something it can do, as fine-tuning does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHIFTS, SCRIPTS, LETTERS, PAIRS = 4, 3, 10, 4
NEUTRAL_SHIFT = SHIFTS
_SCRIPT_0 = SHIFTS + 1
NEUTRAL_SCRIPT = _SCRIPT_0 + SCRIPTS
_LETTER_0 = NEUTRAL_SCRIPT + 1
_OUTPUT_0 = _LETTER_0 + LETTERS
VOCABULARY = _OUTPUT_0 + SCRIPTS * LETTERS
IGNORED = -100
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]

Task = tuple[int, int]
Batch = dict[str, torch.Tensor]


def make_model(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def task_batch(task: Task, size: int, generator: torch.Generator) -> Batch:
    """Sequences of one task under neutral control tokens; only the answers have labels."""
    shift, script = task
    controls = torch.tensor([[NEUTRAL_SHIFT, NEUTRAL_SCRIPT]]).expand(size, 2)
    return _batch(controls, torch.full((size,), shift), torch.full((size,), script), generator)


def _pretraining_batch(size: int, generator: torch.Generator) -> Batch:
    shift = torch.randint(0, SHIFTS, (size,), generator=generator)
    script = torch.randint(0, SCRIPTS, (size,), generator=generator)
    neutral = torch.rand(size, generator=generator) < 0.2
    shift, script = (torch.where(neutral, 0, part) for part in (shift, script))
    controls = torch.stack(
        [
            torch.where(neutral, NEUTRAL_SHIFT, shift),
            torch.where(neutral, NEUTRAL_SCRIPT, _SCRIPT_0 + script),
        ],
        dim=1,
    )
    return _batch(controls, shift, script, generator)


def _batch(
    controls: torch.Tensor, shift: torch.Tensor, script: torch.Tensor, generator: torch.Generator
) -> Batch:
    x = torch.randint(0, LETTERS, (len(shift), PAIRS), generator=generator)
    y = _OUTPUT_0 + script[:, None] * LETTERS + (x + shift[:, None]) % LETTERS
    pairs = torch.stack([x + _LETTER_0, y], dim=2).flatten(1)
    ids = torch.cat([controls, pairs], dim=1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 3::2] = y
    return {"input_ids": ids, "labels": labels}


def pretrain(model: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        loss = model(**_pretraining_batch(64, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def held_out_loss(model: Any, task: Task) -> float:
    """Nats per answer on sequences that no training draws."""
    return float(model(**task_batch(task, 256, torch.Generator().manual_seed(10_000))).loss)


def train_adapter(model: Any, task: Task, folder: Path, steps: int, seed: int, rank: int) -> float:
    """A PEFT adapter for a task, saved to ``folder``; returns its held-out loss."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    wrapped = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = wrapped(**task_batch(task, 32, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wrapped.eval()
    final = held_out_loss(wrapped, task)
    wrapped.save_pretrained(folder)
    wrapped.unload()
    return final
