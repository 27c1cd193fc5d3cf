"""One rank of several: samples each case, keeps results."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wan_infer.request.options import ParallelOptions
from wan_infer.runtime.parallelism import Parallelism
from wan_infer.sampling.sampler import WanSampler
from wan_model.sampling.settings import Settings
from wan_model.system.child_process import end_after

REQUEST = {"width": 64, "height": 96, "frames": 9}
PROMPTS = ["a rabbit in a meadow", "a street"]
SETTINGS = Settings(steps=4, negative_prompt="grey")

Source = dict[str, str | None]
Sample = tuple[torch.Tensor, torch.Tensor, dict[str, int]]


def samples(model: str, source: Source, seeds: list[int], parallelism: Parallelism, tiles: int) -> list[Sample]:
    """By seed: latents and frames of two videos, the tokens that the first block is given for one, the weights held."""
    options: dict[str, Any] = {"device": "cpu", "parallelism": parallelism, "tiles": tiles}
    if source["lora"] is not None:
        options |= {"lora": (source["lora"], 0.1), "lora_mode": source["lora_mode"]}
    if source["checkpoint"] is None:
        sampler = WanSampler.from_pretrained(model, **options)
    else:
        sampler = WanSampler.from_training_checkpoint(source["checkpoint"], model, **options)
    drawn = [sampler.sample_latents(PROMPTS, seed=[seed, seed + 1], settings=SETTINGS, **REQUEST) for seed in seeds]
    tokens: list[int] = []
    handle = sampler.model.blocks["0"].register_forward_pre_hook(
        lambda _, inputs: tokens.append(int(inputs[0].shape[0]))
    )
    sampler.sample_latents(["a"], settings=Settings(steps=1), **REQUEST)
    handle.remove()
    held = sum(
        (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()
        for parameter in sampler.model.blocks.parameters()
    )
    numbers = {"tokens": tokens[0], "held": held}
    return [(latents, sampler.decode(latents), numbers) for latents in drawn]


def run_rank(
    rank: int, world_size: int, model: str, folder: str, seeds: list[int], cases: list[dict[str, Any]]
) -> None:
    """A process of its own, which ends with the tests; results go to ``RANK.pt`` in the folder."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    end_after(caller.join)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    # A file and not a port, which another process might take meanwhile.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {}
    for case in cases:
        options = ParallelOptions(cfg_parallel=case["cfg_parallel"], shard_weights=case["shard_weights"])
        parallelism = Parallelism.initialize(torch.device("cpu"), options)
        found = samples(model, case["source"], seeds, parallelism, case["tiles"])
        for seed, one in zip(seeds, found, strict=True):
            results[case["name"], seed] = (*one, parallelism.rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    parallelism.close()
