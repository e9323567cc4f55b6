"""Choosing among several answers to a problem by a critic: evaluate.py --samples 8 --rerank RUN.

The critic of a PPO run has learned to predict what an answer will earn, from any token on. It reads
each sampled answer and gives it a value. best@k is the share of the problems whose answer of the
highest value is right. weighted_maj@k is a vote in which an answer counts by its value.

A value is the critic's prediction at the position that predicts the end token, having read the
whole answer. (That is the last position it was trained at.) `--rerank-by least` takes the least of
its predictions at the end of every line, as process rewards are used: one bad step spoils the rest.
An answer is encoded again from its text, as a training example is.

A process reward model of train_prm.py is used in the same way. Its values are probabilities, and
each row also gets the list of them, step by step, as "step_values".
"""

import torch

from nanogsm import UserError, data, distributed, steps
from nanogsm.report.scores import majority, paired_tests
from nanogsm.run import machine
from nanogsm.run.critic import Critic, find_critic, load_critic


def critic_for(run: str, problems: list[data.Problem], of_data: str = "") -> Critic:
    """What `rate` needs. Called before the work: UserError if there is no critic, if the problems
    have no answers to count by, or if the critic may have been trained on them."""
    if any(data.extract_answer(p.answer, p.boxed) is None for p in problems):
        raise UserError("--rerank needs problems with known answers")
    critic = find_critic(run)
    check_unseen(critic, run, of_data)
    return critic


def check_unseen(critic: Critic, run: str, of_data: str) -> None:
    """UserError if a model trained on PRM800K may have seen problems of `of_data`. PRM800K holds
    4,500 of the 5,000 test problems of MATH. Only the other 500 are test problems for it."""
    source = critic.args.get("source", "")
    seen = of_data != "math500" if source.endswith("phase 2") else of_data == "math"
    if source.startswith(steps.PRM800K) and seen:
        raise UserError(f"{run} was trained on {source}, which has test problems of MATH: evaluate "
                        "it with --data math500")  # fmt: skip


def example_of(tokenizer, prompt: data.Prompt, row: dict, by: str) -> data.Example:
    """A row's question and answer without an end token. The mask is 1 on the tokens after which the
    critic is asked."""
    text = data.cut(row["completion"])
    ids, mask = data.encode(tokenizer, prompt, row["question"], text)
    if not text:
        ids = data.encode(tokenizer, prompt, row["question"])[0] + [0]
    ids = ids[:-1]  # the end token is what the last position predicts
    ends = [m and by == "least" and "\n" in tokenizer.decode([i]) for i, m in zip(ids, mask)]
    return data.Example(ids, [*map(int, ends[:-1]), 1], row["index"])


def stepwise(tokenizer, prompt: data.Prompt, row: dict) -> data.Example:
    """The same for a process reward model: the mask is 1 on the last token of every step."""
    lines = steps.steps_of(row["completion"])
    if not lines:
        return example_of(tokenizer, prompt, row, "last")
    ids, ends = steps.encode(tokenizer, prompt, row["question"], lines)
    return data.Example(ids[:-1], [int(t in ends) for t in range(len(ids) - 1)], row["index"])


@torch.no_grad()
def values_of(critic: Critic, rows: list[dict], args) -> list[list[float]]:
    """The values of each row at the positions that are asked: all steps of an answer for a process
    reward model, and for a critic the end, or with --rerank-by least every line's end."""
    dtype = machine.dtype_of(args.precision)
    trunk, head, tokenizer = load_critic(critic, dtype, args.device)
    is_prm = critic.kind == "prm"
    examples = [
        stepwise(tokenizer, critic.prompt, row) if is_prm
        else example_of(tokenizer, critic.prompt, row, args.rerank_by)
        for row in rows
    ]  # fmt: skip
    found = []  # (place of the first row, values of each row at the positions that are asked)
    starts = range(0, len(rows), args.batch_size)
    for some in distributed.deal([slice(i, i + args.batch_size) for i in starts], trunk):
        ids, mask, lengths = data.collate(examples[some], tokenizer.pad_id, trunk.device)
        hidden = trunk(ids, lengths).float()  # (b, T, D)
        value = (hidden * head.weight[0]).sum(-1) + head.bias  # (b, T), as train_ppo.Models.value
        value = (value.sigmoid() if is_prm else value)[mask.to(trunk.device)]
        of_rows = value.split([sum(example.mask) for example in examples[some]])
        found.append((some.start, [values.tolist() for values in of_rows]))
    everything = sorted(pair for share in distributed.gathered(found) for pair in share)
    return [values for _, of_rows in everything for values in of_rows]


def one_value(values: list[float], by: str) -> float:
    """An answer's value from `values_of`. by: --rerank-by."""
    return min(values) if by == "least" else values[-1]


def rate(critic: Critic, rows: list[dict], args) -> None:
    """Add a "value" to each row, and "step_values" if the critic is a process reward model. args:
    evaluate.py's, of which precision, device, batch_size and rerank_by are read."""
    for row, values in zip(rows, values_of(critic, rows, args)):
        row["value"] = one_value(values, args.rerank_by)
        if critic.kind == "prm":
            row["step_values"] = [round(value, 4) for value in values]


def summarise(rows: list[dict], args) -> dict:
    """What the values make of k samples a problem, and exact paired tests of it."""
    k = args.samples
    groups = [rows[i : i + k] for i in range(0, len(rows), k)]
    best, vote = f"best@{k}", f"weighted_maj@{k}"
    right = {
        "the first answer": [group[0]["correct"] for group in groups],
        f"maj@{k}": [majority(group) for group in groups],
        best: [max(group, key=lambda row: row["value"])["correct"] for group in groups],
        vote: [majority(group, [max(0.0, row["value"]) for row in group]) for group in groups],
    }
    tests = paired_tests(
        right, [(best, "the first answer"), (best, f"maj@{k}"), (vote, f"maj@{k}")]
    )
    shares = {name: sum(right[name]) / len(groups) for name in (best, vote)}
    return shares | {"rerank": {"run": args.rerank, "by": args.rerank_by, "tests": tests}}


def print_tests(tests: list[dict]) -> None:
    for t in tests:
        print(f"{t['of']} against {t['against']}: {t['points']:+.1f} points, {t['fixed']} fixed, "
              f"{t['broken']} broken, exact McNemar p = {t['p']:.2g}")  # fmt: skip
