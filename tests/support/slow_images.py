"""A task whose image is laid out when a test says so."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from vllm_vlora.plugin import resident
from vllm_vlora.plugin.images import make_image


def hold_images(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """(set once a thread is about to lay out an image, to be set for it and all others to go on)."""
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return make_image(*args, **kwargs)

    monkeypatch.setattr(resident, "make_image", slowly)
    return begun, go_on
