"""`maverick chat` line by line: commands, files, mistakes after which it goes on."""

import io
import json
import shlex

import pytest
from PIL import Image

from maverick_jax.cli import options
from maverick_jax.cli.terminal.answers import harmless, receive
from maverick_jax.errors import UserError
from maverick_jax.inference import chat as chat_module
from oracle.scripted import TOKENIZER, Model, Scripted


@pytest.fixture
def talk(maverick, monkeypatch):
    """`talk(lines, answers)` -> what the command left behind; of the model only its weights are missing."""

    def run(lines, answers=(), *arguments, engine=Scripted):
        Scripted.answers, Scripted.seen = list(answers), []
        monkeypatch.setattr(chat_module, "engine_for", engine)
        monkeypatch.setattr(options, "load_model", lambda args: Model())
        text = lines if isinstance(lines, bytes) else "\n".join(map(str, lines)).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        return maverick("chat", *arguments)

    return run


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["plain.png", "my red.png", "it's.png"]
    for name in names:
        Image.new("RGB", (60, 32)).save(tmp_path / name)
    return [tmp_path / name for name in names]


@pytest.mark.parametrize("form", ["as it is", "quoted", "with backslashes", "of the home directory", "all at once"])
def test_files_are_named_as_in_a_shell(talk, files, form):
    """Terminals write a file that is dropped on them with quotes or backslashes; people type it as it is."""
    names = {
        "as it is": files,
        "quoted": [shlex.quote(str(file)) for file in files],
        "with backslashes": [str(file).replace(" ", "\\ ").replace("'", "\\'") for file in files],
        "of the home directory": [f"~/{file.name}" for file in files],
        "all at once": [shlex.join(map(str, files))],
    }[form]
    result = talk([*(f"/image {name}" for name in names), "What?"], ["Red."])
    assert (result.status, result.out) == (0, "Red.\n")
    assert result.err.count("60 x 32 pixels, 3 tiles (1 x 2 and the whole picture), 17 tokens\n") == 3
    assert Scripted.seen[0][1].shape == (9, 3, 32, 32)


def test_pictures_belong_to_the_next_question(talk, files):
    """`/reset` forgets those that wait, too; what a picture takes is what the prompt then has."""
    talk([f"/image {files[0]}", "One?", "Two?", f"/image {files[0]}", "/reset", "Three?"], ["a", "b", "c"])
    assert [tiles is not None for _, tiles in Scripted.seen] == [True, True, False]
    patches = [ids.count(TOKENIZER.id_of("<|patch|>")) for ids, _ in Scripted.seen]
    assert patches == [12, 12, 0]
    assert "Two?" not in TOKENIZER.decode(Scripted.seen[2][0])


MISTAKES = {
    b"/image": "maverick: /image takes files: /image dog.jpg 'my cat.png'",
    b"/image absent.png": "maverick: picture absent.png cannot be read (No such file or directory): check the path.",
    b"/image https://a.b/c.png": "maverick: picture https://a.b/c.png is an address, which is not fetched",
    b"/image 'a": "maverick: /image 'a cannot be understood (No closing quotation)",
    b"/image .": "maverick: picture . is not a file: check the path.",
    b"/image ~no-such-user/a.png": "maverick: picture ~no-such-user/a.png cannot be read",
    b"/image " + b"a" * 5000: "File name too long",
    b"/image \xff.png": "maverick: picture \\udcff.png cannot be read",
    b"/nonsense": "maverick: /nonsense is no command: /help lists them",
    b"/reset now": "maverick: /reset is no command",
    b"/": "maverick: / is no command",
    b"\xff\xfe": "maverick: this line is not UTF-8: it is left out.",
    b"/help": "/reset            forget the conversation",
}


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: line[:24].decode(errors="replace"))
def test_a_mistake_does_not_end_the_chat(talk, line):
    result = talk(line + b"\nHello\n", ["Hi."])
    assert (result.status, result.out) == (0, "Hi.\n")
    first, *rest, last = result.err.splitlines()
    assert MISTAKES[line] in result.err
    assert first.isprintable()
    assert len(rest) == (4 if line == b"/help" else 0)
    assert "new tokens" in last


def test_slashes_and_white_space(talk):
    """Two slashes are one; lines without words are no questions; `/quit` ends, and so does the end."""
    result = talk(["", "   \t ", "//etc/hosts?", "/quit", "not read"], ["A file."])
    assert (result.status, result.out) == (0, "A file.\n")
    assert TOKENIZER.encode("/etc/hosts?") == Scripted.seen[0][0][5:-5]


def test_a_full_context_names_the_way_out(talk):
    """The request is checked as it is, before anything is computed."""
    result = talk(["word " * 5000, "/reset"], engine=chat_module.engine_for)
    assert result.status == 0
    assert result.err.startswith("maverick: prompt 0 has ")
    assert "the context holds 4096" in result.err
    assert result.err.endswith(" /reset forgets what was said so far; --max-new-tokens asks for shorter answers.\n")


def test_an_error_ends_the_answer_and_not_the_chat(talk):
    result = talk(["One?", "Two?"], [["half", UserError("not finite")], "whole"])
    assert (result.status, result.out) == (0, "half\nwhole\n")
    assert result.err.splitlines()[0] == "maverick: not finite"


def test_ctrl_c_where_nobody_sits_ends_the_command(talk):
    """A script that is interrupted shall not go on with its next line."""
    result = talk(["One?", "Two?"], [["half", KeyboardInterrupt()], "whole"])
    assert (result.status, result.out) == (130, "half\n")
    assert result.err == "maverick: interrupted.\n"


def test_json_is_a_line_for_every_answer(talk):
    """As it was said: a program that reads it decides what to show."""
    result = talk(["One?", "/nonsense", "Two?"], ["\x1b[31mé\n", "b"], "--json")
    assert [json.loads(line)["text"] for line in result.out.splitlines()] == ["\x1b[31mé\n", "b"]
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\nc é 😀 👩\u200d💻 \u200f", "a\tb\nc é 😀 👩\u200d💻 \u200f"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("safe\rhidden\b\x7f\x00", "safe\\rhidden\\x08\\x7f\\x00"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202egnp.exe\u2066x\u2069", "\\u202egnp.exe\\u2066x\\u2069"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    """They would move the cursor, retitle the window, or hide what was said; joiners of emoji are no such thing."""
    assert harmless(text) == shown


def test_files_and_pipes_get_what_was_said(capsys, monkeypatch):
    assert receive(["\x1b[31m", "red"]) == "\x1b[31mred"
    assert capsys.readouterr().out == "\x1b[31mred\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert receive(["\x1b[31m", "red"]) == "\x1b[31mred"
    assert capsys.readouterr().out == "\\x1b[31mred\n"
