"""Runs that end early, and go on as if they had not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.model.low_rank import adapters, add_adapters
from maverick_jax.sharding import TRAINING, AttendOnMesh, Constrain, make_dispatcher, make_mesh
from maverick_jax.training.batch import Batch
from maverick_jax.training.next_token import NextToken
from maverick_jax.training.optimization import SCHEDULES, Optimization
from maverick_jax.training.split import Split
from maverick_jax.training.trainer import REMAT, Loop, train
from oracle.plain import plain_model

STEPS = 8
OPTIMIZATION = Optimization(STEPS, learning_rate=3e-3)


class Counted:
    """Batches that a number decides."""

    def __init__(self, spoilt: int = -1):
        self.at, self.spoilt = 0, spoilt

    def take(self, model) -> tuple[Batch, dict]:
        random = np.random.default_rng(self.at)
        self.at += 1
        ids = random.integers(5, 50, (2, 4, 16)).astype(np.int32)
        weight = np.ones(ids.shape, np.float32)
        if self.at == self.spoilt:
            weight[0, 0, 0] = np.inf
        return Batch(ids, np.full((2, 4), 16, np.int32), np.roll(ids, -1, axis=2), weight), {}

    def state(self) -> dict:
        return {"at": self.at}

    def go_to(self, state: dict) -> None:
        self.at = state["at"]


class Slow(Counted):
    """Leaves time to be killed in."""

    def take(self, model) -> tuple[Batch, dict]:
        time.sleep(0.3)
        return super().take(model)


def model(mesh=None, ranks={"attention": 2, "experts": 2}):  # noqa: B006
    options = {}
    if mesh is not None:
        options = {
            "constrain": Constrain(mesh, TRAINING),
            "attend": AttendOnMesh(mesh, TRAINING),
            "dispatcher": make_dispatcher(mesh, TRAINING, training=True),
        }
    made = plain_model(options=options)
    if ranks:
        add_adapters(made, ranks)
    return made


def run(out: Path, *, data=None, stop_at=None, made=None, identity=None, save_every=2, **settings):
    def stop(step, record):
        return step == stop_at

    loop = Loop(save_every=save_every, keep=2, stop=stop)
    return train(made or model(), NextToken(), data or Counted(), OPTIMIZATION, out, identity=identity or {}, loop=loop, **settings)


def losses(out: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}


def learned(made) -> list[np.ndarray]:
    return [np.asarray(part[...]) for adapter in adapters(made).values() for part in (adapter.a, adapter.b)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: where, and what it learned."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, learned(run(out))


def test_it_goes_on_bit_for_bit(whole, tmp_path):
    """Stopped twice: losses and parameters of every step, and nothing is said twice."""
    run(tmp_path / "run", stop_at=3)
    run(tmp_path / "run", stop_at=5)
    again = learned(run(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(whole[0])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == STEPS
    for one, other in zip(again, whole[1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_killed_at_any_step(whole, tmp_path):
    """kill -9, wherever it is just then: another process goes on to the same end."""
    out = tmp_path / "run"
    folders = [str(Path(__file__).parents[depth]) for depth in range(3)]
    code = f"import sys; sys.path[:0] = {folders!r}\nimport conftest, test_trainer as t, pathlib\n"
    code += "t.run(pathlib.Path(sys.argv[1]), data=t.Slow(), save_every=1)"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = losses(out)
    assert 0 < len(before) < STEPS
    run(out, save_every=1)
    assert losses(out) == losses(whole[0])
    assert before.items() <= losses(out).items()


def test_on_another_mesh(whole, tmp_path):
    """Begun on one device, ended on eight: the same but for the order of sums."""
    run(tmp_path / "run", stop_at=4)
    run(tmp_path / "run", made=model(make_mesh(data=2, expert=2, tensor=2)))
    there = losses(tmp_path / "run")
    np.testing.assert_allclose([*there.values()], [*losses(whole[0]).values()], rtol=1e-4)


def test_all_weights_with_masters(tmp_path):
    """Without adapters every weight learns; masters in float32 take steps that bfloat16 would lose."""
    before = plain_model(dtype="bfloat16")
    assert {leaf.dtype.name for leaf in Split(before, master=True).learned.values()} == {"float32"}
    start = np.asarray(before.text.layers[1].feed_forward.experts.up[...].astype("float32"))
    made = run(tmp_path / "masters", made=plain_model(dtype="bfloat16"), master=True, frozen=["text.embedding"])
    assert made.text.norm.dtype == jax.numpy.bfloat16
    assert (np.asarray(made.text.layers[1].feed_forward.experts.up[...].astype("float32")) != start).mean() > 0.5
    np.testing.assert_array_equal(made.text.embedding[...], before.text.embedding[...])
    assert min(losses(tmp_path / "masters").values()) < losses(tmp_path / "masters")[1]


@pytest.mark.parametrize("remat", ["layers", "products"])
def test_what_is_made_again_is_the_same(whole, tmp_path, remat):
    """Rematerialisation saves memory and changes nothing."""
    loop = Loop(save_every=100, remat=remat)
    train(model(), NextToken(), Counted(), OPTIMIZATION, tmp_path / "run", identity={}, loop=loop)
    np.testing.assert_allclose([*losses(tmp_path / "run").values()], [*losses(whole[0]).values()], rtol=1e-5)


@pytest.mark.parametrize("remat, products", [("products", True), ("layers", False)])
def test_what_a_gradient_keeps(remat, products):
    """Of a layer what products by weights give, in the activations' dtype; scores of T x T never."""
    T, made = 96, plain_model(dtype="bfloat16")
    add_adapters(made, {"attention": 2, "dense": 2})
    made.text.remat = REMAT[remat]
    x = jax.ShapeDtypeStruct((1, T, made.config.text.hidden_size), jax.numpy.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: made.hidden(x)[0], x)[1], x))
    assert not [leaf.shape for leaf in kept if leaf.shape.count(T) > 1]
    text = made.config.text
    wide = [leaf.dtype.name for leaf in kept if leaf.shape == (1, T, text.num_attention_heads, text.head_dim)]
    assert wide == ["bfloat16"] * text.num_hidden_layers * products  # queries
    assert ((1, T, text.intermediate_size_mlp) in [leaf.shape for leaf in kept]) == products


def test_a_loss_that_is_no_number(tmp_path):
    """It stops there, says where, and the checkpoint before it is good."""
    with pytest.raises(UserError, match=r"the loss of step 6 is (nan|-?inf).*the checkpoint of step 4 in .* is good"):
        run(tmp_path / "run", data=Counted(spoilt=6))
    assert [*losses(tmp_path / "run")] == [1, 2, 3, 4, 5]
    run(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == STEPS


@pytest.mark.parametrize(
    "change, words",
    [
        ({"identity": {"data": "other"}}, "is a run with another data: 'mine' there, 'other' now"),
        ({"made": (2, 3)}, r"is a run with another text\.layers\.0\.attention\.key\.a: \[16, 2\] there, \[16, 3\] now"),
        ({"made": None}, "is a run with another number of learned parameters"),
    ],
)
def test_another_run_is_refused(tmp_path, change, words):
    """The difference is said, and the run is as it was."""
    run(tmp_path / "run", identity={"data": "mine"}, stop_at=2)
    made = change.pop("made", 0)
    if made != 0:
        change["made"] = model(ranks=None if made is None else {"attention": made[1], "experts": 2})
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", **{"identity": {"data": "mine"}, **change})
    assert len(losses(tmp_path / "run")) == 2


def test_a_directory_that_is_no_run(tmp_path):
    """Nothing of somebody else's is touched."""
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(UserError, match="exists and is no run: name a new directory"):
        run(tmp_path)
    assert [*tmp_path.iterdir()] == [tmp_path / "thesis.tex"]


def test_a_full_disk(tmp_path, monkeypatch):
    """It says which checkpoint is whole, and once there is room it goes on from that."""
    from orbax.checkpoint import v1 as ocp

    saved, save = [], ocp.training.Checkpointer.save_async

    def full(self, step, *args, **more):
        if step > 4:
            raise OSError(28, "No space left on device")
        saved.append(step)
        return save(self, step, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.training.Checkpointer, "save_async", full)
        with pytest.raises(UserError, match=r"No space left on device.*that of step 4 is whole: make room"):
            run(tmp_path / "run")
    run(tmp_path / "run")
    assert saved == [2, 4]
    assert len(losses(tmp_path / "run")) == STEPS


WRONG = dict(steps=0, learning_rate=-1.0, schedule="step", warmup=1.0, b2=1.5, clip=0.0)


@pytest.mark.parametrize("field", WRONG)
def test_settings_that_mean_nothing(field):
    """Named, with what it must be."""
    with pytest.raises(UserError, match=f"{field} is .*: it must be"):
        Optimization(**{"steps": 10, field: WRONG[field]})


def test_the_rate_rises_and_falls():
    """To a tenth of the highest, by either schedule; or not at all."""
    steps = (0, 5, 10, 55, 100)
    rates = {name: [float(Optimization(100, 1.0, name, warmup=0.1).rate(step)) for step in steps] for name in SCHEDULES}
    assert rates["cosine"] == pytest.approx([0, 0.5, 1, 0.55, 0.1], abs=1e-6)
    assert rates["linear"] == pytest.approx([0, 0.5, 1, 0.55, 0.1], abs=1e-6)
    assert rates["constant"] == pytest.approx([0, 0.5, 1, 1, 1], abs=1e-6)
    assert float(Optimization(10, 1.0, warmup=0.0).rate(0)) == pytest.approx(1)
