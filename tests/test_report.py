"""The HTML page, made from hand-made evaluations. Some of their text is hostile."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanogsm import UserError
from nanogsm.report import page as report
from nanogsm.report.scores import summarise

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
        if tag not in ("meta", "path", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "rect", "polyline"):
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


def test_scores_changes_and_mistakes_are_counted(two):
    page = report.page([report.read_stage(folder) for folder in two])
    cells = lambda *texts: "".join(f"<td>{t}</td>" for t in texts)  # noqa: E731
    assert cells("sft", "25.0%") in page and cells("ppo", "50.0%") in page
    assert cells("2 of 4", "+25.0", "1") in page  # two fixed, one broken: p = 1
    assert "eval-test-4.jsonl" in page and "The rows differ" not in page
    assert "Fixed from sft to ppo: 2" in page and "Broken from sft to ppo: 1" in page
    assert "Mistakes of sft: arithmetic 1, no answer 1." in page
    assert "Mistakes of ppo: guessed 1." in page
    assert cells("guessed", 0, 2, "shows no calculation at all") in page
    assert "arithmetic: &lt;&lt;2*3=7&gt;&gt;" in page
    assert "<h2>Probes</h2>" in page


def test_a_curve_is_drawn_for_each_metric_that_has_values(two):
    stages = [report.read_stage(folder) for folder in two]
    page = report.curves_section(stages)
    sft, ppo = page.index("<h2>SFT: metrics by step"), page.index("<h2>PPO: metrics by step")
    assert sft < page.index("training loss") < ppo < page.index("reward of sampled answers")
    assert page.count("tokens per second") == 2
    assert "gradient norm" not in page  # all its values are null
    assert report.curves_section([stages[0]._replace(metrics=[])]) == ""


def test_an_evaluation_named_by_its_file_has_its_runs_curves_too(two):
    by_folder, by_file = report.read_stage(two[1]), report.read_stage(f"{two[1]}/eval-test-4.jsonl")
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
    with pytest.raises(UserError, match="no evaluation yet"):
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


def test_a_page_needs_a_file_name(two):
    with pytest.raises(UserError, match="give --out a file name"):
        report.main([*two, "--out", "."])
