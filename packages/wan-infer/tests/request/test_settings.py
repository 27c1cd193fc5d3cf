import pytest

from wan_infer.request.flags import repeat_flags
from wan_infer.request.settings import VideoRequest, check_task, pair_requests, parse_size
from wan_model.sampling.settings import Settings


def test_sizes_are_width_by_height() -> None:
    assert parse_size("832*480") == parse_size(" 832x480 ") == (832, 480)
    request = pair_requests(["a"], ["480*832"], [81], [0], Settings())[0]
    assert (request.width, request.height) == (480, 832)


@pytest.mark.parametrize("text", ["832", "832*", "-16*32", "832*480*3", "a*b", ""])
def test_other_spellings_of_a_size_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected width\*height"):
        parse_size(text)


@pytest.mark.parametrize(
    ("frames", "near"), [(80, "77 and 81$"), (2, "1 and 5$"), (0, "nearest is 1$"), (-3, " is 1$")]
)
def test_frames_that_are_not_4n_plus_1_name_the_nearest(frames: int, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        VideoRequest("a", frames=frames)


def test_sides_that_16_does_not_divide_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"850\*480 .* nearest is 848\*480"):
        VideoRequest("a", width=850)
    with pytest.raises(ValueError, match=r"nearest is 16\*16"):
        VideoRequest("a", width=1, height=0)


def test_task_sizes() -> None:
    check_task("t2v-14B", [VideoRequest("a", 1280, 720)])
    check_task("t2v-1.3B", [VideoRequest("a", 416, 240)])
    with pytest.raises(ValueError, match=r"1280\*720 is not one of t2v-1.3B's: 480\*832, 832\*480, 416\*240"):
        check_task("t2v-1.3B", [VideoRequest("a", 1280, 720)])


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((1280, 720), r"832\*480"), ((720, 1280), r"480\*832"), ((320, 192), r"416\*240"), ((512, 512), r"480\*832")],
)
def test_the_nearest_size_of_a_task_is_named(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(ValueError, match=f"the nearest is {nearest};"):
        check_task("t2v-1.3B", [VideoRequest("a", *size)])


def test_lists_go_together_and_single_values_hold_for_all() -> None:
    settings = Settings(steps=3)
    requests = pair_requests(["a"], ["32*48"], [1, 5], [7, 8], settings)
    assert requests == [VideoRequest("a", 32, 48, 1, 7, settings), VideoRequest("a", 32, 48, 5, 8, settings)]
    with pytest.raises(
        ValueError, match="2 prompts, 3 sizes, 1 frame counts, 1 seeds; give each either once or 3 times"
    ):
        pair_requests(["a", "b"], ["32*32"] * 3, [1], [0], settings)


def test_seeds_are_not_negative() -> None:
    with pytest.raises(ValueError, match="the seed is -1"):
        VideoRequest("a", seed=-1)


def test_flags_with_several_values() -> None:
    assert repeat_flags(["--prompts", "a", "b", "--fps", "8", "--sizes", "1*1", "2*2"]) == [
        *("--prompts", "a", "--prompts", "b", "--fps", "8"),
        *("--sizes", "1*1", "--sizes", "2*2"),
    ]
    # The first value is one whatever it looks like.
    assert repeat_flags(["--prompts", "--dashes", "b"]) == ["--prompts", "--dashes", "--prompts", "b"]
    assert repeat_flags(["--prompts=a", "--json"]) == ["--prompts=a", "--json"]
