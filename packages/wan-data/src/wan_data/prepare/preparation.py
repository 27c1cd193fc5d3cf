"""What every step of a preparation knows, and the files that it leaves for the next one."""

import dataclasses
from pathlib import Path

from wan_data.index.manifest import Manifest
from wan_data.index.sources import IndexState
from wan_data.prepare.output_folder import WORK_FOLDER
from wan_data.prepare.outputs import Output
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.report import Report
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.workers import Workers
from wan_data.storage.local_copies import LocalCopies
from wan_model.latent_spec import LatentSpec


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The arguments of ``wan_data.prepare.run.prepare`` that all steps share.

    Attributes:
        target: where the dataset is written to.
        model: folder in diffusers' layout, or a hub id.
        spec: latent space of the model.
        settings: determine the bytes of the shards.
        report: receives the progress.
        readers: number of files that are read at a time, to compare them with what the dataset has.
        ranks: the processes that torchrun has started.
        workers: probe, encode and write.
        copies: of clips in a store.
    """

    target: Output
    model: str
    spec: LatentSpec
    settings: PrepareSettings
    report: Report
    readers: int
    ranks: Ranks
    workers: Workers
    copies: LocalCopies

    @property
    def output(self) -> Path:
        """The folder in which the dataset is made."""
        return self.target.folder

    @property
    def work(self) -> Path:
        """The folder of an unfinished preparation."""
        return self.output / WORK_FOLDER

    def finished(self, number: int) -> Path:
        """The file with the record of a finished shard, by its number."""
        return self.work / f"shard-{number:06d}.json"

    def read_finished(self, number: int) -> FinishedShard:
        """The record of a finished shard, by its number.

        Raises:
            ValueError: it is damaged.
        """
        return FinishedShard.read(self.finished(number))

    def commit(self, manifest: Manifest, state: IndexState) -> Manifest:
        """Make a new state of the index that of the dataset."""
        if state == manifest.index:
            return manifest
        manifest = dataclasses.replace(manifest, index=state)
        manifest.write(self.output)
        return manifest
