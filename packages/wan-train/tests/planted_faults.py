"""Called in a process that trains (``warm_ranks.Call``): mistakes in training that leave its loss looking sound.

Validation computes its noisy packs without ``FlowMatching.corrupt`` and so sees the model as sampling would use it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from wan_model.dit.lora import LoraSettings
from wan_model.flow import TIMESTEPS, FlowMatching, NoisyPack
from wan_model.pack import LatentPack, sample_index


def _replace_corrupt(change: Callable[[LatentPack, NoisyPack], NoisyPack]) -> None:
    corrupt = FlowMatching.corrupt

    def changed(self: FlowMatching, pack: LatentPack, *rest: Any) -> NoisyPack:
        return change(pack, corrupt(self, pack, *rest))

    FlowMatching.corrupt = changed  # type: ignore[method-assign]


def shuffle_captions() -> None:
    """Each sample of a pack has the caption of its neighbour."""
    _replace_corrupt(lambda pack, noisy: dataclasses.replace(noisy, text_BTD=noisy.text_BTD.roll(1, dims=0)))


def reverse_sigma() -> None:
    """sigma is the share of the clean latents, as in other papers, and the timestep and the target are not."""

    def reversed_sigma(pack: LatentPack, noisy: NoisyPack) -> NoisyPack:
        clean = pack.tokens_SC.float()
        noise = noisy.target_SC + clean
        sigma = (noisy.timesteps_B / TIMESTEPS)[sample_index(pack.layout, clean.device), None]
        return dataclasses.replace(noisy, tokens_SC=sigma * clean + (1 - sigma) * noise)

    _replace_corrupt(reversed_sigma)


def scale_timesteps() -> None:
    """Timesteps from 0 to 1 instead of 1,000."""
    _replace_corrupt(lambda _, noisy: dataclasses.replace(noisy, timesteps_B=noisy.timesteps_B / TIMESTEPS))


def pad_texts(length: int) -> None:
    """Texts are padded to another length than in validation."""

    def padded(_: LatentPack, noisy: NoisyPack) -> NoisyPack:
        missing = length - noisy.text_BTD.shape[1]
        text_BTD = torch.nn.functional.pad(noisy.text_BTD, (0, 0, 0, missing))
        return dataclasses.replace(noisy, text_BTD=text_BTD)

    _replace_corrupt(padded)


def ignore_factor() -> None:
    """The change of an adapter is B A, whatever its alpha."""
    LoraSettings.factor = property(lambda self: 1.0)  # type: ignore[assignment]


def thaw_base() -> None:
    """The weights under the adapters are trained with them."""
    from wan_train.model import provider

    add = provider.add_adapters

    def thawed(model: Any, settings: LoraSettings) -> None:
        add(model, settings)
        model.requires_grad_(True)

    provider.add_adapters = thawed
