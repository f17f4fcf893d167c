"""No code that came with a model or a tokenizer runs, whatever its files ask for."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_vlora.errors import AdapterError, OptionError
from vllm_vlora.evaluation.base_model import load_base_model
from vllm_vlora.evaluation.task_text import TOKENIZER_CONFIG, TaskText

CODE = "open({marker!r}, 'w').close()\nclass Evil: pass\n"


def _base(folder: Path) -> None:
    load_base_model(str(folder), torch.device("cpu"), torch.float32)


def _task(folder: Path) -> None:
    TaskText(None, {}, 8).own_of(folder)


@pytest.mark.parametrize(("load", "error"), [(_base, OptionError), (_task, AdapterError)])
def test_code_beside_it_is_not_run(
    load: Callable[[Path], None],
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, marker = tmp_path / "foreign", tmp_path / "ran"
    folder.mkdir()
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    config = {"model_type": "evil", "tokenizer_class": "Evil", "auto_map": names}
    for name in ("config.json", TOKENIZER_CONFIG):
        (folder / name).write_text(json.dumps(config))
    # transformers would ask, and some people say yes.
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text: asked.append(text) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(error, match="custom code"):
        load(folder)
    assert (asked, marker.exists()) == ([], False)
