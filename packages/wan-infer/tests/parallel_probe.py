"""Run as ``python parallel_probe.py MODEL OUT CASES`` in one of several processes: samples each case, keeps results.

CASES is JSON: a list of {"name", "cfg_parallel", "shard_weights", "tiles", "source"}, a source {"checkpoint", "lora"}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from wan_infer.request.options import ParallelOptions
from wan_infer.request.settings import Settings
from wan_infer.runtime.parallelism import Parallelism
from wan_infer.sampling.sampler import WanSampler

REQUEST = {"width": 64, "height": 96, "frames": 9}
PROMPTS = ["a rabbit in a meadow", "a street"]
SETTINGS = Settings(steps=4, negative_prompt="grey")


Source = dict[str, str | None]
Sample = tuple[torch.Tensor, torch.Tensor, dict[str, int]]


def sample(model: str, source: Source, parallelism: Parallelism, tiles: int) -> Sample:
    """Latents and frames of two videos; tokens that the first block is given for one, and weights that are held."""
    options: dict[str, Any] = {"device": "cpu", "parallelism": parallelism, "tiles": tiles}
    if source["lora"] is not None:
        options["lora"] = (source["lora"], 0.1)
    if source["checkpoint"] is None:
        sampler = WanSampler.from_pretrained(model, **options)
    else:
        sampler = WanSampler.from_training_checkpoint(source["checkpoint"], model, **options)
    latents = sampler.sample_latents(PROMPTS, seed=[3, 4], settings=SETTINGS, **REQUEST)
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
    return latents, sampler.decode(latents), {"tokens": tokens[0], "held": held}


def main() -> None:
    model, out, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    results = {}
    for case in cases:
        options = ParallelOptions(cfg_parallel=case["cfg_parallel"], shard_weights=case["shard_weights"])
        parallelism = Parallelism.initialize(torch.device("cpu"), options)
        results[case["name"]] = (*sample(model, case["source"], parallelism, case["tiles"]), parallelism.rank)
    torch.save(results, out / f"{parallelism.rank}.pt")
    parallelism.close()


if __name__ == "__main__":
    main()
