"""Several workers and engine cores behind several API servers: a publication, and a worker's death."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_world import World
from published_world import FIRST, SECOND, PublishedWorld
from several_servers import SEVERAL_SERVERS

pytestmark = [pytest.mark.engine, SEVERAL_SERVERS]

LAYOUTS = {
    "tensor": ["--tensor-parallel-size", "2", "--api-server-count", "2"],
    "data": ["--data-parallel-size", "2", "--api-server-count", "2"],
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def scaled(world: World, request: pytest.FixtureRequest) -> Iterator[PublishedWorld]:
    made = PublishedWorld(world, f"scaled-{request.param}", LAYOUTS[request.param])
    assert made.server.wait(), made.server.log.read_text()[-6000:]
    yield made
    made.server.stop()


def test_all_of_them_take_the_same_publication(scaled: PublishedWorld) -> None:
    scaled.check(FIRST)
    scaled.publish(SECOND)
    print(f"listed after {scaled.wait_until_listed(set(SECOND)):.2f} s")
    scaled.settle(SECOND)
    # Whichever engine core a request meets.
    for _ in range(3):
        scaled.check(SECOND)
    assert scaled.server.log.read_text().count("was published again and is served now") == 2
