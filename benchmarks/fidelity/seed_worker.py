"""Runs inside the seed libraries' own environment: compress with one of them, write what it keeps.

    python seed_worker.py JOB.json

The job names the library, the adapters, those to be added afterwards, and for each ratio a folder to
write to. Each library chooses the most components that meet the ratio with float32 counted at 16
bits, which is to its advantage: both save float32. The answer goes to `answer.json` in each folder.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

JSON = dict[str, Any]


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of all safetensors files in a folder: as they are, and with float32 at 16 bits."""
    on_disk = halved = 0
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        whole = path.stat().st_size
        wide = sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] == "F32"
        )
        on_disk += whole
        halved += whole - wide // 2
    return on_disk, halved


def most_components(limit: int, highest: int, nbytes: Callable[[int], float]) -> int:
    """The largest k up to ``highest`` whose bytes, which grow with k, are within ``limit``; 0: none."""
    return max((k for k in range(1, highest + 1) if nbytes(k) <= limit), default=0)


# --- vlora-dev -----------------------------------------------------------------------------------


def load_float32(path: str) -> Any:
    """An adapter as vlora reads it; its SVD has no 16-bit version on CPU."""
    from vlora import load_adapter

    weights = load_adapter(path)
    for side in (weights.lora_a, weights.lora_b):
        for name, tensor in side.items():
            side[name] = tensor.float()
    return weights


def run_vlora(job: JSON) -> None:
    """``SharedSubspace`` with a number of components; NF4 components if the job says so."""
    adapters = {task: load_float32(path) for task, path in job["adapters"].items()}
    added = {task: load_float32(path) for task, path in job["added"].items()}
    for output, ratio in job["outputs"].items():
        folder = Path(output)
        k = most_components(
            int(job["original_nbytes"] / ratio),
            # Centred data of N adapters has N - 1 directions.
            len(adapters) - 1,
            lambda count: _vlora_nbytes(adapters, count, job["nf4"]),
        )
        answer = {"k": k}
        if k:
            answer |= _vlora_point(adapters, added, k, job["nf4"], folder)
        write_answer(folder, answer)


def _vlora_nbytes(adapters: dict[str, Any], k: int, nf4: bool) -> float:
    """Size of the files by arithmetic, with float32 at 16 bits, without headers."""
    one = next(iter(adapters.values()))
    total = 0.0
    for layer in one.layer_names:
        width = one.lora_a[layer].numel() + one.lora_b[layer].numel()
        components = k * width * (4 / 8 + 2 / 64 if nf4 else 2)
        total += components + 2 * width + 2 * 2 * k * (1 + len(adapters))
    return total


def _vlora_point(
    adapters: dict[str, Any], added: dict[str, Any], k: int, nf4: bool, folder: Path
) -> JSON:
    from vlora import SharedSubspace
    from vlora.io import save_adapter

    started = time.perf_counter()
    subspace = SharedSubspace.from_adapters(
        list(adapters.values()), task_ids=list(adapters), num_components=k
    )
    if nf4:
        subspace.quantize(method="nf4")
    seconds = time.perf_counter() - started

    def save(name: str) -> tuple[int, int]:
        target = folder / name
        if nf4:
            subspace.save_quantized(target)
        else:
            subspace.save(target)
        return sizes(target)

    before = save("files")
    for task, weights in added.items():
        subspace.add_task(subspace.project(weights, task))
    after = save("files_with_added")
    # What the files hold, and not what the process remembers.
    subspace = SharedSubspace.load(folder / "files_with_added")
    for task, weights in (adapters | added).items():
        copy = subspace.reconstruct(task)
        copy.metadata = weights.metadata
        for side in (copy.lora_a, copy.lora_b):
            for name, tensor in side.items():
                side[name] = tensor.contiguous()
        save_adapter(copy, folder / "tasks" / task)
    return {"before": before, "after": after, "seconds": seconds}


# --- lorashare -----------------------------------------------------------------------------------


def run_lorashare(job: JSON) -> None:
    """``SHAREModel`` with a number of components; one fit serves all numbers.

    The components are eigenvectors in the order of their eigenvalues, so that those of a smaller
    number are the first of a larger: cutting gives what fitting again would.
    """
    from lorashare import SHAREModel
    from lorashare.io import load_peft_adapter

    weights = {
        task: load_peft_adapter(path, adapter_name=task)[0]
        for task, path in job["adapters"].items()
    }
    chosen = {
        output: most_components(
            int(job["original_nbytes"] / ratio), 192, lambda k: _lorashare_nbytes(weights, k)
        )
        for output, ratio in job["outputs"].items()
    }
    started = time.perf_counter()
    model = SHAREModel.from_adapters(job["adapters"], num_components=max(1, *chosen.values()))
    seconds = time.perf_counter() - started
    for output, k in chosen.items():
        answer = {"k": k}
        if k:
            answer |= _lorashare_point(model, weights, job, k, Path(output))
            answer["seconds"] = seconds
        write_answer(Path(output), answer)


def _lorashare_nbytes(weights: dict[str, dict[str, torch.Tensor]], k: int) -> float:
    total = 0
    for matrix in next(iter(weights.values())).values():
        rank, width = sorted(matrix.shape)
        total += 2 * k * (width + len(weights) * rank)
    return total


def _lorashare_point(
    model: Any, weights: dict[str, dict[str, torch.Tensor]], job: JSON, k: int, folder: Path
) -> JSON:
    import copy

    from lorashare import SHAREModel
    from lorashare.compression import compute_adapter_loadings

    components = {name: full[:, :k].contiguous() for name, full in model.components.items()}
    config = copy.deepcopy(model.config)
    config.num_components = k
    cut = SHAREModel(
        config,
        components,
        {task: compute_adapter_loadings(components, own) for task, own in weights.items()},
        dict(model.adapter_configs),
    )
    cut.save_pretrained(folder / "files")
    before = sizes(folder / "files")
    for task, path in job["added"].items():
        # A threshold of zero keeps its fast path: project, and leave the other tasks alone.
        cut.add_adapter(path, name=task, variance_threshold=0.0)
    cut.save_pretrained(folder / "files_with_added")
    after = sizes(folder / "files_with_added")
    loaded = SHAREModel.from_pretrained(folder / "files_with_added")
    for task in (*job["adapters"], *job["added"]):
        loaded.reconstruct(task, output_dir=folder / "tasks" / task)
    return {"before": before, "after": after}


def write_answer(folder: Path, answer: JSON) -> None:
    """`answer.json`, which says that a folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    {"vlora-dev": run_vlora, "lorashare": run_lorashare}[job["library"]](job)


if __name__ == "__main__":
    main()
