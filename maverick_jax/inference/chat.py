"""A conversation with a model: text and pictures in, streamed text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.generate import Generation
from maverick_jax.inference.sampling import Sampling
from maverick_jax.inference.stop import StopStrings
from maverick_jax.model import Llama4
from maverick_jax.prompt import Prompt, StreamDecoder, Tokenizer, load_template, render, tile_image


class Chat:
    """Keeps a conversation: `chat("What is this?", images=["dog.jpg"])` returns the answer.

    Args:
      model: from `load`, which remembers where the tokenizer and the chat template are.
      system: system message, if any.
      tools: functions that the model may call: Python functions with types and a docstring, or JSON schemas. A call is an
        answer like any other; add its result to `messages` as {"role": "tool", "content": ...} and let `complete` go on.
      max_new_tokens: longest answer.
      stop: strings that end an answer; they are not part of it.
      sampling: temperature, top_k, top_p, min_p, seed as for `generate`.

    Attributes:
      messages: the conversation so far, as role/content dicts; pictures as the tiles they were cut into.
      last: the `Generation` of the newest answer, with its times and expert loads.
    """

    def __init__(
        self,
        model: Llama4,
        *,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        **sampling: Any,
    ):
        if model.directory is None:
            raise UserError("this model was not loaded from a directory, so its tokenizer is unknown: open it with maverick_jax.load.")
        self.model = model
        self.system = system
        self.tools = tools
        self.max_new_tokens = max_new_tokens
        self.stop = tuple(stop)
        self.sampling = Sampling(**sampling)
        self.tokenizer = Tokenizer.from_directory(model.directory)
        self.template = load_template(model.directory)
        self.last: Generation | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []

    def __call__(self, text: str, images: Sequence[Any] = ()) -> str:
        """The answer to `text` about `images` (paths, bytes or PIL pictures)."""
        return "".join(self.stream(text, images))

    def stream(self, text: str, images: Sequence[Any] = ()) -> Iterator[str]:
        """The answer in portions of whole characters. The conversation grows once the answer is complete."""
        vision = self.model.config.vision
        cut = [tile_image(image, vision) for image in images] if vision else images  # a file may change before the next turn
        content = [{"type": "image", "image": image} for image in cut] + [{"type": "text", "text": text}]
        question = {"role": "user", "content": content if images else text}
        answer = ""
        for portion in self.complete(self.prompt([*self.messages, question])):
            answer += portion
            yield portion
        self.messages += [question, {"role": "assistant", "content": answer}]

    def prompt(self, messages: list[dict[str, Any]]) -> Prompt:
        """Token ids and tiles of a conversation that the assistant is to continue."""
        return render(messages, self.tokenizer, self.model.config, template=self.template, tools=self.tools)

    def raw_prompt(self, text: str) -> Prompt:
        """Token ids of plain text behind the begin-of-text token, for models that continue rather than answer."""
        return Prompt([self.model.config.bos_token_id, *self.tokenizer.encode(text)])

    def complete(self, prompt: Prompt) -> Iterator[str]:
        """Continue a prompt as text, up to a stop token or a stop string."""
        self.last = Generation(
            self.model, [prompt.token_ids], tiles=prompt.tiles, max_new_tokens=self.max_new_tokens, sampling=self.sampling
        )
        decoder, stop = StreamDecoder(self.tokenizer), StopStrings(self.stop)
        for (tokens,) in self.last:
            text = stop.push("".join(decoder.push(token) for token in tokens))
            if text:
                yield text
            if stop.met:
                return
        text = stop.push(decoder.flush()) + stop.flush()
        if text:
            yield text
