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
from heapq import heappop, heappush
from pathlib import Path

from vllm_vlora.adapters.lookalikes import describe_dead_link, describe_file, describe_folder
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
    """What was found up to now.

    Attributes:
        seen: real path -> under which name it was looked into.
        links: the links that are still to be followed, those that lie in adapters last; with their level.
    """

    found: list[Path] = field(default_factory=list)
    passed_over: dict[Path, str] = field(default_factory=dict)
    seen: dict[str, Path] = field(default_factory=dict)
    links: list[tuple[bool, int, Path]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How much was found or passed over up to now, or will be."""
        return len(self.found) + len(self.passed_over) + len(self.links)


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
    while search.links:
        inside, level, link = heappop(search.links)
        _walk(link, search, level, inside)
    found = _without_inner(search)
    return FoundAdapters(dict(zip(_ids(top, found), found, strict=True)), search.passed_over)


def _walk(folder: Path, search: _Search, level: int, inside: bool = False) -> None:
    """Look into a folder; ``inside``: it lies in an adapter."""
    first = search.seen.setdefault(os.path.realpath(folder), folder)
    if first != folder:
        search.passed_over[folder] = (
            f"the same folder as {first}; give it by itself if it is wanted too"
        )
        return
    before = search.count
    if _is_adapter(folder):
        search.found.append(folder)
        _walk_into(_folders(folder), search, 2, True)
        return
    cached = cached_snapshot(folder)
    if cached is not None and _is_adapter(cached):
        search.found.append(folder)
        return
    children = _folders(folder)
    if children and level == _MOST_LEVELS:
        search.passed_over[folder] = (
            f"{level} levels down, deeper is not searched; give it by itself"
        )
        children = []
    kept, others = _of_one_run(children)
    _walk_into(kept, search, level + 1, inside)
    search.passed_over |= others
    said = describe_folder(folder) if level and search.count == before else None
    if said is None:
        search.passed_over |= {file: describe_file(file) for file in _lookalikes(folder)}
        search.passed_over |= _dead_links(folder)
    if said is None and search.count == before and (level == 1 or os.path.islink(folder)):
        said = f"no {CONFIG_FILE} in it"
    if said is not None:
        search.passed_over[folder] = said


def _walk_into(children: list[Path], search: _Search, level: int, inside: bool) -> None:
    """Look into folders, and leave links for later: a folder is found under its own name first."""
    for child in children:
        if os.path.islink(child):
            heappush(search.links, (inside, level, child))
        else:
            _walk(child, search, level, inside)


def _without_inner(search: _Search) -> list[Path]:
    """The adapters, by path, that lie in no other's folder; of what does, adapters alone are named."""
    kept: dict[Path, None] = {}
    for path in sorted(search.found):
        outer = next((above for above in path.parents if above in kept), None)
        if outer is None:
            kept[path] = None
            continue
        search.passed_over[path] = (
            f"lies in the adapter {outer.name}; give its own folder if it is wanted too"
        )
    for path in [*search.passed_over]:
        if any(above in kept for above in path.parents) and not _is_adapter(path):
            del search.passed_over[path]
    return [*kept]


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
    return [child for child in _children(folder) if os.path.isdir(child)]


def _dead_links(folder: Path) -> dict[Path, str]:
    """Links that lead nowhere, any of which may have been an adapter's, and where they lead."""
    described = ((child, describe_dead_link(child)) for child in _children(folder))
    return {child: why for child, why in described if why is not None}


def _children(folder: Path) -> list[Path]:
    return [folder / name for name in _names(folder) if not name.startswith((".", "__"))]


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
