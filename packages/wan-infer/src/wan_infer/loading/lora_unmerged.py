"""LoRA files that are not merged: adapters beside the linears, whose scales may change from request to request.

A linear computes W x + sum over the files of scale * factor * B A x. The adapters of all files are joined along the
rank (A [R, in], B [out, R], a factor for each row of A), and ``wan_model.dit.lora`` computes their product. They have
the precision of their linear's weight, in which products are computed, and are sharded and offloaded as weights are.
The weights stay as they are, and without an adapter of a scale other than 0 a linear computes what it does without.

Every linear may have an adapter, also those of the embedders and of the head. What is no product of a linear (changes
of biases, norms and tables, whole changes of a weight, the patch embedding) can only be merged, and is refused.
"""

import dataclasses
import os
from collections.abc import Sequence

import torch

from wan_model.config import WanConfig
from wan_model.dit.lora import AdaptableLinear, Adapter
from wan_model.dit.model import WanDiT
from wan_model.weights.lora_reading import LoraWeights
from wan_model.weights.transformer import local_slices, local_tensor

_LARGEST = torch.finfo(torch.float32).max


def check_unmerged(lora: LoraWeights, config: WanConfig, path: str | os.PathLike[str]) -> None:
    """Refuse a file with changes that cannot be computed beside a linear; differences of zeros change nothing.

    Raises:
        ValueError: naming the first such weight or bias.
    """
    with torch.device("meta"):
        modules = WanDiT(config).named_modules()
    linears = {f"{name}.weight" for name, module in modules if isinstance(module, AdaptableLinear)}
    refused = [key for key in lora.products if key not in linears]
    refused += [key for key, (difference, _) in lora.differences.items() if difference.any()]
    if refused:
        raise ValueError(
            f"the LoRA {os.fspath(path)} changes {refused[0]} by what is no product of two matrices for a linear, so "
            "it cannot be computed beside the weights; merge it (--lora-mode merged, the default)"
        )


@dataclasses.dataclass
class _Joined:
    """The adapters of all files for one linear.

    Attributes:
        linear: it.
        adapter: how it uses them, where one has a scale other than 0.
        parts: of each file that has one: its number, its rank, and its factor without the scale.
    """

    linear: AdaptableLinear
    adapter: Adapter
    parts: list[tuple[int, int, float]]


class UnmergedLoras:
    """The adapters of one model.

    Args:
        loras: the files, read with a scale of 1; their tensors are freed by ``fill``.
    """

    def __init__(self, loras: Sequence[LoraWeights]) -> None:
        self._loras: Sequence[LoraWeights] = loras
        self._joined: dict[str, _Joined] = {}

    def add_to(self, model: WanDiT) -> None:
        """Give the linears of a model uninitialised adapters; before it is sharded."""
        modules = dict(model.named_modules())
        for key in dict.fromkeys(key for lora in self._loras for key in lora.products):
            name = key.removesuffix(".weight")
            linear = modules[name]
            assert isinstance(linear, AdaptableLinear), "check_unmerged refuses others"
            parts = [
                (number, lora.products[key][1].shape[0], lora.products[key][2])
                for number, lora in enumerate(self._loras)
                if key in lora.products
            ]
            model.ops.add_adapter(linear, sum(rank for _, rank, _ in parts))
            for matrix in (linear.lora_A, linear.lora_B):
                matrix.to(linear.weight.dtype)
            adapter = Adapter(name, 0.0, 0.0, model.ops.input_columns(linear))
            self._joined[key] = _Joined(linear, adapter, parts)

    @torch.no_grad()
    def fill(self, model: WanDiT) -> None:
        """Copy the files' matrices into the model, or a rank's shard of it."""
        for key, joined in self._joined.items():
            products = [lora.products[key] for lora in self._loras if key in lora.products]
            down = torch.cat([down.float() for _, down, _ in products])
            up = torch.cat([up.float() for up, _, _ in products], dim=1)
            for matrix, whole in ((joined.linear.lora_A, down), (joined.linear.lora_B, up)):
                local_tensor(matrix.weight).copy_(whole[local_slices(model, matrix.weight)])
        self._loras = ()

    def set_scales(self, scales: Sequence[float], device: torch.device) -> None:
        """Change the scales; nothing is loaded or copied but a factor for each row of A.

        Args:
            scales: one for each file.
            device: that the model computes on.

        Raises:
            ValueError: a factor is not finite in float32.
        """
        for key, joined in self._joined.items():
            factors = [factor * scales[number] for number, _, factor in joined.parts]
            if not all(abs(factor) <= _LARGEST for factor in factors):
                raise ValueError(
                    f"the LoRA changes {key} by a factor beyond those of float32; check its scale and its alpha"
                )
            if len(set(factors)) == 1:
                joined.adapter.factor = factors[0]
            else:
                ranks = torch.tensor([rank for _, rank, _ in joined.parts])
                joined.adapter.factor = torch.tensor(factors).repeat_interleave(ranks).to(device)
            # Without a product the result is that of the weights alone, to the bit.
            joined.linear.lora = joined.adapter if any(factors) else None
