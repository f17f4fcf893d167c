"""A tiny Llama in float32, real PEFT adapters of it, checkpoints of them, and stock vLLM's tokens.

Stock vLLM runs in a process of its own with plugins off, one request at a time: on CPU its mixed
batches give base requests the last slot's adapter, so they are no reference. The base model's tokens
come from an engine without LoRA for the same reason.

Model, adapters and tokens are kept in ``.cache/engine-world``, where they are made once for all
processes: none of them depends on this project's code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import engine_forks
import torch
from engine_forks import run_script
from filelock import FileLock

CACHE = Path(__file__).parents[2] / ".cache" / "engine-world"
ENGINE_ARGUMENTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 32,
}
# r, alpha, modules, and the rest of LoraConfig: every kind of layer, packed or not, mixed ranks.
ADAPTERS: dict[str, dict] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "everything": {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"down_proj": 5},
    },
    "rslora": {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"], "use_rslora": True},
    "half-packed": {"r": 16, "lora_alpha": 16, "target_modules": ["gate_proj", "k_proj"]},
    "output head/ü": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "lm_head"]},
    "embedding": {"r": 8, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
}
ORDINARY = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(9 + 4 * i)] for i in range(3)]
MAX_TOKENS = 10
PLAIN = "plain"


@dataclass(frozen=True)
class World:
    """Where everything lies; only ``root``, of this process, is for tests to write to."""

    root: Path
    model: Path
    adapters: dict[str, Path]
    ordinary: Path

    @cached_property
    def reference(self) -> dict[str, list[list[int]]]:
        """What stock vLLM answers: name -> a token list per prompt."""
        reference = stock_tokens(self.model, {}, PROMPTS)
        adapters = {**self.adapters, "ordinary": self.ordinary}
        reference |= stock_tokens(self.model, adapters, PROMPTS)
        assert len({tuple(t) for answers in reference.values() for t in answers}) == 3 * 8
        return reference

    def compress(
        self, name: str, tasks: dict[str, Path], force: bool = False, **options: Any
    ) -> Path:
        """A checkpoint ``name`` of PEFT folders."""
        from vllm_vlora.adapters.peft_folder import open_adapter
        from vllm_vlora.compression.options import CompressOptions
        from vllm_vlora.compression.pipeline import compress

        opened = {task: open_adapter(path) for task, path in tasks.items()}
        compress(opened, self.root / name, CompressOptions(**options), force=force)
        return self.root / name


def make_model(folder: Path, hidden: int = 128, seed: int = 0) -> Path:
    """A two-layer Llama whose greedy tokens differ between adapters, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w1")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, seed: int, **config: object) -> Path:
    """A PEFT folder with random factors large enough to change the tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(model), LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.25)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    save_plain(adapted, folder / PLAIN)
    return folder


def save_plain(adapted: Any, folder: Path) -> None:
    """The same adapter with every scale, as PEFT computes it, folded into B: alpha = r throughout.

    vLLM before 0.32 ignores rank_pattern and alpha_pattern, so it needs this form for a reference.
    """
    from peft.tuners.lora import LoraLayer

    for layer in adapted.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name, scale in layer.scaling.items():
            b = layer.lora_B[name].weight if name in layer.lora_B else layer.lora_embedding_B[name]
            b.data *= scale
    adapted.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"lora_alpha": config["r"], "use_rslora": False, "rank_pattern": {}}
    file.write_text(json.dumps(config | {"alpha_pattern": {}}))


STOCK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

def main():
    job = json.loads(sys.argv[1])
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16} if job["adapters"] else {}
    llm = LLM(job["model"], **lora, **job["arguments"])
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    answers = {}
    for number, (name, path) in enumerate((job["adapters"] or {"base": None}).items(), 1):
        request = LoRARequest(name, number, path) if path else None
        answers[name] = [
            list(llm.generate([{"prompt_token_ids": prompt}], sampling, lora_request=request,
                              use_tqdm=False)[0].outputs[0].token_ids)
            for prompt in job["prompts"]
        ]
    assert "vllm_vlora" not in sys.modules
    print("RESULT " + json.dumps(answers), flush=True)

if __name__ == "__main__":
    main()
"""


def stock_tokens(
    model: Path, adapters: dict[str, Path], prompts: list[list[int]]
) -> dict[str, list[list[int]]]:
    """Stock vLLM's greedy tokens: of the base model when ``adapters`` is empty."""
    job = {
        "arguments": ENGINE_ARGUMENTS,
        "max_tokens": MAX_TOKENS,
        "prompts": prompts,
    }
    folders = {name: for_stock(path) for name, path in adapters.items()}
    digests = {name: _digest(path) for name, path in [("", model), *folders.items()]}
    key = hashlib.sha256(json.dumps([job, digests]).encode()).hexdigest()[:32]
    job |= {"model": str(model), "adapters": {name: str(path) for name, path in folders.items()}}

    def ask(file: Path) -> None:
        # An empty list of plugins is stock vLLM; an empty checkpoint is none.
        answers = run_script(STOCK, json.dumps(job), VLLM_PLUGINS="", VLLM_VLORA_CHECKPOINT="")
        file.write_text(json.dumps(answers))

    return json.loads(once(_cache() / "tokens" / f"{key}.json", ask).read_text())


def for_stock(adapter: Path) -> Path:
    """The form of an adapter that the installed vLLM serves as PEFT does."""
    plain = adapter / PLAIN
    return plain if older_vllm(0, 32) and plain.exists() else adapter


def older_vllm(*release: int) -> bool:
    """Whether the installed vLLM is from before a release."""
    return tuple(map(int, _version("vllm").split("+")[0].split(".")[:2])) < release


def _digest(folder: Path) -> str:
    """Of everything that lies directly in a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(
        b"".join(hashlib.sha256(f.name.encode() + f.read_bytes()).digest() for f in files)
    ).hexdigest()


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``, which ``make`` made beside it unless it was there; one process at a time makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            beside = path.with_name(f"{path.name}.part")
            shutil.rmtree(beside, ignore_errors=True)
            make(beside)
            beside.rename(path)
    return path


@cache
def _cache() -> Path:
    """The folder of what these versions of the packages and of this file make."""
    key = hashlib.sha256()
    for package in ("vllm", "torch", "transformers", "peft"):
        key.update(_version(package).encode())
    for file in (__file__, engine_forks.__file__):
        key.update(Path(file).read_bytes())
    return CACHE / key.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return version(f"{package}-cpu")


def make_world(root: Path) -> World:
    """The model and the adapters, and ``root`` for what is made of them."""
    model = once(_cache() / "model", make_model)

    def make(folder: Path) -> None:
        for i, config in enumerate(ADAPTERS.values()):
            make_adapter(model, folder / str(i), 100 + i, **config)
        make_adapter(model, folder / "ordinary", 900, **ORDINARY)

    folder = once(_cache() / "adapters", make)
    adapters = {name: folder / str(i) for i, name in enumerate(ADAPTERS)}
    return World(root, model, adapters, folder / "ordinary")


def all_directions(adapters: dict[str, Path]) -> int:
    """Components of a basis of adapters that loses nothing of any module."""
    from vllm_vlora.adapters.collection import Collection
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.planning.survey import directions

    opened = {task: open_adapter(path) for task, path in adapters.items()}
    modules = Collection(opened).modules.values()
    return max(directions(module) for module in modules if module.kind == "linear")


def exact(world: World, representation: str) -> Path:
    """A checkpoint of all adapters that loses nothing but float32 rounding; made once."""
    name = f"exact-{representation}"
    if (world.root / name).exists():
        return world.root / name
    if representation == "joint":
        options: dict = {"num_components": all_directions(world.adapters)}
    else:
        options = {"ratio": 0.1}
    return world.compress(
        name,
        world.adapters,
        representation=representation,
        quantize="none",
        **options,
    )


def mixed(world: World) -> Path:
    """The exact tasks in one checkpoint: joint, private, or both over their modules; made once.

    Every basis is stored twice, as two clusters of tasks have theirs beside each other, and joint cores
    name the rows of one of the two.
    """
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.writer import CheckpointWriter
    from vllm_vlora.quantize import stack_rows
    from vllm_vlora.representations.stored import Basis

    folder = world.root / "exact-mixed"
    if folder.exists():
        return folder
    joint = Checkpoint.open(exact(world, "joint"))
    private = Checkpoint.open(exact(world, "private"))
    folder.mkdir()
    writer = CheckpointWriter(folder, joint.base_model)
    bases = dict(joint.bases())
    for module in joint.modules:
        basis = bases.get(module.name)
        if basis is not None:
            basis = Basis(stack_rows([basis.u] * 2), stack_rows([basis.v] * 2))
        writer.add_module(module.name, module.d_in, module.d_out, module.kind, basis)
    for number, task in enumerate(ADAPTERS):
        first, second = (joint, private) if number % 3 else (private, joint)
        modules = dict(first.load_task(task).modules)
        if number % 3 != 1:
            others = second.load_task(task).modules
            modules = {n: (others[n] if i % 2 else m) for i, (n, m) in enumerate(modules.items())}
        for name, stored in modules.items():
            if stored.representation == "joint":
                basis = bases[name]
                u, v = number % 2 * basis.u.rows, number % 2 * basis.v.rows
                rows = (u, u + basis.u.rows, v, v + basis.v.rows)
                modules[name] = replace(stored, rows=rows)
        writer.add_task(task, modules, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return folder


def family(world: World, count: int) -> Path:
    """``count`` tasks of different weights: interpolations, in core space, of two exact ones."""
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.writer import CheckpointWriter
    from vllm_vlora.quantize import pack
    from vllm_vlora.representations.decode import decode
    from vllm_vlora.representations.stored import StoredModule

    joint = Checkpoint.open(exact(world, "joint"))
    folder = world.root / f"family-{count}"
    folder.mkdir()
    writer = CheckpointWriter(folder, joint.base_model)
    bases = dict(joint.bases())
    names = [n for n in joint.load_task("attention").modules if n.endswith(("q_proj", "v_proj"))]
    for module in joint.modules:
        if module.name in names:
            writer.add_module(module.name, module.d_in, module.d_out, basis=bases[module.name])
    ends = [joint.load_task(task).modules for task in ("attention", "everything")]
    cores = {}
    for name in names:
        basis = bases[name]
        u, v = basis.u.parts["values"], basis.v.parts["values"]
        factors = [decode(end[name], basis) for end in ends]
        cores[name] = [(u @ b) @ (a @ v.T) for a, b in factors]
    for number in range(count):
        weight = number / count
        modules: dict[str, StoredModule] = {}
        for name in names:
            core = (1 - weight) * cores[name][0] + weight * cores[name][1]
            modules[name] = StoredModule(
                "joint", "float32", 12, {"C": pack(core, "float32")}, core="dense"
            )
        writer.add_task(f"task-{number}", modules, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return folder
