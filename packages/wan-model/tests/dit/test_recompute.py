"""Recomputation: the same gradients to the bit, less memory, and what is computed twice."""

from collections import Counter
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_model import PackLayout, WanDiT
from wan_model.dit import elementwise
from wan_model.dit.recompute import Recompute

LAYOUT = PackLayout(((2, 6, 8), (1, 5, 4)), padding=2)
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def arguments(model: WanDiT) -> tuple[Tensor, Tensor, Tensor, PackLayout]:
    rng = torch.Generator().manual_seed(4)
    tokens = torch.randn(LAYOUT.total, model.config.token_in, generator=rng)
    text = torch.randn(2, model.config.text_length, model.config.text_dim, generator=rng)
    return tokens, torch.tensor([412.5, 90.0]), text, LAYOUT


def held_bytes(model: WanDiT, mode: Recompute) -> int:
    """What a forward pass leaves behind for the backward pass."""
    model.recompute = mode
    # torch 2.11 warns if the events may be those of one cycle only.
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        out = model(*arguments(model))
    held = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    del out
    return held


@pytest.mark.parametrize("chunk", [None, 64], ids=["small tensors", "large tensors"])
def test_gradients_are_equal_to_the_bit(
    small_model: WanDiT, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:  # which are computed in chunks, and partly over their inputs
        monkeypatch.setattr(elementwise, "_CHUNK_SIZE", chunk)
    gradients: dict[str, list[Tensor]] = {}
    for mode in get_args(Recompute):
        small_model.zero_grad()
        small_model.recompute = mode
        small_model(*arguments(small_model)).square().sum().backward()
        gradients[mode] = [parameter.grad for parameter in small_model.parameters() if parameter.grad is not None]
    assert len(gradients["none"]) == len(list(small_model.parameters()))
    for mode in get_args(Recompute):
        assert all(torch.equal(a, b) for a, b in zip(gradients[mode], gradients["none"], strict=True)), mode


def test_what_is_computed_again(small_model: WanDiT) -> None:
    layers, samples = small_model.config.num_layers, LAYOUT.num_samples
    seen = {}
    for mode in get_args(Recompute):
        small_model.recompute = mode
        with Calls() as calls:
            small_model(*arguments(small_model)).sum().backward()
        seen[mode] = calls.seen
    once = layers * samples * 2  # self- and cross-attention
    assert seen["none"][ATTENTION] == once
    assert seen["block"][ATTENTION] == 2 * once
    assert seen["all_but_attention"][ATTENTION] == once + layers * samples, "the cross-attention alone"
    assert seen["elementwise"][ATTENTION] == once
    # Ten linears a block, and six outside: the rest is computed again.
    assert seen["none"]["addmm"] == 10 * layers + 7
    assert seen["all_but_attention"]["addmm"] == seen["block"]["addmm"] == 20 * layers + 7
    assert seen["elementwise"]["addmm"] == seen["none"]["addmm"]
    for function in ("gelu", "native_layer_norm"):
        assert seen["elementwise"][function] == seen["block"][function] > seen["none"][function] > 0


def test_memory_falls(small_model: WanDiT) -> None:
    held = {mode: held_bytes(small_model, mode) for mode in get_args(Recompute)}
    assert held["block"] < 0.2 * held["none"]
    # The result of self-attention, and for each token and head the logarithm of its softmax's sum.
    config = small_model.config
    kept = config.num_layers * LAYOUT.valid * (config.hidden_size + config.num_heads) * 4
    assert held["all_but_attention"] - held["block"] == pytest.approx(kept, rel=0.02)
    assert held["all_but_attention"] < 0.25 * held["none"]
    # The results of both attentions and of the ten linears, of which two have the rows of the texts.
    rows, texts, h = LAYOUT.total, 2 * config.text_length, config.hidden_size
    attended = 2 * LAYOUT.valid * (h + config.num_heads)
    kept = config.num_layers * (rows * (7 * h + config.ffn_dim) + texts * 2 * h + attended) * 4
    assert held["elementwise"] - held["block"] == pytest.approx(kept, rel=0.02)
    assert held["elementwise"] < 0.6 * held["none"]


def test_nothing_is_kept_where_no_gradient_is_wanted(small_model: WanDiT) -> None:
    small_model.recompute = "block"
    with torch.no_grad(), Calls() as calls:
        small_model(*arguments(small_model))
    assert calls.seen[ATTENTION] == 2 * 2 * small_model.config.num_layers


def test_unknown_modes_are_refused(small_model: WanDiT) -> None:
    small_model.recompute = "some"  # type: ignore[assignment]
    known = "none, elementwise, all_but_attention, block"
    with pytest.raises(ValueError, match=f"recompute is 'some'; expected one of {known}"):
        small_model(*arguments(small_model))


def test_nothing_is_recomputed_without_gradients(small_model: WanDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model.recompute = "block"
    monkeypatch.setattr(small_model.ops, "checkpoint", lambda *_, **__: pytest.fail("a checkpoint without a backward"))
    with torch.no_grad():
        small_model(*arguments(small_model))
    with pytest.raises(pytest.fail.Exception, match="a checkpoint without a backward"):
        small_model(*arguments(small_model))
