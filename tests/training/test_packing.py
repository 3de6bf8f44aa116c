"""Documents that share a row do not see each other, and count as they would alone."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from maverick_jax.model.attention import Piece
from maverick_jax.sharding import TRAINING, AttendOnMesh, Constrain, make_dispatcher, make_mesh
from maverick_jax.training.batch import Batch, read
from maverick_jax.training.data.examples import Example
from maverick_jax.training.data.packing import batch_of, pack
from oracle.forward import TOLERANCE, text_ids
from oracle.plain import plain_model

LENGTHS = (13, 3, 21, 1, 9)  # chunks are 8 tokens, the temperature's steps 4


def on_mesh(model_of, **sizes):
    mesh = make_mesh(**sizes)
    return model_of(
        options={
            "constrain": Constrain(mesh, TRAINING),
            "attend": AttendOnMesh(mesh, TRAINING),
            "dispatcher": make_dispatcher(mesh, TRAINING, training=True),
        }
    )


@pytest.mark.parametrize("sizes", [None, dict(data=2, expert=2)], ids=["one device", "a mesh"])
def test_documents_in_a_row_are_as_if_alone(sizes):
    """Chunks and temperature begin anew with each; layers that see everything see one document."""
    model = plain_model() if sizes is None else on_mesh(plain_model, **sizes)
    documents = [text_ids(1, n, seed)[0] % 60 for seed, n in enumerate(LENGTHS)]
    rows = [[Example(ids, np.ones(len(ids), bool)) for ids in documents], [Example(documents[2], np.ones(21, bool))]]
    batch = batch_of(rows, 48, packed=True)
    hidden = np.asarray(jax.jit(lambda batch: model.logits(read(model, batch)[0]))(batch))
    alone = plain_model()
    at = 0
    for ids in documents:
        expected = np.asarray(alone(ids[None]))[0]
        assert_allclose(hidden[0, at : at + len(ids)], expected, atol=TOLERANCE, rtol=0)
        at += len(ids)
    assert_allclose(hidden[1, :21], np.asarray(alone(documents[2][None]))[0], atol=TOLERANCE, rtol=0)


def test_positions_begin_anew():
    """Padding has none that a token could see."""
    document = np.array([[0, 0, 0, 1, 1, 2, -1, -1]], np.int32)
    piece = Piece.packed(jax.numpy.asarray(document))
    assert piece.positions_BT.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    apart, chunk = piece.apart(4)
    assert chunk == 4
    assert [p // 4 for p in apart[0].tolist()] == [0, 0, 0, 2, 2, 4, -2, -2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_every_example_is_in_one_row(lengths):
    """No row is overfull; no two rows could have been one."""
    rows = pack(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert filled[-1] <= 50
    assert len(filled) < 2 or filled[0] + filled[1] > 50


def test_what_counts():
    """The token behind each learned one's place, never the next document's first."""
    one = Example(np.array([7, 8, 9], np.int32), np.array([False, True, True]))
    other = Example(np.array([4, 5], np.int32), np.array([True, True]))
    batch = batch_of([[one, other]], 6, packed=True)
    assert batch.ids_BT.tolist() == [[7, 8, 9, 4, 5, 0]]
    assert batch.weight_BT.tolist() == [[1, 1, 0, 1, 0, 0]]
    assert [t for t, w in zip(batch.target_BT[0], batch.weight_BT[0], strict=True) if w] == [8, 9, 5]
    assert batch.document_BT.tolist() == [[0, 0, 0, 1, 1, -1]]
    assert batch.lengths_B.tolist() == [5]
    assert batch_of([[one]], 6, packed=False).document_BT is None


def test_replayed_routes():
    """The experts that a sampler took: its own choice changes nothing, another one does, in every mixture."""
    model = plain_model(moe_layers=(0, 2))
    ids = text_ids(2, 12) % 60
    batch = Batch(ids, np.full(2, 12, np.int32), ids, np.ones(ids.shape, np.float32))
    hidden, stats = jax.jit(lambda batch: read(model, batch))(batch)
    chosen = np.stack([np.asarray(s.expert_T).reshape(2, 12) for s in stats], axis=-1).astype(np.uint8)
    again, _ = jax.jit(lambda batch: read(model, batch))(batch._replace(expert_BTM=chosen))
    assert_allclose(again, hidden, atol=1e-6, rtol=0)
    other = chosen.copy()
    other[..., 1] = (other[..., 1] + 1) % 4
    changed, stats = jax.jit(lambda batch: read(model, batch))(batch._replace(expert_BTM=other))
    assert np.abs(np.asarray(changed) - np.asarray(hidden)).max() > 1e-2
    assert (np.asarray(stats[1].expert_T).reshape(2, 12) == other[..., 1]).all()
