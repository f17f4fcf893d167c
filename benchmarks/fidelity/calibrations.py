"""Calibrations of the base model, one for each collection's text."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fidelity.inputs import CollectionFolder


class Calibrations:
    """Gathers moments when they are first asked for.

    Args:
        model: folder of the base model.
        cache: calibrations are kept here, by the model and the text.
        resume: take those of an earlier run.
    """

    def __init__(self, model: Path, cache: Path, resume: bool) -> None:
        self._model, self._cache, self._resume = model, cache, resume
        self._ready: set[Path] = set()

    def folder(self, collection: CollectionFolder) -> Path:
        """A calibration folder of the collection's own calibration text.

        Raises:
            DataError: the collection has no such text.
        """
        from vllm_vlora.evaluation.calibrate import calibrate

        digest = hashlib.sha256(str(self._model.resolve()).encode())
        if collection.calibration.exists():
            digest.update(collection.calibration.read_bytes())
        folder = self._cache / digest.hexdigest()[:24]
        if folder not in self._ready and not (self._resume and folder.exists()):
            moments = calibrate(self._model, [collection.calibration])
            folder.parent.mkdir(parents=True, exist_ok=True)
            moments.save(folder, force=True)
        self._ready.add(folder)
        return folder
