"""Terms that train_ppo.py can add to the score of an answer, which is 1 if it is right and else 0.

    flag                     costs an answer                                     at which token
    --penalty-false W        W / 4 for each false annotation, at most W          its last: >>
    --penalty-no-answer W    W if no "#### number" is in it (MATH: no box)       the last
    --penalty-overlong W     nothing up to 4/5 of --max-new-tokens, from there   the last
                             in proportion up to W at the limit (DAPO)

An annotation is GSM8K's <<3*4=12>>. Every weight W is 0 unless it is given.

There are penalties only, so there is nothing to farm: <<1+1=2>>, written a hundred times, earns
nothing. The weights must add up to at most MOST. A right answer that has ended keeps 1 - MOST or
more, whatever else is in it. A wrong answer has 0 or less. So no weights that are allowed make any
wrong answer worth more than a right one. (A reward of your own has a scale of its own: there the
bound does not hold. Nor need it hold with --gamma below 1, because the bound is on the plain sum.)

Trap: an answer without annotations has no false ones. Keep an eye on the metric `worked`.
"""

import bisect

import torch
from torch import Tensor

from nanogsm import data
from nanogsm.arithmetic import ANNOTATION, is_false

TERMS = ("false", "no_answer", "overlong")  # --penalty-..., and reward_... in metrics.jsonl
MOST = 0.9  # of all weights together
COUNTED = 4  # false annotations that cost something; further ones are free
SOFT = 1 / 5  # of the limit: where an answer begins to be overlong


def false_steps(tokenizer: data.Tokenizer, ids: list[int]) -> list[int]:
    """The tokens, as places in an answer's ids, that complete its false annotations."""
    def complete(place: int) -> int:
        """How many annotations are complete with this token."""
        return len(ANNOTATION.findall(tokenizer.decode(ids[: place + 1])))

    found = enumerate(ANNOTATION.finditer(tokenizer.decode(ids)), start=1)
    # A token more never completes fewer: so the n-th annotation's last token is found by bisection.
    tokens = range(len(ids))
    return [bisect.bisect_left(tokens, n, key=complete) for n, a in found if is_false(a)]


def overlong(tokens: int, limit: int) -> float:
    """0 up to (1 - SOFT) limit, 1 at the limit, in proportion between them (DAPO, 2503.14476)."""
    return max(0.0, 1 - (limit - tokens) / (SOFT * limit))


def terms_of(tokenizer: data.Tokenizer, done, args, boxed: bool = False) -> dict:
    """{"terms": [(name, token, what it adds to the reward there), ...]} of a generate.Answer. A
    token is a place in its ids. boxed: the answer belongs in a box. {} if all weights are 0."""
    weights = {name: getattr(args, f"penalty_{name}") for name in TERMS}
    if not any(weights.values()):
        return {}
    last = len(done.ids) - 1
    steps = false_steps(tokenizer, done.ids) if weights["false"] else []
    found = [("false", step, -weights["false"] / COUNTED) for step in steps[:COUNTED]]
    no_answer = data.extract_answer(data.cut(done.text), boxed) is None
    found.append(("no_answer", last, -weights["no_answer"] * no_answer))
    too_long = overlong(len(done.ids), args.max_new_tokens)
    found.append(("overlong", last, -weights["overlong"] * too_long))
    return {"terms": [term for term in found if term[2]]}


def add_terms(rewards: Tensor, answers: list[dict]) -> Tensor:
    """The rewards (N, T - 1), with every term at its token's column in train_ppo.py's drawing."""
    for row, answer in enumerate(answers):
        for _, token, value in answer.get("terms", ()):
            # The action at column t chooses token t + 1.
            rewards[row, answer["example"].mask.index(1) + token - 1] += value
    return rewards


def figures(scores: Tensor, answers: list[dict], args) -> dict:
    """What metrics.jsonl says of the answers' rewards: of their sums, of each term by itself, and,
    without a critic, how many groups have nothing to compare."""
    terms = [answer.get("terms", ()) for answer in answers]
    sums = [sum(value for *_, value in found) for found in terms]
    earned = scores + torch.tensor(sums, dtype=scores.dtype, device=scores.device)  # (N,)
    found = {"reward": earned.mean().item(), "reward_std": earned.std(correction=0).item()}
    for name in TERMS:
        if getattr(args, f"penalty_{name}"):
            own = (value for row in terms for term, _, value in row if term == name)
            found[f"reward_{name}"] = sum(own) / len(answers)
    if args.group:
        groups = earned.view(-1, args.group)
        equal = (groups == groups[:, :1]).all(1)
        found["groups_without_spread"] = equal.float().mean().item()
    return found
