"""The commands of FROM_A_BUCKET.md as they stand, on a bucket of this machine."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from object_store import SECRET_KEY, environment

from wan_data.loader import LoaderConfig, PackLoader

PAGE = Path(__file__).parents[2] / "FROM_A_BUCKET.md"


def write_clip(path, speed, *, seed, quality=20, frames=24):
    """A drawn scene of 832x480 that moves to the left by so many pixels a frame."""
    rng = np.random.default_rng(seed)
    scene = np.kron(rng.integers(0, 256, (12, 40, 3)), np.ones((40, 40, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(16), options={"crf": str(quality)})
        stream.width, stream.height, stream.pix_fmt = 832, 480, "yuv420p"
        for number in range(frames):
            picture = np.ascontiguousarray(scene[:, speed * number : speed * number + 832])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text(f"Squares of scene {seed} move by {speed}.", encoding="utf-8")


def blocks():
    """The blocks of bash that call wan-data."""
    found = re.findall(r"^ *```bash\n(.*?)^ *```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [block for block in found if "wan-train" not in block]


@pytest.fixture
def said(served, proxy, tiny_model, tmp_path):
    clips = served[0] / "bucket" / "clips"
    clips.mkdir(parents=True)
    write_clip(clips / "a.mp4", 12, seed=1)
    write_clip(clips / "copy of a.mp4", 12, seed=1, quality=30)
    write_clip(clips / "b.mp4", 16, seed=2)
    write_clip(clips / "still.mp4", 0, seed=3)
    shutil.copytree(tiny_model, tmp_path / "Wan2.1-T2V-1.3B-Diffusers")
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    variables = {**os.environ, **environment(proxy.url), "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    said = []
    for block in blocks():
        done = subprocess.run(
            ["bash", "-euc", block],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout + done.stderr)
    yield said
    shutil.rmtree(served[0] / "bucket")


def test_the_commands_of_the_page(said, served, tmp_path):
    planned, prepared, looked = said
    assert "motion" in planned
    assert "2 samples" in prepared
    assert "still.mp4" in looked
    listed = json.loads(next(iter((served[0] / "bucket/dataset").glob("wan-data.json"))).read_text())
    assert listed["samples"] == {"train": 1, "val": 1}
    assert {path.suffix for path in (served[0] / "bucket/clips").iterdir()} == {".mp4", ".txt"}
    assert not list(tmp_path.rglob("*.tar")), "shards are in the store alone"
    packs = PackLoader(LoaderConfig("s3://bucket/dataset", capacity=43008), rank=0, world_size=1)
    assert next(iter(packs)).keys
    for path in (*served[0].rglob("*"), *tmp_path.rglob("*")):
        if path.is_file():
            assert SECRET_KEY.encode() not in path.read_bytes(), path
    assert SECRET_KEY not in "".join(said)
