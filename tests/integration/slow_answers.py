"""Responses expensive for math-verify: typical output of degenerate models, and cheap attacks."""

from __future__ import annotations


def _listed(n: int) -> str:
    return ",".join(map(str, range(n)))


def _matrix(rows: int, entry: str) -> str:
    lines = r"\\".join("&".join(entry.format(i=i, j=j) for j in range(rows)) for i in range(rows))
    return rf"\begin{{pmatrix}}{lines}\end{{pmatrix}}"


SLOW = {
    "tower": r"\boxed{9^{9^{9^{9}}}}",
    "ones": "1 " * 30000,
    "set of 1000": rf"\boxed{{\{{{_listed(1000)}\}}}}",
    "factorial": r"\boxed{(10^{9})!}",
    "binomial": r"\boxed{\binom{10^{7}}{5 \cdot 10^{6}}}",
    "power": r"\boxed{2^{10^{10}}}",
    "factorials": r"\boxed{((10!)!)!}",
    "set of 200": rf"\boxed{{\{{{_listed(200)}\}}}}",
    "tuple": rf"\boxed{{({_listed(300)})}}",
    "nested fractions": r"\boxed{" + r"\frac{1}{1+" * 60 + "1" + "}" * 60 + "}",
    "integral": r"\boxed{\int_0^{1} \frac{\sin(x^{x})}{\ln(1+x^{3})} dx}",
    "sum": r"\boxed{\sum_{n=1}^{10^{9}} \frac{1}{n^{3}+n}}",
    "product": r"\boxed{\prod_{n=1}^{10^{8}} n}",
    "parentheses": r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "braces": r"\boxed{" + "{" * 3000 + "1" + "}" * 3000 + "}",
    "matrix": rf"\boxed{{{_matrix(30, 'x_{{{i}}}^{{{j}}}')}}}",
    "determinant": rf"\boxed{{\det{_matrix(12, 'x_{{{i}{j}}}')}}}",
    "unions": r"\boxed{" + r"\cup ".join(f"({i},{i + 1})" for i in range(200)) + "}",
    "polynomial": r"\boxed{(x+y+z+1)^{200}}",
    "remainder": r"\boxed{7^{7^{7^{7}}} \mod 10}",
    "ones and plus": "1+" * 5000,
    "digits": r"\boxed{" + "9" * 100000 + "}",
    "dollars": "$" * 20000,
    "boxes": r"\boxed{" * 5000,
    "roots": r"\boxed{\sqrt{" * 1000,
}
