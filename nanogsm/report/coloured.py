"""The steps of an answer on the HTML page, coloured by a process reward model.

    python -m nanogsm.report runs/sft-full-main runs/ppo-full-main --steps PRM_RUN

A line's colour goes from red, if the model says that it is wrong, to green. Its value stands before
it, in percent, for those who cannot tell the colours apart.
"""

from collections.abc import Callable
from types import SimpleNamespace

from nanogsm import UserError, steps
from nanogsm.report import rerank
from nanogsm.run import machine
from nanogsm.run.critic import find_critic

BATCH = 64  # answers that go through the model at once


def add_values(run: str, stages: list) -> None:
    """Add "step_values" to all rows of page.Stage objects, by the process reward model in `run`."""
    critic = find_critic(run)
    if critic.kind != "prm":
        raise UserError(f"--steps {run}: that is a critic, not a run of train_prm.py")
    for stage in stages:
        if stage.rows:
            rerank.check_unseen(critic, run, (stage.summary or {}).get("data", ""))
    device, precision = machine.pick_compute("auto", "auto")
    args = SimpleNamespace(device=device, precision=precision, batch_size=BATCH, rerank_by="last")
    rows = [row for stage in stages for row in [*stage.rows.values(), *stage.probes]]
    rerank.rate(critic, rows, args)


def answer(row: dict, escape: Callable[[object], str]) -> str:
    """HTML of a row's completion: plain text, or lines with the colours of "step_values"."""
    text, values = row["completion"].strip(), row.get("step_values", [])
    lines = steps.steps_of(text)
    if len(lines) != len(values):  # no values, or an answer without lines
        return escape(text)
    shown = []
    for line, value in zip(lines, values):
        hue = round(120 * value)  # in degrees: 0 is red, 120 green
        percent = f'<span class="dim">{100 * value:3.0f}</span>'
        style = f"background: hsl({hue} 70% 50% / .25)"
        shown.append(f'<span style="{style}">{percent} {escape(line)}</span>')
    return "\n".join(shown)
