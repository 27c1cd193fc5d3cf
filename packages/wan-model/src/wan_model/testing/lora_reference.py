"""What other programs make of LoRA files: diffusers with peft, and the plain formula in float64.

Only tests import this; diffusers and peft are needed for the functions that are named after them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_model.config import WanConfig
from wan_model.dit.lora import LoraSettings, adapter_shapes
from wan_model.weights.transformer import expected_shapes

Tensors = dict[str, Tensor]


def drawn_weights(config: WanConfig, seed: int = 0) -> Tensors:
    """Random weights of a whole transformer, by key."""
    return _drawn(expected_shapes(config), seed)


def drawn_adapters(config: WanConfig, settings: LoraSettings, seed: int = 1) -> Tensors:
    """Random A and B of a whole transformer, by diffusers' key."""
    return _drawn(adapter_shapes(config, settings), seed)


def _drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


def changed_by(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], factor: float) -> Tensors:
    """W + factor * B A, float64, of all weights; those without an adapter are unchanged."""
    changed = {key: weight.double() for key, weight in weights.items()}
    for key, down in adapters.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            changed[f"{name}.weight"] += factor * adapters[f"{name}.lora_B.weight"].double() @ down.double()
    return changed


def assert_same_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """Every tensor is that of the reference to a part of the reference's largest value."""
    assert ours.keys() == theirs.keys()
    for key, wanted in theirs.items():
        away = float((ours[key].double() - wanted.double()).abs().max() / wanted.abs().max())
        assert away <= tolerance, f"{key} is {away:.3g} of its largest value away"


def diffusers_transformer(config: WanConfig, weights: Mapping[str, Tensor]) -> Any:
    """diffusers' transformer with these weights."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        model = WanTransformer3DModel.from_config(config.to_diffusers())
    model.load_state_dict(dict(weights))
    return model


def pipeline_with_adapters(
    config: WanConfig, weights: Mapping[str, Tensor], paths: Sequence[Path], scales: Sequence[float] = (1.0,)
) -> Any:
    """diffusers' pipeline after ``load_lora_weights`` and ``set_adapters``; needs peft."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers_transformer(config, weights),
    )
    names = [f"own{i}" for i in range(len(paths))]
    with torch.random.fork_rng(devices=[]):
        for name, path in zip(names, paths, strict=True):
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(names, list(scales))
    return pipeline


def fused_by_diffusers(
    config: WanConfig, weights: Mapping[str, Tensor], paths: Sequence[Path], scales: Sequence[float] = (1.0,)
) -> Tensors:
    """What diffusers' ``fuse_lora`` makes of the weights; needs peft."""
    pipeline = pipeline_with_adapters(config, weights, paths, scales)
    pipeline.fuse_lora(adapter_names=[f"own{i}" for i in range(len(paths))])
    pipeline.unload_lora_weights()
    state: Tensors = pipeline.transformer.state_dict()
    return state
