"""Saving and resuming the distributed optimizer if neither Transformer Engine nor Apex is installed.

Megatron-Core then uses torch's AdamW, whose state has a tensor "step" per parameter; the fused optimizers keep it once
per group. Core 0.16 handles this in some places only.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from wan_train.engine.upstream.replace import changed, replace

_PURPOSE = "resuming torch's AdamW exactly"


def _inner_adams(optimizer: Any) -> list[torch.optim.Adam]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [getattr(part, "optimizer", None) for part in parts]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam)]


def _seed_state() -> None:
    # torch creates the state lazily, but loading builds a template that asserts that all steps are equal.
    def building_and_seeding(build: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(build)
        def build_and_seed(*args: Any, **kwargs: Any) -> Any:
            optimizer, scheduler = build(*args, **kwargs)
            for adam in _inner_adams(optimizer):
                for group in adam.param_groups:
                    for parameter in group["params"]:
                        state = adam.state[parameter]
                        state.setdefault("step", torch.tensor(0.0))
                        state.setdefault("exp_avg", torch.zeros_like(parameter.data))
                        state.setdefault("exp_avg_sq", torch.zeros_like(parameter.data))
            return optimizer, scheduler

        return build_and_seed

    setup = "megatron.bridge.training.setup"
    replace(f"{setup}:setup_optimizer", building_and_seeding, _PURPOSE, called_by=(f"{setup}:setup",))


# Key of the state of a rank that has no part of any parameter; those of parameters are tensors.
_NO_PARAMETER = "no parameter"


def _save_without_parameters() -> None:
    """Few parameters, as of adapters, may leave a rank without a part of any; Core asserts that one has a step."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict

    def state_dict_with_step(self: Any) -> Any:
        adam: Any = self.optimizer
        if not isinstance(adam, torch.optim.Adam) or adam.state:
            return state_dict(self)
        states: dict[Any, Any] = adam.state
        states[_NO_PARAMETER] = {"step": torch.tensor(getattr(adam, "steps_taken", 0.0))}
        try:
            return state_dict(self)
        finally:
            del states[_NO_PARAMETER]

    DistributedOptimizer.state_dict = state_dict_with_step


def _load_steps_apart() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for name in ("_set_main_param_and_optimizer_states", "load_state_dict", "state_dict"):
        if name not in vars(DistributedOptimizer):
            raise changed(f"Megatron-Core's DistributedOptimizer has no {name}", _PURPOSE)
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict

    def set_states_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # The fully reshardable format has no "step" (the group has it), but Core copies every key of the state.
        if "step" in tensors:
            set_states(self, model_param, tensors)
            return
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, "step": state["step"]})

    def load_and_unshare(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        # Core gives all parameters the same tensor, which torch would increment once for each of them.
        if isinstance(self.optimizer, torch.optim.Adam):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_step
    DistributedOptimizer.load_state_dict = load_and_unshare


def uses_torch_adam(optimizer: Any) -> bool:
    """Whether Megatron fell back to torch's optimizer; equal on every rank."""
    return bool(_inner_adams(optimizer))


def synchronize_steps(optimizer: Any) -> None:
    """Set every parameter's "step" to the number of steps taken; every rank calls it before a save.

    With FSDP a rank may have an empty shard of a tensor, whose steps torch does not count; a checkpoint would keep the
    number of an arbitrary rank.
    """
    adams = _inner_adams(optimizer)
    steps = [state["step"] for adam in adams for state in adam.state.values() if "step" in state]
    most = torch.tensor(max((float(step) for step in steps), default=0.0), device=torch.cuda.current_device())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    for step in steps:
        step.fill_(float(most))
    inner: Any
    for inner in adams:
        inner.steps_taken = float(most)  # for a rank that has no parameter


def patch_optimizer() -> None:
    """Make the distributed optimizer save and resume exactly with torch's AdamW; process-wide."""
    _seed_state()
    _load_steps_apart()
    _save_without_parameters()
