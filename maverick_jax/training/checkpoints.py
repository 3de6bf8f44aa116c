"""The state of a run on disk, by Orbax: every checkpoint whole or not there, written behind the steps that follow.

A checkpoint has what is learned, the optimizer's moments, where the data is, and what a run must have in common with it to go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from orbax.checkpoint import v1 as ocp

from maverick_jax.convert.build.orbax import flatten, quiet, unflatten
from maverick_jax.errors import UserError, first_line
from maverick_jax.training.step import Progress


class Checkpoints:
    """The last `keep` checkpoints of a run, and of those that have a loss the best.

    Always: what is listed is whole. One that was being written when the process died has another name, and is removed.
    """

    def __init__(self, directory: Path, *, keep: int):
        self.directory = directory.absolute()
        which = ocp.training.preservation_policies
        best = which.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False)
        policies: dict[str, Any] = {
            "preservation_policy": which.AnyPreservationPolicy([which.LatestN(keep), best]),
            "save_decision_policy": ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        }
        with quiet():
            self._kept = ocp.training.Checkpointer(str(self.directory), cleanup_tmp_directories=True, **policies)

    @property
    def latest(self) -> int | None:
        """The step of the newest."""
        found = self._kept.latest
        return None if found is None else found.step

    def save(self, step: int, progress: Progress, beside: dict[str, Any], *, loss: float | None = None) -> None:
        """Begin to write one; what was begun before is finished first.

        Args:
          beside: small values, of JSON.
          loss: by which the best one is chosen, of those that have one.
        """
        self.wait()
        metrics: Any = None if loss is None else {"loss": loss}
        with quiet(), self._telling():
            self._kept.save_async(step, unflatten(_named(progress)), custom_metadata=beside, metrics=metrics, overwrite=True)

    def wait(self) -> None:
        """Until all is on disk."""
        with quiet(), self._telling():
            self._kept.wait()

    def beside(self, step: int) -> dict[str, Any]:
        """The small values of a checkpoint."""
        with quiet():
            found: Any = self._kept.metadata(step).custom_metadata
        return found or {}

    def load(self, step: int, like: Progress) -> Progress:
        """A checkpoint, laid out as `like` is, on whatever mesh it was saved."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _named(like))
        with quiet():
            found = flatten(self._kept.load(step, unflatten(abstract)))
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in _named(like)])

    def close(self) -> None:
        self.wait()
        self._kept.close()

    def _telling(self) -> _Telling:
        return _Telling(self)


class _Telling:
    """A disk that is full is told with what is there."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            last = self.checkpoints.latest
            there = f"that of step {last} is whole" if last is not None else "there is none yet"
            raise UserError(
                f"a checkpoint could not be written to {self.checkpoints.directory} ({first_line(error)}); {there}: make room, and run the "
                "same command again."
            ) from error


def _named(progress: Progress) -> dict[str, Any]:
    """Leaves by dotted names, in their order: `moments.1.0.mu.text.norm`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(progress)
    return {".".join(map(_part, path)): leaf for path, leaf in leaves}


def _part(key: Any) -> str:
    match key:
        case GetAttrKey():
            return key.name
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
    raise TypeError(key)
