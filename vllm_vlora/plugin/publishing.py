"""Tasks from tensors in memory, for loops that train and generate: ``publish`` and ``unpublish``."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_vlora.adapters.state_dicts import LoRATensors, read_state_dict
from vllm_vlora.errors import ModelStateError, OptionError, TaskLoadError, TaskNotFoundError
from vllm_vlora.plugin.identity import parse_task_path
from vllm_vlora.plugin.offers import offered, read_whole
from vllm_vlora.plugin.published import (
    ADOPT_METHOD,
    ELSEWHERE,
    OFFER_METHOD,
    UNPUBLISH_METHOD,
    WITHDRAW_METHOD,
)
from vllm_vlora.plugin.requests import requests_for
from vllm_vlora.plugin.seams import is_installed, loaded_paths
from vllm_vlora.quantize import FORMATS
from vllm_vlora.task_ids import validate_task_id

_Found = TypeVar("_Found")
_Question = tuple[Any, ...]
"""A method of engine cores, and its arguments."""
_Steps = Generator[_Question, list[Any], _Found]
"""Asks every engine core a question and is sent their answers, again and again."""


def publish(
    llm: Any,
    task: str,
    tensors: LoRATensors,
    *,
    alpha: float | None = None,
    config: Any = None,
    quantize: str | None = None,
) -> LoRARequest:
    """Give a running ``vllm.LLM`` a task from tensors in memory, without a file.

        request = vllm_vlora.publish(llm, "policy", get_peft_model_state_dict(model), config=config)
        llm.generate(prompts, sampling, lora_request=request)

    The task is new, or takes the place of the one that was published under its name before: requests in
    flight finish on the weights they began with, and those weights are freed after the last of them. It
    stands in front of a task of ``VLLM_VLORA_CHECKPOINT`` of the same name, whatever is published into
    that folder, until :func:`unpublish`. The tensors may be changed as soon as this returns.

    All workers take it or none: with an error nothing has changed. Who is interrupted (Ctrl-C) finds the
    task as it was, or published; nothing is kept of what was under way.

    Args:
        llm: ``vllm.LLM`` or ``LLMEngine``; of an ``AsyncLLM`` see :func:`publish_async`.
        task: its name.
        tensors: LoRA factors under PEFT's names (``get_peft_model_state_dict``), or module ->
            (A [r, d_in], B [d_out, r]); float32, float16 or bfloat16, on any device.
        alpha: alpha of every module, whose scale is alpha / r.
        config: in its place PEFT's ``LoraConfig``, or a mapping of its options.
        quantize: a number format to hold the factors in, ``nf4``, ``nf4-dq`` or ``int8``; by default they
            are held as they are.

    Returns:
        What to generate with. It names this publication, which no request of an earlier one is answered
        from; the prefix cache begins anew.

    Raises:
        AdapterError: the tensors are no plain LoRA, contradict each other, or hold NaN.
        TaskLoadError: the served model cannot take them, or there is no room.
        ModelStateError: the engine runs without LoRA or without this plugin.
        OptionError: an unknown number format. TaskIdError: the name cannot be a task's.
    """
    engine = _engine(llm)
    _settle(tensors)
    return _answered(engine, _publishing(engine, task, tensors, alpha, config, quantize))


async def publish_async(
    engine: AsyncLLM,
    task: str,
    tensors: LoRATensors,
    *,
    alpha: float | None = None,
    config: Any = None,
    quantize: str | None = None,
) -> LoRARequest:
    """:func:`publish` for an ``AsyncLLM``: the event loop goes on while tensors are written.

    API servers of that engine list the task within a second.
    """
    _check(engine, AsyncLLM, "publish_async is for AsyncLLM; call publish")
    _settle(tensors)
    steps = _publishing(engine, task, tensors, alpha, config, quantize)
    return await _answered_async(engine, steps)


def unpublish(llm: Any, task: str) -> None:
    """Take a task from memory away; a task of the checkpoint of that name answers again.

    Requests in flight finish.

    Args:
        llm, task: as :func:`publish` has them.

    Raises:
        TaskNotFoundError: no task was published under this name.
    """
    engine = _engine(llm)
    _answered(engine, _unpublishing(engine, task))


async def unpublish_async(engine: AsyncLLM, task: str) -> None:
    """:func:`unpublish` for an ``AsyncLLM``."""
    _check(engine, AsyncLLM, "unpublish_async is for AsyncLLM; call unpublish")
    await _answered_async(engine, _unpublishing(engine, task))


def _settle(tensors: LoRATensors) -> None:
    """Wait for what the caller's streams have yet to write: threads read the tensors on their own."""
    if not isinstance(tensors, Mapping):
        return
    given = (one for value in tensors.values() for one in _each(value))
    for device in {one.device for one in given if isinstance(one, torch.Tensor) and one.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


# --- what is asked --------------------------------------------------------------------------------


def _publishing(
    engine: Any,
    task: str,
    tensors: LoRATensors,
    alpha: float | None,
    config: Any,
    quantize: str | None,
) -> _Steps[LoRARequest]:
    validate_task_id(task)
    if quantize is not None and quantize not in FORMATS:
        raise OptionError(f"quantize={quantize!r}: use one of {', '.join(FORMATS)}, or None")
    modules = read_state_dict(tensors, config, alpha, f"task {task!r}")
    with offered(task, modules, quantize) as offer:
        described = msgspec.json.encode(offer)
        try:
            answers = yield OFFER_METHOD, described
            if ELSEWHERE in answers:
                answers = yield OFFER_METHOD, described, read_whole(offer)
            refusal = next(filter(None, answers), None)
            if refusal is not None:
                raise TaskLoadError(f"task {task!r} is not published: {refusal}")
        except GeneratorExit:
            raise
        except BaseException:
            # Also of who is interrupted: the workers would keep for ever what nobody will ask for.
            with suppress(Exception):
                yield WITHDRAW_METHOD, offer.path
            raise
        told: _Question = ADOPT_METHOD, task, offer.path
        try:
            before = yield told
        except (Exception, GeneratorExit):
            raise
        except BaseException:
            # Who is interrupted here may have told some and not others, or have told one half of it.
            yield told
            raise
    # What an engine has seen loaded is not asked for again.
    loaded_paths(engine).difference_update(before)
    loaded_paths(engine).add(offer.path)
    path = parse_task_path(offer.path)
    assert path is not None
    (request,) = requests_for({task: path})
    return request


def _unpublishing(engine: Any, task: str) -> _Steps[None]:
    paths = yield UNPUBLISH_METHOD, task
    if not any(paths):
        raise TaskNotFoundError(f"no task was published as {task!r}; give the name of one that was")
    loaded_paths(engine).difference_update(paths)


# --- who is asked ---------------------------------------------------------------------------------


def _engine(llm: Any) -> Any:
    engine = getattr(llm, "llm_engine", llm)
    advice = "publish is for vllm.LLM; with AsyncLLM use `await publish_async(...)`"
    _check(engine, LLMEngine, advice)
    return engine


def _check(engine: Any, kind: type[LLMEngine | AsyncLLM], advice: str) -> None:
    if not isinstance(engine, kind):
        raise OptionError(f"{type(engine).__name__} was given: {advice}")
    if engine.vllm_config.lora_config is None:
        raise ModelStateError("the engine runs without LoRA; start it with enable_lora=True")
    if not is_installed():
        raise ModelStateError(
            "the engine runs without this plugin; start it with VLLM_PLUGINS unset, or with vlora in it"
        )


def _answered(engine: Any, steps: _Steps[_Found]) -> _Found:
    """What steps come to, when an engine core answers."""
    client = engine.engine_core
    core = getattr(client, "engine_core", None)
    try:
        question = next(steps)
        while True:
            method, *args = question
            try:
                answer = (
                    getattr(core, method)(*args)
                    if core is not None
                    else client.call_utility(method, *args)
                )
            except BaseException as error:  # noqa: BLE001 - the steps raise it when they have cleared up
                question = steps.throw(error)
            else:
                question = steps.send([answer])
    except StopIteration as done:
        return done.value
    finally:
        steps.close()


async def _answered_async(engine: Any, steps: _Steps[_Found]) -> _Found:
    """The same of all engine cores, to the end: who is cancelled must not leave them half told."""
    return await asyncio.shield(asyncio.ensure_future(_asked_async(engine.engine_core, steps)))


async def _asked_async(client: Any, steps: _Steps[_Found]) -> _Found:
    sent: list[Any] | BaseException | None = None
    while True:
        try:
            question = await _in_thread(steps, sent)
            if isinstance(question, Future):
                return question.result()
            sent = await _answers(client, *question)
        except asyncio.CancelledError as error:
            # The event loop ends; the steps raise it when they have cleared up.
            if error is sent:
                raise
            sent = error


async def _answers(client: Any, method: str, *args: Any) -> list[Any] | BaseException:
    """What every engine core answers, or the first error, once all have answered."""
    asked = (client._call_utility_async(method, *args, engine=core) for core in client.core_engines)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    return next((a for a in answers if isinstance(a, BaseException)), answers)


async def _in_thread(
    steps: _Steps[_Found], sent: list[Any] | BaseException | None
) -> _Question | Future[_Found]:
    """What steps ask next, or what they came to: on their way they read, write and copy all tensors.

    It is waited for by who is cancelled too, since nothing can be said to steps that a thread is in.
    """
    running = asyncio.get_running_loop().run_in_executor(None, _advance, steps, sent)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _advance(
    steps: _Steps[_Found], sent: list[Any] | BaseException | None
) -> _Question | Future[_Found]:
    over: Future[_Found] = Future()
    try:
        if isinstance(sent, BaseException):
            return steps.throw(sent)
        return next(steps) if sent is None else steps.send(sent)
    except StopIteration as done:
        over.set_result(done.value)
    except BaseException as error:  # noqa: BLE001 - it is raised where the steps are awaited
        over.set_exception(error)
    return over
