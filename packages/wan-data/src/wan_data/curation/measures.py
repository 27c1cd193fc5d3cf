"""What is measured of a clip while it is decoded."""

import dataclasses

SCENE_KINDS = ("off", "content", "adaptive")
# Raised when an unchanged clip gets other measures.
MEASURES_VERSION = 1
# The measures that are one number.
MEASURE_NAMES = ("motion", "stillness", "sharpness", "black_borders")


@dataclasses.dataclass(frozen=True)
class Measures:
    """Measures of a clip at the target rate; None where there is nothing to measure, as the motion of one frame.

    Every value is one of JSON, and ``wan_data.shards.json_records.from_json`` makes the object again.

    Attributes:
        motion: mean speed of what is seen, in diagonals of the picture per second; see ``movement.Movement``.
        stillness: share, 0 to 1, of the frames after the first that are equal to the one before within the noise of
            codecs; see ``movement.Movement``.
        sharpness: mean variance of the Laplacian of the smoothed luma at the area of 480 x 832, in squared levels of
            255; see ``stills.Stills``.
        black_borders: share of the area, 0 to 1, in letterbox and pillarbox; see ``stills.Stills``.
        cuts: the frames that begin a scene, in order, without that at 0; None if scenes are off.
        hashes: perceptual hashes of eight parts of the clip, in order, as 64 hexadecimal digits each; "" for one that
            shows too little to be recognised; see ``fingerprints.Fingerprinter``.
    """

    motion: float | None
    stillness: float | None
    sharpness: float
    black_borders: float
    cuts: tuple[int, ...] | None
    hashes: tuple[str, ...]
