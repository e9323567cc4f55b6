"""Checkpoints <-> the network: config.json, weights and adapters; load_model, save_model,
save_adapter.

A model folder is in the Hub's layout and an adapter folder in PEFT's, so transformers and peft read
what is saved here, and we read theirs. What is not supported is refused by name: otherwise a model
would load, run and compute something else.
"""

import contextlib
import copy
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nanogsm import UserError, distributed, lora
from nanogsm.data import Tokenizer
from nanogsm.fast import cuda, head
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.lora import LoRALinear
from nanogsm.store import files, hub
from nanogsm.transformer import Config, Transformer, attend_causally

# ---------------------------------------------------------------------------------------- config


def read_config(folder: Path) -> Config:
    """Read folder/config.json in the spelling of transformers 4 or 5. Raises UserError for anything
    that is not supported, rather than computing something else."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _config_from(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        problem = f"missing field {e}" if isinstance(e, KeyError) else str(e)
        raise UserError(f"cannot use {folder / 'config.json'}: {problem}") from e


def _config_from(raw: dict) -> Config:
    multimodal = raw["model_type"] == "gemma3"
    raw = _text_part(raw) if multimodal else raw
    kind = raw["model_type"]
    if kind not in ("gemma", "gemma2", "gemma3_text", "llama"):
        raise ValueError(f"model_type {kind!r} is not gemma, gemma2, gemma3, gemma3_text or llama")
    is_gemma = kind != "llama"
    if not is_gemma and raw.get("head_dim") is None:
        width, heads = raw["hidden_size"], raw["num_attention_heads"]
        if not (type(heads) is int and heads > 0 and width % heads == 0):
            raise ValueError("there is no head_dim, and hidden_size is no multiple of the heads")
        raw = raw | {"head_dim": width // heads}
    sizes = {
        "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "head_dim": 2**12,
        "num_hidden_layers": 1000, "num_attention_heads": 2**12, "num_key_value_heads": 2**12,
    }  # fmt: skip
    for name, limit in sizes.items():  # checked first, because the code below loops up to them
        if type(raw[name]) is not int or not 0 < raw[name] <= limit:
            raise ValueError(f"{name} is {raw[name]!r}")
    layers = raw["num_hidden_layers"]
    unsupported = ["attention_bias", "use_bidirectional_attention"]
    if not is_gemma:
        unsupported += ["mlp_bias", "original_max_position_embeddings"]
    if kind != "gemma2":
        unsupported += ["attn_logit_softcapping", "final_logit_softcapping"]
    for name in unsupported:
        if raw.get(name):
            raise ValueError(f"{name} is set, but is not supported")
    if raw.get("quantization_config"):
        raise ValueError("its weights are quantised (quantization_config), which is not supported")
    if raw.get("rope_parameters") and raw.get("rope_scaling"):
        raise ValueError("rope_parameters and rope_scaling are both set: remove one of them")
    for name, usual in {"pruned_heads": {}, "partial_rotary_factor": 1, "auto_map": {},
                        "is_causal": True}.items():  # fmt: skip
        if raw.get(name) not in (None, usual):
            raise ValueError(f"{name} is {raw[name]!r}, which is not supported")
    for name in raw.get("architectures") or ():
        if not name.endswith(("ForCausalLM", "ForConditionalGeneration")):
            raise ValueError(f"architecture {name!r} is not a language model")
    tied = raw.get("tie_word_embeddings")
    tied = is_gemma if tied is None else tied
    if type(tied) is not bool or (multimodal and not tied):
        raise ValueError(f"tie_word_embeddings {tied!r} is not supported")
    usual = "gelu_pytorch_tanh" if is_gemma else "silu"
    activation = raw.get("hidden_activation" if is_gemma else "hidden_act") or usual
    if kind == "gemma":  # whose old files say "gelu" and mean the tanh form
        activation = raw.get("hidden_activation") or raw.get("hidden_act") or activation
        activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    if activation != usual:
        raise ValueError(f"activation {activation!r} is not supported")

    sliding = {  # layer i (from 0) is local
        "gemma": lambda i: False,
        "llama": lambda i: False,
        "gemma2": lambda i: i % 2 == 0,
        "gemma3_text": lambda i: (i + 1) % (raw.get("sliding_window_pattern") or 6) != 0,
    }[kind]
    layer_types = raw.get("layer_types") or [
        "sliding_attention" if sliding(i) else "full_attention" for i in range(layers)
    ]
    if len(layer_types) != layers or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ValueError("layer_types must name full_attention or sliding_attention per layer")
    if not is_gemma and "sliding_attention" in layer_types:
        raise ValueError("sliding_attention in a Llama is not supported")

    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is not supported")

    has_scalar = kind in ("gemma2", "gemma3_text")
    config = Config(
        model_type=kind,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        rms_norm_eps=raw["rms_norm_eps"],
        query_pre_attn_scalar=raw["query_pre_attn_scalar" if has_scalar else "head_dim"],
        layer_types=tuple(layer_types),
        sliding_window=raw.get("sliding_window") if "sliding_attention" in layer_types else None,
        rope=_rope_from(raw),
        # Read with [], not .get(): a Gemma 2 without its caps would compute something else.
        attn_logit_softcapping=raw["attn_logit_softcapping"] if kind == "gemma2" else None,
        final_logit_softcapping=raw["final_logit_softcapping"] if kind == "gemma2" else None,
        dtype=getattr(torch, dtype),
        tied=tied,
        multimodal=multimodal,
    )
    _check(config)
    return config


# What transformers' Gemma3TextConfig has where the files of Gemma 3 4B, 12B and 27B say nothing.
GEMMA3_TEXT = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
}  # fmt: skip


def _text_part(raw: dict) -> dict:
    """The fields of the text model in a multimodal config.json."""
    text = raw["text_config"]
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise ValueError(f"text_config has model_type {text['model_type']!r}, not gemma3_text")
    for_all = ("architectures", "dtype", "torch_dtype", "quantization_config", "auto_map",
               "tie_word_embeddings")  # fmt: skip
    outer = {name: raw[name] for name in for_all if raw.get(name) is not None}
    return GEMMA3_TEXT | text | outer | {"model_type": "gemma3_text"}


def _check(config: Config) -> None:
    """Raise ValueError for numbers with which the model would crash or compute something else."""
    floats = "rms_norm_eps query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping"
    for name in floats.split():
        value = getattr(config, name)
        if not (_positive(value) or (value is None and name.endswith("capping"))):
            raise ValueError(f"{name} is {value!r}")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError("heads must be a multiple of key/value heads, and head_dim even")
    window = config.sliding_window
    if "sliding_attention" in config.layer_types and not (
        type(window) is int and 0 < window < 2**31
    ):
        raise ValueError(f"there are local layers, but sliding_window is {window!r}")
    if not set(config.layer_types) <= config.rope.keys():
        raise ValueError("rope_parameters has no entry for one of the layer_types")


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 2**62  # a larger one is damage


def _rope_from(raw: dict) -> dict[str, tuple]:
    """Layer type -> what transformer.rotary takes."""
    kind = raw["model_type"]

    def theta_and_factor(r: dict, theta: float) -> tuple:
        rope_type = r.get("rope_type") or r.get("type") or "default"
        if rope_type not in ("default", "linear", *["llama3"] * (kind == "llama")):
            raise ValueError(f"rope type {rope_type!r} is not supported")
        if r.get("partial_rotary_factor") not in (None, 1):
            raise ValueError("partial_rotary_factor is not supported")
        # As transformers does: without a rope type a factor is not used.
        factor = 1.0 if rope_type == "default" else r["factor"]
        found = r.get("rope_theta") or theta, factor
        if not all(map(_positive, found)):
            raise ValueError(f"rope theta and factor are {found!r}")
        if rope_type != "llama3":
            return float(found[0]), float(found[1])
        names = "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor"
        low, high, length, factor = (r[name] for name in names)
        if not all(map(_positive, (low, high, length, factor))) or low >= high:
            raise ValueError(f"rope type llama3 has {', '.join(f'{n} {r[n]!r}' for n in names)}")
        return float(found[0]), float(factor), (float(low), float(high), float(length))

    # What transformers' config classes have where a file leaves the base out.
    defaults = {"full_attention": 1e4, "sliding_attention": 1e4}
    if kind == "gemma3_text":
        defaults["full_attention"] = 1e6
    new = raw.get("rope_parameters") or {}
    if new.keys() & defaults.keys():  # transformers 5: a table for each kind of layer
        if kind == "llama":
            raise ValueError("rope_parameters for each kind of layer are not supported in a Llama")
        tables = {layer: new.get(layer) or {} for layer in defaults}
        return {layer: theta_and_factor(tables[layer], defaults[layer]) for layer in defaults}
    base = raw.get("rope_theta") or defaults["full_attention"]
    everywhere = theta_and_factor(new or raw.get("rope_scaling") or {}, base)
    if kind != "gemma3_text":
        return dict.fromkeys(defaults, everywhere)
    # In transformers 4 rope_scaling is for global layers only.
    local = raw.get("rope_local_base_freq") or defaults["sliding_attention"]
    if not _positive(local):
        raise ValueError(f"rope_local_base_freq is {local!r}")
    return {"full_attention": everywhere, "sliding_attention": (float(local), 1.0)}


# --------------------------------------------------------------------------------------- weights


def load_model(
    name: str | Path | hub.ModelFiles,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    merge: bool = False,
    shard: int = 1,
) -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer. name: a Hub id, a folder in the Hub's layout, a run folder, or
    what `hub.find_model` found.

    dtype is that of the weights; None keeps the checkpoint's. A run that trained adapters comes
    back as base plus adapters (float32). `merge` adds the adapters to the base instead, which
    rounds in a 16-bit dtype. shard: how many devices share one copy (distributed.py); each reads
    and keeps some rows of every matrix. Raises UserError for files that are missing, damaged or not
    supported.
    """
    found = name if isinstance(name, hub.ModelFiles) else hub.find_model(str(name))
    cuda.prepare(device)
    tokenizer = Tokenizer(found.base)
    with torch.device("meta"):  # takes no memory: the weights come from the file
        model = Transformer(read_config(found.base))
    if (tokenizer.family.name == "Gemma") != model.config.is_gemma:
        raise UserError(f"{found.base}: tokenizer.json is {tokenizer.family.name}'s, but the "
                        f"model_type in config.json is {model.config.model_type}")  # fmt: skip
    if max(tokenizer.stop_ids | {tokenizer.bos_id}) >= model.config.vocab_size:
        raise UserError(f"{found.base}: the tokenizer's ids exceed the model's vocabulary")
    if beyond := tokenizer.token_beyond(model.config.vocab_size):
        raise UserError(f"{found.base}: the tokenizer's token {beyond!r} is beyond the model's "
                        f"{model.config.vocab_size} embeddings")  # fmt: skip
    if shard > 1:
        distributed.shard(model, shard, torch.device(device).type)
    _load_weights(model, found.base, dtype or model.config.dtype, device)
    use_fast_forms(model)
    model.loaded_from = {"name": found, "device": device, "merge": merge, "shard": shard}
    if found.adapter:
        load_adapter(model, found.adapter)
        if merge:
            lora.merge(model)
            model.requires_grad_(True)  # a whole model again, nothing of it frozen
    return model, tokenizer


def use_fast_forms(model: Transformer) -> None:
    """Set the faster forms at transformer.py's seams. A model without them gives the same results
    up to rounding, more slowly and with more memory."""
    model.lookup = head.lookup
    if model.device.type == "cuda":
        cuda.prepare(model.device)
        model.attend_rows = functools.partial(cuda.attend_rows, attend_causally)


EMBEDDING = "model.embed_tokens.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _load_weights(model: Transformer, folder: Path, dtype: torch.dtype, device: str) -> None:
    """Strict: every tensor the model has, none it does not have, each of the right shape."""
    params = dict(model.named_parameters())
    params.setdefault("lm_head.weight", params[EMBEDDING])  # as some files call a tied embedding
    wanted = {name: tuple(p.shape) for name, p in params.items()}
    loaded: dict[str, Tensor] = {}
    for file, named in hub.weight_files(folder).items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys() if named is None else named & set(tensors.keys()):
                    name = _name_here(key, model.config)
                    if name is None:
                        continue
                    shape = tuple(tensors.get_slice(key).get_shape())
                    if name not in wanted:
                        raise UserError(f"{file}: {key} {_no_place(key)}")
                    if wanted[name] != shape:
                        raise UserError(
                            f"{file}: {key} has shape {shape}, the model needs {wanted[name]}"
                        )
                    if name in loaded:
                        raise UserError(f"{file}: {key} is there twice, under two names")
                    if distributed.is_part(params[name]):
                        tensor = distributed.rows_here(tensors.get_slice(key), params[name])
                    else:
                        tensor = tensors.get_tensor(key)
                    if tensor.dtype not in FLOATS:  # 8 bits are meaningless without their scales
                        raise UserError(f"{file}: {key} is {str(tensor.dtype)[6:]}; quantised "
                                        "weights are not supported")  # fmt: skip
                    # A sum is NaN or infinite if one entry is, and reads the tensor once.
                    if not tensor.sum(dtype=torch.float32).isfinite():
                        raise UserError(f"{file}: {key} has entries that are NaN or infinite")
                    tensor = tensor.to(device, dtype)
                    if distributed.is_part(params[name]):
                        tensor = distributed.as_part(tensor, params[name])
                    loaded[name] = tensor
        except SafetensorError as e:
            raise UserError(f"{file} is damaged or incomplete ({e}): download it again") from e
    if model.config.tied:
        lm_head = loaded.pop("lm_head.weight", None)
        if lm_head is not None and not torch.equal(loaded.setdefault(EMBEDDING, lm_head), lm_head):
            reason = "differs from the embedding, which config.json ties it to"
            raise UserError(f"{folder}: lm_head.weight {reason}")
        del wanted["lm_head.weight"]
    missing = sorted(wanted.keys() - loaded.keys())
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}")
    model.load_state_dict(loaded, strict=True, assign=True)


def _name_here(name: str, config: Config) -> str | None:
    """What we call a tensor or a layer of a checkpoint; None for the vision part of a multimodal
    one. Only multimodal checkpoints have other names than we, in two layouts."""
    if not config.multimodal:
        return name
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
        return None
    name = re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name)
    return name.removeprefix("language_model.")  # of language_model.lm_head


def _name_for_peft(name: str, config: Config) -> str:
    """What PEFT calls one of our layers: it puts adapters on the whole multimodal model."""
    return re.sub(r"^model\.", "model.language_model.", name) if config.multimodal else name


def _no_place(key: str) -> str:
    """Why a tensor of a checkpoint has no place, in the words of the tool that wrote it."""
    for part, reason in {
        "_orig_mod.": "was saved from a compiled model: save its _orig_mod, the model itself",
        "module.": "was saved from a wrapped model: save its module, the model itself",
        "language_model.": "is in the text part of a multimodal model, and has no place here",
        "v_head": "is a value head, as TRL's PPO saves it: save the model without it",
        "score.": "is a classifier's, and not a language model's",
        "qweight": "is quantised, which is not supported",
        "lora_": "is an adapter's: save the merged model, or the adapter alone in PEFT's layout",
    }.items():
        if part in key:
            return reason
    return "is a tensor that this model does not have"


def save_model(model: Transformer, tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write a folder in the Hub's layout, which transformers reads, too. The weights get the dtype
    of the base's checkpoint. Trap: if that dtype is bfloat16, rounding loses a part of the small
    changes of fine-tuning. So a score of the saved weights can differ from the last validation. The
    folder is whole or absent. Raises ValueError for a model with adapters: merge them first."""
    if lora.adapters(model):
        raise ValueError("merge the adapters, or save them alone with save_adapter")
    if model.config.multimodal:
        raise UserError(f"{folder}: of a multimodal model only adapters can be saved")
    distributed.reshard(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if distributed.RANK:
        return files.give_parts(weights, model.config.dtype)
    _say_what_the_licence_asks(model.config)
    with files.replaced_folder(folder) as new:
        # The checkpoint's small files are copied unchanged, for other tools to read.
        for name in (*hub.REQUIRED, *hub.OPTIONAL):
            if (tokenizer.folder / name).exists():
                files.write(new / name, [(tokenizer.folder / name).read_bytes()])
        files.write_tensors(new / "model.safetensors", weights, model.config.dtype)


def _say_what_the_licence_asks(config: Config) -> None:
    if not config.is_gemma:
        _say_once("note: if you share this model, Llama's licence asks for a name that begins with "
                  '"Llama", and for the words "Built with Llama"')  # fmt: skip


_say_once = functools.cache(print)  # the second time, the cache has the text and prints nothing


def save_trained(model: Transformer, tokenizer: Tokenizer, folder: Path, base_model: str) -> None:
    """Save a run's result in its folder: adapter/ if the model has adapters, model/ if not."""
    if lora.adapters(model):
        save_adapter(model, folder / "adapter", base_model)
    else:
        save_model(model, tokenizer, folder / "model")


# --------------------------------------------------------------------------------------- adapters

PREFIX = "base_model.model."  # what PEFT writes before the base model's own names


def save_adapter(model: Transformer, folder: Path, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors. The folder is whole or absent.
    base_model: what `load_model` finds the base under. Stacked adapters are written as one."""
    if distributed.RANK:
        return
    layers = lora.adapters(model)
    first = next(iter(layers.values()))
    if any(isinstance(layer.base, LoRALinear) for layer in layers.values()):
        factors, scale = {name: layer.factors() for name, layer in layers.items()}, 1.0
        # A PEFT adapter may leave some layers out, but the file has one rank: pad with zeros.
        r = max(len(a) for a, _ in factors.values())
        for name, (a, b) in factors.items():
            more = r - len(a)
            factors[name] = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))
    else:
        factors = {name: (m.lora_A.weight, m.lora_B.weight) for name, m in layers.items()}
        r, scale = len(first.lora_A.weight), first.scale
    # PEFT reads a target as the end of a name. Names in full are for an adapter that has left out
    # some layers, and for a multimodal base, whose vision part has layers that end alike.
    targets = sorted({name.split(".")[-1] for name in layers})
    all_of_them = len([n for n, _ in model.named_modules() if n.split(".")[-1] in targets])
    if len(layers) < all_of_them or model.config.multimodal:
        targets = sorted(_name_for_peft(name, model.config) for name in layers)
    revision = None
    if hub.is_hub_id(base_model):
        base_model, _, revision = base_model.partition("@")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",  # without it PEFT builds no generate()
        "base_model_name_or_path": base_model,
        "revision": revision or None,
        "r": r,
        "lora_alpha": scale * r,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{_name_for_peft(name, model.config)}.{side}.weight": factor
        for name, pair in factors.items()
        for side, factor in zip(("lora_A", "lora_B"), pair)
    }
    _say_what_the_licence_asks(model.config)
    with files.replaced_folder(folder) as new:
        files.write_json(new / "adapter_config.json", config)
        files.write_tensors(new / "adapter_model.safetensors", tensors)


# Fields of adapter_config.json that say nothing about what the adapter computes, or are read below.
# PEFT adds fields with every release. One that is in neither list is refused unless it is off.
SAYS_NOTHING = {
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "megatron_core", "lora_dropout", "qalora_group_size", "layers_pattern",
}  # fmt: skip
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "target_modules",
        "exclude_modules", "layers_to_transform"}  # fmt: skip
# Starts of A and B that leave the base as it was. Others (pissa, olora, loftq, corda) change it, so
# the saved adapter belongs to a base that no longer exists.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json, with "scale" added. UserError for whatever is not plain LoRA."""
    config = files.read_json(Path(folder) / "adapter_config.json")
    kind = config.get("peft_type")
    start = config.get("init_lora_weights", True)
    off = (None, False, "", [], {})
    read = SAYS_NOTHING | READ
    unknown = ", ".join(f"{k} {v!r}" for k, v in config.items() if k not in read and v not in off)
    for applies, reason in [
        (kind != "LORA", f"peft_type {kind!r}; only LORA is supported"),
        (config.get("bias", "none") != "none", f"trained biases (bias {config.get('bias')!r})"),
        (start not in STARTS, f"init_lora_weights {start!r}, which changes the base model; convert "
         "it with PEFT's path_initial_model_for_weight_conversion"),
        (bool(unknown), f"{' '.join(unknown.split())}, which is not supported"),
    ]:  # fmt: skip
        if applies:
            raise UserError(f"the adapter in {folder} has {reason}")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not (type(r) is int and 0 < r < 2**20 and type(alpha) in (int, float) and 0 < alpha < 2**30):
        raise UserError(f"the adapter in {folder} has r {r!r}, lora_alpha {alpha!r}")
    return config | {"scale": alpha / (math.sqrt(r) if config.get("use_rslora") else r)}


def load_adapter(model: Transformer, folder: Path) -> None:
    """Put a saved adapter, ours or PEFT's, on a model. Raises UserError if its kind is not
    supported or if it belongs to another model."""
    config = read_adapter_config(folder)
    try:
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"cannot use the adapter in {folder}: {e}") from e
    layers, r = dict(model.named_modules()), config["r"]
    model.requires_grad_(False)
    while tensors:
        key = next(iter(tensors))
        theirs = key.removeprefix(PREFIX).rsplit(".lora_", 1)[0]
        a = tensors.pop(f"{PREFIX}{theirs}.lora_A.weight", None)
        b = tensors.pop(f"{PREFIX}{theirs}.lora_B.weight", None)
        name = _name_here(theirs, model.config)
        # Trap: the vocabulary reads the head's weight and would not see an adapter on the head.
        base = layers.pop(name, None) if name != "lm_head" else None
        fits = a is not None and b is not None and isinstance(base, nn.Linear)
        if isinstance(base, nn.Linear) and (a is None) != (b is None):
            raise UserError(f"the adapter in {folder} has only one of A and B for {name}")
        if not fits or (a.shape, b.shape) != ((r, base.in_features), (base.out_features, r)):
            raise UserError(f"the adapter in {folder}: {_misfit(key)}")
        if not {a.dtype, b.dtype} <= set(FLOATS):
            raise UserError(f"the adapter in {folder}: {name} is quantised: not supported")
        if not (a.float().sum() + b.float().sum()).isfinite():
            raise UserError(f"the adapter in {folder}: {name} has entries that are NaN or infinite")
        lora.replace_module(model, name, LoRALinear(base, a, b, config["scale"]))
    targets = config.get("target_modules")  # in PEFT's files, a list of name endings or a pattern
    targets = [str(target) for target in targets] if isinstance(targets, list) else []
    ends = tuple(f".{_name_here(target, model.config)}" for target in targets)
    # (Adapted layers were popped above.)
    absent = [name for name in layers if f".{name}".endswith(ends)]
    some_only = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if not lora.adapters(model) or (absent and not some_only):
        lacks = absent[0] if absent else "any layer"
        raise UserError(f"the adapter in {folder} is incomplete: it has nothing for {lacks}")


def _misfit(key: str) -> str:
    """Why a tensor of an adapter has no place, in the words of the tool that wrote it."""
    for part, reason in {
        "_orig_mod.": "was saved from a compiled model: save its _orig_mod, the model itself",
        ".default.weight": "has the adapter's name in it; save it with PEFT's save_pretrained",
        "lora_embedding_": "adapts the embedding, which is not supported",
        "embed_tokens": "belongs to the embedding; trained or resized ones are not supported",
        "lm_head": "belongs to the output head, which is never adapted here: not supported",
        "vision_tower": "belongs to the vision part, which is not loaded: not supported",
        "lora_magnitude": "is DoRA's, which is not supported",
        "lora_B.bias": "is a bias of lora_B (lora_bias), which is not supported",
    }.items():
        if part in key:
            return f"{key} {reason}"
    return f"{key} does not fit this base model: it was made for another one"


# ------------------------------------------------------------------------- copies, dtypes, memory


def set_checkpointing(model: Transformer, name: str) -> None:
    """What backward computes again: "none", "light" or "full" (fast/checkpointing.py)."""
    model.recompute = CHECKPOINTING[name]


def compute_in_float32(model: Transformer) -> None:
    """Let a model compute in float32 whatever its weights' dtype, for machines without bfloat16.

    The embedding and the output head are needed all the time, so they are cast once; other weights
    are cast as they are used. All are copied out of the checkpoint's mapped file, or the file would
    stay in memory as well.
    """
    model.activation_dtype = torch.float32
    at_both_ends = {id(model.model.embed_tokens.weight), id(model.vocabulary.weight)}
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if id(p) in at_both_ends else p.dtype, copy=True)


def twin(model: Transformer) -> Transformer:
    """A second model object on the very same weights: adapters added to one are not on the other.

    deepcopy treats its memo's entries as copied already, so the weights themselves are shared. The
    alternative, switching adapters on and off in one model, has a trap: a checkpointed forward is
    computed again in backward, and by then the switch may be in the other position.
    """
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@contextlib.contextmanager
def sampler_of(model: Transformer, bf16: bool) -> Iterator[Transformer]:
    """`with sampler_of(model, bf16) as model`: a model to sample from. Usually it is the model
    itself. If that is sharded it is a whole copy, or the parts would travel for every token. bf16:
    linear weights are rounded, as autocast would do at every use.
    """
    if not distributed.is_sharded(model):
        yield model
        return
    distributed.reshard(model)
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = {}
    for name, p in model.named_parameters():
        dtype = torch.bfloat16 if bf16 and name in linear else p.dtype
        weights[name] = distributed.whole(p.detach().to(dtype))
    with torch.device("meta"):
        copy_of_it = Transformer(model.config)
    copy_of_it.load_state_dict(weights, strict=True, assign=True)
    copy_of_it.activation_dtype = model.activation_dtype or torch.float32
    use_fast_forms(copy_of_it)
    torch.set_autocast_cache_enabled(True)  # or it would cast the embedding for every token
    try:
        yield copy_of_it
    finally:
        torch.set_autocast_cache_enabled(False)


def frozen_copy(model: Transformer, bf16: bool) -> Transformer:
    """A copy with weights of its own, which never change.

    bf16: linear weights are rounded to bfloat16 once, as autocast would do at every use. Other
    weights are rounded only if that is lossless, as it is for a model that came in bfloat16. So the
    copy computes the same as the model, to the bit, in half the memory.
    """
    if distributed.is_sharded(model):  # FSDP's cannot be copied: the same is loaded again
        frozen, _ = load_model(dtype=None if bf16 else torch.float32, **model.loaded_from)
        frozen.activation_dtype = torch.float32
        return frozen.requires_grad_(False)
    # A CPU's product can differ in its last bit with the address of a matrix. A clone is aligned as
    # the copy is.
    for p in model.parameters():
        p.data = p.data.clone()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    memo = {}  # id of a weight -> the weight that the copy has instead (see twin)
    for p in model.parameters() if bf16 else ():
        rounded = p.detach().bfloat16()
        if id(p) in linear or torch.equal(rounded.to(p.dtype), p):
            memo[id(p)] = nn.Parameter(rounded, requires_grad=False)
    frozen = copy.deepcopy(model, memo).requires_grad_(False)
    frozen.activation_dtype = model.activation_dtype or model.model.embed_tokens.weight.dtype
    return frozen
