"""``wan-train pretrain --dry-run``: layout, memory and FLOPs of a run, without process groups or GPUs."""

import dataclasses
import json
from typing import Any, get_args

import torch

from wan_model.dit.flops import training_flops
from wan_model.dit.recompute import Recompute
from wan_model.pack import PackLayout, latent_grid
from wan_train import engine
from wan_train.config.options import DEFAULT_RECIPE, RunOptions
from wan_train.loop.run import build_config, check_layout, configure_data, read_initial_adapters
from wan_train.planning.hardware import CARDS
from wan_train.planning.memory import adapter_parameters_of_model, parameters_of_model, rank_bytes
from wan_train.planning.plan import SETTING


def describe(options: RunOptions, world: int) -> dict[str, Any]:
    """Describe a run of ``world`` processes.

    Returns:
        Plain values: ``layout``, ``parameters`` (of the model, and of the rank that needs most memory), ``lora`` (rank,
        and ``parameters`` of the adapters in the same two ways; null if the weights are trained), ``state_bytes`` of
        that rank, ``recompute`` and ``activation_bytes`` (peak, with each kind of recomputation),
        ``total_bytes`` with the chosen one, ``fits`` (by GPU, whether that fits), ``packs``, ``capacity`` of a pack,
        ``tokens`` and ``training_flops`` of a step. Except of mock data, a pack is assumed to hold one sample of
        ``dataset.capacity`` tokens: an upper bound of the FLOPs, and of activations except for the text of further
        samples.

    Raises:
        ValueError: an unknown key, an invalid layout, a missing dataset or one that does not match the model.
    """
    engine.start(take_device=False)
    config = build_config(options)
    layout = check_layout(config, world)
    configure_data(config, layout, needed=False)
    read_initial_adapters(config)
    model = config.model.wan_config
    bf16 = config.mixed_precision is not None
    packs = config.train.global_batch_size
    if config.dataset.mock:
        mock = config.dataset.mock_settings
        latents = [torch.empty(model.in_channels, *shape, device="meta") for shape in mock.shapes]
        grids = [
            latent_grid(latents[slot % len(latents)], model.patch_size) for slot in range(mock.number_packed_samples)
        ]
        pack = PackLayout(tuple(grids)).padded_to(layout.pad_multiple)
    else:
        # A pack of one sample needs most: attention grows with the square of a sample's tokens.
        pack = PackLayout(((config.dataset.capacity, 1, 1),))
    lora = config.lora.settings()
    needed = {
        mode: rank_bytes(
            model, layout, pack.padded_to(layout.pad_multiple), mode, packs=packs // layout.data, bf16=bf16,
            fp32_gradients=not bf16 or _reduces_in_fp32(config), ema=config.ema.decay > 0, lora=lora,
            fp8_base=config.lora.fp8_base, offload_base=config.lora.offload_base,
        )
        for mode in get_args(Recompute)
    }  # fmt: skip
    recompute = config.model.recompute
    largest = needed[recompute]
    state, adapters = largest.state, None
    if lora is not None:
        of_adapters = {"model": adapter_parameters_of_model(model, lora), "largest_rank": largest.adapters}
        adapters = {"rank": lora.rank, "parameters": of_adapters}
    return {
        "recipe": options.recipe or options.config_file or DEFAULT_RECIPE,
        "layout": {**dataclasses.asdict(layout), "data": layout.data},
        "parameters": {"model": parameters_of_model(model), "largest_rank": largest.parameters},
        "lora": adapters,
        "state_bytes": {**dataclasses.asdict(state), "total": state.total},
        "recompute": recompute,
        "activation_bytes": {mode: found.activations + found.gathered for mode, found in needed.items()},
        "total_bytes": largest.total,
        "fits": {name: largest.total <= card.memory - card.reserved for name, card in CARDS.items()},
        "precision": "bf16" if bf16 else "fp32",
        "packs": packs,
        "packs_a_rank": packs // layout.data,
        "capacity": config.dataset.capacity,
        "tokens": packs * pack.valid,
        "training_flops": packs * training_flops(model, pack, lora),
        "exact": config.dataset.mock,
    }


def _reduces_in_fp32(config: Any) -> bool:
    from wan_train.engine.upstream.loop import get_mixed_precision_config

    precision = config.mixed_precision
    if isinstance(precision, str):
        precision = get_mixed_precision_config(precision)
    return bool(precision.grad_reduce_in_fp32)


def lines_of(found: dict[str, Any]) -> list[str]:
    """The description as text."""
    layout, parameters, state = found["layout"], found["parameters"], found["state_bytes"]
    most = "" if found["exact"] else " at most"
    sharded = ", FSDP" if layout["fully_sharded"] else ""
    gib = {name: size / 2**30 for name, size in state.items()}
    activations = {mode: size / 2**30 for mode, size in found["activation_bytes"].items()}
    chosen = found["recompute"]
    others = ", ".join(f"{size:.2f} with {SETTING[mode]}" for mode, size in activations.items() if mode != chosen)
    tflop = found["training_flops"] / 1e12
    trained, of_rank = "", ""
    if (lora := found["lora"]) is not None:
        adapters = lora["parameters"]
        trained = f", frozen; a LoRA of rank {lora['rank']} with {adapters['model']:,} parameters, fp32"
        of_rank = f" and {adapters['largest_rank']:,} of the LoRA," if layout["world"] > 1 else ""
    pack, capacity, mock = found["tokens"] // found["packs"], found["capacity"], []
    if found["exact"] and pack != capacity:
        mock = [
            f"a pack of mock data has {pack:,} tokens; without --mock a dry run takes dataset.capacity, {capacity:,}"
        ]
    return [
        f"{found['recipe']}: {parameters['model']:,} parameters, {found['precision']}{trained}",
        f"{layout['world']} processes: data {layout['data']} x tensor {layout['tensor']}"
        f"{' with sequence' if layout['sequence'] else ''} x context {layout['context']} x pipeline "
        f"{layout['pipeline']}{sharded}",
        f"the largest rank has {parameters['largest_rank']:,} parameters{of_rank} and {gib['total']:.2f} GiB of model "
        f"state (weights {gib['weights']:.2f}, gradients {gib['gradients']:.2f}, optimizer "
        f"{gib['optimizer']:.2f}, EMA {gib['average']:.2f})",
        f"plus about {activations[chosen]:.2f} GiB of activations with model.recompute_granularity={SETTING[chosen]} "
        f"({others})",
        _verdict(found),
        f"per step: {found['packs']} packs, {found['packs_a_rank']} per data-parallel rank,{most} {found['tokens']:,} "
        f"tokens and{most} {tflop:,.2f} TFLOP, {tflop / layout['world']:,.2f} per process",
        *mock,
    ]


def _verdict(found: dict[str, Any]) -> str:
    cards = ", ".join(
        f"an {name} ({CARDS[name].memory / 1e9:.0f} - {CARDS[name].reserved / 1e9:.0f} GB) is "
        f"{'enough' if fits else 'not enough'}"
        for name, fits in found["fits"].items()
    )
    return f"in all {found['total_bytes'] / 1e9:.1f} GB, beside what driver and communication take: {cards}"


def main(options: RunOptions, world: int, *, as_json: bool) -> list[str]:
    """The lines to print."""
    found = describe(options, world)
    return [json.dumps(found, indent=1, sort_keys=True)] if as_json else lines_of(found)
