"""The configuration of a run: Megatron-Bridge's sections and those of this package.

Import only after ``wan_train.engine.start``.
"""

import dataclasses

from wan_model.flow import TIMESTEPS
from wan_train.config.lora import LoraConfig
from wan_train.config.samples import SamplesConfig
from wan_train.engine.upstream.configuration import BridgeValidation, ConfigContainer


@dataclasses.dataclass(kw_only=True)
class ValidationConfig(BridgeValidation):
    """The ``validation`` section: a validation loss that is comparable between runs.

    Attributes:
        interval: steps between two validations; 0 for none.
        samples: the first samples of the validation split; None for all of it.
        timesteps: timesteps at which the loss is computed, in (0, 1000).
        seed: of the noise, together with the sample's key and the timestep.
        caption_gap: compute the caption gap too, see ``wan_train.loop.caption_gap``: two more evaluations of at most 64
            samples. No loss shows that captions are ignored, so it is on.
    """

    interval: int = 0
    samples: int | None = 64
    timesteps: list[float] = dataclasses.field(default_factory=lambda: [100.0, 300.0, 500.0, 700.0, 900.0])
    seed: int = 1234
    caption_gap: bool = True

    def check(self) -> None:
        """Validate the section.

        Raises:
            ValueError: a setting is invalid.
        """
        if self.interval < 0:
            raise ValueError(f"validation.interval is {self.interval}; expected steps, or 0 for no validation")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"validation.samples is {self.samples}; expected at least 1, or null for all")
        if not self.timesteps or not all(0 < timestep < TIMESTEPS for timestep in self.timesteps):
            raise ValueError(
                f"validation.timesteps is {self.timesteps}; expected at least one number between 0 and {TIMESTEPS:g}"
            )
        if len(set(self.timesteps)) < len(self.timesteps):
            raise ValueError(f"validation.timesteps is {self.timesteps}; expected each only once")


@dataclasses.dataclass
class EmaConfig:
    """The ``ema`` section: an exponential moving average of the weights, in fp32, saved in every checkpoint.

    Attributes:
        decay: weight of the previous EMA in an update; 0 for no EMA.
    """

    decay: float = 0.0

    def check(self) -> None:
        """Validate the section.

        Raises:
            ValueError: a setting is invalid.
        """
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; expected 0 for none, or a number below 1 such as 0.9999")


@dataclasses.dataclass
class ReportConfig:
    """The ``report`` section: metrics beside the loss.

    Attributes:
        peak_tflops: dense peak of one device at the precision of the run, for MFU; None looks it up by the device's
            name, and omits MFU for unknown devices.
    """

    peak_tflops: float | None = None


@dataclasses.dataclass(kw_only=True)
class WanRunConfig(ConfigContainer):
    """Megatron-Bridge's configuration with the sections of this package."""

    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    samples: SamplesConfig = dataclasses.field(default_factory=SamplesConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
