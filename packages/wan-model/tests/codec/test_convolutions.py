"""How the autoencoder's convolutions run: TF32 only where it was chosen, and channels last with equal results."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from wan_model.codec.convolutions import computed_with_tf32, prepare_for, tf32_convolutions, to_channels_last
from wan_model.codec.latent_codec import LatentCodec
from wan_model.testing import assert_within, rounding_scale

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
VIDEO = (1, 3, 5, 32, 32)
LATENTS = (1, 16, 2, 4, 4)


def precision() -> str:
    found: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return found


def test_the_setting_is_restored_also_after_a_failure() -> None:
    before = precision()
    for allowed, expected in ((True, "tf32"), (False, "ieee")):
        with contextlib.suppress(RuntimeError), tf32_convolutions(allowed):
            assert precision() == expected
            raise RuntimeError
        assert precision() == before
    torch.backends.cudnn.allow_tf32  # noqa: B018  torch raises if its two interfaces contradict each other


def test_between_the_items_of_an_iterator_the_setting_is_the_callers() -> None:
    def steps() -> Iterator[str]:
        yield precision()
        yield precision()

    before, seen = precision(), []
    for item in computed_with_tf32(steps(), allowed=False):
        seen.append(item)
        assert precision() == before
    assert seen == ["ieee", "ieee"]


@pytest.mark.parametrize(("tf32", "expected"), [(False, "ieee"), (True, "tf32")])
def test_every_convolution_runs_in_the_chosen_precision(tiny_folder: Path, tf32: bool, expected: str) -> None:
    codec = LatentCodec.from_pretrained(tiny_folder, load_text=False, tf32=tf32)
    seen: dict[str, int] = {}

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[precision()] = seen.get(precision(), 0) + 1

    for part in (codec.vae, codec.decoder):
        for module in part.modules():
            if isinstance(module, CONVOLUTIONS):
                module.register_forward_pre_hook(record)
    codec.encode_video(torch.zeros(VIDEO))
    encoding = sum(seen.values())
    codec.decode_video(torch.zeros(LATENTS))
    assert seen.keys() == {expected}
    assert 0 < encoding < seen[expected]


@pytest.mark.parametrize(
    ("device", "dtype", "changed"),
    [("cuda", torch.float32, False), ("cuda:1", torch.bfloat16, True), ("cpu", torch.bfloat16, False)],
)
def test_only_16_bits_on_a_gpu_have_the_channels_last(device: str, dtype: torch.dtype, changed: bool) -> None:
    convolution = nn.Conv3d(2, 3, 3).to(dtype)
    prepare_for(device, convolution)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last_3d) == changed


@pytest.mark.rounding
def test_channels_last_changes_the_format_of_all_weights_and_no_result(tiny_folder: Path, rng: torch.Generator) -> None:
    plain = LatentCodec.from_pretrained(tiny_folder, load_text=False)
    codec = LatentCodec(plain.spec, copy.deepcopy(plain.vae), decoder=copy.deepcopy(plain.decoder))
    for part in (codec.vae, codec.decoder):
        to_channels_last(part)
        for module in part.modules():
            if isinstance(module, CONVOLUTIONS):
                wanted = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
                assert module.weight.is_contiguous(memory_format=wanted)
    video, latents = torch.rand(VIDEO, generator=rng) * 2 - 1, torch.randn(LATENTS, generator=rng)
    results = {"latents": codec.encode_video(video), "video": codec.decode_video(latents)}
    double = LatentCodec(plain.spec, copy.deepcopy(plain.vae).double(), decoder=copy.deepcopy(plain.decoder).double())
    scale = rounding_scale(
        lambda: {
            "latents": double.encode_video(video.double()).double(),
            "video": double.decode_video(latents.double()).double(),
        },
        samples=2,
    )
    assert_within(results["latents"], plain.encode_video(video), scale["latents"])
    assert_within(results["video"], plain.decode_video(latents), scale["video"])
