"""Probing one source: its digest, its caption, its properties from decoding it to its end, and its windows."""

import dataclasses
from pathlib import Path

from wan_data.curation.measures import MEASURE_NAMES, Measures
from wan_data.curation.measuring_pass import MeasuringOptions
from wan_data.curation.measuring_process import PROGRAM, measures_from, measuring_text
from wan_data.curation.scenes import plan_scene_windows
from wan_data.index.records import UNSELECTED
from wan_data.prepare.planned_source import PlannedSource, ProbeResult, RejectedSource
from wan_data.prepare.probing.cache import Found
from wan_data.prepare.settings import PrepareSettings
from wan_data.sources.captions import CaptionFinder
from wan_data.sources.contents import content_of, status_of
from wan_data.sources.source import SourceFile, caption_of
from wan_data.storage.failures import UnusableStoreError, is_of_the_object
from wan_data.storage.local_copies import LocalCopies
from wan_data.storage.location import StorePath
from wan_data.video.buckets import choose_bucket, enlargement
from wan_data.video.decode import ClipInfo
from wan_data.video.decoder_process import PROGRAM as PLAIN_PROGRAM
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.source_file import Rejected, check_bytes
from wan_data.video.windows import Window
from wan_model.system.files import sha256_of


@dataclasses.dataclass(frozen=True)
class Probed:
    """The result of a source.

    Attributes:
        result: its windows, or why it is rejected or left out.
        found: what is to be remembered of it; None if it was known, or could not be decoded.
    """

    result: ProbeResult
    found: Found | None = None


class SourceProbe:
    """Probes one source after another.

    Args:
        settings: of the preparation.
        copies: of clips in a store.
    """

    def __init__(self, settings: PrepareSettings, copies: LocalCopies) -> None:
        self._settings, self._copies = settings, copies
        self._captions = CaptionFinder(settings.caption_key)
        self._resolutions = settings.resolutions()
        self._selection = settings.selection
        self._measuring = measuring_text(MeasuringOptions(settings.scenes)) if settings.measuring else None

    @property
    def program(self) -> str:
        """The program of the decoder processes that ``probe`` needs."""
        return PLAIN_PROGRAM if self._measuring is None else PROGRAM

    def probe(self, source: SourceFile, known: Found | None, decoder: Decoder) -> Probed:
        """Probe a source; may be called by several threads, each with a decoder of its own.

        Args:
            source: the source.
            known: what an earlier run has found of it, which is used if the file has not changed.
            decoder: decodes it otherwise; it runs ``program``.
        """
        size, digest, new = 0, None, None
        try:
            if source.problem is not None:
                raise Rejected(source.problem)
            assert source.path is not None, "a source without a path has a problem"
            status = status_of(source)
            size = status.bytes
            check_bytes(size, self._settings.limits)
            caption = caption_of(source, self._captions)
            if known is None or [known.bytes, known.mtime_ns] != [size, status.mtime_ns]:
                with content_of(source.path, status, self._copies) as file:
                    digest = sha256_of(file)
                    info, measures = self._decode_completely(file, decoder)
                known = new = Found(size, status.mtime_ns, digest, info, measures)
            digest = known.sha256
            return Probed(self._planned(source, known, caption), new)
        except UnusableStoreError:
            raise
        except OSError as error:
            if isinstance(source.path, StorePath) and not is_of_the_object(error):
                raise  # nothing is known of the source
            reason = f"it cannot be read: {error.strerror or error}"
        except ValueError as error:
            reason = str(error)
        return Probed(RejectedSource(source.name, reason, size, digest), new)

    def ahead(self, item: tuple[SourceFile, Found | None]) -> tuple[SourceFile, Found | None]:
        """Begin to download the clip of a source that will be decoded; returns the same."""
        source, known = item
        if source.problem is None and source.listed is not None:
            clip = source.listed.clip
            new = known is None or [known.bytes, known.mtime_ns] != [clip.bytes, clip.mtime_ns]
            if new and clip.bytes <= self._settings.limits.bytes:
                self._copies.ahead(clip)
        return item

    def _decode_completely(self, path: Path, decoder: Decoder) -> tuple[ClipInfo, Measures | None]:
        settings = self._settings
        job = Job(path, settings.fps, settings.limits, display=settings.display, measuring=self._measuring)
        found, *measures = [result for _, result in decoder.decode([job])]
        if isinstance(found, Rejected):
            raise found
        assert isinstance(found, ClipInfo)
        return found, measures_from(measures[0]) if measures else None

    def _planned(self, source: SourceFile, found: Found, caption: str) -> ProbeResult:
        assert source.path is not None
        settings, info = self._settings, found.info
        by_windows = self._selection is not None and "samples" in self._selection.columns
        # A clip that is left out need not be one that can be used.
        if not by_windows and (left_out := self._left_out(source, found, 0)) is not None:
            return left_out
        bucket = choose_bucket(self._resolutions, info.height, info.width)
        factor = enlargement(bucket, info.height, info.width)
        if factor > 1 and not settings.allow_upscaling:
            raise Rejected(
                f"its {info.height:.0f}x{info.width:.0f} pixels would be enlarged {factor:.2f} times to fill {bucket}; "
                "choose a smaller size, or pass --allow-upscaling"
            )
        windows = self._windows(found)
        if by_windows and (left_out := self._left_out(source, found, len(windows))) is not None:
            return left_out
        return PlannedSource(
            source.name,
            source.path,
            found.bytes,
            found.sha256,
            caption,
            info,
            bucket,
            tuple(windows),
            mtime_ns=found.mtime_ns,
            measures=found.measures,
        )

    def _windows(self, found: Found) -> list[Window]:
        kind = self._settings.windows
        if self._settings.mode == "frames" and kind == "whole":
            kind = "consecutive"  # every frame becomes an image
        cuts = () if found.measures is None else found.measures.cuts or ()
        return plan_scene_windows(found.info.frames, cuts, kind, self._settings.window_lengths)

    def _left_out(self, source: SourceFile, found: Found, windows: int) -> RejectedSource | None:
        """The result of a source that does not fulfil ``--where``; None for others."""
        if (where := self._selection) is None:
            return None
        info, measures = found.info, found.measures
        values = {name: None if measures is None else getattr(measures, name) for name in MEASURE_NAMES}
        values |= {
            "seconds": float(info.frames / self._settings.fps),
            "frames": info.frames,
            "fps": info.source_fps,
            "height": info.height,
            "width": info.width,
            "bytes": found.bytes,
            "samples": windows,
        }
        if where.selects(values):
            return None
        used = ", ".join(
            f"{name} {'was not measured' if values[name] is None else f'is {values[name]:.6g}'}"
            for name in sorted(where.columns)
        )
        return RejectedSource(
            source.name,
            f"it does not fulfil --where {where.text!r}{': ' * bool(used)}{used}",
            found.bytes,
            found.sha256,
            UNSELECTED,
            info,
            found.mtime_ns,
            measures,
        )
