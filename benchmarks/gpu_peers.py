"""What else users have on a GPU, for `on_gpu.py`: transformers through the same model, eager as it comes, with random weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Iterator
from typing import Any

from maverick_jax.config import Config
from maverick_jax.errors import first_line

STEPS = 8
REPEATS = 3
DECODE, PREFILL = ((1, 1024), (8, 1024)), ((1, 1024), (1, 8192))  # more does not fit beside its copies of experts


def transformers_rows(config: Config, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for each batch and context: microseconds of a decode step, and of a prompt. `tiny`: on the CPU, few tokens."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        yield {"failed": f"{' and '.join(missing)} not installed"}
        return
    import torch

    device = "cpu" if tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        yield {"failed": "torch sees no GPU"}
        return
    with torch.inference_mode():
        try:
            model = _random_model(config, device)
        except Exception as error:
            yield {"failed": first_line(error)[:120]}
            return
        for phase, cases in (("decode", DECODE), ("prefill", PREFILL)):
            for batch, tokens in ((batch, 16 if tiny else tokens) for batch, tokens in cases):
                about = {"phase": phase, "batch": batch, "tokens": tokens}
                try:
                    yield about | {"microseconds": round(1e6 * _seconds(model, phase, batch, tokens, device), 1)}
                except Exception as error:  # out of memory, and the next may fit
                    yield about | {"failed": first_line(error)[:120]}
                if device == "cuda":
                    torch.cuda.empty_cache()


def _random_model(config: Config, device: str) -> Any:
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    values: dict[str, Any] = dataclasses.replace(config, vision=None).to_huggingface()
    del values["architectures"]
    values["pad_token_id"] = None  # or it has to be one of the vocabulary
    theirs = Llama4TextConfig(**values)
    with torch.device(device):
        return Llama4ForCausalLM._from_config(theirs, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def _seconds(model: Any, phase: str, batch: int, tokens: int, device: str) -> float:
    """The best of several."""
    import torch
    from transformers import DynamicCache

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    ids = torch.randint(4, model.config.vocab_size, (batch, tokens), device=device)
    best = math.inf
    for _ in range(REPEATS):
        cache, began = DynamicCache(config=model.config), now()
        token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        if phase == "prefill":
            best = min(best, now() - began)
        for _ in range(STEPS if phase == "decode" else 0):
            began = now()
            token = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            best = min(best, now() - began)
    return best
