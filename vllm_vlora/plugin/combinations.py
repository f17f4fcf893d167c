"""vLLM's gauge of the adapters that run and wait, kept to the combinations seen last.

``vllm:lora_requests_info`` has a series for each combination of names that ever ran at once, as a label,
and vLLM makes one with every step. With a few adapters these are few; with hundreds of tasks nearly every
step has a new one, of as many names as run at once, and an API server grows until it is killed.
"""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

_KEPT = 16
"""Combinations that stay: readers take the newest, and several engine cores have one each."""
# From files that several API servers share nothing is removed: so many, and one for all others.
_MOST_SHARED = 256
_OTHER = "other"


class NewestCombinations:
    """Stands for the gauge where vLLM sets it.

    Args:
        gauge: of prometheus_client. names: of its labels, in its order.
        shared: it lies in files of several processes (``PROMETHEUS_MULTIPROC_DIR``).
    """

    def __init__(self, gauge: Any, names: tuple[str, ...], shared: bool) -> None:
        self._gauge, self._names, self._shared = gauge, names, shared
        self._kept: OrderedDict[tuple[str, ...], None] = OrderedDict()

    def labels(self, **labels: Any) -> Any:
        """The gauge of a combination, which then is the newest."""
        values = tuple(str(labels[name]) for name in self._names)
        if self._shared and values not in self._kept and len(self._kept) >= _MOST_SHARED:
            values = (_OTHER,) * len(values)
        self._kept[values] = None
        self._kept.move_to_end(values)
        found = self._gauge.labels(*values)
        while not self._shared and len(self._kept) > _KEPT:
            oldest, _ = self._kept.popitem(last=False)
            self._gauge.remove(*oldest)
        return found


def keep_newest(original: Callable[..., None]) -> Callable[..., None]:
    """``PrometheusStatLogger.__init__`` whose gauge of running adapters does not grow."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from prometheus_client import Gauge

        original(self, *args, **kwargs)
        # Ray's has another kind, which Ray keeps.
        if isinstance(self.gauge_lora_info, Gauge):
            names = (
                self.labelname_max_lora,
                self.labelname_waiting_lora_adapters,
                self.labelname_running_lora_adapters,
            )
            shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
            self.gauge_lora_info = NewestCombinations(self.gauge_lora_info, names, shared)

    return init
