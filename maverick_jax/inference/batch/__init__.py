"""The file side of `maverick batch`: requests in and results out, in OpenAI's batch format."""

from maverick_jax.inference.batch.files import Refused, Requests, Results
from maverick_jax.inference.batch.jobs import Job

__all__ = ["Job", "Refused", "Requests", "Results"]
