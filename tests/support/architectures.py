"""Tiny models of many architectures, PEFT adapters of what vLLM adapts in each, and what engines answer.

Every model is made from a transformers config, with random weights in float32. What is right comes from
PEFT on transformers, or from stock vLLM with PEFT's folders, one request at a time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_forks import run_script

VOCABULARY = 128
PROMPTS = [[(7 * i + 3 * j) % 120 + 2 for j in range(3 + 5 * i)] for i in range(3)]
MAX_TOKENS = 5
ENGINE_ARGUMENTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 32,
}
ORDINARY = "ordinary"
VOCABULARIES = "vocabulary"

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LINEAR = _ATTENTION + _MLP
_BOTH = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Architecture:
    """One model class as vLLM names it.

    Attributes:
        config: the name of the transformers config, and what it is made with.
        targets: what PEFT adapts of the language model, all of which runs direct.
        vocabularies: of embedding and output head what vLLM adapts; such tasks stand in slots.
        auto: the transformers class that makes the model.
        ask: what the engine is asked: to generate, or a pooling task.
        engine: further arguments of ``vllm.LLM``.
        noise: how far log-probabilities may lie from the reference.
    """

    name: str
    config: tuple[str, dict[str, Any]]
    targets: tuple[str, ...] = _LINEAR
    vocabularies: tuple[str, ...] = ()
    auto: str = "AutoModelForCausalLM"
    ask: str = "generate"
    engine: dict[str, Any] = field(default_factory=dict)
    noise: float = 5e-4

    @property
    def by_peft(self) -> bool:
        """Whether PEFT on transformers says what is right; otherwise stock vLLM does."""
        return self.ask == "generate"


def _config(name: str, *left_out: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    """A config of two layers; heads of 32 are the smallest of vLLM's attention on CPU."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    } | changes
    return name, {key: value for key, value in sizes.items() if key not in left_out}


_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1,
          "mamba_expand": 2, "mamba_chunk_size": 16}  # fmt: skip
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
_OPT = {"vocab_size": VOCABULARY, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense")

ARCHITECTURES = [
    Architecture("LlamaForCausalLM", _config("LlamaConfig", attention_bias=True, mlp_bias=True),
                 vocabularies=_BOTH),
    Architecture("MistralForCausalLM", _config("MistralConfig", sliding_window=8)),
    Architecture("Qwen2ForCausalLM", _config("Qwen2Config")),
    Architecture("Qwen3ForCausalLM", _config("Qwen3Config", head_dim=32), vocabularies=_BOTH),
    Architecture("Gemma2ForCausalLM", noise=1e-2, config=_config(
        "Gemma2Config", head_dim=32, query_pre_attn_scalar=32, **_SLIDING)),
    Architecture("Gemma3ForCausalLM", _config(
        "Gemma3TextConfig", head_dim=32, query_pre_attn_scalar=32, **_SLIDING)),
    Architecture("Phi3ForCausalLM", _config("Phi3Config"), vocabularies=_BOTH,
                 targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    Architecture("OPTForCausalLM", ("OPTConfig", _OPT),
                 ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    # Stock vLLM leaves an adapter's c_attn out without a word; here it is refused.
    Architecture("GPTBigCodeForCausalLM", ("GPTBigCodeConfig", _GPT), ("c_proj", "c_fc")),
    Architecture("CohereForCausalLM", _config("CohereConfig"), vocabularies=("embed_tokens",)),
    Architecture("GraniteForCausalLM", _config("GraniteConfig"), vocabularies=_BOTH),
    # vLLM wants gate_proj and up_proj here, and transformers has gate_up_proj.
    Architecture("Glm4ForCausalLM", _config("Glm4Config", head_dim=32),
                 (*_ATTENTION, "down_proj")),
    Architecture("Olmo2ForCausalLM", _config("Olmo2Config")),
    Architecture("NemotronForCausalLM", _config("NemotronConfig"),
                 (*_ATTENTION, "up_proj", "down_proj"), vocabularies=_BOTH),
    Architecture("Exaone4ForCausalLM", _config("Exaone4Config"), vocabularies=_BOTH),
    Architecture("GraniteMoeHybridForCausalLM", vocabularies=_BOTH,
                 targets=(*_ATTENTION, "in_proj", "out_proj", "input_linear", "output_linear"),
                 config=_config("GraniteMoeHybridConfig", layer_types=["mamba", "attention"],
                                num_local_experts=0, num_experts_per_tok=0,
                                shared_intermediate_size=96, position_embedding_type="rope",
                                **_MAMBA)),
    Architecture("FalconH1ForCausalLM", targets=(*_LINEAR, "in_proj"), vocabularies=_BOTH,
                 config=_config("FalconH1Config", head_dim=32, mamba_d_ssm=128, **_MAMBA)),
    Architecture("NemotronHForCausalLM", vocabularies=_BOTH, noise=2e-3,
                 targets=(*_ATTENTION, "in_proj", "up_proj", "down_proj"),
                 config=_config("NemotronHConfig", num_hidden_layers=3, head_dim=32,
                                layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=4,
                                mamba_head_dim=32, ssm_state_size=16, n_groups=1, chunk_size=16)),
    Architecture("Qwen3ForCausalLM, embedding", _config("Qwen3Config", head_dim=32),
                 auto="AutoModel", ask="embed", engine={"runner": "pooling"}),
    Architecture("BertModel", _config("BertConfig", "num_key_value_heads"), _BERT,
                 auto="AutoModel", ask="embed"),
    Architecture("ModernBertModel", targets=("Wqkv", "Wi", "Wo"), auto="AutoModel", ask="embed",
                 config=_config("ModernBertConfig", "num_key_value_heads", local_attention=16,
                                cls_token_id=2, sep_token_id=3)),
    Architecture("LlamaForSequenceClassification", _config("LlamaConfig", num_labels=3),
                 auto="AutoModelForSequenceClassification", ask="classify",
                 engine={"runner": "pooling"}),
    Architecture("RobertaForSequenceClassification", auto="AutoModelForSequenceClassification",
                 ask="classify", targets=("query", "key", "value", "attention.output.dense"),
                 config=_config("RobertaConfig", "num_key_value_heads", num_labels=3,
                                max_position_embeddings=140)),
]  # fmt: skip
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


# --- models ----------------------------------------------------------------------------------------


def write_model(architecture: Architecture, folder: Path) -> Path:
    """The model with random weights of such a size that its layers tell."""
    import transformers

    name, options = architecture.config
    torch.manual_seed(0)
    model = getattr(transformers, architecture.auto).from_config(
        getattr(transformers, name)(**options), dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
        else:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    _make_tokenizer().save_pretrained(folder)
    return folder


def _make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "w0", "unk_token": "w1", "pad_token": "w1"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# --- adapters --------------------------------------------------------------------------------------


def write_adapters(architecture: Architecture, model: Path, root: Path) -> dict[str, Path]:
    """Tasks of every kind by their names; ``ORDINARY`` is not for the checkpoint."""
    targets = architecture.targets
    kinds: dict[str, tuple[Iterable[str], dict[str, Any]]] = {
        "joint-1": (targets, {"r": 4, "lora_alpha": 6}),
        "joint-2": (targets, {"r": 2, "lora_alpha": 3, "use_rslora": True}),
        "joint-3": (targets[::2], {"r": 3, "lora_alpha": 3}),
        "private-1": (targets, {"r": 8, "lora_alpha": 6}),
        "private-2": (targets[1::2], {"r": 5, "lora_alpha": 8}),
        ORDINARY: (targets, {"r": 4, "lora_alpha": 4}),
    }
    if architecture.vocabularies:
        modules = (targets[0], *architecture.vocabularies)
        kinds[VOCABULARIES] = (modules, {"r": 4, "lora_alpha": 6})
    for number, (name, (modules, config)) in enumerate(kinds.items()):
        config |= {"target_modules": [*modules]}
        write_adapter(architecture, model, root / name, number, **config)
    return {name: root / name for name in kinds}


def write_adapter(
    architecture: Architecture, model: Path, folder: Path, seed: int, **config: Any
) -> Path:
    """A PEFT folder with random factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(_load(architecture, model), LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _load(architecture: Architecture, model: Path) -> Any:
    import transformers

    auto = getattr(transformers, architecture.auto)
    return auto.from_pretrained(model, dtype=torch.float32).eval()


def write_checkpoint(adapters: dict[str, Path], root: Path) -> Path:
    """Joint tasks and private ones in one checkpoint, which loses nothing but float32's rounding."""
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.checkpoint.reader import Checkpoint
    from vllm_vlora.checkpoint.writer import CheckpointWriter
    from vllm_vlora.compression.options import CompressOptions
    from vllm_vlora.compression.pipeline import compress

    joint = {name: path for name, path in adapters.items() if name.startswith("joint")}
    private = {name: path for name, path in adapters.items() if name not in (*joint, ORDINARY)}
    parts = []
    for tasks, options in (
        (joint, CompressOptions(num_components=9, quantize="none")),
        (private, CompressOptions(representation="private", ratio=0.1, quantize="none")),
    ):
        folder = root / f"part-{len(parts)}"
        compress({name: open_adapter(path) for name, path in tasks.items()}, folder, options)
        parts.append(Checkpoint.open(folder))
    folder = root / "checkpoint"
    folder.mkdir()
    writer = CheckpointWriter(folder, parts[0].base_model)
    bases = dict(parts[0].bases())
    for spec in {spec.name: spec for part in reversed(parts) for spec in part.modules}.values():
        writer.add_module(spec.name, spec.d_in, spec.d_out, spec.kind, bases.get(spec.name))
    for part in parts:
        for task in part.tasks:
            modules = dict(part.load_task(task).modules)
            writer.add_task(task, modules, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    return folder


# --- what is right ---------------------------------------------------------------------------------

Answers = dict[str, tuple[list[int], list[list[float]]]]
"""Name and number of a prompt -> tokens, and each step's log-probabilities (or what is pooled)."""


def ask_peft(architecture: Architecture, model: Path, adapters: dict[str, Path]) -> Answers:
    """What PEFT on transformers answers in float32, one prompt at a time and without a cache."""
    from peft import PeftModel

    answers: Answers = {}
    for name in ("base", *adapters):
        loaded = _load(architecture, model)
        if name in adapters:
            loaded = PeftModel.from_pretrained(loaded, adapters[name]).eval()
        for number, prompt in enumerate(PROMPTS):
            answers[f"{name} {number}"] = _greedy(loaded, prompt)
    return answers


def _greedy(loaded: Any, prompt: list[int]) -> tuple[list[int], list[list[float]]]:
    tokens, steps = [*prompt], []
    with torch.no_grad():
        for _ in range(MAX_TOKENS):
            logits = loaded(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            steps.append(logits.log_softmax(-1).tolist())
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], steps


_ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

def look(worker):
    manager = worker.model_runner.lora_manager._adapter_manager
    layers = [type(layer).__name__ for layer in manager.modules.values()]
    store = getattr(manager, "vlora_store", None)
    tasks = [] if store is None else store.tasks()
    return {"obstacles": {task.task_id: task.obstacle for task in tasks}, "layers": layers}

def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_lora=True, max_lora_rank=8, **job["engine"])
    requests = {"base": None}
    for number, (name, path) in enumerate(job["adapters"].items(), 1):
        requests[name] = LoRARequest(name, number, path)
    if job["checkpoint"]:
        from vllm_vlora import lora_request
        requests |= {name: lora_request(job["checkpoint"], name) for name in job["tasks"]}
    assert job["checkpoint"] or "vllm_vlora" not in sys.modules
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True,
                              detokenize=False, logprobs=-1)

    def ask(items):
        options = {"lora_request": [requests[name] for name, _ in items], "use_tqdm": False}
        prompts = [{"prompt_token_ids": job["prompts"][number]} for _, number in items]
        if job["ask"] != "generate":
            for done in llm.encode(prompts, pooling_task=job["ask"], **options):
                yield [], [done.outputs.data.flatten().tolist()]
            return
        for done in llm.generate(prompts, sampling, **options):
            output = done.outputs[0]
            steps = [[step[i].logprob for i in range(len(step))] for step in output.logprobs]
            yield list(output.token_ids), steps

    batches = [job["items"]] if job["checkpoint"] else [[item] for item in job["items"]]
    answers = {f"{name} {number}": answer for batch in batches
               for (name, number), answer in zip(batch, ask(batch))}
    found, = llm.collective_rpc(look)
    print("RESULT " + json.dumps([answers, found]), flush=True)

if __name__ == "__main__":
    main()
"""


def ask_stock(architecture: Architecture, model: Path, adapters: dict[str, Path]) -> Answers:
    """What stock vLLM answers, one by one.

    The base model comes first: on CPU its requests get what lies in the last slot.
    """
    items = [(name, number) for name in ("base", *adapters) for number in range(len(PROMPTS))]
    job = {"adapters": _texts(adapters), "items": items, "checkpoint": "", "tasks": []}
    answers, _ = _ask(architecture, model, job, slots=1, VLLM_PLUGINS="")
    return answers


def ask_ours(
    architecture: Architecture, model: Path, adapters: dict[str, Path], checkpoint: Path, mode: str
) -> tuple[Answers, dict[str, Any]]:
    """What an engine with the plugin answers to everything in one batch, and what it is made of.

    The latter: "obstacles", task -> why it is materialized, and "layers", the classes of LoRA layers.
    """
    tasks = [name for name in adapters if name != ORDINARY]
    items = [(name, number) for name in ("base", *adapters) for number in range(len(PROMPTS))]
    random.Random(0).shuffle(items)
    ordinary = {ORDINARY: adapters[ORDINARY]}
    job = {"adapters": _texts(ordinary), "items": items, "tasks": tasks}
    return _ask(
        architecture,
        model,
        {**job, "checkpoint": str(checkpoint)},
        slots=8,
        VLLM_VLORA_CHECKPOINT=str(checkpoint),
        VLLM_VLORA_MODE=mode,
    )


def _texts(paths: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}


def _ask(
    architecture: Architecture, model: Path, job: dict[str, Any], slots: int, **environment: str
) -> tuple[Answers, dict[str, Any]]:
    generates = {"max_logprobs": -1} if architecture.ask == "generate" else {}
    arguments = {**ENGINE_ARGUMENTS, "max_loras": slots, **generates, **architecture.engine}
    job |= {
        "model": str(model),
        "engine": arguments,
        "ask": architecture.ask,
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
    }
    answers, found = run_script(
        _ENGINE,
        json.dumps(job),
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # To send a function to the worker.
        **{"VLLM_VLORA_CHECKPOINT": "", **environment},
    )
    return answers, found


def distances(answers: Answers, right: Answers) -> dict[str, float]:
    """For each name how far it lies from what is right, at most, over its prompts and steps."""
    found: dict[str, float] = {}
    for key, (_, steps) in answers.items():
        name = key.rsplit(" ", 1)[0]
        far = float((torch.tensor(steps) - torch.tensor(right[key][1])).abs().max())
        found[name] = max(found.get(name, 0), far)
    return found
