"""Merge adapters into one, three ways, and blend tasks of one checkpoint without fitting anything.

    python examples/merge_tasks.py                                  # two of the demo's adapters
    python examples/merge_tasks.py lora-a lora-b -o merged --weights 0.7,0.3

Needs no GPU and no base model. What it does, the command line does as well:

    vllm-vlora analyze ADAPTER ADAPTER
    vllm-vlora merge ADAPTER ADAPTER -o DIR --method ties
    vllm-vlora merge --checkpoint CKPT TASK TASK --as NEW_TASK
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_vlora import (
    LoRAWeights,
    SharedSubspace,
    VLoRAError,
    blend_tasks,
    compute_similarity_matrix,
    dare_merge,
    load_adapter,
    save_adapter,
    task_arithmetic,
    ties_merge,
)
from vllm_vlora.errors import OptionError

DEMO = Path(__file__).resolve().parent / "demo" / "adapters"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        names = [Path(path).name for path in options.adapters]
        adapters = [load_adapter(path) for path in options.adapters]
        weights = options.weights or [1 / len(adapters)] * len(adapters)
        merge(names, adapters, weights, options.output, options.force)
        blend(names, adapters, weights, options.output / "checkpoint", options.force)
    except VLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def merge(
    names: Sequence[str],
    adapters: Sequence[LoRAWeights],
    weights: Sequence[float],
    output: Path,
    force: bool,
) -> None:
    """Write the weighted sum, TIES and DARE of the adapters as PEFT folders."""
    if len(adapters) < 2:
        raise OptionError("one adapter is nothing to merge; name at least two")
    merged = {
        "sum": task_arithmetic(adapters, weights),
        "ties": ties_merge(adapters, density=0.3),
        "dare": dare_merge(adapters, drop_rate=0.5, weights=weights, seed=0),
    }
    # Adapters of different tasks hardly resemble each other; a merge should resemble each of them.
    cosines = compute_similarity_matrix([*adapters, *merged.values()])[len(adapters) :]
    print(f"{'merge':<6} {'rank':>4} {'cut off':>8}  cosine with {', '.join(names)}")
    for (name, result), row in zip(merged.items(), cosines.tolist()):
        alike = " ".join(f"{cosine:.3f}" for cosine in row[: len(names)])
        print(f"{name:<6} {result.rank:>4} {result.truncation_error:>8.1%}  {alike}")
        save_adapter(result, output / name, force=force)
    print(f"as PEFT folders in {output}: {', '.join(merged)}")


def blend(
    names: Sequence[str],
    adapters: Sequence[LoRAWeights],
    weights: Sequence[float],
    checkpoint: Path,
    force: bool,
) -> None:
    """Write a checkpoint whose bases hold all the adapters, and their blend into it as a task."""
    subspace = SharedSubspace.from_adapters(
        adapters, names, variance_threshold=1.0, representation="joint", missing="zero"
    )
    subspace.save(checkpoint, force=force)
    blended = blend_tasks(checkpoint, dict(zip(names, weights)), "blend")
    print(
        f"{checkpoint}: task {blended.task_id!r} is {blended.representation}, takes "
        f"{blended.nbytes:,} bytes and is {blended.error:.1e} from the exact sum"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "adapters",
        nargs="*",
        default=[str(DEMO / "french"), str(DEMO / "json")],
        help="PEFT folders or Hub ids",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("merged"), help="folder to write into"
    )
    parser.add_argument(
        "--weights",
        type=lambda text: [float(part) for part in text.split(",")],
        help="one each, between commas; the mean by default",
    )
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
