"""Print the lines of code of the package by directory, without blank lines, comments and docstrings."""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "stabrun"
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
}  # fmt: skip


def python_lines(text: str) -> int:
    docstrings = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    tokens = (token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in NO_CODE)
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(code - docstrings)


def script_lines(text: str) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("//") for line in text.splitlines())


def main() -> None:
    python = Counter[str]()
    for file in PACKAGE.rglob("*.py"):
        python[file.parent.relative_to(PACKAGE.parent).as_posix()] += python_lines(file.read_text())
    for directory, count in sorted(python.items()):
        print(f"{count:6,}  {directory}")
    print(f"{python.total():6,}  Python")
    print(f"{sum(script_lines(file.read_text()) for file in PACKAGE.rglob('*.js')):6,}  JavaScript")


if __name__ == "__main__":
    main()
