"""langchain-openai: an answer, a stream, a bound tool, and an answer of a given form."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

SCRIPTED, MINI = sys.argv[1:]
chat = ChatOpenAI(base_url=f"{SCRIPTED}/v1", api_key="none", model="mini", max_retries=0)


class Sum(BaseModel):
    """Of two digits."""

    right: bool


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"cold in {city}"


assert chat.invoke("Hello").content == "Hello from Maverick."
assert "".join(part.content for part in chat.stream("Hello")) == "Hello from Maverick."
asked = HumanMessage("What is the weather in Oslo?")
called = chat.bind_tools([weather]).invoke([asked])
(call,) = called.tool_calls
assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
told = chat.bind_tools([weather]).invoke([asked, called, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])])
assert told.content == "It is cold in Oslo."
mini = ChatOpenAI(base_url=f"{MINI}/v1", api_key="none", model="mini", max_retries=0)
for method in ("json_schema", "function_calling"):
    assert isinstance(mini.with_structured_output(Sum, method=method).invoke("Hello").right, bool)
