"""One name for each layer of a base model, whatever class the adapters were trained on.

The path of a layer depends on the class that the model was loaded with, and on the version of
transformers: the same projection is ``layers.0.self_attn.q_proj`` in a bare backbone,
``model.layers.0...`` under a head, ``language_model.model.layers.0...`` in a multimodal model before
transformers 4.52 and ``model.language_model.layers.0...`` since. A name here is a *prefix* and what
follows it; below are the prefixes under which models have one and the same part.

Only these are taken for two names of one layer, and only where the adapters leave no doubt. vLLM has the
same table, spread over its model classes (``hf_to_vllm_mapper``); it is not asked here, since adapters
are put together without it and without the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

Found = TypeVar("Found", bound=Hashable)


class _Part(NamedTuple):
    """A part of models: the prefixes that it has in them, and how what follows a prefix begins."""

    prefixes: tuple[str, ...]
    heads: tuple[str, ...]


# Of two parts that a name belongs to, the first counts.
_PARTS = (
    # The decoder: bare, under a head, and in a multimodal model (bare or not, after 4.52 and before).
    _Part(
        ("", "model.", "language_model.", "model.language_model.", "language_model.model."),
        ("layers.", "embed_tokens"),
    ),
    # Idefics 3, SmolVLM.
    _Part(("", "model."), ("text_model.layers.", "text_model.embed_tokens")),
    _Part(("", "language_model."), ("lm_head",)),
    # Towers and what joins them to the decoder; before 4.52 they stood beside it, since then within. The
    # encoder of some has lost the model around it in transformers 5.
    _Part(
        (
            "vision_tower.",
            "model.vision_tower.",
            "vision_tower.vision_model.",
            "model.vision_tower.vision_model.",
        ),
        ("encoder.", "embeddings."),
    ),
    *(
        _Part(("", "model."), (f"{tower}.",))
        for tower in (
            "visual",
            "vision_tower",
            "vision_model",
            "audio_tower",
            "multi_modal_projector",
            "connector",
            "embed_vision",
            "embed_audio",
        )
    ),
    _Part(("", "model.", "bert.", "roberta."), ("encoder.", "embeddings.")),
    _Part(("", "model."), ("decoder.",)),
    _Part(("", "transformer."), ("h.", "wte", "wpe")),
)


class _Place(NamedTuple):
    """How a name reads: the part's number, its prefix, the head, and what follows that."""

    part: int
    prefix: str
    head: str
    rest: str


@lru_cache(maxsize=1 << 16)
def _place(name: str) -> _Place | None:
    for number, part in enumerate(_PARTS):
        for prefix in part.prefixes:
            for head in part.heads:
                # A head without a dot is a module's whole name.
                if name.startswith(prefix + head) and (head.endswith(".") or name == prefix + head):
                    return _Place(number, prefix, head, name[len(prefix + head) :])
    return None


def other_names(name: str) -> Iterator[str]:
    """The names that the same layer has in other model classes.

    Examples:
        >>> list(other_names("model.visual.blocks.0.attn.qkv"))
        ['visual.blocks.0.attn.qkv']
    """
    place = _place(name)
    if place is not None:
        for prefix in _PARTS[place.part].prefixes:
            if prefix != place.prefix:
                yield prefix + place.head + place.rest


def find_name(name: str, translate: Callable[[str], Found | None]) -> Found | None:
    """What ``translate`` gives for a layer under whatever name it knows it.

    Args:
        translate: gives None for a name that it does not know.

    Returns:
        None where it knows none of the names, or where they stand for different things.

    Examples:
        >>> find_name("layers.0.q_proj", {"model.layers.0.q_proj": "it"}.get)
        'it'
    """
    found = translate(name)
    if found is not None:
        return found
    others = {other for other in map(translate, other_names(name)) if other is not None}
    return others.pop() if len(others) == 1 else None


class Layer(Protocol):
    """Whatever describes a layer: of an adapter, a checkpoint or a subspace."""

    @property
    def d_in(self) -> int: ...
    @property
    def d_out(self) -> int: ...
    @property
    def kind(self) -> str: ...


def layer_shapes(layers: Mapping[str, Layer]) -> dict[str, tuple[int, int, str]]:
    """What :func:`shared_prefixes` compares of layers."""
    return {name: (layer.d_in, layer.d_out, layer.kind) for name, layer in layers.items()}


def shared_prefixes(
    adapters: Sequence[Mapping[str, Hashable]], known: Mapping[str, Hashable] | None = None
) -> list[dict[str, str]]:
    """How each adapter's names are changed so that one layer has one name in all of them.

    A part of the model gets the prefix that ``known`` has, else the one that most adapters have (of
    several the longest). It keeps the names that it has wherever they may be different layers: where one
    adapter or ``known`` has two prefixes of it, or where shapes differ under two prefixes.

    Args:
        adapters: for each, module name -> its shape and kind, or whatever else is equal for one layer.
        known: the same of modules whose names stay, as those of a checkpoint that is added to.

    Returns:
        For each adapter, shared prefix -> what the adapter has in its place; see :func:`renamed`.

    Examples:
        >>> shared_prefixes([{"layers.0.q": 1}, {"model.layers.0.q": 1}, {"model.layers.1.q": 1}])
        [{'model.layers.': 'layers.'}, {}, {}]
    """
    everyone = [{name: _place(name) for name in adapter} for adapter in adapters]
    fixed = {name: _place(name) for name in known or {}}
    changes: list[dict[str, str]] = [{} for _ in adapters]
    used, theirs = [_prefixes(places) for places in everyone], _prefixes(fixed)
    for part in sorted(set().union(*used)):
        prefix = _chosen([own[part] for own in used if part in own], theirs.get(part, set()))
        if prefix is None or not _shapes_agree(
            part, [*zip(adapters, everyone), (known or {}, fixed)]
        ):
            continue
        for change, places in zip(changes, everyone):
            for place in places.values():
                if place is not None and place.part == part and place.prefix != prefix:
                    change[prefix + place.head] = place.prefix + place.head
    return changes


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """A name with what stands beside the longest of the ``prefixes`` that fits in that one's place.

    One that ends with a dot fits what begins with it, any other one the name that it is.

    Examples:
        >>> renamed("model.layers.0.q_proj", {"model.layers.": "layers."})
        'layers.0.q_proj'
    """
    if name in prefixes:
        return prefixes[name]
    fitting = [prefix for prefix in prefixes if prefix.endswith(".") and name.startswith(prefix)]
    if not fitting:
        return name
    longest = max(fitting, key=len)
    return prefixes[longest] + name[len(longest) :]


def inverse(prefixes: Mapping[str, str]) -> dict[str, str]:
    """What turns names back that ``prefixes`` turned."""
    return {new: old for old, new in prefixes.items()}


_Places = Mapping[str, _Place | None]


def _prefixes(places: _Places) -> dict[int, set[str]]:
    """The prefixes that an adapter has of each part of the model."""
    found: dict[int, set[str]] = {}
    for place in places.values():
        if place is not None:
            found.setdefault(place.part, set()).add(place.prefix)
    return found


def _chosen(used: Sequence[set[str]], fixed: set[str]) -> str | None:
    """The prefix for all; None where there is one already, or where two may be different layers."""
    if len(set().union(fixed, *used)) < 2 or len(fixed) > 1 or any(len(own) > 1 for own in used):
        return None
    if fixed:
        return next(iter(fixed))
    counts = Counter(prefix for own in used for prefix in own)
    return max(counts, key=lambda prefix: (counts[prefix], len(prefix)))


def _shapes_agree(part: int, adapters: Sequence[tuple[Mapping[str, Hashable], _Places]]) -> bool:
    """Whether a layer has one shape under all prefixes."""
    # Two shapes under one prefix are two base models, and an error of its own.
    shapes: dict[str, dict[str, Hashable]] = {}
    for adapter, places in adapters:
        for name, place in places.items():
            if place is not None and place.part == part:
                shapes.setdefault(place.head + place.rest, {})[place.prefix] = adapter[name]
    return all(len(set(under.values())) == 1 for under in shapes.values())
