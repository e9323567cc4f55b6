"""lora.py against peft's files and logits, and its own promises."""

import json
import re
import shutil

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

from experiments import merge
from nanogsm import UserError, lora
from nanogsm.model import load_adapter, load_model, save_adapter, set_checkpointing

TIGHT = 1e-5
IDS = load_file(FIXTURES / "gemma3_peft/expected.safetensors")["ids"]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.logits(model(ids))


def randomise(model):
    """Adapters that do something: B starts at zero."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora.adapters(model).values():
        layer.lora_B.weight.data = torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.1


FAMILIES = ["gemma3", "llama32", "llama30"]


@pytest.mark.parametrize("name", FAMILIES)
def test_pefts_adapter_gives_pefts_logits(gemma, name):
    model, _ = gemma(name)
    want = load_file(FIXTURES / f"{name}_peft/expected.safetensors")
    plain = logits(model, want["ids"])
    load_adapter(model, FIXTURES / f"{name}_peft")
    assert (plain - want["logits"]).abs().max() > 0.05  # the adapter does something
    assert (logits(model, want["ids"]) - want["logits"]).abs().max() <= TIGHT


@pytest.mark.parametrize("name", FAMILIES)
def test_our_files_are_those_of_peft(gemma, tmp_path, name):
    """Same keys, shapes and required fields, so that peft reads them (checked with peft itself by
    tests/fixtures/check_with_transformers.py, by hand)."""
    model, _ = gemma(name)
    load_adapter(model, FIXTURES / f"{name}_peft")
    save_adapter(model, tmp_path / "adapter", "google/gemma-3-270m")
    ours = load_file(tmp_path / "adapter/adapter_model.safetensors")
    peft = load_file(FIXTURES / f"{name}_peft/adapter_model.safetensors")
    assert ours.keys() == peft.keys()
    assert all(torch.equal(ours[k], peft[k]) for k in peft)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    theirs = json.loads((FIXTURES / f"{name}_peft/adapter_config.json").read_text())
    for field in ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias"):
        assert config[field] == theirs[field], field
    assert config["base_model_name_or_path"] == "google/gemma-3-270m"


def test_lora_is_the_identity_at_the_start(gemma):
    model, _ = gemma("gemma3")
    before = logits(model)
    lora.add_lora(model, 4, 8)
    assert torch.equal(logits(model), before)


def test_the_seven_linear_layers_of_every_block_are_adapted_and_nothing_else(gemma):
    model, _ = gemma("gemma3")
    adapted = lora.add_lora(model, 4, 8)
    assert len(adapted) == 6 * 7
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{side}.weight" for n in adapted for side in "AB"}
    assert not any("embed" in n or "norm" in n for n in trained)


def test_the_start_depends_on_the_seed_alone(gemma):
    first, second, other = (gemma("gemma3")[0] for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        torch.manual_seed(seed + 17)
        lora.add_lora(model, 4, 8, seed)
    a, b, c = (next(iter(lora.adapters(m).values())).lora_A.weight for m in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.abs().max() <= 24**-0.5 and a.std() > 0.5 * 24**-0.5 / 3**0.5


def test_the_change_is_scaled_by_alpha_over_r(gemma):
    """One layer by hand in float64: y = W x + alpha / r * B (A x)."""
    model, _ = gemma("gemma3")
    lora.add_lora(model, 4, 12)
    randomise(model)
    layer = lora.adapters(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 24)
    a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    want = x.double() @ layer.base.weight.double().T + 3.0 * (x.double() @ a.T @ b.T)
    assert (layer(x) - want).abs().max() <= TIGHT


def test_merging_preserves_outputs_and_leaves_plain_layers(gemma):
    model, _ = gemma("gemma3")
    names = {n for n, _ in model.named_parameters()}
    lora.add_lora(model, 4, 8)
    randomise(model)
    before = logits(model)
    lora.merge(model)
    assert {n for n, _ in model.named_parameters()} == names
    assert (logits(model) - before).abs().max() <= TIGHT
    again = logits(model)
    lora.merge(model)  # nothing left to merge
    assert torch.equal(logits(model), again)


def test_merging_into_bfloat16_rounds_once(gemma):
    model, _ = gemma("gemma3", torch.bfloat16)
    lora.add_lora(model, 4, 8)
    randomise(model)
    layer = lora.adapters(model)["model.layers.2.self_attn.v_proj"]
    want = (layer.base.weight.float() + layer.delta()).bfloat16()
    lora.merge(model)
    assert torch.equal(model.get_parameter("model.layers.2.self_attn.v_proj.weight"), want)


def test_every_adapter_learns_under_checkpointing_and_the_base_never_does(gemma):
    grads = {}
    for checkpointing in ("none", "light", "full"):
        model, _ = gemma("gemma3")
        lora.add_lora(model, 4, 8)
        randomise(model)
        set_checkpointing(model, checkpointing)
        model.logits(model(IDS)).logsumexp(-1).mean().backward()
        grads[checkpointing] = {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }
    assert len(grads["none"]) == 2 * 42
    for other in (grads["light"], grads["full"]):
        assert other.keys() == grads["none"].keys()
        for name, grad in grads["none"].items():
            assert torch.equal(grad, other[name]) and grad.abs().max() > 0, name


def test_saved_and_loaded_again_through_a_run_folder(gemma, tmp_path):
    model, _ = gemma("gemma3")
    lora.add_lora(model, 4, 8)
    randomise(model)
    save_adapter(model, tmp_path / "run/adapter", str((FIXTURES / "gemma3").resolve()))
    again, _ = load_model(tmp_path / "run", torch.float32)
    assert torch.equal(logits(again), logits(model))
    merged, _ = load_model(tmp_path / "run", torch.float32, merge=True)
    assert not lora.adapters(merged)
    assert (logits(merged) - logits(model)).abs().max() <= TIGHT


def test_rank_stabilised_scaling_is_read(gemma, tmp_path):
    shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text()) | {"use_rslora": True}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    model, _ = gemma("gemma3")
    load_adapter(model, tmp_path / "a")
    assert next(iter(lora.adapters(model).values())).scale == 8 / 4**0.5


@pytest.mark.parametrize(
    "change, says",
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"peft_type": "PROMPT_TUNING", "r": None}, "peft_type 'PROMPT_TUNING'; only LORA"),
        ({"bias": "all"}, "trained biases .bias 'all'"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base model"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16', which changes the base"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base model"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens \[1, 2\], which is not"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"target_parameters": ["mlp"]}, "target_parameters"),
        ({"of_a_release_to_come": "yes"}, "of_a_release_to_come 'yes', which is not supported"),
    ],
)
def test_adapters_of_other_kinds_are_refused(gemma, tmp_path, change, says):
    shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text()) | change
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        load_adapter(gemma("gemma3")[0], tmp_path / "a")


PEFT_CONFIGS = json.loads((FIXTURES / "peft_configs.json").read_text())


@pytest.mark.parametrize("release", PEFT_CONFIGS)
def test_a_config_with_the_defaults_of_a_peft_release_is_plain_lora(gemma, tmp_path, release):
    """Every field that LoraConfig has there, at its default."""
    shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    ours = json.loads((tmp_path / "a/adapter_config.json").read_text())
    set_by_users = ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    config = PEFT_CONFIGS[release] | {key: ours[key] for key in set_by_users}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    model, same = gemma("gemma3")[0], gemma("gemma3")[0]
    load_adapter(model, tmp_path / "a")
    load_adapter(same, FIXTURES / "gemma3_peft")
    assert torch.equal(logits(model), logits(same))


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_starts_that_leave_the_base_alone_are_read(gemma, tmp_path, start):
    shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config |= {"init_lora_weights": start, "unheard_of": None, "and_off": []}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    load_adapter(gemma("gemma3")[0], tmp_path / "a")


@pytest.mark.parametrize(
    "key, says",
    [
        ("{layer}.lora_A.default.weight", "has the adapter's name in it"),
        ("_orig_mod.{layer}.lora_A.weight", "compiled model"),
        ("model.embed_tokens.lora_embedding_A", "adapts the embedding"),
        ("model.embed_tokens.weight", "trained or resized ones are not supported"),
        ("lm_head.lora_A.weight", "the output head, which is never adapted"),
        ("{layer}.lora_magnitude_vector.weight", "is DoRA's"),
        ("{layer}.lora_B.bias", "lora_bias"),
        ("model.layers.99.mlp.up_proj.lora_A.weight", "made for another one"),
    ],
)
def test_a_tensor_that_has_no_place_is_named_with_the_reason(gemma, tmp_path, key, says):
    shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    key = "base_model.model." + key.format(layer="model.layers.0.mlp.up_proj")
    save_file({key: torch.zeros(4, 24)}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(key)}.*{says}"):
        load_adapter(gemma("gemma3")[0], tmp_path / "a")


@pytest.mark.parametrize("kind", ["half", "int8"])
def test_half_an_adapter_and_a_quantised_one_are_refused(gemma, tmp_path, kind):
    folder = shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    if kind == "half":
        tensors = {name: t for name, t in tensors.items() if "lora_A" in name}
    else:
        tensors = {name: t.to(torch.int8) for name, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    says = "has only one of A and B for model.layers" if kind == "half" else "is quantised"
    with pytest.raises(UserError, match=says):
        load_adapter(gemma("gemma3")[0], folder)


def test_an_adapter_with_nan_is_refused(gemma, tmp_path):
    shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(UserError, match="NaN or infinite"):
        load_adapter(gemma("gemma3")[0], tmp_path / "a")


def test_merge_writes_a_model_that_equals_base_plus_adapter(gemma, tmp_path, capsys):
    shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(FIXTURES / "gemma3")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    assert merge.main([str(tmp_path / "a"), str(tmp_path / "out")]) == 0
    merged, _ = load_model(tmp_path / "out")
    apart, _ = load_model(tmp_path / "a")
    assert (logits(merged) - logits(apart)).abs().max() <= 1e-4
    assert (logits(merged) - logits(gemma("gemma3")[0])).abs().max() > 0.05
    with pytest.raises(UserError, match="exists already"):
        merge.main([str(tmp_path / "a"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="is not an adapter"):
        merge.main([str(FIXTURES / "gemma3"), str(tmp_path / "other")])


def test_a_merge_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path):
    folder = shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(FIXTURES / "gemma3"), "lora_alpha": 2**29}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: t * 1e16 for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="merged, .* has entries that are NaN or infinite"):
        merge.main([str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="out is empty"):
        merge.main([str(folder), ""])


def test_an_adapter_that_lacks_layers_it_names_is_refused(gemma, tmp_path):
    """It would load as the base model, in part or whole, without a word."""
    shutil.copytree(FIXTURES / "gemma3_peft", tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    some = {key: t for key, t in tensors.items() if ".layers.0." in key}
    assert 0 < len(some) < len(tensors)
    for kept in (some, {}):
        save_file(kept, tmp_path / "a/adapter_model.safetensors")
        with pytest.raises(UserError, match="is incomplete: it has nothing for"):
            load_adapter(gemma("gemma3")[0], tmp_path / "a")
    save_file(some, tmp_path / "a/adapter_model.safetensors")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for layers in ([0], 0):  # PEFT takes either
        changed = config | {"layers_to_transform": layers}
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(changed))
        load_adapter(gemma("gemma3")[0], tmp_path / "a")


@pytest.mark.parametrize("left_alone", ["", "self_attn"])
def test_an_adapter_on_an_adapter_is_their_sum(gemma, tmp_path, left_alone):
    """In the forward pass, written as one, merged. The lower one may be on some layers only."""
    model, _ = gemma("gemma3")
    lora.add_lora(model, 3, 5.0, seed=1)
    randomise(model)
    for name, layer in lora.adapters(model).items():
        if left_alone and left_alone in name:
            lora.replace_module(model, name, layer.base)
    lower = set(lora.adapters(model))
    names = lora.add_lora(model, 4, 2.0, seed=2)
    randomise(model)
    assert list(lora.adapters(model)) == names  # each once, by the name of the layer
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        4 * sum(layer.weight.shape) for layer in lora.adapters(model).values()
    )
    by_hand, _ = gemma("gemma3")
    for name, layer in lora.adapters(model).items():
        change = 2.0 / 4 * layer.lora_B.weight @ layer.lora_A.weight
        if name in lower:
            change += 5.0 / 3 * layer.base.lora_B.weight @ layer.base.lora_A.weight
        by_hand.get_submodule(name).weight.data += change
    expected = logits(by_hand)
    assert (logits(model) - expected).abs().max() <= 1e-4
    assert (expected - logits(gemma("gemma3")[0])).abs().max() > 0.05  # they do something

    save_adapter(model, tmp_path / "a", "base")
    loaded, _ = gemma("gemma3")
    load_adapter(loaded, tmp_path / "a")
    assert {layer.lora_A.weight.shape[0] for layer in lora.adapters(loaded).values()} == {7}
    assert (logits(loaded) - expected).abs().max() <= 1e-4
    lora.merge(model)
    assert not lora.adapters(model) and (logits(model) - expected).abs().max() <= 1e-4


def test_a_rank_that_no_matrix_has_is_refused(gemma):
    model, _ = gemma("gemma3")
    most = max(min(m.weight.shape) for n, m in model.named_modules() if n.endswith("_proj"))
    with pytest.raises(UserError, match=f"--lora-r {most + 1}: no matrix .* above {most}"):
        lora.add_lora(model, most + 1, 8)
    lora.add_lora(model, most, 8)


# ------------------------------------------------------- on the text part of a multimodal Gemma 3

VISION, VISION_PEFT = FIXTURES / "gemma3_vision", FIXTURES / "gemma3_vision_peft"


def test_pefts_adapter_on_a_whole_multimodal_model_gives_its_logits():
    want = load_file(VISION / "expected.safetensors")
    model, _ = load_model(VISION)
    load_adapter(model, VISION_PEFT)
    assert (logits(model, want["ids"]) - want["adapted"]).abs().max() <= TIGHT
    assert (want["adapted"] - want["logits"]).abs().max() > 0.05


def test_our_adapter_has_pefts_names_for_the_whole_multimodal_model(tmp_path):
    """Targets in full: "q_proj" alone would adapt the vision part as well. (Read by peft, by hand,
    with equal logits.)"""
    model, _ = load_model(VISION)
    load_adapter(model, VISION_PEFT)
    save_adapter(model, tmp_path / "a", "google/gemma-3-4b-it")
    ours = load_file(tmp_path / "a/adapter_model.safetensors")
    peft = load_file(VISION_PEFT / "adapter_model.safetensors")
    assert ours.keys() == peft.keys() and all(torch.equal(ours[k], peft[k]) for k in peft)
    targets = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 2 * 7
    assert all(target.startswith("model.language_model.layers.") for target in targets)
    again, _ = load_model(VISION)
    load_adapter(again, tmp_path / "a")
    ids = load_file(VISION / "expected.safetensors")["ids"]
    assert torch.equal(logits(again, ids), logits(model, ids))
    del peft["base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"]
    del peft["base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(peft, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(UserError, match="incomplete: it has nothing for model.layers.0.mlp.up"):
        load_adapter(load_model(VISION)[0], tmp_path / "a")


def test_older_and_text_only_names_of_an_adapter_are_read_as_well(tmp_path):
    want = load_file(VISION / "expected.safetensors")
    for prefix in ("language_model.model.", "model."):
        folder = shutil.copytree(VISION_PEFT, tmp_path / prefix)
        tensors = load_file(folder / "adapter_model.safetensors")
        renamed = {k.replace("model.language_model.", prefix): t for k, t in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, folder / "adapter_model.safetensors")
        model, _ = load_model(VISION)
        load_adapter(model, folder)
        assert (logits(model, want["ids"]) - want["adapted"]).abs().max() <= TIGHT


def test_an_adapter_on_the_vision_part_is_refused(tmp_path):
    folder = shutil.copytree(VISION_PEFT, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{name}.lora_A.weight": torch.zeros(4, 8)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="vision_tower.* belongs to the vision part"):
        load_adapter(load_model(VISION)[0], folder)


def test_an_adapter_on_an_untied_output_head_is_refused(gemma, tmp_path):
    """It would have no effect, because the vocabulary reads the head's weight."""
    folder = shutil.copytree(FIXTURES / "llama30_peft", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    for side, shape in (("A", (4, 32)), ("B", (384, 4))):
        tensors[f"base_model.model.lm_head.lora_{side}.weight"] = torch.zeros(shape)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lm_head.* belongs to the output head"):
        load_adapter(gemma("llama30")[0], folder)


def test_an_adapter_for_another_model_is_refused(gemma):
    with pytest.raises(UserError, match="does not fit this base model"):
        load_adapter(gemma("gemma1")[0], FIXTURES / "gemma3_peft")
