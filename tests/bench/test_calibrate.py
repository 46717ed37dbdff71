import pytest
import torch
from torch import nn

from fusion.bench.calibrate import (
    calibrate_batch_norm,
    centre_logits,
    image_batches,
    randomise_affine,
    synthetic_images,
)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )


def test_images_have_the_statistics_of_normalised_photographs():
    images = synthetic_images(256, 48, seed=3)
    assert images.shape == (256, 3, 48, 48) and images.dtype == torch.float32
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=0.15)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), rtol=0, atol=0.15)
    steps = (images[..., 1:] - images[..., :-1]).std() / images.std()
    assert steps < 0.8, "neighbours are alike: it is 1.4 in white noise"
    assert torch.equal(images, synthetic_images(256, 48, seed=3))
    assert not torch.equal(images[:1], synthetic_images(1, 48, seed=4))


def test_all_batches_have_one_length():
    batches = list(image_batches(10, 4, 32))
    assert [batch.shape for batch in batches] == [(4, 3, 32, 32)] * 3
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert not torch.equal(batches[0], batches[1])


def test_statistics_are_the_averages_over_the_batches():
    model = small_network()
    batches = [torch.randn(16, 3, 10, 10) * (index + 1) for index in range(3)]
    first = model[0]
    assert calibrate_batch_norm(model, batches) is model
    outs = [first(batch) for batch in batches]
    mean = torch.stack([out.mean((0, 2, 3)) for out in outs]).mean(0)
    var = torch.stack([out.transpose(0, 1).flatten(1).var(1) for out in outs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert model[1].momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_activations_are_normal_after_calibration():
    model = small_network()
    model[0].weight.data *= 50
    images = [torch.randn(32, 3, 12, 12) for _ in range(4)]
    calibrate_batch_norm(model, images)
    out = model(torch.cat(images))
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.05)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.05)


def test_a_model_without_batch_norm_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).train()
    calibrate_batch_norm(model, [])
    assert not model.training


def test_no_batches():
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_batch_norm(small_network(), [])


def test_affine_parameters_are_random_and_repeatable():
    models = small_network(), small_network()
    for model in models:
        randomise_affine(model, seed=1)
    assert models[0][1].weight.std() > 0.1 and models[0][1].bias.std() > 0
    assert torch.equal(models[0][5].weight, models[1][5].weight)


def test_centred_logits():
    classifier = nn.Linear(6, 5)
    batches = [torch.randn(8, 6) + 3 for _ in range(2)]
    centre_logits(classifier, classifier, batches)
    torch.testing.assert_close(classifier(torch.cat(batches)).mean(0), torch.zeros(5), rtol=0, atol=1e-5)
