"""Two versions of Energon and one dataset: ``nox -s energon`` runs these, beside all other tests, with each version."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_shards import write_latent_shards

from wan_data.energon.version import energon_version
from wan_data.reading.loader import LoaderConfig, PackLoader

# Where nox has installed the version that runs here; without the folder, the environment's own version is imported.
FOLDER = os.environ.get("WAN_ENERGON")
LATENTS = [("train", [torch.full((16, 1, 4, 4), float(n)) for n in range(9)]), ("val", [torch.ones(16, 1, 4, 4)])]
FILES = ("*.tar", "*.tar.idx", ".nv-meta/*.sqlite", ".nv-meta/*.yaml", ".nv-meta/.info.yaml", ".nv-meta/index.uuid")


def loader(folder, **changes):
    return PackLoader(LoaderConfig(str(folder), capacity=8, text_length=4, **changes), rank=0, world_size=1)


def passes(folder):
    train = iter(loader(folder))
    found = {"train": sorted(key for _ in range(5) for key in next(train).keys)}
    return {**found, "val": [pack.keys for pack in loader(folder, split="val")]}


def elsewhere(folder, *actions):
    """What this module's ``main`` prints with the other version."""
    kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != FOLDER]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*kept, str(Path(__file__).parents[1])])}
    command = [sys.executable, __file__, str(folder), *actions]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(folder, *actions):
    if "write" in actions:
        write_latent_shards(folder, LATENTS)
    state = loader(folder).state_dict()
    print(json.dumps({"version": energon_version(), "state": state, **passes(folder)}))


@pytest.mark.skipif(FOLDER is None, reason="needs a second version of Energon: nox -s energon -- --version 6.0.1")
@pytest.mark.parametrize("write", [True, False])
def test_each_version_reads_what_the_other_wrote_and_refuses_its_states(tmp_path, write):
    ours = tmp_path / "ours"
    write_latent_shards(ours, LATENTS)
    theirs = tmp_path / "theirs"
    other = elsewhere(theirs, "write") if write else elsewhere(ours)
    folder = theirs if write else ours
    assert other["version"] != energon_version()
    assert {name: other[name] for name in ("train", "val")} == json.loads(json.dumps(passes(folder)))
    if write:
        for pattern in FILES:
            written = [{path.name: path.read_bytes() for path in one.glob(pattern)} for one in (ours, theirs)]
            assert written[0] == written[1], pattern
            assert written[0], pattern
    with pytest.raises(ValueError, match=f"was saved with Megatron-Energon {other['version']}, and "):
        loader(folder).load_state_dict(other["state"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
