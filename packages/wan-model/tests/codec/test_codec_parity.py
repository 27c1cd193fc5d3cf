"""The codec against the arithmetic of diffusers' own pipelines, and its text path against ``WanPipeline``'s."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.prompt_cleaning import clean_prompt
from wan_model.testing import assert_within, rounding_scale

# White space, HTML entities escaped twice, and text whose encoding was broken and has to be mended.
PROMPTS = ["A large  rabbit &amp;amp; a\n\tbutterfly ", "", "schÃ¶ne Wiese \u2026", "一只兔子在草地上"]
LONG = "a rabbit and a butterfly in a meadow " * 100


@pytest.fixture(scope="module")
def codec(tiny_folder: Path) -> LatentCodec:
    return LatentCodec.from_pretrained(tiny_folder)


@pytest.fixture
def video(rng: torch.Generator) -> torch.Tensor:
    return torch.rand(2, 3, 9, 32, 48, generator=rng) * 2 - 1


def statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
    return mean, 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)


@pytest.mark.rounding
def test_encode_is_the_normalised_posterior_mode(codec: LatentCodec, pipeline: Any, video: torch.Tensor) -> None:
    mean, inverse_std = statistics(pipeline.vae)
    with torch.no_grad():
        posterior = pipeline.vae.encode(video).latent_dist
    assert posterior.std.min() > 0, "a sample would differ from the mode"
    got = codec.encode_video(video)
    assert got.shape == (2, *codec.spec.latent_shape(9, 32, 48))
    assert got.dtype == torch.float32
    # A division, or an inverse and a product: three roundings between them.
    torch.testing.assert_close(got, (posterior.mode() - mean) * inverse_std, rtol=3 * 2**-24, atol=0)
    assert torch.equal(got, codec.encode_video(video)), "encoding draws nothing"


@pytest.mark.rounding
def test_decode_inverts_the_statistics(codec: LatentCodec, pipeline: Any, rng: torch.Generator) -> None:
    latents = 3 * torch.randn(1, 16, 2, 4, 4, generator=rng)
    mean, inverse_std = statistics(pipeline.vae)
    with torch.no_grad():
        raw = pipeline.vae.decode(latents / inverse_std + mean, return_dict=False)[0]
    got = codec.decode_video(latents)
    assert got.shape == (1, 3, 5, 32, 32)
    double = LatentCodec(codec.spec, decoder=copy.deepcopy(codec.decoder).double())
    scale = rounding_scale(lambda: {"video": double.decode_video(latents.double()).double()}, samples=2)
    assert_within(got, raw, scale["video"])


def test_decode_clamps_whatever_the_autoencoder_gives(codec: LatentCodec) -> None:
    decoded = codec.decode_video(100 * torch.ones(1, 16, 1, 2, 2))
    assert decoded.abs().max() == 1.0


@pytest.mark.rounding
def test_text_equals_the_pipelines(codec: LatentCodec, pipeline: Any) -> None:
    prompts = [*PROMPTS, LONG]
    wanted = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=512, device="cpu")
    got = codec.encode_text(prompts)
    assert [len(row) for row in got] == [int((row != 0).any(dim=1).sum()) for row in wanted]
    encoder = copy.deepcopy(codec.text_encoder).double()

    def embedded() -> dict[str, torch.Tensor]:
        ids = [codec.tokenizer(clean_prompt(prompt), 512) for prompt in prompts]
        return {prompt: encoder(torch.tensor(row)) for prompt, row in zip(prompts, ids, strict=True)}

    scale = rounding_scale(embedded, samples=2)
    for prompt, row, padded in zip(prompts, got, wanted, strict=True):
        assert_within(row, padded[: len(row)], scale[prompt], prompt)
        assert not padded[len(row) :].any()
    assert len(got[1]) == 1, "the empty prompt is its end mark"
    assert len(got[4]) == 512, "a long prompt is cut"


def test_neighbours_do_not_change_a_prompt(codec: LatentCodec) -> None:
    assert torch.equal(codec.encode_text([PROMPTS[0]])[0], codec.encode_text([LONG, PROMPTS[0]])[1])


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("  a\t\nb  ", "a b"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&lt;b&gt; \u00a0 end", "<b> end"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("", ""),
        ("&nbsp;a", "a"),
        # ftfy unescapes too, but not where there is a tag: both turns of our own are needed.
        ("<i> &amp;lt;", "<i> <"),
    ],
)
def test_cleaning(prompt: str, clean: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(prompt) == clean == prompt_clean(prompt)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 32, 48), r"the number of frames is 8; .* 4n\+1"),
        ((9, 40, 48), "the height is 40 pixels"),
        ((9, 32, 8), "the width is 8 pixels"),
    ],
)
def test_videos_that_would_be_cut_are_refused(codec: LatentCodec, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.encode_video(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize("prompts", ["a prompt", []])
def test_what_is_no_list_of_prompts_is_refused(codec: LatentCodec, prompts: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of at least one prompt"):
        codec.encode_text(prompts)


def test_halves(tiny_folder: Path, codec: LatentCodec) -> None:
    text_only = LatentCodec.from_pretrained(tiny_folder, load_vae=False)
    assert text_only.spec == codec.spec
    with pytest.raises(ValueError, match="loaded without its vae"):
        text_only.encode_video(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match="loaded without its text_encoder"):
        LatentCodec.from_pretrained(tiny_folder, load_text=False).encode_text(["a"])
    with pytest.raises(ValueError, match="no model at"):
        LatentCodec.from_pretrained(tiny_folder / "absent")


@pytest.mark.rounding
def test_precisions(tiny_folder: Path, codec: LatentCodec, video: torch.Tensor) -> None:
    half = LatentCodec.from_pretrained(tiny_folder, vae_dtype=torch.bfloat16, text_dtype=torch.bfloat16)
    assert next(half.vae.parameters()).dtype == next(half.text_encoder.parameters()).dtype == torch.bfloat16
    assert half.spec == codec.spec, "the precision of loading is no part of the latent space"
    latents = half.encode_video(video)
    double = LatentCodec(codec.spec, vae=copy.deepcopy(codec.vae).double())
    scale = rounding_scale(lambda: {"latents": double.encode_video(video).double()}, torch.bfloat16, samples=2)
    assert_within(latents, codec.encode_video(video), scale["latents"])
    assert {latents.dtype, half.decode_video(latents).dtype, half.encode_text(["a"])[0].dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("key", "tensor", "said"),
    [
        ("encoder.mid_block.resnets.0.conv1.bias", None, r"lack .*conv1\.bias \(expected \[16\]\)"),
        ("encoder.mid_block.resnets.0.conv1.bias", torch.tensor(1.0), r"of shape \[\]; expected \[16\]"),
        ("decoder.conv_out.bias", torch.ones(3, dtype=torch.int8), "of type I8; expected floating-point numbers"),
        ("encoder.scale", torch.ones(3), r"have encoder\.scale, which Wan 2\.1's have not"),
    ],
    ids=["missing", "a number", "integers", "unknown"],
)
def test_an_autoencoder_of_other_weights_is_refused(
    key: str, tensor: torch.Tensor | None, said: str, tiny_folder: Path, tmp_path: Path
) -> None:
    for part in ("vae", "text_encoder"):
        shutil.copytree(tiny_folder / part, tmp_path / part)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop(key, None)
    save_file(tensors if tensor is None else {**tensors, key: tensor}, file)
    with pytest.raises(ValueError, match=said) as error:
        LatentCodec.from_pretrained(tmp_path, load_text=False)
    assert str(tmp_path / "vae") in str(error.value)


def test_sampling_needs_neither_diffusers_nor_transformers(tiny_folder: Path) -> None:
    script = """
import sys, torch
from wan_model.codec.latent_codec import LatentCodec
codec = LatentCodec.from_pretrained(sys.argv[1], load_vae=False, load_decoder=True)
assert codec.decode_video(torch.zeros(1, 16, 2, 4, 4)).shape == (1, 3, 5, 32, 32)
assert codec.encode_text(["a rabbit"])[0].shape[1] == 32
assert not {"diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tiny_folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
