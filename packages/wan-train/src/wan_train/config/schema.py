"""The whole configuration of a run: Megatron-Bridge's sections and ours.

Import only after ``wan_train.engine.start``.
"""

import dataclasses

from megatron.bridge.training.config import ConfigContainer


@dataclasses.dataclass
class ValidationConfig:
    """The ``validation`` section: a loss that compares across runs.

    Attributes:
        interval: steps between two validations; 0 for none.
        samples: of the validation split, from its beginning; None for all of it.
        timesteps: at which every sample is asked, in (0, 1000).
        seed: of the noise, which depends on it, the sample's key and the timestep alone.
    """

    interval: int = 0
    samples: int | None = 64
    timesteps: list[float] = dataclasses.field(default_factory=lambda: [100.0, 300.0, 500.0, 700.0, 900.0])
    seed: int = 1234

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: such a setting.
        """
        if self.interval < 0:
            raise ValueError(f"validation.interval is {self.interval}; expected steps, or 0 for no validation")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"validation.samples is {self.samples}; expected at least 1, or null for all")
        if not self.timesteps or not all(0 < timestep < 1000 for timestep in self.timesteps):
            raise ValueError(f"validation.timesteps is {self.timesteps}; expected some numbers between 0 and 1000")
        if len(set(self.timesteps)) < len(self.timesteps):
            raise ValueError(f"validation.timesteps is {self.timesteps}; each may be there once")


@dataclasses.dataclass
class EmaConfig:
    """The ``ema`` section: an exponential moving average of the weights, in fp32, saved in every checkpoint.

    Attributes:
        decay: share of the average that a step keeps; 0 for no average.
    """

    decay: float = 0.0

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: such a setting.
        """
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; expected 0 for none, or a number below 1 such as 0.9999")


@dataclasses.dataclass
class ReportConfig:
    """The ``report`` section: what the log says beside the loss.

    Attributes:
        peak_tflops: of one device at the precision of the run, dense, for MFU; None takes it from the device's name
            where that is known, and leaves MFU out elsewhere.
    """

    peak_tflops: float | None = None


@dataclasses.dataclass(kw_only=True)
class WanRunConfig(ConfigContainer):
    """Megatron-Bridge's configuration with the sections of this package."""

    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
