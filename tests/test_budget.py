"""budget.py's figures against what the same things hold when they are really made."""

import dataclasses

import pytest
import torch
from conftest import FIXTURES

import train_ppo
from nanogsm import budget
from nanogsm.lora import add_lora
from nanogsm.model import KVCache, load_model
from nanogsm.optim import AdamW


def held(tensors) -> int:
    """Bytes of the memory behind tensors, shared memory counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def parameters(model, trained: bool | None = None) -> list:
    return [p for p in model.parameters() if trained in (None, p.requires_grad)]


@pytest.fixture(scope="module")
def tiny():
    """Load the embedded model, whose weights are float32, in another dtype."""
    return lambda dtype=None: load_model("tiny", dtype)


def test_weights_all_trained_and_frozen_under_adapters(tiny):
    model, _ = tiny(torch.float32)
    total = sum(p.numel() for p in model.parameters())
    assert budget.model_bytes(model.config, total, total, bf16=False) == held(parameters(model))
    base, _ = tiny(torch.bfloat16)
    base.config = dataclasses.replace(base.config, dtype=torch.bfloat16)  # as Gemma's are on disk
    add_lora(base, 16, 32.0)
    adapters = sum(p.numel() for p in parameters(base, trained=True))
    assert 0 < adapters < total
    assert budget.model_bytes(base.config, total + adapters, adapters, bf16=True) == held(parameters(base))
    base.compute_in_float32()
    assert budget.model_bytes(base.config, total + adapters, adapters, bf16=False) == held(parameters(base))


@pytest.mark.parametrize("bf16, came_in", [(True, "float32"), (False, "float32"), (True, "bfloat16")])
def test_the_frozen_reference(tiny, bf16, came_in):
    model, _ = tiny(torch.float32)
    if came_in == "bfloat16":
        for p in model.parameters():
            p.data = p.bfloat16().float()
    config = dataclasses.replace(model.config, dtype=getattr(torch, came_in))
    total = sum(p.numel() for p in model.parameters())
    want = held(parameters(train_ppo.frozen_copy(model, bf16)))
    # Norms that do not round exactly stay float32; the estimate has them rounded with the rest.
    assert budget.frozen_copy_bytes(config, total, bf16) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("optim, bits", [("adamw", 32), ("adamw8bit", 8)])
def test_moments(tiny, optim, bits):
    model, _ = tiny(torch.float32)
    add_lora(model, 8, 16.0)  # whose B keeps float32 moments
    model.requires_grad_(True)
    want = AdamW(model.named_parameters(), 1e-3, bits=bits).state_bytes()
    assert budget.moments_bytes([p.shape for p in model.parameters()], optim) == want


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
@pytest.mark.parametrize("bf16", [True, False])
def test_the_cache(name, bf16):
    config = load_model(FIXTURES / name)[0].config
    cache = KVCache(config, 3, 17, torch.bfloat16 if bf16 else torch.float32, "cpu")
    assert budget.cache_bytes(config, 3, 17, bf16) == held([cache.k, cache.v])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_forward_keeps_for_backward(tiny, lora, bf16):
    """Against all that autograd saves of one forward, weights aside."""
    model, _ = tiny(torch.bfloat16 if lora and bf16 else torch.float32)
    if lora:
        add_lora(model, 16, 32.0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.randint(20, 600, (16, 64), generator=torch.Generator().manual_seed(0))

    def kept() -> int:
        found = []
        keep = lambda t: found.append(t) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = model(ids)
        assert hidden.requires_grad
        return held(t for t in found if t.untyped_storage().data_ptr() not in weights)

    c, n = model.config, ids.numel()
    whole = budget.activation_bytes(c, n, lora, bf16, "none")
    assert whole * 0.6 < kept() < whole * 1.2
    model.checkpointing = "full"  # blocks keep their inputs; one at a time is computed again, whole
    one = whole / (c.num_hidden_layers + 1)
    inputs = budget.activation_bytes(c, n, lora, bf16, "full") - one
    assert inputs < kept() < 2 * inputs  # the final norm, outside all blocks, keeps its own: 2 of 5
