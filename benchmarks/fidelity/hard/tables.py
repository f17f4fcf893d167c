"""The measured forms as tables: what ``auto`` chooses, what its candidates gain, what predicts them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
SINGLE = ("private", "joint", "factored", "flat")
CANDIDATES = ("private", "joint", "flat", "mixed", "mixed-refit", "clusters", "clusters-mixed",
              "clusters-mixed-refit")  # fmt: skip
LEFT = ("flat", "mixed-refit", "clusters-mixed-refit")
"""Were candidates of ``auto`` when they were measured, and are none any more."""
PARTS = {
    "clusters": ("clusters", "clusters-mixed", "clusters-mixed-refit"),
    "refits": ("mixed-refit", "clusters-mixed-refit"),
    "mixed sharing": ("mixed", "mixed-refit", "clusters-mixed", "clusters-mixed-refit"),
    "flat": ("flat",),
    "one basis for all": ("joint",),
    "all sharing": CANDIDATES[1:],
}
COUNTED = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, math.inf)
"""What a shared basis' loss may count; the last is never to share."""


def tables(records: Sequence[Record]) -> str:
    """All tables as Markdown."""
    measured = [record for record in records if record.get("forms")]
    times = [record for record in records if "compress_seconds" in record]
    parts = [_choices(measured), _without(measured), _grown(measured), _predictors(measured),
             _scales(measured), _times(times)]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in parts)


def mean(record: Record, form: str, kind: str, measure: str) -> float | None:
    """Of the tasks that it is defined for."""
    rows = record["forms"].get(form, {}).get(kind, {}).values()
    values = [row[measure] for row in rows if row[measure] is not None]
    return statistics.fmean(values) if values else None


def ahead(record: Record, form: str, other: str, measure: str) -> tuple[float, float]:
    """How far one form is ahead of another, and the standard error of that over tasks."""
    first, second = (record["forms"][name]["in_basis"] for name in (form, other))
    both = [first[t][measure] - second[t][measure] for t in first if first[t][measure] is not None]
    error = statistics.stdev(both) / math.sqrt(len(both)) if len(both) > 1 else 0.0
    return statistics.fmean(both), error


def offered(record: Record, left_out: Iterable[str] = ()) -> list[str]:
    """What ``auto`` has judged: of each form the best by the error of the weights."""
    best: dict[tuple[str, bool], str] = {}
    forms = record["forms"]
    for name in CANDIDATES:
        if name in forms and name not in left_out:
            kind = forms[name]["representation"], name.startswith("clusters")
            old = best.get(kind)
            if old is None or forms[name]["likely_error"] < forms[old]["likely_error"]:
                best[kind] = name
    return list(best.values())


def by_model(record: Record, left_out: Iterable[str] = ()) -> str:
    """What the base model prefers by more than a standard error; otherwise what the error prefers."""
    found = offered(record, left_out)
    likely = by_error(record, left_out)
    best = max(found, key=lambda name: mean(record, name, "in_basis", "judged") or -math.inf)
    gap, error = ahead(record, best, likely, "judged")
    return best if gap > error else likely


def by_error(record: Record, left_out: Iterable[str] = (), counted: float | None = None) -> str:
    """What the error of the weights chooses, a shared basis' loss counting ``counted`` times."""
    forms = record["forms"]

    def likely(name: str) -> float:
        form = forms[name]
        if counted is None:
            return form["likely_error"]
        shared = max(form["loss"] - form["private_loss"], 0.0)
        return form["private_loss"] + (counted * shared if shared else 0.0)

    found = offered(record, left_out) if counted is None else [
        name for name in CANDIDATES if name in forms and name not in left_out
    ]  # fmt: skip
    return min(found, key=likely)


def _cell(record: Record, name: str) -> str:
    kept = mean(record, name, "in_basis", "kl_kept")
    back = mean(record, name, "in_basis", "recovered")
    if kept is None:
        return ""
    return f"{kept:.4f} / {math.nan if back is None else back:.3f}"


def _choices(records: Sequence[Record]) -> Iterator[str]:
    yield "KL kept / recovered; auto: chosen form (KL kept less the best single one's, +- over tasks)"
    yield ""
    names = (*SINGLE, "mixed")
    yield f"| collection | size | tasks | {' | '.join(names)} | auto | auto --no-judge |"
    yield "|---" * (5 + len(names)) + "|"
    for record in records:
        singles = [name for name in SINGLE if name in record["forms"]]
        best = max(singles, key=lambda name: mean(record, name, "in_basis", "kl_kept") or 0)
        cells = [_cell(record, name) for name in names]
        for name in (by_model(record, LEFT), by_error(record, LEFT)):
            gap, error = ahead(record, name, best, "kl_kept")
            cells.append(f"{name} ({gap:+.4f} +- {error:.4f})")
        tasks = len(record["forms"]["private"]["in_basis"])
        yield f"| {record['collection']} | {record['ratio']:g}x | {tasks} | {' | '.join(cells)} |"


def _kept(record: Record, name: str) -> float:
    found = mean(record, name, "in_basis", "kl_kept")
    assert found is not None
    return found


def _without(records: Sequence[Record]) -> Iterator[str]:
    yield "What auto keeps less without a kind of candidate: mean, most and where (KL kept; recovered)"
    yield ""
    yield "| without | chosen by | mean | most | where | recovered there | cells of 0.002 or more |"
    yield "|---" * 7 + "|"
    choosers: dict[str, Callable[..., str]] = {
        "the model": by_model,
        "error": by_error,
        "held-out text": _by_held_out,
    }
    for part, names in PARTS.items():
        for chooser, choose in choosers.items():
            lost = [
                (_kept(r, choose(r)) - _kept(r, choose(r, names)), choose(r), choose(r, names), r)
                for r in records
            ]
            if not lost:
                continue
            most, whole, less, where = max(lost, key=lambda found: found[0])
            back = [mean(where, name, "in_basis", "recovered") or 0.0 for name in (whole, less)]
            cells = sum(found[0] >= 0.002 for found in lost)
            average = statistics.fmean(found[0] for found in lost)
            yield (
                f"| {part} | {chooser} | {average:+.4f} | {most:+.4f} "
                f"({whole}, then {less}; +- {ahead(where, whole, less, 'kl_kept')[1]:.4f}) | "
                f"{where['collection']} {where['ratio']:g}x | {back[0] - back[1]:+.4f} | "
                f"{cells} of {len(lost)}, {sum(found[0] <= -0.002 for found in lost)} the other way |"
            )


def _by_held_out(record: Record, left_out: Iterable[str] = ()) -> str:
    names = [name for name in CANDIDATES if name in record["forms"] and name not in left_out]
    return max(names, key=lambda name: _kept(record, name))


def _grown(records: Sequence[Record]) -> Iterator[str]:
    yield "Tasks added to each form: KL kept / recovered; grown is with --expand"
    yield ""
    names = ("private", "joint", "joint grown", "flat", "mixed", "mixed grown", "clusters-mixed")
    yield f"| collection | size | {' | '.join(names)} |"
    yield "|---" * (2 + len(names)) + "|"
    for record in records:
        cells = []
        for name in names:
            kept = mean(record, name, "added", "kl_kept")
            back = mean(record, name, "added", "recovered")
            cells.append(
                "" if kept is None else f"{kept:.4f} / {math.nan if back is None else back:.3f}"
            )
        if any(cells):
            yield f"| {record['collection']} | {record['ratio']:g}x | {' | '.join(cells)} |"


def _predictors(records: Sequence[Record]) -> Iterator[str]:
    yield "KL kept less the best form's, by error alone: what a shared basis' loss counts"
    yield ""
    collections = list(dict.fromkeys(record["collection"] for record in records))

    def regret(counted: float, chosen: Sequence[Record]) -> float:
        return statistics.fmean(
            _kept(r, by_error(r, LEFT, counted)) - _kept(r, _by_held_out(r, LEFT)) for r in chosen
        )

    yield f"| collection | {' | '.join(map(_named, COUNTED))} | left out, fitted on the others |"
    yield "|---" * (2 + len(COUNTED)) + "|"
    left_out = []
    for name in collections:
        own = [record for record in records if record["collection"] == name]
        others = [record for record in records if record["collection"] != name]
        cells = [f"{regret(counted, own):+.4f}" for counted in COUNTED]
        if others:
            fitted = max(COUNTED, key=lambda counted: regret(counted, others))
            left_out += [regret(fitted, own)] * len(own)
            cells.append(f"{regret(fitted, own):+.4f} ({_named(fitted)})")
        yield f"| {name} | {' | '.join(cells)} |"
    if records:
        cells = [f"{regret(counted, records):+.4f}" for counted in COUNTED]
        known = f"{statistics.fmean(left_out):+.4f}" if left_out else ""
        yield f"| all | {' | '.join(cells)} | {known} |"
        judged = [_kept(r, by_model(r, LEFT)) - _kept(r, _by_held_out(r, LEFT)) for r in records]
        yield f"\nThe base model, on text of its own: {statistics.fmean(judged):+.4f}"


def _named(counted: float) -> str:
    return "never share" if math.isinf(counted) else f"{counted:g}"


def _scales(records: Sequence[Record]) -> Iterator[str]:
    yield "The scale of a stored update: least squares, half-way, unbiased (KL kept / recovered)"
    yield ""
    names = [
        f"{form}{scale}"
        for form in ("private", "joint")
        for scale in ("", " half-way", " unbiased")
    ]
    yield f"| collection | size | {' | '.join(names)} |"
    yield "|---" * (2 + len(names)) + "|"
    for record in records:
        forms = {
            name: record["forms"][name]["in_basis"] for name in names if name in record["forms"]
        }
        # Scales may have been measured on fewer tasks than forms.
        tasks = set.intersection(*(set(form) for form in forms.values()))
        alike = {
            name: {"in_basis": {task: form[task] for task in tasks}} for name, form in forms.items()
        }
        cells = [_cell({"forms": alike}, name) for name in names]
        if len(forms) > 2:
            yield f"| {record['collection']} | {record['ratio']:g}x | {' | '.join(cells)} |"


def _times(records: Sequence[Record]) -> Iterator[str]:
    yield "CPU seconds of compress at 8x"
    yield ""
    yield "| collection | private | joint | flat | auto --no-judge | load |"
    yield "|---" * 6 + "|"
    for record in records:
        found = record["compress_seconds"]
        names = ("private", "joint", "flat", "auto")
        cells = [f"{found[name]:.1f}" if name in found else "" for name in names]
        yield f"| {record['collection']} | {' | '.join(cells)} | {record['load']:.0f} |"
