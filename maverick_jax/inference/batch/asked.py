"""What a job asks of the engine: its prompts as tokens and pictures, and a request for each answer to each of them."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.batch.jobs import CHAT, Job
from maverick_jax.inference.checks import token_rows
from maverick_jax.inference.grammar import Grammars
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.model import Llama4
from maverick_jax.prompt import Prompt, Tokenizer, load_template, render


@dataclasses.dataclass(frozen=True)
class Asked:
    """A job, ready for the engine.

    Attributes:
      requests: `job.answers` for the first prompt, then for the next one.
      echoes: what each answer's text begins with: its prompt's, if the job says so.
    """

    job: Job
    requests: list[Request]
    echoes: list[str]


class Asker:
    """Makes requests of jobs. Any thread may call it.

    Args:
      max_length: tokens of a request, prompt and answer together; an answer without a limit of its own goes on to there.
      grammars: the engine's. A form is compiled here, so that nobody who is being answered waits for it.

    Raises:
      UserError: no model that `load` opened, or tokenizer or template files that cannot be read.
    """

    def __init__(self, model: Llama4, max_length: int, grammars: Grammars):
        if model.directory is None:
            raise UserError("this model was not loaded from a directory, so its tokenizer is unknown: open it with maverick_jax.load.")
        self.config, self.max_length, self._grammars = model.config, max_length, grammars
        self.tokenizer = Tokenizer.from_directory(model.directory)
        self._template = load_template(model.directory)

    def __call__(self, job: Job) -> Asked:
        """
        Raises:
          UserError: messages, a picture or a setting that cannot be understood. What depends on room or vocabulary the engine says.
        """
        if job.grammar is not None:
            self._grammars.compiled(job.grammar)
        # A line without a seed draws otherwise than the next one, and as it did when the batch is run again.
        settings: dict[str, Any] = {"seed": zlib.crc32(job.custom_id.encode("utf-8", "surrogatepass"))} | job.sampling
        prompts = [prompt for prompt in self._prompts(job) for _ in range(job.answers)]
        stop = None
        if job.ignore_eos or job.stop_ids:
            stop = [*job.stop_ids, *(() if job.ignore_eos else self.config.eos_token_id)]
        requests = [
            Request(
                ids=prompt.token_ids,
                tiles=prompt.tiles,
                max_new_tokens=job.max_new_tokens or max(1, self.max_length - len(prompt.token_ids)),
                sampling=sampling,
                stop_ids=stop,
                grammar=job.grammar,
            )
            for prompt, sampling in zip(prompts, Sampling(**settings).by_row(len(prompts)), strict=True)
        ]
        texts = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in job.prompts if job.echo]
        return Asked(job, requests, [text for text in texts for _ in range(job.answers)] or [""] * len(requests))

    def _prompts(self, job: Job) -> list[Prompt]:
        if job.url == CHAT:
            return [render(job.messages, self.tokenizer, self.config, template=self._template, tools=job.tools, **job.render)]
        begin = self.config.bos_token_id
        token_rows([prompt for prompt in job.prompts if not isinstance(prompt, str)], self.config.text.vocab_size)
        return [Prompt([begin, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt) for prompt in job.prompts]
