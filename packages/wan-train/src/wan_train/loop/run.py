"""A training run from its options: the same steps on every rank.

``pretrain`` is the whole of it: start the engine, build the configuration, check what can be checked before the first
step, and hand over to Megatron-Bridge's own loop.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from wan_train import engine
from wan_train.checkpoint.folder import ResumePoint, find_resume_point, saved_steps
from wan_train.config.options import DEFAULT_RECIPE, RunOptions
from wan_train.config.overrides import apply_overrides, apply_sections, read_file
from wan_train.config.shipped_configs import find
from wan_train.model.layout import Layout


def build_config(options: RunOptions) -> Any:
    """Recipe, then file, then overrides.

    Raises:
        ValueError: an unknown recipe, key or value.
    """
    from wan_model.weights.transformer import read_config
    from wan_train.config.recipes import RECIPES
    from wan_train.model.provider import transformer_folder

    sections = read_file(find(options.config_file)) if options.config_file else {}
    named = sections.pop("recipe", None)
    if options.recipe is not None and named is not None and options.recipe != named:
        raise ValueError(f"--recipe is {options.recipe} and {options.config_file} is for {named}; leave --recipe out")
    recipe = options.recipe or named or DEFAULT_RECIPE
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; expected one of {', '.join(RECIPES)}")
    config = RECIPES[recipe](options.training_mode)
    apply_sections(config, sections)
    apply_overrides(config, options.overrides)
    if options.mock:
        config.dataset.mock = True
    if options.init_from:
        config.model.init_from = options.init_from
    if config.model.init_from is not None:
        # The weights say what the sizes are.
        config.model.transformer = read_config(transformer_folder(config.model.init_from)).to_diffusers()
    return config


def check_layout(config: Any, world: int) -> Layout:
    """The run's layout over that many processes.

    Raises:
        ValueError: it, or another setting, cannot be.
    """
    from wan_train.config.settings import check_settings

    check_settings(config)
    layout = Layout.of(config, world)
    layout.check(config.model.wan_config, packs=config.train.global_batch_size, capacity=config.dataset.capacity)
    return layout


def bind_data(config: Any, layout: Layout) -> None:
    """Check what the data can be checked for before they are opened, and tell them of the model.

    Raises:
        ValueError: no data, or data that do not fit the model.
    """
    from wan_train.data.dataset import dataset_spec

    dataset, model = config.dataset, config.model
    if dataset.mock == (dataset.path is not None):
        raise ValueError("name the data with dataset.path=FOLDER, or ask for random data with --mock, and not both")
    if dataset.path is not None:
        if not Path(dataset.path).exists():
            raise ValueError(f"dataset.path is {dataset.path}, which does not exist; make one with wan-data prepare")
        model.latent_spec = dataset_spec(dataset.path, dataset.encoded_by)
        wanted, got = model.wan_config.text_dim, model.latent_spec["text_dim"]
        if wanted != got:
            raise ValueError(f"the dataset's text embeddings are {got} wide, the model takes {wanted}")
        if model.init_from is not None:
            _check_start(model, dataset.path)
    dataset.bind(model.wan_config, layout.pad_multiple)
    model.seq_length = dataset.capacity


def _check_start(model: Any, data: str) -> None:
    """Refuse weights to start from that live in another latent space, where the autoencoder beside them says so."""
    from wan_model.weights.model_folder import latent_spec_of
    from wan_train.model.provider import transformer_folder

    folder = transformer_folder(model.init_from).parent
    if all((folder / part).is_dir() for part in ("vae", "text_encoder")):
        theirs = latent_spec_of(folder, text_length=model.spec.text_length)
        theirs.require_same(model.spec, f"the model {model.init_from}", f"the data {data}")


def _place_checkpoints(config: Any) -> ResumePoint | None:
    """Where to save, and what to go on from: what this run saved itself, else what it is told to load."""
    checkpoint = config.checkpoint
    saves = None if checkpoint.save is None else Path(checkpoint.save).absolute()
    loads = None if checkpoint.load is None else Path(checkpoint.load).absolute()
    loads = None if loads == saves else loads  # the same command starts a run and goes on with it
    if saves is not None:
        checkpoint.save = str(saves)
        config.dataset.dataloader_save = checkpoint.save  # the loader's state lies inside the checkpoint
    if (wanted := checkpoint.ckpt_step) is not None:
        folder = loads or saves
        if folder is None:
            raise ValueError(f"checkpoint.ckpt_step is {wanted} and no folder is named; add checkpoint.load=FOLDER")
        point = find_resume_point(folder, wanted)
        if folder == saves and (later := [step for step in saved_steps(folder) if step > wanted]):
            raise ValueError(
                f"step {wanted} was asked for, and {folder} holds step {later[0]} too, with which this run's own would "
                "be mixed; name another folder with checkpoint.save"
            )
    else:
        point = None if saves is None else find_resume_point(saves)
        if point is None and loads is not None and (point := find_resume_point(loads)) is None:
            raise ValueError(f"checkpoint.load is {loads}, where no complete checkpoint is")
    if point is not None and point.folder == saves:
        checkpoint.finetune = False  # it began with the weights of another run, and goes on with its own
    checkpoint.load = str(point.folder) if point else None
    checkpoint.ckpt_step = point.step if point else None
    checkpoint.exit_on_missing_checkpoint = point is not None
    return point


def _check_origin(config: Any, resume: ResumePoint) -> None:
    """Refuse to go on from weights of other sizes, or that were trained in another latent space than the data's."""
    from wan_model.weights.training_checkpoint import read_run_config

    transformer, spec = read_run_config(resume.step_folder)
    ours = config.model.wan_config
    if differing := [
        f"{field.name} {getattr(ours, field.name)} where it has {getattr(transformer, field.name)}"
        for field in dataclasses.fields(ours)
        if getattr(ours, field.name) != getattr(transformer, field.name)
    ]:
        raise ValueError(
            f"{resume.step_folder} holds another transformer than this run's: {', '.join(differing)}; give the recipe "
            "that it was trained with, or name another folder with checkpoint.save"
        )
    if spec is not None and config.model.spec is not None:
        spec.require_same(config.model.spec, f"the checkpoint {resume.step_folder}", f"the data {config.dataset.path}")


def _make_validator(config: Any, device: Any) -> Any:
    from wan_train.loop.validation import Validator

    dataset = config.dataset
    return Validator(
        config.validation,
        dataset.validation_packs(),
        capacity=dataset.capacity,
        multiple=dataset.pad_multiple,
        device=device,
        dtype=config.model.params_dtype,
    )


@contextlib.contextmanager
def _narration(config: Any, verbose: bool) -> Iterator[TextIO]:
    """Keep Megatron's narration off the terminal: it goes to a file in the checkpoint folder.

    Yields:
        The stream for people.
    """
    terminal = sys.stdout
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(warnings.catch_warnings())
            for module in ("megatron", "torch", "modelopt", "nvidia_resiliency_ext", "wan_train.loop.run"):
                warnings.filterwarnings("ignore", module=rf"{module}\b")
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            where = os.devnull
            if config.checkpoint.save is not None:
                Path(config.checkpoint.save).mkdir(parents=True, exist_ok=True)
                where = f"{config.checkpoint.save}/megatron-rank{os.environ.get('RANK', '0')}.log"
            file = stack.enter_context(open(where, "a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        yield terminal


def _join_process_group(backend: str) -> bool:
    """A single process needs no port; returns whether the group is ours to destroy."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.distributed.is_initialized():
        return False
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return True


def pretrain(options: RunOptions) -> None:
    """Run the training that the options describe, in this process as one of WORLD_SIZE.

    Raises:
        ValueError: anything that a user can put right, before the first step.
    """
    running = engine.start()
    from wan_train.config.settings import settle

    config = build_config(options)
    config.dist.distributed_backend = running.backend
    bind_data(config, check_layout(config, int(os.environ.get("WORLD_SIZE", "1"))))
    if resume := _place_checkpoints(config):
        _check_origin(config, resume)
    settle(config, on_cpu=running.device.type == "cpu")
    if config.logger.logging_level == logging.INFO:
        config.logger.logging_level = logging.WARNING  # Megatron's own narration; set 10 or 30 to choose

    from megatron.bridge.training.pretrain import pretrain as bridge_pretrain

    from wan_train.checkpoint.hooks import Checkpointing
    from wan_train.data.dataset import empty_caption_of
    from wan_train.loop.callback import WanCallback
    from wan_train.loop.report import Report, Terminal
    from wan_train.loop.step import WanForwardStep

    step = WanForwardStep(running.device, config.model.params_dtype, empty_caption_of(config))
    log = Path(config.checkpoint.save) / "log.jsonl" if config.checkpoint.save else None
    validates = functools.partial(_make_validator, config, running.device) if config.validation.interval else None
    checkpointing = Checkpointing(resume)
    checkpointing.install()
    owns_group = _join_process_group(running.backend)
    try:
        with _narration(config, options.verbose) as terminal:
            report = Report(log, Terminal(terminal), config.train.train_iters)
            bridge_pretrain(
                config, step, callbacks=[WanCallback(step, resume, report, validates, checkpointing.take_pause)]
            )
    except SystemExit as stop:  # the loop leaves this way at train.exit_interval
        if stop.code:
            raise
    finally:
        import torch

        if owns_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
