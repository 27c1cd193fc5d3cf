"""Validation loss and caption gap with fixed samples, timesteps and noise, comparable between runs.

Import only after ``wan_train.engine.start``.

The noise of a sample depends on its key, the timestep and a seed, and all samples have equal weight, so the result does
not depend on layout, capacity or number of ranks. Reported is the unweighted error, per timestep and averaged, and the
caption gap (``wan_train.loop.caption_gap``).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from torch import Tensor

from wan_model import LatentPack, PackLayout
from wan_model.flow import TIMESTEPS, NoisyPack, sample_losses
from wan_model.pack import PackedText, to_device
from wan_train.config.schema import ValidationConfig
from wan_train.data.seeds import generator_for
from wan_train.engine.upstream.loop import CallbackContext
from wan_train.loop import caption_gap
from wan_train.model.forward_only import evaluation_mode, forward_only


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """Losses of a validation.

    Attributes:
        samples: number of samples.
        at: mean loss by timestep.
        caption_gap: see ``wan_train.loop.caption_gap``; None if it is not computed.
    """

    samples: int
    at: dict[float, float]
    caption_gap: float | None = None

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


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """One forward pass.

    Attributes:
        pack: its number.
        timestep: of all samples.
        sum: the sum that the losses are added to.
        captions: whose captions the samples have.
    """

    pack: int
    timestep: float
    sum: int
    captions: Literal["own", "others"] = "own"


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
        self.samples = 0
        self._mine: dict[int, LatentPack] = {}
        texts: dict[str, PackedText] = {}
        members: list[tuple[str, ...]] = []  # keys of each pack's samples
        cpu = torch.device("cpu")
        compared = caption_gap.SAMPLES if config.caption_gap else 0
        singles = _noting_texts(itertools.islice(packs, config.samples), texts, compared)
        for number, pack in enumerate(merge(singles, capacity, multiple)):
            self.samples += pack.layout.num_samples
            members.append(pack.keys)
            # The first one fills up ranks that have fewer packs than others, see ``run``.
            if number % ranks == rank or number == 0:
                self._mine[number] = pack.to(cpu, dtype)
        if not members:
            raise ValueError("the validation split is empty; prepare validation data, or set validation.interval to 0")
        others = _captions_of_others(texts, config.seed)
        self._compared = len(others)
        self._others: dict[int, PackedText] = {}  # of each pack
        self._counts: dict[int, Tensor] = {}  # which of its samples are compared, 0 or 1
        for number, pack in self._mine.items():
            if any(key in others for key in pack.keys):
                foreign = PackedText.join([others.get(key) or _empty_text(pack.texts) for key in pack.keys])
                self._others[number] = dataclasses.replace(foreign, rows_RD=foreign.rows_RD.to(dtype))
                self._counts[number] = torch.tensor([float(key in others) for key in pack.keys], dtype=torch.float64)
        each_rank = [
            [
                one
                for number in range(other, len(members), ranks)
                for one in self._evaluations(number, compared=any(key in others for key in members[number]))
            ]
            for other in range(ranks)
        ]
        self._own = each_rank[rank]
        # With FSDP all ranks gather weights together, so each must make as many calls as the rank with most.
        self._calls = max(map(len, each_rank))

    def _evaluations(self, pack: int, *, compared: bool) -> list[_Evaluation]:
        timesteps = self.config.timesteps
        found = [_Evaluation(pack, timestep, place) for place, timestep in enumerate(timesteps)]
        if compared:
            found.append(_Evaluation(pack, caption_gap.TIMESTEP, len(timesteps)))
            found.append(_Evaluation(pack, caption_gap.TIMESTEP, len(timesteps) + 1, "others"))
        return found

    def run(self, context: CallbackContext) -> ValidationResult | None:
        """The losses of the current weights, on the last pipeline stage; None on the other stages."""
        timesteps = self.config.timesteps
        counted = len(self._own)
        todo = [*self._own, *[_Evaluation(0, timesteps[0], 0)] * (self._calls - counted)]
        sums = torch.zeros(len(timesteps) + 2, dtype=torch.float64, device=self.device)
        places = iter(range(len(todo)))

        def loss_of(noisy: NoisyPack, pack: LatentPack, one: _Evaluation, predicted: Tensor) -> Any:
            losses = sample_losses(predicted, noisy, pack.layout)
            if next(places) < counted:
                summed = losses.double()
                if one.sum >= len(timesteps):
                    summed = summed * to_device(self._counts[one.pack], self.device)
                sums[one.sum] += summed.sum()
            return losses.mean(), torch.ones((), dtype=torch.int, device=self.device), {}

        def forward(iterator: Iterator[_Evaluation], model: Any) -> Any:
            one = next(iterator)
            pack = self._mine[one.pack]
            if one.captions == "others":
                pack = dataclasses.replace(pack, texts=self._others[one.pack])
            pack = pack.to(self.device, self.dtype)
            noisy = corrupt_at(pack, one.timestep, self.config.seed)
            out = model(
                tokens_SC=noisy.tokens_SC, timesteps_B=noisy.timesteps_B, text_BTD=noisy.text_BTD, layout=pack.layout
            )
            return out, partial(loss_of, noisy, pack, one)

        with evaluation_mode(context.model):
            forward_only(context.model, forward, todo, context.state.cfg.model.seq_length)
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return None
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        *totals, own, others = sums.tolist()
        gap = others / own if self._compared and own > 0 else math.nan
        return ValidationResult(
            self.samples,
            {timestep: total / self.samples for timestep, total in zip(timesteps, totals, strict=True)},
            gap if math.isfinite(gap) else None,
        )


def _noting_texts(packs: Iterable[LatentPack], texts: dict[str, PackedText], count: int) -> Iterator[LatentPack]:
    """The same packs of one sample each; the texts of the first ones are kept."""
    for number, pack in enumerate(packs):
        if number < count:
            texts[pack.keys[0]] = pack.texts
        yield pack


def _captions_of_others(texts: dict[str, PackedText], seed: int) -> dict[str, PackedText]:
    """By key of the sample that gets it."""
    keys = list(texts)
    found = caption_gap.partners(keys, [caption_gap.caption_id(text) for text in texts.values()], seed)
    return {key: texts[keys[other]] for key, other in zip(keys, found, strict=True) if other is not None}


def _empty_text(like: PackedText) -> PackedText:
    """Zeros, for a sample that is not compared."""
    return PackedText(like.rows_RD[:0].float(), like.places_R[:0], 1, like.length)
