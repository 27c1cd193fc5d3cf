"""An exponential moving average of the weights, in fp32, spread over the ranks that hold the same weights.

Import only after ``wan_train.engine.start``.

The ranks of one data- and context-parallel group hold the same part of the model; each keeps the average of a share of
its tensors, whole ones, so that 4 bytes a parameter are paid once a group and not once a rank. In checkpoints the
average stands under ``ema.`` and the tensor's diffusers key with its global shape, readable in any other layout.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

PREFIX = "ema."


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank keeps the average of which tensor: the largest first, each to the rank that has least."""
    held = [0] * ranks
    owner = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        rank = min(range(ranks), key=lambda rank: (held[rank], rank))
        owner[key] = rank
        held[rank] += sizes[key]
    return owner


class WeightAverage:
    """The average of this rank's share of a model's tensors.

    Args:
        parameters: of this rank's part of the model, by key.
        decay: share of the average that an update keeps.
        rank, ranks: place among those that hold the same weights.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float, *, rank: int, ranks: int) -> None:
        named = dict(parameters)
        owner = owners({key: parameter.numel() for key, parameter in named.items()}, ranks)
        self.decay = decay
        self._parameters = {key: parameter for key, parameter in named.items() if owner[key] == rank}
        self.tensors: dict[str, Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights of now."""
        self.tensors = {key: parameter.detach().float().clone() for key, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay x average + (1 - decay) x weights."""
        for key, average in self.tensors.items():
            average.lerp_(self._parameters[key].detach().float(), 1 - self.decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with a saved average.

        Raises:
            ValueError: tensors other than this rank's share.
        """
        if set(tensors) != set(self.tensors):
            differing = sorted(set(tensors) ^ set(self.tensors))
            raise ValueError(
                f"the saved average of the weights has other tensors than this run, among them {differing[0]}"
            )
        for key, average in self.tensors.items():
            average.copy_(tensors[key])
