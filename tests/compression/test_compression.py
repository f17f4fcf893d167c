"""compress end to end: real files, read back and measured again by a dense float64 reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from synthetic import SHAPES, check, family, run, save

from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.checkpoint.losses import SHARED_LOSS
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.compression.quality import compress_judged
from vllm_vlora.errors import AdapterError, BudgetError, OptionError, OutputError, TaskIdError
from vllm_vlora.planning import joint_curves


@pytest.mark.parametrize("related", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 4.2},
        {"ratio": 2.0, "quantize": "none"},
        {"ratio": 3.0, "quantize": "nf4", "double_quantize": False},
        {"ratio": 1.8, "quantize": "int8"},
        {"ratio": 2.5, "representation": "joint"},
        {"ratio": 2.5, "representation": "private"},
        {"ratio": 1.5, "quantize": "none", "dtype": "float16"},
    ],
)
def test_ratio_is_met_by_the_files(tmp_path: Path, related: bool, options: dict[str, Any]) -> None:
    adapters = family(tmp_path / "in", 10, related=related)
    report = run(adapters, tmp_path / "out", **options)
    check(tmp_path / "out", adapters, report)
    wanted = options["ratio"]
    assert report.ratio >= wanted
    # What is allowed is used, unless another plan needs less for a smaller error.
    assert report.ratio < wanted * 1.6
    assert report.worst_error < 1.0


@pytest.mark.parametrize("related", [True, False])
@pytest.mark.parametrize("representation", ["auto", "joint", "private"])
@pytest.mark.parametrize("limit", [0.3, 0.05, 0.002])
def test_max_error_is_met(tmp_path: Path, related: bool, representation: str, limit: float) -> None:
    adapters = family(tmp_path / "in", 6, related=related, dtype=torch.float32)
    report = run(adapters, tmp_path / "out", max_error=limit, representation=representation)
    check(tmp_path / "out", adapters, report)
    assert report.worst_error <= limit


@pytest.mark.parametrize("limit", [0.25, 0.3, 0.35])
def test_max_error_holds_where_planning_was_too_hopeful(
    tmp_path: Path, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = family(tmp_path / "in", 8, related=False)
    honest = run(adapters, tmp_path / "out", max_error=limit, representation="joint")
    for format in ("bfloat16", "int8", "nf4-dq"):
        monkeypatch.setitem(joint_curves._ROUNDING, format, -0.01)
    report = run(adapters, tmp_path / "out", max_error=limit, representation="joint")
    check(tmp_path / "out", adapters, report)
    assert report.worst_error <= limit
    assert report.nbytes <= 1.3 * honest.nbytes


def test_max_error_of_zero_means_the_very_numbers(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 3, related=True, dtype=torch.float32)
    report = run(adapters, tmp_path / "out", max_error=0)
    check(tmp_path / "out", adapters, report)
    assert report.worst_error == 0.0
    with pytest.raises(BudgetError, match="auto or private"):
        run(adapters, tmp_path / "out", max_error=0, representation="joint")


def test_fewer_bytes_for_a_larger_error(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 4, related=True)
    sizes = [
        run(adapters, tmp_path / "out", max_error=limit).nbytes
        for limit in (0.0, 0.01, 0.05, 0.2, 0.6)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("related", [True, False])
@pytest.mark.parametrize("budget", [{"ratio": 3.0}, {"max_error": 0.15}])
def test_auto_keeps_the_better(
    tmp_path: Path, related: bool, seed: int, budget: dict[str, Any]
) -> None:
    adapters = family(tmp_path / "in", 8, related=related, seed=seed)
    reports = {
        name: run(adapters, tmp_path / name, representation=name, **budget)
        for name in ("auto", "joint", "private")
    }
    auto = reports.pop("auto")
    assert auto.representation in (("joint", "mixed") if related else ("private",))
    if "ratio" in budget:
        # Nothing is private in joint, so all of its loss counts as a shared basis' does.
        joint = reports["joint"].rms_error * SHARED_LOSS**0.5
        likely = auto.rms_error if auto.representation == "private" else 0
        assert likely <= min(joint, reports["private"].rms_error)
        assert auto.rms_error <= max(report.rms_error for report in reports.values())
    else:
        assert auto.nbytes <= min(report.nbytes for report in reports.values())
    considered = {candidate.representation for candidate in auto.candidates}
    assert {"joint", "private"} <= considered <= {"joint", "private", "mixed"}
    assert (auto.representation, auto.format, auto.nbytes) in [c[:3] for c in auto.candidates]


@pytest.mark.parametrize(("representation", "most"), [("joint", 18), ("factored", 18), ("flat", 3)])
def test_where_more_components_are_asked_for_than_there_are_all_are_kept(
    tmp_path: Path, representation: str, most: int
) -> None:
    related = representation == "flat"
    adapters = family(tmp_path / "in", 4, related=related, dtype=torch.float32)
    options: dict[str, Any] = {"representation": representation}
    report = run(adapters, tmp_path / "out", **options, num_components=40)
    assert [f"is 40, but there are only {most} " in line for line in report.warnings] == [True]
    check(tmp_path / "out", adapters, report)
    assert report.worst_error < 1e-5
    same = run(adapters, tmp_path / "same", **options, num_components=most)
    assert (same.nbytes, same.warnings) == (report.nbytes, [])


def test_joint_is_exact_with_enough_components(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 4, related=False, dtype=torch.float32)
    total_rank = 4 + 5 + 4 + 5
    report = run(adapters, tmp_path / "out", num_components=total_rank)
    checkpoint = check(tmp_path / "out", adapters, report)
    assert report.worst_error < 1e-6
    assert {
        segment.representation for r in checkpoint.tasks.values() for segment in r.segments
    } == {"joint"}
    for module in checkpoint.modules:
        assert module.basis is not None
        assert (module.basis.k_out, module.basis.k_in) == (total_rank, total_rank)


def test_num_components_is_uniform_and_clamped(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 12, related=False)
    report = run(adapters, tmp_path / "out", num_components=45, quantize="int8")
    checkpoint = check(tmp_path / "out", adapters, report)
    widths = {m.name: (m.basis.k_out, m.basis.k_in) for m in checkpoint.modules if m.basis}
    assert widths == {"model.layers.0.q_proj": (45, 45), "model.layers.0.v_proj": (40, 45)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_compression_the_originals_come_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    adapters = family(tmp_path / "in", 3, related=False, dtype=dtype)
    report = run(adapters, tmp_path / "out", ratio=1.0, quantize="none")
    checkpoint = check(tmp_path / "out", adapters, report)
    assert report.worst_error == 0.0
    for task_id, adapter in adapters.items():
        stored = checkpoint.load_task(task_id)
        for name, module in stored.modules.items():
            a, b = adapter.factors(name)
            assert module.scale == adapter.modules[name].scale
            assert torch.equal(module.matrices["A"].parts["values"], a)
            assert torch.equal(module.matrices["B"].parts["values"], b.T)


def mixed_collection(folder: Path) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(5)
    embed = {"model.embed_tokens": (120, 32), **SHAPES}
    kinds = {"model.embed_tokens": "embedding"}
    head = {"base_model.model.score.weight": torch.randn(3, 64, generator=generator)}
    return {
        "a/b": save(folder / "1", SHAPES, 2, generator, dtype=torch.float32, alpha=3),
        "a_b": save(folder / "2", embed, 7, generator, kinds=kinds, base="other/base"),
        "ü": save(folder / "3", SHAPES, 5, generator, dtype=torch.float16, extra=head),
        "only": save(folder / "4", {"model.layers.1.q_proj": (50, 60)}, 3, generator),
        "untrained": save(folder / "5", embed, 4, generator, kinds=kinds, zero=True),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.5},
        {"ratio": 1.5, "representation": "joint"},
        {"max_error": 0.2},
        {"num_components": 6},
        {"ratio": 0.5, "quantize": "none"},
    ],
)
def test_mixed_collection(tmp_path: Path, options: dict[str, Any]) -> None:
    adapters = mixed_collection(tmp_path / "in")
    report = run(adapters, tmp_path / "out", **options)
    checkpoint = check(tmp_path / "out", adapters, report)
    assert report.ratio >= options.get("ratio", 0)
    assert report.tasks[-1].error == 0.0
    assert len(report.warnings) == 1
    assert "other/base" in report.warnings[0]
    assert checkpoint.base_model == "org/base"
    assert (tmp_path / "out" / "README.md").read_text()
    head = checkpoint.load_task("ü").extra["base_model.model.score.weight"]
    assert torch.equal(head, adapters["ü"].extra_tensors()["base_model.model.score.weight"])
    for module in checkpoint.modules:
        assert module.basis is None or module.kind == "linear"
    assert [s.representation for s in checkpoint.record("only").segments] == [
        "joint" if "num_components" in options else "private"
    ]


def test_one_adapter(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 1, related=False)
    assert run(adapters, tmp_path / "out", ratio=2).representation == "private"
    report = run(adapters, tmp_path / "out", ratio=1.2, representation="joint")
    assert report.representation == "joint"
    check(tmp_path / "out", adapters, report)


@pytest.mark.parametrize(
    ("options", "reachable"),
    [
        ({"ratio": 500}, "reaches"),
        ({"ratio": 60, "quantize": "none"}, "quantize auto"),
        ({"max_error": 0.001, "quantize": "nf4"}, "least reachable"),
        ({"max_error": 1e-4, "representation": "joint"}, "auto or private"),
    ],
)
def test_budget_out_of_reach_says_what_is_reachable(
    tmp_path: Path, options: dict[str, Any], reachable: str
) -> None:
    adapters = family(tmp_path / "in", 3, related=False)
    with pytest.raises(BudgetError, match=reachable) as raised:
        run(adapters, tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 2, "max_error": 0.1},
        {"ratio": 2, "num_components": 4},
        {"gate": 0.3},
        {"ratio": 0},
        {"ratio": math.nan},
        {"max_error": -0.1},
        {"num_components": 0},
        {"num_components": 3, "representation": "private"},
        {"representation": "curved"},
        {"quantize": "int4"},
        {"dtype": "float64"},
        {"dtype": "float32", "quantize": "nf4", "representation": "private"},
        {"codes": "lattice"},
        {"codes": "trellis"},
        {"codes": "trellis", "max_error": 0.1},
        {"codes": "trellis", "ratio": 4, "gate": 0.3},
        {"codes": "trellis", "ratio": 4, "quantize": "int8"},
        {"codes": "trellis", "ratio": 4, "representation": "joint"},
        {"codes": "trellis", "ratio": 4, "num_components": 4},
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        CompressOptions(**options)


def test_bad_collections_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    one = save(tmp_path / "one", SHAPES, 3, generator)
    name = "model.layers.0.q_proj"
    other = save(tmp_path / "other", {name: (96, 81)}, 3, generator)
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="no adapters"):
        compress({}, out)
    with pytest.raises(AdapterError, match=r"'x'.*'y'"):
        compress({"x": one, "y": other}, out)
    with pytest.raises(TaskIdError):
        compress({"": one}, out)
    embedding = save(
        tmp_path / "e", {"embed": (60, 20)}, 3, generator, kinds={"embed": "embedding"}
    )
    with pytest.raises(OptionError, match="linear"):
        compress({"x": embedding}, out, CompressOptions(representation="joint"))
    assert not out.exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 2, related=False)
    file = tmp_path / "in" / "task1" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    next(iter(tensors.values()))[0, 0] = math.nan
    safetensors.torch.save_file(tensors, file)
    for representation in ("joint", "private"):
        with pytest.raises(AdapterError, match="NaN"):
            run(adapters, tmp_path / "out", representation=representation)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_values_too_large_for_the_wanted_dtype_are_named(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = save(tmp_path / "in", SHAPES, 3, generator, dtype=torch.float32, scale_up=1e7)
    with pytest.raises(AdapterError, match=r"'big'.*q_proj.*float16"):
        run({"big": adapter}, tmp_path / "out", ratio=1, quantize="none", dtype="float16")


class Broken(Exception):
    """Stands for any failure on the way."""


@pytest.mark.parametrize("stage", ["measure", "encode", "write"])
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_a_failure_on_the_way_leaves_the_old_checkpoint(
    tmp_path: Path, stage: str, error: type[BaseException]
) -> None:
    adapters = family(tmp_path / "in", 4, related=True)
    out = tmp_path / "out"
    first = run(adapters, out, ratio=3.5)

    def fail(at: str, done: int, total: int) -> None:
        if at == stage and done >= min(2, total):
            raise error

    options = CompressOptions(ratio=2, representation="joint")
    with pytest.raises(error):
        compress(adapters, out, options, force=True, progress=fail)
    check(out, adapters, first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_existing_folders_are_not_replaced_without_being_asked(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 2, related=False)
    out = tmp_path / "out"
    compress(adapters, out)
    with pytest.raises(OutputError):
        compress(adapters, out)
    compress(adapters, out, force=True)
    with pytest.raises(OutputError):
        compress(adapters, tmp_path / "in", force=True)
    assert (tmp_path / "in" / "task0").is_dir()


def test_progress_reaches_the_end_of_every_stage(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 4, related=True)
    calls: list[tuple[str, int, int]] = []
    compress(adapters, tmp_path / "out", progress=lambda *call: calls.append(call))
    last = {stage: (done, total) for stage, done, total in calls}
    assert list(last) == ["measure", "encode", "write"]
    assert all(done == total for done, total in last.values())
    assert all(0 <= done <= total for _, done, total in calls)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 5, related=True)
    for name in ("x", "y"):
        run(adapters, tmp_path / name, ratio=3.5)
    assert _digests(tmp_path / "x") == _digests(tmp_path / "y")


def _digests(path: Path) -> Sequence[str]:
    checkpoint = Checkpoint.open(path)
    return [checkpoint.digest(task_id) for task_id in checkpoint.tasks]


def test_flat_does_not_take_a_format_that_cannot_hold_it(tmp_path: Path) -> None:
    # alpha / r is 64, and stands in flat factors.
    generator = torch.Generator().manual_seed(4)
    adapters = {
        f"t{i}": save(
            tmp_path / "in" / str(i),
            SHAPES,
            4,
            generator,
            dtype=torch.float16,
            alpha=256,
            scale_up=1e-4,
        )
        for i in range(4)
    }
    for adapter in adapters.values():
        path = adapter.path / "adapter_model.safetensors"
        tensors = {k: t * (2e5 if "lora_B" in k else 1) for k, t in load_file(path).items()}
        save_file(tensors, path)
    with pytest.raises(OptionError, match="too large for flat in float16; use dtype float32"):
        run(adapters, tmp_path / "out", representation="flat", num_components=3)
    wide = run(adapters, tmp_path / "out", representation="flat", num_components=3, dtype="float32")
    assert wide.worst_error < 1e-3
    report = run(adapters, tmp_path / "auto", ratio=1.5)
    check(tmp_path / "auto", adapters, report)
    assert report.worst_error < 0.3


@pytest.mark.parametrize(
    ("ahead", "chosen"),
    [([0.1, 0.1, 0.1, 0.1], "joint"), ([0.5, -0.1, -0.1, -0.1], "private"), ([0.1], "joint")],
)
def test_the_model_is_believed_where_tasks_agree(
    tmp_path: Path, ahead: list[float], chosen: str
) -> None:
    """Joint is ahead in the mean, each time; the error of the weights prefers private."""
    adapters = family(tmp_path / "in", 4, related=False)

    class Jury:
        how = "a jury"

        def declines(self, forms: int, seconds: float) -> None:
            return None

        def __call__(self, folders: Sequence[Path]) -> list[dict[str, float | None]]:
            found: list[dict[str, float | None]] = []
            for folder in folders:
                kinds = {
                    s.representation
                    for r in Checkpoint.open(folder).tasks.values()
                    for s in r.segments
                }
                gaps = ahead if kinds == {"joint"} else [0.0] * len(ahead)
                found.append({f"task{place}": 0.5 + gap for place, gap in enumerate(gaps)})
            return found

    report = compress_judged(adapters, tmp_path / "out", Jury(), CompressOptions(ratio=4.0))
    assert report.representation == chosen
    assert report.chosen_by == "a jury"


def test_a_plan_under_two_names_is_encoded_once(tmp_path: Path) -> None:
    """Here joint in NF4 and a mixture in which everybody shares are the same; int8 is another."""
    stages: list[tuple[str, int, int]] = []
    report = compress(
        family(tmp_path / "adapters", 16, related=True),
        tmp_path / "out",
        CompressOptions(ratio=16.0, executor="serial"),
        progress=lambda *stage: stages.append(stage),
    )
    found = {(c.representation, c.format): c for c in report.candidates}
    joint, mixed = found["joint", "nf4"], found["mixed", "mixed"]
    assert (joint.nbytes, joint.mean_error) == (mixed.nbytes, mixed.mean_error)
    assert found["joint", "int8"].mean_error < joint.mean_error
    assert sum(stage == "encode" and done == total for stage, done, total in stages) == 2
