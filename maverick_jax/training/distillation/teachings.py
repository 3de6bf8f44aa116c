"""What a teacher says of every token that is learned, on disk: found out once, 384 B per token for the 64 likeliest.

RUN/teacher/ids.int32, RUN/teacher/logprobs.float16: [tokens that count, K], row after row of the data. Files only grow: what is there is
not found out again.

Shape suffixes: A micro-batches, B rows, T tokens, K likeliest tokens, N tokens that count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.model import Llama4
from maverick_jax.prompt import Tokenizer
from maverick_jax.sharding import multihost
from maverick_jax.training.asked import over_rows
from maverick_jax.training.batch import Batch, read
from maverick_jax.training.data.pipeline import Batches
from maverick_jax.training.data.rows import Conversations
from maverick_jax.training.distillation.objective import Schedule, Taught
from maverick_jax.training.logits import Top, over_pieces, top

FILES = {"ids": np.dtype(np.int32), "logprobs": np.dtype(np.float16)}


class Teachings:
    """A teacher's K likeliest tokens for all rows of some data."""

    def __init__(self, folder: Path, rows: Conversations, k: int):
        self.folder, self.rows, self.k = folder, rows, k
        self._counts_R = rows.learned_R
        self._starts_R = np.cumsum(self._counts_R) - self._counts_R

    @property
    def missing(self) -> int:
        """The first row that is not there; as many as there are rows once all are."""
        sizes = [self._file(name).stat().st_size if self._file(name).is_file() else 0 for name in FILES]
        tokens = min(size // (self.k * dtype.itemsize) for size, dtype in zip(sizes, FILES.values(), strict=True))
        return int(np.searchsorted(self._starts_R + self._counts_R, tokens, side="right"))

    def find_out(self, teacher: Llama4, *, batch: int, progress: bool = False) -> None:
        """Ask the teacher about the rows that are missing, `batch` at once."""
        first = self.missing
        if first == len(self.rows):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        streams = {}
        if multihost.is_first():
            streams = {name: self._file(name).open("ab") for name in FILES}
            for name, stream in streams.items():
                stream.truncate(int(self._starts_R[first]) * self.k * FILES[name].itemsize)

        def expected(model: Llama4, batch: Batch) -> tuple[Top, jax.Array]:
            return of_batch(model, batch, self.k), jnp.asarray(batch.weight_BT)

        for (ids, logprobs), weight_BT in over_rows(
            teacher, self.rows, expected, batch=batch, what="asking the teacher", first=first, progress=progress
        ):
            for name, values in (("ids", ids), ("logprobs", logprobs)):
                if name in streams:
                    streams[name].write(values[weight_BT != 0].astype(FILES[name]).tobytes())
        for stream in streams.values():
            stream.close()
        multihost.exchange(None)  # all is written before anyone reads

    def of(self, batch_ABT: Batch, rows_AB: np.ndarray) -> Top:
        """[A, B, T, K] of some rows; zeros where nothing counts."""
        shape = (*batch_ABT.ids_BT.shape, self.k)
        out = {name: np.zeros(shape, dtype) for name, dtype in FILES.items()}
        for at in np.ndindex(rows_AB.shape):
            row, counts_T = rows_AB[at], batch_ABT.weight_BT[at] != 0
            for name, dtype in FILES.items():
                start = int(self._starts_R[row]) * self.k
                values = np.fromfile(self._file(name), dtype, int(self._counts_R[row]) * self.k, offset=start * dtype.itemsize)
                out[name][at][counts_T] = values.reshape(-1, self.k)
        return Top(**out)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.{FILES[name].name}"


def of_batch(teacher: Llama4, batch: Batch, k: int) -> Top:
    """[B, T, K] what a teacher expects behind every token."""
    return over_pieces(teacher, read(teacher, batch)[0], lambda logits_BCV: top(logits_BCV, k))


def check_tokenizers(student: Tokenizer, teacher: Tokenizer, vocabulary: int) -> None:
    """
    Raises:
      UserError: a token that means something else to the teacher.
    """
    for id in range(vocabulary):
        mine, theirs = student.spelling(id), teacher.spelling(id)
        if mine != theirs:
            raise UserError(
                f"token {id} is {mine!r} for the student and {theirs!r} for the teacher: what a teacher says of tokens means nothing to a "
                "student with another tokenizer."
            )


class TaughtRows:
    """Rows with their teachings; the weight of the soft targets comes with the step."""

    def __init__(self, rows: Conversations, teachings: Teachings):
        self.rows, self.teachings = rows, teachings

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, rows_AB: np.ndarray) -> Taught:
        batch = self.rows(rows_AB)
        return Taught(batch, self.teachings.of(batch, rows_AB), np.ones(rows_AB.shape, np.float32))


class Scheduled:
    """Batches whose soft targets weigh what the schedule says of the step."""

    def __init__(self, batches: Batches, schedule: Schedule, steps: int):
        self._batches, self._schedule, self._steps = batches, schedule, steps
        self._step = 0

    def take(self, model: Any = None) -> tuple[Taught, dict[str, Any]]:
        taught, said = self._batches.take(model)
        weight = self._schedule.weight(self._step, self._steps)
        self._step += 1
        return taught._replace(soft_B=np.full_like(taught.soft_B, weight)), {**said, "soft": round(weight, 4)}

    def state(self) -> dict[str, Any]:
        return {"step": self._step, "batches": self._batches.state()}

    def go_to(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._batches.go_to(state["batches"])
