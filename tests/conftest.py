"""Shared by all tests: the fixtures' place, and one thread (tiny models lose time to a second)."""

from pathlib import Path

import pytest
import torch

from nanogsm.model import load_model

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def gemma():
    """gemma("gemma3", dtype) -> (model, tokenizer) of a random tiny fixture model."""
    return lambda name="gemma3", dtype=torch.float32: load_model(FIXTURES / name, dtype)
