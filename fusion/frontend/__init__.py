"""Finds the paper's blocks in the graphs of PyTorch models, and folds their weights."""
