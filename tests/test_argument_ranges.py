import math
import re

import pytest

from batchlr.argument_ranges import (
    require_count,
    require_finite,
    require_fraction,
    require_inner_fraction,
    require_non_negative,
    require_positive,
)

TINY, BELOW_ONE = 5e-324, math.nextafter(1.0, 0.0)
CHECKS = {
    require_finite: ((-1e308, 0, 1e308), (math.inf, -math.inf), "be finite"),
    require_non_negative: ((0, 1e308), (-TINY, math.inf), "be finite and at least 0"),
    require_positive: ((TINY, 1e308), (0, -1.0, math.inf), "be positive and finite"),
    require_fraction: ((0, BELOW_ONE), (-TINY, 1, math.inf), "lie in [0, 1)"),
    require_inner_fraction: ((TINY, BELOW_ONE), (0, 1, -math.inf), "lie in (0, 1)"),
    require_count: ((1, 10**30), (0, BELOW_ONE, -1), "be at least 1"),
}


@pytest.mark.parametrize("require", CHECKS)
def test_a_range_ends_where_its_message_says(require):
    inside, outside, words = CHECKS[require]
    for value in inside:
        require(number=value)
    for value in (*outside, math.nan):
        message = re.escape(f"number must {words}, got {value}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            require(number=value)


@pytest.mark.parametrize("require", CHECKS)
def test_of_several_arguments_the_first_that_is_outside_is_named(require):
    inside, outside, _ = CHECKS[require]
    with pytest.raises(ValueError, match="second must "):
        require(first=inside[0], second=outside[0], third=outside[0])
