from fractions import Fraction

import numpy as np
import pytest

from wan_data.video.display.picture import Orientation, orientation_of_exif, orientation_of_matrix, picture_of
from wan_data.video.source_file import Rejected


def test_matrix_and_exif_mean_the_same():
    corner = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, 2)
    of_exif = {
        1: [[0, 1, 2], [3, 4, 5]],
        2: [[2, 1, 0], [5, 4, 3]],
        3: [[5, 4, 3], [2, 1, 0]],
        4: [[3, 4, 5], [0, 1, 2]],
        5: [[0, 3], [1, 4], [2, 5]],
        6: [[3, 0], [4, 1], [5, 2]],
        7: [[5, 2], [4, 1], [3, 0]],
        8: [[2, 5], [1, 4], [0, 3]],
    }
    for number, wanted in of_exif.items():
        orientation = orientation_of_exif(number)
        assert orientation.apply(corner)[..., 0].tolist() == wanted
        assert orientation.exif == number
    # Each point goes where the matrix says.
    for a, b, c, d in ((1, 0, 0, 1), (-1, 0, 0, 1), (0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (0, -1, -1, 0)):
        matrix = np.array([65536 * a, 65536 * b, 0, 65536 * c, 65536 * d, 0, 0, 0, 2**30], np.int32).tobytes()
        shown = orientation_of_matrix(matrix).apply(corner)[..., 0]
        places = {(a * x + c * y, b * x + d * y): 3 * y + x for y in range(2) for x in range(3)}
        left, top = min(x for x, _ in places), min(y for _, y in places)
        assert all(shown[y - top, x - left] == value for (x, y), value in places.items())


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (1, 0.1, -0.1, 1), (1, 0, 0.5, 1)])
def test_other_matrices_are_refused(matrix):
    a, b, c, d = (round(65536 * value) for value in matrix)
    with pytest.raises(Rejected, match="only these are supported"):
        orientation_of_matrix(np.array([a, b, 0, c, d, 0, 0, 0, 2**30], np.int32).tobytes())


def test_aspect_belongs_to_the_stored_picture():
    shown = picture_of(lambda: np.zeros((10, 20, 3), np.uint8), 10, 20, Orientation(exchanged=True), Fraction(3, 2))
    assert (shown.height, shown.width) == (30.0, 10.0)
