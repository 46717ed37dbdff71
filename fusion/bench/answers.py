"""What the processes that measure have in common: lines of JSON in, lines of JSON out."""

import json
import os
import sys
from collections.abc import Callable


def answer_requests(make: Callable[[dict], object]) -> None:
    """Answer requests until standard input ends.

    The first request is given to `make`, whose result has a method for what each request says under "do"; the method
    returns what is answered, and what it raises is answered as "failed".
    """
    # What compilers print must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    bench = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if bench is None:
                bench = make(request)
            reply = getattr(bench, request["do"])()
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"failed": describe(error)}
        print(json.dumps(reply), file=answers, flush=True)


def describe(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
