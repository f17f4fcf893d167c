"""Publishing: whatever goes wrong, the old folder or the new one is there, whole."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_vlora import atomic
from vllm_vlora.atomic import publish_folder, scratch_beside, write_file_atomic
from vllm_vlora.errors import OutputError


def ours(path: Path) -> set[str] | None:
    return {"a.txt", "sub/b.txt", "big"} if (path / "a.txt").exists() else None


def never(path: Path) -> None:
    return None


def publish(target: Path, text: str, *, force: bool = False) -> None:
    with publish_folder(target, force=force, owned=ours) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text(text)


def content(target: Path) -> dict[str, str]:
    return {
        str(path.relative_to(target)): path.read_text()
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }


def whole(text: str) -> dict[str, str]:
    return {"a.txt": text, "sub/b.txt": text}


@pytest.fixture(params=["exchange", "two renames"])
def either_rename(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda left, right: False)


def test_publishes_a_new_folder_and_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "out" / "ckpt"
    publish(target, "new")
    assert content(target) == whole("new")
    assert os.listdir(target.parent) == ["ckpt"]


def test_an_empty_folder_is_filled_without_force(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    target.mkdir()
    publish(target, "new")
    assert content(target) == whole("new")


@pytest.mark.usefixtures("either_rename")
def test_force_replaces_a_folder_of_ours(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    publish(target, "new", force=True)
    assert content(target) == whole("new")
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.mark.parametrize("name", ["a\nb", "\n", "-o", "[red]", "a b", "\udcff", "x" * 250, "*(.+"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    publish(target, "old")
    publish(target, "new", force=True)
    assert content(target) == whole("new")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.usefixtures("either_rename")
@pytest.mark.parametrize("links", [True, False])
def test_what_is_not_ours_stays_as_it_is(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    target = tmp_path / "ckpt"
    publish(target, "old")
    (target / "LICENSE").write_text("mine")
    (target / "LICENSE").chmod(0o600)
    (target / "notes" / "deep").mkdir(parents=True)
    (target / "notes" / "a.txt").write_text("note")
    (target / "sub" / "c.txt").write_text("beside ours")
    (target / "current").symlink_to("notes/a.txt")
    (target / "runs").symlink_to("notes")
    if links:
        os.mkfifo(target / "pipe")
    publish(target, "new", force=True)
    kept = {"LICENSE": "mine", "notes/a.txt": "note", "sub/c.txt": "beside ours"}
    for link in ("current", "runs"):
        assert (target / link).is_symlink()
        (target / link).unlink()
    assert (target / "pipe").is_fifo() == links
    assert content(target) == whole("new") | kept
    assert (target / "notes" / "deep").is_dir()
    assert (target / "LICENSE").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["ckpt"]


def refuse_links(*args: object, **kwargs: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_file_of_the_same_name_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    for text, kept in (("one", {}), ("two", {"LICENSE.old": "mine"}), ("two", {})):
        (target / "LICENSE").write_text("mine" if kept else text)
        with publish_folder(target, force=True, owned=ours) as folder:
            (folder / "a.txt").write_text("new")
            (folder / "LICENSE").write_text(text)
        assert content(target) == {"a.txt": "new", "LICENSE": text} | (
            kept or ({} if text == "one" else {"LICENSE.old": "mine"})
        )


@pytest.mark.usefixtures("either_rename")
def test_what_comes_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    finish = atomic._move_into_place

    def write_late(temporary: Path, where: Path) -> Path | None:
        (target / "late.txt").write_text("late")
        return finish(temporary, where)

    monkeypatch.setattr(atomic, "_move_into_place", write_late)
    publish(target, "new", force=True)
    assert content(target) == whole("new") | {"late.txt": "late"}
    assert os.listdir(tmp_path) == ["ckpt"]


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    with pytest.raises(OutputError, match="not empty"):
        publish(target, "new")
    assert content(target) == whole("old")


def test_force_never_replaces_what_is_not_ours(tmp_path: Path) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "cat.jpg").write_text("cat")
    with pytest.raises(OutputError, match="did not write"):
        publish(target, "new", force=True)
    assert content(target) == {"cat.jpg": "cat"}
    assert os.listdir(tmp_path) == ["photos"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "ckpt"
    target.write_text("a file")
    with pytest.raises(OutputError, match="not a folder"):
        publish(target, "new", force=force)
    assert target.read_text() == "a file"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    publish(tmp_path / "v1", "old")
    link = tmp_path / "current"
    link.symlink_to("v1")
    publish(link, "new", force=True)
    assert link.is_symlink()
    assert content(tmp_path / "v1") == whole("new")


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")

    def fail() -> None:
        with publish_folder(target, force=True, owned=ours) as folder:
            (folder / "a.txt").write_text("half")
            raise kind

    with pytest.raises(kind):
        fail()
    assert content(target) == whole("old")
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.mark.parametrize("inner", ["ckpt", "deep/ckpt"])
def test_a_file_where_a_folder_must_be_is_named(tmp_path: Path, inner: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    target = file / inner
    with pytest.raises(OutputError) as raised:
        publish(target, "new")
    said = f"cannot write {target}: {file} is not a folder; choose another output path"
    assert str(raised.value) == said
    assert file.read_text() == "mine"


def test_errors_of_reading_inputs_are_not_called_write_errors(tmp_path: Path) -> None:
    def read_missing() -> None:
        with publish_folder(tmp_path / "ckpt", force=False, owned=ours):
            (tmp_path / "input.json").read_text()

    def lose_connection() -> None:
        with publish_folder(tmp_path / "ckpt", force=False, owned=ours):
            raise ConnectionError("no route")

    with pytest.raises(FileNotFoundError):
        read_missing()
    with pytest.raises(ConnectionError):
        lose_connection()
    assert os.listdir(tmp_path) == []


def test_a_folder_filled_meanwhile_by_another_process_stays(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"

    def race() -> None:
        with publish_folder(target, force=False, owned=never) as folder:
            (folder / "a.txt").write_text("ours")
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")

    with pytest.raises(OutputError):
        race()
    assert content(target) == {"theirs.txt": "theirs"}
    assert os.listdir(tmp_path) == ["ckpt"]


def raise_full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_at_the_end_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    monkeypatch.setattr(os, call, raise_full)
    with pytest.raises(OutputError, match=r"ckpt.*No space left"):
        publish(target, "new", force=True)
    assert content(target) == whole("old")
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_failed_second_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    rename = os.rename

    def fail_into_place(source: Path, destination: Path) -> None:
        if str(source).endswith(".tmp") and not target.exists():
            raise_full()
        rename(source, destination)

    monkeypatch.setattr(atomic, "_exchange", lambda left, right: False)
    monkeypatch.setattr(os, "rename", fail_into_place)
    with pytest.raises(OutputError):
        publish(target, "new", force=True)
    assert content(target) == whole("old")
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mounted)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def write_plain(path: Path) -> None:
    path.write_bytes(bytes(1 << 20))


def write_safetensors(path: Path) -> None:
    save_file({"x": torch.zeros(1 << 18)}, path)


@pytest.mark.parametrize("write", [write_plain, write_safetensors])
def test_a_really_full_disk(small_disk: Path, write: Callable[[Path], None]) -> None:
    target = small_disk / "ckpt"
    publish(target, "old")

    def overfill() -> None:
        with publish_folder(target, force=True, owned=ours) as folder:
            write(folder / "big")

    with pytest.raises(OutputError, match=r"ckpt.*No space left"):
        overfill()
    assert content(target) == whole("old")
    assert os.listdir(small_disk) == ["ckpt"]
    with pytest.raises(OutputError, match="No space left"):
        write_file_atomic(small_disk / "file", bytes(1 << 20))
    assert os.listdir(small_disk) == ["ckpt"]
    publish(target, "new", force=True)
    assert content(target) == whole("new")


@pytest.mark.parametrize(
    "text",
    [
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space" })',
        "Error while serializing: I/O error: No space left on device (os error 28)",
    ],
    ids=["safetensors 0.4 and 0.5", "0.6 and later"],
)
def test_a_full_disk_in_the_words_of_every_safetensors(tmp_path: Path, text: str) -> None:
    def fill() -> None:
        with publish_folder(tmp_path / "ckpt", force=False, owned=ours):
            raise SafetensorError(text)

    with pytest.raises(OutputError, match=r"ckpt.*No space left"):
        fill()
    assert os.listdir(tmp_path) == []


def test_safetensors_files_are_readable_for_those_who_may_read_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    with publish_folder(target, force=False, owned=ours) as folder:
        save_file({"x": torch.ones(2)}, folder / "x.safetensors")
    file = target / "x.safetensors"
    assert file.stat().st_mode & 0o444 == target.stat().st_mode & 0o444
    assert torch.equal(load_file(file)["x"], torch.ones(2))


KILLED = """
import os, signal, sys
from pathlib import Path
from vllm_vlora import atomic

die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
moment = sys.argv[2]
if moment == "fsync":
    atomic._fsync = die
if moment == "before the move":
    atomic._move_into_place = die
if moment == "after the move":
    atomic._remove_old = die
owned = lambda path: {"a.txt", "sub/b.txt"}
with atomic.publish_folder(Path(sys.argv[1]), force=True, owned=owned) as folder:
    (folder / "a.txt").write_text("new")
    if moment == "writing":
        die()
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("new")
"""


@pytest.mark.parametrize("moment", ["writing", "fsync", "before the move", "after the move"])
def test_a_kill_leaves_old_or_new_and_the_next_run_cleans_up(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target), moment], check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert content(target) == whole("new" if moment == "after the move" else "old")

    assert set(os.listdir(tmp_path)) > {"ckpt", ".ckpt.lock"}
    publish(target, "next", force=True)
    assert content(target) == whole("next")
    assert os.listdir(tmp_path) == ["ckpt"]


KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from vllm_vlora import atomic

atomic._exchange = lambda left, right: False
rename = os.rename
def once(source, target):
    rename(source, target)
    if str(target).endswith(".old"):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = once
owned = lambda path: {"a.txt", "sub/b.txt"}
with atomic.publish_folder(Path(sys.argv[1]), force=True, owned=owned) as f:
    (f / "a.txt").write_text("new")
"""


def kill_between_the_renames(target: Path) -> None:
    publish(target, "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BETWEEN, str(target)], check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    kill_between_the_renames(target)
    with pytest.raises(OutputError, match="not empty"):
        publish(target, "next")
    assert content(target) == whole("old")
    assert os.listdir(tmp_path) == ["ckpt"]
    publish(target, "next", force=True)
    assert content(target) == whole("next")
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_folder_moved_aside_is_kept_when_another_has_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "ckpt"
    kill_between_the_renames(target)
    target.mkdir()
    (target / "a.txt").write_text("another")
    publish(target, "next", force=True)
    (old,) = tmp_path.glob(".ckpt.*.old")
    assert content(old) == whole("old")
    assert old.name in caplog.text
    assert content(target) == whole("next")


def test_an_old_folder_that_was_being_removed_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".ckpt.0123456789abcdef.old").mkdir()
    publish(tmp_path / "ckpt", "new")
    assert os.listdir(tmp_path) == ["ckpt"]


def test_the_folder_of_a_living_run_is_not_taken_for_stale(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    with publish_folder(target, force=False, owned=ours) as folder:
        (folder / "a.txt").write_text("slow")
        hour_ago = time.time() - 3600
        os.utime(folder, (hour_ago, hour_ago))
        publish(tmp_path / "ckpt", "fast")
        assert folder.exists()
        os.rename(target, tmp_path / "moved")
    assert content(target) == {"a.txt": "slow"}


def test_nothing_unlocked_with_another_name_is_removed(tmp_path: Path) -> None:
    hour_ago = time.time() - 3600
    for name in (".ckpt.tmp", "ckpt.0123456789abcdef.tmp", ".other.0123456789abcdef.tmp"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (hour_ago, hour_ago))
    publish(tmp_path / "ckpt", "new")
    assert len(os.listdir(tmp_path)) == 4


def test_publishing_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refuse)
    publish(tmp_path / "ckpt", "new")
    assert content(tmp_path / "ckpt") == whole("new")


@pytest.fixture(params=["here", "NFS"])
def any_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "here":
        return
    flock = fcntl.flock

    def of_nfs(descriptor: int, operation: int) -> None:
        """flock(2): over NFS an exclusive lock needs a descriptor that is open for writing."""
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)


@pytest.mark.usefixtures("any_locks")
@pytest.mark.parametrize("age", ["young", "old"])
def test_what_a_living_run_has_put_aside_outlives_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: str
) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    if age == "old":
        monkeypatch.setattr(atomic, "_STALE_AFTER_SECONDS", 0.0)
    with scratch_beside(target) as aside:
        os.link(target / "a.txt", aside / "a.txt")
        assert os.listdir(aside) == ["a.txt"]
        publish(target, "new", force=True)
        assert content(aside) == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["ckpt"]


def test_what_is_put_aside_outlives_a_change_where_nothing_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(atomic, "_STALE_AFTER_SECONDS", 0.0)
    publish(tmp_path / "ckpt", "old")
    with scratch_beside(tmp_path / "ckpt") as aside:
        assert tmp_path in aside.parents
        publish(tmp_path / "ckpt", "new", force=True)
        assert aside.exists()
    assert os.listdir(tmp_path) == ["ckpt"]


KILLED_ASIDE = """
import os, signal, sys
from pathlib import Path
from vllm_vlora.atomic import scratch_beside

with scratch_beside(Path(sys.argv[1])) as aside:
    (aside / "a.txt").write_text("aside")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("any_locks")
@pytest.mark.parametrize("lock", ["let go", "not made yet"])
def test_what_a_killed_run_has_put_aside_goes_once_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    target = tmp_path / "ckpt"
    publish(target, "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_ASIDE, str(target)], check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".ckpt.*")
    if lock == "not made yet":
        (left / "lock").unlink()
    # It may be one whose lock is taken in a moment.
    publish(target, "new", force=True)
    assert left.exists()
    monkeypatch.setattr(atomic, "_STALE_AFTER_SECONDS", 0.0)
    publish(target, "newer", force=True)
    assert os.listdir(tmp_path) == ["ckpt"]


def test_no_descriptor_leaks(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for index in range(20):
        publish(tmp_path / "ckpt", str(index), force=True)
        with pytest.raises(OutputError):
            publish(tmp_path / "ckpt", str(index))
    assert len(os.listdir("/proc/self/fd")) == before


def test_write_file_replaces_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_file_atomic(file, b"old")
    write_file_atomic(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.json"]


def test_write_file_that_fails_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    write_file_atomic(file, b"old")
    monkeypatch.setattr(os, "fsync", raise_full)
    with pytest.raises(OutputError, match=r"x\.json.*No space left"):
        write_file_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("target", ["file/ckpt", "/proc/ckpt"])
def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot"):
        publish(tmp_path / target, "new")
    with pytest.raises(OutputError, match="cannot write"):
        write_file_atomic(tmp_path / target, b"new")


def test_a_folder_without_permission_is_called_that() -> None:
    nobody, before = 65534, os.geteuid()
    with TemporaryDirectory() as name:
        place = Path(name) / "place"
        publish(place / "ckpt", "old")
        place.chmod(0o555)
        Path(name).chmod(0o755)
        if before == 0:
            os.seteuid(nobody)
        try:
            for write in (publish, lambda target, text: write_file_atomic(target, text.encode())):
                with pytest.raises(OutputError, match=r"cannot write .*: Permission denied"):
                    write(place / "new", "new")
        finally:
            os.seteuid(before)
            place.chmod(0o755)
        assert os.listdir(place) == ["ckpt"]


def test_the_root_is_no_output_folder() -> None:
    with pytest.raises(OutputError, match="cannot be an output folder"):
        publish(Path("/"), "new", force=True)
