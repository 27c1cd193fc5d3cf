"""Packs of random latents and text, for running without data.

A text is a rotation of one random table: to draw as many numbers as a pack of images has text would take longer than a
training step.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wan_model import LatentPack, WanConfig, pack_latents
from wan_train.data.seeds import generator_for

# A prime, so that the rotations of consecutive samples differ.
_STRIDE = 104_729


@dataclasses.dataclass
class MockConfig:
    """Shapes of mock samples; the defaults are those of NVIDIA's recipe (37,440 tokens a sample).

    Attributes:
        shapes: latent frames, rows and columns; the samples of a pack cycle through them.
        context_length: true length of the text embeddings.
        number_packed_samples: samples per pack.
    """

    shapes: list[list[int]] = dataclasses.field(default_factory=lambda: [[24, 104, 60]])
    context_length: int = 512
    number_packed_samples: int = 1


class MockLoader:
    """An infinite stream of random packs; the packs of a step depend on the seed, not on the number of ranks.

    Args:
        settings: shapes.
        model: sizes of the transformer.
        rank, ranks: data-parallel rank and size.
        multiple: packs are padded to a multiple of this many tokens.
        seed: of latents and text.
        purpose: other purposes give other packs.
    """

    def __init__(
        self,
        settings: MockConfig,
        model: WanConfig,
        *,
        rank: int,
        ranks: int,
        multiple: int,
        seed: int,
        purpose: str = "mock",
    ) -> None:
        self.settings, self.model = settings, model
        self.rank, self.ranks, self.multiple, self.seed, self.purpose = rank, ranks, multiple, seed, purpose
        self.drawn = 0
        size = (settings.context_length, model.text_dim)
        self._text_LD = torch.randn(size, generator=generator_for(f"{purpose} text", seed))

    def _text(self, number: int, slot: int) -> Tensor:
        first = (number * self.settings.number_packed_samples + slot) * _STRIDE % self._text_LD.numel()
        return self._text_LD.flatten().roll(first).view_as(self._text_LD)

    def __iter__(self) -> Iterator[LatentPack]:
        """Packs from the current position on."""
        settings = self.settings
        while True:
            number = self.drawn * self.ranks + self.rank
            generator = generator_for(self.purpose, self.seed, number)
            latents, texts, keys = [], [], []
            for slot in range(settings.number_packed_samples):
                shape = settings.shapes[slot % len(settings.shapes)]
                latents.append(torch.randn(self.model.in_channels, *shape, generator=generator))
                texts.append(self._text(number, slot))
                keys.append(f"{self.purpose}-{number}-{slot}")
            self.drawn += 1
            yield pack_latents(
                latents, texts, keys, text_length=self.model.text_length, patch_size=self.model.patch_size,
                multiple=self.multiple,
            )  # fmt: skip

    def position(self) -> Callable[[], dict[str, Any]]:
        """A function that returns the state of now, also after further packs."""
        drawn = self.drawn
        return lambda: {"drawn": drawn}

    def state_dict(self) -> dict[str, Any]:
        """The number of packs drawn."""
        return self.position()()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at that position.

        Raises:
            TypeError: it is not what ``state_dict`` returns.
        """
        if type(state["drawn"]) is not int or state["drawn"] < 0:
            raise TypeError(f"the number of packs drawn is {state['drawn']!r}")
        self.drawn = state["drawn"]
