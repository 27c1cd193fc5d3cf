"""Floating-point operations required for one pack, independent of the implementation.

A multiplication with its addition counts as two. Only matrix products and attention are counted. S² is counted per
sample, not for the whole pack, and padding is not counted.
"""

import dataclasses

from wan_model.config import WanConfig
from wan_model.pack import PackLayout


@dataclasses.dataclass(frozen=True)
class PackFlops:
    """Operations of one forward pass, by part.

    Attributes:
        self_attention: scores and weighted sums among the video tokens.
        cross_attention: the same between video tokens and text.
        block_linears: projections of both attentions, and the feed-forward layers.
        ends: patch embedding, head, and the embedders of text and time.
    """

    self_attention: int
    cross_attention: int
    block_linears: int
    ends: int

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.self_attention + self.cross_attention + self.block_linears + self.ends

    @property
    def training(self) -> int:
        """Forward and backward: three forward passes. Recomputation is not counted."""
        return 3 * self.forward

    def __add__(self, other: "PackFlops") -> "PackFlops":
        """The sum over two packs."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return PackFlops(*(a + b for a, b in zip(mine, theirs, strict=True)))


def pack_flops(config: WanConfig, layout: PackLayout, *, text_length: int | None = None) -> PackFlops:
    """Operations required for a pack, every sample with its text at full length.

    With S tokens of a sample, T of its text, width h, feed-forward width f and L layers, one forward pass takes
    L (8 S h² + 4 S² h + 4 S h² + 4 T h² + 4 S T h + 4 S h f) + 2 S h (values in + out) + 2 T (text width h + h²)
    + 14 h² + 2 h (time features).

    Args:
        config: sizes of the model.
        layout: the pack.
        text_length: tokens of a text; the model's own by default.

    Returns:
        Operations, as exact integers.
    """
    h, f, text = config.hidden_size, config.ffn_dim, text_length or config.text_length
    tokens, samples, layers = layout.valid, layout.num_samples, config.num_layers
    squares = sum(length * length for length in layout.lengths)
    text_embedder = 2 * text * (config.text_dim * h + h * h)
    time_embedder = 2 * h * (config.freq_dim + h) + 2 * h * 6 * h
    return PackFlops(
        self_attention=layers * 4 * squares * h,
        cross_attention=layers * 4 * tokens * text * h,
        block_linears=layers * (12 * tokens * h * h + 4 * samples * text * h * h + 4 * tokens * h * f),
        ends=2 * tokens * h * (config.token_in + config.token_out) + samples * (text_embedder + time_embedder),
    )
