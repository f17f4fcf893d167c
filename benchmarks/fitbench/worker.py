"""Runs in a process of its own, in the seed libraries' environment for these: fit once and measure.

    python worker.py JOB.json

The job names the contestant, the adapters' folders and k. Time runs from the first file's opening
until the bases and every adapter's loadings are there; memory is the peak of the resident set above
what it was after imports and a warm-up. What was kept is measured afterwards.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Fitted:
    """``rebuild(number, a, b)`` gives an adapter's factors as they were kept."""

    rebuild: Callable[[int, torch.Tensor, torch.Tensor], Factors]
    stored_numbers: int
    details: dict[str, float]


Contestant = Callable[[list[str], int], Fitted]


# --- the contestants -----------------------------------------------------------------------------


def ours(paths: list[str], k: int) -> Fitted:
    """``fit_bases``, and one more read for the loadings, which go to a file."""
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.fitting.shared_basis import fit_bases

    started = time.perf_counter()
    adapters = [open_adapter(path) for path in paths]
    (name,) = adapters[0].modules
    module = adapters[0].modules[name]

    def read() -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        for adapter in adapters:
            yield *adapter.factors(name), adapter.modules[name].scale

    u_t, v = fit_bases(read, module.d_in, module.d_out, k)
    fitted = time.perf_counter()
    loadings = 0
    with tempfile.TemporaryFile() as file:
        for batch in _batches(read(), 8):
            rows_a = torch.cat([a for a, _, _ in batch])
            columns_b = torch.cat([scale * b for _, b, scale in batch], dim=1)
            for part in (rows_a @ v.T, columns_b.T @ u_t.T):
                file.write(part.numpy().tobytes())
                loadings += part.numel()
    details = {"bases_s": fitted - started, "loadings_s": time.perf_counter() - fitted}
    return _joint(u_t, v, loadings, details)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def exact(paths: list[str], k: int) -> Fitted:
    """All eigenvectors of sum W^T W and of sum W W^T, from whichever side is smaller; float32.

    With Cholesky factors L L^T of the Gram matrices, A^T L_B has the singular vectors of W.
    """
    rows_a, rows_b, loadings = [], [], 0
    for a, b in _read(paths):
        gram_a, gram_b = a.double() @ a.double().T, b.double().T @ b.double()
        norm = (gram_a * gram_b).sum().sqrt()
        rows_a.append((torch.linalg.cholesky(gram_b).T.float() @ a) / norm)
        rows_b.append((b @ torch.linalg.cholesky(gram_a).float()).T / norm)
        loadings += 2 * k * a.shape[0]
    v = _leading_rows(rows_a, k)
    return _joint(_leading_rows(rows_b, k), v, loadings, {})


def vlora(paths: list[str], k: int) -> Fitted:
    """vlora-dev: SharedSubspace.from_adapters, all adapters in memory."""
    from vlora import SharedSubspace, load_adapter

    subspace = SharedSubspace.from_adapters(
        [load_adapter(path) for path in paths],
        task_ids=[str(i) for i in range(len(paths))],
        num_components=k,
    )
    return _vlora_fitted(subspace)


def vlora_streaming(paths: list[str], k: int) -> Fitted:
    """vlora-dev: SharedSubspace.from_adapters_streaming, which absorbs one adapter after another."""
    from vlora import SharedSubspace

    subspace = SharedSubspace.from_adapters_streaming(
        paths, task_ids=[str(i) for i in range(len(paths))], num_components=k
    )
    return _vlora_fitted(subspace)


def lorashare(paths: list[str], k: int) -> Fitted:
    """lorashare: SHAREModel.from_adapters."""
    from lorashare import SHAREModel

    model = SHAREModel.from_adapters(
        {str(i): path for i, path in enumerate(paths)}, num_components=k, device="cpu"
    )
    (layer,) = {key.rpartition(":")[0] for key in model.components}
    v, u = model.components[f"{layer}:A"], model.components[f"{layer}:B"]
    parts = [model.components, *model.all_loadings.values()]

    def rebuild(number: int, a: torch.Tensor, b: torch.Tensor) -> Factors:
        loadings = model.all_loadings[str(number)]
        return (v @ loadings[f"{layer}:A"]).T, u @ loadings[f"{layer}:B"]

    return Fitted(rebuild, sum(x.numel() for part in parts for x in part.values()), {})


CONTESTANTS: dict[str, Contestant] = {
    "ours": ours,
    "vlora": vlora,
    "vlora-streaming": vlora_streaming,
    "lorashare": lorashare,
    "exact": exact,
}


def _joint(u_t: torch.Tensor, v: torch.Tensor, loadings: int, details: dict[str, float]) -> Fitted:
    def rebuild(number: int, a: torch.Tensor, b: torch.Tensor) -> Factors:
        return (a @ v.T) @ v, u_t.T @ (u_t @ b)

    return Fitted(rebuild, u_t.numel() + v.numel() + loadings, details)


def _leading_rows(rows: list[torch.Tensor], k: int) -> torch.Tensor:
    stacked = torch.cat(rows)
    rows.clear()
    if stacked.shape[1] <= stacked.shape[0]:
        vectors = torch.linalg.eigh(stacked.T @ stacked)[1][:, -k:]
    else:
        weights = torch.linalg.eigh(stacked @ stacked.T)[1][:, -k:]
        vectors = torch.linalg.qr(stacked.T @ weights)[0]
    return vectors.T.contiguous()


def _vlora_fitted(subspace: Any) -> Fitted:
    (layer,) = subspace.layer_names
    parts = [
        subspace.means_a[layer],
        subspace.means_b[layer],
        subspace.components_a[layer],
        subspace.components_b[layer],
    ]
    for task in subspace.tasks.values():
        parts += [task.loadings_a[layer], task.loadings_b[layer]]

    def rebuild(number: int, a: torch.Tensor, b: torch.Tensor) -> Factors:
        weights = subspace.reconstruct(str(number))
        return weights.lora_a[layer], weights.lora_b[layer]

    return Fitted(rebuild, sum(part.numel() for part in parts), {})


# --- measuring -----------------------------------------------------------------------------------


def kept_energy(fitted: Fitted, paths: list[str]) -> float:
    """Mean over the adapters of 1 - ||delta_W' - delta_W||_F^2 / ||delta_W||_F^2.

    For an orthogonal projection this is ||U^T delta_W V^T||_F^2 / ||delta_W||_F^2.
    """
    total = 0.0
    for number, (a, b) in enumerate(_read(paths)):
        a_kept, b_kept = fitted.rebuild(number, a, b)
        both_a = torch.cat([a_kept, a]).double()
        both_b = torch.cat([b_kept, -b], dim=1).double()
        error = ((both_b.T @ both_b) * (both_a @ both_a.T)).sum()
        rank = a.shape[0]
        own = (both_b[:, -rank:].T @ both_b[:, -rank:]) * (both_a[-rank:] @ both_a[-rank:].T)
        total += 1 - float(error / own.sum())
    return total / len(paths)


def _read(paths: list[str]) -> Iterator[Factors]:
    for path in paths:
        with safe_open(f"{path}/adapter_model.safetensors", framework="pt") as file:
            key_a, key_b = sorted(file.keys())
            yield file.get_tensor(key_a), file.get_tensor(key_b)


def status_nbytes(key: str, pid: int | str = "self") -> int:
    """VmRSS (now) or VmHWM (peak) of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/status has no {key}; is it a process that has ended?")


def _warm_up(threads: int) -> None:
    """What torch and its libraries load and reserve at first use is nobody's fit."""
    torch.set_num_threads(threads)
    x = torch.randn(256, 256)
    for y in (x, x.double()):
        torch.linalg.eigh(y @ y.T)
        torch.linalg.qr(y)
        torch.linalg.svd(y)


def main() -> None:
    """Run the job, and write the answer beside it."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    contestant = CONTESTANTS[job["contestant"]]
    for module in job["imports"]:
        importlib.import_module(module)
    _warm_up(job["threads"])
    before = status_nbytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Resets the peak.
    start = {"rss": before, "cpu_seconds": time.process_time()}
    Path(job["started"]).write_text(json.dumps(start), encoding="utf-8")
    wall, cpu = time.perf_counter(), time.process_time()
    fitted = contestant(job["paths"], job["k"])
    answer = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_nbytes": status_nbytes("VmHWM") - before,
        "stored_numbers": fitted.stored_numbers,
        "details": fitted.details,
    }
    Path(job["fitted"]).touch()
    answer["energy"] = kept_energy(fitted, job["paths"])
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
