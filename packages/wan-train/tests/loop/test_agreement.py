"""What data and model share: texts are padded to one length, and every quantity that differs is refused by name."""

import collections
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from training_runs import BASE_OPTIONS, call, data_options, run, write_dataset
from warm_ranks import Call

from wan_model.testing.once import Once
from wan_model.weights.training_checkpoint import find_checkpoint, read_run_config
from wan_model.weights.transformer import read_config, read_trained_spec
from wan_train.checkpoint.export import export

SHORT = 16
ONE_STEP = (*BASE_OPTIONS, "train.train_iters=1", "validation.interval=1", "validation.samples=2")


@pytest.fixture(scope="module")
def short(once: Once) -> Path:
    """A dataset of ``--text-length 16`` with a manifest, and the model that it was encoded with."""
    return once("short-texts", lambda folder: write_dataset(folder, 12, 4, manifest=True, text_length=SHORT))


def on(dataset: Path, *settings: str) -> list[str]:
    """The options of a run on a dataset that records its model."""
    return [*ONE_STEP, *(one for one in data_options(dataset) if "encoded_by" not in one), *settings]


def texts_of(run_folder: Path, notes: Path, *options: str) -> set[tuple[bool, int]]:
    """Train; whether texts were given in a step or in a validation, and how long they were."""
    ended = run(options, run_folder, calls=[Call("rank_calls:note_texts", (str(notes),))])
    assert set(ended.codes) == {0}, ended.errors
    seen = [json.loads(line) for line in notes.read_text().splitlines()]
    # Samples of `write_dataset` have texts of three to seven tokens.
    assert {tokens for _, _, counts in seen for tokens in counts} <= set(range(3, 8))
    return {(training, shape[1]) for training, shape, _ in seen}


@pytest.fixture(scope="module")
def short_run(once: Once, short: Path) -> Path:
    """One step on it; beside its checkpoints what its texts were."""

    def train(folder: Path) -> None:
        assert texts_of(folder / "run", folder / "notes.jsonl", *on(short)) == {(True, SHORT), (False, SHORT)}

    return once("short-texts-run", train) / "run"


def test_texts_are_padded_to_the_length_of_the_data_and_it_is_recorded(short_run: Path, tmp_path: Path) -> None:
    config, spec = read_run_config(find_checkpoint(short_run))
    assert spec is not None
    assert (config.text_length, spec.text_length, spec.fps) == (SHORT, SHORT, "16")
    export(short_run, tmp_path / "model")
    assert read_config(tmp_path / "model/transformer") == config
    assert json.loads((tmp_path / "model/transformer/config.json").read_text())["text_len"] == SHORT
    assert read_trained_spec(tmp_path / "model/transformer") == spec


def test_texts_are_padded_as_configured(short: Path, tmp_path: Path) -> None:
    options = on(short, "model.transformer.text_len=24")
    assert texts_of(tmp_path / "run", tmp_path / "notes.jsonl", *options) == {(True, 24), (False, 24)}
    config, spec = read_run_config(find_checkpoint(tmp_path / "run"))
    assert (config.text_length, spec and spec.text_length) == (24, SHORT)


def test_initial_weights_are_looked_for_and_their_sizes_read_once(short: Path, tmp_path: Path) -> None:
    model, notes = short / "model", tmp_path / "notes"
    options = on(short, "--init-from", str(model), f"model.transformer.text_len={SHORT}")
    ended = run(options, tmp_path / "run", calls=[Call("rank_calls:note_opened", (str(notes), str(model)))])
    assert set(ended.codes) == {0}, ended.errors
    opened = collections.Counter(notes.read_text().splitlines())
    # The index, and the scheduler, tell whether a folder is of Wan 2.1.
    files = ("transformer/config.json", "model_index.json", "scheduler/scheduler_config.json")
    assert {name: opened[name] for name in files} == dict.fromkeys(files, 1)


def changed(dataset: Path, folder: Path, **values: Any) -> Path:
    """A copy of the data whose manifest says something else of the latent space or, of ``fps``, of the videos."""
    shutil.copytree(dataset / "data", folder / "data")
    file = folder / "data/wan-data.json"
    manifest = json.loads(file.read_text())
    if "fps" in values:
        manifest["settings"]["fps"] = values["fps"]
    else:
        manifest["latent_spec"] |= values
    file.write_text(json.dumps(manifest))
    return folder


def test_the_length_of_texts_is_the_datas_the_weights_or_the_configurations(
    short: Path, short_run: Path, start_weights: Path, dataset: Path, tmp_path: Path
) -> None:
    export(short_run, tmp_path / "exported")
    long = changed(short, tmp_path / "long", text_length=512)
    bare = [*ONE_STEP, *data_options(dataset)]
    mock = [*ONE_STEP, "--mock"]
    exported, released = ("--init-from", str(tmp_path / "exported")), ("--init-from", str(start_weights))
    key = "model.transformer.text_len"
    wanted: dict[str, tuple[list[str], int | str]] = {
        "data": (on(short), SHORT),
        "data of 512": (on(long), 512),
        "data without a record": (bare, 512),
        "no data": (mock, 512),
        "no data, configured": ([*mock, f"{key}=32"], 32),
        "no data, short weights": ([*mock, *exported], SHORT),
        "data and short weights": (on(short, *exported), SHORT),
        "data of 512 and weights": (on(long, *released), 512),
        "short data, weights, padded as the weights": (on(short, *released, f"{key}=512"), 512),
        "short data, weights, padded as the data": (on(short, *released, f"{key}=16"), SHORT),
        "short data and weights": (
            on(short, *released),
            f"the captions of {short / 'data'} were cut to 16 tokens and the model {start_weights} was trained on "
            f"texts padded to 512; prepare the data with --text-length 512, or set {key} to 512 or 16, which texts are "
            "padded to from then on",
        ),
        "data of 512 and short weights": (on(long, *exported), "were cut to 512 tokens and the model"),
        "shorter than the data": (
            on(short, f"{key}=8"),
            f"the captions of {short / 'data'} were cut to 16 tokens and {key} is 8; set it to 16, or prepare the data "
            "with --text-length 8",
        ),
        "no data, shorter than its texts": (
            [*mock, f"{key}=8"], f"dataset.mock_settings.context_length is 16; expected at most {key}, 8",
        ),
        "no number": ([*mock, f"{key}=long"], "text_len is 'long'; expected a whole number from 1 to 131,072"),
    }  # fmt: skip
    call("rank_calls:agreements", str(tmp_path / "found"), None, {key: given for key, (given, _) in wanted.items()})
    found = json.loads((tmp_path / "found").read_text())
    for key, (_, said) in wanted.items():
        assert said in found[key] if isinstance(said, str) else found[key] == said, (key, found[key])


# Of the latent space of a dataset: another value, and what is said of it.
OTHERS: dict[str, Any] = {
    "temporal_stride": 2, "spatial_stride": 4, "mean": [0.0] * 16, "std": [1.0] * 16, "model_id": "vae-other",
    "tokenizer": "another", "fps": "24", "text_encoder": "another",
}  # fmt: skip


def test_every_quantity_that_differs_is_refused_by_name(short: Path, short_run: Path, tmp_path: Path) -> None:
    export(short_run, tmp_path / "exported")
    init = ("--init-from", str(tmp_path / "exported"))
    data = {name: changed(short, tmp_path / name, **{name: value}) for name, value in OTHERS.items()}
    fresh = {
        **{f"exported weights: {name}": on(folder, *init) for name, folder in data.items()},
        "in_channels": on(short, "model.transformer.in_channels=8", "model.transformer.out_channels=8"),
        "text_dim": on(short, "model.transformer.text_dim=16"),
    }
    resumed = {
        **{f"resumed: {name}": on(folder) for name, folder in data.items()},
        "resumed: text_len": on(short, "model.transformer.text_len=32"),
        "resumed: patch_size": on(short, "model.transformer.patch_size=[1,1,1]", "dataset.capacity=192"),
        "resumed": on(short),
    }
    call("rank_calls:agreements", str(tmp_path / "fresh"), None, fresh)
    call("rank_calls:agreements", str(tmp_path / "resumed"), str(short_run), resumed)
    found = {**json.loads((tmp_path / "fresh").read_text()), **json.loads((tmp_path / "resumed").read_text())}
    for name, value in OTHERS.items():
        before = "16" if name == "fps" else ""
        for key, owner in (
            (f"exported weights: {name}", f"the model {tmp_path / 'exported'} (fingerprint "),
            (f"resumed: {name}", f"the checkpoint {short_run / 'iter_0000001'} (fingerprint "),
        ):
            assert owner in found[key], (key, found[key])
            assert f"latent spaces: {name} ({before}" in found[key], (key, found[key])
            assert f" against {value}); use the same" in found[key], (key, found[key])
    advice = "; prepare the data with the model's own autoencoder and text encoder"
    assert found["in_channels"] == f"the dataset's latents have 16 channels, the model takes 8{advice}"
    assert found["text_dim"] == f"the dataset's text embeddings are 32 wide, the model takes 16{advice}"
    assert "has another transformer than this run: text_len 32 where it has 16; set" in found["resumed: text_len"]
    assert "has another transformer than this run: patch_size (1, 1, 1) where it" in found["resumed: patch_size"]
    assert found["resumed"] == SHORT


def test_another_word_embedding_is_refused_by_name(short: Path, tmp_path: Path) -> None:
    other = shutil.copytree(short / "model", tmp_path / "model")
    tensors = load_file(other / "text_encoder/model.safetensors")
    save_file({**tensors, "shared.weight": tensors["shared.weight"].flip(0)}, other / "text_encoder/model.safetensors")
    earlier = changed(short, tmp_path / "earlier")
    file = earlier / "data/wan-data.json"
    manifest = json.loads(file.read_text())
    digest = manifest["latent_spec"].pop("text_encoder")
    file.write_text(json.dumps(manifest))
    length = f"model.transformer.text_len={SHORT}"
    wanted = {
        "weights": on(short, length, "--init-from", str(other)),
        "encoded by": on(short, f"dataset.encoded_by={other}"),
        "same": on(short, length, "--init-from", str(short / "model"), f"dataset.encoded_by={short / 'model'}"),
        "earlier": on(earlier, length, "--init-from", str(short / "model")),
        "earlier, encoded by": on(earlier, f"dataset.encoded_by={short / 'model'}"),
    }
    call("rank_calls:agreements", str(tmp_path / "found"), None, wanted)
    found = json.loads((tmp_path / "found").read_text())
    for key in ("weights", "encoded by"):
        assert f"the model {other} (fingerprint " in found[key], found[key]
        assert re.search(
            "are of different latent spaces: text_encoder \\([0-9a-f]{16} against [0-9a-f]{16}\\);", found[key]
        )
        assert digest in found[key]
    assert [found[key] for key in ("same", "earlier", "earlier, encoded by")] == [SHORT] * 3, found


def test_a_checkpoint_of_an_earlier_version_was_padded_to_512(
    short: Path, short_run: Path, tmp_path: Path, rewrite_record: Callable[[Path], None]
) -> None:
    shutil.copytree(short_run, tmp_path / "run")
    rewrite_record(tmp_path / "run")
    config, spec = read_run_config(find_checkpoint(tmp_path / "run"))
    assert (config.text_length, spec and spec.text_length) == (512, SHORT)
    wanted = {"as before": on(short, "model.transformer.text_len=512"), "as the data": on(short)}
    call("rank_calls:agreements", str(tmp_path / "found"), str(tmp_path / "run"), wanted)
    found = json.loads((tmp_path / "found").read_text())
    assert found["as before"] == 512
    assert "text_len 16 where it has 512; set model.transformer as it was" in found["as the data"]


@pytest.fixture
def rewrite_record() -> Callable[[Path], None]:
    """Leave out of the newest checkpoint's record what earlier versions did not write."""
    import yaml
    from training_runs import rewrite

    from wan_model.weights.training_checkpoint import RUN_CONFIG, read_run_settings

    def leave_out(folder: Path) -> None:
        checkpoint = find_checkpoint(folder)
        record = read_run_settings(checkpoint)
        del record["model"]["transformer"]["text_len"]
        del record["model"]["latent_spec"]["tokenizer"], record["model"]["latent_spec"]["fps"]
        del record["model"]["latent_spec"]["text_encoder"]
        rewrite(checkpoint, RUN_CONFIG, yaml.safe_dump(record))

    return leave_out
