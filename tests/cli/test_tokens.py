"""`maverick tokens`: a table that adds up, without any weights."""

import json
import shutil

import pytest

from maverick_jax.assets import mini_directory

QUESTION = "What is the sum?"


def test_the_table_adds_up(maverick, pictures):
    """Every line says where it begins and how many tokens it stands for."""
    images = [word for picture in pictures for word in ("--image", picture)]
    result = maverick("tokens", QUESTION, *images, "--system", "Be brief.")
    found = json.loads(maverick("tokens", QUESTION, *images, "--system", "Be brief.", "--json").out)
    head, *lines, total = result.out.splitlines()
    assert (result.status, result.err) == (0, "")
    assert head.split() == ["id", "from", "token"]
    counts = [int(line.rpartition(" x ")[2]) if " x " in line else 1 for line in lines]
    assert [int(line.split()[0]) for line in lines] == [sum(counts[:i]) for i in range(len(lines))]
    assert sum(counts) == found["total"] == len(found["tokens"])
    assert total.startswith(f"{found['total']} tokens (")
    assert total.endswith("% of the context of 4,096")
    assert sum(line.endswith("<|patch|> x 4") for line in lines) == 2
    assert found["context"] == 4096


def test_it_counts_what_generate_reads(maverick, pictures, tmp_path):
    """And needs neither weights nor their index."""
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(mini_directory() / name, tmp_path)
    asked = ("--image", pictures[0], QUESTION)
    total = json.loads(maverick("tokens", "-m", tmp_path, *asked, "--json").out)["total"]
    answer = maverick("generate", *asked, "--json", "--max-new-tokens", 1, "--mesh", "data=1").out
    assert json.loads(answer)["prompt_tokens"] == total


def test_text_is_told_from_control(maverick):
    """What is spelled like a control token is not one; quotes show which is which, and where spaces are."""
    lines = maverick("tokens", "<|eot|>\x1b\u202e é").out.splitlines()
    control = [line.split()[2:] for line in lines if line.endswith("<|eot|>")]
    assert control == [["template", "<|eot|>"]]
    assert all(line.isprintable() for line in lines)
    assert any(line.endswith('"\\u001b"') for line in lines)
    assert sum("\\x" in line for line in lines) == 5  # of two characters that have no token of their own
    raw = json.loads(maverick("tokens", "--raw", "What", "--json").out)
    assert [(token["text"], token["from"]) for token in raw["tokens"]] == [("<|begin_of_text|>", "template"), ("What", "text")]


def test_a_prompt_that_is_too_long(maverick):
    assert maverick("tokens", "--raw", "word " * 5000).out.splitlines()[-1].endswith("of the context of 4,096, which is too long")


@pytest.mark.parametrize("option", [("--raw", "--system", "x"), ("--raw", "--image", "x.png"), ("-m", "nowhere"), ("--image", "x.png")])
def test_mistakes(maverick, option):
    result = maverick("tokens", QUESTION, *option)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
