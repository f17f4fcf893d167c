"""Adapters of fused experts, which PEFT writes for parameters, as adapters of one module an expert.

transformers 5 holds the experts of a block as two parameters, ``experts.gate_up_proj`` and
``experts.down_proj``. With ``target_parameters`` PEFT adds to expert e of n

    delta_W_e = s B_e A_e,    A_e = A[e r : (e + 1) r],    B_e = B[:, e::n]

and stores the whole A [n r, d_in] and B [d_out, n r] as if they were a module's. Their product is no
update of anything, so such folders are not read as they are. Expert by expert each is plain LoRA, under
the names that models had before and vLLM still takes: ``experts.3.gate_proj``.

Source: ``peft.tuners.lora.layer.ParamWrapper``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_vlora.adapters.companions import companion_files
from vllm_vlora.adapters.peft_config import (
    check_config,
    lora_rank,
    lora_scale,
    rank_options,
)
from vllm_vlora.adapters.peft_folder import (
    Factors,
    find_adapter,
    read_folder,
    sort_tensors,
    write_adapter,
)
from vllm_vlora.adapters.weights_files import WEIGHTS_FILE, WeightsReader
from vllm_vlora.errors import AdapterError
from vllm_vlora.regular_files import JSON_BYTES, read_regular

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_EXPERTS = re.compile(r"(?P<experts>.+\.experts)(?P<inner>\.base_layer)?")


def split_experts(
    ref: str | Path,
    out_dir: str | Path,
    *,
    interleaved: bool,
    names: tuple[str, str, str] = PROJECTIONS,
    force: bool = False,
) -> Path:
    """Write an adapter of fused experts anew, with a module for each projection of each expert.

    gate and up keep the A that they share, each its own copy. All other modules and tensors stay.

    Args:
        ref: a PEFT folder or a Hub id; its ``target_parameters`` name ``experts.gate_up_proj``,
            ``experts.down_proj`` or both.
        out_dir: the folder to publish.
        interleaved: whether gate and up take turns in the rows of ``gate_up_proj``, as in gpt-oss; in
            other models the gate's rows stand before the up's.
        names: what the served model calls gate, up and down of an expert; Mixtral and gpt-oss say
            ("w1", "w3", "w2").
        force: replace a folder that holds a PEFT adapter and nothing else.

    Returns:
        The folder's absolute path.

    Raises:
        AdapterError: the adapter cannot be read, or adapts other parameters than these.
        OutputError: the folder exists and may not be replaced, or cannot be written.

    Examples:
        >>> path = split_experts(fused_dir, folder / "split", interleaved=False)
        >>> list(open_adapter(path).modules)[:2]
        ['layers.0.mlp.experts.0.down_proj', 'layers.0.mlp.experts.0.gate_proj']
    """
    folder = find_adapter(ref)
    config, header = read_folder(folder)
    fused = _fused_parameters(config, str(folder))
    check_config(_without_parameters(config), str(folder))
    pairs, whole = sort_tensors(header, config, str(folder))
    shapes = {name: tuple(pair.sides[s].shape for s in "AB") for name, pair in pairs.items()}
    _check_blocks(shapes, fused, str(folder))
    factors: dict[str, Factors] = {}
    scales: dict[str, tuple[int, float]] = {}
    with WeightsReader(str(folder)) as weights:
        for name, pair in pairs.items():
            a, b = (weights.read(pair.sides[side]) for side in "AB")
            parameter = _parameter(name, fused)
            if parameter is None:
                factors[name], scales[name] = (a, b), _rank_and_alpha(config, name)
                continue
            block = _experts(name)
            rank, alpha = _rank_and_alpha(config, f"{block}.{parameter}")
            parts = _parts(parameter, len(b), interleaved, names)
            split = dict(_split(block, a, b, rank, parts, str(folder)))
            factors |= split
            scales |= dict.fromkeys(split, (rank, alpha))
        extra = {key: weights.read(stored) for key, stored in whole.items()}
    kinds = {name: pair.kind for name, pair in pairs.items() if name in factors}
    return write_adapter(
        out_dir,
        _plain_config(config, scales),
        factors,
        kinds,
        extra,
        companions={
            name: read_regular(path, JSON_BYTES) for name, path in companion_files(folder).items()
        },
        force=force,
    )


def _fused_parameters(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The last parts of the adapted parameters, from the inner of PEFT's wrappers to the outer."""
    named = config.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise AdapterError(f"{where}: target_parameters is {named!r:.200}, no list of names")
    leaves = {name.rsplit(".", 1)[-1] for name in named}
    other = [n for n in named if n.split(".")[-2:-1] not in ([], ["experts"])]
    if not leaves or not leaves <= {GATE_UP, DOWN} or other:
        raise AdapterError(
            f"{where}: target_parameters is {named or 'not set'}; only experts.{GATE_UP} and "
            f"experts.{DOWN} can be split into experts"
        )
    return tuple(leaf for leaf in (GATE_UP, DOWN) if leaf in leaves)


def _check_blocks(
    shapes: Mapping[str, tuple[tuple[int, ...], ...]], fused: tuple[str, ...], where: str
) -> None:
    """Refuse factors of a block's two parameters that do not fit each other, by (A's, B's) shapes."""
    blocks = {_experts(name) for name in shapes if _EXPERTS.fullmatch(name)}
    if not blocks:
        raise AdapterError(f"{where}: {WEIGHTS_FILE} adapts no experts; open it as it is")
    for block in sorted(blocks):
        inner, outer = shapes.get(f"{block}.base_layer"), shapes.get(block)
        if len(fused) == 1 and inner is None:
            continue
        if inner is None or outer is None or len(fused) == 1:
            raise AdapterError(f"{where}: {block} lacks factors of a parameter; save it again")
        (_, hidden), (gate_up, _) = inner
        (_, width), (out, _) = outer
        if hidden != out or gate_up != 2 * width:
            raise AdapterError(
                f"{where}: {block} has {GATE_UP} of {hidden} to {gate_up} and {DOWN} of {width} to "
                f"{out}, which do not follow each other: not the layout that PEFT 0.21 writes; save the "
                "adapter again with that"
            )


def _parameter(module: str, fused: tuple[str, ...]) -> str | None:
    """Which fused parameter the factors of a module of the file adapt; None for a module proper.

    PEFT wraps a block's parameters one around the other in the order in which models have them.
    """
    match = _EXPERTS.fullmatch(module)
    if match is None:
        return None
    return fused[0] if match["inner"] else fused[-1]


def _experts(module: str) -> str:
    return module.removesuffix(".base_layer")


def _rank_and_alpha(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """A module's rank, and the alpha that gives its scale without rsLoRA."""
    rank = lora_rank(config, name)
    alpha, scale = lora_scale(config, name, rank)
    return rank, scale * rank if config.get("use_rslora") else alpha


def _parts(
    parameter: str, d_out: int, interleaved: bool, names: tuple[str, str, str]
) -> dict[str, slice]:
    """The projections that a parameter holds, and the rows of B of each."""
    gate, up, down = names
    if parameter == DOWN:
        return {down: slice(None)}
    if interleaved:
        return {gate: slice(0, None, 2), up: slice(1, None, 2)}
    return {gate: slice(0, d_out // 2), up: slice(d_out // 2, None)}


def _split(
    experts: str,
    a: torch.Tensor,
    b: torch.Tensor,
    rank: int,
    parts: Mapping[str, slice],
    where: str,
) -> Iterator[tuple[str, Factors]]:
    count, left_over = divmod(len(a), rank)
    if left_over or b.shape[1] != len(a) or b.shape[0] % len(parts):
        raise AdapterError(
            f"{where}: {experts} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, which rank "
            f"{rank} does not split into experts; correct r or rank_pattern"
        )
    for expert in range(count):
        a_of_expert, b_of_expert = a[expert * rank : (expert + 1) * rank], b[:, expert::count]
        for name, rows in parts.items():
            yield f"{experts}.{expert}.{name}", (a_of_expert, b_of_expert[rows])


def _plain_config(
    config: Mapping[str, Any], scales: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """The config of the same adapter without parameters."""
    return _without_parameters(config) | rank_options(scales) | {"target_modules": sorted(scales)}


def _without_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "target_parameters"}
