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
BOUNDS = {"to_first": TO_FIRST, "queued": WHOLE, "whole": WHOLE, "between": PER_TOKEN, "per_token": PER_TOKEN}
LABELS = ("model_name", "engine")
REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length"}  # vLLM's, of ours


class Histogram:
    """How many values were at most so large."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, count: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        names = [*map(str, self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(names, itertools.accumulate(self._counts), strict=True)), self._sum)


class Counts:
    """What replies of one name have come to.

    Attributes:
      counted: tokens, and answers, by what they are.
      ended: answers by why they ended.
      timed: seconds, by what took them.
    """

    def __init__(self) -> None:
        self.counted: collections.Counter[str] = collections.Counter()
        self.ended: collections.Counter[str] = collections.Counter()
        self.timed = {what: Histogram(bounds) for what, bounds in BOUNDS.items()}


class Metrics:
    """Counts what replies come to.

    Args:
      names: of the model, the label of what is the engine's, and then of its adapters.
      occupancy: of the engine.
      load_ME: [M, E] tokens that each expert of each mixture has computed.
    """

    def __init__(self, names: Sequence[str], occupancy: Callable[[], Occupancy], load_ME: Callable[[], np.ndarray]):
        self._model, self._occupancy, self._load_ME = names[0], occupancy, load_ME
        self._counts = {name: Counts() for name in names}
        self._registry = CollectorRegistry()
        self._registry.register(self)  # pyright: ignore[reportArgumentType]: it has `collect`, which is all that is asked

    def portion(self, answer: Answer, portion: Portion) -> None:
        """A portion has come."""
        now, timing, counts = time.perf_counter(), answer.timing, self._counts[answer.handle.request.adapter or self._model]
        new = answer.new_tokens - timing.tokens
        if new and not timing.tokens:
            counts.timed["to_first"].add(now - timing.asked)
            timing.first = now
        elif new:
            counts.timed["between"].add((now - timing.last) / new, new)
        if new:
            timing.tokens, timing.last = answer.new_tokens, now
        if portion.finish:
            counts.ended[REASONS[portion.finish]] += 1
            counts.timed["whole"].add(now - timing.asked)
            if timing.tokens > 1:
                counts.timed["per_token"].add((timing.last - timing.first) / (timing.tokens - 1))

    def ended(self, reply: Reply) -> None:
        """A reply is over, as far as it came."""
        counts = self._counts[reply.model]
        counts.counted["prompt"] += reply.prompt_tokens
        counts.counted["generation"] += reply.new_tokens
        counts.counted["cached"] += reply.cached_tokens
        counts.counted["resumed"] += sum(answer.handle.cached_tokens > 0 for answer in reply.answers)
        for answer in reply.answers:
            if answer.handle.waited is not None:
                counts.timed["queued"].add(answer.handle.waited)
            if answer.finish is None:
                counts.ended["abort"] += 1

    def text(self) -> bytes:
        """In Prometheus's format. It waits for the engine's turn."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """(prometheus_client) everything."""
        now = self._occupancy()
        yield from (
            self._gauge("vllm:num_requests_running", "Requests that have a place.", now.running),
            self._gauge("vllm:num_requests_waiting", "Requests that wait for one.", now.waiting),
            self._gauge("vllm:kv_cache_usage_perc", "Share of the cache's pages that running requests hold, of 1.", now.pages_used),
            self._counter("vllm:num_preemptions", "Times that a request lost its place to an older one.", now.preempted),
            self._counted("vllm:prefix_cache_queries", "Tokens of prompts.", "prompt"),
            self._counted("vllm:prefix_cache_hits", "Those that were in the cache.", "cached"),
            self._counted("vllm:prompt_tokens", "Tokens of prompts.", "prompt"),
            self._counted("vllm:generation_tokens", "Tokens of answers.", "generation"),
            self._counter("vllm:spec_decode_num_drafts", "Drafts.", now.drafted.steps),
            self._counter("vllm:spec_decode_num_draft_tokens", "Tokens of drafts.", now.drafted.proposed),
            self._counter("vllm:spec_decode_num_accepted_tokens", "Those that were right.", now.drafted.accepted),
            self._timed("vllm:time_to_first_token_seconds", "From the question to the first token.", "to_first"),
            self._timed("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", "between"),
            self._timed("vllm:request_time_per_output_token_seconds", "The same, the mean of an answer.", "per_token"),
            self._timed("vllm:e2e_request_latency_seconds", "From the question to the end of the answer.", "whole"),
            self._timed("vllm:request_queue_time_seconds", "From the question to the first piece of its prompt.", "queued"),
            self._counted("maverick:resumed_requests", "Answers that continued from what was in the cache.", "resumed"),
        )
        ended = CounterMetricFamily(
            "vllm:request_success", "Answers by why they ended.", labels=("finished_reason", "model_name", "engine")
        )
        for reason, (name, counts) in itertools.product(("stop", "length", "abort"), self._counts.items()):
            ended.add_metric((reason, name, "0"), counts.ended[reason])
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

    def _counted(self, name: str, text: str, what: str) -> Metric:
        """Of each name."""
        family = CounterMetricFamily(name, text, labels=LABELS)
        for of, counts in self._counts.items():
            family.add_metric((of, "0"), counts.counted[what])
        return family

    def _timed(self, name: str, text: str, what: str) -> Metric:
        """Of each name, a histogram."""
        family = HistogramMetricFamily(name, text, labels=LABELS)
        for of, counts in self._counts.items():
            counts.timed[what].add_to(family, (of, "0"))
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric((self._model, "0"), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric((self._model, "0"), value)
        return family
