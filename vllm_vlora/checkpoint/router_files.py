"""A trained router that travels in a checkpoint, beside the weights: which task a prompt is for.

    CKPT/router.json              what it knows, how it reads text, and how often it was right
    CKPT/router-SHA.safetensors   its network; SHA: the first 16 hex digits of the file's SHA-256

Nothing of it is needed to decode a task, so the manifest does not know of it, and a checkpoint with a
router reads as one without to whatever does not look for it. A router may know tasks that are gone, and
there may be tasks that it does not know: it goes on routing to those that it knows and that are there.

The network is that of ``model.router.TaskRouter``: logits = W_2 relu(W_1 x + b_1) + b_2. ``x`` has
``idf`` in it (``blending.prompt_features``). With ``others`` the last output stands for text of no task.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import safetensors.torch
import torch

from vllm_vlora.checkpoint.aliases import Aliases
from vllm_vlora.checkpoint.beside import decode_beside, read_beside
from vllm_vlora.checkpoint.manifest import FileRef, is_checkpoint, read_checked
from vllm_vlora.downloads import copy_again
from vllm_vlora.errors import CheckpointError, OptionError, TaskIdError
from vllm_vlora.representations.spec import Size
from vllm_vlora.task_ids import validate_task_id
from vllm_vlora.tensor_files import DamagedFileError, read_tensors

ROUTER_FILE = "router.json"
NETWORK_NAME = r"router-[0-9a-f]{16}\.safetensors"
"""What its network's file is called, as a regular expression."""
NETWORK_GLOB = f"router-{'[0-9a-f]' * 16}.safetensors"
"""The same as a pattern of file names."""
TEXT_FEATURES = "text-1"
"""How text becomes numbers; others would be another name, which older versions refuse."""
MAX_OUTPUTS = 10_000
MAX_BUCKETS = 1 << 18
MAX_HIDDEN = 1024
# Of a number in a network: no sum of them overflows.
_MOST_VALUE = 1e6

Weights: TypeAlias = Mapping[str, torch.Tensor]
"""``idf`` (buckets), and the state of a ``TaskRouter``; float32."""


class Measured(msgspec.Struct, forbid_unknown_fields=True):
    """Of one task: texts trained on, texts held out, and those of these that were routed right."""

    trained: Size
    held_out: Size
    right: Size


class RouterRecord(msgspec.Struct, forbid_unknown_fields=True):
    """``router.json``.

    Attributes:
        features: ``TEXT_FEATURES``.
        tasks: what the outputs mean, in their order: ids of tasks, or aliases.
        others: whether one more output stands for text of no task.
        temperature: the logits are divided by it.
        weights: the file of the network.
        measured: task -> what training it found; the text of no task is under "".
    """

    version: int
    features: str
    tasks: list[str]
    others: bool
    temperature: Annotated[float, msgspec.Meta(ge=1e-3, le=1e3)]
    weights: FileRef
    measured: dict[str, Measured]

    @property
    def outputs(self) -> int:
        """How many there are to choose from."""
        return len(self.tasks) + self.others


def read_router(checkpoint: Path) -> RouterRecord | None:
    """What a checkpoint's folder says of its router; None where it has none.

    Raises:
        CheckpointError: the file is damaged or newer.
    """
    file = checkpoint / ROUTER_FILE
    data = read_beside(file)
    return None if data is None else decode_router(data, file)


def decode_router(data: bytes, file: Path = Path(ROUTER_FILE)) -> RouterRecord:
    """What ``encode_router`` wrote.

    Raises:
        CheckpointError: it is damaged or newer.
    """
    record = decode_beside(file, data, RouterRecord)
    fault = _fault(record)
    if fault is not None:
        raise CheckpointError(f"{file}: {fault}; train the router again, or {copy_again(file)}")
    return record


def refuse_unreadable(record: RouterRecord, weights: Weights) -> None:
    """Refuse to write a router that :func:`read_router` or :func:`read_router_weights` would refuse.

    Raises:
        OptionError: saying why.
    """
    try:
        decode_router(encode_router(record))
    except CheckpointError as error:
        raise OptionError(f"no router could be read from this: {error}") from error
    fault = _weights_fault(weights, record.outputs)
    if fault is not None:
        raise OptionError(f"no router could be read from this: {fault}")


def encode_router(record: RouterRecord) -> bytes:
    """``router.json``, indented for people, the same for the same router."""
    return msgspec.json.format(msgspec.json.encode(record))


def read_router_weights(checkpoint: Path, record: RouterRecord) -> dict[str, torch.Tensor]:
    """The network of a router, checked: digest, names, shapes, dtype and that every number is finite.

    Raises:
        CheckpointError: it is missing, damaged, or not what the record needs.
    """
    file = checkpoint / record.weights.file
    try:
        tensors = read_tensors(read_checked(file, record.weights))
    except DamagedFileError as error:
        raise CheckpointError(f"{file}: {error}; {copy_again(file)}") from error
    fault = _weights_fault(tensors, record.outputs)
    if fault is not None:
        raise CheckpointError(f"{file}: {fault}; train the router again")
    return tensors


def network_bytes(weights: Weights) -> tuple[bytes, FileRef]:
    """A network as a file, and what names the file, which is called after its content."""
    data = safetensors.torch.save({name: t.contiguous() for name, t in sorted(weights.items())})
    digest = hashlib.sha256(data).hexdigest()
    return data, FileRef(weights_file(digest), digest, len(data))


def weights_file(sha256: str) -> str:
    """The name of the file with this digest."""
    return f"router-{sha256[:16]}.safetensors"


def keep_router(old: Path, new: Path) -> None:
    """Write the router of a checkpoint, if ``old`` is one that has any, into the folder that takes its
    place.

    Raises:
        CheckpointError: it is damaged.
    """
    for file in new.glob(NETWORK_GLOB):
        file.unlink()
    (new / ROUTER_FILE).unlink(missing_ok=True)
    record = read_router(old) if is_checkpoint(old) else None
    if record is not None:
        data = read_checked(old / record.weights.file, record.weights)
        (new / record.weights.file).write_bytes(data)
        (new / ROUTER_FILE).write_bytes(encode_router(record))


class Fit(msgspec.Struct):
    """How a router fits the tasks that there are.

    Attributes:
        unknown: tasks that it never routes to.
        gone: tasks that it knows and that are not there; what it takes to be theirs goes to the base.
    """

    unknown: list[str]
    gone: list[str]


def router_fit(labels: Sequence[str], tasks: Collection[str], aliases: Aliases) -> Fit:
    """How a router's labels fit these tasks, and the names that they have beside their own."""
    known = set(labels)
    for label in labels:
        if label not in tasks:
            known.update(term.task for route in aliases.get(label, ()) for term in route.blend)
    return Fit(
        [task for task in tasks if task not in known],
        [label for label in labels if label not in tasks and label not in aliases],
    )


def _fault(record: RouterRecord) -> str | None:
    ref = record.weights
    if record.features != TEXT_FEATURES:
        return f"features {record.features!a:.40} are unknown; upgrade vllm-vlora"
    if not 2 <= record.outputs <= MAX_OUTPUTS or len(set(record.tasks)) < len(record.tasks):
        return f"it must know 2 to {MAX_OUTPUTS} different tasks"
    if len(ref.sha256) != 64 or set(ref.sha256) - set("0123456789abcdef"):
        return "its weights have no SHA-256"
    if not re.fullmatch(NETWORK_NAME, ref.file):
        return "it names a foreign file of weights"
    try:
        for task in record.tasks:
            validate_task_id(task)
    except TaskIdError as error:
        return str(error)
    return None


def _weights_fault(tensors: Weights, outputs: int) -> str | None:
    first = tensors.get("net.0.weight")
    if first is None or first.ndim != 2:
        return "net.0.weight is missing or no matrix"
    hidden, buckets = first.shape
    if not (1 <= hidden <= MAX_HIDDEN and 1 <= buckets <= MAX_BUCKETS):
        return f"a network of {hidden} x {buckets} is beyond {MAX_HIDDEN} x {MAX_BUCKETS}"
    wanted = {
        "idf": (buckets,),
        "net.0.weight": (hidden, buckets),
        "net.0.bias": (hidden,),
        "net.2.weight": (outputs, hidden),
        "net.2.bias": (outputs,),
    }
    if tensors.keys() != wanted.keys():
        return f"it holds other tensors than {', '.join(wanted)}"
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not float32 {list(shape)}"
        # Also where it is NaN.
        if not bool((tensor.abs() <= _MOST_VALUE).all()):
            return f"{name} holds NaN or numbers beyond {_MOST_VALUE:g}"
    return None
