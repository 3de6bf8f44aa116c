"""The whole way on this machine: convert the embedded PyTorch checkpoint, load it onto an 8-way expert-parallel mesh
(simulated on a CPU), ask a question about two held-out pictures and compare with the expected answer.

example:
  maverick demo
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from maverick_jax import __version__
from maverick_jax.cli import compilation, options, status
from maverick_jax.cli.parser import whole
from maverick_jax.cli.terminal.answers import receive

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from maverick_jax.inference.chat import Chat
    from maverick_jax.inference.handle import Handle
    from maverick_jax.model import Llama4

DEVICES = 8
EXAMPLES = 512  # held-out questions, those of the accuracy that README states
EXPERTS = ("text", "layers", 1, "feed_forward", "experts", "gate")
SHADES = "·░▒▓█"
LINE = 64  # marks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="where the model directory and the pictures go (default: demo)")
    parser.add_argument("--example", type=whole, default=22, metavar="N", help="which held-out question (default: 22)")
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    import jax

    from maverick_jax.assets import digits, mini_directory
    from maverick_jax.checkpoint import load
    from maverick_jax.convert import convert
    from maverick_jax.errors import UserError
    from maverick_jax.inference.chat import Chat
    from maverick_jax.sharding import make_mesh, multihost
    from maverick_jax.sharding.mesh import request_cpu_devices

    if not 0 <= args.example < EXAMPLES:
        raise UserError(f"--example is {args.example}: it counts from 0 to {EXAMPLES - 1}.")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a file: name a folder.")
    question, left, right, expected = digits.held_out_examples(args.example + 1)[args.example]

    request_cpu_devices(DEVICES)  # before anything starts jax's backend
    _heading("versions")
    libraries = "  ".join(f"{name} {version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    print(f"maverick-jax {__version__}  Python {platform.python_version()}  {libraries}")

    _heading("a PyTorch checkpoint becomes an Orbax one")
    out = Path(args.out) / "mini-maverick"
    if multihost.is_first() and (out / "manifest.json").is_file():  # an earlier demo's
        shutil.rmtree(out)
    multihost.exchange("ready")
    options.note(convert(mini_directory(), out, progress=multihost.is_first()).as_text())
    for path in sorted(out.iterdir()):
        print(f"{path}{'/' if path.is_dir() else ''}")

    _heading("every parameter on its devices")
    mesh = make_mesh(expert=math.gcd(DEVICES, jax.device_count()))
    with status.doing("loading the model"):
        model = load(out, mesh=mesh)
    _print_experts(model)

    _heading("two pictures that the model has never seen")
    pictures = [digits.held_out()[0][i] for i in (left, right)]
    print(digits.draw(*pictures))
    images = [digits.picture(pixels) for pixels in pictures]
    assert model.config.vision is not None
    if multihost.is_first():
        save_pictures(images, Path(args.out), model.config.vision.image_size)

    _heading("a question about them")
    chat = Chat(model, max_new_tokens=32)
    print(f"question  {question}\nanswer    ", end="", flush=True)
    answer = receive(chat.stream(question, images))
    print(f"expected  {expected}")

    _heading("tokens per expert, a mark for each of the 128")
    assert chat.engine is not None
    _print_load(model.config.text.moe_layers, chat.engine.load_ME)
    print("Of a prompt, the last layer computes only the last token: nothing else of it is read.")
    print(f"dropped = {chat.engine.dropped}")

    _heading("speed")
    print(options.speed(_warm(chat, question, images)))
    if answer != expected or chat.engine.dropped:
        options.note("maverick: the answer is wrong.")
        return 1
    return 0


def save_pictures(images: list[Image], folder: Path, side: int) -> None:
    """The left and the right picture, exactly the tiles that the model sees."""
    from PIL.Image import Resampling

    for name, image in zip(("left.png", "right.png"), images, strict=True):
        image.resize((side, side), Resampling.BILINEAR).save(folder / name)


def _heading(text: str) -> None:
    print(f"\n── {text} {'─' * max(2, 76 - len(text))}", flush=True)


def _print_experts(model: Llama4) -> None:
    """Which experts of one layer are on which device."""
    import jax
    from flax import nnx
    from jax.sharding import NamedSharding

    weight = dict(nnx.to_flat_state(nnx.state(model)))[EXPERTS][...]
    assert isinstance(weight.sharding, NamedSharding)
    print(f"mesh {dict(weight.sharding.mesh.shape)} of {jax.devices()[0].device_kind} devices")
    print(f"{'.'.join(map(str, EXPERTS))} {list(weight.shape)} {weight.dtype}, {weight.sharding.spec}")
    shape = weight.sharding.shard_shape(weight.shape)
    size = math.prod(shape) * weight.dtype.itemsize
    for device, index in sorted(weight.sharding.devices_indices_map(weight.shape).items(), key=lambda pair: pair[0].id):
        experts = index[0].indices(weight.shape[0])
        print(f"  device {device.id}  experts {experts[0]:3}..{experts[1] - 1:3}  {list(shape)}  {size:,} bytes")


def _print_load(layers: tuple[int, ...], load_ME: np.ndarray) -> None:
    for layer, load_E in zip(layers, load_ME, strict=True):
        marks = "".join(SHADES[min(int(count), 8).bit_length()] for count in load_E)
        for start in range(0, len(marks), LINE):
            print(f"{f'layer {layer}' if start == 0 else '':9} {marks[start : start + LINE]}")
        print(f"{'':9} {int((load_E > 0).sum())} of {len(load_E)} experts; the busiest has {load_E.max()} of {load_E.sum()} tokens")
    print(f"{'':9} {SHADES[0]} none   {SHADES[1]} 1   {SHADES[2]} 2-3   {SHADES[3]} 4-7   {SHADES[4]} 8 or more")


def _warm(chat: Chat, question: str, images: list) -> Handle:
    """The same question again, now that everything is compiled."""
    again = type(chat)(chat.model, max_new_tokens=32)
    again(question, images)
    assert again.last is not None
    return again.last
