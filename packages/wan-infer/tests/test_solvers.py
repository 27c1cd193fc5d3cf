import pytest
import torch

from wan_infer.requests import SOLVERS, SolverName
from wan_infer.solvers import Solver

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_straight_path_ends_at_the_data(name: SolverName, steps: int, shift: float) -> None:
    # Along x_t = (1 - sigma) x0 + sigma eps the velocity is eps - x0 everywhere, so every solver is exact.
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 8, generator=generator)
    sample, solver = noise, Solver(name, steps, shift, CPU)
    for index in range(steps):
        sample = solver.step(index, noise - clean, sample)
    # diffusers' DPM++ takes the noise for what it is at u = 0.999.
    tolerance = 1.01e-3 * float((noise - clean).abs().max()) if name == "dpm++" else 1e-5
    torch.testing.assert_close(sample, clean, atol=tolerance, rtol=0)


def test_timesteps_are_the_shifted_ones() -> None:
    # sigma = 5u / (1 + 4u) for u = 1, 0.80008, 0.60015, ..., cut to whole numbers, as released.
    expected = [999, 952, 882, 769, 555]
    assert Solver("unipc", 5, 5.0, CPU).timesteps == pytest.approx(expected, abs=1.01)
    assert all(timestep == int(timestep) for timestep in Solver("unipc", 7, 3.0, CPU).timesteps)


def test_order_of_convergence() -> None:
    # On x' = x (that is, v = x along sigma) the exact end is x * exp(-1); UniPC's second order comes closer.
    def walk(name: SolverName, steps: int) -> float:
        sample, solver = torch.ones(1, 1), Solver(name, steps, 1.0, CPU)
        for index in range(steps):
            sample = solver.step(index, sample, sample)
        return abs(sample.item() - torch.tensor(-1.0).exp().item())

    assert walk("euler", 40) < 0.6 * walk("euler", 20)
    # First order with a corrector leaves 0.0076 here, second order 0.0009.
    assert walk("unipc", 10) < 0.002 < walk("euler", 10)
    assert walk("dpm++", 10) < 0.5 * walk("euler", 10)
