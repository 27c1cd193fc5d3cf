"""Frozen weights of blocks in less memory: in fp8 with a scale for each output, or in main memory, fetched by block.

**fp8.** See ``wan_model.dit.fp8``.

**Streamed.** A block's frozen weights are in (pinned) main memory, and on the device only while the block computes;
those of the block that follows are fetched meanwhile. Values are the same to the bit. The backward pass needs a block's
weights again, so blocks must be recomputed (``recompute = "block"``), which fetches them again.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wan_model.dit.fp8 import dequantize, largest_of_rows, quantize
from wan_model.dit.lora import AdaptableLinear


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """How far weights in fp8 are from the given ones.

    Attributes:
        relative: norm of all differences over the norm of all weights.
        largest: the same of the linear where it is largest.
        name: of that linear.
    """

    relative: float
    largest: float
    name: str


def materialize(model: nn.Module, device_of: Callable[[str, nn.Parameter], torch.device]) -> None:
    """Allocate the parameters of a model on ``meta``, uninitialised, keeping what a runtime has noted on them.

    Args:
        model: in place.
        device_of: by key and parameter.
    """
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = f"{prefix}.{name}" if prefix else name
            new = nn.Parameter(torch.empty_like(parameter, device=device_of(key, parameter)), parameter.requires_grad)
            new.__dict__.update(parameter.__dict__)
            setattr(module, name, new)


@torch.no_grad()
def to_fp8(model: nn.Module, device: torch.device) -> QuantizationError:
    """Keep the frozen weights of the linears of a model's blocks in fp8, in place, one after the other.

    Args:
        model: its weights may be elsewhere.
        device: where they are rounded, and kept.

    Returns:
        The error that this makes, of this rank's part.
    """
    differences, norms, worst = 0.0, 0.0, (0.0, "")
    for name, linear in model.named_modules():
        if not isinstance(linear, AdaptableLinear) or not name.startswith("blocks.") or linear.weight.requires_grad:
            continue
        wide = linear.weight.to(device).float()
        weight, scale = quantize(wide, linear.over_columns(largest_of_rows(wide)))
        norm = float(wide.square().sum())
        difference = float((dequantize(weight, scale, torch.float32) - wide).square().sum())
        linear.weight.data, linear.weight_scale = weight, scale
        differences, norms = differences + difference, norms + norm
        worst = max(worst, ((difference / norm) ** 0.5 if norm else 0.0, name))
    return QuantizationError((differences / norms) ** 0.5 if norms else 0.0, *worst)


# -- streamed ---------------------------------------------------------------------------------------------------------


class StreamedWeights:
    """The frozen weights of all blocks of a model, in main memory.

    The parameters of the blocks that are frozen are emptied: they are no longer weights of the model by themselves.

    Args:
        blocks: in their order.
        device: where they compute.
    """

    def __init__(self, blocks: dict[str, nn.Module], device: torch.device) -> None:
        self.device = device
        self._order = list(blocks)
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._fetched: dict[str, tuple[dict[str, Tensor], Any]] = {}
        self._last = -1  # the place of the block that was called last
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for name, block in blocks.items():
            self._kept[name] = {key: self._taken(parameter) for key, parameter in _frozen(block)}

    def _taken(self, parameter: nn.Parameter) -> Tensor:
        kept = parameter.data.to("cpu")
        if self._stream is not None:
            kept = kept.pin_memory()
        parameter.data = parameter.data.new_empty(0)
        return kept

    @property
    def nbytes(self) -> int:
        """Bytes in main memory."""
        return sum(tensor.nbytes for block in self._kept.values() for tensor in block.values())

    def call(self, name: str, block: nn.Module, *args: Any) -> Tensor:
        """Call a block with its weights on the device, and begin to fetch those of the block that follows.

        That is the next one, or in a backward pass the one before.
        """
        weights, place = self._get(name), self._order.index(name)
        following = place + 1 if place > self._last else place - 1
        self._fetched, self._last = {}, place
        if 0 <= following < len(self._order):
            self._fetch(self._order[following])
        out: Tensor = functional_call(block, weights, args)
        return out

    def _fetch(self, name: str) -> None:
        if self._stream is None:
            self._fetched[name] = ({key: kept.to(self.device) for key, kept in self._kept[name].items()}, None)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            weights = {key: kept.to(self.device, non_blocking=True) for key, kept in self._kept[name].items()}
        self._fetched[name] = (weights, self._stream.record_event())

    def _get(self, name: str) -> dict[str, Tensor]:
        if name not in self._fetched:
            self._fetch(name)
        weights, event = self._fetched[name]
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for tensor in weights.values():
                tensor.record_stream(current)
        return weights


def _frozen(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((key, parameter) for key, parameter in block.named_parameters() if not parameter.requires_grad)
