"""What the PyTorch code has to compute: NumPy alone, float64, one function an equation.

Read it beside the papers. Nothing here is fast: where an equation has an index there is a loop, and
nothing of the project is imported, so an error there cannot hide here. The tests hold the scripts
against it; `test_oracle.py` holds it against itself and against PyTorch. In order: the Llama
forward pass, sampling, speculative decoding (the rule, the whole routine without a cache, and the
proof by enumeration that it keeps the target's distribution), and what training needs.

Letters: T tokens, C width, H heads, K key/value heads, D head size, F hidden width of the SwiGLU,
V vocabulary, G draft length (gamma). p is the target's distribution, q the draft's.
Linear weights are stored (out, in), as in PyTorch and in Hugging Face checkpoints.

    pytest tests/test_oracle.py
"""

import itertools
from collections import defaultdict

import numpy as np

Array = np.ndarray


# ---- The model: Llama 2 (Touvron et al. 2023) --------------------------------------------------

def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Zhang & Sennrich 2019, eq. 4: x / RMS(x) * weight on the last axis, eps inside the root."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Su et al. 2021, eq. 34: turn pair i of the head at position t by the angle t * theta^(-2i/D).

    x is (T, H, D), positions (T,). The paper pairs neighbours (2i, 2i + 1); Hugging Face's Llama
    pairs component i with i + D/2 (the half rotation), and so do its checkpoints.
    """
    half = x.shape[-1] // 2
    turned = np.empty_like(x)  # (T, H, D)
    for t, position in enumerate(positions):
        for i in range(half):
            angle = float(position) * float(theta) ** (-i / half)
            a, b = x[t, :, i], x[t, :, i + half]  # (H,)
            turned[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
            turned[t, :, i + half] = a * np.sin(angle) + b * np.cos(angle)
    return turned


def softmax(x: Array) -> Array:
    """exp(x) / sum exp(x) on the last axis; taking the maximum off keeps exp from overflowing."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Vaswani et al. 2017, eq. 1, causal, with grouped heads (Ainslie et al. 2023, section 2.2).

    q is (T, H, D); k, v are (T, K, D). Query heads 0 .. H/K - 1 share key/value head 0, and so on.
    """
    T, H, D = q.shape
    group = H // k.shape[1]
    out = np.empty_like(q)  # (T, H, D)
    for h in range(H):
        for t in range(T):
            keys, values = k[: t + 1, h // group], v[: t + 1, h // group]  # (t + 1, D): no future
            out[t, h] = softmax(keys @ q[t, h] / np.sqrt(D)) @ values
    return out


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """Shazeer 2020, eq. 6: (swish(x gate) * x up) down, where swish(z) = z * sigmoid(z)."""
    z = x @ gate.T  # (T, F)
    sigmoid = 0.5 * (1 + np.tanh(z / 2))  # equal to 1 / (1 + exp(-z)), without its overflow
    return (z * sigmoid * (x @ up.T)) @ down.T  # (T, C)


def decoder_layer(x: Array, w: dict, config) -> Array:
    """One layer on x (T, C): x + attention(norm(x)), then x + swiglu(norm(x)); w by local names."""
    T, C = x.shape
    D = C // config.num_attention_heads
    positions, theta = np.arange(T), config.rope_theta
    y = rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
    q = (y @ w["self_attn.q_proj.weight"].T).reshape(T, -1, D)  # (T, H, D)
    k = (y @ w["self_attn.k_proj.weight"].T).reshape(T, -1, D)  # (T, K, D)
    v = (y @ w["self_attn.v_proj.weight"].T).reshape(T, -1, D)  # (T, K, D)
    heads = attention(rope(q, positions, theta), rope(k, positions, theta), v)  # (T, H, D)
    x = x + heads.reshape(T, C) @ w["self_attn.o_proj.weight"].T
    y = rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
    return x + swiglu(y, *(w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))


def forward(weights: dict, config, tokens) -> Array:
    """Logits (T, V) of tokens (T,): row t scores the token that follows tokens[: t + 1].

    weights maps Hugging Face's names to arrays; config has config.json's fields as attributes. With
    tie_word_embeddings the output head is the embedding (Press & Wolf 2017): no lm_head.weight.
    """
    weights = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    x = weights["model.embed_tokens.weight"][np.asarray(tokens)]  # (T, C)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = [name for name in weights if name.startswith(prefix)]
        x = decoder_layer(x, {name.removeprefix(prefix): weights[name] for name in layer}, config)
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x @ weights[head].T  # (T, V)


def loss(logits: Array, targets) -> float:
    """Mean cross-entropy in nats: -log softmax(logits)[target] of logits (T, V), targets (T,)."""
    p = softmax(logits)
    return float(np.mean([-np.log(p[t, target]) for t, target in enumerate(targets)]))


# ---- Sampling ----------------------------------------------------------------------------------

def warp(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """The distribution (V,) that is sampled from: temperature, then top-k, then top-p.

    Order and meaning are those of Hugging Face transformers; off are top_k = 0 and top_p = 1.
    Temperature 0 is the limit: all mass on the first token of the greatest logit.
    Top-k (Fan et al. 2018) keeps what is not below the k-th greatest logit, so all ties with it.
    Top-p (Holtzman et al. 2020, eq. 2) keeps the fewest most likely tokens whose mass *after top-k*
    reaches top_p, one at least; between equally likely tokens the lower id goes first.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]  # argmax returns the first
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits[logits < np.sort(logits)[-top_k]] = -np.inf
    p = softmax(logits)
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        for kept in range(1, len(p) + 1):
            if p[order[:kept]].sum() >= top_p:
                break
        p[order[kept:]] = 0
        p = p / p.sum()  # eq. 3
    return p


def sample(p: Array, u: float) -> int:
    """Inverse CDF: the first token whose running sum exceeds u * sum(p), for 0 <= u < 1.

    Because it must exceed, a token of probability 0 is never drawn, not even at u = 0.
    """
    running = np.cumsum(p)
    for token in range(len(p)):
        if running[token] > u * running[-1]:
            return token
    raise AssertionError("p has no mass, or u is not in [0, 1)")


# ---- Speculative decoding: Leviathan et al. 2023, Algorithm 1 ----------------------------------

def accept_probability(p: float, q: float) -> float:
    """Section 2.3, for one draft: how often it is kept, by its probabilities p and q."""
    return min(1.0, p / q)


def residual(p: Array, q: Array) -> Array:
    """norm(max(0, p - q)) replaces a rejected draft; p where only rounding rejects (p - q <= 0)."""
    left = np.maximum(p - q, 0)
    return left / left.sum() if left.sum() > 0 else p


def verify(p: Array, q: Array, drafted, u_accept, u_bonus: float) -> tuple[list[int], int]:
    """Algorithm 1 for p (G + 1, V), q (G, V), drafted (G,), u_accept (G,): (tokens, n accepted).

    tokens are the n accepted drafts and one more, so a round always emits n + 1.
    """
    G = len(drafted)
    n = 0
    while n < G and u_accept[n] * q[n, drafted[n]] < p[n, drafted[n]]:  # u < p/q without dividing
        n += 1
    bonus = sample(residual(p[n], q[n]) if n < G else p[G], u_bonus)
    return [int(token) for token in drafted[:n]] + [bonus], n


def speculative_decoding(target, draft, prompt, new_tokens: int, G: int, uniforms,
                         temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> list[int]:
    """The whole routine, for one row: `new_tokens` tokens that continue the prompt.

    target and draft map tokens (T,) to logits (T, V); nothing is remembered between two calls.
    uniforms(n) returns the next n random numbers: a round takes G to draw guesses with, G to accept
    them with and one for the token of the target's own.
    """
    text = list(prompt)
    while len(text) < len(prompt) + new_tokens:
        u = uniforms(2 * G + 1)
        drafted, q = [], []
        for i in range(G):  # the draft continues its own guesses
            logits = draft(text + drafted)[-1]
            q.append(warp(logits, temperature, top_k, top_p))
            drafted.append(sample(q[i], u[i]))
        # Row t scores the token after tokens[: t + 1]: G + 1 rows, from the text's last on.
        judged = target(text + drafted)[len(text) - 1:]
        p = [warp(logits, temperature, top_k, top_p) for logits in judged]
        tokens, n = verify(np.array(p), np.array(q), drafted, u[G : 2 * G], u[2 * G])
        text += tokens
    return text[len(prompt):][:new_tokens]


def expected_tokens(alpha: float, G: int) -> float:
    """Eq. 1: tokens a round, if each draft is accepted with probability alpha by itself."""
    return G + 1.0 if alpha == 1 else (1 - alpha ** (G + 1)) / (1 - alpha)


# The proof by enumeration (the paper's appendix A.1 proves one token). The models are Markov
# chains: row t of P (V, V) is the target's distribution after token t, row t of Q the draft's.

def exact_round(P: Array, Q: Array, start: int, G: int) -> dict[tuple, float]:
    """What one round after `start` emits, with its probability: all paths, all outcomes."""
    V = len(P)
    emitted = defaultdict(float)
    for drafted in itertools.product(range(V), repeat=G):
        context = (start, *drafted)  # context[i] is the token before draft i
        drawn = np.prod([Q[context[i], drafted[i]] for i in range(G)])  # how often it is proposed
        if drawn == 0:
            continue
        kept = 1.0  # probability that drafts 0 .. n-1 are all accepted
        for n in range(G + 1):
            last = context[n]
            a = accept_probability(P[last, drafted[n]], Q[last, drafted[n]]) if n < G else 0.0
            bonus = residual(P[last], Q[last]) if n < G else P[last]
            for token in range(V):
                emitted[(*drafted[:n], token)] += float(drawn * kept * (1 - a) * bonus[token])
            kept *= a
    return dict(emitted)


def exact_joint(P: Array, Q: Array, start: int, G: int, n: int) -> dict[tuple, float]:
    """Joint distribution of the first n tokens after `start`, over as many rounds as it takes."""
    rounds = [exact_round(P, Q, last, G) for last in range(len(P))]
    joint = {(): 1.0}
    for _ in range(n):  # rounds suffice, as each emits a token at least
        longer = defaultdict(float)
        for tokens, probability in joint.items():
            more = rounds[(start, *tokens)[-1]] if len(tokens) < n else {(): 1.0}
            for emitted, rest in more.items():
                longer[(tokens + emitted)[:n]] += probability * rest
        joint = dict(longer)
    return joint


def target_joint(P: Array, start: int, n: int) -> dict[tuple, float]:
    """What `exact_joint` must equal: the target alone, P[start, x1] * P[x1, x2] * ..."""
    return {tokens: float(np.prod([P[a, b] for a, b in zip((start, *tokens), tokens)]))
            for tokens in itertools.product(range(len(P)), repeat=n)}


# ---- Training ----------------------------------------------------------------------------------

def clip_by_global_norm(grads: list[Array], max_norm: float) -> tuple[list[Array], float]:
    """Pascanu et al. 2013, Algorithm 1, all gradients as one vector: (clipped, norm before)."""
    norm = float(np.sqrt(sum((g * g).sum() for g in grads)))
    scale = min(1.0, max_norm / (norm + 1e-6))  # the 1e-6 is PyTorch's
    return [g * scale for g in grads], norm


def adamw_step(param: Array, grad: Array, m: Array, v: Array, step: int, lr: float, beta1: float,
               beta2: float, eps: float, weight_decay: float) -> tuple[Array, Array, Array]:
    """Loshchilov & Hutter 2019, Algorithm 2; step counts from 1, m and v start at 0: (param, m, v).

    The decay is no part of the gradient; lr scales it as in PyTorch (the paper's eta times alpha).
    """
    m = beta1 * m + (1 - beta1) * grad  # line 7
    v = beta2 * v + (1 - beta2) * grad * grad  # line 8
    m_hat = m / (1 - beta1**step)  # line 9: both averages start at 0 and are too small by this
    v_hat = v / (1 - beta2**step)  # line 10
    return param - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param), m, v  # line 12


def lr_at(step: int, max_lr: float, min_lr: float, warmup: int, total: int) -> float:
    """AMD's schedule: linear from 0 at step 0 to max_lr at `warmup`, then half a cosine to min_lr
    at `total` (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    if step < warmup:
        return max_lr * step / warmup
    if step >= total:
        return min_lr
    done = (step - warmup) / (total - warmup)
    return float(min_lr + (max_lr - min_lr) * (1 + np.cos(np.pi * done)) / 2)
