import pytest
import torch

from fusion.probe import measure_ceilings, probe_processor, processor_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("probe", [measure_ceilings, probe_processor])
def test_without_a_gpu_the_error_says_what_to_do(probe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA GPU and none is available; plan from shapes"):
        probe()


@needs_gpu
def test_a_device_other_than_a_gpu_is_refused():
    with pytest.raises(RuntimeError, match="needs a CUDA GPU, got device cpu"):
        measure_ceilings("cpu")


@needs_gpu
def test_probe_describes_the_current_gpu():
    processor = probe_processor()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    assert processor.title == properties.name
    assert processor.processors == properties.multi_processor_count
    assert 1e12 < processor.peak_ops < 1e16
    assert 1e11 < processor.bandwidth < 1e14


@needs_gpu
def test_a_gpu_is_measured_once_and_then_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fusion.probe.PROCESSORS", {})
    first = processor_of.__wrapped__()
    monkeypatch.setattr("fusion.probe.measure_ceilings", lambda *_: pytest.fail("measured again"))
    assert processor_of.__wrapped__() == first
