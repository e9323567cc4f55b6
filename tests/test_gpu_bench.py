"""benchmarks/gpu.py on a CPU: every stage at toy size, and what becomes of a stage that fails."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import slow

from benchmarks import gpu, gpu_table
from benchmarks.gpu_parts import at_least, at_most, exactly, row, worst
from nanogsm import UserError

ROOT = Path(__file__).parents[1]
KEYS = {"measure", "value", "unit", "goal", "met", "note"}


def read(path: Path) -> dict:
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """(output, results) of one dry run of everything. All stages but the last run in this process:
    a process of its own for each would spend 20 seconds on importing PyTorch."""
    path = tmp_path_factory.mktemp("gpu") / "new" / "out.json"
    real, state = gpu.watch_stage, (torch.get_num_threads(), torch.get_default_dtype())

    def here(command: list[str], limit: float) -> dict:
        if "study" in command:
            return real(command, limit)
        start, lines = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(lines):
            gpu.main(command[command.index("benchmarks.gpu") + 1 :])
        found = gpu.record_of(lines.getvalue().splitlines(), 0, limit)
        return found | {"seconds": time.perf_counter() - start}

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(gpu, "watch_stage", here)
        patch.setattr(gpu.signal, "signal", lambda *_: None)
        assert gpu.main(["--json", str(path), "--dry"]) == 0, said.getvalue()
    assert state == (torch.get_num_threads(), torch.get_default_dtype())
    return said.getvalue(), read(path)


@slow
def test_a_dry_run_runs_every_stage(dry):
    output, results = dry
    assert list(results["stages"]) == list(gpu.STAGES)
    assert {"gpu", "driver", "cuda", "torch", "commit", "dry", "device"} <= results["about"].keys()
    for name, stage in results["stages"].items():
        allowed = ("done", "skipped") if name.startswith("peer") else ("done",)
        assert stage["status"] in allowed and stage["seconds"] > 0, (name, stage)
        assert stage["rows"] or stage["status"] == "skipped", name
        for line in stage["rows"]:
            assert KEYS <= line.keys(), line
            assert line["met"] in (True, False, None)
            assert line["measure"] in output
        measures = [line["measure"] for line in stage["rows"] if "kernel" not in line["measure"]]
        assert len(set(measures)) == len(measures), name  # Work.value finds a row by its measure


@slow
def test_a_dry_run_meets_the_goals_that_a_cpu_can_meet(dry):
    for name in ("correct", "resume"):
        assert all(line["met"] is not False for line in dry[1]["stages"][name]["rows"]), name


@slow
def test_what_only_a_gpu_knows_is_null_in_a_dry_run(dry):
    rows = {line["measure"]: line for line in dry[1]["stages"]["sft"]["rows"]}
    peak = rows["full, 16 none: peak of tensors"]
    assert peak["value"] is None and peak["met"] is None and peak["budget"]["weights"] > 0
    assert {"backward_s", "optimizer_s", "allocated"} <= rows["LoRA, 8 light"].keys()


@slow
def test_the_study_is_computed_from_the_other_stages(dry):
    stages = dry[1]["stages"]
    rows = {line["measure"]: line["value"] for line in stages["study"]["rows"]}
    step = next(r for r in stages["sft"]["rows"] if r["measure"] == "full: fastest step")
    assert rows["SFT, full"] == pytest.approx(468 * step["value"] / 60)
    assert rows["all four"] == pytest.approx(sum(rows.values()) - rows["all four"])


# ------------------------------------------------------------------------------------ the runner

ROW = 'print(\'{"measure": "m", "value": 1, "unit": "", "goal": "", "met": null, "note": ""}\')'
SCRIPTS = {
    "raises": f"{ROW}; raise ValueError('no such kernel')",
    "hangs": f"{ROW}; import subprocess, sys, time; sys.stdout.flush(); "
             "child = subprocess.Popen(['sleep', '600']); "
             "open(FILE, 'w').write(str(child.pid)); time.sleep(600)",
    "skips": 'print(\'{"skipped": "not installed"}\')',
    "works": ROW,
}  # fmt: skip


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Four stages of a line each in place of the real ones."""
    limits = {name: (None, 1 if name == "hangs" else 60) for name in SCRIPTS}
    monkeypatch.setattr(gpu, "STAGES", limits)

    def command_of(name, args):
        script = SCRIPTS[name].replace("FILE", repr(str(tmp_path / "child")))
        return [sys.executable, "-c", script]

    monkeypatch.setattr(gpu, "command_of", command_of)
    return lambda *flags: gpu.main(["--dry", "--json", str(tmp_path / "out.json"), *flags])


def test_a_stage_that_raises_or_hangs_is_recorded_and_the_rest_run(stages, tmp_path, capsys):
    assert stages() == 1
    found = read(tmp_path / "out.json")["stages"]
    assert {name: stage["status"] for name, stage in found.items()} == {
        "raises": "failed", "hangs": "timed out", "skips": "skipped", "works": "done",
    }  # fmt: skip
    assert found["raises"]["last_lines"][-1] == "ValueError: no such kernel"
    assert found["skips"]["reason"] == "not installed"
    for name in ("raises", "hangs", "works"):  # what was found before the end is kept
        assert [line["measure"] for line in found[name]["rows"]] == ["m"], name
    assert "no such kernel" in capsys.readouterr().out


def test_the_children_of_a_stage_end_with_it(stages, tmp_path):
    stages("--only", "hangs")
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "(zombie)" in status.read_text():
            return
        time.sleep(0.05)
    os.kill(child, 9)
    raise AssertionError("the child of a stage went on")


def test_only_runs_these_stages_and_keeps_the_others(stages, tmp_path):
    assert stages("--only", "works") == 0
    assert stages("--only", "skips,works") == 0
    assert list(read(tmp_path / "out.json")["stages"]) == ["skips", "works"]


def test_a_stage_that_does_not_fit_is_left_out(stages, tmp_path):
    assert stages("--only", "works,hangs", "--minutes", "0.2") == 1
    found = read(tmp_path / "out.json")["stages"]
    assert found["works"]["status"] == "left out" and "60 s" in found["works"]["reason"]
    assert found["hangs"]["status"] == "timed out"


def test_results_of_another_card_are_not_mixed(stages, tmp_path):
    stages("--only", "works")
    results = read(tmp_path / "out.json")
    results["about"]["gpu"] = "another"
    (tmp_path / "out.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="has results of gpu another"):
        stages("--only", "works")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--json", "x", "--dry", "--only", "card,nothing"], "--only nothing: the stages are card"),
        (["--json", "x", "--dry", "--minutes", "0"], "--minutes is 0"),
        (["--json", "x", "--dry", "--minutes", "nan"], "--minutes is nan"),
        (["--dry"], "--json is needed"),
        (["--json", "x", "--device", "cpu"], "only --dry runs without a GPU"),
        (["--json", "x", "--device", "tpu"], "this machine has only"),
        (["--stage", "nothing"], "invalid choice"),
    ],
)
def test_a_bad_flag_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        gpu.main(flags)


def test_a_bad_flag_ends_with_status_2():
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", "x", "--only", "nothing", "--dry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_number_that_is_not_finite_meets_no_goal():
    nan = float("nan")
    assert at_most("a", nan, 1)["met"] is at_least("a", nan, 1)["met"] is False
    assert row("a", nan)["value"] == "nan" and row("a", float("inf"))["value"] == "inf"
    assert str(worst([0.0, nan, 1.0])) == "nan" and worst(x for x in (1.0, 2.0)) == 2.0
    assert at_most("a", None, 1)["met"] is None and exactly("a", 0.0, 0.0)["met"] is True


# -------------------------------------------------------------------------------------- the page


def results(card: str, value: float) -> dict:
    about = {"gpu": card, "cpu": "a CPU", "driver": "570.1", "cuda": "13.0", "torch": "2.11.0",
             "commit": "abc", "dirty": False, "dry": False, "device": "cuda"}  # fmt: skip
    rows = [at_least("speed", value, 5, "x", note="a | b"), row("memory", None, "GiB")]
    done = {"status": "done", "reason": "", "rows": rows, "last_lines": [], "seconds": 1.0}
    failed = {"status": "failed", "reason": "<nothing>", "rows": [], "last_lines": ["x"]}
    return {"about": about, "stages": {"decode": done, "ppo": failed | {"seconds": 2.0}}}


def test_the_page_has_a_table_for_each_card(tmp_path):
    for name, card, value in (("b.json", "H100", 6.5), ("a.json", "H200", 2.0)):
        (tmp_path / name).write_text(json.dumps(results(card, value)))
    assert gpu_table.main([str(tmp_path)]) == 0
    _, first, second = (tmp_path / "README.md").read_text("utf-8").split("\n## ")
    assert first.startswith("H100\n") and "`b.json`, commit abc." in first
    assert "| decode | speed | 6.5 x; a \\| b | at least 5 | yes |" in first
    assert "| decode | memory |  |  |  |" in first
    assert "| ppo | failed | &lt;nothing> |  |  |" in first
    assert second.startswith("H200\n") and "| 2 x; a \\| b | at least 5 | NO |" in second


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no .json files"):
        gpu_table.main([str(tmp_path)])
