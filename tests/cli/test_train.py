"""`maverick train`: a run from a file to an adapter that is used, and what is no run."""

import json

import pytest

import maverick_jax as mj
import maverick_jax.cli.train
from maverick_jax.assets import digits, mini_directory
from maverick_jax.checkpoint import save
from maverick_jax.config import Config
from oracle.plain import plain_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions about two pictures, whose answers are all "9." now."""
    folder = tmp_path_factory.mktemp("data")
    for index, pixels in enumerate(digits.held_out()[0][:8]):
        digits.picture(pixels).save(folder / f"{index}.png")
    with (folder / "data.jsonl").open("w") as file:
        for n in range(24):
            pictures = [{"type": "image", "image": f"{(n + k) % 8}.png"} for k in (0, 3)]
            question = {"type": "text", "text": digits.QUESTIONS[n % len(digits.QUESTIONS)]}
            messages = [{"role": "user", "content": [*pictures, question]}, {"role": "assistant", "content": "9."}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder / "data.jsonl"


ONE = ("--dtype", "float32", "--mesh", "expert=1")  # device
LEARN = (*ONE, "--length", "128", "--batch", "2", "--steps", "12", "--learning-rate", "0.01", "--save-every", "6")


def test_sft(maverick, data, tmp_path):
    """What was learned is said, kept, gone on with, and used; the metrics fall."""
    out = tmp_path / "run"
    told = maverick("train", "sft", data, out, *LEARN)
    assert told.status == 0, told.err
    assert told.out.strip() == str(out / "adapter")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    told_of = {"accuracy", "gradient_norm", "tokens_per_second", "imbalance", "router_entropy", "dropped", "learning_rate"}
    assert told_of <= records[0].keys()
    assert list((out / "tensorboard").iterdir())
    pictures = [data.parent / "0.png", data.parent / "3.png"]
    question = ("generate", *ONE, "--image", pictures[0], "--image", pictures[1], digits.QUESTIONS[0])
    assert maverick(*question, "--adapter", out / "adapter").out == "9.\n"
    again = maverick("train", "sft", data, out, *LEARN, "--json")  # finished: nothing is done again
    assert json.loads(again.out)["learned"] == str(out / "adapter")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 12


def test_sft_of_all_weights(maverick, data, tmp_path):
    """A model directory, which loads; on eight devices."""
    out = tmp_path / "run"
    settings = ("--length", "64", "--batch", "8", "--steps", "1", "--mesh", "data=2,expert=2", "--remat", "layers", "--no-packing")
    told = maverick("train", "sft", data, out, *settings, "--full", "--master", "--freeze", "text.embedding")
    assert told.status == 0, told.err
    assert mj.load(told.out.strip()).config.text.num_hidden_layers == 8


@pytest.fixture(scope="module")
def pairs(data):
    """The same questions, of whose answers the first is preferred."""
    file = data.parent / "pairs.jsonl"
    lines = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    file.write_text("".join(json.dumps({"messages": messages[:1], "chosen": "9.", "rejected": "8."}) + "\n" for messages in lines))
    return file


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_dpo(maverick, pairs, tmp_path):
    """At first it costs log 2; then what is preferred is told apart, also in what was held out."""
    out = tmp_path / "run"
    settings = (*ONE, "--length", "64", "--batch", "4", "--steps", "8", "--learning-rate", "0.01")
    told = maverick("train", "dpo", pairs, out, *settings, "--hold-out", "0.2", "--look-every", "4", "--json")
    assert told.status == 0, told.err
    assert json.loads(told.out)["learned"] == str(out / "adapter")
    found = records(out)
    assert abs(found[0]["loss"] - 0.6931) < 1e-3
    assert found[-1]["preferred"] == 1
    assert found[-1]["held_out_preferred"] == 1
    assert found[-1]["held_out_loss"] < 0.6
    assert "held_out_loss" not in found[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two models that compile quickly, the second one another, and questions for them: directories and a file."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": Config.from_directory(mini_directory()).text.vocab_size, "max_position_embeddings": 128}
    for name, layers in (("model", 3), ("teacher", 2)):
        save(plain_model(**sizes, num_hidden_layers=layers), folder / name, companions=mini_directory())
    lines = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


SHORT = (*ONE, "--length", "64", "--max-new-tokens", "8")


def test_filter(maverick, tiny, tmp_path):
    """What a model that knows nothing never says is hard; other borders judge nothing anew, another count is another run."""
    ask = ("train", "filter", tiny / "data.jsonl", tmp_path / "hard", "-m", tiny / "model", *SHORT)
    told = maverick(*ask, "--count", "2", "--json")
    assert told.status == 0, told.err
    assert json.loads(told.out) == {"out": str(tmp_path / "hard"), "prompts": 8, "kept": 8, "pass@1": 0.0, "pass@2": 0.0}
    again = maverick(*ask, "--count", "2", "--lowest", "0.5")
    assert again.out.splitlines()[-1] == str(tmp_path / "hard" / "kept.jsonl")
    assert " 0 of 2 right  8 " in again.out
    assert (tmp_path / "hard" / "kept.jsonl").read_bytes() == b""
    assert "is a run with another --count: 2 there, 3 now" in maverick(*ask, "--count", "3").err


def test_rl(maverick, tiny, tmp_path):
    """Its own answers, judged by a function of a file; sampler and trainer agree but for rounding."""
    (tmp_path / "reward.py").write_text("def short(text, line):\n    return -len(text)\n")
    settings = ("--batch", "4", "--prompts", "2", "--group", "4", "--steps", "2", "--reward", f"{tmp_path / 'reward.py'}:short")
    told = maverick("train", "rl", tiny / "data.jsonl", tmp_path / "run", "-m", tiny / "model", *SHORT, *settings)
    assert told.status == 0, told.err
    for record in records(tmp_path / "run"):
        assert record["disagreement"] < 1e-5
        assert record["reward"] < 0
        assert record["groups_drawn"] >= 2
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize("own", [(), ("--on-policy",)], ids=["of a file", "its own answers"])
def test_distill(maverick, tiny, tmp_path, own):
    """What another model says is learned; another number of its tokens is another run."""
    ask = ("train", "distill", tiny / "data.jsonl", tmp_path / "run", "-m", tiny / "model", "--teacher", tiny / "teacher", *SHORT)
    settings = (
        "--batch",
        "4",
        "--steps",
        "20",
        "--learning-rate",
        "0.02",
        "--soft-end",
        "1",
        "--no-packing",
        "--adapt",
        "attention,unembedding",
    )
    told = maverick(*ask, *settings, *own)
    assert told.status == 0, told.err
    found = records(tmp_path / "run")
    assert found[-1]["divergence"] < 0.8 * found[0]["divergence"]
    assert "is a run with another --top: 64 there, 8 now" in maverick(*ask, *settings, *own, "--top", "8").err


@pytest.mark.parametrize("arguments", [["sft", "no.jsonl", "run"], ["demo"]], ids=["sft", "demo"])
def test_without_the_extra(maverick, monkeypatch, tmp_path, arguments):
    """As in an environment with the bare package: said before anything is read or made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maverick_jax.cli.train, "EXTRA", ("grain", "no_such_package"))
    told = maverick("train", *arguments)
    cure = "training takes the extra `train` (missing: no_such_package): pip install 'maverick-jax[train]'."
    assert (told.status, told.out, told.err) == (2, "", f"maverick: {cure}\n")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "a kind of training is missing: choose one of sft"),
        (["sft"], "the following arguments are required: DATA, OUT"),
        (["sft", "no.jsonl", "{out}"], "no.jsonl cannot be read: No such file or directory."),
        (["sft", "{data}", "{out}", "--adapt", "everything"], "adapters are asked for in 'everything': choose from experts"),
        (["sft", "{data}", "{out}", "--schedule", "step"], "schedule is 'step': it must be one of cosine, linear, constant."),
        (["sft", "{data}", "{out}", "--remat", "some"], "--remat: invalid choice: 'some'"),
        (["sft", "{data}", "{out}", "--for", "hf"], "--for: invalid choice: 'hf'"),
        (["sft", "{data}", "{out}", "--long", "cut"], "long is 'cut': it must be one of drop, cut-start, cut-end."),
        (["sft", "{data}", "{out}", "--rank", "0"], "--rank: '0' is not a number of 1 or more"),
        (["sft", "{data}", "{out}", "--length", "8"], "has nothing to learn: 24 examples have more than 8 tokens and were dropped."),
        (["sft", "{data}", "{out}", "--freeze", "eyes.*", "--full"], "nothing is called 'eyes.*', which is to stay as it is"),
        (["sft", "{data}", "{out}", "--epochs", "0"], "--epochs is 0: give a number above 0."),
        (["sft", "{data}", "{data}"], "is a file"),
        (["sft", "{data}", "{out}", "--hold-out", "2"], "--hold-out is 2: give a share between 0 and 1."),
        (["sft", "{data}", "{out}", "--hold-out", "0.9"], "rows are too few to hold out"),
        (["dpo", "{data}", "{out}"], "line 1: its chosen is None: give a text, a message or a list of messages."),
        (["dpo", "{data}", "{out}", "--beta", "0"], "beta is 0.0: it must be"),
        (["rl", "{data}", "{out}", "--reward", "good"], "there is no reward 'good': give exact, number, json, format:REGEX"),
        (["rl", "{data}", "{out}", "--group", "1"], "a group has 1 answers"),
        (["rl", "{data}", "{out}", "--batch", "3"], "a step has 8 x 8 answers: choose a --batch that divides them, not 3."),
        (["rl", "{data}", "{out}", "--length", "260"], "has nothing to ask: 24 examples have more than 4 tokens and were dropped."),
        (["filter", "{data}", "{out}", "--endpoint", "http://x"], "--endpoint and --endpoint-model go together"),
        (["distill", "{data}", "{out}"], "the following arguments are required: --teacher"),
        (["distill", "{data}", "{out}", "--teacher", "no"], "no"),
    ],
)
def test_what_is_no_run(maverick, data, tmp_path, arguments, words):
    """One line, and nothing is left."""
    told = maverick("train", *(text.format(data=data, out=tmp_path / "run") for text in arguments))
    assert told.status == 2
    assert len(told.err.splitlines()) == 1, told.err
    assert words in told.err
    assert not (tmp_path / "run").exists()
