"""What the server costs beside the engine: time per token with many streams, and time to the first token of one.

Each round measures the engine alone and the server right behind it, so that neighbours on the machine meet both; the best of the
rounds counts. Clients are one other process that reads bytes and parses nothing.

    python benchmarks/server_overhead.py --streams 32 --tokens 200
    python benchmarks/server_overhead.py -m OUT                     # of a larger model it is less: it is the same time
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import selectors
import socket
import time
from multiprocessing.connection import Connection

import numpy as np

import maverick_jax as mj
from maverick_jax.serving.http.app import Settings
from maverick_jax.serving.http.server import Server, bound
from maverick_jax.serving.http.service import Service

PROMPT = "What is the sum?"


def request(tokens: int, port: int) -> bytes:
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n"
    return head.encode() + data


def clients(pipe: Connection) -> None:
    """Of each (port, streams, tokens) that comes: seconds until all first tokens, and until all streams have ended."""
    while (asked := pipe.recv()) is not None:
        port, streams, tokens = asked
        began, first, events = time.perf_counter(), 0.0, 0
        selector, left, waiting = selectors.DefaultSelector(), streams, streams
        connections: dict[int, socket.socket] = {}
        for _ in range(streams):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(request(tokens, port))
            connections[connection.fileno()] = connection
            selector.register(connection, selectors.EVENT_READ, [])
        while left:
            for key, _ in selector.select():
                data = connections[key.fd].recv(1 << 16)
                events += data.count(b"data: {")
                if not key.data and b"data: {" in data:
                    key.data.append(True)
                    waiting -= 1
                    if not waiting:
                        first = time.perf_counter() - began
                if not data or data.endswith(b"0\r\n\r\n"):
                    selector.unregister(key.fileobj)
                    connections.pop(key.fd).close()
                    left -= 1
        pipe.send((first, time.perf_counter() - began, events))


def alone(engine: mj.Engine, ids: list[int], streams: int, tokens: int) -> tuple[float, float]:
    """The same without a server: the engine's thread works, this one waits."""
    began = time.perf_counter()
    handles = [engine.submit(mj.Request(ids=ids, max_new_tokens=tokens, stop_ids=())) for _ in range(streams)]
    for handle in handles:
        next(iter(handle))
    first = time.perf_counter() - began
    for handle in handles:
        handle.result()
    return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-m", "--model", help="default: the mini model")
    args = parser.parse_args()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=clients, args=(there,), daemon=True)
    process.start()
    engine = mj.Engine(mj.load(args.model), slots=args.streams, max_length=512)
    service = Service(engine, ["mini"])
    ids = service.prepare.begun(PROMPT)
    with engine, Server(service, Settings(), bound("127.0.0.1", 0)) as server:
        port = int(server.url.rpartition(":")[2])
        found: dict[str, list[tuple[float, float]]] = {"engine": [], "server": []}
        first: dict[str, list[float]] = {"engine": [], "server": []}
        events = 0
        for _ in range(args.rounds + 1):  # the first one compiles
            found["engine"].append(alone(engine, ids, args.streams, args.tokens))
            here.send((port, args.streams, args.tokens))
            begun, ended, events = here.recv()
            found["server"].append((begun, ended))
            for _ in range(10):
                first["engine"].append(alone(engine, ids, 1, 2)[0])
                here.send((port, 1, 2))
                first["server"].append(here.recv()[0])
    per_token = {name: np.min([(ended - begun) / (args.tokens - 1) for begun, ended in rows[1:]]) for name, rows in found.items()}
    to_first = {name: np.median(rows[10:]) for name, rows in first.items()}
    print(f"{args.streams} streams of {args.tokens} tokens, {events} events in the last round; best of {args.rounds}")
    print(f"time per token: engine {per_token['engine'] * 1e3:.3f} ms, server {per_token['server'] * 1e3:.3f} ms", end="")
    print(f", {per_token['server'] / per_token['engine'] - 1:+.1%}")
    print(f"one request to its first token: engine {to_first['engine'] * 1e3:.2f} ms, server {to_first['server'] * 1e3:.2f} ms", end="")
    print(f", {(to_first['server'] - to_first['engine']) * 1e3:+.2f} ms")
    here.send(None)


if __name__ == "__main__":
    main()
