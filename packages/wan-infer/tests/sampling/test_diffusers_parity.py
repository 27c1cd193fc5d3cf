"""The same weights and the same noise through diffusers' own pipeline."""

import math
from pathlib import Path

import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file

from wan_infer.sampling.sampler import WanSampler
from wan_model.sampling.denoising import draw_noise
from wan_model.sampling.settings import Settings, SolverName
from wan_model.testing import seeds

PROMPT, NEGATIVE = "A rabbit &amp; a  butterfly\n in a meadow", "blurred, grey"


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> WanPipeline:
    # The transformer is put together by hand, because diffusers' own loader of it wants accelerate to be installed.
    folder = model_folder / "transformer"
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    transformer.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    pipe = WanPipeline.from_pretrained(model_folder, transformer=transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


# diffusers' DPM++ hands a tensor to numpy in a way that is out of date.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.rounding
@pytest.mark.parametrize("seed", seeds(7))
@pytest.mark.parametrize(("solver", "guidance"), [("unipc", 5.0), ("dpm++", 5.0), ("euler", 5.0), ("unipc", 1.0)])
def test_latents_and_video_equal_the_pipelines(
    pipeline: WanPipeline, sampler: WanSampler, model_folder: Path, solver: SolverName, guidance: float, seed: int
) -> None:
    # The pipeline's scheduler comes from the released configuration, not from our settings.
    match solver:
        case "unipc":
            scheduler = UniPCMultistepScheduler.from_pretrained(model_folder, subfolder="scheduler", flow_shift=5.0)
        case "dpm++":
            # As people use it with Wan: the released configuration, given to the other class.
            scheduler = DPMSolverMultistepScheduler.from_pretrained(
                model_folder, subfolder="scheduler", flow_shift=5.0, solver_type="midpoint"
            )
        case "euler":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline.scheduler = scheduler
    noise = draw_noise((16, 3, 12, 8), seed=seed)[None]
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": 96,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 10,
        "guidance_scale": guidance,
        "latents": noise,
    }
    expected = pipeline(**arguments, output_type="latent").frames
    settings = Settings(10, 5.0, guidance, solver, NEGATIVE)
    latents = sampler.sample_latents([PROMPT], width=64, height=96, frames=9, seed=seed, settings=settings)
    error = float((latents - expected).norm() / expected.norm())
    assert error <= 1e-4
    assert float((expected - noise).norm() / noise.norm()) > 0.1, "the model moved nothing, so nothing was compared"

    frames = pipeline(**arguments, output_type="pt").frames[0]
    video = sampler.decode(latents)[0].transpose(0, 1) / 2 + 0.5
    psnr = -10 * math.log10(float((video - frames).square().mean()) + 1e-20)
    assert psnr >= 50
    print(f"{solver}, guidance {guidance}: relative error of latents {error:.2e}, PSNR {psnr:.1f} dB")
