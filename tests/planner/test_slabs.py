import pytest

from fusion.planner.slabs import NARROWEST, slab_widths


@pytest.mark.parametrize(
    "channels, widest, slabs",
    [
        (8, 64, (16,)),
        (16, 16, (16,)),
        (48, 64, (32, 16)),
        (72, 64, (64, 16)),
        (72, 32, (32, 32, 16)),
        (40, 16, (16, 16, 16)),
        (144, 128, (128, 16)),
        (256, 128, (128, 128)),
    ],
)
def test_by_hand(channels, widest, slabs):
    assert slab_widths(channels, widest) == slabs


@pytest.mark.parametrize("widest", [16, 32, 64, 128])
def test_slabs_cover_the_channels_with_powers_of_two_and_little_padding(widest):
    for channels in range(1, 400):
        slabs = slab_widths(channels, widest)
        assert 0 <= sum(slabs) - channels < NARROWEST
        assert all(NARROWEST <= slab <= widest and slab & (slab - 1) == 0 for slab in slabs)
        assert list(slabs) == sorted(slabs, reverse=True)
        assert channels > sum(slabs[:-1]), "the last slab holds channels"
        assert all(slabs.count(slab) == 1 for slab in slabs if slab < widest), "fewer slabs would do"
