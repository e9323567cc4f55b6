"""Labels by sampling, against slow forms; what a kill leaves; and the experiment that uses them."""

import json
import math
import os

import pytest
import torch

import evaluate
import train_ppo
import train_prm
import train_sft
from experiments import label, reward_models
from nanogsm import UserError, data, generate, steps
from nanogsm.model import load_model
from nanogsm.report.scores import paired_tests

PROMPT = data.Prompt()


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", torch.float32)


def greedy(model, tokenizer, ids, limit):
    """The slow form of sampling at temperature 0: one whole forward per token, no cache. Returns
    the text, and whether it ended."""
    new = []
    with torch.no_grad():
        while len(new) < limit:
            logits = model.logits(model(torch.tensor([ids + new]))[:, -1])
            new.append(logits[0].argmax().item())
            text = tokenizer.decode(new)
            if new[-1] in tokenizer.stop_ids or "Question:" in text:
                return text, True
    return text, False


def test_a_prefix_is_what_the_reward_model_is_asked_after(tiny):
    _, tokenizer = tiny
    lines = ["Tom has 3.", "Leo has 4.", "#### 7"]
    found = label.prefixes_of(tokenizer, PROMPT, "How many?", lines)
    assert [so_far for so_far, _ in found] == [("Tom has 3.",), ("Tom has 3.", "Leo has 4.")]
    prompt = data.encode(tokenizer, PROMPT, "How many?")[0]
    for (so_far, ids), text in zip(found, ("Tom has 3.\n", "Tom has 3.\nLeo has 4.\n")):
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode(ids[len(prompt) :]).lstrip(" ") == text
    assert label.prefixes_of(tokenizer, PROMPT, "How many?", ["#### 7"]) == []


def test_without_chance_a_label_says_what_one_continuation_comes_to(tiny, monkeypatch):
    """At temperature 0 all continuations are the greedy one. (The untuned model gives no numbers in
    the format and does not end, so here another rule says which texts are right, and a full stop
    is an end.)"""
    model, tokenizer = tiny
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset(tokenizer.encode("a.")[-1:]))
    monkeypatch.setattr(data, "is_correct", lambda text, problem: len(text) % 3 > 0)
    problems = data.load_problems("tiny", "train")[:6]
    wanted, want, limit = {}, {}, 100
    for problem in problems:
        first = steps.steps_of(problem.answer)
        for so_far, ids in label.prefixes_of(tokenizer, PROMPT, problem.question, first)[-1:]:
            key = problem.index, so_far
            wanted[key] = ids, problem
            before = len(ids) - len(data.encode(tokenizer, PROMPT, problem.question)[0])
            text, ended = greedy(model, tokenizer, ids, limit - before)
            whole = "\n".join(so_far) + "\n" + text
            want[key] = float(ended and data.is_correct(whole, problem))
    sample = {"batch_size": 8, "temperature": 0.0}
    got = label.shares(model, tokenizer, PROMPT, wanted, 2, 5, limit, sample)
    assert got == want and len(set(want.values())) == 2  # some end right and some do not


def test_a_label_is_the_share_of_its_own_continuations(tiny, monkeypatch):
    """Completions made by hand: of k = 4 to each of two prefixes."""
    _, tokenizer = tiny
    ends = ["#### 7", "#### 8", "#### 7", "#### 7", "#### 9", "#### 7", "no", "#### 5"]
    cut_off = [False] * 3 + [True] + [False] * 4  # the fourth has the right number, and no end

    start = data.encode(tokenizer, PROMPT, "?")[0]
    first, second = start + [1], start + [2]

    def sampled(model, prompts, *_, **__):
        assert prompts == [first] * 4 + [second] * 4
        return [generate.Completion(tokenizer.encode(e), c) for e, c in zip(ends, cut_off)]

    monkeypatch.setattr(generate, "generate", sampled)
    problems = data.Problem("?", "#### 7", 0), data.Problem("?", "#### 9", 1)
    wanted = {(0, ("a",)): (first, problems[0]), (1, ("a",)): (second, problems[1])}
    got = label.shares(None, tokenizer, PROMPT, wanted, 4, 0, 9, {})
    assert got == {(0, ("a",)): 0.5, (1, ("a",)): 0.25}


def test_the_rows_of_a_chunk(monkeypatch, tiny):
    """The last line's label is the answer's own; equal beginnings are labelled once."""
    _, tokenizer = tiny
    texts = ["a\nb\n#### 7", "a\n#### 8", " ", "a\n#### 7"]
    cut_off = [False, False, False, True]
    problem = data.Problem("How many?", "#### 7", 3)
    rows = [
        {"completion": t, "truncated": c, "correct": data.is_correct(t, problem)}
        for t, c in zip(texts, cut_off)
    ]
    monkeypatch.setattr(generate, "answer_and_mark", lambda *_, **__: rows)

    def shares(model, tokenizer, prompt, wanted, *_):
        assert [key for key in wanted] == [(3, ("a",)), (3, ("a", "b"))]
        return {(3, ("a",)): 0.25, (3, ("a", "b")): 0.75}

    monkeypatch.setattr(label, "shares", shares)
    args = label.parse_args(["tiny", "--samples", "4", "--k", "4"])
    got = label.label_chunk(None, tokenizer, PROMPT, [problem], 0, args)
    assert [row["labels"] for row in got] == [[0.25, 0.75, 1], [0.25, 0], [0], [0.25, 0]]
    assert [row["steps"] for row in got][:2] == [["a", "b", "#### 7"], ["a", "#### 8"]]
    assert all(row["index"] == 3 and row["question"] == "How many?" for row in got)


def test_an_answer_over_the_limit_counts_as_wrong_as_it_would_if_it_were_sampled_whole(
    tiny, monkeypatch
):
    _, tokenizer = tiny
    problem = data.Problem("?", "#### 7", 0)
    [(so_far, ids)] = label.prefixes_of(tokenizer, PROMPT, "?", ["Tom has 7.", "#### 7"])
    before = len(ids) - len(data.encode(tokenizer, PROMPT, "?")[0])
    one = generate.Completion(tokenizer.encode("#### 7"), False)
    monkeypatch.setattr(generate, "generate", lambda *_, **__: [one])
    assert before > 1
    for limit, want in ((before + len(one.ids), 1.0), (before + len(one.ids) - 1, 0.0)):
        wanted = {(0, so_far): (ids, problem)}
        got = label.shares(None, tokenizer, PROMPT, wanted, 1, 0, limit, {})
        assert got == {(0, so_far): want}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """label(n, *more) -> the file's content, after it was made or continued."""
    monkeypatch.setattr(label, "CHUNK", 2)

    def run(n, *more, name="labels"):
        out = tmp_path / f"{name}.jsonl"
        argv = ["tiny", "--n", str(n), "--samples", "2", "--k", "2", "--max-new-tokens", "12",
                "--device", "cpu", "--out", str(out)]  # fmt: skip
        assert label.main([*argv, *more]) == 0
        return out.read_bytes()

    return run


def test_a_kill_loses_nothing_and_the_same_command_goes_on(command, tmp_path, capsys):
    whole = command(5)
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == 10 and len({row["index"] for row in rows}) == 5
    assert len(steps.read(tmp_path / "labels.jsonl")[0]) == 10
    lines = whole.splitlines(keepends=True)
    for kept in (b"".join(lines[:3]) + lines[3][:20], b"".join(lines[:8]), b"", lines[0][:5]):
        (tmp_path / "labels.jsonl").write_bytes(kept)
        assert command(5) == whole
    assert "continuing" in capsys.readouterr().out
    os.remove(tmp_path / "labels.jsonl")
    assert command(3) == b"".join(lines[:6])
    assert command(5) == whole  # more problems begin with the same
    assert command(3) == whole and "has 10 labelled answers already" in capsys.readouterr().out


def test_other_settings_or_another_writer_are_one_line(command, tmp_path):
    before = command(1)
    with pytest.raises(UserError, match="was made with another k: 2, now 3"):
        command(1, "--k", "3")
    with pytest.raises(UserError, match="has changed meanwhile"):
        label.append(tmp_path / "labels.jsonl", [{}], 7)
    assert (tmp_path / "labels.jsonl").read_bytes() == before
    (tmp_path / "other.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="is there without its settings"):
        command(1, name="other")
    with pytest.raises(UserError, match="give a file that ends in .jsonl"):
        label.parse_args(["tiny", "--out", "labels"])
    with pytest.raises(UserError, match="--k is 0"):
        label.parse_args(["tiny", "--k", "0"])
    with pytest.raises(UserError, match="--temperature is 0"):
        label.parse_args(["tiny", "--temperature", "0"])


def test_one_process_at_a_time_writes_a_file(command, tmp_path):
    before = command(1)
    with label.alone(tmp_path / "labels.jsonl"):
        with pytest.raises(UserError, match="another process writes to .*labels.jsonl"):
            command(2)
        command(1, name="other")
    assert (tmp_path / "labels.jsonl").read_bytes() == before
    assert command(2).startswith(before)  # the lock is gone with its holder
    with pytest.raises(UserError, match="nowhere/x"):
        label.main(["nowhere/x", "--out", str(tmp_path / "new/labels.jsonl"), "--device", "cpu"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*labels.jsonl: "):
        command(1, name="file/labels")


def test_problems_that_the_run_held_out_are_not_labelled(monkeypatch):
    monkeypatch.setattr(label.past, "held_out_by", lambda *_: 300)
    args = label.parse_args(["tiny", "--n", "9"])
    chosen = label.choose_problems(args)
    everything = data.load_problems("tiny", "train")
    held_out = {p.index for p in data.split_validation(everything, 300)[1]}
    assert len(chosen) == len(everything) - 300 and not held_out & {p.index for p in chosen}
    assert chosen != sorted(chosen, key=lambda p: p.index)


# ---------------------------------------------------------------------------------- the experiment


def test_every_command_of_the_experiment_parses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = reward_models.parse_args(["--seeds", "2", "--prm=--epochs 3"])
    parse = {"train_sft.py": train_sft.parse_args, "train_ppo.py": train_ppo.parse_args,
             "train_prm.py": train_prm.prm.prm_args, "evaluate.py": evaluate.parse_args,
             "label": label.parse_args}  # fmt: skip
    made = []
    for seed in (1, 2):
        for script, *flags in reward_models.commands(seed, args):
            got = parse[script](flags)
            made.append(str(got.out))
            assert script != "train_prm.py" or got.epochs == 3
    assert len(set(made)) == len(made) == 12
    assert reward_models.main(["--dry-run", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("python ") == 6
    assert "python -m experiments.label runs/tiny/reward-models/ppo-1 --n 7217" in out


def test_paired_tests_and_noise_by_hand():
    names = ["first", "maj", *reward_models.JUDGES, *reward_models.VOTES]
    right = dict.fromkeys(names, [True, False, False, False])
    right["PRM, last"] = [False, True, True, True]
    tests = {(t["of"], t["against"]): t for t in paired_tests(right, reward_models.PAIRS)}
    one = tests["PRM, last", "maj"]
    assert (one["points"], one["fixed"], one["broken"]) == (50, 3, 1)
    assert one["p"] == pytest.approx(2 * (1 + 4) / 16)
    assert tests["outcome model", "critic"]["p"] == tests["vote, critic", "maj"]["p"] == 1
    got = reward_models.spread([0.5, 1.0, 0.0], [0.25, 0.75, 0.5], 4, 8)
    assert got["root_mean_square"] == pytest.approx(math.sqrt((1 + 1 + 4) / 16 / 3))
    assert got["bias"] == 0 and got["other_side"] == pytest.approx(2 / 3)
    throws = (3 / 16 + 3 / 16 + 1 / 4) / 3 * 8 / 7
    assert got["expected"] == pytest.approx(math.sqrt(throws * (1 / 4 + 1 / 8)))


def test_the_tables_say_what_was_found():
    args = reward_models.parse_args(["--seeds", "1"])
    columns = ("sampled", "pass", "maj", "chance", *reward_models.JUDGES)
    shares = {name: 0.1 * i for i, name in enumerate(columns, start=1)}
    right = dict.fromkeys(
        ["first", "maj", *reward_models.JUDGES, *reward_models.VOTES], [True, False]
    )
    result = {"seed": 1, "shares": shares, "tests": paired_tests(right, reward_models.PAIRS),
              "validated": {"prm": {"val_auc": 0.75}, "orm": {"val_auc": None}}}  # fmt: skip
    found = reward_models.spread([0.5], [0.5], 8, 256)
    text = reward_models.tables([result], found, args)
    assert "| 1 | 10.0% | 20.0% | 30.0% | 40.0% | 50.0% | 60.0% | 70.0% | 80.0% |" in text
    assert "| PRM, last | maj@8 | +0.0 (0, 0; p 1) | +0.0 |" in text
    assert "| PRM, seed 1 | 0.750 |" in text and "| outcome model, seed 1 |  |" in text
    assert "Labels of 8 continuations against labels of 256, on 1 prefixes" in text


def test_numbers_of_other_settings_are_found_again(tmp_path):
    made, path = [], tmp_path / "noise.json"

    def cached(*flags, names=reward_models.SETTINGS):
        args = reward_models.parse_args([*flags])
        return reward_models.cached(
            path, args, names, lambda: made.append(flags) or {"k": args.k, "nan": math.nan}
        )

    assert cached() == cached() == {"k": 4, "nan": None} and len(made) == 1
    path.write_text(json.dumps({"k": 8, "many": 256}))  # as an earlier version wrote it
    cached()
    for more in (["--k", "8"], ["--samples", "4"], ["--label-samples", "8"], ["--prm=--epochs 3"]):
        before = len(made)
        cached(*more)
        cached(*more)
        assert made[before:] == [tuple(more)]
    cached("--many", "9")  # the judges do not depend on it
    cached()
    cached("--many", "9", names=("many",))
    assert len(made) == 8


def test_eight_answers_are_not_taken_for_eighteen(tmp_path):
    for samples in (8, 18):
        (tmp_path / f"eval-test-50-{samples}x-t1-seed0.json").write_text("{}")
        args = reward_models.parse_args(["--n", "50", "--samples", str(samples)])
        found = reward_models.answers_file(tmp_path, args)
        assert found.name == f"eval-test-50-{samples}x-t1-seed0.jsonl"
    assert reward_models.parse_args(["--n", "5000"]).n == 1319


def test_each_judge_reads_the_answers_once(tmp_path, monkeypatch):
    """By the last value the process reward model chooses the first answer, by the least the
    second."""
    rows = [{"correct": i == 1, "answer": float(i), "gold": 1.0, "completion": str(i)}
            for i in range(2)]  # fmt: skip
    (tmp_path / "answers-1").mkdir()
    path = tmp_path / "answers-1/eval-test-1-2x-t1-seed0.json"
    path.write_text("{}")
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values, asked = {"ppo": [[-0.1], [0.2]], "orm": [[0.2], [0.1]]}, []
    values["prm"] = [[0.1, 0.9], [0.5, 0.6]]

    def values_of(critic, rows, how):
        asked.append(critic)
        return values[critic]

    monkeypatch.setattr(reward_models, "find_critic", lambda run: run.split("/")[-1][:3])
    monkeypatch.setattr(reward_models.rerank, "values_of", values_of)
    args = reward_models.parse_args(["--out", str(tmp_path), "--n", "1", "--samples", "2"])
    right = reward_models.judge(1, args)
    assert asked == ["ppo", "orm", "prm"]
    assert right == {"first": [False], "maj": [False], "pass": [True], "critic": [True],
                     "outcome model": [False], "PRM, last": [False], "PRM, least": [True],
                     "vote, critic": [True], "vote, outcome model": [False],
                     "vote, PRM, last": [False], "vote, PRM, least": [True]}  # fmt: skip


def test_a_negative_value_gives_no_vote(tmp_path, monkeypatch):
    """Two answers have the right number, with 0.4 and -0.2. The wrong one has 0.3."""
    rows = [{"correct": i > 0, "answer": float(i > 0), "gold": 1.0, "completion": str(i)}
            for i in range(3)]  # fmt: skip
    (tmp_path / "answers-1").mkdir()
    path = tmp_path / "answers-1/eval-test-1-3x-t1-seed0.json"
    path.write_text("{}")
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(reward_models, "find_critic", lambda run: run)
    values = [[0.3], [0.4], [-0.2]]
    monkeypatch.setattr(reward_models.rerank, "values_of", lambda *_: values)
    args = reward_models.parse_args(["--out", str(tmp_path), "--n", "1", "--samples", "3"])
    assert reward_models.judge(1, args)["vote, critic"] == [True]


def test_a_judge_by_chance_chooses_among_different_texts():
    group = [{"completion": text, "correct": text == "a"} for text in "aaabc"]
    other = [{"completion": "d", "correct": True}] * 5
    assert reward_models.by_chance([group, other]) == pytest.approx((1 / 3 + 1) / 2)
