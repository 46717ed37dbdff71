from dataclasses import replace

import pytest

from fusion.planner.processor import PROCESSORS, get_processor


def test_lookup_by_name_or_instance():
    h200 = get_processor("h200")
    assert h200 is PROCESSORS["h200"] is get_processor(h200)
    with pytest.raises(ValueError, match="'v100' is unknown; use one of a5000, a100, h100, h200, b200, rtx4090"):
        get_processor("v100")


def test_names_and_waterlines():
    assert all(name == processor.name for name, processor in PROCESSORS.items())
    assert get_processor("a5000").op_byte == pytest.approx(159.8, abs=0.05)
    assert "H200" in str(get_processor("h200"))


def test_measured_ceilings_replace_the_datasheet():
    measured = get_processor("h100").with_ceilings(700e12, 3e12)
    assert (measured.peak_ops, measured.bandwidth, measured.source) == (700e12, 3e12, "measured")
    assert measured.processors == get_processor("h100").processors


@pytest.mark.parametrize("field", ["peak_ops", "bandwidth", "processors", "local_memory_bytes", "global_memory_bytes"])
def test_numbers_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
        replace(get_processor("a100"), **{field: 0})
