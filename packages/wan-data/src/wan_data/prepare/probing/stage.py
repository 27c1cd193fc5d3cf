"""Probing as the first stage of ``wan-data prepare``, and all of ``wan-data plan``: with progress and a cache."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

from wan_data.curation.libraries import check_libraries
from wan_data.index.manifest import open_sources, read_manifest
from wan_data.index.sources import SourceIndex
from wan_data.prepare.earlier_index import earlier_index
from wan_data.prepare.output_folder import CACHE_GLOB, WORK_FOLDER, output_folder
from wan_data.prepare.planned_source import ProbeResult
from wan_data.prepare.probing.cache import ProbeCache
from wan_data.prepare.probing.known_index import KnownSources, holds
from wan_data.prepare.probing.pool import KnownSource, probe_sources, with_known
from wan_data.prepare.probing.results import ProbeResults, write_results
from wan_data.prepare.probing.source_probe import Probed
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.report import Report, describe
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.work_files import check_work_folder
from wan_data.sources.source import SourceFile, Sources
from wan_data.storage.local_copies import LocalCopies
from wan_model.system.torchrun import processors

_RESULTS_GLOB = "results-*.sqlite"


@contextlib.contextmanager
def probe_only(
    sources: Sources,
    settings: PrepareSettings,
    *,
    report: Report,
    decoders: int | None = None,
    output: Path | None = None,
    copies: LocalCopies,
) -> Iterator[ProbeResults]:
    """Probe the sources as ``prepare`` does, without encoding anything.

    Args:
        sources, settings, report, decoders: as for ``prepare``.
        output: the folder that ``prepare`` will write to; the results are cached there, so that ``prepare`` does not
            probe again. None caches nothing.
        copies: of clips in a store.

    Yields:
        The results, which can be read in the block.

    Raises:
        ValueError: the output folder is in use, or holds files of another program.
    """
    check_measuring(settings)
    with contextlib.ExitStack() as stack:
        ranks, cache, indices = Ranks(), None, list[SourceIndex]()
        if output is not None:
            stack.enter_context(output_folder(output, ranks, overwrite=False))
            (output / WORK_FOLDER).mkdir(exist_ok=True)
            check_work_folder(output / WORK_FOLDER)
            cache = cache_path(output / WORK_FOLDER, ranks)
            indices += stack.enter_context(_known_indices(output, settings))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wan-data-")))
        run = functools.partial(probe_sources, settings=settings, decoders=decoders or processors(), copies=copies)
        yield probe(sources, len(sources), settings, report, run, cache, results_path(folder, ranks), indices)


@contextlib.contextmanager
def known_indices(work: Path, settings: PrepareSettings, index: SourceIndex | None) -> Iterator[list[SourceIndex]]:
    """The indices that know sources: that of a dataset, and that of the dataset which it replaces, if there are any.

    Args:
        work: the folder of the unfinished preparation.
        settings: of the preparation.
        index: of the dataset, of the same settings; None if there is none.
    """
    with earlier_index(work) as earlier:
        others = [] if earlier is None or not holds(earlier[1], settings) else [earlier[0]]
        yield [*([] if index is None else [index]), *others]


@contextlib.contextmanager
def _known_indices(output: Path, settings: PrepareSettings) -> Iterator[list[SourceIndex]]:
    """``known_indices`` of a folder that may hold a dataset, perhaps of other settings."""
    with contextlib.ExitStack() as stack:
        index = None
        with contextlib.suppress(OSError, ValueError):  # it only saves time
            manifest = read_manifest(output)
            if holds(manifest.settings, settings):
                index = stack.enter_context(open_sources(output, manifest))
        yield stack.enter_context(known_indices(output / WORK_FOLDER, settings, index))


def check_measuring(settings: PrepareSettings) -> None:
    """Refuse to begin if sources are to be measured without the libraries that measure.

    Raises:
        ValueError: one is not installed, or cannot be loaded.
    """
    if settings.measuring:
        check_libraries()


def cache_path(work: Path, ranks: Ranks) -> Path:
    """The file with what this rank has found of each source, in the folder of an unfinished preparation."""
    return work / CACHE_GLOB.replace("*", f"{ranks.rank:05d}")


def results_path(work: Path, ranks: Ranks, rank: int | None = None) -> Path:
    """The file with the probe results of a rank, this one if None."""
    return work / _RESULTS_GLOB.replace("*", f"{ranks.rank if rank is None else rank:05d}")


def delete_results(work: Path) -> None:
    """Delete the results of an earlier run, which may have had more ranks."""
    for path in work.glob(_RESULTS_GLOB):
        path.unlink()


def probe(
    sources: Iterable[SourceFile],
    total: int,
    settings: PrepareSettings,
    report: Report,
    run: Callable[[Iterable[KnownSource]], Generator[tuple[SourceFile, Probed], None, None]],
    cache: Path | None,
    results: Path,
    indices: Sequence[SourceIndex] = (),
) -> ProbeResults:
    """Probe sources, report each result, and remember it.

    Args:
        sources: the files to probe.
        total: number of the sources.
        settings: of the preparation.
        report: receives the progress.
        run: probes, as ``wan_data.prepare.probing.pool.probe_sources`` does.
        cache: file of what earlier runs have found; None if there is none.
        results: file to write.
        indices: that know sources too; see ``KnownSources``.
    """
    if total:
        report.stage("probing", total)

    def reported(known: ProbeCache) -> Generator[ProbeResult, None, None]:
        if not total:
            return
        with contextlib.closing(run(with_known(sources, known))) as probing:
            for source, probed in probing:
                if probed.found is not None:
                    known.add(source.name, probed.found)
                report.step(describe(probed.result))
                yield probed.result

    with (
        contextlib.closing(KnownSources(cache, settings, indices)) as known,
        contextlib.closing(reported(known)) as found,
    ):
        write_results(results, found)
    return ProbeResults([results])


def gathered(work: Path, ranks: Ranks) -> ProbeResults:
    """The results of all ranks, after a barrier."""
    return ProbeResults([results_path(work, ranks, rank) for rank in range(ranks.world_size)])
