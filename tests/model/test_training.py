"""Training one task in a subspace: by hand, and through transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cipher_tasks import (
    Task,
    held_out_loss,
    make_model,
    pretrain,
    task_batch,
    train_adapter,
)
from tiny_adapters import TinyModel, tiny_adapters

from vllm_vlora.errors import OptionError, TaskIdError, TaskNotFoundError
from vllm_vlora.model.attaching import AdaptedLayer
from vllm_vlora.model.text_routing import RouterOptions, train_text_router
from vllm_vlora.model.training import SubspaceTrainer, orthogonal_init
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.subspace.shared import SharedSubspace
from vllm_vlora.subspace.weights import LoRAWeights, load_adapter

NEW: Task = (2, 1)
FAMILY: list[Task] = [(1, 0), (2, 0), (1, 1), (3, 1), (1, 2), (2, 2)]
STEPS = 50
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(7))


@dataclass
class Family:
    """A model that was trained, adapters of six tasks of its family, and one of the new task."""

    model: Any
    adapters: list[Path]
    own: Path

    def subspace(self, k: int = 8) -> SharedSubspace:
        return SharedSubspace.from_adapters(self.adapters, num_components=k, representation="joint")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("family")
    model = make_model()
    pretrain(model, 250)
    for place, task in enumerate(FAMILY):
        train_adapter(model, task, folder / str(place), STEPS, seed=place, rank=4)
    train_adapter(model, NEW, folder / "own", STEPS, seed=99, rank=4)
    return Family(model, [folder / str(place) for place in range(len(FAMILY))], folder / "own")


@pytest.fixture
def joint() -> SharedSubspace:
    return SharedSubspace.from_adapters(tiny_adapters(4), num_components=4, representation="joint")


@pytest.fixture
def flat() -> SharedSubspace:
    return SharedSubspace.from_adapters(tiny_adapters(4), num_components=2)


@pytest.fixture(params=["flat", "joint"])
def either(request: pytest.FixtureRequest) -> SharedSubspace:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def outputs(base: torch.nn.Module, subspace: SharedSubspace, x: torch.Tensor) -> dict[str, Any]:
    model = VLoRAModel(base, subspace)
    found = {}
    with torch.no_grad():
        for task in model.available_tasks:
            with model.task(task):
                found[task] = model(x)
    model.unload()
    return found


# --- what it is for -------------------------------------------------------------------------------


def test_a_trained_core_beats_the_projection_of_a_trained_adapter(family: Family) -> None:
    """Seen: base 8.7, trained core 0.04, projected adapter 0.8, the adapter itself 0.03."""
    model, subspace = family.model, family.subspace()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    others = outputs(model, subspace, torch.arange(1, 9)[None])
    base_loss = held_out_loss(model, NEW)

    subspace.add_task(subspace.project(load_adapter(family.own), "projected"))
    runner = VLoRAModel(model, subspace)
    with runner.task("projected"):
        projected_loss = held_out_loss(runner, NEW)
    runner.unload()

    orthogonal_init(subspace, "trained", scale=0.0)
    trainer = SubspaceTrainer(subspace, "trained", lr=2e-2)
    generator = torch.Generator().manual_seed(99)
    with trainer.attach(model):
        assert held_out_loss(model, NEW) == pytest.approx(base_loss)
        for _ in range(STEPS):
            trainer.step(model(**task_batch(NEW, 32, generator)).loss)
    assert held_out_loss(model, NEW) == base_loss, "the model is left as it was"
    trainer.write_back()

    runner = VLoRAModel(model, subspace)
    runner.set_task("trained")
    trained_loss = held_out_loss(runner, NEW)
    runner.unload()
    assert trained_loss < 0.02 * base_loss
    assert trained_loss < 0.3 * projected_loss
    sizes = {
        task: sum(c.numel() for c in subspace.tasks[task].cores.values())
        for task in ("trained", "projected")
    }
    # One adapter has 6144 numbers.
    assert sizes["trained"] == sizes["projected"] == trainer.num_trainable_params == 640
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    for task, output in outputs(model, subspace, torch.arange(1, 9)[None]).items():
        if task in others:
            assert torch.equal(output.logits, others[task].logits)


def test_expanding_the_basis_learns_what_it_lacks(family: Family) -> None:
    """Two directions of the basis are too few; four random ones more let the loss fall further."""
    losses = []
    for expand in (0, 4):
        subspace = family.subspace(k=1)
        before = outputs(family.model, subspace, torch.arange(1, 9)[None])
        orthogonal_init(subspace, "new", scale=0.0)
        trainer = SubspaceTrainer(subspace, "new", lr=2e-2, num_expand=expand)
        assert trainer.num_trainable_params == 10 * (1 + expand) ** 2
        generator = torch.Generator().manual_seed(0)
        with trainer.attach(family.model):
            for _ in range(STEPS):
                trainer.step(family.model(**task_batch(NEW, 32, generator)).loss)
            losses.append(held_out_loss(family.model, NEW))
        trainer.write_back()
        after = outputs(family.model, subspace, torch.arange(1, 9)[None])
        for task, output in before.items():
            torch.testing.assert_close(after[task].logits, output.logits, rtol=1e-4, atol=1e-4)
        runner = VLoRAModel(family.model, subspace)
        runner.set_task("new")
        assert held_out_loss(runner, NEW) == pytest.approx(losses[-1], rel=1e-4)
        runner.unload()
    assert losses[1] < 0.8 * losses[0]


# --- by hand --------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_dense_update(either: SharedSubspace) -> None:
    base = TinyModel()
    trainer = SubspaceTrainer(either, "task_1")
    with trainer.attach(base):
        base(X).square().sum().backward()
    own = {name: p.detach().double().requires_grad_(True) for name, p in trainer.params.items()}
    parts = []
    for name, layer in either.layers.items():
        if either.representation == "joint":
            delta = layer.u.double() @ own[f"{name}.core"] @ layer.v.double()  # type: ignore[union-attr]
        else:
            factors = [
                getattr(layer, f"mean_{side}").double()
                + torch.einsum(
                    "k,krd->rd",
                    own[f"{name}.loadings_{side}"],
                    getattr(layer, f"components_{side}").double(),
                )
                for side in "ab"
            ]
            delta = factors[1].T @ factors[0]
        linear = base.get_submodule(name)
        parts.append(X.double() @ (linear.weight.double() + delta).T + linear.bias.double())  # type: ignore[operator,union-attr]
    torch.cat(parts, dim=-1).square().sum().backward()
    for name, parameter in trainer.params.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, rtol=1e-4, atol=1e-5)


def test_a_task_trains_below_the_head_that_it_has() -> None:
    """Also through the callback, whose model runs the task until it is detached."""
    from vllm_vlora.integrations.huggingface import VLoRACallback

    class Classifier(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.score = torch.nn.Linear(14, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(super().forward(x))  # type: ignore[no-any-return]

    adapters = tiny_adapters(2)
    weight, bias = torch.randn(5, 14), torch.randn(5)
    named = {"base_model.model.score.weight": weight, "base_model.model.score.bias": bias}
    adapters[0].extra, adapters[0].metadata["modules_to_save"] = named, ["score"]
    joint = SharedSubspace.from_adapters(adapters, num_components=4, representation="joint")
    base = Classifier()
    before = base(X)
    with VLoRAModel(base, joint).task("task_0"):
        wanted = base(X)
    assert wanted.shape == (len(X), 5)
    trainer = SubspaceTrainer(joint, "task_0")
    with trainer.attach(base):
        torch.testing.assert_close(base(X), wanted, rtol=1e-4, atol=1e-5)
        assert trainer.step(base(X).square().mean()) > 0
    assert torch.equal(base(X), before)
    callback = VLoRACallback(joint, "task_0")
    callback.on_init_end(None, None, None, model=base)
    torch.testing.assert_close(base(X), wanted, rtol=1e-4, atol=1e-5)
    callback.detach()
    assert torch.equal(base(X), before)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_training_lowers_a_loss_and_leaves_all_else(either: SharedSubspace) -> None:
    base = TinyModel()
    frozen_before = base.layers[0].q_proj.bias.requires_grad_(False)  # type: ignore[union-attr,operator]
    before = outputs(base, either, X)
    orthogonal_init(either, "new")
    start = {k: v.clone() for k, v in either.tasks["new"].loadings_a.items()}
    trainer = SubspaceTrainer(
        either, "new", lr=0.05, optimizer_cls=torch.optim.SGD, optimizer_kwargs={"momentum": 0.9}
    )
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    target = torch.randn(5, 14, generator=torch.Generator().manual_seed(1))
    with trainer.attach(base) as model:
        assert not any(p.requires_grad for p in base.parameters())
        losses = [trainer.step((model(X) - target).square().mean()) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.step_count == 40
    assert all(torch.equal(start[k], v) for k, v in either.tasks["new"].loadings_a.items())
    trainer.write_back()
    after = outputs(base, either, X)
    assert float((after["new"] - target).square().mean()) < losses[-2]
    for task, output in before.items():
        assert torch.equal(after[task], output)
    assert not frozen_before.requires_grad
    assert base.layers[0].v_proj.weight.requires_grad  # type: ignore[union-attr]
    assert all(p.grad is None for p in base.parameters())
    assert repr(trainer).startswith("SubspaceTrainer(task='new', params=")


def test_a_trained_task_survives_saving(either: SharedSubspace, tmp_path: Path) -> None:
    base = TinyModel()
    orthogonal_init(either, "new")
    trainer = SubspaceTrainer(either, "new", lr=0.05)
    with trainer.attach(base) as model:
        for _ in range(5):
            trainer.step(model(X).square().mean())
    trainer.write_back()
    loaded = SharedSubspace.load(either.save(tmp_path / "saved"))
    for task, output in outputs(base, either, X).items():
        torch.testing.assert_close(outputs(base, loaded, X)[task], output)


def test_without_freezing_the_model_gets_gradients_and_the_optimiser_does_not_step_it(
    joint: SharedSubspace,
) -> None:
    base = TinyModel()
    weight = base.layers[0].q_proj.weight  # type: ignore[union-attr]
    before = weight.clone()  # type: ignore[operator]
    trainer = SubspaceTrainer(joint, "task_0")
    with trainer.attach(base, freeze=False) as model:
        trainer.step(model(X).square().mean())
    assert weight.grad is not None
    assert torch.equal(weight, before)  # type: ignore[arg-type]


def test_a_model_in_half_precision_trains_float32_copies(joint: SharedSubspace) -> None:
    base = TinyModel().bfloat16()
    joint.to(dtype=torch.bfloat16)
    trainer = SubspaceTrainer(joint, "task_0", lr=1e-4)
    with trainer.attach(base) as model:
        for _ in range(3):
            trainer.step(model(X.bfloat16()).float().square().mean())
    assert {p.dtype for p in trainer.params.values()} == {torch.float32}
    trainer.write_back()
    assert {t.dtype for t in joint.tasks["task_0"].cores.values()} == {torch.bfloat16}


def test_a_task_trains_on_a_4_bit_model(joint: SharedSubspace) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = TinyModel()
    for name in ("q_proj", "v_proj"):
        linear = getattr(base.layers[0], name)
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            quant_type="nf4",
            compute_dtype=torch.float32,
        )
        packed.load_state_dict(linear.state_dict())
        setattr(base.layers[0], name, packed)
    base.to("cpu")
    torch.manual_seed(0)
    orthogonal_init(joint, "new")
    trainer = SubspaceTrainer(joint, "new", lr=0.05)
    target = torch.randn(5, 14)
    with trainer.attach(base) as model:
        losses = [trainer.step((model(X) - target).square().mean()) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_knows_nothing_of_the_task_is_refused(joint: SharedSubspace) -> None:
    base = TinyModel()
    trainer = SubspaceTrainer(joint, "task_0")
    before = {name: p.clone() for name, p in trainer.params.items()}
    with pytest.raises(OptionError, match=r"trainer\.attach"):
        trainer.step(base(X).square().mean())
    with pytest.raises(OptionError, match=r"trainer\.attach"):
        trainer.step(torch.tensor(1.0))
    with trainer.attach(base), pytest.raises(OptionError, match="nan"):
        trainer.step(base(X).square().mean() * float("nan"))
    with trainer.attach(base), pytest.raises(OptionError, match="shape"):
        trainer.step(base(X).square())
    assert all(torch.equal(p, before[name]) for name, p in trainer.params.items())
    assert trainer.step_count == 0


@pytest.mark.parametrize("representation", ["flat", "joint"])
def test_a_task_without_a_scale_trains_at_the_one_that_the_model_runs_it_with(
    representation: str,
) -> None:
    """By hand and through the callback: alpha 8 and rank 2 make 4 times delta_W."""
    from vllm_vlora.integrations.huggingface import VLoRACallback

    adapters = [LoRAWeights(w.layer_names, w.lora_a, w.lora_b, w.rank) for w in tiny_adapters(4)]
    subspace = SharedSubspace.from_adapters(
        adapters, num_components=3, representation=representation
    )
    base = TinyModel()
    deltas = VLoRAModel(TinyModel(), subspace).reconstruct_state_dict("task_0")
    parts = []
    for name, delta in deltas.items():
        linear = base.get_submodule(name)
        weight = linear.weight.double() + 4 * delta.double()  # type: ignore[operator,union-attr]
        parts.append(X.double() @ weight.T + linear.bias.double())  # type: ignore[operator,union-attr]
    wanted = torch.cat(parts, dim=-1).float()
    model = VLoRAModel(base, subspace, lora_alpha=8)
    trainer = SubspaceTrainer(subspace, "task_0", lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with trainer.attach(model):
            torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-4)
            for _ in range(5):
                trainer.step(model(X).square().mean())
            trained = model(X).detach()
        trainer.write_back()
        with model.task("task_0"):
            torch.testing.assert_close(model(X), trained, rtol=1e-4, atol=1e-4)
        callback = VLoRACallback(subspace, "task_0")
        callback.on_init_end(None, None, None, model=model)
        torch.testing.assert_close(model(X), trained, rtol=1e-4, atol=1e-4)
        callback.detach()
    # A bare model names none.
    with pytest.warns(UserWarning, match="'task_0' has no scale"), trainer.attach(base):
        pass


@pytest.fixture
def _generators_of_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing but the CPU's generator is restored, and so nothing else may be seeded."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.random.get_rng_state()
    yield
    assert seeded == []
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("_generators_of_devices_are_left_alone")
@pytest.mark.parametrize("expand", [0, 1])
def test_a_trainer_seeds_nobody_else(joint: SharedSubspace, expand: int) -> None:
    SubspaceTrainer(joint, "task_0", num_expand=expand)


def test_directions_are_drawn_from_the_task_s_name() -> None:
    drawn = []
    for task in ("task_0", "task_0", "task_1"):
        subspace = SharedSubspace.from_adapters(tiny_adapters(2), num_components=1)
        SubspaceTrainer(subspace, task, num_expand=2)
        drawn.append(subspace.components_a["layers.0.q_proj"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.usefixtures("_generators_of_devices_are_left_alone")
def test_a_router_of_texts_seeds_nobody_else() -> None:
    texts = {"a": ["one two", "two three"], "b": ["four five", "five six"]}
    once, again = (train_text_router(texts, RouterOptions(epochs=1)).weights for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_values_that_are_not_finite_are_not_written_back(joint: SharedSubspace) -> None:
    before = {n: c.clone() for n, c in joint.tasks["task_0"].cores.items()}
    trainer = SubspaceTrainer(joint, "task_0")
    with torch.no_grad():
        next(iter(trainer.params.values())).fill_(float("inf"))
    with pytest.raises(OptionError, match=r"finite|NaN"):
        trainer.write_back()
    assert all(torch.equal(c, before[n]) for n, c in joint.tasks["task_0"].cores.items())


def test_bad_arguments_are_refused(joint: SharedSubspace) -> None:
    with pytest.raises(TaskNotFoundError, match="orthogonal_init"):
        SubspaceTrainer(joint, "nobody")
    for lr in (0.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="lr"):
            SubspaceTrainer(joint, "task_0", lr=lr)
    with pytest.raises(OptionError, match="num_expand"):
        SubspaceTrainer(joint, "task_0", num_expand=-1)
    widths = {name: layer.widths for name, layer in joint.layers.items()}
    with pytest.raises(TypeError, match="momentum"):
        SubspaceTrainer(joint, "task_0", num_expand=1, optimizer_kwargs={"momentum": 0.9})
    assert {name: layer.widths for name, layer in joint.layers.items()} == widths
    with pytest.raises(OptionError):
        SubspaceTrainer(joint, "task_0", num_expand=100)
    model = VLoRAModel(TinyModel(), joint)
    model.set_task("task_1")
    trainer = SubspaceTrainer(joint, "task_0")
    with pytest.raises(OptionError, match="clear_task"), trainer.attach(model):
        pass
    # The base model underneath runs the task as well.
    with pytest.raises(OptionError, match="clear_task"), trainer.attach(model.base_model):
        pass
    model.clear_task()
    with trainer.attach(model):
        trainer.step(model(X).square().mean())
        with pytest.raises(OptionError, match="runs in layer"):
            VLoRAModel(model.base_model, joint)


def test_starting_points(joint: SharedSubspace, flat: SharedSubspace) -> None:
    base = TinyModel()
    start = orthogonal_init(joint, "new", scale=0.3)
    for name, core in start.cores.items():
        layer = joint.layers[name]
        delta = layer.u @ core @ layer.v  # type: ignore[union-attr]
        assert float(torch.linalg.matrix_norm(delta, ord=2)) == pytest.approx(0.3, rel=1e-4)
    orthogonal_init(joint, "zero", scale=0.0)
    close = outputs(base, joint, X)["zero"]
    torch.testing.assert_close(close, base(X))
    with pytest.raises(TaskIdError, match="new"):
        orthogonal_init(joint, "new")
    assert orthogonal_init(joint, "new", replace=True) is joint.tasks["new"]
    with pytest.raises(OptionError, match="scale"):
        orthogonal_init(joint, "other", scale=-1.0)
    assert "other" not in joint.tasks
    # A flat task starts at the mean of the others.
    orthogonal_init(flat, "new", scale=0.0)
    weights = flat.reconstruct("new")
    for name, layer in flat.layers.items():
        torch.testing.assert_close(weights.lora_a[name], layer.mean_a)  # type: ignore[union-attr]
        torch.testing.assert_close(weights.lora_b[name], layer.mean_b.T)  # type: ignore[union-attr]


# --- transformers' Trainer ------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences of the new task, drawn once."""

    def __init__(self, size: int) -> None:
        self._batch = task_batch(NEW, size, torch.Generator().manual_seed(4))

    def __len__(self) -> int:
        return len(self._batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in self._batch.items()}


def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 16,
            "max_steps": 6,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            **options,
        },
    )


@pytest.fixture
def tiny_family(family: Family) -> Iterator[tuple[Any, SharedSubspace]]:
    """The family's model and a subspace with the task "new"; the model must be left untouched."""
    torch.manual_seed(0)
    subspace = family.subspace()
    orthogonal_init(subspace, "new")
    keys = list(family.model.state_dict())
    trained = [p.requires_grad for p in family.model.parameters()]
    weights = [p.clone() for p in family.model.parameters()]
    yield family.model, subspace
    assert list(family.model.state_dict()) == keys
    assert [p.requires_grad for p in family.model.parameters()] == trained
    assert all(torch.equal(p, w) for p, w in zip(family.model.parameters(), weights))
    hooks = [hook for m in family.model.modules() for hook in m._forward_hooks.values()]
    assert not any(isinstance(getattr(hook, "__self__", None), AdaptedLayer) for hook in hooks)


def trained_cores(subspace: SharedSubspace) -> dict[str, torch.Tensor]:
    return {name: core.clone() for name, core in subspace.tasks["new"].cores.items()}


def assert_cores(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def test_the_trainer_accumulates_clips_and_follows_its_schedule(
    tiny_family: tuple[Any, SharedSubspace], tmp_path: Path
) -> None:
    """Against a loop of our own with AdamW: two micro-batches a step, clipping, warm-up and decay."""
    from transformers import Trainer

    from vllm_vlora.integrations.huggingface import VLoRACallback

    model, subspace = tiny_family
    rows, steps, peak = Rows(32), 6, 0.03
    reference = SubspaceTrainer(
        subspace, "new", lr=peak, optimizer_cls=torch.optim.AdamW,
        optimizer_kwargs={"weight_decay": 0.1},
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        reference.optimizer, lambda step: min(step / 2, (steps - step) / (steps - 2))
    )
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # type: ignore[attr-defined]
    norms, rates = [], []
    model.train()
    with reference.attach(model):
        for _ in range(steps):
            reference.optimizer.zero_grad()
            model(**batch).loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(reference.params.values(), 0.5)))
            rates.append(schedule.get_last_lr()[0])
            reference.optimizer.step()
            schedule.step()
    model.eval()
    wanted = {name: p.detach() for name, p in reference.params.items()}

    callback = VLoRACallback(subspace, "new", lr=peak, log_every=2)
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            warmup_steps=2,
            weight_decay=0.1,
            learning_rate=123.0,
            logging_strategy="steps",
            logging_steps=1,
        ),
        train_dataset=rows,
        callbacks=[callback],
    )
    assert all(p.requires_grad == ("vlora_" in n) for n, p in model.named_parameters())
    trainer.train()
    assert max(norms) > 0.5, "nothing was clipped, so that clipping was not tested"
    for name, core in trained_cores(subspace).items():
        torch.testing.assert_close(core, wanted[f"{name}.core"], rtol=1e-3, atol=1e-4)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(rates)
    assert [entry["grad_norm"] for entry in logs] == pytest.approx(norms, rel=1e-2)
    assert [entry["step"] for entry in logs if "vlora/step" in entry] == [2, 4, 6]
    final = sum(float(core.square().sum()) for core in trained_cores(subspace).values()) ** 0.5
    assert logs[-1]["vlora/loadings_norm"] == pytest.approx(final, rel=1e-5)
    assert logs[-1]["vlora/trainable_params"] == 640
    assert callback.trainer.step_count == steps


def test_the_trainer_lowers_the_held_out_loss(
    tiny_family: tuple[Any, SharedSubspace], tmp_path: Path
) -> None:
    from transformers import Trainer

    from vllm_vlora.integrations.huggingface import VLoRACallback

    model, subspace = tiny_family
    base = held_out_loss(model, NEW)
    Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=30, learning_rate=0.03),
        train_dataset=Rows(128),
        callbacks=[VLoRACallback(subspace, "new", lr=None)],
    ).train()
    runner = VLoRAModel(model, subspace)
    runner.set_task("new")
    assert held_out_loss(runner.eval(), NEW) < 0.1 * base
    runner.unload()


class StopAt:
    """Makes a callback that is interrupted after a step."""

    def __new__(cls, step: int) -> Any:
        from transformers import TrainerCallback

        class Interrupting(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step:
                    raise KeyboardInterrupt

        return Interrupting()


@pytest.mark.parametrize("expand", [0, 2])
def test_an_interrupted_training_goes_on_from_its_checkpoint(
    tiny_family: tuple[Any, SharedSubspace], tmp_path: Path, expand: int
) -> None:
    from transformers import Trainer

    from vllm_vlora.integrations.huggingface import VLoRACallback

    model, subspace = tiny_family
    subspace.save(tmp_path / "subspace")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}

    def trainer_of(own: SharedSubspace, folder: str, *more: Any) -> tuple[Any, Any]:
        callback = VLoRACallback(own, "new", lr=0.02, num_expand=expand)
        made = Trainer(
            model=model,
            args=arguments(tmp_path / folder, **options),
            train_dataset=Rows(64),
            callbacks=[callback, *more],
        )
        return made, callback

    whole = SharedSubspace.load(tmp_path / "subspace")
    trainer_of(whole, "whole")[0].train()

    before = trained_cores(subspace)
    interrupted, callback = trainer_of(subspace, "parts", StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    callback.detach()
    callback.detach()
    assert all(torch.equal(c[: len(b), : b.shape[1]], b) for c, b in zip(
        trained_cores(subspace).values(), before.values()))  # fmt: skip

    # As another process would: everything read from disk.
    again = SharedSubspace.load(tmp_path / "subspace")
    resumed, _ = trainer_of(again, "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_cores(trained_cores(again), trained_cores(whole))


def test_a_second_training_goes_on_with_the_same_parameters(
    tiny_family: tuple[Any, SharedSubspace], tmp_path: Path
) -> None:
    from transformers import Trainer

    from vllm_vlora.integrations.huggingface import VLoRACallback

    model, subspace = tiny_family
    bare = held_out_loss(model, NEW)
    callback = VLoRACallback(subspace, "new", lr=0.02, detach_on_end=False)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=10),
        train_dataset=Rows(64),
        eval_dataset=Rows(64),
        callbacks=[callback],
    )
    trainer.train()
    first = trained_cores(subspace)
    # Still attached: evaluation sees the task.
    loss = trainer.evaluate()["eval_loss"]
    assert loss < 0.7 * bare
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss
    assert any(not torch.equal(c, first[n]) for n, c in trained_cores(subspace).items())
    callback.detach()
    model.eval()
    assert held_out_loss(model, NEW) == bare


def test_what_would_train_nothing_or_something_else_is_refused(
    tiny_family: tuple[Any, SharedSubspace], tmp_path: Path
) -> None:
    from transformers import Trainer

    from vllm_vlora.integrations.huggingface import VLoRACallback

    model, subspace = tiny_family
    late = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(16))
    late.add_callback(VLoRACallback(subspace, "new"))
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(OptionError, match="callbacks="):
        late.train()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=Rows(16),
        callbacks=[VLoRACallback(subspace, "new")],
        optimizers=(own, None),
    )
    with pytest.raises(OptionError, match="no optimiser of your own"):
        trainer.train()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    with pytest.raises(TaskNotFoundError):
        VLoRACallback(subspace, "nobody")
    with pytest.raises(OptionError, match="log_every"):
        VLoRACallback(subspace, "new", log_every=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains(
    tiny_family: tuple[Any, SharedSubspace], tmp_path: Path, reentrant: bool
) -> None:
    from transformers import Trainer

    from vllm_vlora.integrations.huggingface import VLoRACallback

    model, subspace = tiny_family
    before = trained_cores(subspace)
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        ),
        train_dataset=Rows(32),
        callbacks=[VLoRACallback(subspace, "new", lr=0.02)],
    )
    trainer.train()
    assert any(not torch.equal(c, before[n]) for n, c in trained_cores(subspace).items())
    model.gradient_checkpointing_disable()


def test_a_flat_task_trains_through_the_trainer(family: Family, tmp_path: Path) -> None:
    from transformers import Trainer

    from vllm_vlora.integrations.huggingface import VLoRACallback

    subspace = SharedSubspace.from_adapters(family.adapters, num_components=4)
    torch.manual_seed(0)
    orthogonal_init(subspace, "new")
    callback = VLoRACallback(subspace, "new", lr=0.05)
    trainer = Trainer(
        model=family.model,
        args=arguments(
            tmp_path, max_steps=15, logging_strategy="steps", logging_steps=1, max_grad_norm=0.0
        ),
        train_dataset=Rows(64),
        callbacks=[callback],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert any(float(t.abs().max()) > 0 for t in subspace.tasks["new"].loadings_b.values())
