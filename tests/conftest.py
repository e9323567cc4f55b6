"""Shared by all tests: the fixtures' place, one thread (tiny models lose time to a second),
Python's own signal handlers."""

import os
import signal
from pathlib import Path

import pytest
import torch

from nanogsm.model import load_model

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent / "fixtures"
VALIDATED = {"gold": "7", "correct": False, "truncated": False}  # a row of answer_and_mark
# For tests of many seconds whose parts other tests cover. .ci/run runs them.
slow = pytest.mark.skipif(not os.environ.get("NANOGSM_SLOW"), reason="NANOGSM_SLOW=1 runs it")


@pytest.fixture
def gemma():
    """gemma("gemma3", dtype) -> (model, tokenizer) of a random tiny fixture model."""
    return lambda name="gemma3", dtype=torch.float32: load_model(FIXTURES / name, dtype)


@pytest.fixture
def default_signals():
    """Python's own handlers, also where pytest was started with SIGINT ignored."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
