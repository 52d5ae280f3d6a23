"""Draw runs as one SVG: loss and bits per byte against tokens, speed-up against the draft length.

    python benchmarks/plot.py out/demo-draft out/demo-target --out training.svg
    python benchmarks/plot.py docs/run.csv --x-log --out docs/run.svg
    python benchmarks/plot.py g1.json g2.json g4.json --out gamma.svg

A run is a folder of train.py, its metrics.jsonl, or a CSV with the same columns (`--csv FILE`
writes one from the runs, thinned to a few hundred rows, to be kept where a repository has no room
for the whole of it). A file of `speculative.py --gamma N --json FILE` gives a point of the curve.
Needs the extra `plot` (matplotlib).
"""
import argparse
import csv
import io
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import check_writable, write_whole

CURVES = {"loss": "training loss, nats per token", "val_bits_per_byte": "held-out bits per byte"}
COLUMNS = ["run", "tokens", *CURVES]


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl or of a CSV that have tokens and a curve: {column: number}.

    A row's "run" names its curve: in a CSV the column of that name, else the folder.
    """
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in
                    csv.DictReader(file)]
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    name = path.stem if path.suffix == ".csv" else path.resolve().parent.name
    return [{"run": row.get("run", name), "tokens": float(row["tokens"])} |
            {key: float(row[key]) for key in CURVES if key in row}
            for row in rows if any(key in row for key in CURVES)]


def read_runs(paths: list[str]) -> tuple[list[dict], list[tuple[str, float, float]]]:
    """The rows of training runs, and a (label, gamma, speed-up) for each decoding run."""
    rows, points = [], []
    for path in map(Path, paths):
        try:
            if path.is_dir():
                rows += read_metrics(path / "metrics.jsonl")
            elif path.suffix in (".jsonl", ".csv"):
                rows += read_metrics(path)
            else:
                figures = json.loads(path.read_bytes())
                points.append(("sampled" if figures["temperature"] else "greedy",
                               float(figures["gamma"]), float(figures["speedup"])))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a run of train.py (a folder, metrics.jsonl or a CSV) "
                             "and not what `speculative.py --gamma N --json FILE` writes "
                             f"({error!r:.200})") from None
    if not rows and not points:
        raise ValueError(f"{' '.join(paths)}: no step is logged there yet, nothing to draw")
    return rows, points


def thin(rows: list[dict], most: int) -> list[dict]:
    """At most about `most` rows of each run: blocks of training loss become their means, the rarer
    bits per byte all stay."""
    by_run = defaultdict(list)
    for row in rows:
        by_run[row["run"]].append(row)
    kept = []
    for part in by_run.values():
        losses = [row for row in part if "loss" in row]
        size = max(1, -(-len(losses) // most))
        for start in range(0, len(losses), size):
            block = losses[start:start + size]
            kept.append(block[-1] | {"loss": sum(row["loss"] for row in block) / len(block)})
        ends = {row["tokens"] for row in kept if row["run"] == part[0]["run"]}
        for row in losses:                              # their block was averaged away
            if "val_bits_per_byte" in row and row["tokens"] not in ends:
                kept.append({key: row[key] for key in row if key != "loss"})
        kept += [row for row in part if "loss" not in row]
    return sorted(kept, key=lambda row: (list(by_run).index(row["run"]), row["tokens"]))


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if key in CURVES else
                         f"{value:.0f}" if key == "tokens" else value
                         for key, value in row.items()})
    return text.getvalue().encode()


def draw(rows: list[dict], points: list[tuple[str, float, float]], x_log: bool) -> bytes:
    """The SVG: a panel for each curve that there is. The same runs give the same bytes."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install -e '.[plot]'") from None
    panels = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for key, label in CURVES.items():
            if key in row:
                panels[label, "tokens"][row["run"]].append((row["tokens"], row[key]))
    for label, gamma, speedup in points:
        panels["speed-up", "gamma"][label].append((gamma, speedup))
    matplotlib.rcParams["svg.hashsalt"] = "plot.py"
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="tight")
    for axis, ((y, x), curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                      panels.items()):
        for label, curve in curves.items():
            axis.plot(*zip(*sorted(curve)), marker="." if len(curve) < 30 else None, label=label)
        axis.set(xlabel=x, ylabel=y)
        if x_log and x == "tokens":
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def run(args: argparse.Namespace) -> None:
    for path in (args.out, args.csv):
        if path:
            check_writable(path)
    rows, points = read_runs(args.runs)
    if args.csv:
        write_whole(args.csv, [as_csv(thin(rows, args.rows))])
        print(f"wrote {args.csv}")
    if args.out:
        write_whole(args.out, [draw(rows, points, args.x_log)])
        print(f"wrote {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw runs as one SVG.")
    add = parser.add_argument
    add("runs", nargs="+", help="folders or metrics.jsonl of train.py, CSVs, and files that "
        "`speculative.py --json` wrote, one for each gamma")
    add("--out", help="the picture (default: plot.svg, if no --csv is asked for)")
    add("--csv", help="write the training runs there, thinned")
    add("--rows", type=int, default=200, help="rows of a run in the CSV (default: %(default)s)")
    add("--x-log", action="store_true", help="tokens on a logarithmic axis")
    parser.error = lambda message: parser.exit(2, f"plot.py: error: {message}\n")
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows is {args.rows}: expected at least 1")
    args.out = args.out or (None if args.csv else "plot.svg")
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"plot.py: error: {error}\n")


if __name__ == "__main__":
    main()
