"""The PPO experiments in experiments/: pairing, tables, the ablation's rows and its patches."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES

import train_ppo
from experiments import ppo_ablation, ppo_curves, ppo_methods
from nanogsm import UserError, data
from nanogsm.optim import AdamW
from nanogsm.report import stages


def parsed(*flags):
    return train_ppo.parse_args(["--tiny", "--device", "cpu", *flags])


# ---- ppo_curves


SUMMARY = dict.fromkeys(stages.NEEDED, 0) | {"flexible_accuracy": 0.0, "temperature": 0.0}


def made_run(folder, args, right, steps=(), of=10, question="{}?", **summary):
    """A run folder with one evaluation on ten test problems. right: which, or how many of the first
    problems, are right."""
    folder.mkdir(parents=True)
    info = {"prompt": data.Prompt().settings(), "commit": "abc"}
    record = {"args": {"val_examples": 2, "seed": 0} | args, "info": info}
    (folder / "run_args.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    right = range(right) if isinstance(right, int) else right
    rows = [
        {"index": i, "correct": i in right, "question": question.format(i), "gold": 1.0,
         "completion": "1", "answer": 1.0, "flexible": False, "truncated": False, "tokens": 1}
        for i in range(of)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "eval-test-10.jsonl").write_text(text)
    (folder / "eval-test-10.json").write_text(json.dumps(SUMMARY | summary))
    return folder


def test_pairing_counts_what_was_fixed_and_broken_and_refuses_other_questions(tmp_path):
    before = made_run(tmp_path / "before", {}, 3)
    # 1 stays right, 2 are broken, 5 are fixed
    after = made_run(tmp_path / "after", {}, (0, 4, 5, 6, 7, 8))
    found = ppo_curves.before_and_after(before, after)
    assert (found["before"], found["after"], found["fixed"], found["broken"]) == (0.3, 0.6, 5, 2)
    # Two-sided, of a fair coin that is tossed 7 times.
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 7 + 21) / 2**7)
    two = made_run(tmp_path / "two", {}, 7)
    for run, right in ((before, 0), (two, 9)):  # a second evaluation, of more problems
        for ending in ("json", "jsonl"):
            text = (run / f"eval-test-10.{ending}").read_text().replace("?", f"? {right}")
            (run / f"eval-test-99.{ending}").write_text(text)
    found = ppo_curves.before_and_after(before, two, "eval-test-10.jsonl")
    assert (found["before"], found["after"]) == (0.3, 0.7)
    with pytest.raises(UserError, match="eval-test-99.jsonl and .* about different problems"):
        ppo_curves.before_and_after(before, two)
    with pytest.raises(UserError, match="no evaluation in common"):
        ppo_curves.before_and_after(before, two, "eval-test-5.jsonl")
    fewer = made_run(tmp_path / "fewer", {}, 3, of=9)
    others = made_run(tmp_path / "others", {}, 3, question="Other {}?")
    sampled = made_run(tmp_path / "sampled", {}, 3, temperature=1.0, precision="bf16")
    bare = made_run(tmp_path / "bare", {}, 3, [{"step": 1, "tokens": 1, "seconds": 1.0}])
    for file in bare.glob("eval-*"):
        file.unlink()
    for run, why in (
        (fewer, "were asked different problems"),
        (others, "about different problems"),
        (sampled, r"in different ways \(temperature, precision\)"),
        (bare, "have no evaluation in common"),
    ):
        with pytest.raises(UserError, match=why):
            ppo_curves.before_and_after(before, run)


def test_curves_shows_runs_by_recipe_and_by_method(tmp_path, capsys):
    steps = [
        {"step": 0, "val_exact_match": 0.25},
        {"step": 1, "reward": 0.5, "exact_match": 0.5, "worked": 0.5, "response_tokens": 40.0,
         "tokens": 100, "seconds": 2.0, "peak_memory": 2**30, "explained_variance": None},
        {"step": 2, "reward": 0.75, "exact_match": 0.75, "worked": 0.75, "response_tokens": 50.0,
         "tokens": 150, "seconds": 3.0, "peak_memory": 2**31, "explained_variance": 0.5},
    ]  # fmt: skip
    start = tmp_path / "sft"
    made_run(start, {"recipe": "original"}, 3)
    runs = {"original": (4, None), "tuned": (7, None), "rloo": (8, "rloo")}
    for name, (correct, advantage) in runs.items():
        recipe = "tuned" if advantage else name
        args = {"recipe": recipe, "init": str(start), "advantage": advantage, "kl_coef": 0.1}
        made_run(tmp_path / name, args, correct, steps)
    out = ["--out", str(tmp_path / "out/ppo")]
    argv = [*(str(tmp_path / name) for name in ("original", "tuned")), *out]
    assert ppo_curves.main(argv) == 0
    found = json.loads((tmp_path / "out/ppo.json").read_text())
    assert [(r["name"], r["before"], r["after"]) for r in found] == [
        ("original", 0.3, 0.4),
        ("tuned", 0.3, 0.7),
    ]
    assert (found[1]["steps"], found[1]["seconds"]) == (2, 5.0)
    assert found[1]["peak_memory"] == 2**31
    assert found[1]["tokens_per_s"] == 50 and found[1]["curves"]["worked"] == [[1, 0.5], [2, 0.75]]
    assert found[1]["curves"]["val_exact_match"] == [[0, 0.25]]
    printed = capsys.readouterr().out
    assert "| tuned | 0 | 30.0% | 70.0% [" in printed and "| 2.5 | 2.00 GiB |" in printed
    svg = (tmp_path / "out/ppo.svg").read_text()
    titles = ppo_curves.CURVES
    assert [titles[key] in svg for key in titles] == [key in ppo_curves.USUAL for key in titles]

    argv = [str(tmp_path / "tuned"), str(tmp_path / "rloo"), "--by", "method", *out]
    assert ppo_curves.main([*argv, "--curves", "reward", "explained_variance"]) == 0
    assert "| RLOO | 0 | 30.0% | 80.0% [" in capsys.readouterr().out
    svg = (tmp_path / "out/ppo.svg").read_text()
    assert ">PPO<" in svg and titles["explained_variance"] in svg and titles["worked"] not in svg

    of_model = made_run(tmp_path / "of-model", {"recipe": "tuned", "init": "tiny"}, 3, steps)
    new = made_run(tmp_path / "new", {"recipe": "tuned", "init": str(start)}, 3)
    for path, why in (
        (start, "is no run of train_ppo.py"),
        (tmp_path, "is no run of train_ppo.py"),
        (of_model, "started from tiny, which is no run"),
        (new, "no step yet"),
    ):
        with pytest.raises(UserError, match=why):
            ppo_curves.main([str(path), *out])
    with pytest.raises(UserError, match="cannot write .*tuned/metrics.jsonl/x: "):
        ppo_curves.main([*argv, "--out", str(tmp_path / "tuned/metrics.jsonl/x")])


# ---- ppo_ablation


def test_every_row_of_the_ablation_is_a_command_that_parses():
    rows = ppo_ablation.rows()
    some = {"original", "tuned", "original, but tuned's gamma", "tuned, but a separate critic"}
    assert some <= rows.keys()
    for row, (flags, _) in rows.items():
        assert parsed(*flags).recipe == row.split(",")[0]
    assert parsed(*rows["original, but tuned's gamma"][0]).gamma == 1.0


def test_a_row_takes_one_setting_from_the_other_recipe_and_no_more():
    """Both ways, and for every setting in which the recipes differ. Micro-batch and accumulation
    are one setting: their product is the number of answers in an update."""
    ours, theirs = vars(parsed("--recipe", "tuned")), vars(parsed("--recipe", "original"))
    differ = {name for name in ours if ours[name] != theirs[name]} - {"recipe"}
    rows, changed = ppo_ablation.rows(), set()
    for row, (flags, _) in rows.items():
        recipe, _, change = row.partition(", but ")
        own, other = (ours, theirs) if recipe == "tuned" else (theirs, ours)
        args = vars(parsed(*flags))
        moved = {name for name in args if name != "left_open" and args[name] != own[name]}
        if "'s " in change:
            names = set(ppo_ablation.KNOBS[change.split("'s ")[1]])
            assert moved and moved <= names and all(args[n] == other[n] for n in names), row
            changed |= moved
        elif "critic" in change:
            assert moved == {"critic" if "separate" in change else "critic_warmup"}, row
        else:
            assert not moved, row  # the recipe itself, or a patched function
    assert changed == differ
    more = parsed(*rows["original, but tuned's answers an update"][0])
    assert more.micro_batch * more.accumulation == 256


def test_the_table_pairs_rows_with_their_recipe_seed_by_seed(capsys):
    def result(row, seed, exact_match):
        return {"row": row, "seed": seed, "exact_match": exact_match, "mean_reward": 0.3,
                "kl_sequence": 1.0, "response_tokens": 40}  # fmt: skip

    ppo_ablation.table([
        result("original", 0, 0.40), result("original", 1, 0.50),
        result("original, but x", 0, 0.44), result("original, but x", 1, 0.56),
        result("original, but y", 0, 0.41), result("original, but y", 1, 0.55),
        result("original, but z", 0, 0.40), result("original, but z", 1, 0.50),
    ])  # fmt: skip
    # Differences of 4 and 6 points, 1 and 5: variances 2 and 8, pooled 5; 1.96 sqrt(5 / 2) = 3.1.
    table = capsys.readouterr().out
    assert "| original, but x | 50.0 | +5.0 ± 3.1 |" in table
    assert "| original, but y | 48.0 | +3.0 ± 3.1 |" in table
    assert "| original, but z | 45.0 | the same |" in table


def test_finished_rows_of_the_same_setting_are_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []
    numbers = ("exact_match", "mean_reward", "seconds", "kl_sequence", "response_tokens")

    def run(flags, seed, args, folder):
        ran.append((seed, args.steps))
        return dict.fromkeys(numbers, 0.5)

    monkeypatch.setattr(ppo_ablation, "run", run)
    argv = ["--out", str(tmp_path / "rows.jsonl"), "--seeds", "2", "--only", "tuned's gamma"]
    ppo_ablation.main([*argv, "--steps", "5"])
    ppo_ablation.main([*argv, "--steps", "5"])
    assert ran == [(0, 5), (1, 5)]
    ppo_ablation.main([*argv, "--steps", "6"])
    assert ran[2:] == [(0, 6), (1, 6)]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [5, 5, 6, 6]


def test_whitening_by_update_gives_each_update_mean_0_and_variance_1(monkeypatch):
    torch.manual_seed(0)
    mask = torch.rand(6, 7) < 0.7
    advantages = torch.where(mask, 3 + 2 * torch.randn(6, 7), 0.0)
    before = advantages.clone()
    rollout = train_ppo.Rollout(None, mask, *[None] * 5, indices=list(range(6)))
    setup = SimpleNamespace(args=SimpleNamespace(micro_batch=2, accumulation=2))
    seen = []
    monkeypatch.setattr(ppo_ablation, "real_update", lambda *given: seen.append(given))
    ppo_ablation.whitened_by_update(setup, rollout, advantages, "returns", 3)
    got = seen[0][2]
    assert seen[0] == (setup, rollout, got, "returns", 3) and torch.equal(advantages, before)
    for rows in (slice(0, 4), slice(4, 6)):
        part = got[rows][mask[rows]]
        assert part.mean().abs() < 1e-6 and part.var(correction=0) == pytest.approx(1, abs=1e-4)
    assert (got[~mask] == 0).all()


def test_bfloat16_weights_are_rounded_after_every_step_while_the_patch_holds(monkeypatch):
    p = torch.nn.Parameter(torch.full((4,), 1.0))
    optimizer = AdamW([("w", p)], lr=1e-3, bits=32)

    def update(setup, *rest):
        p.grad = torch.ones(4)
        setup.policy_optimizer.step(setup.policy_optimizer.grad_norm(), 9.0)  # as train_ppo does
        return rest

    monkeypatch.setattr(ppo_ablation, "real_update", update)
    setup = SimpleNamespace(policy_optimizer=optimizer)
    assert ppo_ablation.rounded_after_update(setup, 1, 2) == (1, 2)
    assert (p == 1).all()  # 0.999 is nearest to 1 in bfloat16
    update(setup)
    assert (p < 1).all()


def test_a_random_value_head_is_the_only_change_to_the_models(gemma):
    args = parsed("--recipe", "original", "--init", str(FIXTURES / "gemma3"))
    plain = train_ppo.build(gemma("gemma3")[0], args)
    random = ppo_ablation.random_value_head(gemma("gemma3")[0], args)
    assert not plain.value_head.weight.any() and random.value_head.weight.all()
    for p, q in zip(plain.actor.parameters(), random.actor.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("row", [
    "original, but whitened update by update", "tuned, but not whitened",
    "original, but bfloat16 weights", "original, but a random value head",
])  # fmt: skip
def test_the_patch_of_a_row_is_what_train_ppo_calls(row):
    _, patched = ppo_ablation.rows()[row]
    before = train_ppo.update, train_ppo.build, train_ppo.whiten
    with patched:
        during = train_ppo.update, train_ppo.build, train_ppo.whiten
    after = train_ppo.update, train_ppo.build, train_ppo.whiten
    assert sum(a is not b for a, b in zip(before, during)) == 1 and after == before


# ---- ppo_methods


def test_all_methods_get_the_same_rates_seeds_and_number_of_answers(capsys):
    assert ppo_methods.main(["--dry-run", "--steps", "5", "--rollouts", "64"]) == 0
    commands = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    runs = [parsed(*c[1:]) for c in commands if c[0] == "train_ppo.py"]
    assert len(runs) == 3 * 3 + 3 * 3 and len({args.out for args in runs}) == len(runs)
    same = {"steps", "rollouts", "recipe", "kl_coef", "optim", "micro_batch", "accumulation",
            "epochs", "max_new_tokens", "temperature", "clip"}  # fmt: skip
    for name in same:
        assert len({getattr(args, name) for args in runs}) == 1, name
    by_method = {}
    for args in runs:
        kind = args.advantage, args.group
        by_method.setdefault(kind, []).append((args.seed, args.lr, args.init))
    assert by_method.keys() == {(None, None), ("rloo", 8), ("grpo", 8)}
    assert len({tuple(found) for found in by_method.values()}) == 1
    assert [seed for seed, *_ in by_method[None, None]] == [0, 0, 0, 1, 2, 3]
    # The test split is asked after the search only.
    first = next(i for i, c in enumerate(commands) if c[0] == "evaluate.py")
    assert all("-0" in c[-1] for c in commands[:first] if c[0] == "train_ppo.py")


def test_each_term_gets_the_same_weights_and_nothing_else_differs(capsys):
    assert ppo_methods.main(["terms", "--dry-run", "--weights", "0.9", "0.3"]) == 0
    commands = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    runs = [parsed(*c[1:]) for c in commands if c[0] == "train_ppo.py"]
    weights = ("penalty_false", "penalty_no_answer", "penalty_overlong")
    searched = [tuple(getattr(args, name) for name in weights) for args in runs if args.seed == 0]
    zero, low, high = 0.0, 0.3, 0.9
    assert searched == [(zero, zero, zero), (low, zero, zero), (high, zero, zero),
                        (zero, low, zero), (zero, high, zero), (zero, zero, low),
                        (zero, zero, high)]  # fmt: skip
    assert len(runs) == 7 + 3 * 4 and len({args.out for args in runs}) == len(runs)
    for args in runs:
        changed = {k for k, v in vars(args).items() if v != getattr(runs[0], k)}
        assert changed <= {*weights, "seed", "init", "out", "val_every"}


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--rollouts", "100"], "--rollouts 100 is no multiple of --group 8"),
        (["--rates", "nan", "1", "2"], "--rates nan 1 2: give numbers above 0"),
        (["--rates", "1e-4", "inf", "2"], "--rates 0.0001 inf 2: give numbers above 0"),
        (["--rates", "0", "1", "2"], "--rates 0 1 2: give numbers above 0"),
        (["--rates", "1e-4", "2e-4", "0.0001"], "two of the values are the same"),
        (["--rates", "1e-4", "2e-4", "1.00000001e-4"], "two of the values are the same"),
        (["terms", "--rates", "nan", "1", "2"], "--rates nan 1 2: give numbers above 0"),
        (["terms", "--weights", "0.1", "0.91"], "--weights 0.1 0.91: give numbers above 0, at most "
         "0.9"),
        (["terms", "--weights", "0"], "--weights 0: give numbers above 0, at most 0.9"),
        (["terms", "--weights", "nan"], "--weights nan: give numbers above 0"),
        (["terms", "--weights", "0.3", "0.30"], "--weights 0.3 0.3: two of the values are"),
    ],
)  # fmt: skip
def test_settings_that_would_fail_later_are_refused_at_once(argv, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        ppo_methods.parse_args(argv)
    assert "\n" not in str(caught.value)


def test_groups_divide_the_answers_only_where_there_are_groups():
    assert ppo_methods.parse_args(["terms", "--rollouts", "100"]).rollouts == 100
    assert ppo_methods.parse_args(["--rollouts", "100", "--group", "5"]).group == 5


def test_the_best_setting_is_the_lower_of_equals():
    assert ppo_methods.best_setting({"0.0003": 0.5, "0.0001": 0.5, "5e-05": 0.4}) == "0.0001"
    assert ppo_methods.best_setting({"5e-05": 0.1, "0.0001": 0.2, "0.0003": 0.3}) == "0.0003"


def test_methods_are_compared_with_ppo_seed_by_seed(tmp_path, monkeypatch, capsys):
    """Runs that are there already: nothing is trained, and each comparison is paired by hand."""
    args = ppo_methods.parse_args(["--out", str(tmp_path), "--n", "10", "--seeds", "2"])
    validated = {"PPO": (0.2, 0.4, 0.3), "RLOO": (0.5, 0.4, 0.5), "GRPO": (0.1, 0.2, 0.3)}
    steps = [{"step": 0, "val_exact_match": 0.25},
             {"step": 1, "reward": 0.4, "exact_match": 0.5, "response_tokens": 40.0,
              "seconds": 60.0}]  # fmt: skip
    for seed in range(3):
        made_run(tmp_path / f"sft-{seed}", {}, 3)
        for method, found in validated.items():
            for rate, score in zip(args.rates, found):
                run = ppo_methods.folder(method, f"{rate:g}", seed, args)
                correct = {"PPO": 5, "RLOO": 7, "GRPO": 4}[method]
                made_run(run, {}, correct, steps)
                (run / "summary.json").write_text(json.dumps({"val_exact_match": score}))
    ran = []
    monkeypatch.setattr(ppo_methods.study, "run", lambda command: (ran.append(command), (0, ""))[1])
    assert ppo_methods.main(["--out", str(tmp_path), "--n", "10", "--seeds", "2"]) == 0
    assert not [command for command in ran if command[0] == "evaluate.py"]
    found = json.loads((tmp_path / "methods.json").read_text())
    assert {r["variant"]: r["setting"] for r in found["runs"]} == {
        "PPO": "0.00015", "RLOO": "5e-05", "GRPO": "0.00045",
    }  # fmt: skip
    rloo = next(r for r in found["runs"] if r["variant"] == "RLOO")
    pair = rloo["against_first"]
    assert (pair["fixed"], pair["broken"], pair["mcnemar_p"]) == (2, 0, 0.5)
    assert (rloo["before"], rloo["after"]) == (0.3, 0.7)
    assert rloo["curves"]["exact_match"] == [[512, 0.5]]  # by answers sampled
    assert rloo["last"] == {"response_tokens": 40.0}
    text = capsys.readouterr().out
    assert "| RLOO | 5e-05 | 1 | 30.0% | 70.0% |" in text and "| +20.0 | 2, 0 | 0.5 |" in text
    assert text.count("| PPO | 0.00015 |") == 2 and "| GRPO, mean | 0.00045 |" in text
    assert "answers sampled" in (tmp_path / "methods.svg").read_text()
