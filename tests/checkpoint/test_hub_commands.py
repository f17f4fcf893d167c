"""Pushing and pulling, against a Hub that is a folder: no network."""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import typer
from huggingface_hub import ModelCard
from huggingface_hub.utils import OfflineModeIsEnabled, RepositoryNotFoundError
from routers import network
from synthetic import family, run
from typer.testing import CliRunner

from vllm_vlora import atomic, snapshots
from vllm_vlora.checkpoint import hub, manifest
from vllm_vlora.checkpoint.hub import pull_checkpoint, push_checkpoint
from vllm_vlora.checkpoint.manifest import INDEX_FILE, RECORDS_FILE, TASKS_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.editing.aliasing import set_alias
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.editing.routing import attach_router
from vllm_vlora.errors import CheckpointError, OptionError, OutputError
from vllm_vlora.subspace.share_model import SHAREModel
from vllm_vlora.tools.cli import app as whole_app
from vllm_vlora.tools.hub_command import pull as pull_command
from vllm_vlora.tools.hub_command import push as push_command

REPO = "org/tasks"

app = typer.Typer()
app.command()(push_command)
app.command()(pull_command)


class FakeHub:
    """What of ``HfApi`` a push uses, and ``snapshot_download``: repositories are folders.

    ``create_repo``, ``create_branch`` and ``upload_folder`` check their arguments as the Hub's do.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.token: str | None = None
        self.private: dict[str, bool | None] = {}
        self.messages: list[str] = []
        self.failure: Exception | None = None

    def __call__(self, token: str | None = None) -> FakeHub:
        self.token = token
        return self

    def branch(self, repo_id: str, revision: str | None = None) -> Path:
        return self.root / repo_id.replace("/", "--") / (revision or "main")

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        if self.failure is not None:
            raise self.failure
        folder = self.branch(repo_id)
        assert exist_ok or not folder.exists()
        if not folder.exists():
            self.private[repo_id] = private
            folder.mkdir(parents=True)
            (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
        return f"https://hub/{repo_id}"

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        folder = self.branch(repo_id, branch)
        assert exist_ok or not folder.exists()
        if not folder.exists():
            shutil.copytree(self.branch(repo_id), folder)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        commit_message: str,
        revision: str | None,
        delete_patterns: Sequence[str],
    ) -> SimpleNamespace:
        target = self.branch(repo_id, revision)
        assert target.is_dir(), f"no branch {revision}"
        for name in self.files(target):
            if name != ".gitattributes" and matches(name, delete_patterns):
                (target / name).unlink()
        for name in self.files(Path(folder_path)):
            self.put(target / name, (Path(folder_path) / name).read_bytes())
        self.messages.append(commit_message)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{len(self.messages)}")

    def upload_file(
        self,
        *,
        path_or_fileobj: bytes,
        path_in_repo: str,
        repo_id: str,
        revision: str | None,
        commit_message: str,
    ) -> None:
        self.put(self.branch(repo_id, revision) / path_in_repo, path_or_fileobj)
        self.messages.append(commit_message)

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: Sequence[str] | None
    ) -> str:
        assert allow_patterns is None
        return str(self.branch(repo_id, revision))

    @staticmethod
    def files(folder: Path) -> list[str]:
        return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]

    @staticmethod
    def put(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", found)
    monkeypatch.setattr(snapshots.huggingface_hub, "snapshot_download", found.snapshot_download)
    return found


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    adapters = family(
        tmp_path / "adapters",
        3,
        related=True,
        extra={"base_model.model.score.weight": torch.ones(2)},
    )
    run(adapters, tmp_path / "ckpt", num_components=3)
    return tmp_path / "ckpt"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FakeHub.files(folder)}


# --- push -----------------------------------------------------------------------------------------


def test_what_was_pushed_is_what_is_pulled(fake: FakeHub, ckpt: Path, tmp_path: Path) -> None:
    report = push_checkpoint(ckpt, REPO, private=True)
    assert (report.url, report.commit) == (f"https://hub/{REPO}", f"https://hub/{REPO}/commit/1")
    assert (report.revision, report.tasks) == ("main", 3)
    assert report.nbytes == Checkpoint.open(ckpt).nbytes
    assert fake.private == {REPO: True}
    assert fake.messages == ["3 LoRA tasks (vllm-vlora)"]
    opened = pull_checkpoint(REPO, tmp_path / "copy")
    assert opened.path == tmp_path / "copy"
    assert contents(tmp_path / "copy") == contents(ckpt)
    assert validate(tmp_path / "copy") == []


def test_the_model_card_has_base_model_tasks_sizes_and_errors(fake: FakeHub, ckpt: Path) -> None:
    push_checkpoint(ckpt, REPO)
    written = (fake.branch(REPO) / "README.md").read_text()
    (ckpt / "README.md").unlink()
    push_checkpoint(ckpt, REPO, revision="v1", message="again")
    assert fake.messages[1:] == ["again", "Model card"]
    # Written by `compress`, or made anew where there is none: the same facts.
    for text in (written, (fake.branch(REPO, "v1") / "README.md").read_text()):
        card, checkpoint = ModelCard(text), Checkpoint.open(ckpt)
        assert card.data.base_model == "org/base"
        assert "lora" in card.data.tags
        for task, record in checkpoint.tasks.items():
            assert f"| {task} |" in text
            assert f"{record.error:.4f}" in text
        assert f"{checkpoint.ratio:.2f} times smaller" in text


def test_only_the_checkpoints_own_files_and_a_licence_are_uploaded(
    fake: FakeHub, ckpt: Path
) -> None:
    (ckpt / "LICENSE").write_text("Apache-2.0")
    (ckpt / ".env").write_text("HF_TOKEN=hf_secret")
    (ckpt / "notes.txt").write_text("not for others")
    push_checkpoint(ckpt, REPO)
    found = set(FakeHub.files(fake.branch(REPO))) - {".gitattributes"}
    assert found == set(FakeHub.files(ckpt)) - {".env", "notes.txt"}
    assert "LICENSE" in found


def test_files_of_an_earlier_checkpoint_go_with_the_same_commit(
    fake: FakeHub, ckpt: Path, tmp_path: Path
) -> None:
    push_checkpoint(ckpt, REPO)
    (fake.branch(REPO) / "eval.json").write_text("{}")
    share = SHAREModel.from_pretrained(ckpt)
    share.remove_adapter("task1")
    assert share.push_to_hub(REPO, token="hf_mine", message="two") == f"https://hub/{REPO}"
    assert fake.token == "hf_mine"
    found = FakeHub.files(fake.branch(REPO))
    assert "tasks/task1.safetensors" not in found
    assert {"eval.json", ".gitattributes", "tasks/task2.safetensors"} <= set(found)
    assert list(pull_checkpoint(REPO, tmp_path / "copy").tasks) == ["task0", "task2"]


@pytest.mark.parametrize("beside", [True, False])
def test_an_edit_during_the_upload_changes_nothing_of_it(
    fake: FakeHub,
    ckpt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    beside: bool,
) -> None:
    before = contents(ckpt)
    upload = FakeHub.upload_folder

    def during(self: FakeHub, **options: Any) -> SimpleNamespace:
        remove_tasks(ckpt, ["task1"])
        set_alias(ckpt, "prod", "task0")
        return upload(self, **options)

    monkeypatch.setattr(FakeHub, "upload_folder", during)
    if not beside:
        # As where the folder above may not be written to, and files have no second names.
        monkeypatch.setattr(hub, "scratch_beside", elsewhere)
        monkeypatch.setattr(os, "link", no_links)
    assert push_checkpoint(ckpt, REPO).tasks == 3
    monkeypatch.undo()
    published = contents(fake.branch(REPO))
    assert {name: published.get(name) for name in before} == before
    assert validate(fake.branch(REPO)) == []
    assert list(Checkpoint.open(ckpt).tasks) == ["task0", "task2"]
    assert sorted(os.listdir(tmp_path)) == ["adapters", "ckpt", "hub"]


@contextmanager
def elsewhere(target: Path) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder)


def no_links(*args: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_a_push_from_a_place_that_cannot_be_written(
    fake: FakeHub, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))

    monkeypatch.setattr(atomic, "_make_temporary", refused)
    push_checkpoint(ckpt, REPO)
    assert validate(fake.branch(REPO)) == []


def test_aliases_and_a_router_of_an_earlier_checkpoint_go_too(
    fake: FakeHub, ckpt: Path, tmp_path: Path
) -> None:
    later = shutil.copytree(ckpt, tmp_path / "later")
    set_alias(ckpt, "prod", "task0")
    record = attach_router(ckpt, ["task0", "task1"], network(2))
    push_checkpoint(ckpt, REPO)
    mine = fake.branch(REPO) / "router-mine.safetensors"
    mine.write_bytes(b"not a router's")
    there = {"aliases.json", "router.json", record.weights.file}
    assert there <= set(FakeHub.files(fake.branch(REPO)))
    push_checkpoint(later, REPO)
    left = set(FakeHub.files(fake.branch(REPO)))
    assert left == {*FakeHub.files(later), ".gitattributes", mine.name}
    pulled = pull_checkpoint(REPO, tmp_path / "copy")
    assert (dict(pulled.aliases), pulled.router) == ({}, None)


def test_an_index_takes_the_place_of_the_json_and_gives_it_back(
    fake: FakeHub, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_checkpoint(ckpt, REPO)
    for number, (most, there, gone) in enumerate(
        ((1, {INDEX_FILE, RECORDS_FILE}, {TASKS_FILE}), (100, {TASKS_FILE}, {INDEX_FILE}))
    ):
        monkeypatch.setattr(manifest, "INDEXED_TASKS", most)
        remove_tasks(ckpt, [f"task{number}"])
        push_checkpoint(ckpt, REPO)
        files = set(FakeHub.files(fake.branch(REPO)))
        assert there <= files
        assert not gone & files
        pulled = pull_checkpoint(REPO, tmp_path / "copy", force=True)
        assert contents(tmp_path / "copy") == contents(ckpt)
        assert list(pulled.tasks) == [f"task{n}" for n in range(number + 1, 3)]


def test_looking_at_very_many_tasks_downloads_no_weights(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "INDEXED_TASKS", 1)
    remove_tasks(ckpt, ["task0"])
    cache = tmp_path / "cache"

    def download(repo: str, *, revision: str | None, allow_patterns: Sequence[str] | None) -> str:
        for name in FakeHub.files(ckpt):
            if allow_patterns is None or matches(name, allow_patterns):
                FakeHub.put(cache / name, (ckpt / name).read_bytes())
        return str(cache)

    monkeypatch.setattr(snapshots.huggingface_hub, "snapshot_download", download)
    opened = Checkpoint.open(REPO, manifest_only=True)
    assert [record.source for record in opened.tasks.values()] == ["task1", "task2"]
    assert set(FakeHub.files(cache)) == {"vlora_config.json", INDEX_FILE, RECORDS_FILE}


def test_a_revision_is_a_branch(fake: FakeHub, ckpt: Path, tmp_path: Path) -> None:
    report = push_checkpoint(ckpt, REPO, revision="v1")
    assert report.revision == "v1"
    assert FakeHub.files(fake.branch(REPO)) == [".gitattributes"]
    assert list(pull_checkpoint(f"{REPO}@v1", tmp_path / "copy").tasks) == list(
        Checkpoint.open(ckpt).tasks
    )
    with pytest.raises(CheckpointError, match="not a vllm-vlora checkpoint"):
        pull_checkpoint(REPO, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_broken_checkpoint_is_not_pushed(fake: FakeHub, ckpt: Path, tmp_path: Path) -> None:
    file = ckpt / "tasks" / "task1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"SHA-256 differs.*; nothing was published"):
        push_checkpoint(ckpt, REPO)
    with pytest.raises(CheckpointError, match="no such folder"):
        push_checkpoint(tmp_path / "nowhere", REPO)
    # An id of the Hub is no folder, and is not downloaded to be pushed elsewhere.
    with pytest.raises(CheckpointError, match="no such folder"):
        push_checkpoint("org/another", REPO)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="vllm-vlora compress"):
        push_checkpoint(tmp_path / "empty", REPO)
    assert not fake.root.exists()


@pytest.mark.parametrize("repo", ["", "a/b/c", "org/my tasks", "../up", "org/x@v1"])
def test_names_that_no_repository_may_have(repo: str, fake: FakeHub, ckpt: Path) -> None:
    with pytest.raises(OptionError, match="org/name"):
        push_checkpoint(ckpt, repo)
    assert not fake.root.exists()


def test_a_hub_that_refuses_or_is_out_of_reach(fake: FakeHub, ckpt: Path) -> None:
    response: Any = SimpleNamespace(status_code=401, headers={}, request=None)
    fake.failure = RepositoryNotFoundError("401\nmore lines", response=response)
    with pytest.raises(OutputError, match="set HF_TOKEN") as found:
        push_checkpoint(ckpt, REPO)
    assert "\n" not in str(found.value)
    fake.failure = OSError("no route to host\nand so on")
    with pytest.raises(OutputError, match="no route to host; check the network") as found:
        push_checkpoint(ckpt, REPO)
    assert "\n" not in str(found.value)
    fake.failure = ConnectionRefusedError(111, "Connection refused")
    with pytest.raises(OutputError, match=r"cannot be reached \(nothing listens there\); check"):
        push_checkpoint(ckpt, REPO)
    fake.failure = OfflineModeIsEnabled("Cannot reach it: offline mode is enabled.")
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set"):
        push_checkpoint(ckpt, REPO)


def test_what_a_push_asks_of_the_real_library() -> None:
    """The fake has the arguments that the installed huggingface_hub takes."""
    import inspect

    for name in ("create_repo", "create_branch", "upload_folder", "upload_file"):
        real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        ours = inspect.signature(getattr(FakeHub, name)).parameters
        assert set(ours) <= set(real), name
    assert "token" in inspect.signature(huggingface_hub.HfApi).parameters


# --- pull -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "missing", "basis", "json"])
def test_a_damaged_repository_leaves_nothing_behind(
    damage: str, fake: FakeHub, ckpt: Path, tmp_path: Path
) -> None:
    push_checkpoint(ckpt, REPO)
    remote = fake.branch(REPO)
    name = {"basis": "basis.safetensors", "json": "tasks.json"}.get(
        damage, "tasks/task2.safetensors"
    )
    if damage == "missing":
        (remote / name).unlink()
    else:
        (remote / name).write_bytes((remote / name).read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=name) as refused:
        pull_checkpoint(REPO, tmp_path / "copy")
    # The file that is damaged, and not its copy, which nobody finds.
    assert f"{tmp_path}/copy" not in str(refused.value)
    assert ".copy." not in str(refused.value)
    if damage in ("cut", "basis"):
        assert f"/{name}: " in str(refused.value)
        assert Path(str(refused.value).partition(": ")[0]).is_file()
    assert sorted(os.listdir(tmp_path)) == ["adapters", "ckpt", "hub"]


def test_a_pull_replaces_a_checkpoint_only_when_told_and_never_anything_else(
    fake: FakeHub, ckpt: Path, tmp_path: Path
) -> None:
    push_checkpoint(ckpt, REPO)
    pull_checkpoint(REPO, tmp_path / "copy")
    (tmp_path / "copy" / "tasks" / "task0.safetensors").unlink()
    with pytest.raises(OutputError, match="--force"):
        pull_checkpoint(REPO, tmp_path / "copy")
    pull_checkpoint(REPO, tmp_path / "copy", force=True)
    assert contents(tmp_path / "copy") == contents(ckpt)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="did not write"):
        pull_checkpoint(REPO, tmp_path / "mine", force=True)


def test_a_sharded_basis_comes_with_its_index(fake: FakeHub, ckpt: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(ckpt)
    bases = dict(opened.bases())
    (tmp_path / "sharded").mkdir()
    writer = CheckpointWriter(tmp_path / "sharded", "org/base", shard_bytes=1)
    for module in opened.modules:
        writer.add_module(
            module.name, module.d_in, module.d_out, module.kind, bases.get(module.name)
        )
    for task in opened.tasks:
        writer.copy_task(opened, task)
    writer.finish("# A card")
    push_checkpoint(ckpt, REPO)
    push_checkpoint(tmp_path / "sharded", REPO)
    # The one file of the first push is gone, or a reader could take it for the basis.
    assert not (fake.branch(REPO) / "basis.safetensors").exists()
    pulled = pull_checkpoint(REPO, tmp_path / "copy")
    assert [ref.file for ref in pulled.config.basis] == [
        "basis-00001-of-00002.safetensors",
        "basis-00002-of-00002.safetensors",
    ]
    assert contents(pulled.path) == contents(tmp_path / "sharded")
    assert validate(pulled.path) == []


# --- the command line -----------------------------------------------------------------------------


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def test_the_commands(fake: FakeHub, ckpt: Path, tmp_path: Path) -> None:
    out = invoke("push", ckpt, REPO, "--private", "-m", "first", "--revision", "v1").stdout
    assert f"-> {REPO}@v1: 3 tasks" in out
    assert f"https://hub/{REPO}" in out
    assert (fake.private, fake.messages, fake.token) == ({REPO: True}, ["first"], None)
    data = json.loads(invoke("push", ckpt, REPO, "--json").stdout)
    assert (data["repo_id"], data["revision"], data["tasks"]) == (REPO, "main", 3)
    out = invoke("pull", f"{REPO}@v1", "-o", tmp_path / "copy").stdout
    assert f"{tmp_path / 'copy'}: 3 tasks" in out
    data = json.loads(invoke("pull", REPO, "-o", tmp_path / "copy", "--force", "--json").stdout)
    assert data["checkpoint"] == str(tmp_path / "copy")
    assert data["bytes"] == Checkpoint.open(ckpt).nbytes


def test_the_commands_fail_with_one_line(fake: FakeHub, ckpt: Path, tmp_path: Path) -> None:
    failed = invoke("push", ckpt, "no id", code=2)
    assert failed.stderr.startswith("Error: 'no id' is no Hub id")
    failed = invoke("pull", ckpt, "-o", ckpt, code=2)
    assert "which is read" in failed.stderr
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1


def test_looking_at_a_checkpoint_downloads_no_weights(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str] | None] = []

    def download(repo: str, *, revision: str | None, allow_patterns: Sequence[str] | None) -> str:
        asked.append(allow_patterns)
        for name in FakeHub.files(ckpt):
            if allow_patterns is None or matches(name, allow_patterns):
                FakeHub.put(tmp_path / "cache" / name, (ckpt / name).read_bytes())
        return str(tmp_path / "cache")

    monkeypatch.setattr(snapshots.huggingface_hub, "snapshot_download", download)
    for words in (["info", REPO], ["plan", REPO, "--max-loras", "2"], ["serve", "--dry-run", REPO]):
        result = CliRunner().invoke(whole_app, words)
        assert result.exit_code in (0, 2), result.output
    assert len(asked) == 3
    assert all(name.endswith(".json") for name in FakeHub.files(tmp_path / "cache"))
