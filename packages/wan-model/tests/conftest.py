"""What the tests share: one thread, shapes checked at run time, a small random model, its diffusers twin, a tiny folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping  # noqa: E402  the environment is read on import

# Before the first import of wan_model: every annotated function of it checks its shapes from here on.
jaxtyping.install_import_hook("wan_model", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from wan_model import WanConfig, WanDiT  # noqa: E402
from wan_model.tiny import write_tiny_wan  # noqa: E402

torch.set_num_threads(1)

# A head of 20 splits unevenly (8/6/6), and no two sizes are equal.
SMALL = WanConfig(num_heads=3, head_dim=20, num_layers=2, ffn_dim=112, text_dim=28, text_length=16, freq_dim=32)


class Near(Protocol):
    """||got - wanted|| / ||wanted|| <= tolerance, and the same shape."""

    def __call__(self, got: Tensor, wanted: Tensor, tolerance: float = 1e-5, name: str = "") -> None:
        """Assert it."""


def randomise(module: nn.Module, seed: int) -> None:
    """Fill every parameter, the head too, so that activations stay of order one and no gradient vanishes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(noise * fan_in**-0.5)


@pytest.fixture(scope="session")
def near() -> Near:
    def check(got: Tensor, wanted: Tensor, tolerance: float = 1e-5, name: str = "") -> None:
        assert got.shape == wanted.shape, name
        error = ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
        assert error <= tolerance, f"{name} relative error {error:.2e} is above {tolerance:.0e}"

    return check


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="session")
def small_config() -> WanConfig:
    return SMALL


@pytest.fixture
def small_model() -> WanDiT:
    model = WanDiT(SMALL)
    randomise(model, seed=1)
    return model


@pytest.fixture(scope="session")
def randomised() -> Callable[[nn.Module, int], None]:
    return randomise


@pytest.fixture
def diffusers_model() -> Any:
    """Diffusers' model of the same sizes; the weights are the test's business."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_config(SMALL.to_diffusers()).train()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("model") / "tiny-wan")


@pytest.fixture(scope="session")
def pipeline(tiny_folder: Path) -> Any:
    """Diffusers' own pipeline on the tiny folder."""
    from diffusers import WanPipeline

    loaded = WanPipeline.from_pretrained(tiny_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded
