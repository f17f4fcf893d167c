"""VLoRAModel adds what the adapters add: against dense products, PEFT, and single runs."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from format2_world import MODULES, bases_of, write_world
from synthetic import run
from tiny_adapters import SHAPES, TinyModel, save_tiny_adapters, tiny_adapters, tiny_weights
from tiny_llama import write_tiny_llama
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.errors import (
    ModelMismatchError,
    ModelStateError,
    OptionError,
    TaskNotFoundError,
    VLoRAError,
)
from vllm_vlora.model.router import TaskRouter
from vllm_vlora.model.training import SubspaceTrainer, orthogonal_init
from vllm_vlora.model.updates import LowRankUpdate, MixedUpdate, updates_of
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.representations.decode import decode
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.tasks import TaskProjection
from vllm_vlora.subspace.weights import LoRAWeights, save_adapter

TASKS = [f"task_{i}" for i in range(4)]
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def subspace() -> SharedSubspace:
    return SharedSubspace.from_adapters(tiny_adapters(4), num_components=2)


@pytest.fixture
def joint() -> SharedSubspace:
    return SharedSubspace.from_adapters(tiny_adapters(4), num_components=4, representation="joint")


@pytest.fixture(params=["flat", "joint"])
def either(request: pytest.FixtureRequest) -> SharedSubspace:
    return request.getfixturevalue("joint" if request.param == "joint" else "subspace")


def compressed(folder: Path, **options: Any) -> Checkpoint:
    folders = save_tiny_adapters(folder / "adapters", tiny_adapters(4, spread=0.2))
    adapters = {Path(path).name: open_adapter(path) for path in folders}
    run(adapters, folder / "checkpoint", **options)
    return Checkpoint.open(folder / "checkpoint")


def expected(base: TinyModel, deltas: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The base's answer with dense float64 weights; columns as TinyModel lays them out."""
    parts = []
    for name in SHAPES:
        linear = base.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.double()
        if name in deltas:
            weight = weight + deltas[name].double()
        parts.append(x.double() @ weight.T + linear.bias.double())
    return torch.cat(parts, dim=-1)


def deltas_of(weights: LoRAWeights) -> dict[str, torch.Tensor]:
    return {
        name: weights.scale(name) * weights.lora_b[name].double() @ weights.lora_a[name].double()
        for name in weights.layer_names
    }


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# --- what is added --------------------------------------------------------------------------------


def test_a_task_of_a_subspace_adds_its_delta_w(either: SharedSubspace) -> None:
    base = TinyModel()
    model = VLoRAModel(base, either)
    bare = base(X)
    for task in TASKS:
        model.set_task(task)
        close(model(X), expected(base, deltas_of(either.reconstruct(task)), X))
        assert not torch.allclose(model(X), bare, atol=1e-3)
    model.clear_task()
    assert torch.equal(model(X), bare)


@pytest.mark.parametrize(
    "options",
    [
        {"representation": "joint", "num_components": 4},
        {"representation": "flat", "ratio": 0.5},
        {"representation": "private", "ratio": 0.5},
        {"representation": "private", "ratio": 0.5, "quantize": "nf4"},
        {"representation": "joint", "num_components": 3, "quantize": "int8"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_a_task_of_a_checkpoint_adds_what_its_export_adds(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    checkpoint = compressed(tmp_path, **options)
    base = TinyModel()
    model = VLoRAModel(base, checkpoint)
    for task in checkpoint.tasks:
        exported = open_adapter(
            export_task(checkpoint, task, tmp_path / f"out-{task}", dtype=torch.float32)
        )
        weights = LoRAWeights.from_adapter(exported)
        with model.task(task):
            close(model(X), expected(base, deltas_of(weights), X), 1e-4)
        for name, delta in model.reconstruct_state_dict(task).items():
            # An export cuts a bfloat16 core to its rank, which drops some of its rounding.
            close(delta, deltas_of(weights)[name], 1e-4)


def test_a_checkpoint_may_be_given_by_its_path(tmp_path: Path) -> None:
    checkpoint = compressed(tmp_path, representation="joint", num_components=4)
    model = VLoRAModel(TinyModel(), str(checkpoint.path))
    assert model.available_tasks == sorted(checkpoint.tasks)
    model.set_task("task_1")
    other = VLoRAModel(TinyModel(), checkpoint)
    other.set_task("task_1")
    assert torch.equal(model(X), other(X))


def test_layers_that_a_task_lacks_stay_as_they_are() -> None:
    q_only = {"layers.0.q_proj": SHAPES["layers.0.q_proj"]}
    adapters = [tiny_weights(0), tiny_weights(1, shapes=q_only)]
    joint = SharedSubspace.from_adapters(
        adapters, num_components=4, representation="joint", missing="zero"
    )
    base = TinyModel()
    model = VLoRAModel(base, joint)
    model.set_task("task_1")
    assert torch.equal(model(X)[:, 8:], base.layers[0].v_proj(X))  # type: ignore[union-attr,operator]
    close(model(X), expected(base, deltas_of(adapters[1]), X), 1e-4)
    model.set_tasks(["task_1", "task_0", None])
    close(model(X)[0], expected(base, deltas_of(adapters[1]), X)[0], 1e-4)
    close(model(X)[2], expected(base, {}, X)[2])


class Blocks(nn.Module):
    """One layer of every kind that an update may belong to."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.conv = Conv1D(8, 6)
        self.out = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.conv(self.embed(ids)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_embeddings_and_conv1d_agree_with_peft(tmp_path: Path, representation: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    base = Blocks()
    ids = torch.randint(0, 20, (3, 4))
    wanted, folders = {}, []
    for i in range(3):
        config = peft.LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=["embed", "conv", "out"],
            init_lora_weights=False,
            fan_in_fan_out=False,
        )
        wrapped = peft.get_peft_model(base, config)
        wanted[f"task_{i}"] = wrapped(ids).detach()
        wrapped.save_pretrained(tmp_path / f"a{i}")
        folders.append(tmp_path / f"a{i}")
        base = wrapped.unload()
    # Three adapters of rank 2 have two components about their mean, and six directions.
    widths = {"flat": 2, "joint": 6}
    subspace = SharedSubspace.from_adapters(
        folders, num_components=widths[representation], representation=representation
    )
    model = VLoRAModel(base, subspace)
    for task, output in wanted.items():
        model.set_task(task)
        close(model(ids), output, 1e-4)
    model.set_tasks(["task_2", "task_0", "task_1"])
    rows = torch.stack(
        [wanted[task][row] for row, task in enumerate(["task_2", "task_0", "task_1"])]
    )
    close(model(ids), rows, 1e-4)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model.merge("task_1")
    close(base(ids), wanted["task_1"], 1e-4)
    model.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def llama_adapters(model: Any, folder: Path, count: int) -> list[Path]:
    import peft

    folders = []
    for seed in range(count):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=32,
            use_rslora=seed % 2 == 1,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
        )
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.05)
        wrapped.save_pretrained(folder / str(seed))
        folders.append(folder / str(seed))
        model = wrapped.unload()
    return folders


def test_a_llama_agrees_with_peft_and_generates(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama)
    folders = llama_adapters(base, tmp_path, 2)
    joint = SharedSubspace.from_adapters(folders, num_components=8, representation="joint")
    model = VLoRAModel(base, joint)
    ids = torch.randint(3, 200, (2, 6))
    wanted, texts = [], []
    for place, folder in enumerate(folders):
        reference = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(llama), folder
        )
        wanted.append(reference(ids).logits)
        texts.append(reference.generate(ids, max_new_tokens=5, do_sample=False))
        model.set_task(f"task_{place}")
        close(model(input_ids=ids).logits, wanted[-1], 1e-3)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), texts[-1])
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)
    model.set_tasks(["task_1", "task_0"])
    both = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(both, torch.stack([texts[1][0], texts[0][1]]))
    # Beam search repeats each row.
    beams = model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False)
    model.set_task("task_1")
    assert torch.equal(
        beams[0], model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False)[0]
    )


def test_inner_and_outer_models_are_matched_by_name(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModel, AutoModelForCausalLM

    outer = AutoModelForCausalLM.from_pretrained(llama)
    folders = llama_adapters(outer, tmp_path, 2)
    joint = SharedSubspace.from_adapters(folders, num_components=8, representation="joint")
    ids = torch.randint(3, 200, (1, 5))
    model = VLoRAModel(outer, joint)
    model.set_task("task_0")
    wanted = model(ids, output_hidden_states=True).hidden_states[-1]
    model.unload()
    inner = VLoRAModel(AutoModel.from_pretrained(llama), joint)
    inner.set_task("task_0")
    close(inner(ids).last_hidden_state, wanted)
    wrapped = VLoRAModel(nn.ModuleDict({"base_model": nn.ModuleDict({"model": outer})}), joint)
    assert wrapped.qlora_info["num_target_layers"] == len(joint.layer_names)


# --- switching ------------------------------------------------------------------------------------


def test_switching_on_a_shared_basis_copies_nothing(joint: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), joint)
    hooks = len(model.base_model.layers[0].q_proj._forward_hooks)  # type: ignore[union-attr,index]
    updates = []
    for task in TASKS[:2]:
        model.set_task(task)
        updates.append([layer.update for layer in model._layers])
    for one, other in zip(*updates):
        assert isinstance(one, LowRankUpdate)
        assert isinstance(other, LowRankUpdate)
        assert one.v is other.v
        assert one.u is other.u
        assert one.a.shape == (4, 4)
    assert len(model.base_model.layers[0].q_proj._forward_hooks) == hooks  # type: ignore[union-attr,index]
    model.set_task("task_0")
    assert [layer.update for layer in model._layers] == updates[0]


def test_a_known_task_is_set_in_microseconds(joint: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), joint)
    times = []
    for turn in range(200):
        start = time.perf_counter()
        model.set_task(TASKS[turn % 2])
        times.append(time.perf_counter() - start)
    # Two layers take some 5 us; a tenth of a millisecond leaves room for a loaded machine.
    assert sorted(times)[len(times) // 2] < 1e-4


def test_few_tasks_are_kept_ready(either: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), either, cached_tasks=2)
    outputs = {}
    for task in TASKS:
        model.set_task(task)
        outputs[task] = model(X)
        assert len(model._plans) <= 2
    for task in TASKS:
        model.set_task(task)
        assert torch.equal(model(X), outputs[task])


def test_a_task_that_was_replaced_is_seen_when_it_is_set(joint: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), joint)
    model.set_task("task_0")
    before = model(X)
    old = joint.tasks["task_0"]
    joint.add_task(
        TaskProjection("task_0", {n: 2 * c for n, c in old.loadings_a.items()}, {}), replace=True
    )
    model.set_task("task_0")
    bare = TinyModel()(X)
    close(model(X) - bare, 2 * (before - bare))
    with torch.no_grad():
        joint.tasks["task_0"].loadings_a["layers.0.q_proj"].zero_()
    model.refresh()
    close(model(X)[:, :8], bare[:, :8])


def test_a_task_that_was_absorbed_later_can_be_set(joint: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), joint)
    model.set_task("task_0")
    joint.absorb(tiny_weights(9), "late")
    assert "late" in model.available_tasks
    for task in ("late", "task_0"):
        model.set_task(task)
        close(
            model(X),
            expected(model.base_model, deltas_of(joint.reconstruct(task)), X),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_layers_that_a_subspace_gained_are_not_left_out(representation: str) -> None:
    q_only = {"layers.0.q_proj": SHAPES["layers.0.q_proj"]}
    subspace = SharedSubspace.from_adapters(
        tiny_adapters(3, shapes=q_only), num_components=2, representation=representation
    )
    base = TinyModel()
    model = VLoRAModel(base, subspace)
    model.set_task("task_0")
    wanted = model(X)
    subspace.absorb(tiny_weights(7), "new", num_components=8, missing="zero")
    for call in (
        lambda: model.set_task("new"),
        lambda: model.set_tasks(["new"]),
        lambda: model.set_blend(torch.ones(1, 1), ["new"]),
        lambda: model.merge("new"),
    ):
        with pytest.raises(
            ModelStateError, match=r"changes layers\.0\.v_proj, which .* unload\(\)"
        ):
            call()
        assert model.active_task == "task_0"
        close(model(X), wanted)
    again = VLoRAModel(model.unload(), subspace)
    again.set_task("new")
    close(again(X), expected(base, deltas_of(subspace.reconstruct("new")), X), 1e-4)


def test_bases_of_before_are_let_go(joint: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), joint, compute_dtype=torch.float64)
    model.set_task("task_0")
    for seed in range(3):
        bases = [
            weakref.ref(basis)
            for layer in model._layers
            for basis in (layer.update.v, layer.update.u, joint.layers[layer.name].v)  # type: ignore[union-attr]
        ]
        joint.absorb(tiny_weights(seed + 9), f"new_{seed}", num_components=4)
        model.set_task(f"new_{seed}")
        gc.collect()
        assert [basis() for basis in bases] == [None] * 6
    joint.remove_task("new_2")
    model.set_task("task_0")
    close(model(X), expected(model.base_model, deltas_of(joint.reconstruct("task_0")), X))  # type: ignore[arg-type]


def test_a_with_restores_what_was_active(either: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), either)
    model.set_task("task_1")
    wanted = model(X)
    with model.task("task_2") as same:
        assert same is model
        assert model.active_task == "task_2"
        with model.task(None):
            assert torch.equal(model(X), model.base_model(X))
            assert model.active_task is None
    assert model.active_task == "task_1"
    assert torch.equal(model(X), wanted)
    with model.task(["task_0", None, "task_3"]):
        assert model.active_tasks == ("task_0", None, "task_3")
    assert torch.equal(model(X), wanted)
    with pytest.raises(RuntimeError), model.task("task_0"):
        model(X[:, :3])
    assert torch.equal(model(X), wanted)


def test_a_merge_inside_a_with_stays_alone(either: SharedSubspace) -> None:
    base = TinyModel()
    model = VLoRAModel(base, either)
    model.set_task("task_0")
    with model.task("task_1"):
        model.merge()
    assert model.active_task == "task_1"
    wanted = expected(TinyModel(), deltas_of(either.reconstruct("task_1")), X)
    close(model(X), wanted)
    model.unmerge()
    close(model(X), expected(base, {}, X))
    model.set_task("task_0")
    with model.task("task_1"):
        model.merge()
        model.unmerge()
    assert model.active_task == "task_0"
    close(model(X), expected(base, deltas_of(either.reconstruct("task_0")), X))


def test_an_input_may_be_given_by_its_name(joint: SharedSubspace) -> None:
    base = TinyModel()
    model = VLoRAModel(base, joint)
    model.set_task("task_0")
    linear = base.get_submodule("layers.0.q_proj")
    assert torch.equal(linear(input=X), linear(X))


def test_an_unknown_task_leaves_the_active_one(either: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), either)
    model.set_task("task_1")
    for call in (model.set_task, model.merge, model.reconstruct_state_dict):
        with pytest.raises(TaskNotFoundError, match="nobody"):
            call("nobody")
    with pytest.raises(TaskNotFoundError):
        model.set_tasks(["task_0", "nobody"])
    # As vlora's does.
    with pytest.raises(KeyError):
        model.set_task("nobody")
    assert model.active_task == "task_1"


# --- rows and blends ------------------------------------------------------------------------------


def test_every_row_may_have_its_own_task(either: SharedSubspace, tmp_path: Path) -> None:
    sources: list[Any] = [either, compressed(tmp_path, representation="private", ratio=0.5)]
    for source in sources:
        model = VLoRAModel(TinyModel(), source)
        rows: list[str | None] = ["task_2", None, "task_0"]
        model.set_tasks(rows)
        together = model(X)
        assert model.active_task is None
        for row, task in enumerate(rows):
            with model.task(task):
                close(together[row], model(X)[row])
        # Rows with several positions each.
        long = torch.stack([X, X + 1], dim=1)
        close(model(long)[:, 0], together)


class World(nn.Module):
    """The modules of ``format2_world`` side by side; only o has inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name, (d_in, d_out) in MODULES.items():
            setattr(self, name, nn.Linear(d_in, d_out, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [getattr(self, name)(x[..., :d_in]) for name, (d_in, _) in MODULES.items()]
        return torch.cat(parts, dim=-1)


def test_tasks_of_every_representation_share_a_batch(tmp_path: Path) -> None:
    write_world(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    bases = bases_of(checkpoint)
    torch.manual_seed(0)
    base = World()
    model = VLoRAModel(base, checkpoint)
    tasks = list(checkpoint.tasks)
    x = torch.randn(len(tasks), 3, 96)
    model.set_tasks(tasks)
    together = model(x)
    for row, task in enumerate(tasks):
        stored = checkpoint.load_task(task).modules
        parts = []
        for name, (d_in, _) in MODULES.items():
            weight = getattr(base, name).weight.double()
            if name in stored:
                a, b = decode(stored[name], bases.get((name, stored[name].representation)))
                weight = weight + b.double() @ a.double()
            parts.append(x[row, :, :d_in].double() @ weight.T)
        wanted = torch.cat(parts, dim=-1)
        close(together[row], wanted, 1e-3)
        model.set_task(task)
        close(model(x)[row], wanted, 1e-3)
        model.set_tasks(tasks)


def test_a_batch_that_fits_no_rows_is_refused(joint: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), joint)
    model.set_tasks(["task_0", "task_1"])
    with pytest.raises(ModelMismatchError, match="3 rows where 2"):
        model(X)
    with pytest.raises(OptionError, match="got none"):
        model.set_tasks([])


class Flattened(nn.Module):
    """A layer that sees tokens (B * T), or those that ``pick`` takes; and one of (B, T, d)."""

    def __init__(self, pick: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(12, 8)})])
        self.layers[0]["v_proj"] = nn.Linear(12, 6)
        self.pick = pick

    def forward(
        self, x: torch.Tensor | None = None, embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = x if embeds is None else embeds
        tokens = x.reshape(-1, 12)
        chosen = torch.arange(len(tokens)) if self.pick is None else self.pick(tokens)
        out = torch.zeros(len(tokens), 8)
        out[chosen] = self.layers[0]["q_proj"](tokens[chosen])
        return torch.cat([out.view(*x.shape[:-1], 8), self.layers[0]["v_proj"](x)], dim=-1)


@pytest.mark.parametrize("name", ["x", "embeds"])
@pytest.mark.parametrize("beams", [1, 3])
def test_flattened_tokens_and_beams_have_their_row_s_task(
    either: SharedSubspace, name: str, beams: int
) -> None:
    model = VLoRAModel(Flattened(), either)
    x = torch.randn(2 * beams, 5, 12, generator=torch.Generator().manual_seed(1))
    wanted = []
    for task, rows in zip(("task_0", "task_1"), x.split(beams)):
        model.set_task(task)
        wanted.append(model(rows))
    model.set_tasks(["task_0", "task_1"])
    close(model(**{name: x}), torch.cat(wanted))


class Windows(TinyModel):
    """Tokens of a row in windows, each a row of what layers see, as of Swin's images."""

    main_input_name = ("pixels", "texts")

    def forward(self, mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = pixels.shape
        return super().forward(pixels.view(4 * rows, tokens // 4, width)).view(rows, tokens, -1)


def test_windows_of_a_row_have_its_task(either: SharedSubspace) -> None:
    model = VLoRAModel(Windows(), either)
    mask, x = torch.ones(8, 8), torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1))
    wanted = []
    for task, row in zip(("task_0", "task_1"), x.split(1)):
        model.set_task(task)
        wanted.append(model(mask=mask, pixels=row))
    model.set_tasks(["task_0", "task_1"])
    close(model(mask=mask, pixels=x), torch.cat(wanted))


def test_a_layer_that_sees_gathered_tokens_is_refused_rows(joint: SharedSubspace) -> None:
    """As experts of a mixture do: nothing tells whose tokens these are, even where their number fits."""
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
    count = 0
    model = VLoRAModel(Flattened(lambda tokens: torch.arange(count)), joint)
    for mixture in (
        lambda: model.set_tasks(["task_0", "task_1"]),
        lambda: model.set_blend(torch.eye(2), ["task_0", "task_1"]),
    ):
        for count in (4, 6, 8):
            mixture()
            with pytest.raises(ModelMismatchError, match=f"{count} tokens, .* batch of 2 rows"):
                model(x)
            # One row is everybody's.
            model.set_blend(torch.tensor([[0.0, 1.0]]), ["task_0", "task_1"])
            mixed = model(x)
            model.set_task("task_1")
            close(mixed, model(x))
        # An expert that sees no token has nothing to mix up.
        mixture()
        count = 0
        assert model(x).shape == (2, 6, 14)
    # What is called beside the model's own forward, as generate() calls an encoder, has its own batch.
    assert model.layers[0]["v_proj"](torch.ones(4, 12)).shape == (4, 6)  # type: ignore[index,operator]


@pytest.mark.parametrize("shape", [(0, 12), (0, 5, 12), (2, 0, 12)])
def test_an_empty_batch_has_nothing_to_mix(either: SharedSubspace, shape: tuple[int, ...]) -> None:
    model = VLoRAModel(TinyModel(), either)
    for mixture in (
        lambda: model.set_tasks(["task_0", None]),
        lambda: model.set_blend(torch.ones(2, 4)),
    ):
        mixture()
        assert model(torch.zeros(shape)).shape == (*shape[:-1], 14)


def test_a_blend_is_the_weighted_sum_of_the_updates(either: SharedSubspace) -> None:
    base = TinyModel()
    model = VLoRAModel(base, either)
    weights = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, -1.0, 0.5, 0.0], [0.25] * 4])
    model.set_blend(weights)
    parts = {task: deltas_of(either.reconstruct(task)) for task in TASKS}
    for row in range(3):
        blended = {
            name: sum(float(w) * parts[task][name] for w, task in zip(weights[row], TASKS))
            for name in SHAPES
        }
        close(model(X)[row], expected(base, blended, X)[row])  # type: ignore[arg-type]
    # One row of weights serves any batch.
    model.set_blend(weights[:1], TASKS)
    close(model(X)[0], expected(base, {
        name: sum(float(w) * parts[t][name] for w, t in zip(weights[0], TASKS)) for name in SHAPES
    }, X)[0])  # type: ignore[arg-type]  # fmt: skip


def test_gradients_reach_the_weights_of_a_blend_and_the_inputs(either: SharedSubspace) -> None:
    base = TinyModel()
    model = VLoRAModel(base, either)
    weights = torch.rand(3, 4, requires_grad=True)
    x = X.clone().requires_grad_(True)
    model.set_blend(weights)
    model(x).square().sum().backward()
    parts = {task: deltas_of(either.reconstruct(task)) for task in TASKS}
    w = weights.detach().double().requires_grad_(True)
    y = x.detach().double().requires_grad_(True)
    outputs = []
    for row in range(3):
        mixed = {n: sum(w[row, t] * parts[task][n] for t, task in enumerate(TASKS)) for n in SHAPES}
        outputs.append(expected(base, mixed, y)[row])  # type: ignore[arg-type]
    torch.stack(outputs).square().sum().backward()
    assert weights.grad is not None
    assert x.grad is not None
    assert w.grad is not None
    assert y.grad is not None
    close(weights.grad, w.grad, 1e-4)
    close(x.grad, y.grad, 1e-4)


@pytest.mark.parametrize("move", ["double", "bfloat16", "refresh"])
def test_a_blend_survives_moving_the_model(either: SharedSubspace, move: str) -> None:
    base = TinyModel()
    model = VLoRAModel(base, either)
    weights = torch.tensor([[0.7, 0.3], [0.0, -1.0], [0.5, 0.5]], requires_grad=True)
    model.set_blend(weights, TASKS[:2])
    parts = [deltas_of(either.reconstruct(task)) for task in TASKS[:2]]
    getattr(model, move)()
    assert model.is_running
    assert "mixed" in repr(model)
    y = model(X.to(base.layers[0].q_proj.weight.dtype))  # type: ignore[union-attr]
    for row in range(3):
        w = weights[row].detach().double()
        blended = {name: w[0] * parts[0][name] + w[1] * parts[1][name] for name in SHAPES}
        wanted = expected(base, blended, X)[row]
        close(y[row], wanted, 0.05 if move == "bfloat16" else 1e-4)
    y.sum().backward()
    assert weights.grad is not None
    model.clear_task()
    assert not model.is_running


def test_a_with_restores_where_the_model_is_now(either: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), either)
    for call in (
        lambda: model.set_task("task_1"),
        lambda: model.set_tasks(["task_1"]),
        lambda: model.set_blend(torch.ones(1, 1), ["task_1"]),
    ):
        model.float()
        call()
        with model.task("task_2"):
            model.double()
        after = model(X.double())
        call()
        assert torch.equal(model(X.double()), after)


def test_bad_weights_are_refused(joint: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel(), joint)
    for weights in (torch.ones(4), torch.ones(2, 3), torch.ones(0, 4)):
        with pytest.raises(OptionError, match="shape"):
            model.set_blend(weights)
    with pytest.raises(OptionError, match="NaN"):
        model.set_blend(torch.full((1, 4), float("nan")))


def test_updates_of_one_layer_mix_in_every_form() -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    v, u, short_v = draw(4, 9), draw(7, 3), draw(2, 9)
    updates = [
        LowRankUpdate(draw(3, 4), None, v, u),
        LowRankUpdate(draw(2, 4), draw(3, 2), v, u),
        LowRankUpdate(draw(5, 9), draw(7, 5)),
        None,
        LowRankUpdate(draw(3, 2), None, short_v, u),
        LowRankUpdate(draw(1, 9), draw(7, 1)),
    ]
    weights = draw(4, 6)
    mixed = MixedUpdate(updates, weights)
    for x in (draw(4, 9), draw(4, 5, 9), draw(4, 2, 3, 9)):
        wanted = torch.zeros(*x.shape[:-1], 7, dtype=torch.float64)
        for column, update in enumerate(updates):
            if update is not None:
                own = torch.einsum("b...i,oi->b...o", x.double(), update.delta().double())
                wanted += weights[:, column].double().view(4, *(1,) * (x.ndim - 1)) * own
        close(mixed(x), wanted, 1e-4)
    ids = torch.randint(0, 9, (4, 5), generator=generator)
    columns = torch.stack([
        sum(weights[r, c] * o.delta()[:, ids[r]].T for c, o in enumerate(updates) if o is not None)
        for r in range(4)
    ])  # type: ignore[arg-type]  # fmt: skip
    close(mixed(ids), columns, 1e-4)


def test_a_tall_and_a_wide_core_have_small_factors() -> None:
    torch.manual_seed(0)
    for k_out, k_in in ((5, 2), (2, 5), (3, 3)):
        u, v, core = torch.randn(8, k_out), torch.randn(k_in, 12), torch.randn(k_out, k_in)
        update = LowRankUpdate(core, None, v, u)
        a, b = update.factors()
        assert a.shape[0] == min(k_out, k_in)
        close(b @ a, u.double() @ core.double() @ v.double())
        assert (update.d_in, update.d_out) == (12, 8)


def test_updates_leave_out_layers_that_a_task_lacks() -> None:
    q_only = {"layers.0.q_proj": SHAPES["layers.0.q_proj"]}
    joint = SharedSubspace.from_adapters(
        [tiny_weights(0), tiny_weights(1, shapes=q_only)],
        num_components=4,
        representation="joint",
        missing="zero",
    )
    assert list(updates_of(joint, "task_1")) == ["layers.0.q_proj"]
    with pytest.raises(TaskNotFoundError, match="task_0"):
        updates_of(joint, "nobody")


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_and_unmerging_is_exact(either: SharedSubspace, dtype: torch.dtype) -> None:
    base = TinyModel().to(dtype)
    original = {name: p.clone() for name, p in base.named_parameters()}
    model = VLoRAModel(base, either)
    model.set_task("task_2")
    model.merge()
    assert model.is_merged
    assert model.active_task == "task_2"
    for name, delta in deltas_of(either.reconstruct("task_2")).items():
        wanted = (original[f"{name}.weight"].double() + delta).to(dtype)
        merged = base.get_parameter(f"{name}.weight")
        # Rounded once: at most one step from the rounded float64 sum.
        torch.testing.assert_close(merged, wanted, rtol=1.01 * torch.finfo(dtype).eps, atol=2e-7)
    with pytest.raises(RuntimeError, match="unmerge"):
        model.set_task("task_1")
    for call in (model.merge, model.clear_task, model.refresh):
        with pytest.raises(VLoRAError, match="unmerge"):
            call()
    model.unmerge()
    assert all(torch.equal(p, original[name]) for name, p in base.named_parameters())
    assert not model.is_merged
    assert model.active_task is None
    with pytest.raises(RuntimeError, match="not merged"):
        model.unmerge()
    with pytest.raises(ValueError, match="no task"):
        model.merge()


def test_merging_zero_changes_no_float64_weight() -> None:
    joint = SharedSubspace.from_adapters(tiny_adapters(2), representation="joint")
    orthogonal_init(joint, "zero", scale=0.0)
    base = TinyModel().double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 1e-12)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = VLoRAModel(base, joint)
    model.merge("zero")
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    model.unmerge()
    model.merge("task_1")
    for name, delta in deltas_of(joint.reconstruct("task_1")).items():
        close(base.get_parameter(f"{name}.weight"), before[f"{name}.weight"] + delta, 1e-6)


def test_tasks_of_two_owners_do_not_add_up_on_one_layer(either: SharedSubspace) -> None:
    """Two models, a merge and a model, a merge and a training, a training and a model."""
    base = TinyModel()
    bare = base(X)
    one, other = VLoRAModel(base, either), VLoRAModel(base, either)
    trainer = SubspaceTrainer(either, "task_1")
    calls: list[Callable[[], object]] = [
        lambda: other.set_task("task_0"),
        lambda: other.set_tasks(["task_0", None, "task_1"]),
        lambda: other.set_blend(torch.ones(1, 4)),
        lambda: other.merge("task_0"),
        lambda: VLoRAModel(base, either),
        lambda: trainer.attach(base).__enter__(),
        lambda: trainer.attach(other).__enter__(),
    ]
    for start, end in (
        (lambda: one.set_task("task_2"), one.clear_task),
        (lambda: one.merge("task_2"), one.unmerge),
    ):
        start()
        wanted = base(X)
        assert not torch.allclose(wanted, bare)
        for call in calls:
            with pytest.raises(OptionError, match=r"runs in layer .*; call its clear_task"):
                call()
            assert torch.equal(base(X), wanted)
            assert other.active_task is None
            assert not other.is_merged
        other.clear_task()
        end()
        assert torch.equal(base(X), bare)
    with trainer.attach(one):
        wanted = base(X)
        for call in (lambda: one.set_task("task_0"), lambda: one.merge("task_0"), *calls):
            with pytest.raises(OptionError, match="runs in layer"):
                call()
            assert torch.equal(base(X), wanted)
    other.set_task("task_0")
    one.clear_task()
    other.merge()
    other.unload()
    one.merge("task_0")
    one.unload()
    assert torch.equal(base(X), bare)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_are_not_loaded_below_a_merged_task(either: SharedSubspace, assign: bool) -> None:
    """``unmerge`` would put those of before in their place."""
    base = TinyModel()
    model = VLoRAModel(base, either)
    state = {name: tensor + 1 for name, tensor in base.state_dict().items()}
    layer = base.get_submodule("layers.0.q_proj")
    own = {name.rpartition(".")[2]: state[f"layers.0.q_proj.{name}"] for name in layer.state_dict()}
    model.merge("task_0")
    wanted = base(X)
    for module, tensors in ((base, state), (model, model.state_dict()), (layer, own)):
        with pytest.raises(ModelStateError, match=r"'task_0' is merged.*unmerge\(\)"):
            module.load_state_dict(tensors, assign=assign)
        assert torch.equal(base(X), wanted)
    # What lies beside is loaded.
    base.more = nn.Linear(2, 2)
    more = {"more.weight": torch.ones(2, 2), "more.bias": torch.ones(2)}
    base.load_state_dict(more, strict=False, assign=assign)
    assert torch.equal(base.more.weight, torch.ones(2, 2))
    assert torch.equal(base(X), wanted)
    del base.more
    twin = copy.deepcopy(model)
    with pytest.raises(ModelStateError, match="'task_0' is merged"):
        twin.base_model.load_state_dict(state, assign=assign)
    for one in (model, twin):
        one.unmerge()
        one.base_model.load_state_dict(state, assign=assign)
        assert all(torch.equal(p, state[n]) for n, p in one.base_model.named_parameters())


def test_a_weight_that_was_exchanged_below_a_merged_task_is_not_lost(
    either: SharedSubspace,
) -> None:
    base = TinyModel()
    model = VLoRAModel(base, either)
    model.merge("task_0")
    layer = base.get_submodule("layers.0.v_proj")
    merged, layer.weight = layer.weight, nn.Parameter(torch.ones(6, 12))
    with pytest.raises(ModelStateError, match=r"layers\.0\.v_proj.*another weight"):
        model.unmerge()
    assert model.is_merged
    assert torch.equal(layer.weight, torch.ones(6, 12))
    layer.weight = merged
    model.unmerge()
    assert torch.equal(base(X), TinyModel()(X))


def test_an_exchanged_weight_is_kept_by_unload_and_all_else_goes(either: SharedSubspace) -> None:
    base = TinyModel()
    model = VLoRAModel(base, either)
    model.merge("task_0")
    base.get_submodule("layers.0.v_proj").weight = nn.Parameter(torch.ones(6, 12))
    with pytest.raises(ModelStateError, match=r"layers\.0\.v_proj got another weight.*keeps it"):
        model.unload()
    wanted = TinyModel()
    wanted.get_submodule("layers.0.v_proj").weight = nn.Parameter(torch.ones(6, 12))
    assert torch.equal(base(X), wanted(X))
    base.load_state_dict(wanted.state_dict())
    VLoRAModel(base, either).set_task("task_1")


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_merged_base_model_is_a_base_model_of_its_own(
    either: SharedSubspace, way: str
) -> None:
    base = TinyModel()
    model = VLoRAModel(base, either)
    model.merge("task_0")
    twin = copy.deepcopy(base) if way == "deepcopy" else pickle.loads(pickle.dumps(base))
    assert torch.equal(twin(X), base(X))
    wrapped = VLoRAModel(twin, either)
    wrapped.set_task("task_1")
    assert not torch.equal(wrapped(X), base(X))
    wrapped.unload()
    twin.load_state_dict(TinyModel().state_dict())
    with pytest.raises(OptionError, match="another VLoRAModel"):
        VLoRAModel(base, either)
    model.unmerge()
    assert torch.equal(base(X), twin(X))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_merge_that_fails_half_way_changes_nothing(
    either: SharedSubspace, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    base = TinyModel()
    original = {name: p.clone() for name, p in base.named_parameters()}
    model = VLoRAModel(base, either)
    model.set_task("task_1")
    wanted, calls, delta = model(X), [], LowRankUpdate.delta

    def second_fails(update: LowRankUpdate) -> torch.Tensor:
        calls.append(update)
        if len(calls) == 2:
            raise error
        return delta(update)

    monkeypatch.setattr(LowRankUpdate, "delta", second_fails)
    with pytest.raises(error):
        model.merge("task_0")
    assert all(torch.equal(p, original[name]) for name, p in base.named_parameters())
    assert not model.is_merged
    assert model.active_task == "task_1"
    assert torch.equal(model(X), wanted)
    model.merge("task_0")
    model.unmerge()
    assert all(torch.equal(p, original[name]) for name, p in base.named_parameters())


def test_a_tied_weight_is_not_merged() -> None:
    base = TinyModel()
    base.head = nn.Linear(12, 8)
    base.head.weight = base.layers[0].q_proj.weight  # type: ignore[union-attr,assignment]
    model = VLoRAModel(base, SharedSubspace.from_adapters(tiny_adapters(4), num_components=2))
    with pytest.raises(ModelMismatchError, match="shares its weight"):
        model.merge("task_0")
    assert not model.is_merged


def test_unloading_leaves_the_base_as_it_was(either: SharedSubspace) -> None:
    base = TinyModel()
    wanted = base(X)
    model = VLoRAModel(base, either)
    model.merge("task_0")
    assert model.unload() is base
    assert torch.equal(base(X), wanted)
    assert not base.layers[0].q_proj._forward_hooks  # type: ignore[union-attr]


def test_an_unloaded_model_runs_nothing_and_says_so(either: SharedSubspace) -> None:
    base = TinyModel()
    wanted = base(X)
    model = VLoRAModel(base, either)
    model.set_task("task_0")
    with model.task("task_1"):
        model.unload()
    assert model.active_task is None
    for call in (
        lambda: model.set_task("task_0"),
        lambda: model.set_tasks(["task_0"]),
        lambda: model.set_blend(torch.ones(1, 4)),
    ):
        with pytest.raises(ModelStateError, match="unload"):
            call()
    model.float()
    assert torch.equal(model(X), wanted)
    assert model.unload() is base


# --- the base model -------------------------------------------------------------------------------


def test_a_layer_that_does_not_fit_is_named(joint: SharedSubspace) -> None:
    base = TinyModel()
    base.layers[0].v_proj = nn.Linear(12, 7)  # type: ignore[union-attr]
    with pytest.raises(ModelMismatchError, match=r"layers\.0\.v_proj maps 12 to 7"):
        VLoRAModel(base, joint)
    del base.layers[0].v_proj
    with pytest.raises(ModelMismatchError, match=r"no layer layers\.0\.v_proj"):
        VLoRAModel(base, joint)
    base.layers[0].v_proj = nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(ModelMismatchError, match="Identity"):
        VLoRAModel(base, joint)
    two = nn.ModuleDict({"student": TinyModel(), "teacher": TinyModel()})
    with pytest.raises(ModelMismatchError, match="fits both"):
        VLoRAModel(two, joint)


def test_the_dtype_of_updates_follows_the_layer_or_what_is_asked(joint: SharedSubspace) -> None:
    model = VLoRAModel(TinyModel().bfloat16(), joint)
    model.set_task("task_0")
    assert model._layers[0].update.a.dtype == torch.bfloat16  # type: ignore[union-attr]
    exact = VLoRAModel(TinyModel().bfloat16(), joint, compute_dtype=torch.float32)
    exact.set_task("task_0")
    assert exact._layers[0].update.a.dtype == torch.float32  # type: ignore[union-attr]
    assert exact(X.bfloat16()).dtype == torch.bfloat16
    close(model(X.bfloat16()), exact(X.bfloat16()), 0.05)
    # Moving the model prepares the active task anew.
    model.float()
    assert model._layers[0].update.a.dtype == torch.float32  # type: ignore[union-attr]
    assert model.active_task == "task_0"


def test_attributes_are_those_of_the_base(joint: SharedSubspace) -> None:
    base = TinyModel()
    base.config = {"hidden": 3}  # type: ignore[assignment]
    model = VLoRAModel(base, joint)
    assert model.config == {"hidden": 3}
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = model.nothing_here
    assert repr(model) == "VLoRAModel(tasks=4, active='none', layers=2)"
    model.merge("task_1")
    assert repr(model) == "VLoRAModel(tasks=4, active='task_1' merged, layers=2)"


class Linear4bit(nn.Module):
    """Looks like bitsandbytes' class from outside; the weight is packed and has no shape of use."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
        self.compute_dtype = torch.float32
        self._linear = [linear]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear[0](x)  # type: ignore[no-any-return]


def test_quantised_layers_are_adapted_and_not_merged(joint: SharedSubspace) -> None:
    base, plain = TinyModel(), TinyModel()
    base.layers[0].q_proj = Linear4bit(base.layers[0].q_proj)  # type: ignore[union-attr,arg-type]
    model, reference = VLoRAModel(base, joint), VLoRAModel(plain, joint)
    for each in (model, reference):
        each.set_task("task_3")
    close(model(X), reference(X))
    assert model.qlora_info == {
        "quantized": True,
        "method": "nf4",
        "num_quantized_layers": 1,
        "num_target_layers": 2,
    }
    assert not reference.qlora_info["quantized"]
    with pytest.raises(RuntimeError, match="quantised"):
        model.merge()


def test_real_4_and_8_bit_layers(joint: SharedSubspace) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for method, make in {
        "nf4": lambda i, o: bnb.nn.Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.float32),
        "int8": lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False),
    }.items():
        base = TinyModel()
        for name in ("q_proj", "v_proj"):
            linear = getattr(base.layers[0], name)
            packed = make(linear.in_features, linear.out_features)
            packed.load_state_dict(linear.state_dict())
            setattr(base.layers[0], name, packed)
        base.to("cpu")
        bare = base(X)
        model = VLoRAModel(base, joint, compute_dtype=torch.float32)
        assert model.qlora_info["method"] == method
        assert model.qlora_info["num_quantized_layers"] == 2
        model.set_task("task_1")
        deltas = deltas_of(joint.reconstruct("task_1"))
        added = torch.cat([X.double() @ deltas[name].T for name in SHAPES], dim=-1)
        close(model(X) - bare, added, 1e-3)
        with pytest.raises(RuntimeError, match="quantised"):
            model.merge()


class Fp8Linear(nn.Linear):
    """As transformers' FP8Linear with one scale: a Parameter of codes, and what they are times."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.scale = nn.Parameter(linear.weight.detach().abs().max() / 448)
        codes = (linear.weight.detach() / self.scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


class BufferLinear(nn.Module):
    """As the layers of BitNet, GPTQ and AWQ: codes and scales in buffers, and no parameter."""

    def __init__(self, linear: nn.Linear, name: str = "weight") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scales", scale.half())
        self.register_buffer(name, (linear.weight.detach() / scale).round().to(torch.int8))
        self._codes = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (getattr(self, self._codes).to(x.dtype) * self.scales).T


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (Fp8Linear, "fp8"),
        (BufferLinear, "other"),
        (lambda linear: BufferLinear(linear, "qweight"), "other"),
    ],
    ids=["fp8", "weight in a buffer", "no weight"],
)
def test_whatever_is_not_plain_is_quantised(
    joint: SharedSubspace, make: Callable[[nn.Linear], nn.Module], method: str
) -> None:
    base = TinyModel()
    for name in ("q_proj", "v_proj"):
        setattr(base.layers[0], name, make(getattr(base.layers[0], name)))
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    bare = base(X)
    model = VLoRAModel(base, joint)
    assert model.qlora_info == {
        "quantized": True,
        "method": method,
        "num_quantized_layers": 2,
        "num_target_layers": 2,
    }
    deltas = deltas_of(joint.reconstruct("task_1"))
    added = torch.cat([X.double() @ deltas[name].T for name in SHAPES], dim=-1)
    model.set_task("task_1")
    close(model(X) - bare, added)
    model.set_tasks(["task_1", None, "task_1"])
    close((model(X) - bare)[[0, 2]], added[[0, 2]])
    with pytest.raises(ModelStateError, match="quantised"):
        model.merge("task_1")
    assert all(torch.equal(t, kept[name]) for name, t in base.state_dict().items())


def test_a_weight_that_wraps_others_is_not_merged(joint: SharedSubspace) -> None:
    # torchao's and quanto's weights call themselves what they dequantise to.
    base = TinyModel()
    linear = base.get_submodule("layers.0.q_proj")
    whole = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(whole, whole.clone()))
    model = VLoRAModel(base, joint)
    assert model.qlora_info["num_quantized_layers"] == 1
    with pytest.raises(ModelStateError, match="quantised"):
        model.merge("task_1")


@pytest.mark.parametrize(("kind", "method"), [("Embedding8bit", "int8"), ("Embedding4bit", "fp4")])
def test_a_quantised_embedding_is_adapted_and_not_merged(kind: str, method: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    adapters = tiny_adapters(2, shapes={"embed": (20, 64)})
    for weights in adapters:
        weights.kinds = {"embed": "embedding"}
    joint = SharedSubspace.from_adapters(adapters, num_components=4, representation="joint")
    base = nn.ModuleDict({"embed": getattr(bnb.nn, kind)(20, 64)})
    base["embed"].load_state_dict(nn.Embedding(20, 64).state_dict())
    base.to("cpu")
    ids = torch.tensor([[3, 19], [0, 7]])
    embed = base["embed"]
    bare = embed(ids)
    model = VLoRAModel(base, joint)
    assert model.qlora_info["method"] == method
    model.set_task("task_1")
    close(embed(ids) - bare, deltas_of(adapters[1])["embed"].T[ids], 1e-3)
    with pytest.raises(ModelStateError, match="quantised"):
        model.merge()


def test_a_layer_without_tensors_is_named(joint: SharedSubspace) -> None:
    class Hidden(nn.Module):
        in_features, out_features = 12, 8

    base = TinyModel()
    base.layers[0].q_proj = Hidden()  # type: ignore[union-attr]
    with pytest.raises(ModelMismatchError, match=r"layers\.0\.q_proj is a Hidden"):
        VLoRAModel(base, joint).set_task("task_0")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attn(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


@pytest.fixture
def attention() -> tuple[Attention, list[LoRAWeights]]:
    """A model whose out_proj is never called, and adapters of it."""
    torch.manual_seed(0)
    adapters = tiny_adapters(3, shapes={"attn.out_proj": (8, 8), "out": (8, 8)})
    # As PEFT leaves it: no gradient reaches such a layer.
    adapters[2].lora_b["attn.out_proj"].zero_()
    return Attention(), adapters


def test_a_layer_that_is_not_called_is_merged_and_not_run(
    attention: tuple[Attention, list[LoRAWeights]],
) -> None:
    (base, adapters), x = attention, torch.randn(2, 3, 8)
    joint = SharedSubspace.from_adapters(adapters, num_components=6, representation="joint")
    model = VLoRAModel(base, joint)
    bare = model(x)
    for call in (
        lambda: model.set_task("task_0"),
        lambda: model.set_tasks(["task_0", None]),
        lambda: model.set_blend(torch.ones(1, 1), ["task_0"]),
    ):
        with pytest.raises(
            ModelStateError, match=r"attn\.out_proj .* MultiheadAttention .* merge\(\)"
        ):
            call()
        assert torch.equal(model(x), bare)
    twin = copy.deepcopy(base).double()
    with torch.no_grad():
        for name, delta in deltas_of(adapters[0]).items():
            twin.get_parameter(f"{name}.weight").add_(delta)
    model.merge("task_0")
    close(model(x), twin(x.double()), 1e-4)
    model.unmerge()
    with (
        pytest.raises(ModelStateError, match=r"attn\.out_proj"),
        SubspaceTrainer(joint, "task_0").attach(base),
    ):
        pass
    assert torch.equal(base(x), bare)


def test_a_layer_that_is_not_called_may_be_left_as_it_is(
    attention: tuple[Attention, list[LoRAWeights]],
) -> None:
    (base, adapters), x = attention, torch.randn(2, 3, 8)
    joint = SharedSubspace.from_adapters(adapters, num_components=6, representation="joint")
    for weights in adapters:
        weights.lora_b["attn.out_proj"].zero_()
    flat = SharedSubspace.from_adapters(adapters, num_components=2)
    twin = copy.deepcopy(base).double()
    with torch.no_grad():
        twin.out.weight.add_(deltas_of(adapters[2])["out"])
    for subspace in (joint, flat):
        model = VLoRAModel(base, subspace)
        model.set_task("task_2")
        close(model(x), twin(x.double()), 1e-4)
        model.unload()


# --- heads ----------------------------------------------------------------------------------------


def test_a_task_brings_its_classifier_head(tmp_path: Path) -> None:
    class Classifier(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(14, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(super().forward(x))  # type: ignore[no-any-return]

    adapters = tiny_adapters(3)
    for place in (0, 1):
        adapters[place].extra = {
            "base_model.model.score.weight": torch.randn(3, 14),
            "base_model.model.score.bias": torch.randn(3),
        }
        adapters[place].metadata["modules_to_save"] = ["score"]
    joint = SharedSubspace.from_adapters(adapters, num_components=6, representation="joint")
    folders = save_tiny_adapters(tmp_path, adapters)
    run(
        {Path(path).name: open_adapter(path) for path in folders},
        tmp_path / "checkpoint",
        representation="joint",
        num_components=6,
        quantize="none",
    )
    for source in (joint, Checkpoint.open(tmp_path / "checkpoint")):
        base = Classifier()
        original = {name: p.clone() for name, p in base.named_parameters()}
        model = VLoRAModel(base, source)
        for place, adapter in enumerate(adapters):
            head = adapter.extra or {f"base_model.model.{n}": p for n, p in original.items()}
            weight, bias = (
                head[f"base_model.model.score.{n}"].double() for n in ("weight", "bias")
            )
            wanted = expected(base, deltas_of(adapter), X) @ weight.T + bias
            with model.task(f"task_{place}"):
                close(model(X), wanted, 1e-4)
            model.merge(f"task_{place}")
            close(model(X), wanted, 1e-4)
            model.unmerge()
            assert all(torch.equal(p, original[n]) for n, p in base.named_parameters())
        with pytest.raises(OptionError, match="head of its own"):
            model.set_blend(torch.tensor([[0.5, 0.5]]), ["task_2", "task_0"])
        model.set_task("task_1")
        model.set_task("task_2")
        assert torch.equal(base.score.weight, original["score.weight"])
        other = Classifier()
        other.score = nn.Linear(12, 3)
        small = VLoRAModel(other, source)
        small.set_task("task_2")
        with pytest.raises(ModelMismatchError, match=r"\(3, 14\) and the model has \(3, 12\)"):
            small.set_task("task_0")
        assert small.active_task == "task_2"
        with pytest.raises(ModelMismatchError, match="has none"):
            VLoRAModel(TinyModel(), source).set_task("task_0")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_head_does_not_take_the_place_of_a_quantised_one(dtype: torch.dtype) -> None:
    adapters = tiny_adapters(2)
    adapters[0].extra = {"base_model.model.score.weight": torch.rand(3, 14)}
    adapters[0].metadata["modules_to_save"] = ["score"]
    joint = SharedSubspace.from_adapters(adapters, num_components=4, representation="joint")
    base = TinyModel()
    base.score = nn.Linear(14, 3, bias=False)
    base.score.weight = nn.Parameter(torch.ones(3, 14).to(dtype), requires_grad=False)
    model = VLoRAModel(base, joint)
    with pytest.raises(ModelMismatchError, match=r"has it quantised, as (float8_e4m3fn|int8);"):
        model.set_task("task_0")
    model.set_task("task_1")


# --- scale ----------------------------------------------------------------------------------------


def test_a_scale_that_changes_nothing_is_accepted(joint: SharedSubspace) -> None:
    plain = VLoRAModel(TinyModel(), joint)
    plain.set_task("task_0")
    for options in ({"lora_alpha": 4}, {"scaling": 2.0}):
        model = VLoRAModel(TinyModel(), joint, **options)
        model.set_task("task_0")
        assert torch.equal(model(X), plain(X))
    for options in ({"lora_alpha": 32}, {"scaling": 1.0}, {"scaling": float("inf")}):
        with pytest.raises(OptionError):
            VLoRAModel(TinyModel(), joint, **options)
    with pytest.raises(OptionError, match="one of them"):
        VLoRAModel(TinyModel(), joint, scaling=2.0, lora_alpha=4)


def test_a_scale_that_is_not_known_is_given_as_in_vlora() -> None:
    adapters = [without_alpha(weights) for weights in tiny_adapters(4)]
    subspace = SharedSubspace.from_adapters(adapters, num_components=3)
    assert not subspace.scales_known
    base = TinyModel()
    bare = base(X)
    added = []
    for options in ({}, {"scaling": 3.0}, {"lora_alpha": 6}):
        model = VLoRAModel(TinyModel(), subspace, **options)
        model.set_task("task_0")
        added.append(model(X) - bare)
    close(added[0], expected(base, deltas_of(adapters[0]), X) - bare.double(), 1e-4)
    close(added[1], 3 * added[0])
    # alpha / rank
    close(added[2], 3 * added[0])


def without_alpha(weights: LoRAWeights) -> LoRAWeights:
    return LoRAWeights(weights.layer_names, weights.lora_a, weights.lora_b, weights.rank)


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_a_scale_that_is_not_known_is_taken_wherever_the_tasks_are(
    representation: str, tmp_path: Path
) -> None:
    """Of a subspace, of the checkpoint it was saved as, opened and by its path: the same."""
    adapters = [without_alpha(w) for w in tiny_adapters(4, rank=4)]
    subspace = SharedSubspace.from_adapters(
        adapters,
        num_components=3 if representation == "flat" else 12,
        representation=representation,
    )
    path = subspace.save(tmp_path / "saved")
    base = TinyModel()
    wanted = expected(base, {n: 2 * d for n, d in deltas_of(adapters[1]).items()}, X)
    for source in (subspace, path, str(path), Checkpoint.open(path)):
        for options in ({"scaling": 2.0}, {"lora_alpha": 8}):
            model = VLoRAModel(TinyModel(), source, **options)
            model.set_task("task_1")
            close(model(X), wanted, 1e-4)


def test_a_blend_of_tasks_without_a_scale_has_none() -> None:
    adapters = [without_alpha(weights) for weights in tiny_adapters(3)]
    subspace = SharedSubspace.from_adapters(adapters, num_components=6, representation="joint")
    router = TaskRouter.from_subspace(subspace, input_dim=4)
    blend = router.blend_loadings(torch.ones(1, 4), subspace)
    assert not blend.origin.scale_known
    subspace.add_task(blend)
    assert VLoRAModel(TinyModel(), subspace, scaling=3.0).scaling == 3.0


def test_a_scale_is_not_given_to_tasks_that_have_theirs(tmp_path: Path) -> None:
    """Tasks with and without a known alpha, as when an adapter is absorbed into vlora's checkpoint."""
    adapters = tiny_adapters(4)
    mixed = SharedSubspace.from_adapters(
        [adapters[0], *map(without_alpha, adapters[1:])], num_components=3
    )
    path = mixed.save(tmp_path / "saved")
    for source in (mixed, path):
        # The adapters' alpha is 4 and their rank 2.
        for options, factor in (({}, 1.0), ({"lora_alpha": 4}, 2.0)):
            model = VLoRAModel(TinyModel(), source, **options)
            model.set_task("task_0")
            close(model(X), expected(TinyModel(), deltas_of(adapters[0]), X), 1e-4)
            deltas = deltas_of(without_alpha(adapters[1]))
            wanted = expected(TinyModel(), {n: factor * d for n, d in deltas.items()}, X)
            model.set_task("task_1")
            close(model(X), wanted, 1e-4)
            model.merge()
            close(model(X), wanted, 1e-4)
        with pytest.raises(OptionError, match="own is 4"):
            VLoRAModel(TinyModel(), source, lora_alpha=8)
    router = TaskRouter.from_subspace(mixed, input_dim=4)
    with pytest.raises(OptionError, match=r"'task_0' is known and that of 'task_3' is not"):
        router.blend_loadings(torch.ones(1, 4), mixed)


def test_the_adapter_s_own_scale_may_be_named_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = compressed(tmp_path, representation="private", ratio=0.5)
    VLoRAModel(TinyModel(), checkpoint, lora_alpha=4)
    with pytest.raises(OptionError, match="own is 4"):
        VLoRAModel(TinyModel(), checkpoint, lora_alpha=8)


# --- torch.compile --------------------------------------------------------------------------------


def test_compiled_and_eager_agree_and_switching_compiles_nothing(joint: SharedSubspace) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    eager, compiled = VLoRAModel(TinyModel(), joint), VLoRAModel(TinyModel(), joint)
    assert compiled.compile(backend=counter, fullgraph=True) is compiled
    with torch.no_grad():
        for task in TASKS[:2]:
            for each in (eager, compiled):
                each.set_task(task)
            close(compiled(X), eager(X))
        known = counter.frame_count
        for task in TASKS:
            for each in (eager, compiled):
                each.set_task(task)
            close(compiled(X), eager(X))
        assert counter.frame_count == known
        for each in (eager, compiled):
            each.clear_task()
        close(compiled(X), eager(X))
        for each in (eager, compiled):
            each.set_tasks(["task_0", None, "task_2"])
        close(compiled(X), eager(X))
        compiled.merge("task_3")
        eager.set_task("task_3")
        close(compiled(X), eager(X))
    torch._dynamo.reset()


def test_rows_of_other_lengths_compile_nothing(joint: SharedSubspace) -> None:
    """Once for the first length, once for all others."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = VLoRAModel(TinyModel(), joint).compile(backend=backend)
    for length in (5, 6, 7, 9):
        model.set_tasks(["task_0", "task_1"])
        model(torch.ones(2, length, 12))
    assert len(graphs) == 2


def test_a_model_that_was_compiled_before_is_refused(joint: SharedSubspace) -> None:
    with pytest.raises(OptionError, match="compiled already"):
        VLoRAModel(torch.compile(TinyModel(), backend="eager"), joint)  # type: ignore[arg-type]
    base = TinyModel()
    base.compile(backend="eager")
    with pytest.raises(OptionError, match="compiled already"):
        VLoRAModel(base, joint)


def test_adapters_are_read_from_disk_the_same(tmp_path: Path) -> None:
    folder = save_adapter(tiny_weights(0), tmp_path / "a")
    joint = SharedSubspace.from_adapters([folder], num_components=2, representation="joint")
    model = VLoRAModel(TinyModel(), joint)
    model.set_task("task_0")
    close(model(X), expected(TinyModel(), deltas_of(tiny_weights(0)), X), 1e-4)
