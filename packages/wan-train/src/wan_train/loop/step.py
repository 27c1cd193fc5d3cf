"""One forward step: a pack, its noise, the model's output, the loss.

Import only after ``wan_train.engine.start``.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from wan_model import PackLayout
from wan_model.dit.flops import training_flops
from wan_model.flow import FlowMatching, NoisyPack, loss_sum, sample_losses
from wan_train.data.pack_iterator import NumberedPack
from wan_train.data.seeds import generator_for, seed_for
from wan_train.engine.upstream.loop import GlobalState

LOSS = "loss"


@dataclasses.dataclass
class Counts:
    """Counts of this rank since ``take_counts`` was last called.

    Attributes:
        samples, tokens: of the packs.
        tokens_padded: tokens including padding.
        flops: required training FLOPs, see ``wan_model.dit.flops``.
        data_wait: seconds spent waiting for packs.
    """

    samples: int = 0
    tokens: int = 0
    tokens_padded: int = 0
    flops: int = 0
    data_wait: float = 0.0


class WanForwardStep:
    """Megatron-Bridge's forward step for flow matching on packs.

    Args:
        device: where the model is.
        dtype: of the text embeddings.
        empty_caption: [L, D], replaces dropped captions; None without caption dropout.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, empty_caption: Tensor | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.empty_caption = None if empty_caption is None else empty_caption.to(device, dtype)
        self.counts = Counts()
        self._losses: list[tuple[tuple[str, ...], Tensor]] = []

    def take_counts(self) -> Counts:
        """Return the counts and reset them."""
        counts, self.counts = self.counts, Counts()
        return counts

    def begin(self) -> None:
        """Start an optimizer step: clear the losses of the last one's samples."""
        self._losses.clear()

    def losses_of_samples(self) -> list[tuple[str, float]]:
        """Key and unweighted loss of every sample since ``begin``, on the last stage. Synchronises the device."""
        return [(key, loss) for keys, losses in self._losses for key, loss in zip(keys, losses.tolist(), strict=True)]

    def __call__(
        self, state: GlobalState, data_iterator: Iterator[NumberedPack], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """Called by the schedule once per micro-batch on every stage."""
        started = time.perf_counter()
        numbered = next(data_iterator)
        self.counts.data_wait += time.perf_counter() - started
        pack = numbered.pack.to(self.device, self.dtype)
        self.counts.samples += pack.layout.num_samples
        self.counts.tokens += pack.layout.valid
        self.counts.tokens_padded += pack.layout.total
        lora = state.cfg.model.lora
        self.counts.flops += training_flops(state.cfg.model.wan_config, pack.layout, lora)

        flow: FlowMatching = state.cfg.model.flow
        generator = generator_for("noise", state.cfg.rng.seed, numbered.number, device=self.device)
        noisy = flow.corrupt(pack, generator, self.empty_caption)
        dropped = None if lora is None or not lora.dropout else seed_for("lora", state.cfg.rng.seed, numbered.number)
        out = model(
            tokens_SC=noisy.tokens_SC, timesteps_B=noisy.timesteps_B, text_BTD=noisy.text_BTD, layout=pack.layout,
            dropout_seed=dropped,
        )  # fmt: skip
        # Not the pack, whose clean tokens and texts are not needed any more.
        return out, partial(self._loss, noisy, pack.layout, pack.keys)

    def _loss(
        self, noisy: NoisyPack, layout: PackLayout, keys: tuple[str, ...], predicted: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, tokens = loss_sum(predicted, noisy, layout)
        self._losses.append((keys, sample_losses(predicted, noisy, layout)))
        # Megatron sums gradients and counts over the data- and context-parallel ranks. Each of the ranks that share a
        # pack has a part of the gradient and the whole loss, so the pack must be counted once.
        counted = tokens if parallel_state.get_context_parallel_rank() == 0 else 0
        # Filled on the device: a copy from the host would wait there for all that is queued.
        count = torch.full((), counted, dtype=torch.int, device=total.device)
        return total, count, {LOSS: torch.stack([total.detach(), torch.full_like(total, tokens)])}
