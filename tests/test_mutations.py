"""The suite notices the field's bugs: it must fail when one is put back into the code.

A bug is a replacement of source text that must match exactly once: when the code changes, the test
says which bug has to be written again. It stands beside the name of the test that has to notice
it, so that the list in test_pitfalls.py is held to its word. The copies lie in temporary folders
with the other scripts and the tests; pytest runs there, as many at a time as there are cores.

    pytest -m slow tests/test_mutations.py
"""
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forks import Fork

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

# bug: (name of the test that has to notice, replacements (old, new) ...). The text stands in
# speculative.py, or where the bug's name begins with "model: ", in model.py.
BUGS = {
    "raw logits are returned as q": (
        "drafts_are_drawn", ("distributions.append(q_i)",
                             "distributions.append(logits[:, :vocab_size].softmax(-1))")),
    "drafts are drawn from a bf16 q and judged by a float32 q": (
        "drafts_are_drawn", ("d_i = sample(q_i, u_i)", "d_i = sample(q_i.bfloat16(), u_i)")),
    "the residual is softmaxed": (
        "verify_equals_the_oracle", (".clamp(min=0)\n", ".clamp(min=0).softmax(-1)\n")),
    "recovery draws from p": (
        "chi_square", ("sample(residual(p[rows, n], q[rows, n]), u", "sample(p[rows, n], u")),
    "acceptance forgets q": (
        "exactly_the_targets_joint", ("u[:, :G] * q_guess < p_guess", "u[:, :G] < p_guess")),
    "a residual of zero stays zero": (
        "residual_of_zero", ("keepdim=True) > 0, excess", "keepdim=True) >= 0, excess")),
    "uniforms are bf16": (
        "float64_uniforms", ("generator=g, dtype=torch.float64)", "generator=g).bfloat16()")),
    "the draft's random numbers also accept": (
        "no_uniform_is_used_twice", ("self.u[:, G:2 * G + 1]", "self.u[:, :G + 1]")),
    "recovery uses an acceptance's random number": (
        "exactly_the_targets_joint", ("q[rows, n]), u[:, G])", "q[rows, n]), u[:, 0])")),
    "every round reseeds": (
        "no_uniform_is_used_twice",
        ("for g in generators]", "for g in [g.manual_seed(seed) for g in generators]]")),
    "the draft's cache lacks the last draft after full acceptance": (
        "draft_equal_to_the_target",
        ("tokens, guesses, distributions = last_two, [], []",
         "tokens, guesses, distributions = last_two[:, 1:], [], []"),
        ("zip((1, 2), self.models, self.caches)", "zip((1, 1), self.models, self.caches)"),
        ("rollback(verdict.tokens.shape[1] - gained)",
         "rollback((verdict.tokens.shape[1] - 1 - gained).clamp(min=0))")),
    "the draft is not rolled back": (
        "docstrings_picture", ("rollback(verdict.tokens.shape[1] - gained)", "rollback(0)")),
    "the draft is rolled back one token too few": (
        "without_a_cache", ("rollback(verdict.tokens.shape[1] - gained)",
                            "rollback(verdict.tokens.shape[1] - 1 - gained)")),
    "the target's cache keeps a rejected guess": (
        "without_a_cache", ("target_cache.advance(gained)", "target_cache.advance(gained + 1)")),
    "the cache has no room for the last drafts": (
        "fill_its_context", ("-(-(self.length + 2 * longest) // 64) * 64", "self.length")),
    "a row that has ended has no room for its guesses": (
        "ends_last_of_all", ("self.length + 2 * longest", "self.length + longest + 1")),
    "temperature 0 leaves probabilities soft": (
        "depend_on_the_seed", ("torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, "
                               "keepdim=True), 1.0)", "logits.softmax(-1)")),
    "EOS is looked for in the last token alone": (
        "eos_anywhere", ("token == eos_id or", "token == eos_id and i == len(tokens) or")),
    "token id 0 is taken for no token": (
        "token_0", ("token == eos_id or", "token and token == eos_id or")),
    "a stop string is looked for once a round": (
        "stop_function", ("stop and stop(", "stop and i == len(tokens) and stop(")),
    "the last round emits all that it accepted": (
        "exactly_max_new_tokens", ("len(new[b]) == max_new_tokens",
                                   "len(new[b]) >= max_new_tokens and i == len(tokens)")),
    "all rows advance as the luckiest": (
        "without_a_cache", ("gained = (verdict.n + 1) * active",
                            "gained = (verdict.n.max() + 1) * active")),
    "a row that has ended goes on": (
        "has_ended_stands_still", ("gained = (verdict.n + 1) * active", "gained = verdict.n + 1")),
    "short prompts are read with their padding": (
        "rows_of_a_batch", ("advance(lengths - unread)", "advance(lengths.max() - unread)")),
    "the draft looks up a token that it lacks": (
        "another_vocabulary", ("tokens.clamp(max=draft.config.vocab_size - 1)", "tokens")),
    "auto gamma drops a token for what it is": (
        "a_changing_gamma",
        ("        settle(verdict, self.last_two",     # no x of id 0: the accepted guesses will do
         "        if self.gamma == 'auto':\n"
         "            x = verdict.tokens.gather(1, verdict.n[:, None])[:, 0]\n"
         "            dropped = ((x == 0) & (verdict.n > 0)).long()\n"
         "            verdict = verdict._replace(n=verdict.n - dropped)\n"
         "        settle(verdict, self.last_two")),
    "auto gamma forgets full acceptance": (
        "schedule_of_transformers", ("min(gamma + 2, MAX_GAMMA)", "min(gamma + 1, MAX_GAMMA)")),
    "the benchmark counts the prompt": (
        "benchmark_counts", ("self.emitted += len(tokens)", "self.emitted += len(tokens) + 30")),
    "the warm-up is counted": (
        "benchmark_counts", ("prompts[:1], min(new, 32)))",
                             "prompts[:1], min(new, 32), stats=results[0][0]))")),
    "a probe that cannot fail": (
        "cannot_pack", ("return bool((y == 16).all())", "return True")),
    "model: stale keys beyond a row's position are seen": (
        "without_a_cache", ("self.places <= places[..., None]", "self.places <= places.max()")),
    "model: a position of -1 wraps around": (
        "from_minus_one", (".clamp(min=0)", "")),
    "model: all rows store where the first does": (
        "rows_of_a_batch", ("torch.arange(len(places), device=places.device)[:, None]",
                            "torch.zeros_like(places)")),
    "model: rollback forgets nothing": (
        "docstrings_picture", ("self.position -= n", "self.position -= 0 * n")),
}
BUGS["none"] = (" or ".join({test for test, *_ in BUGS.values()}),)     # all of them have to pass


def run_with(bug: str, folder: Path) -> tuple[int, str]:
    """Copy the project, put the bug in, run the test: (pytest's exit status, its output)."""
    script = "model.py" if bug.startswith("model: ") else "speculative.py"
    source = (ROOT / script).read_text()
    test, *replacements = BUGS[bug]
    for old, new in replacements:
        count = source.count(old)
        if count != 1:
            return -1, (f"{script} has {count} times, not once: {old!r}. It has changed: write "
                        "this bug again in test_mutations.py")
        source = source.replace(old, new)
    shutil.copytree(ROOT / "tests", folder / "tests")
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    (folder / script).write_text(source)
    (folder / "run.py").write_text("import pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))\n")
    process = Fork([folder / "run.py", "-x", "-q", "-p", "no:cacheprovider", "-k", test,
                    "tests/test_pitfalls.py", "tests/test_speculative.py", "tests/test_model.py"],
                   {"PYTHONPATH": ""}, folder)
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {bug: pool.submit(run_with, bug, tmp_path_factory.mktemp("copy")) for bug in BUGS}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("bug", BUGS)
def test_the_suite_notices(bug, runs):
    status, output = runs[bug].result()
    assert status >= 0, output
    if bug == "none":
        assert status == 0, f"the copy without a bug has to pass:\n{output}"
    else:
        # 1: tests ran and one failed; others would mean that pytest itself could not run.
        assert status == 1, f"no test fails ({status}) with this bug: {bug}\n{output}"
