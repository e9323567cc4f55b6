"""evaluate.py: prompts and file names, the whole script on the fixture model, and the comparison of
two hand-made evaluations."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

import evaluate
from evaluate import main, parse_args, resolve
from nanogsm import UserError, data, generate
from nanogsm.data import Problem, Prompt
from nanogsm.generate import Completion
from nanogsm.report.eval_files import read_rows
from nanogsm.run import eval_data
from nanogsm.run.past import run_of

GEMMA = Path(__file__).parent / "fixtures" / "gemma3"
FLOAT64_ROUNDING = 1e-12
QUESTIONS = [("How many clips?", 72), ("Half of 24?", 12), ("3 boxes of 12?", 36), ("Minus 5?", -5)]
# The result of `flags` below with --out. An untuned model's prompt and the limit are in the name.
NAME = "eval-mine-4-plain-one-shot-instruction-max6"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Results without --out go to runs/ below the current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("NANOGSM_DATA_DIR", raising=False)


@pytest.fixture
def mine(tmp_path) -> str:
    rows = [{"question": q, "answer": f"So it is {n}.\n#### {n}"} for q, n in QUESTIONS]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_folder(folder: Path, prompt: dict, model=False, val_examples=8, data="main") -> str:
    """What a training run leaves: its prompt, its data, how many problems it held out, and its
    model if the test loads it."""
    folder.mkdir(parents=True)
    record = {"args": {"val_examples": val_examples, "data": data}, "info": {"prompt": prompt}}
    (folder / "run_args.json").write_text(json.dumps(record))
    if model:
        shutil.copytree(GEMMA, folder / "model")
    return str(folder)


def flags(mine, out=None, model=GEMMA, **more) -> list[str]:
    given = {"model": model, "data": mine, "n": 4, "max_new_tokens": 6, "device": "cpu"}
    given |= {"precision": "fp32", "out": out} | more
    return [
        text
        for key, value in given.items()
        if value is not None
        for text in (f"--{key.replace('_', '-')}", str(value))
    ]


def read(folder: Path, name: str) -> tuple[dict, list[dict]]:
    """(summary, rows) as written."""
    summary = json.loads((folder / f"{name}.json").read_text())
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines]


# Prompt and file names


@pytest.mark.parametrize("below", ["", "model", "adapter"])
def test_a_run_is_found_from_its_folder_and_from_what_is_in_it(tmp_path, below):
    run = Path(run_folder(tmp_path / "run", {"style": "chat", "shots": 0, "instruction": True}))
    (run / below).mkdir(exist_ok=True)
    folder, record = run_of(str(run / below))
    assert folder == run and record["args"]["val_examples"] == 8
    prompt, folder, name = resolved("--model", str(run / below), "--n", "8")
    assert (prompt, folder, name) == (Prompt("chat", 0, True), str(run), "eval-test-8")
    assert run_of(f"{run / below}/")[0] == run


def test_what_has_no_record_of_a_run_is_none(tmp_path):
    run = run_folder(tmp_path / "run", Prompt().settings())
    assert run_of("google/gemma-2b-it") is None
    assert run_of(str(tmp_path)) is None
    assert run_of(str(Path(run, "model", "deeper"))) is None


def resolved(*argv) -> tuple[Prompt, str, str]:
    prompt, folder, name = resolve(parse_args(list(argv)))
    return prompt, folder.as_posix(), name


def test_untuned_model_is_asked_with_one_shot_and_instruction():
    folder = "runs/eval-google--gemma-2b-it-plain-one-shot-instruction"
    assert resolved("--n", "8") == (Prompt("plain", 1, True), folder, "eval-test-8")


def test_untuned_models_other_prompts_have_other_folders():
    assert resolved("--n", "8", "--shots", "0", "--no-instruction", "--style", "chat") == (
        Prompt("chat", 0, False),
        "runs/eval-google--gemma-2b-it-chat-zero-shot",
        "eval-test-8",  # the folder's name has the prompt
    )
    found = {
        resolved("--style", style, "--shots", shots, instruction)[1]
        for style in ("plain", "chat")
        for shots in ("0", "1")
        for instruction in ("--instruction", "--no-instruction")
    }
    assert len(found) == 8


@pytest.mark.parametrize(
    "model, named",
    [
        ("google/gemma-2b-it", "google--gemma-2b-it"),
        ("unsloth/gemma-2b-it", "unsloth--gemma-2b-it"),  # another owner's is another model
        ("models/gemma/", "models--gemma"),
        ("/models/gemma", "models--gemma"),
        ("gemma", "gemma"),
    ],
)
def test_untuned_models_folder_has_the_whole_name_in_it(model, named):
    tag = "plain-one-shot-instruction"
    assert resolved("--model", model)[1] == f"runs/eval-{named}-{tag}"


def test_tilde_in_the_models_name_is_the_home_folder(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    run = run_folder(tmp_path / "run", Prompt().settings())
    assert resolved("--model", "~/run", "--n", "8") == (Prompt(), run, "eval-test-8")


def test_run_is_asked_as_it_was_trained_and_results_go_to_its_folder(tmp_path):
    run = run_folder(tmp_path / "run", {"style": "chat", "shots": 0, "instruction": True})
    own = (Prompt("chat", 0, True), run, "eval-test-8")
    assert resolved("--model", run, "--n", "8") == own
    # giving the run's own settings as flags changes nothing
    same = ("--style", "chat", "--shots", "0", "--instruction")
    assert resolved("--model", run, "--n", "8", *same) == own


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--n", "9"], "eval-test-9"),
        (["--split", "validation"], "eval-validation-8"),
        (["--data", "socratic"], "eval-test-8-socratic"),
        (["--data", "socratic", "--split", "validation"], "eval-validation-8-socratic"),
        (["--data", "there/mine.jsonl"], "eval-mine-8"),
        (["--data", "there/mine.jsonl", "--split", "validation"], "eval-mine-validation-8"),
        (["--shots", "1"], "eval-test-8-plain-one-shot"),
        (["--instruction"], "eval-test-8-plain-zero-shot-instruction"),
        (["--style", "chat"], "eval-test-8-chat-zero-shot"),
        (["--temperature", "0.7"], "eval-test-8-1x-t0.7-seed0"),
        (["--temperature", "1", "--samples", "4", "--seed", "3"], "eval-test-8-4x-t1-seed3"),
        (["--max-new-tokens", "64"], "eval-test-8-max64"),
        (
            ["--data", "socratic", "--style", "chat", "--temperature", "0.7"]
            + ["--max-new-tokens", "64"],
            "eval-test-8-socratic-chat-zero-shot-1x-t0.7-seed0-max64",
        ),
        (["--seed", "3"], "eval-test-8"),  # greedy: the seed has no effect
        (["--batch-size", "2"], "eval-test-8"),
    ],
)
def test_what_is_not_the_runs_own_evaluation_is_named_in_the_file(tmp_path, argv, name):
    run = run_folder(tmp_path / "run", Prompt().settings())
    assert resolved("--model", run, "--n", "8", *argv)[1:] == (run, name)


def test_out_chooses_the_folder_and_an_untuned_models_prompt_is_named_there(tmp_path):
    run, there = run_folder(tmp_path / "run", Prompt().settings()), ["--n", "8", "--out", "there"]
    assert resolved("--model", run, *there)[1:] == ("there", "eval-test-8")
    assert resolved("--model", run, "--shots", "1", *there)[2] == "eval-test-8-plain-one-shot"
    # in that folder only the name tells one prompt's result from another's
    assert resolved(*there)[1:] == ("there", "eval-test-8-plain-one-shot-instruction")
    assert resolved("--shots", "0", *there)[2] == "eval-test-8-plain-zero-shot-instruction"


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{",
        "[]",
        '{"args": {"val_examples": 8}, "info": {}}',
        '{"args": {"val_examples": 8}, "info": {"prompt": 3}}',
        '{"args": {"val_examples": 8}, "info": {"prompt": {"style": "chat", "colour": 1}}}',
        '{"args": {}, "info": {"prompt": {"style": "chat"}}}',
        '{"info": {"prompt": {"style": "chat"}}}',
    ],
)
def test_a_folder_without_a_runs_record_is_an_untuned_model(tmp_path, record):
    (tmp_path / "run_args.json").write_text(record)
    assert run_of(str(tmp_path)) is None
    assert resolved("--model", str(tmp_path))[0] == Prompt("plain", 1, True)


def test_test_split_is_sampled_and_validation_is_what_training_held_out(monkeypatch):
    everything, calls = [Problem(f"q{i}", "#### 1", i) for i in range(40)], []

    def load_problems(*given):
        calls.append(given)
        return everything

    monkeypatch.setattr(data, "load_problems", load_problems)
    test = eval_data.choose_problems(parse_args(["--n", "7"]))
    assert test == data.subset(everything, 7)
    validation = eval_data.choose_problems(parse_args(["--n", "7", "--split", "validation"]))
    assert validation == data.split_validation(everything, 7)[1]
    assert calls == [("main", "test", None, False), ("main", "train", None, False)]


@pytest.mark.parametrize("below", ["", "model"])
def test_validation_of_a_run_is_exactly_what_it_held_out(tmp_path, monkeypatch, below):
    everything = [Problem(f"q{i}", "#### 1", i) for i in range(40)]
    monkeypatch.setattr(data, "load_problems", lambda *_: everything)
    run = run_folder(tmp_path / "run", Prompt().settings(), val_examples=8)

    def chosen(*argv):
        return eval_data.choose_problems(parse_args(["--model", str(Path(run, below)), *argv]))

    assert chosen("--split", "validation", "--n", "8") == data.split_validation(everything, 8)[1]
    for n in ("7", "9"):
        with pytest.raises(UserError, match=f"held out 8 problems, not {n}: "):
            chosen("--split", "validation", "--n", n)
    assert len(chosen("--split", "validation")) == 8
    halves = [chosen("--split", "validation", "--part", f"{k}/2") for k in (1, 2)]
    assert [len(half) for half in halves] == [4, 4]
    both = sorted(halves[0] + halves[1], key=lambda problem: problem.index)
    assert both == data.split_validation(everything, 8)[1]
    args = parse_args(["--model", str(run), "--split", "validation", "--part", "2/2"])
    args.n = 4  # as evaluate sets it
    assert evaluate.resolve(args)[2] == "eval-validation-4-part2of2"
    for flags, says in [(["--split", "validation", "--part", part],
                         f"--part: give K/N, K from 1 to N, not '{part}'")
                        for part in ("3/2", "0/2", "x", "1", "1/2/3")] + [
        (["--part", "1/2"], "--part is for --split validation"),
        (["--split", "validation", "--part", "1/9"], "--part 1/9: only 8 problems are held out"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=says):
            chosen(*flags)
    assert len(chosen("--n", "7")) == 7  # on the test split any number is allowed
    run = run_folder(tmp_path / "other", Prompt().settings(), val_examples=0)
    with pytest.raises(UserError, match="held out no problems to ask"):
        chosen("--split", "validation")


# Flags


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n", "0"], "--n is 0"),
        (["--samples", "0"], "--samples is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "inf"], "--temperature is inf"),
        (["--temperature", "1e-42"], "--temperature is 1e-42"),  # logits / 1e-42 overflow
        (["--temperature", "0.009"], "--temperature is 0.009"),
        (["--temperature", "101"], "--temperature is 101"),
        (["--samples", "2"], "--samples above 1 needs --temperature"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", str(2**31)], f"--seed is {2**31}: give at most"),
        (["--seed", "1" + "0" * 30], "--seed is 1000"),
        (["--ask", ""], "--ask is empty"),
        (["--ask", "Why?", "--n", "3"], "--ask answers your own questions: leave out --n"),
        (["--ask", " \t"], "--ask needs a question"),
        (["--compare", "a", "b"], "--compare A B compares two runs: leave out"),
        (["--ask", "caf\udce9"], "not UTF-8"),
        (["--out", "x" * 300], "cannot write to"),
        (["--data", "mian"], "--data mian"),
        (["--data", "none.jsonl"], "cannot read none.jsonl"),
        (["--device", "abacus"], "--device abacus"),
        (["--split", "validation"], "validation would be 4 of these 4 problems"),
    ],
)
def test_bad_flags_are_user_errors_and_nothing_is_written(mine, tmp_path, argv, message):
    with pytest.raises(UserError) as error:
        main(flags(mine, tmp_path / "out") + argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_data_file_with_a_long_name_has_a_result_with_a_shorter_one(mine, tmp_path):
    long = tmp_path / f"{'x' * 240}.jsonl"
    long.write_bytes(Path(mine).read_bytes())
    assert main(flags(str(long), tmp_path / "out")) == 0
    assert len([*(tmp_path / "out").glob(f"eval-{'x' * 60}-*")]) == 2


def test_a_model_that_is_not_there_leaves_no_result(mine, tmp_path):
    with pytest.raises(UserError, match="no such folder: './none'"):
        main(flags(mine, tmp_path / "out", model="./none"))
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_that_cannot_be_is_refused_before_the_model_is_loaded(mine, tmp_path, monkeypatch):
    loaded, before = [], Path(mine).read_bytes()
    monkeypatch.setattr(evaluate, "load_model", lambda *given, **_: loaded.append(given))
    for out in (mine, str(Path(mine) / "below")):
        with pytest.raises(UserError, match=f"^cannot write to {re.escape(out)}: "):
            main(flags(mine, out))
    assert not loaded and Path(mine).read_bytes() == before


@pytest.mark.parametrize("argv", [["--shots", "9"], ["--n", "many"], ["--style", "verse"], ["--compare", "one"]])
def test_values_outside_the_choices_are_refused_by_the_parser(argv):
    with pytest.raises(UserError, match=argv[0]):
        parse_args(argv)


@pytest.mark.parametrize(
    "argv", [["runs/mine"], ["--n", "8", "runs/mine"], ["runs/mine", "--tiny"]]
)
def test_a_run_may_be_given_without_its_flag(argv):
    assert parse_args(argv).model == "runs/mine"
    with pytest.raises(UserError, match="two models, runs/mine and --model runs/other: give one"):
        parse_args([*argv, "--model", "runs/other"])
    with pytest.raises(UserError, match="unrecognized arguments: (--what 3|too) "):
        parse_args(["runs/mine", *(["too"] if argv[1:] else ["--what", "3"])])


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    flags_there_are = (
        "model n split data data-dir shots instruction style samples temperature max-new-tokens "
        "batch-size seed out ask compare device precision"
    )
    for flag in flags_there_are.split():
        assert f"--{flag} " in shown or f"--{flag}," in shown or f"--{flag}]" in shown, flag


# The whole script


def test_evaluation_of_the_fixture_writes_a_summary_and_a_row_per_problem(mine, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(flags(mine, out)) == 0
    assert sorted(p.name for p in out.iterdir()) == [f"{NAME}.json", f"{NAME}.jsonl"]
    summary, rows = read(out, NAME)
    contract = {"n", "correct", "accuracy", "ci_low", "ci_high", "flexible_accuracy", "truncated",
                "tokens_per_s", "seed", "indices", "prompt", "model"}  # fmt: skip
    assert contract <= summary.keys()
    assert (summary["n"], summary["indices"], summary["seed"]) == (4, [0, 1, 2, 3], 0)
    assert summary["model"] == str(GEMMA)
    assert summary["prompt"] == {"style": "plain", "shots": 1, "instruction": True}
    assert summary["tokens_per_s"] > 0
    assert [r["index"] for r in rows] == [0, 1, 2, 3]
    assert [r["gold"] for r in rows] == [72, 12, 36, -5]
    for r, (question, _) in zip(rows, QUESTIONS):
        assert r["question"] == question
        assert 1 <= r["tokens"] <= 6 and (r["truncated"] is False or r["tokens"] == 6)
    shown = capsys.readouterr().out
    assert "4 problems, " in shown and "; plain, one-shot, instruction, greedy" in shown
    assert "exact match" in shown and f"{NAME}.json" in shown


def answers(monkeypatch, texts: list[str], truncated: list[bool] | None = None) -> list[dict]:
    """Make the model answer with these texts. Returns a list that records every call."""
    calls, tokenizer = [], data.Tokenizer(GEMMA)

    def fake(
        model, prompts, stop_ids, max_new_tokens, batch_size, temperature=0.0, seed=0, *_, **__
    ):
        calls.append(
            {
                "prompts": [tokenizer.decode(ids) for ids in prompts],
                "limit": max_new_tokens,
                "temperature": temperature,
                "seed": seed,
            }
        )
        cuts = truncated or [False] * len(texts)
        return [Completion(tokenizer.encode(t) + [1] * (not c), c) for t, c in zip(texts, cuts)]

    monkeypatch.setattr(generate, "generate", fake)
    return calls


def test_the_summary_counts_the_models_answers(mine, tmp_path, monkeypatch):
    texts = [" 70 + 2\n#### 72", " so 12", " #### 35\nQuestion: #### 36", " 1 2 3"]
    answers(monkeypatch, texts, [False, False, False, True])
    main(flags(mine, tmp_path / "out"))
    summary, rows = read(tmp_path / "out", NAME)
    assert [r["correct"] for r in rows] == [True, False, False, False]
    assert [r["flexible"] for r in rows] == [True, True, False, False]
    assert [r["answer"] for r in rows] == [72, None, 35, None]
    assert [r["completion"] for r in rows] == texts
    # all these are single characters to the fixture's tokenizer, and the last has no end token
    assert rows[3]["tokens"] == len(" 1 2 3")
    assert (summary["correct"], summary["accuracy"]) == (1, 0.25)
    assert (summary["flexible_accuracy"], summary["truncated"]) == (0.5, 0.25)
    total = sum(r["tokens"] for r in rows)
    timed = summary["tokens_per_s"] * summary["seconds"]
    assert timed == pytest.approx(total, rel=FLOAT64_ROUNDING)


def test_prompt_settings_reach_the_model(mine, tmp_path, monkeypatch):
    calls = answers(monkeypatch, ["#### 1"] * 4)
    bare = ["--shots", "0", "--no-instruction"]
    main(flags(mine, tmp_path / "out"))
    main(flags(mine, tmp_path / "out") + bare)
    main(flags(mine, tmp_path / "out", style="chat", seed=5, temperature=0.5) + bare)
    full, zero_shot, chat = (call["prompts"][1] for call in calls)
    assert full.startswith(data.INSTRUCTION) and "#### 72\n\nQuestion: Half of 24?\nAnswer:" in full
    assert zero_shot == "Question: Half of 24?\nAnswer:"
    assert chat == "user\nHalf of 24?\nmodel\n"  # decoded without the special tokens
    assert [(c["limit"], c["temperature"], c["seed"]) for c in calls] == [
        (6, 0.0, 0),
        (6, 0.0, 0),
        (6, 0.5, 5),
    ]


def test_run_folder_is_evaluated_with_its_own_prompt_into_itself(mine, tmp_path, monkeypatch):
    run = Path(run_folder(tmp_path / "run", Prompt("chat", 0, False).settings(), model=True))
    calls = answers(monkeypatch, ["#### 72"] * 4)
    main(flags(mine, model=run))
    main(flags(mine, model=run, shots=1))
    assert [call["prompts"][0].count("user\n") for call in calls] == [1, 2]
    assert sorted(p.name for p in run.glob("eval-*.json")) == [
        "eval-mine-4-chat-one-shot-max6.json",
        "eval-mine-4-max6.json",
    ]
    assert read(run, "eval-mine-4-max6")[0]["prompt"] == Prompt("chat", 0, False).settings()


@pytest.mark.parametrize(
    "what, was", [("model", "another"), ("data", "b/mine.jsonl"), ("precision", "bf16")]
)
def test_a_result_of_another_model_data_or_precision_is_not_overwritten(mine, tmp_path, what, was):
    assert evaluate.main(flags(mine, out=tmp_path / "out")) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    summary = json.loads(path.read_text()) | {what: was}
    del summary["data_sha256"], summary["model_sha256"]  # as in earlier files: only the names
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match=f"is a result with {what} {was}: choose another --out"):
        evaluate.main(flags(mine, out=tmp_path / "out"))
    assert json.loads(path.read_text())[what] == was


def test_a_result_of_other_weights_under_the_same_name_is_not_overwritten(mine, tmp_path):
    """An adapter on another base, a run's merged model, weights replaced in their folder."""
    model = shutil.copytree(FIXTURES / "gemma3", tmp_path / "model")
    assert evaluate.main(flags(mine, model=model, out=tmp_path / "out")) == 0
    moved = shutil.move(model, tmp_path / "moved")
    assert evaluate.main(flags(mine, model=moved, out=tmp_path / "out")) == 0  # the same weights
    weights = load_file(moved / "model.safetensors")
    save_file({k: t + 1 for k, t in weights.items()}, moved / "model.safetensors")
    with pytest.raises(UserError, match="is a result with other weights: choose another --out"):
        evaluate.main(flags(mine, model=moved, out=tmp_path / "out"))


def test_a_result_of_a_file_that_has_changed_is_not_overwritten(mine, tmp_path):
    assert evaluate.main(flags(mine, out=tmp_path / "out")) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    lines = Path(mine).read_text().splitlines()
    Path(mine).write_text("\n".join([lines[0].replace("?", "??", 1), *lines[1:]]))
    with pytest.raises(UserError, match="is a result with other problems: choose another --out"):
        evaluate.main(flags(mine, out=tmp_path / "out"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    Path(mine).write_text("\n".join(lines))
    moved = shutil.move(mine, tmp_path / "out" / Path(mine).name)  # the same problems elsewhere
    assert evaluate.main(flags(moved, out=tmp_path / "out")) == 0


@pytest.mark.parametrize("damaged", ['{"mo', "[1]"])
def test_a_damaged_earlier_result_is_one_line(mine, tmp_path, damaged):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval-mine-4-plain-one-shot-instruction-max6.json").write_text(damaged)
    with pytest.raises(UserError, match="eval-mine-4.*json"):
        evaluate.main(flags(mine, out=tmp_path / "out"))


def test_fewer_problems_than_asked_for_are_counted_and_said(mine, tmp_path, monkeypatch, capsys):
    answers(monkeypatch, ["#### 72"] * 4)
    main(flags(mine, tmp_path / "out", n=5000))
    assert read(tmp_path / "out", NAME)[0]["n"] == 4  # in the name, too
    note = "note: --n is 5,000, but there are only 4 problems\n"
    assert capsys.readouterr().out.startswith(note)
    main(flags(mine, tmp_path / "out", n=4))
    assert "note:" not in capsys.readouterr().out


def test_a_run_asked_about_its_own_training_file_is_told_so(mine, tmp_path, capsys):
    run = run_folder(tmp_path / "run", Prompt().settings(), data=mine, val_examples=1)
    note = "note: the run was trained on all but 1 of these: see --split validation\n"
    eval_data.choose_problems(parse_args(["--model", run, "--data", mine, "--n", "4"]))
    assert capsys.readouterr().out == note
    eval_data.choose_problems(parse_args(["--model", run, "--data", mine, "--split", "validation"]))
    assert capsys.readouterr().out == ""


def test_a_run_on_a_file_of_its_own_is_asked_what_it_held_out(mine, tmp_path):
    run = run_folder(tmp_path / "run", Prompt().settings(), data=mine, val_examples=1)
    args = parse_args([run])
    assert (args.data, args.split, args.unscored) == (mine, "validation", False)
    assert eval_data.choose_problems(args) == data.split_validation(data.read_jsonl(Path(mine)), 1)[1]
    assert parse_args([run, "--n", "all"]).n is None  # all that were held out
    args = parse_args([run, "--data", "main"])
    assert (args.data, args.split, args.n) == ("main", "test", 256)
    none = run_folder(tmp_path / "none", Prompt().settings(), data=mine, val_examples=0)
    assert parse_args([none]).split == "test"
    with pytest.raises(UserError, match="held out no problems"):
        eval_data.choose_problems(parse_args([none, "--split", "validation"]))


def test_all_problems_are_asked_with_n_all(mine, tmp_path, capsys):
    main(flags(mine, tmp_path / "out", n="all"))
    assert "note:" not in capsys.readouterr().out
    assert read(tmp_path / "out", NAME)[0]["n"] == 4
    assert parse_args(["--tiny", "--n", "all", "--split", "validation"]).n is None


def test_worked_examples_are_the_first_problems_that_are_not_held_out(mine, tmp_path):
    everything = data.load_problems("tiny", "train")
    rest = data.split_validation(everything, 256)[0]
    prompt, folder, name = resolved("--tiny", "--shots", "5", "--n", "8")
    assert prompt.examples == tuple(rest[:5]) and prompt.shots == 5
    assert folder == "runs/tiny/eval-tiny-plain-5-shot-instruction"
    assert name.startswith("eval-test-8")
    held_out = resolved("--tiny", "--shots", "8", "--split", "validation", "--n", "9")[0]
    assert held_out.examples == tuple(data.split_validation(everything, 9)[0][:8])
    with pytest.raises(UserError, match="so none can be shown; give --split validation"):
        resolved("--data", mine, "--shots", "2")
    with pytest.raises(UserError, match="there are only 3 training problems"):
        resolved("--data", mine, "--shots", "4", "--split", "validation", "--n", "1")
    out = tmp_path / "out"
    argv = flags(mine, out, shots=2, split="validation", n=1)
    main(argv)
    [summary] = [json.loads(path.read_text()) for path in out.glob("*.json")]
    shown = data.split_validation(data.read_jsonl(Path(mine)), 1)[0][:2]
    assert summary["prompt"] == {"style": "plain", "shots": 2, "instruction": True}
    assert summary["shots_sha256"] == data.digest(shown)


def test_unscored_problems_are_answered_and_not_counted(mine, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}]}
            for q, _ in QUESTIONS]  # fmt: skip
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="--unscored is for a file of your own"):
        parse_args(["--unscored"])
    main([*flags(str(own), tmp_path / "out", samples=2, temperature=1), "--unscored"])
    said = capsys.readouterr().out
    assert "unscored      8 completions, truncated" in said and "exact" not in said
    [path] = (tmp_path / "out").glob("*.json")
    summary, found = read(tmp_path / "out", path.stem)
    assert summary["unscored"] and not {"accuracy", "maj@2", "pass@2"} & summary.keys()
    assert len(found) == 8 and {row["correct"] for row in found} == {None}
    with pytest.raises(UserError, match="its problems are unscored, so no answer is right or"):
        main(["--compare", str(path), str(path)])


def test_sampling_twice_gives_the_same_file_and_another_seed_another(mine, tmp_path):
    kept, name = {}, NAME.replace("-max6", "-2x-t1-seed{}-max6")
    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        main(flags(mine, tmp_path / folder, samples=2, temperature=1, seed=seed))
        kept[folder] = (tmp_path / folder / f"{name.format(seed)}.jsonl").read_bytes()
    assert kept["one"] == kept["two"] != kept["three"]
    summary, rows = read(tmp_path / "one", name.format(0))
    assert [r["index"] for r in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert any(a["completion"] != b["completion"] for a, b in zip(rows[::2], rows[1::2]))
    assert (summary["n"], summary["samples"], summary["temperature"]) == (4, 2, 1)
    assert {"pass@2", "maj@2"} <= summary.keys()


@pytest.mark.parametrize("temperature, seed", [("0.01", 2**31 - 1), ("100", 0)])
def test_outermost_temperatures_and_seeds_work(mine, tmp_path, temperature, seed):
    argv = flags(mine, tmp_path / "out", n=1, max_new_tokens=2, temperature=temperature, seed=seed)
    assert main(argv) == 0


def test_ask_prints_an_answer_and_writes_nothing(tmp_path, capsys):
    assert main(flags(None, n=None, ask="How many clips?")) == 0
    assert "\n-> " in capsys.readouterr().out
    assert not list((tmp_path / "here").iterdir())


def test_ask_names_the_words_the_embedded_model_has_never_seen(capsys):
    wugs = "A wug has 3 apples and a wug has 4 more. How many apples?"
    main(flags(None, n=None, model="tiny", ask=wugs))
    assert capsys.readouterr().out.startswith("note: words this model has never seen: wug\n")
    main(flags(None, n=None, model="tiny", ask="Tom has 3 apples. How many apples?"))
    assert "never seen" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, shown",
    [
        (" 70 + 2\n#### 72\nQuestion: next?", "70 + 2\n#### 72\n-> 72\n"),
        ("#### 1,234,567", "#### 1,234,567\n-> 1234567\n"),
        (" I am not sure", "I am not sure\n-> no '#### number' in it\n"),
        (" \x1b[2Jgone\n#### 1.5", "\\x1b[2Jgone\n#### 1.5\n-> 1.5\n"),
    ],
)
def test_ask_shows_the_completion_and_its_number(monkeypatch, capsys, text, shown):
    calls = answers(monkeypatch, [text])
    main(flags(None, n=None, ask="  How many clips? "))
    assert calls[0]["prompts"][0].endswith("Question: How many clips?\nAnswer:")
    assert capsys.readouterr().out == shown


def test_ask_prints_every_sample(monkeypatch, capsys):
    calls = answers(monkeypatch, [" 70 + 2\n#### 72", " I am not sure"])
    main(flags(None, n=None, ask="How many clips?", samples=2, temperature=1, seed=3))
    assert len(calls[0]["prompts"]) == 2 and len(set(calls[0]["prompts"])) == 1
    assert (calls[0]["temperature"], calls[0]["seed"]) == (1, 3)
    assert capsys.readouterr().out == (
        "--- answer 1 of 2\n70 + 2\n#### 72\n-> 72\n"
        "--- answer 2 of 2\nI am not sure\n-> no '#### number' in it\n"
    )


def test_ask_answers_each_line_of_standard_input(monkeypatch, capsys):
    calls = answers(monkeypatch, [" 70 + 2\n#### 72"])
    monkeypatch.setattr("sys.stdin", io.StringIO("First?\n\n  Second?  \nThird?"))
    main([*flags(None, n=None), "--ask"])
    asked_for = [call["prompts"][0].split("Question: ")[-1] for call in calls]
    assert asked_for == ["First?\nAnswer:", "Second?\nAnswer:", "Third?\nAnswer:"]
    assert capsys.readouterr().out == "70 + 2\n#### 72\n-> 72\n" * 3
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    main([*flags(None, n=None), "--ask"])
    assert len(calls) == 3 and capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdin", io.StringIO("a\udc80b?\n"))
    with pytest.raises(UserError, match="--ask: the question is not UTF-8 text"):
        main([*flags(None, n=None), "--ask"])


@pytest.mark.parametrize(
    "stdin, says",
    [(None, "standard input is closed"),
     (io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), "utf-8"), "the question is not UTF-8 text"),
     (open(os.devnull, "w"), "standard input cannot be read (not readable)")],
    ids=["closed", "latin-1", "not readable"],
)  # fmt: skip
def test_standard_input_that_cannot_be_read_is_one_line(monkeypatch, stdin, says):
    answers(monkeypatch, ["#### 72"])
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(UserError, match=re.escape(f"--ask: {says}")):
        main([*flags(None, n=None), "--ask"])


def test_an_answer_is_shown_while_it_is_sampled(monkeypatch, capsys):
    """Nothing that `cut` would drop is ever shown, and no half of a character."""
    tokenizer, seen = data.Tokenizer(GEMMA), []
    text = "  Ä is 3.\x1b[2J Then\n\n#### 3 \n\nQuestion:"

    def fake(model, prompts, stop_ids, limit, batch, temperature, seed, is_over):
        ids = []
        for i in tokenizer.encode(text) + tokenizer.encode(" What is"):
            ids.append(i)
            over = is_over(ids)
            seen.append(capsys.readouterr().out)
            if over:
                return [Completion(ids, False)]

    monkeypatch.setattr(generate, "generate", fake)
    main(flags(None, n=None, ask="How many clips?"))
    rest = capsys.readouterr().out
    assert "".join(seen) + rest == "Ä is 3.\\x1b[2J Then\n\n#### 3\n-> 3\n"
    assert sum(map(bool, seen)) > 5 and not any("\ufffd" in part for part in seen)


# Comparison


def result(index, correct, completion=None, gold=None) -> dict:
    return {
        "index": index,
        "question": f"What is question {index}?",
        "correct": correct,
        "gold": float(index) if gold is None else gold,
        "completion": completion or f"first line\n#### {index if correct else -1}",
    }


def write_rows(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_compare_prints_the_table_and_then_every_changed_answer_in_full(tmp_path, capsys):
    # both right 0-2; only A 3; only B 4-9; both wrong 10, 11. 50 is A's alone, 60 is B's.
    right_a, right_b = {0, 1, 2, 3, 50}, {0, 1, 2, 4, 5, 6, 7, 8, 9}
    rows_a = [result(i, i in right_a, f"A says\nof {i}") for i in [*range(12), 50]]
    rows_b = [result(i, i in right_b, f"B says\nof {i}") for i in [60, *reversed(range(12))]]
    a, b = write_rows(tmp_path / "a.jsonl", rows_a), write_rows(tmp_path / "b.jsonl", rows_b)
    assert main(["--compare", a, b]) == 0
    table, fixed = capsys.readouterr().out.split("\n=== fixed (A wrong, B right): 6 ===\n")
    fixed, broken = fixed.split("\n=== broken (A right, B wrong): 1 ===\n")
    for i in range(4, 10):
        assert (
            f"--- problem {i}, answer {i}\nWhat is question {i}?\n"
            f"[A] A says\nof {i}\n[B] B says\nof {i}\n"
        ) in fixed
    assert broken.strip() == (
        "--- problem 3, answer 3\nWhat is question 3?\n[A] A says\nof 3\n[B] B says\nof 3"
    )
    assert fixed.count("--- problem") == 6
    paths, table = table.split("\n12 problems in common\n")
    assert paths == f"A  {a}\nB  {b}"
    head, first, second, last = table.strip().splitlines()
    assert head.split() == ["B", "right", "B", "wrong"]
    assert first.split() == ["A", "right", "3", "1"]
    assert second.split() == ["A", "wrong", "6", "2"]
    # 2 * (1 + 7)/2**7
    assert last == "A 33.3%, B 75.0%: +41.7 points, exact McNemar p = 0.125"


def test_compare_shows_ten_changed_answers_of_each_kind_and_all_on_demand(tmp_path, capsys):
    a = write_rows(tmp_path / "a.jsonl", [result(i, i >= 12) for i in range(23)])
    b = write_rows(tmp_path / "b.jsonl", [result(i, i < 12) for i in range(23)])
    main(["--compare", a, b])
    fixed, broken = capsys.readouterr().out.split("=== broken")
    assert fixed.count("--- problem") == 10 and "... and 2 more: give --all to see them" in fixed
    assert broken.count("--- problem") == 10 and "... and 1 more: give --all" in broken
    main(["--compare", a, b, "--all"])
    shown = capsys.readouterr().out
    assert shown.count("--- problem") == 23 and "more: give" not in shown


def test_compare_takes_the_plainest_then_the_largest_evaluation_of_a_folder(tmp_path, capsys):
    """A newer evaluation of fewer problems does not count."""
    new = tmp_path / "run" / "eval-test-1319.jsonl"
    write_rows(new, [result(1, True)])
    for name in (
        "eval-test-16",
        "eval-test-1319-plain-one-shot",
        "eval-validation-4000",
        "metrics",
    ):
        write_rows(tmp_path / "run" / f"{name}.jsonl", [result(1, False)])
        os.utime(tmp_path / "run" / f"{name}.jsonl", (2_000_000_000, 2_000_000_000))
    other = write_rows(tmp_path / "b.jsonl", [result(1, False)])
    main(["--compare", str(tmp_path / "run"), other])
    shown = capsys.readouterr().out
    assert f"A  {new}\n" in shown and "A 100.0%, B 0.0%: -100.0 points" in shown


def test_compare_lets_no_terminal_escape_through(tmp_path, capsys):
    bad = "\x1b[2J\x1b]0;title\x07\rgone\x9b5m"
    a = write_rows(tmp_path / "a.jsonl", [result(1, True, bad) | {"question": bad}])
    b = write_rows(tmp_path / "b.jsonl", [result(1, False, bad) | {"question": bad}])
    main(["--compare", a, b])
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\x9b"} & set(shown)
    assert shown.count(r"\x1b[2J\x1b]0;title\x07\rgone\x9b5m") == 3


def test_compare_prints_large_answers_in_full(tmp_path, capsys):
    right = [result(1, True, gold=1234567.0), result(2, True, gold=0.5)]
    a = write_rows(tmp_path / "a.jsonl", right)
    wrong = [result(1, False, gold=1234567.0), result(2, False, gold=0.5)]
    b = write_rows(tmp_path / "b.jsonl", wrong)
    main(["--compare", a, b])
    shown = capsys.readouterr().out
    assert "--- problem 1, answer 1234567\n" in shown and "--- problem 2, answer 0.5\n" in shown


def test_a_line_separator_inside_a_completion_ends_no_row(tmp_path):
    row = result(1, True, "one\u2028two\x85three")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(str(path)) == (str(path), [row])


def test_the_summarys_file_stands_for_the_rows_next_to_it(tmp_path):
    path = Path(write_rows(tmp_path / "a.jsonl", [result(1, True)]))
    assert read_rows(str(path.with_suffix(".json"))) == read_rows(str(path))
    with pytest.raises(UserError, match="there is no .*b.jsonl"):
        read_rows(str(tmp_path / "b.json"))


def test_compare_refuses_what_cannot_be_paired(tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [result(1, True), result(2, True)])
    asked = result(2, True) | {"question": "What else?"}
    other = write_rows(tmp_path / "other.jsonl", [result(1, True), asked])
    with pytest.raises(
        UserError, match=r"good\.jsonl and .*other\.jsonl are about different problems"
    ):
        main(["--compare", good, other])
    apart = write_rows(tmp_path / "apart.jsonl", [result(7, True)])
    with pytest.raises(UserError, match="no problem in common"):
        main(["--compare", good, apart])
    sampled = write_rows(tmp_path / "sampled.jsonl", [result(1, True), result(1, False)])
    for pair in ([good, sampled], [sampled, good]):
        with pytest.raises(UserError, match="several samples per problem"):
            main(["--compare", *pair])


def test_compare_refuses_what_is_no_evaluation(tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [result(1, True)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no evaluation yet: python evaluate.py --model"):
        main(["--compare", good, str(tmp_path / "empty")])
    write_rows(tmp_path / "empty/eval-test-1-8x-t1-seed0.jsonl", [result(1, True)] * 8)
    with pytest.raises(UserError, match="has no evaluation with one answer to each problem yet"):
        main(["--compare", good, str(tmp_path / "empty")])
    # Names that only look like several samples: one sample, a file called so, a base called so.
    for name in ("eval-test-1-1x-t1-seed0", "eval-gsm-2x-train-validation-1", "eval-a-base-8x-t1"):
        write_rows(tmp_path / f"alone/{name}.jsonl", [result(1, True)])
        main(["--compare", good, str(tmp_path / "alone")])
        (tmp_path / f"alone/{name}.jsonl").unlink()
    write_rows(tmp_path / "empty/eval-test-1-1x-t1-seed0.jsonl", [result(1, True)])
    main(["--compare", good, str(tmp_path / "empty")])
    with pytest.raises(UserError, match="^there is no .*none.jsonl: give a run's folder"):
        main(["--compare", str(tmp_path / "none.jsonl"), good])
    for content in ("{", "[1]\n", '{"index": 1}\n', "3\n"):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match="cannot read .*bad.jsonl"):
            main(["--compare", good, str(tmp_path / "bad.jsonl")])


@pytest.mark.parametrize("key", ["index", "correct", "gold", "question", "completion"])
def test_compare_names_a_field_that_is_missing(tmp_path, key):
    good = write_rows(tmp_path / "good.jsonl", [result(1, True)])
    row = result(2, True)
    del row[key]
    bad = write_rows(tmp_path / "bad.jsonl", [result(1, True), row])
    for pair in ([good, bad], [bad, good]):
        with pytest.raises(
            UserError, match=f"an evaluation from .*bad.jsonl: a row has no '{key}'"
        ):
            main(["--compare", *pair])


@pytest.mark.parametrize(
    "key, value",
    [
        ("index", "1"),
        ("index", 1.0),
        ("index", None),
        ("correct", 1),
        ("correct", "true"),
        ("correct", None),
        ("gold", "72"),
        ("gold", None),
        ("question", 3),
        ("question", None),
        ("completion", ["72"]),
        ("completion", None),
    ],
)
def test_compare_names_a_field_of_the_wrong_type(tmp_path, key, value):
    good = write_rows(tmp_path / "good.jsonl", [result(1, True)])
    bad = write_rows(tmp_path / "bad.jsonl", [result(1, True) | {key: value}])
    wrong = re.escape(f"bad.jsonl: a row's {key} is {value!r}")
    with pytest.raises(UserError, match=f"cannot read an evaluation from .*{wrong}"):
        main(["--compare", good, bad])


def test_temperatures_that_differ_have_results_of_their_own():
    names = {
        resolve(parse_args(["--tiny", "--temperature", t, "--n", "4"]))[2]
        for t in ("0.01", "0.010000001", "1", "1.0")
    }
    assert len(names) == 3


def test_a_validation_slice_as_large_as_the_file_is_refused(mine):
    argv = ["--tiny", "--data", mine, "--split", "validation", "--n", "4"]
    with pytest.raises(UserError, match="would be 4 of these 4 problems: give --n from 1 to 3"):
        eval_data.choose_problems(parse_args(argv))
    argv = ["--tiny", "--data", mine, "--split", "validation"]  # a tenth of 4 problems is none
    with pytest.raises(UserError, match="would be 0 of these 4 problems: give --n from 1 to 3"):
        eval_data.choose_problems(parse_args(argv))
