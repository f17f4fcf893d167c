"""TaskRouter: its weights, its blends against single tasks, and that it learns to route."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import TinyModel, tiny_adapters, tiny_weights

from vllm_vlora.errors import OptionError, TaskNotFoundError
from vllm_vlora.model.router import TaskRouter
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.subspace.shared import SharedSubspace

TASKS = [f"task_{i}" for i in range(4)]


@pytest.fixture
def joint() -> SharedSubspace:
    return SharedSubspace.from_adapters(tiny_adapters(4), num_components=4, representation="joint")


def clusters(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Points around four corners of a square, which no single direction tells apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    corners = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    x = corners[labels] + 0.3 * torch.randn(count, 2, generator=generator)
    return x, [TASKS[label] for label in labels]


def test_weights_are_a_softmax_of_the_network() -> None:
    torch.manual_seed(0)
    router = TaskRouter(5, 4, hidden_dim=8, temperature=0.5)
    x = torch.randn(6, 5)
    first, last = router.net[0], router.net[2]
    hidden = (x.double() @ first.weight.double().T + first.bias.double()).clamp(min=0)
    logits = (hidden @ last.weight.double().T + last.bias.double()) / 0.5
    wanted = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(router(x).double(), wanted, rtol=1e-5, atol=1e-6)
    assert router.task_ids == TASKS
    assert router.num_params == 5 * 8 + 8 + 8 * 4 + 4
    assert router.predict(x) == [TASKS[i] for i in wanted.argmax(dim=1)]


def test_a_higher_temperature_is_more_even() -> None:
    torch.manual_seed(0)
    cold, warm = TaskRouter(3, 4, temperature=0.2), TaskRouter(3, 4, temperature=5.0)
    warm.load_state_dict(cold.state_dict())
    x = torch.randn(10, 3)
    assert (warm(x).amax(dim=1) < cold(x).amax(dim=1)).all()


def test_fit_learns_what_is_not_linear_and_holds_on_new_rows() -> None:
    torch.manual_seed(0)
    router = TaskRouter(2, 4, hidden_dim=16)
    x, labels = clusters(200, seed=1)
    losses = router.fit(x, labels, epochs=60, lr=0.02)
    assert len(losses) == 60
    assert losses[-1] < 0.1 < losses[0]
    x, labels = clusters(100, seed=2)
    right = sum(found == label for found, label in zip(router.predict(x), labels))
    assert right >= 97


def test_fit_is_repeatable() -> None:
    x, labels = clusters(50, seed=1)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        router = TaskRouter(2, 4)
        runs.append(router.fit(x, labels, epochs=3, seed=5))
    assert runs[0] == runs[1]


def test_a_router_of_a_subspace_prefers_no_task_at_first() -> None:
    # Two of the tasks are nearly the same, and one is loud.
    adapters = [tiny_weights(0), tiny_weights(0, alpha=4.2), tiny_weights(1), tiny_weights(2)]
    adapters[3].lora_b = {name: 50 * b for name, b in adapters[3].lora_b.items()}
    joint = SharedSubspace.from_adapters(adapters, num_components=6, representation="joint")
    torch.manual_seed(0)
    router = TaskRouter.from_subspace(joint, input_dim=3, hidden_dim=512)
    weight = router.net[2].weight.detach()
    cosines = torch.nn.functional.cosine_similarity(weight[:, None], weight[None], dim=2)
    assert cosines[0, 1] > 0.95
    assert cosines[0, 2].abs() < 0.4
    assert torch.equal(router.net[2].bias, torch.zeros(4))
    weights = router(torch.randn(2000, 3)).mean(dim=0)
    assert weights.max() < 0.35
    plain = TaskRouter.from_subspace(joint, input_dim=3, hidden_dim=512, init_from_loadings=False)
    weight = plain.net[2].weight.detach()
    assert torch.nn.functional.cosine_similarity(weight[0], weight[1], dim=0) < 0.5


def test_the_init_tells_sizes_from_directions() -> None:
    """Cosines of cores are those of the updates, since the bases are orthonormal."""
    from vllm_vlora.model.router import _loading_cosines

    adapters = tiny_adapters(4, spread=0.4)
    joint = SharedSubspace.from_adapters(adapters, num_components=8, representation="joint")
    flat = [
        torch.cat(
            [
                (w.scale(name) * w.lora_b[name].double() @ w.lora_a[name].double()).flatten()
                for name in w.layer_names
            ]
        )
        for w in adapters
    ]
    found = _loading_cosines([joint.tasks[task] for task in TASKS])
    for i in range(4):
        for j in range(4):
            wanted = torch.nn.functional.cosine_similarity(flat[i], flat[j], dim=0)
            torch.testing.assert_close(found[i, j], wanted, rtol=1e-4, atol=1e-4)


def test_a_blend_is_row_by_row_and_not_the_mean(joint: SharedSubspace) -> None:
    torch.manual_seed(0)
    router = TaskRouter.from_subspace(joint, input_dim=2, hidden_dim=16)
    x, labels = clusters(200, seed=1)
    router.fit(x, labels, epochs=40, lr=0.03)
    base = TinyModel()
    model = VLoRAModel(base, joint)
    corners = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    inputs = torch.randn(4, 12)
    weights = router.blend(corners, model)
    assert (weights.diagonal() > 0.97).all()
    blended = model(inputs)
    for row, task in enumerate(TASKS):
        with model.task(task):
            torch.testing.assert_close(blended[row], model(inputs)[row], rtol=0.1, atol=0.06)
    # vlora's blend is one task for the batch: a quarter of each.
    joint.add_task(router.blend_loadings(corners, joint))
    model.set_task("__routed__")
    assert (model(inputs) - blended).abs().max() > 0.3
    # For one row both are the same on a joint basis.
    joint.add_task(router.blend_loadings(corners[2:3], joint), replace=True)
    model.set_task("__routed__")
    routed = model(inputs[:1])
    router.blend(corners[2:3], model)
    torch.testing.assert_close(model(inputs[:1]), routed, rtol=1e-4, atol=1e-5)


def test_a_flat_blend_is_exact_in_a_model_and_not_in_loadings() -> None:
    flat = SharedSubspace.from_adapters(tiny_adapters(4), num_components=2)
    torch.manual_seed(0)
    router = TaskRouter.from_subspace(flat, input_dim=3)
    x = torch.randn(1, 3)
    weights = router(x)[0].detach().double()
    base = TinyModel()
    model = VLoRAModel(base, flat)
    inputs = torch.randn(1, 12)
    router.blend(x, model)
    found = model(inputs) - base_only(model, inputs)
    wanted = torch.zeros(1, 14, dtype=torch.float64)
    for weight, task in zip(weights, TASKS):
        with model.task(task):
            wanted += weight * (model(inputs) - base_only(model, inputs)).double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    flat.add_task(router.blend_loadings(x, flat))
    model.set_task("__routed__")
    assert ((model(inputs) - base_only(model, inputs)).double() - wanted).abs().max() > 1e-3


def base_only(model: VLoRAModel, x: torch.Tensor) -> torch.Tensor:
    with model.task(None):
        return model(x)  # type: ignore[no-any-return]


def test_a_loss_behind_the_model_trains_the_router(joint: SharedSubspace) -> None:
    """Rows from four corners, each to be answered as its own task would; no label names the task."""
    torch.manual_seed(0)
    model = VLoRAModel(TinyModel(), joint)
    router = TaskRouter.from_subspace(joint, input_dim=2, hidden_dim=16)
    x, labels = clusters(64, seed=1)
    inputs = torch.randn(64, 12)
    model.set_tasks(labels)
    answers = model(inputs).detach()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        router.blend(x, model)
        loss = (model(inputs) - answers).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    right = sum(found == label for found, label in zip(router.predict(x), labels))
    assert right >= 60


def test_bad_arguments_are_refused(joint: SharedSubspace) -> None:
    for arguments in (
        {"input_dim": 0, "num_tasks": 2},
        {"input_dim": 2, "num_tasks": 0},
        {"input_dim": 2, "num_tasks": 2, "hidden_dim": 0},
        {"input_dim": 2, "num_tasks": 2, "temperature": 0.0},
        {"input_dim": 2, "num_tasks": 2, "temperature": float("nan")},
        {"input_dim": 2, "num_tasks": 2, "task_ids": ["a"]},
        {"input_dim": 2, "num_tasks": 2, "task_ids": ["a", "a"]},
    ):
        with pytest.raises(OptionError):
            TaskRouter(**arguments)  # type: ignore[arg-type]
    router = TaskRouter(2, 4)
    x = torch.ones(3, 2)
    with pytest.raises(OptionError, match="rows, input_dim"):
        router(torch.ones(3, 5))
    with pytest.raises(OptionError, match="none of the router's"):
        router.fit(x, ["task_0", "task_1", "somebody"])
    with pytest.raises(OptionError, match="3 rows of features and 2 tasks"):
        router.fit(x, ["task_0", "task_1"])
    with pytest.raises(OptionError, match="NaN"):
        router.fit(x * float("nan"), ["task_0"] * 3)
    with pytest.raises(OptionError, match="positive"):
        router.fit(x, ["task_0"] * 3, epochs=0)
    other = TaskRouter(2, 2, task_ids=["task_0", "elsewhere"])
    with pytest.raises(TaskNotFoundError, match="elsewhere"):
        other.blend_loadings(x, joint)
    with pytest.raises(TaskNotFoundError, match="elsewhere"):
        other.blend(x, VLoRAModel(TinyModel(), joint))
