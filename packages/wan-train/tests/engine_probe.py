"""Called in a process where the engine was started (``warm_ranks.Call``): try what it is for, write the results."""

import datetime
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from configuration_probe import configuration_answers, raises
from device_probe import cuda_build_answers, device_answers
from transformer_engine_probe import transformer_engine_answers


def _model_answers() -> dict[str, object]:
    from megatron.core import parallel_state

    from wan_model import WanConfig, save_transformer
    from wan_model.weights.transformer import expected_shapes
    from wan_train.config.options import RunOptions
    from wan_train.loop.run import _init_single_process_group, build_config
    from wan_train.model.provider import MegatronWanDiT, stage_of

    # A single process joins a group without any port.
    owned = _init_single_process_group("gloo")
    parallel_state.initialize_model_parallel()
    config = build_config(RunOptions("tiny"))
    config.model.finalize()
    model = config.model.provide(pre_process=True, post_process=True)
    sharded = model.sharded_state_dict()
    assert isinstance(model, MegatronWanDiT)
    stages = [
        [stage_of(config.model.wan_config, rank, 2).first, stage_of(config.model.wan_config, rank, 2).last]
        for rank in (0, 1)
    ]
    # Weights of another size than the recipe's, so that the sizes must come from them.
    folder = Path(tempfile.mkdtemp())
    small = WanConfig(num_heads=2, head_dim=12, num_layers=3, ffn_dim=40, text_dim=16, freq_dim=32)
    released = {
        key: torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for key, shape in expected_shapes(small).items()
    }
    save_transformer(released, small, folder / "transformer")
    started = build_config(RunOptions("tiny", init_from=str(folder)))
    started.model.finalize()
    loaded = started.model.provide(pre_process=True, post_process=True)
    return {
        "started from": loaded.dit.config == small
        and all(torch.equal(value, released[key]) for key, value in loaded.dit.named_parameters()),
        "joined": owned and torch.distributed.get_world_size() == 1,
        "keys": sorted(tensor.key for tensor in sharded.values()),
        "no attribute called decoder": not hasattr(model, "decoder"),
        "shares no embeddings": model.share_embeddings_and_output_weights is False,
        "stages": stages,
        "head is zero": float(model.dit.proj_out.weight.detach().abs().max()) == 0.0,
    }


def _precision_answers() -> dict[str, object]:
    """Of the model in the wrapper that Megatron puts around one that trains in bf16."""
    from megatron.core.transformer.module import Float16Module

    from wan_model import PackLayout
    from wan_train.config.options import RunOptions
    from wan_train.loop.run import build_config

    provider = build_config(RunOptions("tiny")).model
    provider.finalize()
    provider.bf16, provider.params_dtype = True, torch.bfloat16
    wrapped = Float16Module(provider, provider.provide(pre_process=True, post_process=True))
    seen: list[torch.Tensor] = []
    wrapped.module.dit.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    layout = PackLayout(((1, 2, 2), (1, 1, 2)))
    out = wrapped(
        tokens_SC=torch.ones(layout.total, 64),
        timesteps_B=torch.tensor([999.0, 0.1]),
        text_BTD=torch.ones(2, 4, provider.wan_config.text_dim, dtype=torch.bfloat16),
        layout=layout,
    )
    (timesteps,) = seen
    return {
        "weights": {key: str(weight.dtype) for key, weight in wrapped.module.dit.named_parameters()},
        "timesteps": [round(value, 6) for value in timesteps.tolist()],
        "velocity": str(out.dtype),
    }


def _group_answers() -> dict[str, object]:
    """Of the groups that the model's answers made."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    from torch.distributed import distributed_c10d as c10d

    groups = [group for group, (backend, _) in c10d._world.pg_map.items() if backend == "gloo"]
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    buffer = torch.arange(4.0)
    results = [
        function(buffer, buffer.view(2, 2).view(4), group=groups[-1], async_op=True)
        for function in (buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func)
    ]
    summed = torch.ones(2)
    torch.distributed.all_reduce(summed, group=groups[-1])
    # As torch makes them from 2.14 on.
    store, timeout = torch.distributed.HashStore(), datetime.timedelta(seconds=60)  # type: ignore[attr-defined]
    newer: Any = c10d.ProcessGroupGloo(store, 0, 1, timeout=timeout, enable_reconfigure=False)  # type: ignore[call-arg]
    return {
        "groups": len(groups),
        "threads on the network": threads.count("gloo_tcp_loop"),
        "nothing started for a group of one": results == [None, None] and buffer.tolist() == [0, 1, 2, 3],
        "they work": summed.tolist() == [1, 1],
        "with a switch that is off": newer.size() == 1,
        "of torch's class": all(
            isinstance(group._get_backend(torch.device("cpu")), c10d.ProcessGroupGloo) for group in groups
        ),
    }


def _determinism_answers() -> dict[str, object]:
    from wan_train.config.options import RunOptions
    from wan_train.config.settings import check_settings, derive_settings
    from wan_train.loop.run import build_config

    def build(*overrides: str) -> Any:
        return build_config(RunOptions("tiny", "pretrain", None, ("model.deterministic_mode=true", *overrides)))

    def refused(variable: str, value: str) -> str:
        os.environ[variable] = value
        try:
            return raises(lambda: check_settings(build()))
        finally:
            del os.environ[variable]

    names = ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")
    before = {name: os.environ.pop(name, None) for name in names}
    config = build()
    check_settings(config)
    derive_settings(config, on_cpu=True)
    try:
        config._validate_and_apply_deterministic_mode()  # Megatron-Bridge's
        return {
            "environment": [os.environ.pop(name) for name in names],
            "torch": torch.are_deterministic_algorithms_enabled(),
            "cudnn": raises(lambda: check_settings(build("model.attention=cudnn"))),
            "nccl": refused("NCCL_ALGO", "PAT"),
            "transformer engine": refused("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
        }
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _keys_of_this_version() -> dict[str, str]:
    """What is said about each key that only some versions have, with a value that it may not have."""
    from wan_train.config.options import RunOptions
    from wan_train.config.settings import check_settings
    from wan_train.engine.upstream.configuration import ONLY
    from wan_train.loop.run import build_config

    said = {}
    for key, possible, _ in ONLY:
        config = build_config(RunOptions("tiny"))
        assert "another" not in possible
        check_settings(config)
        *section, name = key.split(".")
        setattr(functools.reduce(getattr, section, config), name, "another")
        said[key] = raises(lambda config=config: check_settings(config))
    return said


def _exit_status(status: object) -> object:
    """What ``pretrain`` makes of Megatron-Bridge's loop that leaves with that status."""
    import megatron.bridge.training.pretrain as bridge

    from wan_train.config.options import RunOptions
    from wan_train.loop.run import pretrain

    original = bridge.pretrain

    def leave(*args: object, **kwargs: object) -> None:
        raise SystemExit(status)

    bridge.pretrain = leave
    try:
        pretrain(RunOptions("tiny", mock=True))
    except SystemExit as stop:
        return stop.code
    finally:
        bridge.pretrain = original
    return "returned"


def _dropout_answers() -> dict[str, object]:
    from types import SimpleNamespace

    from wan_model.flow import FlowMatching
    from wan_model.tiny import TINY_CONFIG
    from wan_train.data.dataset import empty_caption_of
    from wan_train.data.mock_data import MockConfig, MockLoader
    from wan_train.data.pack_iterator import NumberedPack
    from wan_train.loop.step import WanForwardStep

    settings = MockConfig(shapes=[[1, 4, 4]], context_length=16, number_packed_samples=3)
    pack = next(iter(MockLoader(settings, TINY_CONFIG, rank=0, ranks=1, multiple=1, seed=0)))
    empty, seen = torch.ones(2, TINY_CONFIG.text_dim), []

    def model(*, tokens_SC: torch.Tensor, text_BTD: torch.Tensor, **_: object) -> torch.Tensor:
        seen.append((tokens_SC, text_BTD))
        return tokens_SC

    for dropout, given in ((0.0, None), (1.0, empty)):
        flow = FlowMatching(caption_dropout=dropout)
        configuration = SimpleNamespace(flow=flow, wan_config=TINY_CONFIG, lora=None)
        state = SimpleNamespace(cfg=SimpleNamespace(model=configuration, rng=SimpleNamespace(seed=1)))
        WanForwardStep(torch.device("cpu"), torch.float32, given)(state, iter([NumberedPack(0, pack)]), model)

    def configured(**changes: object) -> SimpleNamespace:
        dataset = SimpleNamespace(**{"mock": False, "path": "absent", **changes})
        flow = FlowMatching(caption_dropout=0.1)
        return SimpleNamespace(model=SimpleNamespace(flow=flow, wan_config=TINY_CONFIG), dataset=dataset)

    (tokens, texts), (same_tokens, dropped) = seen
    mock = empty_caption_of(configured(mock=True))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".nv-meta").mkdir()
        (Path(folder) / ".nv-meta" / "dataset.yaml").write_bytes(
            b"__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )
        (Path(folder) / ".nv-meta" / "split.yaml").write_text("split_parts: {train: []}\nexclude: []\n")
        (Path(folder) / ".nv-meta" / ".info.json").write_text('{"shard_counts": {}}')
        refused = raises(lambda: empty_caption_of(configured(path=folder)))
    return {
        "kept": torch.equal(texts, pack.text_BTD),
        "dropped": torch.equal(dropped[:, :2], empty.expand(3, 2, -1)) and not dropped[:, 2:].any().item(),
        "noise stays": torch.equal(tokens, same_tokens),
        "mock": None if mock is None else list(mock.shape),
        "refused": refused,
    }


def _nan_guard_answers() -> dict[str, object]:
    """What the guard makes of each gradient norm, of a plain optimizer and of a chained one."""
    from types import SimpleNamespace

    from wan_train.loop import nan_guard

    nan_guard._explain = lambda step, number, norm: f"{norm} at step {number}"  # type: ignore[assignment]

    def outcome(norm: float | None, name: str) -> object:
        chained = {"chained_optimizers": []} if name == "get_grad_norm" else {}
        optimizer = SimpleNamespace(**{name: lambda: norm}, **chained)
        nan_guard.guard_gradient(optimizer, None, lambda: 6)  # type: ignore[arg-type]
        try:
            return getattr(optimizer, name)()
        except nan_guard.NonFiniteGradientError as error:
            return str(error)

    norms = (float("nan"), float("inf"), float("-inf"), 3.5, None)
    return {name: [outcome(norm, name) for norm in norms] for name in ("clip_grad_norm", "get_grad_norm")}


def _left_out_answers() -> dict[str, object]:
    """What the engine was imported without, and what whoever imports it afterwards gets."""
    names = ("transformer_engine", "modelopt", "transformers", "datasets")
    left = [name for name in names if name in sys.modules]
    import datasets
    import transformers

    return {"left behind": left, "real": [datasets.Dataset.__module__, transformers.PretrainedConfig.__module__]}


def probe(results: str) -> None:
    from wan_train import engine

    started = engine.start()
    import megatron.bridge.training.pretrain
    import megatron.core.extensions.transformer_engine as core_te
    from megatron.bridge.models import GPTModelProvider
    from megatron.core.fusions.fused_bias_gelu import bias_gelu as bias_gelu_impl
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    answers: dict[str, object] = {
        "engine": [str(started.device), started.backend, started.transformer_engine],
        "started twice is the same": engine.start() is started,
        "core has te": core_te.HAVE_TE,
        "stand-ins": _left_out_answers(),
        "model families": [name for name in sys.modules if name.startswith("megatron.bridge.models.qwen")],
        "providers": GPTModelProvider.__module__,
        "bridge imported": megatron.bridge.training.pretrain.__name__,
        "compiled by Megatron": hasattr(bias_gelu_impl, "_torchdynamo_orig_callable"),
        "torch.compile is torch's": torch.compile.__module__,
        "devices": device_answers(),
        "cuda build": cuda_build_answers() if started.backend == "gloo" else {},
        "configuration": configuration_answers(),
        "determinism": _determinism_answers(),
        "keys of this version": _keys_of_this_version(),
        "model": _model_answers(),
        "transformer engine": transformer_engine_answers(),
        "precision": _precision_answers(),
        "groups": _group_answers(),
        "dropout": _dropout_answers(),
        "nan guard": _nan_guard_answers(),
        "exit statuses": [_exit_status(status) for status in (0, None, 3)],
    }
    model_parallel_cuda_manual_seed(5)
    with get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    answers["rng tracker runs"] = bool((first >= 0).all())
    Path(results).write_text(json.dumps(answers))
