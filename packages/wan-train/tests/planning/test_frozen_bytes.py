"""The formula of frozen weights in fp8 and in main memory, against the tensors of a model."""

import pytest
import torch

from wan_model import WAN_14B, WanDiT, init_weights
from wan_model.dit.adapters import add_adapters
from wan_model.dit.frozen import StreamedWeights, to_fp8
from wan_model.dit.lora import AdaptableLinear, LoraSettings, is_adapter_key
from wan_model.tiny import TINY_CONFIG
from wan_train.model.layout import Layout
from wan_train.planning.memory import frozen_bytes


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_take_what_the_formula_counts(fp8: bool, offload: bool, dtype: torch.dtype) -> None:
    model = WanDiT(TINY_CONFIG)
    add_adapters(model, LoraSettings(rank=2))
    init_weights(model, seed=0)
    frozen = {key: value for key, value in model.named_parameters() if not is_adapter_key(key)}
    for value in frozen.values():
        value.data = value.data.to(dtype)  # some are fp32 in a run, which the plan does not count
    if fp8:
        to_fp8(model, torch.device("cpu"))
    linears = [module for module in model.modules() if isinstance(module, AdaptableLinear)]
    scales = sum(module.weight_scale.nbytes for module in linears if module.weight_scale is not None)
    held = sum(value.nbytes for value in frozen.values()) + scales
    wanted = frozen_bytes(TINY_CONFIG, Layout(1), 0, dtype.itemsize, fp8=fp8, offload=offload)
    if not offload:
        assert held == wanted
        return
    # Of two blocks both are on the device, one of them ahead.
    in_main_memory = StreamedWeights(dict(model.blocks.items()), torch.device("cpu")).nbytes
    assert sum(value.nbytes for value in frozen.values()) + in_main_memory + scales == held == wanted


def test_of_a_model_of_many_blocks_two_are_on_the_device() -> None:
    whole = {
        (fp8, offload): frozen_bytes(WAN_14B, Layout(1), 0, 2, fp8=fp8, offload=offload) / 1e9
        for fp8 in (False, True)
        for offload in (False, True)
    }
    assert whole[False, False] == pytest.approx(28.6, abs=0.1)
    assert whole[True, False] == pytest.approx(14.6, abs=0.3)
    assert whole[False, True] < 2
    assert whole[True, True] < 1.3
    parts = [frozen_bytes(WAN_14B, Layout(8, 2, pipeline=4), stage, 2, fp8=True, offload=False) for stage in range(4)]
    # Every rank has all of the embedders.
    assert 1 < sum(parts) * 2 / 1e9 / whole[True, False] < 1.25
