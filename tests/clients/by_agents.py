"""openai-agents: an agent that calls a function and tells what it gave, by responses and by chat."""

import sys

import agents
from openai import AsyncOpenAI

client = AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
agents.set_tracing_disabled(True)
asked = []


@agents.function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return "cold"


for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
    agent = agents.Agent(name="forecaster", instructions="Use the tool.", tools=[weather], model=kind("mini", client))
    assert agents.Runner.run_sync(agent, "What is the weather in Oslo?").final_output == "It is cold in Oslo."
assert asked == ["Oslo"] * 2
