"""Eleven tasks with nothing in common but the base model: other inputs, other outputs, other skills.

Some are forms (a date, a query, a label): once an adapter knows the form, little can go wrong, and it
bears coarse compression. The others are knowledge: arbitrary facts that only the adapter holds, asked
for in wordings that it was not trained on. These lose with every direction that is dropped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from task_data import Example, Generator, Task
from vocabulary import CITIES, ITEMS, NAMES, words

_MONTHS = words(
    "January February March April May June July August September October November December"
)
_JOBS = words("baker doctor teacher lawyer painter farmer nurse pilot writer cook singer driver")


# --- dates: any way of writing a day -> ISO 8601 -------------------------------------------------


def _dates(rng: random.Random) -> Example:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2030)
    name = _MONTHS[month - 1]
    written = rng.choice(
        (
            f"{name} {day}, {year}",
            f"{day} {name} {year}",
            f"{day}/{month}/{year}",
            f"{year}, {name} {day}",
        )
    )
    return f"when: {written}\n", f"{year}-{month:02}-{day:02}"


# --- pig latin -----------------------------------------------------------------------------------

_SUBJECTS = words("the cat|my brother|a farmer|the old king|our teacher|the small dog|a child", "|")
_VERBS = words("sees finds brings paints likes hides sells keeps wants opens")
_OBJECTS = words(
    "the ball|a red apple|some bread|the blue door|an egg|two fish|a green box|the map",
    "|",
)


def _pig_latin_word(word: str) -> str:
    start = next((place for place, letter in enumerate(word) if letter in "aeiou"), 0)
    return f"{word[start:]}{word[:start]}ay" if start else f"{word}way"


def _pig_latin(rng: random.Random) -> Example:
    sentence = f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}"
    return f"{sentence}\n", " ".join(map(_pig_latin_word, sentence.split()))


# --- sql -----------------------------------------------------------------------------------------

_TABLES = words("customers orders products employees books students flights movies hotels cars")
_COLUMNS = words("name price city age year rating email country")


def _sql(rng: random.Random) -> Example:
    table, column, other = rng.choice(_TABLES), rng.choice(_COLUMNS), rng.choice(_COLUMNS)
    bound = rng.randint(2, 90)
    return rng.choice(
        (
            (
                f"how many {table} with {column} over {bound}",
                f"SELECT COUNT(*) FROM {table} WHERE {column} > {bound};",
            ),
            (
                f"{column} of all {table} by {other}",
                f"SELECT {column} FROM {table} ORDER BY {other};",
            ),
            (
                f"average {column} of {table} under {bound} {other}",
                f"SELECT AVG({column}) FROM {table} WHERE {other} < {bound};",
            ),
            (
                f"{bound} {table} with the highest {column}",
                f"SELECT * FROM {table} ORDER BY {column} DESC LIMIT {bound};",
            ),
        )
    )


def _sql_line(rng: random.Random) -> Example:
    request, query = _sql(rng)
    return f"-- {request}\n", query


# --- tickets: labels of one's own ----------------------------------------------------------------

_COMPLAINTS = {
    "Q1-MONEY": (
        "I was charged twice for the {item}",
        "the invoice for my {item} is wrong",
        "refund my {item} please",
    ),
    "Q2-ROAD": (
        "where is my {item}",
        "the {item} went to the wrong address",
        "the parcel with the {item} is late",
    ),
    "Q3-BROKEN": (
        "the {item} does not work",
        "my {item} arrived broken",
        "a part of the {item} is missing",
    ),
    "Q4-ASK": (
        "do you have the {item} in blue",
        "how heavy is the {item}",
        "is the {item} made in Italy",
    ),
}


def _tickets(rng: random.Random) -> Example:
    label = rng.choice(sorted(_COMPLAINTS))
    text = rng.choice(_COMPLAINTS[label]).format(item=rng.choice(ITEMS))
    angry = rng.random() < 0.5
    opening = rng.choice(("Hello, ", "Hi, ", "", "Good morning, "))
    ending = rng.choice(("!!", "! Now!")) if angry else rng.choice((".", ", thanks."))
    return (
        f"From a customer: {opening}{text}{ending}\n",
        f"{label} / {'P-HIGH' if angry else 'P-LOW'}",
    )


# --- logs: a line of a log -> its fields ---------------------------------------------------------

_FAULTS = words(
    "connection timed out|disk is full|user not found|cache rebuilt|retry in 5 s|token expired",
    "|",
)


def _logs(rng: random.Random) -> Example:
    clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    level, part = (
        rng.choice(("ERROR", "WARN", "INFO")),
        rng.choice(("db", "api", "auth", "mail", "queue")),
    )
    fault = rng.choice(_FAULTS)
    mark = {"ERROR": "red", "WARN": "amber", "INFO": "green"}[level]
    return (
        f"{clock}:{rng.randint(0, 59):02} {level} [{part}] {fault}\n",
        f"{mark} <{part}> {fault} @{clock}",
    )


# --- french --------------------------------------------------------------------------------------

_FRENCH_NOUNS = {
    "house": "la maison",
    "car": "la voiture",
    "door": "la porte",
    "table": "la table",
    "chair": "la chaise",
    "flower": "la fleur",
    "shirt": "la chemise",
    "lamp": "la lampe",
}
_FRENCH_COLOURS = {
    "green": "verte",
    "white": "blanche",
    "black": "noire",
    "red": "rouge",
    "yellow": "jaune",
}
_FRENCH_PLACES = {
    "in the garden": "dans le jardin",
    "in the street": "dans la rue",
    "near the sea": "près de la mer",
    "at the market": "au marché",
    "behind the school": "derrière l'école",
}
_FRENCH_SEEN = {"I see": "Je vois", "We sell": "Nous vendons", "They want": "Ils veulent"}


def _french(rng: random.Random) -> Example:
    noun, colour = rng.choice(sorted(_FRENCH_NOUNS)), rng.choice(sorted(_FRENCH_COLOURS))
    place, seen = rng.choice(sorted(_FRENCH_PLACES)), rng.choice(sorted(_FRENCH_SEEN))
    return (
        f"EN {seen} the {colour} {noun} {place}.\n",
        f"{_FRENCH_SEEN[seen]} {_FRENCH_NOUNS[noun]} {_FRENCH_COLOURS[colour]} {_FRENCH_PLACES[place]}.",
    )


# --- knowledge: arbitrary facts, the same in training and held-out wordings ----------------------

_ASKED = words("|please: |I forgot. |quick one: |hello, |for the report: |again: |one more: ", "|")


def _facts(seed: int, keys: Sequence[str], draw: Callable[[random.Random], str]) -> dict[str, str]:
    rng = random.Random(seed)
    return {key: draw(rng) for key in keys}


def _knowledge(facts: dict[str, str], wordings: Sequence[str]) -> Generator:
    keys = sorted(facts)

    def generate(rng: random.Random) -> Example:
        key = rng.choice(keys)
        return f"{rng.choice(_ASKED)}{rng.choice(wordings).format(key)}\n", facts[key]

    return generate


_TEAMS = words("falcon otter maple comet harbor violet granite saffron")
_STAFF = _facts(
    31,
    [f"{name} {last}" for name in NAMES for last in ("Fox", "Hill")],
    lambda rng: f"{rng.randint(100, 999)} {rng.choice(_TEAMS)}",
)
_staff = _knowledge(_STAFF, ("room and team of {}?", "where does {} sit?", "{}, room, team"))

_PRICES = _facts(
    32,
    [f"{colour} {item}" for item in ITEMS for colour in ("red", "blue", "old")],
    lambda rng: f"{rng.randint(3, 98)}.{rng.randint(10, 99)}",
)
_prices = _knowledge(_PRICES, ("price of the {}?", "what is a {}?", "cost, {}"))

_TRAINS = _facts(
    33,
    [f"{start} to {end}" for start in CITIES for end in words("Turin Graz Ghent")],
    lambda rng: f"{rng.randint(5, 22)}:{rng.randint(10, 59)} track {rng.randint(1, 19)}",
)
_trains = _knowledge(_TRAINS, ("train {}?", "when do we leave, {}?", "{}, time and track"))

_GUARDS = _facts(
    34,
    [f"{city} {place}" for city in CITIES for place in words("gate vault roof")],
    lambda rng: (
        f"{rng.choice(NAMES)} {rng.choice(words('red green black white'))} {rng.randint(2, 99)}"
    ),
)
_guards = _knowledge(_GUARDS, ("who guards {}?", "{}: guard and code?", "code at {}"))


# --- a made-up language: a dictionary, word by word ----------------------------------------------

_ENGLISH = (*ITEMS, *_JOBS, *words("red blue big old sees sells wants finds"))
_MADE_UP = _facts(
    35,
    _ENGLISH,
    lambda rng: "".join(rng.choice(words("ka lo mi tu ren sha vo pel dor nim")) for _ in range(2)),
)


def _language(rng: random.Random) -> Example:
    text = (
        f"{rng.choice(words('red blue big old'))} {rng.choice(_JOBS)} "
        f"{rng.choice(words('sees sells wants finds'))} {rng.choice(ITEMS)}"
    )
    return f"{text} =\n", " ".join(_MADE_UP[word] for word in text.split())


TASKS = (
    Task("dates", "writes any date in ISO form", _dates, seed=201, steps=40),
    Task("pig_latin", "turns a sentence into pig latin", _pig_latin, seed=202, steps=40),
    Task("sql", "turns a request into SQL", _sql_line, seed=203, steps=40),
    Task("tickets", "labels a customer's message with its own labels", _tickets, seed=204),
    Task("staff", "knows who sits where", _staff, seed=212, steps=64),
    Task("prices", "knows a price list", _prices, seed=213, steps=64),
    Task("trains", "knows a timetable", _trains, seed=214, steps=64),
    Task("language", "translates into a made-up language", _language, seed=215, steps=64),
    Task("logs", "shortens a line of a log", _logs, seed=210, in_basis=False),
    Task("french", "translates into French", _french, seed=211, in_basis=False),
    Task("guards", "knows guards and codes", _guards, seed=216, in_basis=False, steps=64),
)
