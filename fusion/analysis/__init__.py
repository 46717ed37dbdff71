"""Where the time of any network goes: its layers as tensor-machine kernels, layer by layer and in fused blocks."""
