"""Arguments that several subcommands share: which model on which devices, how to sample, and what to report."""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from maverick_jax.cli import interrupt, status
from maverick_jax.cli.parser import given, given_words, real, whole

DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")  # TPU, NVIDIA, WSL, AMD

if TYPE_CHECKING:
    from maverick_jax.inference.engine import Engine
    from maverick_jax.inference.handle import Handle
    from maverick_jax.model import Llama4


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="DIR", help="model directory, PyTorch checkpoint or Hub id (default: the mini model)")
    parser.add_argument("--mesh", metavar="AXES", help="such as data=1,expert=8,tensor=1 (default: all devices on expert)")
    parser.add_argument("--layout", metavar="NAME", help="throughput, latency or training (default: throughput)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of weights and activations (default: as stored)")
    parser.add_argument(
        "--activations",
        choices=("fp8",),
        help="of what meets routed experts in fp8: float8 too, a scale per token (on Hopper products of float8)",
    )


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="DIR", help="directory of a LoRA for this model, from `maverick train` or PEFT, or a Hub id")


def add_adapters_argument(parser: argparse.ArgumentParser) -> None:
    """As `add_adapter_argument`, or with names several: `adapters` of the parsed arguments."""
    parser.set_defaults(adapters={})
    parser.add_argument(
        "--adapter",
        action=_Adapter,
        type=given,
        metavar="[NAME=]DIR",
        help="LoRA for this model, from `maverick train` or PEFT, for every request; with a NAME for those whose `model` it is, or several",
    )


class _Adapter(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        name, named, directory = values.partition("=")
        if not named or os.path.isdir(values):
            if namespace.adapter is not None:
                raise argparse.ArgumentError(self, f"{values} is a second one without a name: give each its own, NAME=DIR")
            namespace.adapter = values
        elif not name or not directory:
            raise argparse.ArgumentError(self, f"{values} lacks {'its directory' if name else 'its name'}: write NAME=DIR")
        elif name in namespace.adapters:
            raise argparse.ArgumentError(self, f"{name} is the name of two: give each its own")
        else:
            namespace.adapters = {**namespace.adapters, name: directory}
        if namespace.adapter is not None and namespace.adapters:
            raise argparse.ArgumentError(self, f"{namespace.adapter} has no name, and others have: give it one, NAME=DIR")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead, without a progress bar")


def on_every_process(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """For a command that computes: all processes of the run take part, with the same arguments, and only process 0 prints."""

    @functools.wraps(run)
    def joined(args: argparse.Namespace) -> int:
        with status.doing("starting jax"):
            quiet_accelerator_search()
            from maverick_jax.sharding import multihost

        status.watch_compiler()
        interrupt.before_leaving(multihost.tell_interrupted)
        with multihost.joined(), _one_voice():
            multihost.check_same(_arguments(args))
            return run(args)

    return joined


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Standard output belongs to process 0, and among several processes not to libraries: gloo writes lines to it from C++."""
    from maverick_jax.sharding import multihost

    if multihost.process_count() == 1:
        yield
        return
    sys.stdout.flush()
    with open(os.dup(1), "w", encoding=sys.stdout.encoding) as out, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            with contextlib.redirect_stdout(out if multihost.is_first() else nowhere):
                yield
        finally:
            os.dup2(out.fileno(), 1)


def note(text: str) -> None:
    """A line on standard error, from process 0."""
    from maverick_jax.sharding import multihost

    if multihost.is_first():
        print(text, file=sys.stderr)


def note_all(notes: Iterable[str]) -> None:
    """What was seen of a checkpoint and is no mistake, a line each."""
    for text in notes:
        note(f"maverick: note: {text}")


def _arguments(args: argparse.Namespace) -> dict[str, str]:
    """What was asked for, without what may differ from host to host: where files lie."""
    import jax

    from maverick_jax import __version__

    values = {
        name: value
        for name, value in vars(args).items()
        if name not in ("run", "debug", "model", "adapter", "adapters", "source", "image", "out", "trace", "plot", "compilation_cache")
    }
    return {
        "the version": f"maverick-jax {__version__} with jax {jax.__version__}",
        "the command": args.run.__module__.rpartition(".")[2],
        **{name if name == "prompt" else f"--{name.replace('_', '-')}": _short(repr(value)) for name, value in values.items()},
    }


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}… ({digest(text.encode())})"


def digest(data: bytes) -> str:
    """Twelve characters that differ when the data differ."""
    return hashlib.sha256(data).hexdigest()[:12]


def load_model(args: argparse.Namespace, *, training: bool = False, **inputs: str) -> Llama4:
    """The model that the arguments name, on its mesh.

    Args:
      training: as of `load`.
      inputs: what else must be the same on every process: name and content, or its digest.
    """
    from maverick_jax.adapter import identity as adapter_identity
    from maverick_jax.checkpoint import identity, open_checkpoint, read_model, resolve
    from maverick_jax.sharding import make_mesh, multihost, parse_mesh

    directory = resolve(args.model)
    if multihost.process_count() > 1:
        multihost.check_same(identity(directory) | (adapter_identity(args.adapter) if args.adapter else {}) | inputs)
    checkpoint = open_checkpoint(directory)
    note_all(checkpoint.notes)
    axes = parse_mesh(args.mesh) if args.mesh else default_mesh(checkpoint.config)
    mesh = make_mesh(**axes) if math.prod(axes.values()) > 1 else None
    with status.doing("loading the model"):
        options = {name: getattr(args, name) for name in ("layout", "dtype", "activations", "adapter")}
        return read_model(checkpoint, mesh=mesh, training=training, **options)


def model_name(args: argparse.Namespace) -> str:
    """What a model is called that nobody has named."""
    from pathlib import Path

    from maverick_jax.assets import mini_directory

    return Path(args.model or mini_directory()).resolve().name


def default_mesh(config: Any) -> dict[str, int]:
    """All devices on `expert`, or as many of them as divide the experts; with several processes the rest on `data`."""
    import jax

    from maverick_jax.sharding.devices import all_devices

    count = len(all_devices())
    expert = math.gcd(count, config.text.num_local_experts)
    return {"data": 1 if jax.process_count() == 1 else count // expert, "expert": expert}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=whole, metavar="N", help="requests served at once (default: as many as there is memory for, to 64)")
    parser.add_argument(
        "--max-length",
        type=whole,
        metavar="N",
        help="tokens of a prompt and its answer (default: the model's context, or what there is memory for)",
    )
    parser.add_argument("--draft", type=whole, default=0, metavar="N", help="guess up to N tokens from the text so far (default: 0)")
    parser.add_argument("--eight-bits", action="store_true", help="keep keys and values in 8 bits: half the memory, about 1 %% off")
    parser.add_argument("--trace", metavar="FILE", help="write what the scheduler is told and plans")


@contextlib.contextmanager
def engine_for(args: argparse.Namespace, names: list[str], **more: Any) -> Iterator[Engine]:
    """The engine that the arguments describe.

    Args:
      names: what requests may call the model, and no adapter.
      more: settings of `Engine` that a command adds.
    """
    from maverick_jax.convert.formats.recognize import find_directory
    from maverick_jax.inference.engine import Engine
    from maverick_jax.serving.names import all_names
    from maverick_jax.sharding import multihost

    all_names(names, [*args.adapters])  # what is wrong is told before a large model is loaded
    for directory in args.adapters.values():
        find_directory(directory)
    model = load_model(args)
    settings = {name: getattr(args, name) for name in ("slots", "max_length", "draft", "eight_bits", "adapters")}
    with open(args.trace, "w", encoding="utf-8", buffering=1) if args.trace and multihost.is_first() else contextlib.nullcontext() as trace:
        yield Engine(model, **settings, **more, trace=trace)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", type=given_words, metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", type=whole, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=real, default=0.0, metavar="T", help="0 takes the most likely token (default: 0)")
    parser.add_argument("--top-k", type=whole, metavar="K", help="sample among the K most likely tokens")
    parser.add_argument("--top-p", type=real, metavar="P", help="sample among the tokens that together reach probability P")
    parser.add_argument("--min-p", type=real, metavar="P", help="sample among tokens at least P times as likely as the likeliest")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the random numbers (default: 0)")
    parser.add_argument(
        "--stop", type=given_words, action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer instead of streaming")


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Chat`."""
    names = ("system", "max_new_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "seed")
    return {name: getattr(args, name) for name in names}


def speed(answer: Handle) -> str:
    """One line about a finished answer's cost."""
    seconds = answer.seconds
    return (
        f"{answer.prompt_tokens} prompt tokens in {seconds['prefill']:.2f} s, {answer.new_tokens} new tokens, "
        f"{answer.decode_rate:.1f} tokens/s; compilation {seconds['compile']:.1f} s"
    )


def as_json(text: str, answer: Handle) -> str:
    """An answer and its cost as one line of JSON."""
    values = {
        "text": text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "seconds": {name: round(value, 4) for name, value in answer.seconds.items()},
        "tokens_per_second": round(answer.decode_rate, 2),
        "cached_tokens": answer.cached_tokens,
    }
    return json.dumps(values, ensure_ascii=False)


def quiet_accelerator_search() -> None:
    """jax logs that it looked for a TPU or GPU; people who have none need not read it.

    Where libtpu is installed jax starts it even without a TPU, and it complains on standard error, five lines from C++.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    if jax.config.values["jax_platforms"] is None and importlib.util.find_spec("libtpu") and not accelerator_in_sight():
        jax.config.update("jax_platforms", "cpu")


def accelerator_in_sight() -> bool:
    """Whether jax might find one: a device of a kind that we know, or a plugin that may know of others."""
    return any(map(glob.glob, DEVICES)) or bool(importlib.metadata.entry_points(group="jax_plugins"))
