"""Tokenizer files and chat templates: into a checkpoint, along with its tasks, and out again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.tiny_adapters import save_tiny_adapters, tiny_adapters
from vllm_vlora.adapters.companions import companion_files
from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint import manifest
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.hub import pull_checkpoint
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.compression.quality import OneByOne, compress_judged, compress_to_quality
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import AdapterError, CheckpointError
from vllm_vlora.merging.blending import blend_tasks
from vllm_vlora.plugin.kept_templates import read_template, template_file
from vllm_vlora.tools.cli import app

TOKENIZER = b'{"version": "1.0", "added_tokens": []}'
TEMPLATE = b"{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOL_TEMPLATE = b"{{ tools }}"
NAMED = "additional_chat_templates/tool_use.jinja"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """task_0 and task_1 bring the same tokenizer, task_1 templates of its own, task_2 nothing."""
    paths = [Path(p) for p in save_tiny_adapters(tmp_path / "adapters", tiny_adapters(3))]
    for path in paths[:2]:
        (path / "tokenizer.json").write_bytes(TOKENIZER)
    (paths[1] / "chat_template.jinja").write_bytes(TEMPLATE)
    (paths[1] / NAMED).parent.mkdir()
    (paths[1] / NAMED).write_bytes(TOOL_TEMPLATE)
    (paths[1] / "optimizer.pt").write_bytes(b"not a companion")
    return paths


@pytest.fixture
def checkpoint(folders: list[Path], tmp_path: Path) -> Path:
    compress(
        {p.name: open_adapter(p) for p in folders}, tmp_path / "ckpt", CompressOptions(ratio=1)
    )
    return tmp_path / "ckpt"


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in companion_files(folder).items()}


def attached(checkpoint: Path) -> dict[str, list[str]]:
    found = Checkpoint.open(checkpoint).attachments
    return {task: sorted(files) for task, files in found.items()}


def test_the_same_file_is_stored_once_under_its_digest(checkpoint: Path) -> None:
    assert attached(checkpoint) == {
        "task_0": ["tokenizer.json"],
        "task_1": [NAMED, "chat_template.jinja", "tokenizer.json"],
    }
    stored = {p.name: p.read_bytes() for p in (checkpoint / "attachments").iterdir()}
    wanted = [TOKENIZER, TEMPLATE, TOOL_TEMPLATE]
    assert stored == {hashlib.sha256(data).hexdigest(): data for data in wanted}
    assert validate(checkpoint) == []


def test_a_checkpoint_without_any_has_no_trace_of_it(folders: list[Path], tmp_path: Path) -> None:
    tasks = {p.name: open_adapter(p) for p in folders}
    compress(tasks, tmp_path / "without", CompressOptions(ratio=1, tokenizers=False))
    compress({"task_2": tasks["task_2"]}, tmp_path / "none", CompressOptions(ratio=1))
    for name in ("without", "none"):
        assert not [p for p in (tmp_path / name).iterdir() if p.name.startswith("attach")]
        assert Checkpoint.open(tmp_path / name).attachments == {}


def test_weights_and_manifest_do_not_depend_on_them(
    folders: list[Path], checkpoint: Path, tmp_path: Path
) -> None:
    tasks = {p.name: open_adapter(p) for p in folders}
    compress(tasks, tmp_path / "without", CompressOptions(ratio=1, tokenizers=False))
    for name in ("vlora_config.json", "tasks.json", "tasks/task_1.safetensors"):
        assert (tmp_path / "without" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_an_export_has_the_files_that_the_adapter_had(
    folders: list[Path], checkpoint: Path, tmp_path: Path
) -> None:
    for folder in folders:
        out = export_task(Checkpoint.open(checkpoint), folder.name, tmp_path / "out" / folder.name)
        assert files_of(out) == files_of(folder)
        assert not (out / "optimizer.pt").exists()
        # Such a folder is one of PEFT's files alone, and may be replaced.
        export_task(Checkpoint.open(checkpoint), folder.name, out, force=True)
        assert files_of(out) == files_of(folder)


def test_edits_carry_them_along(folders: list[Path], checkpoint: Path) -> None:
    add_adapters(checkpoint, {"new": open_adapter(folders[1])}, AddOptions(max_error=0.5))
    remove_tasks(checkpoint, ["task_1"])
    assert attached(checkpoint) == {
        "new": [NAMED, "chat_template.jinja", "tokenizer.json"],
        "task_0": ["tokenizer.json"],
    }
    remove_tasks(checkpoint, ["new"])
    assert attached(checkpoint) == {"task_0": ["tokenizer.json"]}
    assert [p.read_bytes() for p in (checkpoint / "attachments").iterdir()] == [TOKENIZER]
    remove_tasks(checkpoint, ["task_0"])
    assert not (checkpoint / "attachments").exists()
    assert not (checkpoint / "attachments.json").exists()


def test_an_added_task_may_leave_them_behind(folders: list[Path], checkpoint: Path) -> None:
    options = AddOptions(max_error=0.5, tokenizers=False)
    add_adapters(checkpoint, {"new": open_adapter(folders[1])}, options)
    assert "new" not in attached(checkpoint)


def test_a_blend_keeps_what_its_tasks_have_alike(checkpoint: Path) -> None:
    blended = blend_tasks(checkpoint, {"task_0": 0.5, "task_1": 0.5}, "both")
    assert attached(checkpoint)["both"] == ["tokenizer.json"]
    assert blended.left_behind == (NAMED, "chat_template.jinja")
    assert "other" not in attached(checkpoint)


def test_what_is_judged_and_thrown_away_has_none(folders: list[Path], tmp_path: Path) -> None:
    trials: list[bool] = []

    def judge(folder: Path) -> dict[str, float | None]:
        trials.append((folder / "attachments").exists())
        return dict.fromkeys(Checkpoint.open(folder).tasks, 1.0)

    tasks = {p.name: open_adapter(p) for p in folders}
    compress_to_quality(tasks, tmp_path / "quality", 0.9, judge)
    compress_judged(tasks, tmp_path / "judged", OneByOne(judge), CompressOptions(ratio=0.5))
    assert set(trials) == {False}
    assert list(attached(tmp_path / "quality")) == ["task_0", "task_1"]
    assert list(attached(tmp_path / "judged")) == ["task_0", "task_1"]


def test_a_copy_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    pull_checkpoint(str(checkpoint), tmp_path / "copy")
    assert attached(tmp_path / "copy") == attached(checkpoint)
    assert validate(tmp_path / "copy") == []


def test_a_damaged_file_is_found(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "attachments" / hashlib.sha256(TEMPLATE).hexdigest()
    path.write_bytes(TEMPLATE.replace(b"<", b"["))
    [problem] = validate(checkpoint)
    assert path.name in problem
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        export_task(Checkpoint.open(checkpoint), "task_1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(version=3), "version 3 is unknown"),
        (lambda index: index.update(version=0), "version 0 is unknown"),
        (lambda index: index.update(version=2), "Expected `int`, got `object`"),
        (lambda index: index["tasks"]["task_0"].update({"../x": _ref("a" * 64)}), "foreign"),
        (lambda index: index["tasks"]["task_0"].update({"a/b.jinja": _ref("a" * 64)}), "foreign"),
        (
            lambda index: index["tasks"]["task_0"].update(
                {"vocab.txt": {"file": "vlora_config.json", "sha256": "a" * 64, "nbytes": 1}}
            ),
            "foreign",
        ),
        (lambda index: index["tasks"]["task_0"].update({"vocab.txt": _ref("../../x")}), "SHA-256"),
        (lambda index: index.update(more=1), "more"),
    ],
)
def test_an_index_that_leads_astray_is_refused(checkpoint: Path, change, message: str) -> None:
    file = checkpoint / "attachments.json"
    index = json.loads(file.read_bytes())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint.open(checkpoint).attachments
    assert len(validate(checkpoint)) == 1


@pytest.fixture
def many(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same tasks, as if two were very many."""
    monkeypatch.setattr(manifest, "INDEXED_TASKS", 2)
    compress(
        {p.name: open_adapter(p) for p in folders}, tmp_path / "many", CompressOptions(ratio=1)
    )
    return tmp_path / "many"


def test_many_tasks_name_the_set_of_files_that_they_have(checkpoint: Path, many: Path) -> None:
    few, index = (json.loads((c / "attachments.json").read_bytes()) for c in (checkpoint, many))
    assert few["version"] == 1
    assert index == {
        "version": 2,
        "sets": [few["tasks"]["task_0"], few["tasks"]["task_1"]],
        "tasks": {"task_0": 0, "task_1": 1},
    }
    opened = Checkpoint.open(many)
    assert dict(opened.attachments) == dict(Checkpoint.open(checkpoint).attachments)
    read = [(many / name).read_bytes() for name in ("vlora_config.json", "attachments.json")]
    assert opened.content_digest == hashlib.sha256(b"".join(read)).hexdigest()
    assert validate(many) == []
    pull_checkpoint(str(many), many.with_name("copy"))
    assert Checkpoint.open(many.with_name("copy")).content_digest == opened.content_digest


def test_a_digest_is_of_the_version_that_is_there(
    checkpoint: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was pinned before there was a version 2, and what has become few, keep their digests."""
    old, new = (Checkpoint.open(folder).content_digest for folder in (checkpoint, many))
    monkeypatch.setattr(manifest, "INDEXED_TASKS", 1)
    assert Checkpoint.open(checkpoint).content_digest == old
    monkeypatch.setattr(manifest, "INDEXED_TASKS", 100)
    assert Checkpoint.open(many).content_digest == new
    remove_tasks(many, ["task_1"])
    assert json.loads((many / "attachments.json").read_bytes())["version"] == 1
    assert attached(many) == {"task_0": ["tokenizer.json"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["tasks"].update(task_0=2), "has set 2, which there is not"),
        (lambda index: index["tasks"].update(task_0=-1), "has set -1, which there is not"),
        (lambda index: index["sets"][0].update({"../x": _ref("a" * 64)}), "foreign"),
        (lambda index: index["sets"][0].update({"vocab.txt": _ref("../../x")}), "SHA-256"),
        (lambda index: index.update(more=1), "more"),
    ],
)
def test_an_index_of_sets_that_leads_astray_is_refused(many: Path, change, message: str) -> None:
    file = many / "attachments.json"
    index = json.loads(file.read_bytes())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint.open(many).attachments


def _ref(digest: str) -> dict[str, object]:
    return {"file": f"attachments/{digest}", "sha256": digest, "nbytes": 1}


def test_a_folder_in_place_of_a_file_is_refused(folders: list[Path], tmp_path: Path) -> None:
    (folders[2] / "vocab.json").mkdir()
    with pytest.raises(AdapterError, match="no regular file"):
        compress({"t": open_adapter(folders[2])}, tmp_path / "out", CompressOptions(ratio=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template.jinja": b"A", "tokenizer_config.json": b'{"chat_template": "B"}'}, "A"),
        ({"tokenizer_config.json": b'{"chat_template": "B"}'}, "B"),
        (
            {
                "tokenizer_config.json": b'{"chat_template": [{"name": "tool", "template": "T"},'
                b' {"name": "default", "template": "D"}]}'
            },
            "D",
        ),
        ({"tokenizer_config.json": b'{"chat_template": null}'}, None),
        ({"tokenizer_config.json": b"[]"}, None),
        ({"tokenizer.json": b"{}"}, None),
    ],
)
def test_the_template_of_a_task(
    folders: list[Path], tmp_path: Path, files: dict[str, bytes], template: str | None
) -> None:
    for name, data in files.items():
        (folders[2] / name).write_bytes(data)
    compress({"t": open_adapter(folders[2])}, tmp_path / "out", CompressOptions(ratio=1))
    checkpoint = Checkpoint.open(tmp_path / "out")
    file = template_file(checkpoint.attachments["t"])
    assert (None if file is None else read_template(checkpoint.path, *file)) == template


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_tokenizer_config_that_is_none(folders: list[Path], tmp_path: Path, text: bytes) -> None:
    (folders[2] / "tokenizer_config.json").write_bytes(text)
    compress({"t": open_adapter(folders[2])}, tmp_path / "out", CompressOptions(ratio=1))
    checkpoint = Checkpoint.open(tmp_path / "out")
    file = template_file(checkpoint.attachments["t"])
    assert file is not None
    with pytest.raises(CheckpointError, match=r"this tokenizer_config\.json is none .*; mend it"):
        read_template(checkpoint.path, *file)


def test_the_commands_say_what_is_kept(folders: list[Path], tmp_path: Path) -> None:
    run, refs = CliRunner().invoke, [str(p) for p in folders]
    said = run(app, ["compress", *refs, "-o", str(tmp_path / "a"), "--ratio", "1"])
    assert said.exit_code == 0, said.output
    assert "Kept beside the weights of 2 tasks: " in said.stdout
    size = len(TOKENIZER) + len(TEMPLATE) + len(TOOL_TEMPLATE)
    assert f"chat_template.jinja, tokenizer.json ({size} B, not counted above)" in said.stdout
    told = json.loads(run(app, ["info", str(tmp_path / "a"), "--json"]).stdout)
    assert told["attached_bytes"] == size
    assert told["tasks"][0]["attached"] == ["tokenizer.json"]
    said = run(
        app, ["compress", *refs, "-o", str(tmp_path / "b"), "--ratio", "1", "--no-tokenizers"]
    )
    assert "stay behind, of task_0, task_1" in said.stderr
    assert "Kept beside" not in said.stdout
    arguments = ["merge", "--checkpoint", str(tmp_path / "a"), "task_0", "task_2"]
    said = run(app, [*arguments, "-o", str(tmp_path / "merged")])
    assert said.exit_code == 0, said.output
    assert "stay behind, of task_0" in said.stderr


def test_an_edit_does_not_make_a_damaged_file_sound(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "attachments" / hashlib.sha256(TEMPLATE).hexdigest()
    path.write_bytes(TEMPLATE.replace(b"<", b"["))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        remove_tasks(checkpoint, ["task_0"], output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        blend_tasks(checkpoint, {"task_1": 0.5}, "half", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Without the task there is no need of its file.
    remove_tasks(checkpoint, ["task_1"], output=tmp_path / "out")
    assert validate(tmp_path / "out") == []
