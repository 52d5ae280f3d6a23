"""The suite notices the field's bugs: it must fail when one is put back into speculative.py.

A bug is a replacement of source text that must match exactly once: when speculative.py changes, the
test says which bug has to be written anew. It stands beside the name of the test that has to notice
it, so that the list in test_pitfalls.py is held to its word. The copies lie in temporary folders
with the other scripts and the tests; pytest runs there, as many at a time as there are cores.

    pytest -m slow tests/test_mutations.py
"""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

# bug: (name of the test that has to notice, replacements (old, new) ...)
BUGS = {
    "none": ("",),
    "raw logits are returned as q": (
        "drafts_are_drawn", ("return q, sample(q, u)", "return logits.softmax(-1), sample(q, u)")),
    "drafts are drawn from a bf16 q and judged by a float32 q": (
        "drafts_are_drawn", ("return q, sample(q, u)", "return q, sample(q.bfloat16(), u)")),
    "the residual is softmaxed": (
        "verify_equals_the_oracle", (".clamp(min=0)\n", ".clamp(min=0).softmax(-1)\n")),
    "recovery draws from p": (
        "chi_square", ("(p_n - q[rows, n]).clamp(min=0)", "p_n")),
    "acceptance forgets q": (
        "exactly_the_targets_joint", ("u[:, :G] * q_d < p_d", "u[:, :G] < p_d")),
    "a residual of zero stays zero": (
        "residual_of_zero", ("keepdim=True) > 0, residual", "keepdim=True) >= 0, residual")),
    "uniforms are bf16": (
        "float64_uniforms", ("generator=g, dtype=torch.float64)", "generator=g).bfloat16()")),
    "the draft's random numbers also accept": (
        "no_uniform_is_used_twice", ("self.u[:, G:2 * G + 1]", "self.u[:, :G + 1]")),
    "recovery uses an acceptance's random number": (
        "exactly_the_targets_joint", ("sample(residual, u[:, G])", "sample(residual, u[:, 0])")),
    "every round reseeds": (
        "no_uniform_is_used_twice",
        ("for g in generators]", "for g in [g.manual_seed(seed) for g in generators]]")),
    "the draft's cache lacks the last draft after full acceptance": (
        "draft_equal_to_the_target",
        ("tokens, drafted, q = self.tail, [], []", "tokens, drafted, q = self.tail[:, 1:], [], []"),
        ("position.copy_(self.caches[0].position - 1)", "position.copy_(self.caches[0].position)"),
        ("zip((1, 2), self.models, self.caches)", "zip((1, 1), self.models, self.caches)")),
    "the cache has no room for the last drafts": (
        "fill_its_context", ("-(-(self.length + self.gamma + 1) // 64) * 64", "self.length")),
    "temperature 0 leaves probabilities soft": (
        "depend_on_the_seed", ("torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, "
                               "keepdim=True), 1.0)", "logits.softmax(-1)")),
    "EOS is looked for in the last token alone": (
        "eos_anywhere", ("if token == eos_id or", "if token == eos_id == bonus or")),
    "token id 0 is taken for no token": (
        "token_0", ("if token == eos_id or", "if token and token == eos_id or")),
    "a stop string is looked for once a round": (
        "stop_function", ("(stop and stop(new[b]))", "(stop and token == bonus and stop(new[b]))")),
    "the last round emits all that it accepted": (
        "exactly_max_new_tokens", ("(drafted[:n] + [bonus])[:left[b]]", "(drafted[:n] + [bonus])")),
    "all rows advance as the luckiest": (
        "without_a_cache", ("position += step - (G + 1)", "position += step.max() - (G + 1)")),
    "short prompts are read with their padding": (
        "rows_of_a_batch", ("copy_(lengths - back)", "copy_(lengths.max() - back)")),
    "the draft looks up a token that it lacks": (
        "another_vocabulary", ("tokens.clamp(max=self.draft.config.vocab_size - 1)", "tokens")),
    "auto gamma drops a token for what it is": (
        "a_changing_gamma",
        ("        overlap = torch.minimum(",     # no bonus of id 0: the accepted drafts will do
         "        if self.auto:\n"
         "            n -= ((tokens.gather(1, n[:, None])[:, 0] == 0) & (n > 0)).long()\n"
         "        overlap = torch.minimum(")),
    "the benchmark counts the prompt": (
        "benchmark_counts", ("2:], emitted)", "2:], emitted + len(prompts[b]))")),
}


def run_with(bug: str, folder: Path) -> tuple[int, str]:
    """Copy the project, put the bug in, run the test: (pytest's exit status, its output)."""
    source = (ROOT / "speculative.py").read_text()
    test, *replacements = BUGS[bug]
    for old, new in replacements:
        count = source.count(old)
        if count != 1:
            return -1, (f"speculative.py has {count} times, not once: {old!r}. It has changed: "
                        "write this bug anew in test_mutations.py")
        source = source.replace(old, new)
    shutil.copytree(ROOT / "tests", folder / "tests")
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    (folder / "speculative.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", test,
         "tests/test_pitfalls.py", "tests/test_speculative.py"],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    return done.returncode, done.stdout


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
