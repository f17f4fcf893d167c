"""A task taken out of a checkpoint is a PEFT folder that PEFT and stock vLLM load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter
from vllm_vlora.checkpoint.export import ConfigChanges, export_all, export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.serving import VLLM_LORA_RANKS
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import CheckpointError, OptionError, OutputError, TaskNotFoundError
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.factors import balanced_svd
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.stored import Basis, StoredModule
from vllm_vlora.task_ids import encode_task_id

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        num_labels=3,
        pad_token_id=0,
    )


def make_base(kind: type[Any] = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return kind(tiny_config()).eval()


def make_adapter(folder: Path, seed: int = 1, kind: type[Any] = LlamaForCausalLM, **options: Any):
    """Save a PEFT adapter with random factors and return it opened."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "SEQ_CLS" if kind is LlamaForSequenceClassification else "CAUSAL_LM",
    }
    model = get_peft_model(make_base(kind), LoraConfig(**(settings | options)))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return open_adapter(folder)


def store(
    folder: Path,
    tasks: Mapping[str, tuple[Adapter, Mapping[str, StoredModule]]],
    bases: Mapping[str, Basis] | None = None,
) -> Checkpoint:
    folder.mkdir()
    writer = CheckpointWriter(folder, "org/base")
    declared = {m.name: m for adapter, _ in tasks.values() for m in adapter.modules.values()}
    for module in declared.values():
        basis = (bases or {}).get(module.name)
        writer.add_module(module.name, module.d_in, module.d_out, module.kind, basis)
    for task_id, (adapter, modules) in tasks.items():
        writer.add_task(
            task_id,
            modules,
            original_nbytes=adapter.original_nbytes,
            error=0.0,
            adapter_config=adapter.config,
            extra=adapter.extra_tensors(),
        )
    writer.finish("")
    return Checkpoint.open(folder)


def keep(adapter: Adapter) -> dict[str, StoredModule]:
    """Every module as it is, in its own dtype."""
    formats = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return {
        name: encode_private(*adapter.factors(name), module.scale, formats[module.dtype])
        for name, module in adapter.modules.items()
    }


def truncate(adapter: Adapter, ranks: Mapping[str, int], format: str) -> dict[str, StoredModule]:
    """Rank by the end of a module's name; others keep their own factors."""
    modules = {}
    for name, module in adapter.modules.items():
        a, b = adapter.factors(name)
        rank = next((r for end, r in ranks.items() if name.endswith(end)), None)
        if rank is None:
            modules[name] = encode_private(a, b, module.scale, format)
        else:
            a, b, _ = balanced_svd(a, b, module.scale)
            modules[name] = encode_private(a[:rank], b[:, :rank], 1.0, format)
    return modules


def make_bases(adapter: Adapter) -> dict[str, Basis]:
    """Bases that hold the adapter's own row and column spaces, so a joint core loses nothing."""
    bases = {}
    for name in adapter.modules:
        a, b = adapter.factors(name)
        u, v = torch.linalg.qr(b)[0].T, torch.linalg.qr(a.T)[0].T
        bases[name] = Basis(pack(u.contiguous(), "float32"), pack(v.contiguous(), "float32"))
    return bases


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 7]])).logits


def load(folder: Path, kind: type[Any] = LlamaForCausalLM) -> Any:
    """Load with PEFT; every tensor of the file must find its place and none may be missing."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(make_base(kind), folder)
    return model.eval()


def assert_peft_computes_what_is_stored(folder: Path, checkpoint: Checkpoint, task: str) -> None:
    stored, bases = checkpoint.load_task(task).modules, dict(checkpoint.bases())
    got = deltas(load(folder))
    assert got.keys() == stored.keys()
    for name, module in stored.items():
        a, b = decode(module, bases.get(name))
        want = (b @ a).T if "embed_tokens" in name else b @ a
        error = (got[name] - want).norm() / want.norm()
        assert error < (5e-3 if module.format != "float32" else 1e-6)


# --- kept as it was ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 6},
        {
            "target_modules": r".*layers\.1\.(self_attn\.q_proj|mlp\.up_proj)",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "layers_to_transform": None},
    ],
)
def test_an_untouched_task_comes_back_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = make_adapter(tmp_path / "original", **options)
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, keep(adapter))})
    folder = export_task(checkpoint, "t", tmp_path / "out")
    original, got = (load_file(path / WEIGHTS) for path in (tmp_path / "original", folder))
    assert got.keys() == original.keys()
    for name, tensor in original.items():
        assert tensor.dtype == got[name].dtype
        assert torch.equal(tensor, got[name]), name
    assert open_adapter(folder).config == adapter.config
    assert torch.equal(logits(load(folder)), logits(load(tmp_path / "original")))


def test_a_classifier_head_travels_with_its_task(tmp_path: Path) -> None:
    kind = LlamaForSequenceClassification
    adapter = make_adapter(tmp_path / "original", kind=kind, modules_to_save=["score"])
    assert adapter.extra
    checkpoint = store(
        tmp_path / "ckpt",
        {"exact": (adapter, keep(adapter)), "cut": (adapter, truncate(adapter, {"": 2}, "nf4"))},
    )
    want = load(tmp_path / "original", kind)
    exact = load(export_task(checkpoint, "exact", tmp_path / "exact"), kind)
    assert torch.equal(logits(exact), logits(want))
    cut_folder = export_task(checkpoint, "cut", tmp_path / "cut")
    assert open_adapter(cut_folder).config["modules_to_save"] == adapter.config["modules_to_save"]
    cut = load(cut_folder, kind)
    head = "base_model.model.score.modules_to_save.default.weight"
    assert torch.equal(cut.state_dict()[head], want.state_dict()[head])
    assert not torch.equal(logits(cut), logits(want))


# --- decoded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "nf4", "nf4-dq"])
def test_mixed_ranks_and_scales_compute_what_is_stored(tmp_path: Path, format: str) -> None:
    adapter = make_adapter(tmp_path / "original", alpha_pattern={"down_proj": 5})
    modules = truncate(adapter, {"layers.0.self_attn.q_proj": 2, "v_proj": 1}, format)
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, modules)})
    folder = export_task(checkpoint, "t", tmp_path / "out")
    config = json.loads((folder / CONFIG).read_text())
    assert config["r"] == 4
    assert config["rank_pattern"] == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.self_attn.v_proj": 1,
        "model.layers.1.self_attn.v_proj": 1,
    }
    assert config["base_model_name_or_path"] == "org/base"
    assert config["task_type"] == "CAUSAL_LM"
    # One scale for all: what a reader computes that knows r and lora_alpha only.
    ranks = {**dict.fromkeys(modules, 4), **config["rank_pattern"]}
    alphas = {**dict.fromkeys(modules, config["lora_alpha"]), **config["alpha_pattern"]}
    assert {alphas[name] / ranks[name] for name in modules} == {config["lora_alpha"] / config["r"]}
    # What quantised factors decode to is rounded no further, nor what takes another scale.
    expected = {torch.float32, torch.bfloat16} if format == "bfloat16" else {torch.float32}
    assert {t.dtype for t in load_file(folder / WEIGHTS).values()} == expected
    assert_peft_computes_what_is_stored(folder, checkpoint, "t")


def test_the_stored_scale_stays_in_alpha(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "original", r=3, lora_alpha=5)
    modules = {
        name: encode_private(*adapter.factors(name), module.scale, "int8")
        for name, module in adapter.modules.items()
    }
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, modules)})
    folder = export_task(checkpoint, "t", tmp_path / "out", dtype=torch.float32)
    config = open_adapter(folder).config
    assert (config["lora_alpha"], config["r"]) == (5, 3)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    exported = open_adapter(folder)
    for name, stored in checkpoint.load_task("t").modules.items():
        a, b = exported.factors(name)
        assert torch.equal(a, unpack(stored.matrices["A"]))
        assert torch.equal(b.T, unpack(stored.matrices["B"]))


def test_changes_of_the_config_leave_what_the_task_computes(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", r=4, lora_alpha=8)
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, keep(adapter))})
    changes = ConfigChanges(32, "org/other", ("q_proj", "v_proj", "down_proj"))
    folder = export_task(checkpoint, "t", tmp_path / "out", changes=changes)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["lora_alpha"], config["r"]) == (32, 4)
    assert config["base_model_name_or_path"] == "org/other"
    assert config["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    assert_peft_computes_what_is_stored(folder, checkpoint, "t")
    changed = ConfigChanges(target_modules=("q_proj", "v_proj"))
    with pytest.raises(OptionError, match="down_proj, which none"):
        export_task(checkpoint, "t", tmp_path / "never", changes=changed)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": 0.0}, {"alpha": float("nan")}, {"target_modules": ()}, {"target_modules": ("",)}],
)
def test_changes_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ConfigChanges(**wrong)


def test_joint_tasks_and_only_the_adapted_modules(tmp_path: Path) -> None:
    """layers_to_transform and a suffix list: only full names say which modules these are."""
    adapter = make_adapter(
        tmp_path / "original", layers_to_transform=[1], layers_pattern="layers", use_rslora=True
    )
    bases = make_bases(adapter)
    modules = {
        name: encode_joint(
            *adapter.factors(name),
            module.scale,
            unpack(bases[name].u),
            unpack(bases[name].v),
            "float32",
        )
        for name, module in adapter.modules.items()
    }
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, modules)}, bases)
    folder = export_task(checkpoint, "t", tmp_path / "out")
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == sorted(adapter.modules)
    assert config["layers_to_transform"] is None
    assert config["use_rslora"] is False
    assert_peft_computes_what_is_stored(folder, checkpoint, "t")
    torch.testing.assert_close(
        logits(load(folder)), logits(load(tmp_path / "original")), rtol=1e-4, atol=1e-4
    )


def test_embeddings_and_lm_head(tmp_path: Path) -> None:
    adapter = make_adapter(
        tmp_path / "original", target_modules=["embed_tokens", "lm_head", "q_proj"]
    )
    assert {m.kind for m in adapter.modules.values()} == {"linear", "embedding"}
    modules = truncate(adapter, {"embed_tokens": 2, "lm_head": 3}, "float32")
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, modules)})
    folder = export_task(checkpoint, "t", tmp_path / "out")
    assert_peft_computes_what_is_stored(folder, checkpoint, "t")


@pytest.mark.parametrize("init", ["orthogonal", "eva", "mica", "gaussian"])
def test_how_training_began_is_not_asked_of_other_ranks(tmp_path: Path, init: str) -> None:
    """PEFT's orthogonal factors need an even rank, so a config that asks for them could not load."""
    adapter = make_adapter(tmp_path / "original", bias="lora_only")
    options = adapter.config | {"init_lora_weights": init}
    (tmp_path / "original" / CONFIG).write_text(json.dumps(options))
    adapter = open_adapter(tmp_path / "original")
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, truncate(adapter, {"": 3}, "float32"))})
    folder = export_task(checkpoint, "t", tmp_path / "out")
    assert_peft_computes_what_is_stored(folder, checkpoint, "t")
    assert open_adapter(folder).config["bias"] == "none"


def test_a_module_whose_name_ends_another_ones_gets_its_own_rank(tmp_path: Path) -> None:
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(6, 6)
            self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6)})
            self.other = torch.nn.Linear(6, 6)

    for case, ranks in enumerate([{"proj": 1, "inner.proj": 2}, {"proj": 2, "inner.proj": 3}]):
        writer_ranks = {**ranks, "other": 2}
        writer = CheckpointWriter(tmp_path / f"c{case}", None)
        writer.folder.mkdir()
        modules = {}
        for name, rank in writer_ranks.items():
            writer.add_module(name, 6, 6)
            modules[name] = encode_private(torch.ones(rank, 6), torch.ones(6, rank), 1.0, "int8")
        writer.add_task("t", modules, original_nbytes=1, error=0.0, adapter_config={})
        writer.finish("")
        folder = export_task(Checkpoint.open(writer.folder), "t", tmp_path / f"o{case}")
        model = PeftModel.from_pretrained(Nested(), folder)
        for name, rank in writer_ranks.items():
            delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
            torch.testing.assert_close(delta, torch.full((6, 6), float(rank)))


def test_values_that_do_not_fit_a_dtype_are_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "original")
    big = {
        name: encode_private(a * 1e4, b * 1e4, 1.0, "float32")
        for name, (a, b) in adapter.iter_factors()
    }
    big = {n: StoredModule("private", "float32", m.rank, m.matrices, 3.0) for n, m in big.items()}
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, big)})
    export_task(checkpoint, "t", tmp_path / "out")
    huge = {
        name: encode_private(a * 1e6, b, 3.0, "float32") for name, (a, b) in adapter.iter_factors()
    }
    checkpoint = store(tmp_path / "huge", {"t": (adapter, huge)})
    with pytest.raises(CheckpointError, match=r"do not fit torch\.float16"):
        export_task(checkpoint, "t", tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


# --- many tasks, and what stands in the way ------------------------------------------------------


def test_export_all_writes_a_folder_for_each_task(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "original")
    ids = ["a/b", "a_b", "../../etc/x", "Ünïcode", "A", "a", "con", "x" * 256]
    checkpoint = store(tmp_path / "ckpt", {task: (adapter, keep(adapter)) for task in ids})
    calls: list[tuple[str, int, int]] = []
    folders = export_all(
        checkpoint, ids, tmp_path / "out", progress=lambda *args: calls.append(args)
    )
    assert list(folders) == ids
    assert {p.name for p in (tmp_path / "out").iterdir()} == {encode_task_id(t) for t in ids}
    for task, folder in folders.items():
        assert folder == tmp_path / "out" / encode_task_id(task)
        assert open_adapter(folder).config == adapter.config
    assert calls == [(task, i, len(ids)) for i, task in enumerate(ids, 1)]


def test_nothing_is_written_where_something_is_in_the_way(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "original")
    checkpoint = store(tmp_path / "ckpt", {t: (adapter, keep(adapter)) for t in ("a", "b")})
    own = tmp_path / "out" / "b"
    own.mkdir(parents=True)
    (own / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        export_all(checkpoint, ["a", "b"], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    for force in (False, True):
        with pytest.raises(OutputError):
            export_task(checkpoint, "a", own, force=force)
    assert (own / "notes.txt").read_text() == "mine"
    export_task(checkpoint, "a", tmp_path / "again")
    with pytest.raises(OutputError):
        export_task(checkpoint, "b", tmp_path / "again")
    export_task(checkpoint, "b", tmp_path / "again", force=True)
    with pytest.raises(TaskNotFoundError):
        export_all(checkpoint, ["a", "nope"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_interrupt_says_how_many_tasks_were_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(tmp_path / "original")
    checkpoint = store(tmp_path / "ckpt", {task: (adapter, keep(adapter)) for task in "abc"})

    def interrupt(task: str, done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_all(checkpoint, "abc", tmp_path / "out", progress=interrupt)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert "written before that and kept: 2 of 3 tasks" in caplog.text


def test_a_failure_says_how_many_tasks_were_written(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "original")
    checkpoint = store(tmp_path / "ckpt", {task: (adapter, keep(adapter)) for task in "abc"})
    (tmp_path / "ckpt" / checkpoint.record("c").file).write_bytes(b"")
    with pytest.raises(CheckpointError, match="written before that and kept: 2 of 3 tasks"):
        export_all(checkpoint, "abc", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_a_damaged_task_leaves_no_folder(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "original")
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, keep(adapter))})
    path = tmp_path / "ckpt" / checkpoint.record("t").file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        export_task(checkpoint, "t", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_describes_nothing_is_written_anew(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "original")
    adapter.config.clear()
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, keep(adapter))})
    folder = export_task(checkpoint, "t", tmp_path / "out")
    assert torch.equal(logits(load(folder)), logits(load(tmp_path / "original")))


@pytest.mark.parametrize(
    "config",
    [{"r": "4", "lora_alpha": 8}, {"r": 4, "lora_alpha": 8, "rank_pattern": ["q_proj"]}],
)
def test_a_config_of_other_types_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = make_adapter(tmp_path / "original")
    adapter.config.clear()
    adapter.config.update(config)
    with pytest.raises(CheckpointError, match=r"task 't', adapter_config: (r|rank_pattern) is"):
        store(tmp_path / "ckpt", {"t": (adapter, keep(adapter))})


# --- stock vLLM ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaForSequenceClassification])
def test_stock_vllm_loads_the_folder_and_computes_what_is_stored(
    tmp_path: Path, kind: type[Any], exact: bool
) -> None:
    pytest.importorskip("vllm")
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    assert get_args(MaxLoRARanks) == VLLM_LORA_RANKS
    head = {"modules_to_save": ["score"]} if kind is LlamaForSequenceClassification else {}
    adapter = make_adapter(
        tmp_path / "original", kind=kind, alpha_pattern={} if exact else {"v_proj": 3}, **head
    )
    modules = keep(adapter) if exact else truncate(adapter, {"q_proj": 2}, "float32")
    checkpoint = store(tmp_path / "ckpt", {"t": (adapter, modules)})
    folder = export_task(checkpoint, "t", tmp_path / "out")
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=32)
    helper.validate_legal(LoRAConfig(max_lora_rank=8, max_loras=1))
    model = LoRAModel.from_local_checkpoint(
        str(folder),
        {name.rsplit(".", 1)[-1] for name in adapter.modules},
        helper,
        device="cpu",
        dtype=torch.float32,
    )
    assert model.loras.keys() == modules.keys()
    for name, lora in model.loras.items():
        a, b = decode(modules[name], None)
        assert lora.rank == modules[name].rank
        # What every version of vLLM computes, also those that know lora_alpha / r only.
        for scale in (lora.scaling, helper.vllm_lora_scaling_factor):
            torch.testing.assert_close(scale * lora.lora_b @ lora.lora_a, b @ a)
