"""Probing as the first stage of ``wan-data prepare``, and all of ``wan-data plan``: with progress and a cache."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_data.prepare.output_folder import WORK_FOLDER, output_folder
from wan_data.prepare.probe import PlannedSource, ProbeCache, ProbeResult, RejectedSource, probe_sources
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.report import Report, describe
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.work_files import check_work_folder, read_work_file, remedy_named
from wan_data.shards.json_records import from_json
from wan_data.sources.source import SourceFile
from wan_model.system.files import write_json
from wan_model.system.torchrun import processors

_CACHE_NAME = "examined.jsonl"


def probe_only(
    sources: Sequence[SourceFile],
    settings: PrepareSettings,
    *,
    report: Report,
    decoders: int | None = None,
    output: Path | None = None,
) -> list[ProbeResult]:
    """Probe the sources as ``prepare`` does, without encoding anything.

    Args:
        sources, settings, report, decoders: as for ``prepare``.
        output: the folder that ``prepare`` will write to; the results are cached there, so that ``prepare`` does not
            probe again. None caches nothing.

    Raises:
        ValueError: the output folder is in use, or holds files of another program.
    """
    if output is None:
        return probe(sources, settings, report, decoders, None)
    ranks = Ranks()
    with output_folder(output, ranks, overwrite=False):
        (output / WORK_FOLDER).mkdir(exist_ok=True)
        check_work_folder(output / WORK_FOLDER)
        return probe(sources, settings, report, decoders, cache_path(output / WORK_FOLDER, ranks))


def cache_path(work: Path, ranks: Ranks) -> Path:
    """The file with the probe results of this rank, in the folder of an unfinished preparation."""
    return work / f"{ranks.rank:05d}-{_CACHE_NAME}"


def probe(
    sources: Sequence[SourceFile],
    settings: PrepareSettings,
    report: Report,
    decoders: int | None,
    cache: Path | None,
) -> list[ProbeResult]:
    """Probe sources and report each result; see ``wan_data.prepare.probe.probe_sources``.

    Args:
        sources, settings: as there.
        report: receives the progress.
        decoders: number of decoder processes; one per core if None.
        cache: file of the results of earlier runs; None if there is none.
    """
    if not sources:
        return []
    report.stage("probing", len(sources))
    return probe_sources(
        sources,
        settings,
        lambda result: report.step(describe(result)),
        decoders=decoders or processors(),
        cache=ProbeCache(cache, settings),
    )


def gathered(results: Sequence[ProbeResult], work: Path, ranks: Ranks) -> list[ProbeResult]:
    """All ranks' results on rank 0, by name; nothing on the others.

    Args:
        results: of this rank.
        work: the folder of the unfinished preparation.
        ranks: of the preparation.
    """
    plain = [
        result.to_dict() if isinstance(result, PlannedSource) else dataclasses.asdict(result) for result in results
    ]
    write_json(work / f"verdicts-{ranks.rank:05d}.json", plain)
    ranks.barrier("results")
    if ranks.rank:
        return []
    found: list[ProbeResult] = []
    for rank in range(ranks.world_size):
        path = work / f"verdicts-{rank:05d}.json"
        for value in read_work_file(path, tuple[dict[str, Any], ...]):
            with remedy_named():
                if "reason" in value:
                    found.append(from_json(RejectedSource, value, str(path)))
                else:
                    found.append(from_json(PlannedSource, value, str(path)))
    return sorted(found, key=lambda result: result.name)
