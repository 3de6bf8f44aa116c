"""A table that is embedding and unembedding at once, stored under either name or under both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from maverick_jax.convert.formats.spelling import Spelling
from maverick_jax.convert.formats.tensor_file import Tensor, read_bytes
from maverick_jax.errors import UserError

BLOCK = 8 << 20  # bytes


def as_one_table(directory: Path, spelling: Spelling, embedding: str, unembedding: str) -> Spelling:
    """The names of a model whose two tables are tied, with one of them, under the embedding's name.

    As transformers does: whichever is there serves as both. Where both are there and differ it leaves them untied, against
    its config; here the config is to be mended first.

    Raises:
      UserError: both are stored, and they differ.
    """
    if unembedding not in spelling.tensors:
        return spelling
    tensors, stored = dict(spelling.tensors), dict(spelling.stored)
    other = tensors.pop(unembedding)
    if embedding not in tensors:
        tensors[embedding], stored[embedding] = other, stored[unembedding]
    elif not _equal(tensors[embedding], other):
        raise UserError(
            f"{directory}: config.json says tie_word_embeddings, but {stored[unembedding]} is not {stored[embedding]}: set it to false, "
            "and both are used."
        )
    return dataclasses.replace(spelling, tensors=tensors, stored=stored)


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    size = one.nbytes
    mine, theirs = np.empty((2, min(size, BLOCK)), np.uint8)
    for at in range(0, size, BLOCK):
        count = min(BLOCK, size - at)
        for tensor, block in ((one, mine), (other, theirs)):
            read_bytes(tensor.file, tensor.offset + at, block[:count].data)
        if not np.array_equal(mine[:count], theirs[:count]):
            return False
    return True
