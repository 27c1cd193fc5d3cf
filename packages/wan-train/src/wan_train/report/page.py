"""The page about runs: one HTML file with everything in it, which opens without a network.

All that comes from logs, captions, configurations and names of folders is data of the page, never part of its markup:
one JSON value in a script element that no browser executes, escaped by Jinja. The page's own script puts it into
elements as text. A content security policy allows no other script than the two with these digests, and no connection
but to the server of ``--follow``.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from wan_model.extras import requires_extra
from wan_model.system.files import write_bytes
from wan_train.report.curves import charts_of
from wan_train.report.run_folder import RunFolder
from wan_train.report.settings import rows
from wan_train.report.videos import FoundVideo, choose, table

PAGE_NAME = "report.html"
# Bytes of videos in a page, before base64 adds a third.
LARGEST_VIDEOS = 20_000_000


def open_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs of a page, named by their folders.

    Raises:
        ValueError: a folder is given twice, or has no log.
    """
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if resolved[number] in resolved[:number]:
            raise ValueError(f"{folder} is compared with itself; give every run once")
    names = [folder.name for folder in resolved]
    return [
        RunFolder(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def content_of(
    runs: Sequence[RunFolder],
    *,
    source: Callable[[FoundVideo], str] = FoundVideo.data_uri,
    video_bytes: int = LARGEST_VIDEOS,
) -> dict[str, Any]:
    """All that the page shows, as JSON has it.

    Args:
        runs: the first one, and those that it is compared with.
        source: the URL of a video.
        video_bytes: bytes of all videos.

    Raises:
        ValueError: a video cannot be read.
    """
    charts, absent = charts_of({key for run in runs for key in run.log.curves})
    found, notes = [], []
    for number, run in enumerate(runs):
        videos, left_out = run.videos(number)
        found += videos
        notes += left_out
    chosen, too_many = choose(found, video_bytes)
    return {
        "runs": [run.content() for run in runs],
        "charts": [vars(chart) for chart in charts],
        "absent": absent,
        "videos": table(chosen, source),
        "settings": rows([run.settings for run in runs]),
        "notes": notes + too_many,
        "follow": False,
    }


def _resource(name: str) -> str:
    return (resources.files("wan_train.report") / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def render(content: dict[str, Any]) -> bytes:
    """The page as UTF-8.

    Args:
        content: see ``content_of``.

    Raises:
        ValueError: the extra ``report`` is not installed.
    """
    with requires_extra("report", "wan-train"):
        import jinja2
        import markupsafe
        from plotly.offline import get_plotlyjs
    scripts = [get_plotlyjs(), _resource("page.js")]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    # Numbers that JSON has not would be an error of the page's script.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    text = environment.from_string(_resource("page.html")).render(
        title=" / ".join(run["name"] for run in content["runs"]),
        # Ours and plotly's: no input is in them.
        scripts=[markupsafe.Markup(script) for script in scripts],
        style=markupsafe.Markup(_resource("page.css")),
        digests=[_digest(script) for script in scripts],
        content=content,
    )
    return text.encode("utf-8", "replace")


def write_page(folders: Sequence[Path], out: Path | None = None, *, video_bytes: int = LARGEST_VIDEOS) -> Path:
    """Write the page about runs.

    Args:
        folders: checkpoint folders, the first of the run that the page is about.
        out: the file; ``report.html`` in the first folder by default.
        video_bytes: bytes of all videos.

    Returns:
        The file.

    Raises:
        ValueError: a folder has no log, the file can have no such name, or the extra ``report`` is not installed.
        OSError: the file cannot be written; the error names it.
    """
    runs = open_runs(folders)
    out = folders[0] / PAGE_NAME if out is None else out
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out is {out}; expected the name of a file in a folder that exists")
    page = render(content_of(runs, video_bytes=video_bytes))
    write_bytes(out, page)
    return out


def as_json(content: dict[str, Any]) -> bytes:
    """The content for the page of ``--follow``, which asks for it again."""
    return json.dumps(content, allow_nan=False).encode("ascii")
