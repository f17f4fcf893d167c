"""The fidelity report as JSON data: every field with its type and meaning (``docs/schemas``)."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from msgspec import Meta


class Summary(TypedDict):
    """A fraction over the tasks that have it; null where there are none."""

    judged: Annotated[int, Meta(ge=0, description="tasks whose fraction is known")]
    mean: float | None
    median: float | None
    worst: float | None
    worst_task: str | None


class GreedyFigures(TypedDict):
    """Greedy answers of the task beside its adapter's."""

    tokens: Annotated[float, Meta(description="mean number of first tokens that agree")]
    possible: Annotated[float, Meta(description="mean number that could")]
    exact: Annotated[float, Meta(description="share of answers that agree throughout")]
    limit: Annotated[int, Meta(description="the most tokens that were generated")]


Interval = tuple[float, float]


class TaskFigures(TypedDict):
    """One task. Losses and divergences: nats per supervised token; sizes: bytes; null: unknown."""

    task: str
    data: Annotated[list[str], Meta(description="its files")]
    data_sha256: str
    examples: Annotated[int, Meta(ge=1, description="that were scored")]
    left_out: Annotated[int, Meta(ge=0, description="examples without a supervised token")]
    tokens: Annotated[int, Meta(ge=1, description="that were scored")]
    base_loss: float
    adapter_loss: Annotated[float | None, Meta(description="of the original adapter")]
    compressed_loss: float
    kl_kept: Annotated[
        float | None, Meta(description="1 - kl / kl_base; gates go by it. 1: nothing is lost")
    ]
    kl_kept_standard_error: Annotated[float | None, Meta(description="over examples")]
    kl_kept_interval: Annotated[Interval | None, Meta(description="95 %, bootstrap over examples")]
    kl_kept_undefined_because: str | None
    recovered: Annotated[
        float | None,
        Meta(description="(base_loss - compressed_loss) / (base_loss - adapter_loss)"),
    ]
    recovered_standard_error: Annotated[float | None, Meta(description="over examples")]
    recovered_interval: Annotated[
        Interval | None, Meta(description="95 %, bootstrap over examples")
    ]
    recovered_undefined_because: str | None
    agreement: Annotated[
        float | None, Meta(description="share of tokens whose most likely one is the adapter's")
    ]
    kl: Annotated[float | None, Meta(description="KL(adapter || task)")]
    kl_base: Annotated[float | None, Meta(description="KL(adapter || base)")]
    greedy: GreedyFigures | None
    error: Annotated[
        float | None, Meta(description="||delta_W' - delta_W|| / ||delta_W||, Frobenius")
    ]
    errors_from: Annotated[str, Meta(pattern="^(checkpoint|original)$")]
    module_errors: dict[str, float | None]
    original: Annotated[str | None, Meta(description="folder of the original adapter")]
    original_bytes: Annotated[int, Meta(description="LoRA weights at 16 bits each")]
    bytes: Annotated[int, Meta(description="of the task's file")]
    ratio: float | None
    stored_as: Annotated[
        dict[str, int], Meta(description="modules by representation and number format")
    ]
    tokenizer: Annotated[
        str | None, Meta(description="the folder that read the data, if not the base model's")
    ]


class SpectrumFigures(TypedDict):
    """Singular values of the original updates of one kind of module, each scaled to norm 1."""

    kind: str
    modules: int
    kept_rank: float
    quantiles: Annotated[dict[str, list[float]], Meta(description="by quantile, over modules")]


class SimilarityFigures(TypedDict):
    """Cosines between original updates."""

    tasks: list[str]
    cosines: list[list[float]]


class ReportFigures(TypedDict):
    """What ``vllm-vlora evaluate --json`` prints and ``--save-json`` writes."""

    checkpoint: str
    base_model: str
    bytes: Annotated[int, Meta(description="of all safetensors files")]
    original_bytes: Annotated[int, Meta(description="LoRA weights of all tasks at 16 bits each")]
    basis_bytes: Annotated[int, Meta(description="of what tasks share")]
    ratio: float | None
    kl_kept: Annotated[Summary, Meta(description="1 - KL(adapter || task) / KL(adapter || base)")]
    recovered: Annotated[Summary, Meta(description="part of the adapters' gains in loss")]
    tasks: list[TaskFigures]
    losses: Annotated[dict[str, Any], Meta(description="tasks and modules that lost much")]
    not_evaluated: Annotated[list[str], Meta(description="tasks without data")]
    spectra: list[SpectrumFigures]
    similarity: SimilarityFigures | None
    setting: Annotated[dict[str, str], Meta(description="versions, machine, command, options")]
    seconds: float
