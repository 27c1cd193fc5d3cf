"""Tokenizers of others: right ones are used, and those that would hang, multiply or mislead are named when loaded."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.prompt_cleaning import LONGEST_PROMPT, clean_prompt
from wan_model.codec.prompt_tokenizer import PromptTokenizer


def tokenizer_with(tiny_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_folder / "tokenizer", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    return folder


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


BACKTRACKING = replace({"Regex": "(a|aa)+$"}, "b")
UNDEFINED = {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}], "pair": [],
    "special_tokens": {},
}  # fmt: skip
SEQUENCE = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, BACKTRACKING]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": BACKTRACKING}, r"the pattern '\(a\|aa\)\+\$' in its normalizer"),
        ({"normalizer": SEQUENCE}, r"the pattern '\(a\|aa\)\+\$' in its normalizer"),
        ({"normalizer": replace({"String": "a"}, "b" * 10**6)}, "inserts 'bbb"),
        ({"normalizer": {"type": "Prepend", "prepend": "b" * 10**6}}, "inserts 'bbb"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}}}, "has a 'Split' in its pre_tokenizer"),
        ({"normalizer": {"type": ["NFKC"]}}, r"has a \['NFKC'\] in its normalizer"),
        ({"normalizer": replace({"Regex": []}, "b")}, r"the pattern \[\] in its normalizer"),  # type: ignore[dict-item]
        ({"post_processor": UNDEFINED}, "has the token '</s>' in its template, which special_tokens lacks"),
        ({"model": {"type": "Unknown"}}, "is no tokenizer"),
        ({"model": []}, "is no tokenizer"),
        ({"normalizer": "NFKC"}, "is no tokenizer"),
    ],
    ids=[
        "pattern",
        "in a sequence",
        "replacement",
        "prefix",
        "split",
        "kind",
        "no pattern",
        "template",
        "model",
        "list",
        "text",
    ],
)
def test_a_part_that_no_text_encoder_has_is_refused(
    changes: dict[str, Any], said: str, tiny_folder: Path, tmp_path: Path
) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=said):
        PromptTokenizer(tokenizer_with(tiny_folder, tmp_path, changes))
    assert time.process_time() - start < 20


def test_the_normaliser_of_umt5_is_accepted(tiny_folder: Path, tmp_path: Path) -> None:
    parts = [{"type": "NFKC"}, replace({"Regex": " {2,}"}, "▁")]
    changes = {"normalizer": {"type": "Sequence", "normalizers": parts}}
    tokenizer = PromptTokenizer(tokenizer_with(tiny_folder, tmp_path, changes))
    assert tokenizer("a  rabbit", 512) == tokenizer("a▁rabbit", 512)


def test_a_tokenizer_without_tokens_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(tokenizer_with(tiny_folder, tmp_path, {"post_processor": None}))
    assert tokenizer("a", 512)
    with pytest.raises(ValueError, match=r"gives no token for ''; expected at least an end token"):
        tokenizer("", 512)


def test_a_tokenizer_of_another_model_is_named(tiny_folder: Path) -> None:
    tokenizer = PromptTokenizer(tiny_folder / "tokenizer")
    ids = tokenizer("a rabbit", 512)
    assert tokenizer("a rabbit", 512, max(ids) + 1) == ids
    with pytest.raises(ValueError, match=f"gives the token {max(ids)}, of which the text encoder has {max(ids)}: "):
        tokenizer("a rabbit", 512, max(ids))
    codec = LatentCodec.from_pretrained(tiny_folder, load_vae=False)
    codec.text_encoder.shared.num_embeddings = 3
    with pytest.raises(ValueError, match="tokenizer and text encoder are not of one model"):
        codec.encode_text(["a rabbit"])


def test_a_prompt_of_megabytes_is_refused_and_a_long_one_is_not() -> None:
    assert clean_prompt("a " * 1000).split() == ["a"] * 1000
    with pytest.raises(ValueError, match="a prompt has 1,000,001 characters; expected at most 1,000,000"):
        clean_prompt("a" * (LONGEST_PROMPT + 1))


def test_a_cut_keeps_the_end_token_and_the_count_is_of_the_whole_text(tiny_folder: Path) -> None:
    from tokenizers import Tokenizer

    ours = PromptTokenizer(tiny_folder / "tokenizer")
    theirs = Tokenizer.from_file(f"{tiny_folder}/tokenizer/tokenizer.json")
    for text in ("", "a rabbit", "a rabbit wakes in a meadow " * 5):
        whole = theirs.encode(text).ids
        for length in (1, 4, len(whole), 512):
            theirs.enable_truncation(length)
            assert ours.tokenize(text, length) == (theirs.encode(text).ids, len(whole))
            theirs.no_truncation()
