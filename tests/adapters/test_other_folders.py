"""What people have instead of a whole PEFT folder: read where it can be read exactly, else named."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_vlora.adapters.peft_config import _KNOWN_OPTIONS, _REFUSED_OPTIONS
from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.errors import AdapterError
from vllm_vlora.merging.merging import task_arithmetic

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def make_base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A PEFT folder called french."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(make_base(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "french")
    (tmp_path / "french" / "README.md").unlink()
    return tmp_path / "french"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 7]])).logits


def refused(ref: Path | str, *said: str) -> str:
    with pytest.raises(AdapterError) as caught:
        open_adapter(ref)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in (str(ref), *said):
        assert part in message
    return message


def same(found: Path | str, plain_copy: dict[str, torch.Tensor]) -> None:
    adapter = open_adapter(found)
    assert adapter.name == "french"
    for name, (a, b) in adapter.iter_factors():
        assert torch.equal(a, plain_copy[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(b, plain_copy[f"base_model.model.{name}.lora_B.weight"])
    assert 2 * len(adapter.modules) == len(plain_copy)


# --- ways of storing ---------------------------------------------------------------------------------


def test_one_of_pefts_files_stands_for_its_folder(plain: Path) -> None:
    tensors = load_file(plain / WEIGHTS)
    for name in (WEIGHTS, CONFIG):
        same(plain / name, tensors)
        assert open_adapter(plain / name).path == plain


def shard(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in two files with an index, as Trainers write sharded models."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names = {key: files[number % 2] for number, key in enumerate(sorted(tensors))}
    for file in files:
        save_file({key: tensors[key] for key in names if names[key] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    return tensors


def test_sharded_weights(plain: Path) -> None:
    # A's and B's stand in different files.
    tensors = shard(plain)
    same(plain, tensors)
    _, b = open_adapter(plain).factors(Q)
    assert torch.equal(b, tensors[f"base_model.model.{Q}.lora_B.weight"])
    (plain / "adapter_model-00002-of-00002.safetensors").unlink()
    refused(plain, "adapter_model-00002-of-00002.safetensors", "copy all")


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        {"weight_map": {"x": "../x.safetensors"}},
        {"weight_map": {"x": 1}},
        {"weight_map": 3},
    ],
)
def test_an_index_that_is_none(plain: Path, index: Any) -> None:
    shard(plain)
    (plain / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(plain, "index.json")


def test_an_index_of_tensors_that_no_file_has(plain: Path) -> None:
    shard(plain)
    path = plain / f"{WEIGHTS}.index.json"
    names = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": names | {"more": min(names.values())}}))
    refused(plain, "more", "copy it again")


def test_tensors_that_the_index_does_not_name(plain: Path) -> None:
    shard(plain)
    path = plain / f"{WEIGHTS}.index.json"
    names = json.loads(path.read_text())["weight_map"]
    lost = f"base_model.model.{Q}.lora_"
    kept = {name: file for name, file in names.items() if not name.startswith(lost)}
    path.write_text(json.dumps({"weight_map": kept}))
    refused(plain, f"{lost}A.weight", "does not name", "copy it again")


def test_a_repository_in_the_cache_of_the_hub(plain: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--org--french"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0f3c")
    tensors = load_file(plain / WEIGHTS)
    plain.rename(cached / "snapshots" / "0f3c")
    for place in (cached, cached / "snapshots" / "0f3c"):
        same(place, tensors)
    (cached / "snapshots" / "aaaa").mkdir()
    (cached / "refs" / "main").unlink()
    refused(cached, "name one of its folders in snapshots")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_configs_in_any_unicode_and_with_any_line_ends(plain: Path, encoding: str) -> None:
    options = json.loads((plain / CONFIG).read_text()) | {"base_model_name_or_path": "org/Zürich"}
    text = json.dumps(options, ensure_ascii=False, indent=1).replace("\n", "\r\n")
    (plain / CONFIG).write_bytes(text.encode(encoding))
    assert open_adapter(plain).config == options
    out = write_adapter(plain.parent / "out", options, open_adapter(plain).iter_factors())
    # What is written anew is plain UTF-8 that PEFT and vLLM read.
    assert json.loads((out / CONFIG).read_text("utf-8")) == options


# --- instead of a config or of weights ---------------------------------------------------------------


def break_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../blobs/8f2c")


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pointer": (lfs_pointer, "git lfs pull"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>Sign in"), "web page"),
    "a broken link": (break_link, "../../blobs/8f2c, which is not there"),
}


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", DAMAGED)
def test_files_that_are_not_what_their_name_says(plain: Path, file: str, damage: str) -> None:
    change, said = DAMAGED[damage]
    change(plain / file)
    refused(plain, file, said)


def test_a_config_in_latin_1(plain: Path) -> None:
    (plain / CONFIG).write_bytes('{"base_model_name_or_path": "Zürich"}'.encode("latin-1"))
    refused(plain, CONFIG, "save it as UTF-8")


def test_a_folder_that_may_not_be_read(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, most: int) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vllm_vlora.adapters.peft_config.read_regular", refuse)
    refused(plain, CONFIG, "Permission denied")


FOLDERS = {
    "weights alone": ([WEIGHTS], "copy adapter_config.json too"),
    "a .bin": ([CONFIG, "adapter_model.bin"], "safe_serialization=True"),
    "a .pt": ([CONFIG, "adapter_model.pt"], "safe_serialization=True"),
    "a fine-tune": (["config.json", "model.safetensors"], "whole model and no adapter"),
    "a sharded fine-tune": (["config.json", "model-00001-of-00002.safetensors"], "whole model"),
    "an old fine-tune": (["config.json", "pytorch_model-00001-of-00002.bin"], "whole model"),
    "NeMo": (["sql.nemo"], "NeMo's or Megatron's"),
    "NeMo 2": (["weights/x.distcp", "context/model.yaml"], "NeMo's or Megatron's"),
    "Megatron": (["latest_checkpointed_iteration.txt", "iter_0000100/x"], "NeMo's or Megatron's"),
    "model parallel": (["mp_rank_00/model_weights.ckpt"], "NeMo's or Megatron's"),
    "DeepSpeed": (["zero_to_fp32.py", "latest", "global_step500/x.pt"], "zero_to_fp32.py"),
    "torch.distributed": (["__0_0.distcp", ".metadata"], "distributed run"),
    "FSDP": (["pytorch_model_fsdp_0/x.distcp"], "distributed run"),
    "torchtune": (["adapter_0.pt", "recipe_state.pt"], "torchtune's own file"),
    "mlx-lm": (["adapters.safetensors"], "its adapter_config.json"),
    "early mlx-lm": (["adapters.npz"], "save it again as adapters.safetensors"),
    "diffusers": (["pytorch_lora_weights.safetensors"], "image or video model"),
    "GGUF": (["french.gguf"], "llama.cpp"),
    "an archive": (["french.zip"], "unpack it"),
    "a checkpoint of ours": (["vlora_config.json"], "`vllm-vlora export`"),
    "vlora": (["subspace_meta.json"], "`vllm-vlora convert`"),
    "lorashare": (["share_config.json"], "`vllm-vlora convert`"),
    "a folder around it": (["run1/adapter_config.json"], "its sub-folders run1 hold adapters"),
    "nothing": ([], "give a folder that PEFT's save_pretrained wrote"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_programs_are_named(plain: Path, tmp_path: Path, kind: str) -> None:
    files, said = FOLDERS[kind]
    folder = tmp_path / "it"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        source = plain / name
        (folder / name).write_bytes(source.read_bytes() if source.exists() else b"x")
    refused(folder, said)


def tensors(*names: str) -> Callable[[Path], None]:
    return lambda path: save_file({name: torch.ones(2, 2) for name in names}, path)


def archive(path: Path) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(CONFIG, "{}")
    else:
        tarfile.open(path, "w:gz").close()


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "x.gguf": (lambda path: path.write_bytes(b"GGUF\x03\x00"), "llama.cpp"),
    "no-suffix": (lambda path: path.write_bytes(b"GGUF\x03\x00"), "llama.cpp"),
    "x.nemo": (lambda path: path.write_bytes(b"tar"), "NeMo"),
    "x.bin": (lambda path: torch.save({}, path), "pickle"),
    "x.pt": (lambda path: torch.save({}, path), "pickle"),
    "x.zip": (archive, "unpack it"),
    "x.tar.gz": (archive, "unpack it"),
    "x.npz": (lambda path: path.write_bytes(b"PK"), "NumPy archive"),
    "kohya.safetensors": (tensors("lora_unet_x.lora_down.weight"), "image or video"),
    "flux.safetensors": (tensors("transformer.transformer_blocks.0.q.lora_A.weight"), "image"),
    "mlx.safetensors": (tensors("model.layers.0.q_proj.lora_a"), "its adapter_config.json"),
    "tune.safetensors": (tensors("layers.0.attn.q_proj.lora_a.weight"), "torchtune"),
    "peft.safetensors": (tensors(f"{Q}.lora_A.weight"), f"name it {WEIGHTS}"),
    "gpt2.safetensors": (tensors("transformer.h.0.attn.c_attn.lora_A.weight"), f"name it {WEIGHTS}"),
    "model.safetensors": (tensors("model.embed_tokens.weight"), "whole model"),
    "lfs.safetensors": (lfs_pointer, "git lfs pull"),
    "cut.safetensors": (lambda path: path.write_bytes(b"\xff" * 9), "no tensors"),
    "x.txt": (lambda path: path.write_text("hello"), "give the folder that holds it"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_given_instead_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    make, said = FILES[name]
    make(tmp_path / name)
    refused(tmp_path / name, "is a file", said)


# --- mlx-lm ------------------------------------------------------------------------------------------


def write_mlx(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """As mlx-lm saves: lora_a [d_in, r] and lora_b [r, d_out]."""
    folder.mkdir()
    torch.manual_seed(2)
    found = {
        f"{Q}.lora_a": torch.randn(16, 3), f"{Q}.lora_b": torch.randn(3, 16),
        f"{DOWN}.lora_a": torch.randn(20, 3), f"{DOWN}.lora_b": torch.randn(3, 16),
    }  # fmt: skip
    save_file(found, folder / "adapters.safetensors")
    config = {
        "model": "org/base", "fine_tune_type": "lora", "num_layers": 16, "seed": 0,
        "lora_parameters": {"rank": 3, "scale": 0.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config | options))
    return found


@pytest.mark.parametrize(
    ("parameters", "scale"),
    [
        ({"rank": 3, "scale": 0.5}, 0.5),
        ({"rank": 3, "alpha": 12, "scale": 0.5}, 2.0),
        ({"rank": 8, "scale": 10}, 10.0),
    ],
)
def test_an_adapter_of_mlx_lm_adds_what_mlx_lm_adds(
    tmp_path: Path, parameters: dict[str, Any], scale: float
) -> None:
    """mlx_lm's LoRALinear: y + scale (x lora_a) lora_b, beside PEFT's model of the export."""
    found = write_mlx(tmp_path / "french", lora_parameters=parameters)
    adapter = open_adapter(tmp_path / "french")
    assert (adapter.name, adapter.base_model) == ("french", "org/base")
    compress({"t": adapter}, tmp_path / "ckpt", CompressOptions(max_error=0.0))
    exported = export_task(Checkpoint.open(tmp_path / "ckpt"), "t", tmp_path / "out")
    expected = make_base()
    with torch.no_grad():
        for name in (Q, DOWN):
            a, b = (found[f"{name}.lora_{side}"].double() for side in "ab")
            expected.get_submodule(name).weight += (scale * a @ b).T.float()
    model = PeftModel.from_pretrained(make_base(), exported).eval()
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensor", "options", "said"),
    [
        (None, {"fine_tune_type": "dora"}, "'dora'"),
        (None, {"fine_tune_type": "full"}, "'full'"),
        (None, {"use_dora": True}, "only mlx-lm's 'lora'"),
        (None, {"lora_parameters": {"rank": 3}}, "no scale"),
        (None, {"lora_parameters": {"scale": "x"}}, "scale of lora_parameters"),
        (None, {"lora_parameters": 3}, "no scale"),
        (f"{Q}.m", {}, "none of LoRA's"),
        ("model.embed_tokens.lora_a", {}, "tied"),
        ("model.layers.0.mlp.switch_mlp.up_proj.lora_a", {}, "experts"),
    ],
)
def test_what_else_mlx_lm_trains_is_refused(
    tmp_path: Path, tensor: str | None, options: dict[str, Any], said: str
) -> None:
    found = write_mlx(tmp_path / "it", **options)
    if tensor is not None:
        more = torch.ones((2, 3, 4) if "switch" in tensor else (4, 3))
        save_file(found | {tensor: more}, tmp_path / "it" / "adapters.safetensors")
    refused(tmp_path / "it", said)


# --- every version of the config ---------------------------------------------------------------------


def set_options(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | options
    (folder / CONFIG).write_text(json.dumps(config))


def test_every_option_of_this_peft_is_known() -> None:
    """Options of a newer PEFT are not, until somebody has read what they do."""
    import dataclasses

    options = {field.name for field in dataclasses.fields(LoraConfig)}
    assert options - _KNOWN_OPTIONS - _REFUSED_OPTIONS.keys() == set()


@pytest.mark.parametrize(
    "option", ["use_mora", "use_newlora", "newlora_config", "use_hydra", "enable_lora"]
)
def test_variants_that_are_not_known_are_refused_where_they_are_set(
    plain: Path, option: str
) -> None:
    for off in (None, False, {}, 0):
        set_options(plain, **{option: off})
        assert open_adapter(plain).warnings == ()
    set_options(plain, **{option: [True]})
    refused(plain, option)


def test_other_options_that_are_not_known_are_said(plain: Path) -> None:
    """PEFT ignores them with a warning too."""
    set_options(plain, lora_nums=3, blc_alpha=0.0, note="x" * 100)
    (warning,) = open_adapter(plain).warnings
    assert "lora_nums=3" in warning
    assert "note=" in warning
    assert "blc_alpha" not in warning
    report = compress({"fr": open_adapter(plain)}, plain.parent / "ckpt", CompressOptions(ratio=1))
    assert report.warnings == [f"'fr': {warning}"]


def test_an_initialisation_that_changed_the_base_is_said(plain: Path) -> None:
    set_options(plain, init_lora_weights="lora_ga")
    (warning,) = open_adapter(plain).warnings
    assert "path_initial_model_for_weight_conversion" in warning
    # PEFT, too, loads it as plain LoRA on the base model as it is.
    model = PeftModel.from_pretrained(make_base(), plain)
    set_options(plain, init_lora_weights=True)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(make_base(), plain)))


def test_a_revision_of_the_base_model_is_said(plain: Path, tmp_path: Path) -> None:
    """PEFT's AutoPeftModel loads the base model at it; here, and in vLLM, nothing does by itself."""
    opened = {}
    named = {"a": "v1.0", "b": "v2.0", "c": "v2.0", "d": "main", "e": None}
    for task, revision in named.items():
        folder = shutil.copytree(plain, tmp_path / task)
        set_options(folder, base_model_name_or_path="org/base", revision=revision)
        opened[task] = open_adapter(folder)
    assert [len(adapter.warnings) for adapter in opened.values()] == [1, 1, 1, 0, 0]
    alike = {task: opened[task] for task in "bc"}
    (warning,) = compress(alike, tmp_path / "alike", CompressOptions(ratio=1)).warnings
    assert warning.startswith("'b', 'c': the base model's revision 'v2.0'")
    assert "--revision" in warning
    report = compress(opened, tmp_path / "all", CompressOptions(ratio=1))
    assert Checkpoint.open(tmp_path / "all").base_model == "org/base"
    different = (
        "different base models: org/base@v1.0 (task 'a'), org/base@v2.0 (task 'b'), org/base "
    )
    assert f"{different}(task 'd')" in report.warnings[0]
    # Of two revisions as well one line says that they differ, also where models are fitted in memory.
    with pytest.warns(UserWarning, match=r"different base models: org/base@v1\.0, org/base@v2\.0"):
        task_arithmetic([opened["a"], opened["b"]])


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 0}, {"lora_alpha": -3}, {"lora_alpha": 2.5},
        {"loftq_config": {"loftq_bits": 4}}, {"megatron_core": "megatron.core"},
        {"inference_mode": True, "revision": "main", "auto_mapping": {"unsloth_fixed": True}},
        {"eva_config": {"rho": 2.0}, "corda_config": None, "qalora_group_size": 32},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_options_that_leave_plain_lora_are_read_as_peft_reads_them(
    plain: Path, options: dict[str, Any]
) -> None:
    set_options(plain, **options)
    adapter = open_adapter(plain)
    model = PeftModel.from_pretrained(make_base(), plain)
    for name, module in adapter.modules.items():
        a, b = adapter.factors(name)
        expected = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(module.scale * b @ a, expected, rtol=1e-5, atol=1e-6)


def add_tensors(folder: Path, **more: torch.Tensor) -> None:
    save_file(load_file(folder / WEIGHTS) | more, folder / WEIGHTS)


def test_saved_modules_that_the_file_lacks(plain: Path) -> None:
    """PEFT cannot load such an adapter into a model that has the module."""
    set_options(plain, modules_to_save=["lm_head", "embed_tokens"])
    with pytest.raises(KeyError):
        PeftModel.from_pretrained(make_base(), plain)
    refused(plain, "lm_head, embed_tokens", "ZeRO-3")
    head = {"base_model.model.lm_head.weight": torch.ones(24, 16)}
    add_tensors(plain, **head)
    (warning,) = open_adapter(plain).warnings
    assert "embed_tokens, which the file lacks" in warning
    # Of a task's heads PEFT lists every name that a model may have.
    set_options(plain, modules_to_save=["classifier", "lm_head"])
    assert open_adapter(plain).warnings == ()


@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_heads_that_were_not_gathered(plain: Path, shape: tuple[int, ...]) -> None:
    set_options(plain, modules_to_save=["lm_head"])
    add_tensors(plain, **{"base_model.model.lm_head.weight": torch.ones(shape)})
    refused(plain, "base_model.model.lm_head.weight", "ZeRO-3")


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_weights_that_are_no_file(plain: Path, kind: str) -> None:
    """What cannot be opened is not called empty or damaged."""
    weights = plain / WEIGHTS
    weights.unlink()
    if kind == "folder":
        weights.mkdir()
    elif kind == "pipe":
        os.mkfifo(weights)
    else:
        weights.symlink_to(weights)
    why = "Too many levels of symbolic links" if kind == "loop" else "not a regular file"
    message = refused(plain, f"{WEIGHTS}: cannot be read: {why}")
    assert "empty" not in message
    assert "Errno" not in message
