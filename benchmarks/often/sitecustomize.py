"""Has every process of a server watch and count BENCH_OFTEN times as often as it does by itself.

Python imports this at the start of each process whose PYTHONPATH has this folder. Constants of the
plugin's modules are changed as these are imported.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Seconds between two looks or questions.
_PERIODS = {
    "vllm_vlora.plugin.following": "PERIOD",
    "vllm_vlora.plugin.listing": "PERIOD",
    "vllm_vlora.plugin.metrics": "INTERVAL",
}


class _Finder(MetaPathFinder):
    """Finds those modules as they are found anyway."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        name = _PERIODS.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if name else None
        if name is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            setattr(module, name, getattr(module, name) / float(os.environ["BENCH_OFTEN"]))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "BENCH_OFTEN" in os.environ:
    sys.meta_path.insert(0, _Finder())
