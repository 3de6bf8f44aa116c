"""`maverick plan`: what it prints, and a line for every mistake."""

import dataclasses
import importlib.util
import json
import re
import shlex

import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.config import Config
from maverick_jax.plan import make_plan
from maverick_jax.plan.plot import save_plot


def test_text(maverick):
    result = maverick("plan", "--topology", "v6e:8x8", "--mesh", "expert=8,tensor=8")
    assert result.status == 0
    assert "803.17 GB in bfloat16" in result.out
    assert re.search(r"^routed experts +11\.25$", result.out, re.MULTILINE)  # 2 x 386.5 B / 64
    assert "50.5 of 128 experts hit in a layer; a token takes 10,240 B to its expert and as many back" in result.out
    assert "memory binds" in result.out


def test_json_has_the_numbers_of_the_text(maverick):
    question = ("plan", "--topology", "h100:8", "--dtype", "fp8")
    text, values = maverick(*question).out, json.loads(maverick(*question, "--json").out)
    assert values["mesh"] == {"data": 1, "expert": 1, "tensor": 8}
    assert values["weight_bytes"] == 416_752_626_688
    assert values["decode"]["binds"] == "memory"
    assert f"at most {values['decode']['tokens_per_second']['user']:,.0f} tokens/s per user" in text
    assert f"batch {values['largest_batch']:,} at context 8,192" in text


def test_search(maverick):
    result = maverick("plan", "--topology", "v6e:8x8", "--layout", "throughput", "--search")
    lines = result.out.splitlines()
    assert lines[0].split()[:2] == ["mesh", "layout"]
    assert lines[1].startswith("expert=8,tensor=8")
    plans = json.loads(maverick("plan", "--topology", "v6e:8x8", "--layout", "throughput", "--search", "--json").out)["plans"]
    assert len(plans) == len(lines) - 1


def test_a_directory(maverick):
    """The mini model, by its config.json alone; its weights are not read."""
    result = maverick("plan", "-m", mini_directory(), "--topology", "v5e:2x4", "--mesh", "expert=8", "--context", "128", "--json")
    assert json.loads(result.out)["memory_per_device"]["fits"]


def test_a_directory_of_a_small_model(maverick):
    """What nobody asked for fits the model: its context is 4,096 tokens, half of the usual default."""
    result = maverick("plan", "-m", mini_directory(), "--topology", "h100:8x2")
    assert result.status == 0, result.err
    assert result.out.startswith("3.8 M parameters")
    assert "batch 64, context 4,096\n" in result.out
    assert "batch 64, context 8,192\n" in maverick("plan", "--topology", "v6e:8x8").out


def test_two_hosts(maverick):
    """What the second host costs is a line of its own, in the text, in JSON and where it binds."""
    question = ("plan", "--topology", "h100:8x2", "--dtype", "fp8")
    text, values = maverick(*question).out, json.loads(maverick(*question, "--json").out)
    assert re.search(r"^  network .* MB to other hosts: attention parts all-reduce 50%, all-to-all to experts 25%", text, re.MULTILINE)
    assert "mesh expert=2,tensor=8" in text
    assert "the network binds" in text  # of a prefill
    assert values["hosts"] == 2
    assert sum(values["decode"]["crossed_bytes"].values()) / 50e9 == pytest.approx(values["decode"]["seconds"]["network"])


def test_half_chips(maverick):
    """Whoever counts chips learns that jax counts halves."""
    assert "v7x:2x2x1: 8 devices (2 of each chip) of 96 GiB" in maverick("plan", "--topology", "v7x:2x2x1", "--dtype", "int4").out


def test_plot(maverick, tmp_path):
    """The title says of what; a picture that cannot be finished leaves the old one as it was."""
    question = ("plan", "-m", mini_directory(), "--topology", "v6e:2x2", "--plot", tmp_path / "plan.svg")
    assert maverick(*question).status == 0
    picture = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    for words in ("mini in bfloat16 on v6e:2x2", "mesh expert=2,tensor=2, layout throughput", "tokens/s per user", "memory binds"):
        assert re.search(f"<!-- .*{re.escape(words)}.* -->", picture), words
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.svg"]
    assert maverick(*question[:-1], tmp_path / "plan.png").status == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_anything(tmp_path):
    """Of what does not fit at any batch, of one row, and of a model whose folder is called like a formula."""
    for name, topology in (("a$^{$", "h100:1"), ("scout", "h100:8")):
        save_plot(make_plan(Config.scout(), topology=topology, batch=1), tmp_path / "plan.svg", model=name)
        assert f"<!-- {name} in bfloat16 on {topology} -->" in (tmp_path / "plan.svg").read_text(encoding="utf-8")


def test_a_plot_that_cannot_be_finished(maverick, tmp_path, monkeypatch):
    """A full disk costs neither the old picture nor leaves half of the new one."""
    from matplotlib.figure import Figure

    def full(self, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    (tmp_path / "plan.png").write_bytes(b"old")
    expect(maverick("plan", "--topology", "v6e:8x8", "--plot", tmp_path / "plan.png"), ["plan.png", "No space left on device"])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("plan.png", b"old")]


@pytest.mark.parametrize(
    "arguments, excess",
    [
        ("--topology h100:8", 31.6),
        ("--topology v6e:8x8 --batch 2000", None),
        ("--topology h100:8 --dtype fp8 --mesh expert=8", None),
        ("--topology v6e:4x4 --mesh expert=2,tensor=8", None),
        ("--topology v6e:4x4 --search", None),
    ],
)
def test_what_does_not_fit(maverick, arguments, excess):
    """By how much, and single changes each of which really suffices."""
    result = maverick("plan", *shlex.split(arguments))
    expect(result, ["does not fit", f"{excess} GiB more than" if excess else "GiB more than"])
    changes = re.search(r"what would fit: (.*)\.$", result.err).group(1).split(", or ")
    assert changes
    for change in changes:
        if change.startswith("--topology") and "--mesh" not in change:
            arguments = re.sub(r"--mesh \S+", "", arguments)
        assert maverick("plan", *shlex.split(arguments), *shlex.split(change)).status == 0, change


def test_nothing_suffices(maverick):
    """Scout in float32, the whole of it on every device: no single change is made up."""
    question = "plan --model scout --topology v5e:16x16 --mesh data=256 --dtype float32 --batch 4096 --context 1048576"
    expect(maverick(*question.split()), ["no single change"])


def expect(result, words):
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("maverick: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_compile(maverick, tmp_path):
    """What the real compiler says of the decode step, beside the plan's estimate; a two-layer Maverick."""
    text = dataclasses.replace(Config.maverick().text, num_hidden_layers=2, moe_layers=(1,), nope_layers=(), vocab_size=1024)
    config = dataclasses.replace(Config.maverick(), text=text, vision=None)
    (tmp_path / "config.json").write_text(json.dumps(config.to_huggingface()))
    asked = ("plan", "-m", tmp_path, "--topology", "v6e:2x2", "--mesh", "expert=4", "--batch", "8", "--context", "1024", "--compile")
    result = maverick(*asked, "--json")
    assert result.status == 0, result.err
    compiled = json.loads(result.out)["compiled"]
    assert compiled["collectives"]["all-to-all"]["count"] == 3
    assert compiled["arguments"] > compiled["temporaries"] > 0


def test_training(maverick):
    """Maverick's QLoRA, experts included, on one host of H100s: it fits, with two rows per device at most."""
    question = ("plan", "--train", "qlora", "--topology", "h100:8")
    text, values = maverick(*question).out, json.loads(maverick(*question, "--json").out)
    assert (values["dtype"], values["layout"], values["batch"], values["length"]) == ("int4", "training", 8, 8192)
    assert values["mesh"] == {"data": 1, "expert": 8, "tensor": 1}
    assert values["memory_per_device"]["fits"]
    assert values["largest_batch"] == values["over_batch"][-1]["batch"] == 16
    assert "room for 16 rows of 8,192 tokens in a micro-batch" in text
    assert f"at most {values['step']['tokens_per_second']:,.0f} tokens/s" in text
    assert f"MFU at most {values['step']['mfu']:.0%}" in text


def test_settings_of_training_are_passed_on(maverick):
    changes = "--rank 8 --expert-rank 2 --length 1024 --batch 16 --accumulate 3 --remat products --dtype fp8 --mesh expert=8"
    values = json.loads(maverick("plan", "--train", "lora", "--topology", "h200:8", "--json", *changes.split()).out)
    named = ("rank", "expert_rank", "length", "batch", "accumulate", "remat", "dtype")
    assert [values[name] for name in named] == [8, 2, 1024, 16, 3, "products", "fp8"]
    assert values["step"]["tokens"] == 3 * 16 * 1024
    full = maverick("plan", "--train", "full", "--master", "--topology", "v5p:4x4x8", "--mesh", "data=2,expert=32,tensor=2", "--json")
    assert json.loads(full.out)["master"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--length 8192", ["--length is a setting of training", "--train"]),
        ("--master", ["--master is a setting of training"]),
        ("--train sft", ["training is 'sft'", "lora, qlora, full"]),
        ("--train qlora --dtype bfloat16", ["not of bfloat16", "fp8, int8, int4"]),
        ("--train full --dtype int4", ["weights in int4 cannot be learned"]),
        ("--train qlora --master", ["float32 as they are"]),
        ("--train qlora --remat all", ["remat is 'all'", "layers, products, none"]),
        ("--train qlora --rank 0", ["rank is 0", "from 1"]),
        ("--train qlora --mesh expert=8 --batch 12", ["among 8 devices", "12 rows", "Choose 16"]),
        ("--train qlora --search", ["--search is not for --train"]),
        ("--train qlora --context 8192", ["--context is not for --train", "--length"]),
    ],
)
def test_mistakes_about_training(maverick, arguments, words):
    expect(maverick("plan", "--topology", "h100:8", *arguments.split()), words)


@pytest.mark.parametrize(
    "arguments",
    [
        "--train lora --topology h100:8",
        "--train qlora --topology h100:8 --mesh expert=8 --batch 64",
        "--train qlora --topology h100:8 --remat none --mesh expert=8",
    ],
)
def test_training_that_does_not_fit(maverick, arguments):
    """By how much, and single changes each of which really suffices."""
    result = maverick("plan", *arguments.split())
    expect(result, ["training", "does not fit", "GiB more than"])
    for change in re.search(r"what would fit: (.*)\.$", result.err).group(1).split(", or "):
        asked = re.sub(r"--mesh \S+", "", arguments) if "--mesh" in change else arguments
        assert maverick("plan", *asked.split(), *change.split()).status == 0, change


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_plot_of_training(maverick, tmp_path):
    result = maverick("plan", "--train", "qlora", "--topology", "h100:8", "--mesh", "expert=8", "--plot", tmp_path / "plan.svg")
    assert result.status == 0, result.err
    drawn = (tmp_path / "plan.svg").read_text()
    for words in ("qlora: maverick in int4 on h100:8", "optimizer moments", "at most, MFU, %", "8 rows of 8,192 tokens"):
        assert words in drawn
