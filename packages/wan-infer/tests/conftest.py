import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest
import torch
import yaml

if TYPE_CHECKING:
    from wan_infer.sampler import WanSampler

sys.path.insert(0, str(Path(__file__).parent))  # for parallel_probe
torch.set_num_threads(1)
jaxtyping.install_import_hook("wan_infer", "beartype.beartype")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.1 in diffusers' layout."""
    from wan_model.tiny import write_tiny_wan

    return write_tiny_wan(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def sampler(model_folder: Path) -> "WanSampler":
    from wan_infer.sampler import WanSampler

    return WanSampler.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def write_checkpoint(model_folder: Path) -> Callable[..., Path]:
    """Writes one checkpoint as a training run does; ``average`` is the seed of an average that stands beside it."""
    from torch.distributed.checkpoint.state_dict_saver import save

    from wan_model.dit import WanDiT
    from wan_model.model_folder import latent_spec_of
    from wan_model.tiny import TINY_CONFIG
    from wan_model.weights import init_weights

    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = WanDiT(TINY_CONFIG)
        init_weights(model, seed=seed)
        torch.nn.init.normal_(model.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
        return model.state_dict()

    def write(run: Path, step: int, *, seed: int = 1, spec: object = "own", average: int | None = None) -> Path:
        path = run / f"iter_{step:07d}"
        path.mkdir(parents=True)
        state = {**weights(seed), "optimizer.state": torch.ones(3)}
        if average is not None:
            state |= {f"ema.{key}": value for key, value in weights(average).items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(state, checkpoint_id=path, no_dist=True)
        spec = latent_spec_of(model_folder).to_dict() if spec == "own" else spec
        config = {"model": {"transformer": TINY_CONFIG.to_diffusers(), "latent_spec": spec}}
        (path / "run_config.yaml").write_text(yaml.safe_dump(config))
        return path

    return write
