"""Any image a data set may hold, as upright 8-bit RGB.

What Pillow does silently and wrongly for a model is done right here: EXIF orientation is applied,
transparent pixels are composited on white (not left as the colour hidden under them), and 16-bit
grey is scaled (not clipped at 255). Colour profiles are not applied; of an animation, the first
frame counts. Nothing here resizes: that is the processor's.
"""

import hashlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

from PIL import Image, ImageOps

MAX_ASPECT_RATIO = 200  # Qwen2-VL's image processor refuses longer ones

# What Pillow's decoders raise on damaged bytes; found by fuzzing them.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)

# Pillow warns from half the size that it refuses. Such an image is large, not wrong. (Once for the
# process, since warnings.catch_warnings is not safe in the threads that check images.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used: `found`, what it is, and `todo`, what to do about it."""

    def __init__(self, source: bytes | str | os.PathLike, found: str, todo: str):
        where = "" if isinstance(source, bytes) else f"{os.fspath(source)}: "
        super().__init__(f"{where}{found}; {todo}")
        self.found, self.todo = found, todo


def open_image(source: bytes | str | os.PathLike) -> Image.Image:
    """Decodes an image, given as a path or as the bytes of a file.

    Returns an upright 8-bit RGB image, fully decoded; transparency is composited on white.

    Raises ImageError, a ValueError: "missing", "empty (0 bytes)", "not an image Pillow can read",
    "corrupt or truncated", "decompression bomb: W x H pixels" (over twice Image.MAX_IMAGE_PIXELS,
    Pillow's own limit), "aspect ratio A is over 200", or pixels that have no meaning in 8 bits.
    """
    content = _read(source)
    try:
        image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise _bomb(source, content) from error
    except Image.UnidentifiedImageError as error:
        found = f"not an image Pillow can read: it starts with {content[:8]!r}"
        raise ImageError(source, found, "save it as JPEG or PNG") from error
    except DECODE_ERRORS as error:
        raise _damaged(source, error) from error

    ratio = max(image.size) / max(1, min(image.size))
    if ratio > MAX_ASPECT_RATIO:
        found = f"aspect ratio {ratio:g} is over {MAX_ASPECT_RATIO}"
        raise ImageError(source, f"{found} ({image.width} x {image.height} pixels)", "crop it")

    try:
        image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise _bomb(source, content) from error
    except DECODE_ERRORS as error:
        raise _damaged(source, error) from error
    if image.mode.startswith("I"):
        return _scale_16_bit(source, image)
    if image.mode == "F":
        raise ImageError(source, "pixels are 32-bit floats", "save it as 8-bit RGB")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except ValueError as error:
        found = f"mode {image.mode} has no conversion to RGB"
        raise ImageError(source, found, "save it as 8-bit RGB") from error


def content_key(source: bytes | str | os.PathLike) -> str:
    """sha256, in hexadecimal, of an image file's bytes: equal for equal images.

    Raises ImageError, a ValueError: "missing" or "cannot be read".
    """
    return hashlib.sha256(source if isinstance(source, bytes) else _read(source, 0)).hexdigest()


def _read(source: bytes | str | os.PathLike, at_least: int = 1) -> bytes:
    """The bytes of a source. Raises ImageError where there are fewer than `at_least`."""
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(source, "missing", "restore the file or correct its path") from error
    except OSError as error:
        raise ImageError(source, f"cannot be read: {error.strerror}", "check the path") from error
    except ValueError as error:  # a path with a null character in it
        raise ImageError(source, f"cannot be read: {error}", "correct the path") from error
    if len(content) < at_least:
        raise ImageError(source, "empty (0 bytes)", "restore the file")
    return content


def _damaged(source: bytes | str | os.PathLike, error: Exception) -> ImageError:
    reason = str(error) or type(error).__name__
    return ImageError(source, f"corrupt or truncated: {reason}", "restore the file")


def _bomb(source: bytes | str | os.PathLike, content: bytes) -> ImageError:
    """The error for an image over Pillow's limit, which does not itself tell width and height."""
    size = "of unknown size"
    for factory, accept in Image.OPEN.values():
        if accept and accept(content[:16]) is True:
            try:
                size = "{} x {} pixels".format(*factory(io.BytesIO(content), "").size)
                break
            except (*DECODE_ERRORS, Image.DecompressionBombError):
                continue
    return ImageError(source, f"decompression bomb: {size}", "downscale it")


def _scale_16_bit(source: bytes | str | os.PathLike, image: Image.Image) -> Image.Image:
    """Grey 0 to 65535 -> RGB 0 to 255, rounded. A single transparent grey level is not honoured."""
    image = image.convert("I")
    low, high = image.getextrema()
    if low < 0 or high > 65535:
        found = f"32-bit integer pixels from {low} to {high}, outside 0-65535"
        raise ImageError(source, found, "save it as 8-bit RGB")
    image.info.pop("transparency", None)  # in 16-bit units, which mean nothing after scaling
    return image.point(lambda grey: grey * (1 / 257) + 0.5).convert("L").convert("RGB")
