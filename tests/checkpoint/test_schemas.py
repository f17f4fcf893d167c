"""``docs/schemas``: what the committed JSON Schemas take and refuse, and that they are up to date."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from places import ROOT
from synthetic import family, run

from vllm_vlora.checkpoint.manifest import CONFIG_FILE, TASKS_FILE, read_config, read_tasks
from vllm_vlora.errors import CheckpointError

SCHEMAS = ROOT / "docs" / "schemas"
DATA = ROOT / "tests" / "data"


def _validator(file: str) -> Any:
    schema = json.loads((SCHEMAS / file.replace(".json", ".schema.json")).read_bytes())
    return jsonschema.Draft202012Validator(schema)


def _read(folder: Path, file: str) -> Any:
    return json.loads((folder / file).read_bytes())


def _check(folder: Path) -> None:
    for file in (CONFIG_FILE, TASKS_FILE):
        _validator(file).validate(_read(folder, file))


def test_the_committed_schemas_are_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("json_schemas", ROOT / "docs/json_schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {file.name: file.read_bytes() for file in SCHEMAS.iterdir()}
    assert written == module.make_schemas(), "run: python docs/json_schemas.py"


@pytest.mark.parametrize("file", [CONFIG_FILE, TASKS_FILE])
def test_the_schemas_are_schemas_whose_fields_say_what_they_mean(file: str) -> None:
    validator = _validator(file)
    validator.check_schema(validator.schema)
    for struct in validator.schema["$defs"].values():
        assert struct["description"]
        assert struct["additionalProperties"] is False
        if struct["title"] in ("Config", "ModuleSpec", "TaskRecord", "Segment"):
            for name, field in struct["properties"].items():
                assert field.get("description"), name


@pytest.mark.parametrize("name", ["format1", "format2", "format3", "format5"])
def test_the_pinned_examples_are_valid(name: str) -> None:
    _check(DATA / name)


@pytest.mark.parametrize(
    "options", [{"ratio": 3.0}, {"ratio": 3.0, "representation": "joint"},
                {"ratio": 1.5, "representation": "flat"}, {"ratio": 8.0}],
)  # fmt: skip
def test_what_compress_writes_is_valid(tmp_path: Path, options: dict[str, Any]) -> None:
    run(family(tmp_path / "in", 6, related=True), tmp_path / "out", **options)
    _check(tmp_path / "out")


# Place in the JSON of tests/data/format2, and what is put there; None takes it away.
BROKEN_CONFIGS: list[tuple[list[Any], Any]] = [
    (["format_version"], 6),
    (["format_version"], "2"),
    (["format_version"], 1),  # m.v has "flat"
    (["tasks"], None),
    (["more"], 1),
    (["modules", 0, "d_in"], 0),
    (["modules", 0, "kind"], "conv"),
    (["modules", 0, "name"], ""),
    (["modules", 0, "basis", "format"], "fp4"),
    (["modules", 1, "flat", "rank"], 0),
    (["basis", 0, "file"], "../basis.safetensors"),
    (["basis", 0, "file"], "/basis.safetensors"),
    (["basis", 0, "file"], "a\\b"),
    (["basis", 0, "file"], ""),
]
BROKEN_TASKS: list[tuple[list[Any], Any]] = [
    ([""], {}),
    (["x" * 257], {}),
    (["bits", "file"], "elsewhere.safetensors"),
    (["bits", "error"], None),
    (["bits", "source"], 1),
    (["bits", "more"], 1),
    (["bits", "extra"], {"score": ["F128", [2]]}),
    (["bits", "renamed"], {"m.": 1}),
    (["bits", "segments", 0, "representation"], "sparse"),
    (["bits", "segments", 0, "format"], "nf4"),  # bits are of nf4-dq and trellis alone
    (["bits", "segments", 0, "rank"], 0),
    (["bits", "segments", 0, "module"], -1),
    (["bits", "segments", 0, "bits"], [1, 2]),
    (["bits", "segments", 0, "bits"], [1, 3, -1]),
    (["bits", "segments", 0, "rows"], [0, 1, 0, 1]),  # rows are of joint alone
    (["rows", "segments", 0, "rows"], [0, 1, 0]),
    (["rows", "segments", 0, "core"], None),
    (["rows", "segments", 0, "core"], "sparse"),
    (["flat", "segments", 0, "format"], "int8"),
]  # fmt: skip


def _broken(data: Any, place: list[Any], value: Any) -> Any:
    data = copy.deepcopy(data)
    *path, last = place
    inner = data
    for part in path:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        *((CONFIG_FILE, place, value) for place, value in BROKEN_CONFIGS),
        *((TASKS_FILE, place, value) for place, value in BROKEN_TASKS),
    ],
)
def test_what_is_broken_is_refused_by_schema_and_reader(
    tmp_path: Path, file: str, place: list[Any], value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _broken(_read(DATA / "format2", file), place, value)
    with pytest.raises(jsonschema.ValidationError):
        _validator(file).validate(data)
    for name in (CONFIG_FILE, TASKS_FILE):
        (tmp_path / name).write_bytes((DATA / "format2" / name).read_bytes())
    (tmp_path / file).write_text(json.dumps(data))
    # The digest of a file that was changed is another matter.
    monkeypatch.setattr(
        "vllm_vlora.checkpoint.manifest.read_checked", lambda path, ref: path.read_bytes()
    )
    with pytest.raises(CheckpointError):
        read_tasks(tmp_path, read_config(tmp_path))
