"""The engine where there is no CUDA, obstacle by obstacle; and with CUDA, that nothing is redirected."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from wan_model.tiny import TINY_CONFIG
from wan_model.weights.transformer import expected_shapes


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)


needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here, nothing is redirected")


@needs_no_cuda
def test_starts_on_the_cpu_with_gloo(probed: dict[str, Any]) -> None:
    assert probed["engine"] == ["cpu", "gloo", False]
    assert probed["started twice is the same"]


@needs_no_cuda
def test_bridge_is_importable_without_transformer_engine_and_core_knows(probed: dict[str, Any]) -> None:
    assert probed["bridge imported"] == "megatron.bridge.training.pretrain"
    assert probed["core has te"] is False
    assert probed["stand-ins"]["left behind"] == []
    assert probed["stand-ins"]["real"] == ["datasets.arrow_dataset", "transformers.configuration_utils"]
    assert probed["providers"] == "megatron.bridge.models.gpt_provider"
    assert probed["model families"] == []


@needs_no_cuda
@pytest.mark.parametrize(
    "way", ["by name", "by number", "by object", "moved", "moved by method", "module", "cpu stays"]
)
def test_tensors_for_cuda_land_on_the_cpu(probed: dict[str, Any], way: str) -> None:
    assert probed["devices"][way] == "cpu"


@needs_no_cuda
def test_the_current_device_is_a_number_and_the_type_name_is_cudas(probed: dict[str, Any]) -> None:
    assert probed["devices"]["index is int"]
    assert probed["devices"]["type name"] == "torch.cuda.FloatTensor"


@needs_no_cuda
def test_custom_backwards_and_hooks_are_redirected_too(probed: dict[str, Any]) -> None:
    assert probed["devices"]["gradient of custom backward"] == [2.0, 2.0]
    assert probed["devices"]["gradient of hook"] == [3.0, 3.0]


@needs_no_cuda
def test_a_cuda_build_of_torch_needs_no_driver(probed: dict[str, Any]) -> None:
    found = probed["cuda build"]
    assert found["stepped"] == pytest.approx([-0.5, -0.5])
    assert found["capturing"] == [False, False]
    assert found["accelerators"] == [False, False, 0]


@needs_no_cuda
def test_no_compiler_and_a_working_rng_tracker(probed: dict[str, Any]) -> None:
    assert not probed["compiled by Megatron"]
    assert probed["torch.compile is torch's"] == "torch"
    assert probed["rng tracker runs"]


@needs_no_cuda
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have names on Linux only")
def test_groups_leave_the_cores_to_the_computation(probed: dict[str, Any]) -> None:
    groups = probed["groups"]
    assert groups["groups"] > 10
    assert groups["threads on the network"] == 1
    assert groups["nothing started for a group of one"]
    assert groups["they work"]
    assert groups["with a switch that is off"]
    assert groups["of torch's class"]


def test_one_process_needs_no_port(probed: dict[str, Any]) -> None:
    assert probed["model"]["joined"]


def test_the_model_is_what_the_schedules_and_checkpoints_expect(probed: dict[str, Any]) -> None:
    model = probed["model"]
    assert model["keys"] == sorted(expected_shapes(TINY_CONFIG))
    assert model["no attribute called decoder"]
    assert model["shares no embeddings"]
    assert model["stages"] == [[0, 1], [1, 2]]
    assert model["head is zero"]


def test_dropped_captions_become_the_datasets_empty_one(probed: dict[str, Any]) -> None:
    dropout = probed["dropout"]
    assert dropout["kept"]
    assert dropout["dropped"]
    assert dropout["noise stays"]
    assert dropout["mock"] == [1, TINY_CONFIG.text_dim]
    assert "holds no embedding of the empty caption" in dropout["refused"]
    assert "run wan-data prepare again with the same arguments" in dropout["refused"]


def test_training_starts_from_released_weights_of_whatever_size(probed: dict[str, Any]) -> None:
    assert probed["model"]["started from"]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("unknown key", "unknown configuration key train.train_iter; the nearest known one is train.train_iters"),
        ("unknown section", "unknown configuration key trian; the nearest known one is train"),
        ("unknown recipe", "unknown recipe 'huge'; expected one of wan_1_3b, wan_1_3b_t2i, wan_14b, wan_14b_t2i, tiny"),
        ("no weights", "absent: expected a folder in diffusers' layout"),
        ("wrong kind", "train.train_iters is 'many'; expected"),
        ("bad flow", "model.flow.density is 'cauchy'; expected one of uniform, logit_normal, mode, lognorm"),
        ("layout", "3 processes cannot be laid out as tensor 2 x pipeline 1 x context 1"),
        ("batch", "train.global_batch_size is 1 packs, which 2 data-parallel ranks cannot share equally"),
        ("fsdp", "not with pipeline parallelism; set pipeline_model_parallel_size to 1"),
        ("heads", "4 attention heads cannot be split over tensor_model_parallel_size 3"),
        ("no data", "set dataset.path=FOLDER, or use --mock for random data"),
        ("absent data", "which does not exist; make one with wan-data prepare"),
        ("two kinds of data", "and not both"),
    ],
)
def test_bad_configuration_is_one_sentence(probed: dict[str, Any], case: str, sentence: str) -> None:
    assert sentence in probed["configuration"][case]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(probed: dict[str, Any]) -> None:
    assert probed["configuration"]["file then command line"] == [9, 4.0, 1e-5]


def test_the_tutorials_settings_are_understood(probed: dict[str, Any]) -> None:
    found = probed["configuration"]
    assert found["tutorial"] == [2, 4, 40000, 50, 2]
    said = "model.qkv_format is 'sbhd'; every batch is a pack, so set it to thd or leave it out"
    assert found["other format"] == said


def test_the_rate_decays_over_the_run_and_weights_by_the_optimizers_decay(probed: dict[str, Any]) -> None:
    """Megatron takes the scheduler's weight decay and passes over the optimizer's in silence."""
    found = probed["configuration"]
    assert found["settled"] == [7, 0.5, 0.5]
    assert found["settled otherwise"] == [3, 0.01, 0.1]
    assert found["warming up to the end"] == 10


def test_deterministic_mode_sets_what_every_library_needs(probed: dict[str, Any]) -> None:
    found = probed["determinism"]
    assert found["environment"] == ["Ring", ":4096:8", "0"]
    assert found["torch"] is True
    assert "cudnn, whose backward pass is not deterministic" in found["cudnn"]
    assert found["nccl"].startswith("NCCL_ALGO is 'PAT' and model.deterministic_mode is true")
    assert found["transformer engine"].endswith("unset NVTE_ALLOW_NONDETERMINISTIC_ALGO")


def test_keys_that_only_some_versions_have_are_not_ignored(probed: dict[str, Any]) -> None:
    found = probed["keys of this version"]
    assert {"train.eval_iters", "train.skip_train", "inprocess_restart"} <= set(found)
    assert all(said.startswith(f"{key} is 'another'; ") for key, said in found.items())


def test_training_modes_are_presets_of_the_objective(probed: dict[str, Any]) -> None:
    assert probed["configuration"]["finetune"] == ["uniform", 3.0]


def test_a_failure_of_the_loop_is_not_an_exit_status_of_0(probed: dict[str, Any]) -> None:
    """It leaves with 0 at train.exit_interval, and with others where it gives up."""
    assert probed["exit statuses"] == ["returned", "returned", 3]


def test_with_cuda_nothing_is_redirected() -> None:
    script = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda rank: None
torch.cuda.device_count = lambda: 2
zeros, backward = torch.zeros, torch.autograd._engine_run_backward
import wan_train.engine as engine, wan_train.engine.cpu as cpu
def refuse(): raise SystemExit("redirected")
cpu.redirect = refuse
started = engine.start()
assert (str(started.device), started.backend) == ("cuda:0", "nccl"), started
assert torch.autograd._engine_run_backward is backward
assert torch.zeros(1).type() == "torch.FloatTensor"
"""
    done = python("-c", script + _WITHOUT_LANGUAGE_MODELS)
    assert done.returncode == 0, done.stderr


_WITHOUT_LANGUAGE_MODELS = """
import sys
import megatron.bridge.training.initialize as initialize
from wan_train.engine.upstream.replace import nothing
assert initialize._warmup_jit_function is nothing
families = ("megatron.bridge.models.qwen", "megatron.bridge.models.llama")
assert not [name for name in sys.modules if name.startswith(families)]
assert not {"modelopt", "transformers", "datasets"} & set(sys.modules)
"""
# As on Python 3.13, for which there is no wheel. Core from 0.17 on needs it.
_WITHOUT_RESILIENCY_EXT = """
import importlib.abc, sys
from wan_train.engine import installed
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ("nvidia_resiliency_ext", "regex"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
absent = installed.resiliency_for(installed._folder("megatron.core")) is None
if absent:
    sys.meta_path.insert(0, Absent())
"""
_IT_WAS_ABSENT = """
import megatron.bridge.training.checkpointing as checkpointing, megatron.bridge.training.pretrain as pretrain
from wan_train.engine.absent_modules import AbsentClass
if absent:
    assert not [name for name in sys.modules if name.startswith(("nvidia_resiliency_ext", "regex"))]
    assert checkpointing.HAVE_RESIL is False
    assert pretrain.CallWrapper is AbsentClass
"""


def test_with_cuda_and_transformer_engine_it_starts_without_language_models_too() -> None:
    """With a stand-in whose classes cannot be made, and without modelopt and nvidia-resiliency-ext."""
    script = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda rank: None
torch.cuda.device_count = lambda: 1
from wan_train.engine import absent_modules
class StandIn(absent_modules._Finder):
    def exec_module(self, module):
        super().exec_module(module)
        module.__version__ = "2.12.0"
sys.meta_path.insert(0, StandIn(["transformer_engine", "transformer_engine_torch"]))
import wan_train.engine as engine
assert engine.start().transformer_engine
import megatron.core.extensions.transformer_engine as core_te
assert core_te.HAVE_TE
from wan_train.model.transformer_engine_ops import TransformerEngineOps
"""
    done = python("-c", _WITHOUT_RESILIENCY_EXT + script + _WITHOUT_LANGUAGE_MODELS + _IT_WAS_ABSENT)
    assert done.returncode == 0, done.stderr


def test_more_processes_than_gpus_are_one_sentence() -> None:
    script = """
import os, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
os.environ["LOCAL_RANK"] = "2"
import wan_train.engine as engine
engine.start()
"""
    said = python("-c", script).stderr
    assert "this is process 3 of its machine, which has 2 GPUs; start one for each: --nproc-per-node 2" in said


def test_importing_the_package_and_its_worker_starts_nothing() -> None:
    script = """
import sys
import wan_train, wan_train.launch.worker, wan_train.cli, wan_train.config.options
heavy = {"torch", "megatron", "einops"} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu")
def test_starts_on_cuda_with_nccl() -> None:
    # In a process of its own: ranks that are forked from one with the engine could not use CUDA.
    done = python("-c", "from wan_train import engine; it = engine.start(); print(it.device, it.backend)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["cuda:0", "nccl"]
