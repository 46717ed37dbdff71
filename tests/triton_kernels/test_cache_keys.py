"""Kernels have the same keys in Triton's cache in whatever order they are launched."""

import os
import subprocess
import sys

PRINT_KEYS = """
import sys
from importlib import import_module

from torch.library import wrap_triton

from fusion.triton_kernels.cache_keys import settle_cache_keys

keys = {}
for name in sys.argv[1:]:
    kernel = getattr(import_module(f"fusion.triton_kernels.{name}"), f"{name}_kernel")
    settle_cache_keys(wrap_triton(kernel) if name == "convfirst" else kernel)
    keys[name] = kernel.cache_key
print(sorted(keys.items()))
"""
NAMES = (
    "stem",
    "convfirst_hopper",
    "convfirst",
    "head",
    "stem_convfirst_hopper",
    "mbconv_hopper",
    "mbconv_windows_hopper",
)


def test_keys_do_not_depend_on_the_order_of_launches():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    orders = NAMES, NAMES[::-1]
    printed = [
        subprocess.run(
            [sys.executable, "-c", PRINT_KEYS, *order], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for order in orders
    ]
    assert printed[0] == printed[1]
    assert all(name in printed[0] for name in NAMES)
