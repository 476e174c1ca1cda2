"""Freed memory is kept: a second tensor of the same size costs no fresh pages."""

import subprocess
import sys
from pathlib import Path

import pytest

from mask2former_plugin import engine
from mask2former_plugin.config import load_config
from mask2former_plugin.memory import keep_freed_memory

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "mask2former.yaml"
PAGES = """
import resource, sys
import torch
from mask2former_plugin.memory import keep_freed_memory

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(2**24).fill_(1.0)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = fresh_pages()
assert keep_freed_memory()
print(usual, min(fresh_pages() for _ in range(10)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resource usage and mallopt of Linux")
def test_memory_that_was_freed_is_used_again():
    # A process of its own: the setting can't be taken back. The best of several rounds: now and then a small object
    # settles at the end of a freed block, which then is some bytes too short for its own reuse, and the heap grows once.
    run = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    usual, kept = map(int, run.stdout.split())
    assert usual >= 4 * 32  # with huge pages of 2 MB
    assert kept < usual / 20


def test_nothing_happens_without_glibc(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False


@pytest.mark.parametrize(("wanted", "device", "kept"), [(True, "cpu", True), (False, "cpu", False), (True, "cuda", False)])
def test_the_key_counts_on_cpus_only(wanted, device, kept, monkeypatch):
    called = []
    monkeypatch.setattr(engine, "keep_freed_memory", lambda: called.append(True))
    # a device that is missing or random weights end the construction, after memory was set up
    cfg = load_config(CONFIG, ["MODEL.KEEP_FREED_MEMORY", wanted, "MODEL.DEVICE", device, "MODEL.WEIGHTS", ""])
    with pytest.raises((RuntimeError, ValueError)):
        engine.Predictor(cfg)
    assert bool(called) == kept
