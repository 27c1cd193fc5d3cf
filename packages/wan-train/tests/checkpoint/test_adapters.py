"""Checkpoints of adapters: what they hold, exact resume, what is refused, and what is written out of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    FULL,
    FULLY_SHARDED,
    PIPELINE,
    RUN_OPTIONS,
    STEPS,
    call,
    read_log,
    refused,
    rewrite,
    run,
    steps_of,
    stopped_after,
    train,
    trajectory,
)

from wan_model.dit.lora import LoraSettings, adapter_shapes
from wan_model.tiny import TINY_CONFIG, write_tiny_wan
from wan_model.weights.training_adapters import find_adapters, read_adapters
from wan_model.weights.training_checkpoint import find_checkpoint, read_index, read_training_checkpoint
from wan_model.weights.transformer import load_transformer, save_transformer
from wan_train.checkpoint.adapters import export_lora, merge
from wan_train.checkpoint.export import export

STOPPED = 2
LORA = ("lora.rank=3", "lora.alpha=6", "lora.dropout=0.2", "lora.targets=[attn1.*,ffn.net.2]")
SETTINGS = LoraSettings(rank=3, alpha=6.0, dropout=0.2, targets=("attn1.*", "ffn.net.2"))
SAVED = ("checkpoint.save_interval=2", "ema.decay=0.5")


@pytest.fixture(scope="module")
def lora_run(start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, saved after each second one."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(folder, "--init-from", str(start_weights), *LORA, *SAVED)
    return folder


@pytest.fixture
def stopped_run(lora_run: Path, tmp_path: Path) -> Path:
    return stopped_after(STOPPED, lora_run, tmp_path / "resumed")


def same_adapters(one: Path, other: Path, step: int) -> bool:
    """To the bit, with their EMA."""
    pairs = [
        [read_adapters(find_checkpoint(folder, step), ema=ema) for folder in (one, other)] for ema in (False, True)
    ]
    return all(torch.equal(mine[key], theirs[key]) for mine, theirs in pairs for key in mine)


def test_a_checkpoint_holds_the_adapters_and_their_optimizer_and_nothing_of_the_base(
    lora_run: Path, start_weights: Path
) -> None:
    checkpoint = find_checkpoint(lora_run)
    shapes = adapter_shapes(TINY_CONFIG, SETTINGS)
    entries = read_index(checkpoint).state_dict_metadata
    tensors = {name for name in entries if "blocks." in name or "embedd" in name or "proj_out" in name}
    assert tensors == {
        prefix + key
        for key in shapes
        for prefix in ("", "ema.", "optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    }
    found = find_adapters(checkpoint)
    assert (found.settings, found.config, found.base) == (SETTINGS, TINY_CONFIG, str(start_weights))
    adapters = read_adapters(checkpoint)
    assert {key: tuple(value.shape) for key, value in adapters.items()} == shapes
    assert all(value.any() for value in adapters.values()), "B has left zero"
    averages = read_adapters(checkpoint, ema=True)
    assert not any(torch.equal(averages[key], adapters[key]) for key in adapters)


def test_resumed_equals_uninterrupted_to_the_bit(stopped_run: Path, lora_run: Path) -> None:
    ended = run((*RUN_OPTIONS, *LORA, *SAVED), stopped_run)  # the base is taken over from the checkpoint
    assert ended.codes == [0], ended.errors
    assert [entry["step"] for entry in steps_of(read_log(stopped_run))] == [1, 2, 3, 4, 5, 6]
    assert trajectory(stopped_run) == trajectory(lora_run)
    assert same_adapters(stopped_run, lora_run, STEPS)


def test_resumes_in_another_layout(stopped_run: Path, lora_run: Path, start_weights: Path) -> None:
    layout = ("--nproc-per-node", "2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    ended = run((*RUN_OPTIONS, "--init-from", str(start_weights), *LORA, *SAVED, *layout), stopped_run)
    assert set(ended.codes) == {0}, ended.errors
    for key, value in read_adapters(find_checkpoint(lora_run)).items():
        torch.testing.assert_close(read_adapters(find_checkpoint(stopped_run))[key], value, rtol=1e-3, atol=1e-5)


def test_fully_sharded_resumes_to_the_bit(start_weights: Path, tmp_path: Path) -> None:
    options = ("--init-from", str(start_weights), *LORA, FULLY_SHARDED, "--nproc-per-node", "2", SAVED[0])
    train(tmp_path / "whole", *options)
    resumed = stopped_after(STOPPED, tmp_path / "whole", tmp_path / "resumed")
    train(resumed, *options)
    assert trajectory(resumed) == trajectory(tmp_path / "whole")
    mine, theirs = (read_adapters(find_checkpoint(folder)) for folder in (resumed, tmp_path / "whole"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    names = read_index(find_checkpoint(resumed)).state_dict_metadata
    assert not [name for name in names if "attn2" in name], "nothing of the base is saved"


def test_few_adapters_leave_a_rank_without_optimizer_state(start_weights: Path, tmp_path: Path) -> None:
    """Of three data-parallel ranks the last has no part of the 192 values; each rank's buffer has 128."""
    small = ("lora.rank=1", "lora.targets=[blocks.0.attn1.to_k]", *SAVED, "train.train_iters=4")
    options = ("--init-from", str(start_weights), *small, "--nproc-per-node", "3", "train.global_batch_size=3")
    train(tmp_path / "whole", *options)
    resumed = stopped_after(STOPPED, tmp_path / "whole", tmp_path / "resumed")
    train(resumed, *options)
    assert trajectory(resumed) == trajectory(tmp_path / "whole")
    assert same_adapters(resumed, tmp_path / "whole", 4)


def test_a_base_in_main_memory_changes_nothing_and_one_in_fp8_is_the_same_in_every_layout(
    lora_run: Path, start_weights: Path, tmp_path: Path
) -> None:
    """Resident and fetched weights are equal to the bit; in fp8 those of two tensor ranks are those of one process."""
    base = ("--init-from", str(start_weights), *LORA, SAVED[0], "train.train_iters=4", FULL)
    fetched = train(tmp_path / "fetched", *base, "lora.offload_base=true", "ema.decay=0.5", "validation.interval=4")
    resident = train(tmp_path / "resident", *base, "ema.decay=0.5", "validation.interval=4")
    assert trajectory(tmp_path / "fetched") == trajectory(tmp_path / "resident")
    assert same_adapters(tmp_path / "fetched", tmp_path / "resident", 4)
    assert fetched[-1]["timesteps"] == resident[-1]["timesteps"], "validation"

    both = ("lora.fp8_base=true", "lora.offload_base=true")
    split = ("--nproc-per-node", "2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    (said,) = [entry for entry in train(tmp_path / "fp8", *base, both[0]) if entry.get("event") == "fp8_base"]
    assert 0.01 < said["relative"] <= said["largest"] < 0.05
    train(tmp_path / "split", *base, *both, *split)
    one, two, exact = (read_adapters(find_checkpoint(tmp_path / name)) for name in ("fp8", "split", "resident"))
    # Of those of A that the first step reaches: B leaves zero by the learning rate, whatever the gradient's size.
    distance = {name: _distance(found, one) for name, found in (("layout", two), ("fp8", exact))}
    assert distance["layout"] < 0.02 * distance["fp8"], distance


def _distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return float(sum((found[key] - wanted[key]).square().sum() for key in wanted) ** 0.5)


def test_dropout_of_a_resumed_run(stopped_run: Path, lora_run: Path) -> None:
    ended = run((*RUN_OPTIONS, *LORA, *SAVED, "lora.dropout=0"), stopped_run)
    assert ended.codes == [0], ended.errors
    assert trajectory(stopped_run)[STOPPED] == trajectory(lora_run)[STOPPED]
    assert trajectory(stopped_run)[STOPPED + 1] != trajectory(lora_run)[STOPPED + 1]


def test_where_the_base_of_a_resumed_run_is(stopped_run: Path, lora_run: Path, tmp_path: Path) -> None:
    rounded = shutil.copytree(stopped_run, tmp_path / "rounded")
    ended = run((*RUN_OPTIONS, *LORA, *SAVED, "lora.offload_base=true", FULL), stopped_run)
    assert ended.codes == [0], ended.errors
    assert same_adapters(stopped_run, lora_run, STEPS), "in main memory it is the same base"
    ended = run((*RUN_OPTIONS, *LORA, *SAVED, "lora.fp8_base=true"), rounded)
    assert ended.codes == [0], ended.errors
    assert [entry["step"] for entry in read_log(rounded) if entry.get("event") == "fp8_base"] == [STOPPED]
    assert trajectory(rounded)[STOPPED] == trajectory(lora_run)[STOPPED]
    assert trajectory(rounded)[STOPPED + 1] != trajectory(lora_run)[STOPPED + 1]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora.rank=4", "lora.rank is 4 where {} has 3, which would be another LoRA"),
        ("lora.targets=[attn1.*]", "lora.targets is ['attn1.*'] where {} has ['attn1.*', 'ffn.net.2']"),
        ("lora.alpha=3", "lora.alpha is 3 where {} has 6"),
        ("lora.use_rslora=true", "lora.use_rslora is True where {} has False"),
        ("lora.rank=0", "lora.alpha is 6 and lora.rank is 0, which trains the weights themselves; set lora.rank"),
        ("lora.targets=[to_z]", "the LoRA's target 'to_z' is no linear of the model's 2 blocks"),
        ("lora.targets=attn1.to_q", "lora.targets is 'attn1.to_q'; expected a list, such as [a, b]"),
        (
            "lora.targets=[ffn.0]",
            "lora.targets has 'ffn.0', which is a name of the official release; write ffn.net.0.proj",
        ),
        (
            "lora.targets=[attn1.*,q]",
            "lora.targets has 'q', which is a name of the official release; write attn1.to_q and attn2.to_q",
        ),
        ("lora.offload_base=true", "lora.offload_base needs model.recompute_granularity=full"),
        ("lora.rank=-1", "the rank of the LoRA is -1; expected a whole number from 1"),
    ],
)
def test_another_lora_is_refused(setting: str, said: str, stopped_run: Path) -> None:
    sentence = refused(stopped_run, *LORA, *SAVED, setting)
    assert said.format(find_checkpoint(stopped_run)) in sentence
    assert len(read_log(stopped_run)) == STOPPED


def test_a_lora_is_not_resumed_as_a_run_of_weights(stopped_run: Path) -> None:
    sentence = refused(stopped_run, *SAVED)
    assert f"{find_checkpoint(stopped_run)} holds a LoRA of rank 3 and lora.rank is 0" in sentence
    sentence = refused(stopped_run, *LORA, SAVED[0], FULLY_SHARDED)
    assert f"start anew from what it trained: wan-train merge {stopped_run} MODEL" in sentence


def test_an_alpha_of_the_rank_may_be_left_out(start_weights: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", "--init-from", str(start_weights), "lora.rank=3", "train.train_iters=1")
    log = train(tmp_path / "run", "lora.rank=3", "lora.alpha=3", "train.train_iters=2")
    assert [entry["step"] for entry in steps_of(log)] == [1, 2]
    train(tmp_path / "run", "lora.rank=3", "train.train_iters=3")


def test_a_pipeline_stage_without_adapters_is_refused(start_weights: Path, tmp_path: Path) -> None:
    """It has nothing to save, and Megatron resumes no such stage."""
    given = ("--nproc-per-node", "2", PIPELINE, "--init-from", str(start_weights), "lora.rank=3")
    sentence = refused(tmp_path / "run", *given, "lora.targets=[blocks.0.*]")
    assert "which adapts nothing in the blocks 1 to 1 of pipeline stage 1; add targets there" in sentence


@pytest.mark.parametrize(("setting", "said"), [("lora.alpha=3", True), ("lora.alpha=6.0", False)])
def test_another_spelling_of_the_same_lora_resumes(
    setting: str, said: bool, start_weights: Path, tmp_path: Path
) -> None:
    """An alpha that is the rank is that of none."""
    start = ("--init-from", str(start_weights), "lora.targets=[attn1.*]", "train.train_iters=1")
    train(tmp_path / "run", *start, "lora.rank=6")
    if said:
        sentence = refused(tmp_path / "run", *start, "lora.rank=6", setting)
        assert f"lora.alpha is 3 where {find_checkpoint(tmp_path / 'run')} has null, which would be" in sentence
    else:
        ended = run((*RUN_OPTIONS, *start, "lora.rank=6", setting), tmp_path / "run")
        assert ended.codes == [0], ended.errors


def test_a_checkpoint_of_weights_is_no_start_of_a_lora(
    one_process_run: Path, start_weights: Path, tmp_path: Path
) -> None:
    folder = stopped_after(STOPPED, one_process_run, tmp_path / "run")
    sentence = refused(folder, "--init-from", str(start_weights), *LORA)
    assert f"holds the weights of a model and lora.rank is 3; export them first: wan-train export {folder}" in sentence


def test_a_lora_needs_weights_to_adapt(tmp_path: Path) -> None:
    sentence = refused(tmp_path / "run", *LORA)
    assert sentence == "lora.rank is 3 and there are no weights to adapt; give --init-from MODEL, or lora.rank=0"


def test_other_weights_than_those_of_the_checkpoint_are_refused(
    stopped_run: Path, start_weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(start_weights, tmp_path / "other")
    weights = tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["blocks.0.attn2.to_k.bias"][3] += 1e-3
    save_transformer(state, TINY_CONFIG, weights.parent)
    record = find_checkpoint(stopped_run) / "run_config.yaml"
    moved = record.read_text().replace(str(start_weights), str(tmp_path / "other"))
    rewrite(record.parent, record.name, moved)
    sentence = refused(stopped_run, *LORA, *SAVED)
    assert f"the weights of {tmp_path / 'other'} are not those that the checkpoint's LoRA was trained on" in sentence


def test_a_base_that_has_moved(stopped_run: Path, lora_run: Path, start_weights: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(start_weights, tmp_path / "moved")
    record = find_checkpoint(stopped_run) / "run_config.yaml"
    rewrite(record.parent, record.name, record.read_text().replace(str(start_weights), str(tmp_path / "gone")))
    sentence = refused(stopped_run, *LORA, *SAVED)
    assert f"the base of the LoRA is not found (no model at {tmp_path / 'gone'}" in sentence
    assert "give it with --init-from MODEL" in sentence
    ended = run((*RUN_OPTIONS, "--init-from", str(moved), *LORA, *SAVED), stopped_run)
    assert ended.codes == [0], ended.errors
    assert same_adapters(stopped_run, lora_run, STEPS)
    assert find_adapters(find_checkpoint(stopped_run)).base == str(moved)


def test_a_run_begins_with_the_adapters_of_another(lora_run: Path, start_weights: Path, tmp_path: Path) -> None:
    begin = (f"checkpoint.load={lora_run}", "checkpoint.finetune=true", "train.train_iters=1", "optimizer.lr=1e-12")
    train(tmp_path / "new", "--init-from", str(start_weights), *LORA, *begin, "optimizer.min_lr=0")
    mine, theirs = (read_adapters(find_checkpoint(folder)) for folder in (tmp_path / "new", lora_run))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-9)


# -- files ------------------------------------------------------------------------------------------------------------


def changes(adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By key of the weight, written down plainly."""
    return {
        key.replace("lora_A.", ""): 6 / 3 * adapters[key.replace("lora_A", "lora_B")] @ adapters[key]
        for key in adapters
        if "lora_A" in key
    }


@pytest.mark.parametrize("ema", [False, True])
def test_merged_weights_are_the_base_and_the_change(
    ema: bool, lora_run: Path, start_weights: Path, tmp_path: Path
) -> None:
    merge(lora_run, tmp_path / "model", ema=ema)
    merged = load_transformer(tmp_path / "model" / "transformer").state_dict()
    base = load_transformer(start_weights / "transformer").state_dict()
    added = changes(read_adapters(find_checkpoint(lora_run), ema=ema))
    for key, value in base.items():
        if key in added:
            torch.testing.assert_close(merged[key], value + added[key], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(merged[key], value), key


def test_merged_weights_in_another_precision_are_rounded_once(
    lora_run: Path, start_weights: Path, tmp_path: Path
) -> None:
    merge(lora_run, tmp_path / "model", dtype="bfloat16")
    merged = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_transformer(start_weights / "transformer").state_dict()
    for key, change in changes(read_adapters(find_checkpoint(lora_run))).items():
        assert torch.equal(merged[key], (base[key] + change).bfloat16()), key


@pytest.mark.parametrize("base", ["./models/wan", "my/models/wan", "/models/wan"])
@pytest.mark.parametrize("run_name", ["tuned", "two\nlines", "back\\slash"])
def test_a_file_names_its_base_and_run_wherever_it_is_written(
    base: str, run_name: str, lora_run: Path, start_weights: Path, tmp_path: Path
) -> None:
    """A base may have been given relative to another folder, and a run's name may be no text for metadata."""
    folder = shutil.copytree(lora_run, tmp_path / run_name)
    record = find_checkpoint(folder) / "run_config.yaml"
    rewrite(record.parent, record.name, record.read_text().replace(str(start_weights), base))
    export_lora(folder, tmp_path / "my.safetensors")
    metadata = _metadata(tmp_path / "my.safetensors")
    assert metadata["wan.base"] == "wan"
    assert metadata.get("wan.run") == (run_name if run_name == "tuned" else None)


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya"])
def test_files_change_what_the_run_has_trained(format: str, lora_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.safetensors"
    export_lora(lora_run, file, format=format, ema=True, step=4)
    stored = load_file(file)
    downs = sorted(key for key in stored if key.endswith(("lora_A.weight", "lora_down.weight")))
    added = changes(read_adapters(find_checkpoint(lora_run, 4), ema=True))
    products = []
    for key in downs:
        up = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
        alpha = stored.get(key.rsplit(".", 2)[0] + ".alpha", torch.tensor(6.0))
        products.append(alpha / 3 * stored[up] @ stored[key])
    assert len(products) == len(added)
    for product in products:
        assert any(
            torch.allclose(product, change, rtol=1e-6) for change in added.values() if change.shape == product.shape
        )
    assert "wan-train" in json.dumps(_metadata(file))
    assert str(tmp_path.parent) not in json.dumps(_metadata(file)), "no path of the machine"


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
        return found


def test_the_commands(lora_run: Path, one_process_run: Path, start_weights: Path, tmp_path: Path) -> None:
    write_tiny_wan(tmp_path / "other")
    (tmp_path / "there.safetensors").touch()
    lines = {
        "lora": ["export", str(lora_run), "--lora", str(tmp_path / "a.safetensors"), "--format", "kohya"],
        "bfloat16": ["export", str(lora_run), "--lora", str(tmp_path / "b.safetensors"), "--dtype", "bfloat16"],
        "merge": ["merge", str(lora_run), str(tmp_path / "merged"), "--step", "2", "--dtype", "bfloat16"],
        "neither": ["export", str(lora_run)],
        "weights": ["export", str(lora_run), str(tmp_path / "out")],
        "no lora": ["export", str(one_process_run), "--lora", str(tmp_path / "c.safetensors")],
        "no lora to merge": ["merge", str(one_process_run), str(tmp_path / "out")],
        "there": ["export", str(lora_run), "--lora", str(tmp_path / "there.safetensors")],
        "ending": ["export", str(lora_run), "--lora", str(tmp_path / "lora.pt")],
        "other": ["merge", str(lora_run), str(tmp_path / "out"), "--model", str(tmp_path / "other")],
        "float16": ["export", str(one_process_run), str(tmp_path / "out"), "--dtype", "float16"],
    }
    call("rank_calls:command_lines", str(tmp_path / "results"), lines)
    found = json.loads((tmp_path / "results").read_text())
    newest = find_checkpoint(lora_run)
    assert found["lora"] == [0, f"{tmp_path / 'a.safetensors'}: the LoRA of {newest}\n", ""]
    assert found["bfloat16"][0] == 0
    assert {value.dtype for value in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
    assert found["merge"][0] == 0
    assert load_transformer(tmp_path / "merged" / "transformer").config == TINY_CONFIG
    said = {
        "neither": "expected either OUT, for a model, or --lora FILE, for the LoRA of a run",
        "weights": f"{newest} holds a LoRA; write it with --lora FILE, or merge it with its base: wan-train merge",
        "no lora": "holds the weights of a model, not a LoRA; export it with wan-train export",
        "no lora to merge": "holds the weights of a model, not a LoRA; export it with wan-train export",
        "there": "there.safetensors exists; choose another file",
        "ending": "the name of the LoRA is lora.pt; expected one that ends with .safetensors",
        "other": f"the weights of {tmp_path / 'other'} are not those that the LoRA in {newest} was trained on",
        "float16": "--dtype is float16, which is for --lora; expected stored, float32 or bfloat16",
    }
    for key, sentence in said.items():
        code, _, errors = found[key]
        assert (code, sentence in errors) == (2, True), errors
    assert not (tmp_path / "out").exists()


def test_readers_of_weights_name_the_lora(lora_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a LoRA, not the weights of a model"):
        read_training_checkpoint(find_checkpoint(lora_run))
    with pytest.raises(ValueError, match="holds a LoRA; write it with --lora FILE"):
        export(lora_run, tmp_path / "model")


def test_a_damaged_file_is_named(stopped_run: Path, tmp_path: Path) -> None:
    file = max(find_checkpoint(stopped_run).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        export_lora(stopped_run, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        merge(stopped_run, tmp_path / "model")
