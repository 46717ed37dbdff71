"""Clear errors for images that a model cannot take."""

from torch import Tensor


def min_image_size(num_blurpools: int) -> int:
    """Least height and width, in pixels, that the stem and that many stride-2 blocks after it can take.

    The stem and each `BlurPool` halve the size, rounding up, and a `BlurPool` needs at least 2 pixels in either
    direction: the last one sees `ceil(size / 2**num_blurpools)` of them.
    """
    return 2**num_blurpools + 1 if num_blurpools else 1


def check_images(x: Tensor, in_chans: int, min_size: int) -> Tensor:
    """Return `x` unchanged if it is `[N, in_chans, H, W]` with H and W of at least `min_size` pixels.

    Raises:
        ValueError: it is not.
    """
    if x.dim() != 4:
        raise ValueError(
            f"expected a batch of images [N, {in_chans}, H, W], got {x.dim()} dimensions {list(x.shape)}; "
            f"add a batch dimension to a single image with x.unsqueeze(0)"
        )
    if x.shape[1] != in_chans:
        raise ValueError(
            f"expected images of {in_chans} channels [N, {in_chans}, H, W], got {list(x.shape)}; "
            f"create the model with in_chans={x.shape[1]}, or permute images that have their channels last"
        )
    if x.shape[2] < min_size or x.shape[3] < min_size:
        raise ValueError(
            f"an image of {x.shape[2]}x{x.shape[3]} pixels is too small for the strides of this model, which takes any "
            f"height and width from {min_size} pixels up; resize or pad the image"
        )
    return x
