"""Train the demo's adapters on SmolLM2-135M-Instruct with PEFT.

The adapters in `examples/demo/adapters` come from this command, some two minutes each on one core:

    OMP_NUM_THREADS=1 python examples/demo/train_adapters.py --model .cache/smollm2

`adapters/training.json` beside them records the settings, the seeds, the versions and the loss on
held-out examples before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prepare_model import BASE_MODEL, prepare_model
from tasks import TASKS, Example, Task

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

DEMO = Path(__file__).resolve().parent
BATCH_SIZE = 4
WARMUP_STEPS = 5
IGNORED = -100
VERSIONS = ("torch", "transformers", "peft", "safetensors")

Row = tuple[list[int], list[int]]
"""Token ids, and labels: the same ids with those of the prompt set to IGNORED."""


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> Row:
    """Token ids and labels of one chat turn; only the answer and its end token carry a loss."""
    prompt, answer = example
    messages = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    head_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return head_ids + answer_ids, [IGNORED] * len(head_ids) + answer_ids


def collate(rows: list[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors `input_ids`, `attention_mask` and `labels`, each [rows, longest]."""
    longest = max(len(ids) for ids, _ in rows)

    def padded(sequences: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([ids + [fill] * (longest - len(ids)) for ids in sequences])

    return {
        "input_ids": padded([ids for ids, _ in rows], pad_id),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], IGNORED),
    }


def shuffled_batches(rows: list[Row], pad_id: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of BATCH_SIZE, each pass over the rows in a new order drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < BATCH_SIZE:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield collate([rows[index] for index in order[:BATCH_SIZE]], pad_id)
        order = order[BATCH_SIZE:]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over WARMUP_STEPS, then linear decay to zero."""
    return min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS), 1.0)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: list[Row], pad_id: int) -> float:
    """Mean loss per answer token, in nats, over the held-out examples."""
    model.eval()
    return float(model(**collate(rows, pad_id)).loss)


def train(
    task: Task, base: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, steps: int, bar: Progress
) -> tuple[PeftModel, dict[str, Any]]:
    """Train one adapter; returns the model that wraps `base` and the record of the training."""
    torch.manual_seed(task.seed)
    pad_id = tokenizer.pad_token_id
    rows = [encode(tokenizer, example) for example in task.train]
    held_out = [encode(tokenizer, example) for example in task.held_out]
    base_loss = held_out_loss(base, held_out, pad_id)

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=task.rank,
        lora_alpha=task.alpha,
        target_modules=list(task.target_modules),
        use_rslora=task.rslora,
        lora_dropout=0.0,
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=task.learning_rate, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    progress = bar.add_task(task.name, total=steps, loss=base_loss)
    batches = shuffled_batches(rows, pad_id, task.seed)
    model.train()
    for _ in range(steps):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update(progress, advance=1, loss=float(loss.detach()))
    record = {
        "seed": task.seed,
        "rank": task.rank,
        "alpha": task.alpha,
        "rslora": task.rslora,
        "target_modules": list(task.target_modules),
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": task.learning_rate,
        "training_examples": len(rows),
        "held_out_examples": len(held_out),
        "held_out_loss_base": round(base_loss, 4),
        "held_out_loss_adapter": round(held_out_loss(model, held_out, pad_id), 4),
    }
    return model, record


def save(model: PeftModel, task: Task, folder: Path) -> int:
    """Write a PEFT folder in bfloat16, replacing an older one; returns the bytes of its weights."""
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})

    # PEFT records the local folder the model was read from; what others need is the public name.
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_MODEL
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # In place of PEFT's card, which is a form that nobody has filled in.
    (folder / "README.md").write_text(
        f"LoRA adapter `{task.name}` for {BASE_MODEL}: {task.shows}. "
        f"Trained on {len(task.train)} examples by `examples/demo/train_adapters.py`.\n",
        encoding="utf-8",
    )
    return weights.stat().st_size


def write_records(path: Path, new: dict[str, Any]) -> None:
    """Merge `new` into the records at `path`; tasks that were not trained keep theirs."""
    records = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.exists() else {}
    records.update(new)
    document = {"base_model": BASE_MODEL, "tasks": dict(sorted(records.items()))}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(".cache/smollm2"),
        help="folder of the prepared base model; made when missing (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=DEMO / "adapters", help="default: %(default)s"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=[task.name for task in TASKS],
        metavar="TASK",
        help="train this task only; may be given several times",
    )
    parser.add_argument("--steps", type=int, help="steps for every task (default: the task's own)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    console = Console()
    prepare_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # float32 while training; only the saved weights are rounded to bfloat16.
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    versions = {"python": platform.python_version()} | {name: version(name) for name in VERSIONS}
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = [task for task in TASKS if not arguments.only or task.name in arguments.only]
    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        for task in chosen:
            steps = task.steps if arguments.steps is None else arguments.steps
            start = time.perf_counter()
            model, record = train(task, base, tokenizer, steps, bar)
            nbytes = save(model, task, arguments.output / task.name)
            write_records(
                arguments.output / "training.json", {task.name: record | {"versions": versions}}
            )
            base = model.unload()
            bar.console.print(
                f"{task.name}: held-out loss {record['held_out_loss_base']:.3f} -> "
                f"{record['held_out_loss_adapter']:.3f}, {nbytes / 1e6:.2f} MB, "
                f"{time.perf_counter() - start:.0f} s"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
