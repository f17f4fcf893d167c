"""What the name in a request means: a task, an alias, or a blend of either."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from decimal import Decimal

from vllm_vlora.blend_names import Blend, Term, checked_blend, parse_blend, task_alone
from vllm_vlora.checkpoint.aliases import Aliases, Route


def resolve(name: str, tasks: Container[str], aliases: Aliases, key: str) -> Blend:
    """The tasks that answer requests of a name, and their weights.

    A task's id is that task, whatever else it could be; then an alias is what it stands for; then the
    name is read as a blend of tasks and aliases.

    Args:
        tasks: the ids that there are.
        key: of the client, for canaries: one key has one target as long as the shares stand, and with a
            larger share of the last target none of those that had it leaves it.

    Raises:
        BlendError: the name is none of it, or what it names is above a bound.
    """
    if name in tasks:
        return task_alone(name)
    if name in aliases:
        return choose(name, aliases[name], key)
    return expand(parse_blend(name, _Either(tasks, aliases)), tasks, aliases, key)


def expand(blend: Blend, tasks: Container[str], aliases: Aliases, key: str) -> Blend:
    """A blend of tasks and aliases as one of tasks; arguments as of :func:`resolve`.

    Raises:
        BlendError: it is above a bound.
    """
    merged: dict[str, Decimal] = {}
    for part, weight in blend:
        meant = task_alone(part) if part in tasks else choose(part, aliases[part], key)
        for task, own in meant:
            merged[task] = merged.get(task, Decimal(0)) + weight * own
    return checked_blend(Term(task, weight.normalize()) for task, weight in merged.items())


def choose(alias: str, routes: tuple[Route, ...], key: str) -> Blend:
    """What an alias stands for to a client.

    The key's place between 0 and 1 is the SHA-256 of alias and key, so that canaries fall on clients
    independently of each other.
    """
    if len(routes) == 1:
        return routes[0].blend
    digest = hashlib.sha256(f"{alias}\0{key}".encode(errors="surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") * sum(route.share for route in routes) >> 64
    for share, blend in routes:
        place -= share
        if place < 0:
            return blend
    raise AssertionError("a place is below the sum of the shares")


class _Either(Container[str]):
    """The names of two collections, neither of which is copied."""

    def __init__(self, one: Container[str], other: Container[str]) -> None:
        self._both = one, other

    def __contains__(self, name: object) -> bool:
        return any(name in names for names in self._both)
