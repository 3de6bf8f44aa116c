"""The names of a checkpoint as other tools write them: what they put before all of them, and tensors that are no weights.

What stands before the name of the embedding (or, where an unembedding serves as both, of the last norm) stands before all names;
nothing is guessed for a single tensor.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from maverick_jax.convert.formats.agreement import some_of
from maverick_jax.convert.formats.tensor_file import Tensor
from maverick_jax.errors import UserError
from maverick_jax.ops.quantize import FORMATS

Begins = Mapping[str, str]

# What the embedding's name begins with -> how all names begin, and how they begin in our tables, which have the whole model's.
HUGGINGFACE: Mapping[str, Begins] = {
    "language_model.model.": {},
    "model.language_model.": {  # as transformers has it in other families with pictures
        "model.language_model.": "language_model.model.",
        "model.": "",
        "lm_head.": "language_model.lm_head.",
    },
    "model.": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},  # Llama4ForCausalLM
    "": {"": "language_model.model."},  # Llama4TextModel
}
META: Mapping[str, Begins] = {"": {}}
MARKS = ("embed_tokens.weight", "tok_embeddings.weight", "norm.weight")
# A word of torch's wherever a module was wrapped: compiled, sharded, or computed again in the backward pass.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What changes nothing: scales of an 8-bit cache, which ours is not, and buffers that are computed from the config.
LEFTOVERS = re.compile(
    r".+\.((?:[qkv]|kv|prob)_scale|[kv]_proj\.output_scale|rotary_emb(?:edding)?\.\w+|(?:self_attn|attn)\.(?:masked_)?bias|position_ids)"
)
INPUT_SCALE = re.compile(r"(.+)[._](input_scale)")
FP8 = FORMATS["fp8"].values


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Tensors by the names of our tables.

    Attributes:
      tensors: name in the table -> tensor, without those that change nothing.
      stored: name in the table -> name in the files.
      notes: what is worth telling once, in words.
      before, begins: what the files have before all names, and how they begin behind it.
    """

    tensors: dict[str, Tensor]
    stored: dict[str, str]
    notes: tuple[str, ...]
    before: str
    begins: Begins

    def spell(self, name: str) -> str:
        """How the files spell a name of the table, or would if they had it."""
        fitting = [pair for pair in self.begins.items() if name.startswith(pair[1])]
        theirs, ours = max(fitting, key=lambda pair: len(pair[1]), default=("", ""))
        return self.stored.get(name, f"{self.before}{theirs}{name.removeprefix(ours)}")


def read_spelling(directory: Path, tensors: Mapping[str, Tensor], ways: Mapping[str, Begins] = HUGGINGFACE) -> Spelling:
    """Find out how the names of a checkpoint are spelled.

    Args:
      ways: in which names may begin behind what stands before all of them, the longest first.

    Raises:
      UserError: these are several models, or two names are one tensor's.
    """
    bare = {name: WRAPPERS.sub("", name) for name in tensors}
    before, begins = _find_beginning(directory, bare.values(), ways)
    stored: dict[str, str] = {}
    for name, short in bare.items():
        ours = _as_in_table(short.removeprefix(before), begins) if short.startswith(before) else short
        if ours in stored:
            raise UserError(f"{directory} has {' and '.join(sorted([stored[ours], name]))}, which name one tensor: save the model once.")
        stored[ours] = name
    left = {ours: kind for ours in stored if (kind := _leftover(ours, stored, tensors))}
    kept = {ours: tensors[name] for ours, name in stored.items() if ours not in left}
    return Spelling(kept, stored, (*_note_words(before, bare), *_note_leftovers(left.values())), before, begins)


def _find_beginning(directory: Path, names: Collection[str], ways: Mapping[str, Begins]) -> tuple[str, Begins]:
    """What stands before all names, and how they begin behind it."""
    ends = ([name.removesuffix(mark) for name in names if f".{name}".endswith(f".{mark}")] for mark in MARKS)
    found: dict[str, Begins] = {}
    for head in sorted(next(filter(None, ends), []), key=len, reverse=True):
        way = next(way for way in ways if f".{head}".endswith(f".{way}"))
        found.setdefault(head.removesuffix(way), ways[way])
    if "" in found or not found:  # with a model that has nothing before its names, another one's names are simply too many
        return "", found.get("", {})
    if len(found) > 1:
        raise UserError(f"{directory} holds several models, with names behind {some_of(sorted(found))}: save one of them alone.")
    return next(iter(found.items()))


def _as_in_table(name: str, begins: Begins) -> str:
    theirs, ours = next((pair for pair in begins.items() if name.startswith(pair[0])), ("", ""))
    return ours + name.removeprefix(theirs)


def _leftover(name: str, stored: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str | None:
    """What kind of leftover a tensor is; None for what may be a weight.

    The scale of a product's inputs goes with values that are quantized; beside plain weights it was left by a quantization undone.
    """
    if found := LEFTOVERS.fullmatch(name):
        return found[1]
    if found := INPUT_SCALE.fullmatch(name):
        beside = [tensors[stored[weight]] for weight in (f"{found[1]}.weight", found[1]) if weight in stored]
        return found[2] if beside and beside[0].dtype != FP8 else None
    return None


def _note_words(before: str, bare: Mapping[str, str]) -> list[str]:
    """The words that are left out: those before all names as the files have them, then any that stand elsewhere."""
    tails = {name: short.removeprefix(before) for name, short in bare.items() if short.startswith(before)}
    first = next((name.removesuffix(tail) for name, tail in tails.items() if name.endswith(tail)), before)
    inside = {word for name in bare for word in WRAPPERS.findall(name.removeprefix(first))}
    words = [some_of([word]) for word in (first, *sorted(inside)) if word]
    return [f"names are read without {' and '.join(words)}, which other tools put into them."] if words else []


def _note_leftovers(kinds: Iterable[str]) -> list[str]:
    counts = collections.Counter(kinds)
    listed = ", ".join(f"{kind} ({count:,})" for kind, count in sorted(counts.items()))
    return [f"passed over, for they change nothing: {listed}."] if counts else []
