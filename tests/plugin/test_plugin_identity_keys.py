"""Under which keys vLLM keeps what a task made: the state of its content is in all of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from plugin_world import TASKS, build
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request

from vllm_vlora.plugin import seams
from vllm_vlora.plugin.requests import lora_request


@pytest.fixture
def states(tmp_path: Path) -> list[LoRARequest]:
    """Requests for one task of two states, whose name is the same."""
    found = [
        lora_request(build(tmp_path / name, {"sql": TASKS[name]}).path, "sql")
        for name in ("joint", "private")
    ]
    assert {request.lora_name for request in found} == {"sql"}
    return found


def block_hashes(lora: LoRARequest | None) -> list[Any]:
    """Of a prompt of three blocks: what prefix cache and external KV connectors know blocks by."""
    kv_cache_utils.init_none_hash(sha256)
    request = Request(
        request_id="r",
        prompt_token_ids=list(range(12)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        lora_request=lora,
        block_hasher=kv_cache_utils.get_request_block_hasher(4, sha256),
    )
    return list(request.block_hashes)


def test_blocks_of_two_states_of_a_task_have_nothing_in_common(
    states: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_gen_lora_extra_hash_keys"
    ours = seams._lora_hash_keys(getattr(kv_cache_utils, name))
    monkeypatch.setattr(kv_cache_utils, name, ours)
    of_each = [block_hashes(lora) for lora in (*states, None)]
    assert [len(hashes) for hashes in of_each] == [3, 3, 3]
    assert len({bytes(block) for hashes in of_each for block in hashes}) == 9
    assert block_hashes(states[0]) == of_each[0]


def test_before_0_31_the_name_alone_was_the_key(states: list[LoRARequest]) -> None:
    keys = seams._lora_hash_keys(lambda request: [request.lora_request.lora_name])
    first, second = (keys(SimpleNamespace(lora_request=lora)) for lora in states)
    assert first[0] == second[0] == "sql"
    assert first != second
    ordinary = SimpleNamespace(lora_request=LoRARequest("sql", 1, "/adapters/sql"))
    assert keys(ordinary) == ["sql"]


@pytest.mark.parametrize("tower", [False, True])
def test_what_a_tower_made_of_an_image_is_kept_by_state(
    states: list[LoRARequest], tower: bool
) -> None:
    processor: Any = object.__new__(InputProcessor)
    processor.lora_config = SimpleNamespace(enable_tower_connector_lora=tower)
    key = seams._mm_identifier(InputProcessor._get_mm_identifier)
    ordinary = LoRARequest("sql", 1, "/adapters/sql")
    of_each = [key(processor, "image", lora) for lora in (*states, ordinary, None)]
    # Without adapters of its own a tower makes the same for everybody.
    assert len(set(of_each)) == (4 if tower else 1)
    stock = InputProcessor._get_mm_identifier(processor, "image", ordinary)
    assert of_each[2] == stock
