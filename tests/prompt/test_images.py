"""Pictures are cut into the same tiles as by the reference processors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from maverick_jax.config import VisionConfig
from maverick_jax.errors import UserError
from maverick_jax.prompt import load_picture, tile_image
from maverick_jax.prompt.images import choose_canvas

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


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    """A picture in another mode is seen as its RGB conversion; alpha that hides nothing changes nothing."""
    picture = waves(60, 40).convert(mode)
    tiles, _ = tile_image(picture, VISION)
    expected, _ = tile_image(picture.convert("RGB"), VISION)
    np.testing.assert_array_equal(tiles, expected)


def test_transparent_parts_become_white():
    """Dropping alpha would show whatever colour lies under it, often black on black text."""
    assert np.asarray(load_picture(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert np.asarray(load_picture(palette)).min() == 255


def test_sixteen_bit_greyscale_is_scaled_not_clipped():
    picture = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert np.asarray(load_picture(picture)).max() == 128


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
