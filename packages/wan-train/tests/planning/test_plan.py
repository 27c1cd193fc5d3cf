"""The plan's estimates, against what runs really hold and against sums by hand."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from training_runs import FULLY_SHARDED, RUN_OPTIONS, call, run
from warm_ranks import Call

from wan_model import WAN_1_3B, WAN_14B
from wan_model.dit.flops import pack_flops
from wan_model.dit.lora import LoraSettings
from wan_model.dit.model import precision_of
from wan_model.dit.recompute import Recompute
from wan_model.pack import PackLayout
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.transformer import expected_shapes
from wan_train.cli import main
from wan_train.model.layout import Layout
from wan_train.planning.hardware import KNOWN, Hardware
from wan_train.planning.memory import (
    ActivationBytes,
    StateBytes,
    adapter_parameters_of_stages,
    parameters_of_stages,
)
from wan_train.planning.plan import DEFAULT_GPUS, MODELS, RECIPES, candidates, pack_of
from wan_train.planning.step_time import StepTime

H100 = KNOWN["h100"]
TENSOR = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]
FULL = ["model.recompute_granularity=full"]
# Layout, settings, what is computed again.
MEASURED: dict[str, tuple[Layout, list[str], Recompute]] = {
    "one process": (Layout(1), ["ema.decay=0.9", "train.train_iters=3"], "none"),
    "all computed again": (Layout(1), FULL, "block"),
    "all but attention computed again": (Layout(1), ["model.recompute_granularity=selective"], "all_but_attention"),
    "only elementwise operations computed again": (
        Layout(2, tensor=2, sequence=True),
        [*TENSOR, "model.recompute_granularity=elementwise"],
        "elementwise",
    ),
    "tensor": (Layout(2, tensor=2, sequence=True), TENSOR, "none"),
    "context": (Layout(2, context=2), ["model.context_parallel_size=2"], "none"),
    "pipeline": (Layout(2, pipeline=2), ["model.pipeline_model_parallel_size=2"], "none"),
}
# Large enough that tokens, not texts or the data at hand, are what memory goes to.
GRIDS = ((8, 8, 16), (1, 32, 24), (8, 8, 16))
PACKS = 2


def measure(
    layout: Layout, settings: list[str], folder: Path, *, probe: str = "memory_probe:install"
) -> list[dict[str, float]]:
    """What each rank of a real run held."""
    shapes = [[f, 2 * h, 2 * w] for f, h, w in GRIDS]
    overrides = (
        *(option for option in RUN_OPTIONS if "=" in option), "train.train_iters=1", "checkpoint.save_interval=0",
        "dataset.capacity=4096",
        f"train.global_batch_size={PACKS * layout.data}", "dataset.mock_settings.context_length=512",
        f"dataset.mock_settings.shapes={shapes}".replace(" ", ""), *settings,
    )  # fmt: skip
    processes = ("--nproc-per-node", str(layout.world))
    calls = [Call(probe, [str(folder)])]
    ended = run(("--recipe", "tiny", "--mock", *processes, *overrides), folder / "run", calls=calls)
    assert set(ended.codes) == {0}, ended.errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(layout.world)]


@pytest.mark.parametrize("case", MEASURED)
def test_memory_is_what_a_run_really_holds(case: str, tmp_path: Path) -> None:
    layout, settings, recompute = MEASURED[case]
    pack = PackLayout(GRIDS).padded_to(layout.pad_multiple)
    activations = ActivationBytes.of(TINY_CONFIG, layout, pack, bf16=False, kernels=False)
    parameters = parameters_of_stages(TINY_CONFIG, layout.tensor, layout.pipeline)
    for rank, held in enumerate(measure(layout, settings, tmp_path)):
        stage = rank if layout.pipeline > 1 else 0
        state = StateBytes.of(parameters[stage], layout, bf16=False, ema="ema.decay=0.9" in settings)
        last = stage == layout.pipeline - 1
        layers, in_flight = TINY_CONFIG.num_layers // layout.pipeline, min(layout.pipeline - stage, PACKS)
        wanted = {
            "weights": state.weights,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "average": state.average,
            "kept": activations.kept(recompute, layers, last=last),
            "peak": activations.peak(recompute, layers, in_flight, last=last, piped=layout.pipeline > 1),
        }
        if "train.train_iters=3" in settings:
            second, third = held.pop("after_steps")
            assert second == third, "each step leaves memory behind"
        print(case, rank, {name: round(wanted[name] / (held[name] or 1), 3) for name in held})
        for name in ("weights", "gradients", "optimizer", "average"):
            # Megatron rounds its buffers up.
            assert held[name] == pytest.approx(wanted[name], rel=0.01), name
        # With everything computed again little is kept, and the data at hand are a part of it.
        assert held["kept"] == pytest.approx(wanted["kept"], rel=0.05 if recompute == "none" else 0.12)
        assert held["peak"] == pytest.approx(wanted["peak"], rel=0.1)


RANK = 16
ADAPTERS = [f"lora.rank={RANK}"]
FEW = ("to_q", "attn2.to_k", "ffn.net.2")
# Layout, settings, what is computed again, adapters.
FROZEN: dict[str, tuple[Layout, list[str], Recompute, LoraSettings]] = {
    "one process": (Layout(1), ["ema.decay=0.9"], "none", LoraSettings(RANK)),
    "few linears, all computed again": (
        Layout(1),
        [f"lora.targets=[{','.join(FEW)}]", *FULL],
        "block",
        LoraSettings(RANK, targets=FEW),
    ),
    "tensor, only elementwise operations computed again": (
        Layout(2, tensor=2, sequence=True),
        [*TENSOR, "model.recompute_granularity=elementwise"],
        "elementwise",
        LoraSettings(RANK),
    ),
    "pipeline, dropout": (
        Layout(2, pipeline=2),
        ["model.pipeline_model_parallel_size=2", "lora.dropout=0.1"],
        "none",
        LoraSettings(RANK, dropout=0.1),
    ),
}


@pytest.mark.parametrize("case", FROZEN)
def test_memory_of_adapters_is_what_a_run_really_holds(case: str, start_weights: Path, tmp_path: Path) -> None:
    layout, settings, recompute, lora = FROZEN[case]
    pack = PackLayout(GRIDS).padded_to(layout.pad_multiple)
    activations = ActivationBytes.of(TINY_CONFIG, layout, pack, bf16=False, kernels=False, lora=lora)
    parameters = parameters_of_stages(TINY_CONFIG, layout.tensor, layout.pipeline)
    adapters = adapter_parameters_of_stages(TINY_CONFIG, lora, layout.tensor, layout.pipeline)
    for rank, held in enumerate(measure(layout, [*ADAPTERS, *settings, "--init-from", str(start_weights)], tmp_path)):
        stage = rank if layout.pipeline > 1 else 0
        state = StateBytes.of(
            parameters[stage], layout, bf16=False, ema="ema.decay=0.9" in settings, adapters=adapters[stage]
        )  # fmt: skip
        ends = {"first": stage == 0, "last": stage == layout.pipeline - 1}
        layers, in_flight = TINY_CONFIG.num_layers // layout.pipeline, min(layout.pipeline - stage, PACKS)
        kept = activations.kept(recompute, layers, **ends)
        peak = activations.peak(recompute, layers, in_flight, **ends, piped=layout.pipeline > 1)
        print(
            case, rank, {name: round(size / (held[name] or 1), 4) for name, size in dataclasses.asdict(state).items()}
        )
        print(case, rank, round(kept / held["kept"], 3), round(peak / held["peak"], 3))
        for name, size in dataclasses.asdict(state).items():
            assert held[name] == pytest.approx(size, rel=0.01), name
        assert held["kept"] == pytest.approx(kept, rel=0.05 if recompute == "none" else 0.12)
        assert held["peak"] == pytest.approx(peak, rel=0.1)


SHARDED = {
    "bf16, data": (Layout(2), ["mixed_precision=bf16_mixed"]),
    "fp32, FSDP": (Layout(2, fully_sharded=True), [FULLY_SHARDED]),
    "bf16, FSDP": (Layout(2, fully_sharded=True), [FULLY_SHARDED, "mixed_precision=bf16_mixed"]),
}


@pytest.mark.parametrize("case", SHARDED)
def test_frozen_weights_have_no_state_but_themselves(case: str, start_weights: Path, tmp_path: Path) -> None:
    layout, settings = SHARDED[case]
    bf16, sharded, lora = "mixed_precision=bf16_mixed" in settings, layout.fully_sharded, LoraSettings(RANK)
    (parameters,) = parameters_of_stages(TINY_CONFIG, 1, 1)
    (adapters,) = adapter_parameters_of_stages(TINY_CONFIG, lora, 1, 1)
    state = StateBytes.of(parameters, layout, bf16=bf16, adapters=adapters)
    # What diffusers keeps in fp32: 0.2 % of a released model, which the formula leaves out.
    kept = sum(
        math.prod(shape)
        for key, shape in expected_shapes(TINY_CONFIG).items()
        if bf16 and precision_of(key, torch.bfloat16) == torch.float32
    )
    wanted = {**dataclasses.asdict(state), "weights": state.weights + 2 * kept / (layout.world if sharded else 1)}
    options = [*ADAPTERS, *settings, "--init-from", str(start_weights)]
    for held in measure(layout, options, tmp_path, probe="memory_probe:install_state"):
        print(case, {name: round(size / (held[name] or 1), 4) for name, size in wanted.items()})
        for name, size in wanted.items():
            assert held[name] == pytest.approx(size, rel=0.01), name


def test_a_step_on_one_gpu_is_its_operations_over_their_rates() -> None:
    hardware = dataclasses.replace(H100, efficiency=1.0)
    pack = PackLayout(((21, 30, 52),))
    time = StepTime.of(WAN_14B, Layout(1), pack, "none", hardware, packs=3)
    s, t, h, f, layers = 32_760, 512, 5120, 13824, 40
    linears = layers * (8 * s * h * h + 4 * s * h * h + 4 * t * h * h + 4 * s * h * f)
    ends = 4 * 64 * s * h + 2 * t * (4096 * h + h * h) + 14 * h * h + 512 * h
    core = layers * (4 * s * s * h + 4 * s * t * h)
    assert time.matmul == pytest.approx(3 * 3 * (linears + ends) / 794e12)
    # The backward pass computes 2.5 times the forward pass, of which 2 are required.
    assert time.attention == pytest.approx(3 * (core / 693e12 + 2.5 * core / 572e12))
    assert (time.tensor, time.context, time.pipeline, time.data) == (0, 0, 0, 0)
    assert time.needed == 3 * 3 * (linears + ends + core)
    again = StepTime.of(WAN_14B, Layout(1), pack, "block", hardware, packs=3)
    assert again.matmul == pytest.approx(3 * (4 * linears + 3 * ends) / 794e12)
    assert again.attention == pytest.approx(3 * (2 * core / 693e12 + 2.5 * core / 572e12))
    cheap = StepTime.of(WAN_14B, Layout(1), pack, "elementwise", hardware, packs=3)
    assert (cheap.matmul, cheap.attention) == (time.matmul, time.attention)
    assert cheap.elementwise == again.elementwise > time.elementwise
    kept = StepTime.of(WAN_14B, Layout(1), pack, "all_but_attention", hardware, packs=3)
    text = layers * 4 * s * t * h
    assert kept.attention == pytest.approx(3 * ((core + text) / 693e12 + 2.5 * core / 572e12))


def test_wires_carry_what_the_layout_sends() -> None:
    hardware = dataclasses.replace(H100, efficiency=1.0)
    s, h, layers = 32_768, 5120, 40
    pack = PackLayout(((32, 32, 32),))

    def of(layout: Layout, packs: int = 1) -> StepTime:
        return StepTime.of(WAN_14B, layout, pack, "none", hardware, packs=packs)

    # Three gathers and three scatters of [S, h] bf16 in each direction, of which a rank sends (t - 1) / t. In the
    # backward pass gradients of weights hide the scatters, or everything without sequence parallelism, as far as they
    # take as long.
    once = layers * (3 / 4) * s * h * 2 / 450e9
    assert of(Layout(4, 4, sequence=True)).tensor == pytest.approx(once * (2 * 6 - 3))
    assert of(Layout(4, 4)).tensor == pytest.approx(once * (2 * 6 - 6))
    wide = dataclasses.replace(hardware, matmul=1e18)
    late = StepTime.of(WAN_14B, Layout(4, 4), pack, "none", wide, packs=1).tensor
    assert late == pytest.approx(once * 2 * 6 - layers * 2 * s * h * (4 * h + 13824) / 4 / 1e18)
    # Four exchanges of [S / c, h] bf16 in each direction, of which (c - 1) / c leave.
    assert of(Layout(8, context=8)).context == pytest.approx(layers * 2 * 4 * (7 / 8) * (s / 8) * h * 2 / 450e9)
    # Context over two machines: 4 of the 7 others are in the other one, behind a card of 50 GB/s.
    crossing = of(Layout(16, 2, 8, sequence=True)).context
    assert crossing == pytest.approx(layers * 2 * 4 * (7 / 8) * (s / 8) * (h / 2) * 2 / (50e9 * 7 / 4))
    # With p stages and m packs, (p - 1) / m of the computing is waited for, and rows are sent both ways.
    piped = of(Layout(4, pipeline=4), packs=6)
    computing = piped.matmul + piped.attention + piped.elementwise
    assert piped.pipeline == pytest.approx(computing * 3 / 6 + 2 * 6 * s * h * 2 / 50e9)
    # Gradients in fp32 and weights in bf16 of all parameters, less what a pack's computing hides.
    slow = dataclasses.replace(hardware, intra_node=1e9, inter_node=1e9)
    data = StepTime.of(WAN_14B, Layout(2), pack, "none", slow, packs=1)
    (parameters,) = parameters_of_stages(WAN_14B, 1, 1)
    computing = data.matmul + data.attention + data.elementwise
    assert data.data == pytest.approx(parameters * 6 / 2 / 1e9 - computing)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gpus", DEFAULT_GPUS)
def test_what_is_planned_fits_and_can_be(model: str, gpus: int) -> None:
    config, pack = MODELS[model], pack_of(MODELS[model], (81, 480, 832), 43008)
    assert pack.total == 32_760
    found = candidates(config, pack, gpus, H100, max(8, gpus // 8))
    assert found
    for plan in found:
        plan.layout.check(config, packs=plan.packs, capacity=43008)
        assert plan.memory.total <= 74e9
        assert 0 < plan.time.rate < H100.matmul * H100.efficiency
        assert plan.packs % plan.layout.data == 0
        # Every operation is done by somebody.
        assert plan.time.needed == plan.packs * pack_flops(config, pack).training
    rates = [plan.time.rate for plan in found]
    assert max(rates) - rates[0] < 0.1e12


def test_the_published_layout_is_estimated_near_its_published_rate() -> None:
    """NVIDIA, 14B, 37,440 tokens, 128 H100, tensor 2 with sequence, context 4: 325.77 TFLOP/s a GPU."""
    layout = Layout(128, 2, 4, sequence=True)
    pack = PackLayout(((24, 30, 52),))
    rates = [
        StepTime.of(WAN_14B, layout, pack, mode, H100, packs=1).rate / 1e12
        for mode in ("block", "all_but_attention", "elementwise", "none")
    ]
    assert rates == sorted(rates)
    assert 325.77 < rates[0] < 325.77 * 1.25


def test_the_command_prints_a_table_and_the_settings() -> None:
    result = CliRunner().invoke(main, ["plan", "--model", "14b", "--gpus", "64"])
    assert result.exit_code == 0
    *_, row, _, settings = result.output.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "64"
    command = (
        "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        "--no-python wan-train pretrain --recipe wan_14b dataset.path=DATASET "
        "checkpoint.save=CHECKPOINTS model.flow.caption_dropout=0.1"
    )
    assert settings.startswith(f"{command} train.global_batch_size=8 dataset.capacity=32760 ")
    many = CliRunner().invoke(main, ["plan", "--gpus", "8", "--best", "5", "--json"])
    found: list[dict[str, Any]] = json.loads(many.output)
    assert len(found) == 5
    assert all(
        math.prod(plan["layout"][one] for one in ("data", "tensor", "context", "pipeline")) == 8 for plan in found
    )
    assert [plan["tflops_per_gpu"] for plan in found] == pytest.approx(
        sorted((plan["tflops_per_gpu"] for plan in found), reverse=True), abs=0.1
    )


PASTED = [(model, gpus, shape) for model in MODELS for gpus in (8, 64, 1024) for shape in ("81x480x832", "17x480x832")]


@pytest.fixture(scope="session")
def pasted(once: Callable[..., Path]) -> dict[str, list[Any]]:
    """The plan of each case, and the dry run of its settings."""

    def build(path: Path) -> None:
        plans, wanted = {}, {}
        for model, gpus, shape in PASTED:
            key = f"{model} {gpus} {shape}"
            planned = CliRunner().invoke(
                main, ["plan", "--model", model, "--gpus", str(gpus), "--shape", shape, "--json"]
            )
            (plans[key],) = json.loads(planned.output)
            frames, height, width = map(int, shape.split("x"))
            latent = [1 + (frames - 1) // 4, height // 8, width // 8]
            samples = pack_of(MODELS[model], (frames, height, width), 43008).num_samples
            # Without data a pack is one sample; several have the text of each besides.
            several = [
                "--mock", f"dataset.mock_settings.shapes=[{latent}]".replace(" ", ""),
                f"dataset.mock_settings.number_packed_samples={samples}",
            ]  # fmt: skip
            wanted[key] = [
                *("pretrain", "--recipe", RECIPES[model], "--dry-run", "--json", "--world-size", str(gpus)),
                *(several if samples > 1 else []), *plans[key]["settings"],
            ]  # fmt: skip
        call("rank_calls:command_lines", str(path), wanted)
        path.write_text(json.dumps({key: [plans[key], *ran] for key, ran in json.loads(path.read_text()).items()}))

    results: dict[str, list[Any]] = json.loads(once("pasted-plans", build).read_text())
    return results


@pytest.mark.parametrize(("model", "gpus", "shape"), PASTED)
def test_the_settings_train_what_was_planned(model: str, gpus: int, shape: str, pasted: dict[str, list[Any]]) -> None:
    plan, code, output, errors = pasted[f"{model} {gpus} {shape}"]
    assert code == 0, errors
    found = json.loads(output)
    assert found["layout"] == plan["layout"]
    assert (found["packs"], found["recompute"]) == (plan["packs"], plan["recompute"])
    needed = found["total_bytes"]
    assert needed == pytest.approx(plan["memory"]["total"], rel=1e-12)
    assert found["tokens"] <= plan["packs"] * plan["capacity"]


def test_another_gpu_is_described_by_a_file(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    rates = ("peak", "matmul", "attention_forward", "attention_backward")
    file.write_text("memory: 24.0e9\n" + "".join(f"{rate}: 100.0e12\n" for rate in rates))
    hardware = Hardware.find(str(file))
    assert (hardware.name, hardware.memory, hardware.bandwidth) == ("small", 24e9, H100.bandwidth)
    result = CliRunner().invoke(main, ["plan", "--gpu", str(file), "--gpus", "8"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: no layout of 8 GPUs of 24 GB fits this model")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "tpu"], "--gpu is 'tpu'; expected one of h100, h200, or a YAML file"),
        (["--shape", "big"], "--shape is 'big'; expected FRAMESxHEIGHTxWIDTH"),
        (
            ["--shape", "80x480x832"],
            "of the shape is 80; the autoencoder takes 4n+1 frames: the nearest are 77 and 81",
        ),
        (["--shape", "81x488x832"], "the height of the shape is 488 pixels; it must be a multiple of 16: the nearest"),
        (["--shape", "81x480x0"], "the width of the shape is 0 pixels; it must be a multiple of 16: the nearest is 16"),
        (["--shape", "81x720x1280"], "has 75,600 tokens, more than a pack's 43,008; raise --capacity"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 2
    assert said in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("content", ["- 1", "speed: 3", "memory: much", "memory: -1", "{", "peak: 312e12"])
def test_a_gpu_file_that_describes_none_is_one_sentence(content: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text(content)
    result = CliRunner().invoke(main, ["plan", "--gpu", str(file)])
    assert result.exit_code == 2
    assert str(file) in result.output
    assert result.output.count("\n") == 1


def test_the_training_document_counts_tokens_as_the_packs_do() -> None:
    document = (Path(__file__).parents[2] / "TRAINING.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (\d+) frames? of (\d+) x (\d+).* \| (\d+) x (\d+) x (\d+) = ([\d,]+) \|", document)
    assert len(rows) == 4
    for row in rows:
        *numbers, tokens = (int(number.replace(",", "")) for number in row)
        pack = pack_of(WAN_1_3B, (numbers[0], numbers[1], numbers[2]), tokens)
        assert pack.grids == (tuple(numbers[3:]),)
        assert pack.total == tokens


@pytest.mark.parametrize("model", MODELS)
def test_the_planning_document_has_what_the_command_prints(model: str) -> None:
    document = (Path(__file__).parents[2] / "PLANNING.md").read_text(encoding="utf-8")
    result = CliRunner().invoke(main, ["plan", "--model", model])
    assert result.exit_code == 0
    rows = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(DEFAULT_GPUS)
    assert "\n".join(rows) in document
