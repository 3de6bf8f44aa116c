"""Servers in this process: of the mini model, and of an engine that says what it is told to."""

import contextlib

import pytest

pytest.importorskip("uvicorn", reason="uvicorn, of the extra `server`, is not installed")

import maverick_jax as mj
from maverick_jax.serving.http.app import Settings
from maverick_jax.serving.http.server import Server, bound
from maverick_jax.serving.http.service import Service
from oracle.http_client import Client
from oracle.scripted_engine import ScriptedEngine


@contextlib.contextmanager
def serving(engine, grace_s: float = 5.0, **settings):
    """A client of a server."""
    with Server(Service(engine, ["mini", "other-name"]), Settings(grace_s=grace_s, **settings), bound("127.0.0.1", 0)) as server:
        yield Client(server.url)


@pytest.fixture
def serve():
    """Makes servers that end with the test, of an engine or of what a scripted one shall say."""
    with contextlib.ExitStack() as stack:

        def made(said, grace_s: float = 5.0, **settings) -> Client:
            engine = ScriptedEngine(lambda prompt: said) if isinstance(said, str) else said
            return stack.enter_context(serving(engine, grace_s, **settings))

        yield made


@pytest.fixture(scope="session")
def engine():
    """Of the mini model, with its thread."""
    with mj.Engine(mj.load(), slots=4, max_length=512) as engine:
        yield engine


@pytest.fixture(scope="session")
def mini(engine):
    """A client of a server of the mini model."""
    with serving(engine) as client:
        yield client
