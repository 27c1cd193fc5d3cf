"""A file that is visible under its name is complete on the disk, even after a power failure."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from disk_writes import load_events

from wan_data.index.records import PART_GLOB
from wan_data.prepare.probing.cache import Found, ProbeCache
from wan_data.prepare.settings import PrepareSettings
from wan_data.sources.modification_times import TIMES_NAME
from wan_data.video.decode import ClipInfo


@pytest.fixture(scope="session")
def events(prepared_dataset):
    """The events of the preparation of ``dataset``, one after another."""
    return load_events(prepared_dataset / "events.json")


@pytest.fixture(scope="session")
def renames(events):
    return [event for event in events if event.kind == "rename"]


def test_every_file_is_flushed_before_it_gets_its_name(events, renames):
    assert len(renames) > 20
    for rename in renames:
        before = events[: events.index(rename)]
        flushed = [event.sha256 for event in before if event.kind == "sync" and event.path == rename.path]
        assert flushed, f"{rename.target} gets its name without a flush"
        assert flushed[-1] == rename.sha256, f"{rename.target} was written to after its flush"


def test_every_new_name_is_flushed_before_anything_else_happens(events, renames):
    for rename in renames:
        following = events[events.index(rename) + 1]
        assert (following.kind, following.path) == ("sync", os.path.dirname(rename.target)), rename.target


def test_every_file_of_the_dataset_got_its_name_by_a_rename(dataset, renames):
    files = {str(path) for path in dataset.rglob("*") if path.is_file()}
    kinds = {os.path.basename(path).split("0000")[0] if "shard" in path else os.path.basename(path) for path in files}
    assert {"wan-data.json", "index.sqlite", "split.yaml", "empty-caption.safetensors"} < kinds
    assert sum(path.endswith(".idx") for path in files) == sum(path.endswith(".tar") for path in files) == 5
    # Without the file of times all contents are compared; a damaged one is begun anew.
    assert files - {str(dataset / TIMES_NAME)} <= {rename.target for rename in renames}


def test_the_manifest_comes_after_all_that_it_lists(dataset, renames):
    targets = [rename.target for rename in renames]
    complete = max(index for index, target in enumerate(targets) if target.endswith("wan-data.json"))
    # The last manifest adds the digest of the empty caption.
    assert targets.index(str(dataset / "empty-caption.safetensors")) < complete
    first_complete = next(
        index for index, target in enumerate(targets) if index > 2 and target == str(dataset / "wan-data.json")
    )
    for path in [
        *dataset.glob("*.tar"),
        *dataset.glob("*.idx"),
        *dataset.glob(PART_GLOB),
        *(dataset / ".nv-meta").iterdir(),
    ]:
        assert targets.index(str(path)) < first_complete, path


def test_every_new_folder_is_flushed_into_its_parent(dataset, events):
    folders = [event for event in events if event.kind == "mkdir" and event.path.startswith(str(dataset))]
    assert {os.path.basename(event.path) for event in folders} == {dataset.name, ".nv-meta", ".wan-data"}
    for made in folders:
        after = events[events.index(made) + 1 :]
        assert any(event.kind == "sync" and event.path == os.path.dirname(made.path) for event in after), made.path


def test_what_a_resumed_run_needs_is_flushed_too(events, renames):
    names = [os.path.basename(rename.target) for rename in renames]
    assert names.index("results-00000.sqlite") < names.index("round.sqlite") < names.index("shard-rank00-000000.tar")
    assert {f"shard-{number:06d}.json" for number in range(5)} < set(names)
    for number in range(5):
        assert names.index(f"shard-rank00-{number:06d}.tar") < names.index(f"shard-{number:06d}.json")


KILLED = """
import os, signal, sys
from pathlib import Path
from wan_data.prepare.probing.cache import Found, ProbeCache
from wan_data.prepare.settings import PrepareSettings
from wan_data.video.decode import ClipInfo
cache = ProbeCache(Path(sys.argv[1]), PrepareSettings())
for number in range(50):
    cache.add(f"{number}.mp4", Found(1, 2, "0" * 64, ClipInfo(5, 5, 16.0, 32.0, 48.0, 1)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_all_that_it_has_probed(tmp_path):
    path = tmp_path / "examined.sqlite"
    assert subprocess.run([sys.executable, "-c", KILLED, path], check=False).returncode == -signal.SIGKILL
    found, names = Found(1, 2, "0" * 64, ClipInfo(5, 5, 16.0, 32.0, 48.0, 1)), [f"{number}.mp4" for number in range(50)]
    with contextlib.closing(ProbeCache(path, PrepareSettings())) as cache:
        assert cache.find(names) == dict.fromkeys(names, found)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
