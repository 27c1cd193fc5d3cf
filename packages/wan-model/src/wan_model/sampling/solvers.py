"""UniPC, DPM++ and Euler for flow matching, at diffusers' noise levels.

With x = (1 - sigma) x0 + sigma eps the model's velocity v = eps - x0 gives the data prediction m = x - sigma v. Between
two levels a step is exact for constant m: with a = 1 - sigma, l = log(a / sigma) and h the difference of l,
x' = (sigma' / sigma) x + a' (1 - exp(-h)) m. The second-order solvers extrapolate m linearly in l to the middle of the
step, from the prediction at the level before (DPM++ 2M; UniPC's predictor is the same). UniPC's corrector repeats each
step once the model has been evaluated at its end: its m is the combination of three predictions that is exact for m of
second order in l.

All coefficients are plain numbers, computed in fp64 from levels rounded to fp32 as in diffusers; no value is read back
from the device. The solvers are elementwise, so samples are the tokens [S, C] of the pack.

Sources: DPM-Solver++ (arXiv 2211.01095), UniPC (arXiv 2302.04867) with B(h) = exp(h) - 1; diffusers'
``UniPCMultistepScheduler``, ``DPMSolverMultistepScheduler`` and ``FlowMatchEulerDiscreteScheduler``, which the tests
compare with.
"""

import dataclasses
import math

import numpy as np
from torch import Tensor

from wan_model.flow import TIMESTEPS
from wan_model.sampling.settings import SolverName


def _levels(name: SolverName, steps: int, shift: float) -> "np.ndarray":
    """The noise level at the beginning of each step, fp64."""

    def shifted(levels: "np.ndarray") -> "np.ndarray":
        return shift * levels / (1 + (shift - 1) * levels)

    smallest = 1 / TIMESTEPS
    match name:
        case "unipc":
            levels = shifted(np.linspace(1, smallest, steps + 1)[:-1])
            # At sigma = 1 l is infinite.
            levels[0] = min(levels[0], 1 - 1e-6)
            return levels
        case "dpm++":
            return shifted((1 - np.linspace(1, smallest, steps + 1))[:0:-1])
        case "euler":
            # diffusers shifts the range and then each level of it.
            return shifted(np.linspace(1, shifted(np.array([smallest]))[0], steps))


@dataclasses.dataclass
class _Prediction:
    """A data prediction m, and the l of its noise level."""

    position: float
    data: Tensor


class Solver:
    """The solver of one sampling run; it keeps predictions of earlier steps, so each run needs its own.

    Args:
        name: ``unipc``, ``dpm++`` or ``euler``.
        steps: how many.
        shift: s in sigma <- s * sigma / (1 + (s - 1) * sigma).

    Attributes:
        timesteps: 1000 * sigma of each step, the model's input (whole numbers except with ``euler``).
    """

    def __init__(self, name: SolverName, steps: int, shift: float) -> None:
        self._name, levels = name, _levels(name, steps, shift)
        exact = TIMESTEPS * levels
        self.timesteps: list[float] = (exact if name == "euler" else np.floor(exact)).tolist()
        self._sigmas: list[float] = [*levels.astype(np.float32).tolist(), 0.0]
        self._predictions: list[_Prediction] = []
        self._step_start: Tensor | None = None

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample after step ``index``, fp32; steps are taken in order."""
        sigma, after = self._sigmas[index], self._sigmas[index + 1]
        if self._name == "euler":
            return sample + (after - sigma) * velocity
        prediction = _Prediction(_position(sigma), sample - sigma * velocity)
        if self._name == "unipc" and index > 0:
            sample = self._correct(index, prediction)
        self._predictions = [*self._predictions[-1:], prediction]
        self._step_start = sample
        last = index == len(self._sigmas) - 2
        second = len(self._predictions) == 2 and not last
        data = self._extrapolate(_position(after)) if second else prediction.data
        return _exact_step(sample, data, sigma, after)

    def _extrapolate(self, position: float) -> Tensor:
        before, now = self._predictions
        ratio = 0.5 * (position - now.position) / (now.position - before.position)
        return now.data + ratio * (now.data - before.data)

    def _correct(self, index: int, prediction: _Prediction) -> Tensor:
        """The step before ``index`` again, with the prediction at its end."""
        assert self._step_start is not None, "there was a step before"
        now = self._predictions[-1]
        difference = prediction.data - now.data
        if len(self._predictions) == 1:
            data = now.data + 0.5 * difference
        else:
            h = prediction.position - now.position
            before = (self._predictions[0].position - now.position) / h
            decay = -math.expm1(-h)  # 1 - exp(-h)
            # Weights of the two differences, exact where they are constant or linear in l.
            first = (1 - decay / h) / decay
            second = 2 * (0.5 - (1 - decay / h) / h) / decay
            backward = (first - second) / (1 - before)
            data = now.data + (first - backward) * difference
            data = data + backward / before * (self._predictions[0].data - now.data)
        return _exact_step(self._step_start, data, self._sigmas[index - 1], self._sigmas[index])


def _position(sigma: float) -> float:
    """The l of a noise level."""
    return math.log1p(-sigma) - math.log(sigma) if sigma else math.inf


def _exact_step(sample: Tensor, data: Tensor, sigma: float, after: float) -> Tensor:
    """The step that is exact for a constant data prediction."""
    factor = -math.expm1(_position(sigma) - _position(after))
    return after / sigma * sample + (1 - after) * factor * data
