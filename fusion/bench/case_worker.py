"""Processes that measure, one for each network: a crash or a hang costs one row."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOG_LINES = 40


class CaseWorker:
    """A process that answers lines of JSON on its standard input with lines of JSON; it starts at the first request.

    `compile_threads` is how many processor cores it may use, `variables` are added to its environment. `log` is, once
    it has ended, the end of what it wrote to standard error.
    """

    def __init__(self, command: Sequence[str], compile_threads: int = 1, variables: Mapping[str, str] | None = None):
        self._command = list(command)
        self._compile_threads = compile_threads
        self._variables = dict(variables or {})
        self._process: subprocess.Popen | None = None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in close()
        self._lock = threading.Lock()
        self._closed = False
        self.log = ""

    def ask(self, request: Mapping[str, object], seconds: float) -> dict:
        """The answer; `{"failed": reason}` if the process dies, says something else or takes more than `seconds`."""
        with self._lock:
            if self._closed:
                return {"failed": "its process has ended"}
            if self._process is None:
                self._process = self._start()
            process = self._process
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            in_time = timer.is_alive()
            timer.cancel()
        try:
            return json.loads(line)
        except ValueError:
            pass
        with self._lock:
            if self._closed:
                reason = "its process has ended"
            elif not in_time:
                reason = f"no answer in {seconds:g} s"
            elif line:
                reason = f"an answer that is no JSON: {line.strip()[:100]}"
            else:
                reason = f"its process died with exit code {process.wait()}: {self._last_error()}"
        self.close()
        return {"failed": reason}

    def close(self) -> None:
        """End the process and what it has started. It may be called twice, and from another thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._kill()
        if self._process is not None:
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(OSError):  # what was not read in time
                    stream.close()
        self.log = "\n".join(self._said()[-LOG_LINES:])
        self._errors.close()

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_error(self) -> str:
        said = self._said()
        return said[-1].strip() if said else "it said nothing"

    def _said(self) -> list[str]:
        self._errors.seek(0)
        return [line.rstrip() for line in self._errors if line.strip()]

    def _start(self) -> subprocess.Popen:
        # The interpreter's variable would turn the kernels off; the path is for packages that are not installed.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            environment[name] = str(self._compile_threads)
        environment.update(self._variables)
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )


def network_worker(compile_threads: int) -> CaseWorker:
    """A process for one network (`fusion.bench.network_worker`)."""
    return CaseWorker([sys.executable, "-m", "fusion.bench.network_worker"], compile_threads)
