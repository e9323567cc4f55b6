"""GSM8K's calculator annotations, as in <<3*4=12>>: which of them are false.

The report counts such mistakes, and rewards.py can penalise them.
"""

import ast
import re
from operator import add, mul, sub, truediv

ANNOTATION = re.compile(r"<<([^<>]{1,100})=([^<>=]{1,30})>>")
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def value_of(expression: str) -> float | None:
    """The value of plain arithmetic such as "3*(4+.5)" or "20%*80", else None. A model wrote the
    text, so it is parsed and never executed."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    text = re.sub(r"([\d.]+)%", r"(\1/100)", re.sub(r"[,$\s]", "", expression))
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python does not accept 007
    if not re.fullmatch(r"[\d.+\-*/()]+", text):
        return None
    try:
        return value(ast.parse(text, mode="eval").body)
    except Exception:  # a syntax error, another operator, 1/0, too many brackets, ...
        return None


def is_false(annotation: re.Match) -> bool:
    """Whether a match of ANNOTATION has a wrong result. A result may be off by one unit of its last
    decimal: 1/3=.33 is right, and .34 passes, too. What cannot be read is not called wrong."""
    want, got = value_of(annotation[1]), value_of(annotation[2])
    decimals = len(annotation[2].partition(".")[2].strip())
    tolerance = 10**-decimals if decimals else 1e-6
    return want is not None and got is not None and abs(want - got) > tolerance


def false_annotations(completion: str) -> list[str]:
    """The annotations of a completion that have a wrong result, in their order."""
    return [found[0] for found in ANNOTATION.finditer(completion) if is_false(found)]
