"""An exponential moving average (EMA) of the weights in fp32, sharded over the ranks that hold the same weights.

Import only after ``wan_train.engine.start``.

The ranks of one data- and context-parallel group hold the same part of the model; each keeps the EMA of some of its
tensors, so 4 bytes per parameter are needed once per group, not per rank. A checkpoint has the EMA under ``ema.`` and
the tensor's diffusers key with its global shape, so it can be loaded in any other layout.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "ema."


def assign_tensors(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that keeps the EMA of each tensor: largest first, each to the rank with the fewest parameters so far."""
    held = [0] * ranks
    owner = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        rank = min(range(ranks), key=lambda rank: (held[rank], rank))
        owner[key] = rank
        held[rank] += sizes[key]
    return owner


class WeightEMA:
    """The EMA of this rank's share of a model's tensors.

    Args:
        parameters: this rank's part of the model, by key.
        decay: weight of the previous EMA in an update.
        rank, ranks: position among the ranks that hold the same weights.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float, *, rank: int, ranks: int) -> None:
        named = dict(parameters)
        owner = assign_tensors({key: parameter.numel() for key, parameter in named.items()}, ranks)
        self.decay, self._all, self._owner = decay, named, owner
        self._parameters = {key: parameter for key, parameter in named.items() if owner[key] == rank}
        self.tensors: dict[str, Tensor] = {}
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start from the current weights."""
        self.tensors = {key: parameter.detach().float().clone() for key, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay * ema + (1 - decay) * weights."""
        for key, ema in self.tensors.items():
            ema.lerp_(self._parameters[key].detach().float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place_of_weights(self, group: Any) -> Iterator[None]:
        """The weights are the EMA in this context, and the same bits as before after it; collective.

        The weights are kept in main memory meanwhile, so that the device needs no more of its own.

        Args:
            group: the process group of the ranks that hold the same weights.
        """
        kept = {key: parameter.detach().to("cpu", copy=True) for key, parameter in self._all.items()}
        members = torch.distributed.get_process_group_ranks(group)
        try:
            with torch.no_grad():
                for key, parameter in self._all.items():
                    average = self.tensors.get(key)
                    if average is None:
                        average = torch.empty_like(parameter, dtype=torch.float32)
                    if len(members) > 1:
                        torch.distributed.broadcast(average, src=members[self._owner[key]], group=group)
                    parameter.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for key, parameter in self._all.items():
                    parameter.copy_(kept[key])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a saved EMA.

        Raises:
            ValueError: the tensors are not exactly this rank's share.
        """
        if set(tensors) != set(self.tensors):
            differing = sorted(set(tensors) ^ set(self.tensors))
            raise ValueError(f"the EMA in the checkpoint has other tensors than this run, for example {differing[0]}")
        for key, ema in self.tensors.items():
            ema.copy_(tensors[key])
