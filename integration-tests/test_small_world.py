"""The small world: what clips show is recognised, its autoencoder keeps it, and noise shows nothing."""

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.nn import functional

from small_world import model
from small_world.adherence import COUNT, Adherence, requests, table
from small_world.autoencoder import to_frames, to_tensor
from small_world.clips import read_video, write_clips, write_video
from small_world.recognition import recognise, right
from small_world.scenes import BACKGROUNDS, COLOURS, FRAMES, OBJECTS, PATTERNS, VANISHING, WORLDS, Frames, Scene, World
from wan_model.codec import LatentCodec

EACH = pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
RECONSTRUCTED = 48  # clips of each world, or all scenes of one that has fewer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in a fixed order, on whatever machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write_model(tmp_path_factory.mktemp("small-world") / "model")


@pytest.fixture(scope="module")
def codec(folder: Path) -> LatentCodec:
    return LatentCodec.from_pretrained(folder, load_text=False)


def _draw(world: World, count: int, seed: int) -> list[tuple[Scene, Frames]]:
    """Clips of scenes chosen from all, without repetition, in every size equally often."""
    generator = random.Random(seed)
    scenes = generator.sample(world.scenes, count)
    return [
        (scene, world.frames(scene, world.sizes[n % len(world.sizes)], generator)) for n, scene in enumerate(scenes)
    ]


def _share_right(world: World, clips: list[tuple[Scene, np.ndarray]]) -> float:
    return sum(all(right(world, video, scene).values()) for scene, video in clips) / len(clips)


# -- scenes -----------------------------------------------------------------------------------------------------------


@EACH
def test_every_pair_of_values_is_trained_although_some_combinations_are_not(world, tmp_path):
    pairs = [
        {(a, b, scene[a], scene[b]) for scene in scenes for a, b in itertools.combinations(range(4), 2)}
        for scenes in (world.trained(), world.scenes)
    ]
    assert pairs[0] == pairs[1]
    assert len(world.held_out()) == world.held_out_count
    assert {*world.held_out()} | {*world.trained()} == {*world.scenes}
    # More clips than scenes, so that each scene for training is among them.
    clips = write_clips(world, tmp_path, len(world.trained()) + 4, seed=3)
    written = {json.loads(clip.path.with_suffix(".json").read_text())["caption"] for clip in clips}
    assert written == {world.caption(scene) for scene in world.trained()}
    assert not written & {world.caption(scene) for scene in world.held_out()}
    assert {clip.size for clip in clips} == set(world.sizes)
    assert all(clip.path.is_file() for clip in clips)


def test_equal_seeds_write_equal_clips(tmp_path):
    def bytes_of(name: str, seed: int) -> list[bytes]:
        return [clip.path.read_bytes() for clip in write_clips(PATTERNS, tmp_path / name, 60, seed)]

    first = bytes_of("a", 0)
    assert first != bytes_of("b", 1)
    assert first == bytes_of("c", 0)


@EACH
def test_a_third_of_the_requests_is_held_out(world):
    asked = requests(world)
    assert len(asked) == COUNT == 48
    assert sum(request.held_out for request in asked) == 16
    assert all((request.scene in world.held_out()) == request.held_out for request in asked)
    assert len({request.seed for request in asked}) == COUNT
    assert {request.size for request in asked} == set(world.sizes)
    height, width = world.sizes[1]
    assert asked[1].line(world) == {
        "prompt": world.caption(asked[1].scene),
        "size": f"{width}*{height}",
        "frames": FRAMES,
        "seed": asked[1].seed,
    }


# -- recognition ------------------------------------------------------------------------------------------------------


@EACH
def test_what_true_clips_show_is_recognised(world, tmp_path):
    """Of every combination, from H.264 files, in every size."""
    clips = []
    for scene, frames in _draw(world, len(world.scenes), seed=11):
        write_video(frames, tmp_path / "clip.mp4")
        decoded = read_video(tmp_path / "clip.mp4")
        assert decoded.shape == frames.shape
        clips.append((scene, decoded))
    assert _share_right(world, clips) >= 0.97


@EACH
def test_what_the_autoencoder_reconstructs_is_recognised(world, codec):
    clips = []
    for scene, frames in _draw(world, min(RECONSTRUCTED, len(world.scenes)), seed=12):
        video = codec.decode_video(codec.encode_video(to_tensor([frames])))[0]
        clips.append((scene, to_frames(video)))
    assert _share_right(world, clips) >= 0.95


def _uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.uniform(0, 255, shape)


def _around_gray(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.normal(128, 60, shape).clip(0, 255)


def _smooth(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    frames, height, width, _ = shape
    coarse = torch.from_numpy(generator.normal(size=(1, 3, 4, height // 8, width // 8)))
    fine = functional.interpolate(coarse, (frames, height, width), mode="trilinear")
    return (128 + 90 * rearrange(fine, "1 c t h w -> t h w c").numpy()).clip(0, 255)


def _still(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One smooth frame in every frame: something that stays."""
    return np.broadcast_to(_smooth(generator, shape)[:1], shape)


def _still_spots(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Spots of one colour and one background, where no pattern has them, in every frame."""
    _, height, width, _ = shape
    front, back = generator.choice([*COLOURS.values()]), generator.choice([*BACKGROUNDS.values()])
    spots = np.kron(generator.random((height // 8, width // 8)) < 0.5, np.ones((8, 8), bool))
    return np.broadcast_to(np.where(spots[..., None], front, back), shape)


def _one_colour(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(generator.uniform(0, 255, 3), shape)


@EACH
@pytest.mark.parametrize("noise", [_uniform, _around_gray, _smooth, _still, _still_spots, _one_colour])
def test_noise_shows_no_scene(world, noise: Callable[..., np.ndarray]):
    generator = np.random.default_rng(13)
    videos = [noise(generator, (FRAMES, *world.sizes[n % len(world.sizes)], 3)).astype(np.float32) for n in range(60)]
    # A clip in which a value of each attribute is seen would be right for one scene of many.
    clear = sum(None not in recognise(world, video).values() for video in videos)
    assert clear / len(videos) <= 1 / len(world.scenes)


Change = Callable[[Frames, dict[str, str], random.Random], np.ndarray]


def _other(value: str, values: Iterable[str]) -> str:
    return next(one for one in values if one != value)


def _redrawn(world: World, name: str, values: Iterable[str]) -> Change:
    """The same clip with another value of an attribute."""
    named = [*values]

    def draw(frames: Frames, scene: dict[str, str], generator: random.Random) -> np.ndarray:
        changed = {**scene, name: _other(scene[name], named)}
        return world.frames(tuple(changed.values()), frames.shape[1:3], random.Random(5))

    return draw


def _from_frame(first: int, change: Change) -> Change:
    """What a change makes of a clip, from that frame on."""

    def late(frames: Frames, scene: dict[str, str], generator: random.Random) -> np.ndarray:
        return np.concatenate([frames[:first], change(frames, scene, generator)[first:]])

    return late


def _in_a_cell(change: Change) -> Change:
    """What a change makes of a clip, in the first cell of 16 pixels alone."""

    def local(frames: Frames, scene: dict[str, str], generator: random.Random) -> np.ndarray:
        mixed = frames.copy()
        mixed[:, :16, :16] = change(frames, scene, generator)[:, :16, :16]
        return mixed

    return local


def _faded(strength: float) -> Change:
    def fade(frames: Frames, scene: dict[str, str], generator: random.Random) -> np.ndarray:
        back = np.array(BACKGROUNDS[scene["background"]])
        return back + strength * (frames - back)

    return fade


def _half_empty(frames: Frames, scene: dict[str, str], generator: random.Random) -> np.ndarray:
    mixed = frames.copy()
    mixed[:, :, 16:] = BACKGROUNDS[scene["background"]]
    return mixed


def _noisy_where_hidden(frames: Frames, scene: dict[str, str], generator: random.Random) -> np.ndarray:
    mixed = frames.astype(np.float32)
    for time in (2, 3, 6, 7):
        mixed[time] = np.random.default_rng(time).uniform(0, 255, frames.shape[1:])
    return mixed


def _one_frame_too_many(frames: Frames, scene: dict[str, str], generator: random.Random) -> np.ndarray:
    return frames[[0, 1, 1, 3, 4, 5, 6, 7, 8]]


BLINKING = {"event": "blink"}
PATTERN_CHANGES: dict[str, tuple[Change, dict[str, str]]] = {
    "the last frame has another colour": (_from_frame(8, _redrawn(PATTERNS, "colour", COLOURS)), {"event": "stay"}),
    "another background from frame 5": (_from_frame(5, _redrawn(PATTERNS, "background", BACKGROUNDS)), {}),
    "a cell has another pattern": (_in_a_cell(_redrawn(PATTERNS, "pattern", PATTERNS.attributes["pattern"])), {}),
    "a cell has another colour": (_in_a_cell(_redrawn(PATTERNS, "colour", COLOURS)), {}),
    "only the first column of cells has the pattern": (_half_empty, {}),
    "the pattern fades from the second frame": (_from_frame(1, _faded(0.4)), {"event": "stay"}),
    "noise while it is hidden": (_noisy_where_hidden, BLINKING),
    "it hides a frame too late": (_one_frame_too_many, BLINKING),
    "it slides to the left": (lambda frames, *_: frames[[0, 3, 2, 1, 0, 3, 2, 1, 0]], {"event": "slide"}),
    "it slides and stops": (lambda frames, *_: frames[[0, 1, 2, 3, 4, 5, 5, 5, 5]], {"event": "slide"}),
    "it slides half as fast": (lambda frames, *_: frames[[0, 0, 1, 1, 2, 2, 3, 3, 4]], {"event": "slide"}),
}
OBJECT_CHANGES: dict[str, tuple[Change, dict[str, str]]] = {
    "another shape from frame 5": (_from_frame(5, _redrawn(OBJECTS, "shape", ("triangle", "circle"))), {}),
    "another colour from frame 5": (_from_frame(5, _redrawn(OBJECTS, "colour", COLOURS)), {}),
    "frames in another order": (lambda frames, *_: frames[[0, 5, 2, 7, 4, 1, 6, 3, 8]], {}),
    "a single jump": (lambda frames, *_: frames[[0, 0, 0, 0, 0, 8, 8, 8, 8]], {}),
    "it moves back at the end": (lambda frames, *_: frames[[0, 1, 2, 3, 4, 5, 4, 3, 2]], {}),
    "two frames without it": (lambda frames, *_: np.concatenate([frames[:7], frames[7:] * 0 + frames[0, 0, 0]]), {}),
}


@pytest.mark.parametrize(
    ("world", "change", "where"),
    [
        pytest.param(world, *change, id=name)
        for world, changes in ((PATTERNS, PATTERN_CHANGES), (OBJECTS, OBJECT_CHANGES))
        for name, change in changes.items()
    ],
)
def test_what_nearly_shows_a_scene_does_not(world: World, change: Change, where: dict[str, str]):
    generator, counted = random.Random(14), []
    for scene in world.scenes:
        values = world.values(scene)
        if where.items() <= values.items():
            frames = world.frames(scene, generator.choice(world.sizes), generator)
            changed = change(frames, values, generator)
            counted.append(all(right(world, changed.astype(np.float32), scene).values()))
    assert len(counted) >= 36
    assert not any(counted)


def test_adherence_counts_by_group_and_attribute():
    """Each held-out scene is replaced by one whose colour is another."""
    asked, generator, videos = requests(PATTERNS, 12), random.Random(0), []
    for request in asked:
        values = PATTERNS.values(request.scene)
        if request.held_out:
            values["colour"] = "red" if values["colour"] != "red" else "blue"
        videos.append(PATTERNS.frames(tuple(values.values()), request.size, generator))
    found = table(PATTERNS, asked, videos)
    others = {"pattern": 1.0, "event": 1.0, "background": 1.0}
    assert found == {
        "all": Adherence(12, {"colour": 8 / 12, **others}, 8 / 12),
        "trained": Adherence(8, {"colour": 1.0, **others}, 1.0),
        "held-out": Adherence(4, {"colour": 0.0, **others}, 0.0),
    }


# -- the model folder -------------------------------------------------------------------------------------------------


def test_latents_are_normalised(codec):
    """Statistics of other weights, or none, are off by far more."""
    rows = []
    for number, world in enumerate((PATTERNS, OBJECTS)):
        for _, frames in _draw(world, 60, seed=14 + number):
            rows.append(rearrange(codec.encode_video(to_tensor([frames])), "1 c f h w -> (f h w) c"))
    latents = torch.cat(rows)
    assert latents.shape[1] == 16
    assert latents.mean(0).abs().max() < 0.15
    assert (latents.std(0) - 1).abs().max() < 0.15


def test_the_autoencoder_is_small_and_of_the_released_shape():
    files = [path for path in model.AUTOENCODER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2 * 2**20
    config = json.loads((model.AUTOENCODER / "config.json").read_text())
    assert (config["z_dim"], config["scale_factor_spatial"], config["scale_factor_temporal"]) == (16, 8, 4)
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 16
    assert min(config["latents_std"]) > 0


@pytest.mark.parametrize("name", [*model.DIGESTS])
def test_a_changed_byte_of_the_autoencoder_is_refused(name, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    shutil.copytree(model.AUTOENCODER, kept)
    content = bytearray((kept / name).read_bytes())
    content[-1] ^= 1
    (kept / name).write_bytes(content)
    monkeypatch.setattr(model, "AUTOENCODER", kept)
    expected = rf"^\S+{name} has the sha256 [0-9a-f]{{64}}; expected {model.DIGESTS[name]}: check .*again$"
    with pytest.raises(ValueError, match=expected):
        model.write_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@EACH
def test_captions_fit_the_text_length_and_differ_in_their_embeddings(world, folder):
    text = LatentCodec.from_pretrained(folder, load_vae=False, text_length=model.CONFIG.text_length)
    captions = [world.caption(scene) for scene in world.scenes]
    assert max(text.encode_prompt(caption)[1] for caption in captions) < model.CONFIG.text_length
    embedded = [text.encode_prompt(caption)[0] for caption in captions]
    assert embedded[0].shape[1] == model.CONFIG.text_dim
    # Two captions that differ in one word have embeddings that differ by far more than rounding.
    a, b = embedded[0], embedded[captions.index(captions[0].replace("black", "white"))]
    assert (a - b).norm() > 0.1 * a.norm()


def test_a_new_event_is_a_word_of_its_own_and_the_tokenizer_was_not_trained_on_it(folder):
    (new,) = VANISHING.attributes["event"]
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    known = [f"\u2581{event}" for event in PATTERNS.attributes["event"]]
    assert vocabulary.keys() >= {*known}
    assert f"\u2581{new}" not in vocabulary
    text = LatentCodec.from_pretrained(folder, load_vae=False, text_length=model.CONFIG.text_length)

    def embedded(event: str) -> torch.Tensor:
        tokens = text.encode_prompt(
            PATTERNS.wording.format(colour="red", pattern="dots", event=event, background="black")
        )[0]
        return functional.pad(tokens, (0, 0, 0, model.CONFIG.text_length - len(tokens)))

    for event in PATTERNS.attributes["event"]:
        assert (embedded(new) - embedded(event)).norm() > 0.1 * embedded(event).norm()
