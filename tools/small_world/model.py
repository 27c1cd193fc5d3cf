"""Write the model folder of the small world: ``python -m small_world.model FOLDER``.

The folder has the layout of the released models: a transformer and a text encoder with random weights, a tokenizer that
knows the words of the captions, and the autoencoder that ``small_world.autoencoder`` trained, whose weights are kept
beside this module.
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from small_world.scenes import OBJECTS, PATTERNS
from wan_model import WanConfig
from wan_model.system.files import sha256_of
from wan_model.tiny import write_tiny_wan

CONFIG = WanConfig(num_heads=4, head_dim=32, num_layers=3, ffn_dim=512, text_dim=64, text_length=16, freq_dim=64)
AUTOENCODER = Path(__file__).with_name("autoencoder_weights")
WEIGHTS = "diffusion_pytorch_model.safetensors"
DIGESTS = {
    "config.json": "a9cd1447c3c4a483f148ace0d824bb1fc91be0b5a93e8440b4c13379f119b095",
    WEIGHTS: "87360febdb40bb6066e054e9ac6ea00a1051a6b854afa1e72e5a907c5126c68c",
}
# In an encoder with random weights all words of a caption change the output at each word alike; in a trained one, a
# word's own meaning prevails. Longer embeddings of words give that.
_WORD_SCALE = 24.0


def write_model(folder: Path, *, seed: int = 0, config: WanConfig = CONFIG) -> Path:
    """Write the folder.

    Args:
        folder: created if absent.
        seed: of the random weights.
        config: of the transformer.

    Raises:
        ValueError: the kept autoencoder is not the one that was trained.
    """
    for name, expected in DIGESTS.items():
        digest = sha256_of(AUTOENCODER / name)
        if digest != expected:
            raise ValueError(
                f"{AUTOENCODER / name} has the sha256 {digest}; expected {expected}: check the file out again"
            )
    # Of further captions the tokenizer would be another, and with it what a model of these has learnt.
    corpus = [world.caption(scene) for world in (PATTERNS, OBJECTS) for scene in world.scenes]
    write_tiny_wan(folder, seed=seed, config=config, corpus=corpus * 5)
    text_encoder = folder / "text_encoder" / "model.safetensors"
    weights = load_file(text_encoder)
    weights["shared.weight"] *= _WORD_SCALE
    save_file(weights, text_encoder, metadata={"format": "pt"})
    shutil.rmtree(folder / "vae")
    shutil.copytree(AUTOENCODER, folder / "vae")
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m small_world.model", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        write_model(arguments.folder, seed=arguments.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"wrote the small world's model to {arguments.folder}")


if __name__ == "__main__":
    main()
