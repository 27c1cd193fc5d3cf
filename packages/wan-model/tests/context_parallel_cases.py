"""What each process of ``test_context_parallel`` computes; a module of its own, because processes import it by name."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from wan_model import ContextParallel, PackLayout, TorchOps, WanConfig, WanDiT
from wan_model.dit import context_parallel
from wan_model.dit.recompute import Recompute

HEADS = {"heads that divide": 4, "heads that do not": 3}
LAYOUTS = {
    # Samples end inside a rank's rows, at their border, and span several ranks.
    "mix": PackLayout(((3, 2, 3), (1, 2, 3), (1, 1, 1), (2, 3, 4)), padding=3),
    "one video": PackLayout(((4, 3, 2),)),
    "a rank of padding": PackLayout(((1, 1, 2), (1, 3, 1)), padding=7),
}


def build(heads: int, ops: TorchOps | None = None, seed: int = 0) -> WanDiT:
    config = WanConfig(num_heads=heads, head_dim=12, num_layers=2, ffn_dim=40, text_dim=12, text_length=6, freq_dim=16)
    model = WanDiT(config, ops).double()
    generator = torch.Generator().manual_seed(heads + 10 * seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def outcome(model: WanDiT, layout: PackLayout, recompute: Recompute, seed: int = 9) -> dict[str, Tensor]:
    """The output and every gradient of a probed number, by name; the tokens' gradient too."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(layout.total, 64, generator=rng, dtype=torch.float64).requires_grad_()
    text = torch.randn(layout.num_samples, 6, 12, generator=rng, dtype=torch.float64)
    probe = torch.randn(layout.total, 64, generator=rng, dtype=torch.float64)
    probe[layout.valid :] = 0
    model.recompute = recompute
    timesteps = 1000 * torch.rand(layout.num_samples, generator=rng)
    model.zero_grad()
    out = model(tokens, timesteps, text, layout)
    (out * probe).sum().backward()
    assert tokens.grad is not None
    result = {"output": out[: layout.valid].detach(), "gradient of tokens": tokens.grad}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        result[name] = parameter.grad
    return result


def cases() -> list[tuple[str, int, str, PackLayout, Recompute]]:
    return [
        (head_name, heads, layout_name, layout, recompute)
        for head_name, heads in HEADS.items()
        for layout_name, layout in LAYOUTS.items()
        for recompute in (get_args(Recompute) if layout_name == "mix" else ("none",))
    ]


def on_each_rank(seeds: list[int]) -> dict[str, Any]:
    """Everything that the tests look at, in one start of four processes; gradients are this rank's part.

    Ranks 0 and 1 are a group of two, and so are 2 and 3.
    """
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[dist.get_rank() // 2], 4: None}
    found: dict[str, Any] = {"traffic": traffic(groups[2]), "refusal": refusal(groups[2])}
    for ranks, group in groups.items():
        ops = TorchOps(context=ContextParallel(group))
        results = []
        for seed in seeds:
            for _, heads, _, layout, recompute in cases():
                held = ops.held_rows(layout)
                assert held.stop - held.start == layout.total // ranks
                results.append(outcome(build(heads, ops, seed), layout, recompute, seed))
        found[f"of {ranks}"] = results
    return found


def refusal(group: Any) -> str:
    ops = TorchOps(context=ContextParallel(group))
    try:
        build(4, ops)(
            torch.zeros(7, 64).double(), torch.ones(1), torch.zeros(1, 6, 12).double(), PackLayout(((1, 1, 7),))
        )
    except ValueError as error:
        return str(error)
    return ""


def traffic(group: Any) -> list[tuple[str, int]]:
    """What a forward pass sends: the collectives, and how many values each takes."""
    sent: list[tuple[str, int]] = []
    places = {"all_to_all_single": dist, "all_gather_single": context_parallel}
    originals = {name: getattr(place, name) for name, place in places.items()}

    def record(name: str) -> Any:
        def call(out: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
            sent.append((name, given.numel()))
            return originals[name](out, given, *args, **kwargs)

        return call

    for name, place in places.items():
        setattr(place, name, record(name))
    layout = PackLayout(((2, 3, 4),))
    text = torch.zeros(1, 6, 12).double()
    with torch.no_grad():
        for heads in HEADS.values():
            build(heads, TorchOps(context=ContextParallel(group)))(
                torch.zeros(24, 64).double(), torch.ones(1), text, layout
            )
    for name, place in places.items():
        setattr(place, name, originals[name])
    return sent


def _enter(rank: int, function: Callable[..., Any], ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        torch.save(function(*args), os.path.join(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_distributed(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """The results of ``function(*args)``, tensors in plain containers, from every rank in order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (function, ranks, folder, args), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
