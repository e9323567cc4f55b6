"""nanogsm/rewards.py: each term by hand, where it stands, and the bound that no answer can beat."""

import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES

import train_ppo
from nanogsm import UserError, data, rewards
from nanogsm.generate import Answer
from nanogsm.store.hub import EMBEDDED

PROBLEM = data.Problem("3 * 4?", "<<3*4=12>>12\n#### 12", 7)


@pytest.fixture(scope="module", params=["tiny", "gemma3"])
def tokenizer(request):
    """The embedded model's, in which a digit is a token, and the fixture's."""
    return data.Tokenizer(EMBEDDED if request.param == "tiny" else FIXTURES / "gemma3")


def weights(false=0.0, no_answer=0.0, overlong=0.0, limit=100):
    return SimpleNamespace(penalty_false=false, penalty_no_answer=no_answer,
                           penalty_overlong=overlong, max_new_tokens=limit)  # fmt: skip


def answer_of(tokenizer, text, ends=True):
    ids = tokenizer.encode(text) + [tokenizer.eos_id] * ends
    return Answer([2, 3], ids, not ends, tokenizer.decode(ids))


def worth(tokenizer, text, args, ends=True):
    """The score of an answer and all its terms."""
    done = answer_of(tokenizer, text, ends)
    args.max_new_tokens = max(args.max_new_tokens, len(done.ids))
    terms = rewards.terms_of(tokenizer, done, args).get("terms", ())
    score = train_ppo.reward(data.cut(done.text), PROBLEM, done.truncated)
    return score + sum(value for *_, value in terms)


# ---------------------------------------------------------------------------------- the three terms


def test_a_false_annotation_is_charged_to_the_token_that_completes_it(tokenizer):
    """Found by hand: cut the answer after that token and it is complete, one earlier it is not."""
    text = "He has 3*4 = <<3*4=13>>13, and <<1+1=2>>2, so <<13+2=15>>15 or <<15-1=13>>13.\n#### 13"
    ids = tokenizer.encode(text)
    found = rewards.false_steps(tokenizer, ids)
    assert len(found) == 2  # the second and the third are true
    for place, whole in zip(found, ("<<3*4=13>>", "<<15-1=13>>")):
        assert whole in tokenizer.decode(ids[: place + 1])
        assert whole not in tokenizer.decode(ids[:place])
    assert rewards.false_steps(tokenizer, []) == rewards.false_steps(tokenizer, ids[:3]) == []


def test_the_same_annotation_twice_stands_at_two_tokens(tokenizer):
    ids = tokenizer.encode("<<1+1=3>> <<1+1=3>><<1+1=3>>")
    found = rewards.false_steps(tokenizer, ids)
    assert len(found) == len(set(found)) == 3 and found == sorted(found)
    assert found[-1] == len(ids) - 1


def test_each_false_annotation_costs_a_quarter_and_four_cost_everything(tokenizer):
    for n, cost in ((0, 0.0), (1, 0.1), (3, 0.3), (4, 0.4), (9, 0.4)):
        done = answer_of(tokenizer, "<<1+1=3>> " * n + "#### 12")
        terms = rewards.terms_of(tokenizer, done, weights(false=0.4, limit=10**6)).get("terms")
        assert sum(value for *_, value in terms) == pytest.approx(-cost)
        assert len(terms) == min(n, 4) and all(name == "false" for name, *_ in terms)


def test_an_answer_without_a_number_is_charged_at_its_last_token(tokenizer):
    args = weights(no_answer=0.3, limit=10**6)
    for text, charged in (("#### 12", False), ("#### 7", False), ("12", True), ("#### x", True),
                          ("####", True), ("so Question: #### 12", True)):  # fmt: skip
        done = answer_of(tokenizer, text)
        terms = rewards.terms_of(tokenizer, done, args)["terms"]
        assert terms == ([("no_answer", len(done.ids) - 1, -0.3)] if charged else []), text


def test_a_boxed_answer_is_an_answer_where_boxes_are_asked_for(tokenizer):
    args = weights(no_answer=0.3, limit=10**6)
    for text, boxed, charged in ((r"It is \boxed{12}.", True, False), ("#### 12", True, True),
                                 (r"It is \boxed{12}.", False, True)):  # fmt: skip
        done = answer_of(tokenizer, text)
        assert bool(rewards.terms_of(tokenizer, done, args, boxed)["terms"]) == charged, text


@pytest.mark.parametrize(
    "tokens, cost", [(1, 0), (79, 0), (80, 0), (81, 0.05), (90, 0.5), (99, 0.95), (100, 1)]
)
def test_overlong_rises_over_the_last_fifth(tokens, cost):
    assert rewards.overlong(tokens, 100) == pytest.approx(cost)


def test_without_weights_there_are_no_terms(tokenizer):
    done = answer_of(tokenizer, "<<1+1=3>>")
    assert rewards.terms_of(tokenizer, done, weights()) == {}


def test_terms_stand_at_their_columns():
    """Prompt of 3, answer of 4: answer token 0 is token 3, which column 2 chooses."""
    example = data.Example([2, 5, 6, 7, 8, 9, 1], [0, 0, 0, 1, 1, 1, 1], 0)
    terms = [("false", 0, -0.1), ("false", 2, -0.2), ("overlong", 3, -0.5)]
    answers = [{"example": example}, {"example": example, "terms": terms}]
    got = rewards.add_terms(torch.zeros(2, 6), answers)
    assert torch.allclose(got[1], torch.tensor([0, 0, -0.1, 0, -0.2, -0.5])) and not got[0].any()


def test_the_metrics_have_each_term_apart():
    rows = [{"terms": [("false", 3, -0.1), ("false", 5, -0.1), ("overlong", 9, -0.2)]},
            {"terms": []}, {"terms": [("overlong", 4, -0.4)]}, {"terms": []}]  # fmt: skip
    args = weights(false=0.4, overlong=0.4)
    args.group = 2
    got = rewards.figures(torch.tensor([1.0, 1.0, 0.0, 0.0]), rows, args)
    earned = [0.6, 1.0, -0.4, 0.0]
    mean = sum(earned) / 4
    assert got == pytest.approx({
        "reward": mean, "reward_std": (sum((x - mean) ** 2 for x in earned) / 4) ** 0.5,
        "reward_false": -0.05, "reward_overlong": -0.15, "groups_without_spread": 0.0,
    })  # fmt: skip
    args.group = None
    assert "groups_without_spread" not in rewards.figures(torch.zeros(4), rows, args)


# ---------------------------------------------------------------------------------------- the bound

PIECES = ["<<1+1=2>>", "<<1+1=3>>", "<<2*2=5>>5 ", "<<9=", ">>", "12", " so ", "\n", "<<x=y>>",
          "He has 3*4 = <<3*4=12>>12.", "#### 5\n", "Question:", ""]  # fmt: skip
CORNERS = [(0.9, 0, 0), (0, 0.9, 0), (0, 0, 0.9), (0.3, 0.3, 0.3), (0.45, 0, 0.45), (0, 0, 0)]


@pytest.mark.parametrize("corner", CORNERS)
def test_no_wrong_answer_is_worth_more_than_any_right_one(tokenizer, corner):
    """Answers from pieces drawn at random, at the limit of what they may weigh. The limit of tokens
    is that of the longest, so that some are overlong."""
    rng, right, wrong = random.Random(1), [], []
    for _ in range(60):
        body = "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
        for text, ends in itertools.product((body + "#### 12", "#### 12" + body, body), (1, 0)):
            done = answer_of(tokenizer, text, ends)
            scored = train_ppo.reward(data.cut(done.text), PROBLEM, done.truncated)
            (right if scored else wrong).append(
                worth(tokenizer, text, weights(*corner, limit=60), ends)
            )
    assert len(right) > 30 and len(wrong) > 100
    assert min(right) >= 1 - rewards.MOST - 1e-6 > max(wrong) and max(wrong) <= 0


@pytest.mark.parametrize("corner", CORNERS)
def test_spam_earns_nothing(tokenizer, corner):
    """<<1+1=2>>, however often, before or after the answer."""
    for ending in ("#### 5", "", "#### 12"):
        plain = worth(tokenizer, ending, weights(*corner, limit=10**6))
        for n in (1, 4, 30):
            for text in ("<<1+1=2>>" * n + ending, ending + " <<1+1=2>>" * n):
                spam = worth(tokenizer, text, weights(*corner, limit=10**6))
                assert spam <= plain, text
    right = worth(tokenizer, "<<1+1=3>>" * 30 + "#### 12", weights(*corner, limit=1))
    assert right > worth(tokenizer, "<<1+1=2>>" * 30 + "#### 5", weights(*corner, limit=10**6))


# ---------------------------------------------------------------------------------- flags and runs


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--penalty-false", "-0.1"], "--penalty-false is -0.1: give at least 0"),
        (["--penalty-overlong", "nan"], "--penalty-overlong"),
        (["--penalty-no-answer", "1"], "add up to 1: give at most 0.9"),
        (["--penalty-false", "0.5", "--penalty-overlong", "0.5"], "add up to 1: give at most 0.9"),
    ],
)
def test_weights_that_break_the_bound_are_refused(argv, says):
    with pytest.raises(UserError, match=says):
        train_ppo.parse_args([*argv, "--device", "cpu"])


def test_the_weights_are_0_unless_given_and_0_point_9_is_allowed():
    args = train_ppo.parse_args(["--device", "cpu"])
    assert [getattr(args, f"penalty_{name}") for name in rewards.TERMS] == [0, 0, 0]
    each = [word for name in ("false", "no-answer", "overlong")
            for word in (f"--penalty-{name}", "0.3")]  # fmt: skip
    train_ppo.parse_args([*each, "--device", "cpu"])


@pytest.mark.parametrize("more", [[], ["--advantage", "rloo", "--group", "2"]])
def test_a_run_is_rewarded_by_the_terms_and_says_so(tmp_path, monkeypatch, more):
    """The embedded model, untuned, gives no number. With 3 tokens some of its answers are cut."""
    seen, real = [], train_ppo.rollout_metrics

    def rollout_metrics(answers, rollout, rewards, *rest):
        seen.append((rollout.mask, rewards))
        return real(answers, rollout, rewards, *rest)

    monkeypatch.setattr(train_ppo, "rollout_metrics", rollout_metrics)
    argv = ["--tiny", "--device", "cpu", "--init", "tiny", "--steps", "1", "--rollouts", "4",
            "--micro-batch", "2", "--accumulation", "1", "--val-examples", "0", "--kl-coef", "0",
            "--max-new-tokens", "3", "--penalty-no-answer", "0.25", "--penalty-overlong", "0.5",
            "--out", str(tmp_path / "run"), *more]  # fmt: skip
    assert train_ppo.main(argv) == 0
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    rows = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    [(mask, per_token)] = seen
    tokens = mask.sum(1).tolist()
    cut, whole = ["overlong", 2, -0.5], ["no_answer", 2, -0.25]
    assert 0 < tokens.count(3) and [x["score"] for x in rows] == [0] * 4
    for n, answer in zip(tokens, rows, strict=True):
        assert answer["terms"] == ([whole, cut] if n == 3 else [["no_answer", n - 1, -0.25]])
    assert row["reward_no_answer"] == -0.25 and row["exact_match"] == 0
    assert row["reward_overlong"] == pytest.approx(-0.5 * tokens.count(3) / 4)
    assert row["reward"] == pytest.approx(row["reward_no_answer"] + row["reward_overlong"])
    assert "reward_false" not in row
    for b, n in enumerate(tokens):  # at the last action, and nowhere else
        want = [0.0] * (n - 1) + [-0.25 - 0.5 * (n == 3)]
        assert per_token[b][mask[b]].tolist() == pytest.approx(want)
