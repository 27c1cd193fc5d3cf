"""Shared by the tests: shapes checked at run time, tiny clips, a tiny model, one small dataset, running decoders."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for disk_writes and the other modules here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from wan_model.testing.devices import hide_gpus
from wan_model.testing.once import Once, once_in, order_by_shared_fixtures, session_folder
from wan_model.testing.shapes import check_shapes

# Before the first import of it. What is left out takes protocols, or classes of Energon, whose annotations warn.
_UNCHECKED = ("prepare.local_workers", "prepare.on_ray.ray_workers", "prepare.workers", "reading.empty_caption")
check_shapes("wan_data", but=tuple(f"wan_data.{module}" for module in _UNCHECKED))

import av  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from disk_writes import recorded_writes, save_events  # noqa: E402
from hypothesis import settings  # noqa: E402
from reused_decoder import ReusedDecoder, end_idle_decoders  # noqa: E402

from wan_data.index.manifest import Manifest  # noqa: E402
from wan_data.prepare.results import PrepareResult  # noqa: E402
from wan_data.prepare.settings import PrepareSettings  # noqa: E402

torch.set_num_threads(1)
# Machines differ in speed and tests run side by side: a slow example is no failure, and the examples are the same.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# The fraction is so small that one source is for validation, by the rule that each split gets one, on every machine.
SMALL: dict[str, Any] = {
    "areas": (32 * 48,),
    "frames": 9,
    "min_frames": 5,
    "samples_per_shard": 3,
    "validation_fraction": 1e-4,
}


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
    # Without this flag Matroska files hold a random number, and which clips are for validation follows from the bytes.
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:
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


def pytest_configure(config: pytest.Config) -> None:
    hide_gpus(config.option.markexpr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order_by_shared_fixtures(items, Path(__file__).parent, "reliability_runs", "payload_runs")


@pytest.fixture(scope="session")
def clip() -> Callable[..., Path]:
    return write_clip


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a file or folder once for all test processes; tests only read it, or copy it."""
    return once_in(session_folder(tmp_path_factory, "wan-data"))


@pytest.fixture(scope="session")
def tiny_model(once: Once) -> Path:
    from wan_model.tiny import write_tiny_wan

    return once("tiny-model", write_tiny_wan)


@pytest.fixture(scope="session", autouse=True)
def reused_decoders() -> Iterator[None]:
    """Preparations in this process share decoder processes; processes that they start have their own."""
    from wan_data.prepare.encoding import encoder_pool
    from wan_data.prepare.probing import pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "Decoder", ReusedDecoder)
        patch.setattr(encoder_pool, "Decoder", ReusedDecoder)
        yield
    end_idle_decoders()


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
def length() -> Callable[[Any, Any], Any]:
    """The first argument in ``nox -s soak``, the second otherwise."""
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
def clips(once: Once) -> Path:
    return once("clips", fill_folder)


def prepare_result(clips: Path, output: Path, model: Path, settings: PrepareSettings, **more: Any) -> PrepareResult:
    from wan_data.prepare.run import prepare
    from wan_data.sources.folder import SourceFolder

    more = {"report": Silent(), "device": "cpu", "decoders": 1, **more}
    return prepare(SourceFolder(clips, images=settings.images).files(), output, str(model), settings, **more)


def prepare_folder(clips: Path, output: Path, model: Path, settings: PrepareSettings, **more: Any) -> Manifest:
    return prepare_result(clips, output, model, settings, **more).manifest


@pytest.fixture(scope="session")
def prepared() -> Callable[..., Any]:
    return prepare_folder


@pytest.fixture(scope="session")
def prepare_again() -> Callable[..., PrepareResult]:
    """As ``prepared``, with all that the preparation returns."""
    return prepare_result


@pytest.fixture(scope="session")
def prepared_dataset(once: Once, clips: Path, tiny_model: Path) -> Path:
    """A folder with a dataset of ``clips`` and the events of its preparation."""

    def build(folder: Path) -> None:
        folder.mkdir()
        with recorded_writes() as events:
            prepare_folder(clips, folder / "dataset", tiny_model, PrepareSettings(**SMALL))
        save_events(events, folder / "events.json")

    return once("prepared", build)


@pytest.fixture(scope="session")
def dataset(prepared_dataset: Path) -> Path:
    return prepared_dataset / "dataset"


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    return SMALL
