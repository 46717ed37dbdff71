"""A process in which Triton compiles kernels, as it may interpret them in this one: one for all tests, as it starts
slowly."""

import multiprocessing
import os
import traceback
from contextlib import redirect_stdout
from io import StringIO

TIMEOUT_SECONDS = 300


class CompilingProcess:
    """Calls functions in a process of its own, which starts at the first call and again after it has died."""

    def __init__(self):
        self._process, self._requests = None, None

    def call(self, function, *arguments):
        """What `function(*arguments)` returns or raises there. All of that travels pickled."""
        if self._process is None:
            self._requests, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("spawn")
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._requests.send((function, arguments))
            if not self._requests.poll(TIMEOUT_SECONDS):
                raise TimeoutError(f"no answer in {TIMEOUT_SECONDS} s")
            result, error = self._requests.recv()
        except (EOFError, OSError):
            self._process.kill()
            self._process = None
            raise
        if error is not None:
            raise error
        return result


def _serve(requests):
    # Before anything imports Triton.
    os.environ.pop("TRITON_INTERPRET", None)
    while True:
        try:
            function, arguments = requests.recv()
        except EOFError:
            return
        try:
            requests.send((function(*arguments), None))
        except BaseException as error:
            error.add_note(traceback.format_exc())
            requests.send((None, error))


def _printed(arguments):
    from fusion.triton_kernels.ahead import main

    with redirect_stdout(StringIO()) as text:
        main(arguments)
    return text.getvalue()


_PROCESS = CompilingProcess()


def compiling(function, *arguments):
    """What a function returns or raises where kernels are compiled."""
    return _PROCESS.call(function, *arguments)


def ahead_output(*arguments):
    """What `python -m fusion.triton_kernels.ahead` prints, given these arguments."""
    return compiling(_printed, arguments)
