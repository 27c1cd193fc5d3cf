"""The codec against the arithmetic of diffusers' own pipelines, and its text path against ``WanPipeline``'s."""

from pathlib import Path
from typing import Any

import pytest
import torch

from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.prompt_cleaning import clean_prompt
from wan_model.pack import pad_text

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


def test_encode_is_the_normalised_posterior_mode(
    codec: LatentCodec, pipeline: Any, video: torch.Tensor, near: Any
) -> None:
    mean, inverse_std = statistics(pipeline.vae)
    with torch.no_grad():
        posterior = pipeline.vae.encode(video).latent_dist
    assert posterior.std.min() > 0, "a sample would differ from the mode"
    got = codec.encode_video(video)
    assert got.shape == (2, *codec.spec.latent_shape(9, 32, 48))
    assert got.dtype == torch.float32
    near(got, (posterior.mode() - mean) * inverse_std, 1e-6)
    assert torch.equal(got, codec.encode_video(video)), "encoding draws nothing"


def test_decode_inverts_the_statistics(codec: LatentCodec, pipeline: Any, rng: torch.Generator, near: Any) -> None:
    latents = 3 * torch.randn(1, 16, 2, 4, 4, generator=rng)
    mean, inverse_std = statistics(pipeline.vae)
    with torch.no_grad():
        raw = pipeline.vae.decode(latents / inverse_std + mean, return_dict=False)[0]
    got = codec.decode_video(latents)
    assert got.shape == (1, 3, 5, 32, 32)
    near(got, raw, 1e-5)


def test_decode_clamps_whatever_the_autoencoder_gives(codec: LatentCodec) -> None:
    decoded = codec.decode_video(100 * torch.ones(1, 16, 1, 2, 2))
    assert decoded.abs().max() == 1.0


def test_text_equals_the_pipelines(codec: LatentCodec, pipeline: Any, near: Any) -> None:
    wanted = pipeline._get_t5_prompt_embeds([*PROMPTS, LONG], max_sequence_length=512, device="cpu")
    got = codec.encode_text([*PROMPTS, LONG])
    near(pad_text(got, 512), wanted, 1e-5)
    assert [len(row) for row in got] == [int((row != 0).any(dim=1).sum()) for row in wanted]
    assert len(got[1]) == 1, "the empty prompt is its end mark"
    assert len(got[4]) == 512, "a long prompt is cut"


def test_neighbours_do_not_change_a_prompt(codec: LatentCodec, near: Any) -> None:
    near(codec.encode_text([PROMPTS[0]])[0], codec.encode_text([LONG, PROMPTS[0]])[1], 1e-6)


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
    [((8, 32, 48), r"8 frames .* 4n\+1"), ((9, 40, 48), "40 x 48 pixels"), ((9, 32, 8), "32 x 8 pixels")],
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


def test_precisions(tiny_folder: Path, codec: LatentCodec, video: torch.Tensor, near: Any) -> None:
    half = LatentCodec.from_pretrained(tiny_folder, vae_dtype=torch.bfloat16, text_dtype=torch.bfloat16)
    assert next(half.vae.parameters()).dtype == next(half.text_encoder.parameters()).dtype == torch.bfloat16
    assert half.spec == codec.spec, "the precision of loading is no part of the latent space"
    latents = half.encode_video(video)
    near(latents, codec.encode_video(video), 5e-2)
    assert {latents.dtype, half.decode_video(latents).dtype, half.encode_text(["a"])[0].dtype} == {torch.float32}
