"""Data of one's own from training to evaluation: chats, answers without numbers, few examples."""

import json
from pathlib import Path

import pytest
from conftest import FIXTURES

import evaluate
import train_ppo
import train_sft
from experiments import label
from nanogsm import UserError, data, generate
from nanogsm.report import scores
from nanogsm.run import past
from nanogsm.store import hub

COMPUTE = ["--device", "cpu", "--precision", "fp32", "--max-new-tokens", "4"]
SFT = ["--micro-batch", "2", "--accumulation", "1", "--val-examples", "3"]
PPO = ["--steps", "2", "--rollouts", "4", "--micro-batch", "2", "--accumulation", "1",
       "--val-every", "1"]  # fmt: skip


@pytest.fixture
def chats(tmp_path) -> str:
    """Twelve chats whose answers have no number."""
    rows = [
        {"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Is {i} larger than 5?"},
            {"role": "assistant", "content": "Yes." if i > 5 else "No."},
        ]}
        for i in range(12)
    ]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "chats.jsonl")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_unscored_chats_are_trained_on_validated_by_loss_and_asked(chats, tmp_path, capsys):
    sft, ppo = str(tmp_path / "sft"), str(tmp_path / "ppo")
    argv = ["--model", str(FIXTURES / "gemma3"), "--data", chats, "--style", "chat", *SFT, *COMPUTE]
    with pytest.raises(UserError, match=r"line 1: the answer has no .* \(--unscored trains on"):
        train_sft.main([*argv, "--out", sft])
    best = ["--val-every", "2", "--keep", "best", "--lr", "1e-3", "--epochs", "2"]
    assert train_sft.main([*argv, "--out", sft, "--unscored", *best]) == 0
    validations = [row for row in rows_of(tmp_path / "sft") if "val_loss" in row]
    assert len(validations) == 6 and not any("val_exact_match" in row for row in validations)
    summary = json.loads((tmp_path / "sft/summary.json").read_text())
    assert summary["val_loss"] == min(row["val_loss"] for row in validations)
    Path(chats).write_text(Path(chats).read_text().replace("Yes.", "#### 1").replace("No.", "#### 0"))
    with pytest.raises(UserError, match="unscored was true, now false"):
        train_sft.main([*argv, "--out", sft, *best])
    Path(chats).write_text(Path(chats).read_text().replace("#### 1", "Yes.").replace("#### 0", "No."))

    # A run is asked about its own data, in its own way, with no flag at all.
    capsys.readouterr()
    assert evaluate.main([sft, "--device", "cpu", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert f"3 problems, validation split of {chats}; chat, zero-shot, greedy" in said
    assert "unscored      3 completions" in said

    # PPO needs a reward, and a validation then has its mean.
    (tmp_path / "own.py").write_text("def reward(text, problem, truncated): return len(text)")
    argv = ["--init", sft, "--data", chats, "--unscored", *PPO, *COMPUTE, "--out", ppo]
    with pytest.raises(UserError, match="--unscored needs --reward FILE.py"):
        train_ppo.main(argv)
    assert train_ppo.main([*argv, "--reward", str(tmp_path / "own.py")]) == 0
    rows = rows_of(tmp_path / "ppo")
    assert all(row["exact_match"] is None for row in rows if "kl" in row)
    model = tmp_path / "ppo/model"
    assert evaluate.main([ppo, "--device", "cpu", "--max-new-tokens", "4"]) == 0
    [file] = (tmp_path / "ppo").glob("eval-*.jsonl")
    answers = [json.loads(line)["completion"] for line in file.read_text().splitlines()]
    want = sum(len(data.cut(text)) for text in answers) / 3
    assert rows[-1]["val_reward"] == want and "val_exact_match" not in rows[-1] and model.is_dir()


def test_a_file_that_changed_since_training_is_refused_where_its_held_out_problems_count(tmp_path):
    """The held-out problems are drawn by their places, so a new line moves them."""
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(30)]
    file, run = tmp_path / "own.jsonl", str(tmp_path / "sft")
    file.write_text("\n".join(lines))
    argv = ["--model", str(FIXTURES / "gemma3"), "--data", str(file), *SFT, *COMPUTE]
    assert train_sft.main([*argv, "--out", run]) == 0
    ask = [run, "--device", "cpu", "--max-new-tokens", "4"]
    go_on = ["--init", run, "--data", str(file), *PPO, *COMPUTE, "--dry-run"]
    label_it = [run, "--n", "1", "--data", str(file), "--out", str(tmp_path / "labels.jsonl")]
    others = [*go_on, "--val-examples", "5"]
    assert evaluate.main(ask) == train_ppo.main(go_on) == train_ppo.main(others) == 0
    for changed in (lines[1:], [lines[7], *lines], sorted(lines), lines[:3]):
        file.write_text("\n".join(changed))
        for main, flags in (
            (evaluate.main, ask),
            (train_ppo.main, go_on),
            (train_ppo.main, others),
            (train_sft.main, [*argv[2:], "--model", run, "--dry-run"]),
            (label.main, label_it),
        ):
            with pytest.raises(UserError, match="own.jsonl has changed since .*sft was trained"):
                main(flags)
    assert evaluate.main([*ask, "--split", "test"]) == 0  # all of them, and a note says so
    file.write_text("\n".join(line.replace("#### ", "So #### ") for line in lines))
    again = [*ask, "--out", str(tmp_path / "again")]
    assert evaluate.main(again) == 0  # the same questions, as main's and socratic's are


def test_other_forms_of_the_same_problems_are_no_change(tmp_path):
    """tiny-worked has tiny's questions; a run of an earlier version recorded nothing; one that was
    continued by this version did so then."""
    problems = data.load_problems("tiny", "train")
    digest = past.digest_of(data.split_validation(problems, 256)[1])
    prompt = {"prompt": data.Prompt().settings()}
    record = {"args": {"data": "tiny", "val_examples": 256}, "info": prompt}
    for more, refuses in (
        ({}, False),
        ({"info": prompt | {"held_out_sha256": digest}}, True),
        ({"continued": [prompt, prompt | {"held_out_sha256": digest}]}, True),
    ):
        (tmp_path / "run_args.json").write_text(json.dumps(record | more))
        for of_data in ("tiny", "tiny-worked", "tiny-socratic"):
            given = data.load_problems(of_data, "train")
            past.check_unchanged(str(tmp_path), of_data, given)
            past.check_unchanged(str(tmp_path), "main", given[1:])  # GSM8K's, not this run's
            if refuses:
                with pytest.raises(UserError, match="has changed since"):
                    past.check_unchanged(str(tmp_path), of_data, given[1:])


def test_one_answer_without_a_number_makes_all_unscored():
    """Also if the first one has a number."""
    row = {"index": 0, "question": "q", "truncated": False, "tokens": 3, "completion": "c"}
    rows = [row | {"gold": 5.0, "correct": True, "flexible": True, "answer": 5.0},
            row | {"gold": None, "correct": None, "flexible": False, "answer": None}]  # fmt: skip
    for order in (rows, rows[::-1]):
        assert "accuracy" not in scores.summarise(order, 1)
        assert generate.validation_metrics(order) == {"val_truncated": 0.0}


def test_ppo_may_ask_in_another_style_than_its_start(tmp_path):
    out = str(tmp_path / "run")
    argv = ["--tiny", "--init", "tiny", *PPO, *COMPUTE, "--val-examples", "0", "--out", out]
    assert train_ppo.main([*argv, "--style", "chat"]) == 0
    info = json.loads((tmp_path / "run/run_args.json").read_text())["info"]
    assert info["prompt"] == {"style": "chat", "shots": 0, "instruction": False}
    assert evaluate.resolve(evaluate.parse_args([out]))[0].style == "chat"
    with pytest.raises(UserError, match="style was"):
        train_ppo.main([*argv, "--steps", "3"])


def test_few_steps_and_unknown_words_are_said(tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    row = {"question": "A xylophone quintet of Äpfel?", "answer": "#### 5"}
    file.write_text("\n".join([json.dumps(row)] * 27))
    argv = ["--tiny", "--data", str(file), "--val-examples", "0", "--dry-run", "--device", "cpu"]
    train_sft.main(argv)
    said = capsys.readouterr().out
    assert "27 examples make only 12 steps: more --epochs" in said  # three epochs of four
    assert "note: words this model has never seen: xylophone, quintet, Äpfel\n" in said
    train_sft.main([*argv, "--epochs", "20"])
    assert "make only" not in capsys.readouterr().out
    file.write_text("\n".join(json.dumps(row | {"answer": f"{w}\n#### 5"}) for w in
                              ("kaleidoscope", *"zeta eta theta iota kappa lambda".split())))  # fmt: skip
    train_sft.main(argv)
    said = capsys.readouterr().out
    assert "xylophone, quintet, Äpfel, kaleidoscope, zeta, eta, theta, iota and 2 more" in said


def test_a_model_other_than_the_embedded_one_is_not_warned(chats, tmp_path, capsys):
    argv = ["--model", str(FIXTURES / "gemma3"), "--data", chats, "--unscored", "--dry-run"]
    train_sft.main([*argv, *SFT, *COMPUTE])
    assert "never seen" not in capsys.readouterr().out
    assert hub.EMBEDDED.is_dir()
