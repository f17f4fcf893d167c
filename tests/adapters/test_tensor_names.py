"""Names that training left in a file: one meaning is read, any other refused. PEFT has the last word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.adapters.peft_targets import selects
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
HEAD = f"{PREFIX}score"


def make_base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with an embedding, ranks of its own and a head, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("plain")
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "embed_tokens"],
        task_type="SEQ_CLS", rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3},
    )  # fmt: skip
    model = get_peft_model(make_base(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(make_base(), folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 7]])).logits


def renamed(plain: Path, folder: Path, rename: Callable[[str], str], **config: Any) -> Path:
    folder.mkdir()
    tensors = load_file(plain / WEIGHTS)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    options = json.loads((plain / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(options))
    return folder


def in_layers(wrapper: str) -> Callable[[str], str]:
    return lambda key: key.replace("layers.0.", f"layers.0.{wrapper}.").replace(
        "layers.1.", f"layers.1.{wrapper}."
    )


def named(adapter: str) -> Callable[[str], str]:
    """As a model's state dict has them: the adapter's name in every one."""

    def rename(key: str) -> str:
        for side in ("lora_embedding_A", "lora_embedding_B", "lora_A", "lora_B"):
            key = key.replace(f".{side}", f".{side}.{adapter}")
        return key.replace(HEAD, f"{HEAD}.modules_to_save.{adapter}")

    return rename


WRAPPERS: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled base": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled layers": in_layers("_orig_mod"),
    "DDP": lambda key: f"module.{key}",
    "DDP base": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "DDP of compiled": lambda key: f"module._orig_mod.{key}",
    "FSDP": lambda key: f"_fsdp_wrapped_module.{in_layers('_fsdp_wrapped_module')(key)}",
    "old FSDP": in_layers("_fpw_module"),
    "activation checkpoints": in_layers("_checkpoint_wrapped_module"),
    "all of them": lambda key: "module._orig_mod." + in_layers("_fsdp_wrapped_module._orig_mod")(key),
    "twice": lambda key: PREFIX + key,
    "default": named("default"),
    "an adapter's name": named("my_adapter"),
    "compiled and named": lambda key: f"_orig_mod.{named('fr')(key)}",
    "no prefix": lambda key: key.removeprefix(PREFIX),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_training_wrapped_around_a_name_is_taken_off(
    plain: Path, tmp_path: Path, wrapper: str
) -> None:
    expected = open_adapter(plain)
    adapter = open_adapter(renamed(plain, tmp_path / "wrapped", WRAPPERS[wrapper]))
    assert adapter.modules == expected.modules
    assert adapter.extra == expected.extra
    compress({"task": adapter}, tmp_path / "ckpt", CompressOptions(max_error=0.0))
    exported = export_task(Checkpoint.open(tmp_path / "ckpt"), "task", tmp_path / "out")
    before, after = load_file(plain / WEIGHTS), load_file(exported / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if wrapper == "compiled":
        assert torch.equal(logits(exported), logits(plain))


def test_tensors_beside_a_saved_module_keep_names_of_their_own(plain: Path, tmp_path: Path) -> None:
    """Of a resized vocabulary PEFT writes the base model's copy, and the trained one a second time."""
    folder = renamed(plain, tmp_path / "state", named("default"))
    more = {f"{HEAD}.{name}.weight" for name in ("original_module", "modules_to_save")}
    tensors = load_file(folder / WEIGHTS) | {name: torch.ones(3, 16) for name in more}
    save_file(tensors, folder / WEIGHTS)
    assert open_adapter(folder).extra.keys() == open_adapter(plain).extra.keys() | more


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(AdapterError) as caught:
        open_adapter(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in (str(folder), *said):
        assert part in message


def test_two_adapters_in_a_file_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path / "both", named("fr"))
    other = {named("de")(k): t for k, t in load_file(plain / WEIGHTS).items() if "layers.0" in k}
    # In other layers, so that no name is there twice.
    other = {key.replace("layers.0", "layers.9"): tensor for key, tensor in other.items()}
    save_file(load_file(folder / WEIGHTS) | other, folder / WEIGHTS)
    refused(folder, "'fr'", "'de'", "save_pretrained")


def test_a_name_that_becomes_another_one_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path / "twice", lambda key: key)
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    save_file(tensors | {f"module.{key}": tensors[key].clone()}, folder / WEIGHTS)
    refused(folder, "twice", f"module.{key}")


def test_patterns_that_know_a_module_by_either_name(plain: Path, tmp_path: Path) -> None:
    """The patterns that PEFT was given may stand for the wrapped names; they must not differ."""
    wrapped = renamed(
        plain, tmp_path / "a", WRAPPERS["compiled base"],
        alpha_pattern={"^_orig_mod.model.layers.0.self_attn.q_proj": 31},
    )  # fmt: skip
    refused(wrapped, "alpha_pattern", "_orig_mod.model.layers.0.self_attn.q_proj")
    pattern = r"_orig_mod\.model\.(layers\..*(q_proj|down_proj)|embed_tokens)"
    adapter = open_adapter(
        renamed(plain, tmp_path / "b", WRAPPERS["compiled base"], target_modules=pattern)
    )
    assert adapter.modules == open_adapter(plain).modules
    compress({"task": adapter}, tmp_path / "ckpt", CompressOptions(max_error=0.0))
    exported = export_task(Checkpoint.open(tmp_path / "ckpt"), "task", tmp_path / "out")
    assert torch.equal(logits(exported), logits(plain))


# --- which modules a config selects ----------------------------------------------------------------

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.1.mlp.experts.3.gate_proj",
    "transformer.h.1.attn.c_attn",
    "model.embed_tokens",
    "lm_head",
    "score",
    "q_proj",
    "xq_proj",
    "model.vision.blocks.2.q_proj",
    "layers.0.mlp.layers.5.q_proj",
    "model.layers.0.mlp.layers.5.q_proj",
    "model.h.2.layers.1.q_proj",
]
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["self_attn.q_proj", "experts.3.gate_proj"]},
    {"target_modules": []},
    {"target_modules": [*NAMES]},
    {"target_modules": r".*\.(q_proj|gate_proj)"},
    {"target_modules": "q_proj"},
    {"target_modules": r"(model\.)?layers.*"},
    {"target_modules": ["q_proj", "c_attn", "gate_proj", *NAMES[:1]], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": 1, "layers_pattern": "h"},
    {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1, 3],
     "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 5], "layers_pattern": "model.layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": 5, "layers_pattern": ["layers", "h"]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": []},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r".*vision.*"},
    {"target_modules": [*NAMES], "modules_to_save": ["lm_head", "score", "mlp"]},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_modules_are_selected_as_in_peft(config: dict[str, Any]) -> None:
    options = LoraConfig(**config)
    for name in NAMES:
        found = check_target_module_exists(options, name)
        expected = bool(found) and not isinstance(found, _ExcludedModule)
        assert selects(config, name) is expected, name


@pytest.mark.parametrize("targets", [None, "all-linear", "ALL-linear", ["all-linear"]])
def test_what_the_model_alone_knows_is_left_open(targets: Any) -> None:
    config = {"target_modules": targets}
    assert selects(config, "model.layers.0.q_proj") is None
    if targets is not None:
        assert selects(config, "lm_head") is False
        assert selects(config, "model.embed_tokens", "embedding") is False


def test_the_models_own_targets_are_in_the_layers_that_are_named() -> None:
    """PEFT looks up which modules it adapts in a Llama, and ``layers_to_transform`` counts among them."""
    options: dict[str, Any] = {"target_modules": None, "layers_to_transform": [0]}
    model = get_peft_model(make_base(), LoraConfig(**options))
    modules = dict(model.base_model.model.named_modules())
    for name in [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]:
        adapted = hasattr(modules[name], "lora_A")
        assert selects(options, name) is (None if adapted else False), name


@pytest.mark.parametrize("targets", [["lm_head"], r".*(wte|lm_head)", ["wte", "c_attn"]])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_layers_are_selected_where_peft_loads_them(
    tmp_path: Path, targets: Any, tied: bool
) -> None:
    """PEFT saves ["transformer.wte"] for the first, and in loading takes that for no embedding."""
    base = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 24, "n_positions": 8}
    config = GPT2Config(**base, tie_word_embeddings=tied)
    options = {"target_modules": targets, "ensure_weight_tying": True, "fan_in_fan_out": True}
    folder = tmp_path / "saved"
    get_peft_model(GPT2LMHeadModel(config), LoraConfig(**options)).save_pretrained(folder)
    written = load_file(folder / WEIGHTS)

    def loaded() -> set[str]:
        model = PeftModel.from_pretrained(GPT2LMHeadModel(config), folder).base_model.model
        layers = model.named_modules()
        return {name for name, layer in layers if getattr(layer, "r", {}).get("default")}

    saved = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in written if ".lora_" in key}
    if loaded() < saved:
        assert (targets, tied) == (["lm_head"], True)
        refused(folder, "lm_head", "target_modules", "name them there")
        stated = json.loads((folder / CONFIG).read_text()) | {"target_modules": ["wte", "lm_head"]}
        (folder / CONFIG).write_text(json.dumps(stated))
    assert set(open_adapter(folder).modules) == loaded() == saved


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"exclude_modules": ["down_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear"},
    ],
)
def test_modules_that_peft_would_leave_out_are_refused(
    plain: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """PEFT drops their tensors without a word, and vLLM does not: such a file has two meanings."""
    folder = renamed(plain, tmp_path / "fewer", lambda key: key, **options)
    left_out = [name for name in open_adapter(plain).modules if not _in_peft(folder, name)]
    refused(folder, left_out[0], "target_modules")
    adapter = open_adapter(plain)
    with pytest.raises(AdapterError, match="target_modules"):
        write_adapter(
            tmp_path / "out", adapter.config | options, adapter.iter_factors(),
            {"model.embed_tokens": "embedding"},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def _in_peft(folder: Path, name: str) -> bool:
    model = PeftModel.from_pretrained(make_base(), folder)
    return hasattr(model.base_model.model.get_submodule(name), "lora_A")


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_targets_that_are_open_are_written_out(
    plain: Path, tmp_path: Path, targets: str | None
) -> None:
    folder = tmp_path / "open"
    renamed(plain, folder, lambda key: key)
    linears = {k: t for k, t in load_file(plain / WEIGHTS).items() if "embedding" not in k}
    save_file(linears, folder / WEIGHTS)
    expected = logits(folder)
    options = json.loads((folder / CONFIG).read_text()) | {"target_modules": targets}
    (folder / CONFIG).write_text(json.dumps(options))
    compress({"t": open_adapter(folder)}, tmp_path / "ckpt", CompressOptions(max_error=0.0))
    exported = export_task(Checkpoint.open(tmp_path / "ckpt"), "t", tmp_path / "out")
    assert open_adapter(exported).config["target_modules"] == sorted(open_adapter(exported).modules)
    assert torch.equal(logits(exported), expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [("target_modules", "("), ("target_modules", {"q_proj": 1}), ("exclude_modules", "*"),
     ("layers_pattern", "(")],
)  # fmt: skip
def test_targets_that_are_no_pattern_are_named(
    plain: Path, tmp_path: Path, option: str, value: Any
) -> None:
    folder = renamed(
        plain, tmp_path / "wrong", lambda key: key, layers_to_transform=[0], **{option: value}
    )
    refused(folder, option, CONFIG)
