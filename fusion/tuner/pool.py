"""Worker processes of the tuner, started when needed and again whenever one has died."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fusion.planner.families import Tile, family_of
from fusion.planner.match import BlockShape

COMPILERS = max(1, min(15, (os.cpu_count() or 2) - 1))
ANSWER_SECONDS = 120
"""A tile that takes longer hangs."""

Job = tuple[BlockShape, Tile]


class WorkerPool:
    """Several processes that compile side by side, and one that measures alone. Use it as a context."""

    def __init__(self, device: torch.device):
        self._measurer = Worker(device)
        self._compilers = [Worker(device) for _ in range(COMPILERS)]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_) -> None:
        for worker in (self._measurer, *self._compilers):
            worker.close()

    def compile(self, jobs: Sequence[Job], done: Callable[[], None]) -> None:
        """Fill the compiler's own cache, calling `done` after each job. What fails here fails again when measured."""
        todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            todo.put(job)

        def compile_some(worker: Worker) -> None:
            while True:
                try:
                    shape, tile = todo.get_nowait()
                except queue.Empty:
                    return
                worker.ask(shape, tile, compile_only=True)
                done()

        threads = [
            threading.Thread(target=compile_some, args=(worker,), daemon=True)
            for worker in self._compilers[: len(jobs)]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def measure(self, shape: BlockShape, tile: Tile) -> dict:
        """`{"us": ...}` or `{"failed": reason}`."""
        return self._measurer.ask(shape, tile, compile_only=False)


class Worker:
    """One `fusion.tuner.worker` process."""

    def __init__(self, device: torch.device):
        self._command = [sys.executable, "-m", "fusion.tuner.worker", str(device)]
        self._process: subprocess.Popen | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def ask(self, shape: BlockShape, tile: Tile, compile_only: bool) -> dict:
        """The worker's answer; `{"failed": reason}` if it dies or hangs instead."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        request = {
            "shape": asdict(shape),
            "kernel": family_of(tile).name,
            "tile": tile.to_ints(),
            "compile_only": compile_only,
        }
        timer = threading.Timer(ANSWER_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            hung = not timer.is_alive()
            timer.cancel()
        if line:
            reply = json.loads(line)
            if reply.pop("exiting", False):
                process.wait()
            return reply
        code = process.wait()
        if hung:
            return {"failed": f"no answer in {ANSWER_SECONDS} s"}
        return {"failed": f"worker died with exit code {code}: {self._last_error()}"}

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def _start(self) -> subprocess.Popen:
        # The interpreter's variable would turn the kernel off; the path is for packages that are not installed.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
