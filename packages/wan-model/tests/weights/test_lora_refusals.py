"""Files that are no LoRA of the transformer, and hostile ones: each is refused in one sentence that names it."""

import json
import math
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from wan_model.testing.lora_files import CHANGED, Tensors, comfy, tiny_lora
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.lora_config import CONFIG_NAME
from wan_model.weights.lora_names import METADATA_KEY
from wan_model.weights.lora_patterns import match_patterns
from wan_model.weights.lora_reading import read_lora

Q = "transformer.blocks.0.attn1.to_q"
OFFICIAL_Q = "diffusion_model.blocks.0.self_attn.q"


def refusal(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> str:
    path = folder / "style.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"style\.safetensors|adapter_config\.json") as error:
        read_lora(path, TINY_CONFIG)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def pair(name: str, out: int, width: int, rank: int = 3) -> Tensors:
    return {f"{name}.lora_A.weight": torch.ones(rank, width), f"{name}.lora_B.weight": torch.ones(out, rank)}


OTHER_KINDS: dict[str, tuple[Tensors, str]] = {
    "DoRA of peft": ({f"{Q}.lora_magnitude_vector": torch.ones(96)}, "is a DoRA"),
    "DoRA of ComfyUI": ({f"{OFFICIAL_Q}.dora_scale": torch.ones(96, 1)}, "is a DoRA"),
    "LoKr": ({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(4, 4)}, "is a LoHa, LoKr"),
    "LoHa": ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.ones(4, 4)}, "is a LoHa, LoKr"),
    "keys of the image": (pair("diffusion_model.blocks.0.cross_attn.k_img", 96, 96), "is for an image-to-video model"),
    "of kohya": (pair("lora_unet_blocks_0_cross_attn_v_img", 96, 96), "is for an image-to-video model"),
    "of diffusers": (pair("transformer.blocks.0.attn2.add_k_proj", 96, 96), "is for an image-to-video model"),
    "image embedder": (pair("diffusion_model.img_emb.proj.1", 96, 96), "is for an image-to-video model"),
    "image norms": ({"diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(96)}, "image-to-video"),
    "36 input channels": (
        pair("transformer.patch_embedding", 96, 144),
        "it has 36 input channels, as an image-to-video model has",
    ),
    "36 input channels as a difference": (
        {"diffusion_model.patch_embedding.diff": torch.ones(96, 36, 1, 2, 2)},
        "it has 36 input channels, as an image-to-video model has",
    ),
    "axes of the kernel in another order": (
        {
            "transformer.patch_embedding.lora_A.weight": torch.ones(3, 2, 2, 1, 16),
            "transformer.patch_embedding.lora_B.weight": torch.ones(96, 3, 1, 1, 1),
        },
        "changes patch_embedding.weight of shape [96, 16, 1, 2, 2] by [96, 3, 1, 1, 1] times [3, 2, 2, 1, 16]",
    ),
    "48 input channels": (pair("transformer.patch_embedding", 96, 192), "channels, as Wan 2.2's 5B model has"),
    "52 input channels": (pair("transformer.patch_embedding", 96, 208), "it has 52 input channels, as another model"),
    "Wan 2.2's 5B": (pair(Q, 3072, 3072), "its width of 3072 is that of Wan 2.2's 5B model"),
    "14B": (pair(OFFICIAL_Q, 5120, 5120), "its width of 5120 is that of the 14B models of Wan 2.1 and 2.2"),
    "1.3B": (pair(OFFICIAL_Q, 1536, 1536), "its width of 1536 is that of Wan 2.1's 1.3B model"),
    "second transformer": (pair("transformer_2.blocks.0.attn1.to_q", 96, 96), "is for Wan 2.2, which has a second"),
    "VACE": (pair("diffusion_model.vace_blocks.0.self_attn.q", 96, 96), "is for VACE"),
    "text encoder": (pair("text_encoder.encoder.block.0.layer.0.q", 96, 96), "is for a text encoder"),
    "more layers": (
        pair("lora_unet_blocks_9_self_attn_q", 96, 96),
        "changes lora_unet_blocks_9_self_attn_q.lora_A.weight (and 1 more such keys), which this transformer of 2 "
        "layers does not have",
    ),
    "another architecture": (pair("diffusion_model.double_blocks.0.img_attn.qkv", 96, 96), "does not have"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_files_of_other_kinds_and_models_are_named(tmp_path: Path, name: str) -> None:
    tensors, wanted = OTHER_KINDS[name]
    # Alone, and in between others that fit: nothing is dropped.
    assert wanted in refusal(tmp_path, tensors)
    assert wanted in refusal(tmp_path, {**pair("transformer.blocks.1.attn2.to_k", 96, 96), **tensors})


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"ss_base_model_version": "wan22_14b"}, "is for Wan 2.2 (ss_base_model_version is wan22_14b)"),
        ({"modelspec.architecture": "Wan2.2/lora"}, "is for Wan 2.2 (modelspec.architecture is Wan2.2/lora)"),
        ({"ss_base_model_version": "wan21_i2v_14b"}, "is for an image-to-video model"),
        (
            {METADATA_KEY: json.dumps({"base_model_name_or_path": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "r": 3})},
            "is for an image-to-video model (base_model_name_or_path is Wan2.1-I2V-14B-480P-Diffusers)",
        ),
    ],
)
def test_files_that_say_that_they_are_for_another_model(tmp_path: Path, metadata: dict[str, str], wanted: str) -> None:
    assert wanted in refusal(tmp_path, tiny_lora(), metadata)


def test_what_a_file_of_this_model_says_is_no_reason(tmp_path: Path) -> None:
    metadata = {
        "ss_base_model_version": "wan21_14b",
        "modelspec.architecture": "wan2.1/lora",
        METADATA_KEY: json.dumps({"base_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "lora_alpha": 3}),
    }
    save_file(tiny_lora(), tmp_path / "a.safetensors", metadata)
    assert len(read_lora(tmp_path, TINY_CONFIG).products) == len(CHANGED)


DAMAGED: dict[str, tuple[Tensors, str]] = {
    "only A": ({f"{Q}.lora_A.weight": torch.ones(3, 96)}, "only one of the two matrices"),
    "only B": ({f"{Q}.lora_B.weight": torch.ones(96, 3)}, "only one of the two matrices"),
    "only alpha": ({f"{Q}.alpha": torch.tensor(1.0)}, f"holds {Q}.alpha without lora_A and lora_B"),
    "only the bias of B": ({f"{Q}.lora_B.bias": torch.ones(96)}, "without lora_A and lora_B"),
    "twice": (
        {**pair(Q, 96, 96), **pair(OFFICIAL_Q, 96, 96)},
        f"holds both {OFFICIAL_Q}.lora_A.weight and {Q}.lora_A.weight, which are the same part",
    ),
    "product and difference": ({**pair(Q, 96, 96), f"{Q}.diff": torch.ones(96, 96)}, "expected one of them"),
    "two biases": (
        {**pair(Q, 96, 96), f"{Q}.diff_b": torch.ones(96), f"{Q}.lora_B.bias": torch.ones(96)},
        "expected one of them",
    ),
    "rank 0": (pair(Q, 96, 96, rank=0), "by matrices of rank 0"),
    "two ranks": ({**pair(Q, 96, 96), f"{Q}.lora_B.weight": torch.ones(96, 2)}, "[96, 2] times [3, 96]"),
    "no axes": ({f"{Q}.lora_A.weight": torch.tensor(1.0), f"{Q}.lora_B.weight": torch.tensor(1.0)}, "[] times []"),
    "one axis": ({f"{Q}.lora_A.weight": torch.ones(96), f"{Q}.lora_B.weight": torch.ones(96)}, "[96] times [96]"),
    "a product on a norm": (pair("transformer.blocks.0.norm2", 96, 96), "which is no matrix"),
    "bias of what has none": (
        {"diffusion_model.head.modulation.diff_b": torch.ones(96)},
        "there is no scale_shift_table",
    ),
    "difference of another shape": ({f"{Q}.diff": torch.ones(96, 95)}, "of shape [96, 96] by [96, 95]"),
    "several alphas": ({**pair(Q, 96, 96), f"{Q}.alpha": torch.ones(2)}, "has the shape [2]; expected one number"),
    "NaN": ({**pair(Q, 96, 96), f"{Q}.lora_A.weight": torch.full((3, 96), torch.nan)}, "not finite"),
    "infinite alpha": ({**pair(Q, 96, 96), f"{Q}.alpha": torch.tensor(torch.inf)}, "not finite"),
    "integers": ({**pair(Q, 96, 96), f"{Q}.lora_A.weight": torch.ones(3, 96, dtype=torch.int8)}, "of type I8"),
    "booleans": ({**pair(Q, 96, 96), f"{Q}.alpha": torch.tensor(True)}, "of type BOOL"),
    "a whole weight": ({**pair(Q, 96, 96), f"{Q}.weight": torch.ones(96, 96)}, f"holds {Q}.weight, which is no part"),
    "modules_to_save": ({"base_model.model.proj_out.bias": torch.ones(64)}, "which is no part of a LoRA"),
    "a control character": ({"\x1b[31m": torch.ones(1)}, r"holds '\x1b[31m', which is no part"),
    "a long key": ({"k" * 10**6: torch.ones(1)}, "which is no part"),
    "nothing": ({}, "changes nothing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_incomplete_and_misshapen_files(tmp_path: Path, name: str) -> None:
    tensors, wanted = DAMAGED[name]
    assert wanted in refusal(tmp_path, tensors)


# [field of peft's configuration or the whole text, what is said]
CONFIGURATIONS: list[tuple[Any, str]] = [
    ("[" * 100_000, "is nested more than 100 levels deep"),
    ('{"a":' * 100_000, "is nested more than 100 levels deep"),
    (" " * (2**22 + 1), "characters"),
    ("{", "is not JSON"),
    ('{"lora_alpha": ' + "9" * 5000 + "}", "is not JSON"),
    ("[1]", "is a JSON list"),
    ({"lora_alpha": "16"}, "lora_alpha of .* is '16'; expected a finite number"),
    ({"lora_alpha": True}, "lora_alpha of .* is True"),
    ({"lora_alpha": None}, "lora_alpha of .* is None"),
    ({"lora_alpha": float("nan")}, "lora_alpha of .* is nan"),
    ({"lora_alpha": 10**400}, "lora_alpha of .* is 1000"),
    ({"r": "3"}, "r of .* is '3'; expected a rank"),
    ({"r": 0}, "r of .* is 0; expected a rank"),
    ({"r": 3.5}, "r of .* is 3.5; expected a rank"),
    ({"r": 8}, "the rank 8, but its tensors have the rank 3: it belongs to another file"),
    ({"use_rslora": "yes"}, "use_rslora of .* is 'yes'; expected true or false"),
    ({"alpha_pattern": [1]}, "alpha_pattern of .* is a JSON list"),
    ({"alpha_pattern": {"to_q": "1"}}, "alpha_pattern to_q of .* is '1'"),
    ({"rank_pattern": {"to_q": -1}}, "rank_pattern to_q of .* is -1"),
    ({"rank_pattern": {"to_q": 2}}, "gives blocks.0.attn1.to_q the rank 2"),
    ({"alpha_pattern": {"to_q[": 1}}, r"has the pattern 'to_q\[', which is no regular expression"),
    ({"alpha_pattern": {"[b-a]": 1}}, r"has the pattern '\[b-a\]', which is no regular expression"),
    ({"alpha_pattern": {"(?i)to_q": 1}}, "which is no regular expression"),
    ({"alpha_pattern": {"(" * 900: 1}}, "which is no regular expression"),
    ({"alpha_pattern": {"a" * 1001: 1}}, "over 1000 characters"),
    ({"alpha_pattern": {str(i): 1 for i in range(5000)}}, "over 4096 patterns"),
    ({"use_dora": True}, r"is of a DoRA \(use_dora\)"),
    ({"alora_invocation_tokens": [1]}, "variant of LoRA"),
    ({"peft_type": "LOHA"}, "is of the type 'LOHA'"),
    ({"peft_type": ["LORA"]}, "is of the type"),
    ({"init_lora_weights": "pissa_niter_4"}, "is 'pissa_niter_4', which changes the base model too"),
    ({"init_lora_weights": {}}, "which changes the base model too"),
]


@pytest.mark.parametrize("beside", [False, True], ids=["metadata", "beside"])
@pytest.mark.parametrize(("given", "wanted"), CONFIGURATIONS, ids=[str(given)[:30] for given, _ in CONFIGURATIONS])
def test_configurations_of_another_kind(tmp_path: Path, given: Any, wanted: str, beside: bool) -> None:
    text = given if isinstance(given, str) else json.dumps(given)
    if beside:
        (tmp_path / CONFIG_NAME).write_text(text)
        tensors = {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in tiny_lora().items()}
        said = refusal(tmp_path, tensors)
    else:
        # As diffusers' pipelines write it.
        written = text if isinstance(given, str) else json.dumps({f"transformer.{key}": given[key] for key in given})
        said = refusal(tmp_path, tiny_lora(), {METADATA_KEY: written})
    assert re.search(wanted, said)


def test_a_configuration_beside_counts_for_files_of_peft_only(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    tensors = tiny_lora()
    save_file(tensors, tmp_path / "style.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    factors = [
        {factor for _, _, factor in read_lora(tmp_path / name, TINY_CONFIG).products.values()}
        for name in ("style.safetensors", "adapter_model.safetensors")
    ]
    assert factors == [{1.0}, {2.0}]


def test_a_regular_expression_without_end_is_ended() -> None:
    names = ["blocks.0.attn1.to_q", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"]
    start, in_others = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(ValueError, match="take too long to match"):
        match_patterns(["(a+)+"], names, "style.safetensors", cpu_seconds=1)
    assert time.process_time() - start < 1  # in this process
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - in_others < 3
    assert match_patterns(["x", "(b.*)+"], names, "style.safetensors") == [1, None]


def test_a_module_in_the_working_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("re", "json", "resource", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert match_patterns([".*q"], ["to_q"], "style.safetensors") == [0]


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no LoRA at .*pytorch_lora_weights"):
        read_lora(tmp_path, TINY_CONFIG)
    for name in ("a", "b"):
        save_file(comfy(ab=True, alpha=None), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"has 2 safetensors files \(a.safetensors, b.safetensors\); give one of them"):
        read_lora(tmp_path, TINY_CONFIG)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")
def test_patterns_are_matched_under_a_limit_of_the_system() -> None:
    """A scheduler's limit of the address space (``ulimit -v``) may be below that of the matching process."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (900 << 20,) * 2)\n"
        "from wan_model.weights.lora_patterns import match_patterns\n"
        "print(match_patterns(['(to_q)+', 'b'], ['blocks.0.to_q', 'c'], 'a file'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[0, None]\n", "")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickled.pt")
    for content, said in {
        b"": r"is empty \(0 bytes\); download or copy it again",
        b"no": r"is a text and no safetensors file; name the file",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": r"pointer of a file in Git LFS; .*git lfs pull",
        (tmp_path / "pickled.pt").read_bytes(): r"is a pickled file of PyTorch .*convert it to safetensors",
        b"\x80\x02}q\x00.": r"is a pickled file of PyTorch",
        b"\x10" + bytes(7) + b"no header": r"is not a complete safetensors file \(.*; download or copy it again",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_lora(path, TINY_CONFIG)
    length = 17 << 20
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * length)
    with pytest.raises(ValueError, match=r"has a header of 17,825,792 bytes; at most 16,777,216 are read"):
        read_lora(path, TINY_CONFIG)
    with pytest.raises(ValueError, match=r"the scale of the LoRA .* is nan; expected a finite number"):
        read_lora(path, TINY_CONFIG, math.nan)
    with pytest.raises(ValueError, match=r"no LoRA at .*absent"):
        read_lora(tmp_path / "absent", TINY_CONFIG)
