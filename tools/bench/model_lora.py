"""A training step of a LoRA on the CPU, compared with peft on diffusers' transformer, and what each keeps for it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import median, ratio, time_rounds
from bench.models import Samples, diffusers_model_of, ours_and_diffusers
from bench.report import Table, seconds
from wan_model import WanConfig, WanDiT, patchify
from wan_model.dit.adapters import adapter_parameters, add_adapters
from wan_model.dit.lora import LoraSettings
from wan_model.pack import Grid
from wan_model.weights.transformer import init_adapters

RANK = 32
CPU = torch.device("cpu")
_TEXT: dict[str, Any] = {"text_dim": 512, "text_length": 512}
VIDEO: Sequence[Grid] = ((5, 10, 15),)
MIX: Sequence[Grid] = ((5, 10, 15), (1, 10, 15), (3, 8, 10))
REAL: Sequence[tuple[WanConfig, Sequence[Grid]]] = (
    (WanConfig(num_heads=8, head_dim=64, ffn_dim=2304, num_layers=4, **_TEXT), VIDEO),
    (WanConfig(num_heads=12, head_dim=128, ffn_dim=8960, num_layers=1, **_TEXT), VIDEO),
    (WanConfig(num_heads=12, head_dim=128, ffn_dim=8960, num_layers=1, **_TEXT), MIX),
)
QUICK: Sequence[tuple[WanConfig, Sequence[Grid]]] = (
    (WanConfig(num_heads=2, head_dim=24, ffn_dim=64, num_layers=1, text_dim=32, text_length=64, freq_dim=32), MIX),
)


def lora_step(quick: bool) -> Table:
    """A step of AdamW, of one video and of a mix of shapes."""
    table = Table(
        f"A training step of a LoRA of rank {RANK} of all linears against peft on diffusers' transformer, fp32",
        ["model", "peft", "ours", "ours / peft", "bytes of gradients and moments / of adapters", "losses differ by"],
        note="Forward, backward, AdamW, in turns in one process of one thread. A mix is a pack here, and there one "
        "batch that is padded to the largest sample. Target: <= 0.80 at a width of 512 and more; gradients and moments "
        "of the adapters alone (3).",
    )
    for config, grids in QUICK if quick else REAL:
        table.rows.append(_row(config, grids, quick))
    return table


def _row(config: WanConfig, grids: Sequence[Grid], quick: bool) -> list[str]:
    ours, _ = ours_and_diffusers(config, CPU, torch.float32)
    theirs = _with_peft(diffusers_model_of(copy.deepcopy(ours), CPU))
    add_adapters(ours, LoraSettings(RANK))
    init_adapters(ours, seed=0)
    samples = Samples.draw(config, grids, CPU, torch.float32)
    tokens, padded = samples.tokens, samples.padded()
    target = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    ends = samples.layout.offsets

    def of_ours() -> Tensor:
        return ours(tokens, samples.timesteps, samples.texts, samples.layout)

    def of_theirs() -> Tensor:
        out = theirs(padded, samples.timesteps, samples.texts, return_dict=False)[0]
        sizes = [latent.shape for latent in samples.latents]
        return torch.cat([patchify(one[:, :f, :h, :w]) for one, (_, f, h, w) in zip(out, sizes, strict=True)])

    trained = {"ours": list(adapter_parameters(ours).values()), "peft": _trained(theirs)}
    calls = {"ours": of_ours, "peft": of_theirs}
    steps = {name: _step(call, trained[name], target) for name, call in calls.items()}
    begun = {name: float((call() - target).square().mean().detach()) for name, call in calls.items()}
    times = time_rounds({name: step for name, (step, _) in steps.items()}, 1 if quick else 5, warm_up=not quick)
    held = _held(ours, steps["ours"][1])
    adapters = sum(parameter.nbytes for parameter in trained["ours"])
    shapes = "a video" if len(grids) == 1 else f"{len(grids)} samples of mixed shapes"
    return [
        f"width {config.hidden_size}, {config.num_layers} layer{'s' * (config.num_layers > 1)}, {shapes}, "
        f"{ends[-1]:,} tokens",
        seconds(median(times["peft"])),
        seconds(median(times["ours"])),
        f"{ratio(times['ours'], times['peft']):.3f}",
        f"{held / adapters:.2f}",
        # Padding changes what diffusers attends to, so only one sample can be compared.
        f"{abs(begun['ours'] / begun['peft'] - 1):.1e}" if len(grids) == 1 else "not comparable",
    ]


def _with_peft(model: Any) -> Any:
    from peft import LoraConfig

    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    return model.train()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _step(
    call: Callable[[], Tensor], trained: list[nn.Parameter], target: Tensor
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss = (call() - target).square().mean()
        loss.backward()
        optimizer.step()

    return step, optimizer


def _held(model: WanDiT, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all gradients, and of the optimizer's moments."""
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    )
    return gradients + moments
