"""A LoRA of any dialect as adapters that can be trained further: linears of the blocks, one rank, one factor."""

import dataclasses
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from wan_model.config import WanConfig
from wan_model.dit.lora import DOWN, LINEARS, UP, LoraSettings, adapted_names
from wan_model.weights.lora_reading import LoraBase, LoraWeights, find_lora, read_lora

# Between the factor that settings give and that of a file, whose alphas may be rounded to 16 bits.
_CLOSE = 1e-6


@dataclasses.dataclass(frozen=True)
class FoundAdapters:
    """The adapters of a file.

    Attributes:
        where: the file, or the training checkpoint.
        rank: of all.
        factor: of every B A.
        tensors: A [r, in] and B [out, r], fp32, by diffusers' key: ``blocks.0.attn1.to_q.lora_A.weight``.
        base: the model that they were trained on, where that is recorded.
    """

    where: str
    rank: int
    factor: float
    tensors: dict[str, Tensor]
    base: LoraBase | None

    def alpha(self, *, use_rslora: bool) -> float:
        """The alpha that gives the factor."""
        return self.factor * (math.sqrt(self.rank) if use_rslora else self.rank)

    def has_factor(self, settings: LoraSettings) -> bool:
        """Whether settings of its rank give its factor."""
        return math.isclose(settings.factor, self.factor, rel_tol=_CLOSE)

    def targets(self, config: WanConfig) -> list[str]:
        """The shortest of: all, linears of every block, names."""
        names = set(adapted_names(self.tensors))
        blocks = range(config.num_layers)
        in_all = [name for name in LINEARS if all(f"blocks.{layer}.{name}" in names for layer in blocks)]
        if len(in_all) * config.num_layers < len(names):
            return [
                f"blocks.{layer}.{name}" for layer in blocks for name in LINEARS if f"blocks.{layer}.{name}" in names
            ]
        return ["*"] if len(in_all) == len(LINEARS) else in_all


def read_found_adapters(path: str | os.PathLike[str], config: WanConfig) -> FoundAdapters:
    """Read a LoRA that a training can start from.

    Args:
        path: see ``read_lora``.
        config: of the transformer.

    Raises:
        ValueError: no LoRA of this transformer, or one that is more than adapters of one rank and one factor; the
            message names the first weight.
    """
    where = str(find_lora(path))
    lora = read_lora(where, config)
    _check(lora, config, where)
    first = next(iter(lora.products))
    up, _, factor = lora.products[first]
    tensors = {}
    for key, (own_up, own_down, _) in lora.products.items():
        name = key.removesuffix(".weight")
        tensors[f"{name}.{DOWN}.weight"], tensors[f"{name}.{UP}.weight"] = own_down.float(), own_up.float()
    return FoundAdapters(where, up.shape[1], factor, tensors, lora.base)


def _check(lora: LoraWeights, config: WanConfig, where: str) -> None:
    """Refuse what is no set of adapters of one rank and factor; differences of zeros change nothing."""
    linears = {f"blocks.{layer}.{name}.weight" for layer in range(config.num_layers) for name in LINEARS}
    other = [key for key in lora.products if key not in linears]
    other += [key for key, (difference, _) in lora.differences.items() if bool(torch.any(difference))]
    if other:
        raise ValueError(
            f"{where} changes {other[0]}{_and_more(other)}, which is no LoRA on a linear of the blocks, so it "
            f"cannot be trained further; {_MERGE}"
        )
    if not lora.products:
        raise ValueError(f"{where} changes nothing: all that it holds are zeros; leave it out")
    first, *others = lora.products
    up, _, factor = lora.products[first]
    rank = up.shape[1]
    for key in others:
        its, _, own = lora.products[key]
        if its.shape[1] != rank:
            raise ValueError(
                f"{where} gives {first} the rank {rank} and {key} the rank {its.shape[1]}, and adapters that are "
                f"trained have one; {_MERGE}"
            )
        if not math.isclose(own, factor, rel_tol=_CLOSE):
            raise ValueError(
                f"{where} gives {first} the factor {factor:g} (alpha / rank) and {key} the factor {own:g}, and "
                f"adapters that are trained have one; {_MERGE}"
            )
    if factor <= 0:
        raise ValueError(f"{where} has the factor {factor:g} (alpha / rank); expected one above 0")


_MERGE = "merge it into the weights and train a new LoRA on these: wan-train merge LORA OUT --model MODEL"


def _and_more(keys: Sequence[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
