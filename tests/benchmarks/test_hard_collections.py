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

from fidelity.hard import table, tables, train  # noqa: E402
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


def test_there_are_six_collections_on_two_models() -> None:
    assert len(COLLECTIONS) >= 6
    assert {found.model for found in COLLECTIONS.values()} == {"prose", "code"}
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
        assert 0 < sum(not plan.in_basis for plan in found.tasks) < len(names) / 4


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
