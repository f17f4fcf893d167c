"""Workers and adapters for the tests of executors; other processes import them from here."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch

from vllm_vlora.adapters.peft_folder import Adapter, Factors
from vllm_vlora.errors import AdapterError


@dataclass
class Product:
    """Multiplies by a matrix; notes in ``folder`` the process that it was shipped to."""

    folder: Path
    matrix: torch.Tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, seed: int) -> tuple[int, int, torch.Tensor]:
        vector = torch.randn(self.matrix.shape[1], generator=torch.Generator().manual_seed(seed))
        return seed, torch.get_num_threads(), self.matrix @ vector


def refuse(job: int) -> int:
    """Job 1 is an adapter's fault, job 2 a mistake of ours."""
    if job == 1:
        raise AdapterError("adapter 'x' is damaged; save it again")
    if job == 2:
        raise ZeroDivisionError("never caught")
    return job


def die(job: int) -> int:
    """Job 1 ends its process as the kernel does where memory runs out."""
    if job == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def pid_of(job: int) -> int:
    """The process that did the job."""
    return os.getpid()


def dawdle(job: int) -> int:
    """Job 0 is quick, the others take longer than any test waits."""
    if job:
        time.sleep(300)
    return job


class FatalAdapter(Adapter):
    """Reading it ends the process, if that is not the first one."""

    def factors(self, name: str) -> Factors:
        if parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().factors(name)
