"""The ``lora`` section: train low-rank adapters on frozen weights instead of the weights. Imports no Megatron."""

import dataclasses

from wan_model.config import WanConfig
from wan_model.dit.lora import LoraSettings


@dataclasses.dataclass
class LoraConfig:
    """See ``wan_model.dit.lora.LoraSettings``.

    Attributes:
        rank: of every adapter; 0 trains the weights themselves.
        alpha: the change is alpha / rank * B A; null for the rank, so that the factor is 1.
        use_rslora: alpha / sqrt(rank) instead.
        dropout: probability that a value of an adapter's input is dropped.
        targets: names or globs of the linears of the blocks; by default all of them.
    """

    rank: int = 0
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    targets: list[str] = dataclasses.field(default_factory=lambda: ["*"])

    def settings(self) -> LoraSettings | None:
        """The adapters; None if none are trained.

        Raises:
            ValueError: a setting is invalid.
        """
        if self.rank == 0:
            return None
        if strange := [target for target in self.targets if not isinstance(target, str)]:
            raise ValueError(f"lora.targets has {strange[0]!r}; expected names such as attn1.to_q")
        alpha = None if self.alpha is None else float(self.alpha)
        return LoraSettings(self.rank, alpha, self.use_rslora, float(self.dropout), tuple(self.targets))

    def check(self, model: WanConfig) -> None:
        """Validate the section against the sizes of the transformer.

        Raises:
            ValueError: a setting is invalid.
        """
        if (settings := self.settings()) is not None:
            settings.linears(model)
