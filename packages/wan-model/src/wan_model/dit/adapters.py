"""Adapters of a whole model: adding them, finding them, merging them; see ``wan_model.dit.lora``."""

import torch
from torch import nn

from wan_model.dit.lora import AdaptableLinear, Adapter, LoraSettings, is_adapter_key, merged_weight, weight_change
from wan_model.dit.model import WanDiT


def add_adapters(model: WanDiT, settings: LoraSettings) -> None:
    """Give a model, or a rank's part of it, adapters, and freeze all else.

    A and B are uninitialised until ``wan_model.weights.transformer.init_adapters`` or a loader fills them.

    Raises:
        ValueError: a target that matches no linear.
    """
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for name in settings.linears(model.config):
        if (linear := modules.get(name)) is None:  # in another pipeline stage
            continue
        assert isinstance(linear, AdaptableLinear)
        model.ops.add_adapter(linear, settings.rank)
        linear.lora = Adapter(name, settings.factor, settings.dropout, model.ops.input_columns(linear))


def adapted_linears(model: WanDiT) -> dict[str, AdaptableLinear]:
    """The linears of this part of a model that have an adapter, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptableLinear) and module.lora is not None
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of a model's adapters, by key."""
    return {key: parameter for key, parameter in model.named_parameters() if is_adapter_key(key)}


@torch.no_grad()
def merge_adapters(model: WanDiT) -> None:
    """Add each adapter's change to its linear's weight, and remove the adapters; of models that no rank splits."""
    for linear in adapted_linears(model).values():
        assert linear.lora is not None
        change = weight_change(linear.lora_A.weight, linear.lora_B.weight, linear.lora.factor)
        linear.weight.copy_(merged_weight(linear.weight, change))
        del linear.lora_A, linear.lora_B
        linear.lora = None
