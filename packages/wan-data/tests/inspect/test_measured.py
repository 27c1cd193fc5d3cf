"""What ``inspect`` and ``sources`` show of measures."""

import contextlib
import json
import random
import shutil
import sqlite3

import numpy as np
import pytest
from data_command import run
from made_scenes import Scene, write_frames
from PIL import Image
from rich.console import Console

from wan_data.curation.distributions import BINS, distributions
from wan_data.curation.expressions import COLUMNS, compile_where
from wan_data.index.records import ACCEPTED, REJECTED, REMOVED, SourceRecord
from wan_data.index.sources import IndexState, SourceIndex, added
from wan_data.inspect.measured import sources_table
from wan_data.prepare.settings import PrepareSettings


@pytest.mark.parametrize("count", [1, 2, 3, 20, 101, 1000])
def test_distributions_are_those_of_the_sorted_values(count):
    rng = np.random.default_rng(count)
    values = rng.choice([*rng.normal(size=count), 0.25], size=(count, 4))
    values[rng.random(values.shape) < 0.1] = np.nan
    found = distributions(
        (f"{number}", [None if np.isnan(one) else float(one) for one in row]) for number, row in enumerate(values)
    )
    for column, name in enumerate(("motion", "stillness", "sharpness", "black_borders")):
        known = np.sort(values[:, column][~np.isnan(values[:, column])])
        if not known.size:
            assert name not in found
            continue
        one = found[name]
        for place, share in (("least", 0), ("low", 0.05), ("median", 0.5), ("high", 0.95), ("most", 1)):
            value = getattr(one, place)
            assert np.mean(known <= value) >= share
            assert value == known[0] or np.mean(known < value) < share
        edges = np.linspace(known[0], known[-1], BINS + 1)
        assert one.clips == sum(one.histogram) == known.size
        if known[0] < known[-1]:
            # Values at an edge may round to either side.
            assert np.abs(np.cumsum(one.histogram) - np.searchsorted(known, edges[1:], "right")).max() <= 3
        assert [value for value, _ in one.lowest] == known[:4].tolist()
        assert [value for value, _ in one.highest] == known[::-1][:4].tolist()
        assert all(values[int(name), column] == value for value, name in (*one.lowest, *one.highest))


def test_an_expression_selects_among_the_newest_records(tmp_path):
    """Over several files of an index, as the function of the expression does on each record."""
    rng, state, truth = random.Random(0), IndexState(), {}
    for count in (80, 25, 8):
        changes = {}
        for number in rng.sample(range(80), count):
            path, verdict = f"clip {number}", rng.choice([ACCEPTED, ACCEPTED, REJECTED, REMOVED])
            more = {}
            if verdict == ACCEPTED:
                more = {"split": "train", "frames": rng.randrange(5, 90), "source_fps": 25.0, "height": 48.0}
                more |= {"samples": rng.randrange(1, 4), "motion": rng.choice([None, rng.random()]), "width": 64.0}
            changes[path] = SourceRecord(path, verdict, sha256="0" * 64, bytes=rng.randrange(9), **more)
        state = added(tmp_path, state, [changes[path] for path in sorted(changes)])
        truth |= changes
    assert len(state.parts) == 3
    with SourceIndex.open(tmp_path, state.parts) as index:
        for text in ("motion > 0.5", "seconds >= 2", "not motion > 0.5 or bytes < 3", "seconds < 2", "samples == 0",
                     "fps > 0 and height / width < 1"):  # fmt: skip
            where = compile_where(text)
            selected = [one.path for one in index.selected(where.sql, where.parameters, 16.0)]
            assert selected == [path for path, one in sorted(truth.items()) if where.selects(values_of(one))], text
            assert selected


def values_of(record):
    if record.verdict == REMOVED:
        return {}
    values = {name: getattr(record, name, None) for name in COLUMNS}
    known = {"seconds": record.frames / 16, "fps": record.source_fps}
    if not record.frames:
        values |= dict.fromkeys(("frames", "height", "width"))
        known = {}
    return values | known


@pytest.fixture(scope="session")
def measured(once, prepared, tiny_model, small):
    """A dataset of clips of 0 to 4 pixels of movement a frame, one of them left out, and the clips."""

    def build(folder):
        for speed in range(5):
            path = write_frames(folder / "clips" / f"speed {speed}.mkv", Scene(7).frames(9, speed=float(speed)))
            path.with_suffix(".txt").write_text("A scene.")
        settings = PrepareSettings(**small, where="motion < 0.3")
        prepared(folder / "clips", folder / "dataset", tiny_model, settings)

    return once("measured", build)


def test_sources_are_listed(measured):
    found = [json.loads(line) for line in run("sources", measured / "dataset", "--json").stdout.splitlines()]
    assert [one["path"] for one in found] == [f"speed {speed}.mkv" for speed in range(5)]
    motions = [one["motion"] for one in found]
    assert motions == sorted(motions)
    assert {one["seconds"] for one in found} == {9 / 16}
    some = run("sources", measured / "dataset", "--json", "--where", f"motion > {motions[1]}", "--limit", 2)
    assert [json.loads(line)["path"] for line in some.stdout.splitlines()] == ["speed 2.mkv", "speed 3.mkv"]
    assert some.stderr == "there are more than 2; pass a larger --limit\n"
    out = run("sources", measured / "dataset", "--rejected").output
    left_out = [one["path"] for one in found if one["verdict"] == "unselected"]
    assert 0 < len(left_out) < 5
    assert [name for name in (one["path"] for one in found) if name in out] == left_out
    assert "expected an expression such as" in run("sources", measured / "dataset", "--where", "speed > 1").output


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_both_ends_are_shown(measured, tmp_path):
    path, sheet = tmp_path / "plots.png", tmp_path / "ends.png"
    done = run("inspect", measured / "dataset", "--png", path, "--measures-png", sheet, "--video-folder",
               measured / "clips", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    motion = json.loads(done.stdout)["measures"]["motion"]
    assert [name for _, name in motion["lowest"]] == [f"speed {speed}.mkv" for speed in range(4)]
    assert [name for _, name in motion["highest"]] == [f"speed {speed}.mkv" for speed in (4, 3, 2, 1)]
    assert pixels(path).shape[0] > pixels(path).shape[1] / 3
    shown = pixels(sheet)
    # Of what is in colour, each of four rows has eight pictures.
    coloured = (shown.max(2) - shown.min(2) > 12).any(1)
    assert np.count_nonzero(np.diff(coloured.astype(int)) == 1) >= 4
    table = run("inspect", measured / "dataset").output
    assert "measures of the clips" in table
    lost = run("inspect", measured / "dataset", "--measures-png", sheet, "--video-folder", tmp_path)
    assert lost.exit_code == 0, lost.output
    assert (
        "clips that could not be read (5): speed 0.mkv: it cannot be read: No such file or directory, speed"
        in lost.stderr
    )
    gone = pixels(sheet)
    assert not (gone.max(2) - gone.min(2) > 12).any()


def test_what_was_not_measured_has_no_ends(dataset, clips, tmp_path):
    arguments = ("inspect", dataset, "--measures-png", tmp_path / "ends.png")
    assert "pass their folder as --video-folder" in run(*arguments).output
    assert "prepare it with --measures" in run(*arguments, "--video-folder", clips).output
    assert json.loads(run("inspect", dataset, "--json").stdout)["measures"] == {}
    asked = run("sources", dataset, "--where", "motion < 0.1 or sharpness > 1 or bytes < 0", "--json")
    assert (asked.exit_code, asked.stdout) == (0, "")
    assert f"no comparison with motion and sharpness is true: {dataset} was prepared without --measures" in asked.stderr
    assert run("sources", dataset, "--where", "bytes < 0", "--json").output == ""


def test_a_measure_that_is_no_number_is_named(measured, tmp_path):
    folder = shutil.copytree(measured / "dataset", tmp_path / "damaged")
    (part,) = folder.glob("sources-*.sqlite")
    with contextlib.closing(sqlite3.connect(part)) as database, database:
        database.execute("UPDATE sources SET motion = 'fast' WHERE path = 'speed 2.mkv'")
    done = run("inspect", folder)
    assert done.exit_code == 1
    assert "damaged: of speed 2.mkv the index has ['fast', " in done.output
    assert "holds other records than wan-data.json says" in run("verify", folder).output


def test_names_are_shown_as_they_are(capfd):
    names = ["[x].mkv", "[/x].mkv", "[bold]"]
    records = [SourceRecord(path=name, bytes=1, verdict="rejected", reason=f"{name} is damaged") for name in names]
    Console(width=200).print(sources_table((record, 0.0) for record in records))
    shown = capfd.readouterr().out
    for name in names:
        assert f"│ {name} " in shown
        assert f"│ {name} is damaged " in shown
