"""model.py against transformers' logits (tests/fixtures, made by make_fixtures.py), and itself."""

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from nanogsm import UserError, lora, transformer
from nanogsm import model as model_file
from nanogsm.fast import checkpointing as checkpointing_file
from nanogsm.fast import cpu, head
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.generate import KVCache, choose
from nanogsm.logprob import next_token_logprobs
from nanogsm.lora import add_lora
from nanogsm.model import (
    compute_in_float32,
    frozen_copy,
    load_model,
    read_config,
    save_model,
    set_checkpointing,
    twin,
)
from nanogsm.store import hub
from nanogsm.transformer import Transformer

TIGHT = 1e-5  # float32 against float32, logits of a few units
FAMILIES = ["gemma1", "gemma2", "gemma3", "llama32", "llama30"]
TIED = FAMILIES[:-1]  # llama30 has an output head, which has no part in the hidden states
VISION = FIXTURES / "gemma3_vision"


def expected(name):
    return load_file(FIXTURES / name / "expected.safetensors")


def logits(model, ids, **kw):
    with torch.no_grad():
        return model.logits(model(ids, **kw))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_hidden_states_equal_those_of_transformers(gemma, name):
    model, _ = gemma(name)
    want = expected(name)
    assert want["ids"].shape[1] > (model.config.sliding_window or 0)  # else no window is tested
    with torch.no_grad():
        hidden = model(want["ids"])
    assert (hidden - want["hidden"]).abs().max() <= TIGHT
    assert (model.logits(hidden) - want["logits"]).abs().max() <= TIGHT


def test_the_fixtures_cover_both_kinds_of_layer_and_of_key_heads(gemma):
    kinds = {name: gemma(name)[0].config for name in FAMILIES}
    for name in ("gemma2", "gemma3"):
        assert set(kinds[name].layer_types) == {"full_attention", "sliding_attention"}
    assert {c.num_key_value_heads for c in kinds.values()} == {1, 2}


DEFAULTS = load_file(FIXTURES / "config_defaults.safetensors")
LINEAR = {"rope_type": "linear", "factor": 8.0}
ROPE = {
    "full": {"rope_parameters": {"full_attention": LINEAR}},
    "scaling": {"rope_scaling": LINEAR},
}


@pytest.mark.parametrize("variant", DEFAULTS)
def test_a_field_left_out_is_demanded_or_what_transformers_takes_it_to_be(tmp_path, variant):
    """A guess would run, as another model. Logits of the last of 24 tokens, window 8."""
    name, spelling, field = variant.split(".")
    shutil.copytree(FIXTURES / name, tmp_path / name)
    old = spelling == "config_old"
    config = json.loads((FIXTURES / name / f"config{'_old' * old}.json").read_text())
    del config["rope_parameters" if spelling == "rope" else field]
    config |= ROPE[field] if spelling == "rope" else {}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    try:
        model, _ = load_model(tmp_path / name, torch.float32)
    except UserError as error:
        assert (
            f"missing field '{field}'" in str(error)
            or f"{field} is None" in str(error)
            or (field == "sliding_window" and "sliding_window is None" in str(error))
        )
        return
    ids = expected(name)["ids"][:1]
    want = DEFAULTS[variant]
    assert (logits(model, ids)[0, -1, : len(want)] - want).abs().max() <= TIGHT


def test_fields_that_matter_are_not_all_demanded():
    """Those that published files do leave out have to be taken from transformers' defaults."""
    old = {f"gemma3.config_old.{field}" for field in ("rope_theta", "rope_local_base_freq")}
    new = {"gemma3.config.rope_parameters", "gemma3.rope.full", "gemma3.rope.scaling"}
    assert old | new <= DEFAULTS.keys()


@pytest.mark.parametrize("table", [{"factor": 8.0}, {"rope_type": "default", "factor": 8.0}])
@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_a_factor_without_a_rope_type_is_not_used(tmp_path, table, where):
    """transformers' type default does not read it: its frequencies stay theta^(-2i / N)."""
    shutil.copytree(FIXTURES / "llama30", tmp_path / "llama30")
    path = tmp_path / "llama30/config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {where: table}))
    assert {factor for _, factor in model_file.read_config(path.parent).rope.values()} == {1.0}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_old_spelling_of_config_means_the_same(gemma, name, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / name)
    shutil.copy(tmp_path / name / "config_old.json", tmp_path / name / "config.json")
    assert read_config(tmp_path / name) == read_config(FIXTURES / name)


def test_soft_caps_are_read_from_the_config(tmp_path):
    shutil.copytree(FIXTURES / "gemma2", tmp_path / "m")
    shutil.copy(tmp_path / "m/config_small_caps.json", tmp_path / "m/config.json")
    model, _ = load_model(tmp_path / "m", torch.float32)
    want = expected("gemma2")
    assert (logits(model, want["ids"]) - want["logits_small_caps"]).abs().max() <= TIGHT


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [
        (dict(model_type="gemma", vocab_size=256000, hidden_size=2048, intermediate_size=16384,
              num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1),
         2_506_172_416, 164),
        (dict(model_type="gemma2", vocab_size=256000, hidden_size=2304, intermediate_size=9216,
              num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
              sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
              final_logit_softcapping=30.0),
         2_614_341_888, 288),
        (dict(model_type="gemma3_text", vocab_size=262144, hidden_size=640, intermediate_size=2048,
              num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
              sliding_window=512, query_pre_attn_scalar=256),
         268_098_176, 236),
        (dict(model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912,
              num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
              sliding_window=512, query_pre_attn_scalar=256),
         999_885_952, 340),
        (dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
              num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
              tie_word_embeddings=True),
         1_235_814_400, 146),
        (dict(model_type="llama", vocab_size=128256, hidden_size=3072, intermediate_size=8192,
              num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
              tie_word_embeddings=True),
         3_212_749_824, 254),
        (dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
              num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=None),
         8_030_261_248, 291),
        (dict(model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672,
              num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=None),
         70_553_706_496, 723),
    ],
    ids=["gemma-2b", "gemma-2-2b", "gemma-3-270m", "gemma-3-1b", "Llama-3.2-1B", "Llama-3.2-3B",
         "Llama-3.1-8B", "Llama-3.3-70B"],
)  # fmt: skip
def test_parameter_and_tensor_counts_of_the_real_models(tmp_path, config, parameters, tensors):
    config = {"head_dim": 256, "rms_norm_eps": 1e-6} | config
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Transformer(read_config(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    adapters = {2_506_172_416: (126, 19_611_648), 8_030_261_248: (224, 41_943_040)}
    if parameters in adapters:
        count, size = adapters[parameters]
        assert len(add_lora(model, 16, 32)) == count  # the output head is not adapted
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size


def test_layer_kinds_of_gemma_3_270m_and_1b(tmp_path):
    base = json.loads((FIXTURES / "gemma3/config_old.json").read_text())
    for layers, full in ((18, [5, 11, 17]), (26, [5, 11, 17, 23])):
        config = base | {"num_hidden_layers": layers, "sliding_window_pattern": 6}
        (tmp_path / "config.json").write_text(json.dumps(config))
        kinds = read_config(tmp_path).layer_types
        assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == full


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"num_hidden_layers": None}, "config.json"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"head_dim": "wide"}, "head_dim"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "weights are quantised"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"sliding_window": None}, "sliding_window"),
        ({"dtype": "complex7"}, "complex7"),
        ({"dtype": "load"}, "dtype 'load'"),  # an attribute of torch, and no dtype
        ({"dtype": ["float32"]}, "dtype"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),  # nothing counts up to it
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"sliding_window": "wide"}, "sliding_window"),
        ({"sliding_window": 10**30}, "sliding_window"),
        ({"query_pre_attn_scalar": 10**30}, "query_pre_attn_scalar"),
        ({"layer_types": [["full_attention"]] * 3}, "config.json"),
        ({"rope_parameters": {"full_attention": {"rope_theta": -1}}}, "rope theta"),
        ({"rope_parameters": None, "rope_local_base_freq": -5}, "rope_local_base_freq is -5"),
        ({"rope_parameters": None, "rope_local_base_freq": float("nan")}, "base_freq is nan"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "yarn"}}}, "yarn"),
    ],
)
def test_a_config_we_cannot_run_is_refused_by_name(tmp_path, change, says):
    config = json.loads((FIXTURES / "gemma3/config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        read_config(tmp_path)


BANDS = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    "change, says",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"hidden_size": 25, "head_dim": None}, "hidden_size is no multiple"),
        ({"num_attention_heads": 0, "head_dim": None}, "hidden_size is no multiple"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention in a Llama"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings is set"),
        ({"rope_parameters": BANDS | {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": BANDS | {"factor": None}}, "theta and factor are .*, None"),
        ({"rope_parameters": {"rope_type": "linear"}}, "missing field 'factor'"),
        ({"rope_parameters": BANDS | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0"),
        ({"rope_parameters": BANDS | {"high_freq_factor": "4"}}, "high_freq_factor '4'"),
        ({"rope_parameters": BANDS | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": BANDS}}, "each kind of layer"),
        ({"rope_parameters": {k: v for k, v in BANDS.items() if k != "factor"}},
         "missing field 'factor'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'"),
    ],
)  # fmt: skip
def test_a_llama_we_cannot_run_is_refused_by_name(tmp_path, change, says):
    config = json.loads((FIXTURES / "llama32/config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        read_config(tmp_path)


def test_gemmas_have_no_bands(tmp_path):
    config = json.loads((FIXTURES / "gemma1/config.json").read_text()) | {"rope_parameters": BANDS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="rope type 'llama3' is not supported"):
        read_config(tmp_path)


def test_the_bands_of_rotary_one_channel_at_a_time():
    """In float64, with the three cases of Llama 3.1's description written out. head_dim 64, as in
    Llama 3.2 1B: 15 channels are kept, 3 mixed, 14 divided."""
    base, factor, low, high, length, N = 5e5, 32.0, 1.0, 4.0, 8192.0, 64
    kinds, angles = [], []
    for i in range(N // 2):
        frequency = base ** (-2 * i / N)
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            kinds.append("kept")
        elif wavelength > length / low:
            kinds.append("divided")
            frequency /= factor
        else:
            kinds.append("mixed")
            s = (length / wavelength - low) / (high - low)
            frequency = (1 - s) * frequency / factor + s * frequency
        angles.append(frequency * 1000)  # at position 1000, far below 8192
    assert [kinds.count(kind) for kind in ("kept", "mixed", "divided")] == [15, 3, 14]
    positions = torch.tensor([[1000]])
    cos, sin = transformer.rotary(
        positions, N, torch.float32, base, factor, (low, high, length)
    )
    want = torch.tensor(angles, dtype=torch.float64)
    assert (cos[0, 0, 0, N // 2 :] - want.cos()).abs().max() <= 2e-4  # float32 angles up to 1000
    assert (sin[0, 0, 0, N // 2 :] - want.sin()).abs().max() <= 2e-4
    plain, _ = transformer.rotary(positions, N, torch.float32, base)
    assert (plain - cos).abs().max() > 0.5


def test_llamas_norm_rounds_before_it_multiplies():
    """In bfloat16 the order shows. Gemma's norm rounds after it."""
    config = read_config(FIXTURES / "llama30")
    norm = transformer.RMSNorm(512, config)
    x, w = torch.randn(2, 512, generator=_generator(0)), torch.randn(512, generator=_generator(1))
    x, norm.weight.data = x.bfloat16(), w.bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    first = exact.bfloat16() * w.bfloat16()
    last = (exact * w.bfloat16().double()).bfloat16()
    assert torch.equal(norm(x), first) and not torch.equal(first, last)


@pytest.mark.parametrize("name", ["llama32", "llama30"])
def test_gradients_of_the_loss_equal_those_of_transformers(gemma, name):
    """Through logprob.py: of both ends' matrices, of norms and of layers. 23 tokens a row."""
    model, want = gemma(name)[0], expected(name)
    ids, mask = want["ids"], torch.ones(2, 24)
    logp, _ = next_token_logprobs(model.vocabulary, model(ids), ids, mask)
    (-logp.sum() / (2 * 23)).backward()
    found = {key for key in want if key.startswith("gradient.")}
    assert ("gradient.lm_head" in found) == (name == "llama30")
    for key in found:
        grad = model.get_parameter(key.removeprefix("gradient.") + ".weight").grad[:64]
        assert (grad - want[key]).abs().max() <= 1e-5 * want[key].abs().max(), key


def test_a_missing_config_field_is_named(tmp_path):
    config = json.loads((FIXTURES / "gemma3/config.json").read_text())
    del config["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="rms_norm_eps"):
        read_config(tmp_path)


# ------------------------------------------------------------------------- padding, cache, dtype


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_on_the_right_changes_nothing_before_it(gemma, name):
    model, _ = gemma(name)
    ids = expected(name)["ids"]
    padded = torch.cat((ids[:, :15], torch.randint(7, 380, (2, 9))), dim=1)
    assert (logits(model, padded)[:, :15] - logits(model, ids[:, :15])).abs().max() <= TIGHT


@pytest.mark.parametrize("name", TIED)
def test_the_seams_defaults_give_the_same_hidden_states_and_gradients(gemma, name):
    """A model without its faster forms, as the network's own file has it."""
    ids, lengths = torch.randint(5, 380, (3, 12), generator=_generator(0)), [12, 5, 9]
    found = []
    for plain in (False, True):
        model, _ = gemma(name)
        assert model.lookup is head.lookup
        if plain:
            del model.lookup
            assert model.lookup is torch.nn.functional.embedding
        hidden = model(ids, lengths)
        hidden.logsumexp(-1).sum().backward()
        found.append((hidden, {n: p.grad for n, p in model.named_parameters()}))
    (fast, fast_grads), (plain, plain_grads) = found
    assert torch.equal(fast, plain)
    for name, grad in plain_grads.items():
        assert (grad - fast_grads[name]).abs().max() <= 1e-6 * grad.abs().max(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_attend_rows_may_be_replaced_by_one_launch_for_all_rows(gemma, name):
    """The seam that a GPU needs: rows padded for attention alone, with a mask written out here."""
    model, _ = gemma(name)
    ids, lengths = torch.randint(5, 380, (3, 12), generator=_generator(0)), [12, 5, 9]
    want, asked = model(ids, lengths), []

    def attend_padded(q, k, v, lengths, window, scale, cap):
        asked.append(window)
        pad = lambda x: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
            [row[0].transpose(0, 1) for row in x.split(lengths, 2)], batch_first=True
        ).transpose(1, 2)
        T = max(lengths)
        i, j = torch.arange(T)[:, None], torch.arange(T)[None]
        mask = (j <= i) & (i - j < (window or T))
        out = transformer.softmax_attention(pad(q), pad(k), pad(v), mask[None, None], scale, cap)
        return torch.cat([row[:, :n] for row, n in zip(out, lengths)], 1)[None]

    model.attend_rows = attend_padded
    assert (model(ids, lengths) - want).abs().max() <= TIGHT
    assert len(asked) == model.config.num_hidden_layers
    assert (name in ("gemma1", "llama32", "llama30")) == (set(asked) == {None})


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", TIED)
def test_rows_of_given_lengths_are_as_if_each_were_alone(gemma, name, checkpointing):
    """Hidden states and gradients, of rows within the window of 8, at it and past it, in any order;
    and no layer sees padding."""
    model, _ = gemma(name)
    set_checkpointing(model, checkpointing)
    ids = torch.randint(5, 380, (5, 16), generator=torch.Generator().manual_seed(0))
    lengths = [8, 16, 3, 1, 9]
    slopes = torch.randn(
        5, 16, model.config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    each = [model(row[None, :n])[0] for row, n in zip(ids, lengths)]
    sum((hidden * slope[: len(hidden)]).sum() for hidden, slope in zip(each, slopes)).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    widths = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[:2]))
    ids = ids.masked_fill(torch.arange(16) >= torch.tensor(lengths)[:, None], 0)
    hidden = model(ids, lengths)
    (hidden * slopes).sum().backward()
    assert set(widths) == {(1, sum(lengths))}
    for row, alone, n in zip(hidden, each, lengths):
        assert (row[:n] - alone).abs().max() <= TIGHT and not row[n:].any()
    for name, p in model.named_parameters():
        assert (p.grad - want[name]).abs().max() <= 1e-4 * want[name].abs().max(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_token_by_token_equals_one_forward_pass(gemma, name):
    """Rows of different lengths share the cache: row 0 has 13 tokens of prompt, row 1 has 9."""
    model, _ = gemma(name)
    ids, full = expected(name)["ids"], expected(name)["logits"]
    cache = KVCache(model.config, 2, 24, torch.float32, "cpu")
    out = logits(model, ids[:, :13], attend=cache.attend_prompts([0, 1]))
    assert (out[0] - full[0, :13]).abs().max() <= TIGHT
    assert (out[1, :9] - full[1, :9]).abs().max() <= TIGHT
    positions = torch.tensor([13, 9])
    for i in range(11):
        each = [int(n) + 1 for n in positions]
        used = each if i % 2 else [max(each)]  # attention row by row, or all rows at once
        attend = cache.attend_next(positions[:, None], used)
        token = ids[torch.arange(2), positions][:, None]
        out = logits(model, token, positions=positions[:, None], attend=attend)
        want = full[torch.arange(2), positions]
        assert (out[:, 0] - want).abs().max() <= TIGHT
        positions += 1


def test_a_cache_keeps_the_rows_it_is_told_to(gemma):
    cache = KVCache(gemma("gemma1")[0].config, 5, 6, torch.float32, "cpu")
    for x in (cache.k, cache.v):
        x.normal_()
    k, v = cache.k.clone(), cache.v.clone()
    for rows in ([0, 4, 2, 3], [0, 1, 2, 3], [3]):
        k, v = k[:, rows], v[:, rows]
        cache.keep(rows)
        assert torch.equal(cache.k, k) and torch.equal(cache.v, v)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_fill_the_rows_they_are_given_and_no_others(gemma, name):
    """Row 1 is taken in first, alone; then row 0. Decoding goes on from both."""
    model, _ = gemma(name)
    ids, full = expected(name)["ids"], expected(name)["logits"]
    cache = KVCache(model.config, 2, 24, torch.float32, "cpu")
    logits(model, ids[1:, :10], attend=cache.attend_prompts([1]))
    assert not cache.k[:, 0].any() and not cache.v[:, 0].any() and cache.k[:, 1, :, :10].any()
    logits(model, ids[:1, :10], attend=cache.attend_prompts([0]))
    positions = torch.full((2, 1), 10)
    attend = cache.attend_next(positions, [11])
    rest = logits(model, ids[:, 10:11], positions=positions, attend=attend)
    assert (rest[:, 0] - full[:, 10]).abs().max() <= TIGHT


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_preserves_loss_and_every_gradient(gemma, name, monkeypatch):
    # With the real limit none of these small products would be kept.
    monkeypatch.setattr(checkpointing_file, "MIN_INNER_SIZE", 1)
    ids = expected(name)["ids"]
    grads = {}
    for checkpointing in CHECKPOINTING:
        model, _ = gemma(name)
        set_checkpointing(model, checkpointing)
        model.logits(model(ids)).logsumexp(-1).mean().backward()
        grads[checkpointing] = {n: p.grad for n, p in model.named_parameters()}
    for name, grad in grads["none"].items():
        assert grad is not None, name
        assert torch.equal(grad, grads["light"][name]) and torch.equal(grad, grads["full"][name]), (
            name
        )


def test_a_light_checkpoint_multiplies_nothing_again_but_an_adapters_way_up(gemma, monkeypatch):
    """Counted by PyTorch: 2 x inner size multiplications and additions for each number of a
    product."""
    model, _ = gemma("gemma3")
    lora.add_lora(model, 4, 8)
    monkeypatch.setattr(checkpointing_file, "MIN_INNER_SIZE", 5)
    ids, flops = torch.randint(5, 90, (2, 10)), {}
    for checkpointing in CHECKPOINTING:
        set_checkpointing(model, checkpointing)
        with FlopCounterMode(display=False) as counter:
            model(ids).sum().backward()
        flops[checkpointing] = counter.get_total_flops()
    layers = lora.adapters(model).values()
    up = sum(2 * ids.numel() * layer.lora_B.weight.numel() for layer in layers)
    down = sum(2 * ids.numel() * layer.lora_A.weight.numel() for layer in layers)
    base = sum(2 * ids.numel() * layer.base.weight.numel() for layer in layers)
    assert flops["light"] == flops["none"] + up
    assert flops["full"] - flops["none"] >= up + down + base  # and attention


def test_a_tokens_gradient_comes_from_all_its_places_and_is_added_to_what_is_there():
    weight, ids = torch.randn(5, 3, requires_grad=True), torch.tensor([[4, 4, 1], [4, 0, 1]])
    slopes = torch.arange(18.0).view(2, 3, 3)
    want = torch.ones(5, 3)
    for token, slope in zip(ids.flatten().tolist(), slopes.view(6, 3)):
        want[token] += slope
    there = weight.grad = torch.ones(5, 3)
    (head.lookup(ids, weight) * slopes).sum().backward()
    assert weight.grad is there and torch.equal(there, want)
    assert torch.equal(head.lookup(ids, weight), weight[ids])


def test_a_tokens_gradient_is_the_same_to_the_bit_on_several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    weight, ids = torch.randn(500, 64, requires_grad=True), torch.randint(20, (16, 200))
    slopes, seen = torch.randn(16, 200, 64), []
    for _ in range(8):
        weight.grad = None
        (head.lookup(ids, weight) * slopes).sum().backward()
        seen.append(weight.grad)
    torch.set_num_threads(threads)
    assert all(torch.equal(grad, seen[0]) for grad in seen)


def test_the_embedding_scale_is_rounded_as_the_activations_are(gemma):
    """sqrt(24) = 4.899 is 4.90625 in bfloat16: transformers multiplies by the rounded number."""
    model, _ = gemma("gemma3", torch.bfloat16)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = torch.tensor([[2, 40]])
    model(ids)
    assert torch.equal(seen[0], model.model.embed_tokens(ids) * 4.90625)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama30"])
def test_packed_weights_compute_the_same(gemma, name, weights, autocast):
    """With adapters beside them, for one row and for many; after an error, too, they are gone."""
    model, _ = gemma(name, weights)
    lora.add_lora(model, 4, 8)
    for i, layer in enumerate(lora.adapters(model).values()):
        layer.lora_B.weight.data += (
            torch.randn(layer.lora_B.weight.shape, generator=_generator(i)) / 10
        )
    ids = torch.randint(5, 380, (3, 9), generator=_generator(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        half = model.product_dtype == torch.bfloat16
        assert half == (autocast or weights == torch.bfloat16)
        if half and not cpu.can_pack(model.device, torch.bfloat16):
            pytest.skip("no bfloat16 products here")
        plain = [logits(model, ids), logits(model, ids[:1])]
        with pytest.raises(KeyError), cpu.packed(model, choose):
            layer = model.model.layers[0].mlp.down_proj.base
            assert layer.forward.keywords["packed"].dtype == model.product_dtype
            packed = [logits(model, ids), logits(model, ids[:1])]
            raise KeyError
    for a, b in zip(plain, packed):
        assert a.dtype == b.dtype and (a - b).abs().max() <= (0.03 if half else TIGHT)
    assert "forward" not in vars(layer)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def test_a_bfloat16_base_computes_in_float32_when_told_to(gemma):
    low, _ = gemma("gemma3", torch.bfloat16)
    compute_in_float32(low)
    assert low.model.norm.weight.dtype == torch.bfloat16  # cast as it is used
    high, _ = gemma("gemma3")
    with torch.no_grad():
        for name, p in high.named_parameters():
            p.copy_(low.get_parameter(name))
    ids = expected("gemma3")["ids"]
    assert low(ids).dtype == torch.float32
    assert torch.equal(logits(low, ids), logits(high, ids))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_base_cast_to_float32_does_not_keep_its_file_in_memory(tmp_path):
    shutil.copytree(hub.find_model("tiny").base, tmp_path / "model")
    model, _ = load_model(tmp_path / "model")  # its weights are the file's pages
    mapped = lambda: str(tmp_path) in Path("/proc/self/maps").read_text()  # noqa: E731
    assert mapped()
    compute_in_float32(model)
    assert not mapped()


# --------------------------------------------------------------------------------- save and load


def test_saved_and_loaded_again_gives_identical_logits_and_the_same_files(gemma, tmp_path):
    model, tokenizer = gemma("gemma3")
    save_model(model, tokenizer, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    ids = expected("gemma3")["ids"]
    assert torch.equal(logits(model, ids), logits(again, ids))
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (FIXTURES / "gemma3" / file).read_bytes()
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_a_model_trained_in_float32_is_saved_in_the_dtype_it_came_in(tmp_path):
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "bf16")
    config = json.loads((tmp_path / "bf16/config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "bf16/config.json").write_text(json.dumps(config))
    model, tokenizer = load_model(tmp_path / "bf16", torch.float32)
    save_model(model, tokenizer, tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}


def shards(folder):
    """The fixture's weights as two files and an index, as the Hub has the larger Gemmas."""
    folder.mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(FIXTURES / "gemma3" / file, folder)
    weights = load_file(FIXTURES / "gemma3/model.safetensors")
    names = sorted(weights)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, keys in parts.items():
        save_file({k: weights[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parts


def test_sharded_weights_load_like_a_single_file(gemma, tmp_path):
    shards(tmp_path / "m")
    model, _ = load_model(tmp_path / "m")
    ids = expected("gemma3")["ids"]
    assert torch.equal(logits(model, ids), logits(gemma("gemma3")[0], ids))


def with_head(folder, head, embedding=True):
    """The fixture's model in `folder`, with lm_head.weight beside its embedding or in its place."""
    shutil.copytree(FIXTURES / "gemma3", folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = head(weights["model.embed_tokens.weight"]).clone()
    if not embedding:
        del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("embedding", [True, False])
def test_a_tied_output_head_in_the_file_is_the_embedding(gemma, tmp_path, embedding):
    """Some exporters write both, safetensors' save_model writes only one of two tied tensors."""
    model, _ = load_model(with_head(tmp_path / "m", lambda weight: weight, embedding))
    ids = expected("gemma3")["ids"]
    assert torch.equal(logits(model, ids), logits(gemma("gemma3")[0], ids))


def test_a_gemma_may_have_an_output_head_of_its_own(gemma, tmp_path):
    """By hand: the hidden states times the head's rows, and not the embedding's."""
    folder = with_head(tmp_path / "m", lambda weight: weight.flip(0))
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = load_model(folder)
    ids, tied = expected("gemma3")["ids"], gemma("gemma3")[0]
    assert torch.equal(logits(model, ids), logits(tied, ids).flip(-1))
    save_model(model, tokenizer, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")[0], ids), logits(model, ids))


def test_an_untied_model_without_its_output_head_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "llama30", tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "m/model.safetensors")
    with pytest.raises(UserError, match="lacks 1 tensors, the first is lm_head.weight"):
        load_model(tmp_path / "m")


def test_copies_of_an_untied_model_have_the_output_head(gemma):
    """twin shares it, frozen_copy rounds it as autocast would, float32 computing casts it once."""
    model, _ = gemma("llama30")
    assert twin(model).vocabulary.weight is model.vocabulary.weight
    frozen = frozen_copy(model, bf16=True)
    assert frozen.lm_head.weight.dtype == torch.bfloat16
    assert frozen.model.embed_tokens.weight.dtype == torch.float32
    ids = expected("llama30")["ids"]
    mask = torch.ones(ids.shape)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = [next_token_logprobs(m.vocabulary, m(ids), ids, mask)[0] for m in (model, frozen)]
    assert torch.equal(*found)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert frozen.lm_head.weight.any()
    low, _ = gemma("llama30", torch.bfloat16)
    compute_in_float32(low)
    assert low.vocabulary.weight.dtype == torch.float32
    assert low.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_what_the_licence_of_llama_asks_is_said_once(gemma, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_file, "_say_once", functools.cache(print))
    for name, times in (("gemma1", 0), ("llama32", 1)):
        for i in range(2):
            save_model(*gemma(name), tmp_path / f"{name}{i}")
        said = capsys.readouterr().out
        assert said.count("Built with Llama") == times and said.count("\n") == times


@pytest.mark.parametrize("config, tokens", [("llama32", "gemma1"), ("gemma1", "llama30")])
def test_a_tokenizer_of_the_other_family_is_refused(tmp_path, config, tokens):
    shutil.copytree(FIXTURES / config, tmp_path / "m")
    shutil.copy(FIXTURES / tokens / "tokenizer.json", tmp_path / "m")
    whose = "Llama 3's" if tokens == "llama30" else "Gemma's"
    with pytest.raises(UserError, match=f"tokenizer.json is {whose}, but the model_type in"):
        load_model(tmp_path / "m")


# ------------------------------------------------------- the text part of a multimodal checkpoint


def test_the_text_part_of_a_multimodal_gemma_equals_transformers():
    """Its config leaves heads, epsilon and scale to the class's defaults, as Google's files do."""
    model, _ = load_model(VISION)
    text = json.loads((VISION / "config.json").read_text())["text_config"]
    assert not {"num_attention_heads", "rms_norm_eps", "query_pre_attn_scalar"} & text.keys()
    want = load_file(VISION / "expected.safetensors")
    assert want["ids"].shape[1] > model.config.sliding_window
    assert (logits(model, want["ids"]) - want["logits"]).abs().max() <= TIGHT


def test_the_defaults_that_google_s_files_leave_out(tmp_path):
    """Gemma 3 4B's text_config, whole. 12B and 27B say more."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024}  # fmt: skip
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
             "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "vision_config": {}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": text}))
    config = read_config(tmp_path)
    assert (config.vocab_size, config.num_attention_heads, config.head_dim) == (262_208, 8, 256)
    assert (config.num_key_value_heads, config.query_pre_attn_scalar) == (4, 256)
    assert config.rope == {"full_attention": (1e6, 8.0), "sliding_attention": (1e4, 1.0)}
    assert config.dtype == torch.bfloat16 and config.multimodal and config.rms_norm_eps == 1e-6
    with torch.device("meta"):
        size = sum(p.numel() for p in Transformer(config).parameters())
    assert size == 3_880_263_168  # what is left of gemma-3-4b without its vision part


def renamed(folder, change):
    shutil.copytree(VISION, folder)
    weights = load_file(folder / "model.safetensors")
    changed = {change(name): tensor for name, tensor in weights.items()}
    assert changed.keys() != weights.keys()
    save_file(changed, folder / "model.safetensors")
    return folder


def test_the_newer_layout_of_names_is_read_as_well(tmp_path):
    def newer(name):
        if name.startswith("language_model.model."):
            return name.replace("language_model.model.", "model.language_model.")
        return f"model.{name}"

    model, _ = load_model(renamed(tmp_path / "m", newer))
    want = load_file(VISION / "expected.safetensors")
    assert (logits(model, want["ids"]) - want["logits"]).abs().max() <= TIGHT


def test_a_multimodal_checkpoint_is_read_strictly(tmp_path):
    spoil = lambda name: name.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj")  # noqa: E731
    with pytest.raises(UserError, match="layers.7.mlp.up_proj.weight .* no place here"):
        load_model(renamed(tmp_path / "m", spoil))
    weights = load_file(VISION / "model.safetensors")
    weights["model.norm.weight"] = weights["language_model.model.norm.weight"].clone()
    shutil.copytree(VISION, tmp_path / "two")
    save_file(weights, tmp_path / "two/model.safetensors")
    with pytest.raises(UserError, match="norm.weight is there twice"):
        load_model(tmp_path / "two")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"text_config": None}, "config.json"),
        ({"text_config": {"model_type": "gemma2"}}, "text_config has model_type 'gemma2'"),
        ({"text_config": {}}, "missing field 'hidden_size'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_a_multimodal_config_we_cannot_run_is_refused_by_name(tmp_path, change, says):
    config = json.loads((VISION / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        read_config(tmp_path)


def test_a_multimodal_model_is_not_saved_whole(tmp_path):
    with pytest.raises(UserError, match="of a multimodal model only adapters can be saved"):
        save_model(*load_model(VISION), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_head_that_differs_from_the_embedding_is_refused(tmp_path):
    """It was once ignored: other logits, and nothing said so."""
    spoilt = with_head(tmp_path / "m", lambda weight: weight + 1e-3)
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        load_model(spoilt)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype):
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "m/model.safetensors")
    said = r"model.safetensors: model.layers.2.mlp.up_proj.weight has entries that are NaN or inf"
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "m", dtype)


def add_token(folder, content, special, i=384):
    """The fixture's model in `folder`, its tokenizer with one more token, beyond the embedding."""
    shutil.copytree(FIXTURES / "gemma3", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": i, "content": content, "special": special} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_token_beyond_the_embedding_is_refused_by_name(tmp_path):
    """Text that contains it would end in an IndexError, in the middle of a run."""
    with pytest.raises(UserError, match="token '<think>' is beyond the model's 384 embeddings"):
        load_model(add_token(tmp_path / "m", "<think>", special=False))


def test_a_special_token_beyond_the_embedding_is_fine(tmp_path):
    """As Gemma 3's <image_soft_token>: no text becomes a special token here."""
    _, tokenizer = load_model(add_token(tmp_path / "m", "<image>", special=True))
    assert max(tokenizer.encode("an <image> of <image>")) < 384


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_exact_gelu_is_refused_where_it_is_meant(tmp_path, name):
    """Old files of Gemma 1 say "gelu" for the tanh form. Others say what they mean."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_activation": "gelu"}))
    with pytest.raises(UserError, match="activation 'gelu' is not supported"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert read_config(tmp_path) == read_config(FIXTURES / name)  # transformers reads the other one


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(3)}), "model.extra.weight"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(25)}), r"model.norm.weight.*25"),
    ],
)
def test_loading_is_strict_and_names_the_tensor(tmp_path, spoil, says):
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    spoil(weights)
    save_file(weights, tmp_path / "m/model.safetensors")
    with pytest.raises(UserError, match=says):
        load_model(tmp_path / "m")


def test_a_truncated_weight_file_is_one_clear_error(tmp_path):
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_model(tmp_path / "m")


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text('{"eos_token_id": [1, 384]}')
    with pytest.raises(UserError, match="vocabulary"):
        load_model(tmp_path / "m")
