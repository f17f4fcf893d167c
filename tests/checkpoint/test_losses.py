"""Losses are named, and a task that would be worse than none is not stored unless that is asked for."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from synthetic import SHAPES, save
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.losses import NOTED_LOSS, Losses, describe_losses, predicted_loss
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress, predict
from vllm_vlora.compression.quality import OneByOne, compress_judged
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.editing.rebuilding import rebuild
from vllm_vlora.errors import AdapterError, BudgetError
from vllm_vlora.merging.blending import blend_tasks
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.private import encode_private
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.weights import load_adapter
from vllm_vlora.tools import summary
from vllm_vlora.tools.cli import app

Q = "model.layers.0.q_proj"
V = "model.layers.0.v_proj"
FLAT: dict[str, Any] = {"representation": "flat", "num_components": 2}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six adapters without anything in common, every other with 30 times the norm."""
    folder, generator = tmp_path_factory.mktemp("uneven"), torch.Generator().manual_seed(0)
    for i in range(6):
        save(folder / f"t{i}", SHAPES, 4, generator, scale_up=30.0 if i % 2 else 1.0)
    return folder


def opened(folder: Path) -> dict[str, Adapter]:
    return {path.name: open_adapter(path) for path in sorted(folder.iterdir())}


def delta(checkpoint: Path, task: str, module: str) -> torch.Tensor:
    """delta_W as it is served, in float64."""
    found = Checkpoint.open(checkpoint)
    stored = found.load_task(task).modules[module]
    basis = found.shared_by([task]).get((module, stored.representation))
    a, b = decode(stored, basis)
    return b.double() @ a.double()


def true_error(checkpoint: Path, task: str, adapter: Adapter) -> float:
    """The relative error by dense float64 products."""
    lost = norm = 0.0
    for module, (a, b) in adapter.iter_factors():
        wanted = adapter.modules[module].scale * b.double() @ a.double()
        lost += float((delta(checkpoint, task, module) - wanted).square().sum())
        norm += float(wanted.square().sum())
    return (lost / norm) ** 0.5


# --- refused, unless asked for --------------------------------------------------------------------


def test_a_task_that_is_worse_than_none_is_refused(uneven: Path, tmp_path: Path) -> None:
    adapters = opened(uneven)
    with pytest.raises(
        BudgetError, match=r"task 't0' .* error of 7\.99, .* --allow-large-error"
    ) as e:
        compress(adapters, tmp_path / "ckpt", CompressOptions(**FLAT))
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []
    asked = CompressOptions(**FLAT, allow_large_error=True)
    report = compress(adapters, tmp_path / "ckpt", asked)
    assert report.tasks[0].error == pytest.approx(
        true_error(tmp_path / "ckpt", "t0", adapters["t0"]), rel=1e-3
    )
    assert next(iter(report.losses.above)) == "t0"
    assert validate(tmp_path / "ckpt") == []


def test_a_plan_that_ruins_a_task_gives_way_to_another(uneven: Path, tmp_path: Path) -> None:
    points = predict(opened(uneven), CompressOptions(representation="flat"), ratios=[1.5, 2.0])
    assert all(point.candidate.worst_error <= 1 for point in points)
    # Judged by the model, flat would win here.
    judged = compress_judged(
        opened(uneven),
        tmp_path / "ckpt",
        OneByOne(lambda path: dict.fromkeys(Checkpoint.open(path).tasks, 1.0)),
        CompressOptions(ratio=1.5),
    )
    assert judged.worst_error <= 1


def test_the_rule_holds_for_whatever_writes_a_checkpoint(tmp_path: Path) -> None:
    stored = encode_private(torch.ones(1, 4), torch.ones(3, 1), 1.0, "float32")
    writer = CheckpointWriter(tmp_path, None)
    writer.add_module("m", 4, 3)
    rest: dict[str, Any] = {"original_nbytes": 1, "adapter_config": {}}
    for error in (1.01, float("inf"), float("nan")):
        with pytest.raises(BudgetError, match="task 'x'"):
            writer.add_task("x", {"m": stored}, error=error, **rest)
    with pytest.raises(BudgetError, match="error of 3"):
        writer.add_task("x", {"m": stored}, error=0.1, seen_error=3.0, **rest)
    # What a calibrated model sees is what counts, and an error of 1 is no worse than none.
    writer.add_task("seen", {"m": stored}, error=1.5, seen_error=0.3, **rest)
    writer.add_task("lost", {"m": stored}, error=1.0, **rest)
    writer.allow_large_error = True
    writer.add_task("asked", {"m": stored}, error=1.5, **rest)
    with pytest.raises(BudgetError, match="not finite"):
        writer.add_task("nan", {"m": stored}, error=float("nan"), **rest)


def test_a_subspace_is_saved_with_a_task_that_is_worse_than_none_and_says_so(
    uneven: Path, tmp_path: Path
) -> None:
    loaded = [load_adapter(path) for path in sorted(uneven.iterdir())]
    subspace = SharedSubspace.from_adapters(loaded, num_components=2, representation="flat")
    with pytest.raises(BudgetError, match="task 'task_0'"):
        subspace.save(tmp_path / "ckpt", allow_large_error=False)
    assert not (tmp_path / "ckpt").exists()
    # As vlora does, but not in silence.
    with pytest.warns(UserWarning, match=r"worse than left out: 'task_0', 'task_2', 'task_4'; "):
        subspace.save(tmp_path / "said")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subspace.save(tmp_path / "ckpt", allow_large_error=True)
    error = true_error(tmp_path / "ckpt", "task_0", open_adapter(uneven / "t0"))
    assert Checkpoint.open(tmp_path / "ckpt").record("task_0").error == pytest.approx(
        error, rel=1e-3
    )


def test_options_reach_adding_rebuilding_and_blending(uneven: Path, tmp_path: Path) -> None:
    assert AddOptions(allow_large_error=True).allow_large_error
    output, adapters = tmp_path / "ckpt", opened(uneven)
    compress(adapters, output, CompressOptions(**FLAT, allow_large_error=True))
    # Files that stay are as they were, whatever they had lost; the new task is judged.
    new = {"new": adapters["t1"]}
    report = add_adapters(output, new)
    assert report.losses.above.get("new", 0.0) <= 1
    rebuilt = rebuild(output, {**adapters, **new}, AddOptions(ratio=1.5), output=tmp_path / "new")
    assert rebuilt.worst_error <= 1
    blended = blend_tasks(output, {"t1": 0.5, "t3": 0.5}, "both", rank=1)
    noted = predicted_loss(blended.error, blended.representation) > NOTED_LOSS
    assert set(blended.losses.above) == ({"both"} if noted else set())


# --- named ----------------------------------------------------------------------------------------


def test_large_losses_are_named_in_colour_and_in_json(uneven: Path, tmp_path: Path) -> None:
    output = tmp_path / "ckpt"
    args = ["compress", str(uneven), "-o", str(output), "--representation", "flat", "-k", "2"]
    refused = CliRunner().invoke(app, args)
    assert (refused.exit_code, refused.stdout, output.exists()) == (1, "", False)
    assert "worse than leaving it out" in refused.stderr
    made = CliRunner().invoke(app, [*args, "--allow-large-error", "--json"])
    assert made.exit_code == 0, made.stderr
    losses = json.loads(made.stdout)["losses"]
    assert [losses["above"][task] for task in ("t0", "t2", "t4")] == [1.0] * 3
    assert losses["noted_above"] == NOTED_LOSS
    assert losses["lost_modules"]["t0"] == [Q, V]
    info = CliRunner().invoke(app, ["info", str(output), "--json"])
    assert json.loads(info.stdout)["losses"] == losses
    shown = CliRunner().invoke(app, ["info", str(output)]).stdout
    assert "Predicted to lose more than 5% of what the adapter gains: t0 100%" in shown
    card = (output / "README.md").read_text()
    assert "Predicted to lose more than 5%" in card
    assert "| **7.9874** |" in card
    console = Console(record=True, force_terminal=True, width=200, highlight=False)
    summary.print_tasks(console, summary.summarize(Checkpoint.open(output), str(output)))
    drawn = console.export_text(styles=True)
    assert "\x1b[31m7.9874" in drawn
    assert "\x1b[33m0.6711" in drawn


def test_a_module_that_is_lost_whole_is_named_though_the_mean_looks_fine(tmp_path: Path) -> None:
    stored = encode_private(torch.ones(1, 4), torch.ones(3, 1), 1.0, "float32")
    writer = CheckpointWriter(tmp_path, None)
    for name in ("m", "n"):
        writer.add_module(name, 4, 3)
    modules = {"m": stored, "n": stored.__class__(**{**vars(stored), "error": 1.0})}
    writer.add_task("t", modules, original_nbytes=1, error=0.02, adapter_config={})
    losses = Losses.of(writer.tasks, writer.modules)
    assert losses == Losses({}, {"t": ["n"]}, [])
    assert describe_losses(losses.to_dict()) == [
        "Nothing of the update is left in 1 module, an error of 1 or more: t (n)"
    ]


def test_a_loss_is_predicted_from_the_error_and_from_what_is_shared() -> None:
    assert predicted_loss(0.2, "private") == pytest.approx(0.04)
    for shared in ("joint", "flat", "mixed"):
        assert predicted_loss(0.2, shared) == pytest.approx(0.1)
    assert predicted_loss(7.0, "flat") == 1.0
    predicted = {"kept": 0.04, "lost": 0.1, "unknown": None, "half": 0.5}
    assert Losses.measured(predicted, {}, []).above == {"half": 0.5, "lost": 0.1}


def test_many_named_tasks_stay_a_line() -> None:
    losses = Losses.measured({f"t{i}": 0.06 for i in range(1000)}, {}, [])
    assert len(losses.above) == 1000
    (line,) = describe_losses(losses.to_dict())
    assert "and 990 more" in line


# --- updates of zero ------------------------------------------------------------------------------


@pytest.fixture
def untrained(tmp_path: Path) -> dict[str, Adapter]:
    folder, generator = tmp_path / "in", torch.Generator().manual_seed(1)
    return {
        f"t{i}": save(folder / f"t{i}", SHAPES, 4, generator, zero=i == 3, dtype=torch.float32)
        for i in range(5)
    }


@pytest.mark.parametrize(
    "options",
    [
        {"max_error": 0},
        {"representation": "private", "ratio": 2},
        {"representation": "joint", "ratio": 2},
        {"representation": "flat", "num_components": 4},
        {"representation": "flat", "num_components": 2},
    ],
)
def test_an_update_of_zero_is_said_and_stays_zero(
    untrained: dict[str, Adapter], tmp_path: Path, options: dict[str, Any]
) -> None:
    output = tmp_path / "ckpt"
    report = compress(untrained, output, CompressOptions(**options, allow_large_error=True))
    assert report.losses.no_update == ["t3"]
    assert report.tasks[3].error == 0
    for module in SHAPES:
        assert not delta(output, "t3", module).any()
        assert delta(output, "t2", module).any()
    assert "| no update |" in (output / "README.md").read_text()
    shown = CliRunner().invoke(app, ["info", str(output)]).stdout
    assert "No update, the LoRA weights are zero: t3" in shown
    exported = open_adapter(export_task(Checkpoint.open(output), "t3", tmp_path / "out"))
    for module, (a, b) in exported.iter_factors():
        assert not (b.double() @ a.double()).any(), module


def test_an_exact_task_with_an_untrained_module_is_exported_as_it_was(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    factors = {
        name: (
            torch.randn(2, d_in, generator=generator),
            torch.randn(d_out, 2, generator=generator),
        )
        for name, (d_in, d_out) in SHAPES.items()
    }
    factors[V] = factors[V][0], factors[V][1] * 0
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}
    adapter = open_adapter(write_adapter(tmp_path / "in", config, factors))
    (tmp_path / "ckpt").mkdir()
    writer = CheckpointWriter(tmp_path / "ckpt", None)
    stored = {}
    for name, (a, b) in adapter.iter_factors():
        writer.add_module(name, a.shape[1], b.shape[0])
        stored[name] = encode_private(a, b, adapter.modules[name].scale, "float32")
    record = writer.add_task(
        "t", stored, original_nbytes=1, error=0.0, adapter_config=adapter.config
    )
    writer.finish("card")
    assert [segment.scale for segment in record.segments] == [3.5, 0.0]
    assert Losses.of(writer.tasks, writer.modules) == Losses()
    out = export_task(Checkpoint.open(tmp_path / "ckpt"), "t", tmp_path / "out")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "in" / file).read_bytes()


# --- heads that sharded training left empty -------------------------------------------------------


def test_an_empty_head_is_refused_with_what_to_do(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    head = {"base_model.model.score.weight": torch.randn(3, 8, generator=generator)}
    folder = save(tmp_path / "a", SHAPES, 2, generator, extra=head).path
    tensors = {key: t for adapter in [open_adapter(folder)] for key, t in _tensors(adapter).items()}
    tensors["base_model.model.score.weight"] = torch.empty(0)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match=r"score\.weight' is empty, shape \[0\]; .*ZeRO-3.*gather"
    ):
        open_adapter(folder)


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    found = {}
    for name, (a, b) in adapter.iter_factors():
        found[f"base_model.model.{name}.lora_A.weight"] = a
        found[f"base_model.model.{name}.lora_B.weight"] = b
    return found


def test_a_checkpoint_with_an_empty_head_is_not_sound(tmp_path: Path) -> None:
    stored = encode_private(torch.ones(1, 4), torch.ones(3, 1), 1.0, "float32")
    writer = CheckpointWriter(tmp_path, None)
    writer.add_module("m", 4, 3)
    extra = {"base_model.model.score.weight": torch.empty(0)}
    writer.add_task(
        "t", {"m": stored}, original_nbytes=1, error=0.0, adapter_config={}, extra=extra
    )
    writer.finish("card")
    # It can be read, as other versions wrote it.
    (kept,) = Checkpoint.open(tmp_path).load_task("t").extra.values()
    assert kept.shape == (0,)
    (problem,) = validate(tmp_path)
    assert "ZeRO-3" in problem
    assert "'t'" in problem


def test_who_has_measured_is_not_told_to() -> None:
    losses = Losses({"a": 0.3, "b": 0.2})
    assert "evaluate before you rely" in describe_losses(losses.to_dict())[0]
    (line,) = describe_losses(dataclasses.replace(losses, judged=["a", "b"]).to_dict())
    assert line.endswith("a 30%, b 20%; the KL kept of each was measured")
    (line,) = describe_losses(dataclasses.replace(losses, judged=["b"]).to_dict())
    assert "evaluate before you rely" in line
