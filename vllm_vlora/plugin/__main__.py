"""``python -m vllm_vlora.plugin``: is the installed vLLM one that the plugin can be put into?"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_vlora.errors import IncompatibleVLLMError
from vllm_vlora.plugin import SUPPORTED_VLLM, _vllm_version, check_version
from vllm_vlora.plugin.seam_table import GROUPS, MissingSeamError, Seam
from vllm_vlora.plugin.settings import UNTESTED_VARIABLE

_HELP = f"""\
Looks in the installed vLLM for every place that the plugin replaces, overrides, calls or reads, and
prints for each what it is for and whether it is there. Nothing is patched and no engine is started;
importing vLLM takes some seconds.

  found    it is there, with the parameters that the plugin was written for
  changed  it is there with others, or is another kind of thing
  missing  it is not there
  absent   it is not there, and need not be: only some of the supported versions have it

At start-up vLLM runs without the plugin, and logs why, when a seam is missing or changed. It does
the same for a version that was not tried, unless {UNTESTED_VARIABLE}=1 is set. That every seam is
found does not promise that each means what it did: the engine tests say that.
"""
_EXAMPLES = """\
examples:
  python -m vllm_vlora.plugin           a line for each seam
  python -m vllm_vlora.plugin --json    the same for scripts, with the modules

exit codes:
  0  every seam was found, whether or not the version was tried
  1  a seam is missing or changed
  2  vLLM is not installed, or the call is wrong
"""
_BROKEN = ("missing", "changed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report and return the exit code."""
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("vllm") is None:
        print(
            "vLLM is not installed in this environment; run this with the Python that runs vLLM, or "
            "install it: pip install 'vllm-vlora[serve]'",
            file=sys.stderr,
        )
        return 2
    with _quiet():
        report = make_report()
    print(json.dumps(report, indent=2) if options.json else _text(report))
    return int(any(seam["state"] in _BROKEN for seam in report["seams"]))


def make_report() -> dict[str, Any]:
    """What is found: ``version``, ``supported``, ``note`` on it, and ``seams``.

    A seam has ``use`` (replaced, overridden, called, layers, read or graphs), ``module``, ``name``,
    ``shown`` (with the parameters expected), ``why``, ``state`` and ``problem``, which is null where
    none is.
    """
    note = _fault_of_version()
    return {
        "version": _vllm_version(),
        "supported": note is None,
        "note": note,
        "seams": [
            {
                "use": use,
                "module": seam.module,
                "name": seam.name,
                "shown": str(seam),
                "why": seam.why,
            }
            | _state(seam)
            for use, seams in GROUPS.items()
            for seam in seams
        ],
    }


def _fault_of_version() -> str | None:
    # Whether it was tried is the question, not whether the user would have it tried.
    os.environ.pop(UNTESTED_VARIABLE, None)
    try:
        check_version()
    except IncompatibleVLLMError as error:
        return str(error)
    return None


def _state(seam: Seam) -> dict[str, str | None]:
    try:
        seam.find()
    except MissingSeamError as error:
        return {"state": "absent" if seam.optional else "missing", "problem": str(error)}
    except IncompatibleVLLMError as error:
        return {"state": "changed", "problem": str(error)}
    return {"state": "found", "problem": None}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what vLLM logs while it is imported off standard output."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _text(report: dict[str, Any]) -> str:
    first, end = (".".join(map(str, numbers)) for numbers in SUPPORTED_VLLM)
    lines = [
        report["note"]
        or f"vLLM {report['version']}, supported ({first} up to, not including, {end})"
    ]
    width = max(len(seam["shown"]) for seam in report["seams"] if len(seam["shown"]) < 80)
    use = None
    for seam in report["seams"]:
        if seam["use"] != use:
            use = seam["use"]
            lines += ["", use]
        lines.append(f"  {seam['state']:8} {seam['shown']:{width}}  {seam['why']}")
        if seam["state"] in _BROKEN:
            lines.append(f"           {seam['problem']}")
    states = [seam["state"] for seam in report["seams"]]
    counts = ", ".join(
        f"{states.count(state)} {state}"
        for state in ("found", *_BROKEN, "absent")
        if state in states
    )
    return "\n".join([*lines, "", f"{len(states)} seams: {counts}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_vlora.plugin",
        description=_HELP,
        epilog=textwrap.dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _leave_checkout() -> None:
    # ``python -m`` puts the working folder on the path. In a checkout our ``triton_kernels`` would then
    # answer to its bare name, which vLLM looks for, and vLLM would log the refusal.
    kernels = (Path(__file__).parents[1] / "triton_kernels").resolve()
    sys.path[:] = [e for e in sys.path if (Path(e) / "triton_kernels").resolve() != kernels]


if __name__ == "__main__":
    _leave_checkout()
    sys.exit(main())
