"""A run that starts from a LoRA file: the base with the file at first, in every layout, and what is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import (
    CONTEXT,
    FULLY_SHARDED,
    PIPELINE,
    RUN_OPTIONS,
    SEQUENCE,
    TENSOR,
    call,
    read_log,
    refused,
    run,
    steps_of,
    stopped_after,
    train,
    trajectory,
)

from wan_model.dit.lora import LoraSettings
from wan_model.testing.lora_reference import changed_by, diffusers_transformer, drawn_adapters
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.lora_adapters import read_found_adapters
from wan_model.weights.lora_file import LoraOrigin, save_lora
from wan_model.weights.training_adapters import find_adapters, read_adapters
from wan_model.weights.training_checkpoint import find_checkpoint
from wan_model.weights.transformer import load_transformer, save_transformer

SETTINGS = LoraSettings(rank=4, alpha=12.0, use_rslora=True, targets=("attn1.*", "blocks.1.ffn.net.2"))
FACTOR = 6.0  # 12 / sqrt(4)
# The first step has a learning rate of 0, so its checkpoint has what the run began with.
ONE_STEP = "train.train_iters=1"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def adapters() -> Tensors:
    """Large enough for a change of the loss that rounding cannot be taken for."""
    return {key: 5 * value for key, value in drawn_adapters(TINY_CONFIG, SETTINGS).items()}


@pytest.fixture(scope="module")
def file(adapters: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given") / "dogs.safetensors"
    save_lora(adapters, SETTINGS, TINY_CONFIG, path)
    return path


def first_loss(folder: Path, *options: str) -> float:
    return float(steps_of(train(folder, ONE_STEP, *options))[0]["loss"])


@pytest.fixture(scope="module")
def base_weights(start_weights: Path) -> Tensors:
    return load_transformer(start_weights / "transformer").state_dict()


def loss_of_weights(weights: Tensors, folder: Path) -> float:
    """Of the first step of a run without adapters."""
    save_transformer({key: value.float() for key, value in weights.items()}, TINY_CONFIG, folder / "model/transformer")
    return first_loss(folder / "run", "--init-from", str(folder / "model"))


@pytest.fixture(scope="module")
def losses(
    start_weights: Path, base_weights: Tensors, adapters: Tensors, tmp_path_factory: pytest.TempPathFactory
) -> tuple[float, float]:
    """Of the base, and of the base with the file by the plain formula."""
    folder = tmp_path_factory.mktemp("losses")
    plain = first_loss(folder / "plain", "--init-from", str(start_weights))
    changed = loss_of_weights(changed_by(base_weights, adapters, FACTOR), folder / "changed")
    assert abs(changed - plain) > 5e-3 * plain, "the LoRA changes the loss"
    return plain, changed


def same_change(loss: float, losses: tuple[float, float]) -> bool:
    plain, changed = losses
    return abs(loss - changed) < 2e-3 * abs(changed - plain)


def _diffusers(adapters: Tensors, path: Path) -> None:
    save_lora(adapters, SETTINGS, TINY_CONFIG, path)


def _comfyui(adapters: Tensors, path: Path) -> None:
    save_lora(adapters, SETTINGS, TINY_CONFIG, path, format="comfyui")


def _kohya(adapters: Tensors, path: Path) -> None:
    save_lora(adapters, SETTINGS, TINY_CONFIG, path, format="kohya")


def _of_peft(adapters: Tensors, path: Path) -> None:
    path.mkdir()
    save_file({f"base_model.model.{key}": value for key, value in adapters.items()}, path / "adapter_model.safetensors")
    section = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "use_rslora": True}
    (path / "adapter_config.json").write_text(json.dumps(section))


@pytest.mark.parametrize("write", [_diffusers, _comfyui, _kohya, _of_peft])
def test_the_first_step_is_that_of_the_base_with_the_file(
    write: Callable[[Tensors, Path], None],
    adapters: Tensors,
    losses: tuple[float, float],
    start_weights: Path,
    tmp_path: Path,
) -> None:
    """The section states nothing: rank, alpha and targets are the file's."""
    given = tmp_path / "dogs.safetensors"
    write(adapters, given)
    loss = first_loss(tmp_path / "run", "--init-from", str(start_weights), f"lora.init_from={given}")
    assert same_change(loss, losses)
    checkpoint = find_checkpoint(tmp_path / "run")
    begun = read_adapters(checkpoint)
    assert begun.keys() == adapters.keys()
    assert all(torch.equal(begun[key], value) for key, value in adapters.items())
    settings = find_adapters(checkpoint).settings
    assert (settings.rank, settings.factor) == (4, pytest.approx(FACTOR))
    (said,) = [entry for entry in read_log(tmp_path / "run") if entry.get("event") == "lora_begun"]
    assert said["rank"] == 4
    assert Path(said["lora"]).is_relative_to(given)


def test_the_first_step_is_that_of_the_model_that_peft_trained(
    base_weights: Tensors, losses: tuple[float, float], start_weights: Path, tmp_path: Path
) -> None:
    peft: Any = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        diffusers_transformer(TINY_CONFIG, base_weights),
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_v", "net.2"]),
    )
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    adapted.save_pretrained(tmp_path / "trained")
    wanted = loss_of_weights(adapted.merge_and_unload().state_dict(), tmp_path / "merged")
    loss = first_loss(tmp_path / "run", "--init-from", str(start_weights), f"lora.init_from={tmp_path / 'trained'}")
    assert abs(wanted - losses[0]) > 2e-3 * wanted
    assert same_change(loss, (losses[0], wanted))
    settings = find_adapters(find_checkpoint(tmp_path / "run")).settings
    assert settings == LoraSettings(
        3, 7.0, targets=("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v", "ffn.net.2")
    )


@pytest.mark.parametrize(
    "layout",
    [(TENSOR, SEQUENCE), (PIPELINE,), (CONTEXT,), (FULLY_SHARDED,)],
    ids=["tensor and sequence", "pipeline", "context", "fully sharded"],
)
def test_starts_in_every_layout(
    layout: tuple[str, ...],
    file: Path,
    adapters: Tensors,
    losses: tuple[float, float],
    start_weights: Path,
    tmp_path: Path,
) -> None:
    start = ("--init-from", str(start_weights), f"lora.init_from={file}", "--nproc-per-node", "2")
    assert same_change(first_loss(tmp_path / "run", *start, *layout), losses)
    begun = read_adapters(find_checkpoint(tmp_path / "run"))
    assert all(torch.equal(begun[key], value) for key, value in adapters.items())


def test_what_the_section_states_may_be_the_files(
    file: Path, losses: tuple[float, float], start_weights: Path, tmp_path: Path
) -> None:
    """With rank stabilisation or without: what counts is the change."""
    start = ("--init-from", str(start_weights), f"lora.init_from={file}")
    stated = ("lora.rank=4", "lora.alpha=24", "lora.targets=[blocks.1.ffn.net.2,to_q,attn1.*]")
    sentence = refused(tmp_path / "run", *start, *stated)
    assert ", which does not change blocks.0.attn2.to_q, and lora.targets is " in sentence
    stated = ("lora.rank=4", "lora.alpha=24", "lora.targets=[blocks.1.ffn.net.2,attn1.*]")
    assert same_change(first_loss(tmp_path / "plain", *start, *stated), losses)
    assert same_change(first_loss(tmp_path / "stable", *start, "lora.use_rslora=true"), losses)
    assert find_adapters(find_checkpoint(tmp_path / "stable")).settings.alpha == pytest.approx(12)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ("lora.rank=8",),
            "a LoRA of rank 4, and lora.rank is 8; set lora.rank=4, or lora.rank=0 for that of the file",
        ),
        (
            ("lora.rank=4", "lora.alpha=4"),
            "a LoRA whose changes have the factor 6 (alpha 24 at rank 4), and lora.alpha is 4; set lora.alpha=24, or "
            "lora.alpha=null for that of the file",
        ),
        (
            ("lora.targets=[attn1.*]",),
            "which changes blocks.1.ffn.net.2, and lora.targets is ['attn1.*'], which does not; leave lora.targets out "
            "for the 9 linears of the file",
        ),
        (("lora.offload_base=true",), "lora.offload_base needs model.recompute_granularity=full"),
    ],
)
def test_a_section_that_the_file_is_not_is_refused(
    settings: tuple[str, ...], said: str, file: Path, start_weights: Path, tmp_path: Path
) -> None:
    sentence = refused(tmp_path / "run", "--init-from", str(start_weights), f"lora.init_from={file}", *settings)
    assert said in sentence
    assert len(sentence.splitlines()) == 1


def test_a_start_needs_a_base_and_a_lora(file: Path, start_weights: Path, tmp_path: Path) -> None:
    sentence = refused(tmp_path / "run", f"lora.init_from={file}")
    assert sentence == (
        f"lora.init_from is {file} and there are no weights to adapt; give --init-from MODEL, or leave it out"
    )
    start = ("--init-from", str(start_weights))
    sentence = refused(tmp_path / "run", *start, f"lora.init_from={tmp_path / 'none.safetensors'}")
    assert f"no LoRA at {tmp_path / 'none.safetensors'}" in sentence


@pytest.fixture(scope="module")
def whole_run(file: Path, start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps from the file, saved after each second one."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, "--init-from", str(start_weights), f"lora.init_from={file}", "checkpoint.save_interval=2")
    return folder


def test_a_resume_goes_on_from_the_checkpoint_and_does_not_read_the_file(
    whole_run: Path, file: Path, start_weights: Path, tmp_path: Path
) -> None:
    resumed = stopped_after(2, whole_run, tmp_path / "run")
    start = ("--init-from", str(start_weights), f"lora.init_from={file}", "checkpoint.save_interval=2")
    sentence = refused(resumed, *start, f"lora.init_from={tmp_path / 'other.safetensors'}")
    assert (
        f"lora.init_from is '{tmp_path / 'other.safetensors'}' where {find_checkpoint(resumed)} has '{file}'"
        in sentence
    )
    sentence = refused(resumed, *start, "lora.rank=2")
    assert f"lora.rank is 2 where {find_checkpoint(resumed)} has 4, which would be another LoRA" in sentence
    away = file.rename(tmp_path / "away.safetensors")
    try:
        ended = run((*RUN_OPTIONS, *start), resumed)
    finally:
        away.rename(file)
    assert ended.codes == [0], ended.errors
    assert trajectory(resumed) == trajectory(whole_run)
    mine, theirs = (read_adapters(find_checkpoint(folder)) for folder in (resumed, whole_run))
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert len([entry for entry in read_log(resumed) if entry.get("event") == "lora_begun"]) == 1, "of the first start"


def test_a_run_that_began_without_a_file_does_not_go_on_from_one(
    file: Path, start_weights: Path, tmp_path: Path
) -> None:
    train(tmp_path / "run", ONE_STEP, "--init-from", str(start_weights), "lora.rank=4", "lora.targets=[attn1.*]")
    sentence = refused(tmp_path / "run", "--init-from", str(start_weights), f"lora.init_from={file}")
    assert f"lora.init_from is '{file}' where {find_checkpoint(tmp_path / 'run')} has None" in sentence
    both = (f"checkpoint.load={tmp_path / 'run'}", "checkpoint.finetune=true", f"lora.init_from={file}")
    sentence = refused(tmp_path / "new", "--init-from", str(start_weights), *both)
    assert "and checkpoint.finetune takes the LoRA of" in sentence


def test_a_run_starts_from_the_checkpoints_of_another(whole_run: Path, start_weights: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", ONE_STEP, "--init-from", str(start_weights), f"lora.init_from={whole_run}")
    mine, theirs = (read_adapters(find_checkpoint(folder)) for folder in (tmp_path / "run", whole_run))
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())


def test_the_commands(
    adapters: Tensors, file: Path, base_weights: Tensors, start_weights: Path, tmp_path: Path
) -> None:
    """The dry run knows the rank of the file; a file is merged into any model; another base is said."""
    foreign = tmp_path / "foreign.safetensors"
    origin = LoraOrigin(base="other-model", base_digest="0f3a")
    save_lora(adapters, SETTINGS, TINY_CONFIG, foreign, origin=origin, format="kohya")
    _of_peft(adapters, tmp_path / "peft")
    lines = {
        "dry": [
            *("finetune", "--recipe", "tiny", "--mock", "--init-from", str(start_weights), "--dry-run", "--json"),
            f"lora.init_from={file}",
        ],
        "merge": ["merge", str(file), str(tmp_path / "merged"), "--model", str(start_weights)],
        "foreign": ["merge", str(foreign), str(tmp_path / "foreign"), "--model", str(start_weights)],
        "folder": ["merge", str(tmp_path / "peft"), str(tmp_path / "of-peft"), "--model", str(start_weights)],
        "no model": ["merge", str(file), str(tmp_path / "out")],
    }
    call("rank_calls:command_lines", str(tmp_path / "results"), lines)
    found = json.loads((tmp_path / "results").read_text())
    dry = json.loads(found["dry"][1])
    assert dry["lora"] == {
        "rank": 4,
        "parameters": dict.fromkeys(("model", "largest_rank"), sum(value.numel() for value in adapters.values())),
    }
    assert found["merge"] == [
        0, f"{tmp_path / 'merged' / 'transformer'}: {start_weights} with the LoRA {file}\n", "",
    ]  # fmt: skip
    wanted = changed_by(base_weights, adapters, FACTOR)
    for name in ("merged", "foreign", "of-peft"):
        for key, value in load_transformer(tmp_path / name / "transformer").state_dict().items():
            torch.testing.assert_close(value.double(), wanted[key], rtol=1e-5, atol=1e-6)
    assert found["foreign"][2] == (
        "Warning: foreign.safetensors was trained on other-model, whose weights are not those of "
        f"{start_weights.name}; it is merged all the same\n"
    )
    code, _, errors = found["no model"]
    assert (code, errors) == (
        2,
        f"Error: {file} is a LoRA file, which names no base and has no steps and no EMA; give --model MODEL, and "
        "neither --step nor --ema\n",
    )
    start = ("--init-from", str(start_weights), f"lora.init_from={foreign}")
    train(tmp_path / "run", ONE_STEP, *start)
    (log,) = [line for line in read_log(tmp_path / "run") if line.get("event") == "lora_begun"]
    assert log["base"] == "other-model"


# -- files that are no adapters of one rank and one factor ------------------------------------------------------------


def test_files_with_other_changes_are_refused_by_name(file: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, use_rslora=False, alpha=4.0)
    plain = tmp_path / "plain.safetensors"
    save_lora(drawn_adapters(TINY_CONFIG, settings), settings, TINY_CONFIG, plain, format="comfyui")
    whole, width = load_file(plain), TINY_CONFIG.hidden_size
    q = "diffusion_model.blocks.0.self_attn.q"

    def product(name: str, rank: int) -> Tensors:
        return {
            f"diffusion_model.{name}.lora_A.weight": torch.ones(rank, width),
            f"diffusion_model.{name}.lora_B.weight": torch.ones(width, rank),
        }

    k = "blocks.1.self_attn.k"
    changed: dict[str, tuple[Tensors, str]] = {
        "an embedder": (
            product("text_embedding.2", 4),
            "condition_embedder.text_embedder.linear_2.weight, which is no",
        ),
        "a bias": (
            {f"{q}.diff_b": torch.ones(width)},
            "changes blocks.0.attn1.to_q.bias, which is no LoRA on a linear",
        ),
        "a norm": (
            {"diffusion_model.blocks.0.norm3.diff": torch.ones(width)},
            "changes blocks.0.norm2.weight, which is no LoRA on a linear of the blocks, so it cannot be trained "
            "further; merge it into the weights and train a new LoRA on these: wan-train merge LORA OUT --model MODEL",
        ),
        "two ranks": (product(k, 2), "the rank 4 and blocks.1.attn1.to_k.weight the rank 2, and adapters"),
        "two factors": (
            {f"diffusion_model.{k}.alpha": torch.tensor(2.0)},
            "the factor 1 (alpha / rank) and blocks.1.attn1.to_k.weight the factor 0.5, and adapters that are trained",
        ),
    }
    path = tmp_path / "style.safetensors"
    for name, (tensors, said) in changed.items():
        save_file({**whole, **tensors}, path)
        with pytest.raises(ValueError, match=r"style\.safetensors") as error:
            read_found_adapters(path, TINY_CONFIG)
        assert said in str(error.value), name
    negative = {key: torch.tensor(-4.0) if key.endswith("alpha") else value for key, value in whole.items()}
    save_file(negative, path)
    with pytest.raises(ValueError, match=r"has the factor -1 \(alpha / rank\); expected one above 0"):
        read_found_adapters(path, TINY_CONFIG)
    zeros = {f"{q}.diff_b": torch.zeros(width)}
    save_file({**whole, **zeros}, path)
    assert (
        read_found_adapters(path, TINY_CONFIG).tensors.keys() == read_found_adapters(file, TINY_CONFIG).tensors.keys()
    )
    save_file(zeros, path)
    with pytest.raises(ValueError, match="changes nothing: all that it holds are zeros"):
        read_found_adapters(path, TINY_CONFIG)
