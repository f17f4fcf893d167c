"""A calibration as ``compress`` is given it: a folder, or text from which one is gathered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_vlora.adapters.collection import Progress, common_base_model
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.atomic import publish_folder
from vllm_vlora.errors import DataError, OptionError
from vllm_vlora.evaluation.texts import data_digest
from vllm_vlora.fitting.calibration import Calibration, is_calibration


def calibration_folder(
    given: Path, base: str | None, adapters: Mapping[str, Adapter], progress: Progress
) -> Path:
    """The calibration folder that ``given`` is, or that belongs to the text file ``given``.

    Of a text file ``text.jsonl`` it is ``text.jsonl.calibration`` beside it: taken as it is when it was
    gathered from the same text and model, gathered and saved otherwise.

    Raises:
        OptionError: text, but no base model is named.
        DataError: neither a calibration nor readable text.
    """
    if given.is_dir():
        return given
    base = base or common_base_model(adapters)[0]
    if base is None:
        raise OptionError("the adapters name no base model to calibrate; give it with --base MODEL")
    folder = given.with_name(f"{given.name}.calibration")
    if _serves(folder, given, base):
        return folder
    from vllm_vlora.evaluation.calibrate import calibrate

    with publish_folder(folder, force=True, owned=is_calibration) as target:
        calibrate(base, [given], advance=progress).write(target)
    return folder


def _serves(folder: Path, text: Path, base: str) -> bool:
    digest = data_digest([text])
    try:
        source = Calibration.open(folder, verify=False).source
    except DataError:
        return False
    return source.data_sha256 == digest and source.base_model == base
