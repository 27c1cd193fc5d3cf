"""Training checkpoints of the tiny model for tests."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from wan_model.dit.lora import LoraSettings
from wan_model.dit.model import WanDiT
from wan_model.testing.lora_reference import drawn_adapters
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.base_digest import joint_digest, tensor_digests
from wan_model.weights.model_folder import latent_spec_of
from wan_model.weights.transformer import init_weights


def write_checkpoint_of(
    model_folder: Path,
    run: Path,
    step: int,
    *,
    seed: int = 1,
    spec: object = "own",
    average: int | None = None,
    transformer: Mapping[str, object] | None = None,
) -> Path:
    """Write one checkpoint as a training run does; ``average`` is the seed of an average that stands beside it.

    ``transformer`` is added to the record of the transformer.
    """

    def weights(seed: int) -> dict[str, Tensor]:
        model = WanDiT(TINY_CONFIG)
        init_weights(model, seed=seed)
        torch.nn.init.normal_(model.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
        return model.state_dict()

    path = run / f"iter_{step:07d}"
    path.mkdir(parents=True)
    state = {**weights(seed), "optimizer.state": torch.ones(3)}
    if average is not None:
        state |= {f"ema.{key}": value for key, value in weights(average).items()}
    _save(state, path)
    spec = latent_spec_of(model_folder).to_dict() if spec == "own" else spec
    config = {"model": {"transformer": {**TINY_CONFIG.to_diffusers(), **(transformer or {})}, "latent_spec": spec}}
    (path / "run_config.yaml").write_text(yaml.safe_dump(config))
    return path


def write_adapters(base: Path, run: Path, step: int, settings: LoraSettings, *, seed: int = 1) -> dict[str, Tensor]:
    """Write one checkpoint as a run of a LoRA on the model in ``base`` does; returns A and B."""
    adapters = drawn_adapters(TINY_CONFIG, settings, seed)
    path = run / f"iter_{step:07d}"
    _save(adapters, path)
    model = {
        "transformer": TINY_CONFIG.to_diffusers(), "latent_spec": latent_spec_of(base).to_dict(),
        "init_from": str(base), "base_digest": joint_digest(tensor_digests(base / "transformer")),
    }  # fmt: skip
    section = {**dataclasses.asdict(settings), "targets": list(settings.targets)}
    (path / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "lora": section}))
    return adapters


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(dict(state), checkpoint_id=path, no_dist=True)
