"""Sampling with the model of the training loop, in its parallel layout, by the forward-only schedule of a validation.

Import only after ``wan_train.engine.start``.

The data-parallel ranks share the videos; each computes packs of at most the training's capacity, every branch of
guidance as a pack of its own. The ranks of a tensor- or context-parallel group have the whole velocity; the last
pipeline stage sends it to the others, so that every rank takes the solver's steps.

Shapes: C latent channels, F latent frames, h rows, w columns; S tokens, K values of a token; L text tokens, D text
width.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from wan_model import PackLayout
from wan_model.config import PatchSize
from wan_model.pack import Grid, PackedText, latent_grid, to_device
from wan_model.sampling.denoising import denoise_latents, draw_noise, guide
from wan_model.sampling.settings import Settings
from wan_train.model.forward_only import forward_only


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """One video.

    Attributes:
        name: of its file, without the ending.
        caption: text, for people.
        text_LD: its embedding, fp32.
        shape: of the latent, [C, F, h, w].
        seed: of the noise.
    """

    name: str
    caption: str
    text_LD: Tensor
    shape: tuple[int, int, int, int]
    seed: int


@dataclasses.dataclass(frozen=True)
class SamplePlan:
    """The videos of a run, equal on every rank.

    Attributes:
        requests: the videos.
        negative_LD: embedding of the negative prompt, fp32; None without guidance.
        settings: of sampling.
        text_length: tokens that texts are padded to.
        cut: sentences about prompts that have more.
    """

    requests: Sequence[SampleRequest]
    negative_LD: Tensor | None
    settings: Settings
    text_length: int
    cut: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What the training loop computes with.

    Attributes:
        model: this rank's parts, of ``MegatronWanDiT`` in Megatron's wrappers, in evaluation mode.
        seq_length: of the schedule.
        patch_size: latent positions (frames, rows, columns) of a token.
        capacity, multiple: tokens of a pack, and what it is padded to a multiple of.
        device, dtype: of the model, and precision of the texts.
    """

    model: list[Any]
    seq_length: int
    patch_size: PatchSize
    capacity: int
    multiple: int
    device: torch.device
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Videos that are computed together.

    Attributes:
        layout: of their pack.
        start: their first token, of those of all videos of this rank.
        texts: of each branch, the prompts' first.
    """

    layout: PackLayout
    start: int
    texts: list[PackedText]

    def tokens(self, tokens_SK: Tensor) -> Tensor:
        """The rows of the pack."""
        rows = tokens_SK[self.start : self.start + self.layout.valid]
        return torch.cat([rows, rows.new_zeros(self.layout.padding, rows.shape[1])])


def sample_latents(plan: SamplePlan, runtime: Runtime) -> list[Tensor]:
    """Normalised latents [C, F, h, w] of all videos, fp32, on the device of every rank; collective."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    grids = [latent_grid(torch.empty(one.shape, device="meta"), runtime.patch_size) for one in plan.requests]
    shares = [range(one, len(grids), ranks) for one in range(ranks)]
    packs = [_consecutive([grids[number] for number in share], runtime.capacity) for share in shares]
    # With FSDP all ranks gather weights together, so each must make as many calls as the rank with most.
    calls = max(map(len, packs))
    used = rank if shares[rank] else 0  # a rank without a video computes along
    requests = [plan.requests[number] for number in shares[used]]
    inputs, start, taken = [], 0, 0
    for pack in packs[used]:
        layout = PackLayout(tuple(pack)).padded_to(runtime.multiple)
        texts = _texts(plan, requests[taken : taken + len(pack)])
        inputs.append(_Inputs(layout, start, [_to_device(text, runtime) for text in texts]))
        start, taken = start + layout.valid, taken + len(pack)

    noise = [to_device(draw_noise(one.shape, one.seed), runtime.device) for one in requests]
    latents = denoise_latents(
        lambda tokens_SK, timestep: _velocity(tokens_SK, timestep, inputs, calls, plan.settings, runtime),
        noise,
        plan.settings,
        patch_size=runtime.patch_size,
    )
    if ranks == 1:
        return latents
    group = parallel_state.get_data_parallel_group()
    members = torch.distributed.get_process_group_ranks(group)
    mine = dict(zip(shares[used], latents, strict=True))
    found = []
    for number, one in enumerate(plan.requests):
        latent = mine[number].contiguous() if number in mine else torch.empty(one.shape, device=runtime.device)
        torch.distributed.broadcast(latent, src=members[number % ranks], group=group)
        found.append(latent)
    return found


def _consecutive(grids: Sequence[Grid], capacity: int) -> list[list[Grid]]:
    """Packs of at most ``capacity`` tokens; a video with more is alone."""
    packs: list[list[Grid]] = []
    filled = 0
    for grid in grids:
        tokens = math.prod(grid)
        if not packs or filled + tokens > capacity:
            packs.append([])
            filled = 0
        packs[-1].append(grid)
        filled += tokens
    return packs


def _texts(plan: SamplePlan, requests: Sequence[SampleRequest]) -> list[PackedText]:
    """Of each branch."""
    branches = [[one.text_LD for one in requests]]
    if plan.settings.guided:
        assert plan.negative_LD is not None, "guidance needs the negative prompt's embedding"
        branches.append([plan.negative_LD] * len(requests))
    return [PackedText.of(texts, plan.text_length) for texts in branches]


def _to_device(text: PackedText, runtime: Runtime) -> PackedText:
    rows, places = to_device(text.rows_RD, runtime.device), to_device(text.places_R, runtime.device)
    return dataclasses.replace(text, rows_RD=rows.to(runtime.dtype), places_R=places)


def _velocity(
    tokens_SK: Tensor, timestep: float, inputs: Sequence[_Inputs], calls: int, settings: Settings, runtime: Runtime
) -> Tensor:
    """The guided velocity of this rank's videos, on every rank of its model-parallel group; collective."""
    evaluations = [(one, text) for one in inputs for text in one.texts]
    branches = len(inputs[0].texts)
    predicted: list[Tensor] = []

    def keep(one: _Inputs, out: Tensor) -> Any:
        predicted.append(out[: one.layout.valid].float())
        # What the schedule expects of a loss.
        return out.new_zeros(()), torch.ones((), dtype=torch.int, device=out.device), {}

    def forward(iterator: Iterator[tuple[_Inputs, PackedText]], model: Any) -> Any:
        one, text = next(iterator)
        timesteps_B = torch.full((one.layout.num_samples,), timestep, dtype=torch.float32, device=runtime.device)
        out = model(tokens_SC=one.tokens(tokens_SK), timesteps_B=timesteps_B, text_BTD=text.padded(), layout=one.layout)
        return out, partial(keep, one)

    todo = evaluations + [evaluations[0]] * (calls * branches - len(evaluations))
    forward_only(runtime.model, forward, todo, runtime.seq_length)
    velocity = torch.empty_like(tokens_SK)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        kept = predicted[: len(evaluations)]
        if settings.guided:
            pairs = zip(kept[::2], kept[1::2], strict=True)
            kept = [guide(conditional, unconditional, settings.guidance) for conditional, unconditional in pairs]
        velocity = torch.cat(kept)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            velocity,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return velocity
