"""Sampling settings, checked before anything is loaded. Imports no torch."""

import dataclasses
import math
from typing import Literal, get_args

# Source: ``sample_neg_prompt`` of the official release's shared configuration.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)

SolverName = Literal["unipc", "dpm++", "euler"]
SOLVERS: tuple[SolverName, ...] = get_args(SolverName)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings; the defaults are the official ones.

    Attributes:
        steps: evaluations of the model.
        shift: s in sigma <- s * sigma / (1 + (s - 1) * sigma).
        guidance: g in u + g * (c - u); at 1 only the conditional branch c is computed.
        solver: ``unipc`` or ``dpm++`` (both second order), or ``euler`` (first order).
        negative_prompt: prompt of the unconditional branch u.

    Raises:
        ValueError: a setting is invalid.
    """

    steps: int = 50
    shift: float = 5.0
    guidance: float = 5.0
    solver: SolverName = "unipc"
    negative_prompt: str = NEGATIVE_PROMPT

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"{self.steps} sampling steps; expected 1 to 1000")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"the shift is {self.shift}; it must be positive")
        if not (math.isfinite(self.guidance) and self.guidance >= 1):
            raise ValueError(f"the guidance scale is {self.guidance}; it must be 1 (none) or more")
        if self.solver not in SOLVERS:
            raise ValueError(f"there is no solver {self.solver!r}; expected {', '.join(SOLVERS)}")
        check_text("negative prompt", self.negative_prompt)

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.guidance != 1


def check_seed(name: str, seed: int, bits: int = 63) -> None:
    """Refuse a seed that a generator does not take.

    Args:
        name: of the setting, for the message.
        seed: its value.
        bits: of the largest one; fewer where numbers are added to it.

    Raises:
        ValueError: it is negative or too large.
    """
    if not 0 <= seed < 2**bits:
        raise ValueError(f"{name} is {seed}; expected a number from 0 to 2^{bits} - 1")


def check_text(name: str, text: str) -> None:
    """Refuse half a surrogate pair, as of a command line that is no UTF-8: the metadata of a video cannot hold it.

    Raises:
        ValueError: naming the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} has {text[error.start]!r} at character {error.start}, which is no text") from None
