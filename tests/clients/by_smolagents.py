"""smolagents: its model of an OpenAI server, plain and with a tool."""

import sys

from smolagents import OpenAIServerModel, tool

model = OpenAIServerModel("mini", api_base=f"{sys.argv[1]}/v1", api_key="none")


@tool
def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name.
    """
    return "cold"


def asks(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


assert model.generate(asks("Hello")).content == "Hello from Maverick."
(call,) = model.generate(asks("What is the weather in Oslo?"), tools_to_call_from=[weather]).tool_calls
assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')
