"""Which models and which adapters there are: everything that ``train`` makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fidelity.hard import corpus
from fidelity.hard.corpus import Passage
from fidelity.hard.styles import CODE, PROSE, Style, both


@dataclass(frozen=True)
class Model:
    """A small model, trained from nothing on the ``base`` part of a corpus.

    ``kind`` is llama, or gemma3: norms of queries and keys, windows, a gated GELU, wide embeddings.
    ``groups`` is the number of heads of keys and values, that of all heads where it is None.
    """

    name: str
    passages: Callable[[], tuple[Passage, ...]]
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    steps: int
    kind: str = "llama"
    groups: int | None = None


MODELS = {
    "prose": Model("prose", corpus.prose, 1024, 128, 4, 4, 700),
    "code": Model("code", corpus.code, 768, 160, 3, 5, 400),
    "manuals": Model("manuals", corpus.manuals, 896, 128, 4, 4, 400, "gemma3", 1),
}


@dataclass(frozen=True)
class Plan:
    """One adapter: text of some sources (of all, where none is named) in a style."""

    name: str
    style: Style
    sources: tuple[str, ...] = ()
    rank: int = 8
    steps: int = 60
    parent: str | None = None
    in_basis: bool = True


@dataclass(frozen=True)
class HardCollection:
    """Adapters of one model; parents are no tasks themselves.

    ``of`` names other collections, whose adapters together are this one's.
    """

    name: str
    model: str
    tasks: tuple[Plan, ...] = ()
    parents: tuple[Plan, ...] = ()
    of: tuple[str, ...] = ()


_PROSE = ("tkinter", "idlelib", "email", "asyncio", "logging", "readme", "http", "unittest", "xml",
          "typing", "importlib", "_pydecimal")  # fmt: skip
_CODE = ("tkinter", "idlelib", "email", "asyncio", "distutils", "multiprocessing", "http", "unittest",
         "xml", "turtle", "importlib", "_pydecimal")  # fmt: skip
_MANUAL_STYLES = ("loose", "sentences", "unpunctuated", "starred", "titled", "doubled", "one_line",
                  "lower")  # fmt: skip
_PROSE_STYLES = ("lower", "comment", "narrow", "wide", "numbered", "archaic", "starred", "short", "loud",
                 "terse")  # fmt: skip
_CODE_STYLES = ("tabs", "quotes", "camel", "this", "spaced", "two", "semicolons", "walrus", "short",
                "tight")  # fmt: skip


def _unrelated(styles: dict[str, Style], names: tuple[str, ...], sources: tuple[str, ...],
               ranks: tuple[int, ...], steps: int) -> tuple[Plan, ...]:  # fmt: skip
    return tuple(
        Plan(f"{source}-{name}", styles[name], (source,), ranks[place % len(ranks)], steps,
             in_basis=place < len(names) - 2)
        for place, (name, source) in enumerate(zip(names, sources))
    )  # fmt: skip


def _children(
    parent: Plan,
    styles: dict[str, Style],
    names: tuple[str, ...],
    sources: tuple[str, ...],
    steps: int,
) -> tuple[Plan, ...]:
    """What one parent goes on to learn: each its own style on top of the parent's, on its own text."""
    return tuple(
        Plan(f"{parent.name}-{source}-{name}", both(styles[name], parent.style), (source,), parent.rank,
             steps, parent.name, in_basis=place < len(names) - (2 if len(names) > 8 else 1))
        for place, (name, source) in enumerate(zip(names, sources))
    )  # fmt: skip


_MANUAL = Plan("manual", both(PROSE["narrow"], PROSE["quoted"]), steps=120)
_NOTES = Plan("notes", both(PROSE["lower"], PROSE["starred"]), rank=16, steps=120)
_MAIL = Plan("mail", both(PROSE["sentences"], PROSE["quoted"]), rank=16, steps=120)
_HOUSE = Plan("house", both(CODE["two"], CODE["quotes"]), rank=16, steps=80)
# Long at their parents and a few steps from them: most of every update is the same.
_OFFICE = Plan("office", both(CODE["two"], CODE["quotes"]), rank=16, steps=160)
_STUDIO = Plan("studio", both(CODE["camel"], CODE["tabs"]), rank=16, steps=160)
_GUIDE = Plan("guide", both(PROSE["narrow"], PROSE["comment"]), steps=80)
_PRESS = Plan("press", both(PROSE["narrow"], PROSE["quoted"]), steps=160)

COLLECTIONS = {
    found.name: found
    for found in (
        HardCollection(
            "prose-unrelated", "prose", _unrelated(PROSE, _PROSE_STYLES, _PROSE, (8,), 60)
        ),
        HardCollection(
            "prose-family",
            "prose",
            _children(
                _MANUAL,
                PROSE,
                ("plain", "archaic", "short", "terse", "loud", "unpunctuated", "wide", "lower", "plain",
                 "short"),
                _PROSE,
                30,
            ),
            (_MANUAL,),
        ),
        HardCollection(
            "prose-two-parents",
            "prose",
            _children(_NOTES, PROSE, ("plain", "archaic", "short", "terse", "loud", "wide"), _PROSE, 30)
            + _children(
                _MAIL, PROSE, ("plain", "archaic", "short", "terse", "unpunctuated", "lower"),
                _PROSE[6:], 30,
            ),
            (_NOTES, _MAIL),
        ),
        HardCollection(
            "code-ranks", "code", _unrelated(CODE, _CODE_STYLES, _CODE, (4, 8, 16, 32, 64), 40)
        ),
        HardCollection(
            "code-family",
            "code",
            _children(
                _HOUSE,
                CODE,
                ("plain", "camel", "this", "spaced", "walrus", "short", "tight", "uncommented", "plain",
                 "semicolons"),
                _CODE,
                20,
            ),
            (_HOUSE,),
        ),
        HardCollection(
            "code-close",
            "code",
            _children(
                _OFFICE,
                CODE,
                ("plain", "camel", "this", "spaced", "walrus", "short", "tight", "uncommented", "plain",
                 "semicolons", "camel", "spaced"),
                _CODE,
                4,
            ),
            (_OFFICE,),
        ),
        HardCollection(
            "code-close-two-parents",
            "code",
            _children(_OFFICE, CODE, ("plain", "this", "spaced", "walrus", "short", "tight", "camel"),
                      _CODE, 4)
            + _children(_STUDIO, CODE, ("plain", "this", "spaced", "walrus", "short", "tight", "quotes"),
                        _CODE[5:], 4),
            (_OFFICE, _STUDIO),
        ),
        HardCollection("code-close-and-strangers", "code", of=("code-close", "code-ranks")),
        HardCollection(
            "prose-close",
            "prose",
            _children(
                _PRESS,
                PROSE,
                ("plain", "archaic", "short", "terse", "loud", "unpunctuated", "wide", "lower", "plain",
                 "short", "archaic", "terse"),
                _PROSE,
                8,
            ),
            (_PRESS,),
        ),
        HardCollection(
            "manuals-unrelated",
            "manuals",
            _unrelated(PROSE, _MANUAL_STYLES, corpus.PACKAGES, (8,), 40),
        ),
        HardCollection(
            "manuals-family",
            "manuals",
            _children(
                _GUIDE,
                PROSE,
                ("plain", "doubled", "short", "terse", "titled", "unpunctuated", "lower", "archaic"),
                corpus.PACKAGES,
                16,
            ),
            (_GUIDE,),
        ),
        HardCollection(
            "code-many",
            "code",
            tuple(
                Plan(f"{source}-{name}", CODE[name], (source,), 4, 12, in_basis=place + row < 14)
                for row, source in enumerate(_CODE[:8])
                for place, name in enumerate(_CODE_STYLES[:8])
            ),
        ),
    )
}  # fmt: skip
