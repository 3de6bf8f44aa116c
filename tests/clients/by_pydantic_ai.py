"""pydantic-ai: an agent with a tool, and an output of a given type."""

import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

SCRIPTED, MINI = sys.argv[1:]
asked = []


class Sum(BaseModel):
    right: bool


for kind in (OpenAIChatModel, OpenAIResponsesModel):
    agent = Agent(kind("mini", provider=OpenAIProvider(base_url=f"{SCRIPTED}/v1", api_key="none")))

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "cold"

    assert agent.run_sync("What is the weather in Oslo?").output == "It is cold in Oslo."
    forced = Agent(kind("mini", provider=OpenAIProvider(base_url=f"{MINI}/v1", api_key="none")), output_type=Sum)
    assert isinstance(forced.run_sync("Hello").output.right, bool)
assert asked == ["Oslo"] * 2
