from itertools import pairwise

import pytest

from fusion.plots.side_labels import spread


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ([], []),
        ([20], [20]),
        ([20, 50], [20, 50]),
        ([20, 22], [16, 26]),
        ([22, 20], [26, 16]),
        ([20, 20, 20], [10, 20, 30]),
        ([20, 22, 28], [13 + 1 / 3, 23 + 1 / 3, 33 + 1 / 3]),
        ([1, 2], [0, 10]),
        ([99, 98], [100, 90]),
        ([0, 5, 50, 97, 99], [0, 10, 50, 90, 100]),
    ],
)
def test_positions_by_hand(wanted, expected):
    assert spread(wanted, 10, 0, 100) == pytest.approx(expected)


def test_positions_that_do_not_fit_still_keep_their_gap():
    found = sorted(spread([5, 5, 5, 5], 10, 0, 20))
    assert [b - a for a, b in pairwise(found)] == pytest.approx([10, 10, 10])
