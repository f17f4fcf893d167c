"""Read and write LoRA adapters in PEFT's format: ``adapter_config.json`` + ``.safetensors``.

For a module with base weight W (d_out x d_in) an adapter adds

    delta_W = s B A,    A [r, d_in],  B [d_out, r],    s = alpha / r  (alpha / sqrt(r) with rsLoRA)

An embedding of num_embeddings tokens in embedding_dim dimensions has d_in = num_embeddings and
d_out = embedding_dim. Adapters with a feature that has no such form are refused by name; nothing
is ever ignored in silence.

Sources: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; PEFT's checkpoint format,
https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_vlora.adapters.companions import (
    COMPANION_FILES,
    COMPANION_PATTERNS,
    TEMPLATES_FOLDER,
    companion_files,
)
from vllm_vlora.adapters.peft_config import (
    CONFIG_FILE,
    check_config,
    check_extra_key,
    lora_rank,
    lora_scale,
    read_config,
)
from vllm_vlora.atomic import publish_folder
from vllm_vlora.errors import AdapterError
from vllm_vlora.quantize import is_finite
from vllm_vlora.snapshots import ref_name, resolve_snapshot

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_PATTERNS = [CONFIG_FILE, WEIGHTS_FILE, *COMPANION_PATTERNS]
"""What is downloaded of an adapter on the Hub."""
KINDS = ("linear", "embedding")

Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_PREFIX = "base_model.model."
# What PEFT's save_pretrained writes; anything else in a folder is somebody's own file.
_PEFT_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, "README.md", TEMPLATES_FOLDER})

_LORA_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.default)?(?:\.weight)?"
)

_LORA_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXTRA_DTYPES = _LORA_DTYPES | {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class LoRAModule:
    """One adapted module, as its header and the config describe it.

    Attributes:
        name: path of the module in the base model, "model.layers.0.self_attn.q_proj".
        rank: r, as its tensors have it.
        alpha: alpha of this module (``alpha_pattern``, else ``lora_alpha``).
        scale: s, to be multiplied with B A.
        d_in: columns of A; the number of embeddings for an embedding.
        d_out: rows of B; the embedding dimension for an embedding.
        dtype: of the factors; where A and B differ, the type that holds both.
        kind: "linear" or "embedding".
    """

    name: str
    rank: int
    alpha: float
    scale: float
    d_in: int
    d_out: int
    dtype: torch.dtype
    kind: str

    @property
    def numel(self) -> int:
        """Number of LoRA weights: r (d_in + d_out)."""
        return self.rank * (self.d_in + self.d_out)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. Only headers were read; weights are read when asked for.

    No file stays open, so thousands of adapters can be held.

    Attributes:
        path: the folder.
        name: last part of the folder's path or of the Hub id.
        config: ``adapter_config.json`` as read.
        modules: the adapted modules, sorted by name.
        extra: dtype and shape of every tensor that is not LoRA (classifier heads and other
            ``modules_to_save``, embeddings saved whole), under its name in the file.

    Examples:
        >>> adapter = open_adapter(adapter_dirs[0])
        >>> a, b = adapter.factors("layers.0.v_proj")
        >>> tuple(a.shape), tuple(b.shape), adapter.modules["layers.0.v_proj"].scale
        ((2, 12), (6, 2), 2.0)
    """

    path: Path
    name: str
    config: dict[str, Any]
    modules: dict[str, LoRAModule]
    extra: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    _keys: dict[str, tuple[str, str]] = field(repr=False)

    @property
    def base_model(self) -> str | None:
        """The base model's id or path, where the config names one."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def original_nbytes(self) -> int:
        """Bytes of the LoRA weights at 16 bits each, whatever type they are stored in."""
        return 2 * sum(module.numel for module in self.modules.values())

    @property
    def companions(self) -> dict[str, Path]:
        """Tokenizer files and chat templates in its folder (``adapters.companions``).

        Raises:
            AdapterError: one is no regular file.
        """
        return companion_files(self.path)

    def factors(self, name: str) -> Factors:
        """Return (A [r, d_in], B [d_out, r]) of a module: as stored, in their own dtype, unscaled.

        Each call parses the file's header; :meth:`iter_factors` does so once for many modules.

        Raises:
            KeyError: the adapter has no such module.
            AdapterError: a value is NaN or infinite, or the file changed since it was opened.
        """
        module = self.modules[name]
        with open_weights(self.path / WEIGHTS_FILE) as file:
            return self._read_factors(file, module)

    def iter_factors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Factors]]:
        """Yield (name, (A, B)) for the named modules, or all, opening the file once.

        Raises:
            KeyError, AdapterError: as :meth:`factors`.
        """
        chosen = [self.modules[name] for name in (self.modules if names is None else names)]
        with open_weights(self.path / WEIGHTS_FILE) as file:
            for module in chosen:
                yield module.name, self._read_factors(file, module)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of :attr:`extra`.

        Raises:
            AdapterError: a value is NaN or infinite, or the file changed since it was opened.
        """
        if not self.extra:
            return {}
        with open_weights(self.path / WEIGHTS_FILE) as file:
            return {key: self._read(file, key, shape) for key, (_, shape) in self.extra.items()}

    def _read_factors(self, file: Any, module: LoRAModule) -> Factors:
        key_a, key_b = self._keys[module.name]
        a = self._read(file, key_a, (module.rank, module.d_in))
        return a, self._read(file, key_b, (module.d_out, module.rank))

    def _read(self, file: Any, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        try:
            tensor = file.get_tensor(key)
        except SafetensorError as error:
            raise AdapterError(f"{self.path}: cannot read tensor {key!r}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"{self.path}: tensor {key!r} changed while it was read; run again")
        _check_finite(tensor, key, str(self.path))
        # safetensors maps the file anew for every opening; a tensor that kept its mapping would
        # let a large collection reach the system's limit of maps (65530).
        return tensor.clone()


def open_adapter(ref: str | Path) -> Adapter:
    """Open a PEFT LoRA adapter: a local folder, or a Hub id ("org/name", "org/name@revision").

    Checks the config and the header of the weights file, and reads no weights.

    Raises:
        AdapterError: it cannot be found or read, contradicts itself, or uses a feature with no
            exact low-rank form (DoRA, LoHa, convolutions, pickled weights, ...); one line that
            names the adapter, the offending thing and what to do.

    Examples:
        >>> adapter = open_adapter(adapter_dirs[0])
        >>> adapter.name, adapter.modules["layers.0.q_proj"].rank
        ('task_0', 2)
    """
    folder = resolve_snapshot(ref, what="adapter", error=AdapterError, allow_patterns=PEFT_PATTERNS)
    config = read_config(folder)
    check_config(config, str(folder))
    header = read_header(folder)
    pairs, extra_keys = sort_keys(header, config, str(folder))
    if not pairs:
        raise AdapterError(f"{folder}: {WEIGHTS_FILE} holds no LoRA tensors; nothing to read")
    modules = {
        name: _describe_module(name, pairs[name], header, config, str(folder))
        for name in sorted(pairs)
    }
    return Adapter(
        path=folder,
        name=ref_name(ref),
        config=config,
        modules=modules,
        extra={key: _describe_extra(key, header[key], str(folder)) for key in sorted(extra_keys)},
        _keys={name: (pairs[name].keys["A"], pairs[name].keys["B"]) for name in modules},
    )


def write_adapter(
    out_dir: str | Path,
    config: Mapping[str, Any],
    factors: Mapping[str, Factors] | Iterable[tuple[str, Factors]],
    kinds: Mapping[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    *,
    companions: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> Path:
    """Write a standard PEFT folder, atomically, that PEFT and vLLM load.

    Args:
        out_dir: the folder to publish.
        config: its ``adapter_config.json``. ``r``, ``lora_alpha``, ``rank_pattern`` and
            ``alpha_pattern`` must describe the factors: PEFT takes rank and scale from them.
        factors: module name -> (A [r, d_in], B [d_out, r]), unscaled; any strides and device.
        kinds: module name -> "linear" or "embedding"; linear where it is not named.
        extra: tensors that are not LoRA, under PEFT's names ("base_model.model.score.weight").
        companions: files beside the weights (``adapters.companions``), by name.
        force: replace a folder that holds a PEFT adapter and nothing else.

    Returns:
        The folder's absolute path.

    Raises:
        AdapterError: the factors contradict each other or the config, or are not finite.
        OutputError: the folder exists and may not be replaced, or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    config = dict(config)
    check_config(config, str(out_dir))
    pairs = factors.items() if isinstance(factors, Mapping) else factors
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in pairs:
        kind = (kinds or {}).get(name, "linear")
        _check_factors(name, a, b, kind, config, str(out_dir))
        for key, tensor in zip(_module_keys(name, kind), (a, b), strict=True):
            _add_tensor(tensors, key, tensor, str(out_dir))
    if not tensors:
        raise AdapterError(f"{out_dir}: the adapter has no modules; nothing to write")
    for key, tensor in (extra or {}).items():
        _add_tensor(tensors, key, tensor, str(out_dir))
    # Only the top level is sorted: of two patterns that match a module PEFT takes the first.
    text = json.dumps(dict(sorted(config.items())), indent=2, ensure_ascii=False) + "\n"
    with publish_folder(out_dir, force=force, owned=_is_peft_folder) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        for name, data in (companions or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    return out_dir


@dataclass
class LoRAKeys:
    """A module's kind, and its tensors' names in the file by side, "A" and "B"."""

    kind: str
    keys: dict[str, str]


@dataclass(frozen=True)
class _Header:
    dtype: str
    shape: tuple[int, ...]


def open_weights(path: Path) -> Any:
    """The opened weights file; AdapterError when it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise AdapterError(_missing_weights(path.parent)) from error
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _missing_weights(folder: Path) -> str:
    hint = (
        "a .bin file is pickle, which can run code when it is read, so it is refused; convert it: "
        "load the adapter with PEFT and call save_pretrained(folder, safe_serialization=True)"
    )
    if (folder / "adapter_model.bin").exists():
        return f"{folder}: only adapter_model.bin, no {WEIGHTS_FILE}; {hint}"
    return f"{folder}: no {WEIGHTS_FILE}; where there is only a .bin: {hint}"


def read_header(folder: Path) -> dict[str, _Header]:
    """Dtype and shape of every tensor of a folder's weights file."""
    with open_weights(folder / WEIGHTS_FILE) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {
            key: _Header(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()
        }


def sort_keys(
    header: Mapping[str, _Header], config: Mapping[str, Any], where: str
) -> tuple[dict[str, LoRAKeys], list[str]]:
    """Tell LoRA tensors, paired by module, from extra ones; refuse what is neither."""
    pairs: dict[str, LoRAKeys] = {}
    extra = []
    for key in header:
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            check_extra_key(key, config, where)
            extra.append(key)
            continue
        kind = "embedding" if match["embedding"] else "linear"
        pair = pairs.setdefault(match["module"], LoRAKeys(kind, {}))
        if pair.kind != kind or match["side"] in pair.keys:
            other = next(iter(pair.keys.values()))
            raise AdapterError(
                f"{where}: tensors {other!r} and {key!r} name the same module twice; "
                "remove one of them"
            )
        pair.keys[match["side"]] = key
    for name, pair in pairs.items():
        for side, other in (("A", "B"), ("B", "A")):
            if side not in pair.keys:
                raise AdapterError(
                    f"{where}: module {name!r} has lora_{other} but no lora_{side}; "
                    "the file is incomplete, save the adapter again"
                )
    return pairs, extra


def _describe_module(
    name: str,
    pair: LoRAKeys,
    header: Mapping[str, _Header],
    config: Mapping[str, Any],
    where: str,
) -> LoRAModule:
    dtypes = []
    for key in pair.keys.values():
        dtype = _LORA_DTYPES.get(header[key].dtype)
        if dtype is None:
            raise AdapterError(
                f"{where}: tensor {key!r} has dtype {header[key].dtype}; LoRA weights must be "
                "float32, float16 or bfloat16"
            )
        dtypes.append(dtype)
    shape_a, shape_b = header[pair.keys["A"]].shape, header[pair.keys["B"]].shape
    _check_shapes(name, shape_a, shape_b, config, where)
    rank = shape_a[0]
    alpha, scale = lora_scale(config, name, rank)
    return LoRAModule(
        name=name,
        rank=rank,
        alpha=alpha,
        scale=scale,
        d_in=shape_a[1],
        d_out=shape_b[0],
        dtype=torch.promote_types(*dtypes),
        kind=pair.kind,
    )


def _check_shapes(
    name: str,
    shape_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    config: Mapping[str, Any],
    where: str,
) -> None:
    shown = f"module {name!r} has lora_A {list(shape_a)} and lora_B {list(shape_b)}"
    if len(shape_a) > 2 or len(shape_b) > 2:
        raise AdapterError(f"{where}: {shown}; LoRA on convolutions is not supported")
    if len(shape_a) < 2 or len(shape_b) < 2 or 0 in shape_a or 0 in shape_b:
        raise AdapterError(
            f"{where}: {shown}, not two matrices; sharded training must gather the weights "
            "before it saves them"
        )
    if shape_a[0] != shape_b[1]:
        raise AdapterError(f"{where}: {shown}, whose ranks differ; save the adapter again")
    if shape_a[0] != lora_rank(config, name):
        raise AdapterError(
            f"{where}: {shown}, rank {shape_a[0]}, but {CONFIG_FILE} says rank "
            f"{lora_rank(config, name)}; correct r or rank_pattern"
        )


def _describe_extra(key: str, header: _Header, where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype = _EXTRA_DTYPES.get(header.dtype)
    if dtype is None:
        raise AdapterError(f"{where}: tensor {key!r} has the unsupported dtype {header.dtype}")
    return dtype, header.shape


def _check_finite(tensor: torch.Tensor, key: str, where: str) -> None:
    if not is_finite(tensor):
        raise AdapterError(
            f"{where}: tensor {key!r} holds NaN or infinite values; the training diverged or the "
            "file is damaged"
        )


def _check_factors(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    kind: str,
    config: Mapping[str, Any],
    where: str,
) -> None:
    if kind not in KINDS:
        raise AdapterError(f"{where}: module {name!r} has kind {kind!r}; give one of {KINDS}")
    for side, tensor in (("A", a), ("B", b)):
        if tensor.dtype not in _LORA_DTYPES.values():
            raise AdapterError(
                f"{where}: lora_{side} of module {name!r} has dtype {tensor.dtype}; LoRA weights "
                "must be float32, float16 or bfloat16"
            )
    _check_shapes(name, tuple(a.shape), tuple(b.shape), config, where)


def _module_keys(name: str, kind: str) -> tuple[str, str]:
    # PEFT holds embedding factors as bare parameters, so their names have no ".weight".
    if kind == "embedding":
        return f"{_PREFIX}{name}.lora_embedding_A", f"{_PREFIX}{name}.lora_embedding_B"
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def _add_tensor(
    tensors: dict[str, torch.Tensor], key: str, tensor: torch.Tensor, where: str
) -> None:
    if key in tensors:
        raise AdapterError(f"{where}: tensor {key!r} is given twice; name each module once")
    _check_finite(tensor, key, where)
    # A copy, since safetensors refuses tensors that share memory (factors cut from one basis).
    tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()


def _is_peft_folder(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return CONFIG_FILE in names and names <= _PEFT_FILES | COMPANION_FILES
