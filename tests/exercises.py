"""Exercises: write the functions of this project yourself, from RMSNorm to a round of speculation.

`make` writes a student's copy of the project, in which the bodies of some functions are taken out:
their signatures, docstrings and equations stay. `check` says for each exercise whether it is
solved, and if not, which property fails and where to look. docs/exercises.md is the student's page;
exercise_checks.py has the checks.

An exercise is judged alone: the student's file is loaded with this project's own bodies in all the
functions that belong to other exercises, and it imports this project's other files. So a mistake
in RMSNorm does not spoil attention, and any exercise can be done first.

    python tests/exercises.py make DIR
    python tests/exercises.py check DIR            # all of them
    python tests/exercises.py check DIR 1 2        # some
    python tests/exercises.py check DIR --json     # for a grader
"""
import argparse
import ast
import functools
import io
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# A student's copy has all of the project but the answers.
COPIED = ("*.py", "*.toml", "*.md", "docs/*", "benchmarks/*.py", "tests/*.py")
LEFT_OUT = ("exercises.py", "exercise_checks.py", "test_exercises.py", "test_mutations.py",
            "test_docs.py")      # the pages it reads speak of the others
READY_SECONDS = 300                 # for a worker to import PyTorch, on a slow disk
PRINTED = 500                       # characters shown of what a student's code prints
MEMORY = 8 << 30                    # bytes that a student's code may take, where that can be set
OURS = 10**6                        # line numbers from here on are this project's, not a student's


class Exercise(NamedTuple):
    number: int
    title: str
    points: int
    file: str
    functions: tuple[str, ...]          # whose bodies are taken out
    check: str                          # the function of exercise_checks.py that judges it
    read: str                           # the paper, or the place that has the equation


EXERCISES = [Exercise(number, *row) for number, row in enumerate((
    ("RMSNorm", 3, "model.py", ("RMSNorm.forward",), "rms_norm",
     "the docstring of RMSNorm; Zhang & Sennrich 2019, eq. 4"),
    ("RoPE", 6, "model.py", ("rope", "rotate"), "rope",
     "the docstrings of rope and rotate; Su et al. 2021, section 3.2.2 and eq. 34"),
    ("causal attention", 6, "model.py", ("attention_formula",), "causal_attention",
     "the docstring of attention_formula; Vaswani et al. 2017, section 3.2.1"),
    ("SwiGLU", 3, "model.py", ("SwiGLU.forward",), "swiglu",
     "the docstring of SwiGLU; Shazeer 2020, eq. 6"),
    ("grouped heads", 4, "model.py", ("attention_formula",), "grouped_heads",
     "the docstring of attention_formula; Ainslie et al. 2023, section 2.2; it goes on with your "
     "exercise 3"),
    ("the attention layer", 8, "model.py", ("Attention.forward",), "attention_layer",
     "the docstrings of Past and Attention; Touvron et al. 2023, section 2.2"),
    ("the cache and its rollback", 9, "model.py",
     ("Cache.advance", "Cache.rollback", "Cache.lookup"), "cache_and_rollback",
     "the docstrings of Past and Cache"),
    ("one merge of BPE", 4, "data.py", ("merge_pair",), "bpe_merge",
     "the docstring of merge_pair; Sennrich et al. 2016, Algorithm 1"),
    ("the learning rate's schedule", 4, "train.py", ("learning_rate",), "schedule",
     "the docstring of learning_rate; Loshchilov & Hutter 2017, eq. 5"),
    ("clipping", 4, "train.py", ("clip",), "clipping",
     "the docstring of clip; Pascanu et al. 2013, Algorithm 1"),
    ("AdamW", 6, "tests/oracle.py", ("adamw_step",), "adamw",
     "the docstring of adamw_step; Loshchilov & Hutter 2019, Algorithm 2; in NumPy"),
    ("warp", 8, "speculative.py", ("warp",), "warp",
     "the docstring of warp; Holtzman et al. 2020, eq. 2 and 3, for top-p"),
    ("the residual", 4, "speculative.py", ("residual",), "residual",
     "the table at the top of speculative.py; Leviathan et al. 2023, section 2.3"),
    ("verify", 9, "speculative.py", ("verify",), "verify",
     "the docstring of verify; Leviathan et al. 2023, Algorithm 1"),
    ("AMD's draft-length schedule", 3, "speculative.py", ("next_gamma",), "draft_length",
     "the docstring of next_gamma, which is transformers 4.37's schedule"),
    ("bits per byte", 3, "evaluate.py", ("bits_per_byte",), "bits_per_byte",
     "the docstring of bits_per_byte"),
    ("pass@k", 4, "evaluate.py", ("pass_at_k",), "pass_at_k",
     "the docstring of pass_at_k; Chen et al. 2021, eq. 1"),
    ("one round", 12, "speculative.py", ("propose", "decide", "settle"), "one_round",
     "the picture of one round at the top of speculative.py; Leviathan et al. 2023, section 2"),
), 1)]


class Missing(ValueError):
    """A file lacks a function that an exercise is about."""


# ------------------------------------------------------------------------------ bodies, out and in

def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions and methods of a module, by names such as warp and RMSNorm.forward."""
    found = {}
    for node in tree.body:
        methods = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + method.name: method for method in methods
                  if isinstance(method, ast.FunctionDef)}
    return found


def function(tree: ast.Module, name: str, file: str) -> ast.FunctionDef:
    node = functions(tree).get(name)
    if node is None:
        raise Missing(f"{file} has no function {name}: it has to have the name and the place that "
                      "it has in the project")
    return node


def blank(source: str, file: str, reasons: dict[str, str]) -> str:
    """The source without the bodies of some functions. reasons: name -> what stands there."""
    lines, tree = source.split("\n"), ast.parse(source)
    nodes = [(function(tree, name, file), reason) for name, reason in reasons.items()]
    for node, reason in sorted(nodes, key=lambda pair: -pair[0].lineno):    # from the last one up
        if ast.get_docstring(node) is not None:
            start = node.body[0].end_lineno         # lines[start] follows the docstring
        else:
            start = node.body[0].lineno - 1
            while lines[start - 1].strip().startswith("#"):
                start -= 1                          # the comments before the first statement
        indent = " " * node.body[0].col_offset
        lines[start:node.end_lineno] = [f'{indent}raise NotImplementedError("{reason}")']
    return "\n".join(lines)


def blanked(file: str, exercises: list[Exercise]) -> str:
    """A file of the project without the bodies that these exercises ask for."""
    reasons = {}
    for exercise in exercises:
        for name in exercise.functions if exercise.file == file else ():
            reasons.setdefault(name, []).append(f"exercise {exercise.number}: {exercise.title}")
    source = (ROOT / file).read_text()
    return blank(source, file, {name: "; ".join(texts) for name, texts in reasons.items()})


@functools.cache
def own_functions(file: str) -> dict[str, ast.FunctionDef]:
    """This project's functions, with line numbers that no student's file has."""
    tree = ast.parse((ROOT / file).read_text())
    return functions(ast.increment_lineno(tree, OURS))


def assemble(exercise: Exercise, path: Path, source: str) -> types.ModuleType:
    """A student's file as a module, with this project's bodies in the other exercises' functions.

    It is put together as a syntax tree: the student's lines keep their numbers, for messages.
    """
    tree = ast.parse(source)
    for other in EXERCISES:
        for name in other.functions if other.file == exercise.file else ():
            theirs, own = function(tree, name, exercise.file), own_functions(exercise.file)[name]
            if name not in exercise.functions:
                theirs.args, theirs.body = own.args, own.body
    module = types.ModuleType(f"student_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


# ------------------------------------------------------------------------------------- one verdict

def judge(exercise: Exercise, path: Path, source: str) -> str:
    """Why an exercise is not solved, in one sentence; "" if it is."""
    import exercise_checks                  # it loads PyTorch, which nothing else here needs
    try:
        check = getattr(exercise_checks, exercise.check)
        check(assemble(exercise, path, source))
    except (exercise_checks.Wrong, Missing) as wrong:
        return str(wrong)
    except SyntaxError as error:
        return f"{exercise.file} is not Python: line {error.lineno}: {error.msg}"
    except NotImplementedError as error:
        if str(error).startswith("exercise "):
            return "not written yet"
        return describe(error, path, source)
    except BaseException as error:          # sys.exit() too: it is the student's
        return describe(error, path, source)
    return ""


def describe(error: BaseException, path: Path, source: str) -> str:
    """One sentence for what a student's code raised, with the student's line."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    lines = source.split("\n")
    theirs = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == str(path) and 0 < (frame.lineno or 0) <= len(lines)]
    place = (f" in line {theirs[-1]} of {path.name}: {lines[theirs[-1] - 1].strip()}" if theirs else
             ", where the check used what it returned")
    return f"it raised {text:.200}{place}"


def place(exercise: Exercise, path: Path) -> str:
    """Where a student has to write: model.py:98."""
    try:
        line = functions(ast.parse(path.read_text()))[exercise.functions[0]].lineno
        return f"{exercise.file}:{line}"
    except (OSError, SyntaxError, ValueError, KeyError):
        return exercise.file


class Printed(io.StringIO):
    """Keeps the beginning of what is printed, however much it is."""

    def write(self, text: str) -> int:
        super().write(text[:max(PRINTED - self.tell(), 0)])
        return len(text)


def work(folder: Path, numbers: list[int]) -> None:
    """The worker: judge exercises and write a line of JSON for each. The student's code runs here,
    and may print, loop for ever, or end this process."""
    # This project's files, also where others of these names are installed.
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    import exercise_checks  # noqa: F401            # now: no exercise's time goes on loading it
    torch.set_num_threads(1)                        # more are slower on such small tensors
    channel = os.fdopen(os.dup(1), "w")             # standard output is the student's from now on
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with suppress(ImportError, ValueError, OSError):    # where the system has no such limit
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    print("ready", file=channel, flush=True)
    for exercise in (EXERCISES[number - 1] for number in numbers):
        printed, path = Printed(), folder / exercise.file
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                reason = judge(exercise, path, path.read_text())
            except (OSError, ValueError) as error:
                reason = f"{exercise.file} cannot be read: {error}"
        print(json.dumps([reason, printed.getvalue()]), file=channel, flush=True)


def verdicts(folder: Path, numbers: list[int], seconds: float) -> Iterator[tuple[int, str, str]]:
    """Yield (number, reason or "", what was printed) of each exercise. A worker that is too slow or
    ends is replaced by another one, which begins with the next exercise."""
    remaining = list(numbers)
    while remaining:
        worker = subprocess.Popen(
            [sys.executable, __file__, "work", str(folder), *map(str, remaining)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        lines = queue.Queue()

        def forward(worker=worker, lines=lines):
            for line in worker.stdout:
                lines.put(line)
            lines.put("")                           # the worker has ended

        threading.Thread(target=forward, daemon=True).start()
        try:
            if lines.get(timeout=READY_SECONDS) != "ready\n":
                raise RuntimeError("a worker could not start: its error stands above")
            while remaining:
                line = lines.get(timeout=seconds)
                reason, printed = json.loads(line) if line else ("it ended Python", "")
                yield remaining.pop(0), reason, printed
                if not line:
                    break
        except queue.Empty:
            yield remaining.pop(0), (f"it took more than {seconds:g} seconds, where one is plenty: "
                                     "is there a loop that never ends?"), ""
        finally:
            worker.kill()
            worker.wait()


# --------------------------------------------------------------------------------- the command line

def make(folder: Path) -> None:
    """Write a student's copy of the project."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name a new one")
    paths = [path for pattern in COPIED for path in sorted(ROOT.glob(pattern))
             if path.is_file() and path.name not in LEFT_OUT]
    files = {exercise.file for exercise in EXERCISES}
    texts = {file: blanked(file, EXERCISES) for file in files}      # before anything is written
    for path in paths:
        name = path.relative_to(ROOT)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.as_posix() in files:
            (folder / name).write_text(texts[name.as_posix()])
        else:
            (folder / name).write_bytes(path.read_bytes())
    points = sum(exercise.points for exercise in EXERCISES)
    print(f"{folder} has {len(EXERCISES)} exercises, {points} points. The first one, "
          f"{EXERCISES[0].title}, is in {folder / place(EXERCISES[0], folder / EXERCISES[0].file)}")


def check(folder: Path, numbers: list[int], seconds: float, as_json: bool) -> int:
    """Judge exercises and report: 0 if all are solved, else 1."""
    if not (folder / EXERCISES[0].file).is_file():
        raise ValueError(f"{folder} has no {EXERCISES[0].file}: expected a student's copy, as "
                         "`python tests/exercises.py make` writes it")
    if unknown := [n for n in numbers if not 1 <= n <= len(EXERCISES)]:
        raise ValueError(f"there is no exercise {unknown[0]}: they are 1 to {len(EXERCISES)}")
    results = []
    for number, reason, printed in verdicts(
            folder, numbers or [exercise.number for exercise in EXERCISES], seconds):
        exercise = EXERCISES[number - 1]
        results.append({
            "exercise": number, "title": exercise.title, "points": exercise.points,
            "earned": 0 if reason else exercise.points, "solved": not reason, "reason": reason,
            "place": place(exercise, folder / exercise.file),
            "functions": list(exercise.functions), "read": exercise.read, "printed": printed})
        if not as_json:
            report(results[-1], folder)
    earned, points = (sum(result[key] for result in results) for key in ("earned", "points"))
    if as_json:
        print(json.dumps({"earned": earned, "points": points, "exercises": results}, indent=2))
    else:
        print(f"{earned} of {points} points")
    return 0 if all(result["solved"] for result in results) else 1


def report(result: dict, folder: Path) -> None:
    """Print one exercise's result as it comes."""
    title = f"{result['exercise']:2} {result['title']}"
    if result["solved"]:
        print(f"{title}: solved, {result['points']} points", flush=True)
    else:
        names = ", ".join(result["functions"])
        print(f"{title}: {result['reason']}")
        print(f"   write {names} in {folder / result['place']}")
        print(f"   read {result['read']}", flush=True)
    if result["printed"]:
        print("   your code printed: " + result["printed"].strip().replace("\n", "\n   | "))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write a student's copy of the project, or check one. See docs/exercises.md.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="make or check")
    maker = commands.add_parser("make", help="write a copy without the bodies of the exercises")
    maker.add_argument("folder", type=Path, metavar="DIR")
    checker = commands.add_parser("check", help="say which are solved, and which property fails")
    checker.add_argument("folder", type=Path, metavar="DIR")
    checker.add_argument("numbers", type=int, nargs="*", metavar="N", help="default: all")
    checker.add_argument("--json", action="store_true", help="for a grader")
    checker.add_argument("--seconds", type=float, default=20, help="for each exercise (default 20)")
    worker = commands.add_parser("work")            # what check runs; no command for people
    worker.add_argument("folder", type=Path)
    worker.add_argument("numbers", type=int, nargs="+")
    args = parser.parse_args(argv)
    try:
        if args.command == "make":
            make(args.folder)
        elif args.command == "work":
            work(args.folder, args.numbers)
        else:
            return check(args.folder, args.numbers, args.seconds, args.json)
    except OSError as error:
        print(f"exercises.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"exercises.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130                                      # as shells have it
    return 0


if __name__ == "__main__":
    sys.exit(main())
