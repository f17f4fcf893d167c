"""The seed libraries, in an environment of their own, which sees this one's torch."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fidelity.built import Built, OutOfReachError
from fidelity.inputs import CollectionFolder
from fidelity.methods import SEEDS
from vllm_vlora.errors import OptionError

PINS = {"vlora-dev": "1.0.0", "lorashare": "0.1.3"}
_WORKER = Path(__file__).with_name("seed_worker.py")
# What they import besides torch, safetensors, peft and the like, which are here already.
_EXTRA = ("click",)


def make_environment(folder: Path) -> Path:
    """The Python of an environment with both libraries, made on first use.

    They are installed without their dependencies: torch and PEFT come from the environment that
    runs this, so that all are measured on the same ones.

    Raises:
        OptionError: pip cannot install them.
    """
    python = folder / "bin" / "python"
    if _installed(python) == PINS:
        return python
    venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    (purelib,) = (folder / "lib").glob("python*/site-packages")
    (purelib / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    wanted = [*(f"{name}=={pin}" for name, pin in PINS.items()), *_EXTRA]
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OptionError(
            f"pip cannot install {', '.join(wanted)}: {_last_line(done.stderr)}; give "
            "--representations without the seeds"
        )
    return python


def _installed(python: Path) -> dict[str, str]:
    if not python.exists():
        return {}
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *PINS], capture_output=True, text=True, check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}


def run_worker(
    python: Path, seed: str, collection: CollectionFolder, outputs: Mapping[Path, float]
) -> None:
    """Fill every folder of ``outputs`` for its ratio; one process does all of them.

    Raises:
        RuntimeError: the library failed; the message ends with its last line.
    """
    first = next(iter(outputs))
    job = first.parent / f"{first.name}.job.json"
    job.parent.mkdir(parents=True, exist_ok=True)
    job.write_text(
        json.dumps(
            SEEDS[seed]
            | {
                "adapters": _absolute(collection.in_basis),
                "added": _absolute(collection.held_out),
                "original_nbytes": collection.original_nbytes(collection.in_basis),
                "outputs": {str(path.resolve()): ratio for path, ratio in outputs.items()},
            }
        ),
        encoding="utf-8",
    )
    command = [str(python), str(_WORKER), str(job.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{seed} failed: {_last_line(done.stderr)}")


def read_built(folder: Path, seed: str, collection: CollectionFolder) -> Built:
    """What ``run_worker`` left in a folder.

    Raises:
        OutOfReachError: one component is too much already.
    """
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    if not answer["k"]:
        raise OutOfReachError(f"{seed} with one component is larger, with float32 at 16 bits")
    on_disk, halved = answer["before"]
    return Built(
        {task: folder / "tasks" / task for task in collection.all},
        halved,
        on_disk,
        answer["after"][1],
        answer["seconds"],
        {"num_components": answer["k"], "version": PINS[SEEDS[seed]["library"]]},
    )


def _absolute(folders: Mapping[str, Path]) -> dict[str, str]:
    return {task: str(path.resolve()) for task, path in folders.items()}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def python_version() -> str:
    """Of this environment and of the seeds' alike."""
    return sys.version.split()[0]
