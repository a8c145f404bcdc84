"""Prints the table of a JUnit file: test, result, seconds, and the numbers that the test recorded.

gpu_table.py FILE.xml    exit code 0 if every test ran and passed
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main(path: Path) -> int:
    """Prints the table; returns the exit code."""
    if not path.exists():
        print(f"error: {path} does not exist, because pytest did not finish; see its output above", file=sys.stderr)
        return 1
    tree = ElementTree.parse(path)
    cases = list(tree.iter("testcase"))
    for entry in tree.iterfind(".//testsuite/properties/property"):
        print(f"{entry.get('name')}: {entry.get('value')}")
    rows = [("test", "result", "seconds", "measured"), *(_row(case) for case in cases)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)).rstrip())
    passed = sum(row[1] == "passed" for row in rows)
    print(f"{passed} of {len(cases)} ran and passed")
    return 0 if cases and passed == len(cases) else 1


def _row(case: ElementTree.Element) -> tuple[str, str, str, str]:
    failed, skipped = case.find("failure"), case.find("skipped")
    failed = case.find("error") if failed is None else failed
    result = "FAILED" if failed is not None else "skipped" if skipped is not None else "passed"
    measured = [f"{entry.get('name')} {entry.get('value')}" for entry in case.iterfind("properties/property")]
    if skipped is not None:
        measured.append(str(skipped.get("message")))
    where = str(case.get("classname")).rpartition(".")[2].removeprefix("test_")
    return f"{where}: {str(case.get('name')).removeprefix('test_')}", result, str(case.get("time")), ", ".join(measured)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
