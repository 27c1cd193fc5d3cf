"""Models with random weights made on their device, and inputs: 1.4 billion weights take seconds to draw on a CPU."""

import torch
from torch import Tensor, nn

from bench.models import Samples
from wan_model import WanConfig, WanDiT
from wan_model.codec.vae_decoder import VaeDecoder
from wan_model.dit.attention import AttentionKind
from wan_model.dit.ops import TorchOps
from wan_model.dit.recompute import Recompute

TINY = WanConfig(num_heads=2, head_dim=24, num_layers=2, ffn_dim=64, text_dim=16, text_length=8, freq_dim=32)
TWO_LAYERS = WanConfig(num_layers=2)


def random_model(config: WanConfig, device: str, dtype: torch.dtype, seed: int = 0) -> WanDiT:
    """A model whose activations are of order one through its depth, and whose every gradient is alive."""
    with torch.device("meta"):
        model = WanDiT(config)
    model.to_precision(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model.train()


def use(model: WanDiT, kind: AttentionKind, mode: Recompute) -> None:
    """Choose attention and recomputation, and drop the gradients."""
    assert isinstance(model.ops, TorchOps), "the model was built with torch's ops"
    model.ops.kind, model.recompute = kind, mode
    model.zero_grad()


def call(model: WanDiT, samples: Samples, tokens: Tensor) -> Tensor:
    """A forward pass."""
    out: Tensor = model(tokens, samples.timesteps, samples.texts, samples.layout)
    return out


def random_decoder(width: int) -> VaeDecoder:
    """The autoencoder's decoder with random weights; the width of the released one is 96."""
    multiples = [1, 2, 4, 4] if width >= 32 else [1, 2, 2, 2]
    sizes = {"base_dim": width, "z_dim": 16, "dim_mult": multiples, "num_res_blocks": 2 if width >= 32 else 1}
    decoder = VaeDecoder({**sizes, "temperal_downsample": [False, True, True]})
    draw_convolutions(decoder)
    with torch.no_grad():
        # Pixels are cut off at -1 and 1, where no difference would be seen.
        decoder.decoder.conv_out.weight.mul_(0.2)
    return decoder.eval().requires_grad_(False)


def random_encoder(width: int) -> nn.Module:
    """diffusers' autoencoder, which encodes for ``wan-data``, with random weights; the released one is 96 wide."""
    from diffusers import AutoencoderKLWan

    multiples = [1, 2, 4, 4] if width >= 32 else [1, 2, 2, 2]
    autoencoder: nn.Module = AutoencoderKLWan(
        base_dim=width, z_dim=16, dim_mult=multiples, num_res_blocks=2 if width >= 32 else 1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    draw_convolutions(autoencoder)
    return autoencoder.eval().requires_grad_(False)


def draw_convolutions(autoencoder: nn.Module) -> None:
    """Random weights with which activations stay of order one, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
            elif parameter.ndim > 1:
                parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(std=0.02, generator=generator)
