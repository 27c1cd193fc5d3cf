"""What the sampler holds in memory, and on which device its parts are."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from infer_command import QUICK, run
from safetensors.torch import save_file
from torch import Tensor, nn

from wan_infer.loading import sources
from wan_infer.runtime.placement import Placement
from wan_infer.sampling import sampler as sampler_module
from wan_infer.sampling.sampler import WanSampler
from wan_model.codec.text_encoder import TextEncoder
from wan_model.sampling.settings import Settings
from wan_model.testing.lora_files import tiny_lora

SMALL: dict[str, Any] = {"width": 32, "height": 48, "frames": 5}
FAST = Settings(steps=2, negative_prompt="grey")


@pytest.fixture(scope="module")
def _filled_caches(model_folder: Path) -> None:
    """What a process computes once and keeps, such as the frequencies of timesteps, is there before anything counts."""
    sampler = WanSampler.from_pretrained(model_folder, device="cpu")
    sampler.decode(sampler.sample_latents(["a"], settings=FAST, **SMALL))


@pytest.fixture
def _new_objects_only(_filled_caches: None) -> Iterator[None]:
    """Hide from ``live_bytes`` what there was before, which takes a second to go through with torch imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all tensors that something in this process refers to, each storage once."""
    gc.collect()
    # type() and not isinstance: proxies would be resolved by it.
    tensors = [held for held in gc.get_objects() if issubclass(type(held), Tensor) and not held.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


def size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


@pytest.mark.usefixtures("_new_objects_only")
def test_release_text_frees_the_text_encoder(model_folder: Path) -> None:
    sampler = WanSampler.from_pretrained(model_folder, device="cpu")
    before = live_bytes()
    (embedding,) = sampler.embed(["a rabbit"])
    encoder = weakref.ref(sampler.text_codec.text_encoder)
    assert live_bytes() == before + size(encoder()) + embedding.nbytes
    sampler.release_text()
    assert encoder() is None
    assert live_bytes() == before + embedding.nbytes
    assert torch.equal(sampler.embed(["a rabbit"])[0], embedding), "embeddings are kept"
    assert "text_codec" not in vars(sampler)
    sampler.embed(["a street"])
    assert "text_codec" in vars(sampler), "loaded again for a new prompt"


def test_the_command_frees_the_text_encoder_before_it_loads_the_transformer(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[TextEncoder]] = []
    alive: list[bool] = []
    load_encoder, load_weights = TextEncoder.from_pretrained, sources.load_weights

    def recording_encoder(*arguments: Any) -> TextEncoder:
        encoder = load_encoder(*arguments)
        encoders.append(weakref.ref(encoder))
        return encoder

    def recording_weights(*arguments: Any) -> None:
        alive.extend(encoder() is not None for encoder in encoders)
        load_weights(*arguments)

    monkeypatch.setattr(TextEncoder, "from_pretrained", recording_encoder)
    monkeypatch.setattr(sources, "load_weights", recording_weights)
    result = run("--model", model_folder, "--prompts", "a", "b", *QUICK, "--output-folder", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert alive == [False], "loaded once, and freed when the transformer is loaded"
    assert encoders[0]() is None


@pytest.mark.usefixtures("_new_objects_only")
@pytest.mark.parametrize("source", ["released", "checkpoint", "lora", "unmerged LoRA"])
def test_each_part_is_held_once(
    source: str, model_folder: Path, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    before = live_bytes()
    match source:
        case "released":
            sampler = WanSampler.from_pretrained(model_folder, device="cpu")
        case "checkpoint":
            write_checkpoint(tmp_path / "run", 10, average=2)
            sampler = WanSampler.from_training_checkpoint(tmp_path / "run", model_folder, device="cpu", ema=True)
        case "lora":
            save_file(tiny_lora(), tmp_path / "lora.safetensors")
            sampler = WanSampler.from_pretrained(model_folder, device="cpu", lora=(tmp_path / "lora.safetensors", 1.0))
        case "unmerged LoRA":
            save_file(tiny_lora(), tmp_path / "lora.safetensors")
            sampler = WanSampler.from_pretrained(
                model_folder, device="cpu", lora=tmp_path / "lora.safetensors", lora_mode="unmerged"
            )
    transformer = sampler.model
    assert live_bytes() == before + size(transformer)
    decoder = sampler.codec.decoder
    assert live_bytes() == before + size(transformer) + size(decoder)
    latents = sampler.sample_latents(["a"], settings=FAST, **SMALL)
    embeddings = sum(embedding.nbytes for embedding in sampler.embed(["a", "grey"]))
    sampler.release_text()
    kept = before + size(transformer) + size(decoder) + embeddings
    assert live_bytes() == kept + latents.nbytes
    video = sampler.decode(latents)
    assert live_bytes() == kept + latents.nbytes + video.nbytes, "nothing is left of a video but its frames"


@pytest.mark.parametrize("offload", [True, False])
def test_with_offload_only_the_part_that_computes_is_on_the_device(
    offload: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = WanSampler.from_pretrained(model_folder, device="cpu")
    # Another name of the CPU, so that the two devices can be told apart.
    device = torch.device("cpu", 0)
    sampler.placement = Placement(device, torch.float32, device, offload)
    parts: dict[nn.Module, str] = {}
    at: dict[str, str] = {}
    computed: list[tuple[str, list[str]]] = []
    move = sampler_module.onload

    @contextlib.contextmanager
    def recording_move(module: nn.Module, device: torch.device, offload_device: torch.device) -> Iterator[None]:
        name = type(module).__name__
        with move(module, device, offload_device):
            at[name] = str(device)
            yield
        at[name] = str(offload_device)

    def before_forward(module: nn.Module, inputs: object) -> None:
        computed.append((parts[module], sorted(name for name, where in at.items() if where == "cpu:0")))

    monkeypatch.setattr(sampler_module, "onload", recording_move)
    for name, entry in (
        ("TextEncoder", sampler.text_codec.text_encoder),
        ("WanDiT", sampler.model),
        ("VaeDecoder", sampler.codec.decoder.post_quant_conv),
    ):
        parts[entry] = name
        entry.register_forward_pre_hook(before_forward)
    sampler.sample(["a"], steps=1, **SMALL)
    assert {name for name, _ in computed} == {"TextEncoder", "WanDiT", "VaeDecoder"}
    if offload:
        assert all(on_device == [name] for name, on_device in computed), computed
        assert set(at.values()) == {"cpu"}
    else:
        assert set(at.values()) == {"cpu:0"}
