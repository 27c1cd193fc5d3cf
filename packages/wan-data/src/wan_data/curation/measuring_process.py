"""The decoder process that measures clips while it decodes them.

``Decoder(program=PROGRAM)`` runs it. A job with ``measuring=measuring_text(options)`` is answered with a ``ClipInfo``
and the measures, which ``measures_from`` reads.
"""

import dataclasses
import json
from fractions import Fraction
from typing import Any

from wan_data.curation.libraries import scene_detectors, use_one_thread
from wan_data.curation.measures import Measures
from wan_data.curation.measuring_pass import MeasuringOptions, MeasuringPass
from wan_data.shards.json_records import from_json
from wan_data.video import decoder_process
from wan_data.video.display.picture import Rgb

PROGRAM = "wan_data.curation.measuring_process"


def measuring_text(options: MeasuringOptions) -> str:
    """What is to be measured, for ``wan_data.video.decoder_process.Job.measuring``."""
    return json.dumps(dataclasses.asdict(options))


def measures_from(value: Any) -> Measures:
    """The measures, from the values of JSON that a decoder process or a file gives.

    Raises:
        ValueError: they are damaged, or of another version.
    """
    return from_json(Measures, value, "its measures")


class _JsonPass:
    """A measuring pass whose result is values of JSON."""

    def __init__(self, options: MeasuringOptions, fps: Fraction) -> None:
        self._measuring = MeasuringPass(fps, options)

    def add(self, frame: Rgb, number: int) -> None:
        self._measuring.add(frame, number)

    def result(self) -> dict[str, Any]:
        return dataclasses.asdict(self._measuring.result())


def _measure(text: str, fps: Fraction) -> _JsonPass:
    return _JsonPass(from_json(MeasuringOptions, json.loads(text), "a job"), fps)


def _load() -> decoder_process.Measure:
    use_one_thread()
    scene_detectors()
    return _measure


if __name__ == "__main__":
    decoder_process.main(_load)
