"""Writes ``docs/schemas``: JSON Schemas of a checkpoint's two JSON files, as ``docs/format.md`` has them,
and of the report that ``evaluate`` prints, as ``vllm_vlora.evaluation.figures`` has it.

    python docs/json_schemas.py

Fields and types come from the structs that read the files, what a field means from the tables of
``format.md``, and its limits from below. What no schema can say is the reader's to check: that a
segment's module exists, that bits sum to the rank, what the files hold.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vllm_vlora.checkpoint import manifest
from vllm_vlora.evaluation import figures
from vllm_vlora.quantize import FLOAT_DTYPES, FORMATS, SHARED_FORMATS
from vllm_vlora.representations.registry import REPRESENTATIONS
from vllm_vlora.task_ids import MAX_TASK_ID_LENGTH

FOLDER = Path(__file__).parent / "schemas"
_PAGE = Path(__file__).with_name("format.md")
# The tables of ``format.md`` by the heading above them, in their order.
_TABLES = {"vlora_config.json": ("Config", "ModuleSpec"), "tasks.json": ("TaskRecord", "Segment")}
_ROW = re.compile(r"^\| (?P<names>`\w+`(?:, `\w+`)*)[^|]*\|[^|]*\| (?P<meaning>.*) \|$")

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SOME = {"minimum": 1}
_COUNT = {"minimum": 0}
_FORMAT, _SHARED_FORMAT = {"enum": list(FORMATS)}, {"enum": list(SHARED_FORMATS)}
_SHA256 = {"pattern": "^[0-9a-f]{64}$"}
# Relative, and it stays inside.
_INSIDE = {"pattern": r"^(?!/)(?!(.*/)?\.\.(/|$))[^\\\u0000]+$"}
_LIMITS: dict[str, dict[str, dict[str, Any]]] = {
    "Config": {"format_version": {"enum": list(range(1, manifest.FORMAT_VERSION + 1))}},
    "ModuleSpec": {
        "name": {"minLength": 1},
        "d_in": _SOME,
        "d_out": _SOME,
        "kind": {"enum": ["linear", "embedding"]},
    },
    "BasisSpec": {"k_out": _SOME, "k_in": _SOME, "format": _SHARED_FORMAT},
    "FlatSpec": {"rank": _SOME, "k_out": _SOME, "k_in": _SOME, "format": _SHARED_FORMAT},
    "FileRef": {"file": _INSIDE, "sha256": _SHA256, "nbytes": _COUNT},
    "TaskRecord": {
        "file": {"pattern": rf"^{manifest.TASKS_FOLDER}/[a-z0-9_.~-]+\.safetensors$"},
        "sha256": _SHA256,
        "nbytes": _COUNT,
        "original_nbytes": _COUNT,
    },
    "Segment": {
        "module": _COUNT,
        "representation": {"enum": list(REPRESENTATIONS)},
        "format": _FORMAT,
        "rank": _SOME,
        "core": {"enum": ["factors", "dense", None]},
    },
}


def make_schemas() -> dict[str, bytes]:
    """File name in ``docs/schemas`` -> what it holds."""
    config = _schema(manifest.Config, "vlora_config.json")
    # What came with format 2 is an error in a file of format 1.
    config["if"] = {"properties": {"format_version": {"const": 1}}}
    config["then"] = {"properties": {"modules": {"items": {"properties": {"flat": False}}}}}
    tasks = _schema(dict[str, manifest.TaskRecord], "tasks.json")
    tasks["propertyNames"] = {"minLength": 1, "maxLength": MAX_TASK_ID_LENGTH}
    _limit_extra(tasks["$defs"]["TaskRecord"]["properties"]["extra"])
    segment = tasks["$defs"]["Segment"]
    for name in ("bits", "rows"):
        for number in segment["properties"][name]["anyOf"][0]["prefixItems"]:
            number |= _COUNT
    segment["allOf"] = list(_between_fields())
    return {
        f"{Path(name).stem}.schema.json": json.dumps(schema, indent=2).encode() + b"\n"
        for name, schema in (
            ("vlora_config.json", config),
            ("tasks.json", tasks),
            ("evaluate.json", _report_schema()),
        )
    }


def _report_schema() -> dict[str, Any]:
    schema = msgspec.json.schema(figures.ReportFigures)
    for definition in schema["$defs"].values():
        definition["description"] = inspect.cleandoc(definition["description"])
        definition["additionalProperties"] = False
    title = "What vllm-vlora evaluate --json prints"
    return {"$schema": _DIALECT, "title": title, **schema}


def _schema(kind: Any, name: str) -> dict[str, Any]:
    schema = msgspec.json.schema(kind)
    meanings = _meanings()
    for struct, definition in schema["$defs"].items():
        definition["description"] = inspect.cleandoc(definition["description"])
        for field, content in definition["properties"].items():
            meaning = meanings.get(struct, {}).get(field)
            content |= {"description": meaning} if meaning else {}
            content |= _LIMITS[struct].get(field, {})
    return {
        "$schema": _DIALECT,
        "title": f"{name} of a vllm-vlora checkpoint, formats 1 to {manifest.FORMAT_VERSION}",
        **schema,
    }


def _meanings() -> dict[str, dict[str, str]]:
    """Struct -> field -> its meaning in the tables of ``format.md``."""
    found: dict[str, dict[str, str]] = {}
    page = _PAGE.read_text()
    for heading, structs in _TABLES.items():
        section = page.split(f"\n## `{heading}`\n", 1)[1].split("\n## ", 1)[0]
        tables = [part for part in section.strip().split("\n\n") if part.startswith("| field |")]
        for struct, table in zip(structs, tables, strict=True):
            rows = [row for row in map(_ROW.match, table.splitlines()) if row]
            found[struct] = {
                name: _plain(row["meaning"])
                for row in rows
                for name in re.findall(r"\w+", row["names"])
            }
    return found


def _plain(markdown: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"\*\((\d)\)\*", r"(format \1)", text)


def _limit_extra(extra: dict[str, Any]) -> None:
    dtype, shape = extra["additionalProperties"]["prefixItems"]
    dtype["enum"] = sorted(manifest.SAFETENSORS_DTYPES.values())
    shape["items"] |= _COUNT


def _between_fields() -> Iterator[dict[str, Any]]:
    """What one field of a segment asks of another."""
    is_joint = {"properties": {"representation": {"const": "joint"}}}
    core = {"core": {"enum": ["factors", "dense"]}}
    yield {
        "if": is_joint,
        "then": {"properties": core, "required": ["core"]},
        "else": {"properties": {"core": {"const": None}, "rows": {"const": None}}},
    }
    yield {
        "if": {
            "properties": {
                "representation": {"const": "private"},
                "format": {"enum": ["nf4-dq", "trellis"]},
            }
        },
        "else": {"properties": {"bits": {"const": None}}},
    }
    yield {
        "if": {"properties": {"format": {"const": "trellis"}}},
        "then": {"properties": {"representation": {"const": "private"}}},
    }
    yield {
        "if": {"properties": {"representation": {"const": "flat"}}},
        "then": {"properties": {"format": {"enum": list(FLOAT_DTYPES)}}},
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, data in make_schemas().items():
        (FOLDER / name).write_bytes(data)
        print(FOLDER / name)
