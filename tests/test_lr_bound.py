"""A rate becomes a bound: Student's interval in the logarithm, wider where it is biased."""

import math
from dataclasses import replace

import pytest
from scipy.stats import t as student

from batchlr.lr_bound import LRBound, Rate, reason_marks, tabulated


def bound(rate, freedom=7, reasons=()):
    return LRBound.of(
        rate,
        freedom=freedom,
        reasons=reasons,
        batch_size=64,
        optimizer="sgd",
        momentum=0.9,
        rule="mean-square",
    )


@pytest.mark.parametrize("freedom", [3, 7, 30])
def test_the_interval_is_student_s_in_the_logarithm(freedom):
    found = bound(Rate(2.0, 0.1, 0.5, 0.5), freedom)
    reach = 0.1 * student.ppf(0.95, freedom)
    assert math.log(found.high / 2.0) == pytest.approx(reach, rel=4e-3)  # of the expansion
    assert found.low * found.high == pytest.approx(4.0)
    assert float(found) == 2.0


def test_the_interval_reaches_from_the_rate_before_and_after_the_correction_for_bias():
    plain = bound(Rate(2.0, 0.1, 0.5, 0.5))
    biased = bound(Rate(2.5, 0.1, 0.5, 0.5, ends=(2.0, 3.0)))
    assert biased.value == 2.5
    assert biased.low == plain.low
    assert biased.high == pytest.approx(1.5 * plain.high)


@pytest.mark.parametrize(
    ("share", "regime"), [(0.0, "curvature"), (0.5, "transition"), (0.9, "noise")]
)
def test_the_regime_is_what_limits_the_rate(share, regime):
    assert bound(Rate(1.0, 0.0, 0.0, share)).regime == regime


def test_any_reason_makes_it_unreliable():
    assert bound(Rate(1.0, 0.0, 0.0, 0.0)).reliable
    doubted = bound(Rate(1.0, 0.0, 0.0, 0.0), reasons=("few batches",))
    assert (doubted.reliable, doubted.reasons) == (False, ("few batches",))


def test_an_overwhelming_error_leaves_numbers():
    found = bound(Rate(1.0, 1e9, 0.0, 0.0))
    assert 0 < found.low < 1e-15
    assert 1e15 < found.high < math.inf


# In print --------------------------------------------------------------------------------------


def test_each_of_many_reasons_has_its_own_mark():
    marks = reason_marks([[str(number) for number in range(17)], ["0", "16"]])
    assert len(set(marks.values())) == 17
    assert (marks["0"], marks["8"], marks["16"]) == ("*", "**", "***")


def test_a_bound_is_printed_in_a_line():
    found = replace(bound(Rate(2.0, 0.0, 0.5, 0.9)), low=1.0, high=3.0)
    assert str(found) == "2 (1 to 3) for sgd, momentum 0.9 at batch 64, limited by noise"
    adam = replace(found, optimizer="adam", regime="transition", reliable=False, reasons=("a", "b"))
    assert str(adam) == (
        "2 (1 to 3) for adam, beta1 0.9 at batch 64, limited by noise and curvature; "
        "not reliable: a; b"
    )


def test_a_table_has_a_row_for_each_batch_size_and_marks_what_is_doubtful():
    good = replace(bound(Rate(2.0, 0.0, 0.5, 0.9)), low=1.0, high=3.0)
    other = replace(good, optimizer="rmsprop", value=1.25e-4, low=1e-4, high=0.1)
    poor = replace(other, batch_size=1024, reliable=False, reasons=("few batches",))
    rows = [[good, other], [replace(good, batch_size=1024), poor]]
    assert tabulated(rows).splitlines() == [
        "batch  sgd, momentum 0.9  90 % interval  rmsprop, momentum 0.9    90 % interval",
        "   64                  2         1 to 3               0.000125    0.0001 to 0.1",
        " 1024                  2         1 to 3               0.000125 *  0.0001 to 0.1",
        "Marked rates are not reliable:",
        "* few batches",
    ]
    both = replace(poor, reasons=("a lower bound", "few batches"))
    rows = [[replace(poor, optimizer="sgd"), poor], [replace(good, batch_size=2048), both]]
    assert tabulated(rows).splitlines()[1:] == [
        " 1024           0.000125 *  0.0001 to 0.1               0.000125 *   0.0001 to 0.1",
        " 2048                  2           1 to 3               0.000125 *+  0.0001 to 0.1",
        "Marked rates are not reliable:",
        "* few batches",
        "+ a lower bound",
    ]
    assert tabulated([[good]]).splitlines() == [
        "batch  sgd, momentum 0.9  90 % interval",
        "   64                  2         1 to 3",
    ]
