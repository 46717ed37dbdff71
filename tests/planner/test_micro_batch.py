from dataclasses import replace

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.micro_batch import CACHE_SHARE, PIXELS_PER_PROCESSOR, micro_batch_images
from fusion.planner.processor import PROCESSORS

GPU = replace(PROCESSORS["h200"], processors=2, global_memory_bytes=2_000_000)


def stage(batch, depth=1, channels=16, hw=16):
    return [mbconv(batch, hw, hw, channels, 4) for _ in range(depth)]


def weights_bytes(graphs):
    return 2 * sum(tensor.size for graph in graphs for tensor in graph.weights())


@pytest.mark.parametrize("depth", [1, 4])
def test_weights_input_and_output_fit(depth):
    graphs = stage(200, depth)
    image = 2 * 2 * 16 * 16 * 16
    fitting = int((CACHE_SHARE * GPU.global_memory_bytes - weights_bytes(graphs)) // image)
    images = micro_batch_images(graphs, GPU)
    assert 1 < images <= fitting < 200
    parts = -(-200 // fitting)
    assert images == -(-200 // parts), "as few micro-batches as fit, of equal size"


def test_more_blocks_leave_room_for_fewer_images():
    assert micro_batch_images(stage(200, 30), GPU) < micro_batch_images(stage(200, 1), GPU)


def test_a_batch_that_fits_is_one_micro_batch():
    assert micro_batch_images(stage(20), GPU) == 20


def test_too_few_images_to_fill_the_processors_are_not_worth_it():
    large = stage(200, channels=16, hw=64)  # an image is 262 KB
    assert micro_batch_images(large, GPU) < 200
    filling = replace(GPU, processors=200)
    assert 64 * 64 * micro_batch_images(large, GPU) < filling.processors * PIXELS_PER_PROCESSOR
    assert micro_batch_images(large, filling) == 200
    assert micro_batch_images(stage(200, 1, channels=512), GPU) == 200, "the weights alone do not fit"


def test_whole_images_need_as_many_as_processors():
    graphs, fitting = stage(200, hw=32), micro_batch_images(stage(200, hw=32), GPU)
    assert 1 < fitting < 200
    for processors in (fitting, fitting + 1, 2 * fitting):
        gpu = replace(GPU, processors=processors)
        assert micro_batch_images(graphs, gpu, whole_images=True) == (fitting if processors == fitting else 200)
    assert micro_batch_images(stage(20), replace(GPU, processors=200), whole_images=True) == 20


def test_one_batch_size():
    with pytest.raises(ValueError, match=r"blocks of one batch size, got \[1, 2\]; plan all for the same input"):
        micro_batch_images([*stage(1), *stage(2)], GPU)
    with pytest.raises(ValueError, match=r"blocks of one batch size, got \[\]"):
        micro_batch_images([], GPU)
