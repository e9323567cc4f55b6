"""fast/cuda.py computes what the plain forms compute. Here on a CPU, where all of it but the recording
of kernels can run; a GPU repeats this in benchmarks/gpu.py."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES

from nanogsm import data, generate, model, optim, transformer
from nanogsm.fast import cuda
from nanogsm.model import load_model, set_checkpointing

LENGTHS = [5, 1, 9, 4]


# ---------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3", "llama32"])
@pytest.mark.parametrize("checkpointing", ["none", "light"])
def test_rows_that_attend_together_give_the_same_model(name, checkpointing):
    """Hidden states and all gradients of a whole model: local windows, caps, shared keys."""
    ids = torch.randint(9, 300, (4, 11), generator=torch.Generator().manual_seed(0))
    found = []
    for attend in (transformer.attend_rows, None):
        gemma, _ = load_model(FIXTURES / name, torch.float64)
        set_checkpointing(gemma, checkpointing)
        if attend is None:
            gemma.attend_rows = lambda *a: cuda.attend_rows(transformer.attend_causally, *a)
        hidden = gemma(ids, LENGTHS)
        weights = torch.arange(hidden.numel()).view_as(hidden).cos()
        (hidden * weights).sum().backward()
        found.append((hidden, {n: p.grad for n, p in gemma.named_parameters()}))
    (plain, grads), (fast, fast_grads) = found
    assert torch.allclose(plain, fast, rtol=1e-6, atol=1e-6) and plain.abs().max() > 0.1
    for n, grad in grads.items():
        assert (fast_grads[n] - grad).norm() <= 1e-5 * grad.norm(), n


@pytest.mark.parametrize("heads, shared_by, queries", [(8, 4, 1), (8, 8, 1), (4, 1, 1), (8, 4, 5)])
def test_attention_takes_a_kernels_result_in_any_order(heads, shared_by, queries, monkeypatch):
    """A GPU's kernels return (B, H, T, N) as it would lie in memory if it were (B, T, H, N)."""
    draw = lambda h, t: torch.randn(3, h, t, 16)  # noqa: E731
    q, k, v = draw(heads, queries), draw(heads // shared_by, 7), draw(heads // shared_by, 7)
    mask = (torch.rand(3, 1, queries, 7) < 0.7).index_fill(3, torch.tensor([0]), True)
    want = transformer.softmax_attention(q, k, v, mask, 0.25, None)
    real = F.scaled_dot_product_attention
    turned = lambda *a, **kw: real(*a, **kw).transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", turned)
    assert torch.equal(transformer.softmax_attention(q, k, v, mask, 0.25, None), want)


def test_a_models_own_kernels_are_set_by_its_device(monkeypatch):
    gemma, _ = load_model(FIXTURES / "gemma3")
    assert gemma.attend_rows is transformer.attend_rows
    monkeypatch.setattr(cuda, "prepare", lambda device: None)
    monkeypatch.setattr(type(gemma), "device", property(lambda self: torch.device("cuda:0")))
    model.use_fast_forms(gemma)
    assert gemma.attend_rows.func is cuda.attend_rows


# ----------------------------------------------------------------------------------- sampling


class Fixed:
    """A model whose logits are given."""

    def __init__(self, logits):
        self.logits = lambda hidden: logits


@pytest.mark.parametrize("vocabulary", [7, 831, 4096, 50_000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_two_levels_choose_the_tokens_of_one(vocabulary, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(64, vocabulary, generator=generator)
    logits[0] = -1000.0
    logits[0, 3] = 0.0  # all of the probability
    uniform = torch.rand(64, generator=generator)
    uniform[:3] = torch.tensor([0.5, 0.0, 1 - 2**-24])
    chosen = cuda.choose_in_two_levels(Fixed(logits), None, temperature, uniform)
    plain = generate.inverse_cdf(logits.double(), temperature, uniform)
    assert torch.equal(chosen, plain) and chosen[0] == 3
    greedy = cuda.choose_in_two_levels(Fixed(logits), None, 0.0, None)
    assert torch.equal(greedy, logits.argmax(-1))


def test_nan_logits_give_a_token_and_no_crash():
    logits = torch.full((2, 100), torch.nan)
    chosen = cuda.choose_in_two_levels(Fixed(logits), None, 1.0, torch.tensor([0.1, 0.9]))
    assert ((0 <= chosen) & (chosen < 100)).all()


# ---------------------------------------------------------------------------------- recording


class FakeGraph:
    """Replays a step by calling it again. A real graph reads and writes the addresses it has seen
    when it was recorded, so this one insists on finding everything where it was."""

    def __init__(self, step, used, uniform):
        self.step, self.arguments, self.places = step, (used, uniform), self.where(step)
        self.replayed = 0

    @staticmethod
    def where(step) -> dict:
        inside = dict(zip(step.__code__.co_freevars, (c.cell_contents for c in step.__closure__)))
        tensors = [inside["token"], inside["position"], inside["cache"].k, inside["cache"].v]
        return [(t.data_ptr(), t.shape) for t in tensors]

    def replay(self):
        assert self.where(self.step) == self.places
        self.step(*self.arguments)
        self.replayed += 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_steps_give_the_same_completions(temperature, monkeypatch):
    """More prompts than rows, of many lengths, answers that end early, a batch that shrinks."""
    gemma, _ = load_model(FIXTURES / "gemma3", torch.float32)
    prompts = [[2] + [9 + i + j for j in range(3 + 5 * i)] for i in range(9)]
    stops = frozenset(range(0, 384, 37))
    argv = (gemma, prompts, stops, 40, 6, temperature, 3)
    plain = generate.generate(*argv)

    graphs = []

    def record(self, step, used, uniform):
        graphs.append(FakeGraph(step, used, uniform))
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(cuda, "_records", lambda kind: True)
    monkeypatch.setattr(cuda.Recorder, "_record", record)
    monkeypatch.setattr(cuda, "slots_read", lambda n, slots, device: min(-(-n // 16) * 16, slots))
    monkeypatch.setitem(generate.STEPS_PER_LOOK, "cpu", 4)
    monkeypatch.setitem(generate.SHRINK_AT, "cpu", 1 / 2)
    assert generate.generate(*argv) == plain
    assert sum(graph.replayed for graph in graphs) > 20 and len({len(c.ids) for c in plain}) > 2
    sizes = {graph.places[0][1] for graph in graphs}
    assert len(sizes) > 1, "the batch never shrank"
    assert all("forward" not in m.__dict__ for m in gemma.modules())  # the norms are plain again


def test_slots_are_read_in_few_sizes_on_a_gpu_only():
    read = [cuda.slots_read(n, 300, torch.device("cuda")) for n in (1, 128, 129, 257, 300)]
    assert read == [128, 128, 256, 300, 300]
    assert cuda.slots_read(129, 300, torch.device("cpu")) == 129


# -------------------------------------------------------------------------------------- AdamW


SHAPES = [(64, 512), (64, 512), (33, 160), (2048,), (7,), (128, 16), (2100, 1024)]


def adamw(bits: int) -> optim.AdamW:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    named = [(str(i), p) for i, p in enumerate(params)]
    return optim.AdamW(named, 1e-2, weight_decay=0.1, bits=bits)


@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch's compiler needs one for C++")
def test_the_compiled_update_is_the_plain_one(monkeypatch):
    """Tensors alone and in groups, moments in 8 and (small tensors) 32 bits, with the gradient
    scaled down, at a changing learning rate. Each step starts from the same state: a code that is
    rounded the other way changes what follows."""
    plain, fast = adamw(8), adamw(8)
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        fast.load_state_tensors(plain.state_tensors())
        for optimizer in (plain, fast):
            optimizer.lr = 1e-2 / (step + 1)
        for p, q in zip(plain.params.values(), fast.params.values()):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = {name: p.detach().clone() for name, p in plain.params.items()}
        norm = plain.grad_norm()
        plain.step(norm, 100.0)
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "compiles", lambda pieces: True)
            fast.step(norm, 100.0)
        for name, p in plain.params.items():
            moved = (p - before[name]).abs().max()
            assert (p - fast.params[name]).abs().max() < 1e-4 * moved, name
            for mine, theirs in zip(plain.moments[name], fast.moments[name]):
                if mine.dtype == torch.float32:
                    assert torch.allclose(mine, theirs, rtol=1e-5), name
                else:  # a code at the edge between two may go to either side
                    difference = (mine.int() - theirs.int()).abs()
                    assert difference.max() <= 1 and difference.float().mean() < 1e-3, name


def test_the_gradient_is_scaled_down_as_by_clip_grad_norm():
    """Equal to the bit, and left alone where the norm is small enough."""
    for limit in (1.0, 1e6):
        ours, theirs = adamw(8), adamw(8)
        for p, q in zip(ours.params.values(), theirs.params.values()):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        norm = ours.grad_norm()
        assert norm == torch.nn.utils.clip_grad_norm_(theirs.params.values(), limit)
        ours.step(norm, limit)
        theirs.step()
        for p, q in zip(ours.params.values(), theirs.params.values()):
            assert torch.equal(p, q)


class OnGPU:
    is_cuda = True

    def __init__(self, count):
        self.numel = lambda: count


def test_it_compiles_what_is_worth_it_where_it_can(monkeypatch, capsys):
    large, small = [(1.0, 0, [OnGPU(2**22)])], [(1.0, 0, [OnGPU(2**20)])] * 2
    monkeypatch.setattr(cuda, "has_compiler", lambda: True)
    assert cuda.compiles(large) and not cuda.compiles(small) and not cuda.compiles([])
    assert not cuda.compiles([(1.0, 0, [torch.empty(2**22)])])  # on a CPU
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    cuda.has_compiler.cache_clear()
    assert not cuda.compiles(large) and not cuda.compiles(large)
    assert capsys.readouterr().out.count("note: there is no C compiler here, so AdamW is") == 1
    cuda.has_compiler.cache_clear()


# ------------------------------------------------------------------------------- the process


def test_prepare_sets_the_process_up_for_a_gpu(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        cuda.prepare("cpu")
        assert not devices and torch.backends.cuda.cudnn_sdp_enabled()
        cuda.prepare("cuda")  # torch.cuda.set_device refuses a device without a number
        assert not devices
        cuda.prepare("cuda:1")
        assert devices == ["cuda:1"] and not torch.backends.cuda.cudnn_sdp_enabled()
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "mine")
        cuda.prepare("cuda:1")
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "mine"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)


def test_the_mask_stays_on_the_host(monkeypatch):
    """Finding its positions on a GPU would make the host wait. (meta stands for a GPU.)"""
    batch = data.collate([data.Example([2, 5, 6], [0, 1, 1], 0)], 0, "meta")
    assert (batch.ids.device.type, batch.mask.device.type) == ("meta", "cpu")
