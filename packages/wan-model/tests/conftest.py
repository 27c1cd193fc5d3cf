"""What the tests share: one thread, shapes checked at run time, small random models, a tiny model folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from wan_model.testing import seeds
from wan_model.testing.devices import hide_gpus
from wan_model.testing.once import Once, once_in, order_by_shared_fixtures, session_folder
from wan_model.testing.shapes import check_shapes

check_shapes("wan_model")  # before all other imports of it

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from wan_model import TorchOps, WanConfig, WanDiT  # noqa: E402
from wan_model.tiny import write_tiny_wan  # noqa: E402

torch.set_num_threads(1)

# A head of 20 splits unevenly (8/6/6), and no two sizes are equal.
SMALL = WanConfig(num_heads=3, head_dim=20, num_layers=2, ffn_dim=112, text_dim=28, text_length=16, freq_dim=32)


class SplitOps(TorchOps):
    """What rank ``rank`` of ``ranks`` tensor-parallel ones holds; it computes nothing."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.axes: dict[Tensor, int] = {}

    def column_linear(self, width_in: int, width_out: int) -> nn.Module:
        linear = nn.Linear(width_in, width_out // self.ranks)
        self.axes |= {linear.weight: 0, linear.bias: 0}
        return linear

    def row_linear(self, width_in: int, width_out: int) -> nn.Module:
        linear = nn.Linear(width_in // self.ranks, width_out)
        self.axes[linear.weight] = 1
        return linear

    def norm_across_heads(self, width: int, eps: float) -> nn.Module:
        norm = super().norm_across_heads(width // self.ranks, eps)
        self.axes |= dict.fromkeys(norm.parameters(), 0)
        return norm

    def partition(self, parameter: nn.Parameter) -> tuple[int, int, int] | None:
        return (self.axes[parameter], self.rank, self.ranks) if parameter in self.axes else None


def join(parts: list[WanDiT]) -> dict[str, Tensor]:
    """The whole tensors from every rank's part; what is not split must be equal on all."""
    tensors: dict[str, Tensor] = {}
    for key, first in parts[0].named_parameters():
        pieces: list[Tensor] = [part.get_parameter(key) for part in parts]
        split = parts[0].ops.partition(first)
        assert split or all(torch.equal(piece, first) for piece in pieces), key
        tensors[key] = torch.cat(pieces, dim=split[0]) if split else first
    return tensors


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


def pytest_configure(config: pytest.Config) -> None:
    hide_gpus(config.option.markexpr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order_by_shared_fixtures(items, Path(__file__).parent, "processes")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a file once for all test processes."""
    return once_in(session_folder(tmp_path_factory, "wan-model"))


@pytest.fixture(params=seeds(7), ids="seed {}".format)
def seed(request: pytest.FixtureRequest) -> int:
    """What a test's random numbers are drawn from; see ``wan_model.testing``."""
    chosen: int = request.param
    return chosen


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def small_config() -> WanConfig:
    return SMALL


@pytest.fixture
def small_model(seed: int) -> WanDiT:
    model = WanDiT(SMALL)
    randomise(model, seed=seed + 1)
    return model


@pytest.fixture(scope="session")
def randomised() -> Callable[[nn.Module, int], None]:
    return randomise


@pytest.fixture(scope="session")
def split_ops() -> Callable[[int, int], TorchOps]:
    return SplitOps


@pytest.fixture(scope="session")
def joined() -> Callable[[list[WanDiT]], dict[str, Tensor]]:
    return join


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
