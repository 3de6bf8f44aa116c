"""What a body of OpenAI's clients asks for, and what it may not."""

import base64

import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference.grammar import Grammar
from maverick_jax.serving.dialects import chat as chat_dialect
from maverick_jax.serving.dialects import completions
from maverick_jax.serving.job import Job
from maverick_jax.serving.pictures import Address

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**body) -> Job:
    return chat_dialect.read({"messages": HELLO} | body)


def completion(**body) -> Job:
    return completions.read({"prompt": "Hello"} | body)


def test_a_body_of_the_openai_client():
    """Nulls are fields that are not there, and what steers OpenAI's service is ignored."""
    job = chat(
        model="x",
        user="me",
        metadata={"k": "v"},
        store=False,
        max_tokens=None,
        logprobs=None,
        tools=None,
        seed=7,
        top_p=0.5,
        stop="\n",
        n=2,
        stream=False,
    )
    assert job.messages == HELLO
    assert (job.sampling, job.max_new_tokens) == ({"temperature": 1.0, "seed": 7, "top_p": 0.5}, None)
    assert (job.stop, job.answers, job.grammar) == (("\n",), 2, None)


def test_both_names_of_the_longest_answer():
    """Clients send either."""
    assert chat(max_tokens=5).max_new_tokens == chat(max_completion_tokens=5).max_new_tokens == completion(max_tokens=5).max_new_tokens == 5
    assert (chat().max_new_tokens, completion().max_new_tokens) == (None, 16)  # as OpenAI has it


def test_log_probabilities_of_both_kinds():
    """A flag and a number there, a number here."""
    assert chat(logprobs=True, top_logprobs=3).sampling["logprobs"] == 3
    assert chat(logprobs=True).sampling["logprobs"] == 0
    assert "logprobs" not in chat(logprobs=False).sampling
    assert completion(logprobs=2).sampling["logprobs"] == 2
    assert completion(logprobs=2).prompt_logprobs is None
    assert completion(logprobs=2, echo=True).prompt_logprobs == 2
    assert chat(prompt_logprobs=0).prompt_logprobs == 0


def test_biases_are_by_numbers():
    """JSON's names are texts."""
    assert chat(logit_bias={"5": -100, "17": 1.5}).sampling["logit_bias"] == {5: -100, 17: 1.5}


@pytest.mark.parametrize(
    "prompt, prompts",
    [("Hi", ["Hi"]), (["Hi", "Ho"], ["Hi", "Ho"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]]), ("", [""])],
    ids=["text", "texts", "ids", "rows of ids", "empty text"],
)
def test_prompts(prompt, prompts):
    """Texts and token ids, one or several."""
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "body, grammar",
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "integer"}}}},
            Grammar(json_schema={"type": "integer"}),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Grammar(regex="a+")),
        ({"structured_outputs": {"grammar": 'start: "a"', "json": None}}, Grammar(lark='start: "a"')),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar(choice=["a", "b"])),
    ],
    ids=["text", "object", "schema", "vllm regex", "vllm grammar", "vllm choice"],
)
def test_forms_of_answers(body, grammar):
    """OpenAI's way and vLLM's."""
    assert chat(**body).grammar == grammar


def test_pictures_are_bytes():
    """In an address or beside one; the roles and parts around them stay."""
    data = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": data, "detail": "low"}}]
    job = chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert job.messages[0] == {"role": "system", "content": "Be brief."}
    assert job.messages[1]["content"] == [parts[0], {"type": "image", "image": b"picture"}]


def test_a_picture_elsewhere_stays_an_address():
    """Whether it is fetched is for others to say."""
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    job = chat(messages=[{"role": "user", "content": [part]}])
    assert job.messages[0]["content"] == [{"type": "image", "image": Address("https://example.org/a.png")}]


@pytest.mark.parametrize(
    "make, body, said",
    [
        (chat, {"max_token": 5}, "'max_token' is no field of /v1/chat/completions: did you mean max_tokens?"),
        (completion, {"messages": HELLO}, "'messages' is no field of /v1/completions: leave it out."),
        (
            chat,
            {"tools": [{"type": "web_search"}]},
            "tools holds {'type': 'web_search'}, which is no function: the model is not told of it.",
        ),
    ],
    ids=["a misspelt field", "a field of the other kind", "a tool of another kind"],
)
def test_what_nobody_knows_is_named(make, body, said):
    """What that means is for its reader: a server passes it over, a batch refuses it."""
    assert make(**body).unknown == (said,)


def test_tools_that_may_not_be_called_are_not_shown():
    """`none` is the answer without them."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert chat(tools=tools).tools.schemas == tools
    assert chat(tools=tools, tool_choice="none").tools.schemas is None


def test_what_the_openai_client_may_send_is_understood():
    """Seeds of 64 bits, the lowest top_p, and the arguments of a tool call as JSON in a text."""
    assert chat(seed=-1).sampling["seed"] == 2**32 - 1
    assert chat(seed=2**40 + 5).sampling["seed"] == 5
    assert chat(top_p=0).sampling == {"temperature": 1.0, "top_k": 1}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    (message,) = chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]).messages
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def called_with(arguments: str) -> dict:
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}]}


REFUSED = {
    "a seed of 65 bits": (chat, {"seed": 2**64}, "seed is 18446744073709551616"),
    "seeds for many": (chat, {"seed": [1, 2]}, r"seed is \[1, 2\]"),
    "a bias of a very long number": (chat, {"logit_bias": {"1" * 5000: 1}}, "logit_bias has '111"),
    "arguments that are no JSON": (chat, called_with("{"), "arguments of a tool call are no JSON"),
    "arguments that are a list": (chat, called_with("[1]"), r"arguments of a tool call are \[1\]"),
    "a picture in another alphabet": (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,é"}}]}]},
        "no base64",
    ),
    "no messages": (chat, {"messages": []}, "messages has none"),
    "a text for messages": (chat, {"messages": "Hello"}, "messages is 'Hello'"),
    "a message without a role": (chat, {"messages": [{"content": "x"}]}, "messages holds"),
    "two longest lengths": (chat, {"max_tokens": 1, "max_completion_tokens": 2}, "both max_tokens and"),
    "calls that are no list": (chat, {"messages": [{"role": "assistant", "tool_calls": {}}]}, "tool_calls that are {}"),
    "a call that is none": (chat, {"messages": [{"role": "assistant", "tool_calls": [None]}]}, "the tool call None"),
    "a call without a name": (chat, {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "the tool call"),
    "experts from nowhere": (chat, {"routed_experts_prompt_start": -1}, "routed_experts_prompt_start is -1"),
    "no new token": (chat, {"max_tokens": 0}, "max_tokens is 0"),
    "a text for a number": (completion, {"max_tokens": "5"}, "max_tokens is '5'"),
    "no answer": (chat, {"n": 0}, "n is 0"),
    "a call of nothing": (chat, {"tool_choice": "required"}, "tool_choice asks for a call, and there is no tool to call"),
    "a tool that is none": (chat, {"tools": [None]}, "tools holds None: expected objects"),
    "a tool that there is not": (chat, {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice names 'g'"),
    "a choice of another kind": (chat, {"tool_choice": "any"}, "tool_choice is 'any'"),
    "a tool without a name": (chat, {"tools": [{"type": "function", "function": {}}]}, "tools has the name None"),
    "two tools of one name": (chat, {"tools": [{"function": {"name": "f"}}] * 2}, "two functions of the name 'f'"),
    "log-probabilities of nothing": (chat, {"top_logprobs": 2}, "top_logprobs is given without"),
    "too many log-probabilities": (completion, {"logprobs": 21}, "logprobs is 21"),
    "a bias of a word": (chat, {"logit_bias": {"the": 1}}, "logit_bias has 'the'"),
    "an unknown form": (chat, {"response_format": {"type": "xml"}}, "response_format is"),
    "a schema without schema": (chat, {"response_format": {"type": "json_schema"}}, "response_format is"),
    "two forms": (chat, {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, "both response_format and"),
    "two forms at once": (chat, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "regex and choice"),
    "an unknown form of vllm": (chat, {"structured_outputs": {"xml": "a"}}, "structured_outputs is"),
    "a picture of another scheme": (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
        "a picture's address is 'file:",
    ),
    "a picture that is no base64": (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,a"}}]}]},
        "no base64",
    ),
    "no prompt": (completion, {"prompt": None}, "prompt is None"),
    "an empty prompt": (completion, {"prompt": []}, r"prompt is \[\]"),
    "a prompt of texts and ids": (completion, {"prompt": ["a", 5]}, "prompt is"),
    "fractions for ids": (completion, {"prompt": [[1.5]]}, "prompt holds 1.5"),
    "an empty stop": (completion, {"stop": ""}, "stop holds ''"),
    "a word for a flag": (completion, {"echo": "yes"}, "echo is 'yes'"),
}


@pytest.mark.parametrize("make, body, says", REFUSED.values(), ids=REFUSED)
def test_bodies_that_are_refused(make, body, says):
    """One line that names the field."""
    with pytest.raises(UserError, match=says):
        make(**body)
