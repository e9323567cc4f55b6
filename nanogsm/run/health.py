"""Warnings of a PPO step whose metrics are out of their healthy range, and what usually helps.

The limits are lenient. A run of gemma-2-2b that gained 12 points on GSM8K (verl's published log, in
github.com/eric-haibin-lin/verl-data) ended 17 nats per answer from its reference, clipped 0.3% of
its ratios, and had a critic that explained almost none of the variance from step 6 on.
"""

from collections.abc import Iterable

from torch import Tensor

from nanogsm import distributed


class Moved:
    """The share of a matrix's entries that a step changes: too small an update rounds to 0.

    It looks at one matrix only, the largest with at most 4 million entries, or the smallest of all.
    """

    def __init__(self, weights: Iterable[Tensor]):
        weights = list(weights)
        small = [p for p in weights if p.numel() <= 2**22] or [min(weights, key=Tensor.numel)]
        self.matrix = max(small, key=Tensor.numel)
        self.before = distributed.whole(self.matrix.detach()).clone()

    def share(self) -> float:
        return (distributed.whole(self.matrix.detach()) != self.before).float().mean().item()


def health(metrics: dict, critic_warmup: int) -> list[str]:
    """One line for each metric of a row of metrics.jsonl that needs attention."""
    m, lines = metrics, []
    if m["first_ratio_error"] > 1e-6:
        error = m["first_ratio_error"]
        lines.append(f"the first ratio is off by {error:.2g}: scoring and update disagree")
    if m["truncated"] > 0.2:
        lines.append(
            f"{m['truncated']:.0%} of the answers are cut off: raise --max-new-tokens, "
            "or lower --lr if the policy has forgotten how to end an answer"
        )
    if m["kl_sequence"] > 30:
        lines.append(
            f"the policy is {m['kl_sequence']:.0f} nats per answer from the reference: "
            "lower --lr or raise --kl-coef"
        )
    if m["clipped"] > 0.2:
        lines.append(f"{m['clipped']:.0%} of the ratios are clipped: lower --lr or --epochs")
    if m["step"] > critic_warmup + 3 and m.get("explained_variance", 0) < -0.5:
        lines.append(
            f"the critic's explained variance is {m['explained_variance']:.2g}, worse than a "
            "constant's: raise --value-lr or --critic-warmup"
        )
    if m["entropy"] < 0.02:
        lines.append(f"the entropy is {m['entropy']:.2g} nats: almost nothing is explored")
    if m["reward_std"] == 0:
        lines.append(
            f"every reward is {m['reward']:g}, so no answer is better than another: give more "
            "--rollouts, or problems that are sometimes solved"
        )
    elif m.get("groups_without_spread", 0) > 0.9:
        lines.append(
            f"in {m['groups_without_spread']:.0%} of the groups all answers earned the same, and "
            "teach nothing: raise --group, or give problems that are sometimes solved"
        )
    elif m["moved"] < 0.5 and m["step"] > critic_warmup:
        lines.append(f"only {m['moved']:.0%} of the weights moved: updates round to 0, raise --lr")
    return lines
