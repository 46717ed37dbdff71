import argparse
import json

import pytest

from fusion.bench import diagram_command


def run(*arguments):
    parser = argparse.ArgumentParser(prog="bench")
    diagram_command.register(parser.add_subparsers(required=True))
    args = parser.parse_args(["diagram", *arguments])
    return args.func(args)


def test_prints_the_program(capsys):
    assert run("64,6,64", "--pixel-tile", "8x16", "--hidden-tile", "16") == 0
    text = capsys.readouterr().out
    assert text.startswith("fused convfirst (float16), 1 kernel: 56.37 GOP")
    assert "processors divide residual.out over N by 1 H by 8 W by 16" in text
    assert "loop expand.out over C by 16" in text
    assert "wrote" not in text


@pytest.mark.parametrize(
    "arguments, title, kernels",
    [
        (["64,6,64", "--program", "layerwise"], "convfirst 64, α 6, 64², batch 128: layerwise", 3),
        (["512,6,32", "--program", "scaled"], "convfirst 512, α 6, 32², batch 128: scaled", 1),
        (["ffn:64,6,64", "--batch", "8"], "ffn 64, α 6, 64², batch 8: fused", 1),
        (["mbconv:128,4,16", "--program", "two-pass"], "mbconv 128, α 4, 16², batch 128: two-pass", 2),
        (["mbconv:128,4,16", "--program", "image"], "mbconv 128, α 4, 16², batch 128: image", 1),
        (["64,6,64", "--stride", "2"], "convfirst 64, α 6, 64², stride 2, batch 128: fused", 1),
    ],
)
def test_draws_every_program(tmp_path, capsys, arguments, title, kernels):
    picture, report = tmp_path / "diagram.svg", tmp_path / "diagram.json"
    assert run(*arguments, "--plot", str(picture), "--json", str(report)) == 0
    assert capsys.readouterr().out.endswith(f"wrote {picture}\n")
    assert title in picture.read_text(encoding="utf-8")
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == kernels


def test_json_has_each_tensors_memory(tmp_path):
    path = tmp_path / "mbconv.json"
    run("mbconv:128,4,16", "--hidden-tile", "64", "--json", str(path))
    report = json.loads(path.read_text())
    assert (report["meta"]["batch"], report["meta"]["dtype"], report["meta"]["stride"]) == (128, "float16", 1)
    (row,) = report["rows"]
    assert (row["block"], row["channels"], row["alpha"], row["hw"]) == ("mbconv", 128, 4, 16)
    assert (row["program"], row["kernel"], row["loops"]) == ("fused", "mbconv", [])
    assert row["intensity"] == row["ops"] / row["bytes"]
    assert row["partition"].startswith("expand.out over N by 1 C by 64")
    memories = [row["tensors"][name] for name in ("x", "expand.out", "squeeze.out", "residual.out")]
    assert memories == ["DRAM", "local", "global", "DRAM"]


def test_legend(tmp_path, capsys):
    path = tmp_path / "figure5.png"
    assert run("legend", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"wrote {path}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["legend"], "the legend is a picture only: give --plot PATH"),
        (["64,6,64", "--processors", "2"], "--processors was given for the fused program, but is for scaled only"),
        (["64,6,64", "--program", "layerwise", "--hidden-tile", "16"], "--hidden-tile was given for the layerwise"),
        (["mbconv:128,4,16", "--program", "image", "--pixel-tile", "4x8"], "--pixel-tile was given for the image"),
        (["mbconv:128,4,16", "--program", "scaled"], "use the fused program"),
        (["64,6,64", "--program", "two-pass"], "use the fused program"),
        (["64,6,64", "--program", "scaled", "--processors", "3"], "do not divide over 3 processors"),
        (["ffn:64,6,64", "--stride", "2"], "an ffn block has stride 1 only"),
        (["64,6,64", "--hidden-tile", "0"], "the tile of C must be positive"),
        (["64,6,64", "--batch", "0"], "n must be a positive integer"),
        (["63,6,64"], "63 channels do not divide into groups of 8"),
        (["64,6,64", "--plot", "diagram.jpg"], r"must end in one of \.png, \.svg, \.pdf"),
    ],
)
def test_what_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["64,6"], "is not C,ALPHA,HW"),
        (["head:64,6,64"], "of type 'head'; supported here: convfirst, ffn, mbconv"),
        (["64,6,64", "--pixel-tile", "8"], "'8' is not HxW, such as 8x16"),
        (["64,6,64", "--pixel-tile", "0x8"], "'0x8' is not HxW, such as 8x16"),
    ],
)
def test_arguments_in_another_form(capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        run("64,6,64", "--plot", str(tmp_path / "file" / "diagram.svg"))
