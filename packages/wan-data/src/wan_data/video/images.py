"""Reading images with Pillow: oriented by EXIF, converted to sRGB by their colour profile, over a background."""

import io
import struct
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from wan_data.video.display.colours import HDR, eight_bits, over_background
from wan_data.video.display.options import DisplayOptions
from wan_data.video.display.picture import Picture, Rgb, orientation_of_exif, picture_of
from wan_data.video.limits import Limits
from wan_data.video.media_types import IMAGE_FORMATS
from wan_data.video.source_file import Rejected, check_pixels

Image.MAX_IMAGE_PIXELS = None  # our own limit is compared with the size in the header instead
_LARGEST_FILE = 2**30
_ORIENTATION = 0x0112  # EXIF's tag
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# ITU-T H.273: primaries of BT.709, transfers that standard displays show by their values, as of videos.
_SRGB_PRIMARIES, _SDR_TRANSFERS = (1, 2), (1, 2, 4, 5, 6, 7, 13, 14, 15)
# In 1/100,000, as a chunk has it: 1/2.2, and what differs from it by less than a tenth.
_LEAST_GAMMA, _LARGEST_GAMMA = 41_000, 50_000
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def read_image(file: BinaryIO, limits: Limits, display: DisplayOptions) -> Picture:
    """The picture of an image file; the first one if a photo or TIFF holds several.

    Args:
        file: of ``wan_data.video.source_file.open_source``.
        limits: of the source.
        display: the background of transparent pixels.

    Raises:
        Rejected: it cannot be decoded, exceeds a limit, is damaged or an animation.
    """
    size = file.seek(0, io.SEEK_END)
    if size > _LARGEST_FILE:
        raise Rejected(f"it has {size} bytes; images of at most {_LARGEST_FILE} are read")
    file.seek(0)
    content = io.BytesIO(file.read())
    try:
        with Image.open(content, formats=IMAGE_FORMATS) as image:
            _check(image, limits)
            image.load()
            if image.format == "PNG":
                _check_png(content.getvalue())
            if image.format in ("JPEG", "MPO"):  # MPO is a JPEG file of several photos
                _check_jpeg(content.getvalue())
            orientation = orientation_of_exif(image.getexif().get(_ORIENTATION))
            pixels = _rgb(_exact_png(image, content.getvalue()), display.rgb)
    except UnidentifiedImageError:
        names = ", ".join(IMAGE_FORMATS)
        raise Rejected(f"it cannot be decoded: its content is no image that is read ({names})") from None
    except (OSError, SyntaxError) as error:  # SyntaxError is Pillow's for a damaged PNG
        raise Rejected(f"it cannot be decoded: {error}") from None
    height, width, _ = pixels.shape
    return picture_of(lambda: pixels, height, width, orientation)


def _check(image: Image.Image, limits: Limits) -> None:
    check_pixels(image.width, image.height, limits)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in ("PNG", "WEBP"):
        raise Rejected(f"it is an animation of {frames} pictures; convert it to a video")


def _check_png(content: bytes) -> None:
    """Refuse colours that Pillow does not convert: those of the chunks cICP and gAMA, of other than sRGB's curve.

    Raises:
        Rejected: its transfer characteristics or primaries are not those of standard displays.
    """
    place, profile, gamma = 8, False, 0
    while place + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        if kind == b"IDAT":
            break
        if kind == b"cICP" and length == 4:
            primaries, transfer, matrix, full = content[place + 8 : place + 12]
            if transfer in HDR:
                raise Rejected(f"its colours are in {HDR[transfer]}; convert it to standard dynamic range")
            if primaries not in _SRGB_PRIMARIES or transfer not in _SDR_TRANSFERS or matrix or not full:
                raise Rejected(
                    f"its colours (cICP) are of primaries {primaries}, transfer {transfer}, matrix {matrix} and range "
                    f"{full} of ITU-T H.273; only those of sRGB (1, 13, 0, 1) are read: convert it"
                )
            return  # it goes before the other chunks
        if kind == b"gAMA" and length == 4:
            (gamma,) = struct.unpack(">I", content[place + 8 : place + 12])
        profile = profile or kind in (b"iCCP", b"sRGB")
        place += 12 + length
    if gamma and not profile and not _LEAST_GAMMA <= gamma <= _LARGEST_GAMMA:
        raise Rejected(
            f"its gamma (gAMA) is {gamma / 100_000:g}; only that of sRGB (0.45455) is read: convert it, or remove the "
            "chunk if it is wrong"
        )


def _exact_png(image: Image.Image, content: bytes) -> Image.Image:
    """A PNG of which Pillow drops bits or transparency, decoded again; any other image as it is.

    Pillow cuts 16 bits of colours to 8 without rounding, and compares a transparent colour with pixels of 8 bits.
    """
    if image.format != "PNG":
        return image
    depth, key = content[24], image.info.get("transparency")
    if depth < 8 and image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    if depth != 16 or (image.mode in _SIXTEEN_BITS and key is None):
        return image
    codec = av.CodecContext.create("png", "r")
    try:
        frame, *_ = [*codec.decode(av.Packet(content)), *codec.decode(None)]
    except (av.error.FFmpegError, ValueError) as error:
        raise Rejected(f"it cannot be decoded: {error}") from None
    channels = len(frame.format.components)
    (plane,) = frame.planes
    rows = np.frombuffer(memoryview(plane), ">u2").reshape(frame.height, -1)[:, : channels * frame.width]
    pixels = eight_bits(rows).reshape(frame.height, frame.width, channels)
    exact = Image.fromarray(pixels, {2: "LA", 3: "RGB", 4: "RGBA"}[channels])
    exact.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return exact


def _check_jpeg(content: bytes) -> None:
    """Find damage inside a JPEG, which Pillow decodes to grey blocks: FFmpeg's decoder can be strict.

    Raises:
        Rejected: the strict decoder refuses what the lenient one accepts; others are of a kind that it does not know.
    """
    try:
        _decode_jpeg(content, {"err_detect": "crccheck+explode"})
    except av.error.FFmpegError as error:
        try:
            _decode_jpeg(content, {})
        except av.error.FFmpegError:
            return
        raise Rejected(f"its data are damaged: {error.strerror}") from None


def _decode_jpeg(content: bytes, options: dict[str, str]) -> None:
    codec = av.CodecContext.create("mjpeg", "r")
    codec.options = options
    codec.decode(av.Packet(content))


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Rgb:
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise Rejected(f"its pixels are of Pillow's mode {image.mode}; only images of 8 or 16 bits are read")
    if image.mode in (*_SIXTEEN_BITS, "I"):
        grey = eight_bits(np.asarray(image).astype(np.uint16))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        colours = np.asarray(_to_srgb(rgba.convert("RGB"), image.info.get("icc_profile")))
        alpha = np.asarray(rgba)[..., 3:]
        return over_background(np.concatenate([colours, alpha], axis=2), background)
    return np.array(_to_srgb(image, image.info.get("icc_profile")))


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    if image.mode in ("1", "P"):
        image = image.convert("RGB")
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return image  # the conversion would only round
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")  # viewers ignore a damaged profile, or one of another kind of colours
    assert converted is not None, "only a conversion in place returns nothing"
    return converted
