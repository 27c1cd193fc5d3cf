"""A resumed run does what its configuration says, or is refused: every row of RESUMING.md."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import (
    RUN_OPTIONS,
    call,
    read_log,
    read_tensors,
    refused,
    rewrite,
    run,
    sentence_of,
    steps_of,
    stopped_after,
    trajectory,
)
from warm_ranks import Call

from wan_model.weights.run_settings import read_run_settings
from wan_model.weights.training_checkpoint import find_checkpoint
from wan_train.checkpoint.changes import FIXED
from wan_train.checkpoint.folder import complete_steps, step_folder
from wan_train.config import tutorial_names
from wan_train.data.seeds import generator_for

ROWS = dict(
    re.findall(
        r"^\| `?([^|`]+?)`? \| (takes effect|refused|fixed) \| ",
        (Path(__file__).parents[2] / "RESUMING.md").read_text(),
        re.MULTILINE,
    )
)
STOPPED = 2
SIZE = "the data-parallel size"

# Given to the resumed run whose every number is compared with a formula; its values are observed in the tests below.
LR, MIN_LR, DECAY, BETA1, BETA2, EPS, CLIP = 3e-3, 1e-3, 0.1, 0.5, 0.7, 1e-3, 0.05
WARMUP, DECAY_ITERS, LAST, KEPT, EMA = 2, 10, 5, 3, 0.25
OPTIMIZER = {
    "optimizer.lr": LR,
    "optimizer.min_lr": MIN_LR,
    "optimizer.weight_decay": DECAY,
    "optimizer.adam_beta1": BETA1,
    "optimizer.adam_beta2": BETA2,
    "optimizer.adam_eps": EPS,
    "optimizer.clip_grad": CLIP,
    "scheduler.lr_decay_style": "linear",
    "scheduler.lr_warmup_iters": WARMUP,
    "scheduler.lr_decay_iters": DECAY_ITERS,
}
LOOP = {
    "train.train_iters": LAST,
    "ema.decay": EMA,
    "validation.interval": 2,
    "validation.samples": 3,
    "validation.timesteps": [250.0],
    "validation.caption_gap": False,
    "checkpoint.save_interval": 1,
    "checkpoint.most_recent_k": KEPT,
    "checkpoint.async_save": True,
    "model.flow.weighting": "none",
}
# Given to another resumed run, in which what each step is computed with is written down.
STEP = {
    "model.flow.density": "mode",
    "model.flow.shift": 7.0,
    "model.flow.logit_mean": 0.5,
    "model.flow.logit_std": 2.0,
    "model.flow.uniform_mix": 0.3,
    "model.flow.sigma_min": 0.1,
    "model.flow.sigma_max": 0.9,
    "model.flow.caption_dropout": 0.5,
    "model.recompute_granularity": "full",
    "model.attention": "sdpa",
    "model.deterministic_mode": True,
    "ddp.overlap_grad_reduce": True,
    "ddp.overlap_param_gather": True,
    "ddp.grad_reduce_in_fp32": True,
    "ddp.bucket_size": 5000,
    "dataset.mock_settings.number_packed_samples": 2,
    "rng.seed": 99,
    "logger.log_interval": 2,
    "logger.wandb_project": "project",
    "logger.wandb_exp_name": "name",
    "logger.wandb_save_dir": "folder",
    "report.peak_tflops": 0.5,
    "checkpoint.save_interval": 1,
    "train.exit_interval": 4,
}
# Keys that other tests try.
_IN_ANOTHER_FOLDER = "test_changed_start.py::test_a_run_goes_on_in_another_folder_by_its_own_schedule"
_MOVED_DATA = "test_changed_data.py::test_a_dataset_that_has_moved_is_continued_to_the_bit"
_ANOTHER_OBJECTIVE = "test_changed_start.py::test_averages_data_and_objective_change"
ELSEWHERE = {
    **dict.fromkeys(
        (
            *("scheduler.lr_warmup_init", "scheduler.lr_wsd_decay_style", "scheduler.lr_wsd_decay_iters"),
            *("scheduler.start_weight_decay", "scheduler.end_weight_decay", "scheduler.weight_decay_incr_style"),
            *("train.exit_duration_in_mins", "checkpoint.load", "checkpoint.ckpt_step"),
        ),
        _IN_ANOTHER_FOLDER,
    ),
    **dict.fromkeys(("--training-mode", "validation.seed"), _ANOTHER_OBJECTIVE),
    "samples": "../sampling/test_samples.py::test_training_is_the_same_to_the_bit",
    "checkpoint.finetune": "test_resume.py::test_a_run_begins_with_the_weights_of_another_and_resumes_its_own",
    "train.exit_signal_handler": "test_resume.py::test_a_signal_ends_a_run_in_order",
    **dict.fromkeys(("dataset.path", "dataset.encoded_by"), _MOVED_DATA),
    "dataset.cache_gb": "../data/test_data_in_store.py::test_a_run_goes_on_from_a_store_to_the_bit",
    **dict.fromkeys(
        (
            *("model.tensor_model_parallel_size", "model.sequence_parallel"),
            *("model.context_parallel_size", "model.pipeline_model_parallel_size"),
        ),
        "test_resume.py::test_resumes_in_other_layouts_of_the_model",
    ),
    "dist.distributed_timeout_minutes": "test_resume.py::test_fully_sharded_resumes_to_the_bit",
    "dist.use_megatron_fsdp": "test_resume.py::test_a_plain_checkpoint_is_not_resumed_fully_sharded",
    **dict.fromkeys(
        ("lora.rank", "lora.targets", "lora.alpha", "lora.use_rslora"), "test_adapters.py::test_another_lora_is_refused"
    ),
    "lora.init_from": "test_lora_start.py::test_a_resume_goes_on_from_the_checkpoint_and_does_not_read_the_file",
    "lora.dropout": "test_adapters.py::test_dropout_of_a_resumed_run",
    **dict.fromkeys(
        ("lora.fp8_base", "lora.offload_base"), "test_adapters.py::test_where_the_base_of_a_resumed_run_is"
    ),
    "model.transformer.text_len": "../loop/test_agreement.py::test_every_quantity_that_differs_is_refused_by_name",
    "model.transformer": "test_resume.py::test_weights_of_another_latent_space_or_other_sizes_are_refused",
}


def _options(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _recorded(checkpoint: Path, key: str) -> Any:
    value: Any = read_run_settings(checkpoint)
    for name in key.split("."):
        value = value[name]
    return value


@pytest.fixture(scope="module")
def changed_run(one_process_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = stopped_after(STOPPED, one_process_run, tmp_path_factory.mktemp("changed") / "run")
    board = f"logger.tensorboard_dir={folder / 'board'}"
    calls = [Call("rank_calls:note_async_saves", [str(folder / "async")])]
    ended = run((*RUN_OPTIONS, *_options(OPTIMIZER), *_options(LOOP), board), folder, calls=calls)
    assert ended.codes == [0], ended.errors
    return folder


def _moments(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in read_tensors(checkpoint, (f"optimizer.state.{name}.",)).items()}


def test_the_optimizer_takes_the_steps_of_its_settings(changed_run: Path) -> None:
    """AdamW by its formula, from what two checkpoints hold; the gradient is that of the first moment."""
    before, after = step_folder(changed_run, 3), step_folder(changed_run, 4)
    m, v, p = (_moments(before, name) for name in ("exp_avg", "exp_avg_sq", "param"))
    m2, v2, p2 = (_moments(after, name) for name in ("exp_avg", "exp_avg_sq", "param"))
    # The scheduler counts packs, two a step: the rate of the fourth step is that after the third.
    rate = MIN_LR + (LR - MIN_LR) * (1 - (3 - WARMUP) / (DECAY_ITERS - WARMUP))
    assert trajectory(changed_run)[3][2] == float(LR).hex(), "the end of the warm-up"
    assert float.fromhex(trajectory(changed_run)[4][2]) == pytest.approx(rate, rel=1e-12)
    squares = 0.0
    assert set(p) == set(m) == set(v)
    for key in p:
        gradient = (m2[key] - BETA1 * m[key]) / (1 - BETA1)
        squares += float(gradient.square().sum())
        wanted_v = BETA2 * v[key] + (1 - BETA2) * gradient.square()
        torch.testing.assert_close(v2[key], wanted_v, rtol=1e-4, atol=1e-12)
        decayed = 0.0 if p[key].ndim == 1 else DECAY
        m_hat, v_hat = m2[key] / (1 - BETA1**4), v2[key] / (1 - BETA2**4)
        wanted_p = p[key] * (1 - rate * decayed) - rate * m_hat / (v_hat.sqrt() + EPS)
        # Far below the step, the rounding of a weight of size 1.
        torch.testing.assert_close(p2[key], wanted_p, rtol=2e-7, atol=1e-9)
    assert math.sqrt(squares) == pytest.approx(CLIP, rel=1e-3)
    assert float.fromhex(trajectory(changed_run)[4][1]) > 2 * CLIP, "the gradient was not clipped"


def test_the_loop_does_what_its_settings_say(changed_run: Path, one_process_run: Path) -> None:
    log = read_log(changed_run)
    assert [entry["step"] for entry in steps_of(log)] == list(range(1, LAST + 1))
    validations = [entry for entry in log if entry.get("event") == "validation"]
    assert [(entry["step"], entry["samples"], list(entry["timesteps"])) for entry in validations] == [
        (4, 3, ["250"]),
        (5, 3, ["250"]),
    ]
    assert not any("caption_gap" in entry for entry in validations)
    assert complete_steps(changed_run) == [3, 4, 5]
    assert list((changed_run / "board").iterdir()), "nothing for TensorBoard"
    assert len((changed_run / "async").read_text().splitlines()) == LAST - STOPPED, "saves that the loop waited for"
    # The same weights and noise: every weight is above 1 in the run before, and 1 now.
    assert float.fromhex(trajectory(changed_run)[3][0]) < 0.9 * float.fromhex(trajectory(one_process_run)[3][0])
    start = read_tensors(step_folder(one_process_run, 2), ("blocks.",))
    one = read_tensors(step_folder(changed_run, 3), ("blocks.",))
    average = read_tensors(step_folder(changed_run, 3), ("ema.blocks.",))
    assert average
    for key, value in average.items():
        torch.testing.assert_close(value, EMA * start[key] + (1 - EMA) * one[key], rtol=1e-6, atol=1e-8)


def test_the_record_is_what_ran(changed_run: Path) -> None:
    for key, value in {**OPTIMIZER, **LOOP}.items():
        assert _recorded(find_checkpoint(changed_run), key) == value, key


def test_a_step_is_computed_with_its_settings(one_process_run: Path, tmp_path: Path) -> None:
    """In another folder, with moments and schedule anew."""
    notes, bias, folder = tmp_path / "notes", tmp_path / "bias", tmp_path / "run"
    elsewhere = (f"checkpoint.load={one_process_run}", f"checkpoint.ckpt_step={STOPPED}", "checkpoint.load_optim=false")
    calls = [Call("rank_calls:note_settings", [str(notes)]), Call("rank_calls:note_wandb", [str(bias)])]
    ended = run((*RUN_OPTIONS, *elsewhere, *_options(STEP)), folder, calls=calls)
    assert ended.codes == [0], ended.errors
    found = [json.loads(line) for line in notes.read_text().splitlines()]
    drawn = [entry for entry in found if "noise_seed" in entry]
    assert [entry["noise_seed"] for entry in drawn] == [
        generator_for("noise", STEP["rng.seed"], pack).initial_seed() for pack in range(4, 8)
    ]
    for entry in drawn:
        flow = {key: value for key, value in STEP.items() if key.startswith("model.flow.")}
        assert {key: entry[key.removeprefix("model.flow.")] for key in flow} == flow
        assert entry["samples_of_pack"] == 2
    computed = [entry for entry in found if "recompute" in entry]
    assert len(computed) == 4
    assert all(entry == {"recompute": "block", "attention": "sdpa", "deterministic": True} for entry in computed)
    reduced = {key.removeprefix("ddp."): value for key, value in STEP.items() if key.startswith("ddp.")}
    assert [entry["ddp"] for entry in found if "ddp" in entry] == [reduced, reduced]
    (logged,) = steps_of(read_log(folder))
    assert logged["step"] == 4
    assert logged["mfu"] == pytest.approx(logged["tflops_per_device"] / 0.5)
    begun, *curves = map(json.loads, bias.read_text().splitlines())
    assert begun == {"begun": {"project": "project", "name": "name", "dir": "folder"}}
    # Bridge from 0.4 on adds curves of its own.
    assert [entry["step"] for entry in curves if "train/loss" in entry["curves"]] == [4]
    assert trajectory(folder)[4][2] == trajectory(one_process_run)[2][2], "the schedule does not start anew"
    assert complete_steps(folder) == [3, 4]
    m, v = (_moments(step_folder(folder, 3), name) for name in ("exp_avg", "exp_avg_sq"))
    for key in m:  # those of a first step
        torch.testing.assert_close(v[key], (1 - 0.95) * (m[key] / (1 - 0.9)).square(), rtol=1e-4, atol=1e-12)
    for key, value in STEP.items():
        assert _recorded(find_checkpoint(folder), key) == value, key


DATA = ["--recipe", "tiny", "train.global_batch_size=2", "dataset.path=DATA"]
# By key: this run's options, its value, and that of the checkpoint. Of a run on data:
OF_DATA: dict[str, tuple[list[str], str, str]] = {
    "dataset.mock": (["--recipe", "tiny", "--mock", "train.global_batch_size=2"], "True", "False"),
    "dataset.capacity": (["dataset.capacity=96"], "96", "512"),
    "dataset.packing_buffer": (["dataset.packing_buffer=8"], "8", "64"),
    "dataset.shuffle_buffer": (["dataset.shuffle_buffer=9"], "9", "0"),
    "dataset.num_workers": (["dataset.num_workers=2"], "2", "0"),
    "dataset.seed": (["dataset.seed=5"], "5", "1234"),
}
NOT_DISTRIBUTED = ["optimizer.use_distributed_optimizer=false", "ddp.use_distributed_optimizer=false"]
OTHERS: dict[str, tuple[list[str], str, str]] = {
    "train.global_batch_size": (["train.global_batch_size=4"], "4", "2"),
    "mixed_precision": (["mixed_precision=bf16_mixed"], "'bf16_mixed'", "None"),
    "optimizer.use_distributed_optimizer": (NOT_DISTRIBUTED, "False", "True"),
    "optimizer.use_precision_aware_optimizer": (["optimizer.use_precision_aware_optimizer=true"], "True", "False"),
    "model.init_seed": (["model.init_seed=7"], "7", "1234"),
    SIZE: (["--nproc-per-node", "2"], "2", "1"),
}


def test_what_cannot_change_is_refused_with_both_values(
    one_process_run: Path, start_weights: Path, tmp_path: Path
) -> None:
    folder = stopped_after(STOPPED, one_process_run, tmp_path / "run")
    on_data = stopped_after(STOPPED, one_process_run, tmp_path / "on-data")
    record = read_run_settings(checkpoint := find_checkpoint(on_data))
    record["dataset"].update(mock=False, path="DATA")
    record["model"]["init_from"] = "FIRST"
    rewrite(checkpoint, "run_config.yaml", yaml.safe_dump(record))
    from_others = {"model.init_from": (["--init-from", str(start_weights)], repr(str(start_weights)), "'FIRST'")}

    def errors(run: Path, wanted: dict[str, list[str]]) -> dict[str, str | None]:
        call("rank_calls:resume_errors", str(tmp_path / "errors"), str(run), wanted)
        found: dict[str, str | None] = json.loads((tmp_path / "errors").read_text())
        return found

    said = errors(folder, {"the same": [*RUN_OPTIONS], **{key: [*RUN_OPTIONS, *row[0]] for key, row in OTHERS.items()}})
    wanted = {key: (row[0] if "--mock" in row[0] else [*DATA, *row[0]]) for key, row in (OF_DATA | from_others).items()}
    on = errors(on_data, {"the same data": DATA, **wanted})
    # A path that has moved, and initial weights that are not named again.
    assert [said.pop("the same"), on.pop("the same data")] == [None, None]
    for key, sentence in (said | on).items():
        _, ours, theirs = (OTHERS | OF_DATA | from_others)[key]
        where = find_checkpoint(folder if key in OTHERS else on_data)
        assert sentence is not None, key
        assert sentence.startswith(f"{key} is {ours} where {where} has {theirs}"), sentence
        assert "start a new run from its weights: checkpoint.load=" in sentence
    assert {*said, *on} == {*(setting.key for setting in FIXED if setting.key not in ELSEWHERE), SIZE}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("optimizer.optimizer=sgd", "optimizer.optimizer is 'sgd'; only Adam's"),
        ("scheduler.use_checkpoint_opt_param_scheduler=true", "is True; a resumed run uses its own configuration"),
        ("scheduler.override_opt_param_scheduler=false", "is False; a resumed run uses its own configuration"),
        ("train.iterations_to_skip=[3]", "train.iterations_to_skip is [3]; the saves and the exit of a step that is"),
        ("model.recompute_method=block", "model.recompute_method is 'block' and recompute_num_layers None; recomp"),
        ("model.recompute_num_layers=2", "model.recompute_method is None and recompute_num_layers 2; recomputation"),
        ("ddp.data_parallel_sharding_strategy=optim", "is 'optim'; leave it out, dist.use_megatron_fsdp decides it"),
        ("train.micro_batch_size=2", "train.micro_batch_size is 2; a micro-batch is one pack"),
        ("train.global_batch_size=4", "train.global_batch_size is 4 where"),
    ],
)
def test_refused_before_a_step(setting: str, sentence: str, one_process_run: Path, tmp_path: Path) -> None:
    folder = stopped_after(STOPPED, one_process_run, tmp_path / "run")
    assert sentence in refused(folder, setting)
    assert len(read_log(folder)) == STOPPED


def test_a_checkpoint_without_the_optimizer_is_not_resumed(one_process_run: Path, tmp_path: Path) -> None:
    folder = stopped_after(STOPPED, one_process_run, tmp_path / "run")
    record = read_run_settings(find_checkpoint(folder))
    record["checkpoint"]["save_optim"] = False
    rewrite(find_checkpoint(folder), "run_config.yaml", yaml.safe_dump(record))
    assert "was saved with checkpoint.save_optim=false, so a run cannot continue from it" in refused(folder)


def test_two_sources_of_initial_weights_are_refused(one_process_run: Path, start_weights: Path, tmp_path: Path) -> None:
    both = (f"checkpoint.load={one_process_run}", "checkpoint.finetune=true", "--init-from", str(start_weights))
    assert "leave one of them out" in refused(tmp_path / "run", *both)


def test_a_run_without_a_step_left_says_so(one_process_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(one_process_run, folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    ended = run(RUN_OPTIONS, folder)
    assert ended.codes == [0], ended.errors
    (line,) = ended.output[0].splitlines()
    assert line == (
        f"{folder / 'iter_0000006'} is complete and train.train_iters is 6, so no step is left to train; raise "
        "train.train_iters to go on"
    )
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_an_optimizer_that_keeps_the_settings_of_a_checkpoint_ends_the_run(
    one_process_run: Path, tmp_path: Path
) -> None:
    """As every version of Megatron would; Core 0.19 does not even find its groups."""
    folder = stopped_after(STOPPED, one_process_run, tmp_path / "run")
    calls = [Call("engine_changes:sets_no_settings")]
    said = sentence_of(run((*RUN_OPTIONS, "optimizer.lr=0.005"), folder, calls=calls))
    assert "its optimizer takes the settings of a checkpoint" in said or "does not hold what a checkpoint" in said
    assert len(read_log(folder)) == STOPPED


def test_the_table_has_every_key_and_each_is_tried() -> None:
    tried = {
        "takes effect": {
            *OPTIMIZER,
            *LOOP,
            *STEP,
            "logger.tensorboard_dir",
            "checkpoint.save",
            "checkpoint.load_optim",
        },
        "refused": {*(setting.key for setting in FIXED), SIZE, "checkpoint.save_optim"},
        "fixed": {
            *("optimizer.optimizer", "train.micro_batch_size", "train.iterations_to_skip"),
            *("model.recompute_method", "model.recompute_num_layers", "ddp.data_parallel_sharding_strategy"),
            *("scheduler.use_checkpoint_opt_param_scheduler", "scheduler.override_opt_param_scheduler"),
        },
    }
    tried["takes effect"] -= {"dataset.mock_settings.number_packed_samples"}
    tried["takes effect"] |= {"dataset.mock_settings"}
    for key, test in ELSEWHERE.items():
        file, name = test.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text()
        tried[ROWS[key]].add(key)
    for kind, keys in tried.items():
        assert {key for key, found in ROWS.items() if found == kind} == keys, kind


def test_every_key_that_the_documents_or_the_shipped_files_name_has_a_row() -> None:
    package = Path(__file__).parents[2]
    sections = {key.split(".")[0] for key in ROWS if "." in key}
    named = set()
    for name in ("README.md", "TRAINING.md", "PLANNING.md", "BENCHMARKS.md"):
        words = rf"(?<![\w./-])(?:{'|'.join(sections)})\.[a-z]\w*(?:\.\w+)*"
        named |= set(re.findall(words, (package / name).read_text()))
    for file in (package / "src" / "wan_train" / "config" / "shipped").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        named |= {f"{section}.{key}" for section in content if section != "recipe" for key in content[section]}
    # Headings; an example of a key without an effect; names of NVIDIA's tutorial that stand for another key.
    named -= {"model.flow", "model.hidden_dropout", "model.qkv_format", *tutorial_names.SAME}
    assert {key for key in named if key not in ROWS and not any(key.startswith(f"{row}.") for row in ROWS)} == set()
