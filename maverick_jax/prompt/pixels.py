"""An array of numbers as a picture: which shapes and ranges are one, and of the others what they look like.

Shape suffixes: H, W pixels, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from maverick_jax.errors import UserError

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
SHAPES = "[H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
RANGES = "whole numbers in 0..255, uint16 in 0..65535, or fractions in 0..1"
ROUNDING = 1e-3  # by which resized fractions may leave 0..1


def is_array(value: Any) -> bool:
    """NumPy's, jax's, or what else makes itself one, such as torch's. A PIL picture knows more than its numbers, NumPy's text is one."""
    return hasattr(value, "__array__") and not isinstance(value, (Image.Image, str, bytes))


def picture_of(array: Any) -> Image.Image:
    """A picture of 8 bits in mode `L`, `RGB` or `RGBA`.

    Args:
      array: [H, W] grey, or [H, W, C] with 1, 3 or 4 channels, the fourth alpha; bool, whole numbers in 0..255, uint16 in 0..65535, or
        fractions in 0..1.

    Raises:
      UserError: another shape or range; for what pictures are often mistaken for, such as [3, H, W], how to turn it into one.
    """
    try:
        pixels = np.asarray(array)
    except Exception as error:  # tensors on an accelerator and such with a gradient refuse, each in its own way
        raise UserError(f"the picture is no array that can be read ({error}): give a NumPy array {SHAPES}.") from error
    _check_shape(pixels)
    pixels = _to_8_bits(pixels)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _check_shape(pixels: np.ndarray) -> None:
    shape = pixels.shape
    found = f"the picture is an array {pixels.dtype} {list(shape)}"
    if 0 in shape:
        raise UserError(f"{found}, which is empty: give {SHAPES}.")
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in CHANNELS):
        return
    if len(shape) == 3 and shape[0] in CHANNELS:
        raise UserError(f"{found}, channels first as torch has them: give [H, W, C], which is picture.transpose(1, 2, 0).")
    if len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]:
        raise UserError(f"{found}, like tiles: give the pair that tile_image returned, tiles and (rows, columns), or the picture itself.")
    if len(shape) == 4:
        raise UserError(f"{found}, several pictures: give them one by one, list(pictures).")
    raise UserError(f"{found}: give {SHAPES}.")


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8 of the same shape, rounded."""
    kind = pixels.dtype.kind
    if kind == "b":
        return pixels * np.uint8(255)
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "f" or pixels.dtype.name == "bfloat16":
        return _from_fractions(pixels.astype(np.float32))
    if kind not in "iu":
        raise UserError(f"the picture is an array of {pixels.dtype}: give {RANGES}.")
    if kind == "u" and pixels.itemsize == 2:
        return np.rint(pixels * np.float32(255 / 65535)).astype(np.uint8)
    if pixels.min() < 0 or pixels.max() > 255:
        raise UserError(f"the picture is an array of {pixels.dtype} from {pixels.min()} to {pixels.max()}: give {RANGES}.")
    return pixels.astype(np.uint8)


def _from_fractions(pixels: np.ndarray) -> np.ndarray:
    least, most = pixels.min(), pixels.max()
    if not np.isfinite(pixels).all():
        raise UserError("the picture has NaN or infinity among its fractions: give numbers in 0..1.")
    if least < -ROUNDING or most > 1 + ROUNDING:
        cure = "in 0..255 they are bytes, picture.astype('uint8')" if least >= 0 and most <= 255 else "scale them"
        raise UserError(f"the picture has fractions from {least:g} to {most:g}, but white is 1 and black 0: {cure}.")
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
