"""What a server has done and how busy it is, for Prometheus: under vLLM's names, so that dashboards for it work, and under our own.

Counting is a few additions per portion of an answer; what is shown is made when somebody looks.
Source: vLLM 0.32, the names and labels of its metrics.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from maverick_jax.inference.serving import Occupancy
from maverick_jax.serving.answer import Answer, Portion
from maverick_jax.serving.reply import Reply

TO_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)
LABELS = ("model_name", "engine")
REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length"}  # vLLM's, of ours


class Histogram:
    """How many values were at most so large."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, count: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, text: str, model: str) -> Metric:
        family = HistogramMetricFamily(name, text, labels=LABELS)
        names = [*map(str, self._bounds), "+Inf"]
        family.add_metric((model, "0"), list(zip(names, itertools.accumulate(self._counts), strict=True)), self._sum)
        return family


class Metrics:
    """Counts what replies come to.

    Args:
      model: its name, the label of everything.
      occupancy: of the engine.
      load_ME: [M, E] tokens that each expert of each mixture has computed.
    """

    def __init__(self, model: str, occupancy: Callable[[], Occupancy], load_ME: Callable[[], np.ndarray]):
        self._model, self._occupancy, self._load_ME = model, occupancy, load_ME
        self._counted: collections.Counter[str] = collections.Counter()
        self._ended: collections.Counter[str] = collections.Counter()
        self._to_first, self._queued, self._whole = Histogram(TO_FIRST), Histogram(WHOLE), Histogram(WHOLE)
        self._between, self._per_token = Histogram(PER_TOKEN), Histogram(PER_TOKEN)
        self._registry = CollectorRegistry()
        self._registry.register(self)  # pyright: ignore[reportArgumentType]: it has `collect`, which is all that is asked

    def portion(self, answer: Answer, portion: Portion) -> None:
        """A portion has come."""
        now, timing = time.perf_counter(), answer.timing
        new = answer.new_tokens - timing.tokens
        if new and not timing.tokens:
            self._to_first.add(now - timing.asked)
            timing.first = now
        elif new:
            self._between.add((now - timing.last) / new, new)
        if new:
            timing.tokens, timing.last = answer.new_tokens, now
        if portion.finish:
            self._ended[REASONS[portion.finish]] += 1
            self._whole.add(now - timing.asked)
            if timing.tokens > 1:
                self._per_token.add((timing.last - timing.first) / (timing.tokens - 1))

    def ended(self, reply: Reply) -> None:
        """A reply is over, as far as it came."""
        self._counted["prompt"] += reply.prompt_tokens
        self._counted["generation"] += reply.new_tokens
        self._counted["cached"] += reply.cached_tokens
        self._counted["resumed"] += sum(answer.handle.cached_tokens > 0 for answer in reply.answers)
        for answer in reply.answers:
            if answer.handle.waited is not None:
                self._queued.add(answer.handle.waited)
            if answer.finish is None:
                self._ended["abort"] += 1

    def text(self) -> bytes:
        """In Prometheus's format. It waits for the engine's turn."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """(prometheus_client) everything."""
        now, model = self._occupancy(), self._model
        yield from (
            self._gauge("vllm:num_requests_running", "Requests that have a place.", now.running),
            self._gauge("vllm:num_requests_waiting", "Requests that wait for one.", now.waiting),
            self._gauge("vllm:kv_cache_usage_perc", "Share of the cache's pages that running requests hold, of 1.", now.pages_used),
            self._counter("vllm:num_preemptions", "Times that a request lost its place to an older one.", now.preempted),
            self._counter("vllm:prefix_cache_queries", "Tokens of prompts.", self._counted["prompt"]),
            self._counter("vllm:prefix_cache_hits", "Those that were in the cache.", self._counted["cached"]),
            self._counter("vllm:prompt_tokens", "Tokens of prompts.", self._counted["prompt"]),
            self._counter("vllm:generation_tokens", "Tokens of answers.", self._counted["generation"]),
            self._counter("vllm:spec_decode_num_drafts", "Drafts.", now.drafted.steps),
            self._counter("vllm:spec_decode_num_draft_tokens", "Tokens of drafts.", now.drafted.proposed),
            self._counter("vllm:spec_decode_num_accepted_tokens", "Those that were right.", now.drafted.accepted),
            self._to_first.family("vllm:time_to_first_token_seconds", "From the question to the first token.", model),
            self._between.family("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", model),
            self._per_token.family("vllm:request_time_per_output_token_seconds", "The same, the mean of an answer.", model),
            self._whole.family("vllm:e2e_request_latency_seconds", "From the question to the end of the answer.", model),
            self._queued.family("vllm:request_queue_time_seconds", "From the question to the first piece of its prompt.", model),
            self._counter("maverick:resumed_requests", "Answers that continued from what was in the cache.", self._counted["resumed"]),
        )
        ended = CounterMetricFamily(
            "vllm:request_success", "Answers by why they ended.", labels=("finished_reason", "model_name", "engine")
        )
        for reason in ("stop", "length", "abort"):
            ended.add_metric((reason, model, "0"), self._ended[reason])
        yield ended
        yield from self._experts()

    def _experts(self) -> Iterable[Metric]:
        load_ME = self._load_ME()
        loads = CounterMetricFamily("maverick:expert_tokens", "Tokens that it has computed.", labels=("model_name", "mixture", "expert"))
        uneven = GaugeMetricFamily(
            "maverick:expert_imbalance", "Tokens of a mixture's busiest expert, of their mean.", labels=("model_name", "mixture")
        )
        for mixture, load_E in enumerate(load_ME):
            for expert, count in enumerate(load_E):
                loads.add_metric((self._model, str(mixture), str(expert)), float(count))
            uneven.add_metric((self._model, str(mixture)), float(load_E.max() / max(load_E.mean(), 1e-9)))
        yield from (loads, uneven)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric((self._model, "0"), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric((self._model, "0"), value)
        return family
