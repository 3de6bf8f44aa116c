"""One step of training, compiled: gradients of some micro-batches, added up, clipped, and what the optimizer makes of them.

Shape suffixes: A micro-batches, B rows, T tokens, M layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from maverick_jax.model import Llama4
from maverick_jax.training.split import Leaves, Split


class Objective(Protocol):
    """What is to become small: a sum over a batch, divided by a number that all micro-batches of a step have together."""

    def total(self, batch: Any, /) -> jax.Array:
        """[] float32: what counts in a batch, such as the tokens that are learned."""
        ...

    def __call__(self, model: Llama4, batch: Any, /) -> tuple[jax.Array, Measures]:
        """[] float32, and sums over the batch that are worth knowing, by name."""
        ...


class Progress(NamedTuple):
    """All that changes from step to step.

    Attributes:
      learned: by name.
      moments: the optimizer's.
    """

    learned: Leaves
    moments: optax.OptState


Measures = dict[str, jax.Array]
Update = Callable[[Progress, Leaves, Any], tuple[Progress, Measures]]


def begin(split: Split, optimizer: optax.GradientTransformation) -> Progress:
    """Before the first step. Moments are float32 and lie where what they are of does."""
    places = jax.tree.map(lambda x: x.sharding, abstract_moments(split.learned, optimizer))
    moments = jax.jit(lambda learned: optimizer.init(_float32(learned)), out_shardings=places)(split.learned)
    return Progress(split.learned, moments)


def abstract_moments(learned: Mapping[str, jax.Array | jax.ShapeDtypeStruct], optimizer: optax.GradientTransformation) -> optax.OptState:
    """The shapes, dtypes and shardings of the moments of what is learned, which may be described so itself."""
    everywhere = _everywhere(next(iter(learned.values())).sharding)
    shapes = jax.eval_shape(lambda learned: optimizer.init(_float32(learned)), dict(learned))

    def place(shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return optax.tree.map_params(
        optimizer,
        lambda shape, of: place(shape, of.sharding),
        shapes,
        dict(learned),
        transform_non_params=lambda shape: place(shape, everywhere),
    )


def make_update(split: Split, objective: Objective, optimizer: optax.GradientTransformation) -> Update:
    """`update(progress, frozen, batches) -> (progress, measures)`, to be compiled; see `compile_update`.

    `batches` is a tree of [A, ...]: gradients of A micro-batches are added up, in float32. Measures are the objective's sums, `loss` (the
    mean), `total`, and `gradient_norm`, before anything is clipped.
    """

    def gradient(learned: Leaves, frozen: Leaves, batch: Any, total: jax.Array) -> tuple[Measures, Leaves]:
        def loss(learned: Leaves) -> tuple[jax.Array, Measures]:
            value, measures = objective(split.model(learned, frozen), batch)
            return value / total, measures

        (value, measures), gradients = jax.value_and_grad(loss, has_aux=True)(learned)
        return {"loss": value, **measures}, _float32(gradients)

    def update(progress: Progress, frozen: Leaves, batches: Any) -> tuple[Progress, Measures]:
        total = jax.vmap(objective.total)(batches).sum()
        first, others = jax.tree.map(lambda x: x[0], batches), jax.tree.map(lambda x: x[1:], batches)
        sums = gradient(progress.learned, frozen, first, total)
        if len(jax.tree.leaves(others)[0]):

            def add(sums, batch):
                return jax.tree.map(jnp.add, sums, gradient(progress.learned, frozen, batch, total)), None

            sums, _ = lax.scan(add, sums, others)
        measures, gradients = sums
        learned = _float32(progress.learned)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            updates, moments = optimizer.update(gradients, progress.moments, learned)
        learned = jax.tree.map(lambda old, new: new.astype(old.dtype), progress.learned, optax.apply_updates(learned, updates))
        return Progress(learned, moments), {**measures, "total": total, "gradient_norm": optax.tree.norm(gradients)}

    return update


def make_measure(split: Split, objective: Objective) -> Callable[[Leaves, Leaves, Any], Measures]:
    """`measure(learned, frozen, batches)`: what `update` would say of some micro-batches, without learning from them."""

    def measure(learned: Leaves, frozen: Leaves, batches: Any) -> Measures:
        def one(batch: Any) -> Measures:
            value, measures = objective(split.model(learned, frozen), batch)
            return {"loss": value, **measures, "total": objective.total(batch)}

        sums = jax.tree.map(lambda x: x.sum(axis=0), lax.map(one, batches))
        return {**sums, "loss": sums["loss"] / sums["total"]}

    return jax.jit(measure)


def compile_update(update: Update, progress: Progress) -> Update:
    """Compiled: what is learned and its moments stay where they are, and the old ones' memory is the new ones'."""
    places = jax.tree.map(lambda x: x.sharding, progress)
    return jax.jit(update, donate_argnums=0, out_shardings=(places, None))


def _float32(leaves: Leaves) -> Leaves:
    return {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()}


def _everywhere(place: Sharding) -> Sharding:
    """Whole on all devices of a mesh."""
    return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
