"""The exercises are fair: unwritten ones fail with a reason, right answers pass, and wrong answers
are caught by the property that they break.

A wrong answer is a replacement of the project's own text that must match exactly once in the
exercise's functions; when they change, the test says which answer has to be written anew. Beside
it stand words of the message that a student has to see.

    pytest tests/test_exercises.py
"""
import ast
import functools
import json
import re
import subprocess
import sys

import pytest
import torch

import exercises
from exercises import EXERCISES, ROOT, blank, blanked, functions, judge


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More are slower on such small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# exercise: (what is wrong with the answer, words of the message, old text, new text) ...
WRONG = {
    "RMSNorm": [
        ("a sum for the mean", "mean of the squares", ".mean(-1, keepdim", ".sum(-1, keepdim"),
        ("eps outside the root", "eps belongs inside the root",
         "torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)",
         "(1 / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps))"),
        ("no weight", "multiplied by the weight", "(wide * self.weight)", "wide"),
        ("LayerNorm", "not LayerNorm", "wide.square()",
         "(wide - wide.mean(-1, keepdim=True)).square()"),
        ("over all positions", "each position is normed by itself", ".mean(-1, keepdim=True)",
         ".mean()"),
        ("bfloat16 throughout", "widened to float32",
         "torch.promote_types(x.dtype, torch.float32)", "x.dtype"),
        ("float32 always", "a float64 x stays", "torch.promote_types(x.dtype, torch.float32)",
         "torch.float32"),
        ("in place", "changes its input", "wide = wide *", "wide *= 1 *")],
    "RoPE": [
        ("half the exponent", "look at the exponent", "(even / config.head_dim)",
         "(even / 2 / config.head_dim)"),
        ("theta is fixed", "theta from the config", "config.rope_theta", "10000.0"),
        ("the paper's pairs", "not neighbouring channels", "torch.cat((cos, cos), -1)",
         "cos.repeat_interleave(2, -1)"),
        ("no minus", "sign of the sines", "torch.cat((-sin, sin), -1)",
         "torch.cat((sin, sin), -1)"),
        ("always from position 0", "may begin anywhere", "positions[..., None] *",
         "torch.arange(positions.shape[1]).expand(positions.shape)[..., None] *"),
        ("bfloat16 angles", "computed in float32", "torch.promote_types(dtype, torch.float32)",
         "dtype"),
        ("float32 angles always", "computed in float64",
         "torch.promote_types(dtype, torch.float32)", "torch.float32"),
        ("neighbours are partners", "partner of channel i", "x.shape[-1] // 2, -1", "1, -1"),
        ("a sign too many", "signed already", "cos + x.roll", "cos - x.roll"),
        ("no axis for the heads", "has to have the shape (2, 3, 1, 8)", "cos[:, :, None]", "cos")],
    "causal attention": [
        ("no scale", "square root of D", " / math.sqrt(q.shape[-1])", ""),
        ("scaled by D", "square root of D", "math.sqrt(q.shape[-1])", "q.shape[-1]"),
        ("softmax over the queries", "last axis of the scores", ".softmax(-1)", ".softmax(-2)"),
        ("the mask behind the softmax", "before the softmax", "(scores + mask).softmax(-1)",
         "(scores.softmax(-1) * mask.exp())"),
        ("the mask is turned round", "-inf where it may not", "(scores + mask)",
         "scores.masked_fill(mask == 0, -math.inf)"),
        ("no mask", "no weight", "(scores + mask)", "scores"),
        ("rows are mixed up", "each row and each head", "return (scores",
         "return (scores.flip(0)")],
    "SwiGLU": [
        ("silu on the wrong side", "only the gate goes through silu",
         "F.silu(self.gate_proj(x)) * self.up_proj(x)",
         "self.gate_proj(x) * F.silu(self.up_proj(x))"),
        ("a sum", "the two are multiplied", ") * self.up_proj", ") + self.up_proj"),
        ("gelu", "look alike", "F.silu", "F.gelu"),
        ("a sigmoid", "stops negative ones", "F.silu(", "torch.sigmoid("),
        ("no down_proj", "has to have the shape", "self.down_proj(y)", "y")],
    "grouped heads": [
        ("tiled values", "query heads 0 and 1 share", "v.repeat_interleave(group, 1)",
         "v.repeat(1, group, 1, 1)"),
        ("tiled keys", "keys: query head h", "k.repeat_interleave(group, 1)",
         "k.repeat(1, group, 1, 1)"),
        ("groups of two", "it raised RuntimeError", "q.shape[1] // k.shape[1]", "2"),
        ("not grouped", "it raised RuntimeError",
         "k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)", "k, v")],
    "the attention layer": [
        ("values are turned", "never values", "q, k = rotate(q, cos, sin), rotate(k, cos, sin)",
         "q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), rotate(v, cos, sin)"),
        ("queries are not turned", "both, are turned", "q, k = rotate(q, cos, sin), rot",
         "q, k = q, rot"),
        ("heads are not put together", "bring the heads of a token together",
         "y.transpose(1, 2).flatten(2)", "y.reshape(B, T, -1)"),
        ("one large head", "scores of its own", "    q, k, v = (y.tr",
         "    q, k, v = (y.repeat_interleave(self.o_proj.in_features // self.D // y.shape[2], 2)\n"
         "                   .flatten(2)[:, :, None] for y in (q, k, v))\n"
         "        q, k, v = (y.tr"),
        ("not causal", "attention is causal", "is_causal=mask is None", "is_causal=False"),
        ("keys are stored unturned", "already turned", "= k, v ",
         "= rotate(k, cos, -sin), v "),
        ("nothing is stored", "new values are written",
         "past.keys[past.where], past.values[past.where] = k, v", "pass"),
        ("a past without its mask", "under past.mask", "past.mask if past else None",
         "torch.zeros_like(past.mask) if past else None"),
        ("only the new tokens", "it raised", "k, v = past.keys, past.values", "pass")],
    "the cache and its rollback": [
        ("rollback forgets one more", "rollback((1, 3))", "self.position -= n",
         "self.position -= n + 1"),
        ("rollback moves all rows alike", "rollback((1, 3))", "self.position -= n",
         "self.position -= torch.as_tensor(n).max()"),
        ("rollback does nothing", "rollback((1, 3))", "self.position -= n", "pass"),
        ("a token does not see itself", "hides a place that a token may see",
         "self.places <= places[..., None]", "self.places < places[..., None]"),
        ("stale keys are seen", "stale keys lie", "self.places <= places[..., None]",
         "self.places <= places[..., None] + 1"),
        ("places begin after the position", "new tokens' own places",
         "torch.arange(T, device=self.position.device)",
         "torch.arange(1, T + 1, device=self.position.device)"),
        ("lookup moves the cache", "lookup moves nothing", "self.position[:, None] + ",
         "self.position.add_(T)[:, None] - T + "),
        ("-1 is a place", "position -1", ".clamp(min=0)", "")],
    "one merge of BPE": [
        ("the second token stays", "become one", "i += 2", "i += 1"),
        ("from right to left", "from left to right", "    merged, i = [], 0\n",
         "    merged = list(word)\n"
         "    for i in range(len(word) - 2, -1, -1):\n"
         "        if (*merged[i:i + 2],) == pair:\n"
         "            merged[i:i + 2] = [new]\n"
         "    return merged\n"),
        ("the last pair is missed", "at the word's end", "if tuple(word",
         "if i + 2 < len(word) and tuple(word"),
        ("the last token is lost", "stays as it is", "i < len(word)", "i < len(word) - 1"),
        ("either order", "the pair's order", "tuple(word[i:i + 2]) == pair",
         "(*sorted(word[i:i + 2]),) == pair"),
        ("only the first", "every occurrence", "i += 2", "return merged + word[i + 2:]")],
    "the learning rate's schedule": [
        ("a step too early", "the first step", "config.lr * step / config.warmup",
         "config.lr * (step + 1) / config.warmup"),
        ("t from step 0", "t is counted from the end", "(step - config.warmup)", "(step)"),
        ("a line", "not along a line", "(1 + math.cos(math.pi * t)) / 2", "(1 - t)"),
        ("down to 0", "at the last step", "return config.min_lr + (config.lr - config.min_lr) *",
         "return config.lr *"),
        ("no warmup", "the first step", "step < config.warmup", "step < 0")],
    "clipping": [
        ("short ones grow", "the factor is at most 1", ".clamp(max=1)", ""),
        ("each element by itself", "one factor for all elements", "gradient *= ",
         "gradient.clamp_(-limit, limit).mul_(1) if True else "),
        ("a copy is clipped", "in place", "gradient *= ", "gradient = gradient * "),
        ("the norm is squared", "root of the sum of the squares", "gradient.norm()",
         "gradient.square().sum()"),
        ("the norm of what is left", "from before the clipping", "return norm",
         "return gradient.norm()")],
    "AdamW": [
        ("no correction", "bias correction", "m / (1 - beta1**step)", "m"),
        ("the decay in the gradient", "no part of the gradient", "    m = beta1 * m",
         "    grad = grad + weight_decay * param\n    m = beta1 * m"),
        ("eps in the root", "outside the root", "np.sqrt(v_hat) + eps", "np.sqrt(v_hat + eps)"),
        ("the decay without lr", "lr * weight_decay * param",
         "return param - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param)",
         "return param - lr * m_hat / (np.sqrt(v_hat) + eps) - weight_decay * param"),
        ("the betas are swapped", "running mean of the gradient", "beta1 * m + (1 - beta1)",
         "(1 - beta1) * m + beta1"),
        ("the first step's correction always", "to the power of t", "beta2**step", "beta2")],
    "warp": [
        ("no temperature", "divided by the temperature", " / max(temperature, 1e-6)", ""),
        ("one too few", "top-k keeps the k greatest", "topk(top_k)", "topk(max(top_k - 1, 1))"),
        ("the crossing token is cut", "the one that crosses", "best.cumsum(-1) - best",
         "best.cumsum(-1)"),
        ("not divided by the sum", "divided by its sum", "best / best.sum(-1, keepdim=True)",
         "best"),
        ("the k-th is cut", "top-k keeps the k greatest", "logits < kth", "logits <= kth"),
        ("ties are cut", "equal to the k-th", "logits < kth",
         "torch.ones_like(logits).scatter_(-1, logits.topk(top_k).indices, 0).bool()"),
        ("ties at random", "the lower id goes first", "best, order = p.sort(dim=-1, "
         "descending=True, stable=True)", "best, order = "
         "(x.flip(-1) for x in p.sort(dim=-1, stable=True))"),
        ("soft at 0", "temperature 0", "torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, "
         "keepdim=True), 1.0)", "logits.softmax(-1)")],
    "the residual": [
        ("p itself", "is not p", "excess = (p - q).clamp(min=0)", "excess = p"),
        ("the difference's size", "gets nothing", "(p - q).clamp(min=0)", "(p - q).abs()"),
        ("a softmax", "gets nothing", ".clamp(min=0)", ".clamp(min=0).softmax(-1)"),
        ("a ratio", "token by token", "(p - q).clamp(min=0)", "(p / q - 1).clamp(min=0)"),
        ("zero stays zero", "see the docstring", "> 0, excess, p)", ">= 0, excess, p)"),
        ("nothing is cut off", "is not p", ".clamp(min=0)", "")],
    "verify": [
        ("q is forgotten", "as well as the draft", "u[:, :G] * q_guess < p_guess",
         "u[:, :G] < p_guess"),
        ("p above q", "probability p/q", "u[:, :G] * q_guess < p_guess", "q_guess <= p_guess"),
        ("impossible tokens pass", "not even with u = 0", "q_guess < p_guess",
         "q_guess <= p_guess"),
        ("all accepted ones count", "ends the round", "accepted.cumprod(-1).sum(-1)",
         "accepted.sum(-1)"),
        ("p for the residual", "not from p", "residual(p[rows, n], q[rows, n])", "p[rows, n]"),
        ("a random number serves twice", "judged no guess", "q[rows, n]), u[:, G])",
         "q[rows, n]), u[:, 0])"),
        ("the place after n", "after full acceptance", "p[rows, n], q[rows, n]",
         "p[rows, (n - 1).clamp(min=0)], q[rows, n]"),
        ("all rows as the first", "for each row by itself", "accepted.cumprod(-1).sum(-1)",
         "accepted.cumprod(-1).sum(-1)[:1].expand(B)")],
    "AMD's draft-length schedule": [
        ("1 more", "2 longer", "gamma + 2", "gamma + 1"),
        ("down to 0", "one token at least", "max(gamma - 1, 1)", "gamma - 1"),
        ("what was accepted", "1 shorter", "max(gamma - 1, 1)", "max(accepted, 1)"),
        ("no maximum", "MAX_GAMMA", "min(gamma + 2, MAX_GAMMA)", "gamma + 2")],
    "bits per byte": [
        ("nats", "not a bit", " * math.log(2)", ""),
        ("the wrong way round", "not a bit", "/ (size * math.log(2))", "/ size * math.log(2)"),
        ("a perplexity", "no exponential", "return nats / (size * math.log(2))",
         "return math.exp(nats / size)"),
        ("the bytes are forgotten", "half the bits", "size * math.log(2)", "math.log(2)")],
    "pass@k": [
        ("drawn again", "none of them twice", "1.0 - math.prod(1.0 - k / i for i in "
         "range(n - c + 1, n + 1))", "1.0 - (1.0 - c / n) ** k"),
        ("the chance to fail", "the chance is 0", "1.0 - math.prod(", "math.prod("),
        ("a factor too few", "pass@1", "range(n - c + 1, n + 1)", "range(n - c + 1, n)"),
        ("no case for few wrong ones", "fewer than k programs are wrong",
         "1.0 if n - c < k else ", "0.5 if n - c < k else ")],
    "one round": [
        ("the draft reads one token", "yet to read the last two", "= last_two, [], []",
         "= last_two[:, 1:], [], []"),
        ("the draft's cache stays", "advances by what it has read",
         "cache.advance(tokens.shape[1])", "cache.advance(0)"),
        ("no sampling settings", "the sampling that was passed", "[:, :vocab_size], *sampling)",
         "[:, :vocab_size], 1.0)"),
        ("one number for all guesses", "column i of u", "sample(q_i, u_i)", "sample(q_i, u[:, 0])"),
        ("unknown tokens", "it raised IndexError", "tokens.clamp(max=draft.config.vocab_size - 1)",
         "tokens"),
        ("the target does not read the text's last token", "over the last token of the text",
         "torch.cat((last_two[:, 1:], drafts.tokens), 1)", "drafts.tokens"),
        ("the target reads both last tokens", "the last token of the text and all guesses",
         "last_two[:, 1:], drafts.tokens), 1), cache)",
         "last_two, drafts.tokens), 1), cache)[:, 1:]"),
        ("the target goes on with the draft's last guess alone", "the sampling that was passed",
         "p = warp(logits, *sampling)", "p = warp(logits)"),
        ("the target's cache is off by one", "the last one: as many more",
         "target_cache.advance(gained)", "target_cache.advance(gained - 1)"),
        ("the draft's cache forgets one too few", "all but the last two",
         "verdict.tokens.shape[1] - gained", "verdict.tokens.shape[1] - gained - 1"),
        ("ended rows go on", "a row that has ended", "(verdict.n + 1) * active", "(verdict.n + 1)"),
        ("last_two is a new tensor", "in place", "last_two.copy_(", "last_two = (")],
}


# Right answers that look different: exercise -> bodies of its functions. A check asks for
# properties, not for this project's way.
RIGHT = {
    "RMSNorm": [                # as transformers has it: rounded before the weight
        "y = x.to(torch.promote_types(x.dtype, torch.float32))\n"
        "return self.weight * (y / (y.pow(2).mean(-1, True) + self.eps).sqrt()).to(x.dtype)"],
    "RoPE": [
        "i = torch.arange(config.head_dim // 2)\n"
        "speed = torch.exp(-math.log(config.rope_theta) * 2 * i.double() / config.head_dim)\n"
        "a = (positions.double()[:, :, None] * speed)[:, :, None]\n"
        "one = torch.ones(len(i))\n"
        "sin = torch.cat((a, a), -1).sin() * torch.cat((-one, one))\n"
        "return torch.cat((a, a), -1).cos().to(dtype), sin.to(dtype)",
        "a, b = x.chunk(2, -1)\n"
        "return x * cos + torch.cat((b, a), -1) * sin"],
    "causal attention": [       # without groups, which exercise 5 asks for
        "scores = torch.einsum('bhtd,bhsd->bhts', q, k) * q.shape[-1] ** -0.5 + mask\n"
        "weights = (scores - scores.amax(-1, True)).exp()\n"
        "return torch.einsum('bhts,bhsd->bhtd', weights, v) / weights.sum(-1, True)"],
    "SwiGLU": [
        "z = self.gate_proj(x)\n"
        "return self.down_proj(self.up_proj(x) * z * torch.sigmoid(z))"],
    "grouped heads": [
        "B, H, T, D = q.shape\n"
        "q = q.reshape(B, k.shape[1], -1, T, D)\n"
        "scores = q @ k[:, :, None].mT / D ** 0.5 + mask[:, None]\n"
        "return (scores.softmax(-1) @ v[:, :, None]).reshape(B, H, T, D)"],
    "the attention layer": [
        "B, T, C = x.shape\n"
        "q, k, v = (proj(x).unflatten(-1, (-1, self.D))\n"
        "           for proj in (self.q_proj, self.k_proj, self.v_proj))\n"
        "q, k = rotate(q, cos, sin), rotate(k, cos, sin)\n"
        "mask = torch.full((T, T), float('-inf')).triu(1).to(x)[None, None]\n"
        "if past:\n"
        "    past.keys.index_put_(past.where, k)\n"
        "    past.values.index_put_(past.where, v)\n"
        "    k, v, mask = past.keys, past.values, past.mask\n"
        "y = attention_formula(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)\n"
        "return self.o_proj(y.transpose(1, 2).reshape(B, T, C))"],
    "the cache and its rollback": [
        "self.position = self.position + n",
        "self.position = self.position - n",
        "places = torch.stack([self.position + t for t in range(T)], 1).clamp(min=0)\n"
        "rows = torch.arange(len(places))[:, None]\n"
        "mask = torch.zeros(len(places), 1, T, len(self.places)).double()\n"
        "for b in range(len(places)):\n"
        "    for t in range(T):\n"
        "        mask[b, 0, t, places[b, t] + 1:] = float('-inf')\n"
        "pasts = [Past(self.keys[i], self.values[i], (rows, places), mask)\n"
        "         for i in range(len(self.keys))]\n"
        "return self.cos[places], self.sin[places], pasts"],
    "one merge of BPE": [
        "out = []\n"
        "for token in word:\n"
        "    if out and (out[-1], token) == pair:\n"
        "        out[-1] = new\n"
        "    else:\n"
        "        out.append(token)\n"
        "return out"],
    "the learning rate's schedule": [
        "if step < config.warmup:\n"
        "    return step / config.warmup * config.lr\n"
        "t = (step - config.warmup) / (config.steps - config.warmup)\n"
        "return config.min_lr + (config.lr - config.min_lr) * math.cos(math.pi * t / 2) ** 2"],
    "clipping": [
        "norm = gradient.square().sum().sqrt()\n"
        "if norm > limit:\n"
        "    gradient.mul_(limit / norm)\n"
        "return norm"],
    "AdamW": [
        "param = param * (1 - lr * weight_decay)\n"
        "m, v = m + (1 - beta1) * (grad - m), v + (1 - beta2) * (grad**2 - v)\n"
        "root = np.sqrt(v) / np.sqrt(1 - beta2**step) + eps\n"
        "return param - lr / (1 - beta1**step) * m / root, m, v"],
    "warp": [
        "x = logits.float() if logits.dtype == torch.bfloat16 else logits.clone()\n"
        "if temperature == 0:\n"
        "    return F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)\n"
        "x /= temperature\n"
        "if top_k:\n"
        "    x[x < x.sort(-1).values[..., [max(-top_k, -x.shape[-1])]]] = float('-inf')\n"
        "p = x.softmax(-1)\n"
        "order = p.argsort(dim=-1, descending=True, stable=True)\n"
        "best = p.gather(-1, order)\n"
        "best[best.cumsum(-1) - best >= top_p] = 0\n"
        "return torch.zeros_like(p).scatter(-1, order, best / best.sum(-1, keepdim=True))"],
    "the residual": [           # made to sum to 1, which is not asked for
        "left = torch.maximum(p - q, torch.zeros_like(p))\n"
        "return torch.stack([row / row.sum() if row.sum() > 0 else full\n"
        "                    for row, full in zip(left, p)])"],
    "verify": [
        "B, G = drafted.shape\n"
        "q = F.pad(q, (0, p.shape[-1] - q.shape[-1]))\n"
        "tokens, accepted = torch.zeros(B, G + 1, dtype=torch.int64), []\n"
        "for b in range(B):\n"
        "    n = 0\n"
        "    while n < G and u[b, n] * q[b, n, drafted[b, n]] < p[b, n, drafted[b, n]]:\n"
        "        tokens[b, n] = drafted[b, n]\n"
        "        n += 1\n"
        "    last = residual(p[b, n], q[b, n]) if n < G else p[b, G]\n"
        "    tokens[b, n] = sample(last[None], u[b, G:])[0]\n"
        "    accepted.append(n)\n"
        "return Verdict(tokens, torch.tensor(accepted))"],
    "AMD's draft-length schedule": [
        "if accepted == gamma:\n"
        "    return min(MAX_GAMMA, gamma + 2)\n"
        "return gamma - 1 or 1"],
    "bits per byte": ["return nats / size * math.log2(math.e)"],
    "pass@k": ["return 1 - math.comb(n - c, k) / math.comb(n, k)"],
    "one round": [
        "guesses = []\n"
        "def read(tokens):\n"
        "    logits = draft(tokens.clamp(max=draft.config.vocab_size - 1), cache)\n"
        "    cache.advance(tokens.shape[1])\n"
        "    return warp(logits[:, -1, :vocab_size], *sampling)\n"
        "q = [read(last_two)]\n"
        "for i in range(u.shape[1]):\n"
        "    guesses.append(sample(q[i], u[:, i]))\n"
        "    if i + 1 < u.shape[1]:\n"
        "        q.append(read(guesses[i][:, None]))\n"
        "return Drafts(torch.stack(guesses, 1), torch.stack(q, 1))",
        "p = [warp(x, *sampling) for x in\n"
        "     target(torch.cat((last_two[:, -1:], drafts.tokens), -1), cache).unbind(1)]\n"
        "return verify(torch.stack(p, 1), drafts.q, drafts.tokens, u)",
        "G = verdict.tokens.shape[1] - 1\n"
        "for b, n in enumerate(verdict.n.tolist()):\n"
        "    more = n + 1 if active[b] else 0\n"
        "    target_cache.position[b] += more\n"
        "    if draft_cache is not None:\n"
        "        draft_cache.position[b] += more - G - 1\n"
        "    text = last_two[b].tolist() + verdict.tokens[b, :more].tolist()\n"
        "    last_two[b] = torch.tensor(text[-2:])"],
}


@functools.cache
def project(file: str) -> tuple[str, dict]:
    """A file of the project and its functions."""
    source = (ROOT / file).read_text()
    return source, functions(ast.parse(source))


def wrong_source(exercise, old: str, new: str) -> str:
    """The file with a wrong answer in it: `old` must stand once in the exercise's functions."""
    source, found = project(exercise.file)
    lines = source.split("\n")
    spans = [(found[name].lineno - 1, found[name].end_lineno) for name in exercise.functions]
    count = sum("\n".join(lines[start:end]).count(old) for start, end in spans)
    assert count == 1, (f"{exercise.functions} of {exercise.file} have {count} times, not once: "
                        f"{old!r}. They have changed: write this wrong answer anew")
    for start, end in spans:
        body = "\n".join(lines[start:end]).replace(old, new).split("\n")
        if body != lines[start:end]:
            return "\n".join(lines[:start] + body + lines[end:])
    raise AssertionError(f"{new!r} changes nothing")


def answered(source: str, name: str, body: str) -> str:
    """A blanked file with a body in the place of what was put there."""
    last, lines = functions(ast.parse(source))[name].body[-1], source.split("\n")
    indent = " " * last.col_offset
    lines[last.lineno - 1:last.end_lineno] = [indent + line for line in body.split("\n")]
    return "\n".join(lines)


def verdict(exercise, source: str) -> str:
    return judge(exercise, ROOT / exercise.file, source)


CASES = [(exercise, *case) for exercise in EXERCISES for case in WRONG[exercise.title]]


def test_every_exercise_has_three_wrong_answers():
    assert set(WRONG) == {exercise.title for exercise in EXERCISES}
    assert all(len(cases) >= 3 for cases in WRONG.values())
    assert sum(exercise.points for exercise in EXERCISES) == 100, "points are per cent"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_the_projects_own_answer_is_right(exercise):
    reason = verdict(exercise, (ROOT / exercise.file).read_text())
    assert not reason, f"the project's own code fails exercise {exercise.number}: {reason}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_another_right_answer_is_right_as_well(exercise):
    source = blanked(exercise.file, EXERCISES)
    for name, body in zip(exercise.functions, RIGHT[exercise.title], strict=True):
        source = answered(source, name, body)
    reason = verdict(exercise, source)
    assert not reason, f"a right answer fails exercise {exercise.number}: {reason}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_an_exercise_stands_alone(exercise):
    """Blank, it fails for that; solved, it passes with all the others blank."""
    assert verdict(exercise, blanked(exercise.file, [exercise])) == "not written yet"
    rest = [other for other in EXERCISES if not set(other.functions) & set(exercise.functions)]
    reason = verdict(exercise, blanked(exercise.file, rest))
    assert not reason, f"{exercise.title} is solved, all others are blank, and it fails: {reason}"


@pytest.mark.parametrize("exercise, what, words, old, new", CASES, ids=[
    f"{case[0].title}: {case[1]}" for case in CASES])
def test_a_wrong_answer_is_told_what_it_breaks(exercise, what, words, old, new):
    reason = verdict(exercise, wrong_source(exercise, old, new))
    assert reason, f"exercise {exercise.number} passes with {what}"
    assert words in reason, f"{what}: the student should read {words!r}, and reads: {reason}"
    assert "\n" not in reason, "a reason is one sentence"


# --------------------------------------------------------------------------------- the command line

def run(*arguments: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "tests/exercises.py", *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, **settings)


def answer(folder, name: str, body: str, file: str = "model.py") -> None:
    """Write a body into a student's copy."""
    (folder / file).write_text(answered((folder / file).read_text(), name, body))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "copy"
    exercises.make(folder)
    return folder


def test_a_students_copy_has_equations_but_no_answers(copy):
    for exercise in EXERCISES:
        ours = functions(ast.parse((ROOT / exercise.file).read_text()))
        theirs = functions(ast.parse((copy / exercise.file).read_text()))
        for name in exercise.functions:
            assert ast.get_docstring(theirs[name]) == ast.get_docstring(ours[name])
            assert ast.dump(theirs[name].args) == ast.dump(ours[name].args)
            text = ast.unparse(theirs[name].body[-1])
            assert text.startswith("raise NotImplementedError(") and exercise.title in text
            assert len(theirs[name].body) <= 2, "a docstring and the raise, nothing else"
        assert set(theirs) == set(ours), "the other functions stay"
    names = {path.name for path in copy.rglob("*")}
    assert not names & set(exercises.LEFT_OUT), "the answers must not be in the copy"
    assert {"README.md", "pyproject.toml", "exercises.md", "train.py", "conftest.py"} <= names


AROUND = '''
class A:
    def f(self, x):
        # why
        y = x
        return y


def g(
    a,
):
    """Doc.

    more
    """
    # hint
    return 1   # end

# after
X = 1
'''


def test_the_code_around_a_blank_is_left_as_it_is():
    expected = AROUND
    for old, new in (("        # why\n        y = x\n        return y\n",
                      '        raise NotImplementedError("exercise 1: f")\n'),
                     ("    # hint\n    return 1   # end\n",
                      '    raise NotImplementedError("exercise 2: g")\n')):
        assert old in expected
        expected = expected.replace(old, new)
    assert blank(AROUND, "a.py", {"A.f": "exercise 1: f", "g": "exercise 2: g"}) == expected
    with pytest.raises(exercises.Missing, match="a.py has no function h"):
        blank(AROUND, "a.py", {"h": "exercise 3: h"})


@pytest.mark.slow
def test_check_survives_whatever_a_students_code_does(tmp_path):
    """In one copy: an endless loop, printing, an early end of Python, sys.exit(), an exception, a
    helper function, something that is no tensor."""
    folder = tmp_path / "copy"
    exercises.make(folder)
    answer(folder, "RMSNorm.forward", "while True:\n    print('round and round')")
    answer(folder, "rotate", "import sys\nsys.exit(0)")
    answer(folder, "rope", "return positions")
    answer(folder, "attention_formula", "import os\nos._exit(0)")
    answer(folder, "SwiGLU.forward", "print('here', x.shape)\nreturn my_helper(x @ 3)")
    answer(folder, "Attention.forward", "raise ValueError('two\\nlines')")
    answer(folder, "merge_pair", "return None", "data.py")
    answer(folder, "pass_at_k", "return chance_of(n, c, k)", "evaluate.py")
    with (folder / "evaluate.py").open("a") as file:
        file.write("\n\ndef chance_of(n, c, k):\n"
                   "    return 1 - math.comb(n - c, k) / math.comb(n, k)\n")
    with (folder / "train.py").open("a") as file:
        file.write("\nreturn\n")
    done = run("check", folder, "--json", "--seconds", 3)
    assert done.returncode == 1 and not done.stderr, done.stderr
    results = json.loads(done.stdout)
    reasons = {r["title"]: r["reason"] for r in results["exercises"]}
    for title, words in {
            "RMSNorm": "it took more than 3 seconds", "RoPE": "return 2 things",
            "causal attention": "it ended Python",
            "the attention layer": "ValueError: two lines in",
            "SwiGLU": "in line ", "one merge of BPE": "return a list and returned NoneType",
            "clipping": "train.py is not Python: line ", "pass@k": "", "warp": "not written yet",
            }.items():
        assert words in reasons[title] and bool(words) == bool(reasons[title]), reasons[title]
        assert "\n" not in reasons[title]
    assert results["earned"] == 4 and results["points"] == 100
    printed = {r["title"]: r["printed"] for r in results["exercises"]}["SwiGLU"]
    assert printed == "here torch.Size([2, 3, 6])\n"
    assert set(results["exercises"][0]) == {
        "exercise", "title", "points", "earned", "solved", "reason", "place", "functions", "read",
        "printed"}


def test_all_solved_is_exit_status_0(monkeypatch, capsys):
    monkeypatch.setattr(exercises, "verdicts", lambda folder, numbers, seconds: (
        (number, "", "") for number in numbers))
    assert exercises.main(["check", str(ROOT)]) == 0
    assert capsys.readouterr().out.endswith("100 of 100 points\n")


@pytest.mark.slow
def test_the_page_shows_what_the_commands_print(copy, tmp_path):
    """docs/exercises.md: its commands' output and its table are the real ones."""
    page = (ROOT / "docs/exercises.md").read_text()
    for exercise in EXERCISES:
        row = (f"| {exercise.number} | {exercise.title} | {exercise.points} | `{exercise.file}` | "
               + ", ".join(f"`{name}`" for name in exercise.functions) + " |")
        assert row in page, f"docs/exercises.md lacks this row of its table: {row}"
    folder = tmp_path / "mine"
    shown = re.findall(r"```\n\$ (.*)\n((?:.*\n)*?)```", page)
    assert [command.split()[2] for command, _ in shown] == ["make", "check", "check"]
    for command, output in shown:
        done = run(*command.replace("mine", str(folder)).split()[2:])
        assert not done.stderr, done.stderr
        line = r"model.py:\d+"               # moves whenever model.py does
        assert re.sub(line, "", done.stdout.replace(str(folder), "mine")) == re.sub(
            line, "", output), (
            f"docs/exercises.md shows something else for {command}:\n{done.stdout}")
        if "make" in command:               # the page then lets the student write this
            body, = re.findall(r"```python\n((?:.*\n)*?)```", page)
            answer(folder, "RMSNorm.forward", body.rstrip("\n"))


@pytest.mark.parametrize("arguments, words", [
    (["make", "{copy}"], "exists and is not an empty folder"),
    (["make", "{copy}/model.py"], "exists and is not an empty folder"),
    (["make", "{copy}/model.py/x"], "Not a directory"),
    (["check", "{copy}/tests"], "has no model.py: expected a student's copy"),
    (["check", "{copy}", "0"], "there is no exercise 0: they are 1 to"),
    (["check", "{copy}", "1", "99"], "there is no exercise 99"),
    (["check", "{copy}", "one"], "invalid int value"),
])
def test_a_mistake_is_answered_with_a_sentence(arguments, words, copy, capsys):
    try:
        status = exercises.main([text.format(copy=copy) for text in arguments])
    except SystemExit as stop:          # argparse's
        status = stop.code
    lines = capsys.readouterr().err.strip().split("\n")
    assert status == 2 and words in lines[-1], lines
