"""The ``lora`` section: train low-rank adapters on frozen weights instead of the weights. Imports no Megatron."""

import dataclasses

from wan_model.config import WanConfig
from wan_model.dit.lora import LoraSettings
from wan_train.model.layout import layers_of_stages


@dataclasses.dataclass
class LoraConfig:
    """See ``wan_model.dit.lora.LoraSettings``.

    Attributes:
        rank: of every adapter; 0 trains the weights themselves.
        alpha: the change is alpha / rank * B A; null for the rank, so that the factor is 1.
        use_rslora: alpha / sqrt(rank) instead.
        dropout: probability that a value of an adapter's input is dropped.
        targets: names or globs of the linears of the blocks; by default all of them.
        fp8_base: keep the frozen weights of the blocks' linears in fp8, a byte each; the error is printed.
        offload_base: keep the frozen weights of the blocks in main memory, and fetch each block's when it computes; it
            needs ``model.recompute_granularity=full``.
    """

    rank: int = 0
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    targets: list[str] = dataclasses.field(default_factory=lambda: ["*"])
    fp8_base: bool = False
    offload_base: bool = False

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

    def check(self, model: WanConfig, *, recompute: str, fully_sharded: bool) -> None:
        """Validate the section.

        Args:
            model: sizes of the transformer.
            recompute: see ``wan_model.dit.recompute``.
            fully_sharded: whether the run is.

        Raises:
            ValueError: a setting is invalid, or excludes another.
        """
        settings = self.settings()
        if settings is not None:
            settings.linears(model)
        else:
            self._check_unset()
        for name in ("fp8_base", "offload_base"):
            if getattr(self, name) and fully_sharded:
                raise ValueError(f"lora.{name} is not supported with dist.use_megatron_fsdp; leave one of them out")
        if self.offload_base and recompute != "block":
            raise ValueError(
                "lora.offload_base needs model.recompute_granularity=full: without it the weights of every block would "
                "stay on the device until the backward pass; set it"
            )

    def _check_unset(self) -> None:
        """Refuse a section without its rank, with which all weights would be trained."""
        fresh = LoraConfig()
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) != getattr(fresh, field.name):
                raise ValueError(
                    f"lora.{field.name} is {value!r} and lora.rank is 0, which trains the weights themselves; set "
                    f"lora.rank, or leave lora.{field.name} out"
                )

    def check_stages(self, model: WanConfig, stages: int) -> None:
        """Refuse targets that leave a pipeline stage without adapters: Megatron resumes no stage without parameters.

        Args:
            model: sizes of the transformer.
            stages: number of pipeline stages.

        Raises:
            ValueError: naming the first such stage.
        """
        if (settings := self.settings()) is None:
            return
        adapted, first = {int(name.split(".")[1]) for name in settings.linears(model)}, 0
        for stage, size in enumerate(layers_of_stages(model.num_layers, stages)):
            end = first + size
            if adapted.isdisjoint(range(first, end)):
                raise ValueError(
                    f"lora.targets is {self.targets!r}, which adapts nothing in the blocks {first} to {end - 1} of "
                    f"pipeline stage {stage}; add targets there, or lower model.pipeline_model_parallel_size"
                )
            first = end
