"""Adapters with a vocabulary, embeddings or a tokenizer of their own: judged as PEFT runs them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import typer
from saved_modules import cases, load_model, write_model, write_saved_adapter
from tiny_llama import write_tiny_llama
from tiny_tokenizer import write_word_tokenizer
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.errors import AdapterError, ModelMismatchError, OptionError
from vllm_vlora.evaluation import task_text
from vllm_vlora.evaluation.base_model import load_base_model
from vllm_vlora.evaluation.evaluator import EvaluationOptions, Evaluator
from vllm_vlora.evaluation.kept import kept
from vllm_vlora.tools.evaluate_command import evaluate

NAMES = (
    "more_tokens", "plain", "more_tokens_saved", "more_tokens_saved_embedding", "saved_embedding",
    "lora_both", "saved_embedding_tied",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """A model with a tokenizer of 40 words, adapters, a checkpoint of them, and text of these words."""

    model: Path
    adapters: dict[str, Path]
    checkpoint: Path
    data: Path


@pytest.fixture(scope="module", params=["tied", "untied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp(request.param)
    tied = request.param == "tied"
    model = write_model(root / "model", "llama", tied=tied)
    write_word_tokenizer(model)
    options = cases("llama")
    adapters = {}
    for seed, name in enumerate(NAMES):
        folder = root / "adapters" / name
        adapters[name] = write_saved_adapter(model, "llama", folder, options[name], seed)
    data = root / "text.jsonl"
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(6):
        words = [
            f"w{number}" for number in torch.randint(3, 40, (8,), generator=generator).tolist()
        ]
        lines.append({"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])})
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = {name: open_adapter(folder) for name, folder in adapters.items()}
    options_ = CompressOptions(representation="private", max_error=0.0)
    compress(opened, root / "ckpt", options_, base_model=str(model))
    return World(model, adapters, root / "ckpt", data)


def rows_of(tokenizer: Any, data: Path) -> list[tuple[list[int], int]]:
    """Ids of each example, and how many of them are the prompt's."""
    rows = []
    for line in data.read_text().splitlines():
        example = json.loads(line)
        prompt = tokenizer(example["prompt"])["input_ids"]
        answer = tokenizer(example["completion"] + tokenizer.eos_token)["input_ids"]
        rows.append((prompt + answer, len(prompt)))
    return rows


@torch.no_grad()
def nll_of(model: Any, rows: list[tuple[list[int], int]]) -> torch.Tensor:
    """Sum of -log p of each answer, one example at a time."""
    sums = []
    for ids, prompt in rows:
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(-sum(log_p[place - 1, ids[place]] for place in range(prompt, len(ids))))
    return torch.stack(sums)  # type: ignore[arg-type]


@torch.no_grad()
def kl_from_base(world: World, folder: Path, more: int, rows: list[tuple[list[int], int]]) -> float:
    """KL(adapter || base) a token, the base resized as transformers does, one example at a time."""
    adapted, base = with_peft(world, folder, more), load_model(world.model)
    if more:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base.resize_token_embeddings(base.config.vocab_size + more, mean_resizing=True)
    total, tokens = 0.0, 0
    for ids, prompt in rows:
        places = slice(prompt - 1, len(ids) - 1)
        p, q = (
            model(torch.tensor([ids])).logits[0, places].double().log_softmax(-1)
            for model in (adapted, base)
        )
        total += float((p.exp() * (p - q)).sum())
        tokens += len(ids) - prompt
    return total / tokens


def with_peft(world: World, folder: Path, tokens: int) -> Any:
    return peft.PeftModel.from_pretrained(load_model(world.model, tokens), str(folder)).eval()


def state_of(evaluator: Evaluator) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in evaluator._model.state_dict().items()}


def assert_state(evaluator: Evaluator, before: dict[str, torch.Tensor]) -> None:
    after = evaluator._model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def make_evaluator(world: World, **options: Any) -> Evaluator:
    files = {name: [world.data] for name in world.adapters}
    return Evaluator(world.model, files, EvaluationOptions(**options))


def test_the_command_judges_every_vocabulary_and_leaves_the_base(world: World) -> None:
    """It ended with a KeyError at the first, and the tasks after it would have seen a damaged base."""
    app = typer.Typer()
    app.command()(evaluate)
    arguments = [str(world.checkpoint), "--data", str(world.data.parent / "held-out")]
    held_out = world.data.parent / "held-out"
    held_out.mkdir(exist_ok=True)
    for name in world.adapters:
        (held_out / f"{name}.jsonl").write_text(world.data.read_text())
    arguments += ["--adapters", str(world.data.parent / "adapters"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = {task["task"]: task for task in json.loads(result.stdout)["tasks"]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.model)
    rows = rows_of(tokenizer, world.data)
    tokens = sum(len(ids) - prompt for ids, prompt in rows)
    base = float(nll_of(load_model(world.model), rows).sum()) / tokens
    for name, folder in world.adapters.items():
        more = cases("llama")[name].get("more_tokens", 0)
        wanted = float(nll_of(with_peft(world, folder, more), rows).sum()) / tokens
        assert found[name]["adapter_loss"] == pytest.approx(wanted, rel=1e-5), name
        assert found[name]["compressed_loss"] == pytest.approx(wanted, rel=1e-5), name
        assert found[name]["base_loss"] == pytest.approx(base, rel=1e-5), name
        assert found[name]["agreement"] == 1.0
        assert found[name]["kl_base"] == pytest.approx(
            kl_from_base(world, folder, more, rows), rel=1e-3
        ), name
        assert found[name]["kl_kept"] == pytest.approx(1, abs=1e-3), name
        assert found[name]["tokenizer"] is None


def test_what_fails_in_the_middle_leaves_the_base(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make_evaluator(world, greedy_tokens=0)
    before, logits = state_of(evaluator), evaluator._model(torch.tensor([[3, 4, 5]])).logits
    wanted = evaluator.adapter("plain", world.adapters["plain"]).losses.nll
    # PEFT fails when its layers are in the model already.
    adapter = open_adapter(world.adapters["plain"])
    odd = {"base_model.model.model.norm.weight": torch.ones(7)}
    config = {**adapter.config, "modules_to_save": ["norm"]}
    write_adapter(tmp_path / "odd", config, adapter.iter_factors(), extra=odd)
    with pytest.raises(AdapterError, match="PEFT cannot load it"):
        evaluator.adapter("plain", tmp_path / "odd")
    assert_state(evaluator, before)
    # The second of two adapters, and what runs between.
    with pytest.raises(AdapterError, match="PEFT cannot load it"):
        evaluator.compare("plain", tmp_path / "odd", world.adapters["plain"])
    assert_state(evaluator, before)
    for name in ("more_tokens", "more_tokens_saved", "saved_embedding", "lora_both"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "_losses", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                evaluator.adapter(name, world.adapters[name])
        assert_state(evaluator, before)
    assert torch.equal(evaluator._model(torch.tensor([[3, 4, 5]])).logits, logits)
    assert torch.equal(evaluator.adapter("plain", world.adapters["plain"]).losses.nll, wanted)
    tied = "untied" not in str(world.model)
    model = evaluator._model
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert model.config.vocab_size == 40


def test_an_adapted_embedding_of_more_tokens(world: World, tmp_path: Path) -> None:
    """A tied model's output is its embedding; an untied one's new rows are in no file."""
    options = {"target_modules": ["q_proj", "embed_tokens"], "more_tokens": 3}
    folder = write_saved_adapter(world.model, "llama", tmp_path / "lora", options)
    evaluator = make_evaluator(world, greedy_tokens=0)
    before = state_of(evaluator)
    if "untied" in str(world.model):
        with pytest.raises(AdapterError, match=r"43 tokens, .* 40, .* lm_head are not in its file"):
            evaluator.adapter("plain", folder)
    else:
        rows = rows_of(transformers.AutoTokenizer.from_pretrained(world.model), world.data)
        wanted = nll_of(with_peft(world, folder, 3), rows)
        got = evaluator.adapter("plain", folder).losses.nll
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert_state(evaluator, before)


def test_a_head_that_the_model_lacks_is_not_left_out(world: World, tmp_path: Path) -> None:
    adapter = open_adapter(world.adapters["plain"])
    head = {"base_model.model.score.weight": torch.ones(2, 16)}
    config = {**adapter.config, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    write_adapter(tmp_path / "classifier", config, adapter.iter_factors(), extra=head)
    evaluator = make_evaluator(world, greedy_tokens=0)
    with pytest.raises(ModelMismatchError, match=r"score\.weight, which the model .* lacks"):
        evaluator.adapter("plain", tmp_path / "classifier")


def test_two_adapters_on_one_base_must_agree_on_it(world: World) -> None:
    evaluator = make_evaluator(world, greedy_tokens=0)
    with pytest.raises(AdapterError, match="a weight of the base model, is not that of"):
        evaluator.compare("plain", world.adapters["more_tokens"], world.adapters["plain"])


@pytest.mark.parametrize("new", ["words", "template"])
def test_the_tokenizer_of_an_adapter_reads_its_data(world: World, tmp_path: Path, new: str) -> None:
    """Three words are tokens of the adapter's tokenizer alone; or it alone has a chat template."""
    folder = write_saved_adapter(
        world.model, "llama", tmp_path / "adapters" / "own", {"more_tokens": 3}
    )
    own = transformers.AutoTokenizer.from_pretrained(world.model)
    data = tmp_path / "own.jsonl"
    if new == "words":
        own.add_tokens(["new0", "new1", "new2"])
        lines = [
            {"prompt": "w3 new0 w5", "completion": " w6 new1 new2"},
            {"prompt": "w9", "completion": " new0"},
        ]
    else:
        own.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
        turns = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6"}]
        lines = [{"messages": turns}]
    own.save_pretrained(folder)
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compress(
        {"own": open_adapter(folder)},
        tmp_path / "ckpt",
        CompressOptions(representation="private", max_error=0.0),
        base_model=str(world.model),
    )
    app = typer.Typer()
    app.command()(evaluate)
    arguments = [str(tmp_path / "ckpt"), "--data", f"own={data}", "--adapter", f"own={folder}"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    (task,) = json.loads(result.stdout)["tasks"]
    assert task["tokenizer"] == str(folder)
    if new == "words":
        rows = rows_of(own, data)
        tokens = sum(len(ids) - prompt for ids, prompt in rows)
        assert any(max(ids) >= 40 for ids, _ in rows)
        assert task["tokens"] == tokens
        wanted = float(nll_of(with_peft(world, folder, 3), rows).sum()) / tokens
        assert task["adapter_loss"] == pytest.approx(wanted, rel=1e-5)
        assert task["compressed_loss"] == pytest.approx(wanted, rel=1e-5)
        # The base's new rows lie around the mean of its others.
        base = load_model(world.model)
        base.resize_token_embeddings(43)
        wanted = float(nll_of(base, rows).sum()) / tokens
        assert task["base_loss"] == pytest.approx(wanted, rel=1e-2)
    said = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert "tokens of the adapter's own tokenizer" in " ".join(said.output.split())
    # Without an original the checkpoint has the tokenizer.
    alone = CliRunner().invoke(app, [*arguments[:3], "--json"])
    assert alone.exit_code == 0, alone.output
    (kept_,) = json.loads(alone.stdout)["tasks"]
    assert kept_["tokenizer"] == str(tmp_path / "ckpt")
    for name in ("tokens", "base_loss", "compressed_loss"):
        assert kept_[name] == pytest.approx(task[name], rel=1e-5)


def test_tokenizers_that_are_not_needed_are_not_held(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer takes as much memory as a small model, and a collection has a thousand folders."""
    read: list[Path] = []
    load = task_text._load
    monkeypatch.setattr(task_text, "_load", lambda folder: read.append(folder) or load(folder))
    original = write_saved_adapter(world.model, "llama", tmp_path / "original", {})
    write_word_tokenizer(original)
    other = write_saved_adapter(world.model, "llama", tmp_path / "other", {})
    write_word_tokenizer(other)
    evaluator = Evaluator(world.model, {"own": [world.data]}, EvaluationOptions(greedy_tokens=0))
    for _ in range(2):
        assert evaluator.choose_tokenizer("own", original, other) is None
    assert read == [original]
    assert evaluator._readers == {("own", original): evaluator._text}


def test_a_tokenizer_that_adapters_have_in_common_is_held_once(
    world: World, tmp_path: Path
) -> None:
    folders = {}
    for name in ("one", "two"):
        folders[name] = write_saved_adapter(world.model, "llama", tmp_path / name, {})
        own = transformers.AutoTokenizer.from_pretrained(world.model)
        own.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
        own.save_pretrained(folders[name])
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    evaluator = Evaluator(
        world.model, {name: [data] for name in folders}, EvaluationOptions(greedy_tokens=0)
    )
    for name, folder in folders.items():
        assert evaluator.choose_tokenizer(name, folder) == folder
    assert evaluator._texts["one"] is evaluator._texts["two"] is not evaluator._text


def test_what_is_no_tokenizer_of_a_folder_without_one_is_not_looked_at(
    world: World, tmp_path: Path
) -> None:
    folder = write_saved_adapter(world.model, "llama", tmp_path / "own", {})
    (folder / "vocab.json").mkdir()
    evaluator = Evaluator(world.model, {"own": [world.data]}, EvaluationOptions(greedy_tokens=0))
    assert evaluator.choose_tokenizer("own", folder) is None


def test_a_tokenizer_without_its_tokens_is_refused(world: World, tmp_path: Path) -> None:
    folder = write_saved_adapter(world.model, "llama", tmp_path / "plain", {})
    own = transformers.AutoTokenizer.from_pretrained(world.model)
    own.add_tokens(["new0"])
    own.save_pretrained(folder)
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"prompt": "w3", "completion": " new0"}) + "\n")
    evaluator = Evaluator(world.model, {"own": [data]}, EvaluationOptions(greedy_tokens=0))
    with pytest.raises(AdapterError, match="has the token 40, the model with this adapter has 40"):
        evaluator.compare("own", folder, folder)
    (folder / "tokenizer.json").write_text("{}")
    fresh = Evaluator(world.model, {"own": [data]}, EvaluationOptions(greedy_tokens=0))
    with pytest.raises(AdapterError, match="its tokenizer cannot be loaded"):
        fresh.compare("own", folder, folder)


def test_a_model_is_kept_whatever_happens_to_it(world: World) -> None:
    model = load_model(world.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers, config = list(model.named_modules()), dict(vars(model.config))
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append(1))

    def fail() -> None:
        model.resize_token_embeddings(50)
        model.model.norm.weight.data.zero_()
        model.model.layers[0] = torch.nn.Identity()
        model.lm_head.register_forward_hook(lambda *_: seen.append(2))
        model.requires_grad_(False)
        model.train()
        model.model.extra = torch.nn.Parameter(torch.ones(1))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), kept(model, ["model.norm.weight"]):
        fail()
    assert list(model.named_modules()) == layers
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vars(model.config) == config
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    model(torch.tensor([[3]]))
    assert seen == [1]
    # A handle from before still takes its hook away.
    handle.remove()
    model(torch.tensor([[3]]))
    assert seen == [1]


def test_a_base_model_without_a_tokenizer_is_told_in_one_plain_line(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    with pytest.raises(OptionError) as caught:
        load_base_model(str(model), "cpu", "float32")
    assert str(caught.value) == (
        f"base model {str(model)!r}: its tokenizer cannot be loaded; give the folder or Hub id of a "
        "causal language model with its tokenizer"
    )
