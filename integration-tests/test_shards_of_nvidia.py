"""Shards laid out as NVIDIA's script writes them are prepared, looked at, checked and trained on."""

import io
import json
import pickle
import tarfile

import pytest
import torch
import webdataset

from common.training_log import read_log


@pytest.fixture(scope="module")
def shards(dataset, tmp_path_factory):
    """Our samples as two ranks of that script would have written them, by the same writer.

    Keys are numbers, nothing of ours is in the json, the pickle is torch's own.
    """
    folder = tmp_path_factory.mktemp("nvidia")
    samples = []
    for path in sorted(dataset.glob("*.tar")):
        with tarfile.open(path) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}
        for key in sorted({name.partition(".")[0] for name in found}):
            info = {
                name: value
                for name, value in json.loads(found[f"{key}.json"]).items()
                if name not in ("fps", "text_tokens", "latent_fingerprint")
                and not name.startswith(("source", "frame_"))
            }
            latent = torch.load(io.BytesIO(found[f"{key}.pth"]))
            text = pickle.loads(found[f"{key}.pickle"])
            samples.append({"pth": latent, "pickle": pickle.dumps(text), "json": info})
    for rank in range(2):
        with webdataset.ShardWriter(f"{folder}/shard-rank{rank:02d}-%06d.tar", maxcount=2, verbose=0) as writer:
            for number, sample in list(enumerate(samples))[rank::2]:
                writer.write({"__key__": f"{number:06d}", **sample})
    return folder, len(samples)


def test_they_are_looked_at_checked_and_trained_on(run, shards, tiny_model, tmp_path):
    folder, count = shards
    run(
        "energon", "prepare", folder, "--non-interactive", "--split-ratio", "8,1,1", "--sample-type",
        "CrudeWebdataset", "--force-overwrite",
    )  # fmt: skip
    found = json.loads(run("wan-data", "inspect", folder, "--json").stdout)
    assert sum(split["samples"] for split in found["splits"].values()) == count
    assert found["latent_fingerprint"] is None
    assert "no problems" in run("wan-data", "verify", folder).stdout

    arguments = (
        "wan-train", "pretrain", "--recipe", "tiny", "train.train_iters=3", f"dataset.path={folder}",
        f"checkpoint.save={tmp_path / 'checkpoints'}", "checkpoint.save_interval=3",
    )  # fmt: skip
    refused = run(*arguments, fails=True).stderr
    assert "does not say which model it was encoded with; name that model with encoded_by=MODEL" in refused
    run(*arguments, f"dataset.encoded_by={tiny_model}")
    log = read_log(tmp_path / "checkpoints")
    assert len([line for line in log if "loss" in json.dumps(line)]) >= 3

    # What was trained can be sampled with that model.
    run(
        "wan-infer", "--checkpoint_dir", tmp_path / "checkpoints", "--model", tiny_model, "--prompts", "A pattern.",
        "--sizes", "96*64", "--frame_nums", "9", "--sample_steps", "2", "--save_file", tmp_path / "video.mp4",
    )  # fmt: skip
    assert (tmp_path / "video.mp4").stat().st_size > 1000
