"""Diffusers' ``transformer`` folders in and out, bit for bit, whole or as a rank's part; what is refused."""

import json
import os
import resource
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_model import LatentSpec, Stage, TorchOps, WanConfig, WanDiT, load_transformer, save_transformer
from wan_model.weights.transformer import check_keys, expected_shapes, load_weights, read_config, read_trained_spec

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.fixture
def folder(small_model: WanDiT, tmp_path: Path) -> Path:
    save_transformer(small_model.state_dict(), small_model.config, tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.mark.parametrize("shard_bytes", [10**10, 60_000])
def test_round_trip_through_diffusers_is_bit_equal(
    small_model: WanDiT, small_config: WanConfig, tmp_path: Path, shard_bytes: int
) -> None:
    from diffusers import WanTransformer3DModel

    ours, back = tmp_path / "ours", tmp_path / "diffusers"
    save_transformer(small_model.state_dict(), small_config, ours, shard_bytes=shard_bytes)
    files = list(ours.glob("*.safetensors"))
    assert (len(files) > 2) == (ours / INDEX).exists() == (shard_bytes < 10**10)
    assert all(path.stat().st_size < 70_000 + shard_bytes for path in files)

    theirs, report = WanTransformer3DModel.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    assert equal(theirs.state_dict(), small_model.state_dict())
    theirs.save_pretrained(back, max_shard_size=shard_bytes)
    assert (back / INDEX).exists() == (shard_bytes < 10**10)
    loaded = load_transformer(back)
    assert not loaded.training
    assert loaded.config.to_diffusers() == small_config.to_diffusers()
    assert equal(loaded.state_dict(), small_model.state_dict())


@pytest.mark.parametrize("at_once", [1, 30_000])
def test_every_tensor_arrives_however_often_the_file_is_opened(
    folder: Path, small_model: WanDiT, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("wan_model.weights.transformer._READ_BATCH_BYTES", at_once)
    assert equal(load_transformer(folder).state_dict(), small_model.state_dict())


def test_the_latent_space_of_the_training_data_is_kept_beside_the_weights(
    small_model: WanDiT, small_config: WanConfig, tmp_path: Path
) -> None:
    spec = LatentSpec(16, 4, 8, (0.5,) * 16, (2.0,) * 16, 28, 16, "vae-a-text-b", "digest", "24000/1001")
    save_transformer(small_model.state_dict(), small_config, tmp_path, spec=spec)
    assert read_trained_spec(tmp_path) == spec
    assert load_transformer(tmp_path).config.text_length == small_config.text_length == 16
    (tmp_path / "latent_spec.json").write_text('{"fps": 5}')
    with pytest.raises(ValueError, match=r"latent_spec\.json: a latent specification has the fields"):
        read_trained_spec(tmp_path)
    # Weights of which nothing is known.
    save_transformer(small_model.state_dict(), small_config, tmp_path)
    assert read_trained_spec(tmp_path) is None


def test_precision_of_loading(folder: Path, small_model: WanDiT) -> None:
    loaded = load_transformer(folder, dtype=torch.bfloat16).state_dict()
    kept = {key for key, value in loaded.items() if value.dtype == torch.float32}
    wanted = {key for key in loaded if "time_embedder" in key or "scale_shift_table" in key or "norm2" in key}
    assert kept == wanted
    original = small_model.state_dict().items()
    assert equal(loaded, {key: value if key in kept else value.bfloat16() for key, value in original})


def test_a_save_that_is_killed_leaves_no_mixture_of_two_models(
    small_model: WanDiT, small_config: WanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {key: torch.zeros_like(value) for key, value in small_model.state_dict().items()}
    new = {key: torch.ones_like(value) for key, value in old.items()}
    rename, renamed = Path.replace, 0

    def killed_at_a_rename(self: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += 1
        if renamed == last:
            raise KeyboardInterrupt
        return rename(self, target)

    for last in range(1, 6):
        folder = tmp_path / str(last)
        save_transformer(old, small_config, folder, shard_bytes=60_000)
        renamed = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed_at_a_rename)
            with pytest.raises(KeyboardInterrupt):
                save_transformer(new, small_config, folder, shard_bytes=60_000)
        try:
            loaded = load_transformer(folder).state_dict()
        except ValueError:
            continue
        assert equal(loaded, old) or equal(loaded, new)


@pytest.mark.parametrize(("before", "after"), [(60_000, 10**10), (10**10, 60_000), (30_000, 60_000)])
def test_saving_over_an_earlier_save_leaves_nothing_of_it(
    small_model: WanDiT, small_config: WanConfig, tmp_path: Path, before: int, after: int
) -> None:
    old = {key: torch.zeros_like(value) for key, value in small_model.state_dict().items()}
    save_transformer(old, small_config, tmp_path / "again", shard_bytes=before)
    save_transformer(small_model.state_dict(), small_config, tmp_path / "again", shard_bytes=after)
    save_transformer(small_model.state_dict(), small_config, tmp_path / "fresh", shard_bytes=after)
    assert equal(load_transformer(tmp_path / "again").state_dict(), small_model.state_dict())
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("again", "fresh")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("blocks.1.attn2.norm_k.weight"),
            r"blocks\.1\.attn2\.norm_k\.weight is missing \(expected \[60",
        ),
        (lambda t: t.update(extra=torch.zeros(2, 3)), r"extra is unexpected \(\[2, 3\]\)"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(65)}), r"proj_out\.bias has shape \[65\], expected \[64\]"),
        (lambda t: t.update({"proj_out.bias": torch.tensor(1.0)}), r"proj_out\.bias has shape \[\], expected \[64\]"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("blocks.0")], "and 22 more"),
    ],
    ids=["missing", "unexpected", "misshapen", "a number", "many"],
)
def test_other_tensors_are_named(folder: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(ValueError, match=message):
        load_transformer(folder)
    with pytest.raises(ValueError, match=message):
        save_transformer(tensors, read_config(folder), folder / "elsewhere")
    assert not (folder / "elsewhere").exists()


def test_broken_folders_are_refused(small_model: WanDiT, small_config: WanConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_transformer(tmp_path)
    save_transformer(small_model.state_dict(), small_config, tmp_path, shard_bytes=60_000)
    table = json.loads((tmp_path / INDEX).read_text())
    key, name = next(iter(table["weight_map"].items()))
    # An index that forgets a key is no matter: the files say what they hold.
    del table["weight_map"][key]
    (tmp_path / INDEX).write_text(json.dumps(table))
    assert equal(load_transformer(tmp_path).state_dict(), small_model.state_dict())
    os.mkfifo(tmp_path / "pipe.safetensors")
    for places, said in (
        ({key: f"../{name}"}, "names .*, which is not a file beside it"),
        ({key: "a\0b"}, "names .*, which is not a file beside it"),
        ({key: "absent.safetensors"}, r"names absent\.safetensors, which is missing"),
        ({key: "pipe.safetensors"}, r"pipe\.safetensors is a named pipe; expected a file"),
        ({key: 5}, f": the file of {key} is 5; expected a name"),
        ([], r": weight_map is \[\]; expected an object"),
        (None, ": weight_map is None; expected an object"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError, match=said) as error:
            load_transformer(tmp_path)
        assert str(tmp_path) in str(error.value)
    for path in (*tmp_path.glob("*.safetensors"), tmp_path / INDEX):
        path.unlink()
    with pytest.raises(ValueError, match="only safetensors weights are read"):
        load_transformer(tmp_path)
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(ValueError, match=f"{SINGLE} is a named pipe; expected a file"):
        load_transformer(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_file_that_was_cut_short_is_named(folder: Path, keep: int) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{SINGLE} is (not a complete safetensors file|empty).*download or"):
        load_transformer(folder)


def test_other_variants_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "in_channels": 36, "image_dim": 1280}))
    with pytest.raises(ValueError, match="image-to-video"):
        load_transformer(folder)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_load_their_parts(
    folder: Path,
    small_model: WanDiT,
    split_ops: Callable[[int, int], TorchOps],
    joined: Callable[[list[WanDiT]], dict[str, Tensor]],
    ranks: int,
) -> None:
    parts = [WanDiT(small_model.config, split_ops(rank, ranks)) for rank in range(ranks)]
    for part in parts:
        load_weights(part, folder)
    assert equal(joined(parts), small_model.state_dict())
    assert parts[0].get_parameter("blocks.0.attn1.to_q.weight").shape == (60 // ranks, 60)


def test_stages_load_their_layers(folder: Path, small_model: WanDiT) -> None:
    first = load_transformer(folder, stage=Stage(0, 1, is_first=True, is_last=False)).state_dict()
    last = load_transformer(folder, stage=Stage(1, 2, is_first=False, is_last=True)).state_dict()
    assert {key for key in first if key in last} == {key for key in first if key.startswith("condition_embedder.")}
    assert equal({**first, **last}, small_model.state_dict())


def test_expected_keys_are_diffusers(small_config: WanConfig, diffusers_model: Any) -> None:
    shapes = expected_shapes(small_config)
    assert shapes == {key: tuple(value.shape) for key, value in diffusers_model.state_dict().items()}
    check_keys(shapes, expected_shapes(small_config), "here")


def test_files_appear_whole_or_not_at_all(
    folder: Path, small_config: WanConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = shutil.copytree(folder, folder.parent / "before")
    monkeypatch.setattr("wan_model.weights.safetensors_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_transformer(load_file(folder / SINGLE), small_config, folder)
    assert (folder / SINGLE).read_bytes() == (before / SINGLE).read_bytes()


def test_files_have_the_permissions_of_others(folder: Path, small_config: WanConfig, tmp_path: Path) -> None:
    state = load_file(folder / SINGLE)
    before = os.umask(0o027)
    try:
        save_transformer(state, small_config, tmp_path / "new")
    finally:
        os.umask(before)
    (folder / SINGLE).chmod(0o604)
    save_transformer(state, small_config, folder)
    assert stat.S_IMODE((tmp_path / "new" / SINGLE).stat().st_mode) == 0o640
    assert stat.S_IMODE((folder / SINGLE).stat().st_mode) == 0o604, "an existing file keeps its own"


def test_a_file_that_is_too_large_is_an_error_of_the_system(
    folder: Path, small_config: WanConfig, tmp_path: Path
) -> None:
    state = load_file(folder / SINGLE)
    allowed, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, allowed[1]))
    try:
        with pytest.raises(OSError, match=f"File too large.*{SINGLE}"):
            save_transformer(state, small_config, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list((tmp_path / "new").iterdir())
