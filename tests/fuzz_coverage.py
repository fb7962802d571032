"""Lines and branches of the reader that a replayed corpus reaches: those of every function that reading enters.

    coverage run --data-file=build/fuzz.coverage tests/fuzz.py --replay DIR
    coverage run -a --data-file=build/fuzz.coverage tests/fuzz.py --compiled --replay DIR
    python tests/fuzz_coverage.py build/fuzz.coverage --record results/fuzz.jsonl

The modules are those of the decode path ([tool.coverage.report] in pyproject.toml) without the second decoder. They
hold the encoder's functions as well; what no file enters at all is not counted.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import coverage

APART = ("reference/", "kernels.py", "simd.py")  # the second decoder; loops that are compiled before coverage sees them


def entered(data):
    """(path, function, its summary) of all functions with a line run."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        measured = coverage.Coverage(data_file=data)
        measured.load()
        measured.json_report(outfile=str(report))
        found = json.loads(report.read_text("utf-8"))["files"]
    for path, file in found.items():
        if not any(part in path for part in APART):
            for name, function in file["functions"].items():
                if name and function["summary"]["covered_lines"]:
                    yield path, name, function


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="data file of coverage")
    parser.add_argument("--record", type=Path, help="append the result to this file")
    arguments = parser.parse_args()
    row = {"engine": "replay", "functions": 0, "lines": 0, "lines_run": 0, "branches": 0, "branches_taken": 0}
    for path, name, function in entered(arguments.data):
        summary = function["summary"]
        row["functions"] += 1
        for key, source in (("lines", "num_statements"), ("lines_run", "covered_lines"),
                            ("branches", "num_branches"), ("branches_taken", "covered_branches")):  # fmt: skip
            row[key] += summary[source]
        if function["missing_branches"]:
            sys.stderr.write(f"{path} {name}: {function['missing_branches']}\n")
    row["branch_share"] = round(row["branches_taken"] / row["branches"], 4)
    sys.stdout.write(json.dumps(row) + "\n")
    if arguments.record:
        with arguments.record.open("a") as f:
            f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
