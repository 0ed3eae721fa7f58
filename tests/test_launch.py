"""How several processes are started in tests: what is told of one that hangs, and that nothing of it is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from .launch import start

HANGS = """
import subprocess, sys, time
def stuck_here():
    time.sleep(600)
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
    print("my child is", child.pid, flush=True)
stuck_here()
"""


def test_what_hangs_is_told_and_ended_with_all_it_started(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    with pytest.raises(AssertionError, match=r"Not ended after 8 s(.|\n)*my child is (\d+)") as told:
        start([str(script)], ["-c", "print('I am done')"], limit=8)
    said = str(told.value)
    assert said.count("in stuck_here") == 2 and "I am done" in said
    child = int(said.partition("my child is ")[2].split()[0])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_codes_and_words_come_back_in_order() -> None:
    one, two = start(["-c", "import os, sys; print(os.environ['N']); sys.exit(3)"], ["-c", "raise KeyError('x')"], each=[{"N": "7"}, {}])
    assert (one.code, one.out, two.code) == (3, "7\n", 1) and "KeyError: 'x'" in two.err
