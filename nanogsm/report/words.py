"""The page's sentences about a run: what it is, what happened, its settings. All return HTML."""

import contextlib
import datetime
import html
import math
from pathlib import Path
from statistics import fmean

from nanogsm import data
from nanogsm.report import scores
from nanogsm.report.charts import number
from nanogsm.report.stages import Stage
from nanogsm.run import console
from nanogsm.run.past import run_of

PROBLEMS = {
    "main": "GSM8K",
    "socratic": "GSM8K with socratic answers",
    "tiny": "the embedded word problems",
    "tiny-socratic": "the embedded word problems with socratic answers",
    "tiny-worked": "the embedded word problems with worked answers only",
}
REWARD_MODELS = {
    "PRM": "A process reward model (PRM)",
    "ORM": "An outcome reward model (ORM)",
}
PRECISION = {"bf16": "bfloat16", "fp32": "float32"}


def escape(value: object) -> str:
    """HTML that shows the value as text, whatever is in it."""
    return html.escape(console.printable(str(value)))


def method(args: dict) -> str:
    """SFT, PRM or ORM for a reward model, PPO, or what else trained a run by rewards."""
    if "head_lr" in args:
        return "ORM" if args.get("outcome") else "PRM"
    return str(args.get("advantage") or "ppo").upper() if "kl_coef" in args else "SFT"


def points(metrics: list[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of a key of metrics.jsonl, wherever it has a number."""
    if key == "tokens_per_s":
        timed = [r for r in metrics if r.get("seconds") and r.get("tokens")]
        return [(r["step"], r["tokens"] / r["seconds"]) for r in timed]
    return [(r["step"], r[key]) for r in metrics if isinstance(r.get(key), (int, float))]


def penalties(args: dict) -> dict[str, float]:
    """The terms of a run's reward beside right or wrong, and their weights."""
    return {name: w for name, w in args.items() if name.startswith("penalty_") and w}


def reward_is_a_share(args: dict) -> bool:
    """Whether the mean reward is the share of right answers."""
    return not args.get("reward") and not penalties(args)


def p_value(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def model_name(name: str) -> str:
    """What a run began with before any training: the chain of runs is followed to its start."""
    for _ in range(20):  # a chain cannot be endless, but files can say so
        run = run_of(name)
        if run is None:
            break
        name = str(run[1]["args"].get("init") or run[1]["args"].get("model"))
    return "the embedded model" if name == "tiny" else escape(name)


def problems_name(of_data: str) -> str:
    return PROBLEMS.get(of_data) or f"the problems of {escape(Path(of_data).name)}"


def what_it_is(stage: Stage) -> str:
    """Which model, which method, which problems."""
    args = stage.args
    if not args:
        model = model_name(str(stage.summary.get("model", stage.name)))
        prompt = ""
        with contextlib.suppress(KeyError, TypeError):  # of another version
            prompt = f", asked with the prompt {escape(data.Prompt(**stage.summary['prompt']))}"
        return f"No training: this is {model} as it is{prompt}."
    begin = str(args.get("init") or args.get("model"))
    name = method(args).replace("SFT", "Supervised fine-tuning (SFT)")
    kind = "with LoRA adapters" if args.get("lora") else "of all weights"
    run = run_of(begin)
    after = f", starting from {escape(run[0].name)}" if run else ""
    if name in REWARD_MODELS:
        how = "with LoRA adapters" if args.get("lora") else "in full"
        return (f"{REWARD_MODELS[name]}: {model_name(begin)} and a head, trained {how} on the "
                f"labels of {escape(Path(str(args.get('data'))).name)}{after}.")  # fmt: skip
    about = problems_name(str(args.get("data")))
    return f"{escape(name)} {kind} of {model_name(begin)} on {about}{after}."


def how_it_went(stage: Stage) -> str:
    """Whether the run has finished, and from where to where its metrics went."""
    if not stage.metrics:
        return ""
    n = stage.metrics[-1]["step"]
    steps = f"{n:,} step{'s' * (n != 1)}"
    if stage.finished:
        said = [f"It finished after {steps}."]
    else:
        last = (stage.folder / "metrics.jsonl").stat().st_mtime
        when = datetime.datetime.fromtimestamp(last).strftime("%Y-%m-%d at %H:%M")
        said = [f"<b>It has not finished</b>: {steps} so far, the last one logged on "
                f"{when}."]  # fmt: skip
    # A reward of one's own may be any number; the usual one is the share of right answers.
    reward = "{:.1%}" if reward_is_a_share(stage.args) else "{:.3g}"
    unit = "label" if method(stage.args) in REWARD_MODELS else "token"
    went = []
    for key, what, form in (
        ("reward", "the mean reward of sampled answers", reward),
        ("loss", f"the training loss in nats per {unit}", "{:.3g}"),
        ("response_tokens", "the length of an answer in tokens", "{:.0f}"),
    ):
        values = [y for _, y in points(stage.metrics, key)]
        if len(values) > 1:
            last = fmean(values[-max(1, len(values) // 10) :])
            went.append(f"{what} went from {form.format(values[0])} to {form.format(last)}")
    if went:
        said.append(f"From the first step to the last tenth of the steps {' and '.join(went)}.")
    forms = {
        "val_loss": "their loss is {:.3g}",
        "val_exact_match": "{:.1%} of them are right",
        "val_auc": "the AUC of their steps is {:.3g}",
        "val_sampled": "{:.1%} of the answers to them are right",
        "val_best_last": "{:.1%} of those with the highest value",
    }
    validated = {key: points(stage.metrics, key) for key in forms}
    held_out = [forms[key].format(line[-1][1]) for key, line in validated.items() if line]
    if held_out:
        step = max(line[-1][0] for line in validated.values() if line)
        listed = " and ".join(", ".join(held_out).rsplit(", ", 1))
        said.append(f"On the held-out problems after step {step:,}: {listed}.")
    return " ".join(said)


def what_it_scores(stage: Stage, previous: Stage | None) -> str:
    """Its evaluation, and the comparison with a run before it."""
    s = stage.summary
    if method(stage.args) in REWARD_MODELS:
        return "It answers no questions: it chooses among answers, with evaluate.py --rerank."
    if not s:
        return "It has not been evaluated."
    split = {"test": "test problems", "validation": "held-out problems"}
    named = s.get("data") in (None, *data.NAMED)
    kind = split.get(s.get("split"), "problems") if named else problems_name(s["data"])
    said = f"It solves {s['correct']:,} of {s['n']:,} {kind}: <b>{s['accuracy']:.1%}</b>."
    if previous and previous.rows.keys() & stage.rows.keys():
        pair = scores.paired(previous.rows, stage.rows)
        points, name = pair["points"], escape(previous.name)
        amount = "as many as" if not points else (
            f"{abs(points):.1f} points {'more' if points > 0 else 'less'} than"
        )  # fmt: skip
        p = f"p = {p_value(pair['p'])}".replace("= <", "<")
        chance = "unlikely to be chance" if pair["p"] < 0.05 else "which may be chance"
        said += (f" That is {amount} {name} ({p}, {chance}). Of the problems that "
                 f"both answered, {len(pair['fixed']):,} became right and {len(pair['broken']):,} "
                 "became wrong.")  # fmt: skip
    return said


def opening(stages: list[Stage]) -> str:
    """One item per run. It is compared with the run it started from, if that is on the page, else
    with the one before it."""
    items, previous = [], None
    for stage in stages:
        run = run_of(str(stage.args.get("init") or stage.args.get("model")))
        start = next((s for s in stages if run and s.rows and s.folder == run[0]), None)
        parts = (what_it_is(stage), how_it_went(stage), what_it_scores(stage, start or previous))
        items.append(f"<li><b>{escape(stage.name)}</b>: {' '.join(filter(None, parts))}</li>")
        previous = stage if stage.rows else previous
    return f'<ul class="story">{"".join(items)}</ul>'


def settings(args: dict) -> str:
    """A run's settings as words. What a run of an older version did not record is left out."""
    has = lambda *names: all(args.get(name) is not None for name in names)  # noqa: E731
    said = []
    if has("recipe"):
        said.append(f"recipe {escape(args['recipe'])}")
    if args.get("lora") and has("lora_r"):
        said.append(f"LoRA of rank {args['lora_r']}")
    if has("lr"):
        said.append(f"learning rate {number(args['lr'])}")
        if has("value_lr"):
            said[-1] += f" for the policy and {number(args['value_lr'])} for the critic"
        elif has("head_lr"):
            said[-1] += f" for the network and {number(args['head_lr'])} for the head"
        elif has("min_lr"):
            said[-1] += f", falling to {number(args['min_lr'])}"
        if args.get("warmup"):
            said[-1] += f" after a warm-up over {args['warmup']:.0%} of the steps"
    batch = math.prod(args.get(name) or 1 for name in ("micro_batch", "accumulation"))
    if has("rollouts", "epochs", "micro_batch"):
        said.append(f"{args['rollouts']:,} answers per step")
        size = min(batch, args["rollouts"])
        said.append(f"{_times(args['epochs'])} over them in updates of {size:,} answers")
    elif has("epochs", "micro_batch"):
        said.append(f"{_times(args['epochs'])} over the data in steps of {batch:,} examples")
    if has("kl_coef", "gamma", "lam"):
        said.append(f"KL penalty {number(args['kl_coef'])} per nat")
        said.append(f"gamma {number(args['gamma'])}, lambda {number(args['lam'])}")
    if args.get("group"):
        said.append(f"{args['group']} answers to each problem")
    if args.get("clip_high"):
        said.append(f"ratios clipped above 1 + {number(args['clip_high'])}")
    for name, weight in penalties(args).items():
        said.append(f"{escape(name.replace('_', ' '))} {number(weight)}")
    if args.get("outcome"):
        said.append("the last step's label alone")
    if args.get("critic") == "separate":
        said.append("a separate critic")
    if args.get("reward"):
        said.append(f"reward from {escape(Path(args['reward']).name)}")
    if has("seed"):
        said.append(f"seed {args['seed']}")
    if has("precision", "device"):
        precision = escape(PRECISION.get(args["precision"], args["precision"]))
        said.append(f"{precision} on {escape(args['device'])}")
    return "; ".join(said)


def _times(n: int) -> str:
    return "one pass" if n == 1 else f"{n:,} passes"
