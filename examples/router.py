"""Send each text to the adapter that fits it: train a TaskRouter, and run its blends.

    python examples/router.py                                    # SmolLM2, four of the demo's tasks
    python examples/router.py --model MODEL --adapters FOLDER --data FOLDER
                                                                 # FOLDER/TASK.jsonl for each task

The router sees the base model's own features of a prompt (its last hidden states, averaged), so that one
pass without any task chooses for the second. What is reported for texts that nothing was trained on:
how often the router is right, and the loss of the base model, of routed blends (each text with its own
weights, many tasks in one batch) and of the right task. Data are lines of {"prompt": ..., "completion":
...}, a fifth of which are held out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
    to_rows,
)

from vllm_vlora.errors import VLoRAError
from vllm_vlora.evaluation.texts import (
    IGNORED,
    Row,
    make_batches,
    padding_id,
    read_examples,
    tokenize,
)
from vllm_vlora.model.router import TaskRouter
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.subspace.shared import SharedSubspace

TASKS = ["sentiment", "sql", "keywords", "ticket"]


@dataclass
class Texts:
    """Rows of all tasks, and each one's task."""

    rows: list[Row]
    tasks: list[str]


@dataclass
class Report:
    """On held-out texts: the share routed to their task, and nats a token of the answers."""

    accuracy: float
    base: float
    routed: float
    oracle: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        run(options)
    except VLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> Report:
    """Fit the subspace, train the router, measure."""
    tokenizer, base = load_model(options.model)
    folders = adapter_folders(options.adapters)
    missing = [task for task in options.tasks if task not in folders]
    if missing:
        sys.exit(f"no adapter {missing[0]!r} in {options.adapters}; it has {', '.join(folders)}")
    subspace = SharedSubspace.from_adapters(
        [folders[task] for task in options.tasks],
        options.tasks,
        # All of the variance: routing is what is measured here, not compression.
        variance_threshold=1.0,
        representation="joint",
        missing="zero",
    )
    train, held_out = _texts(options, tokenizer)
    model = VLoRAModel(base, subspace)
    print(f"{model}; {len(train.rows)} texts to learn from, {len(held_out.rows)} held out")

    learned = features(model, train.rows, tokenizer)
    torch.manual_seed(options.seed)
    router = TaskRouter.from_subspace(subspace, learned.shape[1], options.hidden)
    losses = router.fit(learned, train.tasks, epochs=options.epochs, lr=options.lr)
    print(
        f"router of {router.num_params} numbers: cross-entropy {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    report = measure(model, router, held_out, tokenizer)
    print(f"routed to their task: {report.accuracy:.0%}")
    print(f"{'base model':<16} {report.base:7.4f} nats a token of the answers")
    print(f"{'routed blends':<16} {report.routed:7.4f}")
    print(f"{'the right task':<16} {report.oracle:7.4f}")
    return report


@torch.no_grad()
def features(model: VLoRAModel, rows: Sequence[Row], tokenizer: Any) -> torch.Tensor:
    """(rows, hidden size): the base model's last hidden states, averaged over each prompt."""
    prompts = [_prompt_of(row) for row in rows]
    found = torch.zeros(len(rows), model.config.hidden_size)
    with model.task(None):
        for batch in make_batches(prompts, 8, padding_id(tokenizer)):
            hidden = model.base_model.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask
            ).last_hidden_state
            mask = batch.attention_mask[..., None].float()
            found[list(batch.indices)] = (hidden.float() * mask).sum(1) / mask.sum(1)
    # Directions matter; one feature of a language model is often a hundred times the others.
    return torch.nn.functional.layer_norm(found, found.shape[1:])


def measure(model: VLoRAModel, router: TaskRouter, texts: Texts, tokenizer: Any) -> Report:
    """Texts of all tasks in the same batches."""
    seen = features(model, texts.rows, tokenizer)
    right = sum(found == task for found, task in zip(router.predict(seen), texts.tasks))
    model.clear_task()
    base = _loss(model, texts, tokenizer, lambda indices: None)
    routed = _loss(model, texts, tokenizer, lambda rows: router.blend(seen[rows], model))
    oracle = _loss(
        model, texts, tokenizer, lambda rows: model.set_tasks([texts.tasks[i] for i in rows])
    )
    return Report(right / len(texts.tasks), base, routed, oracle)


@torch.no_grad()
def _loss(model: VLoRAModel, texts: Texts, tokenizer: Any, choose: Any) -> float:
    total, tokens = 0.0, 0
    for batch in make_batches(texts.rows, 8, padding_id(tokenizer)):
        choose(list(batch.indices))
        count = sum(texts.rows[index].supervised for index in batch.indices)
        total += float(model(**inputs_of(batch)).loss) * count
        tokens += count
    return total / tokens


def _prompt_of(row: Row) -> Row:
    """The row up to its answer."""
    length = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    return Row(row.input_ids[:length], [IGNORED] * length)


def _texts(options: argparse.Namespace, tokenizer: Any) -> tuple[Texts, Texts]:
    train, held_out = Texts([], []), Texts([], [])
    pairs = {} if options.data is not None else demo_pairs()
    for task in options.tasks:
        if options.data is not None:
            examples = read_examples(options.data / f"{task}.jsonl")
            rows = [tokenize(example, tokenizer, options.max_length) for example in examples]
            parts = [row for i, row in enumerate(rows) if i % 5], rows[::5]
        else:
            first, last = pairs[task]
            parts = to_rows(first, tokenizer), to_rows(last, tokenizer)
        for texts, part in zip((train, held_out), parts):
            texts.rows += part
            texts.tasks += [task] * len(part)
    return train, held_out


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="the adapters' base model")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="PEFT folders")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=f"default {' '.join(TASKS)}")
    parser.add_argument("--data", type=Path, help="a folder of TASK.jsonl; else the demo's texts")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=64, help="width of the router (default 64)")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
