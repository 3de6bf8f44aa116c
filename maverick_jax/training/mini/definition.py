"""Sizes and tokenizer of the embedded mini model: every part of Llama 4, three million parameters."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from maverick_jax.assets.digits import QUESTIONS, answer
from maverick_jax.config import Config, TextConfig, VisionConfig
from maverick_jax.prompt.byte_level import SPLIT_PATTERN, byte_alphabet, byte_level_bpe

SPECIAL = [
    f"<|{name}|>"
    for name in (
        "begin_of_text end_of_text header_start header_end eom eot python_start python_end finetune_right_pad "
        "image_start image_end tile_x_separator tile_y_separator image patch"
    ).split()
]
VOCABULARY = 384  # bytes and merges

# The chat format of the releases, for programs that go by a checkpoint's own template.
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""


def mini_tokenizer() -> dict[str, Any]:
    """A `tokenizer.json` with Llama 4's splitting and special-token names, trained on the questions and answers."""
    sentences = [*QUESTIONS, "user", "assistant", "system", "\n\n"]
    sentences += [answer(question, left, right) for question in QUESTIONS for left in range(10) for right in range(10)]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated"),  # two-digit numbers stay two tokens
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=byte_alphabet(), show_progress=False)
    trained.train_from_iterator(sentences, trainer)
    model = json.loads(trained.to_str())["model"]
    return byte_level_bpe(model["vocab"], [tuple(pair) for pair in model["merges"]], SPECIAL)


def mini_config(tokenizer: dict[str, Any]) -> Config:
    """The architecture of Maverick, small: 128 experts on every second layer, NoPE on every fourth, chunks of 32 tokens."""
    id_of = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    text = TextConfig(
        vocab_size=max(id_of.values()) + 1,
        hidden_size=64,
        intermediate_size=32,
        intermediate_size_mlp=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=128,
        moe_layers=(1, 3, 5, 7),
        nope_layers=(3, 7),
        attention_chunk_size=32,
        floor_scale=16,
        max_position_embeddings=4096,
    )
    vision = VisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        projector_input_dim=128,
        projector_output_dim=128,
        vision_output_dim=128,
    )
    return Config(
        text=text,
        vision=vision,
        image_token_index=id_of["<|patch|>"],
        bos_token_id=id_of["<|begin_of_text|>"],
        eos_token_id=tuple(id_of[f"<|{name}|>"] for name in ("end_of_text", "eom", "eot")),
        pad_token_id=id_of["<|finetune_right_pad|>"],
    )
