"""openai: chats, streams, pictures, tools, parsed answers, log-probabilities, errors, responses."""

import base64
import io
import sys

import openai
from PIL import Image
from pydantic import BaseModel

SCRIPTED, MINI = sys.argv[1:]
client = openai.OpenAI(base_url=f"{SCRIPTED}/v1", api_key="none", max_retries=0)
mini = openai.OpenAI(base_url=f"{MINI}/v1", api_key="none", max_retries=0)
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}}


class Sum(BaseModel):
    right: bool


assert [model.id for model in client.models.list()] == ["mini"]
answer = client.chat.completions.create(model="mini", messages=HELLO)
assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello from Maverick.", "stop")
assert answer.usage.prompt_tokens_details.cached_tokens == 0

chunks = list(client.chat.completions.create(model="mini", messages=HELLO, stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello from Maverick."
assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens

picture = io.BytesIO()
Image.new("L", (28, 28)).save(picture, "PNG")
url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which digit is left?"}]
seen = mini.chat.completions.create(
    model="mini", messages=[{"role": "user", "content": parts}], max_tokens=8, logprobs=True, top_logprobs=2
)
assert len(seen.choices[0].logprobs.content) == seen.usage.completion_tokens
assert len(seen.choices[0].logprobs.content[0].top_logprobs) == 2

called = client.chat.completions.create(model="mini", messages=WEATHER, tools=[TOOL]).choices[0]
(call,) = called.message.tool_calls
assert (called.finish_reason, call.function.name, call.function.arguments) == ("tool_calls", "weather", '{"city": "Oslo"}')
result = {"role": "tool", "tool_call_id": call.id, "content": "cold"}
told = client.chat.completions.create(model="mini", messages=[*WEATHER, called.message, result], tools=[TOOL])
assert told.choices[0].message.content == "It is cold in Oslo."
with client.chat.completions.stream(model="mini", messages=WEATHER, tools=[TOOL]) as stream:
    names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert names == ["weather"]

parsed = mini.chat.completions.parse(model="mini", messages=HELLO, response_format=Sum)
assert isinstance(parsed.choices[0].message.parsed.right, bool)
text = mini.completions.create(model="mini", prompt=["What", "Which"], max_tokens=4, logprobs=1, echo=False)
assert len(text.choices) == 2
assert len(text.choices[0].logprobs.tokens) <= 4

response = client.responses.create(model="mini", input="Hello", instructions="Be kind.")
assert response.output_text == "Hello from Maverick."
with client.responses.stream(model="mini", input="Hello") as stream:
    assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == "Hello from Maverick."
    assert stream.get_final_response().output_text == "Hello from Maverick."
assert isinstance(mini.responses.parse(model="mini", input="Hello", text_format=Sum).output_parsed.right, bool)
(item,) = client.responses.create(model="mini", input=WEATHER, tools=[{"type": "function", **TOOL["function"]}]).output
assert (item.type, item.name, item.arguments) == ("function_call", "weather", '{"city": "Oslo"}')

for wrong, error, field in (
    ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"messages": []}, openai.BadRequestError, "messages"),
):
    named = ""
    try:
        client.chat.completions.create(**{"model": "mini", "messages": HELLO, **wrong})
    except error as raised:
        named = raised.param
    assert named == field, wrong
