"""Functions that a process with the engine imported is asked to call, see ``warm_ranks.Call``."""

import contextlib
import dataclasses
import importlib.machinery
import json
import os
import sys
from pathlib import Path
from typing import Any

_LASTING = contextlib.ExitStack()  # until the process ends


def command_lines(results: str, wanted: dict[str, list[str]]) -> None:
    """``wan-train`` with each list of arguments; by key the exit status, the output and the errors."""
    from click.testing import CliRunner

    from wan_train.cli import main

    found = {}
    for key, arguments in wanted.items():
        result = CliRunner().invoke(main, arguments)
        found[key] = [result.exit_code, result.stdout, result.stderr]
    Path(results).write_text(json.dumps(found))


def alive_adapters() -> None:
    """Make this process draw B of new adapters too: behind zeros nothing has a gradient yet."""
    from wan_model.weights import transformer

    initial = transformer.initial_tensor

    def drawn(key: str, shape: tuple[int, ...], *, seed: int) -> Any:
        is_up = key.endswith("lora_B.weight")
        return initial(key.replace("lora_B", "lora_A") if is_up else key, shape, seed=seed)

    transformer.initial_tensor = drawn


def note_base(path: str) -> None:
    """Write down, after every step, the digests of all weights but adapters, by key, of a model that no rank splits."""
    import hashlib

    from wan_model.dit.lora import is_adapter_key
    from wan_train.loop.callback import WanCallback

    end = WanCallback.on_train_step_end

    def noting_end(self: Any, context: Any) -> None:
        end(self, context)
        digests = {
            key.split("dit.", 1)[1]: hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()
            for key, weight in context.model[0].named_parameters()
            if not is_adapter_key(key)
        }
        Path(path).write_text(json.dumps(digests))

    WanCallback.on_train_step_end = noting_end  # type: ignore[method-assign]


def note_commands(path: str) -> None:
    """Write down every command that this process runs by ``os.system``."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.system":
            with open(path, "a", encoding="utf-8") as file:
                file.write(repr(arguments))

    sys.addaudithook(hook)


def note_settings(path: str) -> None:
    """Write down, as a line of JSON each, what every step is computed with."""
    import torch

    from wan_model.flow import FlowMatching
    from wan_train.loop import validation
    from wan_train.loop.callback import WanCallback
    from wan_train.model.provider import MegatronWanDiT

    corrupt, forward, end = FlowMatching.corrupt, MegatronWanDiT.forward, WanCallback.on_train_step_end
    corrupt_at = validation.corrupt_at

    def note(**entry: Any) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def noting_corrupt(self: FlowMatching, pack: Any, generator: Any, *rest: Any) -> Any:
        samples = pack.layout.num_samples
        first = float(pack.tokens_SC[0, 0])
        note(**dataclasses.asdict(self), noise_seed=generator.initial_seed(), samples_of_pack=samples, first=first)
        return corrupt(self, pack, generator, *rest)

    def noting_corrupt_at(pack: Any, timestep: float, seed: int) -> Any:
        note(validation_seed=seed)
        return corrupt_at(pack, timestep, seed)

    def noting_forward(self: Any, **arguments: Any) -> Any:
        deterministic = torch.are_deterministic_algorithms_enabled()
        note(recompute=self.dit.recompute, attention=self.dit.ops.kind, deterministic=deterministic)
        return forward(self, **arguments)

    def noting_end(self: Any, context: Any) -> None:
        for group in context.optimizer.param_groups:
            if group:
                note(**{name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "wd_mult")})
        names = ("overlap_grad_reduce", "overlap_param_gather", "grad_reduce_in_fp32", "bucket_size")
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        note(timeout=backend.options._timeout.total_seconds())
        note(ddp={name: getattr(context.model[0].ddp_config, name) for name in names})
        end(self, context)

    validation.corrupt_at = noting_corrupt_at
    FlowMatching.corrupt = noting_corrupt  # type: ignore[method-assign]
    MegatronWanDiT.forward = noting_forward  # type: ignore[method-assign]
    WanCallback.on_train_step_end = noting_end  # type: ignore[method-assign]


def note_async_saves(path: str) -> None:
    """Write down a line for each save that another process writes."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    schedule = AsyncCallsQueue.schedule_async_request

    def noting(self: Any, *arguments: Any, **options: Any) -> Any:
        with open(path, "a", encoding="utf-8") as file:
            file.write("scheduled\n")
        return schedule(self, *arguments, **options)

    AsyncCallsQueue.schedule_async_request = noting


def note_wandb(path: str) -> None:
    """A Weights & Biases that writes down what a run is begun with, and the names of each step's curves."""
    from unittest import mock

    def note(**entry: Any) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    wandb = mock.MagicMock()
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)  # Bridge 0.6 looks for it
    wandb.init.side_effect = lambda **given: note(begun={key: given[key] for key in ("project", "name", "dir")})
    wandb.log.side_effect = lambda values, step: note(step=step, curves=sorted(values))
    sys.modules["wandb"] = wandb


def started_before(minutes: float) -> None:
    """Let a run have started that long ago."""
    from megatron.bridge.training.state import GlobalState

    create = GlobalState.__init__

    def create_earlier(self: Any, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        self.start_time -= 60 * minutes

    GlobalState.__init__ = create_earlier


def see_stopped_children_after(seconds: float) -> None:
    """The time that a child process may be stopped."""
    from wan_train.launch import stopped_children

    stopped_children.STOPPED_SECONDS, stopped_children._POLL_SECONDS = seconds, seconds / 4


def resume_errors(results: str, folder: str, wanted: dict[str, list[str]]) -> None:
    """By key the error of resuming the newest checkpoint of a run with these options, or None."""
    from wan_train.checkpoint.changes import check_resume
    from wan_train.checkpoint.folder import find_resume_point
    from wan_train.cli import pretrain
    from wan_train.config.options import RunOptions
    from wan_train.loop.run import build_config, check_layout

    found: dict[str, str | None] = {}
    for key, arguments in wanted.items():
        given = pretrain.make_context("pretrain", arguments).params
        ranks = given.pop("nproc_per_node")
        options = RunOptions(**{name: given[name] for name in RunOptions.__dataclass_fields__ if name in given})
        point = find_resume_point(Path(folder))
        assert point is not None
        try:
            config = build_config(options)
            check_resume(config, check_layout(config, ranks), point)
            found[key] = None
        except ValueError as error:
            found[key] = str(error)
    Path(results).write_text(json.dumps(found))


def note_texts(path: str) -> None:
    """Write down, as a line of JSON each, the shape of the texts that the model is given, and their embedded tokens."""
    import torch

    from wan_train.model.provider import MegatronWanDiT

    forward = MegatronWanDiT.forward

    def noting_forward(self: Any, *, text_BTD: torch.Tensor, **arguments: Any) -> Any:
        with open(path, "a", encoding="utf-8") as file:
            tokens = text_BTD.any(dim=-1).sum(dim=-1).tolist()
            file.write(json.dumps([self.training, list(text_BTD.shape), tokens]) + "\n")
        return forward(self, text_BTD=text_BTD, **arguments)

    MegatronWanDiT.forward = noting_forward  # type: ignore[method-assign]


def agreements(results: str, folder: str | None, wanted: dict[str, list[str]]) -> None:
    """By key what a run with these options says of its data and its model: an error, or what texts are padded to.

    With a folder of checkpoints the run would resume from it.
    """
    from wan_train.checkpoint.changes import check_resume
    from wan_train.checkpoint.folder import find_resume_point
    from wan_train.cli import pretrain
    from wan_train.config.options import RunOptions
    from wan_train.loop.run import build_config, check_layout, configure_data

    found: dict[str, object] = {}
    for key, arguments in wanted.items():
        given = pretrain.make_context("pretrain", arguments).params
        ranks = given.pop("nproc_per_node")
        options = RunOptions(**{name: given[name] for name in RunOptions.__dataclass_fields__ if name in given})
        try:
            config = build_config(options)
            layout = check_layout(config, ranks)
            configure_data(config, layout)
            if folder is not None:
                point = find_resume_point(Path(folder))
                assert point is not None
                check_resume(config, layout, point)
            assert config.model.wan_config.text_length == config.model.transformer["text_len"]
            found[key] = config.model.transformer["text_len"]
        except ValueError as error:
            found[key] = str(error)
    Path(results).write_text(json.dumps(found))


def note_opened(path: str, folder: str) -> None:
    """Write down, below ``folder``, every file that this process opens."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened = os.fspath(arguments[0])
            if isinstance(opened, str) and opened.startswith(f"{folder}{os.sep}"):
                with open(path, "a") as notes:
                    notes.write(f"{opened.removeprefix(folder + os.sep)}\n")

    sys.addaudithook(hook)


def apply_permissions() -> None:
    """Let permissions of files hold for this process and what it starts, also if it is root's."""
    from wan_model.testing.permissions import permissions_apply

    _LASTING.enter_context(permissions_apply())


def fill_output() -> None:
    """Make standard output a device that is full."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def close_output() -> None:
    """Make standard output a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def note_drawing_threads(path: str) -> None:
    """Write down, in steps, between them and at the end, how many threads draw a pack.

    None is drawn ahead before it is waited for, which takes 0.1 seconds besides.
    """
    import threading
    import time

    import wan_train.data.pack_iterator as pack_iterator
    from wan_train.data.dataset import WanDatasetConfig
    from wan_train.loop.callback import WanCallback

    draw, settle = pack_iterator._PrefetchedPack._draw, pack_iterator._PrefetchedPack.settle
    end, close = WanCallback.on_train_step_end, WanDatasetConfig.close

    def asked(ahead: Any) -> threading.Event:
        event: threading.Event = vars(ahead).setdefault("asked", threading.Event())
        return event

    def note(when: str) -> None:
        drawing = [thread for thread in threading.enumerate() if thread.name == "next pack"]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([when, len(drawing)]) + "\n")

    def late_draw(self: Any) -> None:
        assert asked(self).wait(60)
        draw(self)

    def slow_settle(self: Any, seconds: float | None = None) -> None:
        asked(self).set()
        time.sleep(0.1)
        settle(self, seconds)

    def noting_end(self: Any, context: Any) -> None:
        note("in a step")
        end(self, context)
        note("between steps")

    def noting_close(self: Any) -> None:
        close(self)
        note("at the end")

    pack_iterator._PrefetchedPack._draw = late_draw  # type: ignore[method-assign]
    pack_iterator._PrefetchedPack.settle = slow_settle  # type: ignore[method-assign]
    WanCallback.on_train_step_end = noting_end  # type: ignore[method-assign]
    WanDatasetConfig.close = noting_close  # type: ignore[method-assign]


def keep_latents(folder: str) -> None:
    """Keep the latents that the last rank decodes, by step and name."""
    import torch

    from wan_train.sampling.output import VideoWriter

    write_one = VideoWriter._write_one

    def keeping_write_one(self: VideoWriter, step: int, request: Any, latent: Any, state: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(latent.cpu(), Path(folder) / f"{step}-{request.name}.pt")
        write_one(self, step, request, latent, state)

    VideoWriter._write_one = keeping_write_one  # type: ignore[method-assign]


def compare_states(path: str) -> None:
    """Write down, for each time of sampling, whether what training goes on from is as before."""
    import random

    import numpy as np
    import torch

    from wan_train.sampling.sampler import TrainingSampler

    sample = TrainingSampler.run

    def state_of(context: Any) -> dict[str, Any]:
        named = [pair for part in context.model for pair in part.named_parameters()]
        return {
            "torch": torch.get_rng_state().tolist(),
            "numpy": str(np.random.get_state()),  # noqa: NPY002  Megatron seeds it
            "python": random.getstate(),
            "modes": [module.training for part in context.model for module in part.modules()],
            "gradients": torch.is_grad_enabled(),
            **{key: value.detach().clone() for key, value in named},
        }

    def comparing_run(self: TrainingSampler, context: Any, done: int) -> Any:
        before = state_of(context)
        result = sample(self, context, done)
        after = state_of(context)
        same = {
            name: torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
            for name, value in before.items()
        }
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(same) + "\n")
        return result

    TrainingSampler.run = comparing_run  # type: ignore[method-assign]


def slow_decoder(seconds: float) -> None:
    """Let every video take that long to decode."""
    import time

    from wan_train.sampling.output import VideoWriter

    write_one = VideoWriter._write_one

    def slow_write_one(self: VideoWriter, *arguments: Any) -> None:
        time.sleep(seconds)
        write_one(self, *arguments)

    VideoWriter._write_one = slow_write_one  # type: ignore[method-assign]


def follow_captions() -> None:
    """Let validations find a model that errs by 1 with a sample's own caption, and by 2 with another."""
    import itertools

    import torch

    from wan_train.loop import validation
    from wan_train.model.provider import MegatronWanDiT

    corrupt_at, forward = validation.corrupt_at, MegatronWanDiT.forward
    current: list[Any] = []
    own: dict[str, Any] = {}  # the loss comes first, which has each sample's own caption

    def noting_corrupt_at(pack: Any, timestep: float, seed: int) -> Any:
        noisy = corrupt_at(pack, timestep, seed)
        current.append((pack, noisy))
        return noisy

    def following_forward(self: Any, **arguments: Any) -> Any:
        if not current:
            return forward(self, **arguments)
        pack, noisy = current.pop()
        predicted = noisy.target_SC.clone()
        for key, text, (start, stop) in zip(
            pack.keys, arguments["text_BTD"], itertools.pairwise(pack.layout.offsets), strict=True
        ):
            predicted[start:stop] += 1 if torch.equal(own.setdefault(key, text), text) else 2
        return predicted

    validation.corrupt_at = noting_corrupt_at
    MegatronWanDiT.forward = following_forward  # type: ignore[method-assign]
