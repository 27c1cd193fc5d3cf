"""One forward step: a pack, its noise, the model's answer, the loss.

Import only after ``wan_train.engine.start``.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.bridge.training.state import GlobalState
from megatron.core import parallel_state
from torch import Tensor

from wan_model import PackLayout
from wan_model.flow import FlowMatching, NoisyPack, loss_sum
from wan_train.dataset import NumberedPack
from wan_train.seeds import generator_for

LOSS = "loss"


@dataclasses.dataclass
class Counts:
    """What this rank has trained on since the counts were last taken."""

    samples: int = 0
    tokens: int = 0
    tokens_padded: int = 0


def _loss(noisy: NoisyPack, layout: PackLayout, predicted: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, tokens = loss_sum(predicted, noisy, layout)
    # Megatron sums gradients and counts over the data- and context-parallel ranks. Of a pack that several ranks share,
    # each has its part of the gradient and the whole loss: the pack counts once.
    counted = tokens if parallel_state.get_context_parallel_rank() == 0 else 0
    count = torch.tensor(counted, dtype=torch.int, device=total.device)
    return total, count, {LOSS: torch.stack([total.detach(), total.new_tensor(tokens)])}


class WanForwardStep:
    """Megatron-Bridge's forward step for flow matching on packs.

    Args:
        device: where the model is.
        dtype: the precision that text embeddings are sent in.
        empty_caption: [L, D], what takes the place of captions that are dropped; None where none are.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, empty_caption: Tensor | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.empty_caption = None if empty_caption is None else empty_caption.to(device, dtype)
        self.counts = Counts()

    def take_counts(self) -> Counts:
        """The counts, which start anew."""
        counts, self.counts = self.counts, Counts()
        return counts

    def __call__(
        self, state: GlobalState, data_iterator: Iterator[NumberedPack], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """Called by the schedule once a microbatch on every stage."""
        numbered = next(data_iterator)
        pack = numbered.pack.to(self.device, self.dtype)
        self.counts.samples += pack.layout.num_samples
        self.counts.tokens += pack.layout.valid
        self.counts.tokens_padded += pack.layout.total

        flow: FlowMatching = state.cfg.model.flow
        generator = generator_for("noise", state.cfg.rng.seed, numbered.number, device=self.device)
        noisy = flow.corrupt(pack, generator, self.empty_caption)
        out = model(
            tokens_SC=noisy.tokens_SC, timesteps_B=noisy.timesteps_B, text_BTD=noisy.text_BTD, layout=pack.layout
        )
        return out, partial(_loss, noisy, pack.layout)
