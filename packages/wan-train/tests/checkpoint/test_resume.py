"""A run that was stopped and resumed is the uninterrupted run, to the bit."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain_training import Reference, engine_results, kept_by
from training_runs import (
    BASE_OPTIONS,
    EQUALITY_SEED,
    OVERLAP,
    RUN_OPTIONS,
    SMALL_BUCKETS,
    STEPS,
    data_options,
    equality_options,
    read_log,
    refused,
    refused_on,
    rewrite,
    run,
    same_weights,
    start,
    steps_of,
    stopped_after,
    train,
    train_on,
    trajectory,
    write_dataset,
)
from warm_ranks import Call

from wan_model.testing import assert_all_within, seeds
from wan_model.tiny import write_tiny_wan
from wan_model.weights.training_checkpoint import find_checkpoint, read_run_config
from wan_train.checkpoint.export import export
from wan_train.checkpoint.folder import step_folder

STOPPED = 2


@pytest.fixture
def stopped_run(one_process_run: Path, tmp_path: Path) -> Path:
    """A run of its own for every test, stopped after the second of six steps."""
    return stopped_after(STOPPED, one_process_run, tmp_path / "resumed")


def test_resumed_equals_uninterrupted_to_the_bit(stopped_run: Path, one_process_run: Path) -> None:
    # What a resume makes of the weights before it loads them must not matter.
    ended = run(
        (*RUN_OPTIONS, "checkpoint.save_interval=2"), stopped_run, calls=[Call("engine_changes:no_initial_weights")]
    )
    assert ended.codes == [0], ended.errors
    log = read_log(stopped_run)
    assert [entry for entry in log if "event" in entry] == [{"event": "resumed", "step": STOPPED}]
    assert [entry["step"] for entry in steps_of(log)] == [1, 2, 3, 4, 5, 6]
    assert trajectory(stopped_run) == trajectory(one_process_run)
    assert same_weights(stopped_run, one_process_run, STEPS)


def test_resumes_to_the_bit_with_several_buckets_of_gradients(tmp_path: Path) -> None:
    """In bf16, whose weights in fp32 are the optimizer's. Between the buckets of its state there is padding."""
    settings = ("--nproc-per-node", "2", *OVERLAP, SMALL_BUCKETS, "mixed_precision=bf16_mixed")
    whole = tmp_path / "whole"
    train(whole, *settings, "checkpoint.save_interval=2")
    resumed = stopped_after(4, whole, tmp_path / "resumed")
    train(resumed, *settings, "checkpoint.save_interval=2")
    assert trajectory(resumed) == trajectory(whole)
    assert same_weights(resumed, whole, STEPS)


@pytest.mark.parametrize(
    "kind",
    [
        # The weights that are fp32 in bf16 too fit one bucket.
        ("mixed_precision=bf16_mixed", "ddp.bucket_size=20000"),
        ("mixed_precision=null", SMALL_BUCKETS),
        ("mixed_precision=bf16_mixed", SMALL_BUCKETS, "lora.rank=5"),
    ],
    ids=["bf16", "fp32", "LoRA"],
)
def test_optimizer_states_of_other_parameters_are_refused(
    kind: tuple[str, ...], start_weights: Path, tmp_path: Path
) -> None:
    """As they were saved before ``wan_train.engine.upstream.bucket_padding``."""
    base = ("--init-from", str(start_weights)) if "lora.rank=5" in kind else ()
    settings = (*base, *OVERLAP, *kind)
    shifted = [Call("engine_changes:saves_behind_the_padding")]
    train(tmp_path, *settings, f"train.exit_interval={STOPPED}", calls=shifted)
    said = refused(tmp_path, *settings)
    assert "has optimizer states under the names of other parameters" in said
    assert len(steps_of(read_log(tmp_path))) == STOPPED, "no step was taken"
    train(tmp_path / "other", *settings, f"checkpoint.load={tmp_path}", "checkpoint.finetune=true")


# Class paths of run_config.yaml before every module had moved into the folder of its subject.
FORMER_PATHS = {
    "wan_train.config.schema.": "wan_train.config.",
    "wan_train.data.dataset.": "wan_train.dataset.",
    "wan_train.data.mock_data.": "wan_train.mock_data.",
    "wan_train.model.provider.": "wan_train.model.",
}


def test_a_checkpoint_of_before_modules_moved_is_resumed_and_exported(
    stopped_run: Path, one_process_run: Path, tmp_path: Path
) -> None:
    checkpoint = find_checkpoint(stopped_run)
    content = (checkpoint / "run_config.yaml").read_text()
    wanted = read_run_config(checkpoint)
    for path, former in FORMER_PATHS.items():
        assert f"_target_: {path}" in content
        content = content.replace(f"_target_: {path}", f"_target_: {former}")
    rewrite(checkpoint, "run_config.yaml", content)
    assert read_run_config(checkpoint) == wanted
    export(stopped_run, tmp_path / "exported")
    train(stopped_run, f"train.exit_interval={STOPPED + 1}")
    assert trajectory(stopped_run)[STOPPED + 1] == trajectory(one_process_run)[STOPPED + 1]


@pytest.mark.rounding
@pytest.mark.parametrize("seed", seeds(EQUALITY_SEED))
def test_resumes_in_other_layouts_of_the_model(
    seed: int, reference_of: Callable[[int], Reference], tmp_path: Path
) -> None:
    """Two steps alone, one over two tensor-parallel ranks, one over two stages, or that with context parallelism.

    The last is read without Megatron.
    """
    reference = reference_of(seed)
    folder = stopped_after(2, reference.run, tmp_path / "run")
    # Alone with one bucket of gradients, then with several.
    two = ("--nproc-per-node", "2", *OVERLAP, SMALL_BUCKETS)
    tensor = (*two, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    pipeline = (*two, "model.pipeline_model_parallel_size=2")
    train(folder, *equality_options(reference.start, seed, *tensor, "train.exit_interval=3"))
    shutil.copytree(folder, tmp_path / "other")
    context = (*two, "model.context_parallel_size=2")
    for end, settings in ((folder, pipeline), (tmp_path / "other", context)):
        log = train(end, *equality_options(reference.start, seed, *settings))
        assert [entry["step"] for entry in log if entry.get("event") == "resumed"] == [2, 3]
        assert_all_within(engine_results(end), engine_results(reference.run), kept_by([], reference.scale))


def test_losing_the_place_in_the_data_would_show(stopped_run: Path, one_process_run: Path) -> None:
    """Control: with the loader set back to the start, the losses after the resume differ."""
    checkpoint, name = find_checkpoint(stopped_run), "train_dataloader_dprank000.pt"
    saved = torch.load(checkpoint / name, weights_only=True)
    saved["dataloader_state_dict"]["loader"]["drawn"] = 0
    rewrite(checkpoint, name, saved)
    train(stopped_run, f"train.exit_interval={STOPPED + 1}")
    assert trajectory(stopped_run)[STOPPED + 1][0] != trajectory(one_process_run)[STOPPED + 1][0]


def test_a_checkpoint_without_loader_state_is_refused(stopped_run: Path) -> None:
    (find_checkpoint(stopped_run) / "train_dataloader_dprank000.pt").unlink()
    said = refused(stopped_run)
    assert "train_dataloader_dprank000.pt is missing, which complete.json names" in said
    assert len(read_log(stopped_run)) == STOPPED, "no step was taken"


def test_another_data_parallel_size_is_refused_before_a_step(stopped_run: Path) -> None:
    said = refused(stopped_run, "--nproc-per-node", "2")
    assert "resume with the data-parallel size that" in said
    assert len(read_log(stopped_run)) == STOPPED, "no step was taken"


@pytest.mark.parametrize("precision", ["null", "bf16_mixed"])
def test_fully_sharded_resumes_to_the_bit(precision: str, tmp_path: Path) -> None:
    layout = ["--nproc-per-node", "2", "dist.use_megatron_fsdp=true"]
    options = [*layout, "train.train_iters=4", f"mixed_precision={precision}"]
    train(tmp_path / "whole", *options, "checkpoint.save_interval=2")
    stopped_after(2, tmp_path / "whole", tmp_path / "cut")
    # As after a crash between Bridge's tracker and our record.
    shutil.copyfile(step_folder(tmp_path / "whole", 4) / "train_state.pt", tmp_path / "cut" / "latest_train_state.pt")
    log = train(tmp_path / "cut", *options)
    assert [entry for entry in log if "event" in entry] == [{"event": "resumed", "step": 2}]
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole", 4)
    notes, settings = tmp_path / "notes", ("optimizer.lr=0.004", "optimizer.min_lr=0.004", "optimizer.adam_beta2=0.9")
    settings = (*settings, "optimizer.adam_eps=1e-7", "dist.distributed_timeout_minutes=7")
    stopped_after(2, tmp_path / "whole", tmp_path / "changed")
    calls = [Call("rank_calls:note_settings", [str(notes)])]
    ended = run((*RUN_OPTIONS, *options, *settings), tmp_path / "changed", calls=calls)
    assert set(ended.codes) == {0}, ended.errors
    found = [json.loads(line) for line in notes.read_text().splitlines()]
    assert {entry["timeout"] for entry in found if "timeout" in entry} == {7 * 60}
    groups = [entry for entry in found if "betas" in entry]
    assert groups
    assert all((entry["lr"], entry["betas"], entry["eps"]) == (0.004, [0.9, 0.9], 1e-7) for entry in groups)
    assert float.fromhex(trajectory(tmp_path / "changed")[3][2]) == 0.004
    said = refused(tmp_path / "cut", "--nproc-per-node", "2", f"mixed_precision={precision}")
    assert "iter_0000004 was saved with dist.use_megatron_fsdp=true, whose format the other cannot read" in said


def test_a_plain_checkpoint_is_not_resumed_fully_sharded(stopped_run: Path) -> None:
    said = refused(stopped_run, "dist.use_megatron_fsdp=true")
    assert f"iter_000000{STOPPED} was saved with dist.use_megatron_fsdp=false, whose format the other" in said
    assert len(read_log(stopped_run)) == STOPPED, "no step was taken"


def test_a_signal_ends_a_run_in_order(tmp_path: Path) -> None:
    settings = ("train.train_iters=100000", "train.exit_signal_handler=true")
    ranks = start((*RUN_OPTIONS, *settings), tmp_path)
    # The handler is installed before the first step.
    while not (tmp_path / "log.jsonl").exists():
        assert ranks.running(), ranks.wait().errors
        time.sleep(0.05)
    os.kill(ranks.pids[0], signal.SIGTERM)
    ended = ranks.wait()
    assert ended.codes == [0], ended.errors
    done = read_log(tmp_path)[-1]["step"]
    assert done < 100000
    assert find_checkpoint(tmp_path).name == f"iter_{done:07d}"


def test_going_back_in_a_folder_with_later_steps_is_refused(one_process_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(one_process_run, folder)
    assert "checkpoint.ckpt_step is 2, but" in refused(folder, "checkpoint.ckpt_step=2")
    other = tmp_path / "other"
    train(other, f"checkpoint.load={folder}", "checkpoint.ckpt_step=2", "train.exit_interval=4")
    wanted = trajectory(one_process_run)
    assert trajectory(other) == {step: wanted[step] for step in (3, 4)}


def test_loading_from_where_a_run_saves_starts_it_and_goes_on(one_process_run: Path, tmp_path: Path) -> None:
    """As the tutorial has it; the first time there is nothing to load."""
    load = f"checkpoint.load={tmp_path}"
    assert len(train(tmp_path, load, "train.exit_interval=2")) == 2
    log = train(tmp_path, load, "train.exit_interval=3")
    assert [entry["step"] for entry in log if "event" in entry] == [2]
    wanted = trajectory(one_process_run)
    assert trajectory(tmp_path) == {step: wanted[step] for step in (1, 2, 3)}


def test_a_mistyped_load_path_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path, f"checkpoint.load={tmp_path / 'mistyped'}")
    assert said.startswith("checkpoint.load is")
    assert json.dumps(str(tmp_path / "mistyped"))[1:-1] in said


def test_weights_of_another_latent_space_or_other_sizes_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "first")
    write_dataset(tmp_path / "second")
    shutil.rmtree(tmp_path / "second" / "model")
    write_tiny_wan(tmp_path / "second" / "model", seed=1)
    one_step = (*BASE_OPTIONS, "train.train_iters=1")
    run = tmp_path / "run"
    train_on((*one_step, *data_options(tmp_path / "first")), run)

    second = (*BASE_OPTIONS, "train.train_iters=2", *data_options(tmp_path / "second"))
    resumed = refused_on(second, run)
    assert f"the checkpoint {run / 'iter_0000001'}" in resumed
    assert "are of different latent spaces: model_id (vae-" in resumed
    assert [entry["step"] for entry in read_log(run)] == [1], "a step was taken"

    started = (*one_step, *data_options(tmp_path / "second"), "--init-from")
    assert f"the model {tmp_path / 'first' / 'model'} (fingerprint" in refused_on(
        (*started, str(tmp_path / "first" / "model")), tmp_path / "other"
    )
    assert not list((tmp_path / "other").glob("iter_*"))
    train_on((*started, str(tmp_path / "second" / "model")), tmp_path / "other")

    wider = refused_on((*RUN_OPTIONS, "model.transformer.ffn_dim=96"), run)
    assert f"{run / 'iter_0000001'} has another transformer than this run: ffn_dim 96 where it has" in wider


def test_a_run_begins_with_the_weights_of_another_and_resumes_its_own(one_process_run: Path, tmp_path: Path) -> None:
    """``checkpoint.finetune`` is the export of a step, given to ``--init-from``: no other state comes along."""
    begin = (f"checkpoint.load={one_process_run}", "checkpoint.finetune=true", f"checkpoint.ckpt_step={STEPS}")
    begin = (*begin, "train.train_iters=3")
    export(one_process_run, tmp_path / "exported")
    wanted = train(tmp_path / "wanted", "train.train_iters=3", "--init-from", str(tmp_path / "exported"))
    first = train(tmp_path / "begun", *begin, "ema.decay=0.5", "train.exit_interval=2")
    assert first[0] == {"event": "begun", "weights_of": f"step {STEPS} in {one_process_run}"}
    log = train(tmp_path / "begun", *begin, "ema.decay=0.5")
    assert [entry["step"] for entry in log if "event" in entry and entry["event"] == "resumed"] == [2]
    assert [(entry["step"], entry["loss"]) for entry in steps_of(log)] == [
        (entry["step"], entry["loss"]) for entry in wanted
    ]
