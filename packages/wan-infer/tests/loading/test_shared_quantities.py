"""What a transformer was trained with is what it is sampled with, or the sampler refuses it by name."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from infer_command import QUICK, refused, run
from safetensors.torch import load_file, save_file

from wan_infer.request.settings import Settings
from wan_infer.sampling.sampler import WanSampler
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.training_checkpoint import read_training_checkpoint
from wan_model.weights.transformer import save_transformer

PROMPT = "one two three four five six seven eight nine ten"
Write = Callable[..., Path]


def texts_given_to(sampler: WanSampler) -> list[torch.Tensor]:
    """The texts that the transformer is given in one run of sampling."""
    seen: list[torch.Tensor] = []
    prepare = sampler.model.prepare_text

    def noting(text_BTD: torch.Tensor) -> Any:
        seen.append(text_BTD)
        return prepare(text_BTD)

    sampler.model.prepare_text = noting  # type: ignore[method-assign]
    sampler.sample_latents(["a", PROMPT], settings=Settings(steps=1, negative_prompt=""), width=32, height=48, frames=5)
    return seen


@pytest.mark.parametrize(
    ("transformer", "of_data", "padded", "cut"),
    [
        ({}, None, 512, 512),  # random data of a version that recorded nothing
        ({}, 512, 512, 512),
        ({}, 8, 512, 8),  # an earlier version padded to 512 whatever the data were cut to
        ({"text_len": 512}, 8, 512, 8),
        ({"text_len": 8}, 8, 8, 8),
        ({"text_len": 8}, None, 8, 8),
    ],
)
@pytest.mark.parametrize("exported", [False, True])
def test_prompts_are_cut_and_padded_as_in_training(
    model_folder: Path,
    sampler: WanSampler,
    write_checkpoint: Write,
    tmp_path: Path,
    transformer: dict[str, int],
    of_data: int | None,
    padded: int,
    cut: int,
    exported: bool,
) -> None:
    spec = None if of_data is None else {**sampler.spec.to_dict(), "text_length": of_data}
    checkpoint = write_checkpoint(tmp_path / "run", 10, spec=spec, transformer=transformer)
    if exported:
        config, found, state = read_training_checkpoint(checkpoint)
        save_transformer(state, config, tmp_path / "model/transformer", spec=found)
        for part in ("vae", "text_encoder", "tokenizer"):
            (tmp_path / "model" / part).symlink_to(model_folder / part)
        own = WanSampler.from_pretrained(tmp_path / "model", device="cpu")
    else:
        own = WanSampler.from_training_checkpoint(tmp_path / "run", model_folder, device="cpu")
    (text_BTD,) = texts_given_to(own)
    assert text_BTD.shape == (4, padded, TINY_CONFIG.text_dim)
    tokens = min(own.token_counts[PROMPT], cut)
    assert own.token_counts[PROMPT] > 8
    assert bool(text_BTD[1, :tokens].any(dim=-1).all())
    assert not text_BTD[1, tokens:].any()


OTHERS: dict[str, Any] = {
    "channels": 8, "temporal_stride": 2, "spatial_stride": 4, "mean": [0.0] * 16, "std": [1.0] * 16, "text_dim": 16,
    "tokenizer": "another", "model_id": "vae-other", "text_encoder": "another",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("exported", [False, True])
def test_every_quantity_that_differs_is_refused_by_name(
    model_folder: Path, sampler: WanSampler, write_checkpoint: Write, tmp_path: Path, name: str, exported: bool
) -> None:
    spec = {**sampler.spec.to_dict(), name: OTHERS[name]}
    if name == "channels":
        spec |= {"mean": [0.0] * 8, "std": [1.0] * 8}
    if exported:
        shutil.copytree(model_folder, tmp_path / "model")
        (tmp_path / "model/transformer/latent_spec.json").write_text(json.dumps(spec))
        given, origin = ("--model", tmp_path / "model"), "model"
    else:
        write_checkpoint(tmp_path / "run", 10, spec=spec)
        given, origin = ("--model", model_folder, "--checkpoint_dir", tmp_path / "run"), "run"
    said = refused(*given, "--prompts", "a", "--output_folder", tmp_path / "videos", *QUICK)
    assert f"the transformer {origin} (fingerprint " in said
    assert "are of different latent spaces: " in said
    assert f"{name} ({OTHERS[name]} against " in said
    assert not (tmp_path / "videos").exists()


def test_another_word_embedding_is_refused_by_name(
    model_folder: Path, sampler: WanSampler, write_checkpoint: Write, tmp_path: Path
) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(other / "text_encoder/model.safetensors")
    save_file({**tensors, "shared.weight": tensors["shared.weight"].flip(0)}, other / "text_encoder/model.safetensors")
    own = sampler.spec.to_dict()
    write_checkpoint(tmp_path / "run", 10, spec=own)
    given = ("--model", other, "--checkpoint_dir", tmp_path / "run", "--prompts", "a")
    said = refused(*given, "--output_folder", tmp_path / "videos", *QUICK)
    assert f"are of different latent spaces: text_encoder ({own['text_encoder']} against " in said
    assert not (tmp_path / "videos").exists()
    del own["text_encoder"]  # of an earlier version
    write_checkpoint(tmp_path / "earlier", 10, spec=own)
    accepted = WanSampler.from_training_checkpoint(tmp_path / "earlier", model_folder, device="cpu")
    assert accepted.spec.text_encoder == sampler.spec.text_encoder


def test_records_of_texts_that_contradict_each_other_are_refused(
    model_folder: Path, write_checkpoint: Write, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "run", 10, transformer={"text_len": 8})
    with pytest.raises(ValueError, match=r"the transformer run takes texts of 8 tokens and the captions .* cut to 512"):
        WanSampler.from_training_checkpoint(tmp_path / "run", model_folder, device="cpu")


def test_a_transformer_of_other_latent_channels_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model/transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 8, "out_channels": 8}))
    said = refused("--model", tmp_path / "model", "--prompts", "a", "--output_folder", tmp_path / "videos", *QUICK)
    assert (
        "the transformer model was made for latent channels of 8; the given text encoder and autoencoder have 16"
        in said
    )


def test_a_model_of_another_objective_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model/scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    said = refused("--model", tmp_path / "model", "--prompts", "a", "--output_folder", tmp_path / "videos", *QUICK)
    assert f"{file}: prediction_type is 'v_prediction' where Wan 2.1 has 'flow_prediction'; take" in said


@pytest.mark.parametrize(
    ("recorded", "flags", "rate"),
    [("24000/1001", (), Fraction(24000, 1001)), (None, (), Fraction(16)), ("24", ("--fps", "12"), Fraction(12))],
)
def test_videos_have_the_frame_rate_of_the_data(
    model_folder: Path,
    sampler: WanSampler,
    write_checkpoint: Write,
    tmp_path: Path,
    recorded: str | None,
    flags: tuple[str, ...],
    rate: Fraction,
) -> None:
    spec = dataclasses.replace(sampler.spec, fps=recorded)
    write_checkpoint(tmp_path / "run", 10, spec=spec.to_dict())
    given = ("--model", model_folder, "--checkpoint_dir", tmp_path / "run", "--prompts", "a", *flags)
    done = run(*given, "--save_file", tmp_path / "a.mp4", *QUICK)
    assert done.exit_code == 0, done.stderr
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == rate
    warned = "Warning: --fps is 12 and the transformer was trained on 24 frames a second; leave --fps out"
    assert (warned in done.stderr) == bool(flags)
