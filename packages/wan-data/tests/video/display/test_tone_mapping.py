"""HDR is refused by name, or mapped to standard dynamic range: by the formulas of ITU-R BT.2100 and BT.1886."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from dataset_sources import records_of
from media_files import COLOURS, HEIGHT, WIDTH, quarters, write_video

from wan_data.prepare.settings import PrepareSettings
from wan_data.video.containers.video_reader import VideoReader
from wan_data.video.decode import probe
from wan_data.video.display import tone_mapping
from wan_data.video.display.colours import Colours, check_colours
from wan_data.video.display.options import TONE_MAP, DisplayOptions
from wan_data.video.limits import Limits
from wan_data.video.source_file import Rejected, open_source

PQ, HLG, BT2020 = 16, 18, 9
UNSTATED = 2
SDR_WHITE = 203.0  # cd/m2, ITU-R BT.2408
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # ITU-R BT.2087
GREYS = [1.0, 5.0, 10.0, 26.0, 50.0, 100.0, 150.0, SDR_WHITE]
CHROMATIC = [(100.0, 20.0, 20.0), (20.0, 100.0, 20.0), (20.0, 20.0, 100.0), (150.0, 150.0, 30.0)]
PATCH = 32


def pq_of(light: np.ndarray) -> np.ndarray:
    """Signal of PQ from cd/m2 (BT.2100, inverse EOTF)."""
    power = (light / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg_of(light: np.ndarray) -> np.ndarray:
    """Signal of HLG that a display of 1,000 cd/m2 shows as grey of ``light`` (BT.2100, system gamma 1.2)."""
    scene = (light / 1000) ** (1 / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def write_patches(
    path: Path,
    signals: np.ndarray,
    transfer: int,
    *,
    peak: float | None = None,
    stored: str = "yuv444p10le",
    **stated: int,
) -> Path:
    """Patches of R'G'B' signals side by side in BT.2020; ``peak`` is what the mastering display had, in cd/m2."""
    names = {PQ: "smpte2084", HLG: "arib-std-b67"}
    options = {}
    if peak is not None:
        display = f"G(8500,39850)B(6550,2300)R(35400,14600)WP(15635,16450)L({round(peak * 10_000)},1)"
        colours = f"colorprim=bt2020:transfer={names[transfer]}:colormatrix=bt2020nc:master-display={display}"
        # With B-frames and fewer frames than their delay, x265 takes the first DTS from memory it never wrote.
        options = {"x265-params": f"log-level=none:pools=none:frame-threads=1:lossless=1:bframes=0:{colours}"}
    height, width = 64, PATCH * len(signals)
    matrix = np.array([[0.2627, 0.6780, 0.0593], [-0.13963, -0.36037, 0.5], [0.5, -0.459786, -0.040214]])
    planes = (signals @ matrix.T) * [876, 896, 896] + [64, 512, 512]
    if stored.startswith("gbr"):
        planes = 1023 * signals[:, [1, 2, 0]]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1" if peak is None else "libx265", rate=16, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, stored
        tags = {"color_trc": transfer, "colorspace": BT2020, "color_primaries": BT2020, "color_range": 1, **stated}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        frame = av.VideoFrame(width, height, stored)
        for number, plane in enumerate(frame.planes):
            rows = np.zeros((height, plane.line_size // 2), np.uint16)
            rows[:, :width] = np.repeat(np.round(planes[:, number]).astype(np.uint16), PATCH)
            plane.update(rows.tobytes())
        for index in range(2):
            frame.pts, frame.time_base = index, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path: Path, display: DisplayOptions = DisplayOptions(hdr=TONE_MAP)) -> list[np.ndarray]:  # noqa: B008
    with open_source(path, Limits()) as file:
        return [frame.image.rgb() for frame in VideoReader(file, Limits(), display, lambda decoded: None).frames()]


def patches(path: Path) -> np.ndarray:
    first, *_ = read(path)
    return first[first.shape[0] // 2, PATCH // 2 :: PATCH].astype(int)


def grey(light: list[float]) -> np.ndarray:
    return np.repeat(np.array(light)[:, None], 3, axis=1)


def test_what_an_sdr_display_can_show_keeps_its_light(tmp_path):
    """Mastered on a display of SDR's white, the mapping is that of luminance to BT.709 and BT.1886 alone."""
    light = np.concatenate([grey(GREYS), CHROMATIC])
    shown = patches(write_patches(tmp_path / "a.mkv", pq_of(light @ TO_BT2020.T), PQ, peak=SDR_WHITE))
    wanted = 255 * (light / SDR_WHITE) ** (1 / 2.4)
    np.testing.assert_allclose(shown, wanted, atol=3)


def test_the_matrix_of_a_file_is_its_own(tmp_path):
    """The same colours as RGB and as YUV."""
    signals = hlg_of(np.array([(90.0, 10.0, 10.0), (10.0, 90.0, 10.0), (10.0, 10.0, 90.0)]) @ TO_BT2020.T)
    as_rgb = patches(write_patches(tmp_path / "rgb.mkv", signals, HLG, stored="gbrp10le", colorspace=0, color_range=2))
    as_yuv = patches(write_patches(tmp_path / "yuv.mkv", signals, HLG))
    np.testing.assert_allclose(as_yuv, as_rgb, atol=2)
    assert np.ptp(as_rgb, axis=1).min() > 60


def test_primaries_that_are_none_are_refused():
    frame = av.VideoFrame(16, 16, "yuv420p10le")
    with pytest.raises(Rejected, match=r"colour primaries are number 3 of ITU-T H\.273, .*: convert it"):
        check_colours(frame, Colours(transfer=PQ, primaries=3), DisplayOptions(hdr=TONE_MAP))


@pytest.fixture(scope="module")
def bright() -> list[float]:
    return [1.0, 10.0, 50.0, 100.0, SDR_WHITE, 400.0, 600.0, 1000.0]


def test_highlights_are_compressed_and_shadows_kept(tmp_path, bright):
    shown = patches(write_patches(tmp_path / "a.mkv", pq_of(grey(bright)), PQ, peak=1000))
    assert (np.ptp(shown, axis=1) <= 1).all()
    levels = shown[:, 1]
    assert (np.diff(levels) > 8).all()
    assert levels[-1] >= 253
    unmapped = 255 * np.minimum(np.array(bright) / SDR_WHITE, 1) ** (1 / 2.4)
    np.testing.assert_allclose(levels[0], unmapped[0], atol=5)
    assert levels[4] < 200  # SDR's white leaves room for what is brighter


def test_hlg_is_the_light_that_its_display_shows(tmp_path, bright):
    """The same light in HLG and in PQ, whose mastering display had the 1,000 cd/m2 of HLG's."""
    as_pq = patches(write_patches(tmp_path / "pq.mkv", pq_of(grey(bright)), PQ, peak=1000))
    as_hlg = patches(write_patches(tmp_path / "hlg.mkv", hlg_of(grey(bright)), HLG))
    np.testing.assert_allclose(as_hlg, as_pq, atol=4)


def test_primaries_and_matrix_that_are_not_stated_are_those_of_bt2020(tmp_path):
    signals = hlg_of(np.array(CHROMATIC) @ TO_BT2020.T)
    stated = patches(write_patches(tmp_path / "stated.mkv", signals, HLG))
    guessed = write_patches(tmp_path / "guessed.mkv", signals, HLG, color_primaries=UNSTATED, colorspace=UNSTATED)
    np.testing.assert_array_equal(patches(guessed), stated)
    assert np.ptp(stated, axis=1).min() > 50


def test_transparent_pixels_show_the_background(tmp_path):
    image = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    image[..., :3] = 120
    image[:, WIDTH // 2 :, 3] = 255
    tags = {"color_trc": HLG, "color_primaries": BT2020}
    path = write_video(tmp_path / "a.mkv", "ffv1", stored="bgra", images=[image, image], tags=tags)
    for shown in read(path, DisplayOptions("#0a0b0c", TONE_MAP)):
        assert shown[0, 0].tolist() == [10, 11, 12]
        opaque = shown[0, -1].astype(int)
        assert np.ptp(opaque) <= 1
        assert abs(int(opaque[0]) - 120) > 8


def test_a_preparation_refuses_or_maps_tones_as_it_is_told(prepared, clip, tiny_model, small, tmp_path):
    folder, name = tmp_path / "in", "phone.mp4"
    folder.mkdir()
    tags = {"colorspace": BT2020, "color_range": 1, "color_trc": HLG, "color_primaries": BT2020}
    write_video(folder / name, "libx264", stored="yuv420p10le", tags=tags, frames=17, options={"crf": "4"})
    (folder / "phone.json").write_text('{"caption": "x"}')
    with pytest.raises(Rejected, match=r"HDR \(HLG, ARIB STD-B67\); pass --hdr tone-map, or convert it"):
        probe(folder / name, Fraction(16))
    clip(folder / "plain.mkv", range(17))
    (folder / "plain.json").write_text('{"caption": "y"}')
    prepared(folder, tmp_path / "refused", tiny_model, PrepareSettings(**small))
    verdicts = {record.path: record for record in records_of(tmp_path / "refused")}
    assert verdicts[name].verdict == "rejected"
    assert "--hdr tone-map" in verdicts[name].reason
    settings = PrepareSettings(**small, hdr=TONE_MAP)
    mapped = prepared(folder, tmp_path / "mapped", tiny_model, settings)
    assert [record.verdict for record in records_of(tmp_path / "mapped")] == ["accepted"] * 2
    assert mapped.settings["hdr"] == TONE_MAP
    # The colours are those of the picture, brighter or darker.
    shown = quarters(read(folder / name)[0])
    assert [int(colour.argmax()) for colour in shown[:3]] == [int(np.argmax(COLOURS[letter])) for letter in "RGB"]


def test_the_table_of_a_kind_of_frames_is_computed_once(tmp_path):
    signals = hlg_of(grey([10.0, 100.0]))
    one, other = (write_patches(tmp_path / f"{number}.mkv", signals, HLG) for number in (1, 2))
    tone_mapping._graph.cache_clear()
    first = read(one)
    again = read(other)
    np.testing.assert_array_equal(first, again)
    assert tone_mapping._graph.cache_info().misses == 1


def test_a_choice_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match=r"hdr is 'drop'; expected one of refuse, tone-map"):
        PrepareSettings(hdr="drop")
