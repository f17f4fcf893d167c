"""The fidelity benchmark on a tiny model: what it reads, measures, keeps, tabulates and draws."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file, save_file
from tiny_llama import write_tiny_llama

from vllm_vlora.errors import DataError, OptionError
from vllm_vlora.fitting.calibration import Calibration

REPOSITORY = ROOT
sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "examples" / "collections")]

import run  # noqa: E402
import train  # noqa: E402
from fidelity import program, seed_worker, seeds  # noqa: E402
from fidelity.inputs import CollectionFolder  # noqa: E402
from fidelity.methods import parse_method  # noqa: E402
from fidelity.points import PointStore, code_digest, summary  # noqa: E402
from fidelity.report import lines_of, table  # noqa: E402

TASKS = "tickets,staff,logs"


@pytest.fixture(scope="module", autouse=True)
def frozen_code() -> Iterator[None]:
    """Somebody who edits the library while the tests run is not to fail them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fidelity.points.code_digest", lambda _: "code")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def collection(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks in the basis and one held out, trained for a few steps."""
    folder = tmp_path_factory.mktemp("collections") / "tiny"
    arguments = ["unrelated", "-o", folder, "--model", model, "--tasks", TASKS, "--steps", 15]
    assert train.main([str(argument) for argument in arguments]) == 0
    return folder


# --- inputs --------------------------------------------------------------------------------------


def test_a_collection_is_read_with_both_kinds_of_task(collection: Path) -> None:
    found = CollectionFolder(collection)
    assert list(found.in_basis) == ["staff", "tickets"]
    assert list(found.held_out) == ["logs"]
    assert found.name == "tiny"
    (weights,) = found.held_out["logs"].glob("*.safetensors")
    numbers = sum(tensor.numel() for tensor in load_file(weights).values())
    assert found.original_nbytes(found.held_out) == 2 * numbers
    assert list(CollectionFolder(collection, tasks=1).in_basis) == ["staff"]
    assert CollectionFolder(collection, tasks=1).digest != found.digest


def test_a_folder_without_adapters_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no adapter; make the collection with"):
        _ = CollectionFolder(tmp_path).in_basis


def test_a_method_passes_typed_options_on() -> None:
    method = parse_method("joint:quantize=nf4,double_quantize=False,seed=3")
    options = method.compress_options(6.0, None)
    assert (options.representation, options.ratio) == ("joint", 6.0)
    assert (options.quantize, options.double_quantize, options.seed) == ("nf4", False, 3)
    assert not method.is_calibrated
    calibrated = parse_method("auto:calibration=@calibration")
    assert calibrated.is_calibrated
    assert calibrated.add_options(6.0, Path("there")).calibration == "there"
    growing = parse_method("joint:expand=True,quantize=int8")
    assert growing.expand
    assert growing.add_options(6.0, None).quantize == "int8"
    assert calibrated.compress_options(6.0, Path("there")).calibration == "there"
    assert parse_method("lorashare").is_seed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "unknown representation 'nonsense'"),
        ("joint:depth=3", "unknown option 'depth=3'"),
        ("joint:quantize", "unknown option 'quantize'"),
        ("joint:quantize=nf5", "unknown quantize 'nf5'"),
        ("vlora-dev:seed=1", "takes no options"),
    ],
)
def test_a_wrong_method_is_an_error_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_method(text)


# --- the whole -----------------------------------------------------------------------------------


def _run(model: Path, collection: Path, folder: Path, *more: str) -> dict[str, Any]:
    arguments = ["--model", str(model), "--collections", str(collection), "--examples", "6"]
    arguments += ["--cache", str(folder / "cache"), "-o", str(folder / "out.json"), *more]
    assert run.main(["fidelity", *arguments]) == 0
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(model: Path, collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    more = ("--representations", "private", "joint", "--ratios", "1", "6", "5000")
    return folder, _run(model, collection, folder, *more)


def _point(report: dict[str, Any], representation: str, ratio: float) -> dict[str, Any]:
    (found,) = (
        point
        for point in report["points"]
        if (point["representation"], point["ratio_asked"]) == (representation, ratio)
    )
    return found


def test_what_is_kept_whole_recovers_everything(report: Any) -> None:
    point = _point(report[1], "private", 1.0)
    assert set(point["tasks"]) >= {"staff", "tickets"}
    for row in point["tasks"].values():
        assert row["recovered"] == pytest.approx(1, abs=1e-4)
        assert row["error"] == pytest.approx(0, abs=1e-6)


def test_a_point_has_the_fraction_of_its_own_losses_and_its_own_ratio(report: Any) -> None:
    point = _point(report[1], "joint", 6.0)
    original = report[1]["collections"]["tiny"]["original_nbytes"]
    assert point["ratio"] == pytest.approx(original / point["nbytes"])
    assert point["ratio"] >= 6
    for row in point["tasks"].values():
        gain = row["loss_base"] - row["loss_adapter"]
        assert row["recovered"] == pytest.approx((row["loss_base"] - row["loss"]) / gain)
        assert 0 < row["error"] < 1
    rows = [row for row in point["tasks"].values() if not row["held_out"]]
    assert point["in_basis"]["mean"] == pytest.approx(sum(r["recovered"] for r in rows) / 2)
    assert point["in_basis"]["worst"] == min(row["recovered"] for row in rows)


def test_a_calibrated_method_sees_the_collections_text(
    model: Path, collection: Path, tmp_path: Path
) -> None:
    label = "joint:calibration=@calibration"
    found = _run(model, collection, tmp_path, "--representations", label, "joint", "--ratios", "6")
    (folder,) = (tmp_path / "cache" / "calibrations").iterdir()
    assert Calibration.open(folder).source.data == ["calibration.jsonl"]
    plain, calibrated = _point(found, "joint", 6.0), _point(found, label, 6.0)
    # Another norm is minimised, at a cost in this one.
    assert calibrated["in_basis"]["mean_error"] > plain["in_basis"]["mean_error"]


def test_new_tasks_are_added_within_the_ratio(report: Any) -> None:
    for name in ("private", "joint"):
        point = _point(report[1], name, 6.0)
        original = report[1]["collections"]["tiny"]["held_out_nbytes"]
        (added,) = point["details"]["added"].values()
        assert added["nbytes"] <= original / 6
        assert point["nbytes_with_added"] == point["nbytes"] + added["nbytes"]
        assert point["tasks"]["logs"]["held_out"]
        assert point["tasks"]["logs"]["error"] == pytest.approx(added["error"], rel=1e-3)
        assert point["held_out"]["mean"] == point["tasks"]["logs"]["recovered"]


def test_a_basis_may_grow_for_new_tasks(model: Path, collection: Path, tmp_path: Path) -> None:
    label = "joint:expand=True"
    found = _run(model, collection, tmp_path, "--representations", label, "--ratios", "3")
    point = _point(found, label, 3.0)
    (added,) = point["details"]["added"].values()
    assert point["nbytes_with_added"] >= point["nbytes"] + added["nbytes"]
    # Files are rewritten: the new rows and their headers are no more than what growth may take.
    assert (
        added["nbytes"] + added["grown_nbytes"]
        <= found["collections"]["tiny"]["held_out_nbytes"] / 3
    )


def test_a_ratio_out_of_reach_is_a_point_with_its_reason(report: Any) -> None:
    for name in ("private", "joint"):
        point = _point(report[1], name, 5000.0)
        assert "out of reach" in point["reason"]
        assert "in_basis" not in point


def test_the_report_says_what_it_was_measured_with(report: Any) -> None:
    folder, document = report
    setting = document["setting"]
    assert {"command", "python", "versions", "machine", "threads", "examples"} <= set(setting)
    assert setting["versions"]["torch"] == torch.__version__
    assert document["collections"]["tiny"]["training"]["collection"] == "unrelated"
    assert (folder / "out.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_resume_takes_what_was_measured_and_nothing_else(
    model: Path, collection: Path, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, document = report
    built: list[float] = []
    build = program.ours.build

    def counted(method: Any, ratio: float, *rest: Any) -> Any:
        built.append(ratio)
        return build(method, ratio, *rest)

    monkeypatch.setattr(program.ours, "build", counted)
    more = ("--representations", "private", "--ratios", "1", "6", "3")
    again = _run(model, collection, folder, *more, "--resume")
    assert built == [3.0]
    assert _point(again, "private", 6.0) == _point(document, "private", 6.0)


def test_a_point_depends_on_the_code_the_examples_and_the_options(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = CollectionFolder(collection)
    joint = parse_method("joint")
    keys = {
        PointStore(tmp_path, "m", 6).key(found, joint, 4.0),
        PointStore(tmp_path, "m", 7).key(found, joint, 4.0),
        PointStore(tmp_path, "n", 6).key(found, joint, 4.0),
        PointStore(tmp_path, "m", 6).key(found, joint, 4.5),
        PointStore(tmp_path, "m", 6).key(found, parse_method("joint:seed=1"), 4.0),
        PointStore(tmp_path, "m", 6).key(CollectionFolder(collection, tasks=1), joint, 4.0),
    }
    monkeypatch.setattr("fidelity.points.code_digest", lambda _: "another")
    store = PointStore(tmp_path, "m", 6)
    keys.add(store.key(found, joint, 4.0))
    assert len(keys) == 7
    # A seed library does not change with ours.
    monkeypatch.undo()
    seed = parse_method("lorashare")
    assert store.key(found, seed, 4.0) == PointStore(tmp_path, "m", 6).key(found, seed, 4.0)


def test_the_codes_digest_changes_with_any_of_its_files(tmp_path: Path) -> None:
    digests = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "x.py").write_text(text, encoding="utf-8")
        digests.append(code_digest(tmp_path))
    (tmp_path / "x.py").rename(tmp_path / "y.py")
    digests.append(code_digest(tmp_path))
    (tmp_path / "room").mkdir()
    (tmp_path / "y.py").rename(tmp_path / "room" / "y.py")
    assert len({*digests, code_digest(tmp_path)}) == 4


def test_tools_and_plugin_do_not_count(tmp_path: Path) -> None:
    before = code_digest(tmp_path)
    for name in ("tools", "plugin", "triton_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.py").write_text("a = 1", encoding="utf-8")
    assert code_digest(tmp_path) == before


def test_an_unknown_representation_ends_the_run_at_once(
    model: Path, collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--collections", str(collection)]
    arguments += ["--representations", "private", "cubist", "-o", str(tmp_path / "out.json")]
    assert run.main(["fidelity", *arguments]) == 2
    assert "cubist" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


# --- table and lines -----------------------------------------------------------------------------


def _row(recovered: float | None, held_out: bool = False) -> dict[str, Any]:
    return {"recovered": recovered, "held_out": held_out, "error": 0.5}


def test_a_summary_leaves_undefined_fractions_out() -> None:
    rows = {"a": _row(0.5), "b": _row(0.9), "c": _row(None), "d": _row(0.1, held_out=True)}
    assert summary(rows, False) == {
        "judged": 2,
        "mean": pytest.approx(0.7),
        "worst": 0.5,
        "worst_task": "a",
        "mean_error": 0.5,
    }
    assert summary({"c": _row(None)}, False) is None


def test_lines_go_by_the_ratio_reached() -> None:
    def point(ratio: float, mean: float) -> dict[str, Any]:
        figures = {"mean": mean, "worst": mean / 2, "mean_error": 0.1}
        return {
            "collection": "c",
            "representation": "joint",
            "ratio_asked": 1,
            "ratio": ratio,
            "in_basis": figures,
            "held_out": None,
        }

    lost = {"collection": "c", "representation": "joint", "ratio_asked": 99, "reason": "no"}
    points = [point(8.0, 0.8), point(4.0, 0.9), point(4.0, 0.9), lost]
    assert lines_of(points, "c", "in_basis") == {"joint": [(4.0, 0.9, 0.45), (8.0, 0.8, 0.4)]}
    assert lines_of(points, "c", "held_out") == {}
    rows = table(points).splitlines()[2:]
    assert rows[0] == "| c | joint | 1 | 8.00 | 80.0 | 40.0 |  |  | 0.100 |"
    assert "out of reach" in rows[3]


# --- seeds ---------------------------------------------------------------------------------------


def test_float32_is_counted_at_16_bits_and_all_else_as_it_is(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    (length,) = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])
    assert seed_worker.sizes(tmp_path) == (8 + length + 60 + 7, 8 + length + 30 + 7)


def test_the_most_components_that_fit_are_taken() -> None:
    assert seed_worker.most_components(100, 50, lambda k: 10.0 * k) == 10
    assert seed_worker.most_components(100, 4, lambda k: 10.0 * k) == 4
    assert seed_worker.most_components(9, 4, lambda k: 10.0 * k) == 0


def test_a_seeds_answer_becomes_a_point_or_a_reason(collection: Path, tmp_path: Path) -> None:
    found = CollectionFolder(collection)
    answer = {"k": 2, "before": [20, 10], "after": [24, 12], "seconds": 1.5}
    (tmp_path / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
    built = seeds.read_built(tmp_path, "vlora-dev", found)
    assert (built.nbytes, built.nbytes_on_disk, built.nbytes_with_added) == (10, 20, 12)
    assert set(built.folders) == {"staff", "tickets", "logs"}
    (tmp_path / "answer.json").write_text('{"k": 0}', encoding="utf-8")
    with pytest.raises(program.OutOfReachError, match="one component is larger"):
        seeds.read_built(tmp_path, "vlora-dev", found)


def test_a_library_that_fails_says_why(collection: Path, tmp_path: Path) -> None:
    # This environment has no lorashare.
    python = Path(sys.executable)
    with pytest.raises(RuntimeError, match="lorashare failed: ModuleNotFoundError"):
        seeds.run_worker(python, "lorashare", CollectionFolder(collection), {tmp_path / "x": 4.0})
