"""train_prm.py: values and loss against slow forms, its run against an interrupted one, where a run
may be used, and the file formats with hostile rows."""

import json
import math
import random
import shutil

import pytest
import torch
from conftest import FIXTURES
from safetensors import safe_open
from torch import nn

import evaluate
import train_ppo
import train_prm
import train_sft
from nanogsm import UserError, data, steps
from nanogsm.report import coloured, rerank
from nanogsm.run.critic import NAME, find_critic, load_critic
from nanogsm.store import hub

PLAIN = lambda: torch.autocast("cpu", torch.bfloat16, enabled=False)  # noqa: E731
PROMPT = data.Prompt()
ANSWER = ["The hats cost 3*5 = <<3*5=15>>15.", "So 15-1 = 14.", "#### 14"]


def solution(*labels, index=0, lines=ANSWER):
    return steps.Solution("What is 3*5-1?", list(lines[: len(labels)]), list(labels), index)


# ---------------------------------------------------------------------------------- steps and ids


@pytest.mark.parametrize("name", ["gemma3", "llama32", "tiny"])
@pytest.mark.parametrize("style", ["plain", "chat"])
def test_a_step_ends_at_the_token_that_completes_its_line(name, style):
    """The slow form: how many line breaks have the tokens so far, after those of the prompt?"""
    tokenizer = data.Tokenizer(hub.EMBEDDED if name == "tiny" else FIXTURES / name)
    prompt = data.Prompt(style)
    ids, ends = steps.encode(tokenizer, prompt, "What is 3*5-1?\nTell me.", ANSWER)
    assert ids == data.encode(tokenizer, prompt, "What is 3*5-1?\nTell me.", "\n".join(ANSWER))[0]
    start = len(data.encode(tokenizer, prompt, "What is 3*5-1?\nTell me.")[0])
    texts = [tokenizer.decode(ids[start : t + 1]) for t in range(len(ids))]
    slow = [next(t for t, text in enumerate(texts) if text.count("\n") == n + 1) for n in range(2)]
    assert ends == [*slow, len(ids) - 2]
    assert texts[ends[-1]].strip() == "\n".join(ANSWER) and tokenizer.decode(ids[-1:]) == ""


def test_the_mask_is_on_the_token_after_a_step_that_has_a_label():
    tokenizer = data.Tokenizer(FIXTURES / "gemma3")
    ids, ends = steps.encode(tokenizer, PROMPT, "What is 3*5-1?", ANSWER)
    made = steps.example_of(tokenizer, PROMPT, solution(0.5, None, 1.0))
    assert made.ids == ids and made.labels == [0.5, 1.0]
    assert [t for t, bit in enumerate(made.mask) if bit] == [ends[0] + 1, ends[2] + 1]
    assert steps.example_of(tokenizer, PROMPT, solution(0.5, None, 0.0), outcome=True).labels == [0]
    assert steps.example_of(tokenizer, PROMPT, solution(0.5, None), outcome=True).labels == []


def test_the_lines_of_an_answer():
    assert steps.steps_of(" a\n\n b \n#### 3\nQuestion: x\ny") == ["a", "b", "#### 3"]
    assert steps.steps_of(" \n") == []


def test_too_long_and_unlabelled_answers_are_left_out(capsys):
    tokenizer = data.Tokenizer(FIXTURES / "gemma3")
    some = [solution(1.0, 1.0, 1.0), solution(1.0), solution(None, None)]
    longest = len(steps.example_of(tokenizer, PROMPT, some[0]).ids)
    assert len(steps.examples_of(tokenizer, PROMPT, some, longest)) == 2
    assert len(steps.examples_of(tokenizer, PROMPT, some, longest - 1)) == 1
    assert "left out 2 of 3 answers" in capsys.readouterr().out
    with pytest.raises(UserError, match="no answer is at most --max-seq-length 3 long"):
        steps.examples_of(tokenizer, PROMPT, some, 3)


def test_all_answers_to_a_problem_are_held_out_together():
    some = [solution(1.0, index=i // 3) for i in range(30)]
    rest, held_out = steps.hold_out(some, 4)
    assert len(held_out) == 12 and len(rest) == 18
    assert not {s.index for s in rest} & {s.index for s in held_out}
    with pytest.raises(UserError, match="--val-examples 10 of 10 problems leaves none"):
        steps.hold_out(some, 10)


# ----------------------------------------------------------------------------- values and the loss


@pytest.fixture
def judge(gemma):
    """(model, head with something in it, tokenizer, examples of different lengths), in float64."""
    model, tokenizer = gemma("gemma3", torch.float64)
    head = nn.Linear(model.config.hidden_size, 1, dtype=torch.float64)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    some = [solution(1.0, 0.25, 0.0), solution(None, 0.5), solution(0.75)]
    return model, head, tokenizer, steps.examples_of(tokenizer, PROMPT, some, 999)


def slow_values(model, head, examples):
    """One forward for each label, over the tokens up to the end of its step and no other."""
    found = []
    with torch.no_grad():
        for example in examples:
            for t in range(len(example.ids)):
                if example.mask[t]:
                    hidden = model(torch.tensor([example.ids[:t]]))[0, -1]
                    found.append((hidden @ head.weight[0] + head.bias).item())
    return found


def test_a_value_is_the_heads_after_the_tokens_of_its_step(judge):
    model, head, tokenizer, examples = judge
    values = train_prm.step_logits(model, head, examples, tokenizer.pad_id, PLAIN)
    assert values.tolist() == pytest.approx(slow_values(model, head, examples), rel=1e-5)
    rows = train_prm.predict(model, head, examples, 2, tokenizer.pad_id, PLAIN)
    assert [len(row) for row in rows] == [3, 1, 1]
    assert sum(rows, []) == pytest.approx(values.tolist(), rel=1e-5)


def test_the_loss_is_binary_cross_entropy_over_the_labels_of_the_step(judge):
    model, head, tokenizer, examples = judge
    labels = [label for example in examples for label in example.labels]
    p = [1 / (1 + math.exp(-value)) for value in slow_values(model, head, examples)]
    want = -sum(y * math.log(x) + (1 - y) * math.log(1 - x) for x, y in zip(p, labels)) / 5
    for micro_batch in (1, 2, 3):
        model.zero_grad()
        head.zero_grad()
        loss = train_prm.backward_step(
            model, head, examples, micro_batch, tokenizer.pad_id, PLAIN
        ).item()
        assert loss == pytest.approx(want, rel=1e-5)
        # d loss / d value = p - y; the bias gets the sum of it.
        slope = sum(x - y for x, y in zip(p, labels)) / 5
        assert head.bias.grad.item() == pytest.approx(slope, rel=1e-4)
        gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
        assert gradient.abs().max() > 0
        if micro_batch > 1:
            assert (gradient - first).abs().max() < 1e-6 * first.abs().max()  # noqa: F821
        first = gradient  # noqa: F841


# --------------------------------------------------------------------------------- the validation


def test_auc_counts_pairs():
    draw = random.Random(3)
    for n in (2, 5, 40):
        scores = [draw.choice((0.1, 0.2, 0.2, 0.7, draw.random())) for _ in range(n)]
        right = [True, False] + [draw.random() < 0.4 for _ in range(n - 2)]
        pairs = [(a, b) for a, x in zip(scores, right) if x for b, y in zip(scores, right) if not y]
        want = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
        assert train_prm.auc(scores, right) == pytest.approx(want, abs=1e-12)
    assert math.isnan(train_prm.auc([0.1, 0.2], [True, True]))


def example(labels, index=0):
    return steps.Example([1] * 9, [0] * (9 - len(labels)) + [1] * len(labels), index, labels)


def test_validation_metrics_by_hand():
    examples = [example([1.0, 0.25, 0.5]), example([1.0, 0.0], 0), example([0.5, 1.0], 1),
                example([0.75, 0.75, 1.0], 1)]  # fmt: skip
    values = [[2.0, -1.0, 3.0], [-1.0, -2.0], [1.0, 2.0], [1.0, -1.0, 1.0]]
    got = train_prm.validation_metrics(examples, values, True)
    # First wrong steps: 1, 1, none, none. Said to be: 1, 0, none, 1.
    assert got["val_first_wrong"] == 0.5 and got["val_all_right"] == 0.5
    # Right answers: the last labels are 0.5, 0, 1 and 1. By the last value 0 and 2 are chosen, by
    # the least 0 and 2 (1.0).
    assert got["val_sampled"] == 0.75
    assert got["val_best_last"] == 1 and got["val_best_least"] == 1
    assert got["val_pairs"] == 1  # the one pair: 3 of answer 0, which is right, and -2 of answer 1
    worse = [[-2.0, -3.0, -1.0], [0.0, 1.0], [1.0, 2.0], [1.0, -1.0, 1.0]]
    assert train_prm.validation_metrics(examples, worse, True)["val_best_least"] == 0.5
    y = [1, 0.25, 0.5, 1, 0, 0.5, 1, 0.75, 0.75, 1]
    p = [1 / (1 + math.exp(-v)) for row in values for v in row]
    want = -sum(b * math.log(a) + (1 - b) * math.log(1 - a) for a, b in zip(p, y)) / 10
    assert got["val_loss"] == pytest.approx(want, rel=1e-6)
    assert "val_sampled" not in train_prm.validation_metrics(examples, values, False)


def test_what_the_last_and_the_least_value_choose():
    examples = [example([1.0, 0.0]), example([0.5, 1.0])]
    values = [[0.5, 0.9], [0.6, 0.7]]  # by the last the wrong answer, by the least the right one
    got = train_prm.validation_metrics(examples, values, True)
    assert (got["val_best_last"], got["val_best_least"]) == (0, 1)


def test_an_answer_whose_last_step_has_no_label_is_neither_right_nor_wrong():
    """Of problem 0 the second answer is known to be right, of problem 1 nothing is known."""
    tokenizer = data.Tokenizer(FIXTURES / "gemma3")
    some = [solution(1.0, None), solution(0.0, 1.0), solution(0.0), solution(1.0, None, index=1)]
    examples = steps.examples_of(tokenizer, PROMPT, some, 999)
    assert [one.labels for one in examples] == [[1.0], [0.0, 1.0], [0.0], [1.0]]
    for scores in ([9.0, 0.5, 0.1, 0.0], [-9.0, 0.5, 0.1, 0.0]):
        assert train_prm.best_of(examples, scores) == (0.5, 1.0, 1.0)
    assert train_prm.best_of(examples, [9.0, 0.0, 0.1, 0.0]) == (0.5, 0.0, 0.0)


def test_pairs_are_of_answers_to_the_same_problem():
    """Problem 0 has 2 x 2 pairs, problem 1 none, problem 2 one."""
    answers = [(0, 1, 3.0), (0, 0, 2.0), (0, 1, 1.0), (0, 0, 1.0), (1, 1, -9.0), (2, 0, 5.0),
               (2, 1, 4.0)]  # fmt: skip
    examples = [example([float(right)], index) for index, right, _ in answers]
    scores = [score for *_, score in answers]
    # 3 > 2, 3 > 1, not 1 > 2, 1 = 1, not 4 > 5
    assert train_prm.best_of(examples, scores)[2] == pytest.approx((1 + 1 + 0 + 0.5 + 0) / 5)


def test_without_labels_of_last_steps_there_is_no_share():
    examples = [example([1.0])._replace(mask=[0] * 8 + [1, 0])]
    assert all(map(math.isnan, train_prm.best_of(examples, [1.0])))


# ----------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A file whose labels can be learnt: a step with "good" in it is right."""
    draw, rows = random.Random(0), []
    for i in range(96):
        words = [draw.choice(("good", "bad")) for _ in range(draw.choice((1, 2, 3)))]
        rows.append({"index": i // 4, "question": f"{i // 4} + 1?", "steps": words,
                     "labels": [float(word == "good") for word in words]})  # fmt: skip
    path = tmp_path_factory.mktemp("labels") / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def argv(labels, out, *more):
    return ["--model", str(FIXTURES / "gemma3"), "--data", str(labels), "--device", "cpu",
            "--precision", "fp32", "--checkpointing", "none", "--micro-batch", "8",
            "--accumulation", "1", "--epochs", "4", "--lr", "1e-2", "--head-lr", "5e-2",
            "--val-examples", "6", "--save-every", "10", "--out", str(out), *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(labels, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "prm"
    assert train_prm.main(argv(labels, out)) == 0
    return out


def test_it_learns_which_steps_are_right_and_is_saved_with_its_trunks_digest(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["val_auc"] > 0.95 and summary["val_loss"] < 0.4
    assert summary["val_best_last"] > summary["val_sampled"] + 0.2
    with safe_open(trained / NAME, framework="pt") as file:
        assert file.metadata()["kind"] == "prm"
        assert file.metadata()["trunk_sha256"] == hub.fingerprint(hub.find_trunk(trained))
    assert (trained / "adapter").is_dir() and not (trained / "model").exists()


def test_an_interrupted_run_ends_with_the_same_bytes(trained, labels, tmp_path, monkeypatch):
    real = train_prm.check_finite

    def fail(step, *args, **values):
        if step == 15:
            raise RuntimeError("killed")
        real(step, *args, **values)

    monkeypatch.setattr(train_prm, "check_finite", fail)
    with pytest.raises(RuntimeError, match="killed"):
        train_prm.main(argv(labels, tmp_path / "prm"))
    monkeypatch.setattr(train_prm, "check_finite", real)
    assert train_prm.main(argv(labels, tmp_path / "prm")) == 0
    for name in (NAME, "adapter/adapter_model.safetensors"):
        assert (tmp_path / "prm" / name).read_bytes() == (trained / name).read_bytes(), name


def test_an_outcome_model_learns_the_last_label_alone(labels, tmp_path, capsys):
    assert train_prm.main(argv(labels, tmp_path / "orm", "--outcome", "--epochs", "1")) == 0
    assert "72 labels: the last step's label" in capsys.readouterr().out
    rows = (tmp_path / "orm/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["labels"] == 8  # of 8 answers
    assert "val_first_wrong" in json.loads(rows[-1])  # validation looks at all steps


def test_all_weights_can_be_trained_and_reread(labels, tmp_path):
    full = argv(labels, tmp_path / "full", "--full", "--epochs", "1", "--lr", "1e-3")
    assert train_prm.main(full) == 0
    critic = find_critic(str(tmp_path / "full"))
    assert critic.kind == "prm" and critic.trunk.base == tmp_path / "full/model"
    with pytest.raises(UserError, match="not a language model"):
        hub.find_model(str(tmp_path / "full/model"))


def test_a_dry_run_says_what_it_would_do(labels, tmp_path, capsys):
    assert train_prm.main(argv(labels, tmp_path / "no", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "24 answers held out, to 6 problems" in out and "activations" in out
    assert "vocabulary" not in out and not (tmp_path / "no").exists()


@pytest.mark.parametrize("place", ["", "adapter"])
def test_its_run_is_not_a_language_model(trained, tmp_path, place):
    run = str(trained / place)
    commands = [
        lambda: evaluate.main(["--model", run, "--data", "tiny", "--device", "cpu"]),
        lambda: evaluate.main(["--model", run, "--ask", "1 + 1?", "--device", "cpu"]),
        lambda: train_sft.main(["--model", run, "--data", "tiny", "--device", "cpu", "--out",
                                str(tmp_path / "x")]),
        lambda: train_ppo.main(["--init", run, "--data", "tiny", "--device", "cpu", "--out",
                                str(tmp_path / "x")]),
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(UserError, match="is a process reward model.*not a language model"):
            command()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "more, says",
    [
        (["--outcome", "--max-examples", "0"], "--max-examples is 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--full", "--lora-r", "4"], "have no meaning with --full"),
        (["--val-examples", "24"], "leaves none to train on"),
        (["--model", "runs/nowhere"], "there is no runs/nowhere"),
        (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--data", "main"], "give prm800k or a file that ends in .jsonl"),
        (["--data", "x/phase2_test.jsonl"], "are to the problems of MATH-500"),
    ],
)
def test_a_bad_flag_is_one_line(labels, tmp_path, more, says):
    with pytest.raises(UserError, match=says) as caught:
        train_prm.main(argv(labels, tmp_path / "x", *more))
    assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()


# --------------------------------------------------------------------------------- used as a judge


def row(completion, index=0):
    return {"index": index, "question": "3 + 1?", "completion": completion}


@pytest.mark.parametrize("by", ["last", "least"])
def test_it_reranks_by_probabilities_step_by_step(trained, by):
    args = evaluate.parse_args(["--tiny", "--samples", "2", "--temperature", "1", "--device", "cpu",
                                "--precision", "fp32", "--batch-size", "2", "--rerank",
                                str(trained), "--rerank-by", by])  # fmt: skip
    texts = ["good\nbad\n\n good", "bad", "good\nQuestion: bad", "  ", "bad\ngood"]
    rows = [row(text) for text in texts]
    critic = find_critic(str(trained))
    rerank.rate(critic, rows, args)
    trunk, head, tokenizer = load_critic(critic, torch.float32, "cpu")
    for found, text in zip(rows, texts):
        lines = steps.steps_of(text)
        if lines:
            one = steps.Solution("3 + 1?", lines, [0.0] * len(lines), 0)
            values = slow_values(trunk, head, [steps.example_of(tokenizer, PROMPT, one)])
        else:
            ids = data.encode(tokenizer, PROMPT, "3 + 1?")[0]
            hidden = trunk(torch.tensor([ids]))[0, -1]
            values = [(hidden @ head.weight[0] + head.bias).item()]
        want = [1 / (1 + math.exp(-value)) for value in values]
        assert found["step_values"] == pytest.approx(want, abs=1e-3)
        chosen = min(want) if by == "least" else want[-1]
        assert found["value"] == pytest.approx(chosen, abs=1e-4)
    assert rows[0]["step_values"][1] < 0.5 < rows[0]["step_values"][2]


def test_an_evaluation_is_reranked_by_it(trained, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    command = ["--model", str(FIXTURES / "gemma3"), "--data", str(own), "--samples", "3",
               "--temperature", "1", "--max-new-tokens", "4", "--device", "cpu", "--precision",
               "fp32", "--out", str(tmp_path / "out"), "--rerank", str(trained)]  # fmt: skip
    assert evaluate.main(command) == 0
    [file] = (tmp_path / "out").glob("eval-*rerank-last-prm.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(0 < r["value"] < 1 and r["step_values"] for r in rows)


def test_a_trunk_that_has_changed_is_one_line(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    config = json.loads((copy / "adapter/adapter_config.json").read_text())
    config["lora_alpha"] += 1
    (copy / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its model, has changed since the critic was trained"):
        find_critic(str(copy))


@pytest.mark.parametrize(
    "source, allowed",
    [
        ("labels", ["math", "math500", "main", "own.jsonl"]),
        ("prm800k phase 1", ["math500", "main", "own.jsonl"]),
        ("prm800k phase 2", ["math500"]),
    ],
)
def test_what_prm800k_may_have_shown_it_is_not_evaluated(trained, tmp_path, source, allowed):
    copy = shutil.copytree(trained, tmp_path / "copy")
    record = json.loads((copy / "run_args.json").read_text())
    record["args"]["source"] = source
    (copy / "run_args.json").write_text(json.dumps(record))
    problems = [data.Problem("1 + 1?", "#### 2", 0)]
    for name in ("math", "math500", "main", "own.jsonl"):
        if name in allowed:
            assert rerank.critic_for(str(copy), problems, name).kind == "prm"
        else:
            with pytest.raises(UserError, match="evaluate it with --data math500"):
                rerank.critic_for(str(copy), problems, name)


def test_the_page_colours_steps_and_escapes_them():
    escape = lambda text: str(text).replace("<", "&lt;")  # noqa: E731
    plain = coloured.answer({"completion": " <b>a\nb "}, escape)
    assert plain == "&lt;b>a\nb"
    html = coloured.answer({"completion": " <b>a\n\nb", "step_values": [0.0, 1.0]}, escape)
    first, second = html.split("\n")
    assert "hsl(0 70%" in first and "  0</span> &lt;b>a</span>" in first
    assert "hsl(120 70%" in second and "100</span> b</span>" in second
    other = coloured.answer({"completion": "a\nb", "step_values": [0.5]}, escape)
    assert other == "a\nb"  # values of another text


def test_the_pages_values_come_from_the_run(trained):
    class Stage:
        summary = None
        rows = {0: row("good\nbad")}
        probes = [row("bad")]

    coloured.add_values(str(trained), [Stage])
    good, bad = Stage.rows[0]["step_values"]
    assert bad < 0.5 < good and len(Stage.probes[0]["step_values"]) == 1


# ------------------------------------------------------------------------------------ label files


def read(path, *rows, most=None):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    path.write_text(text, encoding="utf-8")
    return steps.read(path, most)


GOOD = {"index": 5, "question": "q?", "steps": ["a", "b"], "labels": [1, None]}


def test_labelled_rows_are_read(tmp_path):
    got, source = read(tmp_path / "x.jsonl", GOOD, "", GOOD | {"labels": [1, 0.5]},
                       GOOD | {"labels": [None, None]})  # fmt: skip
    assert source == "labels"
    assert got == [("q?", ["a", "b"], [1.0, None], 5), ("q?", ["a", "b"], [1.0, 0.5], 5)]
    some = [{"question": q, "steps": ["a"], "labels": [0]} for q in ("r?", "s?", "r? ")]
    assert [s.index for s in read(tmp_path / "x.jsonl", *some)[0]] == [0, 1, 0]


@pytest.mark.parametrize(
    "bad, says",
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ("1", "line 2: not a JSON object"),
        ({"steps": ["a"], "labels": [1]}, "line 2: question is missing"),
        (GOOD | {"question": None}, "line 2: question is None, not a text"),
        (GOOD | {"question": "  "}, "line 2: the question is empty"),
        (GOOD | {"steps": "ab"}, "line 2: steps is 'ab', not a list"),
        (GOOD | {"steps": ["a"]}, "line 2: 1 steps and 2 labels"),
        (GOOD | {"steps": [], "labels": []}, "line 2: 0 steps"),
        (GOOD | {"steps": ["a", 3]}, "line 2: a step is 3: give one line"),
        (GOOD | {"steps": ["a", "b\nc"]}, "line 2: a step is .*: give one line"),
        (GOOD | {"steps": ["a", " "]}, "line 2: a step is ' '"),
        (GOOD | {"steps": ["a", "\ud800"]}, "line 2: it is not UTF-8 text"),
        (GOOD | {"labels": [1, 1.5]}, "line 2: a label is 1.5: give a number from 0 to 1"),
        (GOOD | {"labels": [1, "1"]}, "line 2: a label is '1'"),
        ('{"question": "q", "steps": ["a"], "labels": [NaN]}', "line 2: a label is nan"),
        (GOOD | {"labels": [1, True]}, "line 2: a label is True: give a number from 0 to 1"),
        (GOOD | {"question": {}}, "line 2: question is {}, not a text"),
        (GOOD | {"index": None}, "line 2: some rows have an index and others none"),
        (GOOD | {"question": "r?"}, "line 2: index 5 has two questions"),
        (GOOD | {"question": "r?", "labels": [None, None]}, "line 2: index 5 has two questions"),
        (GOOD | {"index": -1}, "line 2: index is -1"),
        (GOOD | {"index": "3"}, "line 2: index is '3'"),
    ],
)
def test_a_bad_row_of_labels_is_one_line(tmp_path, bad, says):
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path / "x.jsonl", GOOD, bad)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_labels_are_one_line(tmp_path):
    with pytest.raises(UserError, match="has no labelled steps in it"):
        read(tmp_path / "x.jsonl", "")
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n\xff\xfe\n')
    with pytest.raises(UserError, match="line 1: question is missing"):
        steps.read(tmp_path / "x.jsonl")
    good = json.dumps(GOOD).encode() + b"\n"
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + good)  # as Windows' editor saves it
    assert steps.read(tmp_path / "x.jsonl")[0][0].index == 5
    (tmp_path / "x.jsonl").write_bytes(good * 30 + b"\xff\n" + good)
    with pytest.raises(UserError, match="line 31: it is not UTF-8 text"):
        steps.read(tmp_path / "x.jsonl")
    none = GOOD | {"index": None}
    with pytest.raises(UserError, match="line 3: some rows have an index and others none"):
        read(tmp_path / "x.jsonl", none, none, GOOD)
    with pytest.raises(UserError, match="cannot read"):
        steps.read(tmp_path)


def test_a_limit_keeps_a_fixed_sample_in_the_files_order(tmp_path):
    rows = [GOOD | {"index": i} for i in range(40)]
    seen = [s.index for s in read(tmp_path / "x.jsonl", *rows, most=8)[0]]
    assert seen == sorted(seen) and len(set(seen)) == 8 and seen != list(range(8))
    assert [s.index for s in read(tmp_path / "x.jsonl", *rows, most=8)[0]] == seen
    assert len(read(tmp_path / "x.jsonl", *rows, most=99)[0]) == 40


# ---------------------------------------------------------------------------------------- PRM800K


def completion(text, rating):
    return {"text": text, "rating": rating, "flagged": None}


def step(*completions, chosen=0, human=None):
    return {"completions": list(completions), "chosen_completion": chosen,
            "human_completion": human}  # fmt: skip


def rated(*steps_, finish="solution", phase=1, **other):
    """A row as PRM800K's documentation has it, written by hand."""
    return {
        "labeler": "x", "timestamp": "2022-07-17T16:56:51.323252",
        "generation": None if phase == 1 else 9, "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {"problem": "What is 1+2+3?", "ground_truth_answer": "6"},
        "label": {"steps": list(steps_), "total_time": 9, "finish_reason": finish},
    } | other  # fmt: skip


def test_a_row_of_prm800k_by_hand(tmp_path):
    """Step 1: two completions, the second is chosen. Step 2: nobody's, so a person's. Step 3: a
    neutral one is chosen. Step 4: both are wrong, and the path ends."""
    a = step(completion("1+2 = 4.", -1), completion("1+2\n = 3.", 1), chosen=1)
    b = step(completion("3+3 = 9.", -1), chosen=None, human={"text": "So 3+3."})
    c = step(completion("Hm.", 0))
    d = step(completion("5", -1), completion("7", -1), completion("?", None), chosen=None)
    got, source = read(tmp_path / "x.jsonl", rated(a, b, c, d, finish="found_error"))
    assert source == "prm800k phase 1"
    q = "What is 1+2+3?"
    assert got == [
        (q, ["1+2 = 4."], [0.0], 0),
        (q, ["1+2 = 3.", "3+3 = 9."], [None, 0.0], 0),
        (q, ["1+2 = 3.", "So 3+3.", "Hm.", "7"], [None, None, None, 0.0], 0),
        (q, ["1+2 = 3.", "So 3+3.", "Hm.", "5"], [1.0, None, 1.0, 0.0], 0),
    ]
    assert read(tmp_path / "x.jsonl", rated(c, phase=2))[1] == "prm800k phase 2"
    assert read(tmp_path / "x.jsonl", rated(c), rated(c, phase=2))[1] == "prm800k phase 2"


def test_null_completions_end_a_path_or_leave_it_to_a_person(tmp_path):
    empty = {"completions": None, "human_completion": None, "chosen_completion": None}
    one = step(completion("a", 1))
    assert read(tmp_path / "x.jsonl", rated(one, empty, one))[0][0][1:3] == (["a"], [1.0])
    human = empty | {"human_completion": {"text": "b"}}
    found = read(tmp_path / "x.jsonl", rated(human, one))[0]
    assert [s[1:3] for s in found] == [(["b", "a"], [None, 1.0])]


@pytest.mark.parametrize(
    "other", [{"is_quality_control_question": True}, {"is_initial_screening_question": True}]
)
def test_rows_that_check_the_labeller_are_dropped(tmp_path, other):
    bad, good = rated(step(completion("x", 1)), **other), rated(step(completion("a", 1)))
    assert [s.steps for s in read(tmp_path / "x.jsonl", bad, good)[0]] == [["a"]]
    gave_up = rated(step(completion("x", 1)), finish="give_up")
    assert [s.steps for s in read(tmp_path / "x.jsonl", gave_up, good)[0]] == [["a"]]


ONE = step(completion("a", 1))


@pytest.mark.parametrize(
    "bad, says",
    [
        (rated(step({"text": "a"})), "step 1: completion 0: rating is missing"),
        (rated(step(completion("a", 2))), "step 1: completion 0: rating is 2, not -1, 0, 1"),
        (rated(step(completion("a", "1"))), "rating is '1', not a number or null"),
        (rated(step(completion("a", True))), "rating is True, not a number or null"),
        (rated(step(completion(None, 1))), "text is None, not a text"),
        (rated(step(completion(" ", 1))), "text is empty"),
        (rated(step(completion("\ud800", 1))), "it is not UTF-8 text"),
        (rated(step("a")), "step 1: completion 0: it is 'a', not an object"),
        (rated(ONE, step(completion("a", 1), chosen=1)), "step 2: completion 1 was chosen of 1"),
        (rated(step(completion("a", 1), chosen=-1)), "completion -1 was chosen"),
        (rated(step(completion("a", 1), chosen="0")), "chosen_completion is '0', not a number"),
        (rated(ONE | {"completions": "a"}), "step 1: completions is 'a', not a list or null"),
        (rated({"completions": []}), "step 1: human_completion is missing"),
        (rated(ONE | {"human_completion": 3}), "human_completion is 3, not an object, a text or null"),
        (rated(ONE | {"human_completion": {}}), "human_completion: text is missing"),
        (rated(7), "step 1: it is 7, not an object"),
        (rated(ONE, label=None), "label is None, not an object"),
        (rated(ONE, label={"steps": None, "finish_reason": "solution"}), "steps is None, not a l"),
        (rated(ONE, label={"steps": []}), "label: finish_reason is missing"),
        (rated(ONE, question={"problem": 3}), "question: problem is 3, not a text"),
        (rated(ONE, question={"problem": ""}), "the problem is empty"),
        (rated(ONE, question={}), "question: problem is missing"),
        (rated(ONE, is_quality_control_question="no"), "is 'no', not true or false"),
        (GOOD, "has rows of two forms"),
    ],
)
def test_a_hostile_row_of_prm800k_is_one_line(tmp_path, bad, says):
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path / "x.jsonl", rated(ONE), bad)
    assert "\n" not in str(caught.value)
    assert "line 2: " in str(caught.value) or bad is GOOD


def test_prm800k_has_no_outcomes(tmp_path):
    path = tmp_path / "phase.jsonl"
    read(path, *[rated(ONE, question={"problem": f"{i}?"}) for i in range(20)])
    with pytest.raises(UserError, match="--outcome needs answers that are right or wrong"):
        train_prm.main(argv(path, tmp_path / "x", "--outcome"))
    assert train_prm.main(argv(path, tmp_path / "x", "--epochs", "1")) == 0
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert "val_best_last" not in summary and summary["val_auc"] is None  # no step is wrong
    assert json.loads((tmp_path / "x/run_args.json").read_text())["args"]["source"] == (
        "prm800k phase 1"
    )


def test_phase_1_is_fetched_from_pinned_places_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGSM_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []
    monkeypatch.setattr(hub, "_fetch", lambda url, size: asked.append(url) or b"other bytes")
    with pytest.raises(UserError, match="cannot get phase1_train.jsonl.*not the expected file"):
        steps.load("prm800k", None, None)
    assert len(asked) == 2 and all("PRM800K" in u or "openai/prm800k" in u for u in asked)
    assert "7ecc794703b2877f63226f2477a49b34f9b25163" in asked[0]
    assert "547b19506677a59037ee888838834b65e9b1ddd4" in asked[1]
    assert not [*tmp_path.glob("*.jsonl")]
