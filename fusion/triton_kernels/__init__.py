"""Triton kernels, one file for each kernel family. They hold no policy: tiles come from the plan."""
