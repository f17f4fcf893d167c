"""``evaluate --metric`` from the command line, with PEFT in the place of vLLM's engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_llama import write_tiny_llama
from typer.testing import CliRunner

from vllm_vlora import Checkpoint, CompressOptions, compress, export_task, open_adapter
from vllm_vlora.plugin import answering
from vllm_vlora.plugin.answering import Asked
from vllm_vlora.tools.cli import app

TASKS = ("loud", "calm")
PROMPTS = ("one", "two and more", "3")


class PeftEngine:
    """What ``AnsweringEngine`` does, by PEFT, one request after another."""

    started: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self, model: str, checkpoint: Checkpoint, originals: Mapping[str, Path], **options: Any
    ) -> None:
        from transformers import AutoTokenizer

        self.started.append(options)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._model, self._checkpoint, self._originals = model, checkpoint, originals
        self._loaded: dict[tuple[str | None, bool], Any] = {}

    def _of(self, one: Asked) -> Any:
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        key = one.task, one.original
        if key not in self._loaded:
            model: Any = LlamaForCausalLM.from_pretrained(self._model)
            if one.task is not None:
                folder = self._originals[one.task]
                if not one.original:
                    place = self._checkpoint.path.parent / f"{one.task}-exported"
                    folder = export_task(self._checkpoint, one.task, place, force=True)
                model = PeftModel.from_pretrained(model, str(folder))
            self._loaded[key] = model.eval()
        return self._loaded[key]

    @torch.no_grad()
    def answers(self, asked: Sequence[Asked], most: int, progress: Any = None) -> list[str]:
        said = []
        for one in asked:
            ids = torch.tensor([list(one.tokens)])
            out = self._of(one).generate(ids, max_new_tokens=most, do_sample=False)
            text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            said.append(str(text))
        return said

    @torch.no_grad()
    def log_probabilities(self, asked: Sequence[Asked], progress: Any = None) -> list[list[float]]:
        found = []
        for one in asked:
            ids = torch.tensor([list(one.tokens)])
            scores = self._of(one)(ids).logits[0].log_softmax(-1)
            of_next = scores[:-1].gather(1, ids[0, 1:, None])[:, 0]
            found.append([0.0, *of_next.tolist()])
        return found

    def close(self) -> None:
        self._loaded.clear()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it, an exact and a coarse checkpoint, and the adapters' own answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("answers")
    model = write_tiny_llama(folder / "base")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained(model), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
        adapted.save_pretrained(str(folder / "loras" / task))
    opened = {task: open_adapter(folder / "loras" / task) for task in TASKS}
    compress(opened, folder / "exact", CompressOptions(quantize="none"))
    compress(opened, folder / "coarse", CompressOptions(representation="private", ratio=6))
    engine = PeftEngine(str(model), Checkpoint.open(folder / "exact"), {
        task: folder / "loras" / task for task in TASKS
    })  # fmt: skip
    (folder / "heldout").mkdir()
    for task in TASKS:
        given = [engine.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        said = engine.answers([Asked(task, True, ids) for ids in given], 8)
        lines = [
            json.dumps({"prompt": prompt, "completion": answer})
            for prompt, answer in zip(PROMPTS, said, strict=True)
        ]
        (folder / "heldout" / f"{task}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def evaluate(world: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(answering, "AnsweringEngine", PeftEngine)
    PeftEngine.started.clear()
    files = ["--base", str(world / "base"), "--data", str(world / "heldout")]

    def run(checkpoint: str, *options: str, originals: bool = True) -> Any:
        adapters = ["--adapters", str(world / "loras")] if originals else []
        return CliRunner().invoke(
            app, ["evaluate", str(world / checkpoint), *files, *adapters, *options]
        )

    return run


LENGTHS = ("--max-length", "64", "--max-new-tokens", "8")


def test_an_exact_task_answers_as_its_adapter(evaluate: Any, tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    done = evaluate(
        "exact", "--metric", "exact-match", *LENGTHS, "--json", "--save-json", str(saved)
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert json.loads(saved.read_text()) == found
    assert PeftEngine.started[-1] == {"max_length": 64, "dtype": None}
    for task in found["tasks"]:
        assert (task["adapter"], task["compressed"], task["base"]) == (1.0, 1.0, 0.0)
        assert (task["relative"], task["agreement"], task["examples"]) == (1.0, 1.0, 3)
    shown = evaluate("exact", "--metric", "rouge-l", *LENGTHS).stdout
    assert "1.0000" in shown
    assert "Relative: to the uncompressed adapter" in shown


def test_what_was_lost_shows_and_fails_the_gate(evaluate: Any) -> None:
    options = ("--metric", "loss", "--max-length", "64", "--json", "--fail-under", "0.99")
    done = evaluate("coarse", *options)
    assert done.exit_code == 1, done.output
    tasks = json.loads(done.stdout)["tasks"]
    below = [task["task"] for task in tasks if task["relative"] < 0.99]
    said = f"below 0.99 of the adapter: {len(below)} of 2 tasks: {below[0]}"
    assert said in done.stderr.replace("\n", " ")
    for task in tasks:
        assert abs(task["compressed"] - task["adapter"]) > 1e-4
        assert task["relative"] == pytest.approx(task["adapter"] / task["compressed"])
    alone = evaluate("coarse", *options, originals=False)
    assert alone.exit_code == 2
    assert "needs the original of every task" in alone.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metric", "loss", "--html", "report.html"), "--html says nothing with --metric"),
        (("--metric", "loss", "--losses-only"), "--losses-only says nothing"),
        (("--metric", "loss", "--max-new-tokens", "4"), "nothing with --metric loss"),
        (("--max-new-tokens", "4"), "--max-new-tokens says nothing with no --metric"),
        (("--metric", "rouge-l", "--max-length", "64"), "leaves no room in --max-length 64"),
    ],
)
def test_options_that_say_nothing_are_refused(
    evaluate: Any, options: tuple[str, ...], message: str
) -> None:
    done = evaluate("exact", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert PeftEngine.started == []
