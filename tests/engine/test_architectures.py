"""Everything in one batch on many architectures: joint, private and ordinary adapters, and the base.

Log-probabilities of the whole vocabulary at every step are those of PEFT on transformers, or of stock
vLLM one by one. ``make architectures`` runs them all and prints the table of ``docs/models.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from architectures import (
    ARCHITECTURES,
    BY_NAME,
    ORDINARY,
    VOCABULARIES,
    Answers,
    Architecture,
    ask_ours,
    ask_peft,
    ask_stock,
    distances,
    write_adapters,
    write_checkpoint,
    write_model,
)
from engine_world import older_vllm

# Modules that vLLM cuts into slices of its own, or has under other names; and a head of a row a request.
RISKIEST = (
    "GraniteMoeHybridForCausalLM",
    "FalconH1ForCausalLM",
    "LlamaForSequenceClassification",
)
# Layers of every kind, for the mode in which slots alone count.
MATERIALIZED = (
    *RISKIEST,
    "LlamaForCausalLM",
    "Phi3ForCausalLM",
    "BertModel",
)


class Made(NamedTuple):
    model: Path
    adapters: dict[str, Path]
    checkpoint: Path
    right: Answers


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Made]:
    """Made once for all modes."""
    held: dict[str, Made] = {}

    def make_one(architecture: Architecture) -> Made:
        if architecture.name not in held:
            root = tmp_path_factory.mktemp("architecture")
            model = write_model(architecture, root / "model")
            adapters = write_adapters(architecture, model, root)
            checkpoint = write_checkpoint(adapters, root)
            ask = ask_peft if architecture.by_peft else ask_stock
            right = ask(architecture, model, adapters)
            held[architecture.name] = Made(model, adapters, checkpoint, right)
        return held[architecture.name]

    return make_one


def _cases() -> list[Any]:
    """Of all of them the riskiest run with the other engine tests too."""
    return [
        pytest.param(
            architecture.name,
            mode,
            marks=[
                pytest.mark.architectures,
                *([pytest.mark.engine] if architecture.name in RISKIEST and mode == "auto" else []),
            ],
        )
        for architecture in ARCHITECTURES
        for mode in ("auto", "materialize")
        if mode == "auto" or architecture.name in MATERIALIZED
    ]


@pytest.mark.skipif(older_vllm(0, 32), reason="not every class is there, or as it is in 0.32")
@pytest.mark.parametrize(("name", "mode"), _cases())
def test_everything_in_one_batch_is_right(
    make: Callable[[Architecture], Made],
    name: str,
    mode: str,
    record_property: Callable[[str, object], None],
) -> None:
    architecture = BY_NAME[name]
    model, adapters, checkpoint, right = make(architecture)
    answers, found = ask_ours(architecture, model, adapters, checkpoint, mode)

    assert answers.keys() == right.keys()
    far = distances(answers, right)
    assert max(far.values()) <= architecture.noise, far
    assert {key: tokens for key, (tokens, _) in answers.items()} == {
        key: tokens for key, (tokens, _) in right.items()
    }
    # Each adapter tells, by far more than what is called noise.
    base = {f"{task} {n}": right[f"base {n}"] for task in adapters for n in range(3)}
    apart = distances(base, right)
    assert min(apart.values()) > 10 * architecture.noise, apart

    obstacles = found["obstacles"]
    assert obstacles.keys() == adapters.keys() - {ORDINARY}
    direct = {task for task, why in obstacles.items() if not why}
    in_slots = {VOCABULARIES} if mode == "auto" else obstacles.keys()
    assert direct == obstacles.keys() - in_slots, obstacles
    layers = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(found["layers"]).items()))
    record_property(
        "shown",
        f"{name}, {mode}: {len(direct)} direct, {len(obstacles) - len(direct)} materialized; off by "
        f"{max(far.values()):.1e}, apart by {min(apart.values()):.2f}; {layers}",
    )
