"""benchmarks/compare.py: two runs on the same rows, and what may not be compared."""
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import compare


def write_run(path: Path, solved: list[int], task: str = "piqa", **changes) -> str:
    settings = {"bos": False, "dtype": "float32", "max_len": 64} | changes
    path.write_text(json.dumps({
        "settings": settings, "tasks": {task: {"n": len(solved), "sha256": f"of {task}"}},
        "rows": [{"task": task, "row": str(i), "acc": acc} for i, acc in enumerate(solved)]}))
    return str(path)


def refuses(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        compare.main(list(argv))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("compare.py: error: "), message
    assert message.count("\n") == 1, "a refusal is one line"
    return message


def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven():
    for a, b in itertools.product(range(7), repeat=2):
        tosses = list(itertools.product((0, 1), repeat=a + b))
        uneven = sum(abs(2 * sum(toss) - a - b) >= abs(a - b) for toss in tosses)
        assert math.isclose(compare.mcnemar(a, b), uneven / len(tosses)), (a, b)


def test_comparing_pairs_the_rows(tmp_path, capsys):
    x, y = [1, 1, 0, 0, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1, 0, 1]
    compare.main([write_run(tmp_path / "a", x), write_run(tmp_path / "b", y)])
    head, line = capsys.readouterr().out.splitlines()
    assert len(head) == len(line), "the columns are not aligned"
    name, *cells = line.split()
    change = [q - p for p, q in zip(x, y)]
    assert name == "piqa"
    assert [float(cell) for cell in cells] == pytest.approx([
        4 / 8, 6 / 8, 2 / 8, statistics.stdev(change) / math.sqrt(8), 1, 3,
        compare.mcnemar(1, 3)], abs=1e-4)


def test_what_evaluate_writes_can_be_compared(tmp_path):
    import evaluate
    questions = [evaluate.Question([("c", " a"), ("c", " b")], ["a", "b"], i % 2) for i in range(6)]
    paths = []
    for name, better in (("a", 0), ("b", 1)):
        scores = [(float(-choice == better - 1), True) for _ in questions for choice in range(2)]
        result, rows = evaluate.grade(questions, scores)
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({
            "settings": {}, "tasks": {"piqa": result | {"sha256": "s"}},
            "rows": [{"task": "piqa"} | row for row in rows]}))
    assert compare.compare(*map(str, paths))["piqa"]["A"] == 0.5


@pytest.mark.parametrize("changes, complaint", [
    ({"max_len": 32}, "max_len is 64"), ({"bos": True}, "bos is False"),
    ({"dtype": "bfloat16"}, "dtype is float32"), ({"protocol": "amd"}, "protocol is None"),
    ({"max_new_tokens": 4}, "max_new_tokens is None"), ({"task": "wsc"}, "no task in common"),
    ({"solved": [1, 0]}, "sha256, rows"), ({"solved": [1, 2, 0]}, "b is not what evaluate.py")])
def test_what_was_measured_differently_is_refused(changes, complaint, tmp_path, capsys):
    a = write_run(tmp_path / "a", [1, 0, 1])
    b = write_run(tmp_path / "b", **{"solved": [1, 0, 0]} | changes)
    assert complaint in refuses(capsys, a, b)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"rows": [{"task": "x", "acc": 1}]}',
                                     '{"rows": [], "tasks": {}, "settings": 3}', "[" * 100000])
def test_a_file_of_another_kind_is_named(content, tmp_path, capsys):
    a = write_run(tmp_path / "a", [1, 0, 1])
    (tmp_path / "b").write_text(content)
    assert "b is not what evaluate.py --json writes" in refuses(capsys, a, str(tmp_path / "b"))


def test_rows_that_are_missing_are_noticed(tmp_path, capsys):
    a = write_run(tmp_path / "a", [1, 0, 1])
    run = json.loads(Path(a).read_text())
    (tmp_path / "b").write_text(json.dumps(run | {"rows": run["rows"][:2]}))
    assert "2 rows of piqa" in refuses(capsys, a, str(tmp_path / "b"))
    assert "nowhere is not what" in refuses(capsys, a, "nowhere")
