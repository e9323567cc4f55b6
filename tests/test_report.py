"""The HTML page, made from hand-made evaluations. Some of their text is hostile."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanogsm import UserError
from nanogsm.report import page as report
from nanogsm.report import stages, words
from nanogsm.report.curves import CURVES, CURVES_OF_REWARD_MODELS, curves_section
from nanogsm.report.scores import summarise
from nanogsm.run.critic import find_critic

HOSTILE = "<script>alert(1)</script>\x1b[2J</pre></details> <<2*3=7>>\n#### 7"


def stage(
    folder: Path, answers: dict[int, tuple[str, float | None]], ppo: bool = False, probes=False
) -> str:
    """A finished run with an evaluation: problem -> (completion, its number); 6 is right."""
    folder.mkdir()
    rows = [
        {"index": i, "question": f"What is {i} & <b>?", "gold": 6.0, "answer": answer,
         "flexible": False, "correct": answer == 6.0, "truncated": False, "tokens": 9,
         "completion": completion}
        for i, (completion, answer) in answers.items()
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "eval-test-4.jsonl").write_text(lines)
    (folder / "eval-test-4.json").write_text(json.dumps(summarise(rows, 1)))
    if probes:
        (folder / "eval-probes-2.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows[:2])
        )
    args = {"val_examples": 4, "recipe": "tuned", "lr": 1e-3} | ({"kl_coef": 0.01} if ppo else {})
    record = {
        "args": args,
        "info": {"prompt": {"style": "plain", "shots": 0, "instruction": False}},
    }
    (folder / "run_args.json").write_text(json.dumps(record))
    key = "reward" if ppo else "loss"
    metrics = [
        {"step": s, key: 1 / s, "seconds": 2.0, "tokens": 100, "grad_norm": None} for s in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "summary.json").write_text("{}")
    return str(folder)


class Tags(HTMLParser):
    """Which tags a browser would see, and whether they nest."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        assert not [k for k, v in attributes if k in ("src", "href") or k.startswith("on")], (
            "loads or runs"
        )
        if tag not in ("meta", "path", "rect", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "rect", "polyline", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def two(tmp_path) -> list[str]:
    before = {
        0: (HOSTILE, 7.0),
        1: ("no idea", None),
        2: ("<<1+1=2>>\n#### 2", 2.0),
        3: ("#### 6", 6.0),
    }
    after = {
        0: ("<<2*3=6>>\n#### 6", 6.0),
        1: ("#### 6", 6.0),
        2: ("#### 1", 1.0),
        3: ("#### 5", 5.0),
    }
    return [
        stage(tmp_path / "sft", before, probes=True),
        stage(tmp_path / "ppo", after, True, True),
    ]


def test_the_page_is_whole_loads_nothing_and_runs_nothing(two, tmp_path, capsys):
    assert report.main(two) == 0
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    tags = Tags(page)
    assert not tags.open and "script" not in tags.seen and "\x1b" not in page
    said = "".join(tags.text)
    # The hostile text is shown as it was written.
    assert "<script>alert(1)</script>\\x1b[2J</pre></details> <<2*3=7>>" in said
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def read(*folders: str) -> str:
    return report.page(report.read_stages([*folders]))


def test_scores_changes_and_mistakes_are_counted(two):
    page = read(*two)
    row = lambda name, *cells: re.search(  # noqa: E731
        f"<td>{re.escape(html.escape(name))}<small>[^<]*</small></td>"
        + "".join(f"<td>{re.escape(html.escape(cell))}</td>" for cell in cells), page
    )  # fmt: skip
    assert row("exact match", "25.0%", "50.0%") and row("right", "1 of 4", "2 of 4")
    assert row("points", "", "+25.0") and row("p", "", "1")  # two fixed, one broken: p = 1
    assert "eval-test-4.jsonl" in page and "The runs differ" not in page
    assert "Fixed from sft to ppo: 2" in page and "Broken from sft to ppo: 1" in page
    assert "Mistakes of sft: arithmetic 1, no answer 1." in page
    assert "Mistakes of ppo: guessed 1." in page
    assert row("guessed", "0 (0.0%)", "2 (50.0%)") and row("arithmetic", "1 (25.0%)", "0 (0.0%)")
    assert "arithmetic: &lt;&lt;2*3=7&gt;&gt;" in page
    assert "<h2>Probes</h2>" in page


def test_mistakes_are_shares_of_the_answers_that_show_a_calculation(tmp_path):
    """Three guesses become worked answers, one of them wrong. So arithmetic mistakes rise from one
    to two, and their share of the worked answers falls from all to half."""
    wrong, right = ("<<2*3=7>>\n#### 7", 7.0), ("<<2*3=6>>\n#### 6", 6.0)
    before = {0: wrong, 1: ("#### 5", 5.0), 2: ("#### 6", 6.0), 3: ("#### 1", 1.0)}
    after = {0: wrong, 1: wrong, 2: right, 3: right}
    page = read(stage(tmp_path / "a", before), stage(tmp_path / "b", after))
    part = page[page.index("With and without a calculation") :]
    cell = "<td>([^<]+)</td>"
    found = re.findall(f"<td>([^<]+)<small>[^<]*</small></td>{cell}{cell}", part)
    assert found[:6] == [
        ("with a calculation", "1 (25.0%)", "4 (100.0%)"),
        ("of these right", "0 (0.0%)", "2 (50.0%)"),
        ("of these with an arithmetic mistake", "1 (100.0%)", "2 (50.0%)"),
        ("of these set up wrongly", "0 (0.0%)", "0 (0.0%)"),
        ("without a calculation", "3 (75.0%)", "0 (0.0%)"),
        ("of these right", "1 (33.3%)", "none"),
    ]
    assert ("Of 3 problems that a answered without a calculation, b shows one for 3. Of these 1 "
            "were right before, and 2 are right now.") in page  # fmt: skip


def test_a_curve_is_drawn_for_each_metric_that_has_values(two):
    stages = report.read_stages(two)
    page = curves_section(stages)
    sft, ppo = page.index("<h2>SFT: metrics by step"), page.index("<h2>PPO: metrics by step")
    assert sft < page.index("training loss") < ppo < page.index("reward of sampled answers")
    assert page.count("tokens per second") == 2 and page.count(">step</text>") == 4
    assert "gradient norm" not in page  # all its values are null
    assert html.escape(CURVES["reward"].healthy) in page and CURVES["loss"].healthy in page
    assert "100%" in page  # the reward is a share
    own = [stages[1]._replace(args=stages[1].args | {"reward": "mine.py"})]
    assert "%</text>" not in curves_section(own)  # and one's own may be any number
    terms = [stages[1]._replace(args=stages[1].args | {"penalty_false": 0.1})]
    assert "%</text>" not in curves_section(terms) and "penalty false 0.1" in curves_section(terms)
    groups = [stages[1]._replace(args=stages[1].args | {"advantage": "rloo"}), stages[1]]
    assert "<h2>RLOO, PPO: metrics by step" in curves_section(groups)
    assert curves_section([stages[0]._replace(metrics=[])]) == ""


@pytest.fixture
def prm(tmp_path):
    """A run of train_prm.py, and one that learned outcomes."""
    args = {"val_examples": 4, "model": "tiny", "data": "runs/labels-x.jsonl", "lora": True,
            "lr": 1e-4, "head_lr": 1e-3, "outcome": False, "source": "labels"}  # fmt: skip
    prompt = {"style": "plain", "shots": 0, "instruction": False}
    metrics = [
        *({"step": s, "loss": 1 / s, "grad_norm": 1.0, "head_grad_norm": 2.0} for s in (1, 2)),
        {"step": 2, "val_loss": 0.5, "val_auc": 0.875, "val_first_wrong": 0.25,
         "val_all_right": 0.5, "val_pairs": 0.6, "val_sampled": 0.4, "val_best_last": 0.6,
         "val_best_least": 0.7},
    ]  # fmt: skip
    for name, outcome in (("prm", False), ("orm", True)):
        folder = tmp_path / name
        folder.mkdir()
        record = {"args": args | {"outcome": outcome, "lora": not outcome}}
        record["info"] = {"prompt": prompt}
        (folder / "run_args.json").write_text(json.dumps(record))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
        (folder / "summary.json").write_text("{}")
    return [str(tmp_path / "prm"), str(tmp_path / "orm")]


def test_reward_models_have_words_and_curves_of_their_own(prm, two):
    page = read(*prm)
    said = " ".join(re.sub("<[^>]*>", "", page).split())
    for sentence in (
        "prm: A process reward model (PRM): the embedded model and a head, trained with LoRA "
        "adapters on the labels of labels-x.jsonl. It finished after 2 steps.",
        "orm: An outcome reward model (ORM): the embedded model and a head, trained in full on",
        "the training loss in nats per label went from 1 to 0.5. On the held-out problems after "
        "step 2: their loss is 0.5, the AUC of their steps is 0.875, 40.0% of the answers to them "
        "are right and 60.0% of those with the highest value.",
        "It answers no questions: it chooses among answers, with evaluate.py --rerank.",
        "learning rate 0.0001 for the network and 0.001 for the head",
    ):
        assert sentence in said
    assert said.count("the last step's label alone") == 1  # of the ORM
    for wrong in ("per token", "SFT", "uned", "evaluated"):
        assert wrong not in said, wrong
    assert "<h2>PRM, ORM: metrics by step" in page and page.count("<h2>") == 1
    for key in ("loss", "val_loss", "val_auc", "val_pairs", "val_best_last", "val_best_least",
                "val_first_wrong", "val_all_right", "grad_norm", "head_grad_norm"):  # fmt: skip
        assert f'">{CURVES_OF_REWARD_MODELS[key].title}</text>' in page, key
    both = read(*two, prm[0])
    heads = re.findall("<h2>([^<]*): metrics by step", both)
    assert heads == ["SFT", "PPO", "PRM"] and "nats per token" in both


@pytest.mark.parametrize(
    "name, value, wanted",
    [(n, v, "a number") for n in ("lr", "head_lr", "micro_batch", "seed", "epochs", "penalty_false")
     for v in ("x", [1], 10**400)]
    + [(n, v, "a text") for n in ("model", "data", "precision", "device", "reward", "base")
       for v in (3, ["x"], {})],
)  # fmt: skip
def test_a_setting_of_another_type_is_one_line(prm, two, name, value, wanted):
    for folder in (prm[0], two[1]):
        path = Path(folder, "run_args.json")
        record = json.loads(path.read_text())
        record["args"][name] = value
        path.write_text(json.dumps(record))
        for read_it in (lambda: report.main([folder]), lambda: find_critic(folder)):
            with pytest.raises(UserError, match=f"in run_args.json {name} is .*, not {wanted}"):
                read_it()
        record["args"][name] = None  # as flags that were not given are
        path.write_text(json.dumps(record))
        assert read(folder)


def test_the_only_validation_of_a_run_is_a_dot(two):
    with open(f"{two[0]}/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "val_loss": 0.25}\n')
    page = curves_section(report.read_stages(two[:1]))
    panel = page[page.index("loss on held-out problems") :]
    panel = panel[: panel.index("</svg>")]
    [(x, _)] = re.findall(r'<circle class="c0" cx="([\d.]+)" cy="([\d.]+)"', panel)
    assert float(x) == 356.0 and ">0</text>" in panel  # at the right end; the axis begins with 0
    assert "On the held-out problems after step 3: their loss is 0.25." in read(two[0])


def test_the_opening_says_which_model_which_problems_and_what_happened(two):
    for folder, more in zip(two, ({"model": "tiny"}, {"init": two[0], "kl_coef": 0.01})):
        path = Path(folder, "run_args.json")
        record = json.loads(path.read_text())
        record["args"] |= {"data": "tiny", "lora": False, "micro_batch": 8, "accumulation": 2,
                           "epochs": 1, "warmup": 0.03, "min_lr": 1e-4} | more  # fmt: skip
        path.write_text(json.dumps(record))
    said = " ".join(re.sub("<[^>]*>", "", read(*two)).split())
    for sentence in (
        "sft: Supervised fine-tuning (SFT) of all weights of the embedded model on the embedded ",
        "ppo: PPO of all weights of the embedded model on the embedded word problems, starting "
        "from sft. It finished after 3 steps.",
        "the last tenth of the steps the training loss in nats per token went from 1 to 0.333.",
        "the mean reward of sampled answers went from 100.0% to 33.3%.",
        "It solves 2 of 4 problems: 50.0%. That is 25.0 points more than sft (p = 1, which may be "
        "chance). Of the problems that both answered, 2 became right and 1 became wrong.",
    ):
        assert sentence in said
    assert "recipe tuned; learning rate 0.001, falling to 0.0001 after a warm-up over 3% of the " \
        "steps; one pass over the data in steps of 16 examples" in said  # fmt: skip
    assert "False" not in said


def test_the_opening_compares_a_run_with_its_start_if_that_is_on_the_page(two, tmp_path):
    other = stage(tmp_path / "other", {i: ("#### 6", 6.0) for i in range(4)}, ppo=True)
    assert "That is 50.0 points more than ppo" in read(*two, other)  # the one before
    path = Path(other, "run_args.json")
    record = json.loads(path.read_text())
    record["args"]["init"] = f"{two[0]}/model"
    path.write_text(json.dumps(record))
    assert "That is 75.0 points more than sft" in read(*two, other)


def test_a_run_without_an_evaluation_has_its_curves(two, tmp_path, capsys):
    """Also one that is still running, whose last line is half-written."""
    folder = Path(two[1])
    for file in [*folder.glob("eval-*"), folder / "summary.json"]:
        file.unlink()
    # Several answers to each problem have no place on the page.
    (folder / "eval-test-1319-8x-t1-seed0.jsonl").write_text("{}\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    assert report.main([str(folder)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "It has not finished</b>: 3 steps so far, the last one logged on 20" in page
    assert "It has not been evaluated." in page and "reward of sampled answers" in page
    assert "<h2>Scores" not in page and not Tags(page).open
    both = read(*two)  # the other one is evaluated
    assert "<h2>Scores" in both and "PPO: metrics" in both and "Fixed from" not in both
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="neither a step nor an evaluation yet"):
        report.main([str(folder)])


def test_an_unscored_run_has_its_curves(two):
    path = Path(two[0], "run_args.json")
    path.write_text(path.read_text().replace('"recipe"', '"unscored": true, "recipe"'))
    assert "<h2>Scores" not in read(two[0]) and "training loss" in read(two[0])


def test_a_page_about_other_runs_stays(two, tmp_path, capsys):
    sft, ppo = two
    assert report.main([sft]) == 0
    first = (tmp_path / "report.html").read_text()
    capsys.readouterr()
    assert report.main(two) == 0
    assert (tmp_path / "report.html").read_text() == first
    assert "nanogsm: sft, ppo" in (tmp_path / "report-sft-ppo.html").read_text()
    said = capsys.readouterr().out
    assert f"{tmp_path / 'report.html'} is about other runs and stays as it is" in said
    assert f"written to {tmp_path / 'report-sft-ppo.html'}" in said
    for argv, name in (([sft], "report.html"), (two, "report-sft-ppo.html")):  # its own is replaced
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("Scores", "Old"))
        report.main(argv)
        assert "Scores" in (tmp_path / name).read_text()
    (tmp_path / "report-sft-ppo.html").write_text("mine")
    with pytest.raises(UserError, match="give --out a file name"):
        report.main(two)
    assert (tmp_path / "report-sft-ppo.html").read_text() == "mine"


def test_runs_of_one_name_are_told_apart(two, tmp_path):
    (tmp_path / "more").mkdir()
    other = stage(tmp_path / "more" / "sft", {0: ("#### 6", 6.0)})
    names = [stage.name for stage in report.read_stages([two[0], other, two[1]])]
    assert names == [two[0], other, "ppo"]
    with pytest.raises(UserError, match="is given twice"):
        report.main([two[0], two[0]])


def test_a_run_that_names_itself_as_its_start_ends_somewhere(two):
    path = Path(two[0], "run_args.json")
    record = json.loads(path.read_text())
    record["args"] |= {"model": two[0], "data": "tiny"}
    path.write_text(json.dumps(record))
    assert words.model_name(two[0]) == html.escape(two[0])


def test_an_evaluation_named_by_its_file_has_its_runs_curves_too(two):
    by_folder, by_file = (stages.read_stage(two[1] + name) for name in ("", "/eval-test-4.jsonl"))
    assert by_file == by_folder and by_file.metrics and by_file.args["kl_coef"]


def test_stages_about_different_problems_are_refused(two, tmp_path):
    """Their questions tell: the indices of two data files are the same."""
    rows = Path(two[1], "eval-test-4.jsonl")
    rows.write_text(rows.read_text().replace('"question": "', '"question": "Another: '))
    with pytest.raises(UserError, match="eval-test-4.jsonl are about different problems"):
        report.main(two)
    assert not list(tmp_path.glob("report*"))
    # The last has nothing in common with the one before it, only with the first.
    between = stage(tmp_path / "between", {8: ("#### 6", 6.0)})
    with pytest.raises(UserError, match="sft.*ppo.* are about different problems"):
        report.main([two[0], between, two[1]])


def test_what_cannot_be_shown_is_refused(two, tmp_path):
    with pytest.raises(UserError, match="is not a run and has no evaluation"):
        (tmp_path / "bare").mkdir()
        report.main([str(tmp_path / "bare")])
    with pytest.raises(UserError, match="there is no"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(UserError, match="cannot write .*choose another --out"):
        report.main([*two, "--out", str(tmp_path / "bare")])
    assert not list(tmp_path.glob("*.tmp"))
    rows = Path(two[0], "eval-test-4.jsonl")
    rows.write_text(rows.read_text() * 2)
    with pytest.raises(UserError, match="several samples"):
        report.main(two[:1])
    Path(two[1], "eval-test-4.json").write_text("{}")
    with pytest.raises(UserError, match="cannot show .*: evaluate it again"):
        report.main(two[1:])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("eval-test-4.json", lambda text: text.replace('"flexible_accuracy"', '"gone"')),
        ("eval-test-4.json", lambda text: text.replace('"accuracy": 0.5', '"accuracy": "x"')),
        ("eval-test-4.jsonl", lambda text: text.replace('"truncated"', '"gone"')),
        ("eval-test-4.json", lambda text: text.replace('"accuracy": 0.5', '"accuracy": "0.5"')),
        ("eval-test-4.json", lambda text: text.replace('"accuracy": 0.5', f'"accuracy": {10**400}')),
        ("eval-test-4.json", lambda text: text[:1] + '"split": ["test"],' + text[1:]),
        ("metrics.jsonl", lambda text: text + "[1]\n"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(two, name, spoil):
    file = Path(two[1], name)
    text = file.read_text()
    assert spoil(text) != text
    file.write_text(spoil(text))
    with pytest.raises(UserError, match="cannot show .*evaluate it again|cannot read"):
        report.main(two)


def test_metrics_that_are_damaged_are_named(two):
    for damaged in ('{"step": 1}\n{"step": \n{"step": 3}\n', '{"step": "1"}\n', "[1]\n",
                    '{"step": 1, "tokens": "x", "seconds": 1}\n', '{"step": Infinity}\n',
                    f'{{"step": 1, "val_loss": {10**400}}}\n'):  # fmt: skip
        Path(two[0], "metrics.jsonl").write_text(damaged)
        with pytest.raises(UserError, match="cannot read .*metrics.jsonl"):
            report.main(two)


def test_a_page_needs_a_file_name(two):
    with pytest.raises(UserError, match="give --out a file name"):
        report.main([*two, "--out", "."])
