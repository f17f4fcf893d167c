"""What the commands chose and kept, as tables; and how much of what recovers less is further away."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fidelity.hard.tables import LEFT, SINGLE, Record, by_model

Forms = Mapping[str, Mapping[str, Any]]
Kept = Mapping[str, Mapping[str, Any]]
PLACES = ("in_basis", "added", "expanded")


def command_tables(records: Sequence[Record], measured: Sequence[Record]) -> str:
    """All tables as Markdown; ``measured`` are the records of every form by itself."""
    found = cells(records)
    parts = [_choices(found, measured), _singles(found), _apart(found), _scaled(found)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def cells(records: Sequence[Record]) -> dict[tuple[str, float], dict[str, Any]]:
    """(collection, size) -> forms, of all records together; the later one counts."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for record in records:
        found.setdefault((record["collection"], record["ratio"]), {}).update(record["forms"])
    return dict(sorted(found.items()))


def _head(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"


def _tasks(form: Mapping[str, Any], place: str) -> Kept:
    """Task -> what it keeps; of tasks added to a form, where there are any."""
    if place == "in_basis":
        return form.get("in_basis", {})
    return form.get(place, {}).get("tasks", {})


def _mean(kept: Kept, measure: str, tasks: Sequence[str] | None = None) -> float | None:
    values = [kept[task][measure] for task in (kept if tasks is None else tasks)]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def kept_cell(kept: Kept) -> str:
    """KL kept / recovered, means of the tasks of which they are known."""
    first, second = _mean(kept, "kl_kept"), _mean(kept, "recovered")
    if first is None:
        return ""
    return f"{first:.4f}" + ("" if second is None else f" / {second:.3f}")


def _choices(found: Mapping[tuple[str, float], Forms], measured: Sequence[Record]) -> Iterator[str]:
    yield "compress --judge beside the form that the measured ones say; each with its bytes and error"
    yield ""
    yield from _head(
        "collection", "size", "by the command", "by the table", "KL kept / recovered",
        "KL kept less the table's", "less the best single one's", "at a task the most",
    )  # fmt: skip
    table = {(record["collection"], record["ratio"]): record for record in measured}
    for cell, forms in found.items():
        auto, record = forms.get("auto", {}), table.get(cell)
        if "in_basis" not in auto or record is None:
            continue
        says = record["forms"][by_model(record, LEFT)]
        singles = [record["forms"][name] for name in SINGLE if name in record["forms"]]
        least = min(_gap(auto, single) for single in singles)
        most = max(map(abs, _gaps(auto, says, "in_basis", "kl_kept")))
        row = [cell[0], f"{cell[1]:g}x", _stored(auto), _stored(says), kept_cell(auto["in_basis"]),
               f"{_gap(auto, says):+.4f}", f"{least:+.4f}", f"{most:.4f}"]  # fmt: skip
        yield f"| {' | '.join(row)} |"


def _stored(form: Mapping[str, Any]) -> str:
    return f"{form.get('form') or form['representation']}, {form['nbytes']}, {form['error']:.4f}"


def _gaps(
    form: Mapping[str, Any], other: Mapping[str, Any], place: str, measure: str
) -> list[float]:
    """How far one is ahead at each task that both were measured on."""
    first, second = _tasks(form, place), _tasks(other, place)
    both = [t for t in first if t in second and None not in (first[t][measure], second[t][measure])]
    return [first[task][measure] - second[task][measure] for task in both]


def _gap(form: Mapping[str, Any], other: Mapping[str, Any], place: str = "in_basis",
         measure: str = "kl_kept") -> float:  # fmt: skip
    return statistics.fmean(_gaps(form, other, place, measure))


def _singles(found: Mapping[tuple[str, float], Forms]) -> Iterator[str]:
    yield "auto beside single representations, tasks in the basis and added ones (KL kept / recovered)"
    yield ""
    names = ("private", "joint", "factored")
    yield from _head("collection", "size", "tasks", *names, "auto", "stored",
                     "KL kept less the best's", "recovered less that one's")  # fmt: skip
    for cell, forms in found.items():
        for place in PLACES:
            auto = _tasks(forms.get("auto", {}), place)
            singles = {n: forms[n] for n in names if n in forms and _tasks(forms[n], place)}
            if not auto or (not singles and place == "in_basis"):
                continue
            row = [kept_cell(_tasks(forms.get(name, {}), place)) for name in names]
            # With --expand nothing of private tasks is to grow: what add stored is what counts.
            if place == "expanded":
                singles |= {n: {place: forms[n]["added"]} for n in names
                            if n not in singles and _tasks(forms.get(n, {}), "added")}  # fmt: skip
            gaps = {n: _gap(forms["auto"], singles[n], place) for n in singles}
            best = min(gaps, key=lambda name: gaps[name], default=None)
            less = ["", ""]
            if best is not None:
                back = _gap(forms["auto"], singles[best], place, "recovered")
                less = [f"{gaps[best]:+.4f} ({best})", f"{back:+.3f}"]
            stored = forms["auto"]["form"]
            if place != "in_basis":
                stored = ", ".join(sorted(set(forms["auto"][place]["stored"].values())))
            row += [kept_cell(auto), stored, *less]
            yield f"| {cell[0]} | {cell[1]:g}x | {place} | {' | '.join(row)} |"


def parts_of_loss(kept: Kept) -> dict[str, float]:
    """What is not recovered, as the part that is distance and the part that is the original's slope.

    Of a token from the data, log p_original - log p_stored is KL(original || stored) if the original is
    right about what comes next, and the mean of the rest says how wrong it is in the direction of what
    is stored. Both as fractions of the gain; means over tasks.
    """
    known = [row for row in kept.values() if None not in (row["recovered"], row["kl_kept"])]
    far = [(1 - row["kl_kept"]) * row["kl_base"] / row["gain"] for row in known]
    lost = [1 - row["recovered"] for row in known]
    return {
        "lost": statistics.fmean(lost),
        "distance": statistics.fmean(far),
        "slope": statistics.fmean(lost) - statistics.fmean(far),
    }


def _apart(found: Mapping[tuple[str, float], Forms]) -> Iterator[str]:
    yield "What is not recovered: by distance from the original, and by its slope (shares of the gain)"
    yield ""
    yield from _head("collection", "size", "form", "KL kept", "recovered", "not recovered",
                     "distance", "slope", "alike")  # fmt: skip
    for (collection, size), forms in found.items():
        for name in ("auto", *SINGLE):
            kept = _tasks(forms.get(name, {}), "in_basis")
            if not kept or not set(SINGLE) & forms.keys():
                continue
            parts = parts_of_loss(kept)
            chosen = f"auto: {forms[name]['form']}" if name == "auto" else name
            yield (
                f"| {collection} | {size:g}x | {chosen} | {_mean(kept, 'kl_kept'):.4f} | "
                f"{_mean(kept, 'recovered'):.4f} | {parts['lost']:+.4f} | {parts['distance']:+.4f} | "
                f"{parts['slope']:+.4f} | {_mean(kept, 'alike'):.4f} |"
            )


def _scaled(found: Mapping[tuple[str, float], Forms]) -> Iterator[str]:
    yield "Originals and forms scaled, and children whose way from their parent is (KL kept / recovered)"
    yield ""
    columns = dict.fromkeys(name for forms in found.values() for name in forms if " x " in name)
    yield from _head("collection", "size", *columns)
    for (collection, size), forms in found.items():
        row = [kept_cell(_tasks(forms.get(name, {}), "in_basis")) for name in columns]
        if any(row):
            yield f"| {collection} | {size:g}x | {' | '.join(row)} |"
