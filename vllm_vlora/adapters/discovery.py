"""The adapters in a folder of many, under the task ids that their places suggest, and what was left.

A folder with an ``adapter_config.json`` is an adapter; what lies deeper in it is named and not taken. Of
the ``checkpoint-N`` of one training run the last one counts, unless the run has an adapter in its own
folder, or beside them in one called "final" or the like, which trainers write at the end.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vllm_vlora.adapters.lookalikes import describe_file, describe_folder
from vllm_vlora.adapters.peft_config import CONFIG_FILE
from vllm_vlora.snapshots import cached_snapshot, ref_name

_MOST_LEVELS = 6
_CHECKPOINT = re.compile(r"checkpoint[-_]?(?P<number>\d+)", re.IGNORECASE)
# Names that say what a folder holds and nothing of the task.
_GENERIC = frozenset({
    "adapter", "adapters", "adapter_model", "lora", "lora_adapter", "lora_model", "peft", "default",
    "final", "final_model", "final_checkpoint", "last", "best", "best_model", "output", "outputs",
    "checkpoint", "checkpoints", "model", "weights", "save", "saved",
})  # fmt: skip
_MOMENT = re.compile(r"(?:checkpoint|ckpt|step|epoch|iter)[-_]?\d+", re.IGNORECASE)
_FILES = (
    ".safetensors",
    ".gguf",
    ".nemo",
    ".npz",
    ".zip",
    ".tar",
    ".tgz",
    ".gz",
    ".bin",
    ".pt",
    ".ckpt",
)


@dataclass(frozen=True)
class FoundAdapters:
    """What a folder of adapters holds.

    Attributes:
        adapters: task id -> adapter's folder, by path. passed_over: folder or file -> why it was left.

    Examples:
        >>> found = find_adapters(adapter_dirs[0])
        >>> list(found.adapters), found.passed_over
        (['task_0'], {})
    """

    adapters: dict[str, Path]
    passed_over: dict[Path, str]


@dataclass
class _Search:
    found: list[Path] = field(default_factory=list)
    passed_over: dict[Path, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """How much was found or passed over up to now."""
        return len(self.found) + len(self.passed_over)


def find_adapters(folder: str | Path) -> FoundAdapters:
    """Search a folder for adapters.

    The task id is the sub-folder's name, and where adapters lie deeper the part of the path that tells
    them apart: ``runs/sql/checkpoint-500`` and ``runs/chat/adapter`` in ``runs`` are "sql" and "chat".
    Parts that only say what a folder holds ("adapter", "final", "checkpoint-500") are left out where the
    rest is enough.

    Examples:
        >>> list(find_adapters(f"{adapter_dirs[0]}/..").adapters)[:2]
        ['task_0', 'task_1']
    """
    given = Path(os.path.expanduser(folder))
    top = given.resolve() if ".." in given.parts else given.absolute()
    search = _Search()
    _walk(top, search, 0)
    return FoundAdapters(
        dict(zip(_ids(top, search.found), search.found, strict=True)), search.passed_over
    )


def _walk(folder: Path, search: _Search, level: int) -> None:
    real = os.path.realpath(folder)
    if real in search.seen:
        return
    search.seen.add(real)
    before = search.count
    if _is_adapter(folder):
        search.found.append(folder)
        _name_inner(folder, search)
        return
    cached = cached_snapshot(folder)
    if cached is not None and _is_adapter(cached):
        search.found.append(folder)
        return
    children = _folders(folder) if level < _MOST_LEVELS else []
    kept, others = _of_one_run(children)
    for child in kept:
        _walk(child, search, level + 1)
    search.passed_over |= others
    said = describe_folder(folder) if level and search.count == before else None
    if said is None:
        search.passed_over |= {file: describe_file(file) for file in _lookalikes(folder)}
    if said is None and level == 1 and search.count == before:
        said = f"no {CONFIG_FILE} in it"
    if said is not None:
        search.passed_over[folder] = said


def _name_inner(adapter: Path, search: _Search) -> None:
    """Adapters that lie in an adapter's own folder: checkpoints of its training, or others."""
    inner = _Search(seen=search.seen)
    for child in _folders(adapter):
        _walk(child, inner, 2)
    reason = f"lies in the adapter {adapter.name}; give its own folder if it is wanted too"
    search.passed_over |= dict.fromkeys(inner.found, reason)
    search.passed_over |= {
        path: why for path, why in inner.passed_over.items() if _is_adapter(path)
    }


def _of_one_run(children: list[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The folders to look into, and checkpoints of a run of which there is a later one or the end."""
    numbers = {
        child: int(match["number"])
        for child in children
        if (match := _CHECKPOINT.fullmatch(child.name)) and _is_adapter(child)
    }
    last = max(numbers, key=lambda child: numbers[child], default=None)
    ends = [child for child in children if child.name.lower() in _GENERIC and _is_adapter(child)]
    taken = ends[0] if ends else last
    left = {c: f"an earlier checkpoint than {taken.name}" for c in numbers if taken and c != taken}
    return [child for child in children if child not in left], left


def _is_adapter(folder: Path) -> bool:
    # os.path says no where a folder may not be read; Path would raise.
    return os.path.isfile(folder / CONFIG_FILE)


def _folders(folder: Path) -> list[Path]:
    children = (folder / name for name in _names(folder) if not name.startswith((".", "__")))
    return [child for child in children if os.path.isdir(child)]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        # What may not be read is named as a folder without an adapter.
        return []


def _lookalikes(folder: Path) -> list[Path]:
    """Files beside adapters that may have been meant for some; not those of a model or a trainer."""
    names = _names(folder)
    if {"config.json", "tokenizer.json", "trainer_state.json"} & set(names):
        return []
    return [folder / n for n in names if n.endswith(_FILES) and os.path.isfile(folder / n)]


def _ids(top: Path, found: list[Path]) -> list[str]:
    paths = [_parts(top, path) for path in found]
    meaning = [_meaningful(parts) for parts in paths]
    if len(found) == 1:
        alone = meaning[0][-1]
        return [top.name if _says_nothing(alone) else alone]
    counts = Counter(meaning)
    chosen = [m if counts[m] == 1 else p for m, p in zip(meaning, paths, strict=True)]
    levels = enumerate(zip(*chosen, strict=False))
    shared = next((i for i, names in levels if len(set(names)) > 1), _MOST_LEVELS)
    cut = [parts[min(shared, len(parts) - 1) :] for parts in chosen]
    firsts = Counter(parts[0] for parts in cut)
    # Alone below its first folder, the rest of the path says no more.
    ids = [parts[0] if firsts[parts[0]] == 1 else "/".join(parts) for parts in cut]
    if len(set(ids)) < len(ids):
        ids = [path.relative_to(top).as_posix() for path in found]
    return ids


def _parts(top: Path, path: Path) -> tuple[str, ...]:
    """The path below the folder searched; that folder's own name where it is the adapter's itself."""
    parts = path.relative_to(top).parts
    return (*parts[:-1], ref_name(path)) if parts else (ref_name(path),)


def _meaningful(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts without those at the end that say nothing of the task, where any are left."""
    kept = list(parts)
    while len(kept) > 1 and _says_nothing(kept[-1]):
        kept.pop()
    return tuple(kept)


def _says_nothing(name: str) -> bool:
    return name.lower() in _GENERIC or _MOMENT.fullmatch(name) is not None
