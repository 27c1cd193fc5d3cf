"""``python -m bench.plain_training RECIPE STEPS``: training in plain torch, without a framework.

The same model, weights, packs and noise as a run of ``wan-train pretrain --mock`` with these settings, so its losses
are the same numbers; forward, backward and torch's AdamW are timed, one step after another.
"""

import dataclasses
import json
import sys
import time
from typing import Any

import torch

from wan_model import WanConfig, WanDiT, init_weights
from wan_model.flow import FlowMatching, loss_sum
from wan_train.data.mock_data import MockConfig, MockLoader
from wan_train.data.seeds import generator_for

SEED = 1234


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The training that both implementations run.

    Attributes:
        transformer: changes to the tiny recipe's sizes, under diffusers' names.
        shapes: latents of a pack.
        context_length: of their texts.
        rate: learning rate, constant.
    """

    transformer: dict[str, int]
    shapes: list[list[int]]
    context_length: int = 64
    rate: float = 1e-4

    @property
    def tokens(self) -> int:
        """Tokens of a pack."""
        return sum(f * (h // 2) * (w // 2) for f, h, w in self.shapes)

    def options(self) -> list[str]:
        """The recipe as options of ``wan-train pretrain``."""
        samples = len(self.shapes)
        return [
            *("--recipe", "tiny", "--mock", "train.global_batch_size=1"),
            *(f"model.transformer.{key}={value}" for key, value in self.transformer.items()),
            f"dataset.mock_settings.shapes={json.dumps(self.shapes)}",
            f"dataset.mock_settings.number_packed_samples={samples}",
            f"dataset.mock_settings.context_length={self.context_length}",
            f"dataset.capacity={self.tokens}",
            *(f"optimizer.lr={self.rate}", f"optimizer.min_lr={self.rate}", "scheduler.lr_warmup_iters=0"),
            *(f"model.init_seed={SEED}", f"dataset.seed={SEED}", f"rng.seed={SEED}"),
        ]


def tiny_sizes() -> dict[str, Any]:
    """The tiny recipe's model, under diffusers' names."""
    from wan_model.tiny import TINY_CONFIG

    return TINY_CONFIG.to_diffusers()


def train(recipe: Recipe, steps: int) -> dict[str, list[float]]:
    """Seconds and loss of each step."""
    config = WanConfig.from_diffusers({**tiny_sizes(), **recipe.transformer})
    model = WanDiT(config)
    init_weights(model, seed=SEED)
    flow = FlowMatching.pretrain()
    settings = MockConfig(recipe.shapes, recipe.context_length, len(recipe.shapes))
    packs = iter(MockLoader(settings, config, rank=0, ranks=1, multiple=1, seed=SEED))
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    found: dict[str, list[float]] = {"seconds": [], "losses": []}
    for number in range(steps):
        pack = next(packs)
        noisy = flow.corrupt(pack, generator_for("noise", SEED, number))
        start = time.perf_counter()
        out = model(noisy.tokens_SC, noisy.timesteps_B, noisy.text_BTD, pack.layout)
        total, tokens = loss_sum(out, noisy, pack.layout)
        loss = total / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found["seconds"].append(time.perf_counter() - start)
        found["losses"].append(loss.item())
    return found


if __name__ == "__main__":
    print(json.dumps(train(Recipe(**json.loads(sys.argv[1])), int(sys.argv[2]))))
