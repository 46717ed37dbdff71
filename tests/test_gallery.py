"""The gallery's page shows the pictures that its commands draw, and has every figure of the paper that can be drawn."""

import re
from pathlib import Path

import pytest

from bench.draw_figures import GALLERY, ROOT, gallery_commands
from fusion.bench.__main__ import build_parser

FIGURES = ("01", "02", "03", "04", "05", "07a", "07b", "07c", "08", "10", "11", "12", "13", "14", "15", "16", "17")
"""Those that are plots or tensor-machine diagrams; the others show blocks as boxes."""

COMMANDS = gallery_commands()


def pictures_of(page: Path) -> list[str]:
    return re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))


def test_every_picture_has_its_command_and_is_there():
    drawn = [Path(command[command.index("--plot") + 1]) for command in COMMANDS]
    assert all(path.parent == Path("bench/figures") for path in drawn)
    assert sorted(path.name for path in drawn) == sorted(pictures_of(GALLERY))
    for name in pictures_of(GALLERY):
        assert (GALLERY.parent / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in GALLERY.parent.glob("*.png")} == {path.name for path in drawn}


def test_every_figure_of_the_paper_is_there():
    names = pictures_of(GALLERY)
    assert [figure for figure in FIGURES if not any(name.startswith(f"fig{figure}_") for name in names)] == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[-1]).stem)
def test_commands_parse_and_read_what_is_there(command):
    build_parser().parse_args(command)
    assert all((ROOT / word).is_file() for word in command if word.endswith((".json", ".csv")))


def test_pictures_of_the_readme_are_there():
    assert all((ROOT / name).is_file() for name in pictures_of(ROOT / "README.md"))
