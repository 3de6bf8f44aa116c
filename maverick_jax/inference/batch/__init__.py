"""`maverick batch`: a file of requests in OpenAI's batch format, answered by one engine."""

from maverick_jax.inference.batch.files import Refused, Requests, Results
from maverick_jax.inference.batch.jobs import Job
from maverick_jax.inference.batch.serve import Tally, serve

__all__ = ["Job", "Refused", "Requests", "Results", "Tally", "serve"]
