"""Reranking by a critic: its values against the models that PPO trained, the vote by hand, and what
is said where there is no critic that fits."""

import json
import shutil

import pytest
import torch
from conftest import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import train_ppo
from nanogsm import UserError, data
from nanogsm.report import rerank
from nanogsm.report.scores import majority, mcnemar
from nanogsm.run.critic import NAME, find_critic, load_critic
from nanogsm.store import hub

PPO = ["--init", str(FIXTURES / "gemma3"), "--steps", "2", "--rollouts", "4", "--rollout-batch",
       "4", "--micro-batch", "4", "--accumulation", "1", "--max-new-tokens", "6",
       "--val-examples", "0", "--lr", "1e-2", "--value-lr", "5e-2", "--device", "cpu",
       "--precision", "fp32", "--checkpointing", "none"]  # fmt: skip
KINDS = {
    "shared": [],
    "separate": ["--critic", "separate"],
    "LoRA": ["--lora"],
    "LoRA, separate": ["--lora", "--critic", "separate", "--lora-r", "4", "--lora-alpha", "12"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(kind) -> (run folder, the models as they were when it was saved). Every critic has a
    head that reads something."""
    place, known = tmp_path_factory.mktemp("runs"), {}
    rows = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(kind):
        if kind not in known:
            with pytest.MonkeyPatch.context() as patched:
                kept, real = [], train_ppo.save_critic

                def save(folder, models, found):
                    kept.append(models)
                    real(folder, models, found)

                patched.setattr(train_ppo, "save_critic", save)
                patched.setattr(train_ppo, "reward", lambda text, *_: float(len(text) % 2))
                out = place / kind.replace(", ", "-")
                argv = [*PPO, *KINDS[kind], "--data", str(place / "sums.jsonl")]
                assert train_ppo.main([*argv, "--out", str(out)]) == 0
            known[kind] = out, kept[0]
        return known[kind]

    return run


def row(completion, index=0):
    return {"index": index, "question": "3 + 4?", "completion": completion}


def by_hand(models, tokenizer, completion, by):
    """One forward of a whole training example; the head as a product in float64."""
    ids, mask = data.encode(tokenizer, data.Prompt(), "3 + 4?", completion)
    with torch.no_grad():
        hidden = models.critic(torch.tensor([ids]))[0].double()
    values = hidden @ models.value_head.weight[0].double() + models.value_head.bias.double()
    # Token t is predicted from position t - 1: the end token is the last.
    at = [len(ids) - 2]
    if by == "least":
        at += [t for t in range(len(ids) - 1) if mask[t] and "\n" in tokenizer.decode([ids[t]])]
    return min(values[t].item() for t in at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["last", "least"])
def test_the_values_are_those_of_the_critic_that_was_trained(trained, kind, by):
    """It is built again from files: for a separate critic from --init and the adapters."""
    folder, models = trained(kind)
    args = evaluate.parse_args(["--model", str(folder), "--samples", "2", "--temperature", "1",
                                "--device", "cpu", "--precision", "fp32", "--batch-size", "2",
                                "--rerank", str(folder), "--rerank-by", by])  # fmt: skip
    texts = ["7", "3 + 4 =\n7\n#### 7", "It is\nso", "a b c d e f", "x\ny\nz"]
    rows = [row(text, i) for i, text in enumerate(texts)]
    critic = find_critic(str(folder))
    assert critic.separate == ("separate" in kind)
    rerank.rate(critic, rows, args)
    tokenizer = data.Tokenizer(FIXTURES / "gemma3")
    want = [by_hand(models, tokenizer, text, by) for text in texts]
    assert [r["value"] for r in rows] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert max(want) - min(want) > 0.01


def test_an_empty_answer_has_the_value_of_its_prompt(trained):
    folder, models = trained("separate")
    tokenizer = data.Tokenizer(FIXTURES / "gemma3")
    example = rerank.example_of(tokenizer, data.Prompt(), row(" \n"), "last")
    assert example.ids == data.encode(tokenizer, data.Prompt(), "3 + 4?")[0]
    assert example.mask == [0] * (len(example.ids) - 1) + [1]


def test_what_the_model_asks_itself_after_its_answer_is_not_read():
    tokenizer = data.Tokenizer(FIXTURES / "gemma3")

    def example(text):
        return rerank.example_of(tokenizer, data.Prompt(), row(text), "least")

    assert example("so\n#### 7") == example(" so\n#### 7\n\nQuestion: 1 + 1?")
    assert sum(example("a\nb\n#### 7").mask) == 3 and sum(example("a").mask) == 1


# -------------------------------------------------------------------------------- what is reported


def sampled(*answers_and_values, gold=7.0):
    return [{"answer": a, "value": v, "correct": a == gold, "gold": gold}
            for a, v in answers_and_values]  # fmt: skip


def test_a_weighted_vote_by_hand():
    rows = sampled((7.0, 0.9), (8.0, 0.3), (8.0, 0.4))
    weights = [r["value"] for r in rows]
    assert not majority(rows) and majority(rows, weights)  # 0.9 against 0.7
    assert not majority(rows, [0.5, 0.3, 0.3])
    assert majority(rows, [0.5, 0.25, 0.25])  # the earliest wins a tie
    assert not majority(sampled((None, 5.0), (8.0, 0.1), (7.0, 0.0)), [5.0, 0.1, 0.0])
    assert not majority(sampled((None, 1.0)), [1.0])


def test_the_summary_and_its_tests_by_hand():
    """Three problems of three answers. Negative values count as 0 in the vote."""
    groups = [
        sampled((8.0, 0.1), (8.0, 0.1), (7.0, 0.9)),  # maj wrong, best right, vote right
        sampled((7.0, 0.2), (7.0, 0.1), (8.0, 0.8)),  # maj right, best wrong, vote wrong
        sampled((8.0, -0.9), (8.0, -0.8), (7.0, 0.1)),  # maj wrong, best right, vote right
    ]
    args = evaluate.parse_args(["--tiny", "--samples", "3", "--temperature", "1", "--rerank", "x",
                                "--device", "cpu"])  # fmt: skip
    got = rerank.summarise(sum(groups, []), args)
    assert got["best@3"] == pytest.approx(2 / 3) and got["weighted_maj@3"] == pytest.approx(2 / 3)
    first, best, vote = got["rerank"]["tests"]
    assert (first["fixed"], first["broken"]) == (2, 1) and first["against"] == "the first answer"
    assert (best["of"], best["against"], best["fixed"], best["broken"]) == ("best@3", "maj@3", 2, 1)
    assert vote["p"] == best["p"] == mcnemar(1, 2) and vote["points"] == pytest.approx(100 / 3)


def test_a_negative_value_takes_no_votes_away():
    args = evaluate.parse_args(["--tiny", "--samples", "3", "--temperature", "1", "--rerank", "x",
                                "--device", "cpu"])  # fmt: skip
    rows = sampled((7.0, -0.1), (7.0, 0.3), (8.0, 0.25))  # 0.3 against 0.25, and not 0.2
    assert rerank.summarise(rows, args)["weighted_maj@3"] == 1


def test_an_evaluation_reports_it_beside_pass_and_majority(trained, tmp_path, capsys):
    folder, _ = trained("separate")
    own = tmp_path / "own.jsonl"
    rows = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(3)]
    own.write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model", str(FIXTURES / "gemma3"), "--data", str(own), "--samples", "4",
            "--temperature", "1", "--max-new-tokens", "6", "--device", "cpu", "--precision",
            "fp32", "--out", str(tmp_path / "out"), "--rerank", str(folder)]  # fmt: skip
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert "best@4 against maj@4: " in out and "weighted_maj@4 against maj@4: " in out
    [file] = (tmp_path / "out").glob("eval-*rerank-last-separate.json")
    summary = json.loads(file.read_text())
    assert {"pass@4", "maj@4", "best@4", "weighted_maj@4"} <= summary.keys()
    assert summary["rerank"]["by"] == "last"
    lines = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == 12 and len({line["value"] for line in lines}) > 4
    plain = argv[: argv.index("--rerank")]
    assert evaluate.main(plain) == 0  # another file, with the same answers
    [other] = set((tmp_path / "out").glob("eval-*.jsonl")) - {file.with_suffix(".jsonl")}
    alone = [json.loads(line) for line in other.read_text().splitlines()]
    assert [r["completion"] for r in alone] == [r["completion"] for r in lines]
    assert "value" not in alone[0]


def test_a_result_is_not_replaced_by_one_of_another_critic(trained, tmp_path):
    """Two runs of one name. The name of a critic is that of its run, also if a folder in it is
    given."""
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    for place, kind in (("a", "shared"), ("b", "shared"), ("c", "LoRA")):
        shutil.copytree(trained(kind)[0], tmp_path / place / "judge")
    rewrite(tmp_path / "b/judge", **{"head.bias": torch.ones(1)})
    argv = ["--model", str(FIXTURES / "gemma3"), "--data", str(own), "--samples", "2",
            "--temperature", "1", "--max-new-tokens", "2", "--device", "cpu", "--precision",
            "fp32", "--out", str(tmp_path / "out"), "--rerank"]  # fmt: skip
    assert evaluate.main([*argv, str(tmp_path / "a/judge/model")]) == 0
    [file] = (tmp_path / "out").glob("*.json")
    assert file.stem.endswith("-rerank-last-judge")
    before = file.read_bytes()
    for place in ("b/judge", "c/judge", "c/judge/adapter"):  # another head, another trunk
        with pytest.raises(UserError, match="a result with values of another critic: choose anoth"):
            evaluate.main([*argv, str(tmp_path / place)])
    assert file.read_bytes() == before
    assert evaluate.main([*argv, str(tmp_path / "a/judge")]) == 0  # the same critic
    summary = json.loads(file.read_text())
    del summary["rerank_sha256"]  # as an earlier version wrote it
    file.write_text(json.dumps(summary))
    with pytest.raises(UserError, match="is a result with rerank .*a/judge: choose another"):
        evaluate.main([*argv, str(tmp_path / "b/judge")])


# ------------------------------------------------------------------------------- what does not fit


def test_the_file_says_what_it_is_and_which_trunk_it_belongs_to(trained):
    for kind in KINDS:
        folder, _ = trained(kind)
        with safe_open(folder / NAME, framework="pt") as file:
            metadata = file.metadata()
        trunk = str(FIXTURES / "gemma3") if "separate" in kind else str(folder)
        assert metadata["kind"] == "critic"
        assert metadata["trunk_sha256"] == hub.fingerprint(hub.find_model(trunk))


@pytest.fixture
def copied(trained, tmp_path):
    def copy(kind="separate"):
        return shutil.copytree(trained(kind)[0], tmp_path / "copy")

    return copy


def rewrite(folder, metadata=None, **tensors):
    with safe_open(folder / NAME, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(folder / NAME) | tensors, folder / NAME, old | (metadata or {}))


def refused(folder, says):
    with pytest.raises(UserError, match=says) as caught:
        load_critic(find_critic(str(folder)), torch.float32, "cpu")
    assert "\n" not in str(caught.value)


def test_a_head_of_another_size_is_one_line(copied):
    folder = copied()
    rewrite(folder, **{"head.weight": torch.zeros(1, 8)})
    refused(folder, r"has a head of shape \[1, 8\]; the model needs \[1, ")


def test_adapters_of_another_size_are_one_line(copied):
    folder = copied()
    record = json.loads((folder / "run_args.json").read_text())
    record["args"]["lora_r"] = 3
    (folder / "run_args.json").write_text(json.dumps(record))
    refused(folder, "its adapters do not fit")


def test_another_kind_is_one_line_and_none_is_a_critic(copied):
    folder = copied()
    rewrite(folder, {"kind": "reward"})
    refused(folder, "of kind 'reward'")
    save_file(load_file(folder / NAME), folder / NAME)  # as earlier versions wrote it
    assert find_critic(str(folder)).separate


def test_a_trunk_that_has_changed_is_one_line(copied):
    folder = copied("shared")
    assert not find_critic(str(folder)).separate
    shutil.copy(FIXTURES / "gemma3/model.safetensors", folder / "model/model.safetensors")
    refused(folder, "its model, has changed since the critic was trained on it")


def test_a_digest_is_of_head_and_trunk(copied):
    folder = copied("shared")
    save_file(load_file(folder / NAME), folder / NAME)  # without metadata that name the trunk
    first = find_critic(str(folder)).digest()
    shutil.copy(FIXTURES / "gemma3/model.safetensors", folder / "model/model.safetensors")
    second = find_critic(str(folder)).digest()
    other = load_file(folder / NAME) | {"head.bias": torch.ones(1)}
    save_file(other, folder / NAME)
    assert len({first, second, find_critic(str(folder)).digest()}) == 3


def test_the_base_that_a_start_was_given_does_not_disturb_a_whole_model(copied):
    """--base belongs to --init. The result of full fine-tuning has no base."""
    folder = copied("shared")
    record = json.loads((folder / "run_args.json").read_text())
    record["args"]["base"] = str(FIXTURES / "gemma3")
    (folder / "run_args.json").write_text(json.dumps(record))
    load_critic(find_critic(str(folder)), torch.float32, "cpu")


def test_a_start_that_is_gone_is_one_line(copied):
    folder = copied()
    record = json.loads((folder / "run_args.json").read_text())
    record["args"]["init"] = "runs/gone"
    (folder / "run_args.json").write_text(json.dumps(record))
    refused(folder, "the rest of its critic is not there: there is no runs/gone")


@pytest.mark.parametrize("name", ["head.weight", "head.bias"])
def test_a_head_that_is_not_finite_or_not_of_numbers_is_one_line(copied, name):
    folder = copied()
    shape = load_file(folder / NAME)[name].shape
    for bad in (torch.full(shape, float("nan")), torch.ones(shape, dtype=torch.int32)):
        rewrite(folder, **{name: bad})
        refused(folder, f"is damaged: {name} is not made of finite numbers")


def test_a_run_without_a_critic_is_one_line(copied, tmp_path):
    folder = copied()
    record = json.loads((folder / "run_args.json").read_text())
    record["args"]["advantage"] = "rloo"
    (folder / "run_args.json").write_text(json.dumps(record))
    refused(folder, "was trained by rloo, which has no critic")
    del record["args"]["advantage"]
    (folder / "run_args.json").write_text(json.dumps(record))
    (folder / NAME).write_bytes(b"half of it")
    refused(folder, "is damaged")
    (folder / NAME).unlink()
    refused(folder, "has no value_head.safetensors")
    refused(tmp_path, "is not a run folder")


@pytest.mark.parametrize(
    "argv", [["--samples", "1"], ["--samples", "2", "--temperature", "1", "--ask", "3?"]]
)
def test_it_needs_several_answers_and_known_ones(argv):
    with pytest.raises(UserError, match="--rerank needs --samples above 1, and problems with"):
        evaluate.parse_args(["--tiny", "--rerank", "x", "--device", "cpu", *argv])


def test_problems_without_an_answer_are_refused():
    with pytest.raises(UserError, match="--rerank needs problems with known answers"):
        rerank.critic_for("x", [data.Problem("3?", "no number", 0)])
