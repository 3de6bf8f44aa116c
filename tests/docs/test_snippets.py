"""The examples of README, docs and docstrings run as they stand, and print what they say they print.

A block that cannot run here says why in a comment before it: <!-- not run: needs eight H100s -->. A line that is … stands for any
lines of an output. What the reader has, such as `dog.jpg` or the checkpoint `SRC`, is there; what the text above makes is made by it.
"""

import ast
import contextlib
import doctest
import importlib
import io
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from maverick_jax.assets import digits, mini_directory
from maverick_jax.cli import compilation, demo
from maverick_jax.cli.main import COMMANDS, main, make_parser
from maverick_jax.cli.train import KINDS
from maverick_jax.config import Config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "sh", "bash", "shell", "console")
OURS = re.compile(rf"\bmaverick ({'|'.join(COMMANDS)})\b")
ANY_LINES = "…"
TYPED = "What is the sum?\n/quit\n"  # into a chat


class Block(NamedTuple):
    """A fenced piece of a page; `why` it is not run, or empty."""

    language: str
    text: str
    line: int
    why: str

    @property
    def is_ours(self) -> bool:
        return self.language == "python" or (self.language in SHELL and bool(OURS.search(self.text)))


def blocks_of(text: str) -> list[Block]:
    """The blocks that are to be run, or say why not."""
    found = [Block(m["language"], m["text"], text.count("\n", 0, m.start("text")) + 1, m["why"] or "") for m in BLOCK.finditer(text)]
    return [block for block in found if block.is_ours]


def commands_of(text: str) -> list[tuple[str, str | None]]:
    """The commands of a block and, of a block with `$`, what each prints; without `$` every line is one, and None is shown."""
    text = text.replace("\\\n", "")
    if not text.startswith("$ "):
        return [(line, None) for line in text.splitlines() if line and not line.startswith("#")]
    sessions = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
    return [(command, shown or None) for command, shown in sessions]


def run(command: str) -> tuple[int, str]:
    """Status and output of a `maverick` command, run in this process; a pipe behind it is the shell's, unless it picks lines."""
    command, _, pipe = command.partition(" | ")
    name, *arguments = shlex.split(command, comments=True)
    assert name == "maverick", f"{command!r} is no command of ours: put it into a block of its own"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(TYPED))
        status = main(arguments)
    pattern = shlex.split(pipe)[2] if pipe.startswith("grep -E ") else ""
    return status, "".join(line for line in printed.getvalue().splitlines(keepends=True) if re.search(pattern, line))


def shows(printed: str, shown: str) -> bool:
    """Whether an output is what a page shows, in which … stands for any lines."""
    pattern = "".join(".*" if line == ANY_LINES else f"{re.escape(line)}\n" for line in shown.splitlines())
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


@pytest.fixture(scope="module", autouse=True)
def programs_kept(tmp_path_factory):
    """A program that several pages need is compiled once."""
    with compilation.kept(str(tmp_path_factory.mktemp("programs"))):
        yield


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The folder that a reader sits in: the demo's pictures, a checkpoint `SRC`, a model directory and a picture of the reader's own."""
    _, left, right, _ = digits.held_out_examples(23)[22]
    config = Config.from_directory(mini_directory())
    assert config.vision is not None
    (tmp_path / "demo").mkdir()
    demo.save_pictures([digits.picture(digits.held_out()[0][i]) for i in (left, right)], tmp_path / "demo", config.vision.image_size)
    shutil.copytree(mini_directory(), tmp_path / "SRC")
    (tmp_path / "MODEL_DIR").symlink_to("SRC")
    Image.new("RGB", (32, 32), "brown").save(tmp_path / "dog.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, desk):
    """In the order of the page, in one folder and one interpreter, as somebody reads it."""
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        place = f"{page.relative_to(ROOT)}:{block.line}"
        if block.why:
            print(f"{place} not run: {block.why}")
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        else:
            for command, shown in commands_of(block.text):
                status, printed = run(command)
                assert status == 0 or shown, f"{place}: {command}\n{printed}"
                assert shown is None or shows(printed, shown), f"{place}: {command}\n{printed}"


def docstrings() -> list:
    """Every docstring with an example in it, by module and name."""
    found = []
    for folder in ("maverick_jax", "sharding", "convert"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if ">>>" in text or "```python" in text:
                        name = f"{file.relative_to(ROOT)}::{getattr(node, 'name', '')}".removesuffix("::")
                        found.append(pytest.param(name, text, id=name))
    return found


@pytest.mark.parametrize("name, text", docstrings())
def test_docstring(name, text, desk):
    for block in blocks_of(textwrap.dedent(text)):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, name, "exec"), {"__name__": name})
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(doctest.DocTestParser().get_doctest(text, {}, name, name, 0), out=report.write)
    assert runner.failures == 0, report.getvalue()


@pytest.mark.parametrize("command", [*COMMANDS, *(f"train.{kind}" for kind in KINDS)])
def test_help(command):
    """The examples of `--help` are of models and machines that are not here, but every option in them exists."""
    text = importlib.import_module(f"maverick_jax.cli.{command}").__doc__ or ""
    examples = re.findall(rf"^  (?:[\w.]+ )?maverick ({command.replace('.', ' ')}\b.*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        make_parser().parse_args(shlex.split(re.split(r" (?:[|<]|>>?) ", example)[0]))


def test_what_counts_as_an_example():
    """A block that nobody runs is one that nobody marked either: this finds them all, and tells what they print."""
    page = (
        "```python\nx = 1\n```\n\n<!-- not run: needs a friend -->\n```\nssh friend maverick chat\n```\n\n```\nls\n```\n\n"
        "```\n$ maverick plan \\\n  --json\n{}\n$ maverick chat\n```\n\n```yaml\na: b\n```\n"
    )
    blocks = blocks_of(page)
    assert [(block.language, block.line, block.why) for block in blocks] == [("python", 2, ""), ("", 7, "needs a friend"), ("", 15, "")]
    assert commands_of(blocks[2].text) == [("maverick plan   --json", "{}\n"), ("maverick chat", None)]
    assert commands_of("maverick plan  # it\n\nmake demo\n") == [("maverick plan  # it", None), ("make demo", None)]
    with pytest.raises(AssertionError, match="no command of ours"):
        run("ssh friend maverick chat")


def test_shown_outputs():
    assert shows("a\nb\nc\n", "a\nb\nc\n")
    assert shows("a\nb\nc\n", "a\n…\n")
    assert shows("a\nb\nc\n", "…\nb\n…\n")
    assert not shows("a\nb\nc\n", "a\nc\n")
    assert not shows("a\nb\nc\n", "…\nb\n")
