"""Planner: what a block computes, where its tensors live and what that costs. Pure Python: no torch, no Triton."""
