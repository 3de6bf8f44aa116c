"""litellm: as it talks to vLLM's servers, whole and streamed, with a tool."""

import sys

import litellm

ASK = {"model": "hosted_vllm/mini", "api_base": f"{sys.argv[1]}/v1", "num_retries": 0}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
hello = litellm.completion(**ASK, messages=[{"role": "user", "content": "Hello"}], max_tokens=100)
assert hello.choices[0].message.content == "Hello from Maverick."
parts = litellm.completion(**ASK, messages=[{"role": "user", "content": "Hello"}], stream=True)
assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hello from Maverick."
called = litellm.completion(**ASK, messages=[{"role": "user", "content": "What is the weather in Oslo?"}], tools=[TOOL], tool_choice="auto")
assert called.choices[0].message.tool_calls[0].function.arguments == '{"city": "Oslo"}'
