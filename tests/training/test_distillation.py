"""Distillation: divergences by hand, and a teacher's words kept on disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.training.data.files import read_examples, reading_of
from maverick_jax.training.data.pipeline import Batches, Order
from maverick_jax.training.data.rows import Conversations
from maverick_jax.training.distillation.objective import Distillation, Schedule
from maverick_jax.training.distillation.on_policy import OnPolicy
from maverick_jax.training.distillation.teachings import Scheduled, TaughtRows, Teachings, check_tokenizers
from maverick_jax.training.logits import apart, top
from maverick_jax.training.rollouts.prompts import read_prompts
from maverick_jax.training.rollouts.sampling import Sampler
from oracle.answers import likely, log_softmax
from oracle.plain import plain_model

READING = reading_of(mini_directory(), Config.from_directory(mini_directory()))
VOCABULARY = READING.config.text.vocab_size
K = 8


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("taught") / "data.jsonl"
    with file.open("w") as stream:
        for n in range(7):
            messages = [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "9" * (1 + n)}]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return file


def rows_of(file, *, packing=True) -> Conversations:
    return Conversations(read_examples(file, READING, length=48)[0], READING, 48, packing=packing)


def teacher():
    return plain_model(vocab_size=VOCABULARY)


def student():
    return plain_model(vocab_size=VOCABULARY, num_hidden_layers=2)


def divergence(p_log, q_log, ids):
    """KL(p, q) over the tokens of `ids` and all others together, in float64."""
    chosen = [np.exp(np.take_along_axis(log, ids, axis=-1)) for log in (p_log, q_log)]
    p, q = (np.concatenate([part, 1 - part.sum(axis=-1, keepdims=True)], axis=-1) for part in chosen)
    return (p * (np.log(p) - np.log(q))).sum(axis=-1)


@pytest.mark.parametrize("reverse", [False, True])
def test_loss_by_hand(file, tmp_path, reverse):
    """Soft and hard targets in their shares."""
    rows = rows_of(file, packing=False)
    teachings = Teachings(tmp_path, rows, K)
    teachings.find_out(teacher(), batch=3)
    taught = jax.tree.map(lambda x: x[0], TaughtRows(rows, teachings)(np.arange(4)[None]))._replace(soft_B=np.float32([1, 0, 0.25, 0.5]))
    lost, measures = jax.jit(lambda taught: Distillation(reverse)(student(), taught))(taught)
    of_teacher, of_student = (log_softmax(model, taught.batch) for model in (teacher(), student()))
    pair = (of_student, of_teacher) if reverse else (of_teacher, of_student)
    soft, weight = taught.soft_B[:, None].astype(np.float64), taught.batch.weight_BT.astype(np.float64)
    expected = divergence(*pair, taught.top.ids)
    hard = -likely(student(), taught.batch)
    np.testing.assert_allclose(measures["divergence"], (weight * expected).sum(), rtol=2e-3)  # float16
    np.testing.assert_allclose(measures["cross_entropy"], (weight * hard).sum(), rtol=1e-5)
    np.testing.assert_allclose(lost, (weight * (soft * expected + (1 - soft) * hard)).sum(), rtol=2e-3)
    same, _ = Distillation(reverse)(teacher(), taught._replace(soft_B=np.ones(4, np.float32)))
    assert abs(float(same)) < 1e-4  # who says the same loses nothing


def test_the_likeliest_and_all_others():
    """Together they are all there is; as numpy sorts them."""
    logits = np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32) * 4
    found = top(jnp.asarray(logits), K)
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_array_equal(found.ids, np.argsort(-log, axis=-1)[..., :K])
    np.testing.assert_allclose(np.asarray(found.logprobs, np.float32), -np.sort(-log, axis=-1)[..., :K], rtol=1e-3)
    chosen, others = apart(jnp.asarray(logits), found.ids)
    np.testing.assert_allclose(np.exp(chosen).sum(axis=-1) + np.exp(others), 1, rtol=1e-5)


def test_a_teacher_is_asked_once(file, tmp_path):
    """384 B per token for 64; a run that was killed asks for what is missing, and no more; rows in any order find their own."""
    rows = rows_of(file)
    whole = Teachings(tmp_path / "whole", rows, K)
    whole.find_out(teacher(), batch=2)
    assert whole.missing == len(rows)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    tokens = int(rows.learned_R.sum())
    assert sizes == {"ids.int32": 4 * K * tokens, "logprobs.float16": 2 * K * tokens}
    part = Teachings(tmp_path / "part", rows, K)
    (tmp_path / "part").mkdir()
    for name in sizes:
        data = (tmp_path / "whole" / name).read_bytes()
        (tmp_path / "part" / name).write_bytes(data[: len(data) // 2])
    assert 0 <= part.missing < len(rows)
    part.find_out(teacher(), batch=1)
    for name in sizes:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    changed = (tmp_path / "part" / "ids.int32").stat().st_mtime_ns
    part.find_out(student(), batch=1)  # nobody is asked any more
    assert (tmp_path / "part" / "ids.int32").stat().st_mtime_ns == changed
    chosen = np.array([[len(rows) - 1, 0]])
    taught = TaughtRows(rows, whole)(chosen)
    expected = np.argsort(-log_of_rows(rows, chosen), axis=-1)[..., :K]
    counts = taught.batch.weight_BT != 0
    np.testing.assert_array_equal(taught.top.ids[counts], expected[counts])


def log_of_rows(rows, chosen):
    """[1, B, T, V] of packed rows, each document alone."""
    batch = jax.tree.map(lambda x: x[0], rows(chosen))
    model = teacher()
    x_BTD, *_ = model.hidden(model.embed(batch.ids_BT), batch.lengths_B, document_BT=batch.document_BT)
    return np.asarray(jax.nn.log_softmax(model.logits(x_BTD)))[None]


def test_the_weight_of_soft_targets():
    """A straight line, which the batches carry and a run that goes on takes up."""
    schedule = Schedule(1.0, 0.5)
    assert [schedule.weight(step, 5) for step in range(6)] == [1, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert Schedule(0.3, 0.3).weight(0, 1) == 0.3
    with pytest.raises(UserError, match=r"soft-begin is 1\.5: it must be a number from 0 to 1"):
        Schedule(1.5)


def test_batches_carry_the_weight(file, tmp_path):
    rows = rows_of(file, packing=False)
    teachings = Teachings(tmp_path, rows, K)
    teachings.find_out(teacher(), batch=4)

    def data():
        return Scheduled(Batches(TaughtRows(rows, teachings), Order(2, 1, seed=1)), Schedule(), 3)

    one, other = data(), data()
    first = one.take()[0]
    assert first.soft_B.tolist() == [[1, 1]]
    other.go_to(json.loads(json.dumps(one.state())))
    taught, said = one.take()
    assert said == {"soft": 0.75}
    again = other.take()[0]
    assert again.soft_B.tolist() == taught.soft_B.tolist() == [[0.75, 0.75]]
    np.testing.assert_array_equal(again.ids_BT, taught.ids_BT)


def test_a_students_own_answers(file):
    """The teacher's likeliest tokens at every place of what the student has just said."""
    prompts, _ = read_prompts(file, READING, length=32)
    sampler = Sampler(lambda model: Engine(model, slots=4, max_length=64, paced=False), READING, max_new_tokens=6)
    data = OnPolicy(prompts, sampler, teacher(), k=K, rows=2, accumulate=2)
    model = student()
    taught, said = data.take(lambda: model)
    assert taught.ids_BT.shape[:2] == taught.soft_B.shape == (2, 2)
    assert said["answer_tokens"] <= 6
    batch = jax.tree.map(lambda x: x[0], taught.batch)
    counts = batch.weight_BT > 0
    expected = np.argsort(-log_softmax(teacher(), batch), axis=-1)[..., :K]
    np.testing.assert_array_equal(taught.top.ids[0][counts], expected[counts])
    with pytest.raises(UserError, match="7 prompts for 8 rows of a step"):
        OnPolicy(prompts, sampler, teacher(), k=K, rows=8)


def test_other_tokenizers_are_refused():
    class Other:
        def spelling(self, id):
            return b"other" if id == 300 else READING.tokenizer.spelling(id)

    check_tokenizers(READING.tokenizer, READING.tokenizer, VOCABULARY)
    with pytest.raises(UserError, match=r"token 300 is .* for the student and b'other' for the teacher"):
        check_tokenizers(READING.tokenizer, Other(), VOCABULARY)  # pyright: ignore[reportArgumentType]
