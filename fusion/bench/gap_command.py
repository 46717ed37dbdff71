"""`python -m fusion.bench gap`: the efficiency gap of networks, from saved results (the paper's figures 1 and 17)."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fusion.bench import report
from fusion.bench.gap import ENGINES, PAPER, Ceilings, Gap, Incomplete, network_gaps, own_ceilings
from fusion.bench.paper_networks import PAPER_BATCH, PAPER_DTYPE, PAPER_NETWORKS
from fusion.bench.report import Column
from fusion.bench.saved_results import is_table, number, processor_of, read_report, read_table
from fusion.planner.processor import PROCESSORS, Processor, get_processor

DESCRIPTION = """\
How long would a network take at the peak of the GPU, and how long does it take? Ideal latency is OPs / peak, two OPs
for a multiply-accumulate (MAC); ideal over actual latency is the computational efficiency, and on a logarithmic axis
the gap between the two is as wide as that efficiency is low. Next to the top-1 accuracy that shows what a network owes
to its design and what to its implementation. Nothing runs: no GPU is needed.

RESULTS are reports that `network` or `compile` wrote with --json, or the paper's table 4 as CSV: its GPU is an RTX
A5000 at 76.7 TFLOP/s, its latencies of ConvFirstNets are projections. Reports of several GPUs can be mixed: each is
compared with its own peak, which the output names. A report of `compile` has none: it takes that of another report of
the same GPU, or what the planner knows of the GPU. It counts no OPs either: those in the paper's tables stand in.

Latencies are in milliseconds a batch. The picture shows the largest batch, without eager PyTorch.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench network --json network.json && python -m fusion.bench gap network.json --plot gap.png
  python -m fusion.bench gap bench/paper/table4_networks.csv --models efficientnet,convnext --plot figure1.png
  python -m fusion.bench gap bench/paper/table4_networks.csv --models convfirst,convnext --plot figure17.png
  python -m fusion.bench gap compile.json network.json --accuracies trained.csv --json gap.json
"""

PROTOCOL = (
    "not timed: ideal and actual latencies of the reports given, milliseconds a batch; ideal_ms = 2 macs_g batch / "
    "peak_tflops, efficiency_pct = 100 ideal_ms / actual_ms; macs_g: 10^9 multiply-accumulates of one image in "
    "convolutions and linear layers; top1 in percent"
)

TABLE4_COLUMNS = ("model", "engine", "macs_g", "fps", "top1")
TABLE4_NAMES = {"convfirst_": "convfirstnet_", "efficientnetv2_": "tf_efficientnetv2_"}
"""How names of the paper's table begin, and those of the models here and of timm."""
TABLE4_ENGINES = {"inductor": "inductor", "fused": "projected"}


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "gap",
        help="efficiency gap of saved results of networks (the paper's figures 1 and 17)",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="JSON of network or compile, or table 4 as CSV")
    parser.add_argument(
        "--accuracies",
        metavar="CSV",
        help="ImageNet-1k top-1 in percent, columns model,top1; goes before what is known (default: the paper's, at "
        "its image sizes)",
    )
    parser.add_argument(
        "--models", type=_prefixes, metavar="A[,B...]", help="only networks whose names begin so (default: all)"
    )
    parser.add_argument("--plot", metavar="PATH", help="draw the gaps: .png, .svg or .pdf")
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises ValueError for results that it cannot read, for models that they do not have, and when no network is
    complete, OSError if a file cannot be read or written.
    """
    from fusion.plots.gap_plot import plot_gaps

    report.check_outputs(args.json, args.plot)
    found = read_gaps(args.results, read_accuracies(args.accuracies) if args.accuracies else {})
    found = choose_models(found, args.models)
    gaps = [gap for gaps, _ in found.values() for gap in gaps]
    if not gaps:
        print_incomplete(found)
        raise ValueError(f"nothing to compare in {', '.join(args.results)}: every network lacks something, see above")
    if args.json:
        meta = report.collect_meta(PROTOCOL, device="cpu", reports=args.results)
        report.write_json(args.json, meta, gap_rows(found))
    if args.plot:
        plot_gaps(gaps, args.plot)
    # The tables come last: a reader that closes the pipe early must not cost the files.
    print_gaps(found)
    print_incomplete(found)
    return 0


Found = dict[str, tuple[list[Gap], list[Incomplete]]]
"""By the path of the results: networks with a gap, and those without."""


def read_gaps(paths: Sequence[str], accuracies: Mapping[str, tuple[float, str]]) -> Found:
    """Read results. Raises ValueError for what it cannot read, or a GPU that nothing is known of."""
    reports = {
        path: read_report(path, ("model", "batch"), "`network` or `compile`") for path in paths if not is_table(path)
    }
    own = [ceilings for meta, _ in reports.values() if (ceilings := own_ceilings(meta))]
    measured = {ceilings.device: ceilings for ceilings in reversed(own)}
    found = {}
    for path in dict.fromkeys(paths):
        if is_table(path):
            found[path] = read_paper_table(path, accuracies), []
        else:
            meta, rows = reports[path]
            ceilings = (
                own_ceilings(meta) or measured.get(meta.get("device")) or known_ceilings(path, meta.get("device"))
            )
            found[path] = network_gaps(rows, meta, ceilings, accuracies)
    return found


def read_paper_table(path: str | os.PathLike[str], accuracies: Mapping[str, tuple[float, str]]) -> list[Gap]:
    """The paper's table 4. Raises ValueError for another table.

    Its latencies have fewer digits than its images per second, its MACs of ConvFirstNets fewer than its table 9.
    """
    ceilings = _planners(get_processor("a5000"), "NVIDIA RTX A5000")
    gaps = []
    for row in read_table(path, TABLE4_COLUMNS):
        if row["engine"] not in TABLE4_ENGINES:
            raise ValueError(f"{path}: engine {row['engine']!r} is unknown, use {' or '.join(TABLE4_ENGINES)}")
        model, macs_g = _timm_name(row["model"]), number(path, row, "macs_g")
        if model in PAPER_NETWORKS and round(PAPER_NETWORKS[model].macs_g, 1) == macs_g:
            macs_g = PAPER_NETWORKS[model].macs_g
        milliseconds = 1e3 * PAPER_BATCH / number(path, row, "fps")
        top1, source = accuracies.get(model) or (number(path, row, "top1", most=100), PAPER)
        engine = TABLE4_ENGINES[row["engine"]]
        gaps.append(Gap(model, engine, PAPER_BATCH, None, PAPER_DTYPE, macs_g, milliseconds, top1, source, ceilings))
    return gaps


def read_accuracies(path: str | os.PathLike[str]) -> dict[str, tuple[float, str]]:
    """Top-1 in percent by model, and the file's name. Raises ValueError for another table."""
    rows = read_table(path, ("model", "top1"))
    return {row["model"]: (number(path, row, "top1", most=100), Path(path).name) for row in rows}


def known_ceilings(path: str, device: str | None) -> Ceilings:
    """What the planner knows of a GPU that PyTorch calls `device`. Raises ValueError if that is nothing."""
    processor = processor_of(device or "")
    if processor is not None:
        return _planners(processor, device)
    if device == "cpu":
        raise ValueError(f"{path} was written without a GPU: it has no latencies; run its command on a GPU")
    raise ValueError(
        f"{path} does not say what {device} reaches at most, and the planner knows {', '.join(PROCESSORS)} only; add a "
        "report of `network` from that GPU"
    )


def choose_models(found: Found, prefixes: Sequence[str] | None) -> Found:
    """Only networks whose names begin so. Raises ValueError for a prefix that no name has."""
    names = list(dict.fromkeys(item.model for results in found.values() for items in results for item in items))
    for prefix in prefixes or ():
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"no network's name begins with {prefix!r}; there are {', '.join(names)}")
    return {
        path: tuple([item for item in items if item.model.startswith(tuple(prefixes or ("",)))] for items in results)
        for path, results in found.items()
    }


def gap_rows(found: Found) -> list[dict[str, object]]:
    """The rows of the JSON."""
    rows = []
    for path, (gaps, _) in found.items():
        for gap in gaps:
            row = asdict(gap)
            ceilings = row.pop("ceilings")
            device, source = ceilings.pop("device"), ceilings.pop("source")
            row |= {"ideal_ms": gap.ideal_ms, "efficiency_pct": 100 * gap.efficiency, "device": device}
            rows.append({**row, **ceilings, "ceilings_source": source, "report": path})
    return rows


def print_gaps(found: Found) -> None:
    """The gaps as a table, and the peaks that they assume."""
    cells = [
        [
            gap.model,
            gap.size,
            ENGINES[gap.engine],
            gap.batch,
            gap.macs_g,
            gap.ideal_ms,
            gap.actual_ms,
            100 * gap.efficiency,
            gap.top1,
            gap.top1_source,
            path,
        ]
        for path, (gaps, _) in found.items()
        for gap in gaps
    ]
    columns = [
        Column("network"),
        Column("H=W"),
        Column("engine"),
        Column("batch"),
        Column("MACs G", "{:.2f}"),
        Column("ideal ms", "{:.3f}"),
        Column("actual ms", "{:.3f}"),
        Column("efficiency %", "{:.1f}"),
        Column("top-1 %", "{:.1f}"),
        Column("top-1 of"),
        Column("results"),
    ]
    hidden = {index for index in (1, 10) if len({row[index] for row in cells} - {None}) < (1 if index == 1 else 2)}
    shown = [index for index in range(len(columns)) if index not in hidden]
    cells = [[row[index] for index in shown] for row in cells]
    title = "Efficiency gap: latencies in ms a batch, ideal at the peak; computational efficiency = ideal / actual\n"
    report.print_table([columns[index] for index in shown], cells, title + "\n".join(_assumed(found)))


def print_incomplete(found: Found) -> None:
    """Which networks have no gap, and what they lack."""
    for path, (_, incomplete) in found.items():
        for item in incomplete:
            print(f"left out: {item.model} of {path}: {item.reason}")


def _assumed(found: Found) -> list[str]:
    return [f"{path}: {gaps[0].ceilings}" for path, (gaps, _) in found.items() if gaps]


def _planners(processor: Processor, device: str) -> Ceilings:
    return Ceilings(device, processor.peak_ops / 1e12, processor.bandwidth / 1e12, processor.source)


def _timm_name(name: str) -> str:
    stem, _, size = name.rpartition("_")
    name = stem if size.isdecimal() and len(size) == 3 else name
    for papers, ours in TABLE4_NAMES.items():
        if name.startswith(papers):
            return ours + name.removeprefix(papers)
    return name


def _prefixes(text: str) -> list[str]:
    prefixes = [prefix.strip() for prefix in text.split(",")]
    if not all(prefixes):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; write the beginnings of names, as in convnext")
    return prefixes
