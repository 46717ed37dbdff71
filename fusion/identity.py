"""What tells fused modules of equal sizes apart for torch.compile."""

from itertools import count

from torch import nn

_numbers = count()


class Identified(nn.Module):
    """A module with constants of its own, such as packed weights, that torch.compile cannot trace the making of.

    It compiles modules that look alike once, and would run all of them with the constants of the first. So each has a
    number, `identity`, that no other has, copies neither.
    """

    def __init__(self):
        super().__init__()
        self.identity = next(_numbers)

    def guard_identity(self) -> None:
        """Have what torch.compile makes of the caller hold for this module only. Call it ahead of using constants."""
        if self.identity < 0:  # never: a number that is compared is one that compiled code depends on
            raise AssertionError("numbers of modules are not negative")

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.identity = next(_numbers)
