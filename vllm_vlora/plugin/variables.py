"""The environment variables of this package, told to vLLM.

vLLM warns of each variable ``VLLM_*`` that it does not know, and ends with
``--fail-on-environ-validation``. Told of ours, it says so of a misspelled one alone.
"""

from __future__ import annotations

from vllm_vlora.checkpoint.serving import CHECKPOINT_VARIABLE
from vllm_vlora.downloads import CACHE_VARIABLE, OFFLINE_VARIABLE
from vllm_vlora.plugin.events import LOG_VARIABLE
from vllm_vlora.plugin.polling import POLLED_VARIABLE
from vllm_vlora.plugin.settings import (
    BASIS_ROWS_VARIABLE,
    BASIS_VARIABLE,
    BASIS_WAIT_VARIABLE,
    BLENDS_VARIABLE,
    CONCURRENCY_VARIABLE,
    DEVICE_VARIABLE,
    EXCHANGE_VARIABLE,
    FAIR_VARIABLE,
    FETCH_VARIABLE,
    FOLLOW_VARIABLE,
    HOST_VARIABLE,
    LATE_VARIABLE,
    METRICS_LISTED_VARIABLE,
    METRICS_TASKS_VARIABLE,
    MODE_VARIABLE,
    OVERLAP_VARIABLE,
    POLL_VARIABLE,
    QUEUE_VARIABLE,
    ROUTE_THRESHOLD_VARIABLE,
    ROUTE_VARIABLE,
    ROWS_VARIABLE,
    SLOTS_VARIABLE,
    TEMPLATES_VARIABLE,
    UNTESTED_VARIABLE,
    WEIGHTS_VARIABLE,
)

# Of the command line, which becomes vLLM's process.
_DEBUG_VARIABLE = "VLLM_VLORA_DEBUG"

VARIABLES = (
    CACHE_VARIABLE,
    CHECKPOINT_VARIABLE,
    LOG_VARIABLE,
    OFFLINE_VARIABLE,
    POLLED_VARIABLE,
    _DEBUG_VARIABLE,
    BASIS_ROWS_VARIABLE,
    BASIS_VARIABLE,
    BASIS_WAIT_VARIABLE,
    BLENDS_VARIABLE,
    CONCURRENCY_VARIABLE,
    DEVICE_VARIABLE,
    EXCHANGE_VARIABLE,
    FAIR_VARIABLE,
    FETCH_VARIABLE,
    FOLLOW_VARIABLE,
    HOST_VARIABLE,
    LATE_VARIABLE,
    METRICS_LISTED_VARIABLE,
    METRICS_TASKS_VARIABLE,
    MODE_VARIABLE,
    OVERLAP_VARIABLE,
    POLL_VARIABLE,
    QUEUE_VARIABLE,
    ROUTE_THRESHOLD_VARIABLE,
    ROUTE_VARIABLE,
    ROWS_VARIABLE,
    SLOTS_VARIABLE,
    TEMPLATES_VARIABLE,
    UNTESTED_VARIABLE,
    WEIGHTS_VARIABLE,
)


def tell_vllm() -> None:
    """Enter our variables into vLLM's table of those that it knows."""
    from vllm import envs

    for name in VARIABLES:
        # None, whatever the value: what vLLM compiled is kept under all values, and written beside it,
        # while none of ours changes it and a checkpoint's URL may hold a key.
        envs.environment_variables.setdefault(name, lambda: None)
