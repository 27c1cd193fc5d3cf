"""The Triton kernels in Triton's interpreter, against plain fp64 formulae: values and gradients."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")  # before the modules that import it
sys.path.insert(0, str(Path(__file__).parent))
from interpreted import DTYPES, HEAD, ROWS, WIDTH

from wan_model import TokenRows
from wan_model.dit.rope import rotary_table
from wan_model.testing import assert_all_within, rounding_scale, seeds
from wan_model.testing.interpreter import interpreter_problem
from wan_model.testing.once import Once

if problem := interpreter_problem():
    pytest.skip(problem, allow_module_level=True)
SEEDS = seeds(7)
PROGRAM = Path(__file__).with_name("interpreted.py")


@pytest.fixture(scope="session")
def interpreted(once: Once) -> dict[str, Any]:
    """What the kernels gave, all cases in one process."""

    def build(path: Path) -> None:
        command = [sys.executable, str(PROGRAM), str(path), *map(str, SEEDS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    found: dict[str, Any] = torch.load(once("interpreted-kernels.pt", build), weights_only=True)
    return found


def sample_of(rows: TokenRows) -> Tensor:
    index = torch.empty(rows.stop - rows.start, dtype=torch.long)
    for sample, start, stop in rows.segments:
        index[start:stop] = sample
    return index


def plain(name: str, rows: TokenRows, *inputs: Tensor) -> Tensor:
    """The formula of each kernel."""
    x, index = inputs[0], sample_of(rows)
    if name in ("norm modulate", "layer norm"):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if name == "layer norm":
            return normed * inputs[1] + inputs[2]
        return normed * (1 + inputs[1][index, 1]) + inputs[1][index, 0]
    if name.startswith("gate add"):
        return x + inputs[1] * inputs[2][index, 2]
    normed = x / (x.square().sum(-1, keepdim=True) / WIDTH + 1e-6).sqrt() * inputs[1]
    if name == "rms norm":
        return normed
    table = rotary_table(rows, HEAD, torch.device("cpu")).to(torch.complex128)
    return torch.view_as_real(torch.view_as_complex(normed.view(len(x), -1, HEAD // 2, 2)) * table).flatten(1)


KERNELS = ["norm modulate", "layer norm", "gate add", "gate add, fp32 update", "rms norm", "rms norm rotate"]


@pytest.mark.rounding
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_its_formula(name: str, rows: str, dtype: str, seed: int, interpreted: dict[str, Any]) -> None:
    found = interpreted[f"{name}, {rows}, {dtype}, {seed}"]

    def exact() -> dict[str, Tensor]:
        leaves = [leaf.double().requires_grad_() for leaf in found["inputs"]]
        out = plain(name, ROWS[rows], *leaves)
        gradients = torch.autograd.grad((out * found["probe"].double()).sum(), leaves)
        return {"value": out, **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}

    wanted, in_fp32 = exact(), rounding_scale(exact)
    got = {"value": found["value"], **{f"gradient {i}": one for i, one in enumerate(found["gradients"])}}
    for key, value in got.items():
        # A unit in the last place of bf16, because the interpreter truncates where a GPU rounds to the nearest, and
        # before it the rounding of fp32.
        last = 2**-7 * wanted[key].abs() if value.dtype == torch.bfloat16 else 0.0
        assert ((value.double() - wanted[key]).abs() <= last + 16 * in_fp32[key]).all(), key
    assert torch.equal(found["without gradients"], found["value"])
    leaves, gradients = found["inputs"], found["gradients"]
    assert [one.dtype for one in gradients] == [leaf.dtype for leaf in leaves]
    # With frozen weights or modulation the rows have the same gradients.
    of_rows = [one for one in gradients if one.shape == found["value"].shape]
    assert len(found["frozen"]) == len(of_rows) > 0
    assert all(torch.equal(one, other) for one, other in zip(found["frozen"], of_rows, strict=True))


@pytest.mark.rounding
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_a_norm_that_is_split_over_ranks_is_the_whole(
    rows: str, rotated: bool, seed: int, interpreted: dict[str, Any]
) -> None:
    found = interpreted[f"split, {rows}, {rotated}, {seed}"]
    own = found["value"].shape[1]

    def exact() -> dict[str, Tensor]:
        x, weight = (leaf.double().requires_grad_() for leaf in found["inputs"])
        out = plain("rms norm rotate" if rotated else "rms norm", ROWS[rows], x, weight)
        of_x, of_weight = torch.autograd.grad((out * found["probe"].double()).sum(), (x, weight))
        return {"value": out[:, :own], "gradient of x": of_x[:, :own], "gradient of weight": of_weight[:own]}

    of_x, of_weight = found["gradients"]
    assert torch.equal(found["frozen"][0], of_x), "with a frozen weight"
    got = {"value": found["value"], "gradient of x": of_x, "gradient of weight": of_weight}
    assert_all_within(got, {key: value.float() for key, value in exact().items()}, rounding_scale(exact))


@pytest.mark.rounding
@pytest.mark.parametrize("seed", SEEDS)
def test_the_transformer_with_kernels_is_the_transformer(seed: int, interpreted: dict[str, Any]) -> None:
    kernels, without = interpreted[f"model {seed}"]
    assert set(kernels) == set(without)
    for name, wanted in without.items():
        scale = float(wanted.norm())
        assert scale > 0, name
        assert float((kernels[name] - wanted).norm()) < 2e-5 * scale, name
