"""Bytes of the linears' inputs that a block saves, and of what adapters save. Imports no Megatron."""

import dataclasses
from typing import Self

from wan_model.config import WanConfig
from wan_model.dit.lora import LINEARS, LoraSettings
from wan_model.pack import PackLayout
from wan_train.model.layout import Layout

FP32 = 4
_ROW_PARALLEL = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")
# The linears of a block that have the same input.
_SAME_INPUT = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn1.to_out.0",),
    ("attn2.to_q",),
    ("attn2.to_k", "attn2.to_v"),
    ("attn2.to_out.0",),
    ("ffn.net.0.proj",),
    ("ffn.net.2",),
)


@dataclasses.dataclass(frozen=True)
class TrainedLinears:
    """The linears of a block whose inputs are saved: all of them, or those that have an adapter.

    Where blocks have adapters at different linears, this is a block that has all of them.

    Attributes:
        lora: adapters; None if the weights are trained.
        adapted: names of the linears that have an adapter in some block.
        shapes: rows, input width and output width of each linear on a rank, by name.
        size: bytes of an activation.
        of_pack: rows of the whole pack, and by how many ranks the input width of a row-parallel linear is split.
    """

    lora: LoraSettings | None
    adapted: frozenset[str]
    shapes: dict[str, tuple[float, float, float]]
    size: int
    of_pack: tuple[int, int]

    @classmethod
    def of(cls, model: WanConfig, layout: Layout, pack: PackLayout, lora: LoraSettings | None, size: int) -> Self:
        """Of a rank; the arguments are those of ``ActivationBytes.of``, and the bytes of an activation."""
        h, ffn, tensor = model.hidden_size, model.ffn_dim, layout.tensor
        entered, texts = pack.total / layout.context, pack.num_samples * model.text_length
        shapes = dict[str, tuple[float, float, float]]()
        for name in LINEARS:
            rows = texts if name in _SAME_INPUT[3] else entered
            wide_in, wide_out = ffn if name == "ffn.net.2" else h, ffn if name == "ffn.net.0.proj" else h
            split = name in _ROW_PARALLEL
            shapes[name] = (rows, wide_in / tensor, wide_out) if split else (rows, wide_in, wide_out / tensor)
        names = [] if lora is None else [name.split(".", 2)[2] for name in lora.linears(model)]
        return cls(lora, frozenset(names), shapes, size, (pack.total, tensor))

    @property
    def texts_have_keys(self) -> bool:
        """Whether the keys of the text have a gradient."""
        return self.lora is None or "attn2.to_k" in self.adapted

    def inputs(self, own_copies: dict[str, int]) -> float:
        """Bytes of the linears' inputs, and of the adapters' products and precision.

        Args:
            own_copies: of the linears whose input somebody else saves too, how many copies of it are saved besides.
        """
        total = 0.0
        for names in _SAME_INPUT:
            chosen = names if self.lora is None else tuple(name for name in names if name in self.adapted)
            on_text = names == _SAME_INPUT[3]
            if not chosen:
                continue
            rows, wide_in, _ = self.shapes[names[0]]
            if self.lora is not None and self.lora.dropout:
                total += len(chosen) * rows * wide_in * self.size  # each drops others
                if not on_text:  # the masks, of the whole pack
                    whole, ranks = self.of_pack
                    total += len(chosen) * whole * wide_in * (ranks if names[0] in _ROW_PARALLEL else 1)
            elif not on_text:  # the embedded text is counted once for all blocks
                total += own_copies.get(names[0], 1) * rows * wide_in * self.size
            if self.lora is not None:
                for name in chosen:
                    total += self._of_adapter(*self.shapes[name], gradient_of_input=not on_text)
        return total

    def first_masks(self) -> float:
        """Bytes of the dropout masks of linears that read the block's input, which matter if that has a gradient."""
        if self.lora is None or not self.lora.dropout:
            return 0.0
        return sum(self.of_pack[0] * self.shapes[name][1] for name in _SAME_INPUT[0] if name in self.adapted)

    def _of_adapter(self, rows: float, wide_in: float, wide_out: float, *, gradient_of_input: bool) -> float:
        assert self.lora is not None
        # A x; and A and B, which are fp32, in the precision of the input.
        matrices = (wide_in * gradient_of_input + wide_out) * (self.size if self.size < FP32 else 0)
        return self.lora.rank * (rows * self.size + matrices)
