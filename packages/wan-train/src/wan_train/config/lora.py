"""The ``lora`` section: train low-rank adapters on frozen weights instead of the weights. Imports no Megatron."""

import dataclasses

from wan_model.config import WanConfig
from wan_model.dit.lora import LINEARS, LoraSettings, adapted_names
from wan_model.weights.lora_adapters import FoundAdapters
from wan_model.weights.lora_names import official_name
from wan_train.model.layout import layers_of_stages

_ALL = ["*"]


def _official_names() -> dict[str, list[str]]:
    """Our names of the linears by the official ones, whole or from a dot on, as programs of others take them."""
    found: dict[str, list[str]] = {}
    for ours in LINEARS:
        parts = official_name(f"blocks.0.{ours}").split(".")[2:]
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), []).append(ours)
    return {name: ours for name, ours in found.items() if not name.isdigit()}


_OFFICIAL = _official_names()


@dataclasses.dataclass
class LoraConfig:
    """See ``wan_model.dit.lora.LoraSettings``.

    Attributes:
        rank: of every adapter; 0 trains the weights themselves.
        alpha: the change is alpha / rank * B A; null for the rank, so that the factor is 1.
        use_rslora: alpha / sqrt(rank) instead.
        dropout: probability that a value of an adapter's input is dropped.
        targets: names or globs of the linears of the blocks; by default all of them.
        init_from: a LoRA that the training starts from: a safetensors file of any trainer, or the checkpoints of a LoRA
            run; null for A at random and B at zero. A rank of 0, an alpha of null and targets of all linears are then
            those of the file.
        fp8_base: keep the frozen weights of the blocks' linears in fp8, a byte each; the error is printed.
        offload_base: keep the frozen weights of the blocks in main memory, and fetch each block's when it computes; it
            needs ``model.recompute_granularity=full``.
    """

    rank: int = 0
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    targets: list[str] = dataclasses.field(default_factory=lambda: [*_ALL])
    init_from: str | None = None
    fp8_base: bool = False
    offload_base: bool = False

    @property
    def trains(self) -> bool:
        """Whether adapters are trained instead of the weights; their rank may be known only from ``init_from``."""
        return self.rank != 0 or self.init_from is not None

    def take_over(self, found: FoundAdapters, model: WanConfig) -> None:
        """Complete the section from the LoRA that the training starts from.

        Raises:
            ValueError: a setting is not the LoRA's.
        """
        name = f"lora.init_from is {found.where}"
        if self.rank not in (0, found.rank):
            raise ValueError(
                f"{name}, a LoRA of rank {found.rank}, and lora.rank is {self.rank}; set lora.rank={found.rank}, or "
                "lora.rank=0 for that of the file"
            )
        alpha = found.alpha(use_rslora=self.use_rslora)
        self.rank, self.alpha = found.rank, alpha if self.alpha is None else self.alpha
        if self.targets == _ALL:
            self.targets = found.targets(model)
        settings = self.settings()
        assert settings is not None, "it has a rank"
        if not found.has_factor(settings):
            raise ValueError(
                f"{name}, a LoRA whose changes have the factor {found.factor:g} (alpha {alpha:g} at rank "
                f"{found.rank}), and lora.alpha is {self.alpha:g}; set lora.alpha={alpha:g}, or "
                "lora.alpha=null for that of the file"
            )
        ours, theirs = settings.linears(model), set(adapted_names(found.tensors))
        if theirs.symmetric_difference(ours):
            only_theirs = sorted(theirs.difference(ours))
            what = (
                f"which changes {only_theirs[0]}"
                if only_theirs
                else (f"which does not change {next(one for one in ours if one not in theirs)}")
            )
            raise ValueError(
                f"{name}, {what}, and lora.targets is {self.targets}, which {'does not' if only_theirs else 'does'}; "
                f"leave lora.targets out for the {len(theirs)} linears of the file"
            )

    def settings(self) -> LoraSettings | None:
        """The adapters; None if none are trained.

        Raises:
            ValueError: a setting is invalid.
        """
        if self.rank == 0:
            return None
        if strange := [target for target in self.targets if not isinstance(target, str)]:
            raise ValueError(f"lora.targets has {strange[0]!r}; expected names such as attn1.to_q")
        for target in self.targets:
            if ours := _OFFICIAL.get(target):
                raise ValueError(
                    f"lora.targets has {target!r}, which is a name of the official release; write {' and '.join(ours)}"
                )
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
        elif not self.trains:
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
