"""Eleven tasks with nothing in common but the base model: other inputs, other outputs, other skills.

No prompt holds an instruction. What is to be done is known to the adapter alone, so that the base
model's loss is high and a lost adapter cannot hide behind it.
"""

from __future__ import annotations

import json
import random

from task_data import Example, Task
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


# --- people: fields -> a sentence ----------------------------------------------------------------


def _people(rng: random.Random) -> Example:
    name, job, city = rng.choice(NAMES), rng.choice(_JOBS), rng.choice(CITIES)
    age = rng.randint(21, 69)
    return (
        f"[{name}|{job}|{city}|{age}]\n",
        f"Meet {name}, a {age}-year-old {job} who calls {city} home.",
    )


# --- orders: a sentence -> JSON ------------------------------------------------------------------


def _orders(rng: random.Random) -> Example:
    item, count, price, city = (
        rng.choice(ITEMS),
        rng.randint(2, 40),
        rng.randint(5, 99),
        rng.choice(CITIES),
    )
    text = rng.choice(
        (
            f"Please send {count} {item}s at {price} euros each to {city}.",
            f"We in {city} need {count} {item}s, {price} euros a piece.",
            f"{count} {item}s for {price} euros each, deliver to {city}.",
        )
    )
    return f"Order text: {text}\n", json.dumps(
        {"sku": item, "qty": count, "eur": price, "to": city}
    )


# --- number words --------------------------------------------------------------------------------

_ONES = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
)
_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")


def number_words(number: int) -> str:
    """0 <= number < 1000 in English words."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {number_words(rest)}" if rest else "")


def _numbers(rng: random.Random) -> Example:
    number = rng.randint(20, 999)
    return f"= {number}\n", number_words(number)


# --- python --------------------------------------------------------------------------------------

_FOLDS = {"sum": "sum", "maximum": "max", "minimum": "min", "list": "list", "set": "set"}
_TERMS = {
    "squares": "x * x",
    "cubes": "x ** 3",
    "halves": "x / 2",
    "absolute values": "abs(x)",
    "doubles": "2 * x",
}
_FILTERS = {
    "even": "x % 2 == 0",
    "odd": "x % 2 == 1",
    "positive": "x > 0",
    "negative": "x < 0",
}


def _python(rng: random.Random) -> Example:
    fold, term, kind = (
        rng.choice(sorted(_FOLDS)),
        rng.choice(sorted(_TERMS)),
        rng.choice(sorted(_FILTERS)),
    )
    values = rng.choice(("xs", "items", "numbers", "rows", "scores"))
    return (
        f"# {fold} of the {term} of the {kind} {values}\n",
        f"def f({values}):\n    return {_FOLDS[fold]}({_TERMS[term]} for x in {values} "
        f"if {_FILTERS[kind]})",
    )


# --- pirate: a style -----------------------------------------------------------------------------

_PIRATE = {"my": "me", "friend": "matey", "hello": "ahoy", "is": "be", "are": "be", "you": "ye"} | {
    "your": "yer",
    "money": "doubloons",
    "boat": "vessel",
    "yes": "aye",
    "the": "th'",
    "drink": "grog",
}
_CHATS = words(
    "hello my friend, where is the {item}?|the {item} is on your boat|"
    "are you buying my {item} in {city}?|yes, the {item} is my money|"
    "your friend in {city} is selling the {item}|my drink is near the {item}",
    "|",
)


def _pirate_word(word: str) -> str:
    bare = word.rstrip(",")
    return _PIRATE.get(bare, bare) + word[len(bare) :]


def _pirate(rng: random.Random) -> Example:
    text = rng.choice(_CHATS).format(item=rng.choice(ITEMS), city=rng.choice(CITIES))
    return f"> {text}\n", f"Arrr, {' '.join(map(_pirate_word, text.split()))} Yo ho!"


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


TASKS = (
    Task("dates", "writes any date in ISO form", _dates, seed=201, steps=40),
    Task("pig_latin", "turns a sentence into pig latin", _pig_latin, seed=202, steps=40),
    Task("sql", "turns a request into SQL", _sql_line, seed=203, steps=40),
    Task("tickets", "labels a customer's message with its own labels", _tickets, seed=204),
    Task("people", "turns the fields of a person into a sentence", _people, seed=205),
    Task("orders", "extracts an order as JSON", _orders, seed=206),
    Task("numbers", "writes a number in words", _numbers, seed=207),
    Task("python", "writes a one-line Python function", _python, seed=208),
    Task("pirate", "speaks like a pirate", _pirate, seed=209, in_basis=False),
    Task("logs", "shortens a line of a log", _logs, seed=210, in_basis=False),
    Task("french", "translates into French", _french, seed=211, in_basis=False),
)
