"""``LatentSpec``: its fingerprint, its dictionary, its comparison, the shapes it refuses; and where it is read from."""

import dataclasses
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_model import LatentSpec
from wan_model.weights.model_folder import latent_spec_of, resolve_folder

# What records of earlier versions lack.
UNRECORDED = {"tokenizer", "fps", "text_encoder"}
EMBEDDING, OTHER_NAME = "shared.weight", "encoder.embed_tokens.weight"
SPEC = LatentSpec(
    channels=2,
    temporal_stride=4,
    spatial_stride=8,
    mean=(-0.75, 0.5),
    std=(2.8, 1.4),
    text_dim=4096,
    text_length=512,
    model_id="vae-a-text-b",
)


@pytest.mark.parametrize(
    "field",
    [field.name for field in dataclasses.fields(LatentSpec) if field.name not in UNRECORDED | {"channels"}],
)
def test_every_field_counts_in_the_fingerprint(field: str) -> None:
    value: Any = getattr(SPEC, field)
    other: Any = (1.25, *value[1:]) if isinstance(value, tuple) else (value + "x" if field == "model_id" else value * 2)
    changed = dataclasses.replace(SPEC, **{field: other})
    assert changed.fingerprint != SPEC.fingerprint
    with pytest.raises(ValueError, match=rf"the data \(fingerprint {SPEC.fingerprint}\) and the model .*: {field} \("):
        SPEC.require_same(changed, "the data", "the model")


@pytest.mark.parametrize(
    ("field", "ours", "theirs"), [("tokenizer", "a", "b"), ("fps", "16", "24000/1001"), ("text_encoder", "a", "b")]
)
def test_what_earlier_records_lack_agrees_with_everything_and_is_no_part_of_the_fingerprint(
    field: str, ours: str, theirs: str
) -> None:
    one, other = (dataclasses.replace(SPEC, **{field: value}) for value in (ours, theirs))
    assert one.fingerprint == other.fingerprint == SPEC.fingerprint
    with pytest.raises(
        ValueError, match=rf"different latent spaces: {field} \({ours} against {theirs}\); use the same"
    ):
        one.require_same(other, "the data", "the model")
    # Of a version that did not know the field.
    earlier = LatentSpec.from_dict({key: value for key, value in SPEC.to_dict().items() if key != field})
    assert earlier == SPEC
    for agreeing in (earlier, one):
        agreeing.require_same(one, "the data", "the model")
        one.require_same(agreeing, "the data", "the model")
        assert agreeing.completed(one) == one.completed(earlier) == one
    with pytest.raises(ValueError, match="text_length"):
        dataclasses.replace(earlier, text_length=16).require_same(one, "the data", "the model")


def test_a_frame_rate_is_a_number() -> None:
    assert SPEC.frame_rate is None
    assert dataclasses.replace(SPEC, fps="24000/1001").frame_rate == Fraction(24000, 1001)


def test_fingerprint_is_stable_and_survives_json() -> None:
    # A change of this value makes every dataset written before unreadable.
    assert SPEC.fingerprint == "334534dee1762598"
    back = LatentSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert back == SPEC
    back.require_same(SPEC, "one", "the other")


def test_dictionaries_of_other_versions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"another version"):
        LatentSpec.from_dict({**SPEC.to_dict(), "dtype": "float32"})
    with pytest.raises(ValueError, match=r"another version"):
        LatentSpec.from_dict({"channels": 2})
    with pytest.raises(ValueError, match=r"another version"):
        LatentSpec.from_dict([5])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": 3}, "mean of the latent space has 2 values; expected 3 finite numbers"),
        ({"channels": "2"}, "channels of the latent space is '2'; expected a whole number"),
        ({"spatial_stride": 2**40}, "spatial_stride of the latent space is 1099511627776; expected a whole number"),
        ({"text_dim": 10**9}, "text_dim of the latent space is 1000000000; expected a whole number"),
        ({"std": [1.0, 0.0]}, r"std of the latent space has 0\.0 in it; expected 2 positive numbers"),
        ({"std": [1.0, "2.8"]}, "std of the latent space has '2.8' in it; expected 2 positive numbers"),
        ({"mean": [1.0, float("nan")]}, "mean of the latent space has nan in it; expected 2 finite numbers"),
        ({"mean": 5}, "mean of the latent space is 5; expected 2 finite numbers"),
        ({"model_id": None}, "model_id of the latent space is None; expected a text"),
        ({"tokenizer": 5}, "tokenizer of the latent space is 5; expected a text or null"),
        ({"text_encoder": 5}, "text_encoder of the latent space is 5; expected a text or null"),
        ({"fps": 16}, "fps of the latent space is 16; expected a text such as 16 or 24000/1001, or null"),
        ({"fps": "16/0"}, "fps of the latent space is '16/0'; expected a text such as"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        LatentSpec.from_dict({**SPEC.to_dict(), **changes})


def test_latent_shape() -> None:
    assert SPEC.latent_shape(81, 480, 832) == (2, 21, 60, 104)
    assert SPEC.latent_shape(1, 16, 32) == (2, 1, 2, 4)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((80, 480, 832), r"^the number of frames is 80; .* 4n\+1 frames: the nearest are 77 and 81$"),
        ((0, 480, 832), r"^the number of frames is 0; .* the nearest is 1$"),
        ((81, 488, 832), "^the height is 488 pixels; it must be a multiple of 16: the nearest are 480 and 496$"),
        ((81, 480, 0), "^the width is 0 pixels; .* the nearest is 16$"),
    ],
)
def test_sizes_that_would_be_cut_are_refused(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPEC.latent_shape(*size)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of what defines the latent space, free to be changed."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny_folder / part, tmp_path / part)
    return tmp_path


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_spec_of_a_folder(folder: Path) -> None:
    from diffusers import AutoencoderKLWan

    spec, config = latent_spec_of(folder), AutoencoderKLWan.load_config(folder / "vae")
    assert (spec.channels, spec.temporal_stride, spec.spatial_stride) == (16, 4, 8)
    assert (spec.text_dim, spec.text_length) == (32, 512)
    assert (list(spec.mean), list(spec.std)) == (config["latents_mean"], config["latents_std"])
    assert latent_spec_of(folder, text_length=226).fingerprint != spec.fingerprint


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_other_weights_are_another_space_and_another_precision_is_not(folder: Path, file: str) -> None:
    before, tensors = latent_spec_of(folder), load_file(folder / file)
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / file)
    assert latent_spec_of(folder) == before
    save_file({key: tensor + 0.25 for key, tensor in tensors.items()}, folder / file)
    after = latent_spec_of(folder)
    assert dataclasses.replace(after, model_id=before.model_id, text_encoder=before.text_encoder) == before
    assert after.fingerprint != before.fingerprint


def shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a text encoder as two files and their index, the word embedding under its other name."""
    (folder / "model.safetensors").unlink()
    tensors = {OTHER_NAME if key == EMBEDDING else key: tensor for key, tensor in tensors.items()}
    halves = {f"model-{half}.safetensors": sorted(tensors)[half::2] for half in (0, 1)}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    places = {key: name for name, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


BLOCK = "encoder.block.{}.layer.{}.weight"
MATRICES = [EMBEDDING, BLOCK.format(0, "0.SelfAttention.q"), BLOCK.format(1, "1.DenseReluDense.wo")]


@pytest.mark.parametrize("key", MATRICES)
def test_a_text_encoder_of_equal_norms_and_another_matrix_is_another(folder: Path, key: str) -> None:
    before, file = latent_spec_of(folder), folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key].flip(0)}, file)
    after = latent_spec_of(folder)
    assert (after.model_id, after.fingerprint) == (before.model_id, before.fingerprint), "earlier data stay readable"
    with pytest.raises(
        ValueError, match=rf"spaces: text_encoder \({before.text_encoder} against {after.text_encoder}\)"
    ):
        before.require_same(after, "the data", "the model")


def test_the_same_text_encoder_in_other_files_is_the_same(folder: Path) -> None:
    before, file = latent_spec_of(folder), folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    assert before.text_encoder is not None
    shard(folder / "text_encoder", tensors)
    assert latent_spec_of(folder) == before
    shard_of_embedding = json.loads((file.parent / f"{file.name}.index.json").read_text())["weight_map"][OTHER_NAME]
    stored = load_file(file.parent / shard_of_embedding)
    save_file({key: tensor.bfloat16() for key, tensor in stored.items()}, file.parent / shard_of_embedding)
    assert latent_spec_of(folder) == before


def test_only_rows_of_large_tensors_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an embedding of 2 GiB, which takes no place on the disk."""
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    shard(folder / "text_encoder", tensors)
    index = folder / "text_encoder/model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    rows, columns = 1 << 20, 512
    header = json.dumps(
        {EMBEDDING: {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}}
    )
    with (folder / "text_encoder/large.safetensors").open("wb") as large:
        large.write(len(header).to_bytes(8, "little") + header.encode())
        large.truncate(8 + len(header) + 4 * rows * columns)
    index.write_text(json.dumps({"weight_map": {**places, EMBEDDING: "large.safetensors"}}))
    read, convert = [], torch.Tensor.to

    def noting(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        read.append(tensor.numel())
        return convert(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "to", noting)
    assert latent_spec_of(folder).text_encoder is not None
    assert columns in read
    assert sum(read) < 100_000


def test_another_vocabulary_is_another_tokenizer_and_another_way_to_write_it_is_not(folder: Path) -> None:
    file = folder / "tokenizer/tokenizer.json"
    before, content = latent_spec_of(folder), json.loads(file.read_text())
    assert before.tokenizer is not None

    def changed(**model: Any) -> LatentSpec:
        file.write_text(json.dumps({**content, "padding": None, "model": {**content["model"], **model}}, indent=1))
        return latent_spec_of(folder)

    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    # As other versions of the library write it: other formatting, the order of tokens, merges as texts.
    reversed_order = dict(reversed(vocabulary.items()))
    assert changed(vocab=reversed_order, merges=[" ".join(pair) for pair in merges]) == before
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    swapped = {**vocabulary, first: vocabulary[second], second: vocabulary[first]}
    others = {changed(vocab=swapped).tokenizer, changed(merges=merges[1:]).tokenizer, before.tokenizer}
    assert len(others) == 3
    with pytest.raises(ValueError, match=rf"different latent spaces: tokenizer \({before.tokenizer} against "):
        before.require_same(latent_spec_of(folder), "the data", "the model")
    # Of Unigram, which UMT5's is: pairs of a token and its score.
    unigram = [[token, -number / 7] for token, number in vocabulary.items()]
    assert changed(vocab=unigram).tokenizer != changed(vocab=unigram[::-1]).tokenizer
    shutil.rmtree(folder / "tokenizer")
    assert latent_spec_of(folder) == dataclasses.replace(before, tokenizer=None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1 where Wan 2.1 has 1000"),
        ({"prediction_type": "epsilon"}, "prediction_type is 'epsilon' where Wan 2.1 has 'flow_prediction'"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas is False where Wan 2.1 has True"),
    ],
    ids=str,
)
def test_weights_of_another_objective_are_refused(
    tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    shutil.copytree(tiny_folder / "transformer", tmp_path / "transformer")
    file = tmp_path / "scheduler/scheduler_config.json"
    # What diffusers writes today of the schedulers that Wan 2.1 is published with, whatever their shift.
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    ):
        scheduler.save_pretrained(file.parent)
        assert resolve_folder(tmp_path, ["transformer"]) == tmp_path
    rewrite(file, **changes)
    with pytest.raises(ValueError, match=f"^{file}: {said}; take the transformer of"):
        resolve_folder(tmp_path, ["transformer"])
    assert resolve_folder(tmp_path, []) == tmp_path


def test_other_autoencoders_are_refused(folder: Path) -> None:
    rewrite(folder / "vae/config.json", is_residual=True, patch_size=2, z_dim=48)
    with pytest.raises(ValueError, match=r"autoencoder of Wan 2\.2"):
        latent_spec_of(folder)
    rewrite(folder / "vae/config.json", _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match="is of a AutoencoderKL; expected an AutoencoderKLWan"):
        latent_spec_of(folder)
    save_file({"other": torch.zeros(1)}, folder / "text_encoder/model.safetensors")
    rewrite(folder / "vae/config.json", _class_name="AutoencoderKLWan", is_residual=False, patch_size=None, z_dim=16)
    with pytest.raises(ValueError, match="holds none of encoder"):
        latent_spec_of(folder)


@pytest.mark.parametrize(
    ("file", "key", "width"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "quant_conv.bias", 32),
        ("text_encoder/model.safetensors", "encoder.final_layer_norm.weight", 32),
    ],
)
def test_tensors_of_another_form_are_named(folder: Path, file: str, key: str, width: int) -> None:
    tensors = load_file(folder / file)
    for tensor, said in (
        (torch.tensor(1.0), rf"of shape \[\]; expected \[{width}\]"),
        (torch.ones(1, width), rf"of shape \[1, {width}\]; expected \[{width}\]"),
        (torch.ones(width, dtype=torch.int8), "of type I8; expected floating-point numbers"),
    ):
        save_file({**tensors, key: tensor}, folder / file)
        with pytest.raises(ValueError, match=f"^{folder / file} holds {key} {said}"):
            latent_spec_of(folder)


def test_matrices_of_a_text_encoder_are_matrices(folder: Path) -> None:
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    for key in MATRICES:
        for tensor, said in (
            (torch.ones(32), r"of shape \[32\]; expected a matrix"),
            (torch.ones(0, 32), r"of shape \[0, 32\]; expected a matrix"),
            (torch.ones(4, 32, dtype=torch.int8), "of type I8; expected floating-point numbers"),
        ):
            save_file({**tensors, key: tensor}, file)
            with pytest.raises(ValueError, match=f"^{file} holds {key} {said}"):
                latent_spec_of(folder)
        save_file({other: tensor for other, tensor in tensors.items() if other != key}, file)
        with pytest.raises(ValueError, match=f"^{file.parent} lacks {key}: its weights are not those of Wan 2.1's"):
            latent_spec_of(folder)


@pytest.mark.parametrize(
    "index",
    [{"transformer_2": ["diffusers", "WanTransformer3DModel"]}, {"boundary_ratio": 0.875}, {"expand_timesteps": True}],
)
def test_pipelines_of_wan_22_are_refused(tiny_folder: Path, tmp_path: Path, index: dict[str, Any]) -> None:
    # What diffusers writes today for Wan 2.1.
    known = {"_class_name": "WanPipeline", "transformer_2": [None, None], "boundary_ratio": None}
    shutil.copytree(tiny_folder / "transformer", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps(known | {"expand_timesteps": False}))
    assert resolve_folder(tmp_path, ["transformer"]) == tmp_path
    (tmp_path / "model_index.json").write_text(json.dumps(known | index))
    with pytest.raises(ValueError, match=r"holds a Wan 2\.2 model"):
        resolve_folder(tmp_path, ["transformer"])
    (tmp_path / "model_index.json").write_text(json.dumps(known | {"transformer_2": 5}))
    with pytest.raises(ValueError, match=r"model_index\.json: transformer_2 is 5; expected a list"):
        resolve_folder(tmp_path, ["transformer"])


def test_folders_that_are_not_models_are_refused(folder: Path) -> None:
    assert resolve_folder(folder, ["vae"]) == folder
    with pytest.raises(ValueError, match="has no transformer folder"):
        resolve_folder(folder, ["vae", "transformer"])
    with pytest.raises(ValueError, match=r"no model at .*absent"):
        resolve_folder(folder / "absent", ["vae"])
    (folder / "vae/config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list; expected an object"):
        latent_spec_of(folder)
    (folder / "vae/config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        latent_spec_of(folder)
    (folder / "vae/config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        latent_spec_of(folder)
