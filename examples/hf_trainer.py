"""Train a new task inside the subspace of others, with transformers' Trainer.

    python examples/hf_trainer.py                            # SmolLM2, the demo's adapters but one
    python examples/hf_trainer.py --task sql --steps 60
    python examples/hf_trainer.py --model MODEL --adapters FOLDER --data new.jsonl --task new

The other tasks' adapters give the bases; of the new task only small cores are trained, and the base
model stays as it is. Where the task has an adapter of its own, the bases are those of its layers, and the
cores are compared with it and with its projection onto these bases, which has as many numbers. The data
are lines of
{"prompt": ..., "completion": ...}, a fifth of which are held out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo_rows import (
    ADAPTERS,
    MODEL,
    adapter_folders,
    demo_pairs,
    inputs_of,
    load_model,
    mean_loss,
    to_rows,
)
from transformers import Trainer, TrainingArguments

from vllm_vlora.errors import VLoRAError
from vllm_vlora.evaluation.texts import Row, make_batches, padding_id, read_examples, tokenize
from vllm_vlora.integrations.huggingface import VLoRACallback
from vllm_vlora.model.training import orthogonal_init
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.weights import LoRAWeights, load_adapter


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        run(options)
    except VLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, float]:
    """Train, compare and save; returns the held-out losses."""
    tokenizer, model = load_model(options.model)
    train_rows, held_out = _rows(options, tokenizer)
    folders = adapter_folders(options.adapters)
    own = folders.pop(options.task, None)
    adapter = None if own is None else load_adapter(own)
    others = {name: load_adapter(folder) for name, folder in folders.items()}
    if adapter is not None:
        others = on_layers(others, adapter.layer_names)
    subspace = fit(others, options.components)
    print(f"{subspace} from {', '.join(others)}")

    losses = {"base model": mean_loss(model, held_out, tokenizer)}
    orthogonal_init(subspace, options.task, scale=0.0)
    callback = VLoRACallback(subspace, options.task, lr=options.lr, log_every=options.log_every)
    train(model, tokenizer, train_rows, callback, options)
    losses["trained cores"] = task_loss(model, subspace, options.task, held_out, tokenizer)
    print(f"{callback.trainer.num_trainable_params} numbers trained in {options.steps} steps")
    if adapter is not None:
        projected = subspace.project(adapter, "projected")
        print(f"{sum(core.numel() for core in projected.cores.values())} numbers in the projection")
        subspace.add_task(projected)
        losses["own adapter, projected"] = task_loss(
            model, subspace, "projected", held_out, tokenizer
        )
        subspace.remove_task("projected")
        alone = SharedSubspace.from_adapters([adapter], [options.task], 1.0, representation="joint")
        losses["own adapter"] = task_loss(model, alone, options.task, held_out, tokenizer)
    for name, loss in losses.items():
        print(f"{name:<24} {loss:7.4f} nats a held-out token")
    subspace.save(options.output, force=options.force)
    print(f"saved to {options.output}; {options.task} is one of its {len(subspace.tasks)} tasks")
    return losses


def on_layers(adapters: dict[str, LoRAWeights], layers: Sequence[str]) -> dict[str, LoRAWeights]:
    """The adapters with these layers only; those that have none of them are left out."""
    found = {}
    for name, weights in adapters.items():
        kept = [layer for layer in weights.layer_names if layer in set(layers)]
        lora_a = {layer: weights.lora_a[layer] for layer in kept}
        lora_b = {layer: weights.lora_b[layer] for layer in kept}
        if kept:
            rank = max(a.shape[0] for a in lora_a.values())
            found[name] = LoRAWeights(kept, lora_a, lora_b, rank, weights.metadata)
    return found


def fit(adapters: dict[str, LoRAWeights], components: int) -> SharedSubspace:
    """A joint subspace; adapters may differ in rank, alpha and modules."""
    return SharedSubspace.from_adapters(
        list(adapters.values()),
        list(adapters),
        num_components=components,
        representation="joint",
        missing="zero",
    )


def train(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    callback: VLoRACallback,
    options: argparse.Namespace,
) -> None:
    """All of this is the Trainer's: batches, clipping, schedule, logs."""
    pad_id = padding_id(tokenizer)

    def collate(chosen: list[Row]) -> dict[str, torch.Tensor]:
        return inputs_of(next(make_batches(chosen, len(chosen), pad_id)))

    settings = TrainingArguments(
        output_dir=str(options.output.with_name(f"{options.output.name}-training")),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=min(5, options.steps // 4),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        seed=options.seed,
    )
    trainer = Trainer(
        model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[callback]
    )
    trainer.train()
    model.eval()


def task_loss(
    model: Any, subspace: SharedSubspace, task: str, rows: Sequence[Row], tokenizer: Any
) -> float:
    runner = VLoRAModel(model, subspace)
    with runner.task(task):
        loss = mean_loss(runner, rows, tokenizer)
    runner.unload()
    return loss


def _rows(options: argparse.Namespace, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    if options.data is not None:
        rows = [tokenize(e, tokenizer, options.max_length) for e in read_examples(options.data)]
        return [r for i, r in enumerate(rows) if i % 5], rows[::5]
    pairs = demo_pairs()
    if options.task not in pairs:
        sys.exit(
            f"the demo has no task {options.task!r}; give --data, or one of {', '.join(pairs)}"
        )
    train_pairs, held_out = pairs[options.task]
    length = options.max_length
    return to_rows(train_pairs, tokenizer, length), to_rows(held_out, tokenizer, length)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="the adapters' base model")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="PEFT folders")
    parser.add_argument("--task", default="french", help="the task to learn (default french)")
    parser.add_argument("--data", type=Path, help="its texts; the demo's own when left out")
    parser.add_argument("--components", type=int, default=16, help="k of each basis (default 16)")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("hf-trainer-checkpoint"))
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
