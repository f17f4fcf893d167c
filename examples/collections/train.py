"""Train a collection of adapters on SmolLM2-135M-Instruct with PEFT, on CPU.

    python examples/collections/train.py unrelated -o .cache/collections/unrelated
    python examples/collections/train.py family    -o .cache/collections/family

The same command gives the same weights on the same machine. Tasks that are there already, trained
with the same settings, are kept. Two processes may train different `--tasks` into one folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]

from prepare_model import BASE_MODEL, prepare_model  # noqa: E402
from task_data import Example, Task  # noqa: E402

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from train_adapters import IGNORED, Row, collate, learning_rate_factor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

COLLECTIONS = {"unrelated": "unrelated_tasks", "family": "family_tasks"}
RANK, ALPHA = 16, 32
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 1e-3
BATCH_SIZE = 8
CALIBRATION_EXAMPLES = 16
# Held-out examples behind the losses in the records; the files hold more.
SCORED_EXAMPLES = 16
VERSIONS = ("torch", "transformers", "peft", "safetensors")


# --- data ----------------------------------------------------------------------------------------


def encode(tokenizer: Any, example: Example) -> Row:
    """Token ids and labels of plain text; only the completion and its end token carry a loss."""
    prompt, completion = example
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return head + tail, [IGNORED] * len(head) + tail


def batches(rows: Sequence[Row], pad_id: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of BATCH_SIZE, each pass over the rows in a new order drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        if len(order) < BATCH_SIZE:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield collate([rows[index] for index in order[:BATCH_SIZE]], pad_id)
        order = order[BATCH_SIZE:]


def write_jsonl(path: Path, examples: Sequence[Example]) -> None:
    """One JSON object a line, with `prompt` and `completion`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in examples)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_data(tasks: Sequence[Task], output: Path) -> None:
    """Held-out examples of every task, and calibration text from what the basis's tasks train on."""
    calibration: list[Example] = []
    for task in tasks:
        training, held_out = task.split()
        write_jsonl(output / "data" / f"{task.name}.jsonl", held_out)
        if task.in_basis:
            calibration += training[:CALIBRATION_EXAMPLES]
    write_jsonl(output / "calibration.jsonl", calibration)


# --- training ------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: Sequence[Row], pad_id: int) -> float:
    """Mean loss per completion token, in nats; all batches weigh by their tokens."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 2 * BATCH_SIZE):
        batch = collate(list(rows[start : start + 2 * BATCH_SIZE]), pad_id)
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


def start_adapter(base: torch.nn.Module, seed: int, parent: Path | None) -> PeftModel:
    """A fresh adapter drawn from `seed`, or one that goes on from the weights of `parent`."""
    torch.manual_seed(seed)
    if parent is not None:
        return PeftModel.from_pretrained(base, parent, is_trainable=True)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(TARGET_MODULES),
        lora_dropout=0.0,
    )
    return get_peft_model(base, config)


def optimise(model: PeftModel, rows: Sequence[Row], pad_id: int, steps: int, seed: int) -> None:
    """AdamW over the adapter's weights, with linear warm-up and decay."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    stream = batches(rows, pad_id, seed)
    model.train()
    for _ in range(steps):
        model(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def save(model: PeftModel, task: Task, folder: Path) -> None:
    """Write a PEFT folder in bfloat16, replacing an older one."""
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.update(
        base_model_name_or_path=BASE_MODEL, target_modules=sorted(config["target_modules"])
    )
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(
        f"LoRA adapter `{task.name}` for {BASE_MODEL}: {task.shows}. "
        "Trained by `examples/collections/train.py`.\n",
        encoding="utf-8",
    )


def settings_of(task: Task, seed: int, steps: int, parent: str | None) -> dict[str, Any]:
    """What the weights depend on besides the examples; written into the record."""
    return {
        "seed": seed,
        "steps": steps,
        "rank": RANK,
        "alpha": ALPHA,
        "target_modules": list(TARGET_MODULES),
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "parent": parent,
        "in_basis": task.in_basis,
    }


class Trainer:
    """Trains tasks into one folder, on one base model that is read when it is first needed."""

    def __init__(self, model: Path, output: Path, console: Console) -> None:
        self.model_folder, self.output, self.console = model, output, console
        self._loaded: tuple[Any, Any] | None = None

    def folder(self, task: Task) -> Path:
        """Where the task's adapter goes."""
        if task.name == "parent":
            return self.output / task.name
        kind = "adapters" if task.in_basis else "held_out_of_basis"
        return self.output / kind / task.name

    def record_file(self, task: Task) -> Path:
        """Where the task's record goes."""
        return self.output / "records" / f"{task.name}.json"

    def ensure(self, task: Task, seed: int, steps: int, parent: Task | None = None) -> None:
        """Train the task unless it is there with these settings."""
        settings = settings_of(task, seed, steps, parent.name if parent else None)
        record_file = self.record_file(task)
        if record_file.exists():
            record = json.loads(record_file.read_text(encoding="utf-8"))
            if record["settings"] == settings and self.folder(task).is_dir():
                self.console.print(f"{task.name}: there already")
                return
        record = {"settings": settings} | self._train(task, seed, steps, parent)
        record_file.parent.mkdir(parents=True, exist_ok=True)
        record_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self.console.print(
            f"{task.name}: held-out loss {record['held_out_loss_base']:.3f} -> "
            f"{record['held_out_loss_adapter']:.3f}, {record['seconds']:.0f} s"
        )

    def _train(self, task: Task, seed: int, steps: int, parent: Task | None) -> dict[str, Any]:
        base, tokenizer = self._base()
        started = time.perf_counter()
        training, held_out = (
            [encode(tokenizer, example) for example in part] for part in task.split()
        )
        scored = held_out[:SCORED_EXAMPLES]
        pad_id = tokenizer.pad_token_id
        loss_base = held_out_loss(base, scored, pad_id)
        model = start_adapter(base, seed, self.folder(parent) if parent else None)
        try:
            optimise(model, training, pad_id, steps, seed)
            loss_adapter = held_out_loss(model, scored, pad_id)
            save(model, task, self.folder(task))
        finally:
            self._loaded = (model.unload(), tokenizer)
        return {
            "held_out_loss_base": round(loss_base, 4),
            "held_out_loss_adapter": round(loss_adapter, 4),
            "training_examples": len(training),
            "held_out_examples": len(held_out),
            "scored_examples": len(scored),
            "seconds": round(time.perf_counter() - started, 1),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in VERSIONS},
        }

    def _base(self) -> tuple[Any, Any]:
        if self._loaded is None:
            disable_progress_bar()
            tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
            # The frozen base in bfloat16 halves the time; PEFT keeps the adapter in float32.
            base = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=torch.bfloat16)
            self._loaded = (base, tokenizer)
        return self._loaded


def write_collection(name: str, tasks: Sequence[Task], trainer: Trainer) -> None:
    """DIR/collection.json: the records of all tasks that are there."""
    records = {
        task.name: {"shows": task.shows} | json.loads(trainer.record_file(task).read_text("utf-8"))
        for task in tasks
        if trainer.record_file(task).exists()
    }
    document = {"collection": name, "base_model": BASE_MODEL, "tasks": records}
    path = trainer.output / "collection.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


# --- command line --------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection", choices=sorted(COLLECTIONS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(".cache/smollm2"),
        help="folder of the prepared base model; made when missing (default: %(default)s)",
    )
    parser.add_argument("--tasks", help="names, separated by commas (default: all)")
    parser.add_argument("--steps", type=int, help="for every task (default: the task's own)")
    parser.add_argument("--seed", type=int, default=0, help="added to every task's own seed")
    return parser.parse_args(arguments)


def chosen_tasks(tasks: Sequence[Task], names: str | None) -> list[Task]:
    """The tasks named, in the collection's order; exits on a name that is none of them."""
    if names is None:
        return list(tasks)
    wanted = set(names.split(","))
    unknown = wanted - {task.name for task in tasks}
    if unknown:
        raise SystemExit(f"error: no task {', '.join(sorted(unknown))} in this collection")
    return [task for task in tasks if task.name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    module = importlib.import_module(COLLECTIONS[options.collection])
    tasks, parent = module.TASKS, getattr(module, "PARENT", None)
    chosen = chosen_tasks(tasks, options.tasks)
    prepare_model(options.model)
    write_data(tasks, options.output)
    trainer = Trainer(options.model, options.output, Console())
    for task in ([parent] if parent else []) + chosen:
        steps = task.steps if options.steps is None else options.steps
        trainer.ensure(
            task, task.seed + options.seed, steps, parent if task is not parent else None
        )
        write_collection(options.collection, ([parent] if parent else []) + list(tasks), trainer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
