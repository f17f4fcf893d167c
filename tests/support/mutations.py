"""Damage to the files of a folder, as an accident or an attacker would do it.

Half of it knows what it damages: values of JSON, and headers of safetensors, are replaced by such as
readers stumble over, and the digests of a checkpoint put right, so that what lies behind them is reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

Files = dict[str, bytes]
"""Name within the folder -> content."""

NESTED = "[" * 3000 + "]" * 3000


class Raw(str):
    """JSON text that no value stands for."""


_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 60000, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**62, 2**63, 2**64,
    -(2**63), Raw("1" + "0" * 400), Raw("1" + "0" * 5000), 0.5, -0.0, 1e308, 1e-320, Raw("1e999"),
    Raw("NaN"), Raw("-Infinity"), "", "x", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "a\nb",
    Raw('"\\ud800"'), "\u202e", "\x1b]0;x\x07", "é" * 300, "x" * 70000, "(a+)+b", "(", "a{99999999999}",
    "(" * 2000 + ")" * 2000, ".*" * 40 + "b", [], [[]], {}, {"": ""}, [None], [-1], [2**62, 2**62],
    [0, 2**62, 2**62], [0], [1, 2, 3, 4, 5], ["q_proj", 5], {"a": {"b": {}}}, Raw(NESTED),
    Raw('{"a": 1, "a": 2}'), "F32", "BF16", "F8_E4M3", "U64", "C64", "float32", "nf4", "nf4-dq", "int8",
    "joint", "private", "flat", "dense", "factors", "embedding", "LORA",
]  # fmt: skip
_WORDS = [
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b"-",
    b"e",
    b"NaN",
    b"\\ud800",
    b"9" * 30,
    b"\n",
    b"..",
]


def mutated(files: Files, random: Random) -> Files:
    """The files with one to four damages."""
    files = dict(files)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        name = random.choice(sorted(files))
        ways = [_bytes, _bytes, _file]
        if name.endswith((".json", ".jsonl")):
            ways = [_json, _json, _json, _json, *ways]
        elif name.endswith(".safetensors"):
            ways = [_header, _header, _numbers, *ways]
        elif name == "tasks.index":
            ways = [_index, _index, _index, _index, _header, *ways]
        elif name == "tasks.records":
            ways = [_part, _part, _part, _part, *ways]
        random.choice(ways)(files, name, random)
        if not files:
            break
    if random.random() < 0.8:
        refit(files)
    return files


def write(files: Files, folder: Path, random: Random) -> None:
    """Write them, one of them now and then as something that is no regular file, or sparse."""
    odd = random.choice(sorted(files)) if files and random.random() < 0.02 else None
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != odd:
            path.write_bytes(data)
            continue
        kind = random.choice(["fifo", "device", "folder", "lost link", "sparse"])
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "sparse":
            path.write_bytes(data)
            os.truncate(path, 60 << 30)
        else:
            path.symlink_to("/dev/zero" if kind == "device" else "not there")


def refit(files: Files, keep: str | None = None) -> None:
    """Put the digests and sizes of a checkpoint or a calibration right, but not within ``keep``."""
    if "tasks.index" in files and "tasks.records" in files:
        with contextlib.suppress(
            KeyError, ValueError, RecursionError, RuntimeError, SafetensorError
        ):
            _refit_index(files)
    for holder in ("tasks.json", "attachments.json", "router.json", "vlora_config.json",
                   "calibration.json"):  # fmt: skip
        if holder == keep:
            continue
        try:
            data = json.loads(files[holder])
            changed = _refit(data, files)
            if changed:
                files[holder] = json.dumps(data).encode()
        except (KeyError, ValueError, RecursionError):
            continue


def _refit(value: Any, files: Files) -> bool:
    changed = False
    if isinstance(value, dict):
        file = value.get("file")
        if isinstance(file, str) and file in files and "sha256" in value:
            new = {"sha256": hashlib.sha256(files[file]).hexdigest(), "nbytes": len(files[file])}
            changed = any(value.get(key) != new[key] for key in new)
            value.update(new)
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            changed = _refit(inner, files) or changed
    return changed


def _text(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)


def _refit_index(files: Files) -> None:
    """The digests of the parts and of their file, and of other weights those of the tasks' files."""
    tensors = load(files["tasks.index"])
    ends = [0, *tensors["part_nbytes"].cumsum(0).tolist()]
    data = files["tasks.records"]
    digests = [hashlib.sha256(data[a:b]).digest() for a, b in itertools.pairwise(ends)]
    tensors["part_sha256"] = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
    about = json.loads(_text(tensors["about"]))
    _refit(about, files)
    tensors["about"] = _tensor(json.dumps(about).encode())
    files["tasks.index"] = save(tensors)


def _index(files: Files, name: str, random: Random) -> None:
    """One tensor of an index: a value of its JSON, or a number."""
    try:
        tensors = load(files[name])
        key = random.choice(sorted(tensors))
        if key in ("about", "ids", "sources"):
            tensors[key] = _tensor(_changed_json(_text(tensors[key]), random))
        else:
            flat = tensors[key].reshape(-1)
            most = torch.iinfo(flat.dtype).max if not flat.is_floating_point() else 3e38
            some = [0, 1, 2, 3, 7, most, -1 if flat.dtype != torch.uint8 else most]
            flat[random.randrange(len(flat))] = random.choice(some)
        files[name] = save(tensors)
    except (KeyError, ValueError, RecursionError, RuntimeError, SafetensorError):
        return


def _part(files: Files, name: str, random: Random) -> None:
    """A value in the JSON of a part, with the index put right, so that it is reached."""
    try:
        tensors = load(files["tasks.index"])
        sizes = tensors["part_nbytes"]
        place = random.randrange(len(sizes))
        start = int(sizes[:place].sum())
        data = files[name]
        part = _changed_json(data[start : start + int(sizes[place])], random)
        files[name] = data[:start] + part + data[start + int(sizes[place]) :]
        sizes[place] = len(part)
        files["tasks.index"] = save(tensors)
    except (KeyError, ValueError, RecursionError, RuntimeError, SafetensorError):
        return


def _json(files: Files, name: str, random: Random) -> None:
    lines = files[name].split(b"\n") if name.endswith(".jsonl") else [files[name]]
    place = random.randrange(len(lines))
    try:
        lines[place] = _changed_json(lines[place], random)
    except (ValueError, RecursionError):
        return
    files[name] = b"\n".join(lines)


def _changed_json(data: bytes, random: Random) -> bytes:
    root: Any = [json.loads(data)]
    parent, key = root, 0
    # Down to somewhere, deeper ones more often.
    while isinstance(parent[key], dict | list) and parent[key] and random.random() < 0.85:
        parent = parent[key]
        key = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    way = random.random()
    if way < 0.7:
        parent[key] = random.choice(_VALUES)
        if isinstance(parent[key], int) and random.random() < 0.3:
            parent[key] += random.choice([-1, 1])
    elif way < 0.8 and parent is not root:
        del parent[key]
    elif way < 0.9 and isinstance(parent, dict):
        parent[str(random.choice([v for v in _VALUES if isinstance(v, str)]))] = parent[key]
    elif isinstance(parent, list):
        parent += [parent[key]] * random.choice([1, 2, 50])
    return dumped(root[0]).encode("utf-8", "surrogatepass")


def dumped(value: Any) -> str:
    """JSON of a value that may hold ``Raw``."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(k))}:{dumped(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumped, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _header(files: Files, name: str, random: Random) -> None:
    data = files[name]
    if len(data) < 8:
        return
    (size,) = struct.unpack("<Q", data[:8])
    try:
        header = _changed_json(data[8 : 8 + size], random)
    except (ValueError, RecursionError):
        return
    files[name] = struct.pack("<Q", len(header)) + header + data[8 + size :]


def _numbers(files: Files, name: str, random: Random) -> None:
    data = bytearray(files[name])
    (size,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    if 8 + size + 4 >= len(data):
        return
    place = random.randrange(8 + size, len(data) - 4)
    numbers = [float("nan"), float("inf"), 0.0, 3e38, -3e38, 1e-45]
    data[place : place + 4] = struct.pack("<f", random.choice(numbers))
    files[name] = bytes(data)


def _bytes(files: Files, name: str, random: Random) -> None:
    data = files[name]
    place = random.randrange(len(data) + 1)
    way = random.randrange(6)
    if way == 0 and data:
        place = min(place, len(data) - 1)
        data = data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]
    elif way == 1:
        data = data[:place] + random.choice(_WORDS) + data[place:]
    elif way == 2:
        data = data[:place] + data[place + random.choice([1, 2, 8, 100]) :]
    elif way == 3:
        data = data[:place]
    elif way == 4:
        data += bytes(random.choice([1, 8, 1000]))
    else:
        data = random.randbytes(8) + data[8:]
    files[name] = data


def _file(files: Files, name: str, random: Random) -> None:
    way = random.randrange(4)
    other = random.choice(sorted(files))
    if way == 0:
        del files[name]
    elif way == 1:
        files[name] = files[other]
    elif way == 2:
        files[name], files[other] = files[other], files[name]
    else:
        files[name] = b""
