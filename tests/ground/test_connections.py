"""Why an address cannot be reached, as real clients meet it."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import huggingface_hub
import pytest

from vllm_vlora.connections import why_unreachable

Answering = Callable[[socket.socket], None]


@contextmanager
def answering(answer: Answering) -> Iterator[str]:
    """HOST:PORT of a server that does this with a connection."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            with closing(server.accept()[0]) as connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def hang_up(connection: socket.socket) -> None:
    connection.recv(1 << 16)


def mumble(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"220 mail.example.org ready\r\n")


def wait_for_the_end(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def refusal(url: str, patience: float = 60) -> BaseException:
    with pytest.raises(OSError) as found:  # noqa: PT011
        urllib.request.urlopen(url, timeout=patience)
    return found.value


def nowhere() -> str:
    """HOST:PORT where nothing listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_what_does_not_exist() -> None:
    assert why_unreachable(refusal(f"http://{nowhere()}/")) == "nothing listens there"
    assert (
        why_unreachable(refusal("http://nohost.invalid/")) == "no host of that name is known here"
    )


def test_what_does_not_answer_as_it_should() -> None:
    with answering(hang_up) as host:
        assert why_unreachable(refusal(f"http://{host}/")) == "it closed the connection"
    with answering(mumble) as host:
        assert why_unreachable(refusal(f"https://{host}/")) == "it does not speak TLS"
    with answering(wait_for_the_end) as host:
        assert why_unreachable(refusal(f"http://{host}/", 0.1)) == "it does not answer in time"
    with answering(mumble) as host, pytest.raises(Exception, match="220") as found:
        urllib.request.urlopen(f"http://{host}/", timeout=60)
    assert why_unreachable(found.value) == "it does not speak HTTP"


def test_the_client_of_the_hub_is_understood_too() -> None:
    for endpoint, why in (
        (f"http://{nowhere()}", "nothing listens there"),
        ("http://nohost.invalid", "no host of that name is known here"),
    ):
        with pytest.raises(Exception) as found:  # noqa: PT011
            huggingface_hub.HfApi(endpoint=endpoint).model_info("org/name")
        assert why_unreachable(found.value) == why


def test_other_errors_are_not_explained() -> None:
    assert why_unreachable(ValueError("x")) is None
    assert why_unreachable(OSError(28, "No space left on device", "/a/file")) is None
    assert why_unreachable(OSError(28, "No space left on device")) is None


def test_a_network_that_is_not_there() -> None:
    # The block of addresses that is reserved for documentation; with a route to everywhere it times out.
    why = why_unreachable(refusal("http://[2001:db8::1]/", 0.1))
    assert why in ("no network leads there", "it does not answer in time")
