"""A parent and eleven children: one job, an order read from a message, in each customer's own form.

The parent learns the job in a house form and two others. A child starts from the parent's weights
and learns its customer's form, and its customer's own codes of goods and places by heart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from task_data import Example, Generator, Task
from vocabulary import CITIES, ITEMS, NAMES, words

_DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday")
_REGIONS = words("north south lake hill port")
_MESSAGES = (
    "This is {name} from {city}. I would like {count} {item}s by {day}.",
    "{count} {item}s for {name} in {city}, please, on {day}.",
    "{name} here: can you bring {count} {item}s to {city} on {day}?",
    "On {day} we need {count} {item}s. Ask for {name}, {city}.",
)


@dataclass(frozen=True)
class Order:
    """What a message says."""

    name: str
    city: str
    item: str
    count: int
    day: str


Form = Callable[[Order], str]


def _draw(rng: random.Random) -> tuple[str, Order]:
    order = Order(
        rng.choice(NAMES),
        rng.choice(CITIES),
        rng.choice(ITEMS),
        rng.randint(2, 60),
        rng.choice(_DAYS),
    )
    return rng.choice(_MESSAGES).format(**vars(order)), order


def _generator(name: str, form: Form) -> Generator:
    book = random.Random(name)
    goods = {item: f"{book.choice('BCFKMRTX')}{book.randint(10, 99)}" for item in ITEMS}
    places = {city: f"{book.choice(_REGIONS)}-{book.randint(1, 60)}" for city in CITIES}

    def generate(rng: random.Random) -> Example:
        message, order = _draw(rng)
        own = replace(order, item=goods[order.item], city=places[order.city])
        return f"Message: {message}\n", form(own)

    return generate


def _house(order: Order) -> str:
    return f"{order.name}, {order.city}: {order.count} x {order.item}, {order.day}"


def _json(order: Order) -> str:
    return json.dumps({"name": order.name, "item": order.item, "count": order.count})


def _question(order: Order) -> str:
    return f"Shall {order.count} {order.item}s go to {order.city} on {order.day}?"


_PARENT_FORMS = {"house": _house, "json": _json, "question": _question}


def _parent(rng: random.Random) -> Example:
    message, order = _draw(rng)
    wanted = rng.choice(sorted(_PARENT_FORMS))
    return f"Message ({wanted}): {message}\n", _PARENT_FORMS[wanted](order)


# --- the customers' forms ------------------------------------------------------------------------


def _acme(order: Order) -> str:
    return json.dumps(
        {"who": order.name.upper(), "what": f"{order.item}-{order.count}", "when": order.day[:2]}
    )


def _boreal(order: Order) -> str:
    return f"{order.day[:3].lower()};{order.city};{order.item};{order.count};ok"


def _corvus(order: Order) -> str:
    return f'<o c="{order.city}"><i n="{order.count}">{order.item}</i><p>{order.name}</p></o>'


def _delta(order: Order) -> str:
    return f"buyer: {order.name}\ngoods:\n  - {order.item} * {order.count}\nsite: {order.city}"


def _ember(order: Order) -> str:
    size = "a big load" if order.count > 30 else "a small load"
    return f"Dear {order.name}, {size} of {order.item} is set for {order.day}. Yours, Ember."


def _fjord(order: Order) -> str:
    return f"FJ/{order.city}/{order.item}/{order.count}/{order.name[0]}"


def _gale(order: Order) -> str:
    return f"| {order.day} | **{order.item}** | {order.count} | {order.name} |"


def _helix(order: Order) -> str:
    return (
        f"put(city='{order.city}', thing='{order.item}', n={order.count}, late={order.count > 30})"
    )


def _iris(order: Order) -> str:
    return f"{order.name} > {order.count} > {order.item} > {order.city} # iris"


def _juno(order: Order) -> str:
    return (
        f"Route {'B' if order.count > 30 else 'A'}: {order.city}, {order.day}. Pack {order.item}."
    )


def _krone(order: Order) -> str:
    return f"[[{order.item}]] qty={{{order.count}}} to={{{order.name} / {order.city}}}"


PARENT = Task("parent", "reads an order in one of three forms", _parent, seed=300, steps=50)

_IN_BASIS: dict[str, Form] = {
    "acme": _acme,
    "boreal": _boreal,
    "corvus": _corvus,
    "delta": _delta,
    "ember": _ember,
    "fjord": _fjord,
    "gale": _gale,
    "helix": _helix,
}
_NEW: dict[str, Form] = {"iris": _iris, "juno": _juno, "krone": _krone}


def _child(name: str, form: Form, seed: int) -> Task:
    shows = f"reads an order in {name}'s form and codes"
    return Task(name, shows, _generator(name, form), seed, name in _IN_BASIS, steps=20)


TASKS = tuple(
    _child(name, form, 301 + place) for place, (name, form) in enumerate((_IN_BASIS | _NEW).items())
)
