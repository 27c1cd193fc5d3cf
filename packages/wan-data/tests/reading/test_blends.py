import collections
import itertools
import json
import re
import shutil

import pytest
import torch
from latent_shards import write_latent_shards

from wan_data.index.manifest import MANIFEST_NAME
from wan_data.reading.blends import parts_of
from wan_data.reading.datasets import read_latent_spec, splits
from wan_data.reading.loader import LoaderConfig, PackLoader

BLEND = """
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    blend:
      - {path: videos, weight: 3}
      - {path: images, weight: 1}
  val:
    blend:
      - {path: videos, weight: 1}
      - {path: images, split_part: train, weight: 1}
"""


def write(folder, frames, count):
    # The value says which sample it is; the keys are the same in every dataset.
    latents = [torch.full((16, frames, 4, 4), 100.0 * frames + i) for i in range(count)]
    write_latent_shards(folder, [("train", latents), ("val", latents[:4])])


@pytest.fixture(scope="session")
def blend(once):
    def build(folder):
        folder.mkdir()
        write(folder / "videos", 5, 30)
        write(folder / "images", 1, 20)
        (folder / "blend.yaml").write_text(BLEND)

    return once("blend", build) / "blend.yaml"


def loader(path, **changes):
    config = LoaderConfig(str(path), **{"capacity": 64, "packing_buffer": 10, "text_length": 4, **changes})
    return PackLoader(config, rank=0, world_size=1)


def drawn(packs, count):
    return [(pack.keys, pack.tokens_SC.sum().item(), pack.layout) for pack in itertools.islice(packs, count)]


def test_a_blend_draws_by_weight_and_each_dataset_in_permutations(blend):
    keys, mixed, packs = [], 0, 0
    for pack in loader(blend):
        keys += pack.keys
        packs += 1
        mixed += len({key.partition(":")[0] for key in pack.keys}) == 2
        if len(keys) >= 2000:
            break
    assert mixed > packs / 4, "images stand among videos"
    videos = [key for key in keys if key.startswith("videos:")]
    images = [key for key in keys if key.startswith("images:")]
    # 2000 draws of a coin of 3/4: 19 is the standard deviation.
    assert abs(len(videos) - 1500) < 5 * 19
    for stream, size in ((videos, 30), (images, 20)):
        counts = collections.Counter(stream)
        assert len(counts) == size
        # Each was drawn in every whole epoch of its own dataset; packing moves a sample by a buffer at most.
        assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_blend_resumes_exactly(blend, workers):
    whole = loader(blend, num_workers=workers)
    packs, states, wanted = iter(whole), [], []
    for _ in range(4):
        states.append(json.loads(json.dumps(whole.state_dict())))
        wanted += drawn(packs, 1)
    wanted += drawn(packs, 3)
    for step in (0, 2, 3) if workers == 0 else (3,):
        resumed = loader(blend, num_workers=workers)
        resumed.load_state_dict(states[step])
        assert drawn(resumed, 7 - step) == wanted[step:]
    assert len({keys for keys, *_ in wanted}) == len(wanted)


def test_a_pass_over_a_split_of_a_blend_has_every_sample_once(blend):
    keys = [key for pack in loader(blend, split="val") for key in pack.keys]
    assert sorted(keys) == sorted(
        [f"videos:key1{i:03d}" for i in range(4)] + [f"images:key0{i:03d}" for i in range(20)]
    )
    assert splits(blend) == {"train": 50, "val": 24}


def test_a_state_of_other_weights_is_refused(blend, tmp_path):
    state = loader(blend).state_dict()
    for name in ("videos", "images"):
        (tmp_path / name).symlink_to(blend.parent / name)
    other = tmp_path / "blend.yaml"
    other.write_text(BLEND.replace("weight: 3", "weight: 4"))
    with pytest.raises(ValueError, match="of another run: dataset"):
        loader(other).load_state_dict(state)
    other.write_text(BLEND)
    loader(other).load_state_dict(state)


def test_a_dataset_without_a_sample_for_every_reader_is_refused(blend):
    with pytest.raises(ValueError, match="images has 20 training samples for 1 ranks of 25 workers"):
        loader(blend, num_workers=25)


def test_datasets_of_several_latent_spaces_are_refused(dataset, tmp_path):
    for name in "ab":
        shutil.copytree(dataset, tmp_path / name)
    path = tmp_path / "blend.yaml"
    path.write_text("splits: {train: {blend: [{path: a, weight: 1}, {path: b, weight: 1}]}}")
    assert read_latent_spec(path) == read_latent_spec(dataset)
    loader(path, capacity=64, text_length=512)
    original = (tmp_path / "b" / MANIFEST_NAME).read_text()
    for name, other in (
        ("model_id", "another"),
        ("tokenizer", "another"),
        ("text_length", 16),
        ("temporal_stride", 2),
        ("spatial_stride", 4),
        ("mean", [0.0] * 16),
        ("std", [1.0] * 16),
        ("text_dim", 16),
    ):
        manifest = json.loads(original)
        manifest["latent_spec"][name] = other
        (tmp_path / "b" / MANIFEST_NAME).write_text(json.dumps(manifest))
        for read in (read_latent_spec, loader):
            with pytest.raises(
                ValueError, match=rf"of different latent spaces: {name} \({re.escape(str(other))} against"
            ):
                read(path)


def test_videos_of_several_frame_rates_are_refused_and_images_have_none(dataset, tmp_path):
    def of(name, **settings):
        shutil.copytree(dataset, tmp_path / name)
        file = tmp_path / name / MANIFEST_NAME
        manifest = json.loads(file.read_text())
        manifest["settings"] |= settings
        file.write_text(json.dumps(manifest))

    of("images", mode="frames", fps="24")
    of("videos", fps="16")
    of("faster", fps="24000/1001")

    def spec(*names):
        blend = ", ".join(f"{{path: {name}, weight: 1}}" for name in names)
        (tmp_path / "blend.yaml").write_text(f"splits: {{train: {{blend: [{blend}]}}}}")
        loader(tmp_path / "blend.yaml", text_length=None)
        return read_latent_spec(tmp_path / "blend.yaml")

    assert spec("images").fps is None
    assert spec("images", "videos").fps == spec("videos", "images").fps == "16"
    said = r"the dataset in \S+faster .* the dataset in \S+videos .*: fps \(24000/1001 against 16\); use the same"
    with pytest.raises(ValueError, match=said):
        spec("images", "videos", "faster")
    of("damaged", fps=16)
    with pytest.raises(ValueError, match=r"the settings in \S+damaged\S+ are damaged: fps is 16; expected a text"):
        spec("damaged")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("splits: {train: {blend: [{path: videos, weight: 0}]}}", "its weight is 0; it must be a positive number"),
        ("splits: {train: {blend: [{path: videos, weight: .nan}]}}", "its weight is nan"),
        ("splits: {train: {blend: [{path: videos, weight: yes}]}}", "its weight is True"),
        ("splits: {train: {blend: [{path: absent, weight: 1}]}}", "absent is no folder"),
        ("splits: {train: {blend: [{path: videos}, {path: ./videos}]}}", "is listed twice"),
        ("splits: {train: {blend: []}}", "names no dataset"),
        ("splits: {train: {path: videos, split_part: test2}}", "has no split 'test2'; it has train, val"),
        ("splits: {train: {path: videos, aux: {x: y}}}", "aux cannot be used here"),
        ("splits: {train: {path: videos, dataset_config: x.yaml}}", "dataset_config cannot be used here"),
        ("splits: {train: {blend_epochized: [{path: videos}]}}", "names no path"),
        ("splits: {}", "has no splits"),
        ("__module__: os\n__class__: system\nsplits: {train: {path: videos}}", "is no blend of datasets"),
        ("splits: !!python/object/apply:os.system [id]", "is not YAML"),
        ("[]", "is no blend of datasets"),
        ("\x00", "is not YAML"),
    ],
)
def test_blends_of_another_form_are_refused(blend, tmp_path, text, message):
    path = tmp_path / "other.yaml"
    (tmp_path / "videos").symlink_to(blend.parent / "videos")
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parts_of(path)


def test_energon_reads_the_same_blend(blend):
    from megatron.energon.metadataset import load_dataset
    from megatron.energon.metadataset.metadataset_v2 import MetadatasetV2

    assert isinstance(load_dataset(blend), MetadatasetV2)


def test_inspect_knows_weights(blend):
    from wan_data.inspect.statistics import inspect

    found = inspect(blend, capacity=64)["splits"]["train"]
    assert found["weights"] == {"videos": 3.0, "images": 1.0}
    assert [(row["dataset"], row["tokens"], row["samples"]) for row in found["shapes"]] == [
        ("images", 4, 20),
        ("videos", 20, 30),
    ]
    # Of 50 draws, three in four are of the videos, which are three in five of the samples: a deviation is 3 draws.
    assert len(found["drawn_tokens"]) == 50
    assert abs(found["drawn_tokens"].count(20) - 37.5) < 5 * 3.1
    assert found["packing"]["valid_of_capacity"] > 0.9
