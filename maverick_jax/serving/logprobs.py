"""The log-probabilities of an answer's tokens, in the forms that OpenAI's clients know."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from maverick_jax.prompt import Tokenizer
from maverick_jax.serving.answer import Token

Score = tuple[float, dict[int, float]] | None  # of a token: its own, and those of the likeliest by their ids
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


def of_prompt(ids: Sequence[int], scores: Sequence[Score], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token the likeliest ones and itself by their ids, with their ranks where these are known."""
    return [None if score is None else _ranked(token, score, tokenizer) for token, score in zip(ids, scores, strict=True)]


def _ranked(token: int, score: tuple[float, dict[int, float]], tokenizer: Tokenizer) -> dict[str, Any]:
    own, likeliest = score
    ranks = {id: rank for rank, id in enumerate(likeliest, 1)}
    return {
        str(id): {"logprob": _finite(value), "rank": ranks.get(id), "decoded_token": _name(id, tokenizer)}
        for id, value in {**likeliest, token: own}.items()
    }


def echoed(ids: Sequence[int], scores: Sequence[Score], tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """A prompt in the form of `of_completion`, to stand in front of it: of its first token nothing is known."""
    names = [_name(id, tokenizer) for id in ids]
    return {
        "tokens": names,
        "token_logprobs": [score and _finite(score[0]) for score in scores],
        "top_logprobs": [score and _by_name([*score[1].items(), (id, score[0])], tokenizer) for id, score in zip(ids, scores, strict=True)],
        "text_offset": [0, *itertools.accumulate(map(len, names[:-1]))],
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
