"""Embeddings and heads that a task brings whole, on tied and untied models: what PEFT computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from saved_modules import cases, load_model, peft_logits, write_model, write_saved_adapter
from tiny_adapters import TinyModel, tiny_adapters

from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.errors import AdapterError, ModelMismatchError, OptionError
from vllm_vlora.model.heads import HeadSwitch
from vllm_vlora.model.operation_times import time_operations
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.subspace.shared import SharedSubspace

IDS = torch.tensor([[3, 7, 39, 1, 20], [5, 5, 30, 2, 11]])


@dataclass(frozen=True)
class World:
    """A model, its adapters by the name of their case, one checkpoint of all, and PEFT's logits."""

    model: Path
    adapters: dict[str, Path]
    checkpoint: Checkpoint
    logits: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["llama-tied", "llama-untied", "gpt2-tied", "gemma-tied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    arch, _, tied = request.param.partition("-")
    root = tmp_path_factory.mktemp(request.param)
    model = write_model(root / "model", arch, tied=tied == "tied")
    adapters, logits = {}, {}
    for seed, (name, options) in enumerate(cases(arch).items()):
        adapters[name] = write_saved_adapter(model, arch, root / "adapters" / name, options, seed)
        more = options.get("more_tokens", 0)
        logits[name] = peft_logits(model, adapters[name], IDS, more)
    opened = {name: open_adapter(folder) for name, folder in adapters.items()}
    compress(opened, root / "ckpt", CompressOptions(representation="private", max_error=0.0))
    with torch.no_grad():
        logits["base"] = load_model(model)(IDS).logits
    return World(model, adapters, Checkpoint.open(root / "ckpt"), logits)


@torch.no_grad()
def test_a_task_with_saved_modules_computes_what_peft_does(world: World) -> None:
    base = load_model(world.model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    shared = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    model = VLoRAModel(base, world.checkpoint)
    wrong: dict[str, Any] = {}
    for name in [*world.adapters, *reversed(world.adapters)]:
        model.set_task(name)
        wanted = world.logits[name]
        got = model(IDS).logits
        if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-4, atol=1e-4):
            wrong[name] = (
                float((got - wanted).abs().max()) if got.shape == wanted.shape else tuple(got.shape)
            )
    assert not wrong
    model.clear_task()
    assert torch.equal(model(IDS).logits, world.logits["base"])
    assert model.unload() is base
    assert {n for n, t in base.state_dict().items() if not torch.equal(t, before[n])} == set()
    assert shared == (base.get_input_embeddings().weight is base.get_output_embeddings().weight)
    assert base.config.vocab_size == 40


@torch.no_grad()
def test_rows_with_saved_modules_share_a_batch(world: World) -> None:
    """Every two tasks whose outputs are of one size, and the base, a row each."""
    base = load_model(world.model)
    model = VLoRAModel(base, world.checkpoint)
    names = [
        name for name in world.logits if world.logits[name].shape == world.logits["base"].shape
    ]
    tasks = [None if name == "base" else name for name in names]
    ids = IDS[:1].expand(len(names), -1)
    model.set_tasks(tasks)
    wanted = torch.cat([world.logits[name][:1] for name in names])
    assert torch.allclose(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    # Each row twice, as two beams.
    twice = model(ids.repeat_interleave(2, 0)).logits
    assert torch.allclose(twice, wanted.repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)
    with model.task("saved_both"):
        alone = model(IDS).logits
        assert torch.allclose(alone, world.logits["saved_both"], rtol=1e-4, atol=1e-4)
    assert torch.allclose(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(OptionError, match="do not fit one batch"):
        model.set_tasks(["saved_both", "more_tokens"])
    assert model.active_tasks == tuple(tasks)
    model.set_tasks(["more_tokens", "more_tokens_saved_embedding"])
    wider = model(IDS).logits
    for row, name in enumerate(("more_tokens", "more_tokens_saved_embedding")):
        assert torch.allclose(wider[row], world.logits[name][row], rtol=1e-4, atol=1e-4)
    model.clear_task()
    assert torch.equal(model(IDS).logits, world.logits["base"])


@torch.no_grad()
def test_a_model_that_moves_moves_what_is_not_shown_too(world: World) -> None:
    base = load_model(world.model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = VLoRAModel(base, world.checkpoint)
    model.set_task("saved_both")
    model.double()
    wanted = world.logits["saved_both"].double()
    assert torch.allclose(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    model.set_tasks(["saved_both", None])
    model.float()
    assert torch.allclose(model(IDS).logits[:1], wanted[:1].float(), rtol=1e-4, atol=1e-4)
    model.clear_task()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@torch.no_grad()
def test_a_merged_task_brings_its_saved_modules(world: World) -> None:
    base = load_model(world.model)
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    model = VLoRAModel(base, world.checkpoint)
    for name in ("saved_embedding", "more_tokens", "lora_head_saved_embedding"):
        model.set_task("saved_head")
        model.merge(name)
        assert torch.allclose(model(IDS).logits, world.logits[name], rtol=1e-4, atol=1e-4)
        model.unmerge()
        assert torch.equal(model(IDS).logits, world.logits["base"])
    model.set_task("saved_embedding")
    if tied:
        with pytest.raises(ModelMismatchError, match="shares its weight"):
            model.merge("lora_head")
        assert model.active_task == "saved_embedding"
        shown = model(IDS).logits
        assert torch.allclose(shown, world.logits["saved_embedding"], rtol=1e-4, atol=1e-4)


def test_the_loss_counts_the_tokens_of_the_task(world: World) -> None:
    """Transformers takes the width of the logits from the configuration."""
    base = load_model(world.model)
    model = VLoRAModel(base, world.checkpoint)
    model.set_task("more_tokens")
    logits = world.logits["more_tokens"][:, :-1].double()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    assert float(model(IDS, labels=IDS).loss) == pytest.approx(float(wanted), rel=1e-4)
    assert model.config.vocab_size == base.get_input_embeddings().num_embeddings == 43
    model.clear_task()
    assert model.config.vocab_size == base.get_input_embeddings().num_embeddings == 40
    assert base.get_output_embeddings().out_features == 40


# --- other models ---------------------------------------------------------------------------------


class Classifier(TinyModel):
    """(B, 12) -> (B, labels)."""

    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        self.score = torch.nn.Linear(14, labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(super().forward(x))  # type: ignore[no-any-return]


def with_heads(labels: int = 3) -> SharedSubspace:
    """Four tasks, of which the first two have heads."""
    adapters = tiny_adapters(4)
    for adapter in adapters[:2]:
        adapter.extra = {
            "base_model.model.score.weight": torch.randn(labels, 14),
            "base_model.model.score.bias": torch.randn(labels),
        }
        adapter.metadata["modules_to_save"] = ["score"]
    return SharedSubspace.from_adapters(adapters, num_components=6, representation="joint")


def in_a_subspace(folder: Path) -> SharedSubspace:
    return SharedSubspace.from_adapters([folder], num_components=2, representation="joint")


@torch.no_grad()
def test_compiled_code_sees_the_heads_that_are_shown() -> None:
    torch._dynamo.reset()
    base, x = Classifier(), torch.randn(2, 12)
    compiled = VLoRAModel(copy.deepcopy(base), with_heads())
    eager = VLoRAModel(copy.deepcopy(base), compiled.subspace)
    # Guards are dynamo's, whatever compiles the graph.
    compiled.compile(backend="eager", fullgraph=True)
    rows = (["task_0", "task_1"], ["task_2", "task_0"], [None, "task_1"])
    for task in ("task_0", "task_2", "task_1", *rows, "task_0", None):
        with eager.task(task), compiled.task(task):
            assert torch.allclose(compiled(x), eager(x), atol=1e-5), task
    torch._dynamo.reset()


@pytest.mark.parametrize("task", ["saved_both", "lora_both", "more_tokens", "plain"])
def test_switching_to_saved_modules_is_timed(world: World, task: str) -> None:
    found = time_operations(world.checkpoint, task, 3, lambda stage, done, total: None)
    assert {"switch", "switch, cold"} <= {result["operation"] for result in found["results"]}


@torch.no_grad()
def test_a_head_of_other_labels_is_what_peft_computes(tmp_path: Path) -> None:
    """A classifier of three labels on a model that was loaded with two, and with its loss."""
    import transformers

    write_model(tmp_path / "model", "llama", tied=True)
    kind = transformers.AutoModelForSequenceClassification
    trained = kind.from_pretrained(tmp_path / "model", num_labels=3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(trained, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter += torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    labels = torch.tensor([2, 0])
    wanted = adapted(IDS, labels=labels)
    base = kind.from_pretrained(tmp_path / "model", num_labels=2).eval()
    base.config.id2label = {0: "no", 1: "yes"}
    before = base(IDS).logits
    model = VLoRAModel(base, in_a_subspace(tmp_path / "adapter"))
    with model.task("task_0"):
        got = model(IDS, labels=labels)
        assert base.config.num_labels == 3
    assert torch.allclose(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert float(got.loss) == pytest.approx(float(wanted.loss), rel=1e-4)
    assert torch.equal(base(IDS).logits, before)
    assert base.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_weights_of_another_base_are_put_into_it_as_peft_does(tmp_path: Path, tied: bool) -> None:
    """LoRA on an embedding whose vocabulary was resized: PEFT saves the grown base weight beside it."""
    root = write_model(tmp_path / "model", "llama", tied=tied)
    options = {"target_modules": ["q_proj", "embed_tokens"], "more_tokens": 3}
    folder = write_saved_adapter(root, "llama", tmp_path / "adapter", options)
    checkpoint = tmp_path / "ckpt"
    compress(
        {"a": open_adapter(folder)},
        checkpoint,
        CompressOptions(representation="private", max_error=0.0),
    )
    base = load_model(root, 3)
    # The rows that a user's own resizing drew.
    base.get_input_embeddings().weight[-3:] += 1.0
    wanted = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(IDS).logits
    before = base(IDS).logits
    model = VLoRAModel(base, checkpoint)
    with model.task("a"):
        assert torch.allclose(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(base(IDS).logits, before)
    with pytest.raises(ModelMismatchError, match=r"resize_token_embeddings\(43\)"):
        VLoRAModel(load_model(root), checkpoint)


@torch.no_grad()
def test_a_part_of_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """An adapter of more tokens whose output layer is not in the file, which no one can know."""
    root = write_model(tmp_path / "model", "llama", tied=False)
    folder = write_saved_adapter(root, "llama", tmp_path / "adapter", {"more_tokens": 3})
    adapter = open_adapter(folder)
    extra = {key: tensor for key, tensor in adapter.extra_tensors().items() if "embed" in key}
    write_adapter(tmp_path / "part", adapter.config, adapter.iter_factors(), extra=extra)
    source = in_a_subspace(tmp_path / "part")
    model = VLoRAModel(load_model(root), source)
    with pytest.raises(
        ModelMismatchError, match=r"of 43 rows, and nothing for lm_head\.weight of 40"
    ):
        model.set_task("task_0")
    assert model.active_task is None


def test_a_tie_that_the_task_was_not_trained_with_is_refused(tmp_path: Path) -> None:
    untied = write_model(tmp_path / "untied", "llama", tied=False)
    options = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    folder = write_saved_adapter(untied, "llama", tmp_path / "a", options)
    source = in_a_subspace(folder)
    VLoRAModel(load_model(untied), source).set_task("task_0")
    tied = write_model(tmp_path / "tied", "llama", tied=True)
    with pytest.raises(ModelMismatchError, match="one weight in the model"):
        VLoRAModel(load_model(tied), source).set_task("task_0")


def test_a_name_that_fits_two_tensors_is_refused() -> None:
    two = torch.nn.ModuleDict({"left": Classifier(), "right": Classifier()})
    tensors = {"base_model.model.score.weight": torch.zeros(3, 14)}
    with pytest.raises(ModelMismatchError, match=r"has left\.score\.weight and right\.score"):
        HeadSwitch(two).find(tensors, {"modules_to_save": ["score"]})


def test_two_models_on_one_base_do_not_take_heads_for_its_own() -> None:
    base, x = Classifier(), torch.randn(2, 12)
    before = base(x)
    one, other = VLoRAModel(base, with_heads()), VLoRAModel(base, with_heads())
    for show in (lambda: one.set_task("task_0"), lambda: one.set_tasks(["task_0", "task_1"])):
        show()
        with pytest.raises(OptionError, match="clear_task"):
            other.set_task("task_1")
        with pytest.raises(OptionError, match="clear_task"):
            other.set_tasks(["task_1", None])
        one.clear_task()
        assert torch.equal(base(x), before)
    other.set_task("task_1")
    other.clear_task()
    assert torch.equal(base(x), before)


@pytest.mark.parametrize("indices", [[1, 2], {"embed_tokens": [1, 2]}])
def test_trained_tokens_are_refused_by_name(tmp_path: Path, indices: Any) -> None:
    root = write_model(tmp_path / "model", "llama", tied=True)
    options = {"trainable_token_indices": indices, "ensure_weight_tying": isinstance(indices, dict)}
    folder = write_saved_adapter(root, "llama", tmp_path / "adapter", options)
    with pytest.raises(AdapterError, match="trainable_token_indices is set"):
        open_adapter(folder)


@torch.no_grad()
def test_a_head_that_was_replaced_in_the_subspace_is_seen() -> None:
    base, x = Classifier(), torch.randn(2, 12)
    source = with_heads()
    model = VLoRAModel(base, source)
    model.set_task("task_0")
    before = model(x)
    task = source.tasks["task_0"]
    shifted = {key: tensor + 1.0 for key, tensor in task.origin.extra.items()}
    source.tasks["task_0"] = replace(task, origin=replace(task.origin, extra=shifted))
    model.set_task("task_0")
    # Weight and bias have grown by one: by the sum of the layer's input, and one.
    hidden = TinyModel.forward(base, x).sum(-1, keepdim=True)
    torch.testing.assert_close(model(x), before + hidden + 1.0, rtol=1e-4, atol=1e-4)
