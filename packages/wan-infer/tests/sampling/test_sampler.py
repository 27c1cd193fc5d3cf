import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wan_infer import draw_contact_sheet, save_video  # noqa: F401  what the README imports
from wan_infer.request.options import ComputeOptions
from wan_infer.runtime.placement import Placement, onload
from wan_infer.sampling.sampler import WanSampler
from wan_model.sampling.denoising import draw_noise
from wan_model.sampling.settings import Settings
from wan_model.testing import seeds

SMALL: dict[str, Any] = {"width": 32, "height": 48, "frames": 5}
FAST = Settings(steps=3)


@pytest.mark.rounding
@pytest.mark.parametrize("seed", seeds(4))
def test_a_seed_means_one_video_alone_and_among_others(sampler: WanSampler, seed: int) -> None:
    together = sampler.sample_latents(["a rabbit", "a street"], seed=[3, seed], settings=FAST, **SMALL)
    alone = sampler.sample_latents(["a street"], seed=seed, settings=FAST, **SMALL)
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=1e-4)
    other = sampler.sample_latents(["a street"], seed=seed + 1, settings=FAST, **SMALL)
    assert not torch.allclose(alone, other, atol=0.1)


def test_the_global_generator_is_neither_used_nor_moved(sampler: WanSampler) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sampler.sample_latents(["a rabbit"], seed=3, settings=FAST, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, sampler.sample_latents(["a rabbit"], seed=3, settings=FAST, **SMALL))


def test_noise_is_pinned() -> None:
    # What a seed means must not change between versions.
    noise = draw_noise((16, 1, 4, 4), seed=42)
    torch.testing.assert_close(noise[0, 0, 0, :2], torch.tensor([1.9269153, 1.4872841]), atol=1e-6, rtol=0)


def test_videos_have_the_asked_size_and_range(sampler: WanSampler) -> None:
    steps = []
    video = sampler.sample(["a rabbit"], steps=2, on_step=lambda done, total: steps.append((done, total)), **SMALL)
    assert video.shape == (1, 3, 5, 48, 32)
    assert video.dtype == torch.float32
    assert -1 <= video.min() < video.max() <= 1
    assert steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize(("guidance", "samples"), [(1.0, 2), (5.0, 4)])
def test_guidance_runs_both_branches_in_one_pack(sampler: WanSampler, guidance: float, samples: int) -> None:
    packs = []
    handle = sampler.model.register_forward_pre_hook(lambda module, inputs: packs.append(inputs[3].num_samples))
    try:
        sampler.sample_latents(["a", "b"], settings=Settings(steps=2, guidance=guidance), **SMALL)
    finally:
        handle.remove()
    assert packs == [samples, samples]


def test_negative_prompt_matters_only_with_guidance(sampler: WanSampler) -> None:
    def sample(negative: str, guidance: float) -> torch.Tensor:
        settings = Settings(steps=2, guidance=guidance, negative_prompt=negative)
        return sampler.sample_latents(["a rabbit"], settings=settings, **SMALL)

    assert torch.equal(sample("grey", 1.0), sample("a man in a car", 1.0))
    assert not torch.allclose(sample("grey", 5.0), sample("a man in a car", 5.0))


def test_each_text_is_embedded_once(sampler: WanSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[str] = []
    encode = sampler.text_codec.encode_prompt

    def recording(prompt: str) -> tuple[torch.Tensor, int]:
        embedded.append(prompt)
        return encode(prompt)

    monkeypatch.setattr(sampler.text_codec, "encode_prompt", recording)
    settings = Settings(steps=1, negative_prompt="unseen, negative")
    sampler.sample_latents(["unseen one", "unseen one"], settings=settings, **SMALL)
    sampler.sample_latents(["unseen one"], settings=settings, **SMALL)
    assert embedded == ["unseen one", "unseen, negative"]


def test_training_checkpoint_is_sampled(
    model_folder: Path, sampler: WanSampler, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, 10, seed=1)
    write_checkpoint(tmp_path, 20, seed=2)
    newest = WanSampler.from_training_checkpoint(tmp_path, model_folder, device="cpu")
    older = WanSampler.from_training_checkpoint(tmp_path, model_folder, step=10, device="cpu")
    assert (newest.source.step, older.source.step) == (20, 10)
    results = [own.sample_latents(["a"], settings=FAST, **SMALL) for own in (newest, older, sampler)]
    assert not torch.allclose(results[0], results[1], atol=1e-2)
    assert not torch.allclose(results[0], results[2], atol=1e-2)


def test_another_latent_space_is_refused(
    model_folder: Path, sampler: WanSampler, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    spec = {**sampler.spec.to_dict(), "model_id": "vae-other-text-other"}
    write_checkpoint(tmp_path, 10, spec=spec)
    with pytest.raises(ValueError, match=r"different latent spaces: model_id \(vae-other-text-other against vae-"):
        WanSampler.from_training_checkpoint(tmp_path, model_folder, device="cpu")


def test_weights_that_give_nan_are_named(sampler: WanSampler) -> None:
    noise = torch.full((1, 16, 2, 6, 4), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sampler.sample_latents(["a"], settings=FAST, noise=noise, **SMALL)


def test_wrong_counts_are_named(sampler: WanSampler) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sampler.sample_latents(["a", "b"], seed=[1], settings=FAST, **SMALL)
    with pytest.raises(ValueError, match=r"noise has the shape .* expected \(1, 16, 2, 6, 4\)"):
        sampler.sample_latents(["a"], noise=torch.zeros(1, 16, 2, 6, 6), settings=FAST, **SMALL)


@pytest.mark.parametrize("fails", [False, True])
def test_a_part_is_copied_to_the_device_and_the_copy_dropped(fails: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = module.state_dict()
    parameters = list(module.parameters())
    # Nothing can be copied back from the meta device.
    with contextlib.suppress(KeyboardInterrupt), onload(module, torch.device("meta"), torch.device("cpu")):
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
        if fails:
            raise KeyboardInterrupt
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.data_ptr() == before[name].data_ptr(), name
        assert torch.equal(tensor, before[name])
    assert all(new is old for new, old in zip(module.parameters(), parameters, strict=True))


def test_placement_has_execution_and_offload_devices() -> None:
    placement = Placement(torch.device("cuda"), torch.bfloat16, torch.device("cpu"), offload=True)
    assert (placement.offload_device.type, placement.text_offload_device.type) == ("cpu", "cpu")
    assert Placement.choose(ComputeOptions("cpu")).dtype == torch.float32
    assert Placement.choose(ComputeOptions("cpu", "bfloat16")).dtype == torch.bfloat16
    for name, dtype, tf32 in (
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
    ):
        chosen = Placement.choose(ComputeOptions("cpu", vae_dtype=name))
        assert (chosen.vae_dtype, chosen.vae_tf32) == (dtype, tf32)
    assert Placement.choose(ComputeOptions("cpu")).vae_tf32, "as torch and the official code do by default"
    with pytest.raises(ValueError, match="'float16' of the autoencoder; expected float32, tf32, bfloat16"):
        ComputeOptions(vae_dtype="float16")
    for device in ("cuda:99", "mps", "nonsense"):
        with pytest.raises(ValueError, match=device):
            Placement.choose(ComputeOptions(device))


def test_bfloat16_stays_near_float32(model_folder: Path, sampler: WanSampler) -> None:
    coarse = WanSampler.from_pretrained(model_folder, device="cpu", dtype="bfloat16")
    assert coarse.model.proj_out.weight.dtype == torch.bfloat16
    assert next(coarse.codec.decoder.parameters()).dtype == torch.float32
    settings = Settings(steps=3, guidance=1.0)
    ours, exact = (own.sample_latents(["a"], settings=settings, **SMALL) for own in (coarse, sampler))
    assert 0 < float((ours - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("vae_dtype", ["float32", "tf32", "bfloat16"])
def test_the_autoencoder_has_the_precision_of_its_option(
    model_folder: Path, sampler: WanSampler, vae_dtype: str
) -> None:
    own = WanSampler.from_pretrained(model_folder, device="cpu", vae_dtype=vae_dtype)
    wanted = torch.bfloat16 if vae_dtype == "bfloat16" else torch.float32
    assert {parameter.dtype for parameter in own.codec.decoder.parameters()} == {wanted}
    assert own.codec.tf32 == (vae_dtype == "tf32")
    latents = draw_noise((16, 2, 6, 4), 1)[None]
    ours, exact = own.decode(latents), sampler.decode(latents)
    assert ours.dtype == torch.float32
    error = float((ours - exact).norm() / exact.norm())
    assert 0 < error < 0.05 if vae_dtype == "bfloat16" else error == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu")
def test_cuda_gives_the_latents_of_the_cpu_and_offloads_all_parts(model_folder: Path, sampler: WanSampler) -> None:
    own = WanSampler.from_pretrained(model_folder, device="cuda", dtype="float32", offload=True)
    latents = own.sample_latents(["a rabbit"], seed=3, settings=FAST, **SMALL)
    torch.testing.assert_close(
        latents, sampler.sample_latents(["a rabbit"], seed=3, settings=FAST, **SMALL), atol=1e-2, rtol=1e-2
    )
    own.decode(latents)
    assert {parameter.device.type for parameter in own.model.parameters()} == {"cpu"}
    assert {parameter.device.type for parameter in own.codec.decoder.parameters()} == {"cpu"}
