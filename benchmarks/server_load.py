"""Many clients for minutes, some hang up midway, some send pictures: is every answer the offline one, is everything given back?

The server is `maverick serve` with the mini model in float32, a process of its own. Each client asks one question after the other, cold;
what it gets is compared with what the same model says offline, alone. At the end: statuses, answers that differ, and what the server
still holds (slots, pages, file handles, memory), of which nothing may have grown since the first tenth of the time.

    python benchmarks/server_load.py --clients 200 --seconds 300
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import maverick_jax as mj
from maverick_jax.assets import digits
from maverick_jax.prompt import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = 100  # tokens of an answer that goes on
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class Question(NamedTuple):
    path: str
    body: dict[str, Any]
    answer: str


def questions(model: mj.Llama4) -> tuple[list[Question], list[Question]]:
    """Of text, and with pictures; answered offline."""
    assert model.directory is not None
    chat = mj.Chat(model, max_new_tokens=40)
    engine, tokenizer = mj.Engine(model, slots=1, max_length=512), Tokenizer.from_directory(model.directory)
    texts, shown = [], []
    for number in range(24):
        text = f"What is the sum of {number} and {number * 7 % 10}?"
        chat.reset()
        said = {"messages": [{"role": "user", "content": text}], "max_tokens": 40}
        texts.append(Question(CHAT, said, chat(text)))
        (handle,) = engine.run(
            [mj.Request(ids=[model.config.bos_token_id, *tokenizer.encode(text)], max_new_tokens=LONG, stop_ids=(), sampling=mj.Sampling())]
        )
        goes_on = {"prompt": text, "max_tokens": LONG, "ignore_eos": True}
        texts.append(Question(COMPLETIONS, goes_on, tokenizer.decode(handle.tokens)))
    pixels = digits.held_out()[0]
    for text, left, right, _ in digits.held_out_examples(16):
        pictures = [digits.picture(pixels[place]) for place in (left, right)]
        chat.reset()
        content = [{"type": "image_url", "image_url": {"url": url(picture)}} for picture in pictures] + [{"type": "text", "text": text}]
        shown.append(Question(CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 40}, chat(text, images=pictures)))
    return texts, shown


def url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


async def ask(port: int, question: Question, *, stream: bool, hang_up: int | None) -> tuple[str, float]:
    """What came of it, and the seconds until the first of it; the client leaves after so many events."""
    data = json.dumps(question.body | {"temperature": 0, "stream": stream}).encode()
    head = f"POST {question.path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + data)
        status = int((await reader.readline()).split()[1])
        first = time.perf_counter() - began
        if hang_up is not None:
            for _ in range(hang_up):
                await reader.readline()
            return "hung up", first
        rest = await reader.read()
    finally:
        writer.close()
    if status != 200:
        return f"status {status}", first
    said = text_of(rest, stream=stream)
    return ("as offline" if said == question.answer else f"other: {said!r} for {question.answer!r}"), first


def text_of(rest: bytes, *, stream: bool) -> str:
    body = (
        b"".join(re.findall(rb"\r\n[0-9a-f]+\r\n(.*?)(?=\r\n[0-9a-f]+\r\n)", rest, re.DOTALL)) if stream else rest.partition(b"\r\n\r\n")[2]
    )
    parts = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")] if stream else [body]
    choices = [choice for part in parts for choice in json.loads(part)["choices"]]
    return "".join(choice.get("text") or choice.get("message", choice.get("delta", {})).get("content") or "" for choice in choices)


async def client(
    port: int, seed: int, asked: tuple[list[Question], list[Question]], until: float, found: collections.Counter, firsts: list
) -> None:
    draw = random.Random(seed)
    while time.monotonic() < until:
        question = draw.choice(asked[draw.random() < 0.05])
        hang_up = draw.randrange(12) if draw.random() < 0.2 else None
        try:
            outcome, first = await ask(port, question, stream=draw.random() < 0.8, hang_up=hang_up)
            firsts.append(first)
        except (OSError, IndexError, ValueError) as error:
            outcome = f"failed: {error!r}"
        found[outcome] += 1


def held(process: int, base: str) -> dict[str, float]:
    """What the server holds now."""
    with urllib.request.urlopen(f"{base}/metrics") as response:
        text = response.read().decode()
    gauge = {name: float(re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)[0]) for name in GAUGES}
    memory = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return gauge | {"file handles": len(os.listdir(f"/proc/{process}/fd")), "memory MiB": round(memory)}


async def load(port: int, asked, clients: int, seconds: float) -> tuple[collections.Counter, list[float]]:
    found, firsts, until = collections.Counter(), [], time.monotonic() + seconds
    await asyncio.gather(*(client(port, seed, asked, until, found, firsts) for seed in range(clients)))
    return found, firsts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    asked = questions(mj.load(dtype="float32"))
    command = [sys.executable, "-m", "maverick_jax", "serve", "--port", "0", "--dtype", "float32", "--slots", "64", "--max-length", "512"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        (base,) = next(filter(None, (re.findall(r"http://[0-9.]+:\d+", line) for line in server.stdout)))[:1]
        port = int(base.rpartition(":")[2])
        asyncio.run(load(port, asked, args.clients, args.seconds / 10))  # compiles, and fills what is kept
        time.sleep(2)
        before = held(server.pid, base)
        found, firsts = asyncio.run(load(port, asked, args.clients, args.seconds))
        time.sleep(2)
        after = held(server.pid, base)
        server.send_signal(signal.SIGTERM)
        ended = server.wait(60)
    kinds = collections.Counter(outcome.partition(":")[0] for outcome in found.elements())
    print(f"{args.clients} clients for {args.seconds:.0f} s: {sum(found.values()):,} requests; {dict(kinds)}")
    firsts.sort()
    print(f"seconds to the first byte: half of them {firsts[len(firsts) // 2]:.2f}, 99 % {firsts[len(firsts) * 99 // 100]:.2f}")
    print(f"the server holds before {before}, after {after}; it ended with {ended}")
    for outcome, count in found.most_common():
        if ":" in outcome:
            print(f"  {count} x {outcome}")
    wrong = any(kind not in ("as offline", "hung up") for kind in kinds) or any(after[name] for name in GAUGES)
    return int(wrong or ended != 0 or after["file handles"] > before["file handles"])


if __name__ == "__main__":
    sys.exit(main())
