"""Logits whose vocabulary is divided over eight devices: the same tokens, and no device ever gets them all."""

import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maverick_jax.inference.sampling import RowSampling, Sampling, sample
from maverick_jax.sharding import make_mesh

V = 64 * 7 * 64  # 448 blocks, of which 129 are candidates


def test_the_vocabulary_stays_divided():
    """An argmax of each part and a few blocks travel, not the logits."""
    asked = [
        dict(),
        dict(temperature=1.0),
        dict(temperature=1.0, top_k=20),
        dict(temperature=1.0, top_p=0.9),
        dict(temperature=1.0, min_p=0.2),
    ]
    rows = jax.tree.map(lambda *x: np.concatenate(x), *(RowSampling.repeat(Sampling(**one, seed=4), 1) for one in asked))
    logits = np.random.default_rng(0).normal(size=(len(asked), V)).astype(np.float32) * 2
    steps = np.arange(len(asked), dtype=np.int32)
    mesh = make_mesh(tensor=8)
    divided = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    compiled = jax.jit(sample, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(divided, rows, steps).compile()
    assert compiled(divided, rows, steps).token_B.tolist() == jax.jit(sample)(logits, rows, steps).token_B.tolist()
    travels = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text())
    largest = max(np.prod([int(n) for n in shape.split(",") if n], dtype=int) for shape in travels)
    assert 0 < largest <= len(asked) * V * 129 // 448
