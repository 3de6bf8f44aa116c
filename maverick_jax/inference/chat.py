"""A conversation with a model: text and pictures in, streamed text out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.inference.admission import check_model
from maverick_jax.inference.checks import MAX_NEW_TOKENS, check_room, names_the_nearest, shown, stop_strings
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.generate import engine_for
from maverick_jax.inference.handle import Handle
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.inference.sizes import next_power_of_two
from maverick_jax.inference.stop import StopStrings
from maverick_jax.model import Llama4
from maverick_jax.prompt import (
    Prompt,
    StreamDecoder,
    Tokenizer,
    as_tiles,
    listed_pictures,
    load_template,
    render,
    tool_schemas,
    user_message,
)

SHORTEST = 2048  # tokens that a conversation has room for at first


class Chat:
    """Keeps a conversation: `chat("What is this?", images=["dog.jpg"])` returns the answer.

    Args:
      model: from `load`, which remembers where the tokenizer and the chat template are.
      system: system message, if any.
      tools: functions that the model may call: Python functions with types and a docstring, or JSON schemas. A call is an
        answer like any other; add its result to `messages` as {"role": "tool", "content": ...} and let `complete` go on.
      max_new_tokens: longest answer.
      stop: text, or texts, that end an answer; they are not part of it.
      temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, min_tokens, seed: see
        `Sampling`.

    Attributes:
      messages: the conversation so far, as role/content dicts; pictures as the tiles they were cut into.
      sampling: how tokens are chosen; another `Sampling` may be set between two questions.
      last: the `Handle` of the newest answer, with its times; None before the first.
      engine: keeps what it has read, so that a turn reads only what is new; None before the first.

    Raises:
      UserError: no model that `load` opened, tokenizer or template files that cannot be read, or a setting of another type or
        outside its range.
    """

    @names_the_nearest
    def __init__(
        self,
        model: Llama4,
        *,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        seed: int = 0,
    ):
        check_model(model)
        if model.directory is None:
            raise UserError("this model was not loaded from a directory, so its tokenizer is unknown: open it with maverick_jax.load.")
        if not isinstance(system, str | None):
            raise UserError(f"system is {shown(system)}: expected a text, the system message.")
        self.model = model
        self.system = system
        self.tools = tool_schemas(tools)
        self.max_new_tokens = MAX_NEW_TOKENS.check("max_new_tokens", max_new_tokens)
        self.stop = stop_strings(stop)
        self.sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            min_tokens=min_tokens,
            seed=seed,
        )
        self.tokenizer = Tokenizer.from_directory(model.directory)
        self.template = load_template(model.directory)
        self.last: Handle | None = None
        self.engine: Engine | None = None
        self.reset()

    def __repr__(self) -> str:
        return f"Chat({self.model.directory!r}, {len(self.messages)} messages)"

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []

    def __call__(self, text: str, images: Any = ()) -> str:
        """The answer to `text` about `images`, a picture or a list of them as `load_picture` takes them."""
        return "".join(self.stream(text, images))

    def stream(self, text: str, images: Any = ()) -> Generator[str, None, None]:
        """The answer in portions of whole characters.

        The conversation grows by question and answer once the answer is complete. An answer that is stopped (Ctrl-C, or the iterator is
        closed) stays as far as it went; if nothing was said yet, or an error ended it, the conversation is what it was.
        """
        if not isinstance(text, str):
            raise UserError(f"the question is {shown(text)}: expected a text.")
        images, vision = listed_pictures(images), self.model.config.vision
        cut = [as_tiles(image, vision) for image in images] if vision else images  # a file may change before the next turn
        question = user_message(text, cut)
        return self._answer(question, self.complete(self.prompt([*self.messages, question])))

    def _answer(self, question: dict[str, Any], portions: Iterator[str]) -> Generator[str, None, None]:
        answer = ""
        try:
            for portion in portions:
                answer += portion
                yield portion
        except (KeyboardInterrupt, GeneratorExit):
            if answer:
                self._remember(question, answer)
            raise
        self._remember(question, answer)

    def _remember(self, question: dict[str, Any], answer: str) -> None:
        self.messages += [question, {"role": "assistant", "content": answer}]

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """Token ids and tiles of a conversation that the assistant is to continue."""
        return render(messages, self.tokenizer, self.model.config, template=self.template, tools=self.tools)

    def raw_prompt(self, text: str) -> Prompt:
        """Token ids of plain text behind the begin-of-text token, for models that continue rather than answer."""
        return Prompt([self.model.config.bos_token_id, *self.tokenizer.encode(text)])

    def complete(self, prompt: Prompt) -> Iterator[str]:
        """Continue a prompt as text, up to a stop token or a stop string."""
        if not isinstance(prompt, Prompt):
            raise UserError(f"prompt is {shown(prompt)}: expected what `prompt` or `raw_prompt` makes of messages or of text.")
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling is {shown(self.sampling)}: give a maverick_jax.Sampling.")
        (sampling,) = self.sampling.by_row(1)
        check_room([np.asarray(prompt.token_ids)], self.max_new_tokens, self.model.config.text)
        request = Request(ids=prompt.token_ids, tiles=prompt.tiles, max_new_tokens=self.max_new_tokens, sampling=sampling)
        if self.last is not None:
            self.last.cancel()  # of an answer that nobody has begun to read
        self.last = self._engine_for(len(prompt.token_ids) + self.max_new_tokens).submit(request)
        return self._text(self.last)

    def _engine_for(self, tokens: int) -> Engine:
        """One with room for so many; a larger one reads the conversation again, once each time that it has doubled."""
        if self.engine is None or self.engine.limits.max_length < tokens:
            self.engine = self.last = None  # the old cache goes before a new one comes: there is memory for one
            self.engine = engine_for(self.model, [next_power_of_two(max(tokens, SHORTEST))])
        return self.engine

    def _text(self, answer: Handle) -> Iterator[str]:
        decoder, stop = StreamDecoder(self.tokenizer), StopStrings(self.stop)
        try:
            for token in answer:
                text = stop.push(decoder.push(token))
                if text:
                    yield text
                if stop.met:
                    return
        finally:
            answer.cancel()  # whoever listens no more pays no more
        text = stop.push(decoder.flush()) + stop.flush()
        if text:
            yield text
