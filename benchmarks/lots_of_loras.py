"""Compress the 500 adapters of Lots-of-LoRAs and report what they answer, as *Compress then Serve* does.

    python benchmarks/lots_of_loras.py -o runs/lots-of-loras

fetches the adapters of Mistral-7B-Instruct-v0.2 (rank 16, about 55 MB each) and the test split of the
Natural-Instructions task of each from the Hub, compresses them at each ratio, asks one vLLM engine all
questions, and prints the metric relative to the uncompressed adapters. It takes a network and a GPU of
24 GB; what is there already is not fetched or made again. With --source a folder of the same form takes
the Hub's place:

    models/NAME-taskNUMBER/        a PEFT adapter
    datasets/taskNUMBER_TITLE/     a test split, .jsonl or .parquet: "input", and "output", a list of what
                                   is right

Read arXiv 2407.00066 beside the results: its numbers are relative Rouge-L over these tasks.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

AUTHOR = "Lots-of-LoRAs"
MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
PREFIX = "Mistral-7B-Instruct-v0.2-4b-r16-"
# As the model's own chat template writes one turn; its tokenizer puts the first token in front.
TEMPLATE = "[INST] {input} [/INST]"
_TASK = re.compile(r"task(\d+)(?:_|$)")


class Source(Protocol):
    """Where adapters and data sets come from."""

    def models(self) -> list[str]:
        """Names of the adapters."""

    def model(self, name: str) -> Path:
        """The folder of an adapter, here."""

    def datasets(self) -> list[str]:
        """Names of the data sets."""

    def dataset(self, name: str) -> Path:
        """The folder of a data set's test split, here."""


class Folder:
    """A folder of the form above."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def models(self) -> list[str]:
        return sorted(path.name for path in (self._folder / "models").iterdir())

    def model(self, name: str) -> Path:
        return self._folder / "models" / name

    def datasets(self) -> list[str]:
        return sorted(path.name for path in (self._folder / "datasets").iterdir())

    def dataset(self, name: str) -> Path:
        return self._folder / "datasets" / name


class Hub:
    """The author's repositories."""

    def models(self) -> list[str]:
        from huggingface_hub import HfApi

        found = HfApi().list_models(author=AUTHOR, search=f"{PREFIX}task")
        return sorted(one.id.partition("/")[2] for one in found)

    def model(self, name: str) -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(f"{AUTHOR}/{name}", allow_patterns=["adapter_*"]))

    def datasets(self) -> list[str]:
        from huggingface_hub import HfApi

        found = HfApi().list_datasets(author=AUTHOR, search="task")
        return sorted(one.id.partition("/")[2] for one in found)

    def dataset(self, name: str) -> Path:
        from huggingface_hub import snapshot_download

        place = f"{AUTHOR}/{name}"
        return Path(snapshot_download(place, repo_type="dataset", allow_patterns=["*test*"]))


def task_number(name: str) -> int | None:
    """The number of a Natural-Instructions task in a name."""
    found = _TASK.search(name)
    return None if found is None else int(found[1])


def read_rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set's test split."""
    files = sorted(path for path in folder.rglob("*test*") if path.suffix in (".jsonl", ".parquet"))
    if not files:
        raise SystemExit(f"{folder}: no test split in .jsonl or .parquet")
    for path in files:
        if path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line.strip():
                    yield json.loads(line)
            continue
        try:
            from pyarrow import parquet
        except ImportError:
            raise SystemExit(f"{path} needs pyarrow: pip install pyarrow") from None
        yield from parquet.read_table(path).to_pylist()


def held_out(rows: Iterator[Mapping[str, Any]], template: str, most: int) -> Iterator[str]:
    """Lines of a data file for `evaluate --metric`; rows without an answer are left out."""
    for number, row in enumerate(rows):
        if number == most:
            return
        outputs = row["output"] if isinstance(row["output"], list) else [row["output"]]
        if outputs:
            line = {"prompt": template.replace("{input}", row["input"]), "completion": outputs[0]}
            yield json.dumps(line | {"references": outputs[1:]}, ensure_ascii=False)


def gather(source: Source, output: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Task id -> adapter, with a data file `heldout/TASK.jsonl` of each; says what has none."""
    by_number = {task_number(name): name for name in source.datasets()}
    names = [name for name in source.models() if task_number(name) is not None]
    (output / "heldout").mkdir(parents=True, exist_ok=True)
    tasks: dict[str, Path] = {}
    for done, name in enumerate(names[: args.adapters], 1):
        number = task_number(name)
        task, data = f"task{number}", by_number.get(number)
        print(f"\r{done} of {len(names[: args.adapters])}: {name}", end="", file=sys.stderr)
        if data is None:
            print(f"\n{name}: no data set of its task, left out", file=sys.stderr)
            continue
        file = output / "heldout" / f"{task}.jsonl"
        if not file.exists():
            lines = list(held_out(read_rows(source.dataset(data)), args.template, args.examples))
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        tasks[task] = source.model(name)
    print(file=sys.stderr)
    if not tasks:
        raise SystemExit("no adapter has a data set; see --help for the form of --source")
    return tasks


def vllm_vlora(*arguments: str) -> None:
    """Run the command line in a process of its own; its messages are shown."""
    command = [sys.executable, "-P", "-m", "vllm_vlora.tools", *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"vllm-vlora {arguments[0]} ended with {done.returncode}")


def measure(tasks: Mapping[str, Path], output: Path, ratio: float, args: argparse.Namespace) -> Any:
    """Compress to a ratio and evaluate; the report, read again where it was made before."""
    checkpoint, report = output / f"ratio-{ratio:g}", output / f"{args.metric}-{ratio:g}.json"
    if not checkpoint.exists():
        named = [part for task, path in tasks.items() for part in ("--name", f"{task}={path}")]
        vllm_vlora("compress", *named, "-o", str(checkpoint), "--ratio", f"{ratio:g}")
    if not report.exists():
        originals = [part for t, path in tasks.items() for part in ("--adapter", f"{t}={path}")]
        vllm_vlora(
            *("evaluate", str(checkpoint), "--base", args.model, "--metric", args.metric),
            *("--data", str(output / "heldout"), "--save-json", str(report), *originals),
            *("--max-length", str(args.max_length)),
        )
    return json.loads(report.read_text(encoding="utf-8"))


def table(reports: Mapping[float, Mapping[str, Any]]) -> Iterator[str]:
    """The results in Markdown."""
    yield "| ratio | stored | base | adapter | compressed | relative | worst task | alike |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|"
    for ratio, found in reports.items():
        mean, worst = found["mean"], found["worst"]
        cells = [f"{ratio:g}x", f"{found['ratio']:.2f}x", *map(_number, list(mean.values())[:4])]
        last = "-" if worst is None else f"{worst['relative']:.4f} ({worst['task']})"
        yield f"| {' | '.join([*cells, last, _number(mean['agreement'])])} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for everything")
    parser.add_argument("--source", type=Path, help="folder in place of the Hub")
    parser.add_argument("--model", default=MODEL, help="base model (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=500, help="take the first N (default: 500)")
    parser.add_argument("--examples", type=int, default=100, help="of each task (default: 100)")
    parser.add_argument("--ratios", default="4,8,16", help="default: %(default)s")
    parser.add_argument(
        "--metric",
        default="rouge-l",
        choices=("rouge-l", "exact-match", "loss"),
        help="of evaluate",
    )
    parser.add_argument("--template", default=TEMPLATE, help="of a prompt (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens (default: 2048)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch, compress, evaluate, report."""
    args = options(arguments)
    source: Source = Hub() if args.source is None else Folder(args.source)
    tasks = gather(source, args.output, args)
    reports = {}
    for ratio in map(float, args.ratios.split(",")):
        reports[ratio] = measure(tasks, args.output, ratio, args)
    print(
        f"{len(tasks)} adapters of {args.model}, {args.metric}, {args.examples} examples a task\n"
    )
    print("\n".join(table(reports)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
