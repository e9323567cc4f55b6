"""The embedded model: its tokenizer, its pretraining and the text of it, and --tiny."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys

import pytest
import torch
from conftest import FIXTURES, slow
from safetensors.torch import load_file

import evaluate
import train_ppo
import train_sft
from experiments import pretrain_tiny as pretrain
from nanogsm import data
from nanogsm.data import Prompt, encode
from nanogsm.model import load_model
from nanogsm.run import flags
from nanogsm.store import hub
from nanogsm.tiny.problems import LIMIT, sample

TRAIN, SOCRATIC = (data.load_problems(name, "train") for name in ("tiny", "tiny-socratic"))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


# -------------------------------------------------------------------------------------- tokenizer


def test_every_text_is_decoded_as_it_was_and_every_digit_is_a_token(tiny):
    _, tokenizer = tiny
    texts = [f" {p.question} {p.answer}" for p in TRAIN[:500] + SOCRATIC[:500]]
    texts += [data.INSTRUCTION, "caf\u00e9 \u6771\u4eac\n\n\n  two  spaces\ttab", "<eos> is text"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids) > 5  # nothing unknown, nothing special
    assert len(tokenizer.encode("1234567890")) == 10
    assert len(set(map(tuple, map(tokenizer.encode, "0123456789")))) == 10


def test_words_of_problems_and_prompts_are_single_tokens(tiny):
    _, tokenizer = tiny
    texts = [*(f"{p.question} {p.answer}" for p in TRAIN), "Question: Answer:\n" + data.INSTRUCTION]
    text = " ".join(texts)
    words = set(re.findall(r" ([A-Za-z]+)", text)) | {"####", "<<", "**"}
    split = {word for word in words if len(tokenizer.encode(f" {word}")) > 1}
    assert len(words) > 150 and not split


def test_the_prompt_is_a_prefix_and_one_text_encodes_as_its_two_parts(tiny):
    _, tokenizer = tiny
    for p in TRAIN[:300] + SOCRATIC[:300]:
        prompt, _ = encode(tokenizer, Prompt(), p.question)
        ids, mask = encode(tokenizer, Prompt(), p.question, p.answer)
        assert ids[: len(prompt)] == prompt and sum(mask) == len(ids) - len(prompt)
        whole = tokenizer.encode(f"Question: {p.question}\nAnswer: {p.answer}")
        assert ids == [tokenizer.bos_id, *whole, tokenizer.eos_id]


def test_no_answer_is_longer_than_may_be_generated(tiny):
    _, tokenizer = tiny
    for name in data.GENERATED:
        for split in ("train", "test"):
            answers = [p.answer for p in data.load_problems(name, split)]
            longest = max(len(tokenizer.encode(f" {a}")) + 1 for a in answers)  # EOS is one more
            assert longest <= data.answer_limit(name)


# ------------------------------------------------------------------------------------------ model


def test_the_model_is_a_small_gemma_of_under_five_megabytes(tiny):
    model, tokenizer = tiny
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 2_000_000
    assert sum(f.stat().st_size for f in hub.EMBEDDED.iterdir()) < 5_000_000
    assert model.config.vocab_size == tokenizer._tokenizer.get_vocab_size()
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}


def test_logits_and_ids_equal_those_of_transformers(tiny):
    model, tokenizer = tiny
    want = load_file(FIXTURES / "tiny.safetensors")
    rows = json.loads((FIXTURES / "tiny_texts.json").read_text())
    for row, ids, length, logits in zip(rows, want["ids"], want["lengths"], want["logits"]):
        ids = ids[:length]
        assert [tokenizer.bos_id, *tokenizer.encode(row)] == ids.tolist()
        with torch.no_grad():
            ours = model.logits(model(ids[None]))[0]
        assert (ours - logits[:length]).abs().max() <= 2e-5
    assert want["lengths"].max() > model.config.sliding_window


# ------------------------------------------------------------------------------------ pretraining


def test_sums_are_right_and_small():
    rng, seen = random.Random(1), set()
    for _ in range(2000):
        line = pretrain._sum(rng)
        a, operation, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+) = (\d+)", line).groups()
        a, b, result = int(a), int(b), int(result)
        exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operation]
        assert exact == result and max(a, b, result) <= LIMIT and result >= 2
        seen.add(operation)
    assert seen == set("+-*/")


def test_the_text_shows_no_working_after_answer_and_has_no_test_question():
    rng, found = random.Random(2), set()
    left_out = {p.question for p in data.load_problems("tiny", "test")}
    pages = [pretrain.document(rng, left_out) for _ in range(3000)]
    for page in pages:
        assert not re.search(r"####\s*\d", page)
        assert page.count("Answer:") == len(re.findall(r"Answer: \d+(?=\n\n|$)", page))
        lines = [line.removeprefix("Question: ") for line in page.split("\n") if "?" in line]
        found |= {line[: line.rindex("?") + 1] for line in lines}
    assert len(found) > 2000 and not found & left_out
    assert {p.question for p in TRAIN} & found  # so the questions are cut out of the text correctly
    for mark in ("#### ", "<<", "Answer:", data.INSTRUCTION):
        assert sum(mark in page for page in pages) > 100


def test_a_problem_of_the_test_split_is_drawn_again(monkeypatch):
    first, second = sample(random.Random(4)), sample(random.Random(5))
    drawn = iter([first, first, second])
    monkeypatch.setattr(pretrain.problems, "sample", lambda rng: next(drawn))
    assert pretrain._problem(random.Random(3), {first.question}) == second


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """run(name, *flags): pretrain.main with a small model and few, short rows. Returns the status
    and the weights that were written, or None."""
    monkeypatch.setattr(pretrain, "ROWS", 2)
    monkeypatch.setattr(pretrain, "ROW_TOKENS", 32)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    layers = {"layer_types": pretrain.CONFIG["layer_types"][:2]}
    monkeypatch.setattr(pretrain, "CONFIG", pretrain.CONFIG | small | layers)
    tokenizer = hub.EMBEDDED / "tokenizer.json"  # the same that make_tokenizer writes, see below
    monkeypatch.setattr(pretrain, "make_tokenizer", lambda file: shutil.copy(tokenizer, file))

    def run(name, *flags):
        status = pretrain.main(["--steps", "6", "--out", str(tmp_path / name), *flags])
        model = tmp_path / name / "model" / "model.safetensors"
        return status, load_file(model) if model.exists() else None

    return run


def test_pretraining_continues_bit_for_bit(quick, monkeypatch, capsys):
    status, whole = quick("whole")
    assert status == 0
    real = pretrain.rows_of_step

    def interrupted(tokenizer, seed, step, left_out):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(tokenizer, seed, step, left_out)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "rows_of_step", interrupted)
        status, model = quick("parts")
    assert status == 143 and model is None
    status, model = quick("parts")
    assert status == 0 and "continuing" in capsys.readouterr().out
    assert all(torch.equal(model[name], whole[name]) for name in whole)
    with monkeypatch.context() as patch:  # killed between the last step and the end
        patch.setattr(pretrain, "save_model", lambda *_: sys.exit(1))
        patch.setattr(pretrain, "SAVE_EVERY", 3)
        with pytest.raises(SystemExit):
            quick("late")
    assert quick("late")[0] == 0
    _, other = quick("other", "--seed", "1")
    assert not torch.equal(other["model.norm.weight"], whole["model.norm.weight"])


def test_the_committed_tokenizer_and_config_are_the_ones_that_are_made(tmp_path):
    pretrain.make_base(tmp_path)
    for file in tmp_path.iterdir():
        committed = (hub.EMBEDDED / file.name).read_text()
        assert json.loads(file.read_text()) == json.loads(committed), file.name


# ----------------------------------------------------------------------------------------- --tiny


def test_tiny_sets_model_data_rates_and_folder_and_a_flag_still_wins():
    args = train_sft.parse_args(["--tiny", "--recipe", "original"])
    assert (args.model, args.data, args.lr, args.precision) == ("tiny", "tiny", 1e-3, "fp32")
    assert args.micro_batch * args.accumulation == 16  # as for the large model
    assert args.out == "runs/tiny/sft-full-main" and args.max_new_tokens == 128
    given = ["--lora", "--data", "socratic", "--lr", "3e-4", "--micro-batch", "4"]
    args = train_sft.parse_args(["--tiny", *given])
    assert (args.data, args.lr, args.micro_batch) == ("tiny-socratic", 3e-4, 4)
    assert args.out == "runs/tiny/sft-lora-socratic"
    large = flags.recipe(flags.SFT, "original")["lr"]
    tiny = flags.recipe(flags.SFT, "original", flags.SFT_TINY)["lr"]
    assert math.isclose(tiny[0] / large[0], tiny[1] / large[1])  # full, with --lora


def test_a_tenth_of_a_small_file_is_held_out_by_default(tmp_path, capsys):
    rows = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(25)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--tiny", "--data", str(tmp_path / "mine.jsonl"), "--dry-run"]
    for main, start in ((train_sft.main, []), (train_ppo.main, ["--init", "tiny"])):
        assert main([*argv, *start]) == 0
        assert "2 held out" in capsys.readouterr().out
        assert main([*argv, *start, "--val-examples", "0"]) == 0
        assert "0 held out" in capsys.readouterr().out


def test_a_run_of_the_embedded_model_implies_tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/mine"
    run.mkdir(parents=True)
    args = {"val_examples": 9, "tiny": True, "data": "tiny"}
    record = {"args": args, "info": {"prompt": Prompt().settings()}}
    (run / "run_args.json").write_text(json.dumps(record))
    for args in (
        train_sft.parse_args(["--model", "runs/mine"]),
        train_ppo.parse_args(["--init", "runs/mine"]),
        evaluate.parse_args(["--model", "runs/mine"]),
        evaluate.parse_args(["--model", "tiny"]),
    ):
        assert (args.tiny, args.data, args.precision) == (True, "tiny", "fp32")
    assert train_ppo.parse_args(["--init", "runs/mine"]).val_examples == 9


def test_generated_problems_do_not_overwrite_results_on_gsm8k():
    names = [
        evaluate.resolve(evaluate.parse_args(["--model", "some/model", "--n", "256", *more]))[2]
        for more in ([], ["--tiny"], ["--tiny", "--data", "socratic"])
    ]
    assert len(set(names)) == 3
    tiny = evaluate.parse_args(["--tiny"])
    assert evaluate.resolve(tiny)[2] == "eval-test-1319"


@slow
def test_tiny_trains_and_is_evaluated_as_a_newcomer_would(tmp_path, monkeypatch, capsys):
    """The README's commands, shortened to half a minute: the loss falls, and the model learns the
    format."""
    monkeypatch.chdir(tmp_path)
    argv = "--tiny --lora --epochs 1 --lr 0.01 --max-examples 640 --val-examples 32".split()
    assert train_sft.main([*argv, "--device", "cpu"]) == 0
    trained = ["--model", "runs/tiny/sft-lora-main", "--device", "cpu"]
    run = tmp_path / "runs/tiny/sft-lora-main"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert evaluate.main([*trained, "--n", "64"]) == 0
    summary = json.loads((run / "eval-test-64.json").read_text())
    assert summary["data"] == "tiny" and summary["formatted"] > 0.5
    assert evaluate.main(["--tiny", "--n", "64", "--device", "cpu"]) == 0
    untuned = tmp_path / "runs/tiny/eval-tiny-plain-one-shot-instruction/eval-test-64.json"
    assert json.loads(untuned.read_text())["accuracy"] <= 0.1
    capsys.readouterr()
    evaluate.main([*trained, "--ask", TRAIN[0].question])
    openings = ("The", TRAIN[0].question.split()[0], "Each", "Altogether")
    assert capsys.readouterr().out.startswith(openings)
    page = (hub.EMBEDDED.parents[2] / "README.md").read_text("utf-8")
    snippet = re.search(r"```python\n(from nanogsm import.*?)```", page, re.DOTALL)
    exec(snippet[1], {})
    assert capsys.readouterr().out.endswith((".0\n", "None\n"))
