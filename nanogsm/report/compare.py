"""Paired comparison of two evaluations, for `python evaluate.py --compare A B`."""

from nanogsm import UserError
from nanogsm.boxed import shown
from nanogsm.report.eval_files import read_rows
from nanogsm.report.scores import by_problem, in_common, paired
from nanogsm.run.console import printable

SHOWN = 10  # changed answers of each kind


def compare(where_a: str, where_b: str, everything: bool) -> int:
    """Print the table and the exact test for the problems that both evaluations have, then those
    whose answer went from wrong to right or from right to wrong: the first few, or everything."""
    (path_a, rows_a), (path_b, rows_b) = read_rows(where_a), read_rows(where_b)
    a, b = by_problem(path_a, rows_a), by_problem(path_b, rows_b)
    common = in_common(path_a, a, path_b, b)
    if not common:
        raise UserError(f"{path_a} and {path_b} have no problem in common")
    pair = paired(a, b)
    n = len(common)
    both = sum(a[i]["correct"] and b[i]["correct"] for i in common)
    only_a, only_b = len(pair["broken"]), len(pair["fixed"])
    print(f"A  {path_a}\nB  {path_b}\n{n} problems in common")
    print(f"{'':>12}{'B right':>9}{'B wrong':>9}")
    print(f"{'A right':>12}{both:>9}{only_a:>9}")
    print(f"{'A wrong':>12}{only_b:>9}{n - both - only_a - only_b:>9}")
    shares = f"A {(both + only_a) / n:.1%}, B {(both + only_b) / n:.1%}"
    print(f"{shares}: {pair['points']:+.1f} points, exact McNemar p = {pair['p']:.4g}")
    for change, meaning in (("fixed", "A wrong, B right"), ("broken", "A right, B wrong")):
        print(f"\n=== {change} ({meaning}): {len(pair[change])} ===")
        few = pair[change] if everything else pair[change][:SHOWN]
        for i in few:
            print(f"\n--- problem {i}, answer {printable(shown(a[i]['gold']))}")
            print(printable(a[i]["question"]))
            print(f"[A] {printable(a[i]['completion'].strip())}")
            print(f"[B] {printable(b[i]['completion'].strip())}")
        if more := len(pair[change]) - len(few):
            print(f"\n... and {more} more: give --all to see them")
    return 0
