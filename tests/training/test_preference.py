"""Preference training: the loss by hand, and pairs in every spelling."""

import json

import jax
import numpy as np
import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.training.batch import Batch
from maverick_jax.training.data.files import reading_of
from maverick_jax.training.data.pairs import PairRows, read_pairs
from maverick_jax.training.held_out import HeldOut, apart
from maverick_jax.training.preference import Pairs, Preference, reference
from oracle.answers import likely
from oracle.plain import plain_model

READING = reading_of(mini_directory(), Config.from_directory(mini_directory()))
ASKED = {"role": "user", "content": "2 + 2?"}


def pairs_of(rows: int = 6, length: int = 12, seed: int = 0) -> Pairs:
    random = np.random.default_rng(seed)
    ids = random.integers(5, 50, (rows, length)).astype(np.int32)
    lengths = random.integers(6, length + 1, rows).astype(np.int32)
    weight = ((np.arange(length) >= 3) & (np.arange(length) < lengths[:, None] - 1)).astype(np.float32)
    return Pairs(Batch(ids, lengths, np.roll(ids, -1, axis=1), weight), -random.uniform(10, 30, rows).astype(np.float32))


def by_hand(scores_B, reference_B, tokens_B, *, beta, smoothing, normalize):
    """Of each pair, in float64."""
    gain = (scores_B - reference_B) / (tokens_B if normalize else 1)
    margin = beta * (gain[::2] - gain[1::2])
    return (1 - smoothing) * np.log1p(np.exp(-margin)) + smoothing * np.log1p(np.exp(margin))


@pytest.mark.parametrize("setting", [{}, {"beta": 0.5, "smoothing": 0.2}, {"beta": 2.0, "normalize": True}], ids=str)
def test_loss_by_hand(setting):
    """Of scores that numpy makes of all logits."""
    model, pairs = plain_model(), pairs_of()
    objective = Preference(**setting)
    lost, measures = jax.jit(lambda pairs: objective(model, pairs))(pairs)
    weight = pairs.batch.weight_BT.astype(np.float64)
    scores = (likely(model, pairs.batch) * weight).sum(axis=1)
    settings = {"beta": 0.1, "smoothing": 0.0, "normalize": False, **setting}
    np.testing.assert_allclose(lost, by_hand(scores, pairs.reference_B, weight.sum(axis=1), **settings).sum(), rtol=1e-5)
    assert objective.total(pairs) == 3
    assert 0 <= measures["preferred"] <= 3


def test_the_reference_is_found_once(tmp_path):
    """From the file, whatever the model has become; at the start nothing is preferred, and every pair costs log 2."""
    rows = rows_of(tmp_path, [{"messages": [ASKED], "chosen": "4", "rejected": word} for word in ("5", "no", "twenty two")])
    model = plain_model(vocab_size=READING.config.text.vocab_size)
    found = reference(model, rows, tmp_path / "reference.npy", batch=2)
    assert found.shape == (3, 2)
    rows.reference_P2 = found
    pairs = jax.tree.map(lambda x: x[0], rows(np.arange(3)[None]))
    lost, measures = Preference()(model, pairs)
    np.testing.assert_allclose(lost, 3 * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(measures["margin"], 0, atol=1e-4)
    other = plain_model(vocab_size=READING.config.text.vocab_size, num_hidden_layers=2)
    np.testing.assert_array_equal(reference(other, rows, tmp_path / "reference.npy", batch=2), found)


def rows_of(folder, lines) -> PairRows:
    pairs, _ = read_pairs(write(folder, lines), READING, length=64)
    return PairRows(pairs, READING, 64)


def write(folder, lines):
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_every_spelling(tmp_path):
    """Texts, messages, whole conversations; only the answers are learned, also where the assistant has spoken before."""
    good, bad = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
    lines = [
        {"messages": [ASKED], "chosen": "4", "rejected": "5"},
        {"prompt": "2 + 2?", "chosen": good, "rejected": bad},
        {"prompt": [ASKED], "chosen": [good], "rejected": [bad]},
        {"chosen": [ASKED, good], "rejected": [ASKED, bad]},
    ]
    pairs, told = read_pairs(write(tmp_path, lines), READING, length=64)
    assert not told
    for chosen, rejected in pairs:
        assert READING.tokenizer.decode(chosen.ids[chosen.learned].tolist()) == "4"
        assert READING.tokenizer.decode(rejected.ids[rejected.learned].tolist()) == "5"
        np.testing.assert_array_equal(chosen.ids, pairs[0].chosen.ids)
    later = [ASKED, good, {"role": "user", "content": "sure?"}]
    (pair,), _ = read_pairs(write(tmp_path, [{"messages": later, "chosen": "yes", "rejected": "no"}]), READING, length=64)
    assert READING.tokenizer.decode(pair.chosen.ids[pair.chosen.learned].tolist()) == "yes"
    rows = PairRows([pair], READING, 64)(np.array([[0]]))
    assert rows.batch.weight_BT.sum() == pair.chosen.learned.sum() + pair.rejected.learned.sum()


@pytest.mark.parametrize(
    "line, words",
    [
        ({"messages": [ASKED], "chosen": "4"}, "line 1: its rejected is None: give a text, a message or a list of messages"),
        ({"messages": [ASKED], "chosen": "4", "rejected": 5}, "line 1: its rejected is 5"),
        ({"messages": [ASKED], "chosen": "4", "rejected": "4"}, "line 1: its chosen and rejected answers are the same"),
        ({"chosen": [ASKED], "rejected": [ASKED]}, "line 1: its chosen and rejected answers are the same"),
    ],
)
def test_no_pair(tmp_path, line, words):
    file = write(tmp_path, [line])
    with pytest.raises(UserError, match=words):
        read_pairs(file, READING, length=64)
    with pytest.raises(UserError, match="nothing to learn: 1 lines were passed over"):
        read_pairs(file, READING, length=64, skip_bad=True)


def test_long_pairs(tmp_path):
    """Dropped if one of the two is too long, or cut; counted."""
    lines = [{"messages": [ASKED], "chosen": "4", "rejected": "5"}, {"messages": [ASKED], "chosen": "4", "rejected": "5" * 60}]
    file = write(tmp_path, lines)
    pairs, told = read_pairs(file, READING, length=40)
    assert len(pairs) == 1
    assert told == ["1 examples have more than 40 tokens and were dropped."]
    pairs, told = read_pairs(file, READING, length=40, long="cut-end")
    assert [len(pair.rejected.ids) for pair in pairs][1] == 40
    assert told == ["1 examples have more than 40 tokens and were cut."]


def test_what_is_held_out():
    """Whole batches, not learned from; a run is over after so many looks that found nothing lower."""
    learned, held = apart(50, 0.2, 4, seed=0)
    assert held.shape == (2, 4)
    assert sorted([*learned, *held.reshape(-1)]) == [*range(50)]
    with pytest.raises(UserError, match="8 rows are too few to hold out 8 of them"):
        apart(8, 0.2, 8, seed=0)
    held_out = HeldOut(None, every=5, patience=2)
    assert not held_out.is_over({})
    assert not held_out.is_over({5: 2.0, 10: 1.0, 15: 1.5})
    assert held_out.is_over({5: 2.0, 10: 1.0, 15: 1.5, 20: 1.0})


@pytest.mark.parametrize(
    "setting, words", [({"beta": 0}, "beta is 0"), ({"smoothing": 0.5}, "smoothing is 0.5: it must be a number from 0")]
)
def test_settings_that_mean_nothing(setting, words):
    with pytest.raises(UserError, match=words):
        Preference(**setting)
