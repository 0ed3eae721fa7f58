"""Tests with the real libraries, to which veneer is PEFT. They need a process of their own, which tests/test_compat.py starts."""

from __future__ import annotations

import sys

import pytest
import torch

collect_ignore_glob = [] if "veneer.compat" in sys.modules else ["test_*.py"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
