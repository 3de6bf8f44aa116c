"""anthropic: messages, streams, tools, counting, errors."""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]
TOOL = {"name": "weather", "description": "Of a city.", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}

message = client.messages.create(model="mini", max_tokens=100, messages=HELLO, system="Be kind.")
assert (message.content[0].text, message.stop_reason) == ("Hello from Maverick.", "end_turn")
with client.messages.stream(model="mini", max_tokens=100, messages=HELLO) as stream:
    assert "".join(stream.text_stream) == "Hello from Maverick."
    assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens

with client.messages.stream(model="mini", max_tokens=100, messages=WEATHER, tools=[TOOL]) as stream:
    called = stream.get_final_message()
(use,) = called.content
assert (called.stop_reason, use.name, use.input) == ("tool_use", "weather", {"city": "Oslo"})
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "cold"}]}
given = [*WEATHER, {"role": "assistant", "content": called.content}, result]
told = client.messages.create(model="mini", max_tokens=100, messages=given, tools=[TOOL])
assert told.content[0].text == "It is cold in Oslo."
counted = client.messages.count_tokens(model="mini", messages=given, tools=[TOOL]).input_tokens
assert counted == told.usage.input_tokens + told.usage.cache_read_input_tokens

said = ""
try:
    client.messages.create(model="claude-9", max_tokens=5, messages=HELLO)
except anthropic.NotFoundError as error:
    said = str(error)
assert "here is mini" in said
