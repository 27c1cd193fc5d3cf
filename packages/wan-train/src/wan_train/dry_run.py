"""``wan-train pretrain --dry-run``: what a run would be, before any process group or GPU is touched."""

import dataclasses
import json
from typing import Any

from wan_model.flops import pack_flops
from wan_model.pack import PackLayout
from wan_model.weights import expected_shapes
from wan_train import engine
from wan_train.layout import Layout, parameters_of_rank
from wan_train.options import DEFAULT_RECIPE, RunOptions
from wan_train.run import bind_data, build_config, check_layout


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds between two steps, without activations.

    Megatron keeps gradients in one buffer of the reduction's precision, and of the optimizer's state a data-parallel
    rank holds its share: two moments in fp32 and, where the weights are bf16, a copy of them in fp32.

    Attributes:
        weights, gradients, optimizer: bytes of a rank.
        average: of the weights' moving average.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float

    @classmethod
    def of(cls, parameters: int, layout: Layout, *, bf16: bool, fp32_gradients: bool, ema: bool) -> "StateBytes":
        """Of a rank that computes with that many parameters."""
        sharing = layout.data * layout.context
        held = sharing if layout.fully_sharded else 1
        return cls(
            weights=parameters * (2 if bf16 else 4) / held,
            gradients=parameters * (4 if fp32_gradients or not bf16 else 2) / held,
            optimizer=parameters * (12 if bf16 else 8) / sharing,
            average=parameters * 4 / sharing if ema else 0.0,
        )

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.average


def describe(options: RunOptions, world: int) -> dict[str, Any]:
    """What a run of so many processes would be.

    Returns:
        Plain values: ``layout``, ``parameters`` (of the model, and of the rank that has most), ``state_bytes`` of that
        rank, ``packs``, ``tokens`` and ``training_flops`` of a step (the last two at most, where data decide).

    Raises:
        ValueError: an unknown key, a layout that cannot be, data that are not there or do not fit.
    """
    engine.start(take_device=False)
    config = build_config(options)
    layout = check_layout(config, world)
    bind_data(config, layout)
    config.validation.check()
    config.ema.check()
    model = config.model.wan_config
    shapes = expected_shapes(model)
    of_stages = [parameters_of_rank(shapes, model.num_layers, layout, stage) for stage in range(layout.pipeline)]
    bf16 = config.mixed_precision is not None
    state = StateBytes.of(
        max(of_stages), layout, bf16=bf16, fp32_gradients=not bf16 or _reduces_in_fp32(config), ema=config.ema.decay > 0
    )
    packs = config.train.global_batch_size
    if config.dataset.mock:
        mock = config.dataset.mock_settings
        patch = model.patch_size
        grids = [
            tuple(size // one for size, one in zip(mock.shapes[slot % len(mock.shapes)], patch, strict=True))
            for slot in range(mock.number_packed_samples)
        ]
        pack = PackLayout(tuple(grids)).padded_to(layout.pad_multiple)
    else:
        # One sample that fills a pack needs the most: attention grows with the square of a sample.
        pack = PackLayout(((config.dataset.capacity, 1, 1),))
    return {
        "recipe": options.recipe or options.config_file or DEFAULT_RECIPE,
        "layout": {**dataclasses.asdict(layout), "data": layout.data},
        "parameters": {"model": sum(_count(shape) for shape in shapes.values()), "largest_rank": max(of_stages)},
        "state_bytes": {**dataclasses.asdict(state), "total": state.total},
        "precision": "bf16" if bf16 else "fp32",
        "packs": packs,
        "packs_a_rank": packs // layout.data,
        "tokens": packs * pack.valid,
        "training_flops": packs * pack_flops(model, pack).training,
        "exact": config.dataset.mock,
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _reduces_in_fp32(config: Any) -> bool:
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    precision = config.mixed_precision
    if isinstance(precision, str):
        precision = get_mixed_precision_config(precision)
    return bool(precision.grad_reduce_in_fp32)


def lines_of(found: dict[str, Any]) -> list[str]:
    """For people."""
    layout, parameters, state = found["layout"], found["parameters"], found["state_bytes"]
    most = "" if found["exact"] else " at most"
    sharded = ", weights fully sharded" if layout["fully_sharded"] else ""
    gib = {name: size / 2**30 for name, size in state.items()}
    tflop = found["training_flops"] / 1e12
    return [
        f"{found['recipe']}: {parameters['model']:,} parameters, {found['precision']}",
        f"{layout['world']} processes: data {layout['data']} x tensor {layout['tensor']}"
        f"{' with sequence' if layout['sequence'] else ''} x context {layout['context']} x pipeline "
        f"{layout['pipeline']}{sharded}",
        f"the fullest rank computes with {parameters['largest_rank']:,} parameters and holds {gib['total']:.2f} GiB "
        f"between steps (weights {gib['weights']:.2f}, gradients {gib['gradients']:.2f}, optimizer "
        f"{gib['optimizer']:.2f}, average {gib['average']:.2f}); activations come on top",
        f"a step: {found['packs']} packs, {found['packs_a_rank']} a data-parallel rank,{most} {found['tokens']:,} "
        f"tokens and{most} {tflop:,.2f} TFLOP, {tflop / layout['world']:,.2f} a process",
    ]


def main(options: RunOptions, world: int, *, as_json: bool) -> list[str]:
    """What to print."""
    found = describe(options, world)
    return [json.dumps(found, indent=1, sort_keys=True)] if as_json else lines_of(found)
