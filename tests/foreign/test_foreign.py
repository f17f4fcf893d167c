"""Checkpoints of vlora and lorashare, read and converted; held against what those packages read.

``tests/data/seeds`` has checkpoints that the real packages wrote, and what they reconstruct from them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from places import DATA
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint.export import export_all, export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.errors import (
    AdapterError,
    CheckpointError,
    OptionError,
    OutputError,
    TaskIdError,
)
from vllm_vlora.foreign.convert import convert, detect_kind
from vllm_vlora.foreign.lorashare_files import LoraShareFiles
from vllm_vlora.foreign.vlora_files import VLoRAFiles
from vllm_vlora.quantize import unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.tools.convert_command import convert as convert_command
from vllm_vlora.tools.reconstruct_command import reconstruct as reconstruct_command

SEEDS = DATA / "seeds"
NAMES = sorted(
    path.name for path in SEEDS.iterdir() if path.is_dir() and path.name != "__pycache__"
)
VLORA, SHARE = "vlora-1.0.0-float", "lorashare-0.1.3-heads"
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
PREFIX = "base_model.model."

app = typer.Typer()
app.command()(convert_command)
app.command()(reconstruct_command)


def expected(name: str) -> dict[str, torch.Tensor]:
    """What the package reconstructed: "TASK::KEY" -> tensor."""
    return load_file(SEEDS / f"{name}.expected.safetensors")


def expected_factors(name: str, task: str, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = expected(name)
    if name.startswith("vlora"):
        return found[f"{task}::{layer}.A"].float(), found[f"{task}::{layer}.B"].float()
    keys = (f"{task}::{PREFIX}{layer}.lora_{side}.weight" for side in "AB")
    a, b = (found[key] for key in keys)
    return a, b


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (data | changes).items() if v is not ...}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture
def vlora(tmp_path: Path) -> Path:
    """A checkpoint of vlora that a test may damage."""
    return shutil.copytree(SEEDS / VLORA, tmp_path / "vlora")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return shutil.copytree(SEEDS / "vlora-1.0.0-nf4", tmp_path / "packed")


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A checkpoint of lorashare that a test may damage."""
    return shutil.copytree(SEEDS / SHARE, tmp_path / "share")


# --- what the packages reconstruct ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_checkpoint_gives_what_the_package_reconstructs(
    name: str, tmp_path: Path
) -> None:
    report = convert(SEEDS / name, tmp_path / "ckpt")
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert validate(tmp_path / "ckpt") == []
    assert report.kind == name.split("-")[0] == detect_kind(SEEDS / name)
    tasks = list(dict.fromkeys(key.split("::")[0] for key in expected(name)))
    assert report.task_ids == list(checkpoint.tasks)
    assert sorted(checkpoint.tasks) == sorted(tasks)
    # vlora computes in the dtype that it saved, we in float32.
    bound = 2**-7 if name.endswith("bfloat16") else 1e-6
    shared = {(module, kind): basis for module, kind, basis in checkpoint.shared()}
    for task in tasks:
        stored = checkpoint.load_task(task).modules
        assert set(stored) == {Q, V}
        for layer, module in stored.items():
            a, b = decode(module, shared[layer, module.representation])
            wanted_a, wanted_b = expected_factors(name, task, layer)
            for found, wanted in ((a, wanted_a), (b / module.scale, wanted_b)):
                assert found.shape == wanted.shape
                assert (found - wanted).abs().max() <= bound * wanted.abs().max()


def test_every_number_of_vlora_is_kept_bit_for_bit(tmp_path: Path) -> None:
    convert(SEEDS / VLORA, tmp_path / "ckpt")
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    theirs = load_file(SEEDS / VLORA / "subspace.safetensors")
    for layer, _, basis in checkpoint.shared():
        rank, d_out = 4, basis.u.cols
        v, u = unpack(basis.v).view(-1, rank * basis.v.cols), unpack(basis.u).view(-1, rank, d_out)
        assert torch.equal(v[0], theirs[f"{layer}.mean_a"])
        assert torch.equal(v[1:], theirs[f"{layer}.components_a"])
        assert torch.equal(u[0].T.flatten(), theirs[f"{layer}.mean_b"])
        assert torch.equal(u[1:].mT.flatten(1), theirs[f"{layer}.components_b"])
    for task, file in (("cola", "cola"), ("team/wnli", "team_wnli")):
        loadings = load_file(SEEDS / VLORA / f"task_{file}.safetensors")
        for layer, stored in checkpoint.load_task(task).modules.items():
            for side in "ab":
                found = unpack(stored.matrices[side.upper()])[0]
                assert torch.equal(found, loadings[f"{layer}.loadings_{side}"])


def test_every_number_of_lorashare_is_kept_bit_for_bit(tmp_path: Path) -> None:
    convert(SEEDS / SHARE, tmp_path / "ckpt")
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    theirs = load_file(SEEDS / SHARE / "shared_components.safetensors")
    for layer, basis in checkpoint.bases():
        assert torch.equal(unpack(basis.v).T, theirs[f"{layer}:A"])
        assert torch.equal(unpack(basis.u).T, theirs[f"{layer}:B"])
    for task in checkpoint.tasks:
        folder = SEEDS / SHARE / "adapters" / task
        loadings = load_file(folder / "loadings.safetensors")
        loaded = checkpoint.load_task(task)
        for layer, stored in loaded.modules.items():
            for side in "AB":
                assert torch.equal(unpack(stored.matrices[side]).T, loadings[f"{layer}:{side}"])
        heads = load_file(folder / "classifier_head.safetensors")
        assert loaded.extra.keys() == heads.keys() == {f"{PREFIX}score.weight"}
        assert all(torch.equal(loaded.extra[key], heads[key]) for key in heads)


def test_packed_components_are_their_codebook_times_their_scale(packed: Path) -> None:
    files = VLoRAFiles.open(packed)
    theirs = load_file(packed / "subspace_nf4.safetensors")
    # As vlora's own table rounds QLoRA's.
    table = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    table += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    found = files.layer(V).components_a.flatten()
    codes, scales = theirs[f"{V}.packed_a"], theirs[f"{V}.scales_a"]
    assert files.packed
    assert found.numel() == 2 * 4 * 24
    for place in (0, 1, 63, 64, 100, found.numel() - 1):
        byte = int(codes[place // 2])
        code = byte >> 4 if place % 2 == 0 else byte & 15
        wanted = torch.tensor(table[code], dtype=torch.float32) * scales[place // 64]
        assert found[place] == wanted


def test_packed_components_are_stored_in_float32_and_their_bytes_named(tmp_path: Path) -> None:
    report = convert(SEEDS / "vlora-1.0.0-nf4", tmp_path / "ckpt")
    assert (report.representation, report.format) == ("flat", "float32")
    files = sum(file.stat().st_size for file in (tmp_path / "ckpt").rglob("*.safetensors"))
    assert report.nbytes == files
    theirs = sum(f.stat().st_size for f in (SEEDS / "vlora-1.0.0-nf4").glob("*.safetensors"))
    assert report.source_nbytes == theirs
    assert any("NF4" in line and "4.81 kB" in line for line in report.warnings)


def test_a_checkpoint_in_bfloat16_stays_in_bfloat16(tmp_path: Path) -> None:
    report = convert(SEEDS / "vlora-1.0.0-bfloat16", tmp_path / "ckpt")
    assert report.format == "bfloat16"
    assert {m.flat.format for m in Checkpoint.open(tmp_path / "ckpt").modules if m.flat} == {
        "bfloat16"
    }


# --- scales, heads, descriptions ------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (32.0, 8.0)])
def test_an_exported_vlora_task_is_scaled_by_the_alpha_that_was_given(
    alpha: float | None, scale: float, tmp_path: Path
) -> None:
    report = convert(SEEDS / VLORA, tmp_path / "ckpt", alpha=alpha, base_model="org/tiny")
    export_task(Checkpoint.open(tmp_path / "ckpt"), "team/wnli", tmp_path / "out")
    adapter = open_adapter(tmp_path / "out")
    assert adapter.base_model == "org/tiny"
    assert any("alpha" in line for line in report.warnings) == (alpha is None)
    for layer, (a, b) in adapter.iter_factors():
        wanted_a, wanted_b = expected_factors(VLORA, "team/wnli", layer)
        wanted = scale * wanted_b.double() @ wanted_a.double()
        found = adapter.modules[layer].scale * b.double() @ a.double()
        assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_lorashare_tasks_keep_their_own_scales_and_heads(tmp_path: Path) -> None:
    report = convert(SEEDS / SHARE, tmp_path / "ckpt")
    folders = export_all(Checkpoint.open(tmp_path / "ckpt"), report.task_ids, tmp_path / "out")
    # alpha 8 + number over rank 4; the second is rsLoRA: over its square root.
    for task, scale in (("cola", 2.0), ("mrpc", 4.5), ("rte", 2.5), ("wnli", 2.75)):
        adapter = open_adapter(folders[task])
        for layer, (a, b) in adapter.iter_factors():
            wanted_a, wanted_b = expected_factors(SHARE, task, layer)
            wanted = scale * wanted_b.double() @ wanted_a.double()
            found = adapter.modules[layer].scale * b.double() @ a.double()
            assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
        head = expected(SHARE)[f"{task}::{PREFIX}score.weight"]
        assert torch.equal(adapter.extra_tensors()[f"{PREFIX}score.weight"], head)


def test_what_lorashare_had_dropped_is_said(tmp_path: Path) -> None:
    new = convert(SEEDS / SHARE, tmp_path / "new")
    assert ["embed_tokens" in line for line in new.warnings] == [True]
    assert "'cola', 'mrpc', 'rte', 'wnli'" in new.warnings[0]
    old = convert(SEEDS / "lorashare-0.1.0-heads", tmp_path / "old")
    assert any("module score" in line and "0.1.0" in line for line in old.warnings)
    assert convert(SEEDS / "lorashare-0.1.0-fixed", tmp_path / "plain").warnings == []


def test_a_converted_checkpoint_says_where_it_comes_from(tmp_path: Path) -> None:
    convert(SEEDS / SHARE, tmp_path / "ckpt")
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    card = (tmp_path / "ckpt" / "README.md").read_text()
    assert "From a lorashare checkpoint, without loss" in card
    assert 'base_model: "org/tiny"' in card
    assert checkpoint.base_model == "org/tiny"
    assert checkpoint.record("mrpc").source == "mrpc"
    assert checkpoint.record("mrpc").adapter_config["use_rslora"] is True
    assert checkpoint.record("mrpc").original_nbytes == 2 * 4 * (24 + 16 + 24 + 10)
    assert all(s.error == 0.0 for s in checkpoint.record("mrpc").segments)


def test_progress_counts_bases_and_tasks(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    convert(SEEDS / VLORA, tmp_path / "ckpt", progress=lambda *step: seen.append(step))
    assert seen == [("bases", i, 2) for i in (1, 2)] + [("tasks", i, 4) for i in (1, 2, 3, 4)]


# --- layouts --------------------------------------------------------------------------------------


def test_early_files_of_vlora_without_shapes_and_file_names(vlora: Path, tmp_path: Path) -> None:
    edit_json(
        vlora / "subspace_meta.json",
        shapes_a=...,
        shapes_b=...,
        task_filenames=...,
        adaptive_k=...,
        variance_threshold=...,
        task_ids=["cola", "mrpc", "rte"],
    )
    convert(vlora, tmp_path / "early")
    convert(SEEDS / VLORA, tmp_path / "late")
    early, late = Checkpoint.open(tmp_path / "early"), Checkpoint.open(tmp_path / "late")
    assert [ref.sha256 for ref in early.config.basis] == [ref.sha256 for ref in late.config.basis]
    assert list(early.tasks) == ["cola", "mrpc", "rte"]


def test_adaptive_layers_have_their_own_widths() -> None:
    files = VLoRAFiles.open(SEEDS / "vlora-1.0.0-adaptive-nf4")
    widths = {files.widths(layer) for layer in files.layer_names}
    assert (files.adaptive_k, files.variance_threshold, files.num_components) == (True, 0.8, 3)
    assert len({width for pair in widths for width in pair}) > 1
    assert files.layer(Q).components_b.shape == (files.widths(Q)[1], 4, 16)
    assert len(files.layer(Q).singular_values_b) == files.widths(Q)[1]


def test_adapters_of_lorashare_are_those_of_its_config(share: Path, tmp_path: Path) -> None:
    # lorashare writes a name with a slash into nested folders, where it does not find it again; and it
    # reads a removed adapter that still lies there.
    shutil.move(share / "adapters" / "rte", share / "adapters" / "team" / "rte")
    edit_json(share / "share_config.json", adapter_names=["team/rte", "cola"])
    report = convert(share, tmp_path / "ckpt")
    assert report.task_ids == ["team/rte", "cola"]
    a, b = expected_factors(SHARE, "rte", Q)
    export_task(Checkpoint.open(tmp_path / "ckpt"), "team/rte", tmp_path / "out")
    adapter = open_adapter(tmp_path / "out")
    found_a, found_b = adapter.factors(Q)
    found = adapter.modules[Q].scale * found_b @ found_a
    assert torch.allclose(found, 2.5 * b @ a, atol=1e-5)


def test_an_adapter_without_some_layers(share: Path, tmp_path: Path) -> None:
    edit_tensors(
        share / "adapters" / "cola" / "loadings.safetensors",
        lambda tensors: [tensors.pop(f"{V}:{side}") for side in "AB"],
    )
    convert(share, tmp_path / "ckpt")
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert list(checkpoint.load_task("cola").modules) == [Q]
    assert checkpoint.record("cola").original_nbytes == 2 * 4 * (24 + 16)


# --- bad input ------------------------------------------------------------------------------------


def refused(source: Path, tmp_path: Path, error: type[Exception] = CheckpointError) -> str:
    """The message with which a conversion fails, having written nothing."""
    with pytest.raises(error) as found:
        convert(source, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert "\n" not in str(found.value)
    return str(found.value)


def test_folders_that_hold_nothing_to_convert(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "vllm-vlora compress" in refused(tmp_path / "empty", tmp_path)
    convert(SEEDS / VLORA, tmp_path / "ours")
    assert "already" in refused(tmp_path / "ours", tmp_path)
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path)


def test_the_output_is_never_replaced_unasked(tmp_path: Path) -> None:
    convert(SEEDS / VLORA, tmp_path / "ckpt")
    with pytest.raises(OutputError, match="--force"):
        convert(SEEDS / SHARE, tmp_path / "ckpt")
    convert(SEEDS / SHARE, tmp_path / "ckpt", force=True)
    assert "cola" in Checkpoint.open(tmp_path / "ckpt").tasks
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="did not write"):
        convert(SEEDS / VLORA, tmp_path / "mine", force=True)


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf"), 1e39, -1e300])
def test_an_alpha_that_is_none(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="alpha"):
        convert(SEEDS / VLORA, tmp_path / "ckpt", alpha=alpha)
    with pytest.raises(OptionError, match="leave alpha out"):
        convert(SEEDS / SHARE, tmp_path / "ckpt", alpha=8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_names": ...}, "layer_names"),
        ({"layer_names": []}, "no layers"),
        ({"layer_names": [Q, Q]}, "listed twice"),
        ({"layer_names": [Q, V, "other"]}, "other"),
        ({"task_ids": []}, "no tasks"),
        ({"task_ids": ["cola", "cola"]}, "listed twice"),
        ({"task_ids": ["sst2"]}, "task_sst2.safetensors: the file is missing"),
        ({"task_filenames": {"cola": "../../cola"}}, "leaves the checkpoint"),
        ({"task_filenames": {"cola": "mrpc"}}, "remove 'cola' from task_ids"),
        ({"rank": 0}, "positive"),
        ({"rank": "four"}, "rank"),
        ({"format": "int3"}, "int3"),
        ({"shapes_a": {Q: [4, 24]}}, "no shape"),
        ({"shapes_b": {Q: [16, 5], V: [10, 4]}}, "do not multiply"),
        ({"shapes_a": {Q: [4, 25], V: [4, 24]}}, "expected"),
    ],
)
def test_a_meta_file_of_vlora_that_contradicts_its_files(
    changes: dict[str, Any], message: str, vlora: Path, tmp_path: Path
) -> None:
    edit_json(vlora / "subspace_meta.json", **changes)
    assert message in refused(vlora, tmp_path)


def test_a_task_id_that_no_task_may_have(vlora: Path, tmp_path: Path) -> None:
    edit_json(
        vlora / "subspace_meta.json", task_ids=["new\nline"], task_filenames={"new\nline": "cola"}
    )
    refused(vlora, tmp_path, TaskIdError)


def _set(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("subspace", lambda t: t.pop(f"{Q}.mean_a"), "missing"),
        ("subspace", lambda t: t[f"{Q}.mean_a"].fill_(float("nan")), "NaN"),
        ("subspace", _set(f"{Q}.mean_b", torch.zeros(63)), "expected [64]"),
        ("subspace", _set(f"{Q}.components_a", torch.zeros(2, 95)), "expected [2, 96]"),
        ("subspace", _set(f"{Q}.components_a", torch.zeros(0, 96)), "is empty"),
        ("subspace", lambda t: t.update({f"{Q}.mean_a": t[f"{Q}.mean_a"].double()}), "float64"),
        ("task_mrpc", lambda t: t[f"{V}.loadings_b"].fill_(float("inf")), "infinity"),
        ("task_mrpc", _set(f"{V}.loadings_b", torch.zeros(3)), "num_expand"),
        ("task_mrpc", lambda t: t.pop(f"{V}.loadings_a"), "missing"),
    ],
)
def test_tensors_of_vlora_that_are_not_as_they_must_be(
    file: str, change: Any, message: str, vlora: Path, tmp_path: Path
) -> None:
    edit_tensors(vlora / f"{file}.safetensors", change)
    assert message in refused(vlora, tmp_path)


def test_packed_tensors_that_are_not_as_they_must_be(packed: Path, tmp_path: Path) -> None:
    edit_tensors(packed / "subspace_nf4.safetensors", _set(f"{Q}.packed_a", torch.zeros(95).byte()))
    assert "expected torch.uint8 [96] for 2 components" in refused(packed, tmp_path)


@pytest.mark.parametrize("name", ["subspace.safetensors", "task_rte.safetensors"])
def test_files_of_vlora_that_are_cut_off_or_missing(name: str, vlora: Path, tmp_path: Path) -> None:
    data = (vlora / name).read_bytes()
    (vlora / name).write_bytes(data[:-8])
    assert "not a whole safetensors file" in refused(vlora, tmp_path)
    (vlora / name).unlink()
    assert f"{name}: the file is missing" in refused(vlora, tmp_path)


def test_json_that_is_none(vlora: Path, share: Path, tmp_path: Path) -> None:
    (vlora / "subspace_meta.json").write_bytes(b'{"rank": \xff')
    assert "subspace_meta.json" in refused(vlora, tmp_path)
    (share / "share_config.json").write_text("[1, 2]")
    assert "share_config.json" in refused(share, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_names": []}, "no adapters"),
        ({"adapter_names": ["cola", "cola"]}, "listed twice"),
        ({"adapter_names": ["sst2"]}, "adapter_meta.json: the file is missing"),
        ({"adapter_names": ["../share/adapters/cola"]}, "leaves the checkpoint"),
        ({"adapter_names": "cola"}, "adapter_names"),
    ],
)
def test_a_config_of_lorashare_that_contradicts_its_files(
    changes: dict[str, Any], message: str, share: Path, tmp_path: Path
) -> None:
    edit_json(share / "share_config.json", **changes)
    assert message in refused(share, tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("shared_components", lambda t: t.pop(f"{Q}:B"), "side A only"),
        ("shared_components", lambda t: t[f"{Q}:B"].mul_(1.01), "not orthonormal"),
        ("shared_components", lambda t: t[f"{Q}:B"].fill_(float("nan")), "NaN"),
        ("shared_components", _set("words", torch.zeros(2)), "LAYER:A"),
        ("shared_components", _set(f"{Q}:B", torch.zeros(16)), "no matrix"),
        ("shared_components", lambda t: (t.pop(f"{V}:A"), t.pop(f"{V}:B")), "no components"),
        ("adapters/rte/loadings", lambda t: t.pop(f"{Q}:B"), "side A only"),
        ("adapters/rte/loadings", _set(f"{Q}:B", torch.zeros(6, 4)), "expected [5, 4]"),
        ("adapters/rte/loadings", lambda t: t[f"{Q}:A"].fill_(float("inf")), "infinity"),
        (
            "adapters/rte/classifier_head",
            lambda t: t[f"{PREFIX}score.weight"].fill_(float("nan")),
            "NaN",
        ),
    ],
)
def test_tensors_of_lorashare_that_are_not_as_they_must_be(
    file: str, change: Any, message: str, share: Path, tmp_path: Path
) -> None:
    edit_tensors(share / f"{file}.safetensors", change)
    assert message in refused(share, tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": 8}, CheckpointError, "has rank 4"),
        ({"use_dora": True}, AdapterError, "DoRA"),
        ({"lora_alpha": ...}, AdapterError, "lora_alpha"),
        ({"peft_type": "LOHA"}, AdapterError, "LOHA"),
    ],
)
def test_configs_of_adapters_that_do_not_describe_them(
    changes: dict[str, Any], error: type[Exception], message: str, share: Path, tmp_path: Path
) -> None:
    path = share / "adapters" / "mrpc" / "adapter_meta.json"
    meta = json.loads(path.read_text())
    config = {k: v for k, v in (meta["original_config"] | changes).items() if v is not ...}
    path.write_text(json.dumps(meta | {"original_config": config}))
    assert message in refused(share, tmp_path, error)


def test_reading_lorashare_directly() -> None:
    files = LoraShareFiles.open(SEEDS / SHARE)
    adapter = files.adapter("mrpc")
    a, b = adapter.loadings[Q]
    u, v = files.components(Q)
    wanted_a, wanted_b = expected_factors(SHARE, "mrpc", Q)
    assert torch.allclose(a.T @ v, wanted_a, atol=1e-6)
    assert torch.allclose(u.T @ b, wanted_b, atol=1e-6)
    assert (adapter.scales[Q], adapter.source) == (4.5, "heads/mrpc")


@pytest.mark.parametrize("alpha", [1e38, -(2.0**64), 2.0**53])
def test_a_huge_alpha_is_read_as_it_was_given(alpha: float, tmp_path: Path) -> None:
    convert(SEEDS / VLORA, tmp_path / "ckpt", alpha=alpha)
    record = Checkpoint.open(tmp_path / "ckpt").record("cola")
    assert {segment.scale for segment in record.segments} == {alpha / 4}
    assert record.adapter_config["lora_alpha"] == alpha


# --- the command line -----------------------------------------------------------------------------


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def test_the_convert_command(tmp_path: Path) -> None:
    result = invoke("convert", SEEDS / VLORA, "-o", tmp_path / "ckpt", "--alpha", 16)
    assert "vlora, 4 tasks, 2 modules, 6.47 kB" in result.stdout
    assert "flat, float32, 4.75 kB" in result.stdout
    assert "Warning" not in result.stderr
    record = Checkpoint.open(tmp_path / "ckpt").record("cola")
    assert {segment.scale for segment in record.segments} == {4.0}
    data = json.loads(
        invoke("convert", SEEDS / SHARE, "-o", tmp_path / "ckpt", "--force", "--json").stdout
    )
    assert data["kind"] == "lorashare"
    assert data["tasks"] == ["cola", "mrpc", "rte", "wnli"]
    assert data["bytes"] == Checkpoint.open(data["checkpoint"]).nbytes
    failed = invoke("convert", SEEDS / VLORA, "-o", tmp_path / "ckpt", code=2)
    assert failed.stderr.startswith("bases ...") or "Error: " in failed.stderr
    assert failed.stdout == ""


@pytest.mark.parametrize("name", [VLORA, SHARE])
def test_the_reconstruct_command(name: str, tmp_path: Path) -> None:
    convert(SEEDS / name, tmp_path / "ckpt")
    invoke("reconstruct", SEEDS / name, "--adapter", "cola", "-o", tmp_path / "theirs")
    invoke("reconstruct", tmp_path / "ckpt", "--adapter", "cola", "-o", tmp_path / "ours")
    theirs, ours = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    out = invoke("reconstruct", tmp_path / "ckpt", "--all", "-o", tmp_path / "all", "--json").stdout
    folders = json.loads(out)
    assert sorted(folders) == sorted(Checkpoint.open(tmp_path / "ckpt").tasks)
    assert open_adapter(folders["cola"]).modules.keys() == {Q, V}


def test_calls_of_reconstruct_that_name_nothing_or_too_much(tmp_path: Path) -> None:
    both = ["--all", "--adapter", "cola"]
    for args in ([], both):
        invoke("reconstruct", SEEDS / SHARE, *args, "-o", tmp_path / "out", code=2)
    failed = invoke("reconstruct", SEEDS / SHARE, "--adapter", "x", "-o", tmp_path / "o", code=2)
    assert "no task 'x'" in failed.stderr
    assert not (tmp_path / "o").exists()
