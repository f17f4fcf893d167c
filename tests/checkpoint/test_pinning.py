"""A digest that says which content of a checkpoint is meant, against literal bytes and every change."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT
from typer.testing import CliRunner

from vllm_vlora.checkpoint.attachments import AttachmentWriter
from vllm_vlora.checkpoint.hub import pull_checkpoint
from vllm_vlora.checkpoint.pinning import absolute_ref, pinned, split_pin
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.errors import CheckpointError
from vllm_vlora.tools.cli import app

# sha256sum vlora_config.json
PLAIN = "977ab652cdb7dc97061f7b3add630c94364985321c4d70d3397e27a4287fc468"
OTHER = "0123456789abcdef" * 4
INDEX = b"""{
  "version": 1,
  "tasks": {
    "a/b": {
      "chat_template.jinja": {
        "file": "attachments/2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "nbytes": 5
      }
    }
  }
}"""
"""The template is ``hello``."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the format's example, which is pinned for ever."""
    return Path(shutil.copytree(ROOT / "tests/data/format1", tmp_path / "ckpt"))


def attach(folder: Path, text: str) -> None:
    file = folder.with_name("template")
    file.write_text(text)
    writer = AttachmentWriter(folder)
    writer.attach("a/b", {"chat_template.jinja": file})
    writer.finish()


@pytest.mark.parametrize("format_version", [1, 2, 3])
def test_without_attachments_it_is_the_manifests(format_version: int) -> None:
    folder = ROOT / f"tests/data/format{format_version}"
    manifest = (folder / "vlora_config.json").read_bytes()
    assert Checkpoint.open(folder).content_digest == hashlib.sha256(manifest).hexdigest()


def test_with_attachments_their_index_stands_behind_it(folder: Path) -> None:
    assert Checkpoint.open(folder).content_digest == PLAIN
    attach(folder, "hello")
    assert (folder / "attachments.json").read_bytes() == INDEX
    both = hashlib.sha256((folder / "vlora_config.json").read_bytes() + INDEX).hexdigest()
    assert Checkpoint.open(folder).content_digest == both
    assert Checkpoint.open(f"{folder}@sha256:{both}").tasks
    with pytest.raises(CheckpointError, match=f"its content is sha256:{both}, not sha256:{PLAIN}"):
        Checkpoint.open(f"{folder}@sha256:{PLAIN}")


def _file_of_a_task(folder: Path) -> None:
    (file, *_) = sorted((folder / "tasks").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"\1")


def _basis(folder: Path) -> None:
    file = folder / "basis.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")


def _tasks(folder: Path) -> None:
    """With a digest that agrees, as whoever may write the folder would see to."""
    data = (folder / "tasks.json").read_bytes().replace(b'"rank":1', b'"rank":2', 1)
    config = json.loads((folder / "vlora_config.json").read_bytes())
    config["tasks"] |= {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)}
    (folder / "tasks.json").write_bytes(data)
    (folder / "vlora_config.json").write_text(json.dumps(config))


def _base_model(folder: Path) -> None:
    config = json.loads((folder / "vlora_config.json").read_bytes())
    (folder / "vlora_config.json").write_text(json.dumps(config | {"base_model": "evil/model"}))


def _template(folder: Path) -> None:
    attach(folder, "another")


def _template_in_place(folder: Path) -> None:
    (file,) = (folder / "attachments").iterdir()
    file.write_text("other")


def _no_template(folder: Path) -> None:
    (folder / "attachments.json").unlink()


@pytest.mark.parametrize(
    "change",
    [_file_of_a_task, _basis, _tasks, _base_model, _template, _template_in_place, _no_template],
)
def test_no_change_of_what_is_served_goes_unseen(
    folder: Path, change: Callable[[Path], None]
) -> None:
    attach(folder, "hello")
    ref = f"{folder}@sha256:{Checkpoint.open(folder).content_digest}"
    assert validate(ref) == []
    change(folder)
    problems = validate(ref)
    assert problems
    assert all("\n" not in problem for problem in problems)


def test_what_is_written_otherwise_and_means_the_same_is_the_same(folder: Path) -> None:
    config = json.loads((folder / "vlora_config.json").read_bytes())
    (folder / "vlora_config.json").write_text(json.dumps(config))
    assert Checkpoint.open(folder).content_digest == PLAIN


@pytest.mark.parametrize("digest", ["", "abc", PLAIN[:-1], PLAIN.upper(), PLAIN + "0", "g" * 64])
def test_a_digest_that_is_none_is_refused(folder: Path, digest: str) -> None:
    with pytest.raises(CheckpointError, match="64 hex digits that `vllm-vlora info` shows"):
        Checkpoint.open(f"{folder}@sha256:{digest}")


@pytest.mark.parametrize("where", ["folder", "org/name", "org/name@main", "a@b/c", "/x@y"])
def test_it_stands_behind_any_reference(where: str) -> None:
    assert split_pin(where) == (where, None)
    assert split_pin(pinned(where, PLAIN)) == (where, PLAIN)
    assert pinned(where, None) == where
    assert absolute_ref(pinned(where, PLAIN)) == pinned(where, PLAIN)


def test_the_commands_show_it_and_take_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    shown = run(app, ["info", "ckpt"])
    assert f"\nContent        sha256:{PLAIN}\n" in shown.stdout
    told = json.loads(run(app, ["info", f"ckpt@sha256:{PLAIN}", "--json"]).stdout)
    assert told["content"] == f"sha256:{PLAIN}"
    assert told["serve"].startswith(f"VLLM_VLORA_CHECKPOINT={folder}@sha256:{PLAIN} vllm serve ")
    assert f"ckpt: sound, sha256:{PLAIN}\n" in run(app, ["validate", "ckpt"]).stdout
    told = json.loads(run(app, ["validate", "ckpt", "--json"]).stdout)
    assert (told["sound"], told["content"]) == (True, f"sha256:{PLAIN}")
    wrong = run(app, ["validate", f"ckpt@sha256:{OTHER}", "--json"])
    assert wrong.exit_code == 1
    assert json.loads(wrong.stdout)["content"] is None
    assert run(app, ["info", f"ckpt@sha256:{OTHER}"]).exit_code == 2
    line = run(app, ["serve", f"ckpt@sha256:{PLAIN}", "--dry-run"]).stdout
    assert line.startswith(f"VLLM_VLORA_CHECKPOINT={folder}@sha256:{PLAIN} vllm serve ")


def test_what_is_pulled_is_what_was_asked_for(folder: Path, tmp_path: Path) -> None:
    attach(folder, "hello")
    digest = Checkpoint.open(folder).content_digest
    assert pull_checkpoint(f"{folder}@sha256:{digest}", tmp_path / "copy").content_digest == digest
    with pytest.raises(CheckpointError, match="its content is"):
        pull_checkpoint(f"{folder}@sha256:{OTHER}", tmp_path / "other")
    assert not (tmp_path / "other").exists()
