"""The table against transformers' own names and shapes."""

import math

import pytest

from maverick_jax.config import Config
from maverick_jax.convert.formats import names, places


def test_the_table_names_every_tensor_of_transformers_and_no_other(case):
    ours = {stored: place.stored_shape for stored, place in names.find_places(Config.from_directory(case.source)).values()}
    assert ours == {name: tensor.shape for name, tensor in case.tensors.items()}


def test_every_row_is_used(cases):
    """A row that no model has is a row that no test proves."""
    used = {name for case in cases.values() for name in names.find_places(Config.from_directory(case.source))}
    kinds = {".".join("{i}" if part.isdigit() else part for part in name.split(".")) for name in used}
    assert kinds == {row.ours for row in names.HUGGINGFACE}


def test_gate_comes_before_up(maverick):
    """Swapped halves are the error that shapes do not show."""
    found = names.find_places(Config.from_directory(maverick.source))
    (stored, gate), (same, up) = (found[f"text.layers.1.feed_forward.experts.{part}"] for part in ("gate", "up"))
    assert stored == same
    assert gate.file_shape == up.file_shape == (8, 160, 192)
    assert (gate.start, up.start) == ((0, 0, 0), (0, 0, 96))
    assert [name for name, (tensor, _) in found.items() if tensor == stored] == [
        "text.layers.1.feed_forward.experts.gate",
        "text.layers.1.feed_forward.experts.up",
    ]


@pytest.mark.parametrize("shape,chunk", [((8, 3), (3, 3)), ((2, 5, 4), (2, 5, 3)), ((7,), (7,))])
def test_chunks_cover_an_array_once(shape, chunk):
    seen = [index for box in places.chunk_indices(shape, chunk) for index in _cells(box)]
    assert len(seen) == len(set(seen)) == math.prod(shape)


def test_a_chunk_is_one_experts_matrix_in_the_releases():
    row = names.plain_row("text.layers.1.feed_forward.experts.down")
    assert places.Place.of(row.axes, (128, 8192, 5120), row.stored_axes).chunk_shape(itemsize=2) == (1, 8192, 5120)


def test_chunks_of_a_matrix_are_whole_rows_of_the_file():
    row = names.plain_row("text.unembedding")
    rows, columns = places.Place.of(row.axes, (5120, 202048), row.stored_axes).chunk_shape(itemsize=2)
    assert rows == 5120
    assert rows * columns * 2 <= places.BLOCK < rows * (columns + columns // 10) * 2


def _cells(box):
    import itertools

    return itertools.product(*(range(part.start, part.stop) for part in box))
