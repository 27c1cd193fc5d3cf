"""Mutations of wan-infer."""

from mutations.mutation import mutation_of

_of = mutation_of("wan-infer")

MUTATIONS = (
    _of(
        "text-encoder-not-released", "sampling/sampler.py",
        'self.__dict__.pop("text_codec", None)', "pass",
        "11 GB of the text encoder stay in memory for the whole run",
        "sampling/test_memory.py",
    ),
    _of(
        "guidance-branches-swapped", "sampling/denoise.py",
        "conditional, unconditional = both", "unconditional, conditional = both",
        "guidance moves videos away from the prompt and towards the negative prompt",
        "sampling/test_diffusers_parity.py",
    ),
    _of(
        "one-noise-for-all-videos", "sampling/sampler.py",
        "draw_noise(shape, own) for own in seeds", "draw_noise(shape, seeds[0]) for own in seeds",
        "all videos of a call use the first seed",
        "sampling/test_sampler.py",
    ),
    _of(
        "unmerged-lora-of-the-first-scale", "loading/lora_unmerged.py",
        "factor * scales[number] for", "factor * scales[0] for",
        "all LoRA files beside the weights have the scale of the first",
        "loading/test_lora_unmerged.py",
    ),
    _of(
        "lora-on-another-base-not-said", "sampling/sampler.py",
        "if base.digest != digest", "if False",
        "a LoRA is applied to weights that it was not trained on, and nobody is told why the videos are bad",
        "loading/test_lora_base.py",
    ),
    _of(
        "metadata-always-kept", "cli.py",
        'metadata=not given["no_metadata"]', "metadata=True",
        "--no-metadata has no effect: published files contain the prompts",
        "test_cli.py",
    ),
    _of(
        "tiles-of-another-process", "sampling/decode.py",
        "all_tiles[parallelism.rank * tiles : (parallelism.rank + 1) * tiles]",
        "all_tiles[parallelism.rank : parallelism.rank + tiles]",
        "with several processes and tiles parts of every frame are missing",
        "runtime/test_parallelism.py::test_equal_to_one_process",
    ),
)  # fmt: skip
