"""One image file -> 8-bit RGB as a person would see it, or a reason why not."""

import hashlib
import os
import struct
import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ASPECT_RATIO = 200  # Qwen2-VL's image processor refuses more

# Pillow warns from its limit on and refuses at twice the limit; the refusal is what counts here.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

Source = bytes | str | os.PathLike


def open_image(source: Source) -> Image.Image:
    """A fully decoded 8-bit RGB image from a file or its bytes.

    EXIF orientation is applied. Transparency (RGBA, LA, palette) is laid on white; grey, palette,
    CMYK and 1-bit images become RGB; 16-bit grey is scaled to 8 bits.

    Raises ValueError saying what was found: missing, empty, unreadable, corrupt, a decompression
    bomb, an aspect ratio over 200, or floating-point pixels.
    """
    data = read_bytes(source)
    if not data:
        raise ValueError("empty (0 bytes)")
    try:
        image = Image.open(BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"decompression bomb: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"corrupt or truncated: {error}") from error
    image = to_rgb(image)
    ratio = max(image.size) / min(image.size)
    if ratio > MAX_ASPECT_RATIO:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size}: the aspect ratio {ratio:.0f} is over {MAX_ASPECT_RATIO}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB. Raises ValueError for floating-point pixels."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise ValueError(f"{image.mode} pixels from {low} to {high}: save it as 8-bit")
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode == "F":
        raise ValueError("floating-point pixels: save it as 8-bit")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_bytes(source: Source) -> bytes:
    """The file's bytes. Raises ValueError where it is missing or unreadable."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise ValueError("missing: there is no such file") from None
    except OSError as error:
        raise ValueError(f"unreadable: {error.strerror}") from error


def content_key(source: Source) -> str:
    """sha256 of the file's bytes, in hexadecimal: equal where the image is."""
    return hashlib.sha256(read_bytes(source)).hexdigest()
