"""Tensors that outlive a call: made from their values, and in ordinary memory, whatever happens around them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Made = TypeVar("Made")


@contextmanager
def real_tensors() -> Iterator[None]:
    """Whatever mode the caller is in, tensors made here are ordinary ones, for they are kept for all callers.

    The modes are that of inference, in which tensors could not be used outside of it, and those of torch.export, in
    which they would have no values and their making would be a part of the exported program.
    """
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


def make_for_all(make: Callable[[], Made], device: torch.device) -> Made:
    """What `make` makes on a device, as ordinary tensors that callers on all streams may use at once.

    On GPUs a thread of its own runs it: what the caller's thread allocates may belong to a CUDA graph that is being
    made, and goes when the graph does.
    """
    if device.type != "cuda":
        with real_tensors():
            return make()
    outcome: list[Made | BaseException] = []

    def run() -> None:
        try:
            with torch.cuda.device(device), real_tensors():
                outcome.append(make())
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    return result
