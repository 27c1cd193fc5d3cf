"""Reads every poisoned dataset and prints what happened: ``python payload_runs.py OURS STOCK``, two folders.

Those of the first folder are read with wan-data, those of the second with what the libraries beneath it offer. What a
payload would run makes a folder, and an audit hook notes every program that is started and every connection that is
opened meanwhile.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "pty.spawn")
events: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(WATCHED):
        events.append(f"{event} {arguments!r:.80}")


def ours(case: Path) -> list[str]:
    """The refusal of each way to read."""
    from wan_data.inspect.plots import choose_samples
    from wan_data.inspect.statistics import inspect
    from wan_data.inspect.verify import verify
    from wan_data.reading.datasets import read_latent_spec, splits
    from wan_data.reading.loader import LoaderConfig, PackLoader

    path = case / "blend.yaml" if (case / "blend.yaml").exists() else case / "dataset"

    def load() -> None:
        loader = iter(PackLoader(LoaderConfig(str(path), capacity=64, text_length=16), rank=0, world_size=1))
        for _ in range(3):
            next(loader)

    def verified() -> None:
        if problems := verify(case / "dataset")[1]:
            raise ValueError(problems[0])

    ways = {
        "load": load,
        "inspect": lambda: inspect(path),
        "verify": verified,
        "preview": lambda: choose_samples(case / "dataset", "train", 3, 0),
        "splits": lambda: splits(path),
        "latent space": lambda: read_latent_spec(path),
    }
    refused = []
    for way, read in ways.items():
        try:
            read()
        except ValueError as error:
            refused.append(f"{way}: {error}")
    return refused


def stock(case: Path) -> list[str]:
    """Energon with a task encoder as its documentation shows, or webdataset where the payload is a shard's name."""
    import webdataset
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
    from megatron.energon.task_encoder.cooking import basic_sample_keys

    if (case / "url").exists():
        with contextlib.suppress(Exception):
            next(iter(webdataset.WebDataset((case / "url").read_text(), shardshuffle=False)))
        return []

    @stateless
    def cook(sample: Any) -> Any:
        from megatron.energon import TextSample

        return TextSample(**basic_sample_keys(sample), text=str(sorted(sample)))

    class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
        cookers = (Cooker(cook),)

    path = case / "blend.yaml" if (case / "blend.yaml").exists() else case / "dataset"
    try:
        dataset = get_train_dataset(
            path,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=1,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
        )
        loader = iter(get_loader(dataset))
        for _ in range(3):
            next(loader)
    except BaseException as error:
        return [repr(error)]
    return []


def run(read: Callable[[Path], list[str]], folder: Path) -> dict[str, Any]:
    found = {}
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        events.clear()
        said = read(case)
        found[case.name] = {"said": said, "events": list(events), "marker": (case / "marker").exists()}
    return found


def main() -> None:
    ours_folder, stock_folder = map(Path, sys.argv[1:])
    answer = os.dup(1)
    os.dup2(2, 1)  # what is read may print
    ours(ours_folder / "harmless")  # imports what there is to import
    sys.addaudithook(watch)
    # Ours first: what a payload changes in this process must not be there before.
    found = {"ours": run(ours, ours_folder), "stock": run(stock, stock_folder)}
    os.write(answer, json.dumps(found).encode())


if __name__ == "__main__":
    main()
