import importlib.metadata
import importlib.util
import json

import pytest
from data_command import run

from wan_data.energon import pipeline
from wan_data.energon.version import energon_version, unusable
from wan_data.reading.loader import LoaderConfig, PackLoader


@pytest.fixture
def installed(monkeypatch):
    def set_version(number):
        def version(name):
            assert name == "megatron-energon"
            if number is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return number

        monkeypatch.setattr("wan_data.energon.version.version", version)

    return set_version


@pytest.mark.parametrize("number", ["6.0.1", "6.0.1.post1", "6.1", "7.0.0", "7.4.1", "7.10.0rc1", "7.5.0+nv26.8"])
def test_versions_from_6_0_1_to_below_8_are_accepted(installed, number):
    installed(number)
    assert energon_version() == number


@pytest.mark.parametrize("number", ["5.2.0", "6.0.0", "6.0", "8.0.0", "8.0.0a1", "10.1", "unknown"])
def test_others_are_refused_with_what_was_found_and_what_is_needed(installed, dataset, number):
    installed(number)
    with pytest.raises(ValueError, match=r"^Megatron-Energon (.*) is installed; wan-data needs (.*)$") as caught:
        PackLoader(LoaderConfig(str(dataset), capacity=200), rank=0, world_size=1)
    assert str(caught.value).split()[1] == number
    assert str(caught.value).endswith("megatron-energon>=6.0.1,<8")
    assert str(unusable("anything")) == str(caught.value)


def test_a_missing_energon_is_refused(installed):
    installed(None)
    with pytest.raises(ValueError, match=r"^Megatron-Energon is not installed; wan-data needs megatron-energon>="):
        energon_version()


def test_prepare_refuses_before_it_encodes(installed, clips, tiny_model, tmp_path):
    installed("8.0.0")
    arguments = ["prepare", "--video-folder", clips, "--output-folder", tmp_path / "out", "--model", tiny_model]
    done = run(*arguments)
    assert done.exit_code == 1
    assert (
        done.output.strip() == "Error: Megatron-Energon 8.0.0 is installed; wan-data needs megatron-energon>=6.0.1,<8"
    )
    assert not (tmp_path / "out").exists()


def imported_anew():
    spec = importlib.util.spec_from_file_location("another_pipeline", pipeline.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def test_an_energon_that_lacks_a_class_is_refused(monkeypatch, installed):
    monkeypatch.delattr("megatron.energon.wrappers.BlendDataset")
    installed("7.9.0")
    with pytest.raises(ValueError, match=r"7\.9\.0 cannot be used: cannot import name 'BlendDataset' .* tested with"):
        imported_anew()
    installed("5.2.0")
    with pytest.raises(ValueError, match=r"Megatron-Energon 5\.2\.0 is installed; wan-data needs"):
        imported_anew()
    monkeypatch.undo()
    imported_anew()


def test_a_state_of_another_version_is_refused(installed, dataset):
    def loader():
        return PackLoader(LoaderConfig(str(dataset), capacity=200), rank=0, world_size=1)

    installed("7.4.0")
    state = json.loads(json.dumps(loader().state_dict()))
    loader().load_state_dict(state)
    installed("7.4.1")
    with pytest.raises(
        ValueError, match=r"saved with Megatron-Energon 7\.4\.0, and 7\.4\.1 is installed, .* resume with"
    ):
        loader().load_state_dict(state)
