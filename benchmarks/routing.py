"""Which features a router of prompts is best built on, what it sends where, and what a pick costs."""

from __future__ import annotations

import argparse
import ast
import itertools
import random
import re
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from harness import cpu_name, end_record, print_record, record, say, table, write_json

from vllm_vlora.blending.prompt_features import BUCKETS, counts
from vllm_vlora.blending.text_router import RoutePolicy, TextRouter
from vllm_vlora.model.router import TaskRouter
from vllm_vlora.model.text_routing import RouterOptions, train_text_router

DESCRIPTION = """\
Texts of three kinds, each cut into what is trained on and what is judged: the prompts of the two
collections of examples/collections (those of the family are alike in every task, so that chance is all
there is), and the first paragraphs of the docstrings of installed packages, which are tasks here.

On the docstrings TaskRouter is trained on each candidate for its features, as often as --rounds says:
runs of bytes (what is built in), words and pairs of words, and with --model tokens and pairs of tokens,
and the mean of the model's input embeddings.

Then the router as `vllm-vlora router train` makes it: how many of the other texts go right, how many
have a weight above the threshold, and how many texts of another kind go to the base model. Last the CPU
time of one pick against the length of the prompt.
"""
EXAMPLES = """\
  python benchmarks/run.py routing --quick
  python benchmarks/run.py routing --model .cache/demo/model --json FILE      some five minutes on a core
"""
PACKAGES = ("torch", "transformers", "numpy", "pydantic", "vllm", "peft", "ray", "aiohttp", "sympy",
            "networkx", "jinja2", "PIL", "openai", "rich")  # fmt: skip
LENGTHS = (50, 500, 2000, 8192, 200_000)
Split = tuple[dict[str, list[str]], dict[str, list[str]]]
"""Label -> texts to train on, and label -> texts to judge by."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model whose tokens are a candidate."""
    parser.add_argument("--model", type=Path, help="a folder with a tokenizer and safetensors")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sizes of a smoke run where one is asked for."""
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.train, args.judge = (20, 10) if args.quick else (150, 50)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    torch.set_num_threads(1)
    report = record(args, cpu_name(), "torch", "numpy")
    print_record(report)
    docs = docstrings(args.train, args.judge)
    report["packages"] = list(docs[0])
    report["accuracy"] = {
        name: [_accuracy(features, docs, seed) for seed in range(args.rounds)]
        for name, features in candidates(args.model).items()
    }
    rows = [
        [name, f"{statistics.mean(found):.3f}", f"{min(found):.3f}", f"{max(found):.3f}"]
        for name, found in report["accuracy"].items()
    ]
    print(f"\n{table(['docstrings: features', 'right', 'least', 'most'], rows)}")
    kinds = {"docstrings": docs, **collections(args.quick)}
    routers = {name: _trained(name, texts) for name, texts in kinds.items()}
    report["routed"] = {
        name: {other: _routed(routers[name], kinds[other][1], name == other) for other in kinds}
        for name in kinds
    }
    _print_routed(report["routed"])
    report["pick_milliseconds"] = _costs(routers["docstrings"])
    rows = [[str(n), f"{cost:.2f}"] for n, cost in report["pick_milliseconds"].items()]
    print(f"\n{table(['characters', 'ms of CPU for a pick'], rows)}")
    end_record(report)
    write_json(args.json, report)
    return 0


# --- texts ----------------------------------------------------------------------------------------


def collections(quick: bool) -> dict[str, Split]:
    """The prompts of the two collections."""
    sys.path.append(str(Path(__file__).parents[1] / "examples" / "collections"))
    import family_tasks
    import unrelated_tasks

    found = {}
    for name, module in (("unrelated", unrelated_tasks), ("family", family_tasks)):
        parts: Split = ({}, {})
        for task in module.TASKS:
            for texts, examples in zip(parts, task.split()):
                texts[task.name] = [prompt for prompt, _ in examples[: 12 if quick else None]]
        found[name] = parts
    return found


def docstrings(train: int, judge: int) -> Split:
    """One paragraph each, of packages that are installed and have enough of them."""
    parts: Split = ({}, {})
    for package in PACKAGES:
        spec = find_spec(package)
        found = sorted(set(_paragraphs(Path(spec.origin).parent))) if spec and spec.origin else []
        random.Random(1).shuffle(found)
        if len(found) < train + judge:
            say(f"{package} has too few docstrings or is not installed")
            continue
        parts[0][package], parts[1][package] = found[:train], found[train : train + judge]
    return parts


def _paragraphs(folder: Path) -> Iterator[str]:
    files = sorted(folder.rglob("*.py"))
    random.Random(0).shuffle(files)
    for file in files[:400]:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (
                text := ast.get_docstring(node)
            ):
                line = " ".join(text.split("\n\n")[0].split())
                if 40 < len(line) < 400:
                    yield line


# --- candidates -----------------------------------------------------------------------------------

Features = Callable[[str], np.ndarray]


def candidates(model: Path | None) -> dict[str, tuple[Features, bool]]:
    """Name -> a row of a text, and whether its numbers are counts."""

    def of_bytes(text: str) -> np.ndarray:
        row = np.zeros(BUCKETS, dtype=np.float32)
        places, times = counts(text, BUCKETS)
        row[places] = times
        return row

    def of_words(text: str) -> np.ndarray:
        return _pairs(re.findall(r"\w+|[^\w\s]", text.lower()))

    found: dict[str, tuple[Features, bool]] = {
        "runs of 3 to 5 bytes": (of_bytes, True),
        "words and pairs": (of_words, True),
    }
    if model is not None:
        found |= _of_model(model)
    return found


def _of_model(model: Path) -> dict[str, tuple[Features, bool]]:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    weights: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        weights |= {n: t for n, t in load_file(file).items() if n.endswith("embed_tokens.weight")}
    [embeddings] = weights.values()

    def of_tokens(text: str) -> np.ndarray:
        return _pairs([str(token) for token in tokenizer(text)["input_ids"]])

    def of_embeddings(text: str) -> np.ndarray:
        mean = embeddings[tokenizer(text)["input_ids"]].float().mean(0).numpy()
        return 10 * mean / np.linalg.norm(mean)

    return {
        "tokens and pairs": (of_tokens, True),
        "mean input embedding": (of_embeddings, False),
    }


def _pairs(parts: Sequence[str]) -> np.ndarray:
    row = np.zeros(BUCKETS, dtype=np.float32)
    for part in (*parts, *map(" ".join, itertools.pairwise(parts))):
        row[zlib.crc32(part.encode()) % BUCKETS] += 1
    return row


def _accuracy(candidate: tuple[Features, bool], texts: Split, seed: int) -> float:
    """Of the texts to judge by, those that a router with these features takes for what they are."""
    features, counted = candidate
    labels = [[label for label, own in part.items() for _ in own] for part in texts]
    train, judge = (np.stack([features(t) for own in part.values() for t in own]) for part in texts)
    if counted:
        idf = np.log((1 + len(train)) / (1 + (train > 0).sum(0))) + 1
        train, judge = (_normed(np.log1p(rows) * idf) for rows in (train, judge))
    torch.manual_seed(seed)
    router = TaskRouter(train.shape[1], len(texts[0]), 64, list(texts[0]))
    router.fit(
        torch.tensor(train, dtype=torch.float32), labels[0], lr=5e-3, weight_decay=1e-2, seed=seed,
        # Dense numbers want more passes.
        epochs=8 if counted else 40,
    )  # fmt: skip
    found = router.predict(torch.tensor(judge, dtype=torch.float32))
    return sum(a == b for a, b in zip(found, labels[1])) / len(found)


def _normed(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


# --- the router that is built in ------------------------------------------------------------------


def _trained(name: str, texts: Split) -> TextRouter:
    say(f"train a router on {name}")
    # A part is held out for the temperature; what is judged is neither.
    found = train_text_router(texts[0], RouterOptions())
    return TextRouter(found.tasks, found.temperature, found.weights)


def _routed(router: TextRouter, texts: Mapping[str, Sequence[str]], own: bool) -> dict[str, float]:
    """Parts of texts: to the base model, and with the threshold and without to the right task."""
    labelled = [(text, label) for label, texts_ in texts.items() for text in texts_]
    tasks = set(router.tasks)
    picks = [router.pick(text, tasks, RoutePolicy()).blend for text, _ in labelled]
    found = {"base": sum(pick is None for pick in picks) / len(picks)}
    if own:
        likeliest = [
            router.pick(text, tasks, RoutePolicy(threshold=0.0)).blend for text, _ in labelled
        ]
        right = [
            pick is not None and pick[0].task == y for pick, (_, y) in zip(likeliest, labelled)
        ]
        above = [yes for yes, pick in zip(right, picks) if pick is not None]
        found["right"] = sum(right) / len(right)
        if above:
            found["right_above_threshold"] = sum(above) / len(above)
    return found


def _print_routed(routed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    rows = [
        [router, texts, *(f"{found[key]:.3f}" if key in found else "-" for key in
                          ("right", "base", "right_above_threshold"))]
        for router, kinds in routed.items()
        for texts, found in kinds.items()
    ]  # fmt: skip
    head = ["router of", "texts of", "right", "to the base", "right of the others"]
    print(f"\n{table(head, rows, left=2)}")


def _costs(router: TextRouter) -> dict[int, float]:
    """Characters of a prompt -> milliseconds of CPU for a pick, the median of many."""
    tasks, found = set(router.tasks), {}
    words = [f"word{number}" for number in range(1, 40_000)]
    for length in LENGTHS:
        text = " ".join(words)[:length]
        times = []
        for _ in range(50):
            started = time.process_time_ns()
            router.pick(text, tasks, RoutePolicy())
            times.append((time.process_time_ns() - started) / 1e6)
        found[length] = statistics.median(times)
    return found
