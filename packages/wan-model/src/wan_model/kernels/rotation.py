"""The rotary rotation of a row, for the kernels that apply it or its inverse."""

import inspect

import triton
import triton.language as tl


def _rotate(  # type: ignore[no-untyped-def]
    value, table, row, columns, inside, HEAD: tl.constexpr, BLOCK: tl.constexpr, SIGN: tl.constexpr
):
    # The table has the cosine and the sine of each pair side by side, as the row has its values.
    angles = tl.load(table + tl.cast(row, tl.int64) * HEAD + columns % HEAD, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(value, (BLOCK // 2, 2)))
    cosine, sine = tl.split(tl.reshape(angles, (BLOCK // 2, 2)))
    sine *= SIGN
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (BLOCK,))


# A part of kernels, which call it with SIGN 1.0 for the rotation and -1.0 for its inverse; see ``launch.Kernel``.
rotate = triton.jit(inspect.unwrap(_rotate))
