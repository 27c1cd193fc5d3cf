"""A training run from its options: the same steps on every rank.

``pretrain`` starts the engine, builds and validates the configuration, and calls Megatron-Bridge's training loop.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from wan_model.system import torchrun
from wan_model.system.files import naming, require_local
from wan_model.system.terminal import Terminal
from wan_train import engine
from wan_train.checkpoint.folder import LOG_NAME, ResumePoint, find_resume_point, saved_steps
from wan_train.config.options import DEFAULT_RECIPE, RECIPES, RunOptions
from wan_train.config.overrides import apply_overrides, apply_sections, read_file
from wan_train.config.shipped_configs import find
from wan_train.model.layout import Layout


def build_config(options: RunOptions) -> Any:
    """Apply the recipe, then the file, then the overrides.

    Raises:
        ValueError: an unknown recipe, key or value.
    """
    from wan_model.config import TEXT_LENGTH_KEY
    from wan_train.config.recipes import RECIPE_FUNCTIONS, fine_tuning
    from wan_train.model.provider import InitialWeights

    require_local("--config-file", options.config_file)
    sections = read_file(find(options.config_file)) if options.config_file else {}
    named = sections.pop("recipe", None)
    if options.recipe is not None and named is not None and options.recipe != named:
        raise ValueError(f"--recipe is {options.recipe} and {options.config_file} is for {named}; leave --recipe out")
    recipe = options.recipe or named or DEFAULT_RECIPE
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; expected one of {', '.join(RECIPES)}")
    config = RECIPE_FUNCTIONS[recipe](options.training_mode)
    apply_sections(config, sections)
    apply_overrides(config, options.overrides)
    if options.command == "finetune":
        lora = config.lora.trains  # as the file and the overrides say
        config = RECIPE_FUNCTIONS[recipe](options.training_mode)
        fine_tuning(config, lora=lora)
        apply_sections(config, sections)
        apply_overrides(config, options.overrides)
    if options.mock:
        config.dataset.mock = True
    if options.init_from:
        config.model.init_from = options.init_from
    if config.model.init_from is not None:
        # The weights determine the sizes; what texts are padded to is decided where the data are known.
        given = {TEXT_LENGTH_KEY: config.model.transformer.get(TEXT_LENGTH_KEY)}
        config.model.initial_weights = InitialWeights.find(config.model.init_from)
        config.model.transformer = config.model.initial_weights.config.to_diffusers() | given
    return config


def check_layout(config: Any, world: int) -> Layout:
    """Validate the settings and return the layout for that many processes.

    Raises:
        ValueError: the layout or another setting is invalid.
    """
    from wan_train.config.settings import check_settings

    check_settings(config)
    layout = Layout.of(config, world)
    layout.check(config.model.wan_config, packs=config.train.global_batch_size, capacity=config.dataset.capacity)
    config.lora.check_stages(config.model.wan_config, layout.pipeline)
    return layout


def configure_data(config: Any, layout: Layout, *, needed: bool = True) -> None:
    """Validate the dataset against the model, and configure its loader; decides what texts are padded to.

    Args:
        config, layout: of the run.
        needed: whether there must be data.

    Raises:
        ValueError: there is no dataset, or it does not match the model.
    """
    from wan_train.data.dataset import read_dataset_spec, require_dataset
    from wan_train.loop.agreement import check_data, with_text_length

    dataset, model = config.dataset, config.model
    if (dataset.mock and dataset.path is not None) or (needed and not dataset.mock and dataset.path is None):
        given = "both dataset.path and --mock are given" if dataset.mock else "no data are given"
        raise ValueError(f"{given}; set dataset.path=FOLDER, or use --mock for random data, and not both")
    if dataset.path is not None:
        require_dataset(dataset.path)
        model.latent_spec = read_dataset_spec(dataset.path, dataset.encoded_by)
        check_data(model, dataset.path)
    model.transformer = with_text_length(model, dataset)
    dataset.configure(model.wan_config, layout.pad_multiple)
    # Only for Megatron's checks of a fixed sequence length, which a pack's capacity need not pass.
    divisor = 2 * layout.context * layout.tensor
    model.seq_length = -(-dataset.capacity // divisor) * divisor


def _resolve_checkpoints(config: Any) -> ResumePoint | None:
    """Resolve where to save, and the checkpoint to resume from: of ``checkpoint.save``, else of ``checkpoint.load``."""
    checkpoint = config.checkpoint
    for name in ("save", "load"):
        require_local(f"checkpoint.{name}", getattr(checkpoint, name))
    saves = None if checkpoint.save is None else Path(checkpoint.save).absolute()
    loads = None if checkpoint.load is None else Path(checkpoint.load).absolute()
    loads = None if loads == saves else loads  # the same command starts a run and resumes it
    if saves is not None:
        checkpoint.save = str(saves)
        config.dataset.dataloader_save = checkpoint.save  # the loader's state is part of the checkpoint
    wanted = checkpoint.ckpt_step
    if wanted is not None and loads is None:
        if saves is None:
            raise ValueError(f"checkpoint.ckpt_step is {wanted} without a folder; add checkpoint.load=FOLDER")
        point = find_resume_point(saves, wanted)
        if later := [step for step in saved_steps(saves) if step > wanted]:
            raise ValueError(
                f"checkpoint.ckpt_step is {wanted}, but {saves} also has step {later[0]}, which this run would "
                "overwrite; set checkpoint.save to another folder"
            )
    else:
        # The same command begins a run from another one's step and resumes it, so its own checkpoints come first.
        point = None if saves is None else find_resume_point(saves)
        if point is None and loads is not None and (point := find_resume_point(loads, wanted)) is None:
            raise ValueError(f"checkpoint.load is {loads}, which has no complete checkpoint")
    if point is not None and point.folder == saves:
        checkpoint.finetune = False  # it has checkpoints of its own, and resumes from these
    checkpoint.load = str(point.folder) if point else None
    checkpoint.ckpt_step = point.step if point else None
    checkpoint.exit_on_missing_checkpoint = point is not None
    return point


def _find_base(config: Any) -> None:
    """Find the weights that adapters are added to; a resumed run need not name them again."""
    from wan_train.model.provider import InitialWeights

    lora, model = config.lora, config.model
    if not lora.trains:
        return
    if model.init_from is None:
        given = f"lora.init_from is {lora.init_from}" if lora.init_from else f"lora.rank is {lora.rank}"
        out = "leave it out" if lora.init_from else "lora.rank=0"
        raise ValueError(f"{given} and there are no weights to adapt; give --init-from MODEL, or {out}")
    if model.initial_weights is None:
        try:
            model.initial_weights = InitialWeights.find(model.init_from)
        except ValueError as error:
            raise ValueError(
                f"the base of the LoRA is not found ({error}); give it with --init-from MODEL, wherever it is now"
            ) from error


def read_initial_adapters(config: Any) -> None:
    """Read the LoRA that a new training starts from, and complete the ``lora`` section from it.

    Raises:
        ValueError: it cannot be trained further, or is not what the section says.
    """
    lora, model = config.lora, config.model
    if lora.init_from is None or model.resumes:
        return
    from wan_model.weights.lora_adapters import read_found_adapters

    model.initial_adapters = read_found_adapters(lora.init_from, model.wan_config)
    lora.take_over(model.initial_adapters, model.wan_config)
    lora.check_stages(model.wan_config, model.pipeline_model_parallel_size)


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


def _make_sampler(config: Any, device: Any) -> Any:
    from wan_train.sampling.sampler import TrainingSampler

    return TrainingSampler(config, device)


class _NamedOutput(io.TextIOWrapper):
    """A text file that is appended to; an error of the system names it."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        super().__init__(open(path, "ab"), encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  closed with this object

    def write(self, text: str) -> int:
        """As of any file."""
        with naming(self._path):
            return super().write(text)

    def flush(self) -> None:
        """As of any file; called by ``close`` too."""
        with naming(self._path):
            super().flush()


class _LogFile(logging.Handler):
    """Appends records to a file; one that cannot be written, such as on a full disk, is dropped.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(logging.WARNING)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """As of any handler."""
        with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{self.format(record)}\n")


@contextlib.contextmanager
def _log_records_in_file(path: str) -> Iterator[None]:
    """Write log records that no handler takes to a file instead of standard error."""
    before = logging.lastResort
    logging.lastResort = _LogFile(path)
    try:
        yield
    finally:
        logging.lastResort = before


def _megatron_log() -> str:
    return f"megatron-rank{torchrun.rank()}.log"


def _require_writable(folder: Path) -> None:
    """Create the checkpoint folder.

    Raises:
        ValueError: nothing can be written there; the message names the folder or the file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in (folder / LOG_NAME, folder / _megatron_log()):
            if path.exists():
                if path.is_fifo() or path.is_socket():  # opening would wait for a reader
                    raise OSError(errno.EINVAL, "No plain file", str(path))
                path.open("a").close()
    except OSError as error:
        where = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
        raise ValueError(
            f"checkpoint.save is {folder}, which cannot be written: {error.strerror}{where}; choose another folder, or "
            "change its permissions"
        ) from error


@contextlib.contextmanager
def _megatron_output_in_file(config: Any, verbose: bool) -> Iterator[TextIO]:
    """Redirect Megatron's output to a file in the checkpoint folder, unless ``verbose``.

    Yields:
        The standard output.
    """
    terminal = sys.stdout
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(warnings.catch_warnings())
            for module in ("megatron", "torch", "modelopt", "nvidia_resiliency_ext", "wan_train.engine.upstream.loop"):
                warnings.filterwarnings("ignore", module=rf"{module}\b")
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            where = os.devnull
            if config.checkpoint.save is not None:
                where = f"{config.checkpoint.save}/{_megatron_log()}"
            file = stack.enter_context(_NamedOutput(where))
            stack.enter_context(contextlib.redirect_stdout(file))
            stack.enter_context(_log_records_in_file(where))  # it logs errors of files that are reported here
        yield terminal


def _init_single_process_group(backend: str) -> bool:
    """A process group of one process, which needs no port; returns whether it was created here."""
    import torch

    if torchrun.world_size() > 1 or torch.distributed.is_initialized():
        return False
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return True


def pretrain(options: RunOptions) -> None:
    """Run the training that the options describe, in this process as one of WORLD_SIZE.

    Raises:
        ValueError: invalid options, configuration or data; before the first step.
    """
    running = engine.start()
    from wan_train.checkpoint.changes import check_resume
    from wan_train.config.settings import derive_settings
    from wan_train.loop.metrics import MetricsWriter

    config = build_config(options)
    config.dist.distributed_backend = running.backend
    layout = check_layout(config, torchrun.world_size())
    configure_data(config, layout)
    if resume := _resolve_checkpoints(config):
        check_resume(config, layout, resume)
        config.model.resumes = True
        if not config.checkpoint.finetune and resume.step >= config.train.train_iters:
            if torchrun.rank() == 0:
                Terminal(sys.stdout).print_line(
                    f"{resume.step_folder} is complete and train.train_iters is {config.train.train_iters}, so no step "
                    "is left to train; raise train.train_iters to go on"
                )
            return
    _find_base(config)
    read_initial_adapters(config)
    logger = config.logger
    if config.checkpoint.save is not None:
        _require_writable(Path(config.checkpoint.save))
    elif logger.wandb_project and logger.wandb_save_dir is None:
        raise ValueError(
            f"logger.wandb_project is {logger.wandb_project!r}, and there is no folder for its files; set "
            "logger.wandb_save_dir or checkpoint.save"
        )
    elif torchrun.rank() == 0:
        Terminal(sys.stdout).print_line(
            "checkpoint.save is not set: nothing is saved, and an interrupted run has nothing to resume from"
        )
    derive_settings(config, on_cpu=running.device.type == "cpu")
    if logger.logging_level in (None, logging.INFO):
        logger.logging_level = logging.WARNING  # Megatron's own messages; set 10 or 30 to choose

    from wan_train.checkpoint.hooks import CheckpointHooks
    from wan_train.data.dataset import empty_caption_of
    from wan_train.engine.upstream.loop import run_loop
    from wan_train.loop.callback import WanCallback
    from wan_train.loop.step import WanForwardStep

    dropped = empty_caption_of(config) if config.model.flow.caption_dropout else None
    step = WanForwardStep(running.device, config.model.params_dtype, dropped)
    log = Path(config.checkpoint.save) / LOG_NAME if config.checkpoint.save else None
    validates = functools.partial(_make_validator, config, running.device) if config.validation.interval else None
    samples = functools.partial(_make_sampler, config, running.device) if config.samples.interval else None
    hooks = CheckpointHooks(resume)
    hooks.install()
    owns_group = _init_single_process_group(running.backend)
    try:
        with _megatron_output_in_file(config, options.verbose) as terminal:
            metrics = MetricsWriter(log, Terminal(terminal), config.train.train_iters)
            callback = WanCallback(step, resume, metrics, validates, samples, hooks)
            with hooks.failed_saves_explained(None if log is None else log.parent):
                run_loop(config, step, [callback])
            if callback.state is not None:
                hooks.require_complete(config.checkpoint, callback.state.train_state.step)
    finally:
        import torch

        config.dataset.close()
        if owns_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
