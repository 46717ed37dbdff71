"""Pictures of what networks, blocks and kernels reach, and could. matplotlib is imported when one is drawn."""
