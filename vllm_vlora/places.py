"""Whether another folder can take the place of one, known before anything is written into it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vllm_vlora.errors import OutputError

# Where renaming a folder onto one that is not empty fails for sure, and so may be tried.
_SURE = frozenset({"overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs"})


def check_no_mount_point(target: Path) -> None:
    """Raise OutputError if an existing folder is a mount point, as a container's volume is one."""
    if mount_of(target) != mount_of(target.parent):
        raise OutputError(
            f"{target} is a mount point, and no other folder can take its place; write to another "
            f"folder, or mount the one that is to hold {target.name}"
        )


def check_movable(target: Path, sibling: Path) -> None:
    """Raise OutputError if a folder cannot be renamed, as one of a container image's layer cannot.

    Args:
        target: an existing folder, resolved. sibling: another one beside it, which is not empty.
    """
    if _file_system(target) not in _SURE:
        return
    try:
        # Never succeeds, as the other one is not empty; how it fails says whether it could.
        os.rename(target, sibling)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        if error.errno == errno.EXDEV:
            raise OutputError(
                f"{target} is part of a container image's layer, and no other folder can take its "
                "place; write to another folder, or keep it on a volume"
            ) from error
        raise OutputError(
            f"{target} cannot be replaced: {error.strerror}; write to another folder"
        ) from error


def mount_of(path: Path) -> str:
    """What tells the mount that something lies on from others; links are not followed."""
    if not hasattr(os, "O_PATH"):
        return str(path.lstat().st_dev)
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    except OSError:
        lines = []
    finally:
        os.close(descriptor)
    ids = [line.partition(":")[2].strip() for line in lines if line.startswith("mnt_id:")]
    return ids[0] if ids else str(path.lstat().st_dev)


def _file_system(path: Path) -> str:
    """Its type, as "ext4"; empty where the system does not say."""
    mount = mount_of(path)
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        # "ID PARENT ... - TYPE SOURCE OPTIONS" (proc_pid_mountinfo(5)).
        if line.split(" ", 1)[0] == mount:
            return line.partition(" - ")[2].split(" ", 1)[0]
    return ""
