"""From noise to data along the model's velocity: diffusers' schedulers, set as Wan 2.1 is released.

The solvers work element by element, so they are given tokens [S, C] as they lie in the pack.
"""

import warnings
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from wan_infer.requests import SolverName


def _scheduler(name: SolverName, shift: float) -> Any:
    match name:
        case "unipc":
            return UniPCMultistepScheduler(
                num_train_timesteps=1000,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=shift,
                solver_order=2,
                solver_type="bh2",
                predict_x0=True,
                lower_order_final=True,
                final_sigmas_type="zero",
            )
        case "dpm++":
            return DPMSolverMultistepScheduler(
                num_train_timesteps=1000,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=shift,
                algorithm_type="dpmsolver++",
                solver_order=2,
                final_sigmas_type="zero",
            )
        case "euler":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


class Solver:
    """One walk from noise to data; it remembers earlier steps, so each walk needs its own.

    Args:
        name: ``unipc``, ``dpm++`` or ``euler``.
        steps: how many.
        shift: s in sigma <- s * sigma / (1 + (s - 1) * sigma).
        device: of the tokens.

    Attributes:
        timesteps: 1000 * sigma of each step, fp32 on the CPU (whole numbers but with ``euler``).
    """

    def __init__(self, name: SolverName, steps: int, shift: float, device: torch.device) -> None:
        self._scheduler = _scheduler(name, shift)
        with warnings.catch_warnings():
            # diffusers' DPM++ hands a tensor to numpy in a way that is out of date.
            warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
            self._scheduler.set_timesteps(steps, device=device)
        # Said here, or the scheduler would look each timestep up on the device.
        self._scheduler.set_begin_index(0)
        self._own = self._scheduler.timesteps
        self.timesteps: list[float] = self._own.float().tolist()

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample after step ``index``, fp32; steps are taken in order."""
        result: Tensor = self._scheduler.step(velocity, self._own[index], sample, return_dict=False)[0]
        return result
