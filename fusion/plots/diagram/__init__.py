"""Tensor-machine diagrams of programs (paper section 5.1, figures 5, 7, 10 and 11)."""
