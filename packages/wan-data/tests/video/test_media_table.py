"""Containers, codecs and oddities: each file is made here and must be read as a player shows it, or be refused.

What is right is written beside each file. Where FFmpeg's command is installed, its frames and times are compared too,
pixel by pixel.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from av.stream import Disposition
from media_files import (
    COLOURS,
    FFMPEG,
    HEIGHT,
    MATRICES,
    RATE,
    SHOWN,
    WIDTH,
    joined,
    quarters,
    shade,
    shown_by_ffmpeg,
    twice,
    with_damage,
    with_edit,
    with_edits,
    with_matrix,
    without_packets,
    write_exif_video,
    write_two_videos,
    write_video,
    write_with_cover,
)

from wan_data.video.containers.video_reader import VideoReader, _shown_stream
from wan_data.video.decode import probe
from wan_data.video.display.options import DisplayOptions
from wan_data.video.limits import Limits
from wan_data.video.source_file import Rejected, open_source

FULL, LIMITED = 2, 1
PLAIN_DISPLAY = DisplayOptions()
H264 = {"crf": "4", "preset": "fast"}
B_FRAMES = {**H264, "bf": "3", "b_strategy": "0", "g": "12"}
MPEG_B = {"bf": "2", "g": "12", "qmin": "1", "qmax": "3"}
HDR10 = {"colorspace": 9, "color_range": LIMITED, "color_trc": 16, "color_primaries": 9}
HLG = {**HDR10, "color_trc": 18}
BT709 = {"colorspace": 1, "color_range": LIMITED}
# Video of standard dynamic range is shown by its values, whichever of these curves it states.
SDR_TRANSFERS = {"BT.709": 1, "gamma 2.2": 4, "gamma 2.8": 5, "BT.601": 6, "240M": 7, "sRGB": 13, "BT.2020": 14}
TRIMMED = 24  # frames of the clips that an edit list shortens


@dataclasses.dataclass(frozen=True)
class Cell:
    """A file, and what is to be seen.

    Attributes:
        name: container, codec and oddity.
        make: writes the file.
        shades: numbers of the frames that are shown.
        times: their times in 1/16 seconds from the first; one after another if None.
        shown: the letters of the quarters (``SHOWN``).
        size: height and width in square pixels.
        refused: a pattern of the sentence with which the file is refused.
        tolerance: levels by which mean colours may differ; codecs are not lossless.
        ffmpeg_tolerance: levels by which the mean of FFmpeg's command may differ; 0 where it shows something else.
        still: the limit of seconds that a frame is displayed.
    """

    name: str
    make: Callable[[Path], Any]
    shades: Sequence[int] = range(12)
    times: Sequence[int] | None = None
    shown: str = SHOWN[1]
    size: tuple[float, float] = (HEIGHT, WIDTH)
    refused: str | None = None
    tolerance: float = 4.0
    ffmpeg_tolerance: float = 0.1
    still: int = 60


def video(codec: str, *after: Callable[[Path], Any], **more: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        write_video(path, codec, **more)
        for change in after:
            change(path)
        return path

    return make


def h264(*after: Callable[[Path], Any], options: dict[str, str] = H264, **more: Any) -> Callable[[Path], Path]:
    return video("libx264", *after, options=options, **more)


def trimmed(codec: str, options: dict[str, str], first: int, frames: int) -> Callable[[Path], Path]:
    return video(codec, lambda path: with_edit(path, first, frames), options=options, frames=TRIMMED)


def edited(*edits: tuple[int | None, int]) -> Callable[[Path], Path]:
    return h264(lambda path: with_edits(path, edits), options={**B_FRAMES, "g": "6"}, frames=TRIMMED)


def aspects(codec: str, one: Fraction, other: Fraction, **more: Any) -> Callable[[Path], Path]:
    """A recording in which the shape of pixels changes."""

    def make(path: Path) -> Path:
        write_video(path, codec, aspect=one, **more)
        return joined(path, write_video(path.with_name(f"other{path.suffix}"), codec, aspect=other, **more))

    return make


def oriented(number: int, **more: Any) -> Callable[[Path], Path]:
    return h264(lambda path: with_matrix(path, MATRICES[number]), **more)


def with_transparency(codec: str, stored: str, **more: Any) -> Callable[[Path], Path]:
    images = []
    for index in range(3):
        image = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
        image[..., :3] = (200, 40, 40)  # what is hidden
        image[: HEIGHT // 2, : WIDTH // 2] = (*COLOURS["R"], 255)
        image[: HEIGHT // 2, WIDTH // 2 :] = (*COLOURS["G"], 255)
        image[HEIGHT // 2 :, WIDTH // 2 :] = (*(3 * (shade(index),)), 255)
        images.append(image)
    return video(codec, stored=stored, images=images, **more)


def dropped(codec: str, **more: Any) -> Callable[[Path], Path]:
    """AVI has an empty chunk for each frame that was dropped."""
    return video(codec, times=[*range(5), *range(12, 19)], **more)


def damaged_picture(suffix_of_data: bytes) -> Callable[[Path], None]:
    """Zeros over the middle of the fourth JPEG of the file."""

    def damage(path: Path) -> None:
        data, place = bytearray(path.read_bytes()), -1
        for _ in range(4):
            place = data.index(b"\xff\xd8\xff", place + 1)
        scan = data.index(b"\xff\xda", place)
        data[scan + 60 : scan + 130] = suffix_of_data * 35
        path.write_bytes(data)

    return damage


GAP = [0, 1, 2, 3, 4, 12, 13, 14, 15, 16, 17, 18]
UNEVEN = [0, 1, 4, 5, 9, 10, 11, 16, 20, 21, 22, 30]
EQUAL = [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
MINUTES = [0, 1, 2, 3, *range(80 * RATE, 80 * RATE + 8)]
MATRIX_AND_RANGE = {"bt601": 6, "bt709": 1, "bt2020": 9}

PLAIN = [
    Cell("mp4 h264", h264()),
    Cell("mp4 hevc", video("libx265", options={"x265-params": "log-level=none:crf=4"})),
    Cell("mp4 mpeg4", video("mpeg4")),
    Cell("mp4 vp9", video("libvpx-vp9", options={"crf": "4", "cpu-used": "8"})),
    Cell("m4v mpeg4", video("mpeg4", form="mp4")),
    Cell("mov qtrle", video("qtrle", stored="rgb24"), tolerance=0.1),
    Cell("mov mjpeg", video("mjpeg", stored="yuvj420p", options={"q": "2"})),
    Cell("mov prores", video("prores", stored="yuv422p10le")),
    Cell("mov png", video("png", stored="rgb24"), tolerance=0.1),
    Cell("3gp mpeg4", video("mpeg4")),
    Cell("mkv h264", h264()),
    Cell("mkv ffv1", video("ffv1", stored="yuv444p"), tolerance=1.0),
    Cell("mkv ffv1 16 bits", video("ffv1", stored="gbrp16le"), tolerance=1.0, ffmpeg_tolerance=0.5),
    Cell("mkv mpeg2video", video("mpeg2video")),
    Cell("webm vp8", video("libvpx", options={"crf": "4"})),
    Cell("ogv vp8", video("libvpx", form="ogg", options={"crf": "4"})),
    Cell("webm vp9", video("libvpx-vp9", options={"crf": "4", "cpu-used": "8"})),
    Cell("avi mpeg4", video("mpeg4")),
    Cell("avi h264", h264()),
    Cell("avi mjpeg", video("mjpeg", stored="yuvj420p")),
    Cell("avi huffyuv", video("huffyuv", stored="rgb24"), tolerance=0.1),
    Cell("mpg mpeg2video", video("mpeg2video")),
    Cell("mpg mpeg2video without a container", video("mpeg2video", form="mpeg2video")),
    Cell("vob mpeg2video", video("mpeg2video", form="vob")),
    Cell("ts h264", h264()),
    Cell("ts mpeg2video", video("mpeg2video")),
    Cell("m2ts h264", h264(form="mpegts")),
    Cell("mts h264", h264(form="mpegts")),
    Cell("flv flv1", video("flv")),
    Cell("flv h264", h264()),
    Cell("wmv wmv2", video("wmv2")),
    Cell("gif gif", video("gif", stored="bgr8"), tolerance=40),
]
TIMES = [
    Cell("mp4 h264 b-frames", h264(options=B_FRAMES)),
    Cell("mkv h264 b-frames", h264(options=B_FRAMES)),
    Cell("ts h264 b-frames", h264(options=B_FRAMES)),
    Cell("flv h264 b-frames", h264(options=B_FRAMES)),
    Cell("avi h264 b-frames", h264(options=B_FRAMES)),
    Cell("avi mpeg4 b-frames", video("mpeg4", options=MPEG_B)),
    Cell("vob mpeg2video b-frames", video("mpeg2video", form="vob", options=MPEG_B)),
    Cell("mkv ffv1 uneven", video("ffv1", stored="yuv444p", times=UNEVEN), times=UNEVEN),
    Cell("mp4 h264 uneven", h264(times=UNEVEN, options=B_FRAMES), times=UNEVEN),
    Cell("webm vp9 uneven", video("libvpx-vp9", times=UNEVEN, options={"cpu-used": "8"}), times=UNEVEN),
    Cell("mpg mpeg2video b-frames without times", video("mpeg2video", form="mpeg2video", options=MPEG_B)),
    Cell(
        "mkv ffv1 frames of one time", video("ffv1", stored="yuv444p", times=EQUAL), times=EQUAL, ffmpeg_tolerance=0.0
    ),
    Cell("avi mpeg4 dropped", dropped("mpeg4"), times=GAP),
    Cell("avi mjpeg dropped", dropped("mjpeg", stored="yuvj420p"), times=GAP),
    Cell("avi h264 dropped", dropped("libx264", options={**H264, "bf": "0"}), times=GAP),
    Cell("mkv ffv1 still", video("ffv1", times=MINUTES), refused=r"stays for 80 s.*--max-source-still"),
    Cell("mkv ffv1 still allowed", video("ffv1", times=MINUTES), times=MINUTES, still=90),
    Cell("mp4 h264 still", h264(times=MINUTES), refused=r"stays for 80 s.*--max-source-still"),
    Cell("mp4 h264 still allowed", h264(times=MINUTES), times=MINUTES, still=80),
]
EDITS = [
    Cell("mp4 h264 edit at the end", trimmed("libx264", {**B_FRAMES, "g": "6"}, 0, 9), shades=range(9)),
    Cell("mp4 h264 edit at the start", trimmed("libx264", {**B_FRAMES, "g": "6"}, 8, 16), shades=range(8, 24)),
    Cell("mp4 h264 edit at both", trimmed("libx264", {**B_FRAMES, "g": "6"}, 7, 8), shades=range(7, 15)),
    Cell("mp4 h264 delayed by an empty edit", edited((None, 8), (0, 24)), shades=range(24)),
    Cell("mp4 h264 two edits", edited((0, 6), (12, 6)), shades=[*range(6), *range(12, 18)]),
    Cell("mov h264 edits in another order", edited((12, 6), (0, 6)), shades=[*range(12, 18), *range(6)]),
    Cell("mp4 h264 an edit repeated", edited((0, 6), (0, 6)), shades=[*range(6), *range(6)]),
    Cell("mp4 mpeg4 edit at the end", trimmed("mpeg4", {"g": "6"}, 0, 9), shades=range(9)),
    Cell("mov h264 edit at both", trimmed("libx264", {**B_FRAMES, "g": "6"}, 7, 8), shades=range(7, 15)),
    Cell("mov mjpeg edit at both", trimmed("mjpeg", {"strict": "unofficial"}, 7, 8), shades=range(7, 15)),
]
JOINS = [
    Cell("ts h264 joined", h264(twice), shades=[*range(12), *range(12)]),
    Cell("ts h264 b-frames joined", h264(twice, options=B_FRAMES), shades=[*range(12), *range(12)]),
    Cell("ts mpeg2video joined", video("mpeg2video", twice), shades=[*range(12), *range(12)]),
    Cell("m2ts h264 joined", h264(twice, form="mpegts", options=B_FRAMES), shades=[*range(12), *range(12)]),
    Cell("vob mpeg2video joined", video("mpeg2video", twice, form="vob"), shades=[*range(12), *range(12)]),
    # Packets 3 to 8 are the first frame; the last of them is followed by the begin of the next.
    Cell("ts h264 damaged inside a frame", h264(lambda path: without_packets(path, 5, 1)), refused="damaged"),
    Cell("ts h264 damaged at the end of a frame", h264(lambda path: without_packets(path, 8, 1)), refused="damaged"),
    Cell("ts h264 a packet lost", h264(lambda path: without_packets(path, 12, 1)), refused="damaged|cannot be decoded"),
    Cell("ts h264 packets lost", h264(lambda path: without_packets(path, 9, 9)), refused="damaged|cannot be decoded"),
]
ORIENTATIONS = [
    Cell(
        f"{suffix} h264 orientation {number}",
        oriented(number),
        shown=SHOWN[number],
        size=(HEIGHT, WIDTH) if number < 5 else (WIDTH, HEIGHT),
    )
    for suffix in ("mp4", "mov")
    for number in MATRICES
]
ORIENTATIONS += [
    Cell(
        f"{suffix} mjpeg exif {number}",
        functools.partial(write_exif_video, orientation=number),
        shades=[0, 0, 0],
        shown=SHOWN[number],
        size=(HEIGHT, WIDTH) if number < 5 else (WIDTH, HEIGHT),
    )
    for suffix in ("mov", "avi")
    for number in MATRICES
]
ORIENTATIONS += [
    Cell(
        "mp4 h264 turned by 45 degrees", h264(lambda p: with_matrix(p, (0.7, 0.7, -0.7, 0.7))), refused="not of a rot"
    ),
    Cell("mp4 h264 scaled matrix", h264(lambda p: with_matrix(p, (-0.5, 0, 0, 0.5))), shown=SHOWN[2]),
    Cell("mp4 h264 matrix of zeros", h264(lambda p: with_matrix(p, (0, 0, 0, 0)))),
]
ASPECTS = [
    Cell("mp4 h264 pixels 2:1", h264(aspect=Fraction(2)), size=(HEIGHT, 2 * WIDTH)),
    Cell("mkv h264 pixels 1:2", h264(aspect=Fraction(1, 2)), size=(HEIGHT, WIDTH / 2)),
    Cell("ts h264 pixels 2:1", h264(aspect=Fraction(2)), size=(HEIGHT, 2 * WIDTH)),
    Cell("mov qtrle pixels 4:3", video("qtrle", stored="rgb24", aspect=Fraction(4, 3)), size=(HEIGHT, WIDTH * 4 / 3)),
    *(
        Cell(f"{suffix} {codec} pixels of {one} and {other}", aspects(codec, one, other, **more), refused="shape")
        for suffix, codec, more in (("ts", "libx264", {}), ("vob", "mpeg2video", {"form": "vob"}))
        for one, other in ((Fraction(1), Fraction(4, 3)), (Fraction(4, 3), Fraction(1)))
    ),
    *(
        Cell(f"mov qtrle pixels {wide}", video("qtrle", stored="rgb24", aspect=wide), refused="times as wide as high")
        for wide in (Fraction(17), Fraction(1, 17))
    ),
    Cell("mp4 h264 pixels 2:1 turned", oriented(6, aspect=Fraction(2)), shown=SHOWN[6], size=(2 * WIDTH, HEIGHT)),
]
COLOUR_TAGS = [
    Cell(
        f"mkv ffv1 {stored} {matrix} {'full' if full == FULL else 'limited'}",
        video("ffv1", stored=stored, tags={"colorspace": number, "color_range": full}),
        tolerance=2.1,
        # Its conversion from full range is 0.4 levels too bright where more than 8 bits are stored.
        ffmpeg_tolerance=0.5 if full == FULL else 0.1,
    )
    for stored in ("yuv420p", "yuv444p10le")
    for matrix, number in MATRIX_AND_RANGE.items()
    for full in (LIMITED, FULL)
]
COLOUR_TAGS += [
    Cell("mp4 h264 bt709 limited", h264(tags={"colorspace": 1, "color_range": LIMITED})),
    Cell("mp4 h264 bt709 full", h264(stored="yuvj420p", tags={"colorspace": 1, "color_range": FULL})),
    Cell("webm vp9 bt709", video("libvpx-vp9", options={"cpu-used": "8"}, tags={"colorspace": 1, "color_range": 1})),
    Cell("mkv ffv1 SMPTE 240M", video("ffv1", stored="yuv444p", tags={"colorspace": 7}), tolerance=2.1),
    *(
        Cell(f"mkv ffv1 transfer {name}", video("ffv1", tags={**BT709, "color_trc": number}), tolerance=2.1)
        for name, number in SDR_TRANSFERS.items()
    ),
    Cell("mkv ffv1 YCgCo", video("ffv1", tags={"colorspace": 8}), refused="matrix coefficients are number 8"),
    Cell("mkv ffv1 linear light", video("ffv1", tags={"color_trc": 8}), refused="linear light"),
    Cell("mkv ffv1 no tags", video("ffv1"), tolerance=1.0),
    Cell("mkv ffv1 PQ", video("ffv1", stored="yuv420p10le", tags=HDR10), refused=r"HDR \(PQ"),
    Cell("mkv ffv1 HLG", video("ffv1", stored="yuv420p10le", tags=HLG), refused=r"HDR \(HLG"),
    Cell("mp4 h264 PQ", h264(stored="yuv420p10le", tags=HDR10), refused=r"HDR \(PQ"),
    Cell("webm vp9 HLG", video("libvpx-vp9", tags=HLG), refused=r"HDR \(HLG"),
]
ALPHA: dict[str, Any] = {"shades": range(3), "shown": "RGW-", "ffmpeg_tolerance": 0.0}
TRANSPARENCY = [
    Cell("mov qtrle alpha", with_transparency("qtrle", "argb"), tolerance=0.1, **ALPHA),
    Cell("mov png alpha", with_transparency("png", "rgba"), tolerance=0.1, **ALPHA),
    Cell("mkv ffv1 alpha", with_transparency("ffv1", "bgra"), tolerance=0.1, **ALPHA),
    Cell("mkv ffv1 alpha 4:2:0", with_transparency("ffv1", "yuva420p"), **ALPHA),
    Cell("mov prores alpha", with_transparency("prores_ks", "yuva444p10le"), tolerance=6, **ALPHA),
    Cell("webm vp9 alpha", with_transparency("libvpx-vp9", "yuva420p", options={"auto-alt-ref": "0"}), **ALPHA),
    Cell("webm vp8 alpha", with_transparency("libvpx", "yuva420p", options={"auto-alt-ref": "0"}), **ALPHA),
]
NOISE = np.random.default_rng(0).integers(64, 192, (6, HEIGHT, WIDTH, 3)).astype(np.uint8)
DAMAGE = [
    Cell(
        f"{suffix} mjpeg damaged by {data.hex()}",
        video("mjpeg", damaged_picture(data), stored="yuvj420p"),
        refused="damaged|cannot be decoded",
    )
    for suffix in ("avi", "mov", "mkv")
    for data in (b"\x00\x00", b"\xff\xd5")
]
CHECKED = {"level": "3", "slicecrc": "1"}
DAMAGE += [
    Cell(
        f"{suffix} {codec} damaged by {data.hex()}",
        video(codec, functools.partial(with_damage, content=data), stored=stored, images=NOISE, options=options),
        refused="damaged|cannot be decoded",
    )
    for suffix, codec, stored, options in (
        ("mov", "png", "rgb24", {}),
        ("mov", "prores", "yuv422p10le", {}),
        ("mov", "cfhd", "yuv422p10le", {}),
        ("mkv", "ffv1", "yuv444p", CHECKED),
    )
    for data in (b"\x00", b"\xff\xd5", b"\x37\xa1\x5c")
]
DAMAGE += [
    Cell(
        "mkv ffv1 damaged at the start",
        video(
            "ffv1",
            functools.partial(with_damage, content=b"\x00", number=0),
            stored="yuv444p",
            images=NOISE,
            options=CHECKED,
        ),
        refused="damaged after frame 0",
    ),
    Cell("mkv ffv1 checksums", video("ffv1", stored="yuv444p", options={**CHECKED, "slices": "4"}), tolerance=1.0),
]
STREAMS = [Cell("mp4 h264 with a cover", write_with_cover)]
STREAMS += [Cell(f"{suffix} h264 behind a smaller video", write_two_videos) for suffix in ("mp4", "mkv", "mov")]
CELLS = [*STREAMS, *PLAIN, *TIMES, *EDITS, *JOINS, *ORIENTATIONS, *ASPECTS, *COLOUR_TAGS, *TRANSPARENCY, *DAMAGE]


def read(
    path: Path, still: int = 60, display: DisplayOptions = PLAIN_DISPLAY
) -> tuple[list[Fraction], list[np.ndarray], list[tuple[float, float]]]:
    with open_source(path, Limits()) as file:
        frames = list(VideoReader(file, Limits(still=still), display, lambda decoded: None).frames())
    first = frames[0].time
    sizes = [(frame.image.height, frame.image.width) for frame in frames]
    return [frame.time - first for frame in frames], [frame.image.rgb() for frame in frames], sizes


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_file_is_read_as_it_is_displayed(cell, tmp_path):
    path = tmp_path / f"a.{cell.name.split()[0]}"
    cell.make(path)
    if cell.refused is not None:
        with pytest.raises(Rejected, match=cell.refused):
            probe(path, Fraction(RATE))
        return
    assert probe(path, Fraction(RATE), limits=Limits(still=cell.still)).source_frames == len(cell.shades)
    times, images, sizes = read(path)
    wanted = range(len(cell.shades)) if cell.times is None else cell.times
    # Matroska and Flash round to milliseconds, GIF to hundredths.
    rounded = 0.0051 if path.suffix == ".gif" else 0.0011
    assert [float(time) for time in times] == pytest.approx([time / RATE for time in wanted], abs=rounded)
    assert all(size == pytest.approx(cell.size) for size in sizes)
    for index, image in zip(cell.shades, images, strict=True):
        colours = [COLOURS.get(letter, 3 * (shade(index),)) for letter in cell.shown]
        np.testing.assert_allclose(quarters(image), colours, atol=cell.tolerance)
    if FFMPEG is not None and cell.ffmpeg_tolerance > 0 and (by_ffmpeg := shown_by_ffmpeg(path)) is not None:
        expected, expected_times = by_ffmpeg
        assert [float(time) for time in times] == pytest.approx([float(time) for time in expected_times], abs=0.0011)
        difference = np.stack(images).astype(int) - expected
        # Its scale filter takes the colour samples of 4:2:0 for centred, whatever the file states; that shows at edges.
        rows, columns = (np.abs(np.arange(side) - side / 2 + 0.5) > 6 for side in expected.shape[1:3])
        difference = difference[:, rows][:, :, columns]
        assert np.abs(difference).max() <= 3
        assert abs(difference.mean()) < cell.ffmpeg_tolerance


def test_transparent_pixels_of_a_video_show_the_background(tmp_path):
    path = with_transparency("qtrle", "argb")(tmp_path / "a.mov")
    _, images, _ = read(path, display=DisplayOptions("#0a6414"))
    for index, image in enumerate(images):
        colours = [COLOURS["R"], COLOURS["G"], (10, 100, 20), 3 * (shade(index),)]
        np.testing.assert_allclose(quarters(image), colours, atol=0.1)


def test_a_cover_is_not_the_video():
    def stream(side, disposition):
        return types.SimpleNamespace(
            disposition=disposition, codec_context=types.SimpleNamespace(width=side, height=side)
        )

    cover, video = stream(4000, Disposition.attached_pic | Disposition.default), stream(64, Disposition(0))
    unknown = types.SimpleNamespace(disposition=Disposition.default, codec_context=None)
    container = types.SimpleNamespace(streams=types.SimpleNamespace(video=[cover, unknown, video]))
    assert _shown_stream(container) is video
    container.streams.video = [unknown]
    with pytest.raises(Rejected, match="no decoder for its video"):
        _shown_stream(container)
