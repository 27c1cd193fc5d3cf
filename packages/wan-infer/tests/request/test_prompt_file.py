import dataclasses
from pathlib import Path

import pytest

from wan_infer.request.prompt_file import read_prompt_file
from wan_infer.request.settings import VideoRequest
from wan_model.sampling.settings import Settings

DEFAULT = VideoRequest("", 64, 48, 5, 7, Settings(steps=3))


def read(tmp_path: Path, name: str, content: str | bytes, default: VideoRequest = DEFAULT) -> list[VideoRequest]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompt_file(path, default)


def test_a_prompt_a_line(tmp_path: Path) -> None:
    requests = read(tmp_path, "a.txt", '\ufeff a rabbit \r\n\n兔子, "quoted"\n')
    assert requests == [dataclasses.replace(DEFAULT, prompt=prompt) for prompt in ("a rabbit", '兔子, "quoted"')]


def test_an_object_a_line_says_what_differs(tmp_path: Path) -> None:
    first, second = read(
        tmp_path,
        "a.jsonl",
        '{"prompt": "a"}\n\n{"prompt": "b", "size": "832*480", "frames": 1, "seed": 0, "negative_prompt": "", '
        '"steps": 9, "shift": 3, "guidance": 1.5, "solver": "dpm++"}\n',
    )
    assert first == dataclasses.replace(DEFAULT, prompt="a")
    assert second == VideoRequest("b", 832, 480, 1, 0, Settings(9, 3.0, 1.5, "dpm++", ""))


UNMERGED = dataclasses.replace(DEFAULT, lora_scales=(0.8, 0.5))


def test_scales_of_loras_that_are_not_merged(tmp_path: Path) -> None:
    lines = ('{"prompt": "a"}', '{"prompt": "a", "lora_scale": 0}', '{"prompt": "a", "lora_scale": [1, -0.5]}')
    requests = read(tmp_path, "a.jsonl", "\n".join(lines), UNMERGED)
    assert [request.lora_scales for request in requests] == [(0.8, 0.5), (0.0, 0.0), (1.0, -0.5)]


@pytest.mark.parametrize(
    ("scale", "default", "said"),
    [
        ("1", DEFAULT, "line 1: lora_scale needs LoRA files that are not merged: give --lora and --lora-mode unmerged"),
        ("[1, 2, 3]", UNMERGED, "line 1: got 3 scales of 2 LoRA; expected one for all or one each"),
        ("[]", UNMERGED, "line 1: got 0 scales of 2 LoRA; expected one for all or one each"),
        ('"1"', UNMERGED, "line 1: lora_scale is '1'; expected a number, or a list of them"),
        ("null", UNMERGED, "line 1: lora_scale is None; expected a number, or a list of them"),
        ("[true, 1]", UNMERGED, r"line 1: lora_scale is \[True, 1\]; expected a number, or a list of them"),
        ("1e999", UNMERGED, "line 1: .*expected a finite number|line 1: .*not JSON"),
    ],
)
def test_scales_that_cannot_be_meant(tmp_path: Path, scale: str, default: VideoRequest, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path, "a.jsonl", f'{{"prompt": "a", "lora_scale": {scale}}}', default)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e"])
def test_only_a_newline_ends_a_line(tmp_path: Path, odd: str) -> None:
    (request,) = read(tmp_path, "a.txt", f"one{odd}two\r\n")
    assert request.prompt == f"one{odd}two"
    if ord(odd) > 31:  # JSON has to escape the others
        (request,) = read(tmp_path, "a.jsonl", f'{{"prompt": "one{odd}two"}}\r\n')
        assert request.prompt == f"one{odd}two"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "a", r"must end in \.txt .* or \.jsonl"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "is not UTF-8: invalid start byte at byte 0"),
        ("a.jsonl", '{"prompt": "a"}\nb', "a.jsonl, line 2: it is not JSON"),
        ("a.jsonl", '["a"]', "line 1: expected an object such as"),
        ("a.jsonl", '{"seed": 1}', "line 1: expected an object such as"),
        ("a.jsonl", '{"prompt": "a", "sede": 1}', "line 1: there is no setting 'sede'; expected some of prompt, size"),
        ("a.jsonl", '{"prompt": "a", "seed": "1"}', "line 1: seed is '1'; expected int"),
        ("a.jsonl", '{"prompt": "a", "steps": true}', "line 1: steps is True; expected int"),
        ("a.jsonl", '{"prompt": "a", "shift": 1' + "0" * 400 + "}", r"line 1: shift is 10{59}; expected float$"),
        ("a.jsonl", '{"prompt": "a", "seed": 1' + "0" * 400 + "}", r"line 1: seed is 10{59}; expected int$"),
        ("a.jsonl", '{"prompt": "a\\ud800b"}', r"line 1: the prompt has '\\ud800' at character 1, which is no text$"),
        (
            "a.jsonl",
            '{"prompt": "a", "negative_prompt": "\\udcff"}',
            r"line 1: the negative prompt has '\\udcff' at character 0, which is no text$",
        ),
        ("a.jsonl", '{"prompt": "a", "frames": 8}', "line 1: the number of frames is 8; the autoencoder takes"),
        ("a.jsonl", '{"prompt": "a", "solver": "heun"}', "line 1: there is no solver 'heun'; expected unipc"),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path, name, content)


def test_an_absent_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_prompt_file(tmp_path / "absent.txt", DEFAULT)
