"""benchmarks/plot.py: pictures of training and decoding runs, and the small CSVs kept of them."""
import csv
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import plot


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two training runs and three decoding runs, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, scale in (("base", 9.0), ("code", 5.0)):
        Path(name).mkdir()
        Path(name, "metrics.jsonl").write_text("".join(
            json.dumps({"step": i, "tokens": 100 * i, "loss": scale / i} | (
                {"val_bits_per_byte": 3.0 / i} if i % 10 == 0 else {})) + "\n"
            for i in range(1, 101)))
    for gamma in (1, 3, 5):
        for name, temperature in ((f"{gamma}.json", 0.0), (f"{gamma}s.json", 0.8)):
            Path(name).write_text(json.dumps({
                "gamma": gamma, "speedup": 1.0 + gamma, "temperature": temperature}))
    return tmp_path


def refuses(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        plot.main(list(argv))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("plot.py: error: "), message
    assert message.count("\n") == 1, "a refusal is one line"
    return message


def test_runs_are_drawn_as_svg(runs):
    pytest.importorskip("matplotlib", reason="matplotlib (the extra `plot`) is not installed")
    pictures = []
    for out in ("one.svg", "two.svg"):
        plot.main(["base", "code/metrics.jsonl", "1.json", "3.json", "5.json", "3s.json",
                   "--out", out, "--x-log"])
        pictures.append(Path(out).read_bytes())
    assert pictures[0] == pictures[1], "the same runs must give the same file"
    for label in (b"training loss", b"held-out bits per byte", b"speed-up", b"gamma", b"sampled",
                  b"base", b"code"):
        assert b"<!-- " + label in pictures[0], f"the picture lacks {label.decode()}"


def test_a_csv_of_all_rows_holds_the_same_curves(runs):
    plot.main(["base", "code", "--csv", "all.csv", "--rows", "1000"])
    expected, rows = (plot.read_runs(paths)[0] for paths in (["base", "code"], ["all.csv"]))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected):
        assert row == {key: value if key == "run" else pytest.approx(value, rel=1e-5)
                       for key, value in other.items()}
    assert not Path("plot.svg").exists(), "nothing was asked for but the CSV"


def test_a_csv_is_thinned_by_means_and_keeps_every_validation(runs):
    plot.main(["base", "code", "--csv", "small.csv", "--rows", "20"])
    rows = list(csv.DictReader(Path("small.csv").open()))
    base = [row for row in rows if row["run"] == "base"]
    losses = [(int(row["tokens"]), float(row["loss"])) for row in base if row["loss"]]
    assert len(losses) == 20
    assert losses[0] == (500, pytest.approx(sum(9.0 / i for i in range(1, 6)) / 5, rel=1e-5))
    held_out = {int(row["tokens"]): float(row["val_bits_per_byte"]) for row in base
                if row["val_bits_per_byte"]}
    assert held_out == {100 * i: pytest.approx(3.0 / i, rel=1e-5) for i in range(10, 101, 10)}
    assert [int(row["tokens"]) for row in base] == sorted(int(row["tokens"]) for row in base)


def test_a_validation_within_a_block_is_not_averaged_away(runs):
    plot.main(["base", "--csv", "small.csv", "--rows", "7"])
    rows = list(csv.DictReader(Path("small.csv").open()))
    assert {int(row["tokens"]) for row in rows if row["val_bits_per_byte"]} == set(
        range(1000, 10001, 1000))


@pytest.mark.parametrize("content, name", [
    ("{", "broken.json"), ('{"speedup": 2.0}', "other.json"), ("{", "broken.jsonl"),
    ('{"gamma": "auto", "speedup": 2.0, "temperature": 0.0}', "auto.json"), ("[1]", "list.json"),
    ('{"loss": 1.0}', "no-tokens.jsonl"), ("tokens,loss\n1,x\n", "words.csv")])
def test_a_file_of_another_kind_is_named(content, name, runs, capsys):
    Path(name).write_text(content)
    assert f"{name} is not a run of train.py" in refuses(capsys, name)


def test_nothing_to_draw_is_an_error(runs, capsys):
    Path("base", "metrics.jsonl").write_text("")
    assert "no step is logged there yet" in refuses(capsys, "base")
    assert "nowhere is not a run" in refuses(capsys, "nowhere")
    assert "cannot be written" in refuses(capsys, "code", "--out", "nowhere/plot.svg")
    assert "--rows is 0" in refuses(capsys, "code", "--csv", "a.csv", "--rows", "0")
