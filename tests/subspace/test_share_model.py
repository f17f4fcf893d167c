"""SHAREModel: lorashare's interface on our fit, our checkpoint and our export."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from places import DATA
from safetensors.torch import load_file
from synthetic import SHAPES, dense, family, save
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.errors import (
    AdapterError,
    CheckpointError,
    OptionError,
    OutputError,
    TaskIdError,
    TaskNotFoundError,
)
from vllm_vlora.subspace.share_model import SHAREModel
from vllm_vlora.subspace.shared import SharedSubspace

SEEDS = DATA / "seeds"
Q, V = SHAPES
PREFIX = "base_model.model."
ALL = 96


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Five adapters around three directions; ranks 4 and 5, float32."""
    folder = tmp_path_factory.mktemp("related")
    return family(folder, 5, related=True, dtype=torch.float32)


def paths(adapters: dict[str, Adapter]) -> list[str]:
    return [str(adapter.path) for adapter in adapters.values()]


def quiet(*args: Any, **options: Any) -> SHAREModel:
    """``from_adapters`` where more components are asked for than there are directions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SHAREModel.from_adapters(*args, **options)


def delta(weights: dict[str, torch.Tensor], adapter: Adapter, name: str) -> torch.Tensor:
    """delta_W of tensors by PEFT's names under the adapter's own config."""
    a, b = (weights[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
    return adapter.modules[name].scale * b @ a


# --- what is kept ---------------------------------------------------------------------------------


def test_with_all_components_nothing_is_lost(related: dict[str, Adapter]) -> None:
    share = quiet(paths(related), num_components=ALL)
    assert share.adapter_names == list(related)
    for name, adapter in related.items():
        weights = share.reconstruct(name)
        for module in adapter.modules:
            wanted = dense(adapter, module)
            assert torch.allclose(delta(weights, adapter, module), wanted, rtol=0, atol=1e-6)
        assert share.reconstruction_error(name, original_path=adapter.path)["max"] < 1e-6


def test_fewer_components_keep_what_a_projection_on_the_bases_keeps(
    related: dict[str, Adapter],
) -> None:
    share = SHAREModel.from_adapters(paths(related), num_components=3)
    assert share.num_components == 3
    spans = {name: (basis.u, basis.v) for name, basis in share.checkpoint.bases()}
    for name, adapter in related.items():
        weights, found = (
            share.reconstruct(name),
            share.reconstruction_error(name, original_path=str(adapter.path)),
        )
        for module in (Q, V):
            u, v = (matrix.parts["values"].double() for matrix in spans[module])
            whole = dense(adapter, module)
            kept = u.T @ (u @ whole @ v.T) @ v
            assert torch.allclose(delta(weights, adapter, module), kept, rtol=0, atol=1e-5)
            error = float((kept - whole).norm() / whole.norm())
            assert found["per_layer"][module] == pytest.approx(error, rel=1e-4)
        assert found["max"] == max(found["per_layer"].values())
        assert found["mean"] == pytest.approx(sum(found["per_layer"].values()) / 2)


@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.99])
def test_auto_takes_the_least_components_that_hold_the_variance(
    threshold: float, related: dict[str, Adapter]
) -> None:
    share = SHAREModel.from_adapters(paths(related), "auto", variance_threshold=threshold)
    k = share.num_components

    def held(module: str, count: int) -> float:
        """Mean share of ||delta_W||^2 on the leading eigenvectors, from dense float64 matrices."""
        units = [dense(adapter, module) for adapter in related.values()]
        units = [unit / unit.norm() for unit in units]
        v = torch.linalg.eigh(sum(unit.T @ unit for unit in units))[1][:, -count:]
        u = torch.linalg.eigh(sum(unit @ unit.T for unit in units))[1][:, -count:]
        return sum(float((u.T @ unit @ v).square().sum()) for unit in units) / len(units)

    assert 1 <= k < 20
    assert all(held(module, k) >= threshold - 1e-4 for module in (Q, V))
    assert k == 1 or any(held(module, k - 1) < threshold for module in (Q, V))


def test_auto_widens_until_it_is_enough(tmp_path: Path) -> None:
    # 12 unrelated adapters have 52 directions, more than the width that is tried first.
    adapters = family(tmp_path, 12, related=False, dtype=torch.float32)
    share = SHAREModel.from_adapters(paths(adapters), "auto", variance_threshold=1.0)
    assert share.num_components > 32
    assert share.compression_stats["min_explained_variance"] > 1 - 1e-6


@pytest.mark.parametrize("name", ["lorashare-0.1.0-fixed", "lorashare-0.1.3-chunked"])
def test_as_many_components_keep_more_than_lorashare_keeps(name: str, tmp_path: Path) -> None:
    drawn = runpy.run_path(str(SEEDS / "make_fixtures.py"))["draw_factors"]()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    folders = {task: write_adapter(tmp_path / task, config, f) for task, f in drawn.items()}
    theirs = SHAREModel.from_pretrained(SEEDS / name)
    ours = SHAREModel.from_adapters(folders, num_components=theirs.num_components)
    assert ours.num_components == theirs.num_components == 6
    for task, folder in folders.items():
        lost = [
            share.reconstruction_error(task, original_path=folder)["mean"]
            for share in (ours, theirs)
        ]
        assert lost[0] < 0.7 * lost[1]


# --- naming and reading ---------------------------------------------------------------------------


def test_names_come_from_folders_or_from_the_dict(
    related: dict[str, Adapter], tmp_path: Path
) -> None:
    again = shutil.copytree(related["task0"].path, tmp_path / "elsewhere" / "task0")
    first, second = str(related["task0"].path), str(related["task1"].path)
    assert quiet([first, str(again), second]).adapter_names == ["task0", "task0_1", "task1"]
    assert quiet({"a/b": first, "a_b": second}).adapter_names == ["a/b", "a_b"]


def test_adapters_that_cannot_be_read_are_errors_or_left_out(
    related: dict[str, Adapter], tmp_path: Path
) -> None:
    refs = [*paths(related)[:2], str(tmp_path / "nowhere")]
    with pytest.raises(AdapterError, match="nowhere"):
        SHAREModel.from_adapters(refs)
    with pytest.warns(UserWarning, match="left out: .*nowhere"):
        share = SHAREModel.from_adapters(refs, num_components=3, on_error="skip")
    assert share.adapter_names == ["task0", "task1"]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(AdapterError, match="at least two"),
    ):
        SHAREModel.from_adapters(refs[1:], on_error="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "num_components"),
        ({"num_components": "many"}, "num_components"),
        ({"num_components": 2.5}, "num_components"),
        ({"num_components": True}, "num_components"),
        ({"variance_threshold": 0.0}, "variance_threshold"),
        ({"variance_threshold": 1.5}, "variance_threshold"),
        ({"device": "gpu"}, "device"),
        ({"layer_by_layer": "yes"}, "layer_by_layer"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 2.0}, "chunk_size"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], message: str, related: dict[str, Adapter]
) -> None:
    with pytest.raises(OptionError, match=message):
        SHAREModel.from_adapters(paths(related)[:2], **options)


def test_one_path_is_no_list(related: dict[str, Adapter]) -> None:
    with pytest.raises(OptionError, match="give a list"):
        SHAREModel.from_adapters(paths(related)[0])


@pytest.mark.parametrize("asked", [32, 97])
def test_more_components_than_directions_are_said_and_lose_nothing(
    related: dict[str, Adapter], asked: int
) -> None:
    said = f"num_components is {asked}, but .* 9 directions"
    with pytest.warns(UserWarning, match=said) as caught:
        share = SHAREModel.from_adapters(paths(related)[:2], num_components=asked)
    assert Path(caught[0].filename).name == Path(__file__).name
    assert share.num_components == 9


def test_what_adapters_lose_is_said(related: dict[str, Adapter]) -> None:
    said = r"Predicted to lose more than 5% .*: task\d \d+%.*; give a larger num_components"
    with pytest.warns(UserWarning, match=said) as caught:
        SHAREModel.from_adapters(paths(related), num_components=1)
    assert Path(caught[0].filename).name == Path(__file__).name


def test_bounds_on_memory_do_not_change_the_result(related: dict[str, Adapter]) -> None:
    plain = SHAREModel.from_adapters(paths(related), num_components=4)
    bounded = SHAREModel.from_adapters(
        paths(related), num_components=4, device="cpu", layer_by_layer=True, chunk_size=2
    )
    for name in related:
        one, other = plain.reconstruct(name), bounded.reconstruct(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.warns(UserWarning, match="fitted on the CPU"):
        SHAREModel.from_adapters(paths(related), num_components=4, device="cuda")


def test_adapters_of_different_base_models(related: dict[str, Adapter], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    other = save(tmp_path / "other", SHAPES, 4, generator, base="org/another")
    with pytest.raises(AdapterError, match="org/another"):
        SHAREModel.from_adapters([*paths(related), str(other.path)], num_components=3)


def test_ranks_scales_and_modules_may_differ(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    one = save(tmp_path / "one", SHAPES, 2, generator, alpha=16, dtype=torch.float32)
    two = save(tmp_path / "two", {Q: SHAPES[Q]}, 5, generator, alpha=1, dtype=torch.float32)
    share = quiet([one.path, two.path], num_components=ALL)
    for adapter in (one, two):
        found = share.reconstruction_error(adapter.name, original_path=adapter.path)
        assert found["per_layer"].keys() == adapter.modules.keys()
        assert found["max"] < 1e-6


# --- taking out -----------------------------------------------------------------------------------


def test_a_reconstruction_is_for_the_adapters_own_config(
    related: dict[str, Adapter], tmp_path: Path
) -> None:
    # Two components hold rank 2 at most: the rest of the adapter's rank is zeros.
    share = SHAREModel.from_adapters(paths(related), num_components=2)
    weights = share.reconstruct("task1", output_dir=tmp_path / "out")
    written, original = open_adapter(tmp_path / "out"), related["task1"]
    assert written.config == original.config
    assert {m.rank for m in written.modules.values()} == {5}
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == weights.keys()
    for module in (Q, V):
        a, b = written.factors(module)
        assert torch.equal(a, weights[f"{PREFIX}{module}.lora_A.weight"])
        assert a.dtype == b.dtype == torch.float32
        assert not a[2:].any()
        assert not b[:, 2:].any()
    share.reconstruct("task1", output_dir=tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        share.reconstruct("task1", output_dir=tmp_path / "out", force=False)
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(OutputError, match="did not write"):
        share.reconstruct("task1", output_dir=tmp_path / "out")


def test_an_adapter_that_is_not_there_is_a_key_error(related: dict[str, Adapter]) -> None:
    share = SHAREModel.from_adapters(paths(related), num_components=2)
    for call in (
        share.reconstruct,
        share.remove_adapter,
        lambda name: share.apply(None, name),
        lambda name: share.reconstruction_error(name, original_path=related["task0"].path),
    ):
        with pytest.raises(TaskNotFoundError, match="no task 'nobody'"):
            call("nobody")
        with pytest.raises(KeyError):
            call("nobody")


def test_errors_against_weights_in_memory(related: dict[str, Adapter]) -> None:
    share = SHAREModel.from_adapters(paths(related), num_components=3)
    weights = load_file(related["task0"].path / "adapter_model.safetensors")
    from_path = share.reconstruction_error("task0", original_path=related["task0"].path)
    assert share.reconstruction_error("task0", original_weights=weights) == from_path
    with pytest.raises(OptionError, match="one of them"):
        share.reconstruction_error("task0")
    with pytest.raises(OptionError, match="one of them"):
        share.reconstruction_error("task0", weights, str(related["task0"].path))
    some = {key: tensor for key, tensor in weights.items() if "v_proj" not in key}
    with pytest.raises(AdapterError, match="v_proj"):
        share.reconstruction_error("task0", original_weights=some)


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).eval()


def tiny_bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def classifiers(folder: Path, make: Callable[[], Any], targets: list[str]) -> list[Path]:
    """Three adapters with classifier heads of their own, as PEFT saves them."""
    found = []
    for number in range(3):
        settings = LoraConfig(
            r=4, lora_alpha=8 + number, target_modules=targets, task_type="SEQ_CLS"
        )
        model = get_peft_model(make(), settings)
        torch.manual_seed(10 + number)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder / f"task{number}")
        found.append(folder / f"task{number}")
    return found


@pytest.mark.parametrize(
    ("make", "targets", "components"),
    [
        (tiny_llama, ["q_proj", "v_proj", "down_proj"], 48),
        (tiny_bert, ["query", "value"], 32),
        (tiny_bert, ["query", "value"], 3),
    ],
    ids=["llama", "bert", "bert-lossy"],
)
def test_a_classifier_answers_as_peft_does_with_the_same_adapter(
    make: Callable[[], Any], targets: list[str], components: int, tmp_path: Path
) -> None:
    folders = classifiers(tmp_path, make, targets)
    share = quiet(folders, num_components=components)
    tokens = torch.arange(1, 25).reshape(2, 12)
    bare = make()(tokens).logits
    for folder in folders:
        share.reconstruct(folder.name, output_dir=tmp_path / "out")
        # Without loss the original is what PEFT is asked with, head and all.
        lossless = components >= 32
        known = PeftModel.from_pretrained(make(), folder if lossless else tmp_path / "out").eval()
        model = share.apply(make(), folder.name).eval()
        with torch.no_grad():
            found, wanted = model(tokens).logits, known(tokens).logits
        assert torch.allclose(found, wanted, rtol=0, atol=1e-4)
        assert (found - bare).abs().max() > 0.1
        heads = open_adapter(folder).extra_tensors()
        assert heads
        written = open_adapter(tmp_path / "out").extra_tensors()
        assert written.keys() == heads.keys()
        assert all(torch.equal(written[key], heads[key]) for key in heads)


def test_embeddings_keep_their_own_factors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    shapes, kinds = SHAPES | {"model.embed_tokens": (40, 96)}, {"model.embed_tokens": "embedding"}
    adapters = [
        save(tmp_path / name, shapes, 3, generator, kinds=kinds, dtype=torch.float32)
        for name in ("one", "two")
    ]
    share = SHAREModel.from_adapters([a.path for a in adapters], num_components=2)
    found = share.reconstruction_error("one", original_path=adapters[0].path)
    assert found["per_layer"]["model.embed_tokens"] < 1e-6
    share.reconstruct("one", output_dir=tmp_path / "out")
    assert open_adapter(tmp_path / "out").modules["model.embed_tokens"].kind == "embedding"


# --- keeping --------------------------------------------------------------------------------------


def test_a_saved_model_is_a_checkpoint_like_any_other(
    related: dict[str, Adapter], tmp_path: Path
) -> None:
    share = SHAREModel.from_adapters(paths(related), num_components=3)
    share.save_pretrained(tmp_path / "ckpt")
    assert validate(tmp_path / "ckpt") == []
    loaded = SHAREModel.from_pretrained(tmp_path / "ckpt")
    assert loaded.adapter_names == share.adapter_names
    for name in related:
        one, other = share.reconstruct(name), loaded.reconstruct(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    share.remove_adapter("task0")
    share.save_pretrained(tmp_path / "ckpt")
    assert "task0" not in Checkpoint.open(tmp_path / "ckpt").tasks
    with pytest.raises(OutputError, match="exists"):
        share.save_pretrained(tmp_path / "ckpt", force=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="did not write"):
        share.save_pretrained(tmp_path / "mine")


@pytest.mark.parametrize("name", ["lorashare-0.1.3-heads", "lorashare-0.1.0-fixed"])
def test_checkpoints_of_lorashare_give_what_lorashare_reconstructs(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        share = SHAREModel.from_pretrained(SEEDS / name)
    expected = load_file(SEEDS / f"{name}.expected.safetensors")
    assert share.adapter_names == ["cola", "mrpc", "rte", "wnli"]
    for task in share.adapter_names:
        weights = share.reconstruct(task)
        assert {f"{task}::{key}" for key in weights} == {
            key for key in expected if key.startswith(f"{task}::")
        }
        for key, found in weights.items():
            wanted = expected[f"{task}::{key}"]
            assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_a_checkpoint_of_vlora_opens_too_and_its_warnings_are_given(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="vlora keeps no alpha"):
        share = SHAREModel.from_pretrained(SEEDS / "vlora-1.0.0-float")
    expected = load_file(SEEDS / "vlora-1.0.0-float.expected.safetensors")
    found = share.reconstruct("team/wnli")
    key = "model.layers.0.self_attn.q_proj"
    a, b = (found[f"{PREFIX}{key}.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(a, expected[f"team/wnli::{key}.A"], atol=1e-5)
    assert torch.allclose(b, expected[f"team/wnli::{key}.B"], atol=1e-5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a vllm-vlora checkpoint"):
        SHAREModel.from_pretrained(tmp_path / "empty")


def test_the_summary_has_the_sizes_of_the_files(
    related: dict[str, Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share = SHAREModel.from_adapters(paths(related), num_components=3)
    share.save_pretrained(tmp_path / "ckpt")
    share.summary()
    printed, stats = capsys.readouterr().out, share.compression_stats
    files = sum(file.stat().st_size for file in (tmp_path / "ckpt").rglob("*.safetensors"))
    original = sum(adapter.original_nbytes for adapter in related.values())
    assert stats["compression_ratio"] == pytest.approx(original / files)
    assert stats["original_total_params"] == original // 2
    assert stats["shared_component_params"] == 3 * (96 + 80) + 3 * (96 + 40)
    # Cores of rank 3 (at most the three components) on both sides of both modules.
    assert stats["per_adapter_loading_params"] == 5 * 2 * 3 * (3 + 3)
    for name, adapter in related.items():
        lost = norm = 0.0
        weights = share.reconstruct(name)
        for module in (Q, V):
            whole = dense(adapter, module)
            lost += float((delta(weights, adapter, module) - whole).square().sum())
            norm += float(whole.square().sum())
        kept = stats["per_adapter_explained_variance"][name]
        assert kept == pytest.approx(1 - lost / norm, abs=1e-5)
    assert "Components (k):      3" in printed
    assert f"(ratio {original / files:.2f})" in printed
    assert "task0, task1, task2, task3, task4" in printed


def test_the_summary_of_a_converted_checkpoint_claims_no_more_than_is_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    SHAREModel.from_pretrained(SEEDS / "lorashare-0.1.0-fixed").summary()
    assert "of what the lorashare checkpoint holds; its own loss" in capsys.readouterr().out


# --- adding and removing --------------------------------------------------------------------------


def test_an_adapter_that_the_bases_hold_is_projected(
    related: dict[str, Adapter], tmp_path: Path
) -> None:
    refs = paths(related)
    share = SHAREModel.from_adapters(refs[:4], num_components=4)
    share.save_pretrained(tmp_path / "before")
    found = share.add_adapter(refs[4], variance_threshold=0.9)
    assert (found["method"], found["adapter_name"]) == ("projection", "task4")
    share.save_pretrained(tmp_path / "after")
    assert validate(tmp_path / "after") == []
    before, after = (Checkpoint.open(tmp_path / name) for name in ("before", "after"))
    assert [ref.sha256 for ref in before.config.basis] == [ref.sha256 for ref in after.config.basis]
    assert all(before.record(n).sha256 == after.record(n).sha256 for n in before.tasks)
    errors = share.reconstruction_error("task4", original_path=refs[4])["per_layer"]
    explained = [1 - error**2 for error in errors.values()]
    assert found["min_explained_variance"] == pytest.approx(min(explained), abs=1e-5)
    assert found["mean_explained_variance"] == pytest.approx(sum(explained) / 2, abs=1e-5)
    assert min(explained) >= 0.9
    total = math.sqrt(1 - share.compression_stats["per_adapter_explained_variance"]["task4"])
    assert min(errors.values()) <= total <= max(errors.values())


def test_an_adapter_that_the_bases_do_not_hold_makes_a_new_fit(
    related: dict[str, Adapter], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(21)
    stranger = save(tmp_path / "stranger", SHAPES, 4, generator, dtype=torch.float32)
    share = SHAREModel.from_adapters(paths(related), num_components=12)
    found = share.add_adapter(str(stranger.path), name="s/t")
    assert found == {"method": "recompute", "adapter_name": "s/t"}
    # The very fit that all adapters together give, since the originals are still there.
    whole = SHAREModel.from_adapters(
        {**{n: a.path for n, a in related.items()}, "s/t": stranger.path}, num_components=12
    )
    assert share.adapter_names == whole.adapter_names
    for name in share.adapter_names:
        one, other = share.reconstruct(name), whole.reconstruct(name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_fit_without_the_originals_starts_from_what_is_stored(
    related: dict[str, Adapter], tmp_path: Path
) -> None:
    refs = paths(related)
    SHAREModel.from_adapters(refs[:4], num_components=3).save_pretrained(tmp_path / "ckpt")
    share = SHAREModel.from_pretrained(tmp_path / "ckpt")
    stored = {name: tmp_path / "stored" / name for name in share.adapter_names}
    for name, folder in stored.items():
        share.reconstruct(name, output_dir=folder)
    assert share.add_adapter(refs[4], force_recompute=True)["method"] == "recompute"
    assert share.checkpoint.base_model == "org/base"
    # As many components as the checkpoint had.
    whole = SHAREModel.from_adapters({**stored, "task4": refs[4]}, num_components=3)
    for name in related:
        one, other = share.reconstruct(name), whole.reconstruct(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    # The folder that was opened is as it was.
    assert list(Checkpoint.open(tmp_path / "ckpt").tasks) == list(related)[:4]


def test_tokenizers_stay_with_their_adapters(related: dict[str, Adapter], tmp_path: Path) -> None:
    refs = paths(related)
    refs[0] = str(shutil.copytree(refs[0], tmp_path / "task0"))
    (tmp_path / "task0" / "tokenizer.json").write_bytes(b"{}")
    SHAREModel.from_adapters(refs[:3], num_components=3).save_pretrained(tmp_path / "ckpt")
    share = SHAREModel.from_pretrained(tmp_path / "ckpt")
    share.add_adapter(refs[3], force_recompute=True)
    assert list(share.checkpoint.attachments) == ["task0"]
    share.reconstruct("task0", output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"


def test_what_cannot_be_added(related: dict[str, Adapter], tmp_path: Path) -> None:
    refs = paths(related)
    share = SHAREModel.from_adapters(refs[:2], num_components=3)
    generator = torch.Generator().manual_seed(22)
    wide = save(tmp_path / "wide", {Q: (100, 80)}, 4, generator)
    other = save(tmp_path / "other", SHAPES, 4, generator, base="org/another")
    with pytest.raises(TaskIdError, match="task1"):
        share.add_adapter(refs[1])
    with pytest.raises(TaskIdError, match="empty"):
        share.add_adapter(refs[2], name="")
    with pytest.raises(AdapterError, match="100"):
        share.add_adapter(wide.path)
    with pytest.raises(AdapterError, match="org/another"):
        share.add_adapter(other.path)
    with pytest.raises(OptionError, match="variance_threshold"):
        share.add_adapter(refs[2], variance_threshold=2.0)
    with pytest.raises(OptionError, match="device"):
        share.add_adapter(refs[2], device="abacus")
    assert share.adapter_names == ["task0", "task1"]
    assert share.reconstruction_error("task0", original_path=refs[0])["max"] < 1


def test_removing_leaves_the_others_and_the_opened_folder_as_they_are(
    related: dict[str, Adapter], tmp_path: Path
) -> None:
    SHAREModel.from_adapters(paths(related)[:3], num_components=3).save_pretrained(
        tmp_path / "ckpt"
    )
    share = SHAREModel.from_pretrained(tmp_path / "ckpt")
    before = share.reconstruct("task1")
    share.remove_adapter("task0")
    share.remove_adapter("task2")
    assert share.adapter_names == ["task1"]
    after = share.reconstruct("task1")
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(OptionError, match="no task would be left"):
        share.remove_adapter("task1")
    assert list(Checkpoint.open(tmp_path / "ckpt").tasks) == ["task0", "task1", "task2"]
    config = json.loads((related["task1"].path / "adapter_config.json").read_text())
    assert share.checkpoint.record("task1").adapter_config == config


def test_what_is_written_is_of_new_factors(tmp_path: Path) -> None:
    """Its config is the adapter's own, but for how a training began: that was with others."""
    adapters = family(tmp_path, 3, related=True, dtype=torch.float32)
    for adapter in adapters.values():
        file = adapter.path / "adapter_config.json"
        words = {"init_lora_weights": "orthogonal", "bias": "lora_only"}
        file.write_text(json.dumps(json.loads(file.read_text()) | words))
    share = SHAREModel.from_adapters(paths(adapters), num_components=4)
    share.reconstruct(share.adapter_names[0], output_dir=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["bias"]) == (True, "none")
    own = share.checkpoint.record(share.adapter_names[0]).adapter_config
    assert (config["r"], config["lora_alpha"]) == (own["r"], own["lora_alpha"])


@pytest.mark.parametrize("asked", [8, "auto"])
def test_what_was_asked_for_is_kept_with_the_checkpoint(
    related: dict[str, Adapter], asked: int | str, tmp_path: Path
) -> None:
    """As lorashare keeps it: an adapter that is added in another session is taken in as in this one."""
    first, last = paths(related)[:2], paths(related)[4]
    share = quiet(first, num_components=asked, variance_threshold=0.999)
    share.save_pretrained(tmp_path / "ckpt")
    again = SHAREModel.from_pretrained(tmp_path / "ckpt")
    assert again.variance_threshold == 0.999
    again.save_pretrained(tmp_path / "copy")
    for model in (share, again, SHAREModel.from_pretrained(tmp_path / "copy")):
        added = model.add_adapter(last, "added")
        assert added["method"] == "recompute"
        assert model.num_components == share.num_components
        model.save_pretrained(tmp_path / "added")
        assert SHAREModel.from_pretrained(tmp_path / "added").variance_threshold == 0.999
    # Of a subspace the same words mean something else.
    subspace = SharedSubspace.from_adapters(first, num_components=64, representation="joint")
    saved = SHAREModel.from_pretrained(subspace.save(tmp_path / "subspace"))
    assert saved.variance_threshold == 0.95


def test_what_lorashare_was_asked_for_is_read(tmp_path: Path) -> None:
    share = SHAREModel.from_pretrained(SEEDS / "lorashare-0.1.3-auto")
    assert share.variance_threshold == 0.9
    share.save_pretrained(tmp_path / "ours")
    assert SHAREModel.from_pretrained(tmp_path / "ours").variance_threshold == 0.9
