"""The environment variables of this package, told to vLLM.

vLLM warns of each variable ``VLLM_*`` that it does not know, and ends with
``--fail-on-environ-validation``. Told of ours, it says so of a misspelled one alone.
"""

from __future__ import annotations

from vllm_vlora.checkpoint.serving import CHECKPOINT_VARIABLE
from vllm_vlora.downloads import CACHE_VARIABLE, OFFLINE_VARIABLE
from vllm_vlora.plugin import settings
from vllm_vlora.plugin.events import LOG_VARIABLE
from vllm_vlora.plugin.polling import POLLED_VARIABLE

# Of the command line, which becomes vLLM's process.
_DEBUG_VARIABLE = "VLLM_VLORA_DEBUG"

VARIABLES = (
    CACHE_VARIABLE,
    CHECKPOINT_VARIABLE,
    LOG_VARIABLE,
    OFFLINE_VARIABLE,
    POLLED_VARIABLE,
    _DEBUG_VARIABLE,
    settings.BASIS_ROWS_VARIABLE,
    settings.BASIS_VARIABLE,
    settings.BASIS_WAIT_VARIABLE,
    settings.BLENDS_VARIABLE,
    settings.CONCURRENCY_VARIABLE,
    settings.DEVICE_VARIABLE,
    settings.EXCHANGE_VARIABLE,
    settings.FAIR_VARIABLE,
    settings.FETCH_VARIABLE,
    settings.FOLLOW_VARIABLE,
    settings.HOST_VARIABLE,
    settings.LATE_VARIABLE,
    settings.METRICS_LISTED_VARIABLE,
    settings.METRICS_TASKS_VARIABLE,
    settings.MODE_VARIABLE,
    settings.OVERLAP_VARIABLE,
    settings.POLL_VARIABLE,
    settings.QUEUE_VARIABLE,
    settings.ROUTE_THRESHOLD_VARIABLE,
    settings.ROUTE_VARIABLE,
    settings.ROWS_VARIABLE,
    settings.SLOTS_VARIABLE,
    settings.TEMPLATES_VARIABLE,
    settings.UNTESTED_VARIABLE,
    settings.WEIGHTS_VARIABLE,
)


def tell_vllm() -> None:
    """Enter our variables into vLLM's table of those that it knows."""
    from vllm import envs

    for name in VARIABLES:
        # None, whatever the value: what vLLM compiled is kept under all values, and written beside it,
        # while none of ours changes it and a checkpoint's URL may hold a key.
        envs.environment_variables.setdefault(name, lambda: None)
