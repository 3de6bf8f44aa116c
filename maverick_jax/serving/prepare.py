"""What a job asks of the engine: its prompts as tokens and pictures, and a request for each answer to each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.checks import NoRoom, token_rows
from maverick_jax.inference.grammar import Grammars
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.model import Llama4
from maverick_jax.prompt import Prompt, Tokenizer, load_template, render
from maverick_jax.serving.job import Job
from maverick_jax.serving.pictures import Address, refuse_address
from maverick_jax.serving.tools.form import form_of


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A job, ready for the engine.

    Attributes:
      requests: `job.answers` for the first prompt, then for the next one.
      echoes: what each answer's text begins with: its prompt's, if the job says so.
      config: the model's.
      adapter: what answers, by its name; None is the model alone.
    """

    job: Job
    requests: list[Request]
    echoes: list[str]
    config: Config
    adapter: str | None = None


class Preparer:
    """Makes requests of jobs. Any thread may call it.

    Args:
      max_length: tokens of a request, prompt and answer together; a longer answer, or one without a limit, goes on to there.
      grammars: the engine's. A form is compiled here, so that nobody who is being answered waits for it.
      fetch: the bytes of a picture that is elsewhere.
      adapters: names that a job may have for its model's, besides the model's own.
      routed_experts: whether answers tell the experts of their tokens.

    Raises:
      UserError: no model that `load` opened, or tokenizer or template files that cannot be read.
    """

    def __init__(
        self,
        model: Llama4,
        max_length: int,
        grammars: Grammars,
        fetch: Callable[[Address], bytes] = refuse_address,
        *,
        adapters: Collection[str] = (),
        routed_experts: bool = False,
    ):
        if model.directory is None:
            raise UserError("this model was not loaded from a directory, so its tokenizer is unknown: open it with maverick_jax.load.")
        self.config, self.max_length, self._grammars, self._fetch = model.config, max_length, grammars, fetch
        self._adapters, self._routed_experts = adapters, routed_experts
        self.tokenizer = Tokenizer.from_directory(model.directory)
        self.template = load_template(model.directory)

    def __call__(self, job: Job, seed: int) -> Prepared:
        """
        Args:
          seed: what a job draws with that names none.

        Raises:
          UserError: messages, a picture or a setting that cannot be understood. What depends on the vocabulary the engine says.
        """
        grammar = form_of(job.tools, job.grammar)
        if grammar is not None:
            self._grammars.compiled(grammar)
        settings: dict[str, Any] = {"seed": seed} | job.sampling
        prompts = [prompt for prompt in self.prompts(job) for _ in range(job.answers)]
        stop = None
        if job.ignore_eos or job.stop_ids:
            stop = [*job.stop_ids, *(() if job.ignore_eos else self.config.eos_token_id)]
        told_from = job.routed_experts_prompt_start
        if told_from is None and self._routed_experts:
            told_from = 0
        adapter = job.model if job.model in self._adapters else None
        requests = [
            Request(
                ids=prompt.token_ids,
                tiles=prompt.tiles,
                max_new_tokens=self._longest(job, prompt),
                sampling=sampling,
                stop_ids=stop,
                grammar=grammar,
                prompt_logprobs=job.prompt_logprobs,
                adapter=adapter,
                routed_experts_prompt_start=told_from,
            )
            for prompt, sampling in zip(prompts, Sampling(**settings).by_row(len(prompts)), strict=True)
        ]
        texts = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in job.prompts if job.echo]
        echoes = [text for text in texts for _ in range(job.answers)] or [""] * len(requests)
        return Prepared(job, requests, echoes, self.config, adapter)

    def prompts(self, job: Job) -> list[Prompt]:
        """As the model takes them."""
        if job.messages:
            messages = [self._fetched(message) for message in job.messages]
            return [render(messages, self.tokenizer, self.config, template=self.template, tools=job.tools.schemas, **job.render)]
        token_rows([prompt for prompt in job.prompts if not isinstance(prompt, str)], self.config.text.vocab_size)
        return [Prompt(self.begun(prompt) if isinstance(prompt, str) else prompt) for prompt in job.prompts]

    def begun(self, text: str) -> list[int]:
        """Its tokens, behind the one that begins a text."""
        return [self.config.bos_token_id, *self.tokenizer.encode(text)]

    def _fetched(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with the pictures that are elsewhere."""
        if not isinstance(parts := message.get("content"), list):
            return message
        return message | {"content": [self._fetched_part(part) for part in parts]}

    def _fetched_part(self, part: Any) -> Any:
        image = part.get("image") if isinstance(part, dict) else None
        return part | {"image": self._fetch(image)} if isinstance(image, Address) else part

    def _longest(self, job: Job, prompt: Prompt) -> int:
        room = self.max_length - len(prompt.token_ids)
        if room < 1:
            raise NoRoom(
                f"the prompt has {len(prompt.token_ids)} tokens, and with an answer there is room for {self.max_length}: shorten it."
            )
        return min(room, job.max_new_tokens or room)
