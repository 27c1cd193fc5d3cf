"""What is shipped, what a dry run says, and what an export leaves."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from training_runs import EQUALITY_STEPS, call, stopped_after

from wan_model import WAN_1_3B, WAN_14B, PackLayout
from wan_model.config import WanConfig
from wan_model.dit.flops import pack_flops, training_flops
from wan_model.dit.lora import LoraSettings
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_model.weights.transformer import expected_shapes
from wan_train.cli import main
from wan_train.config.shipped_configs import names, path_of
from wan_train.model.layout import Layout, layers_of_stages, parameters_of_rank

REFUSED = [
    (["--recipe", "wan_14b", "--world-size", "12", "model.tensor_model_parallel_size=8"], "multiple of 8"),
    (["--recipe", "wan_14b", "--world-size", "7", "model.tensor_model_parallel_size=7"], "40 attention heads"),
    (["--recipe", "wan_1_3b", "--world-size", "8"], "train.global_batch_size is 1 packs, which 8"),
    (["--recipe", "wan_1_3b", "--world-size", "31", "model.pipeline_model_parallel_size=31"], "30 layers cannot"),
    (["--recipe", "wan_1_3b", "model.sequence_parallel=true"], "set model.tensor_model_parallel_size, or leave it out"),
    (["--recipe", "wan_1_3b", "dataset.mock_settings.shapes=[[21,45,80]]"], "does not divide a latent of frames, rows"),
    (
        ["--recipe", "tiny", "optimizer.overlap_param_gather_with_optimizer_step=true"],
        "is True; use ddp.overlap_param_gather",
    ),
    (
        ["--recipe", "tiny", "checkpoint.dist_ckpt_optim_fully_reshardable=false"],
        "is False; a run is not resumed exactly from the other format",
    ),
    (["--recipe", "tiny", "--config-file", "wan_1_3b"], "--recipe is tiny and wan_1_3b is for wan_1_3b"),
    (["--config-file", "/dev/zero"], "/dev/zero is a device; expected a file"),
    (["--config-file", "nowhere.yaml"], "nowhere.yaml does not exist; give a path, or one of tiny"),
    (
        ["--recipe", "tiny", "model.recompute_granularity=half"],
        "'half'; expected one of elementwise, selective, full or null",
    ),
    (["--recipe", "tiny", "model.recompute_method=block"], "recomputation applies to every layer"),
    (["--recipe", "tiny", "model.recompute_modules=[core_attn]"], "selective recomputes all but self-attention"),
    (["--recipe", "tiny", "train.train_iter=3"], "the nearest known one is train.train_iters"),
    (["--recipe", "tiny", "dist.use_megatron_fsdp=true", "ema.decay=0.9"], "ema.decay is not supported with"),
    (["--recipe", "tiny", "dist.use_megatron_fsdp=true", "checkpoint.async_save=true"], "checkpoint.async_save is not"),
    (["--recipe", "tiny", "model.gradient_accumulation_fusion=true"], "needs APEX's fused_weight_gradient_mlp_cuda"),
    (["--recipe", "tiny", "model.num_layers=3"], "has no effect on a Wan model; set model.transformer.num_layers"),
    (["--recipe", "tiny", "model.tp_comm_overlap=true"], "model.tp_comm_overlap is True, which has no effect"),
    (["--recipe", "tiny", "model.cpu_offloading=true"], "model.cpu_offloading is True, which has no effect"),
    (["--recipe", "tiny", "model.defer_embedding_wgrad_compute=true"], "is True, which has no effect on a Wan model"),
    (["--recipe", "tiny", "model.hidden_dropout=0.2"], "model.hidden_dropout is 0.2, which has no effect"),
    (
        ["--recipe", "tiny", "model.fp8=e4m3"],
        "'e4m3', which has no effect on a Wan model; set mixed_precision",
    ),
    (["--recipe", "tiny", "mixed_precision=bf16_with_mxfp8_mixed"], "expected null (fp32) or bf16_mixed"),
    (["--recipe", "tiny", "train.train_samples=10"], "train.train_samples is 10; a run's length is train.train_iters"),
    (["--recipe", "tiny", "train.train_iters=null"], "train.train_iters is None; expected at least 1"),
    (["--recipe", "tiny", "optimizer.lr=0"], "optimizer.lr is 0.0; expected a number above 0"),
    (["--recipe", "tiny", "optimizer.lr=1e-5"], "optimizer.min_lr is 0.0002, above optimizer.lr, which is 1e-05"),
    (["--recipe", "tiny", "optimizer.adam_beta1=1"], "optimizer.adam_beta1 is 1.0; expected 0 or more and below 1"),
    (["--recipe", "tiny", "optimizer.weight_decay=-1"], "optimizer.weight_decay is -1.0; expected 0 or more"),
    (["--recipe", "tiny", "optimizer.clip_grad=-1"], "optimizer.clip_grad is -1.0; expected 0 for no clipping"),
    (["--recipe", "tiny", "optimizer.optimizer=sgd"], "optimizer.optimizer is 'sgd'; only Adam's state"),
    (["--recipe", "tiny", "scheduler.lr_warmup_samples=8"], "counted in steps: scheduler.lr_warmup_iters"),
    (["--recipe", "tiny", "scheduler.lr_warmup_fraction=0.1"], "counted in steps: scheduler.lr_warmup_iters"),
    (["--recipe", "tiny", "scheduler.lr_warmup_iters=-1"], "scheduler.lr_warmup_iters is -1; expected 0 or more"),
    (["--recipe", "tiny", "scheduler.lr_warmup_init=1"], "scheduler.lr_warmup_init is 1.0; expected 0 to"),
    (["--recipe", "tiny", "scheduler.lr_decay_iters=2"], "scheduler.lr_decay_iters is 2 and scheduler.lr_warmup_iters"),
    (["--recipe", "tiny", "scheduler.lr_decay_style=WSD"], "which needs scheduler.lr_wsd_decay_iters"),
    (["--recipe", "tiny", "scheduler.end_weight_decay=1"], "goes from 0.01 (scheduler.start_weight_decay, else"),
    (
        ["--recipe", "tiny", "optimizer.decoupled_lr=1"],
        "optimizer.decoupled_lr is 1; it has no effect on a Wan model",
    ),
    (["--recipe", "tiny", "optimizer.loss_scale=128"], "optimizer.loss_scale is 128; it has no effect on a Wan"),
    (["--recipe", "tiny", "optimizer.log_num_zeros_in_grad=true"], "log_num_zeros_in_grad is True; it has no effect"),
    (["--recipe", "tiny", "inprocess_restart={enabled: true}"], "inprocess_restart is {'enabled': True}; it has no"),
    (["--recipe", "tiny", "ft={enable_ft_package: true}"], "; it has no effect on a Wan model"),
    (["--recipe", "tiny", "peft={dim: 4}"], "peft is {'dim': 4}; adapters are the section lora"),
    (["--recipe", "tiny", "comm_overlap={tp_comm_overlap: true}"], "set ddp.overlap_grad_reduce and ddp.overlap_param"),
    (["--recipe", "tiny", "checkpoint.non_persistent_ckpt_type=local"], "is 'local'; it has no effect on a Wan model"),
    (["--recipe", "tiny", "scheduler.no_weight_decay_cond_type=qwen3_next"], "'qwen3_next'; it has no effect on a Wan"),
    (["--recipe", "tiny", "rng.seed=0"], "rng.seed is 0; expected 1 to 4000000000"),
    (["--recipe", "tiny", "rng.seed=5000000000"], "rng.seed is 5000000000; expected 1 to 4000000000"),
    (["--recipe", "tiny", "train.micro_batch_size=2"], "train.micro_batch_size is 2; a micro-batch is one pack"),
    (["--recipe", "tiny", "ddp.average_in_collective=true"], "ddp.average_in_collective is True; gradients are summed"),
    (
        ["--recipe", "tiny", "optimizer.use_distributed_optimizer=false"],
        "ddp.use_distributed_optimizer is True; set both",
    ),
    (
        [
            *("--recipe", "tiny", "mixed_precision=bf16_mixed", "checkpoint.save=unused"),
            *("optimizer.use_distributed_optimizer=false", "ddp.use_distributed_optimizer=false"),
        ],
        "Megatron cannot save that optimizer's state, because some weights are fp32",
    ),
    (["--recipe", "tiny", "ddp.use_megatron_fsdp=true"], "ddp.use_megatron_fsdp is True; use dist.use_megatron_fsdp"),
    (["--recipe", "tiny", "ddp.num_distributed_optimizer_instances=2"], "is 2; the optimizer's state has one part"),
    (["--recipe", "tiny", "checkpoint.load_main_params_from_ckpt=true"], "is True; the optimizer's weights follow"),
    (["--recipe", "tiny", "checkpoint.use_checkpoint_args=true"], "is True; a resumed run uses its own configuration"),
    (["--recipe", "tiny", "checkpoint.pretrained_checkpoint=x"], "use checkpoint.load with checkpoint.finetune=true"),
    (
        ["--recipe", "tiny", "dataset.capacity=1", "model.context_parallel_size=2", "--world-size", "2"],
        "less than the 2",
    ),
]
LIES = {**WanConfig().to_diffusers(), "num_layers": "2"}
README = Path(__file__).parents[2] / "README.md"
GPUS = {
    "tiny": 1, "wan_1_3b": 8, "wan_1_3b_t2i": 8, "wan_14b_128gpu": 128, "wan_14b_64gpu_fsdp": 64, "wan_14b_t2i": 32,
    "wan_1_3b_lora": 1, "wan_14b_lora": 1,
}  # fmt: skip
# What the released weights of adapters are, and the card that they are for.
BASES = {"wan_1_3b_lora": WAN_1_3B, "wan_14b_lora": WAN_14B}
CARD = {"wan_1_3b_lora": 24e9}

# Tokens of a pack: what a dry run without data takes. The mock video of the files with adapters has as many.
CAPACITY = {name: 32_760 if name in BASES else 43_008 for name in GPUS}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def run_in_engine(folder: Path, wanted: dict[str, list[str]]) -> dict[str, list[Any]]:
    """The commands where the engine is imported already: exit status, output and errors of each."""
    folder.mkdir(exist_ok=True)
    call("rank_calls:command_lines", str(folder / "results.json"), wanted)
    results: dict[str, list[Any]] = json.loads((folder / "results.json").read_text())
    return results


@pytest.fixture(scope="session")
def dry_runs(once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, list[Any]]:
    """All of them in one process: exit status, output and errors."""

    def build(folder: Path) -> None:
        (folder / "model" / "transformer").mkdir(parents=True)
        (folder / "model" / "transformer" / "config.json").write_text(json.dumps(LIES))
        started = dict[str, list[str]]()
        for name, gpus in GPUS.items():
            started[name] = ["--config-file", name, "--mock", "--world-size", str(gpus)]
            if name in BASES:
                # A dry run reads the sizes alone.
                (folder / name / "transformer").mkdir(parents=True)
                config = json.dumps(BASES[name].to_diffusers())
                (folder / name / "transformer" / "config.json").write_text(config)
                started[name] += ["--init-from", str(folder / name)]
        wanted = {
            **{f"shipped {name}": [*arguments, "--json"] for name, arguments in started.items()},
            # Without data, packs of the capacity.
            **{f"full {name}": [*(one for one in arguments if one != "--mock"), "--json"]
               for name, arguments in started.items() if name != "tiny"},
            "people, adapters": started["wan_1_3b_lora"],
            **{said: ["--mock", *arguments] for arguments, said in REFUSED},
            "a model that lies": ["--recipe", "tiny", "--mock", "--init-from", str(folder / "model")],
            "Megatron's words": [
                "--recipe", "wan_1_3b", "--mock", "model.num_layers=30", "model.num_attention_heads=12",
                "model.hidden_size=1536", "model.ffn_hidden_size=8960", "model.kv_channels=128",
            ],
            "people": ["--config-file", "wan_14b_128gpu", "--world-size", "128"],
            "people, mock data": ["--config-file", "wan_14b_128gpu", "--mock", "--world-size", "128"],
        }  # fmt: skip
        run_in_engine(folder, {key: ["pretrain", "--dry-run", *arguments] for key, arguments in wanted.items()})

    results: dict[str, list[Any]] = json.loads((once("dry-runs", build) / "results.json").read_text())
    return results


def test_every_shipped_file_is_listed_with_what_it_is_for() -> None:
    code, output = run("config", "list")
    assert code == 0
    lines = dict(line.split(None, 1) for line in output.splitlines())
    assert sorted(lines) == sorted(GPUS) == names()
    assert all(lines.values())


@pytest.mark.parametrize("name", GPUS)
def test_every_shipped_file_applies_and_its_layout_can_be(name: str, dry_runs: dict[str, list[Any]]) -> None:
    code, output, errors = dry_runs[f"shipped {name}"]
    assert code == 0, errors
    found = json.loads(output)
    layout = found["layout"]
    assert layout["world"] == GPUS[name]
    assert layout["data"] * layout["tensor"] * layout["context"] * layout["pipeline"] == GPUS[name]


@pytest.mark.parametrize("name", [name for name in GPUS if name != "tiny"])
@pytest.mark.parametrize("packs", ["shipped", "full"])
def test_every_shipped_file_fits_its_card_with_a_tenth_to_spare(
    name: str, packs: str, dry_runs: dict[str, list[Any]]
) -> None:
    found = json.loads(dry_runs[f"{packs} {name}"][1])
    assert found["total_bytes"] < 0.9 * CARD.get(name, 80e9)
    assert found["fits"] == {"rtx4090": found["total_bytes"] <= 22e9, "h100": True, "h200": True}
    capacity = CAPACITY[name]
    assert found["tokens"] / found["packs"] <= capacity
    assert (found["tokens"] / found["packs"] == capacity) == (packs == "full" or name in BASES)


@pytest.mark.parametrize("name", BASES)
def test_a_dry_run_of_adapters_says_what_is_trained_and_what_that_costs(
    name: str, dry_runs: dict[str, list[Any]]
) -> None:
    found, model = json.loads(dry_runs[f"shipped {name}"][1]), BASES[name]
    # r (in + out) of ten linears of every block.
    adapters = 32 * model.num_layers * (16 * model.hidden_size + 2 * (model.hidden_size + model.ffn_dim))
    base = sum(math.prod(shape) for shape in expected_shapes(model).values())
    assert found["lora"] == {"rank": 32, "parameters": {"model": adapters, "largest_rank": adapters}}
    assert found["parameters"] == {"model": base, "largest_rank": base}
    assert found["state_bytes"] == {
        "weights": 2 * base + 4 * adapters, "gradients": 4 * adapters, "optimizer": 8 * adapters,
        "average": 4 * adapters, "total": 2 * base + 20 * adapters,
    }  # fmt: skip
    pack = PackLayout(((21, 30, 52),))
    assert found["training_flops"] == training_flops(model, pack, LoraSettings(32)) < pack_flops(model, pack).training
    # The comment at the top and the guide have the same number.
    needed = f"{found['total_bytes'] / 1e9:.1f} GB"
    assert f": {needed} by the dry run" in path_of(name).read_text(encoding="utf-8")
    guide = README.with_name("TRAINING.md").read_text(encoding="utf-8")
    (row,) = (
        line for line in guide.splitlines() if line.startswith(f"| `{name}` | {CARD.get(name, 80e9) / 1e9:.0f} GB")
    )
    assert needed in row


def test_a_dry_run_of_adapters_is_readable(dry_runs: dict[str, list[Any]]) -> None:
    code, output, errors = dry_runs["people, adapters"]
    assert code == 0, errors
    assert "1,418,996,800 parameters, bf16, frozen; a LoRA of rank 32 with 43,745,280 parameters, fp32\n" in output
    assert "an rtx4090 (24 - 2 GB) is enough" in output


def test_a_shipped_file_is_shown_and_copied_and_never_written_over(tmp_path: Path) -> None:
    code, shown = run("config", "show", "tiny")
    assert code == 0
    code, output = run("config", "copy", "tiny", str(tmp_path))
    copied = tmp_path / "tiny.yaml"
    assert code == 0
    assert output.strip() == str(copied)
    assert copied.read_text() == shown
    copied.write_text("mine")
    code, output = run("config", "copy", "tiny", str(copied))
    assert code == 1
    assert "exists; choose another file" in output
    assert copied.read_text() == "mine"
    assert run("config", "copy", "tiny", str(copied), "--force")[0] == 0
    assert copied.read_text() == shown
    code, output = run("config", "show", "huge")
    assert code == 1
    assert "unknown configuration 'huge'; expected one of tiny" in output


def test_a_resolved_file_names_every_key_and_can_be_given_back(tmp_path: Path) -> None:
    shown = run_in_engine(tmp_path, {"": ["config", "show", "tiny", "--resolved"]})[""]
    assert shown[0] == 0, shown
    values = yaml.safe_load(shown[1])
    assert values["ema"]["decay"] == 0.9, "of the file"
    assert values["optimizer"]["adam_beta2"] == 0.95, "of the recipe"
    assert values["model"]["flow"]["shift"] == 2.5
    assert values["checkpoint"]["async_save"] is False, "of Megatron-Bridge"
    values["ema"]["decay"] = 0.5
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"recipe": "tiny", **values}))
    given = ["pretrain", "--config-file", str(tmp_path / "mine.yaml"), "--mock", "--dry-run", "--json"]
    code, output, errors = run_in_engine(tmp_path, {"": given})[""]
    assert code == 0, errors
    assert json.loads(output)["state_bytes"]["average"] > 0


def test_listing_imports_neither_torch_nor_megatron() -> None:
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom wan_train.cli import main\n"
        "assert CliRunner().invoke(main, ['config', 'list']).exit_code == 0\n"
        "print([name for name in ('torch', 'megatron', 'einops') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_model_that_lies_is_named_with_its_file(dry_runs: dict[str, list[Any]]) -> None:
    code, output, errors = dry_runs["a model that lies"]
    assert code == 2, output
    assert errors.endswith("transformer/config.json: num_layers is '2'; expected a whole number from 1 to 1,024\n")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("said", [said for _, said in REFUSED])
def test_a_dry_run_refuses_what_cannot_be(said: str, dry_runs: dict[str, list[Any]]) -> None:
    code, output, errors = dry_runs[said]
    assert code == 2, output
    assert said in errors
    assert len(errors.strip().splitlines()) == 1


def test_sizes_in_megatrons_words_may_be_said_where_they_are_so(dry_runs: dict[str, list[Any]]) -> None:
    code, _, errors = dry_runs["Megatron's words"]
    assert code == 0, errors


def test_a_dry_run_says_what_a_step_is(dry_runs: dict[str, list[Any]]) -> None:
    code, output, errors = dry_runs["people, mock data"]
    assert code == 0, errors
    assert "14,288,491,584 parameters, bf16" in output
    assert "data 16 x tensor 2 with sequence x context 4 x pipeline 1" in output
    # 6.184 PFLOP a sample of 37,440 tokens, and 16 of them.
    assert "16 packs, 1 per data-parallel rank, 599,040 tokens and 98,945" in output
    assert "a pack of mock data has 37,440 tokens; without --mock a dry run takes dataset.capacity, 43,008\n" in output


def test_the_readme_shows_what_a_dry_run_prints(dry_runs: dict[str, list[Any]]) -> None:
    code, output, errors = dry_runs["people"]
    assert code == 0, errors
    command = "$ wan-train pretrain --config-file wan_14b_128gpu --dry-run --world-size 128\n"
    assert f"```sh\n{command}{output}```" in README.read_text(encoding="utf-8")


def test_the_guide_lists_every_shipped_file(dry_runs: dict[str, list[Any]]) -> None:
    guide = README.with_name("TRAINING.md").read_text(encoding="utf-8")
    _, table = guide.split("| configuration file |", 1)
    rows = [line.split("|")[1:-1] for line in table.split("\n\n")[0].splitlines()[2:]]
    listed = {name: (int(row[1]), int(row[3])) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    packs = {name: json.loads(dry_runs[f"shipped {name}"][1])["packs"] for name in GPUS}
    assert listed == {name: (gpus, packs[name]) for name, gpus in GPUS.items()}


@pytest.mark.parametrize(("model", "parameters"), [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)])
def test_shares_add_up_to_the_released_models(model: object, parameters: int) -> None:
    shapes = expected_shapes(model)  # type: ignore[arg-type]
    assert parameters_of_rank(shapes, model.num_layers, Layout(1), 0) == parameters  # type: ignore[attr-defined]


def test_layers_left_over_go_to_the_middle() -> None:
    assert layers_of_stages(10, 4) == [2, 3, 3, 2]
    assert sum(layers_of_stages(40, 7)) == 40


@pytest.mark.parametrize(("step", "ema"), [(None, False), (2, False), (None, True)])
def test_an_export_is_what_trained_to_the_bit(
    equality_reference: Path, step: int | None, ema: bool, tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel

    arguments = [*(["--step", str(step)] if step else []), *(["--ema"] if ema else [])]
    code, output = run("export", str(equality_reference), str(tmp_path / "out"), *arguments)
    assert code == 0, output
    assert f"iter_{step or EQUALITY_STEPS:07d}" in output
    _, _, wanted = read_training_checkpoint(find_checkpoint(equality_reference, step), dtype=None, ema=ema)
    found = dict(WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer").named_parameters())
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    if ema:
        _, _, weights = read_training_checkpoint(find_checkpoint(equality_reference), dtype=None)
        assert any(not torch.equal(weights[key], value) for key, value in wanted.items())


def test_an_export_refuses_what_it_would_write_over_and_what_is_not_whole(
    one_process_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, output = run("export", str(one_process_run), str(tmp_path))
    assert code == 2
    assert "exists and is not an empty folder" in output
    code, output = run("export", str(one_process_run), str(tmp_path / "out"), "--step", "3")
    assert code == 2
    assert "has no checkpoint of step 3; it has 2, 4, 6" in output
    plain = stopped_after(2, one_process_run, tmp_path / "plain")
    code, output = run("export", str(plain), str(tmp_path / "out"), "--ema")
    assert code == 2
    assert "holds no EMA of the weights" in output
    file = plain / "iter_0000002" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, output = run("export", str(plain), str(tmp_path / "out"))
    assert code == 2
    assert f"{file} is damaged" in output
    assert not (tmp_path / "out").exists()
