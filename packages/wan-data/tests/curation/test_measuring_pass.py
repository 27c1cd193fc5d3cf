"""Measures by a decoder process, those of files, and what is said where the libraries are missing."""

import dataclasses
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from made_scenes import Scene, joined_scenes, write_frames
from media_files import write_video
from reused_decoder import ReusedDecoder

from wan_data.curation.measures import Measures
from wan_data.curation.measuring_pass import MeasuringOptions, MeasuringPass
from wan_data.curation.measuring_process import PROGRAM, measures_from, measuring_text
from wan_data.video.decode import ClipInfo, _Source, probe
from wan_data.video.decoder_process import Job
from wan_data.video.display.options import DisplayOptions
from wan_data.video.limits import Limits
from wan_data.video.source_file import Rejected

FPS = Fraction(16)


def measured(path, scenes="adaptive"):
    measuring = MeasuringPass(FPS, MeasuringOptions(scenes))
    probe(path, FPS, measuring=measuring)
    return measuring.result()


def test_measures_of_a_decoder_process_are_those_of_this_one(tmp_path):
    clip = write_frames(tmp_path / "clip.mkv", joined_scenes((14, 14), speed=2))
    other = write_frames(tmp_path / "other.mp4", Scene(5).frames(9), crf=20)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(other.read_bytes()[:-200])
    text = measuring_text(MeasuringOptions("adaptive"))
    jobs = [Job(path, FPS, Limits(), measuring=text) for path in (clip, damaged, other)] + [Job(clip, FPS, Limits())]
    with ReusedDecoder(program=PROGRAM) as decoder:
        answers = [(job.path.name, answer) for job, answer in decoder.decode(jobs)]
    assert [name for name, _ in answers] == ["clip.mkv"] * 2 + ["damaged.mp4"] + ["other.mp4"] * 2 + ["clip.mkv"]
    found = [answer for _, answer in answers]
    assert found[0] == found[5] == probe(clip, FPS)
    assert measures_from(found[1]) == measured(clip)
    assert measures_from(found[1]).cuts == (14,)
    assert isinstance(found[2], Rejected)
    assert isinstance(found[3], ClipInfo)
    assert measures_from(found[4]) == measured(other)


def test_measures_are_values_of_json(tmp_path):
    found = measured(write_frames(tmp_path / "clip.mkv", joined_scenes((8, 8), speed=2)))
    assert measures_from(json.loads(json.dumps(dataclasses.asdict(found)))) == found
    nothing = Measures(None, None, 0.0, 0.0, None, ("",) * 8)
    assert measures_from(json.loads(json.dumps(dataclasses.asdict(nothing)))) == nothing
    with pytest.raises(ValueError, match="its measures has text at motion; expected a number"):
        measures_from({**dataclasses.asdict(nothing), "motion": "much"})


def test_repeated_frames_count_as_if_they_were_copies():
    frames = [frame for frame in Scene(2).frames(12, speed=2) for _ in range(3)]
    measures = []
    for shown in (frames, [frame.copy() for frame in frames]):
        measuring = MeasuringPass(FPS)
        for number, frame in enumerate(shown):
            measuring.add(frame, number)
        measures.append(measuring.result())
    one, other = measures
    assert one.hashes == other.hashes
    assert one.stillness == other.stillness == pytest.approx(24 / 35)
    assert one.motion == pytest.approx(other.motion, rel=1e-6)
    assert one.black_borders == other.black_borders


def test_unknown_scenes_are_refused():
    with pytest.raises(ValueError, match="scenes are 'fast'; expected one of off, content, adaptive"):
        MeasuringOptions("fast")


@pytest.mark.parametrize(
    ("codec", "stored", "suffix"),
    [("libx264", "yuv420p", "mp4"), ("libx264", "yuv444p10", "mp4"), ("ffv1", "bgr0", "mkv"),
     ("mjpeg", "yuvj422p", "avi"), ("qtrle", "argb", "mov"), ("ffv1", "gray", "mkv")],
)  # fmt: skip
def test_quick_pixels_are_nearly_the_exact_ones(tmp_path, codec, stored, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", codec, stored=stored, frames=3)
    for picture in _Source(path, Limits(), DisplayOptions(), lambda _: None).resampled(FPS):
        exact, quick = picture.rgb().astype(float), picture.quick_rgb().astype(float)
        assert quick.shape == exact.shape
        assert np.abs(quick - exact).mean() < 3
        assert np.abs(np.median(quick - exact, (0, 1))).max() <= 2


def test_without_the_libraries_one_sentence_says_how_to_install_them():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"
        "from wan_data.curation import duplicates, expressions, measuring_process, libraries\n"
        "try:\n    libraries.check_libraries()\n"
        "except ValueError as error:\n    print(error)\n"
    )
    for missing, name in (("cv2", "OpenCV"), ("scenedetect", "PySceneDetect")):
        done = subprocess.run([sys.executable, "-c", code, missing], capture_output=True, text=True, check=True)
        expected = f"{name} is not installed, and curation needs it: pip install 'wan-data[curation]'"
        assert done.stdout.strip() == expected


def test_importing_the_modules_imports_none_of_the_libraries():
    code = (
        "import sys\n"
        "from wan_data.curation import duplicates, expressions, measuring_process, scenes, libraries\n"
        "print(sorted({'cv2', 'scenedetect', 'torch'} & set(sys.modules)))\n"
        "libraries.check_libraries()\n"
        "print(sorted({'cv2', 'scenedetect', 'torch'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "['cv2', 'scenedetect']"]
