"""A training run from its options: the same steps on every rank.

``pretrain`` is the whole of it: start the engine, build the configuration, check what can be checked before the first
step, and hand over to Megatron-Bridge's own loop.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wan_train import engine
from wan_train.checkpoints import ResumePoint, find_resume_point
from wan_train.options import RunOptions
from wan_train.overrides import apply_file, apply_overrides


def build_config(options: RunOptions) -> Any:
    """Recipe, then file, then overrides.

    Raises:
        ValueError: an unknown recipe, key or value.
    """
    from wan_model.weights import read_config
    from wan_train.model import transformer_folder
    from wan_train.recipes import RECIPES

    if options.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {options.recipe!r}; expected one of {', '.join(RECIPES)}")
    config = RECIPES[options.recipe](options.training_mode)
    if options.config_file:
        apply_file(config, Path(options.config_file))
    apply_overrides(config, options.overrides)
    if options.mock:
        config.dataset.mock = True
    if options.init_from:
        config.model.init_from = options.init_from
    if config.model.init_from is not None:
        # The weights say what the sizes are.
        config.model.transformer = read_config(transformer_folder(config.model.init_from)).to_diffusers()
    return config


def _check_layout(config: Any, world_size: int) -> None:
    model = config.model
    model_ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    if world_size % model_ranks:
        raise ValueError(
            f"{world_size} processes cannot be laid out as tensor {model.tensor_model_parallel_size} x pipeline "
            f"{model.pipeline_model_parallel_size} x context {model.context_parallel_size}: their number must be a "
            f"multiple of {model_ranks}"
        )
    replicas = world_size // model_ranks
    batch = config.train.global_batch_size
    if config.train.micro_batch_size != 1:
        raise ValueError(f"train.micro_batch_size is {config.train.micro_batch_size}; a micro-batch is one pack")
    if batch % replicas:
        raise ValueError(
            f"train.global_batch_size is {batch} packs, which {replicas} data-parallel ranks cannot share equally"
        )
    if config.dist.use_megatron_fsdp or config.dist.use_torch_fsdp2:
        raise ValueError(
            "fully sharded data parallelism is asked for; this version does not run it, leave dist.use_*_fsdp* out"
        )
    if config.train.eval_iters:
        raise ValueError(f"train.eval_iters is {config.train.eval_iters}; this version runs no validation, set it to 0")


def _bind_data(config: Any) -> None:
    from wan_train.dataset import dataset_spec

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
    sequence_ranks = model.tensor_model_parallel_size if model.sequence_parallel else 1
    dataset.bind(model.wan_config, sequence_ranks * model.context_parallel_size)
    model.seq_length = dataset.capacity


def _place_checkpoints(config: Any) -> ResumePoint | None:
    checkpoint = config.checkpoint
    if checkpoint.save is not None:
        checkpoint.save = str(Path(checkpoint.save).absolute())
        config.dataset.dataloader_save = checkpoint.save  # the loader's state lies inside the checkpoint
    if checkpoint.load is not None:
        point = find_resume_point(Path(checkpoint.load), checkpoint.ckpt_step)
        if point is None:
            raise ValueError(f"checkpoint.load is {checkpoint.load}, where no checkpoint has been saved")
    elif checkpoint.save is not None and (point := find_resume_point(Path(checkpoint.save))):
        checkpoint.load = checkpoint.save
    else:
        point = None
    checkpoint.exit_on_missing_checkpoint = checkpoint.load is not None
    return point


@contextlib.contextmanager
def _narration(config: Any, verbose: bool) -> Iterator[Callable[[str], None]]:
    """Keep Megatron's narration off the terminal: it goes to a file in the checkpoint folder.

    Yields:
        What prints a line for people.
    """
    terminal = sys.stdout
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(warnings.catch_warnings())
            for module in ("megatron", "torch", "modelopt", "nvidia_resiliency_ext", "wan_train.run"):
                warnings.filterwarnings("ignore", module=rf"{module}\b")
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            where = os.devnull
            if config.checkpoint.save is not None:
                Path(config.checkpoint.save).mkdir(parents=True, exist_ok=True)
                where = f"{config.checkpoint.save}/megatron-rank{os.environ.get('RANK', '0')}.log"
            file = stack.enter_context(open(where, "a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        yield lambda line: print(line, file=terminal, flush=True)


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
    config = build_config(options)
    config.dist.distributed_backend = running.backend
    _check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    _bind_data(config)
    resume = _place_checkpoints(config)
    if config.logger.logging_level == logging.INFO:
        config.logger.logging_level = logging.WARNING  # Megatron's own narration; set 10 or 30 to choose

    from megatron.bridge.training.pretrain import pretrain as bridge_pretrain

    from wan_train.callback import WanCallback
    from wan_train.dataset import empty_caption_of
    from wan_train.step import WanForwardStep

    step = WanForwardStep(running.device, config.model.params_dtype, empty_caption_of(config))
    log = Path(config.checkpoint.save) / "log.jsonl" if config.checkpoint.save else None
    owns_group = _join_process_group(running.backend)
    try:
        with _narration(config, options.verbose) as report:
            bridge_pretrain(config, step, callbacks=[WanCallback(step, resume, log, report)])
    except SystemExit as stop:  # the loop leaves this way at train.exit_interval
        if stop.code:
            raise
    finally:
        import torch

        if owns_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
