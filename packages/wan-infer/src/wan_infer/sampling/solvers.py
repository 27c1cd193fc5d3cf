"""From noise to data along the model's velocity: UniPC, DPM++ and Euler, at the noise levels that diffusers gives them.

With x = (1 - sigma) x0 + sigma eps the model's velocity v = eps - x0 gives the data m = x - sigma v. Between two levels
a step is exact for constant m: with a = 1 - sigma, l = log(a / sigma) and h the difference of l,
x' = (sigma' / sigma) x + a' (1 - exp(-h)) m. The second-order solvers add to m half of what it would change by if it
went on as from the level before (DPM++ 2M; UniPC's predictor is the same). UniPC also corrects each step when the model
has answered at its end: the m of the step is then the combination of three answers that is exact for m of second order
in l.

All coefficients are plain numbers, computed in fp64 from levels rounded to fp32 as diffusers has them; nothing is read
from a device. The solvers work element by element, so they are given tokens [S, C] as they lie in the pack.

Sources: DPM-Solver++ (arXiv 2211.01095), UniPC (arXiv 2302.04867) with B(h) = exp(h) - 1; diffusers'
``UniPCMultistepScheduler``, ``DPMSolverMultistepScheduler`` and ``FlowMatchEulerDiscreteScheduler``, which the tests
compare with.
"""

import dataclasses
import math

import numpy as np
from torch import Tensor

from wan_infer.request.settings import SolverName

_TRAINED = 1000  # timesteps


def _levels(name: SolverName, steps: int, shift: float) -> "np.ndarray":
    """The noise level that each step begins at, fp64."""

    def shifted(levels: "np.ndarray") -> "np.ndarray":
        return shift * levels / (1 + (shift - 1) * levels)

    smallest = 1 / _TRAINED
    match name:
        case "unipc":
            levels = shifted(np.linspace(1, smallest, steps + 1)[:-1])
            # Where nothing of the data is left l is infinite.
            levels[0] = min(levels[0], 1 - 1e-6)
            return levels
        case "dpm++":
            return shifted((1 - np.linspace(1, smallest, steps + 1))[:0:-1])
        case "euler":
            # diffusers shifts the range and then each level of it.
            return shifted(np.linspace(1, shifted(np.array([smallest]))[0], steps))


@dataclasses.dataclass
class _Answer:
    """What the model said of the data, and where."""

    position: float
    data: Tensor


class Solver:
    """One walk from noise to data; it remembers earlier steps, so each walk needs its own.

    Args:
        name: ``unipc``, ``dpm++`` or ``euler``.
        steps: how many.
        shift: s in sigma <- s * sigma / (1 + (s - 1) * sigma).

    Attributes:
        timesteps: 1000 * sigma of each step, which the model is asked at (whole numbers but with ``euler``).
    """

    def __init__(self, name: SolverName, steps: int, shift: float) -> None:
        self._name, levels = name, _levels(name, steps, shift)
        exact = _TRAINED * levels
        self.timesteps: list[float] = (exact if name == "euler" else np.floor(exact)).tolist()
        self._sigmas: list[float] = [*levels.astype(np.float32).tolist(), 0.0]
        self._answers: list[_Answer] = []
        self._begun_at: Tensor | None = None

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample after step ``index``, fp32; steps are taken in order."""
        sigma, after = self._sigmas[index], self._sigmas[index + 1]
        if self._name == "euler":
            return sample + (after - sigma) * velocity
        answer = _Answer(_position(sigma), sample - sigma * velocity)
        if self._name == "unipc" and index > 0:
            sample = self._correct(index, answer)
        self._answers = [*self._answers[-1:], answer]
        self._begun_at = sample
        last = index == len(self._sigmas) - 2
        second = len(self._answers) == 2 and not last
        data = self._carried_on(_position(after)) if second else answer.data
        return _move(sample, data, sigma, after)

    def _carried_on(self, position: float) -> Tensor:
        before, now = self._answers
        share = 0.5 * (position - now.position) / (now.position - before.position)
        return now.data + share * (now.data - before.data)

    def _correct(self, index: int, answer: _Answer) -> Tensor:
        """The step that led here, with what the model says here."""
        assert self._begun_at is not None, "a step went before"
        now = self._answers[-1]
        change = answer.data - now.data
        if len(self._answers) == 1:
            data = now.data + 0.5 * change
        else:
            h = answer.position - now.position
            before = (self._answers[0].position - now.position) / h
            grown = -math.expm1(-h)  # 1 - exp(-h)
            # Weights of the two differences that make constants and straight lines in l exact.
            first = (1 - grown / h) / grown
            second = 2 * (0.5 - (1 - grown / h) / h) / grown
            backward = (first - second) / (1 - before)
            data = now.data + (first - backward) * change
            data = data + backward / before * (self._answers[0].data - now.data)
        return _move(self._begun_at, data, self._sigmas[index - 1], self._sigmas[index])


def _position(sigma: float) -> float:
    """L of a noise level."""
    return math.log1p(-sigma) - math.log(sigma) if sigma else math.inf


def _move(sample: Tensor, data: Tensor, sigma: float, after: float) -> Tensor:
    """The exact step for data that do not change on the way."""
    share = -math.expm1(_position(sigma) - _position(after))
    return after / sigma * sample + (1 - after) * share * data
