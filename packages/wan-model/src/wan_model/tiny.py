"""A tiny Wan 2.1 model with random weights and the full architecture, in diffusers' folder layout.

``python -m wan_model.tiny FOLDER`` writes what released models have: transformer, autoencoder, text encoder, a working
tokenizer, scheduler, and the index that diffusers' ``WanPipeline.from_pretrained`` reads. Tests and the quickstart use
it if the released weights are not available. The same seed gives the same bytes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wan_model.config import WanConfig
from wan_model.extras import requires_extra
from wan_model.system.versions import check_dependencies

TINY_CONFIG = WanConfig(num_heads=4, head_dim=24, num_layers=2, ffn_dim=192, text_dim=32, text_length=512, freq_dim=64)

# Training text of the tokenizer; any text works.
_CORPUS = [
    "A large rabbit wakes in a meadow and looks up at a butterfly.",
    "Two people ride their bikes along a street between parked cars in the morning.",
    "A man in a car speaks into the camera while trees pass by the window.",
    "The camera pans slowly over green hills, a clear sky, and a quiet river.",
    "A close-up of a face; the light changes, leaves move in the wind.",
    "一只兔子在草地上，蝴蝶飞过。",  # noqa: RUF001  Chinese has its own comma
    "Une prairie, un ruisseau, des fleurs.",
    "Ein Mann fährt mit dem Rad.",
]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _randomise(module: torch.nn.Module, generator: torch.Generator, gain: float) -> None:
    # Scaled normal weights keep activations of order one through the depth; norm weights are near one, biases small.
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * gain / fan_in**0.5)
            else:
                parameter.copy_(0.02 * noise)


def _tokenizer(folder: Path, vocabulary: int, corpus: Sequence[str]) -> int:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*_CORPUS, *corpus], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def write_tiny_wan(folder: Path, *, seed: int = 0, config: WanConfig = TINY_CONFIG, corpus: Sequence[str] = ()) -> Path:
    """Write the model folder.

    Args:
        folder: the output folder; created if absent.
        seed: of all weights.
        config: sizes of the transformer; its ``text_dim`` is the text encoder's width.
        corpus: more training text of the tokenizer; frequent words become single tokens.

    Returns:
        ``folder``.
    """
    with requires_extra("tiny"):
        from diffusers import AutoencoderKLWan
        from transformers import UMT5Config, UMT5EncoderModel

    from wan_model.dit.model import WanDiT
    from wan_model.weights.transformer import save_transformer

    folder = Path(folder)
    vocabulary = _tokenizer(folder / "tokenizer", 640, corpus)

    generator = torch.Generator().manual_seed(seed)
    # The constructors draw weights from the global generator, whose state must not change for the caller.
    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKLWan(base_dim=8, z_dim=config.in_channels, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    _randomise(vae, generator, gain=1.2)
    vae.save_pretrained(folder / "vae")

    text_config = UMT5Config(
        vocab_size=vocabulary,
        d_model=config.text_dim,
        d_kv=8,
        d_ff=2 * config.text_dim,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        text_encoder = UMT5EncoderModel(text_config)
    _randomise(text_encoder, generator, gain=1.0)
    text_encoder.save_pretrained(folder / "text_encoder")

    model = WanDiT(config)
    _randomise(model, generator, gain=1.0)
    save_transformer(model.state_dict(), config, folder / "transformer")

    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "UniPCMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            "timestep_spacing": "linspace",
        },
    )
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "WanPipeline",
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
    )
    return folder


def main() -> None:
    """Command line of ``python -m wan_model.tiny``."""
    parser = argparse.ArgumentParser(prog="python -m wan_model.tiny", description=write_tiny_wan.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        check_dependencies("wan-model", ["tiny"])
        folder = write_tiny_wan(arguments.folder, seed=arguments.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"wrote a tiny Wan 2.1 with random weights to {folder}")


if __name__ == "__main__":
    main()
