"""The hard collections: text is of one use only, styles differ, what is made can be read and judged."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

sys.path[:0] = [str(ROOT / "benchmarks")]

from fidelity.hard import commands, table, tables, train  # noqa: E402
from fidelity.hard.command_tables import parts_of_loss  # noqa: E402
from fidelity.hard.corpus import LONGEST, SHORTEST, Passage, _cut, _function  # noqa: E402
from fidelity.hard.plans import COLLECTIONS, MODELS, HardCollection, Model, Plan  # noqa: E402
from fidelity.hard.styles import CODE, PROSE  # noqa: E402
from fidelity.inputs import CollectionFolder  # noqa: E402

TEXT = """Return the {word} of a mailbox, and its flags.

    The {word} is read from the server: it is a list, or None. You are to
    call this with a lock; for {word} in others: see poll(self, x='{word}').
    b = 2  # a comment on {word}
    if self.a_name == None:
        return first_name (a, b)"""
SAMPLE = TEXT.format(word="state")


def passages() -> tuple[Passage, ...]:
    return tuple(
        Passage(TEXT.format(word=f"{chr(97 + n % 26)}{n}"), ("tkinter", "email")[n % 2])
        for n in range(120)
    )


TINY = HardCollection(
    "tiny",
    "tiny",
    (
        Plan("lower", PROSE["lower"], ("email",), 4, 6, "parent"),
        Plan("narrow", PROSE["narrow"], ("tkinter",), 4, 6, "parent"),
        Plan("loud", PROSE["loud"], ("tkinter",), 8, 6, in_basis=False),
    ),
    (Plan("parent", PROSE["quoted"], rank=4, steps=6),),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", Model("tiny", passages, 300, 32, 2, 4, 4))
        return train.make_collection(TINY, root)


def test_every_style_writes_something_else() -> None:
    for styles in (PROSE, CODE):
        written = {name: style(SAMPLE) for name, style in styles.items()}
        assert written.pop("plain") == SAMPLE
        assert SAMPLE not in written.values()
        assert len(set(written.values())) == len(written)


def test_there_are_collections_on_three_models_of_two_kinds() -> None:
    assert len(COLLECTIONS) >= 6
    assert {found.model for found in COLLECTIONS.values()} == MODELS.keys()
    assert {model.kind for model in MODELS.values()} == {"llama", "gemma3"}
    assert max(len(found.tasks) for found in COLLECTIONS.values()) >= 60
    ranks = {plan.rank for found in COLLECTIONS.values() for plan in found.tasks}
    assert {4, 64} <= ranks
    for found in COLLECTIONS.values():
        if found.of:
            assert set(found.of) <= COLLECTIONS.keys()
            assert {COLLECTIONS[name].model for name in found.of} == {found.model}
            continue
        names = [plan.name for plan in (*found.tasks, *found.parents)]
        assert len(set(names)) == len(names)
        assert {plan.parent for plan in found.tasks} - {None} == {p.name for p in found.parents}
        assert 0 < sum(not plan.in_basis for plan in found.tasks) <= len(names) / 4


def test_a_model_may_be_of_another_kind(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = Model("other", passages, 300, 32, 2, 4, 4, "gemma3", 1)
    found = AutoModelForCausalLM.from_pretrained(train.make_model(model, tmp_path / "other"))
    assert type(found).__name__ == "Gemma3ForCausalLM"
    attention = found.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (32, 8)
    assert attention.sliding_window < 512
    kinds = {name.rpartition(".")[2] for name, _ in found.named_modules()}
    assert set(train.TARGETS) <= kinds


def test_no_text_has_two_uses() -> None:
    plan = Plan("any", str)
    parts: dict[str, Sequence[str]] = {
        part: train.texts_of(plan, passages(), part, 1000) for part in ("base", "train", "held out")
    }
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 120
    email = train.texts_of(Plan("e", str, ("email",)), passages(), "train", 5)
    assert len(email) == 5
    assert set(email) <= {p.text for p in passages() if p.source == "email"}


def test_text_is_cut_at_the_end_of_a_line_and_functions_lose_their_margin() -> None:
    assert _cut("short") == "short"
    lines = "\n".join(f"line {number} of many" for number in range(60))
    cut = _cut(lines)
    assert SHORTEST <= len(cut) <= LONGEST
    assert lines.startswith(f"{cut}\n")
    import ast

    source = "class A:\n    def f(self):\n        return 1\n\x0c\n    def g(self):\n        pass\n"
    (cls,) = ast.parse(source).body
    assert isinstance(cls, ast.ClassDef)
    found = [_function(source, node) for node in cls.body if isinstance(node, ast.FunctionDef)]
    assert found == ["def f(self):\n    return 1", "def g(self):\n    pass"]


def test_what_is_made_is_a_collection_of_the_benchmark(made: Path) -> None:
    found = CollectionFolder(made)
    assert list(found.in_basis) == ["lower", "narrow"]
    assert list(found.held_out) == ["loud"]
    document = json.loads((made / "collection.json").read_text())
    assert (made / document["model"] / "config.json").is_file()
    assert document["tasks"]["lower"]["parent"] == "parent"
    assert len(found.data("lower").read_text().splitlines()) > 3
    assert found.data("lower").read_text().islower()
    # A child goes on from its parent.
    weights = {
        name: load_file(made / kind / name / "adapter_model.safetensors")
        for kind, name in (("parents", "parent"), ("adapters", "lower"), ("adapters", "narrow"))
    }
    for name in ("lower", "narrow"):
        for key, tensor in weights[name].items():
            if "lora_A" in key:
                parent = weights["parent"][key]
                cosine = torch.cosine_similarity(tensor.flatten(), parent.flatten(), 0)
                assert 0.9 < float(cosine) < 1, key


def test_the_table_has_a_row_for_a_size(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny", "--folder", made.parent, "--ratios", 2, 10000, "--examples", 4]
    records = made.parent / "records.jsonl"
    assert table.main([str(part) for part in (*arguments, "--json", records)]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny | 2x")
    ]
    # What every form keeps, and what scaled ones do.
    assert len(lines) == 2
    found = [json.loads(line) for line in records.read_text().splitlines()]
    (first,) = [record for record in found if record.get("forms")]
    # Of a size that is out of reach no form is written.
    assert {record["ratio"]: bool(record["forms"]) for record in found if "ratio" in record} == {
        2.0: True,
        10000.0: False,
    }
    assert [sorted(r["compress_seconds"]) for r in found if "ratio" not in r]
    assert {"private", "joint", "private unbiased"} <= first["forms"].keys()
    for form in first["forms"].values():
        assert form["in_basis"].keys() == {"lower", "narrow"}
        for measured in form["in_basis"].values():
            # None where the original does not differ from the base model on so little text.
            assert measured["kl_kept"] is None or 0 < measured["kl_kept"] <= 1.001
            assert 0 < measured["judged"] <= 1.001
    chosen = max(
        ("private", "joint", "mixed"),
        key=lambda n: tables.mean(first, n, "in_basis", "judged") or 0,
    )
    assert f"| {chosen} (+0.0000 +- 0.0000) |" in lines[0]
    # Nothing that is there is measured again.
    before = records.read_bytes()
    assert table.main([str(part) for part in (*arguments, "--json", records)]) == 0
    assert records.read_bytes() == before


def _update(folder: Path, module: str) -> torch.Tensor:
    """delta_W in float64, by PEFT's definition."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


def test_originals_are_scaled_and_children_set_apart(made: Path, tmp_path: Path) -> None:
    child, parent = made / "adapters" / "lower", made / "parents" / "parent"
    larger = commands.scaled(child, 1.2, tmp_path / "larger")
    further = commands.apart(child, parent, 1.5, tmp_path / "further")
    there = commands.apart(child, parent, 0.0, tmp_path / "there")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        ours, theirs = _update(child, module), _update(parent, module)
        torch.testing.assert_close(_update(larger, module), 1.2 * ours, rtol=1e-6, atol=1e-9)
        expected = theirs + 1.5 * (ours - theirs)
        torch.testing.assert_close(_update(further, module), expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(_update(there, module), theirs, rtol=1e-6, atol=1e-9)


def test_what_is_not_recovered_has_two_parts() -> None:
    """One position of two tokens: all is distance where the data are as the original says."""
    base, original, stored = (torch.tensor([p, 1 - p]).double() for p in (0.5, 0.8, 0.7))

    def row(data: torch.Tensor) -> dict[str, float]:
        def loss(model: torch.Tensor) -> float:
            return float(-(data * model.log()).sum())

        def apart(model: torch.Tensor) -> float:
            return float((original * (original / model).log()).sum())

        gain = loss(base) - loss(original)
        return {
            "kl_kept": 1 - apart(stored) / apart(base),
            "kl_base": apart(base),
            "recovered": (loss(base) - loss(stored)) / gain,
            "gain": gain,
        }

    right = parts_of_loss({"task": row(original)})
    assert right["lost"] == pytest.approx(right["distance"], rel=1e-9)
    assert right["slope"] == pytest.approx(0, abs=1e-12)
    # Where the data go further than the original says, whatever goes less far is behind by more.
    further = parts_of_loss({"task": row(torch.tensor([0.9, 0.1]).double())})
    assert further["slope"] > 0.05
    assert further["lost"] == pytest.approx(further["distance"] + further["slope"], rel=1e-9)


def test_commands_are_measured_as_they_are_given(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = made.parent / "commands.jsonl"
    arguments = ["tiny", "--folder", made.parent, "--examples", 4, "--json", records,
                 "--measured", made.parent / "none.jsonl"]  # fmt: skip
    forms = ["--forms", "auto", "joint", "--add", "--scaled"]
    assert commands.main([str(part) for part in (*arguments, "--ratios", 2, *forms)]) == 0
    printed = capsys.readouterr().out
    (record,) = [json.loads(line) for line in records.read_text().splitlines()]
    found = record["forms"]
    assert {"auto", "joint", "original x 110%", "apart x 0%"} <= found.keys()
    for name in ("auto", "joint"):
        assert found[name]["in_basis"].keys() == {"lower", "narrow"}
        assert found[name]["added"]["tasks"].keys() == {"loud"}
        assert found[name]["error"] > 0
    assert found["joint"]["expanded"]["stored"].keys() == {"loud"}
    assert "2 of 2 adapters" in found["auto"]["chosen_by"]
    for name, far in (("original x 110%", 0.01), ("apart x 0%", 1.0)):
        for kept in found[name]["in_basis"].values():
            assert kept["kl_kept"] is None or 1 - far < kept["kl_kept"] <= 1
    # A row of what was chosen; and of tasks in the basis, added and, where it can grow, expanded.
    rows = [line for line in printed.splitlines() if line.startswith("| tiny | 2x")]
    assert sum("| in_basis |" in line for line in rows) == 1
    assert sum("| added |" in line for line in rows) == 1
    # A size that nothing reaches is kept as what the command says; nothing is measured twice.
    assert commands.main([str(part) for part in (*arguments, "--ratios", 2, 10000)]) == 0
    capsys.readouterr()
    records = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(records) == 2
    assert "10000" in records[1]["forms"]["auto"]["refused"]
