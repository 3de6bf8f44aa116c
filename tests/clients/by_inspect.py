"""inspect-ai: an evaluation with a picture by its provider `vllm`, and one in which the model calls a tool by that of any such server."""

import base64
import struct
import sys
import zlib

from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

SCRIPTED, MINI = sys.argv[1:3]
asked = []


def png() -> str:
    """A white square of 28 x 28, as a data URL."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress((b"\0" + b"\xff" * 28) * 28)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


@tool
def weather():
    async def execute(city: str) -> str:
        """How the weather is.

        Args:
          city: its name.
        """
        asked.append(city)
        return "cold"

    return execute


def run(name: str, url: str, samples: list[Sample], solver: list, **config) -> list:
    model = get_model(name, base_url=f"{url}/v1", api_key="none", config=GenerateConfig(**config), memoize=False)
    (log,) = evaluate(Task(dataset=samples, solver=solver, scorer=includes()), model=model, display="none", log_dir="logs")
    assert log.status == "success", log.error
    return log.samples


picture = [ChatMessageUser(content=[ContentImage(image=png()), ContentText(text="What is the sum?")])]
asking = [Sample(input="What is the sum?", target="="), Sample(input=picture, target="=")]
samples = run("vllm/mini", MINI, asking, [generate()], max_tokens=12, temperature=0)
assert all(sample.output.completion for sample in samples)
assert samples[1].output.usage.input_tokens > samples[0].output.usage.input_tokens
asking = [Sample(input="How is the weather in Oslo?", target="cold in Oslo")]
(sample,) = run("openai-api/maverick/mini", SCRIPTED, asking, [use_tools(weather()), generate()])
assert asked == ["Oslo"]
assert sample.scores["includes"].value == "C"
