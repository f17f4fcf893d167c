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
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file

from vllm_vlora.adapters.companions import (
    COMPANION_FILES,
    COMPANION_PATTERNS,
    TEMPLATES_FOLDER,
    companion_files,
    is_companion,
)
from vllm_vlora.adapters.lookalikes import describe_file
from vllm_vlora.adapters.mlx_folder import MLX_WEIGHTS, as_peft, is_mlx
from vllm_vlora.adapters.module_names import inverse, renamed
from vllm_vlora.adapters.patterns import Work
from vllm_vlora.adapters.peft_config import (
    CONFIG_FILE,
    GATHER,
    check_config,
    check_extra_key,
    check_extra_shape,
    check_saved_modules,
    config_warnings,
    lora_rank,
    lora_scale,
    rank_options,
    read_config,
)
from vllm_vlora.adapters.peft_targets import full_targets, prepared, selects
from vllm_vlora.adapters.tensor_names import PREFIX, parse_lora, parse_whole
from vllm_vlora.adapters.weights_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    WeightsReader,
    check_finite,
    read_headers,
)
from vllm_vlora.atomic import publish_folder
from vllm_vlora.errors import AdapterError
from vllm_vlora.regular_files import JSON_BYTES, read_regular
from vllm_vlora.representations.spec import rank_fault
from vllm_vlora.snapshots import ref_name, resolve_snapshot
from vllm_vlora.wording import some_of

PEFT_PATTERNS = [
    CONFIG_FILE,
    WEIGHTS_FILE,
    INDEX_FILE,
    "adapter_model-*.safetensors",
    MLX_WEIGHTS,
    *COMPANION_PATTERNS,
]
"""What is downloaded of an adapter on the Hub."""
KINDS = ("linear", "embedding")

Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]

# What PEFT's save_pretrained writes; anything else in a folder is somebody's own file.
_PEFT_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, "README.md", TEMPLATES_FOLDER})

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
            ``modules_to_save``, embeddings saved whole), under PEFT's name.
        warnings: what was found and is not followed, one line each.
        renamed: prefix of the modules' names -> what they have in its place in the file
            (``module_names``); empty where the names are the file's.

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
    warnings: tuple[str, ...]
    _keys: dict[str, tuple[StoredTensor, StoredTensor]] = field(repr=False)
    _whole: dict[str, StoredTensor] = field(repr=False)
    renamed: Mapping[str, str] = field(default_factory=dict)

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
        a, b = self._keys[name]
        with WeightsReader(str(self.path)) as weights:
            return weights.read(a), weights.read(b)

    def iter_factors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Factors]]:
        """Yield (name, (A, B)) for the named modules, or all, opening the file once.

        Raises:
            KeyError, AdapterError: as :meth:`factors`.
        """
        chosen = {name: self._keys[name] for name in (self.modules if names is None else names)}
        with WeightsReader(str(self.path)) as weights:
            for name, (a, b) in chosen.items():
                yield name, (weights.read(a), weights.read(b))

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of :attr:`extra`.

        Raises:
            AdapterError: a value is NaN or infinite, or the file changed since it was opened.
        """
        with WeightsReader(str(self.path)) as weights:
            return {key: weights.read(stored) for key, stored in self._whole.items()}

    def under_names(self, prefixes: Mapping[str, str]) -> Adapter:
        """The adapter with these prefixes in its modules' names: new prefix -> the one in the file.

        Only names change: its config, and what its weights mean, are as they were.
        """
        assert not self.renamed, f"{self.path} has other names already"
        names = {name: renamed(name, inverse(prefixes)) for name in self.modules}
        modules = {new: replace(self.modules[old], name=new) for old, new in names.items()}
        return replace(
            self,
            modules=dict(sorted(modules.items())),
            renamed=dict(prefixes),
            _keys={new: self._keys[old] for old, new in names.items()},
        )


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
    folder = find_adapter(ref)
    config, header = read_folder(folder)
    where = str(folder)
    check_config(config, where)
    pairs, whole = sort_tensors(header, config, where)
    if not pairs:
        raise AdapterError(f"{where}: {WEIGHTS_FILE} holds no LoRA tensors; nothing to read")
    check_targets(config, {name: (pair.kind, pair.trained) for name, pair in pairs.items()}, where)
    warnings = config_warnings(config) + check_saved_modules(config, whole, where)
    modules = {name: describe_module(name, pairs[name], config, where) for name in sorted(pairs)}
    return Adapter(
        path=folder,
        name=ref_name(folder if os.path.isfile(ref) else ref),
        config=config,
        modules=modules,
        extra={key: _describe_extra(whole[key], where) for key in sorted(whole)},
        warnings=tuple(warnings),
        _keys={name: (pairs[name].sides["A"], pairs[name].sides["B"]) for name in modules},
        _whole={key: whole[key] for key in sorted(whole)},
    )


def find_adapter(ref: str | Path) -> Path:
    """The local folder of an adapter that is named by its folder, one of PEFT's files, or its Hub id."""
    path = Path(os.path.expanduser(ref))
    if os.path.isfile(path):
        beside = path.name in (WEIGHTS_FILE, CONFIG_FILE) and (path.parent / CONFIG_FILE).is_file()
        if not beside:
            raise AdapterError(f"adapter {os.fspath(ref)!r} is a file: {describe_file(path)}")
        return path.parent.absolute()
    return resolve_snapshot(
        ref,
        what="adapter",
        error=AdapterError,
        allow_patterns=PEFT_PATTERNS,
        required=CONFIG_FILE,
    )


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """A folder's config and its tensors by name, as PEFT has both."""
    config = read_config(folder)
    return as_peft(folder, config) if is_mlx(config) else (config, read_headers(folder))


def check_targets(
    config: Mapping[str, Any], modules: Mapping[str, tuple[str, str]], where: str
) -> None:
    """Refuse modules that the config does not select: PEFT would leave them out and vLLM apply them.

    Args:
        modules: name -> (kind, name in the model that was trained).
    """
    try:
        ready, work = prepared(config), Work()
        left_out = [
            name
            for name, (kind, trained) in modules.items()
            if selects(ready, name, kind, work) is False
            and selects(ready, trained, kind, work) is False
        ]
    except ValueError as error:
        raise AdapterError(f"{where}: {error}; correct {CONFIG_FILE}") from error
    if left_out:
        raise AdapterError(
            f"{where}: target_modules and its companions in {CONFIG_FILE} do not select "
            f"{some_of(left_out)}, for which there are LoRA tensors: PEFT would leave them out and "
            "vLLM apply them; name them there, or remove the tensors"
        )


@contextmanager
def as_peft_folder(adapter: Adapter) -> Iterator[Path]:
    """A folder from which PEFT reads the adapter as it was read here: its own, or a copy for now.

    PEFT passes over tensors of other names with a warning, and would run the base model.
    """
    if _is_as_peft_writes(adapter):
        yield adapter.path
        return
    modules = adapter.modules
    options = rank_options({n: (m.rank, m.scale * m.rank) for n, m in modules.items()})
    with TemporaryDirectory(prefix="vllm-vlora-") as scratch:
        yield write_adapter(
            Path(scratch) / "adapter",
            {**adapter.config, **options, **full_targets(modules)},
            adapter.iter_factors(),
            {name: module.kind for name, module in modules.items()},
            adapter.extra_tensors(),
        )


def _is_as_peft_writes(adapter: Adapter) -> bool:
    """Whether the files and the names in them are those that ``write_adapter`` would write."""
    try:
        json.loads(read_regular(adapter.path / CONFIG_FILE, JSON_BYTES).decode())
    # In another encoding than PEFT reads.
    except ValueError:
        return False
    except OSError as error:
        raise AdapterError(f"{adapter.path}: {CONFIG_FILE}: {error.strerror}") from error
    stored = dict(adapter._whole)
    for name, module in adapter.modules.items():
        stored |= zip(_module_keys(name, module.kind), adapter._keys[name], strict=True)
    return all(
        tensor.key == key and tensor.file.name == WEIGHTS_FILE for key, tensor in stored.items()
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
    written: dict[str, tuple[str, str]] = {}
    for name, (a, b) in pairs:
        kind = (kinds or {}).get(name, "linear")
        written[name] = kind, name
        _check_factors(name, a, b, kind, config, str(out_dir))
        for key, tensor in zip(_module_keys(name, kind), (a, b), strict=True):
            _add_tensor(tensors, key, tensor, str(out_dir))
    if not tensors:
        raise AdapterError(f"{out_dir}: the adapter has no modules; nothing to write")
    check_targets(config, written, str(out_dir))
    for key, tensor in (extra or {}).items():
        _add_tensor(tensors, key, tensor, str(out_dir))
    # Only the top level is sorted: of two patterns that match a module PEFT takes the first.
    text = json.dumps(dict(sorted(config.items())), indent=2, ensure_ascii=False) + "\n"
    with publish_folder(out_dir, force=force, owned=_peft_files) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        for name, data in (companions or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    return out_dir


@dataclass
class LoRAPair:
    """A module's kind, its name in the model that was trained, and its tensors by side, "A" and "B"."""

    kind: str
    trained: str
    sides: dict[str, StoredTensor]


def sort_tensors(
    header: Mapping[str, StoredTensor], config: Mapping[str, Any], where: str
) -> tuple[dict[str, LoRAPair], dict[str, StoredTensor]]:
    """LoRA tensors by module, and others by PEFT's name; refuse what is neither."""
    pairs: dict[str, LoRAPair] = {}
    whole: dict[str, StoredTensor] = {}
    adapters: Counter[str] = Counter()
    for key, stored in header.items():
        lora = parse_lora(key)
        if lora is None:
            check_extra_key(key, config, where)
            plain, adapter = parse_whole(key)
            if plain in whole:
                raise _twice(whole[plain].key, stored.key, where)
            whole[plain] = stored
        else:
            adapter = lora.adapter
            pair = pairs.setdefault(lora.module, LoRAPair(lora.kind, lora.trained, {}))
            if pair.kind != lora.kind or lora.side in pair.sides:
                raise _twice(next(iter(pair.sides.values())).key, stored.key, where)
            pair.sides[lora.side] = stored
        if adapter is not None:
            adapters[adapter] += 1
    if len(adapters) > 1:
        raise AdapterError(
            f"{where}: holds the adapters {some_of(map(repr, adapters))} at once; save each into a "
            "folder of its own with PEFT's save_pretrained"
        )
    _check_whole_pairs(pairs, where)
    return pairs, whole


def _check_whole_pairs(pairs: Mapping[str, LoRAPair], where: str) -> None:
    for name, pair in pairs.items():
        for side, other in (("A", "B"), ("B", "A")):
            if side not in pair.sides:
                raise AdapterError(
                    f"{where}: module {name!r} has lora_{other} but no lora_{side}; "
                    "the file is incomplete, save the adapter again"
                )


def _twice(first: str, second: str, where: str) -> AdapterError:
    return AdapterError(
        f"{where}: tensors {first!r} and {second!r} name the same module twice; remove one of them"
    )


def describe_module(name: str, pair: LoRAPair, config: Mapping[str, Any], where: str) -> LoRAModule:
    """A module, from its tensors' headers and the config; AdapterError where they contradict."""
    dtypes = []
    for stored in pair.sides.values():
        dtype = _LORA_DTYPES.get(stored.dtype)
        if dtype is None:
            raise AdapterError(
                f"{where}: tensor {stored.key!r} has dtype {stored.dtype}; LoRA weights must be "
                "float32, float16 or bfloat16"
            )
        dtypes.append(dtype)
    shape_a, shape_b = pair.sides["A"].shape, pair.sides["B"].shape
    _check_shapes(name, shape_a, shape_b, config, where)
    rank = shape_a[0]
    wrong = rank_fault(rank, shape_a[1], shape_b[0])
    if wrong:
        raise AdapterError(f"{where}: module {name!r}: {wrong}; refactor it into its true rank")
    alpha, scale = lora_scale(config, name, rank)
    if lora_scale(config, pair.trained, rank) != (alpha, scale):
        raise AdapterError(
            f"{where}: alpha_pattern gives {name!r} another alpha than the name in the file, "
            f"{pair.trained!r}; name the tensors as PEFT's save_pretrained does"
        )
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
        raise AdapterError(f"{where}: {shown}, not two matrices; {GATHER}")
    if shape_a[0] != shape_b[1]:
        raise AdapterError(f"{where}: {shown}, whose ranks differ; save the adapter again")
    if shape_a[0] != lora_rank(config, name):
        raise AdapterError(
            f"{where}: {shown}, rank {shape_a[0]}, but {CONFIG_FILE} says rank "
            f"{lora_rank(config, name)}; correct r or rank_pattern"
        )


def _describe_extra(stored: StoredTensor, where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype = _EXTRA_DTYPES.get(stored.dtype)
    if dtype is None:
        raise AdapterError(
            f"{where}: tensor {stored.key!r} has the unsupported dtype {stored.dtype}"
        )
    check_extra_shape(stored.key, stored.shape, where)
    return dtype, stored.shape


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
        return f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B"
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _add_tensor(
    tensors: dict[str, torch.Tensor], key: str, tensor: torch.Tensor, where: str
) -> None:
    if key in tensors:
        raise AdapterError(f"{where}: tensor {key!r} is given twice; name each module once")
    check_finite(tensor, key, where)
    # A copy, since safetensors refuses tensors that share memory (factors cut from one basis).
    tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()


def _peft_files(folder: Path) -> set[str] | None:
    """The files of an adapter's folder that ``force`` may replace; None where other files lie in it."""
    names = {entry.name for entry in folder.iterdir()}
    if CONFIG_FILE not in names or not names <= _PEFT_FILES | COMPANION_FILES:
        return None
    templates = {f"{TEMPLATES_FOLDER}/{path.name}" for path in folder.glob(f"{TEMPLATES_FOLDER}/*")}
    return names | {name for name in templates if is_companion(name)}
