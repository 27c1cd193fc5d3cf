"""``python interpreted.py OUT SEED...``: results of the kernels in Triton's interpreter, each with its inputs.

A program of its own, because the interpreter has to be chosen before Triton is imported.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from wan_model import PackLayout, TokenRows, WanConfig, WanDiT
from wan_model.dit import elementwise as ew
from wan_model.dit.rope import rotary_table
from wan_model.kernels import available
from wan_model.kernels.split_rms_norm import split_rms_norm_rotate

CPU = torch.device("cpu")
# Odd sizes: a width that is no power of two, samples of less than a chunk and of several, padding.
ROWS = {
    "pack": TokenRows.whole(PackLayout(((2, 3, 4), (1, 2, 2), (1, 1, 5)), padding=3)),
    "one sample": TokenRows.whole(PackLayout(((3, 3, 3),))),
    "a rank's rows": TokenRows(PackLayout(((2, 3, 4), (1, 2, 2), (1, 1, 5)), padding=3), 9, 27),
}
HEADS, HEAD = 3, 20
WIDTH = HEADS * HEAD
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(rows: TokenRows) -> dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]]:
    """By name: a function of tensors, and their shapes; those of [rows, width] have the tested precision."""
    count, samples = rows.stop - rows.start, rows.layout.num_samples
    table = rotary_table(rows, HEAD, CPU)
    of_row, of_sample = (count, WIDTH), (samples, 3, WIDTH)
    return {
        "norm modulate": (
            lambda x, m: ew.norm_modulate(x, m[:, 0], m[:, 1], rows, 1e-6), [of_row, of_sample]
        ),
        "layer norm": (lambda x, w, b: ew.layer_norm(x, w, b, 1e-6), [of_row, (WIDTH,), (WIDTH,)]),
        "gate add": (lambda x, y, m: ew.gate_add_(x, y, m[:, 2], rows), [of_row, of_row, of_sample]),
        "gate add, fp32 update": (
            lambda x, y, m: ew.gate_add_(x, y.float(), m[:, 2], rows), [of_row, of_row, of_sample]
        ),
        "rms norm": (lambda x, w: ew.rms_norm_(x, w, 1e-6), [of_row, (WIDTH,)]),
        "rms norm rotate": (lambda x, w: ew.rms_norm_(x, w, 1e-6, table), [of_row, (WIDTH,)]),
    }  # fmt: skip


def split(rows: TokenRows, rotated: bool, seed: int) -> dict[str, Any]:
    """The norm of the first two heads of each row, to which the other rank's sums are added by formula."""
    rng = torch.Generator().manual_seed(seed)
    count, own = rows.stop - rows.start, 2 * HEAD
    x, probe = (torch.randn(count, WIDTH, generator=rng) for _ in range(2))
    weight = torch.randn(WIDTH, generator=rng)
    table = torch.view_as_real(rotary_table(rows, HEAD, CPU)) if rotated else None
    theirs = x[:, own:].clone()
    scale = (x.square().sum(-1, keepdim=True) / WIDTH + 1e-6).rsqrt()
    # What the other rank has for the backward pass: the gradient of its part, rotated back.
    pairs = torch.view_as_complex(probe[:, own:].contiguous().view(count, -1, HEAD // 2, 2))
    if rotated:
        pairs = pairs * rotary_table(rows, HEAD, CPU).conj()
    products = (torch.view_as_real(pairs).flatten(1) * weight[own:] * theirs * scale).sum(-1)
    added = iter([theirs.square().sum(-1), products])
    mine, its_weight = x[:, :own].clone().requires_grad_(), weight[:own].clone().requires_grad_()
    out = split_rms_norm_rotate(mine, its_weight, 1e-6, table, WIDTH, lambda values: values.add_(next(added)))
    gradients = torch.autograd.grad((out * probe[:, :own]).sum(), (mine, its_weight))
    added = iter([theirs.square().sum(-1), products])
    out = split_rms_norm_rotate(mine, weight[:own], 1e-6, table, WIDTH, lambda values: values.add_(next(added)))
    frozen = torch.autograd.grad((out * probe[:, :own]).sum(), mine)
    return {"inputs": [x, weight], "probe": probe, "value": out.detach(), "gradients": gradients, "frozen": frozen}


def run(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], count: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Inputs, the value with and without gradients, the gradients, and those of the rows alone (frozen weights)."""
    rng = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(shape, generator=rng) for shape in shapes]
    leaves = [leaf.to(dtype) if leaf.shape == (count, WIDTH) else leaf for leaf in leaves]
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(*inputs)
    probe = torch.randn(out.shape, generator=rng).to(dtype)
    gradients = torch.autograd.grad((out * probe).sum(), inputs)
    of_rows = [leaf for leaf in inputs if leaf.shape == (count, WIDTH)]
    alone = function(*(leaf.detach() if leaf.shape != (count, WIDTH) else leaf for leaf in inputs))
    frozen = torch.autograd.grad((alone * probe).sum(), of_rows)
    with torch.no_grad():
        again = function(*(leaf.clone() for leaf in leaves))
    return {
        "inputs": leaves, "probe": probe, "value": out.detach(), "without gradients": again, "gradients": gradients,
        "frozen": frozen,
    }  # fmt: skip


def model(seed: int, kernels: bool) -> dict[str, Tensor]:
    """The output and every gradient of a small transformer."""
    ew.available.for_tensor = lambda x: kernels  # type: ignore[assignment]
    config = WanConfig(
        num_heads=HEADS, head_dim=HEAD, num_layers=2, ffn_dim=96, text_dim=16, text_length=8, freq_dim=32
    )
    whole, rng = WanDiT(config), torch.Generator().manual_seed(seed)
    for parameter in whole.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=rng) * fan_in**-0.5
    layout = ROWS["pack"].layout
    tokens = torch.randn(layout.total, config.token_in, generator=rng)
    texts = torch.randn(3, 4, config.text_dim, generator=rng)
    out = whole(tokens, torch.tensor([900.0, 300.0, 20.0]), texts, layout)
    (out * torch.randn(out.shape, generator=rng)).sum().backward()
    return {"output": out.detach(), **{name: p.grad for name, p in whole.named_parameters() if p.grad is not None}}


def main(path: str, seeds: list[int]) -> None:
    """Compute everything and save it."""
    assert available.usable(CPU), "the interpreter runs here"
    found: dict[str, Any] = {f"model {seed}": [model(seed, kernels) for kernels in (True, False)] for seed in seeds}
    ew.available.for_tensor = lambda x: True  # type: ignore[assignment]
    for rows_name, rows in ROWS.items():
        for name, (function, shapes) in cases(rows).items():
            for dtype_name, dtype in DTYPES.items():
                for seed in seeds:
                    key = f"{name}, {rows_name}, {dtype_name}, {seed}"
                    found[key] = run(function, shapes, rows.stop - rows.start, dtype, seed)
        for rotated in (False, True):
            for seed in seeds:
                found[f"split, {rows_name}, {rotated}, {seed}"] = split(rows, rotated, seed)
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1], [int(seed) for seed in sys.argv[2:]])
