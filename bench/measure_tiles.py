"""Time the tuner's candidates for ConvFirst blocks and compare each with the planner's prediction.

    python bench/measure_tiles.py --json bench/results/h200/tiles.json

The constants of `fusion.planner.tile` and `fusion.planner.hopper_time` are judged by this: the root mean square of
predicted over measured minus one, and how much longer the tile predicted best takes than the one measured best.
"""

import argparse

from fusion.bench import report
from fusion.bench.blocks import FIGURE8, BlockConfig, parse_block
from fusion.planner.families import family_of
from fusion.planner.plan import block_shape
from fusion.probe import cuda_device, processor_of
from fusion.tuner.tune import search

PROTOCOL = (
    "every tile in a worker process: random weights and inputs, a stage of eight blocks with distinct weights in a "
    "CUDA graph, median of 20 replays after warm-up, microseconds per block; results checked against float64"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", action="append", type=parse_block, metavar="C,ALPHA,HW", help="default: figure 8's")
    parser.add_argument("--batch", type=int, default=128, metavar="N")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    if args.json:
        report.check_writable(args.json)
    configs: list[BlockConfig] = args.block or list(FIGURE8)
    device = cuda_device()
    processor = processor_of(device)
    shapes = {config: block_shape(config.graph(args.batch)) for config in configs}
    results = search(list(shapes.values()), processor, device, progress=True)
    rows, summary = [], []
    for config, shape in shapes.items():
        found = results[shape]
        predicted = {tile: family_of(tile).predicted_us(tile, shape, processor) for tile in found.measured}
        rows += [
            {
                "block": config.block,
                "channels": config.channels,
                "alpha": config.alpha,
                "hw": config.hw,
                "batch": args.batch,
                "dtype": shape.dtype,
                "kernel": family_of(tile).name,
                "tile": repr(tile),
                "measured_us": found.measured[tile],
                "predicted_us": predicted[tile],
            }
            for tile in found.ranking()
        ]
        best, chosen = found.ranking()[0], min(predicted, key=predicted.__getitem__)
        error = sum((predicted[tile] / us - 1) ** 2 for tile, us in found.measured.items()) / len(predicted)
        regret = found.measured[chosen] / found.measured[best]
        failed = sum(found.failures.values())
        summary.append([str(config), len(predicted), failed, found.measured[best], 100 * error**0.5, regret])
    if args.json:
        report.write_json(args.json, report.collect_meta(PROTOCOL, processor, batch=args.batch), rows)
    columns = ("block", "tiles", "failed", "best µs", "prediction rms %", "predicted best / measured best")
    formats = ("{}", "{}", "{}", "{:.1f}", "{:.1f}", "{:.2f}")
    cells = [report.Column(*column) for column in zip(columns, formats, strict=True)]
    report.print_table(cells, summary, f"Tiles on {processor.title}, batch {args.batch}")


if __name__ == "__main__":
    main()
