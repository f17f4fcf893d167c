"""The environment variables of this package, told to vLLM.

vLLM warns of each variable ``VLLM_*`` that it does not know, and ends with
``--fail-on-environ-validation``. Told of ours, it says so of a misspelled one alone.
"""

from __future__ import annotations

import vllm_vlora.plugin.settings as settings
from vllm_vlora.checkpoint.serving import CHECKPOINT_VARIABLE
from vllm_vlora.downloads import CACHE_VARIABLE, OFFLINE_VARIABLE
from vllm_vlora.plugin.polling import POLLED_VARIABLE

# Of the command line, which becomes vLLM's process.
_DEBUG_VARIABLE = "VLLM_VLORA_DEBUG"

VARIABLES = (
    CACHE_VARIABLE,
    CHECKPOINT_VARIABLE,
    OFFLINE_VARIABLE,
    POLLED_VARIABLE,
    _DEBUG_VARIABLE,
    *(value for name, value in vars(settings).items() if name.endswith("_VARIABLE")),
)


def tell_vllm() -> None:
    """Enter our variables into vLLM's table of those that it knows."""
    from vllm import envs

    for name in VARIABLES:
        # None, whatever the value: what vLLM compiled is kept under all values, and written beside it,
        # while none of ours changes it and a checkpoint's URL may hold a key.
        envs.environment_variables.setdefault(name, lambda: None)
