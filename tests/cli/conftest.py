"""Running `maverick` in this process."""

import dataclasses

import pytest
from interrupting import heed_the_signal

from maverick_jax.assets import digits
from maverick_jax.cli.main import main


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """Also where the tests run as a job in the background."""
    heed_the_signal()


@pytest.fixture
def maverick(capfd):
    """`maverick("generate", "hello")` -> status, standard output and standard error."""

    def run(*arguments) -> Result:
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            status = end.code
        return Result(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list:
    """Files of the two pictures of held-out example 22, whose question is about their sum."""
    folder = tmp_path_factory.mktemp("pictures")
    _, left, right, _ = digits.held_out_examples(23)[22]
    files = [folder / "left.png", folder / "right.png"]
    for file, index in zip(files, (left, right), strict=True):
        digits.picture(digits.held_out()[0][index]).save(file)
    return files
