"""lm-eval: a task of multiple choice and one of generation, offline, with the server's tokenizer; its numbers are those of the server."""

import json
import sys
import urllib.request
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

MINI = sys.argv[2]
ROWS = [
    {"question": "What is the sum?", "choices": ["8 + 6 = 14.", "The left digit is 3.", "xyzzy"], "answer": 0},
    {"question": "Which digit is left?", "choices": ["Both are 7.", "The left digit is 5.", "qqqq"], "answer": 1},
    {"question": "Which is larger?", "choices": ["9 is larger than 2.", "zzz zzz", "????"], "answer": 0},
]
CHOICE = """
task: digits_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
GENERATE = """
task: digits_generate
dataset_path: json
dataset_kwargs: {data_files: {test: rows.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def post(path: str, body: dict) -> dict:
    request = urllib.request.Request(f"{MINI}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def ids(text: str) -> list[int]:
    return post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]


def likelihood(question: str, choice: str) -> float:
    """Of a choice behind its question and a blank, asked of the server directly."""
    body = {"prompt": ids(f"{question} {choice}"), "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    return sum(post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][len(ids(question)) : -1])


Path("rows.json").write_text("\n".join(map(json.dumps, ROWS)))
Path("choice.yaml").write_text(CHOICE)
Path("generate.yaml").write_text(GENERATE)
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": "mini",
        "base_url": f"{MINI}/v1/completions",
        "tokenizer_backend": "remote",
        "num_concurrent": 2,
        "max_length": 1024,
    },
    tasks=["digits_choice", "digits_generate"],
    task_manager=TaskManager(include_path="."),
    log_samples=True,
    bootstrap_iters=0,
)
expected = [[likelihood(row["question"], choice) for choice in row["choices"]] for row in ROWS]
samples = sorted(found["samples"]["digits_choice"], key=lambda sample: sample["doc_id"])
for sample, row in zip(samples, expected, strict=True):
    told = [float(response[0][0]) for response in sample["resps"]]
    assert all(abs(a - b) < 0.1 for a, b in zip(told, row, strict=True)), (told, row)
right = [row.index(max(row)) == doc["answer"] for row, doc in zip(expected, ROWS, strict=True)]
assert found["results"]["digits_choice"]["acc,none"] == sum(right) / len(right)
assert len(found["samples"]["digits_generate"]) == len(ROWS)
assert all(isinstance(sample["resps"][0][0], str) for sample in found["samples"]["digits_generate"])
