"""Pictures are cut into the same tiles as by the reference processors."""

import io
import os

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from maverick_jax.config import VisionConfig
from maverick_jax.errors import UserError
from maverick_jax.prompt import load_picture, tile_image
from maverick_jax.prompt.images import MAX_FILE, choose_canvas

VISION = VisionConfig()
PIXELS = 0.02  # normalised units: the Hugging Face processor rounds to bfloat16 (spec section 3.1)
LAYOUTS = {  # width x height -> rows, columns (spec section 3.1)
    (336, 336): (1, 1), (640, 480): (2, 2), (800, 600): (2, 3), (1280, 720): (3, 4), (1920, 1080): (3, 5), (1080, 1920): (5, 3),
    (4000, 3000): (3, 4), (2000, 500): (2, 6), (300, 800): (3, 1), (1, 1): (1, 1), (5000, 1): (1, 15), (1, 5000): (15, 1),
}  # fmt: skip


def waves(width: int, height: int) -> Image.Image:
    """The synthetic picture of the shared vectors: three sine waves."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.floor(127.5 * (1 + np.sin(2 * np.pi * (a * x / width + b * y / height)))) for a, b in ((3, 1), (1, 4), (5, 5))]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def test_shared_vectors(shared_dir):
    """Layout exact, pixels to 0.02, of the Hugging Face image processor for 21 sizes."""
    with np.load(shared_dir / "oracle" / "image_vectors.npz") as vectors:
        sizes = sorted({name.split("_")[0] for name in vectors})
        assert len(sizes) == 21
        for size in sizes:
            tiles, layout = tile_image(waves(*map(int, size.split("x"))), VISION)
            assert layout == tuple(vectors[f"{size}_aspect"].reshape(-1))
            np.testing.assert_allclose(tiles[:, :, 3::37, 5::37], vectors[f"{size}_sample"], rtol=0, atol=PIXELS)
            np.testing.assert_allclose(tiles.mean(axis=(1, 2, 3)), vectors[f"{size}_mean"], rtol=0, atol=PIXELS)


@pytest.mark.parametrize("size", list(LAYOUTS)[:9])
def test_layouts_of_the_specification(size):
    assert choose_canvas(*size, tile=336, max_tiles=16) == LAYOUTS[size]


@pytest.mark.parametrize("size", [(640, 480), (300, 800), (100, 60), (350, 1000)])
def test_tiles_equal_antialiased_torch_resizing(size):
    """Row-major tiles of the padded picture, then the whole picture squeezed: pixels as torch's antialiased bilinear gives them."""
    picture = waves(*size)
    tiles, (rows, columns) = tile_image(picture, VISION)
    scale = min(min(max(size[0], 336), columns * 336) / size[0], min(max(size[1], 336), rows * 336) / size[1])
    width, height = int(size[0] * scale + 1e-6), int(size[1] * scale + 1e-6)
    canvas = np.full((3, rows * 336, columns * 336), -1, np.float32)  # padding is black
    canvas[:, :height, :width] = torch_resized(picture, height, width)
    expected = [canvas[:, r * 336 : r * 336 + 336, c * 336 : c * 336 + 336] for r in range(rows) for c in range(columns)]
    expected += [torch_resized(picture, 336, 336)] if rows * columns > 1 else []
    np.testing.assert_allclose(tiles, np.stack(expected), rtol=0, atol=PIXELS)


def torch_resized(picture: Image.Image, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(np.asarray(picture, np.float32).transpose(2, 0, 1).copy())[None]
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].numpy() / 127.5 - 1


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "La", "RGBa", "CMYK", "1", "YCbCr", "HSV", "RGBX", "PA"])
def test_every_mode_becomes_rgb(mode):
    """A picture in another mode is seen as its RGB conversion; alpha that hides nothing changes nothing."""
    over = {"La": "LA", "LA": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, mode)  # PIL converts to and from some modes by others only
    picture = waves(60, 40).convert(over)
    tiles, _ = tile_image(picture.convert(mode), VISION)
    expected, _ = tile_image(picture.convert("RGB"), VISION)
    np.testing.assert_array_equal(tiles, expected)


def test_transparent_parts_become_white():
    """Dropping alpha would show whatever colour lies under it, often black on black text."""
    assert np.asarray(load_picture(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert np.asarray(load_picture(palette)).min() == 255


def file_of(picture: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


GREY = np.array([[0, 0.2, 0.6, 1.0]])
GREY_SEEN = [0, 51, 153, 255]
NUMBERS = {  # pixels and what is seen; the mode that PIL gives them
    "16 bits": ((GREY * 65535).astype(np.uint16), GREY_SEEN, "I;16"),
    "16 bits, dark": (np.array([[0, 255, 257, 4095]], np.uint16), [0, 1, 1, 16], "I;16"),
    "16 bits, darker": (np.array([[0, 100, 200, 255]], np.uint16), [0, 0, 1, 1], "I;16"),
    "16 bits, the other byte order": ((GREY * 65535).astype(">u2"), GREY_SEEN, "I;16B"),
    "32 bits, 0 to 255": (np.rint(GREY * 255).astype(np.int32), GREY_SEEN, "I"),
    "32 bits, 0 to 1": (np.array([[0, 1, 0, 1]], np.int32), [0, 1, 0, 1], "I"),
    "32 bits, 0 to 65535": (np.rint(GREY * 65535).astype(np.int32), GREY_SEEN, "I"),
    "32 bits, 0 to 256": (np.array([[0, 255, 256, 128]], np.int32), [0, 1, 1, 0], "I"),
    "32 bits, 0 to a million": ((GREY * 1_000_000).astype(np.int32), GREY_SEEN, "I"),
    "32 bits, all of them": ((GREY * (2**31 - 1)).astype(np.int32), GREY_SEEN, "I"),
    "32 bits, negative": (np.array([[-(2**31), -1, 0, 255]], np.int32), [0, 0, 0, 255], "I"),
    "fractions, 0 to 1": (GREY.astype(np.float32), GREY_SEEN, "F"),
    "fractions, 0 to 255": ((GREY * 255).astype(np.float32), GREY_SEEN, "F"),
    "fractions, 0 to 65535": ((GREY * 65535).astype(np.float32), GREY_SEEN, "F"),
    "fractions, 0 to a million": ((GREY * 1_000_000).astype(np.float32), GREY_SEEN, "F"),
    "fractions that are no numbers": (np.array([[np.nan, np.inf, -np.inf, 0.2]], np.float32), [0, 255, 0, 51], "F"),
    "nothing but no numbers": (np.array([[np.nan, -np.inf, np.nan, -np.inf]], np.float32), [0, 0, 0, 0], "F"),
    "all black": (np.zeros((1, 4), np.int32), [0, 0, 0, 0], "I"),
    "all below black": (np.full((1, 4), -3, np.float32), [0, 0, 0, 0], "F"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_scaled_by_their_range_not_clipped(case):
    """Scans and pictures from arrays became black (32 bits of 0 to 255) or white (clipped)."""
    pixels, seen, mode = NUMBERS[case]
    for picture in (Image.fromarray(pixels), file_of(Image.fromarray(pixels), "TIFF")):
        if isinstance(picture, Image.Image):
            assert picture.mode == mode
        assert np.asarray(load_picture(picture))[0].tolist() == [[value] * 3 for value in seen]
    if mode == "I;16":
        assert np.asarray(load_picture(file_of(Image.fromarray(pixels), "PNG")))[0, :, 0].tolist() == seen


def test_colours_of_lab_are_those_of_rgb():
    """A TIFF of a print shop; not refused, and not with its axes taken for red, green and blue."""
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (255, 128, 128)])  # white
    assert np.asarray(load_picture(lab)).min() > 250
    assert np.asarray(load_picture(file_of(lab, "TIFF"))).min() > 250


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read(form):
    picture = waves(600, 400).resize((60, 40)).quantize(8).convert("RGB")
    seen = np.asarray(load_picture(file_of(picture, form, **({"lossless": True} if form == "WEBP" else {}))), np.int32)
    assert np.abs(seen - np.asarray(picture, np.int32)).mean() < (20 if form == "JPEG" else 1e-9)


@pytest.mark.parametrize("form", ["ICO", "PPM", "TGA", "PCX", "EPS", "PDF", "ICNS", "SGI", "JPEG2000"])
def test_other_formats_are_not_decoded(form):
    """Every decoder is one more that meets what strangers send, and EPS starts a program."""
    content = file_of(waves(64, 64), form)
    with pytest.raises(UserError, match=r"its format is unknown\): give a PNG, JPEG, WebP, GIF, BMP or TIFF file\."):
        load_picture(content)


def test_of_several_frames_the_first_is_seen():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        content = file_of(frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {}))
        assert np.asarray(load_picture(content))[4, 4].tolist() == [255, 0, 0]


def test_a_photograph_stands_upright():
    """Phones store the rotation beside the pixels; without it the picture lies on its side."""
    picture = waves(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_picture(buffer.getvalue())), np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_bad_pictures_are_one_clear_line(tmp_path):
    """Broken, missing, empty, over-wide and exploding pictures name themselves and say what to do."""
    whole = png(waves(300, 200))
    cases = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"not a picture", r"cannot be read as a picture \(its format is unknown\)"),
        "cut.png": (whole[: len(whole) // 2], "cannot be read as a picture"),
        "wide.png": (png(Image.new("L", (50_000, 2))), "50000 x 2 pixels"),
        "bomb.png": (png(Image.new("1", (12_000, 12_000))), "12000 x 12000 pixels"),
        "worse.png": (png(Image.new("1", (20_000, 20_000))), "too many pixels"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            tile_image(tmp_path / name, VISION)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"absent\.png cannot be read \(No such file"):
        tile_image(tmp_path / "absent.png", VISION)


def test_what_is_no_file_is_refused_unread(tmp_path):
    """A device gives bytes for ever, a pipe none, and an address is no path."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", MAX_FILE + 1)
    for source, message in {
        "/dev/zero": "picture /dev/zero is not a file: check the path.",
        tmp_path / "pipe.png": "pipe.png is not a file: check the path.",
        tmp_path: "is not a file: check the path.",
        tmp_path / "large.png": "large.png has 268,435,457 bytes, more than 268,435,456: scale it down first.",
        "https://example.com/dog.png": "picture https://example.com/dog.png is an address, which is not fetched: give a file, or its",
        "file:///dog.png": "picture file:///dog.png is an address, which is not fetched",
        "data:image/png;base64," + "A" * 1_000_000: "is an address, which is not fetched: give a file, or its bytes.",
        "x" * 300: "cannot be read (File name too long)",
        "a\0b": "null",
    }.items():
        with pytest.raises(UserError) as error:
            load_picture(source)
        assert message in str(error.value)
        assert len(str(error.value)) < 3000
        assert str(error.value).isprintable()


def test_what_is_odd_and_can_be_read_is_read():
    """Pillow warns; a warning is several lines for the user, and where warnings are errors the picture is lost."""
    content = bytearray(file_of(waves(60, 40), "TIFF"))
    content += b"\0" * 10
    palette = waves(60, 40).quantize(4)
    palette.info["transparency"] = bytes([255, 255, 255, 255])
    assert load_picture(bytes(content)).size == (60, 40)
    assert load_picture(file_of(palette, "PNG", transparency=bytes([255] * 4))).size == (60, 40)
    exif = Image.Exif()
    exif[0x0112] = 1
    broken = file_of(waves(60, 40), "JPEG", exif=exif.tobytes()[:-9])
    assert load_picture(broken).size == (60, 40)


GREY_BYTES = np.array([[0, 51, 153, 255], [255, 153, 51, 0]], np.uint8)
COLOUR = np.stack([GREY_BYTES, GREY_BYTES[::-1], GREY_BYTES * 0], axis=-1)
OPAQUE = np.concatenate([COLOUR, np.full((2, 4, 1), 255, np.uint8)], axis=-1)
ARRAYS = {  # what is seen of them is GREY_BYTES or COLOUR
    "bytes": GREY_BYTES,
    "one channel": GREY_BYTES[..., None],
    "three channels": COLOUR,
    "four channels": OPAQUE,
    "fractions, as matplotlib has them": GREY_BYTES / 255,
    "fractions of 32 bits": (COLOUR / 255).astype(np.float32),
    "fractions of 16 bits": (COLOUR / 255).astype(np.float16),
    "fractions with alpha": OPAQUE / 255,
    "resized fractions": GREY_BYTES / 255 * (1 + 1e-6),
    "whole numbers": COLOUR.astype(np.int64),
    "16 bits": GREY_BYTES.astype(np.uint16) * 257,
    "16 bits, the other byte order": (COLOUR.astype(np.uint16) * 257).astype(">u2"),
    "jax": jnp.asarray(COLOUR),
    "jax fractions": jnp.asarray(COLOUR / 255, jnp.float32),
    "jax, bfloat16": jnp.asarray(COLOUR > 100, jnp.bfloat16),
    "torch": torch.from_numpy(COLOUR),
    "not in one piece": np.repeat(COLOUR, 2, axis=1)[:, ::2],
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_are_pictures(case):
    """Fractions of 0..1, as matplotlib and jax users have them, were turned black."""
    expected = COLOUR if ARRAYS[case].ndim == 3 and ARRAYS[case].shape[2] > 1 else np.repeat(GREY_BYTES[..., None], 3, axis=-1)
    expected = np.where(expected > 100, 255, 0) if "bfloat16" in case else expected
    np.testing.assert_array_equal(np.asarray(load_picture(ARRAYS[case])), expected)


def test_two_colours():
    assert np.asarray(load_picture(GREY_BYTES > 100))[:, :, 0].tolist() == [[0, 0, 255, 255], [255, 255, 0, 0]]


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, 8, 9)), r"float64 \[3, 8, 9\], channels first as torch has them: .* picture\.transpose\(1, 2, 0\)"),
        (np.zeros((5, 3, 28, 28), np.float32), r"float32 \[5, 3, 28, 28\], like tiles: give the pair that tile_image returned"),
        (COLOUR[None], r"\[1, 2, 4, 3\], several pictures: give them one by one, list\(pictures\)"),
        (np.zeros((2, 4, 2)), r"float64 \[2, 4, 2\]: give \[H, W\]"),
        (np.zeros(4), r"float64 \[4\]: give"),
        (np.float32(0.5), r"float32 \[\]: give"),
        (np.zeros((0, 4, 3)), "which is empty"),
        (GREY_BYTES * np.nan, "NaN or infinity"),
        (np.full((2, 4), np.inf), "NaN or infinity"),
        (GREY_BYTES.astype(np.float32), r"fractions from 0 to 255, .* in 0\.\.255 they are bytes, picture\.astype\('uint8'\)"),
        (GREY_BYTES / 127.5 - 1, "fractions from -1 to 1, but white is 1 and black 0: scale them"),
        (GREY_BYTES.astype(np.int32) * 4, "int32 from 0 to 1020: give whole numbers in 0..255"),
        (GREY_BYTES.astype(np.int8), "int8 from -103 to 51"),
        (GREY_BYTES.astype(complex), "array of complex128"),
        (GREY_BYTES.astype(object), "array of object"),
        (np.array([["a"]]), "array of <U1"),
        (torch.zeros(2, 4, requires_grad=True), r"no array that can be read \(.*requires grad"),
        ([[0, 1]], r"picture \[\[0, 1\]\] is neither a file"),
        (5, "picture 5 is neither a file"),
        (None, "picture None is neither a file"),
        (io.StringIO("text"), "picture StringIO is open as text: open it with 'rb'"),
        (io.BytesIO(), "picture BytesIO is empty"),
        (b"", "picture is empty"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{type(value).__name__} {getattr(value, 'shape', '')}",
)
def test_what_is_no_picture(array, message):
    """Each of these was a traceback, or a picture of something else."""
    with pytest.raises(UserError, match=message) as error:
        load_picture(array)
    assert str(error.value).isprintable()


def test_open_files_and_bytes(tmp_path):
    """Wherever the file stands, and as often as it is asked for."""
    content = file_of(Image.fromarray(COLOUR), "PNG")
    (tmp_path / "a.png").write_bytes(content)
    with open(tmp_path / "a.png", "rb") as file:
        file.seek(7)
        for source in (file, file, io.BytesIO(content), bytearray(content), memoryview(content)):
            np.testing.assert_array_equal(np.asarray(load_picture(source)), COLOUR)
    with pytest.raises(UserError, match="closed file"):
        load_picture(file)
