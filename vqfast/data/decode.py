"""One image file into pixels of the size asked for."""

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_GREY_MODES = ("1", "L", "I", "F")


def is_grey(image: Image.Image) -> bool:
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def read_image(file: BinaryIO, image_size: int | None) -> np.ndarray:
    """Decode an image, turn it upright, and fit it into a square.

    Args:
        file: an image in any format that pillow reads.
        image_size: side in pixels: the shorter side is resized to it and the middle kept. None keeps the
            image's own size.

    Returns:
        (H, W, C) uint8, C = 1 for grey images, else 3; transparency is laid on white.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: not an image, a broken or a huge one.
    """
    with Image.open(file) as opened:
        if image_size is not None:
            # A large JPEG is decoded at a half, quarter or eighth, still at least twice the size asked for.
            opened.draft(None, (2 * image_size, 2 * image_size))
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit grey to 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif is_grey(image):
        image = image.convert("L")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        image = image.convert("RGB")
    if image_size is not None:
        image = fit(image, image_size)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` pixels and keep the middle square."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
