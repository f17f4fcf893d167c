"""Folders that somebody else made: links out of them, and what is no regular file, at every command."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from synthetic import family, run
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint import hub
from vllm_vlora.tools.cli import app

SECRET = "root:x:0:0:not for others"
# No command here takes more than a moment; one that waits for a FIFO's other end takes for ever.
_MOST_SECONDS = 60

# The command's words, for a checkpoint or an adapter that was received, and a folder to write to.
CHECKPOINT_COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "validate": lambda ckpt, out: ["validate", str(ckpt)],
    "info": lambda ckpt, out: ["info", str(ckpt)],
    "plan": lambda ckpt, out: ["plan", str(ckpt), "--max-loras", "2"],
    "serve": lambda ckpt, out: ["serve", str(ckpt), "--dry-run"],
    "export": lambda ckpt, out: ["export", str(ckpt), "--all", "-o", str(out)],
    "diff": lambda ckpt, out: ["diff", str(ckpt), "task0", "task1"],
    "remove": lambda ckpt, out: ["remove", str(ckpt), "task0", "-o", str(out)],
    "remove in place": lambda ckpt, out: ["remove", str(ckpt), "task0"],
    "pull": lambda ckpt, out: ["pull", str(ckpt), "-o", str(out)],
    "push": lambda ckpt, out: ["push", str(ckpt), "org/name"],
    "compress --force": lambda ckpt, out: [
        "compress", str(ckpt.parent / "adapters"), "-o", str(ckpt), "--force", "--ratio", "1",
    ],
}  # fmt: skip
ADAPTER_COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "compress": lambda adapter, out: ["compress", str(adapter), "-o", str(out), "--ratio", "1"],
    "add": lambda adapter, out: ["add", str(out), f"new={adapter}"],
    "diff": lambda adapter, out: ["diff", str(adapter), str(adapter)],
    "merge": lambda adapter, out: ["merge", str(adapter), str(adapter), "-o", str(out)],
    "analyze": lambda adapter, out: ["analyze", str(adapter.parent)],
}


@contextmanager
def limited() -> Iterator[None]:
    """Ends what hangs."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(_MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Uploads:
    """What of ``HfApi`` a push uses; keeps what would have been uploaded."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def __call__(self, token: str | None = None) -> Uploads:
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        return repo_id

    def upload_folder(self, *, folder_path: Path, **options: Any) -> SimpleNamespace:
        assert "allow_patterns" not in options
        for path in folder_path.rglob("*"):
            if path.is_file():
                self.files[str(path.relative_to(folder_path))] = path.read_bytes()
        return SimpleNamespace(commit_url="commit")

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, **options: Any) -> None:
        self.files[path_in_repo] = path_or_fileobj


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``adapters``, one of which has a tokenizer, and a checkpoint ``ckpt`` of them."""
    folder = tmp_path_factory.mktemp("made")
    adapters = family(folder / "adapters", 3, related=True)
    for task in ("task0", "task1"):
        (folder / "adapters" / task / "tokenizer.json").write_text(f'{{"of": "{task}"}}')
    run(adapters, folder / "ckpt", num_components=3)
    (folder / "ckpt" / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and the Hub a stand-in."""
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", Uploads())
    return tmp_path / "world"


def invoke(words: list[str]) -> Result:
    with limited():
        result = CliRunner().invoke(app, words)
    # A traceback is an exception that no exit code stands for.
    assert result.exception is None or isinstance(result.exception, SystemExit), (
        words,
        repr(result.exception),
    )
    assert result.exit_code in (0, 1, 2), (words, result.output)
    return result


def received_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def link_out(path: Path) -> None:
    """Put in its place a link to the same content outside, so that no digest tells."""
    outside = path.parents[2] / f"outside-{path.name}"
    shutil.move(path, outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("command", CHECKPOINT_COMMANDS)
def test_no_link_leads_out_of_a_checkpoint(command: str, world: Path) -> None:
    """Nothing outside is read, copied or uploaded, whatever file of the checkpoint is the link."""
    kept = world.parent / "kept"
    shutil.copytree(world, kept)
    names = [*received_files(world / "ckpt"), "tasks", "attachments"]
    for name in names:
        shutil.rmtree(world)
        shutil.copytree(kept, world)
        # Nothing else tells a file that the manifest does not name from the one that was there.
        unnamed = name in ("README.md", "LICENSE")
        if unnamed:
            (world / "ckpt" / name).write_text(SECRET)
        link_out(world / "ckpt" / name)
        out = world / "out"
        uploads = Uploads()
        hub.huggingface_hub.HfApi = uploads  # type: ignore[assignment,misc]
        result = invoke(CHECKPOINT_COMMANDS[command](world / "ckpt", out))
        copied = [p for p in out.rglob("*") if p.is_file() and not p.is_symlink()]
        assert not any(SECRET in p.read_bytes().decode("latin1") for p in copied), name
        assert not any(SECRET in data.decode("latin1") for data in uploads.files.values()), name
        reads_all = command in ("validate", "push", "pull")
        if (reads_all and not unnamed) or command in ("push", "pull"):
            assert result.exit_code in (1, 2), (name, result.output)
            assert "link out of its folder" in result.output
            assert not out.exists()
            assert not uploads.files


@pytest.mark.parametrize("command", ADAPTER_COMMANDS)
def test_no_link_leads_out_of_an_adapter(command: str, world: Path) -> None:
    for name in received_files(world / "adapters" / "task0"):
        place = world.parent / name
        shutil.copytree(world, place)
        link_out(place / "adapters" / "task0" / name)
        out = place / ("ckpt" if command == "add" else "out")
        before = received_files(out)
        invoke(ADAPTER_COMMANDS[command](place / "adapters" / "task0", out))
        assert received_files(out) == before or name == "README.md", name


def test_folders_of_the_hubs_cache_are_read_and_links_out_of_them_are_not(world: Path) -> None:
    cache = world / "models--org--name"
    snapshot = cache / "snapshots" / "c0ffee"
    for number, name in enumerate(received_files(world / "ckpt")):
        blob = cache / "blobs" / str(number)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "ckpt" / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    for number, command in enumerate(("validate", "info", "export", "remove", "pull", "push")):
        out = world / f"out{number}"
        result = invoke(CHECKPOINT_COMMANDS[command](snapshot, out))
        assert result.exit_code == 0, result.output
        assert not any(p.is_symlink() for p in out.rglob("*") if p.name != "LICENSE")
    # A commit's folder that is a link could be any folder of this machine.
    forged = world / "models--org--forged"
    (forged / "snapshots").mkdir(parents=True)
    (forged / "snapshots" / "c0ffee").symlink_to(world / "ckpt")
    assert invoke(["validate", str(forged)]).exit_code == 2
    # The repository's folder is the limit: a blob may not be a link to something else.
    blob = (snapshot / "README.md").resolve()
    shutil.move(blob, world / "outside")
    blob.symlink_to(world / "outside")
    result = invoke(CHECKPOINT_COMMANDS["pull"](snapshot, world / "out"))
    assert result.exit_code == 2
    assert not (world / "out").exists()


# --- no regular files --------------------------------------------------------------------------------


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.mkdir()


def as_device(path: Path) -> None:
    """By a link, as making one takes rights; it never ends."""
    path.symlink_to("/dev/zero")


def as_sparse_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(60 << 30)


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


KINDS = (as_fifo, as_folder, as_device, as_sparse_file, as_loop, as_unreadable, as_socket)
# Through every command, each name in each kind: some minutes.
short_of_kinds = pytest.mark.parametrize("kind", [as_fifo, as_device, as_sparse_file])
all_kinds = pytest.mark.parametrize("kind", KINDS)


@short_of_kinds
def test_no_command_waits_for_what_is_no_file(kind: Callable[[Path], None], world: Path) -> None:
    attached = next(n for n in received_files(world / "ckpt") if n.startswith("attachments/"))
    attack_checkpoint(
        kind,
        world,
        ["validate", "remove", "remove in place", "pull", "push"],
        ["tasks.json", "README.md", "LICENSE", "attachments.json", attached],
    )
    attack_adapter(kind, world, ["compress"], ["adapter_model.safetensors", "tokenizer.json"])


@pytest.mark.attacks_long
@all_kinds
def test_no_command_waits_for_what_is_no_file_at_length(
    kind: Callable[[Path], None], world: Path
) -> None:
    attack_checkpoint(kind, world, list(CHECKPOINT_COMMANDS), received_files(world / "ckpt"))
    names = received_files(world / "adapters" / "task0")
    attack_adapter(kind, world, list(ADAPTER_COMMANDS), names)


def test_a_copy_takes_no_more_room_than_its_file(world: Path) -> None:
    """A licence is nobody's to refuse, and a file can be grown to any size without a byte written."""
    (world / "ckpt" / "LICENSE").write_text("a")
    os.truncate(world / "ckpt" / "LICENSE", 60 << 30)
    assert invoke(CHECKPOINT_COMMANDS["remove"](world / "ckpt", world / "out")).exit_code == 0
    kept = (world / "out" / "LICENSE").stat()
    assert kept.st_size == 60 << 30
    assert kept.st_blocks <= 16


def attack_checkpoint(
    kind: Callable[[Path], None], world: Path, commands: list[str], names: list[str]
) -> None:
    """Exactly one of the checkpoint's files is no file; the old state stays where one is refused."""
    for number, (command, name) in enumerate(itertools.product(commands, names)):
        place = world.parent / f"{number}"
        shutil.copytree(world, place)
        (place / "ckpt" / name).unlink()
        kind(place / "ckpt" / name)
        before = sorted(os.listdir(place))
        result = invoke(CHECKPOINT_COMMANDS[command](place / "ckpt", place / "out"))
        if result.exit_code and "were written before" in result.output:
            assert command == "export"
            assert all(open_adapter(folder).modules for folder in (place / "out").iterdir())
        elif result.exit_code:
            assert sorted(os.listdir(place)) == before, (command, name)
        shutil.rmtree(place)


def attack_adapter(
    kind: Callable[[Path], None], world: Path, commands: list[str], names: list[str]
) -> None:
    for number, (command, name) in enumerate(itertools.product(commands, names)):
        place = world.parent / f"a{number}"
        shutil.copytree(world, place)
        (place / "adapters" / "task0" / name).unlink()
        kind(place / "adapters" / "task0" / name)
        out = place / ("ckpt" if command == "add" else "out")
        before = sorted(os.listdir(place))
        result = invoke(ADAPTER_COMMANDS[command](place / "adapters" / "task0", out))
        if result.exit_code:
            assert sorted(os.listdir(place)) == before, (command, name)
        shutil.rmtree(place)


ODD_NAMES = (
    "with blank", "-o", "--force", "a'b\"c", "new\nline", "\x1b[2Jx", "\u202egpj", "*", "a=b", "@x",
    "x" * 200, "..x", "~", "$(touch owned)", "\udcff", "\u00e9", "e\u0301", "CON", "a\\b", "%s", "[red]",
)  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES[:6])
def test_a_folder_may_have_any_name(name: str, world: Path) -> None:
    attack_name(name, world)


@pytest.mark.attacks_long
@pytest.mark.parametrize("name", ODD_NAMES[6:])
def test_a_folder_may_have_any_name_at_length(name: str, world: Path) -> None:
    attack_name(name, world)


def attack_name(name: str, world: Path) -> None:
    (world / "ckpt").rename(world / name)
    for command in ("validate", "info", "plan", "serve", "pull", "remove"):
        result = invoke(CHECKPOINT_COMMANDS[command](world / name, world / "out"))
        assert result.exit_code == 0, (command, result.output)
        assert all(c.isprintable() or c == "\n" for c in result.output), command
        shutil.rmtree(world / "out", ignore_errors=True)
    (world / "adapters" / "task0").rename(world / "adapters" / name)
    result = invoke(["compress", str(world / "adapters"), "-o", str(world / "out"), "--ratio", "1"])
    assert all(c.isprintable() or c == "\n" for c in result.output)
    assert not (world / "owned").exists()
