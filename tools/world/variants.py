"""What is compared: named changes to one setting, or to those that belong together, of the quickstart's training."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from small_world import commands

BASE = "base"
PACKS = 2  # a step
_FIRST_SEED = 1234  # the recipe's


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the comparison.

    Attributes:
        name: for ``--only``.
        what: the change, for the table.
        training: settings of wan-train over those of the base.
        length: of the run, as a multiple of the base's steps.
        sampling: options of wan-infer over those of the base.
        ema: sample from the EMA of the weights.
    """

    name: str
    what: str
    training: Mapping[str, str] = dataclasses.field(default_factory=dict)
    length: int = 1
    sampling: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ema: bool = True

    def settings(self, steps: int, seed: int, overrides: Mapping[str, str]) -> dict[str, str]:
        """All settings of wan-train but the sizes of the model.

        Args:
            steps: of the base.
            seed: 0 for the recipe's own.
            overrides: of every variant, below its own.
        """
        seeds = {key: str(_FIRST_SEED + seed) for key in ("rng.seed", "dataset.seed", "model.init_seed")}
        every = str(steps * self.length)
        return {
            **commands.TRAINING,
            "dataset.capacity": str(commands.CAPACITY),
            "train.global_batch_size": str(PACKS),
            **seeds,
            **overrides,
            **self.training,
            "train.train_iters": every,
            "checkpoint.save_interval": every,
            "validation.interval": every,
        }

    def options(self) -> dict[str, str]:
        """Options of wan-infer."""
        return {**commands.SAMPLING, **self.sampling}


def _one(key: str, *values: str, short: str) -> list[Variant]:
    """A variant for each value of a setting."""
    return [Variant(f"{short}-{value}", f"`{key}={value}`", {key: value}) for value in values]


_NO_GUIDANCE = {"--sample-guide-scale": "1"}
_NO_DROPOUT = {"model.flow.caption_dropout": "0"}
# The objective of the preset for pretraining, all of it.
_PRESET = {
    "model.flow.density": "logit_normal",
    "model.flow.shift": "2.5",
    "model.flow.logit_std": "1.5",
    "model.flow.uniform_mix": "0.2",
}

VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in [
        Variant(BASE, "none: " + ", ".join(f"`{key}={value}`" for key, value in commands.TRAINING.items())),
        Variant("logit_normal", "the density of the preset `pretrain`: logit-normal, shift 2.5", _PRESET),
        *(
            Variant(
                density,
                f"`model.flow.density={density}`, nothing mixed in",
                {"model.flow.density": density, "model.flow.uniform_mix": "0"},
            )
            for density in ("mode", "lognorm")
        ),
        *_one("model.flow.shift", "1.0", "5.0", short="shift"),
        *_one("model.flow.weighting", "none", short="weighting"),
        *_one("model.flow.caption_dropout", "0", "0.3", short="dropout"),
        Variant("no-guidance", "sampled without guidance", sampling=_NO_GUIDANCE),
        Variant(
            "dropout-0-no-guidance",
            "`model.flow.caption_dropout=0`, sampled without guidance",
            _NO_DROPOUT,
            sampling=_NO_GUIDANCE,
        ),
        *_one("ema.decay", "0.9", "0.999", short="ema"),
        Variant("no-ema", "sampled from the weights, not from their EMA", ema=False),
        *_one("optimizer.lr", "1e-3", "6e-3", short="lr"),
        Variant(
            "half-batch",
            "one pack a step, twice the steps; warm-up and EMA as long in tokens",
            {"train.global_batch_size": "1", "scheduler.lr_warmup_iters": "100", "ema.decay": "0.995"},
            length=2,
        ),
    ]
}


def shared_runs(names: Sequence[str], training: Callable[[Variant], Mapping[str, str]]) -> list[list[Variant]]:
    """Variants by the training runs that they need: those with equal settings share one.

    Args:
        names: of variants.
        training: settings of a variant's training.
    """
    found: list[list[Variant]] = []
    for variant in (VARIANTS[name] for name in dict.fromkeys(names)):
        for others in found:
            if training(others[0]) == training(variant):
                others.append(variant)
                break
        else:
            found.append([variant])
    return found
