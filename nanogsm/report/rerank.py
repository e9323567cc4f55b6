"""Choosing among several answers to a problem by a critic: evaluate.py --samples 8 --rerank RUN.

The critic of a PPO run has learned to predict what an answer will earn, from any token on. It reads
each sampled answer and gives it a value. best@k is the share of the problems whose answer of the
highest value is right. weighted_maj@k is a vote in which an answer counts by its value.

A value is the critic's prediction at the position that predicts the end token, having read the
whole answer. (That is the last position it was trained at.) `--rerank-by least` takes the least of
its predictions at the end of every line, as process rewards are used: one bad step spoils the rest.
An answer is encoded again from its text, as a training example is.
"""

import math

import torch

from nanogsm import UserError, data, distributed
from nanogsm.report.scores import majority, mcnemar
from nanogsm.run.critic import Critic, find_critic, load_critic


def critic_for(run: str, problems: list[data.Problem]) -> Critic:
    """What `rate` needs. Called before the work: UserError if there is no critic, or if the
    problems have no answers to count by."""
    if any(data.extract_answer(problem.answer) is None for problem in problems):
        raise UserError("--rerank needs problems with known answers")
    return find_critic(run)


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


@torch.no_grad()
def rate(critic: Critic, rows: list[dict], args) -> None:
    """Add a "value" to each row. args: evaluate.py's."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    trunk, head, tokenizer = load_critic(critic, dtype, args.device)
    examples = [example_of(tokenizer, critic.prompt, row, args.rerank_by) for row in rows]
    values = torch.zeros(len(rows), device=trunk.device)
    starts = range(0, len(rows), args.batch_size)
    for some in distributed.deal([slice(i, i + args.batch_size) for i in starts], trunk):
        ids, mask, lengths = data.collate(examples[some], tokenizer.pad_id, trunk.device)
        hidden = trunk(ids, lengths).float()  # (b, T, D)
        value = (hidden * head.weight[0]).sum(-1) + head.bias  # (b, T), as train_ppo.Models.value
        values[some] = value.masked_fill(~mask.to(trunk.device), math.inf).amin(1)
    distributed.add_up(values)
    for row, value in zip(rows, values.tolist()):
        row["value"] = value


def summarise(rows: list[dict], args) -> dict:
    """What the values make of k samples a problem, and exact paired tests of it."""
    k = args.samples
    groups = [rows[i : i + k] for i in range(0, len(rows), k)]
    right = {
        "the first answer": [group[0]["correct"] for group in groups],
        f"maj@{k}": [majority(group) for group in groups],
        f"best@{k}": [max(group, key=lambda row: row["value"])["correct"] for group in groups],
        f"weighted_maj@{k}": [
            majority(group, [max(0.0, row["value"]) for row in group]) for group in groups
        ],
    }
    tests = []
    for a, b in (("the first answer", f"best@{k}"), (f"maj@{k}", f"best@{k}"),
                 (f"maj@{k}", f"weighted_maj@{k}")):  # fmt: skip
        fixed = sum(y and not x for x, y in zip(right[a], right[b]))
        broken = sum(x and not y for x, y in zip(right[a], right[b]))
        points = 100 * (fixed - broken) / len(groups)
        tests.append({"of": b, "against": a, "points": points, "fixed": fixed, "broken": broken,
                      "p": mcnemar(broken, fixed)})  # fmt: skip
    shares = {name: sum(right[name]) / len(groups) for name in (f"best@{k}", f"weighted_maj@{k}")}
    return shares | {"rerank": {"run": args.rerank, "by": args.rerank_by, "tests": tests}}


def print_tests(tests: list[dict]) -> None:
    for t in tests:
        print(f"{t['of']} against {t['against']}: {t['points']:+.1f} points, {t['fixed']} fixed, "
              f"{t['broken']} broken, exact McNemar p = {t['p']:.2g}")  # fmt: skip
