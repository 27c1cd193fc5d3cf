"""Probing one source: its digest, its caption, its properties from decoding it to its end, and its windows."""

import dataclasses
from pathlib import Path

from wan_data.prepare.planned_source import PlannedSource, ProbeResult, RejectedSource
from wan_data.prepare.probing.cache import Found
from wan_data.prepare.settings import PrepareSettings
from wan_data.sources.captions import CaptionFinder
from wan_data.sources.source import SourceFile, caption_of
from wan_data.video.buckets import choose_bucket, enlargement
from wan_data.video.decode import ClipInfo
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.source_file import Rejected, check_bytes, check_regular
from wan_data.video.windows import plan_windows
from wan_model.system.files import sha256_of


@dataclasses.dataclass(frozen=True)
class Probed:
    """The result of a source.

    Attributes:
        result: its windows, or why it is rejected.
        found: what is to be remembered of it; None if it was known, or could not be decoded.
    """

    result: ProbeResult
    found: Found | None = None


class SourceProbe:
    """Probes one source after another.

    Args:
        settings: of the preparation.
    """

    def __init__(self, settings: PrepareSettings) -> None:
        self._settings = settings
        self._captions = CaptionFinder(settings.caption_key)
        self._resolutions = settings.resolutions()

    def probe(self, source: SourceFile, known: Found | None, decoder: Decoder) -> Probed:
        """Probe a source; may be called by several threads, each with a decoder of its own.

        Args:
            source: the source.
            known: what an earlier run has found of it, which is used if the file has not changed.
            decoder: decodes it otherwise.
        """
        size, digest, new = 0, None, None
        try:
            if source.problem is not None:
                raise Rejected(source.problem)
            assert source.path is not None, "a source without a path has a problem"
            status = source.path.stat()
            check_regular(status)
            size = status.st_size
            check_bytes(size, self._settings.limits)
            caption = caption_of(source, self._captions)
            if known is None or [known.bytes, known.mtime_ns] != [size, status.st_mtime_ns]:
                digest = sha256_of(source.path)
                info = self._decode_completely(source.path, decoder)
                known = new = Found(size, status.st_mtime_ns, digest, info)
            digest = known.sha256
            return Probed(self._planned(source, known, caption), new)
        except OSError as error:
            reason = f"it cannot be read: {error.strerror or error}"
        except ValueError as error:
            reason = str(error)
        return Probed(RejectedSource(source.name, reason, size, digest), new)

    def _decode_completely(self, path: Path, decoder: Decoder) -> ClipInfo:
        settings = self._settings
        ((_, found),) = decoder.decode([Job(path, settings.fps, settings.limits, display=settings.display)])
        if isinstance(found, Rejected):
            raise found
        assert isinstance(found, ClipInfo)
        return found

    def _planned(self, source: SourceFile, found: Found, caption: str) -> PlannedSource:
        assert source.path is not None
        settings, info = self._settings, found.info
        bucket = choose_bucket(self._resolutions, info.height, info.width)
        factor = enlargement(bucket, info.height, info.width)
        if factor > 1 and not settings.allow_upscaling:
            raise Rejected(
                f"its {info.height:.0f}x{info.width:.0f} pixels would be enlarged {factor:.2f} times to fill {bucket}; "
                "choose a smaller size, or pass --allow-upscaling"
            )
        kind = settings.windows
        if settings.mode == "frames" and kind == "whole":
            kind = "consecutive"  # every frame becomes an image
        windows = plan_windows(info.frames, kind, settings.window_lengths)
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
        )
