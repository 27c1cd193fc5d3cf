"""Saving and resuming the distributed optimizer where neither Transformer Engine nor Apex is installed.

Megatron-Core then uses torch's AdamW, whose state has a tensor "step" for every parameter that the fused optimizers
keep once a group. Core 0.16 knows of it in some places and not in others.
"""

from typing import Any

import torch


def _inner_adams(optimizer: Any) -> list[torch.optim.Adam]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [getattr(part, "optimizer", None) for part in parts]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam)]


def _seed_state() -> None:
    # torch makes the state lazily; before anything is loaded, saving's template asserts that every step is the same.
    import megatron.bridge.training.setup as setup

    build = setup.setup_optimizer

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

    setup.setup_optimizer = build_and_seed


def _load_steps_apart() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict

    def set_states_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # The fully reshardable format carries no "step" (the group does), yet Core copies every key of the state.
        if "step" in tensors:
            set_states(self, model_param, tensors)
            return
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, "step": state["step"]})

    def load_and_unshare(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        # Core hands one tensor to all parameters; torch counts it up once for each of them.
        if isinstance(self.optimizer, torch.optim.Adam):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_step
    DistributedOptimizer.load_state_dict = load_and_unshare


def uses_torch_adam(optimizer: Any) -> bool:
    """Whether Megatron fell back to torch's optimizer; the same on every rank."""
    return bool(_inner_adams(optimizer))


def agree_on_steps(optimizer: Any) -> None:
    """Have every parameter's "step" be the number of steps taken, on every rank; each rank calls it before a save.

    Where weights are fully sharded a rank may hold nothing of a tensor; torch never counts its steps there, and of the
    ranks' different numbers a checkpoint keeps any.
    """
    adams = _inner_adams(optimizer)
    steps = [state["step"] for adam in adams for state in adam.state.values() if "step" in state]
    most = torch.tensor(max((float(step) for step in steps), default=0.0), device=torch.cuda.current_device())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    for step in steps:
        step.fill_(float(most))


def mend() -> None:
    """Make the distributed optimizer save and resume exactly with torch's AdamW; process-wide."""
    _seed_state()
    _load_steps_apart()
