"""Is checkpoint B better than checkpoint A? Two runs of evaluate.py on the same rows, row by row.

Most of the spread of a score comes from the rows, some of which are harder than others. Two runs on
the same rows share it, so the difference of their scores has a far smaller error than each score:
with 0.40 and 0.42 on 1000 rows each score is known to 0.016, and if only 60 rows change sides the
difference of 0.02 is known to 0.008.

    python evaluate.py A --tasks piqa --data DIR --json a.json       # and B with b.json
    python benchmarks/compare.py a.json b.json

Reference: McNemar 1947, for the p of "only A solves it" against "only B solves it".
"""
import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import mean_and_error

SETTINGS = ("bos", "dtype", "max_len", "protocol", "max_new_tokens")


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of a split at least as uneven, if both sides were equally likely."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def read_run(path: str) -> tuple[dict, dict[str, list[int]]]:
    """What another run must share to be compared with this one, and by task each row's "acc"."""
    solved = defaultdict(list)
    try:
        report = json.loads(Path(path).read_bytes())
        for row in report["rows"]:
            if "acc" in row:
                solved[row["task"]].append([0, 1].index(row["acc"]))    # or a ValueError
        for name, rows in solved.items():
            if len(rows) != report["tasks"][name]["n"]:
                raise ValueError(f"{len(rows)} rows of {name}")
        facts = {key: report["settings"].get(key) for key in SETTINGS}
        return facts | {f"{name} (sha256, rows)": (report["tasks"][name]["sha256"], len(rows))
                        for name, rows in solved.items()}, solved
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not what evaluate.py --json writes ({error!r:.200}): run it "
                         "again with --json") from None


def compare(path_a: str, path_b: str) -> dict[str, dict]:
    """By task: both scores, their difference with its error, the rows that only one solves."""
    (facts_a, solved_a), (facts_b, solved_b) = read_run(path_a), read_run(path_b)
    names = [name for name in solved_a if name in solved_b]
    if not names:
        raise ValueError(f"{path_a} and {path_b} have no task in common: run both with --tasks, or "
                         "with --allow-code-execution")
    for key, value in facts_a.items():
        if value != facts_b.get(key, value):
            raise ValueError(f"{key} is {value} in {path_a} and {facts_b[key]} in {path_b}: only "
                             "what was measured alike can be compared; run one of them again")
    results = {}
    for name in names:
        a, b = solved_a[name], solved_b[name]
        change, error = mean_and_error([y - x for x, y in zip(a, b)])
        only_a, only_b = sum(map(int.__gt__, a, b)), sum(map(int.__lt__, a, b))
        results[name] = {"A": sum(a) / len(a), "B": sum(b) / len(b), "B - A": change,
                         "stderr": error, "only A": only_a, "only B": only_b,
                         "p": mcnemar(only_a, only_b)}
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare two runs of evaluate.py row by row.")
    parser.add_argument("a", help="what `evaluate.py --json` wrote")
    parser.add_argument("b", help="another one, of the same tasks and rows")
    parser.error = lambda message: parser.exit(2, f"compare.py: error: {message}\n")
    args = parser.parse_args(argv)
    try:
        results = compare(args.a, args.b)
    except ValueError as error:
        parser.exit(2, f"compare.py: error: {error}\n")
    print(f"{'task':20}" + "".join(f"{column:>10}" for column in next(iter(results.values()))))
    for name, result in results.items():
        print(f"{name:20}" + "".join(f"{x:>10.4f}" if isinstance(x, float) else f"{x:>10}"
                                     for x in result.values()))


if __name__ == "__main__":
    main()
