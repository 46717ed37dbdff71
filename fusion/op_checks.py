"""What the operators check alike; errors name the operator, what was asked, and what to do."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from fusion.planner.families import Tile
from fusion.planner.hopper_tile import COMPUTE_CAPABILITY
from fusion.planner.tile import CHANNEL_MULTIPLE, KERNEL_DTYPES, MAX_IMAGE_ELEMENTS
from fusion.reference import SQUEEZE_ACTIVATIONS

GPU_DTYPES = tuple(getattr(torch, name) for name in KERNEL_DTYPES)

ADDRESS_MULTIPLE = 16
"""Of tensors that the Hopper kernels copy to shared memory, in bytes."""

AnyTile = TypeVar("AnyTile", bound=Tile)


def tile_from_ints(op: str, tile_type: type[AnyTile], ints: list[int]) -> AnyTile:
    """Undo `to_ints()`. Raises ValueError for another number of integers."""
    if len(ints) != len(fields(tile_type)):
        raise ValueError(
            f"{op}: tile must be the {len(fields(tile_type))} integers of {tile_type.__name__}.to_ints(), got {ints}"
        )
    return tile_type(*ints)


def refuse_malformed(op: str, tile: Tile, reason: str | None) -> None:
    """Raises ValueError if there is a reason why no block runs with this tile."""
    if reason:
        raise ValueError(f"{op}: {tile!r} cannot run: {reason}; take the tile of a plan")


def check_input(op: str, x: Tensor, out_channels: int) -> None:
    """Whether `x` can be the input, `[N, C, H, W]`, of a block with this many output channels.

    Raises ValueError for shapes, RuntimeError for devices, and TypeError for dtypes that are not supported.
    """
    check_images(op, x)
    _, in_channels, height, width = x.shape
    for name, channels in (("input", in_channels), ("output", out_channels)):
        if channels % CHANNEL_MULTIPLE:
            raise ValueError(
                f"{op}: {channels} {name} channels are not supported, use a multiple of {CHANNEL_MULTIPLE}"
            )
    check_image_size(op, x, max(height * width * in_channels, height * width * out_channels))


def check_images(op: str, x: Tensor) -> None:
    """Whether `x` is `[N, C, H, W]` on a device and in a dtype that kernels take. Raises as `check_input` does."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [N, C, H, W], got shape {list(x.shape)}")
    if x.device.type not in ("cuda", "cpu"):
        raise RuntimeError(f"{op}: x is on {x.device}; supported are CUDA GPUs, and CPUs for reference: move it there")
    if x.device.type == "cuda" and x.dtype not in GPU_DTYPES:
        raise TypeError(
            f"{op}: x has dtype {x.dtype}; supported are {any_of(GPU_DTYPES)}: convert the model and its input, for "
            "example with .half()"
        )


def check_image_size(op: str, x: Tensor, elements: int) -> None:
    """Raises ValueError if `elements`, of an image of `x` or of its output, are more than kernels count."""
    if elements > MAX_IMAGE_ELEMENTS:
        height, width = x.shape[2:]
        raise ValueError(
            f"{op}: images of {height}x{width} pixels are too large, split them: 2**31 elements are the limit"
        )


def is_too_many(count: int | torch.SymInt, limit: int) -> bool:
    """Whether there is more of something than a launch can have, as far as it is known.

    Of a batch of any size, which torch.export traces, it is not: judging it would set a limit to the exported program's
    input. An operator that the program calls judges then.
    """
    return isinstance(count, int) and count > limit


def check_residual(op: str, residual: bool, in_channels: int, out_channels: int) -> None:
    """Raises ValueError if a residual is asked for that cannot be added."""
    if residual and out_channels != in_channels:
        raise ValueError(
            f"{op}: a residual of {in_channels} input channels cannot be added to {out_channels} output channels; they "
            "must be equal, or pass residual=False"
        )


def check_squeeze_activation(op: str, squeeze_activation: str) -> None:
    """Raises ValueError for an activation that no kernel has inside of squeeze-and-excitation."""
    if squeeze_activation not in SQUEEZE_ACTIVATIONS:
        raise ValueError(
            f"{op}: squeeze_activation {squeeze_activation!r} is not supported, use {any_of(SQUEEZE_ACTIVATIONS)}"
        )


def check_weights(
    op: str,
    x: Tensor,
    hidden_channels: int,
    out_channels: int,
    tile: Tile,
    pack: str,
    tensors: Iterable[tuple[str, Tensor, list[int], torch.dtype | None]],
) -> None:
    """Whether packed weights fit the block, the tile and `x`.

    `tensors` are names, tensors, the shapes that they must have, and their dtypes, None for any; `pack` names the
    function that makes them. Raises ValueError, TypeError and RuntimeError for another shape, dtype or device.
    """
    channels = f"{x.shape[1]} input, {hidden_channels} hidden and {out_channels} output channels"
    check_packed(op, x, f"{channels} with {tile!r}", pack, tensors)


def check_packed(
    op: str,
    x: Tensor,
    packed_for: str,
    pack: str,
    tensors: Iterable[tuple[str, Tensor, list[int], torch.dtype | None]],
) -> None:
    """What `check_weights` checks, of blocks without hidden channels too; `packed_for` tells what shapes depend on."""
    for name, tensor, shape, dtype in tensors:
        if list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be a contiguous {shape} for {packed_for}, got shape {list(tensor.shape)} with "
                f"strides {list(tensor.stride())}; pack the weights for this tile with {pack}"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, it must be {dtype} for {x.dtype} x")
        if tensor.device != x.device:
            raise RuntimeError(f"{op}: {name} is on {tensor.device}, x on {x.device}; move one of them")


def weight_dtype(x: Tensor) -> torch.dtype | None:
    """Of weights that go with `x`; None, any, on CPUs."""
    return x.dtype if x.device.type == "cuda" else None


def empty_output(x: Tensor, out_channels: int, stride: int = 1) -> Tensor:
    """`[N, K, ceil(H / stride), ceil(W / stride)]` like `x` `[N, C, H, W]`, channels_last.

    By strides: Inductor does not see a memory format here, and would copy what is empty into one that has it.
    """
    batch, _, height, width = x.shape
    height, width = (height + stride - 1) // stride, (width + stride - 1) // stride
    return torch.empty_strided(
        (batch, out_channels, height, width),
        (height * width * out_channels, 1, width * out_channels, out_channels),
        dtype=x.dtype,
        device=x.device,
    )


def check_gpu(op: str, device: torch.device, instead: str) -> None:
    """Raises RuntimeError unless the GPU is of the Hopper kernels' compute capability."""
    found = torch.cuda.get_device_capability(device)
    if found != COMPUTE_CAPABILITY:
        needed, found = (".".join(map(str, capability)) for capability in (COMPUTE_CAPABILITY, found))
        raise RuntimeError(
            f"{op}: {torch.cuda.get_device_name(device)} has compute capability {found}, the kernel needs {needed}; "
            f"{instead}"
        )


def aligned(op: str, x: Tensor, weights: Tensor) -> Tensor:
    """`x`, or a copy of it at an address that kernels can copy from. Raises ValueError for such weights."""
    if weights.data_ptr() % ADDRESS_MULTIPLE:
        raise ValueError(f"{op}: weights are at an address that is no multiple of {ADDRESS_MULTIPLE} bytes, clone them")
    return x.clone(memory_format=torch.channels_last) if x.data_ptr() % ADDRESS_MULTIPLE else x


def gradient_refusal(op: str) -> Callable[..., None]:
    """A `setup_context` that raises RuntimeError: PyTorch calls it when an input requires a gradient."""

    def refuse(ctx, inputs, output) -> None:
        raise RuntimeError(
            f"{op} is an inference operator and has no gradient, but one of its inputs requires a gradient; call it "
            "under torch.no_grad() or torch.inference_mode(), and train the unfused module"
        )

    return refuse


def any_of(names: Iterable[object]) -> str:
    return " or ".join(map(str, names))
