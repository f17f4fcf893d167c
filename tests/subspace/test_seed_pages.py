"""All code on vlora's and lorashare's pages runs here, or ``docs/migration.md`` says why not."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file
from seed_pages import TASKS, snippets, write_classifiers, write_world
from typer.testing import CliRunner

import vllm_vlora
from vllm_vlora import Checkpoint, SharedSubspace, load_adapter, open_adapter, validate
from vllm_vlora.checkpoint import hub
from vllm_vlora.errors import OutputError, VLoRAError
from vllm_vlora.tools.cli import app

MIGRATION = re.sub(r"\s+", " ", (ROOT / "docs" / "migration.md").read_text(encoding="utf-8"))
PYTHON = snippets("vlora", "python")
GLUE = [f"{place}/{task}_lora" for place in ("path/to", "org") for task in ("cola", "mrpc", "rte")]
# Section, start of the statement -> what it says here, and what docs/migration.md says of that.
REFUSED = {
    ("NF4 Quantization", "subspace.quantize(method='nf4', double_quant"): (
        "quantised already",
        "`quantize` can be called again and rounds what was rounded",
    ),
    ("NF4 Quantization", "subspace.quantize(method='nf4', quantize_loadings"): (
        "quantised already",
        "`quantize` can be called again and rounds what was rounded",
    ),
    ("Advanced Compression", "subspace.quantize(method='nf4')"): (
        "quantised already",
        "`quantize` can be called again and rounds what was rounded",
    ),
    ("Advanced Compression", "subspace.quantize(method='nf4', double_quant"): (
        "quantised already",
        "`quantize` can be called again and rounds what was rounded",
    ),
    ("Training in the Subspace", "for batch in dataloader"): (
        "the loss does not depend on the task",
        "takes a loss of a model that the loadings are no part of, and trains nothing",
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world as the working folder, to be written into."""
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


class Names(dict[str, Any]):
    """What a reader of vlora's page has at hand: every section starts with it."""

    def __init__(self) -> None:
        super().__init__({name: getattr(vllm_vlora, name) for name in ("SharedSubspace",)})
        adapters = [load_adapter(f"adapters/task_{number}") for number in range(5)]
        subspace = SharedSubspace.from_adapters(adapters, num_components=4)
        if not Path("shared_subspace").exists():
            subspace.save("shared_subspace")
        ids = torch.arange(10)[None]
        self.update(
            torch=torch,
            adapters=adapters,
            subspace=subspace,
            new_adapter=load_adapter("adapters/new_task"),
            adapter_paths=[f"adapters/task_{number}" for number in range(10)],
            input_ids=ids,
            batch={"input_ids": ids, "labels": ids},
            dataloader=[{"input_ids": ids, "labels": ids}] * 3,
            compute_loss=lambda model, batch: model(**batch).loss,
            get_input_embedding=lambda batch: torch.randn(2, 4096),
        )

    def __missing__(self, name: str) -> Any:
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

        if name in ("base_model", "model"):
            return AutoModelForCausalLM.from_pretrained("model-name")
        if name == "Trainer":
            rows = [{key: value[0] for key, value in self["batch"].items()}] * 4
            return lambda **options: Trainer(**options, train_dataset=rows)
        if name == "args":
            return TrainingArguments("trained", max_steps=2, use_cpu=True, report_to=[])
        raise KeyError(name)


def statements(title: str) -> Iterator[str]:
    for node in ast.parse(PYTHON[title]).body:
        yield ast.unparse(node)


def delta(folder: str | Path, layer: str) -> torch.Tensor:
    """alpha / r B A of a layer in a PEFT folder, float64."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


def restored(subspace: SharedSubspace, task: str, layer: str) -> torch.Tensor:
    weights = subspace.reconstruct(task)
    return weights.lora_b[layer].double() @ weights.lora_a[layer].double()


def run(title: str, names: Names) -> Names:
    """Run a section statement by statement; what is refused must have its reason in the docs."""
    for source in statements(title):
        found = [key for key in REFUSED if key[0] == title and source.startswith(key[1])]
        # The longest start is that of the statement.
        refused = REFUSED[max(found, key=lambda key: len(key[1]))] if found else None
        code = compile(source, title, "exec")
        if "cuda" in source and not torch.cuda.is_available():
            code = compile(source.replace("cuda", "cpu"), title, "exec")
        if refused is None:
            exec(code, names)
            continue
        message, reason = refused
        assert reason in MIGRATION, f"{source} is refused, and no page says why"
        with pytest.raises(VLoRAError, match=message):
            exec(code, names)
        if title != "Training in the Subspace":
            # By itself it is done.
            exec(code, Names())
    return names


def test_vloras_quickstart_keeps_what_there_is(here: Path) -> None:
    names: dict[str, Any] = {}
    with pytest.warns(UserWarning, match="num_components is 16, but there are only 4") as caught:
        exec(compile(PYTHON["Quickstart"], "Quickstart", "exec"), names)
    said = [str(warning.message) for warning in caught]
    assert all(Path(warning.filename).name == "Quickstart" for warning in caught)
    # A fifth point's subspace holds next to nothing of a sixth, whatever package it is.
    assert re.search(r"Predicted to lose more than 5% .*: new_task \d+%; absorb\(\)", said[1])
    subspace = names["subspace"]
    assert list(subspace.tasks) == [*TASKS[:5], "new_task", "another"]
    # 16 were asked for, so that what is absorbed gets a component more.
    layers = open_adapter("adapters/task_0").modules
    for task, folder in [*zip(TASKS[:5], TASKS[:5]), ("another", "another_task")]:
        for layer in layers:
            wanted = delta(f"adapters/{folder}", layer)
            torch.testing.assert_close(
                restored(subspace, task, layer), wanted, atol=1e-5, rtol=1e-4
            )
    assert validate("shared_subspace") == []


@pytest.mark.parametrize("title", [name for name in PYTHON if name != "Quickstart"])
def test_code_on_vloras_page_runs(title: str, here: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = Names()
        if title == "Packed NF4 Storage":
            with pytest.raises(OutputError, match="not empty"):
                exec(PYTHON[title], names)
            assert "`save` refuses a folder that is there" in MIGRATION
            shutil.rmtree("shared_subspace")
        run(title, names)
    if title == "Multi-Task Inference":
        assert names["model"].available_tasks == TASKS[:5]
        assert names["output"].logits.isfinite().all()
    if title == "QLoRA Base Model":
        assert names["model"].qlora_info["method"] == "nf4"
    if title == "Full-Stack Compression":
        assert names["stats"]["base_model"]["compression_ratio"] == 4.0
    if title == "HuggingFace Trainer Integration":
        assert "new_task" in Checkpoint.open("updated_subspace").tasks


def test_a_model_with_a_task_answers_as_peft_does(here: Path) -> None:
    from peft import PeftModel

    names = run("Multi-Task Inference", Names())
    base = Names()["base_model"]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, "adapters/task_1")(names["input_ids"]).logits
        names["model"].set_task("task_1")
        found = names["model"](names["input_ids"]).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def call(line: str) -> str:
    done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
    assert done.exit_code == 0, f"{line}: {done.output}"
    return done.stdout


def lines(page: str) -> list[str]:
    return [
        line
        for line in re.sub(r"\\\n\s*", "", snippets(page, "bash")["CLI"]).splitlines()
        if line and not line.startswith("#")
    ]


def test_commands_on_vloras_page_run(here: Path) -> None:
    for line in lines("vlora"):
        call(line)
    assert list(Checkpoint.open("shared_subspace").tasks) == [*TASKS[:3], "new_task"]
    exported = open_adapter("exported_adapter")
    assert exported.base_model == "meta-llama/Llama-3-8B"
    assert exported.config["lora_alpha"] == 32
    merged = open_adapter("merged")
    assert list(merged.modules) == list(exported.modules)


# --- lorashare ------------------------------------------------------------------------------------


@pytest.fixture
def glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that the page's calls name; returns what was pushed."""
    write_classifiers(tmp_path, GLUE[:3])
    shutil.copytree(tmp_path / "path" / "to", tmp_path / "org")
    for number, task in enumerate(("cola", "mrpc", "rte"), 1):
        shutil.copytree(tmp_path / f"path/to/{task}_lora", tmp_path / f"adapter{number}")
    monkeypatch.chdir(tmp_path)
    pushed: list[str] = []

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> str:
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
            pushed.append(repo_id)
            assert (Path(folder_path) / "vlora_config.json").is_file()
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    monkeypatch.setattr(hub.huggingface_hub, "HfApi", Api)
    return pushed


def test_code_on_lorashares_page_runs(glue: list[str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    names: dict[str, Any] = {}
    code = snippets("lorashare", "python")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code["Python API"], "Python API", "exec"), names)
    assert glue == ["username/my-share-model"]
    share, ids = names["share"], torch.arange(2, 12)[None]
    assert share.adapter_names == ["cola_lora", "mrpc_lora", "rte_lora"]
    # 24 directions at most, so that 32 components hold all: what PEFT answers with the original.
    base = AutoModelForSequenceClassification.from_pretrained("roberta-base")
    known = PeftModel.from_pretrained(base, "path/to/cola_lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            names["model"].eval()(ids).logits, known(ids).logits, atol=1e-4, rtol=1e-3
        )
    exec(compile(code["From HuggingFace Hub"], "Hub", "exec"), names)
    stats = names["share"].compression_stats["per_adapter_explained_variance"]
    assert min(stats.values()) >= 0.9


def test_commands_on_lorashares_page_run_as_the_table_says(glue: list[str]) -> None:
    compress, info, one, every = lines("lorashare")
    options = (
        "--representation factored --num-components 32 --name cola=adapter1 --name mrpc=adapter2"
    )
    assert compress == "vllm-vlora compress adapter1/ adapter2/ adapter3/ -o ./compressed -k 32"
    call(f"vllm-vlora compress {options} --name rte=adapter3 -o ./compressed")
    call(info)
    call(one)
    call(f"{every}-all")
    for task, folder in (("cola", "adapter1"), ("rte", "adapter3")):
        for layer in open_adapter(folder).modules:
            wanted = delta(folder, layer)
            found = delta(f"reconstructed-all/{task}", layer)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    shutil.rmtree("compressed")
    assert "only 24 directions" in call(f"{compress} --json").replace("\n", " ")
