"""What `import veneer` costs beyond `import torch`."""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time, torch, safetensors
start = time.perf_counter()
import {name}
print(time.perf_counter() - start)
"""


def seconds(name: str, rounds: int = 7) -> float:
    """The median time of an import in a fresh process that has imported torch."""
    found = [
        float(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", CODE.format(name=name)], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(rounds)
    ]
    return statistics.median(found)
