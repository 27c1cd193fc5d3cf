"""Options of the command line, passed to the training processes."""

import dataclasses
import json
from typing import Literal, Self

RECIPES = ("wan_1_3b", "wan_1_3b_t2i", "wan_14b", "wan_14b_t2i", "tiny")
DEFAULT_RECIPE = RECIPES[0]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of the command line.

    Attributes:
        recipe: one of ``RECIPES``; None for the one that the configuration file names, else
            ``wan_1_3b``.
        training_mode: preset of the objective.
        config_file: YAML applied over the recipe: a file, or the name of one of the package's.
        overrides: ``key.path=value`` settings, applied last.
        mock: train on random data.
        init_from: a model in diffusers' layout to start from.
        verbose: print Megatron's own output.
        command: ``finetune`` has other defaults, see ``wan_train.config.recipes.fine_tuning``.
    """

    recipe: str | None
    training_mode: Literal["pretrain", "finetune"] = "pretrain"
    config_file: str | None = None
    overrides: tuple[str, ...] = ()
    mock: bool = False
    init_from: str | None = None
    verbose: bool = False
    command: Literal["pretrain", "finetune"] = "pretrain"

    def to_json(self) -> str:
        """One argument for a worker process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse."""
        values = json.loads(text)
        return cls(**{**values, "overrides": tuple(values["overrides"])})
