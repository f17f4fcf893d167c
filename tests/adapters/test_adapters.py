"""Reading and writing adapters, with PEFT itself as the reference."""

from __future__ import annotations

import json
import math
import os
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_vlora.adapters import peft_config
from vllm_vlora.adapters.peft_config import lora_rank, lora_scale
from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter
from vllm_vlora.errors import AdapterError, OutputError

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base",
}


def plain_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (4, 16), "lora_B": (12, 4)}
    return {
        f"base_model.model.{module}.{side}.weight": torch.randn(shape, generator=generator)
        for module in (Q, V)
        for side, shape in shapes.items()
    }


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(plain_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, *said: str) -> str:
    with pytest.raises(AdapterError) as caught:
        open_adapter(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    for part in said:
        assert part in message
    return message


# --- against PEFT ---------------------------------------------------------------------------

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEARS},
    "one module": {"target_modules": ["v_proj"], "r": 1, "lora_alpha": 3},
    "rslora": {"target_modules": LINEARS, "use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": LINEARS,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 7, r".*\.mlp\..*": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 31, "down_proj": 5},
    },
    "patterns and rslora": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"q_proj": 1},
        "use_rslora": True,
    },
    "embedding and lm_head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "bias without biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "classifier": {
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "SEQ_CLS",
        "modules_to_save": ["score"],
    },
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
}


def base_model(case: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    if case.get("task_type") == "SEQ_CLS":
        config = transformers.LlamaConfig(**TINY, num_labels=3)
        return transformers.LlamaForSequenceClassification(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()


def trained(case: dict[str, Any]) -> torch.nn.Module:
    """A PEFT model in which every adapter weight, lora_B and saved modules too, has moved."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **case})
    model = peft.get_peft_model(base_model(case), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(1, 11).reshape(2, 5)
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


def assert_same_deltas(adapter: Adapter, model: torch.nn.Module) -> None:
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert list(adapter.modules) == sorted(layers)
    for name, layer in layers.items():
        module = adapter.modules[name]
        a, b = adapter.factors(name)
        assert (a.shape, b.shape) == ((module.rank, module.d_in), (module.d_out, module.rank))
        delta = module.scale * (b.double() @ a.double())
        expected = layer.get_delta_weight("default").detach().double()
        if module.kind == "embedding":
            delta = delta.T
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def test_delta_weights_are_those_of_peft(case: dict[str, Any], tmp_path: Path) -> None:
    model = trained(case)
    model.save_pretrained(tmp_path / "adapter")
    assert_same_deltas(open_adapter(tmp_path / "adapter"), model)


def test_a_round_trip_gives_peft_the_same_logits(case: dict[str, Any], tmp_path: Path) -> None:
    model = trained(case)
    model.save_pretrained(tmp_path / "first")
    adapter = open_adapter(tmp_path / "first")
    saved = write_adapter(
        tmp_path / "second",
        adapter.config,
        adapter.iter_factors(),
        {name: module.kind for name, module in adapter.modules.items()},
        adapter.extra_tensors(),
    )
    loaded = peft.PeftModel.from_pretrained(base_model(case), saved).eval()
    assert torch.equal(logits(loaded), logits(model))
    before = load_file(tmp_path / "first" / "adapter_model.safetensors")
    after = load_file(saved / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_embeddings_have_tokens_as_inputs(tmp_path: Path) -> None:
    trained(CASES["embedding and lm_head"]).save_pretrained(tmp_path)
    modules = open_adapter(tmp_path).modules
    embedding, head = modules["model.embed_tokens"], modules["lm_head"]
    assert (embedding.kind, embedding.d_in, embedding.d_out) == ("embedding", 24, 16)
    assert (head.kind, head.d_in, head.d_out) == ("linear", 16, 24)


def test_heads_are_extra_under_their_peft_names(tmp_path: Path) -> None:
    model = trained(CASES["classifier"])
    model.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    key = "base_model.model.score.weight"
    assert adapter.extra == {key: (torch.float32, (3, 16))}
    score = model.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(adapter.extra_tensors()[key], score)


@given(
    name=st.from_regex(r"model\.layers\.[0-9]{1,2}\.(attn|mlp)\.[qkv]_proj", fullmatch=True),
    keys=st.lists(
        st.sampled_from(
            ["q_proj", "k_proj", "proj", "attn.q_proj", r"layers\.1\.mlp\..*", "^model.*v_proj"]
        ),
        unique=True,
    ),
)
def test_patterns_match_as_in_peft(name: str, keys: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    pattern = {key: rank for rank, key in enumerate(keys, start=2)}
    expected = pattern.get(get_pattern_key(pattern.keys(), name), 1)
    assert lora_rank({"r": 1, "rank_pattern": pattern}, name) == expected
    config = {"lora_alpha": 1, "alpha_pattern": pattern}
    assert lora_scale(config, name, 4) == (expected, expected / 4)
    assert lora_scale(config | {"use_rslora": True}, name, 4)[1] == expected / 2


# --- reading ----------------------------------------------------------------------------------


def test_describes_what_it_opened(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path / "french"))
    assert adapter.name == "french"
    assert adapter.base_model == "org/base"
    assert list(adapter.modules) == [Q, V]
    module = adapter.modules[Q]
    assert (module.rank, module.alpha, module.scale) == (4, 8.0, 2.0)
    assert (module.d_in, module.d_out, module.dtype) == (16, 12, torch.float32)
    assert adapter.original_nbytes == 2 * 2 * 4 * (16 + 12)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("suffix", [".weight", ".default.weight", ""])
def test_names_are_normalised(tmp_path: Path, prefix: str, suffix: str) -> None:
    tensors = {
        prefix + key.removeprefix("base_model.model.").removesuffix(".weight") + suffix: tensor
        for key, tensor in plain_tensors().items()
    }
    adapter = open_adapter(write(tmp_path, tensors))
    assert list(adapter.modules) == [Q, V]
    expected = plain_tensors()[f"base_model.model.{Q}.lora_B.weight"]
    assert torch.equal(adapter.factors(Q)[1], expected)


@pytest.mark.parametrize("suffix", ["", ".default", ".default.weight"])
def test_embedding_names_are_normalised(tmp_path: Path, suffix: str) -> None:
    tensors = {
        f"base_model.model.model.embed_tokens.lora_embedding_A{suffix}": torch.ones(4, 24),
        f"base_model.model.model.embed_tokens.lora_embedding_B{suffix}": torch.ones(16, 4),
    }
    written = write(tmp_path, tensors, target_modules=["embed_tokens"])
    (module,) = open_adapter(written).modules.values()
    assert (module.name, module.kind) == ("model.embed_tokens", "embedding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in plain_tensors().items()}
    adapter = open_adapter(write(tmp_path, tensors))
    assert adapter.modules[Q].dtype == dtype
    assert [factor.dtype for factor in adapter.factors(Q)] == [dtype, dtype]


def test_mixed_dtypes_are_described_by_the_type_that_holds_both(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors[f"base_model.model.{Q}.lora_A.weight"] = torch.ones(4, 16, dtype=torch.bfloat16)
    adapter = open_adapter(write(tmp_path, tensors))
    assert adapter.modules[Q].dtype == torch.float32
    assert adapter.factors(Q)[0].dtype == torch.bfloat16


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = plain_tensors()
    tensors[f"base_model.model.{V}.lora_B.weight"][3, 1] = math.nan
    adapter = open_adapter(write(tmp_path, tensors))
    adapter.factors(Q)
    with pytest.raises(AdapterError, match=re.escape(f"{V}.lora_B.weight")):
        adapter.factors(V)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    head = "base_model.model.score.weight"
    tensors = plain_tensors() | {head: torch.tensor([1.0, value])}
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = value
    adapter = open_adapter(write(tmp_path, tensors, modules_to_save=["score"]))
    with pytest.raises(AdapterError, match=re.escape(f"{Q}.lora_A.weight")):
        list(adapter.iter_factors())
    with pytest.raises(AdapterError, match=re.escape(head)):
        adapter.extra_tensors()


def test_an_unknown_module_is_a_key_error(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path))
    with pytest.raises(KeyError):
        adapter.factors("model.layers.9.self_attn.q_proj")


def test_a_file_that_changed_since_it_was_opened(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path))
    halved = {key: tensor[:2].clone() for key, tensor in plain_tensors().items()}
    write(tmp_path, halved)
    with pytest.raises(AdapterError, match="changed"):
        adapter.factors(Q)
    write(tmp_path, {"other": torch.ones(1)})
    with pytest.raises(AdapterError, match=re.escape(Q)):
        adapter.factors(Q)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        adapter.factors(Q)


def test_hundreds_of_open_adapters_hold_no_descriptors(tmp_path: Path) -> None:
    write(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    held = [open_adapter(tmp_path) for _ in range(300)]
    factors = [adapter.factors(Q) for adapter in held]
    assert len(os.listdir("/proc/self/fd")) == before
    assert "adapter_model.safetensors" not in Path("/proc/self/maps").read_text()
    assert len(factors) == 300


def test_base_weights_saved_along_are_extra(tmp_path: Path) -> None:
    extra = {
        "base_model.model.lm_head.weight": torch.ones(24, 16, dtype=torch.float16),
        "base_model.model.model.embed_tokens.base_layer.weight": torch.ones(24, 16),
        "base_model.model.classifier.dense.bias": torch.arange(3),
    }
    adapter = open_adapter(write(tmp_path, plain_tensors() | extra))
    assert list(adapter.modules) == [Q, V]
    assert adapter.extra == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in extra.items()
    }
    assert all(torch.equal(adapter.extra_tensors()[key], extra[key]) for key in extra)


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "peft_type", ["LOHA", "LOKR", "IA3", "ADALORA", "VERA", "OFT", "PROMPT_TUNING", None]
)
def test_other_peft_types(tmp_path: Path, peft_type: str | None) -> None:
    refused(write(tmp_path, peft_type=peft_type), repr(peft_type))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [3]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"num_samples": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_features_without_a_low_rank_form(tmp_path: Path, option: str, value: Any) -> None:
    refused(write(tmp_path, **{option: value}), option)


def test_options_that_are_off_are_accepted(tmp_path: Path) -> None:
    off = dict.fromkeys(peft_config._REFUSED_OPTIONS) | {
        "use_dora": False,
        "init_lora_weights": True,
    }
    nothing = {"rank_pattern": None, "alpha_pattern": {}, "modules_to_save": None, "bias": "none"}
    assert open_adapter(write(tmp_path, **off, **nothing)).modules


def test_loha_and_dora_as_peft_saves_them(tmp_path: Path) -> None:
    case = CASES["one module"]
    loha = peft.get_peft_model(base_model(case), peft.LoHaConfig(target_modules=["v_proj"]))
    loha.save_pretrained(tmp_path / "loha")
    refused(tmp_path / "loha", "LOHA")
    trained(case | {"use_dora": True}).save_pretrained(tmp_path / "dora")
    refused(tmp_path / "dora", "use_dora")


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        ("lora_magnitude_vector", "DoRA"),
        ("lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_B.bias", "bias"),
        ("lora_diag", "no PEFT LoRA tensor"),
        ("lora_down.weight", "no PEFT LoRA tensor"),
        ("lora.up.weight", "no PEFT LoRA tensor"),
        ("lora_A.french.weight", "twice"),
        ("token_adapter.trainable_tokens_delta", "trainable tokens"),
    ],
)
def test_unknown_lora_tensors_are_named(tmp_path: Path, suffix: str, said: str) -> None:
    key = f"base_model.model.{Q}.{suffix}"
    refused(write(tmp_path, plain_tensors() | {key: torch.ones(12)}), repr(key), said)


def test_trained_biases_are_refused_but_not_those_of_a_head(tmp_path: Path) -> None:
    head = {"base_model.model.classifier.out.bias": torch.ones(3)}
    trained_head = write(
        tmp_path, plain_tensors() | head, bias="all", modules_to_save=["classifier"]
    )
    assert list(open_adapter(trained_head).extra) == list(head)
    assert open_adapter(write(tmp_path, plain_tensors() | head, bias="all", task_type="SEQ_CLS"))
    key = f"base_model.model.{Q}.bias"
    biased = plain_tensors() | {key: torch.ones(12)}
    refused(write(tmp_path, biased, bias="all", modules_to_save="classifier"), key, "bias='all'")


def pair(a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{Q}.lora_"
    return {f"{prefix}A.weight": torch.ones(a), f"{prefix}B.weight": torch.ones(b)}


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((4, 16), (12, 5), "ranks differ"),
        ((16, 4), (4, 12), "ranks differ"),
        ((8, 16), (12, 8), "says rank 4"),
        ((4, 3, 3, 3), (8, 4, 1, 1), "convolution"),
        ((4, 16, 3), (8, 4, 1), "convolution"),
        ((64,), (12, 4), "not two matrices"),
        ((0, 16), (12, 0), "not two matrices"),
        ((4, 0), (12, 4), "not two matrices"),
    ],
)
def test_contradicting_shapes(
    tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...], said: str
) -> None:
    refused(write(tmp_path, pair(a, b)), repr(Q), said)


def test_rank_pattern_that_contradicts_the_tensors(tmp_path: Path) -> None:
    refused(write(tmp_path, rank_pattern={"v_proj": 2}), V, "says rank 2")


@pytest.mark.parametrize(("lost", "kept"), [("A", "B"), ("B", "A")])
def test_half_a_module(tmp_path: Path, lost: str, kept: str) -> None:
    tensors = plain_tensors()
    del tensors[f"base_model.model.{V}.lora_{lost}.weight"]
    refused(write(tmp_path, tensors), f"{V!r} has lora_{kept} but no lora_{lost}")


def test_the_same_module_twice(tmp_path: Path) -> None:
    key = f"{Q}.lora_A.weight"
    refused(write(tmp_path, plain_tensors() | {key: torch.ones(4, 16)}), key, "twice")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_unsupported_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    key = f"base_model.model.{Q}.lora_B.weight"
    tensors = plain_tensors()
    tensors[key] = tensors[key].to(dtype)
    refused(write(tmp_path, tensors), key, "float32, float16 or bfloat16")


def test_an_adapter_without_lora_tensors(tmp_path: Path) -> None:
    refused(write(tmp_path, {"base_model.model.score.weight": torch.ones(2)}), "no LoRA tensors")
    refused(write(tmp_path, {}), "no LoRA tensors")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", None),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", "x"),
        ("lora_alpha", math.nan),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj": None}),
        ("rank_pattern", [1]),
        ("rank_pattern", {"(": 4}),
    ],
)
def test_bad_config_values_are_named(tmp_path: Path, option: str, value: Any) -> None:
    refused(write(tmp_path, **{option: value}), option, "adapter_config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"r": 4'])
def test_broken_config_json(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    refused(tmp_path, "adapter_config.json")


def test_config_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    refused(tmp_path, "adapter_config.json")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        open_adapter(tmp_path / "nothing")
    refused(tmp_path, "no adapter_config.json")
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(tmp_path, "no adapter_model.safetensors")
    torch.save(plain_tensors(), tmp_path / "adapter_model.bin")
    refused(tmp_path, "only adapter_model.bin", "pickle", "safe_serialization=True")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_weights(tmp_path: Path, kept: int) -> None:
    file = write(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(tmp_path, "adapter_model.safetensors")


@given(st.data())
def test_damaged_headers_never_escape_as_other_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write(tmp_path_factory.mktemp("damaged"))
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, 400))
    content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    message = ""
    try:
        list(open_adapter(folder).iter_factors())
    except AdapterError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


# --- the Hub ----------------------------------------------------------------------------------


def test_a_hub_id_fetches_only_config_and_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, sorted(allow_patterns)))
        return str(write(tmp_path / "0f3c"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    adapter = open_adapter("org/french-lora@v2")
    ((repo, revision, patterns),) = asked
    assert (repo, revision) == ("org/french-lora", "v2")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(patterns)
    pickled = (".bin", ".pt", ".pth", ".pkl", "*")
    assert not [pattern for pattern in patterns if pattern.endswith(pickled)]
    assert adapter.name == "french-lora"
    assert list(adapter.modules) == [Q, V]


# --- writing ----------------------------------------------------------------------------------


def ones(rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(rank, 16), torch.ones(12, rank)


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kinds=st.lists(st.sampled_from(["linear", "embedding"]), min_size=4, max_size=4),
    rslora=st.booleans(),
)
def test_what_is_saved_is_what_is_opened(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: list[int],
    dtype: torch.dtype,
    kinds: list[str],
    rslora: bool,
) -> None:
    names = [f"model.{letter}" for letter in string.ascii_lowercase[: len(ranks)]]
    factors = {
        name: (torch.randn(rank, 5).to(dtype), torch.randn(7, rank).to(dtype))
        for name, rank in zip(names, ranks, strict=True)
    }
    config = CONFIG | {
        "rank_pattern": dict(zip(names, ranks, strict=True)),
        "target_modules": names,
        "use_rslora": rslora,
    }
    out = tmp_path_factory.mktemp("saved") / "adapter"
    write_adapter(out, config, factors, dict(zip(names, kinds, strict=False)))
    adapter = open_adapter(out)
    assert adapter.config == config
    assert list(adapter.modules) == names
    for name, rank, kind in zip(names, ranks, kinds, strict=False):
        module = adapter.modules[name]
        assert (module.rank, module.kind, module.dtype) == (rank, kind, dtype)
        assert module.scale == pytest.approx(8 / (math.sqrt(rank) if rslora else rank))
        for saved, given_factor in zip(adapter.factors(name), factors[name], strict=True):
            assert torch.equal(saved, given_factor)


def test_factors_that_are_views_of_shared_memory(tmp_path: Path) -> None:
    basis = torch.randn(16, 8)
    a, b = basis.T[:4], basis[:12, 4:]
    write_adapter(tmp_path / "out", CONFIG, {Q: (a, b), V: (a, b)})
    adapter = open_adapter(tmp_path / "out")
    for name in (Q, V):
        assert torch.equal(adapter.factors(name)[0], a)
        assert torch.equal(adapter.factors(name)[1], b)


def test_the_order_of_patterns_survives(tmp_path: Path) -> None:
    pattern = {"v_proj": 2, "self_attn.v_proj": 9, "a": 1}
    write_adapter(tmp_path / "out", CONFIG | {"rank_pattern": pattern}, {Q: ones(), V: ones(2)})
    adapter = open_adapter(tmp_path / "out")
    assert list(adapter.config["rank_pattern"]) == list(pattern)
    assert list(adapter.config) == sorted(adapter.config)


@pytest.mark.parametrize(
    ("factors", "config", "said"),
    [
        ({}, {}, "no modules"),
        ({Q: ones(3)}, {}, "says rank 4"),
        ({Q: (torch.ones(4, 16), torch.ones(12, 3))}, {}, "ranks differ"),
        ({Q: (torch.full((4, 16), math.nan), torch.ones(12, 4))}, {}, f"{Q}.lora_A.weight"),
        ({Q: (torch.ones(4, 16).double(), torch.ones(12, 4))}, {}, "torch.float64"),
        ([(Q, ones()), (Q, ones())], {}, "twice"),
        ({Q: ones()}, {"peft_type": "LOHA"}, "LOHA"),
        ({Q: ones()}, {"use_dora": True}, "use_dora"),
    ],
)
def test_nothing_contradictory_is_written(
    tmp_path: Path, factors: Any, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdapterError, match=re.escape(said)):
        write_adapter(tmp_path / "out", CONFIG | config, factors)
    assert os.listdir(tmp_path) == []


def test_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'conv'"):
        write_adapter(tmp_path / "out", CONFIG, {Q: ones()}, {Q: "conv"})


def add_readme(folder: Path) -> None:
    (folder / "README.md").write_text("card")


def add_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"state")


def remove_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "force", "replaced"),
    [
        (add_readme, True, True),
        (add_readme, False, False),
        (add_optimizer, True, False),
        (remove_config, True, False),
    ],
)
def test_which_folders_are_replaced(
    tmp_path: Path, change: Callable[[Path], None], force: bool, replaced: bool
) -> None:
    out = write_adapter(tmp_path / "out", CONFIG, {Q: ones()})
    change(out)
    before = sorted(os.listdir(out))
    if replaced:
        write_adapter(out, CONFIG, {V: ones()}, force=force)
        assert list(open_adapter(out).modules) == [V]
    else:
        with pytest.raises(OutputError, match="out"):
            write_adapter(out, CONFIG, {V: ones()}, force=force)
        assert sorted(os.listdir(out)) == before
