"""What transformers says of the mini model, kept in `mini.npz`: a machine without PyTorch can compare too.

python tests/oracle/mini.py makes the file again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from maverick_jax.assets import digits, mini_directory
from maverick_jax.config import Config
from maverick_jax.prompt import Tokenizer, render

FILE = Path(__file__).with_name("mini.npz")
TEXT_TOKENS = 100  # more than three chunks of 32 tokens, six steps of the attention temperature
NEW_TOKENS = 40
TEXT_VOCABULARY = 256  # ids that are bytes


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[1, 100] ids of a text; [1, T] ids of a question about two pictures, and its [2, 3, S, S] tiles."""
    text = np.random.default_rng(0).integers(0, TEXT_VOCABULARY, (1, TEXT_TOKENS)).astype(np.int32)
    question, left, right, _ = digits.held_out_examples(1)[0]
    pictures = [digits.picture(pixels) for pixels in digits.held_out()[0]]
    directory = mini_directory()
    prompt = render(
        digits.messages(question, pictures[left], pictures[right]), Tokenizer.from_directory(directory), Config.from_directory(directory)
    )
    assert prompt.tiles is not None
    return text, np.array([prompt.token_ids], np.int32), prompt.tiles


def ask_transformers() -> dict[str, np.ndarray]:
    """[100, V] and [T, V] float32 logits of both prompts, and the tokens that follow the text greedily."""
    import torch
    from transformers import Llama4ForConditionalGeneration

    model = Llama4ForConditionalGeneration.from_pretrained(mini_directory(), dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None  # random text may be followed by a stop token
    text, question, tiles = inputs()
    ids = torch.tensor(text, dtype=torch.long)
    with torch.no_grad():
        return {
            "text_logits": model(input_ids=ids).logits[0].numpy(),
            "picture_logits": model(input_ids=torch.tensor(question, dtype=torch.long), pixel_values=torch.from_numpy(tiles))
            .logits[0]
            .numpy(),
            "new_tokens": model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, TEXT_TOKENS:].numpy(),
        }


if __name__ == "__main__":
    np.savez_compressed(FILE, **ask_transformers())
    sys.stdout.write(f"{FILE.name}: {FILE.stat().st_size:,} bytes\n")
