"""Pictures to tiles: a canvas of up to 16 squares in the picture's proportions, and the whole picture once more, small.

Source: Llama 4 reference, `models/llama4/preprocess.py`; spec section 3.1.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import reprlib
import stat
import warnings
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from maverick_jax.config import VisionConfig
from maverick_jax.errors import UserError
from maverick_jax.prompt.pixels import is_array, picture_of

MAX_SIDE = 32_768  # pixels
MAX_PIXELS = 100_000_000  # a compressed file of a few kilobytes can unfold to gigabytes
MAX_FILE = 256 << 20  # bytes; a picture of that many pixels takes less in every format, uncompressed ones of 8 bits included
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # each decoder is one more that meets what strangers send
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
FULL_RANGES = (1, 255, 65535)  # what stands for white in files of numbers; 1 for fractions only
WHITE = (255, 255, 255, 255)

Array: TypeAlias = Any  # of NumPy, jax or torch: what has `__array__`
Picture: TypeAlias = str | os.PathLike | bytes | bytearray | memoryview | IO[bytes] | Image.Image | Array


def load_picture(source: Picture) -> Image.Image:
    """An upright RGB picture from a file's name, from an open file or its bytes, from any PIL picture, or from an array as `picture_of`
    takes it: transparent parts become white, of several frames it is the first.

    A picture of 16 bits (mode `I;16`) is white at 65535. One of 32 bits (`I`, `F`) does not say where: at the least of 255 and 65535, and
    before them 1 for fractions, that no value exceeds; beyond them at its largest value. Negative values are black.

    Raises:
      UserError: no such file, not a picture in one of `FORMATS`, one too large to decode safely, an array that is none, or a value of
        another type.
    """
    if is_array(source):
        source = picture_of(source)
    name = f"picture {source}" if isinstance(source, (str, os.PathLike)) else "picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd and can be read; the limits below are stricter than those warned of
            picture = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(_read(source)), formats=FORMATS)
            width, height = picture.size
            if not 0 < max(width, height) <= MAX_SIDE or not 0 < width * height <= MAX_PIXELS:
                raise UserError(
                    f"{name} has {width} x {height} pixels: it must have at least 1, at most {MAX_SIDE:,} on a side and "
                    f"{MAX_PIXELS:,} in all. Scale it down first."
                )
            return _to_rgb(ImageOps.exif_transpose(picture))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} unfolds to too many pixels ({error}): scale it down first.") from error
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        what = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name} cannot be read as a picture ({what}): give a PNG, JPEG, WebP, GIF, BMP or TIFF file.") from error


def _read(source: Any) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _not_empty(bytes(source), "picture")
    if hasattr(source, "read"):
        return _read_open(source)
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"picture {reprlib.repr(source)} is neither a file, the bytes of one, a PIL picture nor an array.")
    if ADDRESS.match(str(source)):
        raise UserError(f"picture {source} is an address, which is not fetched: give a file, or its bytes.")
    file = Path(source)
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):  # to read a pipe or a device may take for ever
            raise UserError(f"picture {source} is not a file: check the path.")
        if found.st_size > MAX_FILE:
            raise UserError(f"picture {source} has {found.st_size:,} bytes, more than {MAX_FILE:,}: scale it down first.")
        with file.open("rb") as stream:
            data = stream.read(found.st_size)
    except OSError as error:
        raise UserError(f"picture {source} cannot be read ({error.strerror}): check the path.") from error
    return _not_empty(data, f"picture {source}")


def _read_open(file: IO[bytes]) -> bytes:
    """All of an open file, wherever it stands: it may have been looked at before."""
    with contextlib.suppress(AttributeError, OSError):  # a pipe has no beginning to go back to
        file.seek(0)
    data = file.read(MAX_FILE + 1)
    if not isinstance(data, bytes):
        raise UserError(f"picture {_name_of(file)} is open as text: open it with 'rb'.")
    if len(data) > MAX_FILE:
        raise UserError(f"picture {_name_of(file)} has more than {MAX_FILE:,} bytes: scale it down first.")
    return _not_empty(data, f"picture {_name_of(file)}")


def _not_empty(data: bytes, name: str) -> bytes:
    if not data:
        raise UserError(f"{name} is empty: fetch it again.")
    return data


def _name_of(file: Any) -> str:
    """What an open file is called."""
    return str(getattr(file, "name", type(file).__name__))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in "IF":  # PIL's own conversion clips at 255
        picture = Image.fromarray(_to_8_bits(np.asarray(picture), sixteen=picture.mode.startswith("I;16")))
    if picture.mode == "La":  # which PIL converts to LA and to nothing else
        picture = picture.convert("LA")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture)
    return picture.convert("RGB")


def _to_8_bits(pixels: np.ndarray, *, sixteen: bool) -> np.ndarray:
    """[H, W] uint8, rounded, of integers or fractions in a range as `load_picture` has it."""
    largest = np.max(pixels, where=np.isfinite(pixels), initial=0)
    ranges = FULL_RANGES[-1:] if sixteen else FULL_RANGES[pixels.dtype.kind != "f" :]
    white = next((value for value in ranges if largest <= value), largest)
    scaled = np.nan_to_num(pixels.astype(np.float32) * (255 / np.float32(white)), nan=0, posinf=255, neginf=0)
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def tile_image(picture: Picture, vision: VisionConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """Cut a picture into the tiles that the vision tower sees.

    Args:
      picture: what `load_picture` takes.
      vision: gives the side S of a tile in pixels and the largest number of tiles.

    Returns:
      [n, 3, S, S] float32 in -1..1 and (rows, columns). Tiles are row-major; with more than one, the whole picture
      squeezed into a square follows as the last, so n is rows * columns + 1; otherwise 1.
    """
    image = load_picture(picture)
    S = vision.image_size
    rows, columns = choose_canvas(image.width, image.height, tile=S, max_tiles=vision.max_tiles)
    canvas = Image.new("RGB", (columns * S, rows * S))  # black: -1 once normalised
    canvas.paste(image.resize(_size_on_canvas(image.width, image.height, columns * S, rows * S, S), Image.Resampling.BILINEAR))
    tiles = _normalise(canvas).reshape(3, rows, S, columns, S).transpose(1, 3, 0, 2, 4).reshape(-1, 3, S, S)
    if rows * columns > 1:
        tiles = np.concatenate([tiles, _normalise(image.resize((S, S), Image.Resampling.BILINEAR))[None]])
    return np.ascontiguousarray(tiles), (rows, columns)


def as_tiles(image: Any, vision: VisionConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """What `tile_image` makes of a picture, or has made of it already.

    Raises:
      UserError: no picture, and no pair of this model's tiles and (rows, columns).
    """
    if not isinstance(image, tuple):
        return tile_image(image, vision)
    try:
        tiles, (rows, columns) = image
        count = rows * columns + (rows * columns > 1)
        fits = tiles.shape == (count, 3, vision.image_size, vision.image_size)
    except (TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"picture {reprlib.repr(image)} is no pair of tiles and (rows, columns) for this model: give what tile_image returns."
        )
    return image


def listed_pictures(images: Any) -> list[Any]:
    """The pictures that are meant: of a list its items, of a single picture itself, which Python would take apart.

    Raises:
      UserError: neither.
    """
    try:
        return [images] if _is_one(images) else list(images)
    except TypeError:
        raise UserError(f"images is {reprlib.repr(images)}: expected a list of pictures.") from None


def _is_one(images: Any) -> bool:
    """Whether it is a picture itself, or the pair that `tile_image` returns."""
    if isinstance(images, tuple):
        return len(images) == 2 and isinstance(images[1], tuple) and all(isinstance(n, int) for n in images[1])
    file = isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(images, "read")
    return file or isinstance(images, Image.Image) or is_array(images)


def choose_canvas(width: int, height: int, *, tile: int, max_tiles: int) -> tuple[int, int]:
    """(rows, columns) of the canvas: the one that enlarges the picture least, else the one that shrinks it least.

    Among canvases of the same scale the smallest; scales are compared in float32 as the reference does.
    """
    canvases = np.array([(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)])
    target = (canvases * tile).astype(np.float32)
    scale = np.minimum(target[:, 0] / np.float32(height), target[:, 1] / np.float32(width))
    best = scale[scale >= 1].min() if (scale >= 1).any() else scale.max()
    candidates = canvases[scale == best]
    rows, columns = candidates[candidates.prod(axis=1).argmin()]
    return int(rows), int(columns)


def _size_on_canvas(width: int, height: int, canvas_width: int, canvas_height: int, tile: int) -> tuple[int, int]:
    """(width, height) in the picture's proportions; a small picture grows to one tile at most."""
    limit_width = min(max(width, tile), canvas_width)
    limit_height = min(max(height, tile), canvas_height)
    scale_width, scale_height = limit_width / width, limit_height / height
    if scale_width < scale_height:
        return limit_width, min(max(int(height * scale_width), 1), limit_height)
    return min(max(int(width * scale_height), 1), limit_width), limit_height


def _normalise(image: Image.Image) -> np.ndarray:
    """[3, H, W] float32: 0..255 becomes -1..1."""
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
