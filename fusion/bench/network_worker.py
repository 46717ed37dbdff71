"""A process that measures one network: requests and answers are lines of JSON on standard input and output."""

import json
import os
import sys

from fusion.bench.network_case import NetworkCase


def main() -> None:
    """Answer "prepare" and "measure" until standard input ends; a first line says which network."""
    # What compilers print must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    bench = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if bench is None:
                from fusion.bench.network_bench import NetworkBench

                bench = NetworkBench(NetworkCase(**request["case"]), request["tune"], request["by_block"])
            reply = getattr(bench, request["do"])()
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
