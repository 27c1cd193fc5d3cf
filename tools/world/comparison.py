"""Short runs that differ in one setting each: validation loss, caption gap and adherence of each.

A row is written as soon as it is done, and rows that stand are not run again, so a session can be stopped at any time,
and the variants of one table may be spread over several sessions.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shlex
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from common.commands import run_command
from common.failure import ToolFailure
from common.json_file import write_json
from common.training_log import counted, read_log
from small_world import commands
from small_world.adherence import requests
from small_world.scenes import World
from world.comparison_report import markdown
from world.curve import is_trained, point
from world.place import Data, Place, claim
from world.sampling import adherence
from world.variants import VARIANTS, Variant, shared_runs

FOLDER = "compare"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all rows.

    Attributes:
        world: of the clips.
        steps: of the base's training.
        requests: videos sampled from each run.
        seeds: a run of every variant for each.
        processes: of each training.
        jobs: runs side by side.
        overrides: settings of wan-train for every variant, below its own.
        options: of the session, those that make these settings.
    """

    world: World
    steps: int
    requests: int
    seeds: Sequence[int]
    processes: int
    jobs: int
    overrides: Mapping[str, str]
    options: Sequence[str]

    def command(self, name: str) -> str:
        """What makes the rows of one variant in this table."""
        return shlex.join(["nox", "-s", "world", "--", "--compare", "--only", name, *self.options])

    def shared(self, data: Data) -> dict[str, str]:
        """What every row of a table has in common."""
        facts = {"world": self.world.name, "steps": self.steps, "requests": self.requests}
        values = {**facts, "processes": self.processes, "data": data.digest, **self.overrides}
        return {name: str(value) for name, value in values.items()}


class Comparison:
    """The rows of a folder.

    Args:
        place: of the session.
        data: the prepared world.
        settings: of all rows.

    Raises:
        ToolFailure: the folder holds rows of other settings.
    """

    def __init__(self, place: Place, data: Data, settings: Settings) -> None:
        self.place, self.data, self.settings = place, data, settings
        claim(place.path(FOLDER), settings.shared(data))
        self.asked = requests(settings.world, settings.requests)
        commands.write_requests(settings.world, self.asked, place.path(FOLDER, "requests.jsonl"))
        self._writing = threading.Lock()
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // settings.jobs))
        self._environment = {"OMP_NUM_THREADS": threads}

    def training(self, variant: Variant, seed: int) -> dict[str, str]:
        """All settings of a variant's training."""
        return {**self.data.sizes, **variant.settings(self.settings.steps, seed, self.settings.overrides)}

    def lines(self, variant: Variant, seed: int) -> tuple[str, list[str], list[str]]:
        """The folder of a variant's run, which is named for its settings, and the commands that train and sample."""
        training = self.training(variant, seed)
        name = f"run-{hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()[:12]}"
        checkpoints = self.place.argument(FOLDER, name, "checkpoints")
        train = commands.pretrain(self.data.dataset, checkpoints, training, processes=self.settings.processes)
        sample = commands.sample(
            checkpoints,
            self.data.model,
            self.place.argument(FOLDER, "requests.jsonl"),
            self.place.argument(FOLDER, name, variant.name, "videos"),
            ema=variant.ema,
            settings=variant.options(),
        )
        return name, train, sample

    def run(self, names: Sequence[str]) -> None:
        """Make the rows that do not stand, and write the table after each.

        Raises:
            ToolFailure: some runs failed; the others were made.
        """
        jobs = [
            (seed, variants)
            for seed in self.settings.seeds
            for variants in shared_runs(names, functools.partial(self.training, seed=seed))
        ]
        failures: list[str] = []
        with ThreadPoolExecutor(self.settings.jobs) as pool:
            waiting = [pool.submit(self._run, *job) for job in jobs]
            try:
                for one in as_completed(waiting):
                    if isinstance(error := one.exception(), ToolFailure):
                        failures.append(str(error))
                        print(f"failed: {error}", flush=True)
                    else:
                        one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.write()
        if failures:
            raise ToolFailure(f"{len(failures)} of {len(jobs)} runs failed: {'; '.join(failures)}")

    def _run(self, seed: int, variants: Sequence[Variant]) -> None:
        """Train once, and make the rows of the variants that are sampled from this run."""
        name, train, _ = self.lines(variants[0], seed)
        folder = self.place.path(FOLDER, name)
        folder.mkdir(parents=True, exist_ok=True)
        steps = self.settings.steps * variants[0].length
        output: dict[str, Any] = {"folder": self.place.root, "environment": self._environment}
        if not is_trained(self.place, steps, FOLDER, name, "checkpoints"):
            run_command(*train, output=folder / "training.txt", errors=folder / "training.txt", **output)
        entries = counted(read_log(folder / "checkpoints"))
        for variant in variants:
            _, _, sample = self.lines(variant, seed)
            found = adherence(
                self.settings.world, self.asked, sample, folder / variant.name,
                root=self.place.root, environment=self._environment,
            )  # fmt: skip
            row = {"variant": variant.name, "seed": seed, **point(steps, entries, found)}
            row["commands"] = [shlex.join(train), shlex.join(sample)]
            write_json(self.place.path(FOLDER, f"{variant.name}-seed{seed}.json"), row)
            print(f"{variant.name}, seed {seed}: {found['all']['all']:.0%} of the videos show everything", flush=True)
            self.write()

    def rows(self) -> list[dict[str, Any]]:
        """The rows that stand, from this session and from earlier ones, in the order of the variants."""
        found = [json.loads(path.read_text("utf-8")) for path in self.place.path(FOLDER).glob("*-seed*.json")]
        names = list(VARIANTS)

        def stands(row: dict[str, Any]) -> bool:
            # A variant may have been changed since.
            if row["variant"] not in VARIANTS:
                return False
            _, train, sample = self.lines(VARIANTS[row["variant"]], row["seed"])
            return row["commands"] == [shlex.join(train), shlex.join(sample)]

        return sorted(filter(stands, found), key=lambda row: (names.index(row["variant"]), row["seed"]))

    def write(self) -> None:
        """Write the table of the rows that stand."""
        with self._writing:
            rows = self.rows()
            write_json(self.place.path("compare.json"), {"settings": self.settings.shared(self.data), "rows": rows})
            if rows:
                text = markdown(rows, self.settings.world.name, self.settings.steps, self.settings.command)
                self.place.path("compare.md").write_text(text, encoding="utf-8")
