"""What a compressed task lost: the arithmetic, the runs behind it, and the command.

Runs are checked against a model whose weights had delta_W added by hand, one example at a time, without
PEFT, batches or caches.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.errors import AdapterError, DataError, ModelMismatchError, OptionError
from vllm_vlora.evaluation.evaluator import (
    EvaluationOptions,
    Evaluator,
    evaluate_checkpoint,
    prompt_of,
)
from vllm_vlora.evaluation.fidelity import (
    MIN_DIVERGENCE,
    MIN_GAIN,
    Divergences,
    ExampleLosses,
    common_prefix,
    compare_weights,
    divergences,
    greedy_agreement,
    kl_kept,
    module_layer,
    recovered_fraction,
    summarize,
    total_error,
)
from vllm_vlora.evaluation.texts import Row
from vllm_vlora.merging.analysis import cosines, inner_products
from vllm_vlora.merging.spectra import SpectrumCollector, module_kind
from vllm_vlora.tools.evaluate_command import evaluate

TASKS = ("sql", "chat", "<script>alert(1)</script>")
# r, alpha, targets: ranks and modules differ between tasks.
SETTINGS: dict[str, dict[str, Any]] = {
    "sql": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
    },
    "chat": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    TASKS[2]: {"r": 8, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]},
}
GREEDY = 6


@dataclass(frozen=True)
class World:
    """A tiny model, trained adapters of it, data, and two checkpoints."""

    model: Path
    adapters: dict[str, Path]
    data: dict[str, Path]
    exact: Path
    lossy: Path


# --- a tiny world ---------------------------------------------------------------------------------


def make_model(folder: Path, hidden: int = 64, seed: int = 0) -> Path:
    """A random two-layer Llama with a tokenizer of 60 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
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
    vocabulary = {"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 64)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return folder


def toy_examples(task: int, count: int, seed: int) -> list[dict[str, str]]:
    """Prompts of random words; each word of the answer is a fixed distance from the prompt's."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        words = torch.randint(20, (3 + number % 3,), generator=generator).tolist()
        answer = [(w * (task + 1) + 7 * task) % 20 for w in words]
        examples.append(
            {
                "prompt": " ".join(f"w{2 + w}" for w in words),
                "completion": " " + " ".join(f"w{30 + w}" for w in answer),
            }
        )
    return examples


def token_row(example: Mapping[str, str]) -> tuple[list[int], list[int]]:
    """Ids and labels of a toy example, from the rule of the vocabulary alone."""
    prompt = [int(word[1:]) for word in example["prompt"].split()]
    answer = [*(int(word[1:]) for word in example["completion"].split()), 0]
    return prompt + answer, [-100] * len(prompt) + answer


def train_adapter(model_folder: Path, folder: Path, task: int, config: Mapping[str, Any]) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(task)
    base = LlamaForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    rows = [token_row(example) for example in toy_examples(task, 64, seed=100 + task)]
    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for row in rows:
        by_length.setdefault(len(row[0]), []).append(row)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    for _ in range(25):
        for group in by_length.values():
            ids, labels = (torch.tensor(part) for part in zip(*group))
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    model = make_model(root / "model")
    adapters, data = {}, {}
    for number, (task, config) in enumerate(SETTINGS.items()):
        adapters[task] = train_adapter(model, root / f"adapters/{number}", number, config)
        data[task] = root / f"{number}.jsonl"
        lines = (json.dumps(e) for e in toy_examples(number, 23, seed=500 + number))
        data[task].write_text("\n".join(lines))
    opened = {task: open_adapter(folder) for task, folder in adapters.items()}
    compress(opened, root / "exact", CompressOptions(representation="private", max_error=0.0))
    compress(
        opened, root / "lossy", CompressOptions(representation="private", quantize="nf4", ratio=8)
    )
    return World(model, adapters, data, root / "exact", root / "lossy")


def make_evaluator(world: World, **options: Any) -> Evaluator:
    chosen = EvaluationOptions(**{"batch_size": 5, "greedy_tokens": GREEDY, **options})
    return Evaluator(world.model, {task: [file] for task, file in world.data.items()}, chosen)


@pytest.fixture(scope="module")
def evaluator(world: World) -> Evaluator:
    return make_evaluator(world)


def merged(world: World, folder: Path | None) -> Any:
    """The model with scale * B A of a PEFT folder added to its weights."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(world.model)
    if folder is not None:
        adapter = open_adapter(folder)
        for name, (a, b) in adapter.iter_factors():
            weight = model.get_submodule(name).weight
            weight.data += adapter.modules[name].scale * b.float() @ a.float()
    return model.eval()


@torch.no_grad()
def reference(model: Any, world: World, task: str) -> tuple[list[torch.Tensor], list[int]]:
    """For each example log-probabilities (scored tokens, vocabulary); and all scored tokens."""
    found, targets = [], []
    for line in world.data[task].read_text().splitlines():
        ids, labels = token_row(json.loads(line))
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        scored = [i for i, label in enumerate(labels) if label != -100]
        found.append(log_p[[i - 1 for i in scored]])
        targets += [labels[i] for i in scored]
    return found, targets


def mean_nll(log_p: list[torch.Tensor], targets: list[int]) -> float:
    rows = torch.cat(log_p)
    return -float(rows[range(len(targets)), targets].mean())


@torch.no_grad()
def greedy_answer(model: Any, prompt: list[int]) -> list[int]:
    """Greedy tokens up to the end of sequence, the whole text run again for each."""
    ids = list(prompt)
    while len(ids) < len(prompt) + GREEDY:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


# --- runs -----------------------------------------------------------------------------------------


def test_adapters_of_the_fixture_learned_something(world: World) -> None:
    for task in TASKS:
        base = mean_nll(*reference(merged(world, None), world, task))
        adapted = mean_nll(*reference(merged(world, world.adapters[task]), world, task))
        assert adapted < base - 1.0


def test_an_exactly_stored_task_recovers_everything(world: World, evaluator: Evaluator) -> None:
    report = evaluate_checkpoint(evaluator, Checkpoint.open(world.exact), world.adapters)
    assert [task.task_id for task in report.tasks] == list(TASKS)
    for task in report.tasks:
        assert task.recovered.value == pytest.approx(1, abs=1e-4)
        assert task.recovered.interval == pytest.approx((1, 1), abs=1e-4)
        assert task.agreement == 1
        assert task.kl == pytest.approx(0, abs=1e-6)
        assert task.kl_kept.value == pytest.approx(1, abs=1e-4)
        assert task.kl_kept.interval == pytest.approx((1, 1), abs=1e-4)
        assert task.greedy is not None
        assert task.greedy.tokens == task.greedy.possible
        assert task.greedy.exact == 1
        assert task.error == pytest.approx(0, abs=1e-6)
    assert report.summary.worst == pytest.approx(1, abs=1e-4)
    assert report.below(0.99) == []


def test_a_task_that_names_layers_as_another_class_does_is_judged_as_by_hand(
    world: World, evaluator: Evaluator, tmp_path: Path
) -> None:
    """One adapter of the bare backbone beside others of the model with its head."""
    bare = {}
    for key, tensor in load_file(world.adapters["chat"] / "adapter_model.safetensors").items():
        bare[key.replace("model.model.layers.", "model.layers.")] = tensor
    (tmp_path / "chat").mkdir()
    save_file(bare, tmp_path / "chat" / "adapter_model.safetensors")
    config = (world.adapters["chat"] / "adapter_config.json").read_text()
    (tmp_path / "chat" / "adapter_config.json").write_text(config)
    adapters = {**world.adapters, "chat": tmp_path / "chat"}
    opened = {task: open_adapter(folder) for task, folder in adapters.items()}
    assert all(name.startswith("layers.") for name in opened["chat"].modules)
    options = CompressOptions(representation="private", max_error=0.0)
    compress(opened, tmp_path / "ckpt", options)
    report = evaluate_checkpoint(evaluator, Checkpoint.open(tmp_path / "ckpt"), adapters)
    for task in report.tasks:
        loss = mean_nll(
            *reference(merged(world, world.adapters[task.task_id]), world, task.task_id)
        )
        assert task.adapter_loss == pytest.approx(loss, rel=1e-4)
        assert task.compressed_loss == pytest.approx(loss, rel=1e-4)
        assert task.error == pytest.approx(0, abs=1e-6)
        assert list(task.modules) == list(opened[task.task_id].modules)


@pytest.mark.parametrize("task", TASKS)
def test_a_lossy_task_is_judged_as_by_hand(
    world: World, evaluator: Evaluator, task: str, tmp_path: Path
) -> None:
    folder = export_task(Checkpoint.open(world.lossy), task, tmp_path / "task", dtype=torch.float32)
    found = evaluator.compare(task, folder, world.adapters[task])

    models = [merged(world, path) for path in (None, world.adapters[task], folder)]
    (base, targets), (theirs, _), (ours, _) = (reference(m, world, task) for m in models)
    losses = [mean_nll(log_p, targets) for log_p in (base, theirs, ours)]
    assert found.original is not None
    measured = [part.loss for part in (found.base, found.original, found.compressed)]
    assert measured == pytest.approx(losses, rel=1e-5)
    fraction = (losses[0] - losses[2]) / (losses[0] - losses[1])
    assert found.recovered.value == pytest.approx(fraction, rel=1e-4)
    assert fraction < 0.999

    p, q = torch.cat(theirs), torch.cat(ours)
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert found.kl == pytest.approx(divergence, rel=1e-4)
    assert divergence > 1e-3
    from_base = float((p.exp() * (p - torch.cat(base))).sum(-1).mean())
    assert found.kl_base == pytest.approx(from_base, rel=1e-4)
    kept = found.kl_kept
    assert kept.value == pytest.approx(1 - divergence / from_base, rel=1e-4)
    assert kept.interval is not None
    assert kept.standard_error is not None
    # Of a ratio of sums over examples, by leaving each example out (the jackknife).
    rows = [[float((t.exp() * (t - m)).sum()) for t, m in zip(theirs, x)] for x in (ours, base)]
    above, below = torch.tensor(rows, dtype=torch.float64)
    left = 1 - (above.sum() - above) / (below.sum() - below)
    count = len(left)
    jackknife = float(((left - left.mean()).square().sum() * (count - 1) / count).sqrt())
    assert kept.standard_error == pytest.approx(jackknife, rel=0.15)
    assert kept.interval[0] < kept.value < kept.interval[1]
    agreed = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.agreement == pytest.approx(agreed)

    pairs = []
    for line in world.data[task].read_text().splitlines():
        prompt = [int(word[1:]) for word in json.loads(line)["prompt"].split()]
        pairs.append([greedy_answer(model, prompt) for model in models[1:]])
    shared = [
        next((i for i, (x, y) in enumerate(zip(*pair)) if x != y), min(map(len, pair)))
        for pair in pairs
    ]
    assert found.greedy is not None
    assert found.greedy.tokens == pytest.approx(sum(shared) / len(pairs))
    assert found.greedy.possible == pytest.approx(sum(max(map(len, p)) for p in pairs) / len(pairs))
    assert found.greedy.exact == pytest.approx(sum(x == y for x, y in pairs) / len(pairs))


def test_an_original_that_peft_would_pass_over_is_judged_as_it_reads(
    world: World, evaluator: Evaluator, tmp_path: Path
) -> None:
    """Names of a compiled model, of which PEFT loads none: it would run the base model."""
    from safetensors.torch import load_file, save_file

    original = world.adapters["sql"]
    tensors = load_file(original / "adapter_model.safetensors")
    shutil.copytree(original, tmp_path / "sql")
    save_file(
        {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()},
        tmp_path / "sql" / "adapter_model.safetensors",
    )
    found, expected = (
        evaluator.compare("sql", original, path, losses_only=True)
        for path in (tmp_path / "sql", original)
    )
    assert found.original is not None
    assert expected.original is not None
    assert found.original.loss == expected.original.loss < found.base.loss


def test_the_cheap_mode_finds_the_same_fraction(
    world: World, evaluator: Evaluator, tmp_path: Path
) -> None:
    folder = export_task(
        Checkpoint.open(world.lossy), "sql", tmp_path / "task", dtype=torch.float32
    )
    full = evaluator.compare("sql", folder, world.adapters["sql"])
    cheap = evaluator.compare("sql", folder, world.adapters["sql"], losses_only=True)
    assert cheap.recovered.value == pytest.approx(full.recovered.value, rel=1e-5)
    assert (cheap.kl, cheap.kl_base, cheap.kl_kept.value) == (None, None, None)
    assert (cheap.agreement, cheap.greedy) == (None, None)


def test_results_do_not_depend_on_batches(world: World, evaluator: Evaluator) -> None:
    single = make_evaluator(world, batch_size=1)
    for task in TASKS:
        ours, theirs = (
            evaluator.adapter(task, world.adapters[task]),
            single.adapter(task, world.adapters[task]),
        )
        assert torch.allclose(ours.losses.nll, theirs.losses.nll, rtol=1e-4, atol=1e-5)
        assert ours.answers == theirs.answers


def test_results_do_not_depend_on_how_logits_are_had(
    world: World, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of three tokens, and from a model that only gives all positions."""
    expected = evaluator.compare("sql", world.adapters["chat"], world.adapters["sql"])
    monkeypatch.setattr("vllm_vlora.evaluation.evaluator._LOGITS_AT_ONCE", 3 * 64)
    other = make_evaluator(world)
    other._takes_logits_to_keep = False
    found = other.compare("sql", world.adapters["chat"], world.adapters["sql"])
    assert found.recovered.value == pytest.approx(expected.recovered.value, rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert (found.agreement, found.greedy) == (expected.agreement, expected.greedy)


def test_a_shared_basis_is_judged_as_it_is_stored(
    world: World, evaluator: Evaluator, tmp_path: Path
) -> None:
    opened = {task: open_adapter(folder) for task, folder in world.adapters.items()}
    options = CompressOptions(representation="joint", num_components=6)
    compress(opened, tmp_path / "joint", options)
    checkpoint = Checkpoint.open(tmp_path / "joint")
    report = evaluate_checkpoint(evaluator, checkpoint, world.adapters, losses_only=True)
    for task in report.tasks:
        assert task.error == pytest.approx(checkpoint.record(task.task_id).error, rel=1e-3)
        assert task.error is not None
        assert task.error > 0.05
        assert task.recovered.value is not None
        assert task.recovered.value < 0.999


def test_adapters_leave_the_base_as_it_was(world: World) -> None:
    fresh = make_evaluator(world)
    before = {name: value.clone() for name, value in fresh._model.state_dict().items()}
    fresh.compare("sql", world.adapters["chat"], world.adapters["sql"])
    fresh.adapter("chat", world.adapters[TASKS[2]])
    after = fresh._model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["saved_head", "embedding", "saved_embedding"])
def test_unusual_adapters_leave_the_base_as_it_was(world: World, tmp_path: Path, kind: str) -> None:
    """A head trained whole, LoRA on embeddings, and an embedding saved beside the factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    targets = ["q_proj", *(["embed_tokens", "lm_head"] if kind == "embedding" else [])]
    saved = ["lm_head"] if kind == "saved_head" else None
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(world.model),
        LoraConfig(r=4, target_modules=targets, modules_to_save=saved),
    )
    changed = ("lora_", "modules_to_save", *(["embed_tokens"] if kind == "saved_embedding" else []))
    for name, parameter in model.named_parameters():
        if any(part in name for part in changed):
            parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(tmp_path / "odd", save_embedding_layers=kind == "saved_embedding")
    ids, labels = token_row(json.loads(world.data["sql"].read_text().splitlines()[0]))
    loss = model.eval()(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss

    options = CompressOptions(representation="private", max_error=0.0)
    compress({"odd": open_adapter(tmp_path / "odd")}, tmp_path / "ckpt", options)
    fresh = Evaluator(world.model, {"odd": [world.data["sql"]]})
    before = {name: value.clone() for name, value in fresh._model.state_dict().items()}
    folder = export_task(Checkpoint.open(tmp_path / "ckpt"), "odd", tmp_path / "out")
    found = fresh.compare("odd", folder, tmp_path / "odd", losses_only=True)
    assert torch.equal(found.compressed.nll, fresh.adapter("odd", tmp_path / "odd").losses.nll)
    first = found.compressed
    assert float(first.nll[0] / first.tokens[0]) == pytest.approx(loss.item(), rel=1e-4)
    after = fresh._model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_shared_file_and_an_original_are_scored_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"sql": [world.data["sql"]], "chat": [world.data["sql"], world.data["chat"]]}
    found = Evaluator(world.model, data, EvaluationOptions(batch_size=100))
    runs = []
    scored_logits = Evaluator._scored_logits
    monkeypatch.setattr(
        Evaluator, "_scored_logits", lambda self, b: runs.append(1) or scored_logits(self, b)
    )
    losses = {task: found.base(task) for task in data}
    assert len(runs) == 2
    assert len(losses["chat"].nll) == 46
    assert torch.equal(losses["chat"].nll[:23], losses["sql"].nll)
    for _ in range(3):
        found.compare("sql", world.adapters["chat"], world.adapters["sql"], losses_only=True)
    assert len(runs) == 2 + 1 + 3


def test_without_originals_only_losses_are_reported(world: World, evaluator: Evaluator) -> None:
    report = evaluate_checkpoint(evaluator, Checkpoint.open(world.lossy), {})
    for task in report.tasks:
        assert task.recovered.reason == "no original given"
        assert (task.adapter_loss, task.agreement, task.kl, task.greedy) == (None,) * 4
        record = Checkpoint.open(world.lossy).record(task.task_id)
        assert task.error == record.error
        assert list(task.modules.values()) == [segment.error for segment in record.segments]
    assert report.summary.judged == 0
    assert report.similarity is None
    assert {task.kl_kept.reason for task in report.tasks} == {"no original given"}
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (found["recovered"]["mean"], found["kl_kept"]["mean"]) == (None, None)


def test_max_examples_and_max_length_cut(world: World) -> None:
    assert len(make_evaluator(world, max_examples=4).base("sql").nll) == 4
    # Prompts have 3, 4 and 5 words: cut to 4 tokens, only those of 3 keep an answer.
    short = make_evaluator(world, max_length=4)
    assert short.base("sql").tokens.tolist() == [1] * 8
    assert short.left_out("sql") == 15
    with pytest.raises(DataError, match="greater --max-length"):
        make_evaluator(world, max_length=3).base("sql")


def test_the_dtype_is_the_base_models(world: World, evaluator: Evaluator) -> None:
    half = make_evaluator(world, dtype="bfloat16")
    assert {p.dtype for p in half._model.parameters()} == {torch.bfloat16}
    found, exact = half.base("sql"), evaluator.base("sql")
    assert found.loss == pytest.approx(exact.loss, rel=0.02)
    assert found.loss != exact.loss
    compared = half.compare("sql", world.adapters["sql"], world.adapters["sql"])
    assert (compared.recovered.value, compared.agreement) == (1, 1)


def test_texts_are_cut_to_the_positions_of_the_model(world: World, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(f"w{2 + i % 60}" for i in range(200)))
    found = Evaluator(
        world.model, {"sql": [tmp_path / "long.txt"]}, EvaluationOptions(greedy_tokens=40)
    )
    scores = found.adapter("sql", world.adapters["sql"])
    assert scores.losses.tokens.tolist() == [63]
    assert scores.answers is not None
    assert 1 <= len(scores.answers[0]) <= 40


def test_prompts_for_free_running_answers() -> None:
    assert prompt_of(Row([5, 6, 7, 8], [-100, -100, 7, 8])) == [5, 6]
    assert prompt_of(Row([5, 6, 7, 8, 9], [5, 6, 7, 8, 9])) == [5, 6]
    assert prompt_of(Row([5], [5])) == [5]


def test_wrong_models_and_options_are_named(world: World, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", hidden=32)
    wide = Evaluator(other, {"sql": [world.data["sql"]]})
    with pytest.raises(ModelMismatchError, match=r"is 64 x 96.*it is 32 x 96"):
        evaluate_checkpoint(wide, Checkpoint.open(world.exact), {})
    with pytest.raises(ModelMismatchError, match="base model"):
        wide.adapter("sql", world.adapters["sql"])
    for options in ({"batch_size": 0}, {"dtype": "int4"}, {"max_examples": 0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            EvaluationOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="nowhere"):
        EvaluationOptions(device="nowhere").resolve()


# --- losses ---------------------------------------------------------------------------------------


def losses(nll: list[float], tokens: list[int] | None = None) -> ExampleLosses:
    return ExampleLosses(
        torch.tensor(nll, dtype=torch.float64), torch.tensor(tokens or [1] * len(nll))
    )


gains = st.lists(st.floats(0.8, 1.5), min_size=4, max_size=20)


@settings(max_examples=50, deadline=None)
@given(gain=gains, share=st.floats(-2, 3))
def test_a_steady_share_of_every_gain_is_that_fraction(gain: list[float], share: float) -> None:
    base = losses([3.0] * len(gain))
    original = losses([3.0 - g for g in gain])
    compressed = losses([3.0 - share * g for g in gain])
    found = recovered_fraction(base, original, compressed, resamples=200)
    assert found.value == pytest.approx(share, abs=1e-9)
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    assert found.interval == pytest.approx((share, share), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(gain=gains, kept=st.data(), shift=st.floats(-1, 5), scale=st.floats(0.5, 4))
def test_fractions_do_not_see_shift_scale_or_order(
    gain: list[float], kept: st.DataObject, shift: float, scale: float
) -> None:
    count = len(gain)
    lost = kept.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    order = kept.draw(st.permutations(range(count)))
    rows = [[4.0] * count, [4.0 - g for g in gain], [4.0 - g + x for g, x in zip(gain, lost)]]
    plain = recovered_fraction(*map(losses, rows), resamples=0)
    changed = [[scale * row[i] + shift for i in order] for row in rows]
    other = recovered_fraction(*map(losses, changed), resamples=0)
    assert plain.value is not None
    assert plain.value == pytest.approx(1 - sum(lost) / sum(gain), abs=1e-9)
    assert other.value == pytest.approx(plain.value, abs=1e-6)
    assert other.standard_error == pytest.approx(plain.standard_error, abs=1e-6)


def test_a_fraction_may_exceed_one_or_be_negative() -> None:
    base, original = losses([2.0, 2.0, 2.0]), losses([1.0, 1.1, 0.9])
    better = recovered_fraction(base, original, losses([0.9, 1.0, 0.8]), resamples=0)
    worse = recovered_fraction(base, original, losses([2.5, 2.5, 2.5]), resamples=0)
    assert better.value == pytest.approx(1.1)
    assert worse.value == pytest.approx(-0.5)


def test_an_adapter_that_does_not_help_has_no_fraction() -> None:
    base = losses([4.0, 6.0], [2, 3])
    found = recovered_fraction(base, losses([4.0, 6.0], [2, 3]), base)
    assert found.value is None
    assert "2.0000" in str(found.reason)
    barely = recovered_fraction(base, losses([4.0 - MIN_GAIN, 6.0], [2, 3]), base)
    assert barely.value is None
    # A large gain that one example alone makes is noise.
    noisy = recovered_fraction(losses([2.0] * 10), losses([0.0] + [2.0] * 9), losses([2.0] * 10))
    assert noisy.value is None
    assert "more examples" in str(noisy.reason)


def test_one_example_has_a_fraction_without_an_interval() -> None:
    found = recovered_fraction(losses([3.0]), losses([1.0]), losses([1.5]))
    assert (found.value, found.standard_error, found.interval) == (0.75, None, None)


def test_errors_and_intervals_cover_the_truth() -> None:
    """Of repeated draws, 95% intervals hold the true fraction about 95 times in 100."""
    generator = torch.Generator().manual_seed(1)
    held, spread, claimed = 0, [], []
    for seed in range(200):
        gain = 1 + 0.3 * torch.randn(80, generator=generator, dtype=torch.float64)
        lost = 0.2 + 0.1 * torch.randn(80, generator=generator, dtype=torch.float64)
        tokens = torch.ones(80, dtype=torch.int64)
        base = ExampleLosses(torch.full((80,), 4.0, dtype=torch.float64), tokens)
        found = recovered_fraction(
            base,
            ExampleLosses(base.nll - gain, tokens),
            ExampleLosses(base.nll - gain + lost, tokens),
            resamples=500,
            seed=seed,
        )
        assert found.value is not None
        assert found.interval is not None
        assert found.standard_error is not None
        held += found.interval[0] <= 0.8 <= found.interval[1]
        spread.append(found.value)
        claimed.append(found.standard_error)
    assert 178 <= held <= 199
    assert sum(claimed) / 200 == pytest.approx(float(torch.tensor(spread).std()), rel=0.15)


def test_kl_kept_by_hand_and_where_there_is_none() -> None:
    tokens = torch.tensor([2, 2])
    kept = kl_kept(Divergences(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]), tokens))
    assert kept.value == pytest.approx(0.75)
    worse = kl_kept(Divergences(torch.tensor([1.0]), torch.tensor([1.5]), tokens[:1]))
    assert (worse.value, worse.interval) == (pytest.approx(-0.5), None)
    small = torch.full((2,), 1.9 * MIN_DIVERGENCE)
    assert "less than 0.001" in str(kl_kept(Divergences(small, small, tokens)).reason)
    assert kl_kept(Divergences(1.1 * small, small, tokens)).value == pytest.approx(1 / 11, rel=1e-5)


def test_kl_kept_is_greatest_for_the_adapter_itself(
    world: World, evaluator: Evaluator, tmp_path: Path
) -> None:
    """However the adapter is scaled, which a loss may reward."""
    original = open_adapter(world.adapters["chat"])
    kept = {}
    for scale in (0.8, 1.0, 1.25):
        factors = ((name, (a, scale * b)) for name, (a, b) in original.iter_factors())
        folder = write_adapter(tmp_path / str(scale), original.config, factors)
        kept[scale] = evaluator.compare("chat", folder, world.adapters["chat"]).kl_kept.value
    assert kept[1.0] == pytest.approx(1, abs=1e-6)
    assert max(kept[0.8], kept[1.25]) < 0.999


def test_summaries_leave_undefined_tasks_out() -> None:
    base = losses([3.0, 3.0])
    found = {
        "a": recovered_fraction(base, losses([1.0, 1.0]), losses([1.2, 1.2])),
        "b": recovered_fraction(base, losses([1.0, 1.0]), losses([2.0, 2.0])),
        "c": recovered_fraction(base, losses([1.0, 1.0]), losses([1.0, 1.0])),
        "d": recovered_fraction(base, base, base),
    }
    summary = summarize(found)
    assert (summary.judged, summary.worst_task, summary.worst) == (3, "b", 0.5)
    assert (summary.median, summary.mean) == (pytest.approx(0.9), pytest.approx(0.8))


# --- tokens ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_the_common_prefix_is_common_and_longest(first: list[int], second: list[int]) -> None:
    shared = common_prefix(first, second)
    assert first[:shared] == second[:shared]
    assert shared == min(len(first), len(second)) or first[shared] != second[shared]


def test_greedy_agreement_counts_what_could_agree() -> None:
    found = greedy_agreement([(1, 2, 3), (1, 0)], [(1, 2, 4), (1, 0)], 3)
    assert (found.tokens, found.possible, found.exact, found.limit) == (2.0, 2.5, 0.5, 3)
    shorter = greedy_agreement([(1, 0)], [(1, 2, 3)], 3)
    assert (shorter.tokens, shorter.possible, shorter.exact) == (1.0, 3.0, 0.0)


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergences(p.log() + 3, q.log() - 1).tolist() == [pytest.approx(expected, rel=1e-6)]
    ruled_out = torch.tensor([[0.0, -math.inf]])
    both = torch.cat([ruled_out, torch.zeros(1, 2)])
    found = divergences(ruled_out.expand(2, 2), both)
    assert found.tolist() == pytest.approx([0, math.log(2)], rel=1e-6)


# --- weights --------------------------------------------------------------------------------------


Make = Callable[..., Adapter]


@pytest.fixture
def make_adapter(tmp_path: Path) -> Make:
    def make(
        name: str,
        modules: Mapping[str, tuple[int, int]],
        rank: int = 3,
        alpha: int = 6,
        seed: int = 0,
    ) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        factors = {
            module: (
                torch.randn(rank, d_in, generator=generator),
                torch.randn(d_out, rank, generator=generator),
            )
            for module, (d_out, d_in) in modules.items()
        }
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(factors),
        }
        return open_adapter(write_adapter(tmp_path / name, config, factors))

    return make


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    a, b = adapter.factors(name)
    return adapter.modules[name].scale * b.double() @ a.double()


SHAPES = {"model.layers.0.self_attn.q_proj": (10, 14), "model.layers.1.mlp.up_proj": (20, 14)}


def test_weights_are_compared_as_if_they_were_formed(make_adapter: Make) -> None:
    original = make_adapter("original", SHAPES)
    copy = make_adapter("copy", SHAPES, rank=2, alpha=1, seed=1)
    found = compare_weights(original, copy)
    assert [module.name for module in found] == sorted(SHAPES)
    lost = whole = 0.0
    for module in found:
        exact = dense(original, module.name)
        difference = float((dense(copy, module.name) - exact).norm())
        assert module.error == pytest.approx(difference / float(exact.norm()))
        expected = torch.linalg.svdvals(exact)[:3].tolist()
        assert module.singular_values == pytest.approx(expected)
        lost, whole = lost + difference**2, whole + float(exact.norm()) ** 2
    assert total_error(found) == pytest.approx(math.sqrt(lost / whole))


def test_a_module_that_the_task_left_out_is_lost_whole(make_adapter: Make) -> None:
    original = make_adapter("original", SHAPES)
    kept, left_out = sorted(SHAPES)
    copy = make_adapter("copy", {kept: SHAPES[kept]})
    errors = {module.name: module.error for module in compare_weights(original, copy)}
    assert errors[left_out] == pytest.approx(1)


def test_an_unrelated_adapter_of_the_same_shapes_is_far_away(make_adapter: Make) -> None:
    shapes = {"model.layers.0.mlp.up_proj": (400, 300)}
    found = compare_weights(make_adapter("a", shapes, seed=1), make_adapter("b", shapes, seed=2))
    assert total_error(found) == pytest.approx(2**0.5, abs=0.2)


def test_another_adapter_is_no_original(make_adapter: Make) -> None:
    name = next(iter(SHAPES))
    copy = make_adapter("copy", SHAPES)
    with pytest.raises(AdapterError, match=r"up_proj is absent.*--adapter TASK=PATH"):
        compare_weights(make_adapter("less", {name: SHAPES[name]}), copy)
    with pytest.raises(AdapterError, match="10 x 15 in it and 10 x 14"):
        compare_weights(make_adapter("other", SHAPES | {name: (10, 15)}), copy)


def test_similarities_are_cosines_of_the_updates(make_adapter: Make) -> None:
    name = next(iter(SHAPES))
    adapters = [
        make_adapter("a", SHAPES, seed=1),
        make_adapter("b", {name: SHAPES[name]}, rank=5, alpha=3, seed=2),
        make_adapter("c", SHAPES, seed=1, alpha=600),
    ]
    vectors = [
        torch.cat(
            [
                (dense(a, m) if m in a.modules else torch.zeros(SHAPES[m])).double().flatten()
                for m in SHAPES
            ]
        )
        for a in adapters
    ]
    stacked = torch.stack([vector / vector.norm() for vector in vectors])
    found = cosines(inner_products(adapters))
    assert torch.allclose(found, stacked @ stacked.T, atol=1e-5)
    assert found[0, 2] == pytest.approx(1, abs=1e-5)


def test_spectra_are_of_unit_updates(make_adapter: Make) -> None:
    collector = SpectrumCollector()
    for seed in range(3):
        adapter = make_adapter(f"a{seed}", SHAPES, rank=3 + seed, seed=seed)
        collector.add(compare_weights(adapter, adapter), dict.fromkeys(SHAPES, seed))
    first, second = collector.spectra()
    assert (first.kind, second.kind) == ("q_proj", "up_proj")
    assert (first.modules, first.kept_rank) == (3, 1)
    tops = []
    for seed in range(3):
        adapter = make_adapter(f"b{seed}", SHAPES, rank=3 + seed, seed=seed)
        sigma = torch.linalg.svdvals(dense(adapter, "model.layers.0.self_attn.q_proj"))
        tops.append(float(sigma[0] / sigma.norm()))
    assert first.quantiles[1][0] == pytest.approx(sorted(tops)[1], rel=1e-5)
    assert [len(row) for row in first.quantiles] == [5, 5, 5]


def test_kinds_and_layers_of_module_names() -> None:
    assert module_kind("model.layers.12.self_attn.q_proj") == "q_proj"
    assert module_layer("model.layers.12.self_attn.q_proj") == 12
    assert module_kind("model.layers.3.experts.7") == "experts"
    assert (module_kind("lm_head"), module_layer("lm_head")) == ("lm_head", None)


# --- the command ----------------------------------------------------------------------------------

runner = CliRunner()
app = typer.Typer()
app.command()(evaluate)


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.output
    return result


def error_line(*args: str | Path) -> str:
    result = invoke(*args, code=2)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def data_options(world: World) -> list[str]:
    return [part for task in TASKS for part in ("--data", f"{task}={world.data[task]}")]


def originals_options(world: World) -> list[str]:
    return [part for task in TASKS for part in ("--adapter", f"{task}={world.adapters[task]}")]


def test_the_command_reports_and_gates(world: World, tmp_path: Path) -> None:
    html, saved = tmp_path / "report.html", tmp_path / "report.json"
    result = invoke(
        world.lossy, "--base", world.model, *data_options(world), *originals_options(world),
        "--html", html, "--save-json", saved, "--json", "--greedy-tokens", "4",
        "--fail-under", "0.9999", code=1,
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert json.loads(saved.read_text()) == found
    schema = json.loads((ROOT / "docs" / "schemas" / "evaluate.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(found)
    for broken in ({"kl_kept": 1.0}, {"more": 1}, {"tasks": [found["tasks"][0] | {"kl": "0"}]}):
        assert not jsonschema.Draft202012Validator(schema).is_valid(found | broken)
    worst = found["kl_kept"]["worst_task"]
    assert f"KL kept below 0.9999 in 3 of 3 tasks: {worst} " in result.stderr
    assert [task["task"] for task in found["tasks"]] == list(TASKS)
    for task in found["tasks"]:
        fraction = (task["base_loss"] - task["compressed_loss"]) / (
            task["base_loss"] - task["adapter_loss"]
        )
        assert task["recovered"] == pytest.approx(fraction)
        assert task["recovered_interval"][0] <= fraction <= task["recovered_interval"][1]
        assert task["kl_kept"] == pytest.approx(1 - task["kl"] / task["kl_base"])
        assert task["kl_kept_interval"][0] <= task["kl_kept"] <= task["kl_kept_interval"][1]
        assert f"{task['kl_kept']:.4f}" in html.read_text()
        assert task["greedy"]["limit"] == 4
        assert task["error"] == pytest.approx(
            Checkpoint.open(world.lossy).record(task["task"]).error, rel=1e-3
        )
    assert found["similarity"]["tasks"] == list(TASKS)
    assert {s["kind"] for s in found["spectra"]} >= {"q_proj", "down_proj"}
    assert "alert(1)" in html.read_text()
    assert "<script" not in html.read_text()


def test_the_command_finds_data_and_originals_in_folders(world: World, tmp_path: Path) -> None:
    from vllm_vlora.task_ids import encode_task_id

    (tmp_path / "data").mkdir()
    for task in TASKS[1:]:
        file = tmp_path / f"data/{encode_task_id(task)}.jsonl"
        file.write_bytes(world.data[task].read_bytes())
    (tmp_path / "loras").mkdir()
    for task in TASKS:
        (tmp_path / f"loras/{encode_task_id(task)}").symlink_to(world.adapters[task])
    result = invoke(
        world.exact, "--base", world.model, "--data", tmp_path / "data", "--adapters",
        tmp_path / "loras", "--greedy-tokens", "0", "--fail-under", "0.999",
    )  # fmt: skip
    assert "1.0000" in result.stdout
    assert "no data, left out: sql" in result.stdout


def test_adapters_are_found_by_the_name_they_had(world: World) -> None:
    # The tasks' adapters lie in folders 0, 1 and 2, which compress recorded as their sources.
    from vllm_vlora.checkpoint.task_files import find_originals

    folder = world.adapters["sql"].parent
    checkpoint = Checkpoint.open(world.exact)
    assert find_originals(checkpoint, [str(folder)], []) == world.adapters
    named = find_originals(checkpoint, [str(folder)], ["sql=elsewhere"])
    assert named == {**world.adapters, "sql": Path("elsewhere")}


def test_a_task_id_may_hold_an_equals_sign(world: World, tmp_path: Path) -> None:
    from vllm_vlora.checkpoint.task_files import find_data

    opened = {name: open_adapter(world.adapters["sql"]) for name in ("a", "a=b")}
    compress(opened, tmp_path / "ckpt", CompressOptions(representation="private", max_error=0.0))
    found = find_data(Checkpoint.open(tmp_path / "ckpt"), ["a=b=x.jsonl", "a=y.jsonl"])
    assert found == {"a": [Path("y.jsonl")], "a=b": [Path("x.jsonl")]}


def test_a_file_that_is_given_twice_counts_once(world: World, tmp_path: Path) -> None:
    """Twice as many examples, all of them the same, would make intervals narrower by a third."""
    from vllm_vlora.checkpoint.task_files import find_data

    file, other = tmp_path / "data" / "sql.jsonl", tmp_path / "more.jsonl"
    file.parent.mkdir()
    for path in (file, other):
        path.write_text("{}\n")
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    checkpoint = Checkpoint.open(world.exact)
    given = [str(file.parent), f"sql={file}", f"sql={other}", f"sql={link}"]
    assert find_data(checkpoint, given) == {"sql": [file, other]}


def test_files_of_no_task_are_named(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm_vlora.checkpoint.task_files import find_data

    for name in ("sql.jsonl", "SQL2.jsonl", "notes.txt", "README.md"):
        (tmp_path / name).touch()
    assert find_data(Checkpoint.open(world.exact), [str(tmp_path)]) == {
        "sql": [tmp_path / "sql.jsonl"]
    }
    assert "no task is named as SQL2.jsonl, notes.txt, which are left out" in caplog.text
    assert "sql.jsonl" not in caplog.text
    assert "README" not in caplog.text


def test_a_folder_of_data_has_one_file_a_task(world: World, tmp_path: Path) -> None:
    from vllm_vlora.checkpoint.task_files import find_data

    checkpoint = Checkpoint.open(world.exact)
    (tmp_path / "sql.JSONL").touch()
    assert find_data(checkpoint, [str(tmp_path)]) == {"sql": [tmp_path / "sql.JSONL"]}
    (tmp_path / "sql.txt").touch()
    with pytest.raises(OptionError, match=r"sql\.JSONL and sql\.txt.*TASK=FILE"):
        find_data(checkpoint, [str(tmp_path)])


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_vlora.errors import OutputError
    from vllm_vlora.tools.evaluate_command import _write_report

    path = tmp_path / "report.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            _write_report(path, "new" * 1000)
    assert path.read_text() == "old"
    _write_report(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_mistakes_are_one_line_that_says_what_to_do(world: World, tmp_path: Path) -> None:
    base = [world.exact, "--base", world.model]
    sql = ["--data", f"sql={world.data['sql']}"]
    unknown = error_line(*base, "--data", f"sqll={world.data['sql']}")
    assert "no task 'sqll'; it has: sql, chat" in unknown
    assert "nowhere.jsonl: No such file" in error_line(*base, "--data", "sql=nowhere.jsonl")
    assert "TASK=FILE" in error_line(*base, "--data", "nowhere")
    assert "named as a task" in error_line(*base, "--data", tmp_path)
    assert "no such folder" in error_line(*base, *sql, "--adapters", tmp_path / "none")
    assert "--adapter TASK=PATH" in error_line(*base, *sql, "--adapters", tmp_path)
    assert "original of every task" in error_line(*base, *sql, "--fail-under", "0.9")
    assert "KL kept is at most 1" in error_line(*base, *sql, "--fail-under", "95")
    gate = ["--adapter", f"sql={world.adapters['sql']}", "--fail-under", "0.9", "--losses-only"]
    assert "goes by KL kept" in error_line(*base, *sql, *gate)
    assert "--max-examples" not in error_line(*base, *sql, "--max-length", "1")
    missing = tmp_path / "none/report.html"
    assert "make it first" in error_line(*base, *sql, "--html", missing)
    wrong = error_line(world.exact, "--base", tmp_path / "nomodel", *sql)
    assert wrong.endswith("nomodel': no such folder, and not a Hub id, org/name")
    other = make_model(tmp_path / "other", hidden=32)
    assert "adapters' own base model" in error_line(world.exact, "--base", other, *sql)
    swapped = error_line(*base, *sql, "--adapter", f"sql={world.adapters['chat']}")
    assert "not the original of this task" in swapped


def test_a_gate_without_any_fraction_does_not_pass(world: World, tmp_path: Path) -> None:
    """An adapter that changes next to nothing has nothing to keep, and nothing to gain."""
    faint = open_adapter(world.adapters["sql"])
    factors = ((name, (a, 1e-4 * b)) for name, (a, b) in faint.iter_factors())
    write_adapter(tmp_path / "sql", faint.config, factors)
    options = CompressOptions(representation="private", max_error=0.0)
    compress({"sql": open_adapter(tmp_path / "sql")}, tmp_path / "ckpt", options)
    result = invoke(
        tmp_path / "ckpt", "--base", world.model, "--data", f"sql={world.data['sql']}",
        "--adapter", f"sql={tmp_path / 'sql'}", "--greedy-tokens", "0", "--fail-under", "0.5", code=1,
    )  # fmt: skip
    assert "no task could be judged against 0.5" in result.stderr
    assert "sql: KL kept unknown: the adapter's KL to the base is" in result.stdout
    assert "sql: Recovered unknown: the adapter's loss is" in result.stdout
