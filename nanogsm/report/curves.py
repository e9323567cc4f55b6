"""The page's curves: which metrics of metrics.jsonl are drawn, and what a healthy one looks like.

docs/metrics.md says more about each metric, and what to do if it is not healthy.
"""

from typing import NamedTuple

from nanogsm.report import charts
from nanogsm.report.stages import Stage
from nanogsm.report.words import escape, method, points, reward_is_a_share, settings


class Curve(NamedTuple):
    title: str
    healthy: str  # one line
    share: bool = False


CURVES = {  # key in metrics.jsonl: its panel
    "reward": Curve(
        "mean reward of sampled answers",
        "Rises over tens of steps. If it stays flat, the policy does not learn.", True),
    "val_exact_match": Curve(
        "exact match on held-out problems",
        "Rises. Judge the run by this one: greedy answers to problems it does not train on.", True),
    "val_reward": Curve(
        "mean reward on held-out problems",
        "Rises. Judge the run by this one: greedy answers to problems it does not train on."),
    "loss": Curve(
        "training loss, nats per token",
        "Falls fast at first, then slowly. If it rises or jumps, the learning rate is too high."),
    "val_loss": Curve(
        "loss on held-out problems, nats per token",
        "Falls with the training loss. If it rises meanwhile, the model learns answers by heart."),
    "kl_sequence": Curve(
        "KL from the reference, nats per answer",
        "Grows slowly from 0. It is the distance from the start, and above 30 that is far."),
    "entropy": Curve(
        "entropy, nats per token",
        "Falls slowly. Near 0 the policy tries almost nothing new."),
    "value_loss": Curve(
        "value loss",
        "Low. Above 0.125 for many steps, the critic is worse than one constant guess."),
    "explained_variance": Curve(
        "explained variance of the critic",
        "Rises from 0 towards 1. PPO also works near 0. Far below 0 the critic does harm."),
    "groups_without_spread": Curve(
        "groups whose answers all earned the same",
        "Low: such a group teaches nothing. Near 100% almost nothing is learned.", True),
    "clipped": Curve(
        "policy ratios that were clipped",
        "A few tenths of a percent. Above 20% the updates are too large.", True),
    "value_clipped": Curve(
        "values that were clipped",
        "Low. If it stays high, the critic is held back.", True),
    "truncated": Curve(
        "answers cut at the token limit",
        "Near 0. Above 20% the limit is too low, or the policy no longer ends its answers.", True),
    "response_tokens": Curve(
        "length of an answer, tokens",
        "Changes slowly. A quick rise with many answers cut means answers without an end."),
    "worked": Curve(
        "answers that show a calculation",
        "Has no target. It tells how the way of answering changes.", True),
    "right_by_value_only": Curve(
        "answers right by value, not by text",
        "Low. If it grows, the policy writes right answers in ways that only the grader reads.",
        True),
    "grad_norm": Curve(
        "gradient norm",
        "Changes slowly. A jump points at an odd example, or at too high a learning rate."),
    "value_grad_norm": Curve(
        "gradient norm of the critic's own weights",
        "Changes slowly, on a scale of its own."),
    "lr": Curve(
        "learning rate",
        "Follows the schedule: up during the warm-up, then down along a cosine."),
    "tokens_per_s": Curve(
        "tokens per second",
        "Level. A drop means that something else used the machine."),
}  # fmt: skip


CURVES_OF_REWARD_MODELS = {
    "loss": Curve(
        "training loss, nats per label",
        "Falls from about 0.69, which is to know nothing. It stays above 0 if labels are shares."),
    "val_loss": Curve(
        "loss on held-out problems, nats per label",
        "Falls with the training loss. If it rises meanwhile, train for fewer epochs."),
    "val_auc": Curve(
        "AUC of the steps of held-out problems",
        "Rises from 0.5, which is chance. Part of it is telling easy problems from hard ones."),
    "val_pairs": Curve(
        "right answers above wrong ones to the same problem",
        "Rises from 50%, which is chance. A judge that is near it cannot choose the best answer.",
        True),
    "val_best_last": Curve(
        "best answer by its last value is right",
        "Lies above the share of all answers that are right. Otherwise it does not help to choose.",
        True),
    "val_best_least": Curve(
        "best answer by its least value is right",
        "Lies above the share of all answers that are right, too.", True),
    "val_first_wrong": Curve(
        "first wrong step is the first called wrong",
        "Rises. Read it together with the next: one that calls every step wrong is no judge.",
        True),
    "val_all_right": Curve(
        "answers without a wrong step called so",
        "Rises, or stays high.", True),
    "grad_norm": CURVES["grad_norm"],
    "head_grad_norm": Curve(
        "gradient norm of the head",
        "Changes slowly, on a scale of its own."),
    "lr": CURVES["lr"]._replace(title="learning rate of the network"),
    "tokens_per_s": CURVES["tokens_per_s"],
}  # fmt: skip


def curves_section(stages: list[Stage]) -> str:
    """One panel per metric. All SFT runs share their panels, all runs with rewards theirs, and all
    reward models theirs."""
    parts = []
    for family, curves in enumerate((CURVES, CURVES, CURVES_OF_REWARD_MODELS)):
        of = lambda args: {"SFT": 0, "PRM": 2, "ORM": 2}.get(method(args), 1)  # noqa: E731
        runs = [stage for stage in stages if stage.metrics and of(stage.args) == family]
        kinds = escape(", ".join(dict.fromkeys(method(stage.args) for stage in runs)))
        names = [stage.name for stage in runs]
        last = max((row["step"] for stage in runs for row in stage.metrics), default=0)
        share_of_right = all(reward_is_a_share(stage.args) for stage in runs)
        figures = []
        for key, curve in curves.items():
            lines = [(stage.name, points(stage.metrics, key)) for stage in runs]
            never = key == "worked" and not any(y for _, line in lines for _, y in line)
            if any(line for _, line in lines) and not never:  # MATH's answers have no annotations
                share = curve.share and (key != "reward" or share_of_right)
                panel = charts.Panel(curve.title, lines, share, "step", last)
                drawn, caption = charts.page([panel], names), escape(curve.healthy)
                figures.append(f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")
        if figures:
            items = [f"<li><b>{escape(s.name)}</b>: {settings(s.args)}.</li>" for s in runs]
            parts.append(f"<h2>{kinds}: metrics by step</h2><ul>{''.join(items)}</ul>")
            parts.append('<p class="dim">The line below a curve says what a healthy one looks like.'
                         "</p>")  # fmt: skip
            parts.append(f'<div class="curves">{"".join(figures)}</div>')
    return "\n".join(parts)
