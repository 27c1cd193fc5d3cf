"""wan-train on the CPU: its loop compared with plain torch, packs with padded batches, and recomputation."""

import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import median, ratio, run_process, time_rounds
from bench.plain_training import Recipe, tiny_sizes
from bench.report import Table, gigabytes, seconds
from common.training_log import read_steps
from wan_data.reading.packing import best_fit
from wan_model import PackLayout, WanConfig, WanDiT, init_weights
from wan_model.dit.attention import Offsets
from wan_model.dit.ops import TorchOps
from wan_model.dit.recompute import Recompute

SIZES = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "text_dim": 512, "freq_dim": 256}
MIXED = [[5, 16, 28], [1, 20, 20], [3, 16, 24]]
QUICK = Recipe({"num_layers": 2}, [[1, 8, 8], [2, 8, 8]], context_length=16)
FIRST_STEPS = 5  # excluded: caches and allocators are being filled

# A typical 480p dataset, in percent: a third images, clips of all lengths, mostly landscape. Latent frames, and a
# thirtieth of the tokens per frame (1,560 for 480 x 832 and 832 x 480, 1,521, 1,530, 1,560).
FRAMES = {1: 30, 5: 10, 9: 15, 13: 15, 17: 10, 21: 20}
FRAME_TOKENS = {52: 82, 51: 18}


def realistic_mix(count: int) -> list[int]:
    """Tokens of each sample."""
    rng = random.Random(0)
    frames = rng.choices(list(FRAMES), list(FRAMES.values()), k=count)
    sizes = rng.choices(list(FRAME_TOKENS), list(FRAME_TOKENS.values()), k=count)
    return [frame * size for frame, size in zip(frames, sizes, strict=True)]


# -- the loop ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class LoopRun:
    """Seconds and loss of each step of ``wan-train pretrain``, from its log."""

    seconds: list[float]
    losses: list[float]


def run_loop(recipe: Recipe, steps: int, *options: str) -> LoopRun:
    """Run the command in one process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from wan_train.cli import main; main()", "pretrain", *recipe.options()]
        settings = [f"train.train_iters={steps}", f"checkpoint.save={folder}", "checkpoint.save_interval=1000000"]
        run_process([*command, *settings, *options], torch.get_num_threads())
        entries = read_steps(Path(folder))
    assert len(entries) == steps, f"{len(entries)} steps in the log instead of {steps}"
    return LoopRun([e["seconds"] for e in entries], [e["loss"] for e in entries])


def run_plain(recipe: Recipe, steps: int) -> tuple[list[float], list[float]]:
    """Seconds and losses of the same training in plain torch, in a process of its own."""
    command = [sys.executable, "-m", "bench.plain_training", json.dumps(dataclasses.asdict(recipe)), steps]
    _, printed = run_process(command, torch.get_num_threads())
    found = json.loads(printed)
    return found["seconds"], found["losses"]


def loop(quick: bool) -> Table:
    """The overhead of Megatron's loop and of our callbacks per step."""
    recipe = QUICK if quick else Recipe({**SIZES, "num_layers": 4}, MIXED)
    rounds, steps = (1, FIRST_STEPS + 3) if quick else (3, FIRST_STEPS + 15)
    plain, ours = [], []
    for number in range(rounds):
        for turn in (number, number + 1):
            if turn % 2 == 0:
                times, expected = run_plain(recipe, steps)
                plain.append(median(times[FIRST_STEPS:]))
            else:
                run = run_loop(recipe, steps)
                ours.append(median(run.seconds[FIRST_STEPS:]))
        # The first step has the same weights, pack and noise; later ones differ by gradient clipping.
        assert abs(run.losses[0] - expected[0]) < 1e-4 * expected[0], f"{run.losses[0]} and {expected[0]} differ"
    each = [a / b for a, b in zip(ours, plain, strict=True)]
    width = recipe.transformer.get("num_attention_heads", 4) * recipe.transformer.get("attention_head_dim", 24)
    return Table(
        f"A step of wan-train pretrain against plain torch: width {width}, {recipe.transformer['num_layers']} layers, "
        f"packs of {recipe.tokens:,} tokens, fp32",
        ["plain step", "loop's step", "loop / plain", "of each pair"],
        [
            [
                seconds(median(plain)),
                seconds(median(ours)),
                f"{ratio(ours, plain):.3f}",
                ", ".join(f"{r:.3f}" for r in each),
            ]
        ],
        note="Plain: WanDiT, the objective and torch.optim.AdamW, forward to optimizer, without data, noise, clipping "
        "or log. The loop: one process on gloo, from log line to log line. Each run is a new process; the two "
        f"alternate. The first {FIRST_STEPS} of {steps} steps are excluded, and medians are taken. Target: <= 1.10.",
    )


# -- packs ------------------------------------------------------------------------------------------------------------


class PaddedOps(TorchOps):
    """A padded batch: all samples have one length, and attention is one call with the padding masked."""

    lengths: Sequence[int] = ()

    def self_attention(self, q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, offsets: Offsets) -> Tensor:
        """One batched call; queries of padding are computed as well and ignored by the loss."""
        batch, longest = len(self.lengths), offsets[1]
        real = torch.arange(longest) < torch.tensor(self.lengths)[:, None]
        q, k, v = (x.view(batch, longest, *x.shape[1:]).transpose(1, 2) for x in (q_SHE, k_SHE, v_SHE))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        return out.transpose(1, 2).flatten(0, 1)


@dataclasses.dataclass
class Samples:
    """Noise of the given lengths; positions run along one axis, so padding at the end changes no position."""

    lengths: list[int]
    tokens: list[Tensor]
    texts: Tensor
    timesteps: Tensor

    @classmethod
    def draw(cls, config: WanConfig, lengths: list[int]) -> "Samples":
        """Draw from a fixed seed."""
        rng = torch.Generator().manual_seed(0)
        return cls(
            lengths,
            [torch.randn(length, config.token_in, generator=rng) for length in lengths],
            torch.randn(len(lengths), config.text_length, config.text_dim, generator=rng),
            1000 * torch.rand(len(lengths), generator=rng),
        )


def train_packed(model: WanDiT, samples: Samples, packs: list[list[int]]) -> float:
    """A forward and a backward pass of every pack; returns the sum of squares of the model's output."""
    total = 0.0
    for pack in packs:
        layout = PackLayout(tuple((1, 1, samples.lengths[i]) for i in pack))
        out = model(torch.cat([samples.tokens[i] for i in pack]), samples.timesteps[pack], samples.texts[pack], layout)
        loss = out.square().sum()
        loss.backward()
        total += loss.item()
    return total


def train_padded(model: WanDiT, samples: Samples, batches: list[list[int]]) -> float:
    """The same for padded batches; padding is excluded from the sum."""
    assert isinstance(model.ops, PaddedOps)
    total = 0.0
    for batch in batches:
        model.ops.lengths = [samples.lengths[i] for i in batch]
        longest = max(model.ops.lengths)
        rows = [F.pad(samples.tokens[i], (0, 0, 0, longest - samples.lengths[i])) for i in batch]
        layout = PackLayout(((1, 1, longest),) * len(batch))
        out = model(torch.cat(rows), samples.timesteps[batch], samples.texts[batch], layout)
        real = torch.cat([torch.arange(longest) < samples.lengths[i] for i in batch])
        loss = out[real].square().sum()
        loss.backward()
        total += loss.item()
    return total


def packs_against_padding(quick: bool) -> Table:
    """Samples per second of packs and padded batches, on a typical mix."""
    config = WanConfig(num_heads=4, head_dim=64, ffn_dim=1024, num_layers=4, text_dim=128, text_length=64, freq_dim=128)
    if quick:
        config = dataclasses.replace(config, num_layers=1)
    samples = Samples.draw(config, realistic_mix(8 if quick else 32))
    longest = 21 * 52
    packed = WanDiT(config)
    init_weights(packed, seed=0)
    with torch.no_grad():
        packed.proj_out.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    padded = WanDiT(config, PaddedOps())
    padded.load_state_dict(packed.state_dict())

    order = list(range(len(samples.lengths)))
    packs = best_fit(samples.lengths, 2 * longest)
    found: dict[str, float] = {}

    def call(name: str, train: Callable[..., float], model: WanDiT, groups: list[list[int]]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            found[name] = train(model, samples, groups)

        return run

    groups = {"packs": packs} | {f"batches of {n}": [order[i : i + n] for i in order[::n]] for n in (2, 4)}
    calls = {
        name: call(name, train_packed, packed, group) if name == "packs" else call(name, train_padded, padded, group)
        for name, group in groups.items()
    }
    times = time_rounds(calls, 1 if quick else 2)
    for name, total in found.items():
        assert abs(total - found["packs"]) < 1e-3 * found["packs"], f"{name} give another result than packs: {found}"
    needed, count = sum(samples.lengths), len(samples.lengths)
    table = Table(
        f"Packs against padded batches: {count} samples of 52 to {longest:,} tokens, width {config.hidden_size}, "
        f"{config.num_layers} layers, fp32",
        ["", "tokens computed / needed", "samples/s", "packs / this"],
        note="A third of the samples are images, the others clips of 5 to 21 latent frames, with a thirtieth of the "
        f"tokens per frame of 480p. Packs: best fit into {2 * longest:,} tokens, as wan-data packs a buffer. Batches: "
        "in the order of the samples, each padded to the longest of its batch, with one masked attention call. Same "
        "model, forward and backward pass, and the same result.",
    )
    for name, group in groups.items():
        computed = needed if name == "packs" else sum(len(g) * max(samples.lengths[i] for i in g) for g in group)
        table.rows.append(
            [
                name,
                f"{computed / needed:.2f}",
                f"{count / median(times[name]):.2f}",
                f"{ratio(times[name], times['packs']):.2f}",
            ]
        )
    return table


# -- recomputation ----------------------------------------------------------------------------------------------------

# Megatron's model.recompute_granularity, and the mode of WanDiT that wan-train sets for it.
MODES: dict[str, Recompute] = {
    "none": "none",
    "elementwise": "elementwise",
    "selective": "all_but_attention",
    "full": "block",
}


def recompute(quick: bool) -> Table:
    """Activations that a forward pass on a mixed pack saves with each setting, and the time of both passes."""
    recipe = QUICK if quick else Recipe({**SIZES, "num_layers": 4}, [[5, 32, 32], [3, 32, 32], [1, 32, 32]])
    config = WanConfig.from_diffusers({**tiny_sizes(), **recipe.transformer})
    model = WanDiT(config)
    init_weights(model, seed=0)
    rng = torch.Generator().manual_seed(0)
    layout = PackLayout(tuple((f, h // 2, w // 2) for f, h, w in recipe.shapes))
    tokens = torch.randn(layout.total, config.token_in, generator=rng)
    texts = torch.randn(layout.num_samples, config.text_length, config.text_dim, generator=rng)
    timesteps = 1000 * torch.rand(layout.num_samples, generator=rng)

    def in_mode(mode: Recompute) -> Callable[[], None]:
        def run() -> None:
            model.recompute = mode
            model.zero_grad()
            model(tokens, timesteps, texts, layout).square().sum().backward()

        return run

    times = time_rounds({mode: in_mode(MODES[mode]) for mode in MODES}, 1 if quick else 3)
    table = Table(
        f"Recomputation: {config.num_layers} layers of width {config.hidden_size}, {layout.total:,} tokens, fp32",
        ["model.recompute_granularity", "saved", "forward and backward", "time / none"],
        note="Saved: memory that a forward pass leaves allocated, measured with torch's allocator.",
    )
    for mode in MODES:
        model.recompute = MODES[mode]
        model.zero_grad()
        with torch.profiler.profile(profile_memory=True) as profile:
            out = model(tokens, timesteps, texts, layout)
        kept = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
        del out
        took = seconds(median(times[mode]))
        table.rows.append([mode, gigabytes(kept), took, f"{ratio(times[mode], times['none']):.2f}"])
    return table


def tables(*, quick: bool) -> Iterator[Table]:
    """Yield each table when it is measured."""
    for measure in (loop, packs_against_padding, recompute):
        yield measure(quick)
