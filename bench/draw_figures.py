"""Draw the pictures of the gallery again, by the commands that its page shows.

A NAME is a part of the names of the pictures to draw, such as fig03. Run it from anywhere; paths are those of the
repository. Networks of timm need timm.
"""

import argparse
import os
import re
import shlex
from pathlib import Path

from fusion.bench.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "bench" / "figures" / "README.md"
PREFIX = "python -m fusion.bench "


def gallery_commands() -> list[list[str]]:
    """The arguments of every command on the page, in order."""
    blocks = re.findall(r"^```\n(.*?)^```$", GALLERY.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line.removeprefix(PREFIX)) for line in lines if line.startswith(PREFIX)]


def draw(names: list[str]) -> int:
    """Run the commands whose picture's name contains one of `names`, or all; the number of those that failed."""
    os.chdir(ROOT)
    failed = 0
    for arguments in gallery_commands():
        picture = Path(arguments[-1]).name
        if not names or any(name in picture for name in names):
            print(f"== {PREFIX}{shlex.join(arguments)}")
            failed += main(arguments) != 0
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="draw only pictures whose names contain it")
    raise SystemExit(draw(parser.parse_args().names))
