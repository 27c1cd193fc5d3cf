"""Floating-point operations required for one pack, independent of the implementation.

A multiplication with its addition counts as two. Only matrix products and attention are counted. S² is counted per
sample, not for the whole pack, and padding is not counted.
"""

import dataclasses
import functools

from wan_model.config import WanConfig
from wan_model.dit.lora import LoraSettings
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


def training_flops(config: WanConfig, layout: PackLayout, lora: LoraSettings | None = None) -> int:
    """Operations of a training step on a pack, as an exact integer; recomputation is not counted.

    Without adapters these are three forward passes. With adapters of rank r on frozen weights (the symbols are those of
    ``pack_flops``), where every linear is adapted, beside one forward pass:

    - L (8 S² h + 8 S T h): gradients of queries, keys and values;
    - L (12 S h² + 4 S h f) + 2 S h (values out): gradients of the linears' inputs. There are none of frozen weights, of
      the text, which is the input of two linears, and of what comes before the blocks;
    - L r (6 (12 S h + 2 S (h + f) + 4 T h) - 4 T h): two thin products for each adapter forward, and four backward: the
      gradients of A and B, and of their inputs, without those of the text;
    - less 6 S h² + 6 S h r: the rows that enter the first block have no gradient either.

    With fewer targets, nothing before the first adapter has a gradient, and keys and values of the text have one only
    if their linear is adapted.

    Args:
        config: sizes of the model.
        layout: the pack.
        lora: adapters that are trained; None for all weights.
    """
    flops = pack_flops(config, layout)
    return flops.training if lora is None else flops.forward + _Adapters(config, layout, lora).beside_forward()


@functools.cache
def _adapted(config: WanConfig, lora: LoraSettings) -> frozenset[str]:
    return frozenset(lora.linears(config))


class _Adapters:
    """Counts, linear by linear, what a step needs beside the forward pass of the frozen model."""

    def __init__(self, config: WanConfig, layout: PackLayout, lora: LoraSettings) -> None:
        self.config, self.tokens, self.text = config, layout.valid, layout.num_samples * config.text_length
        self.rank, self.adapted = lora.rank, _adapted(config, lora)
        flops = pack_flops(config, layout)
        self.of_attention = {"attn1": flops.self_attention, "attn2": flops.cross_attention}
        self.count = 0

    def _linear(self, name: str, rows: int, wide_in: int, wide_out: int, *, has_gradient: bool) -> bool:
        """Whether its output has a gradient, if its input has one or not."""
        self.count += 2 * rows * wide_in * wide_out * has_gradient
        if name not in self.adapted:
            return has_gradient
        # Forward, gradients of both matrices, and gradients of their inputs.
        self.count += 2 * rows * self.rank * (3 * wide_out + (2 + has_gradient) * wide_in)
        return True

    def _attention(self, name: str, has_gradient: bool, source: int, *, source_has_gradient: bool) -> bool:
        h, attention = self.config.hidden_size, name.rsplit(".", 1)[1]
        q = self._linear(f"{name}.to_q", self.tokens, h, h, has_gradient=has_gradient)
        k = self._linear(f"{name}.to_k", source, h, h, has_gradient=source_has_gradient)
        v = self._linear(f"{name}.to_v", source, h, h, has_gradient=source_has_gradient)
        # Forward are two products; backward one each for queries, keys, values and probabilities.
        products = q + k + v + (q or k)
        self.count += self.of_attention[attention] // self.config.num_layers // 2 * products
        return self._linear(f"{name}.to_out.0", self.tokens, h, h, has_gradient=q or k or v)

    def beside_forward(self) -> int:
        """Operations of adapters, and of the gradients of what is frozen."""
        h, f, rows = self.config.hidden_size, self.config.ffn_dim, False
        for layer in range(self.config.num_layers):
            block = f"blocks.{layer}"
            rows |= self._attention(f"{block}.attn1", rows, self.tokens, source_has_gradient=rows)
            rows |= self._attention(f"{block}.attn2", rows, self.text, source_has_gradient=False)
            inner = self._linear(f"{block}.ffn.net.0.proj", self.tokens, h, f, has_gradient=rows)
            rows |= self._linear(f"{block}.ffn.net.2", self.tokens, f, h, has_gradient=inner)
        assert rows, "something is adapted"
        return self.count + 2 * self.tokens * h * self.config.token_out
