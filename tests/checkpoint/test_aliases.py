"""Aliases: they travel with the checkpoint, name what there is, and nothing loses them in silence."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from edited_world import NEW, OLD, World
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_vlora.blend_names import Term, parse_blend
from vllm_vlora.checkpoint.aliases import ALIASES_FILE, Route, encode_aliases, read_aliases
from vllm_vlora.checkpoint.hub import pull_checkpoint
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.editing.aliasing import parse_routes, remove_alias, set_alias
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import (
    BlendError,
    CheckpointError,
    OptionError,
    OutputError,
    TaskIdError,
    TaskNotFoundError,
    VLoRAError,
)
from vllm_vlora.merging.blending import blend_tasks
from vllm_vlora.tools.cli import app


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return World.at(tmp_path / "world").checkpoint


def aliases_of(checkpoint: Path) -> dict[str, list[tuple[int, dict[str, str]]]]:
    return {
        name: [(share, {t.task: str(t.weight) for t in blend}) for share, blend in routes]
        for name, routes in Checkpoint.open(checkpoint).aliases.items()
    }


def adapters_of(checkpoint: Path) -> Path:
    return checkpoint.parent.parent / "adapters"


def originals(checkpoint: Path, *tasks: str) -> dict[str, object]:
    from vllm_vlora.adapters.peft_folder import open_adapter

    return {task: open_adapter(adapters_of(checkpoint) / task) for task in tasks}


# --- set, listed, taken away ------------------------------------------------------------------------


def test_a_name_for_each_kind(checkpoint: Path) -> None:
    set_alias(checkpoint, "prod", "task0")
    set_alias(checkpoint, "mixed", "task1*.70+task2*0.3")
    set_alias(checkpoint, "ten % new", "task0 90, task1-task2*0.5 10")
    assert aliases_of(checkpoint) == {
        "prod": [(1, {"task0": "1"})],
        "mixed": [(1, {"task1": "0.7", "task2": "0.3"})],
        "ten % new": [(90, {"task0": "1"}), (10, {"task1": "1", "task2": "-0.5"})],
    }
    set_alias(checkpoint, "prod", "task3")
    remove_alias(checkpoint, "mixed")
    assert aliases_of(checkpoint).keys() == {"prod", "ten % new"}
    assert aliases_of(checkpoint)["prod"] == [(1, {"task3": "1"})]
    assert validate(checkpoint) == []


def test_files_of_weights_are_not_touched(checkpoint: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != ALIASES_FILE]
        return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}

    before = state()
    set_alias(checkpoint, "prod", "task0")
    assert state() == before


def test_the_content_digest_covers_them(checkpoint: Path) -> None:
    def digest() -> str:
        return Checkpoint.open(checkpoint).content_digest

    plain = digest()
    set_alias(checkpoint, "prod", "task0")
    named = digest()
    set_alias(checkpoint, "prod", "task1")
    assert len({plain, named, digest()}) == 3
    set_alias(checkpoint, "prod", "task0")
    assert digest() == named
    remove_alias(checkpoint, "prod")
    assert digest() == plain
    with pytest.raises(CheckpointError, match="which was asked for"):
        Checkpoint.open(f"{checkpoint}@sha256:{named}")


@pytest.mark.parametrize(
    ("name", "target", "error", "reason"),
    [
        ("task1", "task0", OptionError, "'task1' is a task of"),
        ("prod", "nothing", BlendError, "no task is called 'nothing'"),
        ("prod", "task0+nothing", BlendError, "is none"),
        ("prod", "old", BlendError, "'old' is an alias, and an alias stands for tasks"),
        ("prod", "task0 90, nothing 10", BlendError, "no task is called 'nothing'"),
        ("prod", "task0 90, task1", BlendError, "'task1' is no target with a share"),
        ("prod", "task0 90 task1 10", BlendError, "'task0 90 task1'; write NAME SHARE, NAME SHARE"),
        ("prod", "task0 90,", BlendError, "behind the last comma"),
        ("prod", "task0 0, task1 1", BlendError, "share 0"),
        ("prod", "task0 1000001, task1 1", BlendError, "share 1000001"),
        ("prod", ", ".join(["task0 1"] * 17), BlendError, "1 to 16 targets"),
        ("prod", "task0*0", BlendError, "weight 0"),
        ("", "task0", TaskIdError, "empty"),
        ("a\n", "task0", TaskIdError, "control"),
    ],
)
def test_what_is_refused(
    checkpoint: Path, name: str, target: str, error: type[VLoRAError], reason: str
) -> None:
    set_alias(checkpoint, "old", "task0")
    before = (checkpoint / ALIASES_FILE).read_bytes()
    with pytest.raises(error, match=reason):
        set_alias(checkpoint, name, target)
    assert (checkpoint / ALIASES_FILE).read_bytes() == before


def test_removing_what_is_not_there(checkpoint: Path) -> None:
    set_alias(checkpoint, "prod", "task0")
    with pytest.raises(OptionError, match=r"no alias 'other'; it has: prod"):
        remove_alias(checkpoint, "other")
    with pytest.raises(OptionError, match="is no folder; pull it"):
        set_alias("org/name", "prod", "task0")


def test_ids_with_blanks_and_commas_keep_their_shares() -> None:
    tasks = {"a b", "a, b", "c 5", "c"}
    routes = parse_routes("a b 1,  a, b 20 , c 5 3", tasks)
    assert [(share, blend[0].task) for share, blend in routes] == [
        (1, "a b"),
        (20, "a, b"),
        (3, "c 5"),
    ]
    # A text that is a task is that task.
    assert parse_routes("c 5", tasks) == (Route(1, parse_blend("c 5", tasks)),)


ids = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12)
weights = st.decimals("-100", "100", places=6).filter(bool)
blends = st.lists(st.builds(Term, ids, weights), min_size=1, max_size=8, unique_by=lambda t: t.task)
routes = st.lists(st.builds(Route, st.integers(1, 1000), blends.map(tuple)), min_size=1, max_size=4)


@given(st.dictionaries(ids, routes.map(tuple), max_size=4))
def test_what_is_written_is_read(aliases: dict[str, tuple[Route, ...]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ALIASES_FILE).write_bytes(encode_aliases(aliases))
        found = read_aliases(Path(folder), None)
    assert {n: [(s, set(b)) for s, b in r] for n, r in found.items()} == {
        n: [(s, set(b)) for s, b in r] for n, r in aliases.items()
    }
    assert encode_aliases(found) == encode_aliases(aliases)


# --- along with edits ---------------------------------------------------------------------------------


def test_edits_carry_them_along(checkpoint: Path, tmp_path: Path) -> None:
    set_alias(checkpoint, "prod", "task0 90, task1 10")
    before = aliases_of(checkpoint)
    add_adapters(checkpoint, originals(checkpoint, NEW[0]), AddOptions())  # type: ignore[arg-type]
    remove_tasks(checkpoint, ["task3"])
    blend_tasks(checkpoint, {"task0": 0.5, "task1": 0.5}, "half")
    remove_tasks(checkpoint, ["half"], output=tmp_path / "copy")
    pulled = pull_checkpoint(str(tmp_path / "copy"), tmp_path / "pulled")
    for folder in (checkpoint, tmp_path / "copy", pulled.path):
        assert aliases_of(folder) == before
        assert validate(folder) == []
    assert not list(checkpoint.glob("*.old"))


def test_compressing_anew_keeps_them(checkpoint: Path) -> None:
    set_alias(checkpoint, "prod", "task0")
    options = CompressOptions(ratio=2.0)
    compress(originals(checkpoint, "task0", "task1"), checkpoint, options, force=True)  # type: ignore[arg-type]
    assert aliases_of(checkpoint) == {"prod": [(1, {"task0": "1"})]}
    before = Checkpoint.open(checkpoint).content_digest
    with pytest.raises(OutputError, match=r"alias 'prod' names task 'task0', which there is not"):
        compress(originals(checkpoint, "task1"), checkpoint, options, force=True)  # type: ignore[arg-type]
    assert Checkpoint.open(checkpoint).content_digest == before


def test_a_task_that_an_alias_names_is_not_removed(checkpoint: Path) -> None:
    set_alias(checkpoint, "-prod", "task0 90, task1 10")
    before = Checkpoint.open(checkpoint).content_digest
    with pytest.raises(OutputError) as caught:
        remove_tasks(checkpoint, ["task1"])
    line = f"vllm-vlora alias {checkpoint} --remove -- -prod"
    assert str(caught.value).endswith(line)
    assert "alias '-prod' names task 'task1'" in str(caught.value)
    assert Checkpoint.open(checkpoint).content_digest == before
    arguments = line.split()[1:]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    remove_tasks(checkpoint, ["task1"])
    assert "task1" not in Checkpoint.open(checkpoint).tasks


def test_a_new_task_may_not_take_an_alias_name(checkpoint: Path) -> None:
    set_alias(checkpoint, NEW[0], OLD[0])
    with pytest.raises(OutputError, match=f"alias '{NEW[0]}' has the name of a task with this"):
        add_adapters(checkpoint, originals(checkpoint, NEW[0]), AddOptions())  # type: ignore[arg-type]
    assert NEW[0] not in Checkpoint.open(checkpoint).tasks


# --- damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "copy the checkpoint again"),
        ('{"version": 2, "aliases": {}}', "upgrade"),
        ('{"version": 1, "aliases": {}, "more": 1}', "more"),
        ('{"version": 1, "aliases": {"a": []}}', "1 to 16"),
        ('{"version": 1, "aliases": {"a": [{"share": 0, "terms": {"task0": "1"}}]}}', ">= 1"),
        ('{"version": 1, "aliases": {"a": [{"share": 1, "terms": {}}]}}', "1 to 8"),
        ('{"version": 1, "aliases": {"a": [{"share": 1, "terms": {"task0": "NaN"}}]}}', "plainly"),
        ('{"version": 1, "aliases": {"a": [{"share": 1, "terms": {"task0": "x"}}]}}', "no number"),
        ('{"version": 1, "aliases": {"a": [{"share": 1, "terms": {"task0": "1e9"}}]}}', "plainly"),
        ('{"version": 1, "aliases": {"a": [{"share": 1, "terms": {"task0": "101"}}]}}', "101"),
        ('{"version": 1, "aliases": {"a": [{"share": 1, "terms": {"gone": "1"}}]}}', "'gone'"),
        ('{"version": 1, "aliases": {"task1": [{"share": 1, "terms": {"task0": "1"}}]}}', "of a"),
        ('{"version": 1, "aliases": {"\\u0007": [{"share": 1, "terms": {"task0": "1"}}]}}', "U+"),
    ],
)
def test_a_damaged_file_is_said(checkpoint: Path, content: str, reason: str) -> None:
    (checkpoint / ALIASES_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=reason.replace("+", r"\+")):
        _ = Checkpoint.open(checkpoint).aliases
    [problem] = validate(checkpoint)
    assert ALIASES_FILE in problem


@pytest.mark.parametrize("target", ["nope", "task0-v7", "task0*"])
def test_a_task_that_there_is_not_is_named_with_those_there_are(
    checkpoint: Path, target: str
) -> None:
    with pytest.raises(TaskNotFoundError) as caught:
        set_alias(checkpoint, "prod", target, kind="task")
    assert f"no task {target!r}; it has: task0, " in str(caught.value)
    with pytest.raises(BlendError, match="is a blend and no task; give the id"):
        set_alias(checkpoint, "prod", "task0*0.5", kind="task")


def test_an_alias_of_a_task_that_is_gone_can_be_mended(checkpoint: Path) -> None:
    """An older version that knows no aliases may have removed the task."""
    content = encode_aliases({"prod": (Route(1, (Term("gone", Decimal(1)),)),)})
    (checkpoint / ALIASES_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="take it away first"):
        _ = Checkpoint.open(checkpoint).aliases
    set_alias(checkpoint, "prod", "task0")
    assert aliases_of(checkpoint) == {"prod": [(1, {"task0": "1"})]}


def test_a_link_out_is_not_followed(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"version": 1, "aliases": {}}')
    (checkpoint / ALIASES_FILE).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError):
        _ = Checkpoint.open(checkpoint).aliases


# --- the command ----------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["alias", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command(checkpoint: Path) -> None:
    assert run(checkpoint) == (0, f"{checkpoint} has no aliases.\n")
    assert run(checkpoint, "prod", "task0")[0] == 0
    assert run(checkpoint, "mixed", "--blend", "task1*0.70-task2")[0] == 0
    code, text = run(checkpoint, "new", "--canary", "task0 3, task1 1")
    assert (code, text.splitlines()) == (
        0,
        [
            "Alias          mixed -> task1*0.7-task2 (blend)",
            "Alias          new -> task0 (0.75), task1 (0.25) (canary)",
            "Alias          prod -> task0 (task)",
        ],
    )
    code, text = run(checkpoint, "--json")
    assert json.loads(text)["aliases"][1] == {
        "alias": "new",
        "kind": "canary",
        "targets": [
            {"target": "task0", "share": 0.75, "tasks": {"task0": 1.0}},
            {"target": "task1", "share": 0.25, "tasks": {"task1": 1.0}},
        ],
    }
    shown = CliRunner().invoke(app, ["info", str(checkpoint)]).output
    assert "Alias          prod -> task0 (task)" in shown
    assert run(checkpoint, "prod", "--remove")[0] == 0
    assert "prod" not in aliases_of(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["prod"], "give one of TASK, --blend, --canary and --remove"),
        (["prod", "task0", "--remove"], "give one of TASK"),
        (["prod", "task0", "--blend", "task1*0.5"], "give one of TASK"),
        (["--remove"], "name the alias"),
        (["prod", "task0*0.5"], "'task0*0.5' is a blend and no task; give the id"),
        (["prod", "--blend", "task0"], "'task0' is a task and no blend; write one as"),
        (["prod", "--canary", "task0"], "'task0' is a task and no canary; write one as"),
    ],
)
def test_what_the_command_refuses(checkpoint: Path, arguments: list[str], reason: str) -> None:
    code, text = run(checkpoint, *arguments)
    assert code == 2
    assert reason in text
    assert not (checkpoint / ALIASES_FILE).exists()
