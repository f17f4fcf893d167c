"""What ``examples/monitoring`` asks of Prometheus, checked against a scrape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml
from places import ROOT
from scrapes import Scrape

FOLDER = ROOT / "examples" / "monitoring"
# Prometheus itself gives every series these.
_OF_PROMETHEUS = {"job", "instance"}
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*:[a-zA-Z0-9_:]+")
_SELECTED = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*:[a-zA-Z0-9_:]+)\s*\{([^}]*)\}")
_MATCHER = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)\s*(?:=~|!~|!=|=)\s*\"[^\"]*\"")
_BY = re.compile(r"\bby\s*\(([^)]*)\)")


def panels() -> list[dict[str, Any]]:
    return json.loads((FOLDER / "dashboard.json").read_text())["panels"]


def queries() -> Iterator[tuple[str, str]]:
    """Where a query stands, and the query: of panels, their variables and alerts."""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    board = json.loads((FOLDER / "dashboard.json").read_text())
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def names_in(query: str) -> set[str]:
    """The metrics' names that a query has: all of ours and of vLLM's have a colon."""
    return set(_NAME.findall(re.sub(r'"[^"]*"', '""', query)))


def problems(query: str, scrape: Scrape) -> list[str]:
    """What a query asks for that the scrape has not: names, and labels of each name."""
    found = [f"no metric {name}" for name in names_in(query) - scrape.names]
    there = {label for name in names_in(query) for label in scrape.labels(name)} | _OF_PROMETHEUS
    for name, inside in _SELECTED.findall(query):
        labels = set(_MATCHER.findall(inside))
        parts = [part for part in inside.split(",") if part.strip()]
        if len(labels) != len(parts):
            found.append(f"matchers of {name} are not understood: {inside}")
        if name in scrape.names:
            found += [
                f"{name} has no label {label}"
                for label in labels - scrape.labels(name) - _OF_PROMETHEUS
            ]
    grouped = {label.strip() for inside in _BY.findall(query) for label in inside.split(",")}
    found += [f"no label {label}" for label in grouped - there]
    if query.count("(") != query.count(")") or query.count("{") != query.count("}"):
        found.append("brackets do not match")
    return found
