"""Make the hard collections again: small models from nothing, and LoRA adapters of them with PEFT.

    python benchmarks/fidelity/hard/train.py                  all, some twenty minutes of one core
    python benchmarks/fidelity/hard/train.py prose-family     one, with its model

The text is what the Python installation holds, so that the weights are the same for the same versions
of Python and of the installed packages. What is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from fidelity.hard.corpus import Passage  # noqa: E402
from fidelity.hard.plans import COLLECTIONS, MODELS, HardCollection, Model, Plan  # noqa: E402

OUTPUT = Path(".cache/hard")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, BATCH = 128, 16
ROW, ADAPTER_BATCH, ADAPTER_RATE = 96, 8, 4e-3
TRAINING_ROWS, HELD_OUT_ROWS, CALIBRATION_ROWS = 256, 24, 8
IGNORED = -100


# --- the models ----------------------------------------------------------------------------------


def make_model(model: Model, folder: Path) -> Path:
    """A folder that transformers loads; about three minutes of one core each."""
    if (folder / "model.safetensors").exists():
        return folder
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    texts = [passage.text for passage in model.passages() if passage.part == "base"]
    tokenizer = _tokenizer(texts, model.vocabulary)
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(_config(model, tokenizer))
    losses = _pretrain(found, _blocks(tokenizer, texts), model.steps)
    found.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in found.parameters())
    print(
        f"{model.name}: {parameters} parameters, loss {losses[0]:.2f} -> {losses[-1]:.2f}, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return folder


def _config(model: Model, tokenizer: Any) -> Any:
    from transformers import Gemma3TextConfig, LlamaConfig

    size = model.hidden // model.heads
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": model.hidden,
        "intermediate_size": 11 * model.hidden // 4,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups or model.heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if model.kind == "llama":
        return LlamaConfig(**common)
    # Of every two layers one sees a window.
    types = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(model.layers)]
    return Gemma3TextConfig(
        **common,
        head_dim=size,
        query_pre_attn_scalar=size,
        sliding_window=LENGTH // 4,
        layer_types=types,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer(texts: Sequence[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _blocks(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def _pretrain(model: Any, blocks: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=0.1
    )
    generator, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in range(steps):
        ids = blocks[torch.randint(len(blocks), (BATCH,), generator=generator)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return [losses[0], sum(losses[-20:]) / 20]


# --- the adapters --------------------------------------------------------------------------------


def texts_of(plan: Plan, passages: Sequence[Passage], part: str, count: int) -> list[str]:
    """The first texts of a part, in the plan's style; sources take turns."""
    chosen = [
        passage
        for passage in passages
        if passage.part == part and (not plan.sources or passage.source in plan.sources)
    ]
    step = max(1, len(chosen) // count)
    return [plan.style(passage.text) for passage in chosen[::step][:count]]


def _batches(tokenizer: Any, texts: Sequence[str], seed: int) -> Iterator[dict[str, torch.Tensor]]:
    rows = [tokenizer(text)["input_ids"][:ROW] for text in texts]
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    while True:
        if len(order) < ADAPTER_BATCH:
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen = [rows[index] for index in order[:ADAPTER_BATCH]]
        order = order[ADAPTER_BATCH:]
        longest = max(map(len, chosen))
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        labels = torch.full((len(chosen), longest), IGNORED)
        for row, found in enumerate(chosen):
            ids[row, : len(found)] = labels[row, : len(found)] = torch.tensor(found)
        yield {"input_ids": ids, "attention_mask": (labels != IGNORED).long(), "labels": labels}


@torch.no_grad()
def _loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:ROW]])
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens


def train_adapter(
    base: Any, tokenizer: Any, plan: Plan, passages: Sequence[Passage], seed: int, parent: Path | None,
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Write a PEFT folder; returns what a record says of it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    started = time.perf_counter()
    torch.manual_seed(seed)
    held_out = texts_of(plan, passages, "held out", HELD_OUT_ROWS)
    before = _loss(base, tokenizer, held_out)
    if parent is None:
        config = LoraConfig(
            task_type="CAUSAL_LM", r=plan.rank, lora_alpha=2 * plan.rank, target_modules=TARGETS
        )
        model = get_peft_model(base, config)
    else:
        model = PeftModel.from_pretrained(base, str(parent), is_trainable=True)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Wider adapters take smaller steps in every direction, as alpha / r is the same.
    rate = ADAPTER_RATE * math.sqrt(8 / plan.rank)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=plan.steps)
    stream = _batches(tokenizer, texts_of(plan, passages, "train", TRAINING_ROWS), seed)
    model.train()
    for _ in range(plan.steps):
        model(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    after = _loss(model, tokenizer, held_out)
    model.save_pretrained(folder)
    model.unload()
    return {
        "rank": plan.rank,
        "steps": plan.steps,
        "parent": plan.parent,
        "held_out_loss_base": round(before, 4),
        "held_out_loss_adapter": round(after, 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_collection(collection: HardCollection, output: Path) -> Path:
    """The collection's folder, as ``fidelity.inputs`` reads it; its model is made first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model(MODELS[collection.model], output / "models" / collection.model)
    folder = output / collection.name
    if (folder / "collection.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    if collection.of:
        return _united(collection, output)
    base = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    passages = MODELS[collection.model].passages()
    calibration: list[str] = []
    records = {}
    for number, plan in enumerate([*collection.parents, *collection.tasks]):
        kind = "adapters" if plan.in_basis else "held_out_of_basis"
        kind = "parents" if plan in collection.parents else kind
        parent = None if plan.parent is None else folder / "parents" / plan.parent
        records[plan.name] = train_adapter(
            base, tokenizer, plan, passages, number, parent, folder / kind / plan.name
        )
        print(collection.name, plan.name, records[plan.name], flush=True)
        held_out = texts_of(plan, passages, "held out", HELD_OUT_ROWS)
        _write_jsonl(folder / "data" / f"{plan.name}.jsonl", held_out)
        if kind == "adapters":
            calibration += texts_of(plan, passages, "train", CALIBRATION_ROWS)
    _write_jsonl(folder / "calibration.jsonl", calibration)
    _write_record(folder, collection, records)
    return folder


def _united(collection: HardCollection, output: Path) -> Path:
    """The adapters of other collections side by side, as links."""
    folder, records = output / collection.name, {}
    for name in collection.of:
        part = make_collection(COLLECTIONS[name], output)
        records |= json.loads((part / "collection.json").read_text(encoding="utf-8"))["tasks"]
        for kind in ("adapters", "held_out_of_basis", "data"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for found in (part / kind).iterdir():
                (folder / kind / found.name).symlink_to(found.resolve())
    _write_record(folder, collection, records)
    return folder


def _write_record(folder: Path, collection: HardCollection, records: dict[str, Any]) -> None:
    document = {
        "collection": collection.name,
        "model": f"../models/{collection.model}",
        "tasks": records,
    }
    (folder / "collection.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is named, or everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collections", nargs="*", metavar="NAME", help=", ".join(COLLECTIONS))
    parser.add_argument(
        "-o", "--output", type=Path, default=OUTPUT, help=f"folder (default: {OUTPUT})"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.collections) - set(COLLECTIONS)
    if unknown:
        parser.error(
            f"no collection {', '.join(sorted(unknown))}; there are {', '.join(COLLECTIONS)}"
        )
    for name in options.collections or COLLECTIONS:
        make_collection(COLLECTIONS[name], options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
