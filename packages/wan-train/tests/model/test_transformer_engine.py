"""Transformer Engine's attention: how it is asked, everywhere; what it answers, where it is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import RUN_OPTIONS, read_log, refused, steps_of, wan_train

has_it = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here, where the real one is asked")


@needs_no_cuda
def test_it_is_asked_for_what_every_other_attention_computes(probed: dict[str, Any]) -> None:
    """Of a stand-in that computes what the documentation says, forward and backward, in float64."""
    off = probed["transformer engine"]["off by"]
    assert len(off) == 5
    assert {name: value for name, value in off.items() if not value < 1e-12} == {}


@needs_no_cuda
def test_it_is_taken_only_where_it_is_named(probed: dict[str, Any]) -> None:
    assert probed["transformer engine"]["chosen"] == {
        "auto, fp32": "MegatronOps",
        "auto, bf16": "MegatronOps",
        "sdpa, bf16": "MegatronOps",
    }


@needs_no_cuda
def test_asking_for_it_where_it_is_not_is_one_sentence(tmp_path: Path) -> None:
    assert refused(tmp_path, "model.attention=transformer_engine") == (
        "model.attention is transformer_engine, which is not installed here (it needs CUDA); install it as the "
        "README of wan-train says, or leave the setting at auto"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not has_it, reason="needs a CUDA device, transformer-engine and -m gpu")
@pytest.mark.parametrize(
    "settings",
    [[], ["--nproc-per-node", "2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]],
    ids=["alone", "tensor and sequence"],
)
def test_it_trains_as_torchs_attention_does(settings: list[str], tmp_path: Path) -> None:
    if settings and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    losses: dict[str, list[float]] = {}
    for attention in ("transformer_engine", "sdpa"):
        folder = tmp_path / attention
        done = wan_train(
            *RUN_OPTIONS, "mixed_precision=bf16_mixed", f"model.attention={attention}", f"checkpoint.save={folder}",
            *settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses[attention] = [entry["loss"] for entry in steps_of(read_log(folder))]
    assert losses["transformer_engine"] == pytest.approx(losses["sdpa"], rel=2e-2)
