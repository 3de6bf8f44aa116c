"""`maverick train`: a run from a file to an adapter that is used, and what is no run."""

import json

import pytest

import maverick_jax as mj
from maverick_jax.assets import digits


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
    ],
)
def test_what_is_no_run(maverick, data, tmp_path, arguments, words):
    """One line, and nothing is left."""
    told = maverick("train", *(text.format(data=data, out=tmp_path / "run") for text in arguments))
    assert told.status == 2
    assert len(told.err.splitlines()) == 1, told.err
    assert words in told.err
    assert not (tmp_path / "run").exists()
