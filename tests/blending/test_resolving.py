"""What a name means: tasks before aliases before blends, and canaries that stay with their clients."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vlora.blend_names import Term, task_alone
from vllm_vlora.blending.resolving import choose, resolve
from vllm_vlora.checkpoint.aliases import Aliases, Route
from vllm_vlora.editing.aliasing import parse_routes
from vllm_vlora.errors import BlendError

TASKS = {"sql", "sql-v7", "sql-v8", "french", "a*2"}


def aliases(**targets: str) -> Aliases:
    return {name.replace("_", "-"): parse_routes(text, TASKS) for name, text in targets.items()}


def meaning(name: str, known: Aliases, key: str = "k") -> dict[str, str]:
    return {term.task: str(term.weight) for term in resolve(name, TASKS, known, key)}


def test_tasks_before_aliases_before_blends() -> None:
    known = aliases(prod_sql="sql-v7", mix="sql*0.7+french*0.3", sql_french="french")
    assert meaning("sql", known) == {"sql": "1"}
    assert meaning("a*2", known) == {"a*2": "1"}
    assert meaning("prod-sql", known) == {"sql-v7": "1"}
    assert meaning("mix", known) == {"sql": "0.7", "french": "0.3"}
    # Without the alias it would be a difference.
    assert meaning("sql-french", known) == {"french": "1"}
    assert meaning("sql-french", {}) == {"sql": "1", "french": "-1"}


def test_aliases_in_blends_are_multiplied_out() -> None:
    known = aliases(prod="sql-v7", mix="sql*0.5-french*0.25")
    assert meaning("prod*0.5+french", known) == {"sql-v7": "0.5", "french": "1"}
    assert meaning("mix*2-prod", known) == {"sql": "1", "french": "-0.5", "sql-v7": "-1"}
    # The same task from both sides is added up exactly.
    assert meaning("mix*0.2+french*0.15", known) == {"sql": "0.1", "french": "0.1"}
    with pytest.raises(BlendError, match="weight 0"):
        meaning("mix+french*0.25", known)
    with pytest.raises(BlendError, match="weight 140 of"):
        meaning("mix*100+sql*90", known)


def test_too_many_tasks_of_aliases_are_refused() -> None:
    tasks = {f"t{n}" for n in range(9)}
    wide = {"wide": (Route(1, tuple(Term(f"t{n}", Decimal(1)) for n in range(8))),)}
    with pytest.raises(BlendError, match="1 to 8 tasks, got 9"):
        resolve("wide+t8", tasks, wide, "")


@pytest.mark.parametrize("name", ["", "nobody", "prod-nobody", "prod*0", "sql+sql"])
def test_what_means_nothing(name: str) -> None:
    with pytest.raises(BlendError):
        meaning(name, aliases(prod="sql"))


@given(st.text(max_size=40), st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_a_key_always_has_one_target(key: str, shares: list[int]) -> None:
    routes = tuple(Route(share, task_alone(f"t{n}")) for n, share in enumerate(shares))
    chosen = choose("canary", routes, key)
    assert chosen in [route.blend for route in routes]
    assert chosen == choose("canary", routes, key)


@pytest.mark.parametrize("shares", [(90, 10), (1, 1, 1), (999, 1), (5, 3, 2)])
def test_targets_have_their_shares_of_the_clients(shares: tuple[int, ...]) -> None:
    routes = tuple(Route(share, task_alone(f"t{n}")) for n, share in enumerate(shares))
    count = 20_000
    found = Counter(choose("canary", routes, f"client {n}")[0].task for n in range(count))
    for number, share in enumerate(shares):
        expected = count * share / sum(shares)
        # Five standard deviations of a binomial.
        spread = 5 * (expected * (1 - share / sum(shares))) ** 0.5
        assert abs(found[f"t{number}"] - expected) < spread


@pytest.mark.parametrize(("before", "after"), [(1, 5), (10, 50), (50, 90)])
def test_a_growing_canary_keeps_its_clients(before: int, after: int) -> None:
    def new(share: int) -> set[int]:
        routes = parse_routes(f"sql-v7 {100 - share}, sql-v8 {share}", TASKS)
        return {n for n in range(3000) if choose("prod", routes, str(n))[0].task == "sql-v8"}

    assert new(before) < new(after)


def test_two_canaries_fall_on_clients_independently() -> None:
    routes = parse_routes("sql-v7 50, sql-v8 50", TASKS)
    pairs = Counter(
        (choose("one", routes, str(n))[0].task, choose("other", routes, str(n))[0].task)
        for n in range(4000)
    )
    assert len(pairs) == 4
    assert min(pairs.values()) > 850
