"""add and remove: real files, measured again by a dense float64 reference."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from routers import network
from synthetic import calibration_of, dense, family, save
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter
from vllm_vlora.checkpoint import successor
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.manifest import CONFIG_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_files import find_originals, open_originals
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.editing.aliasing import set_alias
from vllm_vlora.editing.growth_offers import ResidualFit
from vllm_vlora.editing.options import AddedTask, AddOptions, AddReport
from vllm_vlora.editing.rebuild_advice import predict_rebuild, rebuild_advice
from vllm_vlora.editing.rebuilding import rebuild
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.editing.routing import attach_router
from vllm_vlora.errors import (
    AdapterError,
    BudgetError,
    CheckpointError,
    DataError,
    OptionError,
    OutputError,
    TaskIdError,
    TaskNotFoundError,
)
from vllm_vlora.fitting.calibration import Calibration, ModuleRecord, Settings, Source
from vllm_vlora.fitting.moments import FullMoment
from vllm_vlora.fitting.whitening import FROBENIUS, Metric, Whitener
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.stored import Basis
from vllm_vlora.tools.add_command import add as add_command
from vllm_vlora.tools.add_command import remove as remove_command
from vllm_vlora.tools.cli import app as cli

# Wide enough that a file's header is not most of it.
SHAPES = {"model.layers.0.q_proj": (192, 160), "model.layers.0.v_proj": (192, 96)}

commands = typer.Typer()
commands.command()(add_command)
commands.command()(remove_command)
runner = CliRunner()


def renamed(adapters: dict[str, Adapter], prefix: str) -> dict[str, Adapter]:
    return {f"{prefix}{task_id}": adapter for task_id, adapter in adapters.items()}


RELATIVES = ("task12", "task13")


@functools.cache
def _built(**options: Any) -> tempfile.TemporaryDirectory[str]:
    """What ``world`` copies; removed when the process ends."""
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    adapters = family(folder / "adapters", 14, related=True, shapes=SHAPES)
    members = {task_id: adapters[task_id] for task_id in adapters if task_id not in RELATIVES}
    compress(members, folder / "ckpt", CompressOptions(**({"ratio": 5.0} | options)))
    return made


def world(tmp_path: Path, **options: Any) -> tuple[Path, dict[str, Adapter], dict[str, Adapter]]:
    """A checkpoint of a family, the family, and two relatives that are not in it."""
    shutil.copytree(_built(**options).name, tmp_path, dirs_exist_ok=True)
    adapters = {f"task{i}": open_adapter(tmp_path / "adapters" / f"task{i}") for i in range(14)}
    relatives = {task_id: adapters.pop(task_id) for task_id in RELATIVES}
    return tmp_path / "ckpt", adapters, relatives


def strangers(tmp_path: Path, count: int = 2, seed: int = 3) -> dict[str, Adapter]:
    """Adapters that have nothing in common with anything."""
    return renamed(
        family(tmp_path / "strangers", count, related=False, shapes=SHAPES, seed=seed), "other-"
    )


def others(tmp_path: Path, count: int = 5) -> dict[str, Adapter]:
    """A family of its own, which the checkpoint's bases do not hold."""
    return renamed(
        family(tmp_path / "others", count, related=True, shapes=SHAPES, seed=8), "second-"
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def decoded(checkpoint: Checkpoint, task_id: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bases = dict(checkpoint.bases())
    modules = checkpoint.load_task(task_id).modules
    return {name: decode(stored, bases.get(name)) for name, stored in modules.items()}


def measured(checkpoint: Checkpoint, task_id: str, adapter: Adapter) -> float:
    """The relative error of a task, dense in float64."""
    lost = norm = 0.0
    factors = decoded(checkpoint, task_id)
    assert list(factors) == list(adapter.modules)
    for name, (a, b) in factors.items():
        wanted = dense(adapter, name)
        lost += float((b.double() @ a.double() - wanted).square().sum())
        norm += float(wanted.square().sum())
    return math.sqrt(lost / norm) if norm else 0.0


def check(path: Path, adapters: dict[str, Adapter], report: AddReport) -> dict[str, AddedTask]:
    """Sizes against the files, errors against the dense reference, the checkpoint is sound."""
    checkpoint = Checkpoint.open(path)
    assert report.nbytes == checkpoint.nbytes
    assert report.original_nbytes == checkpoint.original_nbytes
    assert validate(path) == []
    assert not list(path.glob(".*"))
    for task in report.tasks:
        record = checkpoint.record(task.task_id)
        error = measured(checkpoint, task.task_id, adapters[task.task_id])
        assert task.error == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert record.error == task.error
        assert task.nbytes == record.lora_nbytes
        kinds = {segment.representation for segment in record.segments}
        assert task.kind == {
            frozenset(["joint"]): "projected", frozenset(["private"]): "private",
            frozenset(["joint", "private"]): "mixed",
        }[frozenset(kinds)]  # fmt: skip
    return {task.task_id: task for task in report.tasks}


# --- projected or private --------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4", "auto"])
def test_a_relative_is_projected_and_a_stranger_is_private(tmp_path: Path, quantize: str) -> None:
    path, _, relatives = world(tmp_path, representation="joint", quantize=quantize)
    new = relatives | strangers(tmp_path)
    tasks = check(path, new, add_adapters(path, new))
    for task_id in relatives:
        assert tasks[task_id].kind in ("projected", "mixed")
        assert tasks[task_id].carried > 0.95
        assert f"{tasks[task_id].carried:.1%}" in tasks[task_id].why
    for task_id in set(new) - set(relatives):
        assert tasks[task_id].kind == "private"
        assert tasks[task_id].carried < 0.1
        assert "private factors keep more" in tasks[task_id].why


def test_what_the_bases_carry_is_the_projection_on_them(tmp_path: Path) -> None:
    path, _, relatives = world(tmp_path, representation="joint", quantize="none")
    bases = {name: (unpack(b.u), unpack(b.v)) for name, b in Checkpoint.open(path).bases()}
    report = add_adapters(path, relatives, output=tmp_path / "new")
    for task in report.tasks:
        held = norm = 0.0
        for name in SHAPES:
            delta = dense(relatives[task.task_id], name)
            u, v = (torch.linalg.qr(rows.double().T)[0] for rows in bases[name])
            held += float((u.T @ delta @ v).square().sum())
            norm += float(delta.square().sum())
        assert task.carried == pytest.approx(held / norm, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [3.0, 7.0])
@pytest.mark.parametrize("expand", [False, True])
def test_never_below_private_at_the_same_bytes(
    tmp_path: Path, seed: int, ratio: float, expand: bool
) -> None:
    adapters = family(tmp_path / "adapters", 12, related=True, shapes=SHAPES, seed=seed)
    new = {task_id: adapters.pop(task_id) for task_id in ("task10", "task11")}
    path = tmp_path / "ckpt"
    compress(adapters, path, CompressOptions(ratio=6, representation="joint"))
    new |= strangers(tmp_path, 2, seed) | others(tmp_path, 4)
    tasks = check(path, new, add_adapters(path, new, AddOptions(ratio=ratio), expand=expand))
    for task_id, task in tasks.items():
        limit = task.nbytes + task.grown_nbytes
        options = CompressOptions(representation="private", max_bytes=limit)
        try:
            alone = compress({task_id: new[task_id]}, tmp_path / "alone", options, force=True)
        except BudgetError:
            continue
        assert task.error <= alone.tasks[0].error * (1 + 1e-6), (task_id, task.why)


def test_budgets_are_kept(tmp_path: Path) -> None:
    path, _, relatives = world(tmp_path, representation="joint")
    new = relatives | strangers(tmp_path)
    out = tmp_path / "new"
    for ratio in (3.0, 4.5, 7.0):
        tasks = check(
            out, new, add_adapters(path, new, AddOptions(ratio=ratio), output=out, force=True)
        )
        assert all(task.nbytes * ratio <= task.original_nbytes for task in tasks.values())
    report = add_adapters(path, new, AddOptions(max_bytes=2500), output=out, force=True)
    assert sum(task.nbytes for task in report.tasks) <= 2500
    for expand in (False, True):
        for error in (0.02, 0.1, 0.3):
            options = AddOptions(max_error=error)
            report = add_adapters(path, new, options, expand=expand, output=out, force=True)
            tasks = check(out, new, report)
            assert all(task.error <= error for task in tasks.values())
    private = [task for task in tasks.values() if task.private_nbytes is not None]
    assert all(task.nbytes + task.grown_nbytes <= task.private_nbytes for task in private)


def test_a_ratio_of_one_keeps_everything(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path)
    new = strangers(tmp_path)
    tasks = check(path, new, add_adapters(path, new, AddOptions(ratio=1)))
    assert [task.error for task in tasks.values()] == [0.0, 0.0]


def test_the_default_keeps_the_ratio_except_for_poor_tasks(tmp_path: Path) -> None:
    path, _, relatives = world(tmp_path, representation="joint")
    before = Checkpoint.open(path)
    worst = max(record.error for record in before.tasks.values())
    new = relatives | strangers(tmp_path)
    tasks = check(path, new, add_adapters(path, new))
    for task_id, task in tasks.items():
        ratio = task.original_nbytes / task.nbytes
        assert (ratio >= before.ratio) == (task_id in relatives)
        assert task.error <= max(1.5 * worst, 0.1)


def test_a_task_loses_nothing_that_matters_where_none_did(tmp_path: Path) -> None:
    path, _, relatives = world(tmp_path)
    adapters = strangers(tmp_path)
    compressed = compress(adapters, tmp_path / "kept")
    assert compressed.losses.above == {}
    tasks = check(tmp_path / "kept", relatives, add_adapters(tmp_path / "kept", relatives))
    for task in tasks.values():
        shared = {
            s.representation
            for s in Checkpoint.open(tmp_path / "kept").record(task.task_id).segments
        }
        assert task.error**2 * (1.0 if shared == {"private"} else 2.5) <= 0.01
    # Unquantised is exact, whatever the checkpoint has lost.
    unquantised = check(path, adapters, add_adapters(path, adapters, AddOptions(quantize="none")))
    assert [task.error for task in unquantised.values()] == [0.0, 0.0]


def test_a_task_that_loses_more_is_named(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path, representation="joint")
    report = add_adapters(path, strangers(tmp_path))
    assert len(report.warnings) == 1
    assert "'other-task0', 'other-task1' lose far more" in report.warnings[0]
    assert "--expand" in report.warnings[0]


def test_blocks_of_clusters_are_projected_on_one_by_one(tmp_path: Path) -> None:
    first = renamed(family(tmp_path / "a", 8, related=True, shapes=SHAPES), "a-")
    second = renamed(family(tmp_path / "b", 8, related=True, shapes=SHAPES, seed=8), "b-")
    new = {
        task_id: group.pop(task_id) for group, task_id in ((first, "a-task7"), (second, "b-task7"))
    }
    path = tmp_path / "ckpt"
    options = CompressOptions(ratio=4, representation="joint", clusters=2)
    compress(first | second, path, options)
    tasks = check(path, new, add_adapters(path, new, AddOptions(ratio=8)))
    checkpoint = Checkpoint.open(path)
    for task_id, task in tasks.items():
        assert task.kind == "projected"
        assert task.carried > 0.9
        relative = task_id.replace("7", "0")
        for new_segment, old in zip(
            checkpoint.record(task_id).segments, checkpoint.record(relative).segments
        ):
            assert new_segment.rows is not None
            assert old.rows is not None
            assert new_segment.rows[0] == old.rows[0]
            assert new_segment.rows[1] <= old.rows[1]
    third = others(tmp_path)
    report = add_adapters(path, third, expand=True)
    assert report.grown > 0
    check(path, third, report)


def test_other_modules_ranks_kinds_and_heads(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path)
    generator = torch.Generator().manual_seed(5)
    shapes = {**SHAPES, "model.layers.0.k_proj": (48, 32), "model.embed_tokens": (64, 40)}
    new = {
        "wide": save(
            tmp_path / "wide", shapes, 6, generator, dtype=torch.float32,
            kinds={"model.embed_tokens": "embedding"}, extra={"score.weight": torch.randn(3, 8)},
        ),
        "zero": save(tmp_path / "zero", {"model.layers.0.q_proj": (192, 160)}, 2, generator, zero=True),
    }  # fmt: skip
    tasks = check(path, new, add_adapters(path, new, AddOptions(ratio=3)))
    checkpoint = Checkpoint.open(path)
    assert [module.name for module in checkpoint.modules][-2:] == sorted(set(shapes) - set(SHAPES))
    assert checkpoint.load_task("wide").extra["base_model.model.score.weight"].shape == (3, 8)
    assert checkpoint.record("wide").lora_nbytes == tasks["wide"].nbytes
    assert tasks["zero"].error == 0.0


def test_a_core_loses_what_it_says_and_no_core_loses_less(tmp_path: Path) -> None:
    from vllm_vlora.editing.projection import BlockMeter

    generator = torch.Generator().manual_seed(0)
    moment = torch.diag(torch.logspace(0, -3, 24))
    metric = Metric(Whitener.from_moment(moment), None)
    basis = Basis(
        pack(torch.linalg.qr(torch.randn(20, 5, generator=generator))[0].T, "int8"),
        pack(torch.linalg.qr(torch.randn(24, 6, generator=generator))[0].T, "int8"),
    )
    a, b = torch.randn(3, 24, generator=generator), torch.randn(20, 3, generator=generator)
    block = BlockMeter(basis, (1, 5, 0, 6), metric)
    projection = block.project(a, b, 0.5)
    for k_out, k_in, format in (
        (4, 6, "float32"),
        (2, 5, "int8"),
        (4, 3, "nf4-dq"),
        (1, 1, "bfloat16"),
    ):
        stored, loss = block.encode(projection, k_out, k_in, format)
        assert stored.rows == (1, 1 + k_out, 0, k_in)
        new_a, new_b = decode(stored, basis)
        difference = new_b.double() @ new_a.double() - 0.5 * b.double() @ a.double()
        root = torch.linalg.cholesky(
            moment.double() / moment.double().diagonal().mean() + 0.01 * torch.eye(24)
        )
        assert loss == pytest.approx(float((difference @ root).square().sum()), rel=1e-5)
        if format == "float32":
            # No core on these rows loses less.
            u, v = (unpack(m).double() for m in (basis.u.row_slice(1, 5), basis.v))
            flat = torch.kron(u.T, (v @ root).T)
            wanted = (0.5 * b.double() @ a.double() @ root).flatten()
            best = torch.linalg.lstsq(flat, wanted[:, None]).solution
            least = float((flat @ best - wanted[:, None]).square().sum())
            assert loss == pytest.approx(least, rel=1e-6)


SOURCE = Source(
    base_model="org/base",
    data=["text.jsonl"],
    data_sha256="0" * 64,
    examples=400,
    tokens=400,
    gradient_tokens=400,
    settings=Settings(400, 100, 4, True, 2048, 256, "float32"),
    versions={},
)


def _moments(folder: Path) -> str:
    """Of inputs and gradients that have few directions."""
    records, moments = [], []
    for number, (name, (d_in, d_out)) in enumerate(SHAPES.items()):
        moments += [
            FullMoment(torch.diag(torch.logspace(0, -3, d_in))),
            FullMoment(torch.diag(torch.logspace(0, -1, d_out)) * 10.0**-number),
        ]
        records.append(ModuleRecord(name, d_in, d_out, 2 * number, 2 * number + 1))
    Calibration(SOURCE, records, moments).save(folder)
    return str(folder)


@pytest.mark.parametrize("expand", [False, True])
def test_calibration_keeps_more_of_what_the_model_sees(tmp_path: Path, expand: bool) -> None:
    path, _, relatives = world(tmp_path, representation="joint")
    new = relatives | others(tmp_path, 4)
    options = AddOptions(ratio=6, calibration=_moments(tmp_path / "moments"))
    white = add_adapters(path, new, options, expand=expand, output=tmp_path / "white")
    plain = add_adapters(path, new, AddOptions(ratio=6), expand=expand, output=tmp_path / "plain")
    check(tmp_path / "white", new, white)
    checkpoints = [Checkpoint.open(tmp_path / name) for name in ("white", "plain")]
    for task in white.tasks:
        seen = [_seen(checkpoint, task.task_id, new[task.task_id]) for checkpoint in checkpoints]
        # The metric's damping is in the report's figure and not in this one.
        assert task.seen_error == pytest.approx(seen[0], rel=0.2, abs=0.005)
        assert task.private_error is None or task.seen_error <= task.private_error * (1 + 1e-6)
    assert sum(task.error for task in white.tasks) > sum(task.error for task in plain.tasks)


def test_with_a_calibration_losses_are_those_that_the_model_sees(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path, representation="joint")
    moments = str(calibration_of(tmp_path / "moments", SHAPES))
    options = AddOptions(max_error=0.2, calibration=moments)
    report = add_adapters(path, others(tmp_path, 2), options, output=tmp_path / "out")
    first, second = report.tasks
    assert (first.kind, second.kind) == ("mixed", "private")
    assert first.seen_error < 0.2 < 0.7 < first.error
    # On shared bases a squared error counts 2.5 times; 0.2 of its own costs the second only 4 %.
    assert report.losses.above == {first.task_id: pytest.approx(2.5 * first.seen_error**2)}
    # What is said to be allowed is an error of the same kind.
    assert report.budget == "a relative error of 0.2, as the calibrated model sees it"


def test_the_errors_that_the_model_sees_have_a_column_of_their_own(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path, representation="joint")
    moments = calibration_of(tmp_path / "moments", SHAPES)
    command = ["add", path, "--max-error", "0.2"]
    for task, adapter in others(tmp_path, 2).items():
        command += ["--name", f"{task}={adapter.path}"]
    said = invoke(commands, *command, "--calibration", moments, "--output", tmp_path / "out").stdout
    rows = [[cell.strip() for cell in re.split("[│┃]", line)] for line in said.splitlines()]
    header = next(row for row in rows if "New task" in row)
    task = next(row for row in rows if "second-task0" in row)
    error, seen = (float(task[header.index(name)]) for name in ("Error", "Seen"))
    assert seen < 0.2 < 0.7 < error
    assert f"second-task0 {2.5 * seen**2:.0%}" in said
    assert "`info` knows only the error of the weights" in said
    assert "Seen" not in invoke(commands, *command, "--output", tmp_path / "plain").stdout


def test_another_models_calibration_is_refused(tmp_path: Path) -> None:
    path, _, relatives = world(tmp_path, representation="joint")
    name, (d_in, d_out) = next(iter(SHAPES.items()))
    moments = [FullMoment(torch.eye(d_in + 1)), FullMoment(torch.eye(d_out))]
    record = ModuleRecord(name, d_in + 1, d_out, 0, 1)
    Calibration(SOURCE, [record], moments).save(tmp_path / "moments")
    with pytest.raises(DataError, match="calibrate the adapters' base model"):
        add_adapters(path, relatives, AddOptions(calibration=str(tmp_path / "moments")))


def _seen(checkpoint: Checkpoint, task_id: str, adapter: Adapter) -> float:
    lost = norm = 0.0
    for number, (name, (a, b)) in enumerate(decoded(checkpoint, task_id).items()):
        d_in, d_out = SHAPES[name]
        left = (torch.logspace(0, -1, d_out).double() * 10.0**-number).sqrt()[:, None]
        right = torch.logspace(0, -3, d_in).double().sqrt()
        wanted = left * dense(adapter, name) * right
        lost += float((left * (b.double() @ a.double()) * right - wanted).square().sum())
        norm += float(wanted.square().sum())
    return math.sqrt(lost / norm)


# --- what stays -------------------------------------------------------------------------------------


def test_what_is_there_stays_byte_for_byte(tmp_path: Path) -> None:
    path, adapters, relatives = world(tmp_path)
    (path / "LICENSE").write_text("mine")
    (path / "notes").mkdir()
    (path / "notes" / "a.txt").write_text("mine too")
    before, old = digests(path), Checkpoint.open(path)
    identities = {task_id: old.digest(task_id) for task_id in old.tasks}
    new = relatives | strangers(tmp_path)
    add_adapters(path, new)
    after = digests(path)
    written = {CONFIG_FILE, "tasks.json", "README.md"}
    assert {f: d for f, d in after.items() if f in before and f not in written} == {
        f: d for f, d in before.items() if f not in written
    }
    checkpoint = Checkpoint.open(path)
    assert list(checkpoint.tasks) == [*adapters, *new]
    assert {task_id: checkpoint.digest(task_id) for task_id in identities} == identities


@pytest.mark.parametrize(("quantize", "ratio"), [("none", 4.5), ("int8", 4.5), ("nf4", 6.0)])
def test_grown_bases_leave_old_tasks_to_the_bit(
    tmp_path: Path, quantize: str, ratio: float
) -> None:
    path, adapters, _ = world(tmp_path, representation="joint", quantize=quantize)
    before, old = digests(path), Checkpoint.open(path)
    factors = {task_id: decoded(old, task_id) for task_id in adapters}
    first_bases = dict(old.bases())
    new = others(tmp_path, 7)
    report = add_adapters(path, new, AddOptions(ratio=ratio), expand=True)
    tasks = check(path, new, report)
    checkpoint = Checkpoint.open(path)
    assert report.grown == 2
    assert report.grown_nbytes == checkpoint.basis_nbytes - old.basis_nbytes
    assert checkpoint.config.format_version == 2
    after = digests(path)
    for task_id in adapters:
        file = checkpoint.record(task_id).file
        assert after[file] == before[file]
        for name, (a, b) in decoded(checkpoint, task_id).items():
            assert torch.equal(a, factors[task_id][name][0])
            assert torch.equal(b, factors[task_id][name][1])
    for name, basis in checkpoint.bases():
        first = first_bases[name]
        for side in ("u", "v"):
            now, then = getattr(basis, side), getattr(first, side)
            assert now.rows > then.rows
            assert torch.equal(unpack(now.row_slice(0, then.rows)), unpack(then))
    assert "projected" in {task.kind for task in tasks.values()}


def test_growing_keeps_more_at_the_same_bytes(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path, representation="joint")
    new, out = others(tmp_path), tmp_path / "new"
    options = AddOptions(ratio=3.5)
    plain = add_adapters(path, new, options, output=out)
    grown = add_adapters(path, new, options, expand=True, output=out, force=True)
    check(out, new, grown)
    budget = sum(adapter.original_nbytes for adapter in new.values()) / 3.5
    assert grown.nbytes - grown.nbytes_before <= budget
    assert all(new.error <= old.error for old, new in zip(plain.tasks, grown.tasks))
    assert sum(task.error for task in grown.tasks) < 0.6 * sum(task.error for task in plain.tasks)


def test_growing_again(tmp_path: Path) -> None:
    path, adapters, _ = world(tmp_path, representation="joint")
    second = others(tmp_path)
    third = renamed(family(tmp_path / "third", 6, related=True, shapes=SHAPES, seed=21), "third-")
    everything = adapters | second | third
    options = AddOptions(ratio=3.5)
    assert add_adapters(path, second, options, expand=True).grown == 2
    known = {task_id: decoded(Checkpoint.open(path), task_id) for task_id in adapters | second}
    assert add_adapters(path, third, options, expand=True).grown == 2
    checkpoint = Checkpoint.open(path)
    assert list(checkpoint.tasks) == list(everything)
    for task_id, factors in known.items():
        for name, (a, b) in decoded(checkpoint, task_id).items():
            assert torch.equal(a, factors[name][0])
            assert torch.equal(b, factors[name][1])
    assert validate(path) == []


def test_no_basis_grows_for_one_stranger(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path, representation="joint")
    new = strangers(tmp_path, 1)
    out, plain = tmp_path / "new", tmp_path / "plain"
    report = add_adapters(path, new, expand=True, output=out)
    add_adapters(path, new, output=plain)
    assert report.grown == report.grown_nbytes == 0
    assert "no basis has grown" in report.warnings[0]
    assert digests(out) == digests(plain)


@pytest.mark.parametrize(
    "metric", [FROBENIUS, Metric(Whitener.from_moment(torch.diag(torch.logspace(0, -2, 30))))]
)
def test_directions_are_those_that_the_block_leaves(metric: Metric) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(25, 4, generator=generator))[0].T
    v = torch.linalg.qr(torch.randn(30, 5, generator=generator))[0].T
    basis = Basis(pack(u, "float32"), pack(v, "float32"))
    fit = ResidualFit(basis, (1, 4, 0, 5), metric, 3, 3)
    left, right = [], []
    white_v = torch.linalg.qr(metric.a(v.double()).T)[0]
    for _ in range(7):
        a, b = torch.randn(2, 30, generator=generator), torch.randn(25, 2, generator=generator)
        delta = 0.3 * b.double() @ metric.a(a.double())
        fit.add(a, b, 0.3, float(delta.square().sum()))
        delta /= delta.norm()
        projector = u[1:4].T.double() @ u[1:4].double()
        left.append(delta - projector @ delta)
        right.append(delta - delta @ white_v @ white_v.T)
    rows_u, rows_v = fit.directions()
    for rows, block in ((rows_u, u[1:4]), (rows_v, v)):
        both = torch.cat([block, rows])
        assert torch.allclose(both @ both.T, torch.eye(len(both)), atol=1e-5)
    best = torch.linalg.svd(torch.cat(left, dim=1))[0][:, :3]
    assert torch.linalg.matrix_norm(best.T @ rows_u.T.double(), 2) == pytest.approx(1, rel=1e-6)
    assert float((best.T @ rows_u.T.double()).square().sum()) == pytest.approx(3, rel=1e-6)
    wanted = torch.linalg.svd(torch.cat(right))[2][:3]
    spanned = torch.linalg.qr(torch.cat([white_v, metric.a(rows_v.double()).T], dim=1))[0]
    assert float((wanted @ spanned).square().sum()) == pytest.approx(3, rel=1e-6)


def test_added_tasks_are_exported_as_they_decode(tmp_path: Path) -> None:
    path, _, relatives = world(tmp_path, representation="joint")
    new = relatives | others(tmp_path)
    add_adapters(path, new, expand=True)
    checkpoint = Checkpoint.open(path)
    for task_id in new:
        adapter = open_adapter(
            export_task(checkpoint, task_id, tmp_path / "out", force=True, dtype=torch.float32)
        )
        for name, (a, b) in decoded(checkpoint, task_id).items():
            assert torch.allclose(
                dense(adapter, name), b.double() @ a.double(), rtol=1e-5, atol=1e-8
            )


def test_a_replaced_task_keeps_its_place(tmp_path: Path) -> None:
    path, adapters, _ = world(tmp_path)
    new = {"task3": strangers(tmp_path, 1)["other-task0"]}
    with pytest.raises(TaskIdError, match=r"has 'task3' already; replace with --replace"):
        add_adapters(path, new)
    check(path, new, add_adapters(path, new, replace_tasks=True))
    assert list(Checkpoint.open(path).tasks) == list(adapters)


def test_another_folder_leaves_the_checkpoint(tmp_path: Path) -> None:
    path, adapters, relatives = world(tmp_path)
    before = digests(path)
    add_adapters(path, relatives, output=tmp_path / "new")
    assert digests(path) == before
    assert list(Checkpoint.open(tmp_path / "new").tasks) == [*adapters, *relatives]
    with pytest.raises(OutputError, match="exists and is not empty"):
        add_adapters(path, relatives, output=tmp_path / "new")


# --- what goes wrong --------------------------------------------------------------------------------


def test_errors_leave_the_checkpoint(tmp_path: Path) -> None:
    path, _, relatives = world(tmp_path)
    before = digests(path)
    generator = torch.Generator().manual_seed(0)
    other = save(tmp_path / "x", {"model.layers.0.q_proj": (192, 64)}, 4, generator)
    with pytest.raises(AdapterError, match="160 x 192 linear in the checkpoint"):
        add_adapters(path, {"x": other})
    with pytest.raises(AdapterError, match="no adapters"):
        add_adapters(path, {})
    with pytest.raises(BudgetError, match=r"task 'task12' does not fit into 51 bytes"):
        add_adapters(path, relatives, AddOptions(ratio=100))
    with pytest.raises(BudgetError, match=r"within a relative error of 0\.001"):
        add_adapters(path, relatives, AddOptions(max_error=0.001, quantize="nf4"))
    with pytest.raises(OptionError, match="contradict"):
        AddOptions(ratio=3, max_error=0.1)
    with pytest.raises(CheckpointError, match="is not a vllm-vlora checkpoint"):
        add_adapters(tmp_path / "x", relatives)
    assert digests(path) == before


def test_damage_is_found(tmp_path: Path) -> None:
    path, _, relatives = world(tmp_path, representation="joint")
    for file in (path / "basis.safetensors", path / "tasks" / "task5.safetensors"):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        before = digests(path)
        with pytest.raises(CheckpointError, match=file.name):
            add_adapters(path, relatives)
        assert digests(path) == before
        file.write_bytes(data)
    add_adapters(path, relatives)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_crash_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path, _, relatives = world(tmp_path)
    before = digests(path)

    def crash(self: successor.Successor) -> None:
        assert list(self.tasks) != []
        raise error

    monkeypatch.setattr(successor.Successor, "finish_edited", crash)
    new = relatives | others(tmp_path)
    for expand in (False, True):
        with pytest.raises(error):
            add_adapters(path, new, expand=expand)
        with pytest.raises(error):
            remove_tasks(path, ["task0"])
    assert digests(path) == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"adapters", "ckpt", "others"}


def test_a_change_by_somebody_else_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, adapters, relatives = world(tmp_path)
    finish = successor.Successor.finish_edited
    calls: list[Path] = []
    theirs = strangers(tmp_path)

    def meanwhile(self: successor.Successor) -> Any:
        calls.append(self.folder)
        if len(calls) == 1:
            add_adapters(path, theirs)
        return finish(self)

    monkeypatch.setattr(successor.Successor, "finish_edited", meanwhile)
    with pytest.raises(OutputError, match="was changed meanwhile"):
        add_adapters(path, relatives)
    assert list(Checkpoint.open(path).tasks) == [*adapters, *theirs]


# --- removing ---------------------------------------------------------------------------------------


def test_removed_tasks_are_gone_and_the_rest_stays(tmp_path: Path) -> None:
    path, adapters, _ = world(tmp_path)
    before = digests(path)
    size = (path / "tasks" / "task4.safetensors").stat().st_size
    assert remove_tasks(path, ["task4"]) == size
    after = digests(path)
    assert list(Checkpoint.open(path).tasks) == [t for t in adapters if t != "task4"]
    assert set(before) - set(after) == {"tasks/task4.safetensors"}
    assert all(after[f] == before[f] for f in after if f.endswith(".safetensors"))
    assert validate(path) == []
    with pytest.raises(TaskNotFoundError, match="no task 'task4'"):
        remove_tasks(path, ["task4"])
    with pytest.raises(OptionError, match="no task would be left"):
        remove_tasks(path, list(Checkpoint.open(path).tasks))


def test_rows_that_nobody_uses_are_counted(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path, representation="joint")
    new = others(tmp_path)
    grown = add_adapters(path, new, expand=True).grown_nbytes
    assert rebuild_advice(Checkpoint.open(path)).idle_nbytes == 0
    remove_tasks(path, list(new))
    advice = rebuild_advice(Checkpoint.open(path))
    assert advice.likely
    # The header of the basis file does not count.
    assert grown - 64 <= advice.idle_nbytes <= grown
    assert f"no task uses {advice.idle_nbytes} bytes" in advice.why


# --- rebuilding -------------------------------------------------------------------------------------


def test_a_rebuild_takes_in_what_add_had_to_store_privately(tmp_path: Path) -> None:
    path, adapters, _ = world(tmp_path, representation="joint")
    new = others(tmp_path)
    assert not rebuild_advice(Checkpoint.open(path)).likely
    add_adapters(path, new)
    checkpoint = Checkpoint.open(path)
    advice = rebuild_advice(checkpoint)
    assert advice.likely
    assert advice.private_tasks == len(new)
    data = sum(checkpoint.record(task_id).lora_nbytes for task_id in new)
    assert 0.3 * data < advice.private_nbytes < data
    prediction = predict_rebuild(checkpoint, adapters | new)
    assert prediction.best is not None
    assert prediction.best.error < prediction.error
    ratio = checkpoint.original_nbytes / prediction.best.nbytes
    report = rebuild(path, adapters | new, AddOptions(ratio=ratio))
    assert report.nbytes <= prediction.best.nbytes
    assert report.mean_error == pytest.approx(prediction.best.error, rel=0.05)
    assert list(Checkpoint.open(path).tasks) == [*adapters, *new]


def test_a_rebuild_elsewhere_keeps_what_lies_beside_as_adding_does(tmp_path: Path) -> None:
    path, adapters, new = world(tmp_path)
    (path / "LICENSE").write_text("a licence")
    set_alias(path, "prod", "task0")
    router = attach_router(path, ["task0", "task1"], network(2))
    options = AddOptions(ratio=5.0)
    for ref, output in ((path, tmp_path / "new"), (f"file://{path}", None)):
        report = rebuild(ref, adapters | new, options, output=output)
        assert report.path == (output or path)
        after = Checkpoint.open(report.path)
        assert list(after.tasks) == [*adapters, *new]
        assert (after.aliases, after.router) == (Checkpoint.open(path).aliases, router)
        assert list(after.aliases) == ["prod"]
        assert (report.path / "LICENSE").read_text() == "a licence"
        assert validate(report.path) == []
    before = digests(tmp_path)
    with pytest.raises(OutputError, match="alias 'prod' names task 'task0', which there is not"):
        remove_tasks(path, ["task0"])
    with pytest.raises(OutputError, match="exists and is not empty"):
        rebuild(path, adapters | new, options, output=tmp_path / "new")
    with pytest.raises(OutputError, match="which is read"):
        rebuild(path, adapters | new, options, output=tmp_path / "adapters", force=True)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("edit", ["add", "remove", "rebuild"])
def test_no_output_lies_in_the_checkpoint_itself(tmp_path: Path, edit: str) -> None:
    path, adapters, new = world(tmp_path)
    before = digests(tmp_path)
    edits: dict[str, Callable[[], object]] = {
        "add": lambda: add_adapters(path, new, output=path / "small"),
        "remove": lambda: remove_tasks(path, ["task0"], output=path / "small"),
        "rebuild": lambda: rebuild(path, adapters, output=path / "small"),
    }
    with pytest.raises(OutputError, match=r"lies in the checkpoint .*; choose an output beside it"):
        edits[edit]()
    assert digests(tmp_path) == before


def test_a_rebuild_is_predicted_from_the_tasks_as_stored(tmp_path: Path) -> None:
    path, _, _ = world(tmp_path, representation="joint")
    first = predict_rebuild(Checkpoint.open(path))
    assert not first.from_originals
    assert all(point.error >= first.error for point in first.points)
    add_adapters(path, others(tmp_path))
    before = digests(path)
    second = predict_rebuild(Checkpoint.open(path))
    assert second.best is not None
    assert second.best.nbytes <= 0.9 * second.nbytes
    assert second.best.error <= 1.05 * second.error
    assert digests(path) == before


def test_a_rebuild_of_what_has_lost_nothing_pays_in_bytes_or_not_at_all(tmp_path: Path) -> None:
    path, adapters, _ = world(tmp_path, ratio=None, quantize="none")
    prediction = predict_rebuild(Checkpoint.open(path), adapters)
    assert prediction.error == 0
    assert any(point.error == 0 for point in prediction.points)
    assert prediction.best is None


def test_originals_are_found_by_id_and_by_portable_name(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    root = tmp_path / "originals"
    adapters = {
        "org/chat": save(root / "org" / "chat", SHAPES, 4, generator),
        "ü b": save(root / "other", SHAPES, 4, generator),
    }
    compress(adapters, tmp_path / "ckpt", CompressOptions(ratio=2))
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    # By the name that the adapter had, as `evaluate --adapters` finds it.
    assert open_originals(checkpoint, root)["ü b"].path == root / "other"
    (root / "other").rename(root / "lost")
    with pytest.raises(AdapterError, match="no adapter for 1 of 2 tasks: 'ü b'"):
        open_originals(checkpoint, root)
    assert list(open_originals(checkpoint, root, ["org/chat"])) == ["org/chat"]
    name = Path(checkpoint.record("ü b").file).stem
    (root / "lost").rename(root / name)
    found = open_originals(checkpoint, root)
    assert {task_id: adapter.path for task_id, adapter in found.items()} == {
        "org/chat": root / "org" / "chat",
        "ü b": root / name,
    }
    with pytest.raises(AdapterError, match="no original of task 'ü b'"):
        rebuild(tmp_path / "ckpt", {"org/chat": adapters["org/chat"]})


def test_a_folder_that_is_one_tasks_own_is_not_anothers_original(tmp_path: Path) -> None:
    """Task a was compressed from a folder b, and a task b came later: b/ is the original of b alone."""
    generator = torch.Generator().manual_seed(0)
    adapters = {
        "a": save(tmp_path / "then" / "b", SHAPES, 4, generator),
        "b": save(tmp_path / "then" / "c", SHAPES, 4, generator),
    }
    compress(adapters, tmp_path / "ckpt", CompressOptions(ratio=2))
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert [record.source for record in checkpoint.tasks.values()] == ["b", "c"]
    save(tmp_path / "now" / "b", SHAPES, 4, generator)
    assert find_originals(checkpoint, [str(tmp_path / "now")]) == {"b": tmp_path / "now" / "b"}
    with pytest.raises(AdapterError, match="no adapter for 1 of 2 tasks: 'a'"):
        open_originals(checkpoint, tmp_path / "now")
    # Where no task is called c, the folder of that name is the one that b was compressed from.
    save(tmp_path / "now" / "a", SHAPES, 4, generator)
    (tmp_path / "now" / "b").rename(tmp_path / "now" / "c")
    found = open_originals(checkpoint, tmp_path / "now")
    assert {task: adapter.path.name for task, adapter in found.items()} == {"a": "a", "b": "c"}
    with pytest.raises(OptionError, match=r"--originals .*nowhere: no such folder"):
        open_originals(checkpoint, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="name the folders as the tasks"):
        open_originals(checkpoint, tmp_path / "empty")


# --- the command line -------------------------------------------------------------------------------


def invoke(app: typer.Typer, *args: str | Path, code: int = 0) -> Any:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.output
    return result


def put(tmp_path: Path, name: str, adapters: dict[str, Adapter]) -> Path:
    """A folder of these adapters by task id."""
    root = tmp_path / name
    root.mkdir()
    for task_id, adapter in adapters.items():
        (root / task_id).symlink_to(adapter.path)
    return root


def test_the_command_adds_and_says_why(tmp_path: Path) -> None:
    path, adapters, relatives = world(tmp_path, representation="joint")
    new = relatives | strangers(tmp_path, 1)
    folder = put(tmp_path, "new", new)
    result = invoke(commands, "add", path, folder, "-o", tmp_path / "copy")
    assert "task12: projected; the shared bases hold 9" in result.stdout
    assert "other-task0: private; the shared bases hold" in result.stdout
    assert "Warning: 'other-task0' loses far more" in result.stdout
    data = json.loads(invoke(commands, "add", path, folder, "--json").stdout)
    assert [task["task_id"] for task in data["tasks"]] == sorted(new)
    assert data["bytes"] == Checkpoint.open(path).nbytes
    kinds = {task["task_id"]: task["kind"] for task in data["tasks"]}
    assert kinds["other-task0"] == "private"
    assert kinds["task12"] == "projected"
    again = invoke(commands, "add", path, folder, code=2)
    assert again.stderr.splitlines()[-1].startswith("Error: ")
    assert "--replace" in again.stderr
    invoke(commands, "add", path, folder, "--replace", "--expand", "--ratio", "4")
    invoke(commands, "add", path, folder, "--name", f"x={folder / 'task12'}", code=2)
    invoke(commands, "add", path, "--name", f"x={folder / 'task12'}", "--max-error", "0.2")
    assert "x" in Checkpoint.open(path).tasks
    one = ("--task-id", "y", "--incremental", "--max-bytes", "40kB", "-o", tmp_path / "with-y")
    invoke(commands, "add", path, folder / "task13", *one)
    assert "y" in Checkpoint.open(tmp_path / "with-y").tasks
    equals = ("--task-id", "y=1", *one[2:-1], tmp_path / "with-equals")
    invoke(commands, "add", path, folder / "task13", *equals)
    assert "y=1" in Checkpoint.open(tmp_path / "with-equals").tasks
    assert "single adapter" in invoke(commands, "add", path, *["--task-id", "y"], code=2).stderr
    data = json.loads(invoke(commands, "remove", path, "x", "task13", "--json").stdout)
    assert data["removed"] == ["x", "task13"]
    assert "Removed 1 task" in invoke(commands, "remove", path, "task12").stdout
    assert list(Checkpoint.open(path).tasks) == [*adapters, "other-task0"]
    invoke(commands, "remove", path, "nobody", code=2)
    invoke(commands, "add", path, folder, "--ratio", "200", "--replace", code=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rebuild"], "--originals DIR"),
        (["--originals", "x"], "is for --rebuild"),
        (["--rebuild", "--originals", "x", "--expand"], "no effect"),
        (["--ratio", "3", "--max-error", "0.1"], "contradict"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, options: Sequence[str], words: str) -> None:
    result = invoke(commands, "add", tmp_path, tmp_path, *options, code=2)
    assert words in result.stderr


def test_the_command_rebuilds_and_info_says_when(tmp_path: Path) -> None:
    path, adapters, _ = world(tmp_path, representation="joint")
    new = others(tmp_path)
    folder = put(tmp_path, "new", new)
    originals = put(tmp_path, "originals", adapters)
    assert "A rebuild may pay" not in invoke(cli, "info", path).stdout
    invoke(commands, "add", path, folder)
    assert "A rebuild may pay: 5 tasks are private" in invoke(cli, "info", path).stdout
    # In bytes: a ratio of one or less, of a checkpoint that is larger than 16 bits, sets no limit.
    said = " ".join(invoke(cli, "info", path, "--rebuild").stdout.split())
    best = predict_rebuild(Checkpoint.open(path)).best
    assert best is not None
    assert f"`vllm-vlora add CKPT --rebuild --originals DIR --max-bytes {best.nbytes}`" in said
    missing = invoke(cli, "info", path, "--rebuild", "--originals", originals, code=2)
    assert "no adapter for 5 of 17 tasks" in missing.stderr
    missing = invoke(commands, "add", path, "--rebuild", "--originals", originals, code=2)
    assert "no adapter for 5 of 17 tasks" in missing.stderr
    before = Checkpoint.open(path)
    args = ("add", path, folder, "--replace", "--rebuild", "--originals", originals, "--json")
    data = json.loads(invoke(commands, *args).stdout)
    after = Checkpoint.open(path)
    assert data["bytes"] == after.nbytes <= before.nbytes
    worst = {task_id: record.error for task_id, record in before.tasks.items()}
    assert sum(r.error for r in after.tasks.values()) < 0.6 * sum(worst.values())
    data = json.loads(invoke(cli, "info", path, "--rebuild", "--json").stdout)
    assert data["rebuild"]["prediction"]["pays"] is False
    invoke(cli, "info", path, "--originals", originals, code=2)
