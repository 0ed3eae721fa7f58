"""Starting processes that work together: one way for all tests, which says what was said where something fails, and what hung where nothing ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# torchrun's own store listens on a port that the kernel gives and keeps it, so no port can be taken in between; without an address of its own it
# would ask the network for this machine's name
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
_MINE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a launcher's, which these tests may run under


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.err + self.out


def start(*commands: Sequence[str], each: Sequence[Mapping[str, str]] = (), limit: float = 300, **env: str) -> list[Ended]:
    """Run commands of this Python side by side, to their end.

    Args:
        commands: each without the interpreter.
        each: further environment variables, one mapping for each command.
        limit: seconds.

    Raises:
        AssertionError: if one has not ended by then; with where each of its processes was, and what all have said.
    """
    base = {k: v for k, v in os.environ.items() if k not in _MINE}
    base |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **env}
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback is not None:
        base.setdefault("GLOO_SOCKET_IFNAME", loopback)
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        started = [
            subprocess.Popen([sys.executable, *command], env={**base, **own}, stdout=out, stderr=err)
            for command, own, (out, err) in zip(commands, each or [{}] * len(commands), files, strict=True)
        ]
        end = time.monotonic() + limit
        try:
            for p in started:
                p.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            _abort(started)
            said = "\n".join(
                f"--- {p.args}\n{_read(err)[-20000:]}{_read(out)[-4000:]}" for p, (out, err) in zip(started, files, strict=True)
            )
            raise AssertionError(f"Not ended after {limit:.0f} s. What was said, and where each process was:\n{said}") from None
        finally:
            for p in started:
                p.kill()
                p.wait()
        return [Ended(p.returncode, _read(out), _read(err)) for p, (out, err) in zip(started, files, strict=True)]


def _abort(started: Sequence[subprocess.Popen[Any]]) -> None:
    """End all of them and what they started; Python's fault handler writes where each was.

    One at a time, while the others are held: processes that share a file for errors would write into each other's lines, and one whose peer is
    gone would be elsewhere by the time it is asked.
    """
    import psutil

    trees = [[*psutil.Process(p.pid).children(recursive=True), psutil.Process(p.pid)] for p in started if p.poll() is None]
    every = [process for tree in trees for process in tree]
    end = time.monotonic() + 30  # on a busy machine a process needs its time to write
    for process in every:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in every:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                process.resume()
                while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:  # what its parent has yet to collect has ended
                    time.sleep(0.01)


def _read(file: Any) -> str:
    file.seek(0)
    return str(file.read())
