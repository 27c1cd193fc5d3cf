"""What was found of the clips, without a cluster."""

import pytest

from wan_data.prepare.planned_source import PlannedSource
from wan_data.prepare.probing.results import ProbeResults, write_results
from wan_data.video.buckets import Size
from wan_data.video.decode import ClipInfo
from wan_data.video.windows import Window


@pytest.fixture
def probed_clips(tmp_path):
    """Ten clips of four windows."""
    info = ClipInfo(36, 36, 16.0, 48.0, 64.0, 1)
    windows = tuple(Window(start, start + 9) for start in range(0, 36, 9))
    sources = (
        PlannedSource(
            f"{number}.mkv", tmp_path / f"{number}.mkv", 1, f"{number}", "A clip.", info, Size(32, 48), windows
        )
        for number in range(10)
    )
    write_results(tmp_path / "results.sqlite", sources)
    return ProbeResults([tmp_path / "results.sqlite"])
