from __future__ import annotations

import pytest
from engine_world import World, make_world


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Tests that share an engine stay in one process of ``--dist loadgroup``."""
    for item in items:
        if {"engine", "server"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))
