"""OpenCV and PySceneDetect, which the extra ``curation`` installs, imported on first use."""

import functools
import importlib
from typing import Any

INSTALL = "pip install 'wan-data[curation]'"


def opencv() -> Any:
    """The module ``cv2``.

    Raises:
        ValueError: it is not installed, or cannot be loaded.
    """
    return _imported("cv2", "OpenCV")


def scene_detectors() -> Any:
    """The module ``scenedetect.detectors``.

    Raises:
        ValueError: it is not installed, or cannot be loaded.
    """
    opencv()
    return _imported("scenedetect.detectors", "PySceneDetect")


def frame_timecode() -> Any:
    """PySceneDetect's class of a frame number at a rate.

    Raises:
        ValueError: it is not installed, or cannot be loaded.
    """
    opencv()
    return _imported("scenedetect.common", "PySceneDetect").FrameTimecode


def check_libraries() -> None:
    """Refuse to begin without the libraries: for a command, before it starts processes that need them.

    Raises:
        ValueError: one is not installed, or cannot be loaded.
    """
    scene_detectors()


def use_one_thread() -> None:
    """Keep OpenCV's threads out of this process, for a decoder process: there is one for each core.

    Raises:
        ValueError: OpenCV is not installed, or cannot be loaded.
    """
    opencv().setNumThreads(1)


@functools.cache
def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:  # one that it needs
            raise ValueError(f"{name} cannot be loaded ({error}): {INSTALL}") from None
        raise ValueError(f"{name} is not installed, and curation needs it: {INSTALL}") from None
    except ImportError as error:  # such as a build of OpenCV for windows on the screen, without their libraries
        raise ValueError(f"{name} cannot be loaded ({error}): {INSTALL}") from None
