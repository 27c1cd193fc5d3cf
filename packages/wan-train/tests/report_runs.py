"""Folders of runs as a training leaves them, written without one."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from PIL import Image

from wan_train.checkpoint.folder import step_folder
from wan_train.checkpoint.sample_videos import SampleVideo, records_path, suffix_of
from wan_train.report.server import Follower, PageServer

# What ends a script, opens an element, and runs where markup is read.
MARKUP = "</script><img src=x onerror=\"document.title='taken'\"><!--"


def entry(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    """An entry of a step."""
    return {
        "step": step, "loss": loss, "grad_norm": loss / 2, "learning_rate": 1e-3, "seconds": 2.0, "samples": 3,
        "tokens": 100, "tokens_padded": 125, "flops": 10**9, "data_wait": 0.25, "save_seconds": 0.0,
        "peak_memory": 3 * 10**9, "tokens_per_second": 50.0, "packing_efficiency": 0.8, "tflops_per_device": 0.5,
        "mfu": 0.4, **more,
    }  # fmt: skip


def validation(step: int, at: dict[str, float], **more: Any) -> dict[str, Any]:
    """An entry of a validation."""
    loss = sum(at.values()) / len(at)
    return {"event": "validation", "step": step, "loss": loss, "samples": 4, "timesteps": at, **more}


def write_run(folder: Path, entries: list[Any], settings: dict[str, Any] | None = None, saved: int = 0) -> Path:
    """A log, and a checkpoint with settings if there are any; entries that are text are lines as they stand."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in entries]
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if settings is not None:
        checkpoint = step_folder(folder, saved)
        checkpoint.mkdir()
        (checkpoint / "run_config.yaml").write_text(yaml.safe_dump(settings))
        (checkpoint / "complete.json").write_text("{}")
    return folder


def write_sample(folder: Path, step: int, name: str, caption: str = "a fox", frames: int = 8) -> SampleVideo:
    """A sampled video, H.264 or for one frame PNG, and its record."""
    sample = SampleVideo(step, name, caption, 7, suffix_of(frames))
    path = sample.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [np.full((48, 64, 3), (30 * number, 80, step % 256), dtype=np.uint8) for number in range(frames)]
    if frames == 1:
        Image.fromarray(pictures[0]).save(path)
    else:
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for picture in pictures:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    with records_path(folder).open("a", encoding="utf-8") as records:
        record = {"step": step, "name": name, "caption": caption, "seed": 7, "solver": "unipc"}
        record["file"] = path.relative_to(folder).as_posix()
        records.write(json.dumps(record) + "\n")
    return sample


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[PageServer]:
    """The server of ``wan-train report --follow`` in a thread."""
    with PageServer(Follower([folder])) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
