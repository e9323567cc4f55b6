"""run/plan.py's estimates of memory against what the same things take when they are made."""

import argparse
import dataclasses

import pytest
import torch
from conftest import FIXTURES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogsm import data, logprob
from nanogsm.fast import cpu, head
from nanogsm.fast.cpu import can_pack, inverse_cdf, packed
from nanogsm.generate import KVCache, choose
from nanogsm.lora import add_lora
from nanogsm.model import (
    compute_in_float32,
    frozen_copy,
    load_model,
    read_config,
    set_checkpointing,
)
from nanogsm.optim import AdamW
from nanogsm.run import flags as flags_of
from nanogsm.run import machine, plan
from nanogsm.store.hub import ModelFiles
from nanogsm.transformer import Config, Vocabulary


def held(tensors) -> int:
    """Bytes of the memory behind tensors. Shared memory counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Alive(TorchDispatchMode):
    """Counts the bytes of what operators make inside it: those alive `now`, and the `most` ever."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = filter(torch.is_tensor, tree_leaves((args, kwargs)))
        given = {t.untyped_storage()._cdata for t in inputs}
        for t in filter(torch.is_tensor, tree_leaves(out)):
            storage = t.untyped_storage()
            if storage._cdata not in given:  # neither a view of an input nor changed in place
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.now())
        return out

    def now(self) -> int:
        self.made = {key: pair for key, pair in self.made.items() if not pair[0].expired()}
        return sum(size for _, size in self.made.values())


def parameters(model, trained: bool | None = None) -> list:
    return [p for p in model.parameters() if trained in (None, p.requires_grad)]


@pytest.fixture(scope="module")
def tiny():
    """Returns a function that loads the embedded model, whose weights are float32, in a dtype."""
    return lambda dtype=None: load_model("tiny", dtype)


def test_the_weights_of_full_training_and_of_lora(tiny):
    model, _ = tiny(torch.float32)
    total = sum(p.numel() for p in model.parameters())
    assert plan.model_bytes(model.config, total, total, bf16=False) == held(parameters(model))
    base, _ = tiny(torch.bfloat16)
    base.config = dataclasses.replace(
        base.config, dtype=torch.bfloat16
    )  # as Gemma's weights are on disk
    add_lora(base, 16, 32.0)
    adapters = sum(p.numel() for p in parameters(base, trained=True))
    assert 0 < adapters < total
    sizes = base.config, total + adapters, adapters
    assert plan.model_bytes(*sizes, bf16=True) == held(parameters(base))
    compute_in_float32(base)
    assert plan.model_bytes(*sizes, bf16=False) == held(parameters(base))


@pytest.mark.parametrize("bf16", [False, True])
def test_an_output_head_of_its_own_is_counted(bf16):
    """Its weights, its float32 cast and its rounding in the reference. It is a fifth of this
    model."""
    model, _ = load_model(FIXTURES / "llama30", torch.float32)
    total, head = sum(p.numel() for p in parameters(model)), model.lm_head.weight.numel()
    assert head > 0.2 * total
    blocks = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
    want = held(parameters(model)) + 2 * blocks * bf16  # with autocast's copies
    near = lambda n: pytest.approx(n, rel=0.01)  # noqa: E731  norms are counted as linear layers
    assert plan.model_bytes(model.config, total, total, bf16) == near(want)
    frozen = held(parameters(frozen_copy(model, bf16)))
    assert plan.frozen_copy_bytes(model.config, total, bf16) == near(frozen)
    base, _ = load_model(FIXTURES / "llama30", torch.bfloat16)
    base.config = dataclasses.replace(base.config, dtype=torch.bfloat16)
    add_lora(base, 4, 8.0)
    if not bf16:
        compute_in_float32(base)
    adapters = sum(p.numel() for p in parameters(base, trained=True))
    found = plan.model_bytes(base.config, total + adapters, adapters, bf16)
    assert found == held(parameters(base))


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_gathered_of_a_sharded_model(tied):
    """By hand, for a vocabulary of 100, a width of 10 and two blocks of 300 weights."""
    config = dataclasses.replace(
        read_config(FIXTURES / "llama30"), vocab_size=100, hidden_size=10, tied=tied
    )
    ends = 1000 if tied else 2000
    found = plan.in_parts(4, config, ends + 600, {"gradients": 8.0, "sampling": 5.0})
    assert found["gathered"] == 4 * (3 * ends + 2 * 300)
    assert found["weights"] == ends + 600 and found["gradients"] == 2
    assert found["sampling"] == 5 + 4 * 1000 + 2 * (ends - 1000 + 600)  # only a lookup is float32


@pytest.mark.parametrize(
    "bf16, came_in", [(True, "float32"), (False, "float32"), (True, "bfloat16")]
)
def test_the_frozen_reference(tiny, bf16, came_in):
    model, _ = tiny(torch.float32)
    if came_in == "bfloat16":
        for p in model.parameters():
            p.data = p.bfloat16().float()
    config = dataclasses.replace(model.config, dtype=getattr(torch, came_in))
    total = sum(p.numel() for p in model.parameters())
    want = held(parameters(frozen_copy(model, bf16)))
    # Norms that would lose digits stay float32. The estimate counts them as rounded.
    assert plan.frozen_copy_bytes(config, total, bf16) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("optim, bits", [("adamw", 32), ("adamw8bit", 8)])
def test_moments(tiny, optim, bits):
    model, _ = tiny(torch.float32)
    add_lora(model, 8, 16.0)  # the moments of its B stay float32
    model.requires_grad_(True)
    want = AdamW(model.named_parameters(), 1e-3, bits=bits).state_bytes()
    assert plan.moments_bytes([p.shape for p in model.parameters()], optim) == want


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3", "llama32", "llama30"])
@pytest.mark.parametrize("bf16", [True, False])
def test_the_cache(name, bf16):
    config = load_model(FIXTURES / name)[0].config
    cache = KVCache(config, 3, 17, torch.bfloat16 if bf16 else torch.float32, "cpu")
    assert plan.cache_bytes(config, 3, 17, bf16) == held([cache.k, cache.v])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_forward_keeps_for_backward(tiny, lora, bf16):
    """Compared with all that autograd saves of one forward, except weights."""
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
    whole = plan.activation_bytes(c, n, lora, bf16, "none")
    assert whole * 0.6 < kept() < whole * 1.2
    # With full checkpointing blocks keep only their inputs. The estimate adds one whole block, the
    # one that backward computes again.
    set_checkpointing(model, "full")
    one_block = whole / (c.num_hidden_layers + 1)
    inputs = plan.activation_bytes(c, n, lora, bf16, "full") - one_block
    assert inputs < kept() < 2 * inputs  # more, because the final norm is outside all blocks


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", ["light", "full"])
def test_what_a_checkpoint_keeps_of_each_layer(tiny, lora, bf16, checkpointing):
    """What a third layer adds to the bytes alive after a forward. Hooks on saved tensors do not see
    what a light checkpoint holds. For light, the estimate is also compared with a step's peak."""

    def step(layers: int) -> tuple[int, int, int]:
        """Bytes alive after the forward, the most in forward and backward, and the estimate."""
        model, _ = tiny(torch.bfloat16 if lora and bf16 else torch.float32)
        model.model.layers = model.model.layers[:layers]
        kinds = model.config.layer_types[:layers]
        model.config = dataclasses.replace(
            model.config, num_hidden_layers=layers, layer_types=kinds
        )
        if lora:
            add_lora(model, 1, 2.0)  # the estimate leaves out what A returns, which is kept, too
        for p in parameters(model, trained=True):
            p.grad = torch.zeros_like(p)  # gradients are estimated separately
        set_checkpointing(model, checkpointing)
        ids = torch.randint(20, 600, (16, 64), generator=torch.Generator().manual_seed(0))
        with Alive() as alive:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = model(ids)
            kept = alive.now()
            hidden.backward(torch.ones_like(hidden))
        n = ids.numel()
        return kept, alive.most, plan.activation_bytes(model.config, n, lora, bf16, checkpointing)

    (kept_by_two, _, two), (kept_by_three, most, three) = step(2), step(3)
    assert three - two == pytest.approx(kept_by_three - kept_by_two, rel=0.02)
    if checkpointing == "light":
        # The estimate leaves out what backward itself needs in a block, which shows with 3 layers.
        assert 0.9 * three < most < 1.3 * three


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "tokens, width, vocabulary, logits, least",
    [
        pytest.param(512, 512, 2048, 2**19, 0.85, id="two blocks"),
        pytest.param(256, 256, 1024, 2**20, 0.6, id="one block"),  # no earlier block is still there
        pytest.param(1024, 256, 512, 2**20, 0.6, id="more tokens than width"),
        pytest.param(32, 256, 2048, 2**18, 0.3, id="few tokens"),  # little but the rows' copies
    ],
)
def test_the_vocabulary(
    tiny, monkeypatch, tokens, width, vocabulary, logits, least, bf16, entropy, trained
):
    """Compared with the peak while log-probs and gradients are made. In bfloat16, where logits and
    rows of the vocabulary are copied, the peak is nearly the estimate. In float32 it is lower."""
    monkeypatch.setitem(head.BLOCK_LOGITS, "cpu", logits)
    monkeypatch.setitem(head.BLOCK_LOGITS, "cuda", logits)
    monkeypatch.setitem(head.KEPT_EXPONENTIALS, "cpu", tokens * vocabulary)
    monkeypatch.setitem(head.KEPT_EXPONENTIALS, "cuda", tokens * vocabulary)
    weight = torch.nn.Parameter(torch.randn(vocabulary, width), requires_grad=trained)
    weight.grad = torch.zeros_like(weight)  # gradients are estimated separately
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    targets, mask = torch.randint(vocabulary, (1, tokens)), torch.ones(1, tokens)
    with Alive() as alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = logprob.token_logprobs(
                Vocabulary(weight), hidden, targets, mask, entropy=entropy
            )
        sum(score.sum() for score in scores[: 1 + entropy]).backward()
    config = dataclasses.replace(tiny()[0].config, hidden_size=width, vocab_size=vocabulary)
    estimate = plan.head_bytes(config, tokens, "cpu", trained, bf16, entropy)
    least *= 0.9 if trained else 1  # the estimate counts what is kept of the last block twice
    assert bf16 * least * estimate < alive.most < 1.05 * estimate
    assert plan.head_bytes(config, tokens, "cuda:1", trained, bf16, entropy) == estimate


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_drawing_a_token_for_each_row(tiny, monkeypatch, device):
    """Compared with the peak of drawing: logits, then probabilities and their sums in float64, of
    the whole vocabulary or, as on a CPU, of one block at a time."""
    model, _ = tiny(torch.float32)
    rows, vocabulary = 64, model.config.vocab_size
    monkeypatch.setattr(plan, "VOCABULARY_BLOCK", width := 100)
    hidden, u = torch.randn(rows, model.config.hidden_size), torch.rand(rows)
    with Alive() as alive, torch.no_grad():
        logits = model.logits(hidden).split(width if device == "cpu" else vocabulary, -1)
        inverse_cdf(logits, 0.7, u)
    estimate = plan.sampling_bytes(model.config, 0, rows, False, device)
    assert 0.8 * estimate < alive.most < 1.05 * estimate


@pytest.mark.parametrize("name", ["tiny", "llama30"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_packed_weights_of_a_cpu(tiny, name, bf16, monkeypatch):
    """Of an untied model the output head is packed, and once, and not the embedding."""
    model = tiny(torch.float32)[0] if name == "tiny" else load_model(FIXTURES / name)[0]
    if not can_pack(model.device, torch.bfloat16 if bf16 else torch.float32):
        pytest.skip("no oneDNN, or none with bfloat16")
    made, real = [], cpu.pack
    monkeypatch.setattr(cpu, "pack", lambda *args: made.append(real(*args)) or made[-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), packed(model, choose):
        want = sum(copy.numel() * copy.element_size() for copy in made)
    total = sum(p.numel() for p in parameters(model))
    tied = dataclasses.replace(model.config, tied=True)
    with_them = plan.sampling_bytes(model.config, total, 64, bf16, "cpu")
    without = plan.sampling_bytes(tied, 0, 64, bf16, "cpu")
    # Norms are not packed. The estimate counts them, too.
    assert with_them - without == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize(
    "lora, critic, of_policy, of_critic", [(True, None, "adapters", None),
    (True, "separate", "adapters", "adapters"), (False, "separate", "all", "adapters")],
)  # fmt: skip
def test_what_a_run_takes_on_disk(tiny, lora, critic, of_policy, of_critic):
    """A separate critic has adapters of its own, beside the policy's."""
    model, _ = tiny(torch.float32)
    sizes = {"all": held(parameters(model)), None: 0}
    config = dataclasses.replace(model.config, dtype=torch.bfloat16)
    add_lora(model, 16, 32.0)
    sizes["adapters"] = held(parameters(model, trained=True))
    args = argparse.Namespace(lora=lora, critic=critic, lora_r=16, lora_alpha=32.0, optim="adamw")
    checkpoint, result = plan.disk_bytes(args, config)
    trained = sizes[of_policy] + sizes[of_critic]  # in float32, as its two moments
    assert checkpoint == 3 * trained
    assert result == (sizes["all"] / 2 if not lora else sizes["adapters"]) + sizes[of_critic]


# ---------------------------------------------------------------------------- a card's memory

GEMMA_2B = Config(
    model_type="gemma", vocab_size=256_000, hidden_size=2048, intermediate_size=16_384,
    num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
    rms_norm_eps=1e-6, query_pre_attn_scalar=256, layer_types=("full_attention",) * 18,
    sliding_window=None, rope={"full_attention": (1e4, 1.0)}, attn_logit_softcapping=None,
    final_logit_softcapping=None, dtype=torch.bfloat16,
)  # fmt: skip
LENGTHS = [230 + 40 * (i % 5 - 2) for i in range(100)]  # tokens, about GSM8K's


def on_a_card(monkeypatch, gib: float, *flags: str):
    """The arguments of train_sft.py with gemma-2b on a GPU of that size, as the plan leaves them."""
    monkeypatch.setattr(machine, "pick_compute", lambda device, precision: ("cuda", "bf16"))
    monkeypatch.setattr(machine, "free_memory", lambda device: gib * 2**30)
    args = flags_of.sft_args(["--model", "x", *flags])
    args.lora_r, args.lora_alpha = 16, 32.0
    examples = [data.Example([1] * n, [1] * n, i) for i, n in enumerate(LENGTHS)]
    plan.settle_sft(args, ModelFiles(None, None, "x"), GEMMA_2B, examples, [], 1)
    assert args.micro_batch * args.accumulation == 16 and not hasattr(args, "left_open")
    return args.micro_batch, args.checkpointing


def test_a_card_gets_the_fastest_split_that_fits(monkeypatch, capsys):
    """The product, which is what counts for the result, stays 16."""
    assert on_a_card(monkeypatch, 80) == (16, "none")
    assert "80 GiB free; checkpointing none" in capsys.readouterr().out
    smaller = [on_a_card(monkeypatch, gib) for gib in (56, 48, 44, 40)]
    kinds = [kind for _, kind in smaller]
    assert kinds == sorted(kinds, key=("none", "light", "full").index)  # less and less is kept
    assert on_a_card(monkeypatch, 32, "--lora") == (16, "none")
    assert on_a_card(monkeypatch, 12, "--lora")[1] != "none"
    capsys.readouterr()
    assert on_a_card(monkeypatch, 8) == (1, "full")
    assert "8 GiB free, which may be too little" in capsys.readouterr().out


def test_what_the_command_line_says_is_kept(monkeypatch):
    assert on_a_card(monkeypatch, 80, "--checkpointing", "full") == (16, "full")
    assert on_a_card(monkeypatch, 80, "--micro-batch", "2", "--accumulation", "8") == (2, "none")
    assert on_a_card(monkeypatch, 80, "--accumulation", "2") == (8, "none")


def test_the_rollout_batch_is_what_fits_beside_the_weights():
    def budget() -> dict:
        return {"weights": 10, "activations": args.micro_batch, "cache": args.rollout_batch / 10}

    base = {"tiny": False, "micro_batch": 2, "accumulation": 8, "rollout_batch": 64,
            "rollouts": 300}  # fmt: skip
    for free, want in ((100, 512), (50, 256), (20, 32)):
        args = argparse.Namespace(**base, checkpointing="light", left_open=["rollout_batch"])
        said = plan.fit_card(args, budget, free)
        assert said.endswith(f", {min(want, 300)} answers sampled at once")
        assert (args.rollout_batch, args.micro_batch, args.accumulation) == (want, 2, 8)


def test_an_open_split_goes_down_to_one_row_also_where_four_is_the_largest():
    """16 examples on 4 devices: at most 4 rows each, and 4 was once the only size tried."""
    for free, want in ((6, 4), (3, 2), (1.5, 1)):
        args = argparse.Namespace(tiny=False, micro_batch=8, accumulation=2, shard=4,
                                  checkpointing="full",
                                  left_open=["micro_batch", "accumulation"])  # fmt: skip
        plan.fit_card(args, lambda: {"activations": args.micro_batch}, free)
        assert (args.micro_batch, args.accumulation) == (want, 16 // want)


def test_without_a_gpu_nothing_is_chosen(monkeypatch):
    args = argparse.Namespace(tiny=False, micro_batch=8, accumulation=2, left_open=["micro_batch"])
    assert plan.fit_card(args, dict, None) == "" and (args.micro_batch, args.accumulation) == (8, 2)
    assert machine.free_memory("cpu") is None
