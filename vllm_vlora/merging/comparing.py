"""What ``analyze`` and ``diff`` say of adapters, as JSON data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vllm_vlora.adapters.collection import Progress
from vllm_vlora.adapters.peft_folder import Adapter
from vllm_vlora.errors import OptionError
from vllm_vlora.merging.analysis import (
    adapter_diff,
    add_products,
    by_layer,
    compute_similarity_matrix,
    cosines,
    effective_rank,
    find_clusters,
    layer_singular_values,
    outliers_of,
    scaled_layers,
    update_norm,
)
from vllm_vlora.merging.spectra import ModuleFidelity, Spectrum, SpectrumCollector
from vllm_vlora.subspace.weights import Update
from vllm_vlora.wording import count_of


def analyze_adapters(
    adapters: Mapping[str, Adapter], threshold: float, progress: Progress
) -> tuple[dict[str, Any], list[Spectrum]]:
    """Similarities, clusters, outliers and ranks of a collection, and its singular values by kind.

    Args:
        threshold: the cosine from which two adapters are in one cluster.
    """
    names = list(adapters)
    # What errors name is what the caller calls them.
    opened = [replace(adapter, name=name) for name, adapter in adapters.items()]
    if len(opened) < 2:
        raise OptionError(f"{count_of(len(opened), 'adapter')} given; this needs at least 2")
    products = torch.zeros(len(opened), len(opened), dtype=torch.float64)
    found: list[list[ModuleFidelity]] = [[] for _ in opened]
    # Every weight is read once: a layer gives its products and its singular values.
    most = len(set().union(*(adapter.modules for adapter in opened)))
    for done, (module, pairs) in enumerate(by_layer(opened)):
        progress("compare", done, most)
        add_products(products, pairs)
        for place, sigma in layer_singular_values(pairs):
            squared = float(sigma.square().sum())
            found[place].append(ModuleFidelity(module, 0.0, squared, tuple(sigma.tolist())))
    progress("compare", most, most)
    products = (products + products.T) / 2
    similarity = cosines(products).float()
    clusters = [[names[place] for place in group] for group in find_clusters(similarity, threshold)]
    outliers = outliers_of(products) if _can_stand_out(len(opened)) else None
    collector, described = SpectrumCollector(), []
    for name, adapter, modules in zip(names, opened, found):
        ranks = {
            m.name: effective_rank(torch.tensor(m.singular_values, dtype=torch.float64))
            for m in modules
        }
        collector.add(modules, {module: round(rank) for module, rank in ranks.items()})
        described.append(
            {
                "adapter": name,
                "modules": len(modules),
                "max_rank": max(module.rank for module in adapter.modules.values()),
                "effective_rank": sum(ranks.values()) / len(ranks),
                "norm": math.sqrt(sum(module.norm_squared for module in modules)),
            }
        )
    rows = similarity.tolist()
    data: dict[str, Any] = {
        "similarity_matrix": {
            name: dict(zip(names, row)) for name, row in zip(names, rows, strict=True)
        },
        "clusters": clusters,
        "threshold": threshold,
        "redundant_count": sum(len(cluster) - 1 for cluster in clusters),
        "outliers": None
        if outliers is None
        else [
            {
                "adapter": names[found["index"]],
                "distance": found["distance"],
                "z_score": found["z_score"],
            }
            for found in outliers
        ],
        "adapters": described,
    }
    return data, collector.spectra()


def _can_stand_out(count: int) -> bool:
    """Whether so many adapters can have an outlier at all (``find_outliers``)."""
    return count >= 3 and (count - 1) / math.sqrt(count) > 2.0


def compare_pair(pair: tuple[Update, Update]) -> dict[str, Any]:
    """Norms, distance and cosine of two updates, over all layers and layer by layer.

    Distances are ||W_a - W_b|| (Frobenius) of the updates s B A.
    """
    layers = adapter_diff(*pair)
    norms = [
        math.sqrt(sum(update_norm(*factors) ** 2 for _, factors in scaled_layers(side)))
        for side in pair
    ]
    return {
        "norm_a": norms[0],
        "norm_b": norms[1],
        "l2_distance": math.sqrt(sum(found["l2_distance"] ** 2 for found in layers.values())),
        "cosine_sim": float(compute_similarity_matrix(pair)[0, 1]),
        "layers": layers,
    }
