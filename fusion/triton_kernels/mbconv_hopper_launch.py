"""How the Hopper kernels of MBConv blocks are launched: they take the same weights, and a program for each image."""

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusion.planner.mbconv_hopper_tile import WARPS
from fusion.relaunch import launch_kernel, scratch
from fusion.triton_kernels.hopper_layouts import flat_layout
from fusion.triton_kernels.hopper_parts import processor_count
from fusion.triton_kernels.mbconv_hopper_spec import PRODUCT_WIDTHS, Spec


def launch_images(
    kernel,
    x: torch.Tensor,
    expand: torch.Tensor,
    taps: torch.Tensor,
    conv_bias: torch.Tensor,
    squeeze: torch.Tensor,
    squeeze_bias: torch.Tensor,
    excite: torch.Tensor,
    excite_bias: torch.Tensor,
    project: torch.Tensor,
    project_bias: torch.Tensor,
    out: torch.Tensor,
    *,
    projected: Spec,
    workspace_elements: int,
    **constants: object,
) -> None:
    """Run `kernel` on the images of `x` `[N, C, H, W]`, on the current device.

    There is a launch for as many images as the GPU has processors, and all use one workspace, of `workspace_elements`
    an image. Weights are those of `fusion.mbconv_hopper_weights.PackedMBConvHopper`. `projected` says how the kernel
    projects; `constants` are the kernel's other arguments.
    """
    batch = len(x)
    programs = min(batch, processor_count(x.device.index))
    # Hidden channels that stay in shared memory need no workspace: then the kernel does not touch what stands for it.
    workspace = out if projected.resident else scratch(x, (programs, workspace_elements))
    boxes = descriptor_boxes(projected)
    rows = {"hidden_desc": workspace, **{f"v{width}_desc": project for width in PRODUCT_WIDTHS}}
    descriptors = {name: rows_descriptor(tensor, boxes.get(name)) for name, tensor in rows.items()}
    for first in range(0, batch, programs):
        images = slice(first, first + programs)
        launch_kernel(
            kernel,
            (len(x[images]),),
            x_ptr=x[images],
            out_ptr=out[images],
            **descriptors,
            expand_ptr=expand.view(torch.int32),
            taps_ptr=taps,
            conv_bias_ptr=conv_bias,
            squeeze_ptr=squeeze.view(torch.int32),
            squeeze_bias_ptr=squeeze_bias,
            excite_ptr=excite.view(torch.int32),
            excite_bias_ptr=excite_bias,
            project_bias_ptr=project_bias,
            workspace_ptr=workspace,
            **constants,
            num_warps=WARPS,
            launch_pdl=True,
        )


def descriptor_boxes(projected: Spec) -> dict[str, list[int]]:
    """What one copy by TMA brings: the box of every descriptor that a kernel needs, by the argument's name."""
    boxes = {f"v{width}_desc": [projected.step * width // 64, 64] for width in projected.products}
    return boxes if projected.resident else boxes | {"hidden_desc": [projected.hidden_rows, 64]}


def rows_descriptor(tensor: torch.Tensor, box: list[int] | None) -> TensorDescriptor | None:
    """Of rows of 64 elements; None without a box."""
    if box is None:
        return None
    return TensorDescriptor(tensor, [tensor.numel() // 64, 64], [64, 1], box, flat_layout())
