"""``analyze``, ``diff``, ``merge`` and ``benchmark``: what they say, write and refuse."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from synthetic import dense, family, run
from tiny_adapters import delta_w, save_tiny_adapters, tiny_adapters, tiny_weights
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.merging.merging import dare_merge, ties_merge
from vllm_vlora.subspace.weights import load_adapter, save_adapter
from vllm_vlora.tools import plots, task_plots
from vllm_vlora.tools.analyze_command import analyze
from vllm_vlora.tools.benchmark_command import benchmark
from vllm_vlora.tools.diff_command import diff
from vllm_vlora.tools.merge_command import merge

HOSTILE = "<script>alert(1)</script>&"

app = typer.Typer()
for command in (analyze, benchmark, diff, merge):
    app.command()(command)


def invoke(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.output
    return result


def data_of(*args: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(invoke(*args, "--json").stdout)
    return found


def error_line(*args: object) -> str:
    """The one line that a failing call says on stderr; it prints nothing on stdout."""
    result = invoke(*args, code=2)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


class Page(HTMLParser):
    """Counts elements and keeps text; unbalanced elements are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Four tiny adapters; the second is the first in other words, with twice the alpha."""
    adapters = tiny_adapters(4, spread=0.7)
    double = {name: b / 2 for name, b in adapters[0].lora_b.items()}
    adapters[1].lora_a.update(adapters[0].lora_a)
    adapters[1].lora_b.update(double)
    adapters[1].metadata["lora_alpha"] *= 2
    return save_tiny_adapters(tmp_path / "adapters", adapters)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt"
    run(family(tmp_path / "related", 3, related=True), path, num_components=8)
    return path


# --- analyze --------------------------------------------------------------------------------------


def test_analyze_finds_the_copy(folders: list[str], tmp_path: Path) -> None:
    found = data_of("analyze", tmp_path / "adapters")
    assert found["clusters"] == [["task_0", "task_1"], ["task_2"], ["task_3"]]
    assert found["redundant_count"] == 1
    assert found["threshold"] == 0.9
    rows = found["similarity_matrix"]
    assert list(rows) == ["task_0", "task_1", "task_2", "task_3"]
    assert rows["task_0"]["task_1"] == pytest.approx(1.0, abs=1e-6)
    first, third = load_adapter(folders[0]), load_adapter(folders[2])
    updates = [
        torch.cat([delta_w(w, name).flatten() for name in w.layer_names]) for w in (first, third)
    ]
    cosine = float(torch.nn.functional.cosine_similarity(*updates, dim=0))
    assert rows["task_0"]["task_2"] == pytest.approx(cosine, abs=1e-6)
    described = found["adapters"][0]
    assert described["norm"] == pytest.approx(float(updates[0].norm()), rel=1e-5)
    assert described["max_rank"] == 2
    assert 1 < described["effective_rank"] <= 2
    # Of four adapters none can be two standard deviations away.
    assert found["outliers"] is None


def test_analyze_names_the_outlier(tmp_path: Path) -> None:
    adapters = [tiny_weights(seed, spread=0.1) for seed in range(7)] + [tiny_weights(9, alpha=40)]
    save_tiny_adapters(tmp_path, adapters)
    found = data_of("analyze", tmp_path)
    assert [outlier["adapter"] for outlier in found["outliers"]] == ["task_7"]
    assert "Outlier: task_7" in invoke("analyze", tmp_path).stdout


def test_analyze_says_it_in_words(folders: list[str]) -> None:
    text = invoke("analyze", *folders, "--threshold", "0.5").stdout
    assert "Cluster 1: task_0, task_1" in text
    assert "could be redundant (cosine 0.5 or more)" in text
    assert "1.000 task_1" in text


def test_analyze_plots_a_page(folders: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = data_of("analyze", *folders, "--name", f"{HOSTILE}={folders[3]}", "--plot", page)
    assert found["plot"] == str(page)
    text = page.read_text(encoding="utf-8")
    read = Page(text)
    # Similarities, effective ranks, spectra: a mark a cell and a mark a bar say what they are.
    assert read.tags.count("svg") == 3
    assert read.tags.count("script") == 0
    assert HOSTILE in "".join(read.text)
    assert read.tags.count("title") == 1 + 4 * 4 + 4
    for adapter in found["adapters"]:
        assert f"{adapter['effective_rank']:.4f}" in read.text
    assert not re.search(r"(https?:)?//", text), "the page names another address"


def test_analyze_plots_a_png(folders: list[str], tmp_path: Path) -> None:
    invoke("analyze", *folders, "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", ["a.png", "a.html"])
def test_without_matplotlib_a_plot_is_refused_before_work(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = error_line("analyze", *folders, "--plot", tmp_path / name)
    assert said == 'Error: --plot needs matplotlib; pip install "vllm-vlora[plot]"'
    assert not (tmp_path / name).exists()


def test_analyze_refuses(folders: list[str], tmp_path: Path) -> None:
    assert "at least 2" in error_line("analyze", folders[0])
    assert "threshold" in invoke("analyze", *folders, "--threshold", "2", code=2).stderr
    assert "neither .html nor .png" in error_line("analyze", *folders, "--plot", "a.pdf")
    assert "no folder" in error_line("analyze", *folders, "--plot", tmp_path / "x" / "a.html")
    assert "same task id" in error_line("analyze", folders[0], _copied(folders[0], tmp_path))
    wide = tiny_weights(1, shapes={"layers.0.q_proj": (10, 8)})
    other = save_adapter(wide, tmp_path / "other" / "task_0")
    called = error_line("analyze", folders[0], "--name", f"wide={other}")
    assert "8 x 12 in adapter 'task_0' and 8 x 10 in adapter 'wide'" in called
    assert f"8 x 12 in adapter '{folders[0]}' and 8 x 10 in adapter '{other}'" in error_line(
        "diff", folders[0], other
    )


def _copied(folder: str, root: Path) -> Path:
    return save_adapter(load_adapter(folder), root / "copies" / Path(folder).name)


# --- diff -----------------------------------------------------------------------------------------


def test_diff_of_two_adapters(folders: list[str]) -> None:
    found = data_of("diff", folders[0], folders[2])
    first, third = load_adapter(folders[0]), load_adapter(folders[2])
    squares = 0.0
    for name in first.layer_names:
        a, b = delta_w(first, name), delta_w(third, name)
        layer = found["layers"][name]
        assert layer["l2_distance"] == pytest.approx(float((a - b).norm()), rel=1e-5)
        assert layer["cosine_sim"] == pytest.approx(
            float((a * b).sum() / a.norm() / b.norm()), abs=1e-6
        )
        squares += float((a - b).square().sum())
    assert found["l2_distance"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    same = data_of("diff", folders[0], folders[1])
    assert same["l2_distance"] < 1e-6
    assert same["cosine_sim"] == pytest.approx(1.0, abs=1e-6)


def test_diff_of_two_tasks(checkpoint: Path, tmp_path: Path) -> None:
    found = data_of("diff", checkpoint, "task0", "task1")
    assert (found["a"], found["b"]) == ("task0", "task1")
    originals = [open_adapter(tmp_path / "related" / task) for task in ("task0", "task1")]
    for name, layer in found["layers"].items():
        a, b = (dense(adapter, name) for adapter in originals)
        assert layer["l2_distance"] == pytest.approx(float((a - b).norm()), rel=0.2)
    text = invoke("diff", checkpoint, "task0", "task1").stdout
    assert "model.layers.0.q_proj" in text
    assert f"{found['cosine_sim']:.4f}" in text


def test_diff_plots(folders: list[str], checkpoint: Path, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    found = data_of("diff", folders[0], folders[2], "--plot", page)
    read = Page(page.read_text(encoding="utf-8"))
    assert len(found["layers"]) == 2
    for name, layer in found["layers"].items():
        assert read.text.count(name) == 2
        assert f"{layer['l2_distance']:.4f}" in read.text
        assert f"{name}: {layer['cosine_sim']:.4f}" in read.text
    invoke("diff", checkpoint, "task0", "task1", "--plot", tmp_path / "diff.png")
    assert (tmp_path / "diff.png").stat().st_size > 1000


def test_diff_refuses(folders: list[str], checkpoint: Path) -> None:
    assert "give a checkpoint and two of its tasks" in error_line("diff", folders[0])
    assert "no task 'absent'" in error_line("diff", checkpoint, "task0", "absent")


# --- merge ----------------------------------------------------------------------------------------


def test_merge_writes_the_weighted_sum(folders: list[str], tmp_path: Path) -> None:
    found = data_of("merge", *folders[:3], "-o", tmp_path / "out", "--weights", "0.7,0.5,-0.25")
    adapters = [load_adapter(folder) for folder in folders[:3]]
    merged = load_adapter(tmp_path / "out")
    for name in merged.layer_names:
        parts = [w * delta_w(a, name) for a, w in zip(adapters, (0.7, 0.5, -0.25))]
        assert torch.allclose(delta_w(merged, name), torch.stack(parts).sum(0), atol=1e-6)
    assert found == {
        "output": str(tmp_path / "out"),
        "method": "average",
        "adapters": ["task_0", "task_1", "task_2"],
        "weights": [0.7, 0.5, -0.25],
        "seed": None,
        "modules": 2,
        "max_rank": 6,
        "truncation_error": 0.0,
        "adds_nothing": [],
        "warnings": [],
    }


def test_merge_by_ties_and_dare_is_the_librarys(folders: list[str], tmp_path: Path) -> None:
    adapters = [load_adapter(folder) for folder in folders]
    calls = {
        "ties": (["--density", "0.3", "--rank", "3"], ties_merge(adapters, 0.3, rank=3)),
        "dare": (["--drop-rate", "0.4", "--seed", "3"], dare_merge(adapters, 0.4, seed=3)),
    }
    for method, (options, wanted) in calls.items():
        out = tmp_path / method
        found = data_of("merge", tmp_path / "adapters", "-o", out, "--method", method, *options)
        assert found["truncation_error"] == pytest.approx(wanted.truncation_error)
        assert found["seed"] == wanted.seed
        merged = load_adapter(out)
        for name in wanted.layer_names:
            assert torch.equal(merged.lora_a[name], wanted.lora_a[name])
    text = invoke("merge", *folders, "-o", tmp_path / "t", "--method", "ties").stdout
    assert "of its norm" in text


def test_merge_says_what_is_odd(folders: list[str], tmp_path: Path) -> None:
    config = Path(folders[2]) / "adapter_config.json"
    changed = {"base_model_name_or_path": "org/other", "init_lora_weights": "lora_ga"}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    call = ("merge", folders[0], folders[2], "-o", tmp_path / "out", "--force")
    found = data_of(*call)["warnings"]
    assert len(found) == 2
    assert "lora_ga" in found[0]
    assert "org/base, org/other; merged as org/base's" in found[1]
    assert "different base models" in invoke(*call).stderr
    nothing = ("--method", "ties", "--density", "1e-9")
    assert data_of(*call, *nothing)["adds_nothing"] == ["layers.0.q_proj", "layers.0.v_proj"]
    assert "Nothing is left of 2 modules: layers.0.q_proj" in invoke(*call, *nothing).stdout


def test_merge_of_tasks(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("merge", "--checkpoint", checkpoint, "task0", "task2", "-o", out, "--weights", "1,-1")
    before = {name: Checkpoint.open(checkpoint).digest(name) for name in ("task0", "task2")}
    found = data_of(
        "merge", "--checkpoint", checkpoint, "task0", "task2", "--as", "less", "--weights", "1,-1"
    )
    assert found["stored_as"] == "joint"
    assert found["error"] < 1e-5
    opened = Checkpoint.open(checkpoint)
    assert {name: opened.digest(name) for name in before} == before
    assert validate(checkpoint) == []
    again = data_of("diff", checkpoint, "less", "task0")
    merged = load_adapter(out)
    assert again["norm_a"] == pytest.approx(
        float(torch.cat([delta_w(merged, n).flatten() for n in merged.layer_names]).norm()),
        rel=1e-4,
    )
    text = invoke("merge", "--checkpoint", checkpoint, "task0", "less", "--as", "more").stdout
    assert "Wrote task more" in text
    assert "already" in error_line(
        "merge", "--checkpoint", checkpoint, "task0", "task1", "--as", "more"
    )
    full = data_of("merge", "--checkpoint", checkpoint, "task0", "task1", "--as", "more", "--force")
    tasks = ("--checkpoint", checkpoint, "task0", "task1", "--as", "small", "--format", "int8")
    small = data_of("merge", *tasks)
    assert small["bytes"] < 0.6 * full["bytes"]
    assert full["error"] < 1e-5 < small["error"] < 0.02
    segments = Checkpoint.open(checkpoint).record("small").segments
    assert {segment.format for segment in segments} == {"int8"}


def test_merge_refuses(folders: list[str], checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    two = folders[:2]
    assert "at least two" in error_line("merge", folders[0], "-o", out)
    assert "nowhere to write" in error_line("merge", *two)
    assert "3 weights for 2 adapters" in error_line("merge", *two, "-o", out, "--weights", "1,2,3")
    assert "1 weight for 2 adapters" in error_line("merge", *two, "-o", out, "--weights", "1")
    blend = ("--checkpoint", checkpoint, "task0", "--as", "blend", "--weights", "1,2")
    assert "2 weights for 1 task;" in error_line("merge", *blend)
    assert "1 adapter given" in error_line("analyze", folders[0])
    assert "1 name given" in error_line("diff", folders[0])
    assert "not numbers" in error_line("merge", *two, "-o", out, "--weights", "a,b")
    blend = ("--checkpoint", checkpoint, "task0", "task1", "--as", "blend", "--weights")
    assert "weight 1e+300 of task 'task0'" in error_line("merge", *blend, "1e300,1")
    for weight, format in (("1e12", "float16"), ("3e38", "float32")):
        huge = error_line("merge", *blend, f"{weight},1", "--format", format)
        assert "task 'blend', module" in huge
        assert f"too large for {format}" in huge
    assert "--density is for --method ties" in error_line(
        "merge", *two, "-o", out, "--density", "0.5"
    )
    assert "--seed is for --method dare" in error_line(
        "merge", *two, "-o", out, "--method", "ties", "--seed", "1"
    )
    assert "name it with --checkpoint" in error_line("merge", *two, "--as", "x")
    tasks = ["--checkpoint", checkpoint, "task0", "task1"]
    assert "give one of them" in error_line("merge", *tasks, "--as", "x", "-o", out)
    assert "weighted sum" in error_line("merge", *tasks, "--as", "x", "--method", "ties")
    assert "give --checkpoint and --as" in error_line("merge", *two, "-o", out, "--format", "int8")
    assert "unknown" in error_line("merge", *tasks, "--as", "x", "--format", "int3")
    for where in (["--as", "x"], ["-o", out]):
        assert "named twice" in error_line(
            "merge", "--checkpoint", checkpoint, "task0", "task0", *where
        )
    assert "given twice" in error_line("merge", folders[0], folders[0], "-o", out)
    invoke("merge", *two, "-o", out)
    # Found before anything is read: the second adapter does not exist.
    assert "--force" in error_line("merge", two[0], tmp_path / "absent", "-o", out)
    invoke("merge", *two, "-o", out, "--force")


# --- benchmark ------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["joint", "private", "flat"])
def test_benchmark_times_what_there_is(tmp_path: Path, made: str) -> None:
    path = tmp_path / "ckpt"
    adapters = family(tmp_path / "adapters", 4, related=True)
    if made == "flat":
        adapters = {name: adapters[name] for name in ("task0", "task2")}
    options = {"private": {"ratio": 2.0}, "flat": {"num_components": 1}}.get(
        made, {"num_components": 4}
    )
    run(adapters, path, representation=made, **options)
    found = data_of("benchmark", path, "--runs", "3")
    operations = [result["operation"] for result in found["results"]]
    shared = [] if made == "private" else ["project"]
    assert operations == [
        "load", "load task", "reconstruct", "switch", "switch, cold", *shared, "export",
    ]  # fmt: skip
    for result in found["results"]:
        assert 0 < result["p20"] <= result["p50"] <= result["p80"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"].startswith("cpu")
    assert found["unit"] == "ms"


def test_benchmark_of_one_task_and_its_words(checkpoint: Path) -> None:
    text = invoke("benchmark", checkpoint, "--task", "task2", "--runs", "3").stdout
    assert "task task2; 3 runs" in text
    assert "reconstruct" in text
    assert "no task 'absent'" in error_line("benchmark", checkpoint, "--task", "absent")


def test_benchmark_leaves_the_checkpoint_alone(checkpoint: Path) -> None:
    before = sorted((f.name, f.stat().st_mtime_ns) for f in checkpoint.rglob("*"))
    invoke("benchmark", checkpoint, "--runs", "3")
    assert sorted((f.name, f.stat().st_mtime_ns) for f in checkpoint.rglob("*")) == before


# --- figures --------------------------------------------------------------------------------------


def test_a_page_of_figures_escapes() -> None:
    bars = plots.Bars(HOSTILE, HOSTILE, ["a", HOSTILE], [2.0, -1.0])
    text = task_plots.render_plots("Page", [bars])
    assert "".join(Page(text).text).count(HOSTILE) == 4
    assert HOSTILE not in text
