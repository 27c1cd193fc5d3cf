from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from wan_model.sampling.settings import SOLVERS, SolverName
from wan_model.sampling.solvers import Solver


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_straight_path_ends_at_the_data(name: SolverName, steps: int, shift: float) -> None:
    # Along x_t = (1 - sigma) x0 + sigma eps the velocity is eps - x0 everywhere, so every solver is exact.
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 8, generator=generator)
    sample, solver = noise, Solver(name, steps, shift)
    for index in range(steps):
        sample = solver.step(index, noise - clean, sample)
    # diffusers' DPM++ takes the noise for what it is at u = 0.999.
    tolerance = 1.01e-3 * float((noise - clean).abs().max()) if name == "dpm++" else 1e-5
    torch.testing.assert_close(sample, clean, atol=tolerance, rtol=0)


def scheduler_of(name: SolverName, shift: float) -> Any:
    shared = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    match name:
        case "unipc":
            return UniPCMultistepScheduler(**shared, solver_order=2, solver_type="bh2", final_sigmas_type="zero")
        case "dpm++":
            return DPMSolverMultistepScheduler(**shared, algorithm_type="dpmsolver++", final_sigmas_type="zero")
        case "euler":
            return FlowMatchEulerDiscreteScheduler(shift=shift)


# diffusers' DPM++ hands a tensor to numpy in a way that is out of date.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_steps_are_those_of_diffusers(name: SolverName, steps: int, shift: float) -> None:
    # A velocity that bends with time and place, so that no term of a solver vanishes.
    def velocity(sample: torch.Tensor, timestep: float) -> torch.Tensor:
        return (sample * 1.5 + timestep / 300).sin() + 0.3 * sample

    scheduler, solver = scheduler_of(name, shift), Solver(name, steps, shift)
    scheduler.set_timesteps(steps)
    assert solver.timesteps == pytest.approx(scheduler.timesteps.double().tolist(), rel=1e-6)
    theirs = ours = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    for index, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocity(theirs, float(timestep)), timestep, theirs, return_dict=False)[0]
        ours = solver.step(index, velocity(ours, float(timestep)), ours)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_timesteps_are_the_shifted_ones() -> None:
    # sigma = 5u / (1 + 4u) for u = 1, 0.80008, 0.60015, ..., cut to whole numbers, as released.
    expected = [999, 952, 882, 769, 555]
    assert Solver("unipc", 5, 5.0).timesteps == pytest.approx(expected, abs=1.01)
    assert all(timestep == int(timestep) for timestep in Solver("unipc", 7, 3.0).timesteps)


def test_order_of_convergence() -> None:
    # On x' = x (that is, v = x along sigma) the exact end is x * exp(-1); UniPC's second order comes closer.
    def error(name: SolverName, steps: int) -> float:
        sample, solver = torch.ones(1, 1), Solver(name, steps, 1.0)
        for index in range(steps):
            sample = solver.step(index, sample, sample)
        return abs(sample.item() - torch.tensor(-1.0).exp().item())

    assert error("euler", 40) < 0.6 * error("euler", 20)
    # First order with a corrector leaves 0.0076 here, second order 0.0009.
    assert error("unipc", 10) < 0.002 < error("euler", 10)
    assert error("dpm++", 10) < 0.5 * error("euler", 10)
