"""Support for numerical tests: which seeds a test runs with, and how far rounding can move its results.

Usage, in any package's tests:

    from wan_model.testing import assert_all_within, rounding_scale, seeds

    @pytest.mark.rounding
    @pytest.mark.parametrize("seed", seeds(7))          # seed 7 alone; 1 to 100 with WAN_SEEDS=100
    def test_two_ways_agree(seed):
        model, batch = build(seed)
        double = copy.deepcopy(model).double()
        # The same computation in float64, from inputs to named results: outputs, gradients, weights after some steps.
        scale = rounding_scale(lambda: gradients(double, batch))
        assert_all_within(gradients(model, batch), gradients_another_way(model, batch), scale)

``rounding_scale`` runs the function in float64, once as it is and several times with noise in the result of every
operation. The noise of an operation has the size that float32 rounding has there, which follows from the magnitudes of
the terms that it sums, so the spread of the results says how far rounding can move each of them: little where terms add
up, much where they cancel (the bias of attention keys, which the softmax ignores). Nothing in it is measured on the
float32 run that is tested, so a bound holds for every seed, processor and order of summation. Where one device computes
what several processes compute in parallel, the one-device model in float64 serves for both. Where the other way is
plain mathematics, ``assert_rounds_to({"out": got}, lambda: {"out": plain(x.double())})`` does all of it at once. The
function must give the same numbers at every call: clear gradients first, and make its generators inside. Only a
tensor's norm is compared, so one wrong element must be wrong by more than the rounding of the whole tensor.
"""

from wan_model.testing.rounding import assert_all_within, assert_rounds_to, assert_within, rounding_scale
from wan_model.testing.seeds import seeds

__all__ = ["assert_all_within", "assert_rounds_to", "assert_within", "rounding_scale", "seeds"]
