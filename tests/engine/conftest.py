from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
from engine_world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def take_out_the_plugin() -> Callable[[], None]:
    """Has the next engine of this process install the plugin as its own environment says."""

    def take_out() -> None:
        seams = sys.modules.get("vllm_vlora.plugin.seams")
        if seams is not None:
            import vllm.plugins

            seams.uninstall()
            vllm.plugins.plugins_loaded = False

    return take_out


@pytest.fixture(autouse=True, scope="module")
def _plugin_of_its_own(take_out_the_plugin: Callable[[], None]) -> Iterator[None]:
    """An engine in a test's process leaves the plugin installed as that one's environment said."""
    yield
    take_out_the_plugin()
