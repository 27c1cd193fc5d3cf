"""Two, three and four gloo processes against one: the same latents and frames, whatever is divided."""

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_probe import Sample, Source, run_rank, samples
from safetensors.torch import save_file
from tiny_sources import write_checkpoint_of

from wan_infer.runtime.parallelism import Parallelism
from wan_model.testing import seeds
from wan_model.testing.lora_files import tiny_lora
from wan_model.testing.once import Once


def case(
    name: str, *, cfg: bool = False, shard: bool = False, tiles: int = 1, source: str = "released"
) -> dict[str, Any]:
    return {"name": name, "cfg_parallel": cfg, "shard_weights": shard, "tiles": tiles, "source": source}


# By the number of processes; where guidance is not split all of them divide the tokens, else half of them each.
CASES = {
    2: [
        case("guidance", cfg=True),
        case("tokens"),
        case("guidance, weights", cfg=True, shard=True),
        case("tokens, weights", shard=True, tiles=2),
        case("weights of a checkpoint", shard=True, source="checkpoint"),
        case("weights with a LoRA", shard=True, source="lora"),
        case("a LoRA beside the weights", source="unmerged"),
        case("weights and a LoRA beside them", cfg=True, shard=True, source="unmerged"),
    ],
    3: [case("tokens, heads that do not divide"), case("the same, weights", shard=True)],
    4: [case("guidance x tokens", cfg=True), case("guidance x tokens, weights", cfg=True, shard=True)],
}
SEEDS = seeds(3)
# For the start, and for each seed.
SECONDS, SECONDS_OF_A_SEED = 300.0, 60.0


@pytest.fixture(scope="module")
def sources(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    write_checkpoint_of(model_folder, folder / "run", 10, seed=5)
    save_file(tiny_lora(), folder / "lora.safetensors")
    return {
        "released": {"checkpoint": None, "lora": None},
        "checkpoint": {"checkpoint": str(folder / "run"), "lora": None},
        **{
            name: {"checkpoint": None, "lora": str(folder / "lora.safetensors"), "lora_mode": mode}
            for name, mode in (("lora", "merged"), ("unmerged", "unmerged"))
        },
    }


@pytest.fixture(scope="module")
def alone(once: Once, model_folder: Path, sources: dict[str, Source]) -> dict[str, dict[int, Sample]]:
    """What one process makes of each source with each seed."""

    def build(path: Path) -> None:
        made = {
            name: dict(zip(SEEDS, samples(str(model_folder), source, SEEDS, Parallelism(), 1), strict=True))
            for name, source in sources.items()
        }
        torch.save(made, path)

    found: dict[str, dict[int, Sample]] = torch.load(once("sampled-alone.pt", build), weights_only=True)
    return found


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    """Processes that are forked from one that has imported the sampler."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["wan_infer.sampling.sampler", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
    )
    return context


def off_by(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def several(
    once: Once,
    sources: dict[str, Source],
    context: multiprocessing.context.ForkServerContext,
    model_folder: Path,
) -> Callable[[int], list[Any]]:
    """By the number of processes: what each found, all cases and seeds in one start of them."""

    def start(count: int, folder: Path) -> None:
        folder.mkdir()
        cases = [{**one, "source": sources[one["source"]]} for one in CASES[count]]
        processes = [
            context.Process(target=run_rank, args=(rank, count, str(model_folder), str(folder), SEEDS, cases))
            for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(SECONDS + SECONDS_OF_A_SEED * len(SEEDS))
            assert [process.exitcode for process in processes] == [0] * count, "see standard error"
        finally:
            for process in processes:
                process.kill()
                process.join()

    @functools.cache
    def results(count: int) -> list[Any]:
        folder = once(f"sampled-in-{count}", functools.partial(start, count))
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]

    return results


def test_sources_differ(alone: dict[str, dict[int, Sample]]) -> None:
    released, checkpoint, lora = (alone[name][SEEDS[0]][0] for name in ("released", "checkpoint", "lora"))
    assert off_by(checkpoint, released) > 0.01
    assert off_by(lora, released) > 0.01
    assert off_by(alone["unmerged"][SEEDS[0]][0], lora) < 1e-4


@pytest.mark.rounding
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", CASES)
def test_equal_to_one_process(
    count: int, seed: int, alone: dict[str, dict[int, Sample]], several: Callable[[int], list[Any]]
) -> None:
    results = several(count)
    for one in CASES[count]:
        latents, video, numbers = alone[one["source"]][seed]
        for rank, result in enumerate(results):
            own_latents, own_video, own_numbers, own_rank = result[one["name"], seed]
            assert own_rank == rank
            off, pixels_off = off_by(own_latents, latents), float((own_video - video).abs().max())
            print(f"{one['name']}, rank {rank}: latents off by {off:.1e}, pixels by {pixels_off:.1e}")
            assert off < 1e-4, one["name"]
            assert pixels_off < 1e-3, one["name"]
            # The work is divided: a process computes its part, and holds its part.
            share = count  # half of the branches by a half of the tokens is a quarter of both
            assert own_numbers["tokens"] == -(-numbers["tokens"] // share), one["name"]
            if one["shard_weights"]:
                assert own_numbers["held"] < 0.6 * numbers["held"], one["name"]
            else:
                assert own_numbers["held"] == numbers["held"]
        # And every process has the same.
        assert all(torch.equal(result[one["name"], seed][0], results[0][one["name"], seed][0]) for result in results)
