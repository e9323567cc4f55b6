"""A user's mistake ends in one line that says what is wrong and what to do, status 2, and no file.

The other tests show the same for each part (damaged checkpoints, downloads, tokenizers, ...). Here
are the three scripts as they are started, every numeric flag, and files made to do harm.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

import evaluate
import train_ppo
import train_sft
from nanogsm import UserError
from nanogsm.run import flags

ROOT = Path(__file__).parents[1]
MODEL = str(FIXTURES / "gemma3")
START = {train_sft: "--model", train_ppo: "--init", evaluate: "--model"}
SCRIPTS = pytest.mark.parametrize("script", START, ids=lambda module: module.__name__)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Work in an empty folder. A good file of problems lies next to it."""
    rows = [
        {"question": f"{i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(8)
    ]
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("NANOGSM_DATA_DIR", raising=False)
    return tmp_path


def usual(script, place, model=MODEL) -> list[str]:
    """Arguments of a run that would work."""
    small = {train_sft: ["--val-examples", "2"], evaluate: ["--n", "2"],
             train_ppo: ["--val-examples", "2", "--rollouts", "4", "--steps", "1"]}  # fmt: skip
    return [START[script], model, "--data", str(place / "good.jsonl"), "--max-new-tokens", "3",
            "--device", "cpu", "--out", "run", *small[script]]  # fmt: skip


def refused(script, argv, says) -> None:
    with pytest.raises(UserError, match=says) as error:
        script.main(argv)
    assert len(" ".join(str(error.value).split())) < 600
    assert not list(Path().iterdir()), "something was written"


# ------------------------------------------------------------------------------------- the flags


def numeric_flags(script) -> list[tuple[str, type]]:
    parsers = []

    class Spy(flags.Parser):
        def parse_known_args(self, *_):  # parse_args calls it, too
            parsers.append(self)
            raise UserError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "Parser", Spy)
        with pytest.raises(UserError, match="seen"):
            script.parse_args([])
    return [(a.option_strings[-1], a.type) for a in parsers[0]._actions if a.type in (int, float)]


ABSURD = {int: ("-1", "much", "1.5", "9" * 30), float: ("-1", "much", "nan", "inf", "1e39")}
NUMBERS = [
    (script, flag, value)
    for script in START
    for flag, kind in numeric_flags(script)
    for value in ABSURD[kind]
]


def test_the_numeric_flags_are_found():
    assert {"--lora-r", "--lr", "--seed"} <= {flag for _, flag, _ in NUMBERS} and len(NUMBERS) > 150


SHORT_ID = lambda value: getattr(value, "__name__", str(value)[:9])  # noqa: E731


@pytest.mark.parametrize("script, flag, value", NUMBERS, ids=SHORT_ID)
def test_absurd_numbers_are_refused_by_name(script, flag, value, place):
    adapters = ["--lora"] * (script is not evaluate and flag.startswith("--lora"))
    refused(script, [*usual(script, place), *adapters, flag, value], f"{flag}(:| is)")


@SCRIPTS
def test_a_misspelt_flag_is_one_line(script, place):
    refused(script, ["--epoch-s", "1"], "unrecognized arguments: --epoch-s.*--help")


@pytest.mark.parametrize(
    "script, argv, says",
    [
        (train_sft, ["--merge"], "--merge needs --lora"),
        (train_sft, ["--lora-r", "8"], "--lora-r needs --lora"),
        (train_sft, ["--keep", "best", "--val-examples", "2"], "--keep best needs --val-every"),
        (train_sft, ["--keep", "best", "--val-every", "1", "--val-examples", "0"],
         "nothing to choose by"),
        (train_sft, ["--min-lr", "1", "--lr", "0.1"], "--min-lr"),
        (train_sft, ["--val-examples", "8"], "--val-examples 8 of 8"),
        (train_sft, ["--max-seq-length", "5"], "every example is longer than --max-seq-length 5"),
        (train_sft, ["--recipe", "mine"], "--recipe"),
        (train_ppo, ["--val-examples", "8"], "--val-examples 8 of 8"),
        (train_ppo, ["--critic", "none"], "--critic"),
        (train_ppo, ["--gamma", "1.1"], "--gamma"),
        (evaluate, ["--samples", "4"], "--samples above 1 needs --temperature"),
        (evaluate, ["--split", "validation", "--n", "9"], "would be 9 of these 8 problems"),
        (evaluate, ["--shots", "2"], "--shots"),
        (evaluate, ["--ask", " "], "--ask needs a question"),
        (evaluate, ["--compare", "a", "b"], "--compare A B compares two runs: leave out"),
    ],
)  # fmt: skip
def test_flags_that_contradict_each_other_or_the_data(script, argv, says, place):
    refused(script, [*usual(script, place), *argv], says)


def test_runs_to_compare_that_are_not_there(place):
    refused(evaluate, ["--compare", "a", "b"], "there is no a")


# -------------------------------------------------------------------------------- models and places


@SCRIPTS
@pytest.mark.parametrize(
    "model, says",
    [
        ("no/such/folder", "no such folder"),
        ("x" * 300, "no such folder"),
        ("runs/sft-lora-mine", "train it first|PPO starts from"),
        ("a/model-nobody-has", "HF_HUB_OFFLINE"),
        ("../good.jsonl", "is a file"),
        (".", "is not a model"),
    ],
)
def test_models_that_are_not_there(script, model, says, place):
    refused(script, usual(script, place, model), says)


@SCRIPTS
def test_gsm8k_that_is_not_there(script, place):
    argv = [*usual(script, place), "--data", "main", "--data-dir", str(place)]
    refused(script, argv, "(train|test).jsonl")


@SCRIPTS
@pytest.mark.parametrize("flag", ["--out", "--data", "--data-dir", "--device", "--base", "MODEL"])
def test_an_empty_value_is_not_the_default(script, flag, place):
    """`--out $RUN`, where RUN was never set."""
    flag = START[script] if flag == "MODEL" else flag
    refused(script, [*usual(script, place), flag, ""], f"{flag} is empty")


@SCRIPTS
@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "no problems in it"),
        (b"\n \n", "no problems in it"),
        (b"{", "line 1: not a JSON object"),
        (b'{"question": "1?"}', "line 1: not a JSON object"),
        (b'{"question": 1, "answer": "#### 1"}', "line 1: not a JSON object"),
        (b'{"question": "1?", "answer": "one"}', 'line 1: the answer has no "#### number"'),
        (b'\xff\xfe{"question"', "not UTF-8"),
        (b"[" * 100_000, "line 1: not a JSON object"),
    ],
)
def test_files_without_problems(script, content, says, place):
    (place / "bad.jsonl").write_bytes(content)
    refused(script, [*usual(script, place), "--data", str(place / "bad.jsonl")], says)


@SCRIPTS
def test_a_folder_that_is_not_a_run_folder_is_left_alone(script, place):
    """A file in its place, and for training a folder with something else in it."""
    (place / "file").write_text("mine")
    refused(script, [*usual(script, place), "--out", str(place / "file")], str(place / "file"))
    if script is not evaluate:
        refused(script, [*usual(script, place), "--out", str(place)], "not a run folder")
    assert (place / "file").read_text() == "mine"


@SCRIPTS
@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_named(script, place):
    (place / "fixed").mkdir(mode=0o555)
    refused(script, [*usual(script, place), "--out", str(place / "fixed/run")], "fixed")


@SCRIPTS
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux has such a folder")
def test_a_folder_that_only_looks_writable_is_named(script, place):
    refused(script, [*usual(script, place), "--out", "/proc/run"], "/proc/run")


# ------------------------------------------------------------------------------ files made to harm


def copy_of(name, place) -> Path:
    shutil.copytree(FIXTURES / name, place / "model")
    return place / "model"


def header(tensors: dict, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


EMBEDDING = "model.embed_tokens.weight"
HOSTILE = {
    "nothing at all": b"",
    "a length and nothing else": struct.pack("<Q", 8),
    "a header longer than any memory": struct.pack("<Q", 2**63),
    "a header that is not JSON": struct.pack("<Q", 4) + b"spam",
    "a shape larger than its bytes": header(
        {EMBEDDING: {"dtype": "F32", "shape": [384, 24], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "a shape that would fill any memory": header(
        {EMBEDDING: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "a shape whose product overflows": header(
        {EMBEDDING: {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}}
    ),
    "offsets beyond the file": header(
        {EMBEDDING: {"dtype": "F32", "shape": [1], "data_offsets": [2**40, 2**40 + 4]}}, b"\0" * 4
    ),
    "offsets that run backwards": header(
        {EMBEDDING: {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4
    ),
    "two tensors on the same bytes": header(
        {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a", "b")}, b"\0" * 4
    ),
    "another model's tensors": header(
        {"lstm": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93",
}  # fmt: skip


@SCRIPTS
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_are_one_line(script, kind, place):
    model = copy_of("gemma3", place)
    (model / "model.safetensors").write_bytes(HOSTILE[kind])
    argv = usual(script, place, str(model))
    refused(script, argv, "model.safetensors")


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../model.safetensors", "a/b.safetensors", "x.bin"]
)
def test_an_index_that_points_elsewhere_is_refused(target, place):
    model = copy_of("gemma3", place)
    (model / "model.safetensors").unlink()
    index = {"weight_map": {EMBEDDING: target}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(evaluate, usual(evaluate, place, str(model)), "not the plain name")


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("config.json", "", "config.json"),
        ("config.json", "[" * 100_000, "config.json"),
        ("config.json", "[]", "config.json"),
        ("config.json", '{"model_type": "gemma"}', "missing field"),
        ("tokenizer.json", "", "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
    ],
)
def test_a_folders_own_files_are_checked(name, content, says, place):
    model = copy_of("gemma3", place)
    (model / name).write_text(content)
    for script in START:
        refused(script, usual(script, place, str(model)), says)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(place):
    model = copy_of("gemma3", place)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    weights = load_file(model / "model.safetensors")
    weights[EMBEDDING] = weights[EMBEDDING][:5].clone()
    save_file(weights, model / "model.safetensors")
    refused(evaluate, usual(evaluate, place, str(model)), "vocabulary")


def stored_as(dtype):
    return lambda name, t: {name: t.to(dtype) if "proj" in name else t}


def renamed(before: str, after: str):
    return lambda name, t: {name.replace(before, after, 1): t}


@pytest.mark.parametrize(
    "change, says",
    [
        (stored_as(torch.int8), "down_proj.weight is int8; quantised weights"),
        (stored_as(torch.float8_e4m3fn), "is float8_e4m3fn; quantised weights"),
        (renamed("model", "_orig_mod.model"), "saved from a compiled model"),
        (renamed("model", "module.model"), "saved from a wrapped model"),
        (renamed("model", "language_model.model"), "part of a multimodal model"),
        (renamed("model.norm.weight", "v_head.summary.weight"), "value head, as TRL's"),
        (renamed("model.norm.weight", "score.weight"), "a classifier's"),
        (renamed("down_proj.weight", "down_proj.qweight"), "is quantised"),
        (renamed("down_proj.weight", "down_proj.lora_A.weight"), "is an adapter's"),
        (renamed("model.norm", "model.final_norm"), "that this model does not have"),
    ],
)
def test_weights_as_other_tools_leave_them_are_refused_with_the_reason(change, says, place):
    """A tensor of 8 bits would load as a number without its scale, and give other answers."""
    model = copy_of("gemma3", place)
    weights = load_file(model / "model.safetensors")
    changed = {k: v for name, t in weights.items() for k, v in change(name, t).items()}
    save_file(changed, model / "model.safetensors")
    refused(evaluate, usual(evaluate, place, str(model)), says)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"architectures": ["Gemma3TextForSequenceClassification"]}, "not a language model"),
        ({"architectures": ["Gemma3TextModel"]}, "not a language model"),  # EmbeddingGemma
        ({"architectures": [3]}, "config.json"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ({"is_causal": False}, "is_causal is False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map is"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "are both set"),
    ],
)
def test_configs_of_other_models_are_refused(change, says, place):
    model = copy_of("gemma3", place)
    config = json.loads((model / "config.json").read_text()) | change
    (model / "config.json").write_text(json.dumps(config))
    refused(evaluate, usual(evaluate, place, str(model)), says)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"r": 0}, "has r 0"), ({"r": "eight"}, "has r 'eight'"), ({"r": 8.0}, "has r 8.0"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000"), ({"lora_alpha": 0}, "lora_alpha 0"),
        ({"r": 10**30}, "has r 1000"), ({"lora_alpha": -4}, "lora_alpha -4"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"), ({"lora_alpha": None}, "lora_alpha None"),
        ({"x\ny": 1}, "has x y 1, which is not supported"),  # one line
        ({"r": 3}, "made for another one"), ({"peft_type": "IA3"}, "'IA3'; only LORA is supported"),
        ({"base_model_name_or_path": 7}, "does not name its base"),
        ({"base_model_name_or_path": "no/such/folder"}, "no such folder"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(change, says, place):
    adapter = place / "adapter"
    adapter.mkdir()
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": MODEL,
        "bias": "none",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.zeros(4, 24),
        f"{name}.lora_B.weight": torch.zeros(64, 4),
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    for script in (train_ppo, evaluate):
        refused(script, usual(script, place, str(adapter)), says)


# ------------------------------------------------------------------------------ as they are started


@pytest.mark.parametrize(
    "command, says",
    [
        (["train_sft.py", "--lorra"], "unrecognized arguments: --lorra"),
        (["train_ppo.py"], "no runs/sft-full-main yet"),
        (["evaluate.py", "--model", "\x1b[31mred"], r"no such folder: '\x1b[31mred'"),
    ],
)
def test_status_2_and_one_printable_line_on_stderr(command, says, place):
    argv = [sys.executable, str(ROOT / command[0]), *command[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr
    assert "\x1b" not in done.stderr and not list(Path().iterdir())
