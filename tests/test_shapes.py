"""Shape comments are true: the oracle, model.py and speculative.py run with a check behind each.

A line such as

    q = self.q_proj(x).view(B, T, -1, self.D)               # (B, T, H, D)

is compiled together with a check that compares q's shape with the comment. The letters have one
meaning in a whole run, and all have different values, so that no comment is true by accident. Only
in functions that take any size (`free` below) is a letter bound anew, at its first use in each
call. Three other kinds of claims are checked: the value of `return ...  # (B, T, C)`, the commented
fields of a NamedTuple, and arguments that a docstring names with their shape: "q (B, H, T, D)".
The scripts are checked down to the line where a reader can stop.

    pytest tests/test_shapes.py -rP          (prints how many comments were checked)
"""
import ast
import io
import math
import re
import sys
import tokenize
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import model

ROOT = Path(model.__file__).parent
# Different from each other, from 1, and from each sum that the comments have (G + 1, 2 G + 1).
SIZES = {"B": 7, "T": 5, "S": 17, "C": 48, "H": 6, "K": 3, "D": 8, "F": 40, "V": 61, "G": 12}

# What counts as a shape: a tuple that opens with a dimension.
SHAPE = re.compile(r"\(((?:[A-Z]\b|\d+[A-Z]?\b|heads\b|\.\.\.)[^()]*,[^()]*)\)")


# ---- The language of the comments --------------------------------------------------------------

def matches(size: int, words: str, letters: dict, free: str) -> bool:
    """Is this one size of `words`: T, G+1, 2G+1, D/2, heads, B or 1, V or fewer? A free letter
    that stands alone, or as G+1, is bound at its first use."""
    for choice in words.replace("heads", "H or K").split(" or "):
        choice = re.sub(r"(\d)([A-Z])", r"\1*\2", choice.strip())
        if choice == "fewer":
            upper = letters[words.split(" or ")[0].strip()]
            if size <= upper:
                return True
        elif choice.removesuffix("+1") in free.split() and choice[0] not in letters:
            letters[choice[0]] = size - choice.endswith("+1")
            return True
        elif not re.fullmatch(r"[A-Z0-9 +*/-]+", choice):
            raise ValueError(f"{words!r} is no dimension")
        elif eval(choice, {"__builtins__": {}}, letters) == size:
            return True
    return False


def agrees(shape: tuple, claim: str, letters: dict, free: str) -> bool:
    dims = [words.strip() for words in claim.rstrip(", ").split(",")]
    if dims[0] == "...":
        dims = dims[1:]
        shape = shape[len(shape) - len(dims):]
    return len(dims) == len(shape) and all(
        matches(size, words, letters, free) for size, words in zip(shape, dims))


def tensors(value) -> list:
    """The tensors of a value, or of a tuple, list or dict of them."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors(part)]
    return [value] if hasattr(value, "shape") else []


# ---- A module with its checks ------------------------------------------------------------------

class Traced:
    """The source of a module, its claims, and what became of each when the module ran."""

    def __init__(self, path: Path, sizes: dict, free: dict, source: str | None = None):
        self.name, self.sizes, self.free = path.name, sizes, free
        self.source = source or path.read_text()
        story = self.source[:self.source.find("\n# ====") + 1 or None].count("\n")
        self.claims = {}                    # line -> comment or part of a docstring
        self.owner = {}                     # line -> the function that it stands in
        self.checked, self.problems = set(), {}
        self.fields = defaultdict(list)     # class -> (field, line)
        comments = {token.start[0]: token for token in
                    tokenize.generate_tokens(io.StringIO(self.source).readline)
                    if token.type == tokenize.COMMENT and SHAPE.search(token.string)
                    and token.start[0] <= story}
        lines = self.source.splitlines()
        self.comments = {}                  # line of the statement -> line of the comment
        for number, token in comments.items():
            self.claims[number] = token.string
            own_line = not lines[number - 1][:token.start[1]].strip()
            target = number
            if own_line and not re.match("# " + SHAPE.pattern, token.string):
                del self.claims[number]     # a comment that mentions a shape
                continue
            while own_line and (not lines[target - 1].strip()
                                or lines[target - 1].strip().startswith("#")):
                target += 1                 # a comment above its statement
            self.comments[target] = number
        tree, self.story = ast.parse(self.source), story
        self.visit(tree, None)
        self.module = types.ModuleType("traced_" + path.stem)
        self.module.check = self.check
        sys.modules[self.module.__name__] = self.module         # dataclasses look there
        try:
            exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), self.module.__dict__)
        finally:
            del sys.modules[self.module.__name__]
        for class_name, fields in self.fields.items():
            self.watch(getattr(self.module, class_name), fields)

    def visit(self, node: ast.AST, function: str | None) -> None:
        """Put a check behind each statement of `node` that has a comment, innermost first."""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if not isinstance(body, list):
                continue
            new = []
            for statement in body:
                self.visit(statement, function)
                if isinstance(node, ast.ClassDef) and isinstance(statement, ast.AnnAssign):
                    if number := self.comments.get(statement.lineno):
                        self.fields[node.name].append((statement.target.id, number))
                        self.owner[number] = node.name
                    new.append(statement)
                elif function is None:
                    new.append(statement)
                else:
                    new += self.instrument(statement, function)
            setattr(node, name, new)
        for handler in getattr(node, "handlers", []):
            self.visit(handler, function)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [*ast.parse("letters_ = {}").body, *self.arguments(node), *node.body]

    def instrument(self, statement: ast.stmt, function: str) -> list[ast.stmt]:
        """The statement, with checks behind it (before it, if it returns)."""
        last = statement.body[0].lineno - 1 if hasattr(statement, "body") else statement.end_lineno
        numbers = [self.comments[line] for line in range(statement.lineno, last + 1)
                   if self.comments.get(line) and self.comments[line] not in self.owner]
        for number in numbers:
            self.owner[number] = function
            if isinstance(statement, ast.For):
                statement.body.insert(0, self.call(number, statement.target, function))
            elif isinstance(statement, (ast.Return, ast.Expr)):
                statement.value = self.call(number, statement.value, function).value
            elif isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                targets = getattr(statement, "targets", None) or [statement.target]
                return [statement] + [self.call(n, t, function)
                                      for n in numbers for t in targets]
            else:
                self.problems[number] = "stands at a statement that makes no value"
        return [statement]

    def arguments(self, function: ast.FunctionDef) -> list[ast.stmt]:
        """Checks of the arguments that the docstring names with their shapes."""
        names = {arg.arg for arg in (*function.args.args, *function.args.kwonlyargs)}
        checks = []
        if function.lineno > self.story:
            return checks
        for match in re.finditer(r"(\w+(?:, \w+)*) " + SHAPE.pattern,
                                 ast.get_docstring(function) or "", re.M):
            for name in match[1].split(", "):
                if name in names:
                    key = f"{function.lineno}, {name}"
                    self.claims[key], self.owner[key] = f"({match[2]})", function.name
                    checks.append(self.call(key, ast.Name(name), function.name))
        return checks

    def call(self, key, value: ast.expr, function: str) -> ast.Expr:
        """The statement check(key, value, function, letters_)."""
        text = ast.unparse(value)
        code = f"check({key!r}, {text}, {function!r}, letters_)"
        return ast.parse(code).body[0]

    def watch(self, kind: type, fields: list) -> None:
        """Check a NamedTuple's commented fields whenever one is made."""
        make = kind.__new__

        def checked(cls, *values, **named):
            made, letters = make(cls, *values, **named), {}
            for name, number in fields:
                self.check(number, getattr(made, name), kind.__name__, letters)
            return made
        kind.__new__ = checked

    def check(self, key, value, function: str, letters: dict):
        """Compare a value with its claim; returns the value."""
        if value is None and isinstance(key, str):
            return value                        # an optional argument
        free = self.free.get(function, self.free.get("*", ""))
        for letter, size in self.sizes.items():
            if letter not in free.split():
                letters[letter] = size
        # "(B, 2 + G) -> (B, 2)": the value is what the arrow leads to. "(B, 1) and (B, T), which
        # broadcast to (B, T)": the values come first.
        claims = SHAPE.findall(self.claims[key].rpartition("->")[2].split("broadcast")[0])
        found = tensors(value)
        if len(claims) == 1:
            claims *= len(found)
        self.checked.add(key)
        try:
            if not claims or len(claims) != len(found):
                raise ValueError(f"{len(claims)} shapes for {len(found)} tensors")
            for claim, tensor in zip(claims, found):
                if not agrees(tuple(tensor.shape), claim, letters, free):
                    names = {size: letter for letter, size in letters.items()}
                    self.problems[key] = (
                        f"says ({claim}), and the shape is {tuple(tensor.shape)}, "
                        f"({', '.join(str(names.get(size, size)) for size in tensor.shape)})")
        except (ValueError, NameError, KeyError, SyntaxError) as error:
            self.problems[key] = f"is not understood: {self.claims[key]} ({error})"
        return value

    def report(self) -> str:
        for key in self.claims.keys() - self.owner.keys():
            self.problems[key] = f"belongs to no statement: {self.claims[key]}"
        return "\n".join(f"{self.name}:{key} {text}" for key, text in
                         sorted(self.problems.items(), key=lambda item: str(item[0])))

    def unchecked(self) -> list[str]:
        return sorted(f"{self.name}:{key} in {self.owner.get(key)}: {self.claims[key]}"
                      for key in self.claims.keys() - self.checked)


# ---- The runs ----------------------------------------------------------------------------------

def config() -> model.ModelConfig:
    return model.ModelConfig(
        vocab_size=SIZES["V"], hidden_size=SIZES["C"], intermediate_size=SIZES["F"],
        num_hidden_layers=2, num_attention_heads=SIZES["H"], num_key_value_heads=SIZES["K"],
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None)


def run_model(source: str | None = None) -> Traced:
    """Grouped heads, without and with a cache, and attention as it is written out."""
    # rope() makes a table of any size: for (1, T) positions, for (B, T), for (1, S) of a cache.
    traced = Traced(ROOT / "model.py", SIZES, {"rope": "B T"}, source)
    B, T, S, H, K, D, V = (SIZES[letter] for letter in "BTSHKDV")
    llama = traced.module.Transformer(config())
    tokens = torch.randint(V, (B, T))
    with torch.no_grad():
        llama(tokens)
        cache = traced.module.Cache(llama.config, B, S)
        for step in range(3):
            llama(tokens, cache)
            cache.advance(T)
            cache.rollback(torch.arange(B) % 3)
        q, k, v = torch.randn(B, H, T, D), torch.randn(B, K, S, D), torch.randn(B, K, S, D)
        traced.module.attention_formula(q, k, v, torch.zeros(B, 1, T, S))
    return traced


def run_speculative(source: str | None = None) -> Traced:
    """One batch, plainly and with guesses, greedy and sampled; verify() with a smaller draft."""
    # A plain step's Verdict has G = 0.
    traced = Traced(ROOT / "speculative.py", SIZES, {"Verdict": "G"}, source)
    B, G, V, T = (SIZES[letter] for letter in "BGVT")
    target, draft = model.Transformer(config(), seed=0), model.Transformer(config(), seed=1)
    prompts = [list(range(T - b % 3)) for b in range(B)]
    sampled = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    for settings in ({}, {"draft": draft}, {"draft": draft} | sampled):
        traced.module.complete(target, prompts, 2, gamma=G, **settings)
    p, q = torch.rand(B, G + 1, V), torch.rand(B, G, V - 3)
    traced.module.verify(p, q, torch.zeros(B, G, dtype=torch.int64), torch.rand(B, G + 1))
    return traced


def run_oracle(source: str | None = None) -> Traced:
    """The forward pass, its loss, and one verification; T tokens, without a batch."""
    # rope() turns queries and keys, of H and of K heads.
    traced = Traced(ROOT / "tests" / "oracle.py", SIZES, {"rope": "H"}, source)
    T, V, G = (SIZES[letter] for letter in "TVG")
    weights = model.Transformer(config()).state_dict()
    tokens, generator = np.arange(T), np.random.default_rng(0)
    weights = {name: weight.numpy() for name, weight in weights.items()}
    logits = traced.module.forward(weights, config(), tokens)
    traced.module.loss(logits, tokens)
    p, q = generator.dirichlet(np.ones(V), G + 1), generator.dirichlet(np.ones(V), G)
    traced.module.verify(p, q, np.arange(G), generator.random(G), 0.5)
    return traced


RUNS = {"oracle.py": run_oracle, "model.py": run_model, "speculative.py": run_speculative}


# ---- The claims --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RUNS)
def test_each_shape_comment_is_the_shape(name):
    traced = RUNS[name]()
    problems = traced.report()
    print(f"{name}: {len(traced.checked)} of {len(traced.claims)} shapes were checked")
    assert not problems, "these comments are not true:\n" + problems
    assert not traced.unchecked(), "the run did not come by here:\n" + "\n".join(
        traced.unchecked())
    assert len(traced.checked) >= 15, "hardly a shape was found: has their notation changed?"


@pytest.mark.parametrize("name", RUNS)
def test_a_false_comment_is_found(name):
    """All comments are made false, by a swap of their first and last sizes or by one size more; and
    each of them is reported, with its line and the real shape."""
    traced = RUNS[name]()
    lines, broken = traced.source.splitlines(), set()

    def swap(match: re.Match) -> str:
        dims = [words.strip() for words in match[1].rstrip(", ").split(",")]
        dims = [dims[-1], *dims[1:-1], dims[0]] if dims[0] != dims[-1] else [*dims, "1"]
        return f"({', '.join(dims)})"
    for number in traced.comments.values():
        before, hash_sign, comment = lines[number - 1].rpartition("# ")
        lines[number - 1] = before + hash_sign + SHAPE.sub(swap, comment)
        broken.add(number)
    traced = RUNS[name]("\n".join(lines) + "\n")
    missed = broken - traced.problems.keys()
    assert not missed, f"these false comments went unnoticed: lines {sorted(missed)} of {name}"
    assert all("the shape is (" in traced.problems[number] for number in broken), traced.report()
    assert len(broken) >= 10


@pytest.mark.parametrize("comment, reason", [
    ("(B, Q)", "is not understood"), ("(B, T C)", "is not understood"),
    ("(B, T), (B, C)", "2 shapes for 1 tensors"), ("(B, C)", "the shape is (7, 5)"),
    ("(B, T, 1)", "the shape is (7, 5)"), ("(B or 1, S or T)", None), ("(S, C) -> (B, T)", None)])
def test_a_comment_that_is_not_understood_is_an_error(tmp_path, comment, reason):
    path = tmp_path / "small.py"
    path.write_text(f"def double(x):\n    y = 2 * x       # {comment}\n    return y\n")
    traced = Traced(path, SIZES, {})
    traced.module.double(torch.zeros(SIZES["B"], SIZES["T"]))
    assert traced.report().startswith("small.py:2 ") and reason in traced.report() if reason \
        else traced.report() == ""
