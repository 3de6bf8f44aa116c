"""transformers' Llama 4 with the weights of a Hugging Face directory, stage by stage: the other side of `compare`.

Every module is transformers' own, made without weights. Each part of it reads its own, under the names that it gives them itself,
when it is called, and lets go of them when it returns. Nothing here knows our names or our layout: this is what these are held against.

Shape suffixes: T tokens, D model width, E experts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Llama4Config, Llama4TextConfig, Llama4VisionModel
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.utils import logging

from maverick_jax.config import Config
from maverick_jax.convert.formats.huggingface import read_names
from maverick_jax.convert.formats.tensor_file import Tensor, read_box
from maverick_jax.convert.proof.compare.stages import LOGITS_AT_ONCE, Prompt, State

PREFIX = "language_model."  # of the text in the whole model, as `read_names` has it for a text-only one too
TIE = 1e-4  # of the largest router score: as near as counts as the same everywhere else


class Reference:
    """What transformers makes of a checkpoint.

    Args:
      directory: of Hugging Face.
      prefer: asked in every mixture for an expert per token, which is taken where the router finds it no worse than the best.
    """

    def __init__(self, directory: Path, prefer: Callable[[], np.ndarray] | None = None):
        self.prefer = prefer
        self.tensors = read_names(directory).tensors
        self.config: Any = read_config(directory)
        self.text: Any = getattr(self.config, "text_config", self.config)

    @torch.no_grad()
    def run(self, prompt: Prompt) -> Iterator[State]:
        """As the model's `forward`, with a look at what it holds in between."""
        ids, layers = torch.tensor(prompt.ids, dtype=torch.long), f"{PREFIX}model.layers."
        x = self._embed(ids)
        if prompt.tiles is not None:
            features = self._encode(torch.tensor(prompt.tiles))
            yield State("vision", features.numpy())
            x = x.masked_scatter((ids == self.config.image_token_index)[..., None], features)
        yield State("embedding", x[0].numpy())
        positions = torch.arange(ids.shape[1])[None]
        asked = dict(config=self.text, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions)
        masks = {"full_attention": create_causal_mask(**asked), "chunked_attention": create_chunked_causal_mask(**asked)}
        angles = llama4.Llama4TextRotaryEmbedding(self.text)(x, positions)
        for i, kind in enumerate(self.text.layer_types):
            layer = self._make_layer(i, f"{layers}{i}.")
            x = layer(x, attention_mask=masks[kind], position_ids=positions, position_embeddings=angles)
            experts = layer.feed_forward.expert_T.numpy() if layer.is_moe_layer else None
            yield State(f"layer {i}", x[0].numpy(), experts)
        norm = self._fill(llama4.Llama4TextRMSNorm, f"{PREFIX}model.norm.", self.text.hidden_size, self.text.rms_norm_eps)
        yield State("logits", self._logits(norm(x)[0]).numpy())

    def _encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """[T, D]."""
        vision = self._fill(Llama4VisionModel, "vision_model.", self.config.vision_config)
        vision.rotary_embedding = llama4.Llama4VisionRotaryEmbedding(self.config.vision_config)  # holds numbers, not weights
        projector = self._fill(llama4.Llama4MultiModalProjector, "multi_modal_projector.", self.config)
        return projector(vision(tiles).last_hidden_state).flatten(0, 1)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[1, T, D], reading a row at a time."""
        rows, where = ids.unique(return_inverse=True)
        table = self._table("model.embed_tokens.weight")
        return torch.cat([read(table, [slice(row, row + 1)]) for row in rows.tolist()]).float()[where]

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        table = self._table("lm_head.weight")
        logits_TV = torch.empty(len(x_TD), table.shape[0])
        for at in range(0, table.shape[0], LOGITS_AT_ONCE):
            part = slice(at, min(at + LOGITS_AT_ONCE, table.shape[0]))
            logits_TV[:, part] = torch.nn.functional.linear(x_TD, read(table, [part]).float())
        return logits_TV

    def _table(self, name: str) -> Tensor:
        """Embedding or unembedding; where the config ties them, either serves as both."""
        names = (name, *(("model.embed_tokens.weight", "lm_head.weight") if self.text.tie_word_embeddings else ()))
        return next(self.tensors[PREFIX + name] for name in names if PREFIX + name in self.tensors)

    def _make_layer(self, layer: int, prefix: str) -> Any:
        with torch.device("meta"):
            made: Any = llama4.Llama4TextDecoderLayer(self.text, layer)
        if made.is_moe_layer:
            experts = f"{prefix}feed_forward.experts."
            made.feed_forward = MoE(made.feed_forward, lambda expert: self._make_expert(experts, expert), self.prefer)
        stream(made, prefix, self.tensors)
        return made

    def _make_expert(self, prefix: str, expert: int) -> torch.nn.Module:
        """One routed expert: of a stack, or from tensors of its own (the FP8 checkpoint)."""
        if f"{prefix}{expert}.gate_proj.weight" in self.tensors:
            return self._fill(llama4.Llama4TextMLP, f"{prefix}{expert}.", self.text)
        config = copy.copy(self.text)
        config.num_local_experts = 1
        return self._fill(llama4.Llama4TextExperts, prefix, config, at=[slice(expert, expert + 1)])

    def _fill(self, kind: Any, prefix: str, *options: Any, at: Sequence[slice] = ()) -> Any:
        with torch.device("meta"):
            made = kind(*options)
        stream(made, prefix, self.tensors, at)
        return made.eval()


class MoE(torch.nn.Module):
    """`Llama4TextMoe` with its router and its shared expert; of the routed ones it makes those that tokens are sent to, one at a time.

    transformers sends every token to every expert, all but one times zero; an expert makes zeros of zeros.

    Attributes:
      expert_T: the router's choice.
    """

    expert_T: torch.Tensor

    def __init__(self, original: Any, make_expert: Callable[[int], torch.nn.Module], prefer: Callable[[], np.ndarray] | None):
        super().__init__()
        self.router, self.shared_expert = original.router, original.shared_expert
        self.make_expert, self.prefer = make_expert, prefer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TD = x.reshape(-1, x.shape[-1])
        score_TE, logits_TE = self.router(x_TD)
        self.expert_T = score_TE.argmax(dim=1)
        expert_T = self._settle_ties(logits_TE)
        score_T = logits_TE.gather(1, expert_T[:, None]).sigmoid()
        out_TD = self.shared_expert(x_TD)
        for expert in expert_T.unique().tolist():
            rows = expert_T == expert
            out_TD[rows] += self.make_expert(expert)(x_TD[rows] * score_T[rows])
        return out_TD, logits_TE

    def _settle_ties(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Two experts that rounding decides between make different vectors, and no later stage could be compared."""
        if self.prefer is None:
            return self.expert_T
        preferred_T = torch.tensor(self.prefer(), dtype=torch.long)
        best_T, found_T = (logits_TE.gather(1, expert_T[:, None])[:, 0] for expert_T in (self.expert_T, preferred_T))
        return torch.where(best_T - found_T <= TIE * logits_TE.abs().amax(dim=1), preferred_T, self.expert_T)


def read_config(directory: Path) -> Llama4Config | Llama4TextConfig:
    """`config.json` as transformers reads it; in a spelling that transformers refuses, as we do."""
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with _quiet():
        try:
            config = _from_dict(values)
        except Exception:  # of as many kinds as it has checks; some mirrors write the integer 4 for a switch
            config = _from_dict(Config.from_directory(directory).to_huggingface())
    text: Any = getattr(config, "text_config", config)
    if text.attention_chunk_size is None:  # full attention (Llama Guard 4), which it reads but does not compute: one chunk for all
        text.attention_chunk_size = 1 << 30
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if part is not None:
            part._attn_implementation = "eager"
    return config


def _from_dict(values: dict[str, Any]) -> Llama4Config | Llama4TextConfig:
    return (Llama4TextConfig if values["model_type"] == "llama4_text" else Llama4Config).from_dict(values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers finds fault with the releases' RoPE scaling, whose low and high factors are equal."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def stream(module: torch.nn.Module, prefix: str, tensors: Mapping[str, Tensor], at: Sequence[slice] = ()) -> None:
    """Let every part of a module read its own parameters when it is called, and let go of them when it returns.

    Args:
      prefix: of their names in the checkpoint.
      at: which part of each tensor, by its first axes.
    """
    for path, part in module.named_modules():
        names = [name for name, parameter in part.named_parameters(recurse=False) if parameter.is_meta]
        stored = {name: f"{prefix}{path}.{name}" if path else f"{prefix}{name}" for name in names}
        if stored:
            empty = {name: getattr(part, name) for name in stored}

            def fill(part, _, stored=stored):
                for name, full in stored.items():
                    setattr(part, name, torch.nn.Parameter(_weight(tensors, full, at), requires_grad=False))

            def let_go(part, _, __, empty=empty):
                for name, parameter in empty.items():
                    setattr(part, name, parameter)

            part.register_forward_pre_hook(fill)
            part.register_forward_hook(let_go)


def _weight(tensors: Mapping[str, Tensor], name: str, at: Sequence[slice]) -> torch.Tensor:
    """Float32; of FP8 values and their scales the product in the dtype of the scales, as `compressed-tensors` makes it."""
    weight = read(tensors[name], at)
    if weight.dtype == torch.float8_e4m3fn:
        scale = read(tensors[f"{name}_scale"], at)
        weight = weight.to(scale.dtype) * scale
    return weight.float()


def read(tensor: Tensor, at: Sequence[slice] = ()) -> torch.Tensor:
    """A part of a stored tensor in its dtype: `at` the first axes, all of the others."""
    box = (*at, *(slice(0, size) for size in tensor.shape[len(at) :]))
    out = np.empty([part.stop - part.start for part in box], f"u{tensor.dtype.itemsize}")
    read_box(tensor.file, tensor.offset, tensor.shape, box, out)
    return torch.from_numpy(out.view(np.uint8)).view(getattr(torch, tensor.dtype.name))
