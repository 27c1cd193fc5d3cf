"""Validation loss with fixed samples, timesteps and noise, comparable between runs.

Import only after ``wan_train.engine.start``.

The noise of a sample depends on its key, the timestep and a seed, and all samples have equal weight, so the result does
not depend on layout, capacity or number of ranks. Reported is the unweighted error, per timestep and averaged.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from wan_model import LatentPack, PackLayout
from wan_model.flow import TIMESTEPS, NoisyPack, sample_losses
from wan_model.pack import PackedText, to_device
from wan_train.config.schema import ValidationConfig
from wan_train.data.seeds import generator_for
from wan_train.engine.upstream.loop import CallbackContext


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """Losses of a validation.

    Attributes:
        samples: number of samples.
        at: mean loss by timestep.
    """

    samples: int
    at: dict[float, float]

    @property
    def loss(self) -> float:
        """Mean over the timesteps."""
        return sum(self.at.values()) / len(self.at)


def merge(packs: Iterable[LatentPack], capacity: int, multiple: int) -> Iterator[LatentPack]:
    """Concatenate consecutive packs up to ``capacity`` tokens, including padding."""
    waiting: list[LatentPack] = []

    def whole() -> LatentPack:
        layout = PackLayout(tuple(grid for pack in waiting for grid in pack.layout.grids)).padded_to(multiple)
        rows = [pack.tokens_SC[: pack.layout.valid] for pack in waiting]
        rows.append(rows[0].new_zeros(layout.padding, rows[0].shape[1]))
        texts = PackedText.join([pack.texts for pack in waiting])
        return LatentPack(torch.cat(rows), texts, layout, tuple(key for pack in waiting for key in pack.keys))

    usable = capacity - capacity % multiple
    for pack in packs:
        if waiting and sum(one.layout.valid for one in (*waiting, pack)) > usable:
            yield whole()
            waiting = []
        waiting.append(pack)
    if waiting:
        yield whole()


def corrupt_at(pack: LatentPack, timestep: float, seed: int) -> NoisyPack:
    """The pack at one timestep with the noise of each sample; no caption dropout, no weighting."""
    sigma = timestep / TIMESTEPS
    clean = pack.tokens_SC.float()
    noise = torch.zeros(clean.shape)
    for key, (start, stop) in zip(pack.keys, itertools.pairwise(pack.layout.offsets), strict=True):
        generator = generator_for(f"validation {key} {timestep:g}", seed)
        # On the CPU: random numbers of a GPU depend on its model.
        noise[start:stop] = torch.randn(stop - start, clean.shape[1], generator=generator)
    noise = to_device(noise, clean.device)
    ones = torch.ones(pack.layout.num_samples, device=clean.device)
    return NoisyPack((1 - sigma) * clean + sigma * noise, noise - clean, timestep * ones, ones, pack.text_BTD)


class Validator:
    """Runs validations with the model of the training loop.

    Args:
        config: the ``validation`` section.
        packs: every sample of the split, one per pack, equal on every rank; each rank keeps its share.
        capacity, multiple: capacity and padding of the packs.
        device, dtype: device of the model, and precision of the texts.

    Raises:
        ValueError: the split has no sample.
    """

    def __init__(
        self,
        config: ValidationConfig,
        packs: Iterable[LatentPack],
        *,
        capacity: int,
        multiple: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.samples = self.packs = 0
        self._mine: dict[int, LatentPack] = {}
        cpu = torch.device("cpu")
        for number, pack in enumerate(merge(itertools.islice(packs, config.samples), capacity, multiple)):
            self.samples += pack.layout.num_samples
            self.packs += 1
            # The first one fills up ranks that have fewer packs than others, see ``run``.
            if number % ranks == rank or number == 0:
                self._mine[number] = pack.to(cpu, dtype)
        if not self.packs:
            raise ValueError("the validation split is empty; prepare validation data, or set validation.interval to 0")

    def run(self, context: CallbackContext) -> ValidationResult | None:
        """The losses of the current weights, on the last pipeline stage; None on the other stages."""
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine = [(number, timestep) for number in range(rank, self.packs, ranks) for timestep in self.config.timesteps]
        # With FSDP all ranks gather weights together, so each must make as many calls as the rank with most packs.
        calls = -(-self.packs // ranks) * len(self.config.timesteps)
        counted = len(mine)
        mine += [(0, self.config.timesteps[0])] * (calls - counted)
        sums = torch.zeros(len(self.config.timesteps), dtype=torch.float64, device=self.device)
        places = iter(range(calls))

        def loss_of(noisy: NoisyPack, pack: LatentPack, timestep: float, predicted: Tensor) -> Any:
            losses = sample_losses(predicted, noisy, pack.layout)
            if next(places) < counted:
                sums[self.config.timesteps.index(timestep)] += losses.double().sum()
            return losses.mean(), torch.ones((), dtype=torch.int, device=self.device), {}

        def forward(iterator: Iterator[tuple[int, float]], model: Any) -> Any:
            number, timestep = next(iterator)
            pack = self._mine[number].to(self.device, self.dtype)
            noisy = corrupt_at(pack, timestep, self.config.seed)
            out = model(
                tokens_SC=noisy.tokens_SC, timesteps_B=noisy.timesteps_B, text_BTD=noisy.text_BTD, layout=pack.layout
            )
            return out, partial(loss_of, noisy, pack, timestep)

        for part in context.model:
            part.eval()
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(mine),
                model=context.model,
                num_microbatches=calls,
                seq_length=context.state.cfg.model.seq_length,
                micro_batch_size=1,
                forward_only=True,
            )
        for part in context.model:
            part.train()
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return None
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        means = (sums / self.samples).tolist()
        return ValidationResult(self.samples, dict(zip(self.config.timesteps, means, strict=True)))
