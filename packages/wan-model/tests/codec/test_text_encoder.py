"""UMT5's encoder and its tokenizer against transformers', with the same weights."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_model.codec.prompt_tokenizer import PromptTokenizer
from wan_model.codec.text_encoder import TextEncoder, distance_buckets
from wan_model.testing import assert_within, rounding_scale

PROMPTS = ["", "a rabbit", "一只兔子在草地上, \U0001f430!", "a rabbit and a butterfly in a meadow " * 100]


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, UMT5EncoderModel

    encoder = UMT5EncoderModel.from_pretrained(tiny_folder / "text_encoder", dtype=torch.float32)
    return encoder.eval(), AutoTokenizer.from_pretrained(tiny_folder / "tokenizer")


@pytest.fixture(scope="module")
def ours(tiny_folder: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(tiny_folder / "text_encoder")


@pytest.mark.rounding
@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_are_those_of_the_masked_ones(
    tiny_folder: Path, ours: TextEncoder, theirs: tuple[Any, Any], prompt: str
) -> None:
    encoder, tokenizer = theirs
    given = tokenizer([prompt], padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    ids = PromptTokenizer(tiny_folder / "tokenizer")(prompt, 512)
    length = int(given.attention_mask.sum())
    assert ids == given.input_ids[0, :length].tolist()
    with torch.no_grad():
        wanted = encoder(given.input_ids, given.attention_mask).last_hidden_state[0, :length]
    double = copy.deepcopy(ours).double()
    scale = rounding_scale(lambda: {"embedding": double(torch.tensor(ids))}, samples=4)
    assert_within(ours(torch.tensor(ids)), wanted, scale["embedding"])


@pytest.mark.rounding
def test_coarse_weights_are_as_near_as_transformers_own(
    tiny_folder: Path, ours: TextEncoder, theirs: tuple[Any, Any]
) -> None:
    from transformers import UMT5EncoderModel

    tokenizer = PromptTokenizer(tiny_folder / "tokenizer")
    their_coarse = UMT5EncoderModel.from_pretrained(tiny_folder / "text_encoder", dtype=torch.bfloat16).eval()
    our_coarse = TextEncoder.from_pretrained(tiny_folder / "text_encoder", torch.bfloat16)
    squares = torch.zeros(3, dtype=torch.float64)
    for prompt in PROMPTS:
        ids = torch.tensor(tokenizer(prompt, 512))
        with torch.no_grad():
            their = their_coarse(ids[None]).last_hidden_state[0]
        exact = ours(ids)
        errors = (our_coarse(ids).float() - exact, their.float() - exact, exact)
        squares += torch.stack([error.double().square().sum() for error in errors])
    ours_off, theirs_off, size = squares.sqrt().tolist()
    assert ours_off < 1.2 * theirs_off
    assert 1e-4 * size < ours_off < 0.02 * size


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (16, 20)])
def test_buckets_are_transformers(buckets: int, farthest: int) -> None:
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    layer = UMT5Attention.__new__(UMT5Attention)
    torch.nn.Module.__init__(layer)
    layer.is_decoder = False
    layer.relative_attention_num_buckets, layer.relative_attention_max_distance = buckets, farthest
    places = torch.arange(300)
    wanted = layer._relative_position_bucket(places[None, :] - places[:, None])
    assert torch.equal(distance_buckets(300, buckets, farthest), wanted)


def test_what_is_no_encoder_of_wan_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder / "text_encoder", tmp_path / "text_encoder")
    weights = folder / "model.safetensors"
    state = load_file(weights)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TextEncoder.from_pretrained(folder)

    key = "encoder.block.1.layer.0.SelfAttention.q.weight"
    save_file({name: value for name, value in state.items() if name != key}, weights)
    refused(r"lacks encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight and 0 more of UMT5's weights")
    save_file({**state, key: state[key][:-1].clone()}, weights)
    refused(r"holds encoder\.block\.1.*of shape \[31, 32\]; expected \[32, 32\]")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    refused("the text encoder is t5 with gated-gelu; expected umt5 with gated-gelu")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        PromptTokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not JSON"):
        PromptTokenizer(folder)


def test_an_embedding_under_its_other_name_is_found(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder / "text_encoder", tmp_path / "text_encoder")
    state = load_file(folder / "model.safetensors")
    shared = state.pop("shared.weight", None)
    state.setdefault("encoder.embed_tokens.weight", shared)
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
    ids = torch.arange(5)
    one, other = (TextEncoder.from_pretrained(path)(ids) for path in (folder, tiny_folder / "text_encoder"))
    assert torch.equal(one, other)
