"""What a client may ask besides answers: which model, how long, is anybody there; and texts to tokens and back.

Source: OpenAI's `/v1/models`; vLLM's `/tokenize`, `/detokenize`, `/tokenizer_info`, which lm-eval reads.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import token_rows
from maverick_jax.serving.dialects import chat, messages
from maverick_jax.serving.fields import Fields
from maverick_jax.serving.http.exchange import parsed, read_body
from maverick_jax.serving.http.openapi import description
from maverick_jax.serving.http.service import Service
from maverick_jax.serving.names import check_name


class Information:
    """Endpoints of Starlette.

    Args:
      longest: bytes of a body.
      created: when the model was loaded, in seconds since 1970.
    """

    def __init__(self, service: Service, longest: int, created: int):
        self._service, self._longest, self._created = service, longest, created

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._service.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        check_name(name, self._service.models)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        longest, names = self._service.engine.limits.max_length, self._service.names
        parent = {} if name in names else {"parent": names[0]}  # vLLM's, of an adapter
        return {"id": name, "object": "model", "created": self._created, "owned_by": "maverick-jax", "max_model_len": longest, **parent}

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, 503 once the server shuts down."""
        return Response(status_code=503 if self._service.stopping else 200)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        text = await self._service.in_thread(self._service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": importlib.metadata.version("maverick-jax")})

    async def openapi(self, request: Request) -> Response:
        """What the server offers."""
        return JSONResponse(description())

    async def tokenize(self, request: Request) -> Response:
        return JSONResponse(await self._answer(request, self._tokenize))

    async def detokenize(self, request: Request) -> Response:
        return JSONResponse(await self._answer(request, self._detokenize))

    async def count_tokens(self, request: Request) -> Response:
        """Of a body for `/v1/messages`."""
        return JSONResponse(await self._answer(request, self._count_tokens))

    async def tokenizer_info(self, request: Request) -> Response:
        tokenizer, config = self._service.prepare.tokenizer, self._service.prepare.config
        named = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id[0], "pad_token": config.pad_token_id}
        spelled = {name: None if id is None else tokenizer.spelling(id).decode() for name, id in named.items()}
        template = self._service.prepare.template
        return JSONResponse({**spelled, "chat_template": template and template.sources.get("default"), "tokenizer_class": "maverick-jax"})

    async def _answer(self, request: Request, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        data = await read_body(request, self._longest)
        return await self._service.in_thread(lambda: work(parsed(data)))

    def _count_tokens(self, body: Any) -> dict[str, Any]:
        (prompt,) = self._service.prepare.prompts(messages.read(body, answered=False))
        return {"input_tokens": len(prompt.token_ids)}

    def _tokenize(self, body: Any) -> dict[str, Any]:
        fields, prepare = Fields(body, "/tokenize"), self._service.prepare
        text, begun, spelled = fields.text("prompt"), fields.flag("add_special_tokens", True), fields.flag("return_token_strs")
        if fields.has("messages"):
            (prompt,) = prepare.prompts(chat.read(body))
            ids = prompt.token_ids
        elif fields.has("prompt"):
            ids = prepare.begun(text) if begun else prepare.tokenizer.encode(text)
        else:
            raise UserError("prompt is missing: give a text, or messages.")
        spellings = [prepare.tokenizer.spelling(id).decode("utf-8", "backslashreplace") for id in ids]
        strings = {"token_strs": spellings} if spelled else {}
        return {"count": len(ids), "max_model_len": self._service.engine.limits.max_length, "tokens": ids} | strings

    def _detokenize(self, body: Any) -> dict[str, Any]:
        fields = Fields(body, "/detokenize")
        if not fields.has("tokens"):
            raise UserError("tokens is missing: give a list of token ids.")
        if ids := fields.ids("tokens"):
            token_rows([ids], self._service.prepare.config.text.vocab_size)
        return {"prompt": b"".join(map(self._service.prepare.tokenizer.spelling, ids)).decode("utf-8", "replace")}
