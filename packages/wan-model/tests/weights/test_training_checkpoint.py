import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from wan_model.config import WanConfig
from wan_model.dit.model import WanDiT
from wan_model.latent_spec import LatentSpec
from wan_model.testing.pickled_call import PickledCall
from wan_model.weights.training_checkpoint import checkpoint_steps, find_checkpoint, read_training_checkpoint
from wan_model.weights.transformer import init_weights

CONFIG = WanConfig(num_heads=2, head_dim=12, num_layers=1, ffn_dim=32, text_dim=8, freq_dim=8)
SPEC = LatentSpec(16, 4, 8, (0.0,) * 16, (1.0,) * 16, 8, 512, "vae-1-text-2")


def model_state(seed: int) -> dict[str, Tensor]:
    model = WanDiT(CONFIG)
    init_weights(model, seed=seed)
    return {key: value.detach() for key, value in model.state_dict().items()}


def write(path: Path, state: Mapping[str, object], *, spec: LatentSpec | None = SPEC) -> Path:
    path.mkdir(parents=True)
    beside = {"optimizer.state.exp_avg.blocks.0": torch.ones(3), "rng_state": b"never read"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save({**state, **beside}, checkpoint_id=path, no_dist=True)
    model = {"transformer": CONFIG.to_diffusers(), "latent_spec": spec and spec.to_dict(), "_target_": "os.system"}
    (path / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"train_iters": 3}}))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run with complete checkpoints of steps 10 and 20."""
    folder = tmp_path / "run"
    write(folder / "iter_0000010", model_state(1))
    shutil.copytree(folder / "iter_0000010", folder / "iter_0000020")
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    return folder


def test_reads_what_was_saved(run: Path) -> None:
    config, spec, state = read_training_checkpoint(run / "iter_0000010")
    expected = model_state(1)
    assert (config, spec) == (CONFIG, SPEC)
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_converts_while_reading(run: Path) -> None:
    state = read_training_checkpoint(run / "iter_0000010", dtype=torch.bfloat16)[2]
    for key, value in model_state(1).items():
        kept = "time_embedder" in key or "scale_shift_table" in key or "norm2" in key
        assert torch.equal(state[key], value if kept else value.bfloat16()), key


def test_megatrons_plans_in_the_index_are_understood(run: Path) -> None:
    # What megatron-core 0.16 adds to torch's index.
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))
    data = TensorWriteData(chunk, TensorProperties(torch.bfloat16), torch.Size([3]))
    plan = SavePlan([WriteItem(MetadataIndex("a"), WriteItemType.SHARD, tensor_data=data)])
    change_index(run / "iter_0000010", lambda index: setattr(index, "all_local_plans", [plan]))
    assert read_training_checkpoint(run / "iter_0000010")[0] == CONFIG


def test_made_up_data_has_no_latent_spec(tmp_path: Path) -> None:
    assert read_training_checkpoint(write(tmp_path / "iter_0000001", model_state(1), spec=None))[1] is None


def test_newest_complete_is_found(run: Path) -> None:
    assert list(checkpoint_steps(run)) == [10, 20]
    assert find_checkpoint(run) == run / "iter_0000020"
    assert find_checkpoint(run, 10) == run / "iter_0000010"
    assert find_checkpoint(run / "iter_0000010") == run / "iter_0000010"


def cut_shard(path: Path) -> None:
    shard = next(path.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size - 1)


def pipe_for_shard(path: Path) -> None:
    shard = next(path.glob("*.distcp"))
    shard.unlink()
    os.mkfifo(shard)


DAMAGES = {
    "metadata": (lambda path: (path / ".metadata").unlink(), r"\.metadata is missing"),
    "metadata-cut": (lambda path: os.truncate(path / ".metadata", 300), r"\.metadata is refused"),
    "shard": (lambda path: next(path.glob("*.distcp")).unlink(), r"__0_0\.distcp is missing"),
    "shard-cut": (cut_shard, r"__0_0\.distcp has \d+ bytes where \.metadata names \d+"),
    "shard-pipe": (pipe_for_shard, r"__0_0\.distcp is a named pipe; expected a file"),
    "config": (lambda path: (path / "run_config.yaml").unlink(), r"run_config\.yaml is missing"),
    "config-cut": (lambda path: os.truncate(path / "run_config.yaml", 30), r"run_config\.yaml (lacks|is not)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_partial_is_never_chosen_and_named_when_asked_for(run: Path, damage: str) -> None:
    break_it, message = DAMAGES[damage]
    break_it(run / "iter_0000020")
    assert list(checkpoint_steps(run)) == [10]
    assert find_checkpoint(run) == run / "iter_0000010"
    for ask in (
        lambda: find_checkpoint(run, 20),
        lambda: find_checkpoint(run / "iter_0000020"),
        lambda: read_training_checkpoint(run / "iter_0000020"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    shutil.rmtree(run / "iter_0000010")
    with pytest.raises(ValueError, match=rf"no checkpoint in .* is complete.*{message}"):
        find_checkpoint(run)


def test_absent_ones_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint of step 15; it has 10, 20"):
        find_checkpoint(run, 15)
    with pytest.raises(ValueError, match=r"is one checkpoint, of step 10; step 20 was requested"):
        find_checkpoint(run / "iter_0000010", 20)
    with pytest.raises(ValueError, match=r"no checkpoint folder at .*nowhere"):
        find_checkpoint(tmp_path / "nowhere")
    shutil.copytree(run / "iter_0000010", tmp_path / "moved")
    assert find_checkpoint(tmp_path / "moved") == tmp_path / "moved"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    state = model_state(1)
    local = {**state, "proj_out.weight": state["proj_out.weight"][:32].clone(), "blocks.7.extra": torch.ones(2)}
    del local["proj_out.bias"]
    with pytest.raises(
        ValueError, match=r"proj_out\.bias is missing.*blocks\.7\.extra is unexpected.*shape \[32, 24\]"
    ):
        read_training_checkpoint(write(tmp_path / "iter_0000001", local))


def change_index(path: Path, change: Callable[[Metadata], None]) -> None:
    file = path / ".metadata"
    index: Metadata = pickle.loads(file.read_bytes())
    change(index)
    file.write_bytes(pickle.dumps(index))


def test_parts_that_were_never_stored_are_named(run: Path) -> None:
    def shorten(index: Metadata) -> None:
        entry = index.state_dict_metadata["proj_out.bias"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks[0].sizes = torch.Size([32])

    change_index(run / "iter_0000010", shorten)
    with pytest.raises(ValueError, match=r"only 32 of the 64 values of proj_out\.bias"):
        read_training_checkpoint(run / "iter_0000010")


@pytest.mark.parametrize(
    "change",
    [{"offset": "x"}, {"length": None}, {"length": -1}, {"relative_path": 5}],
    ids=lambda change: f"{next(iter(change))}",
)
def test_an_index_with_values_of_another_type_is_none(run: Path, change: dict[str, object]) -> None:
    def lie(index: Metadata) -> None:
        key, info = next(iter(index.storage_data.items()))
        index.storage_data[key] = dataclasses.replace(info, **change)

    change_index(run / "iter_0000020", lie)
    with pytest.raises(ValueError, match=r"\.metadata is not the index of a distributed checkpoint"):
        read_training_checkpoint(run / "iter_0000020")
    assert list(checkpoint_steps(run)) == [10]


@pytest.mark.parametrize(("name", "value"), [("size", 5), ("properties", None), ("chunks", [3])])
def test_an_entry_with_values_of_another_type_is_none(run: Path, name: str, value: object) -> None:
    change_index(run / "iter_0000020", lambda index: setattr(index.state_dict_metadata["proj_out.bias"], name, value))
    with pytest.raises(ValueError, match=r"\.metadata is not the index of a distributed checkpoint"):
        read_training_checkpoint(run / "iter_0000020")


def test_files_elsewhere_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copy(next((run / "iter_0000010").glob("*.distcp")), tmp_path / "stray.distcp")

    def point_outside(index: Metadata) -> None:
        for key, info in index.storage_data.items():
            index.storage_data[key] = dataclasses.replace(info, relative_path="../../stray.distcp")

    change_index(run / "iter_0000010", point_outside)
    with pytest.raises(ValueError, match="not a file beside it"):
        read_training_checkpoint(run / "iter_0000010")


def test_damaged_content_is_one_sentence(run: Path) -> None:
    shard = next((run / "iter_0000010").glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match="its files are damaged") as caught:
        read_training_checkpoint(run / "iter_0000010")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("owner", "name", "taken"),
    [(WriteItemType, "TENSOR", True), (WriteItemType, "mro", False), (Metadata, "__init__", False)],
)
def test_only_members_of_enums_are_taken_by_name(run: Path, owner: type, name: str, taken: bool) -> None:
    # As Python 3.11.0 to 3.11.3 pickle the members of enums.
    attribute = PickledCall(getattr, owner, name)
    change_index(run / "iter_0000010", lambda index: setattr(index, "planner_data", attribute))
    if taken:
        read_training_checkpoint(run / "iter_0000010")
        return
    with pytest.raises(ValueError, match=f"is refused: it asks for the attribute '{name}'"):
        read_training_checkpoint(run / "iter_0000010")


@pytest.mark.parametrize("way", ["os.system", "subprocess", "eval", "inside"])
def test_code_in_the_index_is_not_run(run: Path, tmp_path: Path, way: str) -> None:
    marker = tmp_path / "marker"
    touch = f"open({str(marker)!r}, 'w').close()"
    payload: object = {
        "os.system": PickledCall(os.system, f"touch {marker}"),
        "subprocess": PickledCall(subprocess.check_call, [sys.executable, "-c", touch]),
        "eval": PickledCall(eval, touch),
        "inside": Metadata({}, planner_data=PickledCall(exec, touch), storage_data={}),
    }[way]
    file = run / "iter_0000020" / ".metadata"
    file.write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match=r"\.metadata is refused: it asks for .*, which no checkpoint needs"):
        find_checkpoint(run, 20)
    assert checkpoint_steps(run) == {10: run / "iter_0000010"}
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists(), "the payload is harmless, so the test shows nothing"


# A key of the transformer or of the latent space, its value in the file, and what is said.
LIES = [
    ("num_layers", 10**9, r"num_layers is 1000000000; expected a whole number from 1 to 1,024"),
    ("num_layers", 2.5, r"num_layers is 2\.5; expected a whole number"),
    ("num_layers", "x", r"num_layers is 'x'; expected a whole number"),
    ("num_layers", [2], r"num_layers is \[2\]; expected a whole number"),
    ("num_layers", None, r"num_layers is None; expected a whole number"),
    ("ffn_dim", 1 << 40, r"ffn_dim is 1099511627776; expected a whole number"),
    ("patch_size", 2, r"patch_size is 2; expected three whole numbers"),
    ("eps", float("inf"), r"eps is inf; expected a number between 0 and 1"),
    ("channels", 10**9, r"channels of the latent space is 1000000000; expected a whole number"),
    ("text_length", "512", r"text_length of the latent space is '512'; expected a whole number"),
    ("std", ["1"] * 16, r"std of the latent space has '1' in it; expected 16 positive numbers"),
    ("mean", {"a": 1}, r"mean of the latent space is \{'a': 1\}; expected 16 finite numbers"),
    ("latent_spec", 5, r"a latent specification has the fields channels, .*; got 5"),
]


def test_a_configuration_that_lies_is_named(run: Path) -> None:
    file = run / "iter_0000020" / "run_config.yaml"
    content = yaml.safe_load(file.read_text())
    for key, value, said in LIES:
        model = dict(content["model"])
        if key in model:
            model[key] = value
        else:
            part = "transformer" if key in model["transformer"] else "latent_spec"
            model[part] = {**model[part], key: value}
        file.write_text(yaml.safe_dump({**content, "model": model}))
        with pytest.raises(ValueError, match=rf"^{file} does not describe a Wan 2\.1 transformer: {said}"):
            read_training_checkpoint(file.parent)
        assert list(checkpoint_steps(run)) == [10], key


def test_configuration_with_python_tags_is_refused(run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    file = run / "iter_0000020" / "run_config.yaml"
    file.write_text(f"model: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ValueError, match="is not YAML: could not determine a constructor"):
        find_checkpoint(run, 20)
    assert not marker.exists()
