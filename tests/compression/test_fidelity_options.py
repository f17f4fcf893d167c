"""The ways to choose what a compression keeps: representations, groups, budgets, gates, calibration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SHAPES, calibration_of, check, dense, family, run, save

from vllm_vlora.adapters.collection import Collection
from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import Compression, predict
from vllm_vlora.compression.quality import compress_to_quality
from vllm_vlora.errors import BudgetError, OptionError
from vllm_vlora.fitting.calibration import Calibration
from vllm_vlora.fitting.whitening import Metric
from vllm_vlora.planning.plan import Budget, Plan
from vllm_vlora.planning.survey import Surveyor
from vllm_vlora.representations.decode import decode

# Wide enough that headers are a small part of a file.
WIDE = {name: (4 * d_in, 4 * d_out) for name, (d_in, d_out) in SHAPES.items()}


def stored_as(path: Path) -> dict[str, Counter[str]]:
    """Task -> how often each representation occurs."""
    return {
        task: Counter(segment.representation for segment in record.segments)
        for task, record in Checkpoint.open(path).tasks.items()
    }


def two_families(folder: Path, each: int) -> dict[str, Adapter]:
    left = family(folder / "left", each, related=True, seed=1, shapes=WIDE)
    right = family(folder / "right", each, related=True, seed=2, shapes=WIDE)
    return {f"l{k}": v for k, v in left.items()} | {f"r{k}": v for k, v in right.items()}


def same_start(folder: Path, count: int) -> dict[str, Adapter]:
    """Adapters of one rank near one common adapter, and a few directions away from it."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    start, ways = {}, {}
    for name, (d_in, d_out) in WIDE.items():
        shapes = (4, d_in), (d_out, 4)
        start[name] = [torch.randn(shape, generator=generator) for shape in shapes]
        ways[name] = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    for number in range(count):
        z = 0.2 * torch.randn(2, generator=generator)
        factors = {
            n: (
                (a + torch.einsum("k,krd->rd", z, ways[n][0])).bfloat16(),
                (0.01 * (b + torch.einsum("k,kdr->dr", z, ways[n][1]))).bfloat16(),
            )
            for n, (a, b) in start.items()
        }
        config = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
        }
        write_adapter(folder / f"t{number}", config, factors)
        found[f"t{number}"] = open_adapter(folder / f"t{number}")
    return found


@pytest.mark.parametrize("representation", ["factored", "flat", "joint", "private", "auto"])
def test_every_representation_is_written_and_measured(tmp_path: Path, representation: str) -> None:
    adapters = same_start(tmp_path / "in", 9)
    report = run(adapters, tmp_path / "out", ratio=4.0, representation=representation)
    checkpoint = check(tmp_path / "out", adapters, report)
    assert report.ratio >= 4.0
    segments = [s for r in checkpoint.tasks.values() for s in r.segments]
    if representation == "factored":
        assert {s.core for s in segments if s.representation == "joint"} == {"factors"}
    if representation in ("flat", "private"):
        assert {s.representation for s in segments} == {representation}


def test_flat_keeps_adapters_of_one_start_that_nothing_else_keeps(tmp_path: Path) -> None:
    adapters = same_start(tmp_path / "in", 12)
    flat, private = (
        run(adapters, tmp_path / name, ratio=8.0, representation=name)
        for name in ("flat", "private")
    )
    assert flat.worst_error < 0.5 * private.worst_error
    auto = run(adapters, tmp_path / "auto", ratio=8.0)
    assert auto.rms_error < 0.5 * private.rms_error, "a basis carries them as well"
    assert "flat" not in {candidate.representation for candidate in auto.candidates}


def test_sides_of_a_basis_have_widths_of_their_own(tmp_path: Path) -> None:
    """Adapters that share what they read and not what they write."""
    generator = torch.Generator().manual_seed(0)
    parents = {}
    for name, (d_in, d_out) in WIDE.items():
        shapes = (3, d_in), (d_out, 60)
        parents[name] = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    adapters = {
        f"t{i}": save(tmp_path / f"in{i}", WIDE, 4, generator, parents=parents) for i in range(10)
    }
    report = run(adapters, tmp_path / "out", ratio=2.5, representation="joint")
    checkpoint = check(tmp_path / "out", adapters, report)
    bases = [module.basis for module in checkpoint.modules if module.basis]
    assert sum(basis.k_out for basis in bases) > 1.3 * sum(basis.k_in for basis in bases)


@pytest.mark.parametrize("strangers", [1, 4])
def test_auto_beats_both_where_only_some_tasks_are_related(tmp_path: Path, strangers: int) -> None:
    adapters = family(tmp_path / "in", 12, related=True, shapes=WIDE)
    others = family(tmp_path / "strange", strangers, related=False, seed=9, shapes=WIDE)
    adapters |= {f"s{name}": adapter for name, adapter in others.items()}
    auto = run(adapters, tmp_path / "auto", ratio=4.0)
    check(tmp_path / "auto", adapters, auto)
    for other in ("joint", "private"):
        single = run(adapters, tmp_path / other, ratio=4.0, representation=other)
        assert auto.rms_error <= single.rms_error


def test_some_modules_of_some_tasks_share_and_the_rest_do_not(tmp_path: Path) -> None:
    """A basis for the related ones, and private factors of the others in the same checkpoint."""
    adapters = family(tmp_path / "in", 10, related=True, shapes=WIDE)
    others = family(tmp_path / "strange", 5, related=False, seed=9, shapes=WIDE)
    adapters |= {f"s{name}": adapter for name, adapter in others.items()}
    limits = torch.full((15,), 0.2**2, dtype=torch.float64)
    # Whoever may lose nothing at all cannot share.
    limits[10:] = 0
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    compression = Compression(Collection(adapters), CompressOptions(), scratch, bounded=False)
    report = compression.write(out, compression.choose(Budget(limits=limits)))
    check(out, adapters, report)
    found = stored_as(out)
    assert all(found[f"s{name}"] == {"private": 2} for name in others)
    assert sum(found[name]["joint"] for name in found if not name.startswith("s")) >= 10
    assert all(task.error == 0 for task in report.tasks[10:])
    assert max(task.error for task in report.tasks) <= 0.2


def test_two_families_get_a_basis_each(tmp_path: Path) -> None:
    adapters = two_families(tmp_path / "in", 8)
    options: dict[str, Any] = {"ratio": 6.0, "representation": "joint"}
    one = run(adapters, tmp_path / "one", clusters=1, **options)
    two = run(adapters, tmp_path / "two", clusters=2, **options)
    checkpoint = check(tmp_path / "two", adapters, two)
    assert two.rms_error < one.rms_error
    for index, module in enumerate(checkpoint.modules):
        rows = {
            task: segment.rows
            for task, record in checkpoint.tasks.items()
            for segment in record.segments
            if segment.module == index
        }
        left, right = ({rows[t] for t in rows if t.startswith(side)} for side in "lr")
        assert len(left) == len(right) == 1, module.name
        assert left != right
    auto = run(adapters, tmp_path / "auto", ratio=6.0)
    check(tmp_path / "auto", adapters, auto)
    assert auto.rms_error <= two.rms_error


def test_one_basis_and_bases_of_clusters_are_judged_apart(tmp_path: Path) -> None:
    adapters = two_families(tmp_path / "in", 4)
    (tmp_path / "scratch").mkdir()
    options = CompressOptions(ratio=6.0, executor="serial")
    forms = Compression(Collection(adapters), options, tmp_path / "scratch").best_of_each()
    plans = {chosen.plan.form: chosen.plan for chosen in forms}
    assert {("private", False), ("joint", False), ("joint", True)} <= plans.keys()
    blocks = {kind: max(map(len, plans["joint", kind].blocks.values())) for kind in (False, True)}
    assert blocks == {False: 1, True: 2}


def test_what_is_the_same_under_two_names_is_judged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every task shares in the formats of ``joint``, that is what ``mixed`` comes to."""
    adapters = family(tmp_path / "in", 8, related=True)
    (tmp_path / "scratch").mkdir()
    compression = Compression(
        Collection(adapters),
        CompressOptions(ratio=12.0, executor="serial"),
        tmp_path / "scratch",
    )
    planned = compression.candidates.plans(compression.budget())[0]
    kept = [(plan.private, plan.joint, plan.flat) for plan in planned]
    assert {"joint", "mixed"} <= {plan.representation for plan in planned}
    assert any(one in kept[:place] for place, one in enumerate(kept)), "two are the same"
    encoded: list[Plan] = []
    encode = compression._encode
    monkeypatch.setattr(
        compression, "_encode", lambda plan, *rest: encoded.append(plan) or encode(plan, *rest)
    )
    chosen = [(c.plan.private, c.plan.joint, c.plan.flat) for c in compression.best_of_each()]
    assert all(one not in chosen[:place] for place, one in enumerate(chosen))
    assert len(encoded) == len(chosen)


def test_clusters_are_not_made_up(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 8, related=False)
    run(adapters, tmp_path / "out", ratio=4.0)
    segments = [s for r in Checkpoint.open(tmp_path / "out").tasks.values() for s in r.segments]
    assert {segment.rows for segment in segments} == {None}


@pytest.mark.parametrize("clusters", [3, 5])
def test_as_many_clusters_as_tasks_are_passed_over_with_a_warning(
    clusters: int, tmp_path: Path
) -> None:
    adapters = family(tmp_path / "in", 3, related=True)
    report = run(adapters, tmp_path / "out", clusters=clusters, ratio=4.0)
    check(tmp_path / "out", adapters, report)
    [said] = [line for line in report.warnings if "clusters" in line]
    assert f"clusters is {clusters}" in said
    without = run(adapters, tmp_path / "without", clusters=1, ratio=4.0)
    assert (report.nbytes, report.worst_error) == (without.nbytes, without.worst_error)
    assert not any("clusters" in line for line in without.warnings)


def test_a_gate_lifts_the_worst_task(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 8, related=True)
    adapters |= family(tmp_path / "strange", 1, related=False, seed=3) and {
        "stranger": save(tmp_path / "s", SHAPES, 8, torch.Generator().manual_seed(7))
    }
    free = run(adapters, tmp_path / "free", ratio=5.0, representation="joint")
    gate = 0.8 * free.worst_error
    gated = run(adapters, tmp_path / "gated", ratio=5.0, gate=gate)
    check(tmp_path / "gated", adapters, gated)
    assert gated.worst_error <= gate
    assert gated.ratio >= 5.0
    ungated = run(adapters, tmp_path / "ungated", ratio=5.0)
    if ungated.worst_error > gate:
        assert gated.raised
    with pytest.raises(BudgetError, match="gate"):
        run(adapters, tmp_path / "never", ratio=12.0, gate=1e-3)


def test_max_bytes_is_met(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 6, related=True)
    limit = 9_000
    report = run(adapters, tmp_path / "out", max_bytes=limit)
    check(tmp_path / "out", adapters, report)
    assert 0.9 * limit < report.nbytes <= limit
    with pytest.raises(BudgetError, match="bytes"):
        run(adapters, tmp_path / "never", max_bytes=100)


def test_predictions_are_what_compressing_then_gives(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 8, related=True)
    points = predict(adapters, ratios=(2, 4, 8))
    assert [point.ratio for point in points] == [2, 4, 8]
    errors = [point.candidate.mean_error for point in points]
    assert errors == sorted(errors)
    for point in points:
        report = run(adapters, tmp_path / "out", ratio=point.ratio)
        assert report.mean_error == pytest.approx(point.candidate.mean_error, rel=0.1, abs=0.005)
    assert [path.name for path in tmp_path.iterdir()] != ["in"]


def test_a_budget_is_replaced_by_every_size_of_a_prediction(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 4, related=True)
    plain = predict(adapters, ratios=(4, 8))
    for budget in ({"num_components": 4}, {"ratio": 3}, {"max_bytes": 9000}, {"max_error": 0.1}):
        points = predict(adapters, CompressOptions(**budget), ratios=(4, 8))
        assert points == plain
    with pytest.raises(OptionError, match="no ratio to predict"):
        predict(adapters, ratios=())


@pytest.mark.parametrize("quantize", ["auto", "nf4"])
def test_a_gate_holds_at_every_size_that_is_predicted(tmp_path: Path, quantize: str) -> None:
    """Also beside a ratio that limits nothing."""
    adapters = family(tmp_path / "in", 4, related=False)
    options = CompressOptions(max_bytes=9_000, gate=1e-3, quantize=quantize)
    points = predict(adapters, options, ratios=(0.5, 8))
    # NF4 loses more than that, and eight times fewer bytes do in any format.
    assert [point.ratio for point in points] == ([0.5] if quantize == "auto" else [])
    assert all(point.candidate.worst_error <= 1e-3 for point in points)


def recovered_by_error(adapters: dict[str, Adapter], sharpness: dict[str, float]) -> Any:
    """A judge by dense weights: 1 - sharpness * error^2 for each task."""

    def judge(folder: Path) -> dict[str, float | None]:
        checkpoint = Checkpoint.open(folder)
        shared = {(n, kind): basis for n, kind, basis in checkpoint.shared()}
        found: dict[str, float | None] = {}
        for task, adapter in adapters.items():
            lost = norm = 0.0
            for name, stored in checkpoint.load_task(task).modules.items():
                a, b = decode(stored, shared.get((name, stored.representation)))
                wanted = dense(adapter, name)
                lost += float((b.double() @ a.double() - wanted).square().sum())
                norm += float(wanted.square().sum())
            found[task] = 1 - sharpness[task] * lost / norm
        return found

    return judge


def test_every_task_recovers_what_was_asked_for(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 6, related=False)
    sharpness = dict.fromkeys(adapters, 1.0) | {"task2": 20.0, "task4": 1e9}
    judge = recovered_by_error(adapters, sharpness)
    report = compress_to_quality(adapters, tmp_path / "out", 0.95, judge)
    check(tmp_path / "out", adapters, report)
    measured = judge(tmp_path / "out")
    assert report.kl_kept == pytest.approx(measured)
    assert min(value for value in measured.values() if value is not None) >= 0.95
    assert report.kept == ["task4"]
    errors = {task.task_id: task.error for task in report.tasks}
    assert errors["task4"] == 0
    # Not far inside what was asked for: error^2 = 0.05 / sharpness is the largest that passes.
    assert errors["task0"] > 0.75 * 0.05**0.5
    assert 0 < errors["task2"] <= (0.05 / 20) ** 0.5
    with pytest.raises(OptionError, match="leave out"):
        compress_to_quality(adapters, tmp_path / "x", 0.9, judge, CompressOptions(ratio=3))


def test_a_task_without_a_figure_keeps_what_is_kept_by_default(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 4, related=False)
    measure = recovered_by_error(adapters, dict.fromkeys(adapters, 1.0))

    def judge(folder: Path) -> dict[str, float | None]:
        return {**measure(folder), "task1": None}

    report = compress_to_quality(adapters, tmp_path / "out", 0.8, judge)
    check(tmp_path / "out", adapters, report)
    errors = {task.task_id: task.error for task in report.tasks}
    assert errors.pop("task1") <= 0.1
    assert min(errors.values()) > 0.3
    assert any("task1" in warning for warning in report.warnings)
    # Of what no default allows, nothing.
    strict = compress_to_quality(adapters, tmp_path / "strict", 0.999, judge)
    assert max(task.error for task in strict.tasks) <= 0.001**0.5


@pytest.mark.parametrize("representation", ["auto", "private", "joint"])
def test_a_quality_beside_what_a_format_cannot_reach(tmp_path: Path, representation: str) -> None:
    adapters = family(tmp_path / "in", 4, related=False)
    options = CompressOptions(quantize="nf4", representation=representation)
    judge = recovered_by_error(adapters, dict.fromkeys(adapters, 1.0))
    # NF4 alone is .09 or more away: after .3, at .12, comes .05.
    report = compress_to_quality(adapters, tmp_path / "out", 0.975, judge, options)
    assert min(value for value in judge(tmp_path / "out").values() if value) >= 0.975
    assert report.kept == []
    with pytest.raises(BudgetError, match=r"'task\d' keeps at most 0\.9\d+ .*0\.999"):
        compress_to_quality(adapters, tmp_path / "x", 0.999, judge, options)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 3, "max_bytes": 100},
        {"max_bytes": 0},
        {"gate": 0.1, "max_error": 0.1},
        {"gate": -1, "ratio": 2},
        {"clusters": 0},
        {"clusters": "many"},
        {"clusters": 2, "representation": "private"},
        {"executor": "cloud"},
        {"jobs": -1},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        CompressOptions(**options)


def seen_loss(calibration: Calibration, adapters: dict[str, Adapter], path: Path) -> float:
    """Mean over tasks of the squared error as the model sees it, dense."""
    checkpoint = Checkpoint.open(path)
    shared = {(name, kind): basis for name, kind, basis in checkpoint.shared()}
    ratios = []
    for task, adapter in adapters.items():
        lost = norm = 0.0
        for name, stored in checkpoint.load_task(task).modules.items():
            a, b = decode(stored, shared.get((name, stored.representation)))
            h = calibration.input_moment(name).dense().double()
            g = calibration.output_moment(name).dense().double()
            wanted = dense(adapter, name)
            for matrix, add in ((b.double() @ a.double() - wanted, "lost"), (wanted, "norm")):
                value = float((g @ matrix @ h * matrix).sum())
                lost, norm = (lost + value, norm) if add == "lost" else (lost, norm + value)
        ratios.append(lost / norm)
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("representation", ["joint", "private", "auto"])
def test_calibration_keeps_more_of_what_the_model_sees(tmp_path: Path, representation: str) -> None:
    adapters = family(tmp_path / "in", 8, related=False)
    folder = calibration_of(tmp_path / "calibration")
    options: dict[str, Any] = {"ratio": 4.0, "representation": representation, "quantize": "int8"}
    plain = run(adapters, tmp_path / "plain", **options)
    white = run(adapters, tmp_path / "white", calibration=str(folder), **options)
    check(tmp_path / "white", adapters, white)
    calibration = Calibration.open(folder)
    seen = {name: seen_loss(calibration, adapters, tmp_path / name) for name in ("plain", "white")}
    # A task's own leading directions are much the same in either metric; shared ones are not.
    assert seen["white"] < (0.7 if representation == "joint" else 0.96) * seen["plain"]
    mean = sum(task.seen_error**2 for task in white.tasks) / len(white.tasks)
    assert mean == pytest.approx(seen["white"], rel=0.15)
    assert white.rms_error > plain.rms_error


def test_calibrated_factors_with_bits_of_one_kind_are_kept_between_the_passes(
    tmp_path: Path,
) -> None:
    """With rows of 3 or of 2 bits alone nothing is stacked, and parts are written as packed."""
    shapes = dict.fromkeys(SHAPES, (576, 512))
    generator = torch.Generator().manual_seed(0)
    adapters = {name: save(tmp_path / name, shapes, 8, generator) for name in ("first", "second")}
    folder = calibration_of(tmp_path / "calibration", shapes)
    options = {"ratio": 6.0, "representation": "private", "quantize": "nf4"}
    report = run(adapters, tmp_path / "out", calibration=str(folder), **options)
    check(tmp_path / "out", adapters, report)
    records = Checkpoint.open(tmp_path / "out").tasks.values()
    bits = {segment.bits for record in records for segment in record.segments}
    assert any(found and found.count(0) == 2 for found in bits), bits


def test_a_metric_is_made_once_a_module_and_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its square roots take longer than a task's factors; they are not taken again for every task."""
    adapters = family(tmp_path / "in", 6, related=False)
    folder, asked, metric = (
        calibration_of(tmp_path / "calibration"),
        Counter[str](),
        Surveyor.metric,
    )

    def counted(self: Surveyor, module: str) -> Metric:
        asked[module] += 1
        return metric(self, module)

    monkeypatch.setattr(Surveyor, "metric", counted)
    options: dict[str, Any] = {"representation": "private", "executor": "serial"}
    run(adapters, tmp_path / "out", ratio=4.0, calibration=str(folder), **options)
    assert asked.keys() == SHAPES.keys()
    assert set(asked.values()) == {2}


@pytest.mark.parametrize("options", [{"num_components": 8}, {"ratio": 0.3}, {"max_error": 0.001}])
@pytest.mark.parametrize("d_out", [1, 3, 20])
def test_bases_of_clusters_are_together_no_wider_than_their_module(
    tmp_path: Path, d_out: int, options: dict[str, Any]
) -> None:
    """Two families on a module with few outputs: their bases stand beside each other in its own."""
    shapes = {"model.layers.0.v_proj": (96, d_out)}
    adapters = {}
    for seed in range(2):
        made = family(tmp_path / str(seed), 4, related=True, seed=seed, shapes=shapes)
        adapters.update({f"{seed}.{name}": adapter for name, adapter in made.items()})
    kind = "auto" if "max_error" in options else "joint"
    report = run(adapters, tmp_path / "out", clusters=2, representation=kind, **options)
    check(tmp_path / "out", adapters, report)
    basis = Checkpoint.open(tmp_path / "out").modules[0].basis
    assert basis is None if kind == "auto" else basis is not None and basis.k_out <= d_out


def test_bases_of_families_with_strangers_have_room_beside_each_other(tmp_path: Path) -> None:
    """Of the tasks of a basis only some share it in the end; the basis is as wide as it was."""
    shapes = {"model.layers.0.v_proj": (48, 16)}
    adapters = {}
    for seed in range(3):
        made = family(tmp_path / str(seed), 5, related=True, seed=seed, shapes=shapes)
        adapters.update({f"{seed}.{name}": adapter for name, adapter in made.items()})
    made = family(tmp_path / "strangers", 3, related=False, seed=9, shapes=shapes)
    adapters.update({f"s.{name}": adapter for name, adapter in made.items()})
    for ratio in (0.5, 0.8, 1.0, 1.5, 2.0, 3.0):
        out = tmp_path / f"out{ratio}"
        check(out, adapters, run(adapters, out, clusters=4, ratio=ratio))
