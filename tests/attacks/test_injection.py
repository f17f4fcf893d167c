"""Names that others gave reach no output as anything but text: terminal, JSON, card, page, log, shell."""

from __future__ import annotations

import html.parser
import io
import itertools
import json
import logging
import shlex
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from attacking import scaled
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.progress import Progress
from safetensors.torch import save_file
from synthetic import SHAPES, family, run, save
from typer.testing import CliRunner

from vllm_vlora.checkpoint.card import model_card
from vllm_vlora.checkpoint.manifest import CONFIG_FILE, encode_config, read_config
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import report_contents
from vllm_vlora.checkpoint.serving import remove_line, serve_command
from vllm_vlora.errors import CheckpointError, VLoRAError
from vllm_vlora.tools import html_report, summary, terminal
from vllm_vlora.tools.cli import app
from vllm_vlora.tools.task_plots import render_plots
from vllm_vlora.wording import quoted, shown

ATTACKS = {
    "colours": "\x1b[31mred\x1b[0m",
    "clear screen": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\text\x1b]8;;\x1b\\",
    "8-bit CSI": "\x9b31m",
    "carriage return": "good\rbad",
    "lines": "one\nError: forged\n\n# forged",
    "unicode lines": "one\u2028two\u2029three\x85four",
    "right to left": "abc\u202egpj.exe\u2066x\u2069",
    "invisible": "a\u200bb\ufeffc\u00add",
    "tag characters": "a\U000e0041\U000e0042",
    "rich markup": "[red]loud[/red] [link=http://evil]x[/link]",
    "emoji": ":boom:",
    "markdown": "x\n```\n\n<script>alert(1)</script>\n\n[a](javascript:b) | x | $$y$$ `c`",
    "html": "</code></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'",
    "yaml": "x\n---\nlicense: evil\n---",
    "option": "--config=evil.yaml",
    "short option": "-o",
    "shell": "x; touch owned; $(touch owned) `touch owned` ' \" \\",
    "backspace": "safe\b\b\b\bevil",
    "lone surrogate": "a\ud800b",
}
every_attack = pytest.mark.parametrize("name", ATTACKS.values(), ids=ATTACKS)
# Through whole commands, which take a second each, all at once; one by one in the long form.
ATTACKS_AT_ONCE = {
    "all": "".join(
        text for kind, text in ATTACKS.items() if kind not in ("option", "lone surrogate")
    ),
    "option": ATTACKS["option"],
}
every_command = pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(text, id=kind) for kind, text in ATTACKS_AT_ONCE.items()),
        *(
            pytest.param(text, id=f"long: {kind}", marks=pytest.mark.attacks_long)
            for kind, text in ATTACKS.items()
        ),
    ],
)
nasty_text = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("\x1b\x9b\x07\n\r\u202e\u2066\u2028\u200b`<>[]|$-'\"\\&;#~\ufeff"),
    ),
    min_size=1,
    max_size=40,
)


def assert_harmless(text: str) -> None:
    """Every character is seen as what it is; line feeds are the program's own."""
    seen = {c for c in text if not c.isprintable() and c != "\n"}
    assert not seen, f"{sorted(map(ascii, seen))} in {text!r}"


# --- the one function --------------------------------------------------------------------------------


@settings(max_examples=scaled(200), deadline=None)
@given(nasty_text)
def test_what_is_shown_is_visible_and_shown_again_the_same(text: str) -> None:
    assert shown(text).isprintable()
    assert shown(shown(text)) == shown(text)
    assert not any(unicodedata.category(c)[0] == "C" for c in shown(text))
    if text.isprintable():
        assert shown(text) == text


def test_words_for_the_shell_read_back_as_they_were() -> None:
    words = [text for text in ATTACKS.values() if "\ud800" not in text]
    line = quoted(words)
    assert line.isprintable()
    echo = "import sys; sys.stdout.buffer.write('\\0'.join(sys.argv[1:]).encode())"
    found = subprocess.run(
        ["bash", "-c", f"python3 -c {shlex.quote(echo)} {line}"], capture_output=True, check=True
    )
    assert found.stdout.decode().split("\0") == words


# --- terminal ----------------------------------------------------------------------------------------


@settings(max_examples=scaled(60), deadline=None)
@given(nasty_text)
def test_nothing_that_a_console_prints_is_obeyed(text: str) -> None:
    console = terminal.open_console()
    console.file = io.StringIO()
    summary.line(console, text)
    assert console.file.getvalue().count("\n") == 1
    table = summary.make_table(["Name", text], ["Number"], title=text)
    table.add_row(text, text)
    table.add_row(summary.Text(text, style="bold"), "2")
    console.print(table)
    console.print(text)
    summary.print_warnings(console, [text])
    assert_harmless(console.file.getvalue())


@every_attack
def test_a_bar_and_its_stages_say_what_they_are(name: str) -> None:
    for is_terminal in (False, True):
        console = terminal.open_console()
        console.file, console._force_terminal = io.StringIO(), is_terminal
        with terminal.progress_bar(console) as advance:
            advance(name, 1, 2)
            if isinstance(advance._progress, Progress):
                (task,) = advance._progress.tasks
                rendered = advance._progress.make_tasks_table([task])
                console.print(rendered)
        text = console.file.getvalue().encode("utf-8", "backslashreplace").decode()
        # Of a terminal the bar's own codes move the cursor and set colours.
        assert "\u202e" not in text
        assert "\x9b" not in text
        assert "\x1b]" not in text
        assert "\x1b[2J\x1b[H" not in text
        if "[red]" in name:
            assert "[red]loud[/red]" in text


@every_attack
def test_an_error_is_one_harmless_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (CheckpointError(f"{name}: no such"), OSError(2, name, name)):
        for verbose in (False, True):
            with pytest.raises(terminal.typer.Exit), terminal.reported(verbose):
                raise error
            output = capsys.readouterr().err
            assert_harmless(output)
            assert verbose or output.count("\n") == 1
    assert str(VLoRAError(name)).isprintable()


@every_attack
def test_a_log_has_the_error_as_it_is_shown(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        logging.getLogger("vllm").error("vllm-vlora: %s", CheckpointError(f"task {name}"))
    assert_harmless(caplog.records[-1].getMessage())


@every_attack
def test_json_is_harmless_and_means_the_same(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({name: [name]})
    output = capsys.readouterr().out
    assert_harmless(output)
    assert json.loads(output) == {name: [name]}


# --- every command -----------------------------------------------------------------------------------


def with_foreign_manifest(ckpt: Path, name: str) -> None:
    """The checkpoint with this text wherever its manifest has any."""
    config = read_config(ckpt)
    config.base_model, config.created_by = name, name
    names = {m.name: f"{name}.{m.name}" for m in config.modules}
    config.modules = [msgspec.structs.replace(m, name=names[m.name]) for m in config.modules]
    (ckpt / CONFIG_FILE).write_bytes(encode_config(config))


@every_command
def test_commands_show_a_foreign_checkpoint_and_obey_none_of_it(name: str, tmp_path: Path) -> None:
    if "\ud800" in name:
        pytest.skip("no manifest that is read holds it")
    # A task's id holds no control character, but bidi ones and markup.
    task = "".join(c for c in name if unicodedata.category(c) not in ("Cc", "Zl", "Zp"))[:200]
    adapters = family(tmp_path / "adapters", 2, related=True)
    adapters = {task: adapters["task0"], "--force": adapters["task1"]}
    run(adapters, tmp_path / "ckpt", representation="private", ratio=1)
    with_foreign_manifest(tmp_path / "ckpt", name)
    ckpt = str(tmp_path / "ckpt")
    for words in (
        ["info", ckpt],
        ["info", ckpt, "--json"],
        ["validate", ckpt],
        ["plan", ckpt, "--max-loras", "2"],
        ["diff", ckpt, task, "--", "--force"],
        ["diff", ckpt, "nothing", task],
        ["serve", ckpt, "--dry-run"],
        ["serve", "--base", name, ckpt, "--dry-run"],
        ["merge", ckpt, task, "-o", str(tmp_path / "merged")],
        ["export", ckpt, "--all", "-o", str(tmp_path / "exported")],
        ["remove", ckpt, "-o", str(tmp_path / "less"), "--", "--force"],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), words
        assert_harmless(result.output)
    assert_card_is_text((tmp_path / "less" / "README.md").read_text(), name)


@every_command
def test_commands_show_a_foreign_adapter_and_obey_none_of_it(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folders = tmp_path / "adapters"
    for task in ("a", "b"):
        save(folders / task, SHAPES, 4, generator, base="org/base")
        config = json.loads((folders / task / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": name, "revision": name, name.strip(): name}
        (folders / task / "adapter_config.json").write_text(json.dumps(config))
    save(folders / "refused", SHAPES, 4, generator)
    weights = {f"{name}.lora_A.weight".replace("\ud800", ""): torch.ones(2, 2)}
    save_file(weights, folders / "refused" / "adapter_model.safetensors")
    odd = folders / name.replace("/", "").replace("\ud800", "").encode()[:200].decode(
        errors="ignore"
    )
    odd.mkdir()
    out = str(tmp_path / "out")
    for words in (
        ["compress", str(folders), "-o", out],
        ["compress", str(folders / "a"), str(folders / "b"), "-o", out, "--ratio", "1"],
        ["compress", str(folders / "refused"), "-o", out],
        ["analyze", str(folders / "a"), str(folders / "b")],
        ["diff", str(folders / "a"), str(folders / "refused")],
        ["merge", str(folders / "a"), str(folders / "b"), "-o", str(tmp_path / "merged")],
        ["compress", str(odd), "-o", out],
        ["info", str(odd)],
        ["validate", str(odd)],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), words
        assert_harmless(result.output)
    card = tmp_path / "out" / "README.md"
    if card.exists():
        assert_card_is_text(card.read_text(), name)


# --- card --------------------------------------------------------------------------------------------


def assert_card_is_text(card: str, name: str) -> None:
    """The card's blocks are those that it has for an ordinary name, and no HTML is among them."""
    assert_harmless(card)
    _, front, body = card.split("---\n", 2)
    assert {line.partition(":")[0] for line in front.splitlines()} <= {
        "base_model", "base_model_relation", "library_name", "tags", "- lora", "- vllm", "- peft",
    }  # fmt: skip
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    headings = [
        following.content
        for token, following in itertools.pairwise(tokens)
        if token.type == "heading_open"
    ]
    assert headings[1:] == ["Tasks", "Serve", "Take a task out again"]
    assert [t.type for t in tokens].count("fence") == 2
    kinds = {child.type for token in tokens for child in token.children or ()}
    assert "html_block" not in {t.type for t in tokens}
    assert not {"html_inline", "link_open", "image"} & kinds


@settings(
    max_examples=scaled(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(base=nasty_text, task=nasty_text)
def test_a_card_stays_a_card(base: str, task: str, card_of: Callable[[str, str], str]) -> None:
    assert_card_is_text(card_of(base, task), base)


@every_attack
def test_a_card_is_not_written_by_a_name(name: str, card_of: Callable[[str, str], str]) -> None:
    assert_card_is_text(card_of(name, name), name)


@pytest.fixture(scope="module")
def card_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    folder = tmp_path_factory.mktemp("card")
    run(family(folder / "adapters", 1, related=True), folder / "ckpt", ratio=1)
    opened = Checkpoint.open(folder / "ckpt")
    (record,) = opened.tasks.values()

    def make(base: str, task: str) -> str:
        report = report_contents(folder, {task: record}, opened.modules, 0)
        report.kl_kept, report.kept = {task: 0.5}, [task]
        return model_card(base, report)

    return make


# --- pages -------------------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """Which elements and attributes a page has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


@every_attack
def test_a_page_has_the_same_elements_whatever_the_names(name: str) -> None:
    from vllm_vlora.tools.plots import Bars

    def page(text: str) -> str:
        table = html_report._table((text, "b"), [(text, text)], text=(0,))
        bars = Bars(text, text, [text, "other"], [1.0, 2.0])
        return html_report.render_page(text, [table, html_report.render_figure(bars)]) + (
            render_plots(text, [bars])
        )

    found = page(name)
    assert_harmless(found)
    elements, plain = Elements(found).found, Elements(page("plain")).found
    assert [e for e in elements if e[0] != "tspan"] == [e for e in plain if e[0] != "tspan"]


# --- the line that people paste ----------------------------------------------------------------------


@settings(max_examples=scaled(100), deadline=None)
@example(base="0", where="\ud800")
@given(base=nasty_text, where=nasty_text)
def test_the_serve_line_gains_no_option(base: str, where: str) -> None:
    line = serve_command(where, base, 8, 2)
    assert line.isprintable()
    if where.isprintable():
        words = shlex.split(line)
        assert words[1:3] == ["vllm", "serve"]
        assert not words[3].startswith("-")
        assert words[4:] == ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]


@every_attack
def test_serve_takes_no_base_model_that_is_an_option(name: str) -> None:
    from vllm_vlora.errors import OptionError
    from vllm_vlora.tools.serve_command import _model

    checkpoint = SimpleNamespace(path="ckpt", base_model=name)
    if name.startswith("-") or not name.isprintable():
        with pytest.raises(OptionError):
            _model(checkpoint, None)  # type: ignore[arg-type]
    else:
        assert _model(checkpoint, None) == name  # type: ignore[arg-type]


def test_the_remove_line_takes_no_task_for_an_option() -> None:
    assert remove_line("CKPT", ["t2"]) == "vllm-vlora remove CKPT t2 -o COPY"
    assert remove_line("a b", ["--force", "x y"]) == (
        "vllm-vlora remove 'a b' -o COPY -- --force 'x y'"
    )
