"""Training written down plainly: torch's operations and optimizer, one loop, no Megatron; in float64.

What every parallel layout is compared with is itself one process of the engine; that process is compared with this.
Results have names, the same ones for this loop and for a run of the engine: ``loss`` and ``norm`` of all steps,
``gradient/KEY`` (Adam's first moment after the second step: 0.09 and 0.1 times the clipped gradients of the first two
steps, which the warm-up from 0 computes with the same weights), ``weight/KEY`` and ``ema/KEY`` after the last step,
``validation`` at all its steps and timesteps, ``gap`` at all its steps; sampled after the last step
``latent-ema/NAME`` and ``latent-weights/NAME``.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rank_calls import alive_adapters
from torch import Tensor
from training_runs import (
    AVERAGE_DECAY,
    CAPTION_DROPOUT,
    EQUALITY_STEPS,
    FULLY_SHARDED,
    SAMPLE_GUIDANCE,
    SAMPLE_SEED,
    SAMPLE_STEPS,
    SAMPLES,
    WEIGHT_DECAY,
    read_log,
    read_tensors,
    steps_of,
)

from wan_model import LatentPack, PackLayout, pad_text, patchify, unpatchify
from wan_model.dit.adapters import add_adapters
from wan_model.dit.lora import LoraSettings
from wan_model.flow import FlowMatching, NoisyPack
from wan_model.pack import PackedText
from wan_model.sampling.denoising import draw_noise
from wan_model.sampling.solvers import Solver
from wan_model.testing import rounding_scale
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.training_adapters import has_adapters, read_adapters
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_model.weights.transformer import init_adapters, load_transformer
from wan_train.data.mock_data import MockConfig, MockLoader
from wan_train.data.seeds import generator_for, seed_for
from wan_train.loop.caption_gap import caption_id, partners

# What the tiny recipe and the options of ``train_for_equality`` say.
PACKS = MockConfig(shapes=[[3, 8, 8], [1, 6, 10], [2, 4, 10]], context_length=512, number_packed_samples=3)
PACKS_A_STEP = 2
INIT_SEED = 1234
FLOW = dataclasses.replace(FlowMatching.pretrain(), caption_dropout=CAPTION_DROPOUT)
EMPTY_CAPTION = torch.zeros(1, TINY_CONFIG.text_dim)
TIMESTEPS = (100.0, 300.0, 500.0, 700.0, 900.0)
VALIDATION_SAMPLES, VALIDATION_SEED, VALIDATION_STEPS = 7, 1234, (2, 4)
# The fully sharded format names modules as they are wrapped.
FIRST_MOMENT = ("optimizer.state.exp_avg.", "optimizer.state.module.module.dit.")

Results = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a run is compared with.

    Attributes:
        start: the model folder that training starts from.
        run: one process of the engine.
        exact: results of the plain loop.
        scale: how far fp32 rounding can move each of them.
    """

    start: Path
    run: Path
    exact: Results
    scale: Results


def learning_rate(step: int) -> float:
    """One step of warm-up from 0, then a cosine from 0.01 to 0.001 over the run's steps."""
    if step == 0:
        return 0.0
    return 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * (step - 1) / (EQUALITY_STEPS - 1)))


def packs_of(seed: int) -> Iterator[LatentPack]:
    """The packs of a run."""
    return iter(MockLoader(PACKS, TINY_CONFIG, rank=0, ranks=1, multiple=1, seed=seed))


def noisy_of(pack: LatentPack, seed: int, number: int) -> NoisyPack:
    """A pack of that number as the model gets it in training, fp32."""
    return FLOW.corrupt(pack, generator_for("noise", seed, number), EMPTY_CAPTION)


def _errors(
    model: torch.nn.Module, noisy: NoisyPack, pack: LatentPack, dropout_seed: int | None = None
) -> list[Tensor]:
    """Squared error of each token, by sample."""
    out = model(noisy.tokens_SC.double(), noisy.timesteps_B, noisy.text_BTD.double(), pack.layout, dropout_seed)
    errors = (out - noisy.target_SC.double()).square().mean(-1)
    return [errors[start:stop] for start, stop in itertools.pairwise(pack.layout.offsets)]


def train_plainly(
    start: Path, seed: int, number_of: Callable[[int], int] = lambda pack: pack, lora: LoraSettings | None = None
) -> Results:
    """Train from a model folder; ``number_of`` says by which number a pack's noise is drawn.

    With ``lora`` adapters are trained, and the model's weights are frozen.
    """
    model = load_transformer(start / "transformer")
    if lora is not None:
        add_adapters(model, lora)
        init_adapters(model, seed=INIT_SEED)
    model = model.double().train()
    named = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    decaying = [parameter for parameter in named.values() if parameter.ndim > 1]  # not biases and norms
    others = [parameter for parameter in named.values() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8, foreach=False,
    )  # fmt: skip
    ema = {key: parameter.detach().clone() for key, parameter in named.items()}
    packs, results, losses, norms = packs_of(seed), {}, [], []
    validations, gaps = [], []
    for step in range(EQUALITY_STEPS):
        optimizer.zero_grad()
        summed, counted = torch.zeros((), dtype=torch.float64), 0
        for number in range(PACKS_A_STEP * step, PACKS_A_STEP * (step + 1)):
            pack = next(packs)
            noisy = noisy_of(pack, seed, number_of(number))
            dropped = None if lora is None else seed_for("lora", seed, number_of(number))
            errors = _errors(model, noisy, pack, dropped)
            total = torch.stack([w * one.sum() for w, one in zip(noisy.weights_B.double(), errors, strict=True)]).sum()
            total.backward()
            summed, counted = summed + total.detach(), counted + pack.layout.valid
        for parameter in named.values():
            assert parameter.grad is not None
            parameter.grad /= counted
        losses.append(summed / counted)
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 1.0, foreach=False))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        if step == 1:
            for key, parameter in named.items():
                results[f"gradient/{key}"] = optimizer.state[parameter]["exp_avg"].clone()
        with torch.no_grad():
            for key, average in ema.items():
                average.mul_(AVERAGE_DECAY).add_(named[key] * (1 - AVERAGE_DECAY))
        if step + 1 in VALIDATION_STEPS:
            validation, gap = _validate(model, seed)
            validations += validation
            gaps.append(gap)
    results.update(loss=torch.stack(losses), norm=torch.stack(norms))
    results.update(validation=torch.stack(validations), gap=torch.stack(gaps))
    results.update(_samples("latent-weights", model, seed))
    results.update(_samples("latent-ema", lambda *given: torch.func.functional_call(model, ema, given), seed))
    results.update({f"weight/{key}": parameter.detach() for key, parameter in named.items()})
    return {**results, **{f"ema/{key}": average for key, average in ema.items()}}


@functools.cache
def _held_out_alone(seed: int) -> list[LatentPack]:
    """The samples of a validation, one a pack."""
    packs = []
    for number, shape in zip(range(VALIDATION_SAMPLES), itertools.cycle(PACKS.shapes), strict=False):
        settings = dataclasses.replace(PACKS, shapes=[shape], number_packed_samples=1)
        loader = MockLoader(settings, TINY_CONFIG, rank=0, ranks=1, multiple=1, seed=seed, purpose="held out")
        loader.drawn = number
        packs.append(next(iter(loader)))
    return packs


@functools.cache
def _held_out(seed: int) -> LatentPack:
    """The samples of a validation in one pack, which is their mean alone (wan-model's tests)."""
    packs = _held_out_alone(seed)
    return LatentPack(
        torch.cat([pack.tokens_SC for pack in packs]),
        PackedText.join([pack.texts for pack in packs]),
        PackLayout(tuple(grid for pack in packs for grid in pack.layout.grids)),
        tuple(key for pack in packs for key in pack.keys),
    )


@torch.no_grad()
def _validate(model: torch.nn.Module, seed: int) -> tuple[list[Tensor], Tensor]:
    """The losses by timestep, and the caption gap."""
    pack = _held_out(seed)
    losses = [_loss_at(model, pack, timestep) for timestep in TIMESTEPS]
    # No two of these samples have the same caption, so each has one that differs.
    ids = [caption_id(text) for text in (PackedText.of([rows], 512) for rows in pack.text_BTD)]
    others = [other for other in partners(pack.keys, ids, VALIDATION_SEED) if other is not None]
    texts = PackedText.of([pack.text_BTD[other] for other in others], 512)
    foreign = dataclasses.replace(pack, texts=texts)
    return losses, _loss_at(model, foreign, 950.0) / _loss_at(model, pack, 950.0)


def _loss_at(model: torch.nn.Module, pack: LatentPack, timestep: float) -> Tensor:
    rows = [
        torch.randn(
            length, pack.tokens_SC.shape[1],
            generator=generator_for(f"validation {key} {timestep:g}", VALIDATION_SEED),
        )
        for key, length in zip(pack.keys, pack.layout.lengths, strict=True)
    ]  # fmt: skip
    noise, sigma = torch.cat(rows), timestep / 1000
    tokens = (1 - sigma) * pack.tokens_SC + sigma * noise
    ones = torch.ones(pack.layout.num_samples)
    noisy = NoisyPack(tokens, noise - pack.tokens_SC, timestep * ones, ones, pack.text_BTD)
    return torch.stack([errors.mean() for errors in _errors(model, noisy, pack)]).mean()


@torch.no_grad()
def _samples(kind: str, model: Callable[..., Any], seed: int) -> Results:
    """Latents sampled with the captions and in the shapes of the first validation samples, each alone."""
    found = {}
    for number, pack in enumerate(_held_out_alone(seed)[:SAMPLES]):
        shape = (TINY_CONFIG.in_channels, *PACKS.shapes[number % len(PACKS.shapes)])
        tokens = patchify(draw_noise(shape, SAMPLE_SEED + number)).double()
        texts = [pack.text_BTD.double(), pad_text([EMPTY_CAPTION], 512).double()]
        solver = Solver("unipc", SAMPLE_STEPS, 5.0)
        for index, timestep in enumerate(solver.timesteps):
            ours, empty = (model(tokens, torch.tensor([timestep]), text, pack.layout) for text in texts)
            tokens = solver.step(index, empty + SAMPLE_GUIDANCE * (ours - empty), tokens)
        found[f"{kind}/{number:02d}"] = unpatchify(tokens, pack.layout.grids[0])
    return found


def write_plain_results(path: str, start: str, seed: int, lora: dict[str, Any] | None = None) -> None:
    """What the loop computes, and how far fp32 rounding can move each of it; with ``lora`` of alive adapters."""
    settings = None
    if lora is not None:
        alive_adapters()
        settings = LoraSettings(**{**lora, "targets": tuple(lora["targets"])})

    def train() -> Results:
        return train_plainly(Path(start), seed, lora=settings)

    kind = "training" if lora is None else "training of adapters"
    # Each result has many elements, so that few samples tell its norm.
    scale = rounding_scale(train, samples=3, name=f"plain {kind}, seed {seed}")
    torch.save((train(), scale), path)


def engine_results(folder: Path) -> Results:
    """The same of a run of the engine."""
    log = read_log(folder)
    steps, validations = steps_of(log), [entry for entry in log if entry.get("event") == "validation"]
    assert [entry["step"] for entry in steps] == list(range(1, EQUALITY_STEPS + 1))
    assert [entry["step"] for entry in validations] == list(VALIDATION_STEPS)
    at = [entry["timesteps"][f"{timestep:g}"] for entry in validations for timestep in TIMESTEPS]
    results = {
        "loss": torch.tensor([entry["loss"] for entry in steps], dtype=torch.float64),
        "norm": torch.tensor([entry["grad_norm"] for entry in steps], dtype=torch.float64),
        "validation": torch.tensor(at, dtype=torch.float64),
        "gap": torch.tensor([entry["caption_gap"] for entry in validations], dtype=torch.float64),
    }
    moments = read_tensors(find_checkpoint(folder, 2), FIRST_MOMENT)
    for key, moment in moments.items():
        # The fully sharded format names the moment behind the tensor.
        if not key.endswith((".exp_avg_sq", ".step")):
            results[f"gradient/{key.removesuffix('.exp_avg')}"] = moment
    checkpoint = find_checkpoint(folder, EQUALITY_STEPS)
    if has_adapters(checkpoint):
        weights = read_adapters(checkpoint)
    else:
        config, _, weights = read_training_checkpoint(checkpoint, dtype=torch.float32)
        assert config == TINY_CONFIG
    results.update({f"weight/{key}": value for key, value in weights.items()})
    results.update({f"ema/{key}": value for key, value in read_tensors(checkpoint, ("ema.",)).items()})
    records = [json.loads(line) for line in (folder / "samples" / "samples.jsonl").read_text().splitlines()]
    for record in records[-SAMPLES:]:
        latent = torch.load(folder / "latents" / f"{EQUALITY_STEPS}-{record['name']}.pt", weights_only=True)
        results[f"latent-{record['weights']}/{record['name']}"] = latent
    return results


def kept_by(settings: list[str], results: Results) -> Results:
    """Those of the results that a run with these settings has: fully sharded runs keep no EMA."""
    absent = ("ema/", "latent-ema/") if FULLY_SHARDED in settings else ("latent-weights/",)
    return {name: value for name, value in results.items() if not name.startswith(absent)}
