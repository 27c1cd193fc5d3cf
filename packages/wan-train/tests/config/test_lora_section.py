"""The ``lora`` section: what is refused before anything is loaded."""

from typing import Any

import pytest

from wan_model.tiny import TINY_CONFIG
from wan_train.config.lora import LoraConfig

SET: dict[str, Any] = {
    "alpha": 3.0,
    "use_rslora": True,
    "dropout": 0.1,
    "targets": ["to_q"],
    "fp8_base": True,
    "offload_base": True,
}


@pytest.mark.parametrize("name", SET)
def test_a_section_without_its_rank_would_train_every_weight(name: str) -> None:
    section = LoraConfig(**{name: SET[name]})
    with pytest.raises(ValueError, match=rf"^lora\.{name} is .* and lora\.rank is 0, .*; set lora\.rank, or leave"):
        section.check(TINY_CONFIG, recompute="block", fully_sharded=False)
    LoraConfig(rank=2, **{name: SET[name]}).check(TINY_CONFIG, recompute="block", fully_sharded=False)
    LoraConfig().check(TINY_CONFIG, recompute="none", fully_sharded=True)


@pytest.mark.parametrize("name", ["fp8_base", "offload_base"])
def test_what_does_not_go_with_fsdp(name: str) -> None:
    section = LoraConfig(rank=2, **{name: True})
    with pytest.raises(ValueError, match=rf"lora\.{name} is not supported with dist\.use_megatron_fsdp"):
        section.check(TINY_CONFIG, recompute="block", fully_sharded=True)


def test_every_pipeline_stage_has_adapters() -> None:
    for targets in (["*"], ["blocks.0.attn1.to_q", "blocks.1.ffn.*"]):
        LoraConfig(rank=2, targets=targets).check_stages(TINY_CONFIG, 2)
    only_last = LoraConfig(rank=2, targets=["blocks.1.*"])
    only_last.check_stages(TINY_CONFIG, 1)
    with pytest.raises(ValueError, match=r"adapts nothing in the blocks 0 to 0 of pipeline stage 0; add targets there"):
        only_last.check_stages(TINY_CONFIG, 2)
    LoraConfig().check_stages(TINY_CONFIG, 2)
