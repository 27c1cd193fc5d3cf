"""Called in a process that trains (``warm_ranks.Call``): host memory that is copied to the device between two kernels.

On a GPU a copy from pageable memory waits until all that is queued is done. On a CPU what makes such a copy is seen:
``torch.tensor`` and its like wrap a value of the host (``lift_fresh``), and ``to`` another device copies.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    """Notes what would copy from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        name = func.name()
        devices = {x.device for x in (*args, out) if isinstance(x, torch.Tensor)}
        if "lift_fresh" in name or ("copy" in name and len(devices) > 1):
            self.seen.append(name)
        return out


def note_host_copies(path: str) -> None:
    """Write, when the run ends, how many operators ran in the steps and validations, and which of them copied.

    Every pack is computed twice, because what is computed on the host for a new layout is copied from pinned memory.
    """
    import wan_train.model.forward_only as passes
    from wan_train.loop.callback import WanCallback
    from wan_train.loop.step import WanForwardStep

    found = {"step": Copies(), "loss": Copies(), "validation": Copies(), "validation loss": Copies()}

    def watched(purpose: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            *state, packs, model = args
            pack = next(packs)
            forward(*state, iter([pack]), model)
            with found[purpose]:
                out, loss = forward(*state, iter([pack]), model)

            def watched_loss(predicted: torch.Tensor) -> Any:
                with found[f"{purpose} loss".removeprefix("step ")]:
                    return loss(predicted)

            return out, watched_loss

        return call

    step, schedule, end = WanForwardStep.__call__, passes.get_forward_backward_func, WanCallback.on_train_end

    def watched_step(self: WanForwardStep, state: Any, packs: Iterator[Any], model: Any) -> Any:
        return watched("step", lambda *args: step(self, *args))(state, packs, model)

    def watched_schedule() -> Callable[..., Any]:
        run = schedule()
        return lambda **options: run(
            **{**options, "forward_step_func": watched("validation", options["forward_step_func"])}
        )

    def noting_end(self: WanCallback, context: Any) -> None:
        Path(path).write_text(json.dumps({name: [it.operators, it.seen] for name, it in found.items()}))
        end(self, context)

    WanForwardStep.__call__ = watched_step  # type: ignore[method-assign]
    passes.get_forward_backward_func = watched_schedule
    WanCallback.on_train_end = noting_end  # type: ignore[method-assign]
