"""Adapters: equal to peft's on diffusers' transformer, the formulae, frozen weights, dropout, merging."""

import copy
import math
import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model import PackLayout, WanConfig, WanDiT, init_weights, patchify
from wan_model.dit.adapters import adapted_linears, adapter_parameters, add_adapters, merge_adapters
from wan_model.dit.lora import LINEARS, DropoutRows, LoraSettings, adapter_shapes, dropout_mask, dropout_over
from wan_model.dit.recompute import Recompute
from wan_model.testing import assert_all_within, rounding_scale, seeds
from wan_model.weights.transformer import init_adapters

LAYOUT = PackLayout(((2, 3, 4), (1, 2, 5)))
TIMESTEPS = torch.tensor([900.4, 37.25])
STEPS = 10


def random_adapters(model: WanDiT, settings: LoraSettings, seed: int = 3) -> WanDiT:
    """A copy of the model with adapters whose A and B are both alive."""
    model = copy.deepcopy(model)
    add_adapters(model, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.3 / parameter.shape[1] ** 0.5, generator=generator)
    return model


def peft_of(diffusers_model: Any, settings: LoraSettings, ours: WanDiT) -> Any:
    """diffusers' transformer with peft's adapters of the same values."""
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    theirs = copy.deepcopy(diffusers_model)
    targets = [name.removeprefix("blocks.0.") for name in settings.linears(WanConfig(num_layers=1))]
    theirs.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
            use_rslora=settings.use_rslora,
            target_modules=targets,
            lora_dropout=settings.dropout,
        )
    )
    state = {key: value.detach() for key, value in adapter_parameters(ours).items()}
    assert set(get_peft_model_state_dict(theirs)) == set(state), "the keys are those of diffusers' files"
    set_peft_model_state_dict(theirs, state)
    return theirs


def peft_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {
        key.replace(".default", ""): parameter for key, parameter in model.named_parameters() if parameter.requires_grad
    }


class Run:
    """Inputs, and what a model makes of them."""

    def __init__(self, config: WanConfig, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        shapes = [(config.in_channels, f, 2 * h, 2 * w) for f, h, w in LAYOUT.grids]
        self.latents, self.probes = ([torch.randn(shape, generator=rng) for shape in shapes] for _ in range(2))
        self.texts = torch.randn(len(shapes), config.text_length, config.text_dim, generator=rng)

    def ours(self, model: WanDiT, dropout_seed: int | None = None) -> Tensor:
        dtype = model.proj_out.weight.dtype
        tokens = torch.cat([patchify(x) for x in self.latents]).to(dtype)
        return model(tokens, TIMESTEPS, self.texts.to(dtype), LAYOUT, dropout_seed)

    def theirs(self, model: Any) -> Tensor:
        parts = []
        for i, latent in enumerate(self.latents):
            out = model(latent[None], TIMESTEPS[i : i + 1], self.texts[i : i + 1], return_dict=False)[0][0]
            parts.append(patchify(out))
        return torch.cat(parts)

    def loss(self, out: Tensor) -> Tensor:
        probes = torch.cat([patchify(x) for x in self.probes]).to(out.dtype)
        return (out * probes).sum()

    def results(self, out: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        for parameter in parameters.values():
            parameter.grad = None
        self.loss(out).backward()
        found = {"output": out.detach()}
        for key, parameter in parameters.items():
            assert parameter.grad is not None, key
            found[key] = parameter.grad
        return found


SETTINGS = {
    "all linears": LoraSettings(rank=4),
    "alpha": LoraSettings(rank=3, alpha=12.0, targets=("to_q", "to_v")),
    "rank stabilisation": LoraSettings(rank=4, alpha=6.0, use_rslora=True, targets=("attn1.*", "ffn.net.2")),
}


@pytest.mark.rounding
@pytest.mark.parametrize("seed", seeds(5))
@pytest.mark.parametrize("name", SETTINGS)
def test_forward_and_every_gradient_are_those_of_peft(
    name: str, seed: int, small_model: WanDiT, diffusers_model: Any
) -> None:
    diffusers_model.load_state_dict(small_model.state_dict())
    settings, run = SETTINGS[name], Run(small_model.config, seed)
    ours = random_adapters(small_model, settings, seed)
    theirs, double = peft_of(diffusers_model, settings, ours), copy.deepcopy(ours).double()
    scale = rounding_scale(lambda: run.results(run.ours(double), adapter_parameters(double)))
    got = run.results(run.ours(ours), adapter_parameters(ours))
    wanted = run.results(run.theirs(theirs), peft_parameters(theirs))
    assert all(value.norm() > 0 for value in wanted.values())
    assert_all_within(got, wanted, scale)
    for key, value in got.items():
        assert (value - wanted[key]).norm() <= 1e-5 * wanted[key].norm(), key


@pytest.mark.rounding
@pytest.mark.parametrize("seed", seeds(6))
def test_weights_after_steps_of_adamw_are_those_of_peft(seed: int, small_model: WanDiT, diffusers_model: Any) -> None:
    diffusers_model.load_state_dict(small_model.state_dict())
    settings = SETTINGS["all linears"]
    ours = random_adapters(small_model, settings, seed)
    theirs = peft_of(diffusers_model, settings, ours)

    def train(parameters: dict[str, nn.Parameter], forward: Any) -> dict[str, Tensor]:
        # A large eps: without it the sign of a gradient that is nearly zero would decide.
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.1, eps=1e-2, foreach=False)
        for step in range(STEPS):
            run = Run(small_model.config, 100 * seed + step)
            optimizer.zero_grad()
            (run.loss(forward(run)) / LAYOUT.total).backward()
            optimizer.step()
        return {key: parameter.detach() for key, parameter in parameters.items()}

    begun = {key: parameter.detach().clone() for key, parameter in adapter_parameters(ours).items()}
    got = train(adapter_parameters(ours), lambda run: run.ours(ours))
    wanted = train(peft_parameters(theirs), lambda run: run.theirs(theirs))
    for key, value in wanted.items():
        moved = (value - begun[key]).norm()
        assert moved > 1e-3 * value.norm(), "the steps change the weights"
        assert (got[key] - value).norm() <= 1e-4 * value.norm(), key


def test_only_adapters_learn_and_they_are_fp32_beside_bfloat16(small_model: WanDiT) -> None:
    model = random_adapters(small_model, LoraSettings(rank=4)).to_precision(torch.bfloat16)
    Run(model.config, 1).ours(model).sum().backward()
    for key, parameter in model.named_parameters():
        adapts = ".lora_" in key
        assert parameter.requires_grad == (parameter.grad is not None) == adapts, key
        if adapts:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, key  # type: ignore[union-attr]
    assert model.blocks["0"].attn1.to_q.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_every_module_with_parameters_is_called(small_model: WanDiT) -> None:
    """A runtime may wait in a hook of the call until the parameters of a step have come from other ranks."""
    model = random_adapters(small_model, LoraSettings(rank=4))
    owners = {name for name, module in model.named_modules() if dict(module.named_parameters(recurse=False))}
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.add(name))
    Run(model.config, 1).ours(model)
    assert owners <= called, owners - called


def test_initial_adapters_change_nothing_and_are_those_of_peft(small_model: WanDiT) -> None:
    model, settings = copy.deepcopy(small_model), LoraSettings(rank=64)
    add_adapters(model, settings)
    init_adapters(model, seed=1)
    run = Run(model.config, 1)
    assert torch.equal(run.ours(model), run.ours(small_model))
    reference = torch.empty(64, 4096)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    for key, value in model.state_dict().items():
        if ".lora_" not in key:
            continue
        if key.endswith("lora_B.weight"):
            assert not value.any(), key
        else:
            bound = reference.abs().max().item() * math.sqrt(4096 / value.shape[1])
            assert value.abs().max().item() == pytest.approx(bound, rel=0.02), key
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), key
    again = copy.deepcopy(small_model)
    add_adapters(again, settings)
    init_adapters(again, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_base_is_filled_around_adapters(small_model: WanDiT) -> None:
    model = copy.deepcopy(small_model)
    add_adapters(model, LoraSettings(rank=2))
    init_weights(model, seed=4)
    plain = WanDiT(small_model.config)
    init_weights(plain, seed=4)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())


@pytest.mark.rounding
@pytest.mark.parametrize("joined", [False, True])
def test_without_gradients_the_result_is_the_same(joined: bool, small_model: WanDiT) -> None:
    settings = LoraSettings(rank=4, alpha=3.0)
    model, run = random_adapters(small_model, settings), Run(small_model.config, 1)
    wanted = run.ours(model).detach()
    if joined:  # the same factor, given for each row of A
        for linear in adapted_linears(model).values():
            linear.lora.factor = torch.full((4,), settings.factor)  # type: ignore[union-attr]
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        scale = rounding_scale(lambda: {"output": run.ours(double)})
        assert_all_within({"output": run.ours(model)}, {"output": wanted}, scale)


TARGETS = [
    (("*",), [f"blocks.{layer}.{name}" for layer in range(2) for name in LINEARS]),
    (("attn1.to_q",), ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"]),
    (("to_k", "blocks.1.ffn.*"), [
        "blocks.0.attn1.to_k", "blocks.0.attn2.to_k",
        "blocks.1.attn1.to_k", "blocks.1.attn2.to_k", "blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2",
    ]),
    (("proj",), ["blocks.0.ffn.net.0.proj", "blocks.1.ffn.net.0.proj"]),
]  # fmt: skip


@pytest.mark.parametrize(("targets", "wanted"), TARGETS)
def test_targets(targets: tuple[str, ...], wanted: list[str], small_model: WanDiT) -> None:
    settings = LoraSettings(rank=2, targets=targets)
    assert settings.linears(small_model.config) == wanted
    model = copy.deepcopy(small_model)
    add_adapters(model, settings)
    assert list(adapted_linears(model)) == wanted
    shapes = {key: tuple(parameter.shape) for key, parameter in adapter_parameters(model).items()}
    assert shapes == adapter_shapes(model.config, settings)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "the rank of the LoRA is 0; expected a whole number from 1"),
        ({"alpha": 0.0}, "the alpha of the LoRA is 0.0; expected a number above 0"),
        ({"alpha": math.inf}, "the alpha of the LoRA is inf"),
        ({"alpha": 1e39}, "the alpha of the LoRA is 1e+39; expected a number above 0, from 1e-30 to 1e+30"),
        ({"alpha": 1e-46}, "the alpha of the LoRA is 1e-46"),
        ({"alpha": math.nan}, "the alpha of the LoRA is nan"),
        ({"dropout": 1.0}, "the dropout of the LoRA is 1.0; expected 0 or more and below 1"),
        ({"targets": ()}, "the LoRA has no targets"),
    ],
)
def test_values_that_no_adapter_can_have(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        LoraSettings(**{"rank": 4, **values})


@pytest.mark.parametrize("target", ["to_z", "blocks.2.*", "norm_q", "condition_embedder.*", "q", "blocks.0"])
def test_a_target_that_is_no_linear_of_the_blocks(target: str, small_model: WanDiT) -> None:
    with pytest.raises(
        ValueError, match=f"the LoRA's target '{target}' is no linear of the model's 2 blocks".replace("*", r"\*")
    ):
        add_adapters(small_model, LoraSettings(rank=2, targets=("to_q", target)))


def test_gradients_are_equal_to_the_bit_however_blocks_are_recomputed(small_model: WanDiT) -> None:
    model, run = random_adapters(small_model, LoraSettings(rank=4, dropout=0.2)), Run(small_model.config, 1)
    gradients: dict[str, list[Tensor]] = {}
    for mode in get_args(Recompute):
        model.recompute = mode
        found = run.results(run.ours(model, dropout_seed=7), adapter_parameters(model))
        gradients[mode] = list(found.values())
    for mode in get_args(Recompute):
        assert all(torch.equal(a, b) for a, b in zip(gradients[mode], gradients["none"], strict=True)), mode


def held_bytes(model: WanDiT, mode: Recompute) -> int:
    """What a forward pass leaves behind for the backward pass."""
    model.recompute = mode
    run = Run(model.config, 1)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        out = run.ours(model)
    held = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    del out
    return held


def test_recomputation_of_all_but_products_keeps_no_second_product(small_model: WanDiT) -> None:
    adapted = random_adapters(small_model, LoraSettings(rank=1))
    more = held_bytes(adapted, "elementwise") - held_bytes(small_model, "elementwise")
    wide = LAYOUT.total * small_model.config.hidden_size * 4
    # Twenty linears: a second result of each would be at least twenty times this.
    assert more < 8 * wide


# -- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_is_the_formula(small_model: WanDiT) -> None:
    settings = LoraSettings(rank=4, alpha=8.0, dropout=0.25, targets=("blocks.0.attn1.to_q",))
    model = random_adapters(small_model, settings)
    linear = model.blocks["0"].attn1.to_q  # type: ignore[union-attr]
    x = torch.randn(LAYOUT.total, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    rows = DropoutRows(11, 0, LAYOUT.total, LAYOUT.total)
    mask = dropout_mask(linear.lora, rows, x.device)
    assert 0.7 < mask.float().mean() < 0.8
    with dropout_over(rows):
        got = linear(x)
    low = F.linear(x * mask / 0.75, linear.lora_A.weight)
    torch.testing.assert_close(got, F.linear(x, linear.weight, linear.bias) + 2 * F.linear(low, linear.lora_B.weight))
    assert torch.equal(linear(x), linear(x)), "nothing is dropped outside"


def test_masks_differ_by_linear_and_seed_and_are_cut_out_of_the_whole(small_model: WanDiT) -> None:
    model = random_adapters(small_model, LoraSettings(rank=2, dropout=0.5))
    first, second = (adapted_linears(model)[name].lora for name in ("blocks.0.attn1.to_q", "blocks.1.attn1.to_q"))
    assert first is not None
    assert second is not None
    device = torch.device("cpu")
    whole = dropout_mask(first, DropoutRows(1, 0, 12, 12), device)
    assert torch.equal(whole, dropout_mask(first, DropoutRows(1, 0, 12, 12), device))
    assert not torch.equal(whole, dropout_mask(second, DropoutRows(1, 0, 12, 12), device))
    assert not torch.equal(whole, dropout_mask(first, DropoutRows(2, 0, 12, 12), device))
    assert torch.equal(whole[3:6], dropout_mask(first, DropoutRows(1, 3, 6, 12), device))
    first.columns = (20, 40, 60)
    assert torch.equal(whole[:, 20:40], dropout_mask(first, DropoutRows(1, 0, 12, 12), device))


def test_dropout_needs_a_seed_and_leaves_the_global_generator_alone(small_model: WanDiT) -> None:
    model, run = random_adapters(small_model, LoraSettings(rank=4, dropout=0.5)), Run(small_model.config, 1)
    state = torch.get_rng_state()
    without, one, again, other = (run.ours(model, seed) for seed in (None, 1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.allclose(one, without)
    assert not torch.allclose(one, other)


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=list(SETTINGS))
def adapted(request: pytest.FixtureRequest, small_model: WanDiT) -> WanDiT:
    return random_adapters(small_model, SETTINGS[request.param])


@pytest.mark.rounding
def test_merged_weights_give_the_same_output(adapted: WanDiT) -> None:
    run, double = Run(adapted.config, 1), copy.deepcopy(adapted).double()
    scale = rounding_scale(lambda: {"output": run.ours(double)})
    merged = copy.deepcopy(adapted)
    merge_adapters(merged)
    assert not adapter_parameters(merged)
    assert_all_within({"output": run.ours(merged)}, {"output": run.ours(double)}, scale)
