"""Preparations of different machines that write one dataset in a store: none says that it is done when it is not."""

import shutil

import pytest
from data_command import run
from stored_datasets import prepare_stored

from wan_data.index.manifest import read_manifest
from wan_data.prepare.store_output import StoreOutput
from wan_data.prepare.writer_claim import CLAIM_NAME

MEANWHILE = "was changed by another preparation meanwhile; run the same command again"


@pytest.fixture
def machines(bucket, clip, tmp_path, tiny_model):
    """The folder of the dataset, and a function that prepares the clips of one of two machines; all of one size."""
    folder, root = bucket
    for name, shade in (("one", 0), ("two", 60)):
        for number in range(2):
            path = clip(folder / name / f"{number}.mkv", range(shade + 9 * number, shade + 9 * number + 18))
            path.with_suffix(".txt").write_text(f"{name} {number}")

    def prepare(name, *options):
        places = ("--video-folder", f"{root}/{name}", "--output-folder", f"{root}/out")
        return prepare_stored(tiny_model, *places, "--work-folder", tmp_path / name, *options)

    return folder / "out", prepare


def interrupted(self, manifest):
    del self
    if manifest.complete:
        raise ValueError("interrupted")


def verified(out):
    return run("verify", f"s3://{out.parent.name}/out")


def test_the_first_is_told_when_another_has_written_its_shards(machines, monkeypatch):
    out, prepare = machines
    commit, others = StoreOutput.commit, []

    def meanwhile(self, manifest):
        if manifest.complete and not others:  # its shards are there, its manifest is not
            others.append("two")
            with monkeypatch.context() as patch:
                patch.setattr(StoreOutput, "commit", interrupted)
                assert "Error: interrupted" in prepare("two").output
        commit(self, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(StoreOutput, "commit", meanwhile)
        result = prepare("one")
    assert result.exit_code == 1
    assert MEANWHILE in result.output
    assert not (out / "wan-data.json").exists()
    result = prepare("one")
    assert result.exit_code == 0, result.output
    assert "encoding" in result.output, "what it had finished may have been replaced"
    assert verified(out).exit_code == 0
    assert not (out / CLAIM_NAME).exists()


def test_an_interrupted_one_begins_anew_after_another_was_there(machines, monkeypatch):
    out, prepare = machines
    with monkeypatch.context() as patch:
        patch.setattr(StoreOutput, "commit", interrupted)
        for name in ("one", "two"):
            assert "Error: interrupted" in prepare(name).output
    assert prepare("one").exit_code == 0
    assert verified(out).exit_code == 0
    assert not (out / CLAIM_NAME).exists()


def test_an_interrupted_one_goes_on_where_nobody_else_was(machines, monkeypatch):
    out, prepare = machines
    with monkeypatch.context() as patch:
        patch.setattr(StoreOutput, "commit", interrupted)
        assert "Error: interrupted" in prepare("one").output
    assert (out / CLAIM_NAME).exists()
    result = prepare("one")
    assert result.exit_code == 0, result.output
    assert "encoding" not in result.output
    assert not (out / CLAIM_NAME).exists()


def test_a_claim_that_is_left_does_not_matter(machines, tmp_path):
    out, prepare = machines
    assert prepare("one").exit_code == 0
    samples = read_manifest(out).samples
    (out / CLAIM_NAME).write_text("of another machine")
    shutil.copy(out.parent / "two" / "0.mkv", out.parent / "one" / "another.mkv")
    (out.parent / "one" / "another.txt").write_text("Another.")
    result = prepare("one")
    assert result.exit_code == 0, result.output
    assert sum(read_manifest(out).samples.values()) > sum(samples.values())
    assert verified(out).exit_code == 0
    assert not (out / CLAIM_NAME).exists()
