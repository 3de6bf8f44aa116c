"""`maverick batch`: a file of requests in OpenAI's batch format, answered by one engine."""

from maverick_jax.serving.batch.files import Line, Refused, Requests, Results
from maverick_jax.serving.batch.serve import Tally, serve

__all__ = ["Line", "Refused", "Requests", "Results", "Tally", "serve"]
