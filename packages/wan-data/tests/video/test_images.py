import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from media_files import COLOURS, SHOWN, jpeg, picture, profile_of, quarters, shade, to_xyz, write_image
from PIL import Image, ImageOps

from wan_data.video.buckets import Size
from wan_data.video.decode import probe, read_windows
from wan_data.video.display.options import DisplayOptions
from wan_data.video.images import read_image
from wan_data.video.limits import Limits
from wan_data.video.source_file import Rejected, open_source
from wan_data.video.windows import Window

FORMS = {
    "jpg": ("JPEG", {"quality": 95}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tif": ("TIFF", {}),
}
SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
P3 = {"red": (0.680, 0.320), "green": (0.265, 0.690), "blue": (0.150, 0.060)}


def read(path, background="#ffffff", limits=Limits()):  # noqa: B008 - immutable
    with open_source(path, limits) as file:
        return read_image(file, limits, DisplayOptions(background))


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("suffix", FORMS)
def test_exif_says_how_a_photo_is_displayed(tmp_path, suffix, orientation):
    form, more = FORMS[suffix]
    path = write_image(tmp_path / f"a.{suffix}", form, orientation=orientation, **more)
    picture = read(path)
    rgb = picture.rgb()
    assert (picture.height, picture.width) == rgb.shape[:2] == ((48, 64) if orientation < 5 else (64, 48))
    colours = [COLOURS.get(letter, 3 * (shade(0),)) for letter in SHOWN[orientation]]
    np.testing.assert_allclose(quarters(rgb), colours, atol=2)
    with Image.open(path) as image:
        np.testing.assert_array_equal(rgb, np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("orientation", [0, 9, 2**16 - 1])
def test_an_orientation_that_does_not_exist_is_upright(tmp_path, orientation):
    path = write_image(tmp_path / "a.png", "PNG", orientation=orientation)
    np.testing.assert_array_equal(read(path).rgb(), picture(0))


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_cut_image_is_refused(tmp_path, suffix, share):
    form, more = FORMS[suffix]
    with Image.open(io.BytesIO(jpeg())) as photo:
        path = write_image(tmp_path / f"a.{suffix}", form, image=photo.convert("RGB"), **more)
    data = path.read_bytes()
    read(path)
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(Rejected, match=r"decoded|damaged"):
        probe(path, Fraction(16))


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_inside_a_jpeg_is_found(tmp_path, progressive):
    path, data = tmp_path / "a.jpg", jpeg(progressive=progressive)
    path.write_bytes(data)
    read(path)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + b"\xff\xd5" + 60 * b"\xfe" + data[middle + 62 :])
    with pytest.raises(Rejected, match=r"damaged|cannot be decoded"):
        read(path)


def transparent(mode):
    """Opaque above, half transparent below on the left, transparent over another colour on the right."""
    image = np.zeros((48, 64, 4), np.uint8)
    image[:24] = (100, 100, 100, 255)
    image[24:, :32] = (100, 100, 100, 128)
    image[24:, 32:] = (30, 30, 30, 0)
    return Image.fromarray(image, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(image, "RGBA")


@pytest.mark.parametrize(("background", "behind"), [("#ffffff", (255, 255, 255)), ("#102030", (16, 32, 48))])
@pytest.mark.parametrize(("suffix", "mode"), [("png", "RGBA"), ("png", "LA"), ("webp", "RGBA"), ("tif", "RGBA")])
def test_transparent_pixels_show_the_background(tmp_path, suffix, mode, background, behind):
    form, _ = FORMS[suffix]
    path = write_image(
        tmp_path / f"a.{suffix}", form, image=transparent(mode), **({"lossless": True} if form == "WEBP" else {})
    )
    half = [(100 * 128 + 127 * part) / 255 for part in behind]
    np.testing.assert_allclose(
        quarters(read(path, background).rgb()), [(100,) * 3, (100,) * 3, half, behind], atol=0.51
    )


def test_a_transparent_entry_of_a_palette_shows_the_background(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([1, 2, 3, 200, 100, 50])
    path = write_image(tmp_path / "a.png", "PNG", image=image, transparency=1)
    assert read(path).rgb()[0, 0].tolist() == [255, 255, 255]
    path = write_image(tmp_path / "b.png", "PNG", image=Image.new("RGB", (8, 8), (9, 8, 7)), transparency=(9, 8, 7))
    assert read(path, "#010203").rgb()[0, 0].tolist() == [1, 2, 3]


def test_the_background_is_a_setting(tmp_path):
    path = write_image(tmp_path / "a.png", "PNG", image=Image.new("RGBA", (64, 48), (1, 2, 3, 0)))
    (frames,) = read_windows(
        path,
        [Window(0, 1)],
        Size(48, 64),
        fps=Fraction(16),
        resize_mode="bicubic",
        center_crop=True,
        display=DisplayOptions("#0a0b0c"),
    )
    assert frames[0, 0, 0].tolist() == [10, 11, 12]


@pytest.mark.parametrize("wrong", ["white", "#fff", "#ffffff00", ""])
def test_a_background_that_is_no_colour_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a colour as #rrggbb"):
        DisplayOptions(wrong)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_a_png_in_hdr_is_refused(tmp_path, transfer, name):
    path = write_image(tmp_path / "a.png", "PNG")
    data = path.read_bytes()
    chunk = b"cICP" + bytes([9, transfer, 0, 1])
    place = data.index(b"IDAT") - 4
    path.write_bytes(data[:place] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place:])
    with pytest.raises(Rejected, match=rf"its colours are in HDR \({name}.*convert it to standard dynamic range"):
        read(path)


def png(depth, colours, row, *chunks):
    """A PNG of one row; ``colours`` is its type (0 grey, 2 RGB, 4 grey and alpha, 6 RGBA)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width = 8 * len(row) // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[colours])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colours, 0, 0, 0))
    rest = [chunk(*one) for one in chunks] + [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(rest)


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


BEHIND = [255, 255, 255]
TRANSPARENT_COLOURS = {
    "grey of 2 bits": (png(2, 0, bytes([0b01101100]), (b"tRNS", words(1))), [BEHIND, [170] * 3, [255] * 3, [0] * 3]),
    "grey of 4 bits": (png(4, 0, bytes([0x7A]), (b"tRNS", words(7))), [BEHIND, [170] * 3]),
    "grey of 8 bits": (png(8, 0, bytes([7, 200]), (b"tRNS", words(7))), [BEHIND, [200] * 3]),
    "grey of 16 bits": (png(16, 0, words(30000, 30001), (b"tRNS", words(30000))), [BEHIND, [117] * 3]),
    "RGB of 16 bits": (
        png(16, 2, words(0x1234, 0x5678, 0x9ABC, 0x12FF, 0x56FF, 0x9AFF), (b"tRNS", words(0x1234, 0x5678, 0x9ABC))),
        [BEHIND, [19, 87, 154]],
    ),
    "no transparency": (png(16, 2, words(0x12FF, 0x56FF, 0x9AFF)), [[19, 87, 154]]),
    "alpha of 16 bits": (png(16, 6, words(0x30FF, 0x40FF, 0x20FF, 0xFFFF)), [[49, 65, 33]]),
    "grey and alpha": (png(16, 4, words(0x30FF, 0xFFFF, 0x30FF, 0)), [[49] * 3, BEHIND]),
}


@pytest.mark.parametrize("name", TRANSPARENT_COLOURS)
def test_all_bits_of_a_png_count(tmp_path, name):
    content, wanted = TRANSPARENT_COLOURS[name]
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(read(tmp_path / "a.png").rgb()[0], wanted)


COLOUR_CHUNKS = {
    "sRGB": ((b"sRGB", b"\0"), None),
    "cICP of sRGB": ((b"cICP", bytes([1, 13, 0, 1])), None),
    "cICP of P3": ((b"cICP", bytes([12, 13, 0, 1])), r"primaries 12, .*convert it"),
    "cICP of limited range": ((b"cICP", bytes([1, 13, 0, 0])), "range 0"),
    "cICP of linear light": ((b"cICP", bytes([1, 8, 0, 1])), "transfer 8"),
    "gamma of sRGB": ((b"gAMA", struct.pack(">I", 45455)), None),
    "gamma of linear light": ((b"gAMA", struct.pack(">I", 100_000)), r"gamma \(gAMA\) is 1; .*convert it"),
    "gamma of 1.8": ((b"gAMA", struct.pack(">I", 55556)), "gAMA"),
    "no gamma": ((b"gAMA", struct.pack(">I", 0)), None),
}


@pytest.mark.parametrize("name", COLOUR_CHUNKS)
def test_colours_that_a_png_states_are_those_of_srgb_or_refused(tmp_path, name):
    chunk, refused = COLOUR_CHUNKS[name]
    (tmp_path / "a.png").write_bytes(png(8, 2, bytes([10, 128, 250]), chunk))
    if refused is None:
        assert read(tmp_path / "a.png").rgb()[0, 0].tolist() == [10, 128, 250]
        return
    with pytest.raises(Rejected, match=refused):
        read(tmp_path / "a.png")


def test_a_bmp_is_read_and_a_cut_one_refused(tmp_path):
    path = write_image(tmp_path / "a.bmp", "BMP")
    assert (read(path).rgb() == picture(0)).all()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Rejected, match="cannot be decoded"):
        read(path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_of_grey_are_rounded_to_eight(tmp_path, suffix):
    levels = np.arange(256, dtype=np.uint16).repeat(4).reshape(8, 128) * 257
    image = Image.fromarray(levels)
    rgb = read(write_image(tmp_path / f"a.{suffix}", FORMS[suffix][0], image=image)).rgb()
    assert (rgb == (levels // 257)[..., None]).all()


def test_a_colour_profile_is_converted_to_srgb(tmp_path):
    """Display P3 with the gamma 2.2, by the formula; its profile is made here."""
    colours = [(200, 100, 60), (90, 160, 100), (60, 90, 180), (120, 120, 120)]
    image = Image.fromarray(np.array(colours, np.uint8).repeat(8, 0).reshape(4, 8, 3).copy())
    path = write_image(tmp_path / "a.png", "PNG", image=image, icc_profile=profile_of(2.2, P3))
    linear = (np.linalg.inv(SRGB_TO_XYZ) @ to_xyz(P3) @ (np.array(colours).T / 255) ** 2.2).clip(0, 1).T
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    np.testing.assert_allclose(read(path).rgb()[:, 0], srgb, atol=2)


def test_a_damaged_profile_is_ignored(tmp_path):
    path = write_image(tmp_path / "a.png", "PNG", icc_profile=b"no profile")
    np.testing.assert_array_equal(read(path).rgb(), picture(0))


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_inks_become_colours(tmp_path, form):
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    path = write_image(tmp_path / f"a.{form[:3].lower().replace('jpe', 'jpg')}", form, image=image)
    red, green, blue = read(path).rgb()[8, 8].tolist()
    assert red < 20
    assert green > 235
    assert blue > 235


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_no_image(tmp_path, form):
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (10, 200)]
    path = write_image(tmp_path / f"a.{form.lower()}", form, image=frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(Rejected, match="an animation of 2 pictures"):
        read(path)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image" * 100)
    with pytest.raises(Rejected, match="cannot be decoded: its content is no image that is read"):
        read(tmp_path / "a.png")
    write_image(tmp_path / "b.tif", "TIFF", image=Image.new("F", (4, 4), 0.5))
    with pytest.raises(Rejected, match="only images of 8 or 16 bits are read"):
        read(tmp_path / "b.tif")


def test_an_image_that_is_too_large_is_refused_before_it_is_decoded(tmp_path):
    path = write_image(tmp_path / "a.png", "PNG", image=Image.new("1", (20_000, 20_000)))
    with pytest.raises(Rejected, match=r"20000 x 20000 pixels; at most .*--max-source-pixels"):
        read(path)
