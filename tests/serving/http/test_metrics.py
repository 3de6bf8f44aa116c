"""What Prometheus is shown: under vLLM's names what requests really came to."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from oracle.http_client import until
from oracle.scripted import TOKENIZER
from oracle.scripted_engine import ScriptedEngine

COMPLETIONS = "/v1/completions"


def metrics_of(client) -> dict[tuple[str, ...], float]:
    """Values by name and the labels that are not the model's and the engine's."""
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "engine"))): sample.value
        for family in text_string_to_metric_families(answer.body)
        for sample in family.samples
    }


def test_what_requests_came_to(serve):
    """Tokens, times and endings add up, of a stream, of two answers to one prompt, and of one that was cut off."""
    length = len(TOKENIZER.encode("abcdefghij"))
    engine = ScriptedEngine(lambda prompt: "abcdefghij", pause=0.02)
    client = serve(engine)
    list(client.events(COMPLETIONS, {"prompt": "x"}))
    client.post(COMPLETIONS, {"prompt": "xyz", "n": 2})
    client.post(COMPLETIONS, {"prompt": "x", "max_tokens": 3})
    prompts = [len(request.ids) for request in engine.seen]
    until(lambda: metrics_of(client)["vllm:generation_tokens_total",] == 3 * length + 3)
    found = metrics_of(client)
    assert found["vllm:prompt_tokens_total",] == found["vllm:prefix_cache_queries_total",] == prompts[0] + prompts[1] + prompts[3]
    assert (found["vllm:request_success_total", "stop"], found["vllm:request_success_total", "length"]) == (3, 1)
    assert found["vllm:time_to_first_token_seconds_count",] == found["vllm:e2e_request_latency_seconds_count",] == 4
    assert found["vllm:inter_token_latency_seconds_count",] == 3 * length + 3 - 4
    assert found["vllm:inter_token_latency_seconds_sum",] == pytest.approx((3 * length - 1) * 0.02, rel=0.7)
    assert found["vllm:request_time_per_output_token_seconds_count",] == 4
    assert found["vllm:e2e_request_latency_seconds_sum",] >= 0.02 * 3 * length
    assert found["vllm:e2e_request_latency_seconds_bucket", "+Inf"] == 4
    assert (found["vllm:num_requests_running",], found["vllm:num_requests_waiting",]) == (0, 0)
    assert found["maverick:expert_tokens_total", "0", "0"] == 3  # labels in alphabetical order: expert, mixture
    assert found["maverick:expert_imbalance", "0"] == 3.0


def test_who_went_away_is_counted(serve):
    """As vLLM's abort."""
    engine = ScriptedEngine(lambda prompt: "x" * 1000, pause=0.01)
    client = serve(engine)
    events = client.events(COMPLETIONS, {"prompt": "x", "max_tokens": 1000})
    next(events)
    assert metrics_of(client)["vllm:num_requests_running",] == 1
    events.close()
    until(lambda: metrics_of(client)["vllm:request_success_total", "abort"] == 1)
    assert metrics_of(client)["vllm:num_requests_running",] == 0


def test_of_the_engine(mini):
    """What it knows alone: the cache, the experts, and how long requests wait."""
    for _ in range(2):
        mini.post(COMPLETIONS, {"prompt": "What is the sum of it all, and why?", "max_tokens": 4})
    until(lambda: metrics_of(mini)["vllm:request_queue_time_seconds_count",] >= 2)
    found = metrics_of(mini)
    assert found["vllm:prefix_cache_hits_total",] > 0 < found["maverick:resumed_requests_total",]
    assert found["vllm:kv_cache_usage_perc",] == 0
    assert sum(value for name, value in found.items() if name[0] == "maverick:expert_tokens_total") > 0
    assert all(value >= 1 for name, value in found.items() if name[0] == "maverick:expert_imbalance")
