"""What a run says of itself: a bar on the terminal, a line of JSON per step, curves for TensorBoard.

Shape suffixes: M layers with experts, E experts.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

METRICS, CURVES = "metrics.jsonl", "tensorboard"
NO_SUMS = ("loss", "gradient_norm", "total", "dropped")


def summarize(measures: dict[str, Any]) -> dict[str, Any]:
    """Sums over a step as what people read: means of what counts.

    Args:
      measures: of `make_update`, on the host.
    """
    total = max(float(measures["total"]), 1e-30)
    record: dict[str, Any] = {name: float(measures[name]) for name in ("loss", "gradient_norm") if name in measures}
    record |= {name: float(value) / total for name, value in measures.items() if np.ndim(value) == 0 and name not in NO_SUMS}
    if "load" in measures:
        load_ME = np.asarray(measures["load"], np.float64)
        tokens_M = np.maximum(load_ME.sum(axis=1), 1)
        record["imbalance"] = [round(float(x), 3) for x in load_ME.max(axis=1) / (tokens_M / load_ME.shape[1])]
        record["idle_experts"] = [int(n) for n in (load_ME == 0).sum(axis=1)]
        record["router_entropy"] = [round(float(x), 4) for x in np.asarray(measures["router_entropy"]) / tokens_M]
        record["dropped"] = int(measures["dropped"])
    return record


class Report:
    """Writes as the steps come.

    Args:
      out: the run's directory.
      steps: of the whole run.
      done: those that were made before; what an earlier attempt said of later ones is taken back.
    """

    def __init__(self, out: Path, *, steps: int, done: int, progress: bool):
        self._file = out / METRICS
        kept = [line for line in self._file.read_text().splitlines() if json.loads(line)["step"] <= done] if self._file.is_file() else []
        self._stream = self._file.open("w", encoding="utf-8", buffering=1)
        self._stream.writelines(f"{line}\n" for line in kept)
        self._curves = _curves(out / CURVES, done)
        self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=None if progress else True)
        self._since = time.perf_counter()

    def step(self, number: int, record: dict[str, Any], *, tokens: int, flops: float, peak: float | None) -> dict[str, Any]:
        """One step's record, as `summarize` gives it.

        Args:
          tokens: that it took, padding included.
          flops: that it needed.
          peak: FLOP/s of all devices, if that is known.
        """
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        record = {"step": number, **record, "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}
        if peak:
            record["mfu"] = round(flops / seconds / peak, 4)
        self._stream.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self._curves.add_scalar(name, float(np.mean(value)), number)
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s", refresh=False)
        self._bar.update()
        return record

    def close(self) -> None:
        self._bar.close()
        self._stream.close()
        self._curves.close()


def _curves(folder: Path, done: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=done + 1)
