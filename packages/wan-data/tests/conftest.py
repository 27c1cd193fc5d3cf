"""What the tests share: shapes checked at run time, tiny clips written on the spot, a tiny model, one small dataset."""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping

# Before the first import of wan_data: the annotated functions of these modules check shapes and types under pytest.
# Modules with subclasses of Energon's classes are left out, because beartype warns about Energon's own annotations.
_CHECKED = (
    *("prepare.captions", "prepare.encoding", "reading.packing", "shards.serialization", "shards.writer"),
    *("video.buckets", "video.decode", "video.windows"),
)
jaxtyping.install_import_hook([f"wan_data.{module}" for module in _CHECKED], "beartype.beartype")

import av  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from wan_data.prepare.settings import PrepareSettings  # noqa: E402

torch.set_num_threads(1)
# Machines differ in speed and tests run side by side: a slow example is no failure, and the examples are the same.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

SMALL: dict[str, Any] = {"areas": (32 * 48,), "frames": 9, "min_frames": 5, "samples_per_shard": 3}


def write_clip(
    path: Path,
    shades: Sequence[int],
    *,
    size: tuple[int, int] = (48, 64),
    rate: int = 16,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    mark: bool = False,
) -> Path:
    """A lossless clip: frame i is grey of shade ``shades[i]``, shown at ``times[i]`` milliseconds.

    With ``mark`` the upper left quarter is white, so that turns and mirrors can be told apart.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        codec, stored = ("qtrle", "rgb24") if path.suffix == ".mov" else ("ffv1", "bgr0")
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = stored
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for index, shade in enumerate(shades):
            image = np.full((*size, 3), shade, dtype=np.uint8)
            if mark:
                image[: size[0] // 2, : size[1] // 2] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stored)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def clip() -> Callable[..., Path]:
    return write_clip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from wan_model.tiny import write_tiny_wan

    return write_tiny_wan(tmp_path_factory.mktemp("model") / "tiny")


class Silent:
    """A progress report that collects its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.lines.append(f"{name} {total}")

    def step(self, line: str) -> None:
        self.lines.append(line)

    def log(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="session")
def length() -> Callable[[int, int], int]:
    """How often: the first number in ``nox -s soak``, the second otherwise."""
    return lambda soak, quick: soak if os.environ.get("WAN_SOAK") else quick


@pytest.fixture
def silent() -> Silent:
    return Silent()


def fill_folder(folder: Path) -> Path:
    """Six sources of three aspect ratios with captions of every kind, 14 samples at the small settings."""
    write_clip(folder / "wide.mkv", range(27), size=(48, 64))
    (folder / "wide.json").write_text('{"caption": "A wide clip."}', encoding="utf-8")
    write_clip(folder / "deep" / "tall.mkv", range(40, 67), size=(64, 48))
    (folder / "deep" / "tall.jsonl").write_bytes(
        "\ufeff".encode() + '{"caption": "Ein hoher Clip, größer."}\n'.encode()
    )
    for index in range(4):
        write_clip(folder / "many" / f"clip {index}.v1.mkv", range(80 + 10 * index, 98 + 10 * index), size=(48, 48))
    lines = [f'{{"video_path": "clip {index}.v1.mkv", "caption": "A square."}}' for index in range(4)]
    (folder / "many" / "all.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_folder(tmp_path_factory.mktemp("clips"))


def prepare_folder(clips: Path, output: Path, model: Path, settings: PrepareSettings, **more: Any) -> Any:
    from wan_data.prepare.run import prepare
    from wan_data.prepare.sources import files_of_folder

    more = {"report": Silent(), "device": "cpu", "decoders": 1, **more}
    return prepare(files_of_folder(clips, settings), output, str(model), settings, **more)


@pytest.fixture(scope="session")
def prepared() -> Callable[..., Any]:
    return prepare_folder


@pytest.fixture(scope="session")
def dataset(clips: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    prepare_folder(clips, folder, tiny_model, PrepareSettings(**SMALL))
    return folder


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    return SMALL
