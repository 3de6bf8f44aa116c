"""Groups of answers: what is drawn, what it is worth to the trainer, and that sampler and trainer speak of the same model."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.model.low_rank import adapters, add_adapters
from maverick_jax.training.asked import asked
from maverick_jax.training.data.files import reading_of
from maverick_jax.training.demo import tasks
from maverick_jax.training.optimization import Optimization
from maverick_jax.training.policy import Policy
from maverick_jax.training.rollouts.drawn import Reference, rounded
from maverick_jax.training.rollouts.groups import Draws, Groups
from maverick_jax.training.rollouts.prompts import Pool, read_prompts
from maverick_jax.training.rollouts.sampling import Sampler, draw
from maverick_jax.training.trainer import Loop, train
from oracle.plain import plain_model

READING = reading_of(mini_directory(), Config.from_directory(mini_directory()))
QUESTIONS = ("Which digit is left?", "What is the sum?", "Which is larger?", "Which digit is right?")
DRAWS = Draws(prompts=2, group=4, rest=3, rows=4)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": question}], "answer": "The left digit is 3."} for question in QUESTIONS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_prompts(file, READING, length=40)[0]


def model():
    made = plain_model(vocab_size=READING.config.text.vocab_size, max_position_embeddings=128)
    add_adapters(made, {"attention": 4, "experts": 2}, seed=1)
    return made


def sampler(replayed: bool = True) -> Sampler:
    def engine(model):
        return Engine(model, slots=8, max_length=64, routed_experts=replayed, paced=False)

    return Sampler(engine, READING, max_new_tokens=12)


def groups(prompts, reward, **more) -> Groups:
    return Groups(prompts, sampler(), reward, DRAWS, more.pop("told", print), **more)


def vowels(text, line):
    """Something that differs from answer to answer."""
    return float(sum(letter in "aeiou" for letter in text) + len(text) / 100)


def test_the_sampler_and_the_trainer_agree(prompts):
    """With the sampler's experts the trainer finds every token as likely as the sampler did, in float32 but for rounding: no ratio is
    clipped, and what the routers would choose by themselves is what was replayed."""
    made = model()
    drawn, said = groups(prompts, vowels).take(lambda: made)
    assert drawn.batch.expert_BTM is not None
    assert said["groups_without_advantage"] == 0
    lost, measures = asked(made, lambda model, drawn: Policy()(model, drawn))(drawn)
    tokens = drawn.batch.weight_BT.sum()
    assert measures["disagreement"].sum() / tokens < 2e-6
    assert measures["clipped"].sum() == 0
    by_themselves = drawn._replace(batch=drawn.batch._replace(expert_BTM=None))
    np.testing.assert_allclose(asked(made, lambda model, drawn: Policy()(model, drawn)[0])(by_themselves), lost, rtol=1e-5)


def test_replay_sends_tokens_where_the_sampler_did(prompts):
    """Other experts are other probabilities: the trainer does go where it is told."""
    made = model()
    drawn, _ = groups(prompts, vowels).take(lambda: made)
    turned = drawn._replace(batch=drawn.batch._replace(expert_BTM=(drawn.batch.expert_BTM + 1) % 4))
    measures = asked(made, lambda model, drawn: Policy()(model, drawn)[1])(turned)
    assert measures["disagreement"].sum() / drawn.batch.weight_BT.sum() > 1e-3
    assert measures["load"].sum() == asked(made, lambda model, drawn: Policy()(model, drawn)[1])(drawn)["load"].sum()


def test_advantages(prompts):
    """Of each group: reward less mean, in standard deviations; the same at each token of an answer and nowhere else."""
    made = model()
    drawn, said = groups(prompts, vowels).take(lambda: made)
    advantage_ABT, weight_ABT = drawn.advantage_BT, drawn.batch.weight_BT
    assert (advantage_ABT[weight_ABT == 0] == 0).all()
    of_rows = np.where(weight_ABT.sum(axis=2) > 0, advantage_ABT.sum(axis=2) / weight_ABT.sum(axis=2), 0).reshape(-1, DRAWS.group)
    texts = [
        READING.tokenizer.decode(target[weight > 0].tolist())
        for target, weight in zip(drawn.batch.target_BT.reshape(8, -1), weight_ABT.reshape(8, -1), strict=True)
    ]
    rewards = np.array([vowels(text, {}) for text in texts]).reshape(-1, DRAWS.group)
    expected = (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(of_rows, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(said["reward"], rewards.mean(), rtol=1e-6)


def test_what_is_drawn_follows_from_the_seed(prompts):
    """Not from what is drawn beside it."""
    engine = Engine(model(), slots=8, max_length=64, paced=False)
    together = [*draw(engine, prompts, READING, count=3, max_new_tokens=8, seed=5)]
    (alone,) = draw(engine, prompts[2:3], READING, count=3, max_new_tokens=8, seed=5)
    assert [answer.ids_A.tolist() for answer in alone] == [answer.ids_A.tolist() for answer in together[2]]
    (other,) = draw(engine, prompts[2:3], READING, count=3, max_new_tokens=8, seed=6)
    assert [answer.ids_A.tolist() for answer in other] != [answer.ids_A.tolist() for answer in alone]


def test_the_same_words_about_another_picture():
    """Have random numbers of their own: else what is drawn to one is drawn to the other, wherever the model is as sure."""
    seeds = []

    def run(requests):
        seeds.extend(request.sampling.seed for request in requests)
        return [SimpleNamespace(check=lambda name: None, tokens=[], logprobs=[], stop_token=None)] * len(requests)

    questions = [tasks.read(np.random.default_rng(seed)) for seed in (0, 0, 2)]
    sides = [question._replace(picture=question.picture.resize((40, 30))) for question in questions]
    list(draw(SimpleNamespace(run=run, routed_experts=False), tasks.prompts(sides, READING), READING, count=1, max_new_tokens=8, seed=5))
    same, again, other = seeds
    assert same == again != other


def test_an_answer_holds_no_picture(prompts):
    """A `<|patch|>` token that a model draws is learned, as the end of its answer, and never read: the trainer would look for a picture."""
    made, patch = model(), READING.config.image_token_index
    made.text.unembedding[...] = made.text.unembedding[...].at[:, patch].set(made.text.unembedding[...][:, :40].sum(axis=1))
    drawn, _ = groups(prompts, vowels).take(lambda: made)
    counts = drawn.batch.weight_BT > 0
    assert (drawn.batch.target_BT[counts] == patch).any()
    assert (drawn.batch.ids_BT != patch).all()


def test_groups_that_teach_nothing(prompts):
    """Are drawn again from other prompts; their prompts rest, and come back."""
    made = model()

    def only_sums(text, line):
        return vowels(text, line) if "sum" in line["messages"][0]["content"] else 1.0

    data = groups(prompts, only_sums)
    drawn, said = data.take(lambda: made)  # two prompts, then one more at a time in place of those that teach nothing
    assert said["resting"] == said["groups_without_advantage"] == 3
    assert said["groups_drawn"] == 5
    assert (drawn.batch.weight_BT.sum(axis=2) > 0).sum() == 8  # the sum twice
    assert data.take(lambda: made)[1]["groups_drawn"] == 2
    assert data.take(lambda: made)[1]["groups_drawn"] == 2
    assert data.take(lambda: made)[1]["groups_without_advantage"] > 0  # the fourth step is three after the first
    with pytest.raises(UserError, match="none of 4 prompts has answers of different worth, in step 1: all are right, or all wrong"):
        groups(prompts, lambda text, line: 0.0).take(lambda: made)


def test_a_reward_that_fails(prompts):
    """Its group is dropped and named; the third in a row ends the run."""
    made, told = model(), []

    def sometimes(text, line):
        if "sum" in line["messages"][0]["content"]:
            raise ValueError("no sums")
        return vowels(text, line)

    data = groups(prompts, sometimes, told=told.append)
    data.take(lambda: made)
    data.take(lambda: made)
    assert "line 2: the reward of " in told[0]
    assert "raised ValueError: no sums The group is dropped." in told[0]
    with pytest.raises(UserError, match=r"raised ZeroDivisionError: .* \(3 prompts in a row\.\)"):
        groups(prompts, lambda text, line: 1 / 0).take(lambda: made)


def test_a_run_that_goes_on_draws_the_same(prompts, tmp_path):
    """Stopped after two steps: the same losses bit for bit, the same prompts; and what is rewarded grows."""

    def run(out, stop_at=None):
        loop = Loop(save_every=1, stop=lambda step, record: step == stop_at)
        train(
            model(),
            Policy(kl=0.01),
            groups(prompts, vowels, reference=Reference(model())),
            Optimization(4, 3e-3),
            out,
            identity={},
            loop=loop,
        )
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    whole = run(tmp_path / "whole")
    run(tmp_path / "run", stop_at=2)
    again = run(tmp_path / "run")
    told = ("loss", "gradient_norm", "reward", "disagreement", "answer_tokens", "kl", "entropy")
    assert [[record[name] for name in told] for record in again] == [[record[name] for name in told] for record in whole]
    assert whole[0]["kl"] < 1e-6 < whole[-1]["kl"]
    assert max(record["disagreement"] for record in whole) < 2e-6
    assert whole[-1]["reward"] != whole[0]["reward"]


def test_the_reference_stays(prompts):
    """Also once a trainer has used up the arrays that learn."""
    made = model()
    drawn, _ = groups(prompts, vowels).take(lambda: made)
    reference = Reference(made)
    for adapter in adapters(made).values():
        adapter.a[...].delete()
        adapter.b[...].delete()
    counts = drawn.batch.weight_BT > 0
    np.testing.assert_allclose(reference(drawn.batch)[counts], drawn.sampled_BT[counts], atol=1e-5)


def test_prompts_in_turn():
    """Every one once in an epoch, in an order of its own; those that rest are passed over; the state says all."""
    pool = Pool(5, seed=3)
    epochs = [pool.take(5, 0) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(5)]
    assert epochs[0] != epochs[1]
    pool.rest(2, until=4)
    assert 2 not in pool.take(4, 3)
    assert len(pool.take(9, 3)) == 4
    other = Pool(5, seed=3)
    other.go_to(json.loads(json.dumps(pool.state())))
    assert [pool.take(3, 4) for _ in range(3)] == [other.take(3, 4) for _ in range(3)]


def test_lengths_of_rows():
    """Few, and at most a quarter too long."""
    for length in itertools.chain(range(1, 300), (8191, 8192, 8193)):
        assert length <= rounded(length) <= max(8, 1.25 * length + 8)
    assert len({rounded(length) for length in range(1025, 2049)}) == 4


@pytest.mark.parametrize(
    "draws, words", [({"group": 1}, "a group has 1 answers"), ({"rows": 7}, "8 x 8 answers: choose a --batch that divides")]
)
def test_draws_that_mean_nothing(draws, words):
    with pytest.raises(UserError, match=words):
        Draws(**draws)


def test_prompts_of_a_file(tmp_path):
    """A last message of the assistant's is the answer; too long ones are dropped and counted."""
    file = tmp_path / "prompts.jsonl"
    asked_ = {"role": "user", "content": "2 + 2?"}
    lines = [
        {"messages": [asked_, {"role": "assistant", "content": "4"}]},
        {"messages": [{**asked_, "content": "2 + " * 50}], "answer": "?"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (prompt,), told = read_prompts(file, READING, length=40)
    assert prompt.line["answer"] == "4"
    assert READING.tokenizer.decode(prompt.ids.tolist()).count("4") == 0
    assert told == ["1 examples have more than 40 tokens and were dropped."]
    assert jax.tree.leaves(prompt.ids)[0].dtype == np.int32
