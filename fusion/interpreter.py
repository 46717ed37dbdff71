"""Triton's interpreter, which runs kernels where there is no GPU."""

import os
from dataclasses import replace


def interpret_kernels() -> None:
    """Let Triton interpret all kernels of this process, on CPUs. Call it before anything imports Triton.

    The interpreter computes each integer operation twice, to look for overflows, and then ignores what it found unless
    it is debugging: half of its time, which is saved here.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    if hasattr(options, "sanitize_overflow"):
        interpreter_builder.options = replace(options, sanitize_overflow=False)
