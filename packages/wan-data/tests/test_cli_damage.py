"""Damaged, hostile and unwritable files, through the command line: one sentence that names the file, at once."""

import json
import os
import shutil
import time

import pytest
from data_command import run
from earlier_format import as_format_1

from wan_model.testing.permissions import permissions_apply

BRACKETS = "[" * 100_000


@pytest.fixture
def refused():
    """Run a command that has to end with an error of one line, and return it."""

    def invoke(*arguments):
        start = time.process_time()
        done = run(*arguments)
        assert done.exit_code == 1, done.output
        assert time.process_time() - start < 20
        said = done.stderr.splitlines()[-1] if done.stderr else done.stdout.splitlines()[0]
        return said.removeprefix("Error: ")

    return invoke


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def gigabytes(path):
    path.touch()
    os.truncate(path, 30 << 30)


def changed(**values):
    def damage(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def changed_first(kind, **values):
    def damage(path):
        manifest = json.loads(path.read_text())
        row = manifest[kind][0]
        if isinstance(row, list):  # of values, in the order of a record
            row = dict(zip(("name", "split", "samples", "bytes", "sha256"), row, strict=True))
        manifest[kind][0] = {**row, **values}
        path.write_text(json.dumps(manifest))

    return damage


def without(name):
    def damage(path):
        path.write_text(json.dumps({key: one for key, one in json.loads(path.read_text()).items() if key != name}))

    return damage


MANIFESTS = {
    "another index": (changed(index={"parts": 3}), "the number 3 at index.parts; expected a list"),
    "a part elsewhere": (
        changed(index={"parts": [["../x.sqlite", 1, "0"]], "next_part": 1, "counts": {}}),
        "'../x.sqlite', which is no name of a file of the index",
    ),
    "another format": (changed(format_version=3), "of format 3; this version reads 2 and 1"),
    "a fraction": (changed_first("shards", bytes=1.5), "the number 1.5 at shards[0].bytes; expected a whole number"),
    "true for a number": (changed_first("shapes", tokens=True), "true or false at shapes[0].tokens; expected a whole"),
    "another folder": (changed_first("shards", name="../../x.tar"), "'../../x.tar', which is no name of a shard"),
    "an object": (changed(settings=[]), "a list at settings; expected an object"),
    "a text": (changed(next_shard="7"), "text at next_shard; expected a whole number"),
    "null": (changed(latent_spec=None), "null at latent_spec; expected an object"),
    "too few": (without("next_shard"), "has no next_shard"),
    "nested": (lambda path: path.write_text(BRACKETS), "nested more than 100 levels deep"),
    "no object": (lambda path: path.write_text("[]"), "holds a JSON list; expected an object"),
    "gigabytes": (gigabytes, "has 32,212,254,720 bytes; expected at most"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_damaged_manifest(refused, dataset, tmp_path, name):
    damage, said = MANIFESTS[name]
    for path in dataset.iterdir():
        if path.name != "wan-data.json":
            (tmp_path / path.name).symlink_to(path)
    shutil.copy(dataset / "wan-data.json", tmp_path)
    damage(tmp_path / "wan-data.json")
    named(refused, tmp_path, said)


def named(refused, folder, said):
    for command in ("verify", "inspect"):
        found = refused(command, folder)
        assert "wan-data.json" in found
        assert said in found


SOURCES = {
    "text for a number": (changed_first("sources", samples="x"), "text at sources[0].samples; expected a whole number"),
    "no number": (changed_first("sources", source_fps=float("nan")), "nan at sources[0].source_fps; expected a number"),
    "a short row": (changed_first("sources", dropped=[[1]]), "a list of 1 at sources[0].dropped[0]; expected one of 2"),
    "an unknown field": (changed_first("sources", other=1), "the unknown field 'other' at sources[0]; expected path"),
    "half a letter": (changed_first("sources", path="\ud800"), "half of a surrogate pair at sources[0].path; expected"),
    "another verdict": (
        changed_first("sources", verdict="removed"),
        "a source of the verdict 'removed'; expected accep",
    ),
    "a list": (changed(sources=3), "the number 3 at sources; expected a list"),
    "none": (without("sources"), "has no sources"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_manifest_of_the_first_format(refused, dataset, tmp_path, name):
    damage, said = SOURCES[name]
    folder = as_format_1(dataset, tmp_path / "earlier")
    damage(folder / "wan-data.json")
    named(refused, folder, said)


def test_a_pipe_for_a_manifest(refused, dataset, tiny_model, clips, tmp_path):
    out = shutil.copytree(dataset, tmp_path / "out")
    pipe(out / "wan-data.json")
    assert "wan-data.json" in refused("inspect", out)
    assert "wan-data.json" in refused("verify", out)
    options = ("--video-folder", clips, "--output-folder", out, "--model", tiny_model)
    assert "holds files that wan-data did not write" in refused("prepare", *options)


def test_a_damaged_manifest_is_not_added_to(refused, dataset, tiny_model, clips, tmp_path):
    out = shutil.copytree(dataset, tmp_path / "out")
    changed_first("shards", samples="x")(out / "wan-data.json")
    said = refused("prepare", "--video-folder", clips, "--output-folder", out, "--model", tiny_model)
    assert "expected a whole number; restore the file, or prepare the dataset again with --overwrite" in said


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_something_else_for_a_listing(refused, clips, tmp_path, kind):
    pytest.importorskip("pyarrow")
    listing = tmp_path / f"list.{kind}"
    pipe(listing)
    assert refused("plan", "--listing", listing) == f"{listing} is a named pipe; expected a file"
    listing.unlink()
    gigabytes(listing)
    said = refused("plan", "--listing", listing)
    assert said.startswith(f"{listing} ")
    listing.unlink()
    listing.mkdir()
    assert refused("plan", "--listing", listing) == f"{listing} is a folder; expected a file"
    if kind == "jsonl":
        listing.rmdir()
        listing.write_text(BRACKETS)
        done = run("plan", "--listing", listing)
        assert done.exit_code == 1
        assert "nested more than 100 levels deep" in " ".join(done.output.split())


def test_something_else_for_captions(clip, tmp_path):
    clip(tmp_path / "a.mkv", range(5))
    for name, make, said in (
        ("a.json", pipe, "a.json is a named pipe; expected a file"),
        ("a.txt", pipe, "a.txt is a named pipe; expected a file"),
        ("a.jsonl", pipe, "a.jsonl is a named pipe; expected a file"),
        ("a.json", gigabytes, "a.json has 32,212,254,720 bytes; expected at most"),
        ("a.txt", gigabytes, "a.txt has 32,212,254,720 bytes; expected at most"),
        ("a.jsonl", gigabytes, "a.jsonl has a line of over 16,777,216 bytes at byte 0"),
        ("a.json", lambda path: path.write_text(BRACKETS), "a.json is nested more than 100 levels deep"),
        ("a.jsonl", lambda path: path.write_text(BRACKETS), "a.jsonl line 1 is nested more than 100 levels deep"),
    ):
        make(tmp_path / name)
        options = ["plan", "--video-folder", str(tmp_path), "--area", "1536", "--num-decoders", "1", "--json"]
        done = run(*options)
        assert done.exit_code == 1
        (kind,) = json.loads(done.stdout)["rejected"]
        assert said in kind["sources"][0]
        (tmp_path / name).unlink()


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_damaged_model(refused, clips, tiny_model, tmp_path, part):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for make, said in (
        (pipe, "is a named pipe; expected a file"),
        (gigabytes, "has 32,212,254,720 bytes; expected at most"),
        (lambda path: path.write_text(BRACKETS), "is nested more than 100 levels deep"),
    ):
        (model / part / "config.json").unlink()
        make(model / part / "config.json")
        options = ("--video-folder", clips, "--output-folder", tmp_path / "out", "--model", model)
        assert refused("prepare", *options).startswith(f"{model / part / 'config.json'} {said}")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(refused, dataset, clips, tiny_model, tmp_path):
    out = shutil.copytree(dataset, tmp_path / "closed" / "out")
    for folder, output in ((out.parent, out.parent / "new"), (out, out)):
        options = ("--video-folder", clips, "--output-folder", output, "--model", tiny_model)
        mode = folder.stat().st_mode
        folder.chmod(0o500)
        try:
            with permissions_apply():
                for command in (("prepare", *options), ("plan", *options[:4])):
                    said = refused(*command)
                    assert said.startswith(str(output))
                    assert said.endswith(": Permission denied")
        finally:
            folder.chmod(mode)
    assert not (out.parent / "new").exists()
