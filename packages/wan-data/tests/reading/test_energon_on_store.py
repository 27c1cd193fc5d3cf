"""Energon's own reader opens a dataset in a store by the same URL as ours, and gives the samples of the disk."""

import itertools

import pytest
import torch
from latent_shards import write_latent_shards
from object_store import write_profile

from wan_data.reading.loader import LoaderConfig, PackLoader


@pytest.fixture
def profile(bucket, proxy, tmp_path, monkeypatch):
    """A dataset in a bucket, and its URL by a profile of multi-storage-client."""
    folder, root = bucket
    latents = [[torch.full((16, 1, 2, 2), 10.0 * number + i) for i in range(6)] for number in range(3)]
    write_latent_shards(folder / "set", zip(["train", "train", "val"], latents, strict=True))
    monkeypatch.setenv("MSC_CONFIG", str(write_profile(tmp_path / "msc.yaml", root.bucket, proxy.url)))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return folder / "set", "msc://tests/set"


def raw_samples(path, count):
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        TextSample,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon.task_encoder.cooking import basic_sample_keys

    @stateless
    def cook(sample):
        content = [sample[kind] for kind in ("json", "pickle", "pth")]
        return TextSample(**basic_sample_keys(sample), text=repr(content))

    class Encoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)
        decoder = None

    dataset = get_train_dataset(
        path,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    loader = get_loader(dataset)
    loader.pin_memory = False
    return [(batch.__key__, batch.text) for batch in itertools.islice(loader, count)]


def test_energon_reads_the_same_samples_from_the_server(profile):
    from megatron.energon.epathlib import EPath

    folder, url = profile
    wanted = raw_samples(folder, 12)
    assert len({str(key) for key, _ in wanted}) == 12
    assert raw_samples(EPath(url), 12) == wanted


def test_our_loader_takes_the_url_of_a_profile(profile):
    folder, url = profile

    def keys(path):
        packs = PackLoader(LoaderConfig(str(path), capacity=4, text_length=4), rank=0, world_size=1)
        return [pack.keys for pack in itertools.islice(packs, 8)]

    assert keys(url) == keys(folder)
