"""Limits and fair sharing in real engines: who begins when, and that nothing else changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_forks import ENGINE_ENVIRONMENT, run_script
from engine_server import Server, ids, words
from engine_world import ENGINE_ARGUMENTS, MAX_TOKENS, PROMPTS, World, exact
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.engine

BURST, OTHER, THIRD = "attention", "everything", "rslora"
ROOM = 4
# Tokens: seconds of any machine.
LONG = 8000


class Engine:
    """An engine in this process with room for few requests at once."""

    def __init__(self, world: World, **arguments: Any) -> None:
        from vllm import LLM

        from vllm_vlora import lora_request

        self.world = world
        checkpoint = exact(world, "private")
        self.requests: dict[str, Any] = {
            task: lora_request(checkpoint, task) for task in world.adapters
        }
        self.requests["base"] = None
        options = {**ENGINE_ARGUMENTS, "max_num_seqs": ROOM, "enable_prefix_caching": False}
        self.llm = LLM(
            str(world.model),
            enable_lora=True,
            max_loras=8,
            max_lora_rank=16,
            **{**options, **arguments},
        )
        self.engine: Any = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.number = 0
        self.forget()

    def forget(self) -> None:
        self.began: list[str] = []
        self.most: Counter[str] = Counter()
        self.preempted = 0
        self.answers: dict[str, list[int]] = {}

    def send(self, *names: str, tokens: int = MAX_TOKENS, **more: Any) -> list[str]:
        """Ask each once; their ids, which begin with the task's name."""
        from vllm import SamplingParams

        priority = more.pop("priority", 0)
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **more)
        sent = []
        for name in names:
            self.number += 1
            sent.append(f"{name}/{self.number}")
            prompt = {"prompt_token_ids": PROMPTS[0]}
            self.engine.add_request(
                sent[-1], prompt, sampling, lora_request=self.requests[name], priority=priority
            )
        return sent

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.answers[output.request_id] = list(output.outputs[0].token_ids)
        running = [request.request_id.split("-")[0] for request in self.scheduler.running]
        self.began += [name for name in running if name not in self.began]
        self.most |= Counter(name.split("/")[0] for name in running)
        self.preempted += sum(
            request.num_preemptions for request in self.scheduler.requests.values()
        )

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()
        tenants = self.scheduler._vlora_tenants
        assert not self.scheduler.requests
        assert not tenants.waiting
        assert len(self.scheduler.waiting) == 0

    def right(self, *asked: str) -> bool:
        """Whether these answered as stock vLLM does, up to where they were to end."""
        reference = {name: self.world.reference[name][0] for name in self.requests}
        return all(
            (own := self.answers[name]) == reference[name.split("/")[0]][: len(own)] and own
            for name in asked
        )


Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def make_engine(world: World, take_out_the_plugin: Callable[[], None]) -> Iterator[Make]:
    """An engine with settings of its own; the one before it is ended."""
    made: dict[str, Engine] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_VLORA_CHECKPOINT", str(exact(world, "private")))

        def make(settings: dict[str, str], **arguments: Any) -> Engine:
            key = json.dumps([settings, arguments])
            if key not in made:
                for engine in made.values():
                    engine.engine.engine_core.shutdown()
                made.clear()
                take_out_the_plugin()
                for name in ("FAIR", "WEIGHTS", "TASK_CONCURRENCY"):
                    patch.setenv(f"VLLM_VLORA_{name}", settings.get(name, ""))
                made[key] = Engine(world, **arguments)
            made[key].forget()
            return made[key]

        yield make
        for engine in made.values():
            engine.engine.engine_core.shutdown()


# --- fair sharing ---------------------------------------------------------------------------------

FAIR = {"FAIR": "on", "WEIGHTS": json.dumps({THIRD: 3})}


@pytest.fixture
def fair(make_engine: Make) -> Engine:
    # A request may take 8 blocks; four of 109 tokens end with 16, so that some are preempted.
    return make_engine(
        FAIR, num_gpu_blocks_override=10, block_size=32, scheduling_policy="priority"
    )


def test_a_burst_of_one_task_keeps_nobody_waiting(fair: Engine) -> None:
    burst = fair.send(*[BURST] * 30)
    for _ in range(3):
        fair.step()
    late = fair.send(OTHER, OTHER, "base", "base")
    fair.finish()
    assert set(late) <= set(fair.began[: ROOM + len(late) + 1])
    assert fair.right(*burst, *late)
    again = fair.send(*[BURST] * 10, *["base"] * 10)
    fair.finish()
    began = [name.split("/")[0] for name in fair.began if name in again]
    assert abs(began[:8].count(BURST) - began[:8].count("base")) <= 2, began


def test_a_weight_is_a_share(fair: Engine) -> None:
    fair.send(*[BURST] * 24, *[THIRD] * 24)
    fair.finish()
    began = [name.split("/")[0] for name in fair.began[:24]]
    assert 15 <= began.count(THIRD) <= 20, began


def test_priority_comes_first(fair: Engine) -> None:
    fair.send(*[BURST] * 12)
    fair.send(*[OTHER] * 2, priority=1)
    urgent = fair.send(*[BURST] * 3, priority=-1)
    fair.finish()
    assert set(fair.began[:3]) == set(urgent)
    assert {name.split("/")[0] for name in fair.began[-2:]} == {OTHER}


def test_preempted_requests_answer_as_before(fair: Engine) -> None:
    sent = fair.send(*[BURST, OTHER, "base", THIRD] * 3, tokens=100)
    fair.finish()
    assert fair.preempted, "the cache is too large for this test"
    for name in {BURST, OTHER, "base", THIRD}:
        own = [fair.answers[one] for one in sent if one.startswith(f"{name}/")]
        assert own[0][:MAX_TOKENS] == fair.world.reference[name][0]
        assert own[0] == own[1] == own[2]
        assert len(own[0]) == 100


# --- limits ---------------------------------------------------------------------------------------


@pytest.fixture
def limited(make_engine: Make) -> Engine:
    return make_engine({"TASK_CONCURRENCY": "2"})


def test_a_task_runs_as_often_as_it_may_and_the_rest_is_the_others(limited: Engine) -> None:
    sent = limited.send(*[BURST] * 12, *[OTHER] * 6, *["base"] * 12)
    limited.finish()
    assert limited.right(*sent)
    assert (limited.most[BURST], limited.most[OTHER]) == (2, 2)
    limited.forget()
    alone = limited.send(*["base"] * 12, *[BURST] * 2)
    limited.finish()
    assert limited.right(*alone)
    assert limited.most["base"] == ROOM, "the base model is not limited"
    assert limited.began == alone, "without fairness the order is that of coming"


def test_what_waits_can_be_given_up(limited: Engine) -> None:
    sent = limited.send(*[BURST] * 10, "base")
    limited.step()
    # One that runs, some that wait, and one that is not there.
    limited.engine.abort_request([sent[0], *sent[4:9], "nobody"])
    limited.finish()
    assert set(limited.answers) == {*sent[1:4], *sent[9:]}
    assert limited.right(*limited.answers)
    sent = limited.send(*[BURST] * 10)
    limited.step()
    limited.engine.abort_request(sent)
    limited.finish()
    assert limited.right(*limited.answers)


def test_grammars_are_compiled_and_kept_within_a_limit(limited: Engine) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(regex="(w5|w7|w9|w3)+")
    bound = limited.send(*[BURST] * 6, structured_outputs=grammar)
    free = limited.send(*[BURST, OTHER] * 3)
    limited.finish()
    assert limited.right(*free)
    assert limited.most[BURST] == 2
    for name in bound:
        assert set(limited.answers[name]) <= {3, 5, 7, 9, 0}


# --- many callers: sessions, refusals -------------------------------------------------------------

SESSIONS = """
import asyncio, json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_vlora import lora_request
from vllm_vlora.errors import TaskBusyError

job = json.loads(sys.argv[1])
number = 0

def sampling():
    return SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False,
                          output_kind=RequestOutputKind.DELTA)

async def ask(engine, prompt, task):
    global number
    number += 1
    tokens = []
    try:
        async for output in engine.generate(prompt, sampling(), str(number), lora_request=task):
            tokens += output.outputs[0].token_ids
    except TaskBusyError as error:
        return str(error)
    return tokens

def plain(engine, task):
    return ask(engine, {"prompt_token_ids": list(job["prompts"][0])}, task)

def session(engine, task, pause=0.05):
    async def pieces():
        for prompt in job["prompts"]:
            yield StreamingInput({"type": "token", "prompt_token_ids": list(prompt)})
            await asyncio.sleep(pause)
    return ask(engine, pieces(), task)

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        job["model"], enable_lora=True, max_loras=8, max_lora_rank=16,
        **job["arguments"] | {"max_num_seqs": 3}))
    burst, other = (lora_request(job["checkpoint"], task) for task in job["tasks"])
    found = {"alone": [await session(engine, burst), await plain(engine, burst)]}
    # Two sessions fill the limit, and stay inside between their pieces; the others wait, are refused
    # or are nobody's to wait for.
    crowd = [session(engine, burst, 0.3), session(engine, burst, 0.3)]
    crowd = [asyncio.create_task(one) for one in crowd]
    await asyncio.sleep(0.2)
    crowd += [asyncio.create_task(plain(engine, burst)) for _ in range(20)]
    crowd += [asyncio.create_task(session(engine, burst)) for _ in range(8)]
    crowd += [asyncio.create_task(plain(engine, other)) for _ in range(2)]
    found["crowd"] = await asyncio.wait_for(asyncio.gather(*crowd), 60)
    given_up = [asyncio.create_task(plain(engine, burst)) for _ in range(4)]
    await asyncio.sleep(0.01)
    for one in given_up:
        one.cancel()
    await asyncio.gather(*given_up, return_exceptions=True)
    # Nothing is left inside: a pause that waits for all ends.
    await asyncio.wait_for(engine.pause_generation(mode="keep"), 30)
    held = asyncio.create_task(plain(engine, burst))
    await asyncio.sleep(0.3)
    found["held"] = held.done()
    await engine.resume_generation()
    found["after"] = await asyncio.wait_for(held, 30)
    await asyncio.wait_for(engine.pause_generation(mode="wait"), 30)
    await engine.resume_generation()
    found["session after"] = await asyncio.wait_for(session(engine, burst), 30)
    print("RESULT " + json.dumps(found), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def _job(world: World) -> str:
    job = {
        "model": str(world.model),
        "checkpoint": str(exact(world, "private")),
        "arguments": ENGINE_ARGUMENTS,
        "tasks": [BURST, OTHER],
        "prompts": PROMPTS,
    }
    return json.dumps(job)


def _environment(world: World, **limits: str) -> dict[str, str]:
    return {"VLLM_VLORA_CHECKPOINT": str(exact(world, "private")), **limits}


def test_sessions_pauses_and_refusals(world: World) -> None:
    limits = {
        "VLLM_VLORA_TASK_CONCURRENCY": "2",
        "VLLM_VLORA_TASK_QUEUE": "4",
        "VLLM_VLORA_FAIR": "on",
    }
    found = run_script(SESSIONS, _job(world), **_environment(world, **limits))
    session, plain = found["alone"]
    assert plain == world.reference[BURST][0][:6]
    assert (len(session), found["after"], found["session after"]) == (18, plain, session)
    assert not found["held"]
    sessions, asked = found["crowd"][:2], found["crowd"][2:22]
    assert sessions == [session, session]
    refused = [answer for answer in asked if isinstance(answer, str)]
    assert len(refused) >= 10
    assert all(answer == plain for answer in asked if answer not in refused)
    assert all(f"4 requests of '{BURST}' wait already" in answer for answer in refused)
    # A session that is refused is refused whole.
    late = found["crowd"][22:30]
    assert all(answer == session or isinstance(answer, str) for answer in late)
    assert [answer for answer in late if isinstance(answer, str)]
    assert found["crowd"][30:] == [world.reference[OTHER][0][:6]] * 2


OFFLINE = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
from vllm import LLM, SamplingParams
from vllm_vlora import lora_request

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_lora=True, max_loras=8, max_lora_rank=16,
              **job["arguments"] | {"max_num_seqs": 3})
    done = llm.generate([{"prompt_token_ids": job["prompts"][0]}] * 20,
                        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
                        lora_request=lora_request(job["checkpoint"], job["tasks"][0]), use_tqdm=False)
    print("RESULT " + json.dumps([list(one.outputs[0].token_ids) for one in done]), flush=True)

if __name__ == "__main__":
    main()
"""


def test_the_offline_engine_refuses_its_caller_nothing(world: World) -> None:
    found = run_script(OFFLINE, _job(world), **_environment(world, VLLM_VLORA_TASK_QUEUE="2"))
    assert found == [world.reference[BURST][0][:6]] * 20


# --- vllm serve -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        world,
        tmp_path_factory.mktemp("limits") / "log",
        exact(world, "private"),
        options=("--max-num-seqs", str(ROOM), "--api-server-count", "2"),
        VLLM_VLORA_FAIR="on",
        VLLM_VLORA_TASK_QUEUE="200",
    )
    assert server.wait(), server.log.read_text()[-4000:]
    yield server
    server.stop()


async def _ask(client: httpx.AsyncClient, model: str, **more: Any) -> tuple[int, str, float]:
    """Status, text or body, and when it came."""
    body = {
        "model": model,
        "prompt": PROMPTS[0],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    answer = await client.post("/v1/completions", json=body | more)
    text = answer.text
    if answer.status_code == 200 and not more.get("stream"):
        text = answer.json()["choices"][0]["text"]
    return answer.status_code, text, time.monotonic()


def _together(server: Server, *batches: list[dict[str, Any]]) -> list[list[tuple[int, str, float]]]:
    """Send batches of requests, each when the one before was sent."""

    async def ask() -> list[list[tuple[int, str, float]]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client:
            sent = []
            for batch in batches:
                sent.append([asyncio.create_task(_ask(client, **one)) for one in batch])
                await asyncio.sleep(0.5)
            return [list(await asyncio.gather(*batch)) for batch in sent]

    return asyncio.run(ask())


def test_five_requests_do_not_wait_for_two_hundred_of_another_task(
    server: Server, world: World
) -> None:
    burst, few = _together(server, [{"model": BURST}] * 200, [{"model": OTHER}] * 5)
    assert {status for status, _, _ in burst + few} == {200}
    for name, answers in ((BURST, burst), (OTHER, few)):
        assert all(ids(text) == words(world.reference[name][0]) for _, text, _ in answers)
    last = max(came for _, _, came in few)
    after = sum(came > last for _, _, came in burst)
    assert after > 100, f"{after} of the burst came after the last of the few"


def test_above_the_bound_a_task_gets_429_and_others_answer(server: Server, world: World) -> None:
    burst, others = _together(
        server,
        [{"model": BURST, "max_tokens": 40}] * 260,
        [{"model": name} for name in (OTHER, "base", "ordinary")],
    )
    kinds = Counter(status for status, _, _ in burst)
    assert set(kinds) == {200, 429}, kinds
    # Two run, 200 wait.
    assert 10 <= kinds[429] <= 58
    for status, text, _ in burst:
        if status == 429:
            error = json.loads(text)["error"]
            assert f"200 requests of '{BURST}' wait already" in error["message"]
            assert (error["code"], error["type"]) == (429, "Too Many Requests")
    for name, (status, text, _) in zip((OTHER, "base", "ordinary"), others):
        assert (status, ids(text)) == (200, words(world.reference[name][0]))
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
    assert "Traceback" not in server.log.read_text()


def test_a_stream_that_is_refused_says_so_in_its_first_event(server: Server) -> None:
    (burst,) = _together(server, [{"model": BURST, "max_tokens": 40, "stream": True}] * 260)
    refused = [text for _, text, _ in burst if '"error"' in text]
    assert len(refused) >= 10
    for text in refused:
        first = json.loads(text.splitlines()[0].removeprefix("data: "))
        assert first["error"]["code"] == 429


async def _while_three_are_there(server: Server) -> list[tuple[int, str]]:
    """Status and body of a request of a task of which three streams are there, and of another's."""
    long = {"model": BURST, "prompt": PROMPTS[0], "max_tokens": LONG, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        asked = client.build_request("POST", "/v1/completions", json=long | {"stream": True})
        three = await asyncio.gather(*[client.send(asked, stream=True) for _ in range(3)])
        # They have a status before the engine has them, and none of them ends for long.
        while await _requests(client) < 3:
            await asyncio.sleep(0.05)
        more = [await _ask(client, name, stream=True, max_tokens=4) for name in (BURST, OTHER)]
        for answer in three:
            await answer.aclose()
    return [(answer.status_code, "") for answer in three] + [answer[:2] for answer in more]


async def _requests(client: httpx.AsyncClient) -> float:
    """That run or wait in the engine."""
    return sum(
        sample.value
        for family in text_string_to_metric_families((await client.get("/metrics")).text)
        for sample in family.samples
        if sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting")
    )


def test_a_stream_gets_its_status_where_one_server_knows(world: World, tmp_path: Path) -> None:
    server = Server(
        world,
        tmp_path / "log",
        exact(world, "private"),
        options=("--max-model-len", str(2 * LONG)),
        VLLM_VLORA_TASK_CONCURRENCY="1",
        VLLM_VLORA_TASK_QUEUE="2",
        # More than the model was made for, which nobody reads.
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
    )
    try:
        assert server.wait(), server.log.read_text()[-4000:]
        found = asyncio.run(_while_three_are_there(server))
        # With nothing to do, one begins at once, and two wait.
        prompts = [{"model": BURST, "prompt": [PROMPTS[0]] * n} for n in (3, 4)]
        many = [_together(server, [asked])[0][0] for asked in prompts]
    finally:
        server.stop()
    assert [status for status, *_ in many] == [200, 429]
    assert [status for status, _ in found] == [200, 200, 200, 429, 200]
    assert json.loads(found[3][1])["error"]["code"] == 429
    assert '"error"' not in found[4][1]


def test_callers_that_hang_up_leave_their_place(server: Server, world: World) -> None:
    async def hang_up() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            asked = [asyncio.create_task(_ask(client, BURST, max_tokens=200)) for _ in range(90)]
            await asyncio.sleep(0.7)
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    for _ in range(3):
        asyncio.run(hang_up())
    start = time.monotonic()
    (answers,) = _together(server, [{"model": BURST}] * 8)
    assert [status for status, _, _ in answers] == [200] * 8
    assert time.monotonic() - start < 10
