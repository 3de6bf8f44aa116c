"""The log-probabilities of an answer's tokens, in the forms that OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from maverick_jax.prompt import Tokenizer
from maverick_jax.serving.answer import Token

LEAST = -9999.0  # OpenAI's for what has none: JSON knows no infinity


def of_chat(tokens: Iterable[Token], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """An object for every token that has one."""
    return [
        _spelled(token.id, token.logprob, tokenizer)
        | {"top_logprobs": [_spelled(id, value, tokenizer) for id, value in token.likeliest.items()]}
        for token in tokens
        if token.logprob is not None
    ]


def of_completion(tokens: Sequence[Token], tokenizer: Tokenizer, *, before: int = 0) -> dict[str, list[Any]]:
    """Lists over the tokens; among the likeliest stands the token itself, as one more if need be.

    Args:
      before: characters in front of the answer.
    """
    return {
        "tokens": [_name(token.id, tokenizer) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_name([*token.likeliest.items(), (token.id, token.logprob)], tokenizer) for token in tokens],
        "text_offset": [before + token.place for token in tokens],
    }


def _by_name(likely: list[tuple[int, float | None]], tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest first. Tokens may be spelled alike: then the first one stays."""
    names: dict[str, float] = {}
    for id, value in likely:
        names.setdefault(_name(id, tokenizer), _finite(value))
    return names


def _spelled(id: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"token": _name(id, tokenizer), "bytes": list(tokenizer.spelling(id)), "logprob": _finite(logprob)}


def _name(id: int, tokenizer: Tokenizer) -> str:
    return tokenizer.spelling(id).decode("utf-8", "backslashreplace")


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)
