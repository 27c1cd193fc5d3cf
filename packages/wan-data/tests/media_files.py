"""Small media files with known content, for the tests of reading, and what FFmpeg's command shows of them.

Every picture has four quarters: red, green and blue, and a grey whose shade is the number of the frame.
"""

import io
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageCms

HEIGHT, WIDTH = 48, 64
RATE = 16
COLOURS = {"R": (200, 40, 40), "G": (40, 180, 60), "B": (50, 60, 190), "W": (255, 255, 255)}
EXACT = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"


def shade(index: int) -> int:
    return 40 + 8 * index


def picture(index: int) -> np.ndarray:
    image = np.full((HEIGHT, WIDTH, 3), shade(index), np.uint8)
    top, left = HEIGHT // 2, WIDTH // 2
    image[:top, :left], image[:top, left:], image[top:, :left] = COLOURS["R"], COLOURS["G"], COLOURS["B"]
    return image


def quarters(image: np.ndarray) -> np.ndarray:
    """Mean colours of the middles of the quarters: upper left, upper right, lower left, lower right."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    inner = [
        image[top + height // 4 : top + 3 * height // 4, left + width // 4 : left + 3 * width // 4]
        for top in (0, height)
        for left in (0, width)
    ]
    return np.stack([part.reshape(-1, 3).mean(0) for part in inner])


def write_video(
    path: Path,
    codec: str,
    *,
    frames: int = 12,
    times: Sequence[int] | None = None,
    stored: str = "yuv420p",
    options: dict[str, str] | None = None,
    form: str | None = None,
    aspect: Fraction | None = None,
    tags: dict[str, int] | None = None,
    images: Sequence[np.ndarray] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Path:
    """A video of ``picture(0)``, ``picture(1)``, ... at times in 1/16 seconds; ``tags`` are those of its colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=form, options={"fflags": "bitexact"}) as container:
        stream = container.add_stream(codec, rate=RATE, options=options or {})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, stored
        stream.bit_rate = 4_000_000
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if prepare is not None:
            prepare(stream)
        for index, image in enumerate(images if images is not None else map(picture, range(frames))):
            frame = as_frame(image, stored, tags)
            frame.pts, frame.time_base = index if times is None else times[index], Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def as_frame(image: np.ndarray, stored: str, tags: dict[str, int] | None) -> Any:
    if image.shape[2] == 4:
        return av.VideoFrame.from_ndarray(image, format="rgba").reformat(format=stored)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    # The numbers of libswscale: of BT.709 1, BT.601 5, SMPTE 240M 7, BT.2020 9; of limited range 1, of full range 2.
    matrix = {1: 1, 7: 7, 9: 9}.get((tags or {}).get("colorspace", 6), 5)
    full = (tags or {}).get("color_range", 2 if stored.startswith("yuvj") else 1)
    return frame.reformat(
        format=stored, dst_colorspace=matrix, dst_color_range=full, interpolation=4 | 0x40000 | 0x2000 | 0x4000
    )


# -- oddities of mp4 --------------------------------------------------------------------------------------------------

MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
# The letters of the quarters for each of EXIF's orientations; the grey one is "-".
SHOWN = {1: "RGB-", 2: "GR-B", 3: "-BGR", 4: "B-RG", 5: "RBG-", 6: "BR-G", 7: "-GBR", 8: "G-RB"}


def with_matrix(path: Path, matrix: Sequence[float]) -> Path:
    """Another display matrix [a b; c d] in the header of the video track."""
    data = path.read_bytes()
    upright = struct.pack(">9I", 65536, 0, 0, 0, 65536, 0, 0, 0, 0x40000000)
    place = data.index(upright, data.index(b"tkhd"))
    a, b, c, d = (round(65536 * value) for value in matrix)
    path.write_bytes(data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000) + data[place + 36 :])
    return path


def with_edit(path: Path, first: int, frames: int) -> Path:
    """An edit list that shows ``frames`` frames from number ``first`` on, as a trim without encoding writes."""
    data = path.read_bytes()
    place = data.index(b"elst")
    version, count, _, start = struct.unpack(">IIII", data[place + 4 : place + 20])
    assert (version, count) == (0, 1)
    scale = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    movie = struct.unpack(">I", data[data.index(b"mvhd") + 16 : data.index(b"mvhd") + 20])[0]
    edited = struct.pack(">II", frames * movie // RATE, start + first * scale // RATE)
    path.write_bytes(data[: place + 12] + edited + data[place + 20 :])
    return path


def with_edits(path: Path, edits: Sequence[tuple[int | None, int]]) -> Path:
    """An edit list of several entries: each shows so many frames from a number on, or nothing (None) for that time."""
    data = path.read_bytes()
    assert data.index(b"mdat") < data.index(b"moov"), "no offset of the samples changes"
    place = data.index(b"elst") - 4
    (size,) = struct.unpack(">I", data[place : place + 4])
    (start,) = struct.unpack(">i", data[place + 20 : place + 24])
    scale = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    movie = struct.unpack(">I", data[data.index(b"mvhd") + 16 : data.index(b"mvhd") + 20])[0]
    body = b"".join(
        struct.pack(">IiI", frames * movie // RATE, -1 if first is None else start + first * scale // RATE, 65536)
        for first, frames in edits
    )
    box = struct.pack(">I4sII", 16 + len(body), b"elst", 0, len(edits)) + body
    out = bytearray(data[:place] + box + data[place + size :])
    for name in (b"edts", b"trak", b"moov"):
        parent = out.index(name) - 4
        (old,) = struct.unpack(">I", out[parent : parent + 4])
        out[parent : parent + 4] = struct.pack(">I", old + len(box) - size)
    path.write_bytes(out)
    return path


def joined(path: Path, other: Path) -> Path:
    """The bytes of another file behind those of a file, as recordings are joined."""
    path.write_bytes(path.read_bytes() + other.read_bytes())
    return path


def with_damage(path: Path, content: bytes, number: int = 3) -> Path:
    """Other content in the middle of a packet."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = places[number]
    middle, length = position + size // 2, min(70, size // 3)
    data = bytearray(path.read_bytes())
    data[middle : middle + length] = (content * length)[:length]
    path.write_bytes(data)
    return path


def twice(path: Path) -> Path:
    path.write_bytes(2 * path.read_bytes())
    return path


def without_packets(path: Path, first: int, count: int, size: int = 188) -> Path:
    """A transport stream in which packets are missing."""
    data = path.read_bytes()
    path.write_bytes(data[: first * size] + data[(first + count) * size :])
    return path


# -- images -----------------------------------------------------------------------------------------------------------


def write_image(path: Path, form: str, *, orientation: int | None = None, image: Any = None, **more: Any) -> Path:
    image = Image.fromarray(picture(0)) if image is None else image
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        more["exif"] = exif.tobytes() if form != "TIFF" else exif
    image.save(path, form, **more)
    return path


def write_exif_video(path: Path, orientation: int, frames: int = 3) -> Path:
    """A Motion JPEG whose pictures state an orientation, as some cameras write it."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(picture(0)).save(out, "JPEG", quality=95, exif=exif.tobytes())
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        for index in range(frames):
            packet = av.Packet(out.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, RATE), True
            packet.pts = packet.dts = index
            container.mux(packet)
    return path


def write_two_videos(path: Path, *, cover: bool = False) -> Path:
    """The video behind a smaller one of another colour; with ``cover`` behind a larger picture that is a cover."""
    height, width = (4 * HEIGHT, 4 * WIDTH) if cover else (HEIGHT // 2, WIDTH // 2)
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:
        other = container.add_stream("mjpeg", rate=RATE)
        other.height, other.width, other.pix_fmt = height, width, "yuvj420p"
        other.disposition = Disposition.attached_pic if cover else Disposition(0)
        video = container.add_stream("libx264", rate=RATE, options={"crf": "4", "preset": "fast"})
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        video.disposition = Disposition(0) if cover else Disposition.default
        for index in range(12):
            if index == 0 or not cover:
                container.mux(other.encode(_at(index, np.full((height, width, 3), 99, np.uint8), "yuvj420p")))
            container.mux(video.encode(_at(index, picture(index), "yuv420p")))
        container.mux(other.encode())
        container.mux(video.encode())
    return path


def write_with_cover(path: Path) -> Path:
    return write_two_videos(path, cover=True)


def _at(index: int, image: np.ndarray, stored: str) -> Any:
    frame = as_frame(image, stored, None)
    frame.pts, frame.time_base = index, Fraction(1, RATE)
    return frame


def jpeg(size: tuple[int, int] = (96, 128), **more: Any) -> bytes:
    """A photograph's bytes, more or less."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    grain = np.random.default_rng(0).normal(0, 8, (*size, 3))
    waves = [np.sin(columns / 9 + rows / 17), np.cos(rows / 8), columns / size[1] - 0.5]
    out = io.BytesIO()
    Image.fromarray((128 + 80 * np.stack(waves, -1) + grain).clip(0, 255).astype(np.uint8)).save(
        out, "JPEG", quality=90, **more
    )
    return out.getvalue()


def to_xyz(primaries: dict[str, tuple[float, float]]) -> np.ndarray:
    """The matrix from linear red, green and blue to XYZ, white D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries.values()]).T
    return columns * np.linalg.solve(columns, [0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])


def profile_of(gamma: float, primaries: dict[str, tuple[float, float]]) -> bytes:
    """A minimal colour profile (ICC 2.4, display, RGB to XYZ) of a gamma and of primaries, white D65."""
    columns, white = to_xyz(primaries), np.array([0.9642, 1.0, 0.8249])
    # Profiles are relative to D50: Bradford's adaptation.
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gains = (cones @ white) / (cones @ columns.sum(1))
    columns = np.linalg.inv(cones) @ np.diag(gains) @ cones @ columns

    def xyz(values: Sequence[float]) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(65536 * value)) for value in values)

    text = b"a profile\0"
    bodies = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78), b"wtpt": xyz(white)}
    bodies |= {name: xyz(columns[:, number]) for number, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))
    bodies |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    bodies[b"cprt"] = b"text" + bytes(4) + b"none\0"
    table, data, place = b"", b"", 128 + 4 + 12 * len(bodies)
    for name, body in bodies.items():
        padded = body + bytes(-len(body) % 4)
        table += name + struct.pack(">II", place + len(data), len(body))
        data += padded
    rest = struct.pack(">I", len(bodies)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(rest), b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(65536 * value) for value in white))
    profile = head + bytes(128 - len(head)) + rest
    ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return profile


# -- the reference: FFmpeg --------------------------------------------------------------------------------------------

FFMPEG = shutil.which("ffmpeg")


def shown_by_ffmpeg(path: Path) -> tuple[np.ndarray, list[Fraction]] | None:
    """The frames and their times, in seconds from the first, that FFmpeg's command shows; None if it crashes."""
    work = path.with_suffix(".reference")
    work.mkdir()
    assert FFMPEG is not None
    convert = ["-fps_mode", "passthrough", "-enc_time_base", "demux", "-pix_fmt", "rgb24"]
    command = [FFMPEG, "-v", "error", "-nostdin", "-i", f"file:{path}"]
    command += [*convert, "-sws_flags", EXACT, "-f", "rawvideo", str(work / "pixels")]
    command += [*convert, "-sws_flags", EXACT, "-f", "framecrc", str(work / "times")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:  # some static builds do, on every transport stream
        return None
    assert (work / "times").is_file(), done.stderr
    lines = (work / "times").read_text().splitlines()
    head = dict(line[1:].split(" 0: ") for line in lines if line.startswith("#") and " 0: " in line)
    width, height = map(int, head["dimensions"].split("x"))
    times = [int(line.split(",")[2]) * Fraction(head["tb"]) for line in lines if not line.startswith("#")]
    pixels = np.frombuffer((work / "pixels").read_bytes(), np.uint8).reshape(-1, height, width, 3)
    return pixels, [time - times[0] for time in times]
