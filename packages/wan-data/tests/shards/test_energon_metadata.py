import contextlib
import itertools
import json
import shutil
import sqlite3
import subprocess
import sys

import braceexpand
import pytest
import yaml

from wan_data.reading.datasets import splits
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.shards.energon_metadata import DATASET_YAML, _names_of, check_metadata, shard_counts, write_metadata
from wan_data.shards.writer import ShardRecord

# Energon's command line, several calls in one process: each would import for seconds.
ENERGON = """
import contextlib, io, json, sys
from megatron.energon.cli.main import main
from megatron.energon.tools.prepare import command

if __name__ == "__main__":
    asks = not any("--non-interactive" in option.opts for option in command.params)
    found = []
    for arguments in json.loads(sys.argv[1]):
        out, answers = io.StringIO(), ""
        if arguments[0] == "prepare":
            more = ["--split-ratio", "8,1,1", "--sample-type", "CrudeWebdataset", "--force-overwrite"]
            # Energon 6 asks for the ratio and the type, of which the crude one is the last.
            arguments += ["--num-workers", "1"] + ([] if asks else ["--non-interactive", *more])
            answers = "8,1,1\\ny\\n-1\\n"
        sys.stdin = io.StringIO(answers)
        with contextlib.redirect_stdout(out):
            main(arguments, standalone_mode=False)
        found.append(out.getvalue())
    print(json.dumps(found))
"""


def energon(folder, *calls):
    """The output of each call."""
    script = folder / "energon_calls.py"
    script.write_text(ENERGON)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(calls)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def open_it(folder):
    return PackLoader(LoaderConfig(str(folder), capacity=200), rank=0, world_size=1)


def test_the_splits_are_counted(dataset):
    counts = splits(dataset)
    assert sum(counts.values()) == 14
    assert set(counts) == {"train", "val"}
    assert sorted(itertools.chain(*check_metadata(dataset).values())) == sorted(
        path.name for path in dataset.glob("*.tar")
    )


def test_a_dataset_yaml_that_runs_code_is_refused_before_it_runs(copy, tmp_path):
    marker = tmp_path / "marker"
    (copy / ".nv-meta" / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})\ndef fn(sample): return sample\n")
    (copy / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
        "sample_loader: evil.py:fn\npart_filter: evil.py:fn\n"
    )
    with pytest.raises(ValueError, match=r"dataset.yaml is not what wan-data writes and could run code"):
        open_it(copy)
    assert not marker.exists()
    # The control: Energon itself runs it.
    from megatron.energon import WorkerConfig, get_train_dataset

    get_train_dataset(
        copy,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
    )
    assert marker.exists()


@pytest.mark.parametrize("name", ["pipe:id.tar", "../x.tar", "s3://bucket/x.tar", "absent.tar", "/etc/x.tar"])
def test_shards_elsewhere_are_refused(copy, name):
    path = copy / ".nv-meta" / ".info.json"
    info = json.loads(path.read_text())
    info["shard_counts"][name] = 1
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"\.info\.json names"):
        open_it(copy)


@pytest.mark.parametrize(
    "text",
    [
        "split_parts: {train: ['../x.tar']}\nexclude: []\n",
        "__module__: os\n__class__: system\n",
        "split_parts: {train: [shard-rank00-000000.tar]}\nexclude: [shard-rank00-000000.tar]\n",
        "split_parts: !!python/object/apply:os.system [id]\n",
        "split_parts: {train: [shard-rank00-000000.tar, 'shard-rank00-{000000..000001}.tar']}\nexclude: []\n",
        "split_parts: {train: [shard-rank00-000000.tar], val: [shard-rank00-000000.tar]}\nexclude: []\n",
        "",
    ],
)
def test_a_split_yaml_of_another_form_is_refused(copy, text):
    (copy / ".nv-meta" / "split.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"split\.yaml"):
        open_it(copy)


def test_what_energon_itself_writes_is_accepted(copy):
    (copy / ".nv-meta" / "split.yaml").write_text(
        "split_parts:\n  train:\n  - shard-rank00-{000000..000003}.tar\n  val: []\n  test:\n"
        "  - shard-rank00-000004.tar\nexclude: []\n"
    )
    assert set(splits(copy)) == {"train", "test"}


@pytest.mark.parametrize(
    "pattern",
    ["a.tar", "a-{3..7}.tar", "a-{03..11}.tar", "a-{9..10}.tar", "{0..1}-b-{00..02}.tar", "a{x,y,z9}.tar", "a{5..5}"],
)
def test_patterns_are_expanded_as_energon_does(pattern, tmp_path):
    assert list(_names_of(pattern, 20, tmp_path)) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize(
    "pattern",
    [
        "a-{000000..999999}.tar", "a-{1..999999999}.tar", "{0..9}{0..9}.tar", "{0..9}" * 60, "a-{a..z}.tar",
        "a-{0..9..2}.tar", "a-{7..3}.tar", "{{0..1}..{1..2}}.tar", "a-{0..1.tar", "a-{,x}.tar",
    ],
)  # fmt: skip
def test_patterns_of_more_than_there_is_are_refused(copy, pattern):
    (copy / ".nv-meta" / "split.yaml").write_text(f"split_parts:\n  train: ['{pattern}']\nexclude: []\n")
    with pytest.raises(ValueError, match=r"split\.yaml names '.*', which|split\.yaml names '.*'; expected names"):
        open_it(copy)


def test_a_dataset_of_either_generation_of_energon_is_read(copy):
    # Version 6 writes the counts in YAML, later ones in JSON; we write both.
    meta = copy / ".nv-meta"
    counts = splits(copy)
    assert yaml.safe_load((meta / ".info.yaml").read_text()) == {"shard_counts": shard_counts(copy)}
    kept = next(iter(open_it(copy))).keys
    for name in (".info.yaml", ".info.json"):
        hidden = (meta / name).rename(meta / "hidden")
        assert splits(copy) == counts
        assert next(iter(open_it(copy))).keys == kept
        hidden.rename(meta / name)
    (meta / ".info.json").unlink()
    (meta / ".info.yaml").write_text("shard_counts: !!python/object/apply:os.system [id]\n")
    with pytest.raises(ValueError, match=r"\.info\.yaml is not YAML"):
        open_it(copy)
    (meta / ".info.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no \.nv-meta/\.info\.json: run wan-data prepare again"):
        open_it(copy)


def test_a_shard_of_another_length_is_refused(copy):
    shard = copy / "shard-rank00-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard-rank00-000001.tar has .* bytes; wan-data.json says"):
        open_it(copy)


def test_missing_things_are_named(tmp_path, copy):
    with pytest.raises(ValueError, match="no folder"):
        open_it(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no \.nv-meta"):
        open_it(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        PackLoader(LoaderConfig(str(copy), capacity=200, split="test"), rank=0, world_size=1)


def rows(folder, table):
    with contextlib.closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as index:
        (known,) = index.execute("SELECT count(*) FROM sqlite_master WHERE name = ?", [table]).fetchone()
        columns = "tar_file_id, sample_key, sample_index, byte_offset, byte_size" if table == "samples" else "*"
        # Energon inserts them as its workers get ready.
        return sorted(index.execute(f"SELECT {columns} FROM {table}")) if known else None


def schema(folder):
    with contextlib.closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as index:
        return sorted(" ".join(sql.split()) for (sql,) in index.execute("SELECT sql FROM sqlite_master WHERE sql > ''"))


def test_a_shard_of_other_samples_than_its_record_is_named(dataset, tmp_path):
    shutil.copy(dataset / "shard-rank00-000000.tar", tmp_path)
    with pytest.raises(OSError, match="it holds 3 samples instead of 2") as caught:
        write_metadata(tmp_path, [ShardRecord("shard-rank00-000000.tar", "train", 2, 0, "")])
    assert caught.value.filename.endswith("shard-rank00-000000.tar")
    assert not (tmp_path / ".nv-meta" / "index.sqlite").exists()


def test_energons_own_tools(dataset, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in dataset.glob("*.tar"):
        shutil.copy(shard, shards)
    configuration = ("--dataset-config", "captioning.yaml")
    info, _, preview, _ = energon(
        tmp_path,
        ("info", str(dataset), *configuration),
        ("lint", str(dataset), "--parallel", "0", "--split-parts", "train,val", *configuration),
        ("preview", str(dataset), "--split-parts", "val", *configuration),
        ("prepare", str(shards)),
    )
    assert "14 samples" in info
    assert "caption (<class 'str'>)" in preview
    # What `energon prepare` makes of the same shards is what we write, to the last row of the index.
    assert sum(splits(shards).values()) == 14
    assert rows(shards, "samples") == rows(dataset, "samples")
    if (parts := rows(shards, "sample_parts")) is not None:  # Energon 6 does not know the second table
        assert parts == rows(dataset, "sample_parts")
        assert schema(shards) == schema(dataset)
    assert {path.name: path.read_bytes() for path in shards.glob("*.idx")} == {
        path.name: path.read_bytes() for path in dataset.glob("*.idx")
    }
    (written,) = (shards / ".nv-meta").glob(".info.*")
    theirs, ours = (yaml.safe_load((folder / ".nv-meta" / written.name).read_bytes()) for folder in (shards, dataset))
    assert theirs == ours
    assert (shards / ".nv-meta" / "dataset.yaml").read_bytes() == DATASET_YAML
    assert len(next(iter(PackLoader(LoaderConfig(str(shards), capacity=200), rank=0, world_size=1))).keys) > 1
