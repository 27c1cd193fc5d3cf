"""The autoencoder's convolutions run in TF32 only where it was chosen."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from wan_model.codec.convolutions import computed_with_tf32, tf32_convolutions
from wan_model.codec.latent_codec import LatentCodec

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
