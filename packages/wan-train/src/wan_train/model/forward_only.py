"""Forward passes without gradients with the model of the training loop, in its parallel layout.

Import only after ``wan_train.engine.start``.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func


@contextlib.contextmanager
def evaluation_mode(model: Sequence[Any]) -> Iterator[None]:
    """In this context the parts of the model are in evaluation mode, and afterwards in training mode."""
    for part in model:
        part.eval()
    try:
        yield
    finally:
        for part in model:
            part.train()


def forward_only(
    model: list[Any], forward: Callable[[Iterator[Any], Any], Any], todo: Sequence[Any], seq_length: int
) -> None:
    """One forward pass for each item, by Megatron's schedule; every rank of a model-parallel group calls it.

    Args:
        model: this rank's parts in Megatron's wrappers.
        forward: Megatron's forward step: takes the iterator of items and a part of the model, and returns the output
            and a function of it, which the last pipeline stage calls.
        todo: the items. With FSDP all ranks need as many.
        seq_length: of the schedule.
    """
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(todo),
            model=model,
            num_microbatches=len(todo),
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=True,
        )
