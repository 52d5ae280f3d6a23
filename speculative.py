"""Speculative decoding: a small draft model guesses, the large target checks, nothing is lost.

A language model writes one token at a time, and for each token the machine fetches all of the
model's weights from memory, which takes most of the time. To read five tokens in one pass takes
hardly longer than to read one, because the weights are fetched once either way. So a small model,
the draft, guesses a few tokens; the large one, the target, reads all of them in one pass; and a
rule accepts or replaces them in such a way that the text has exactly the distribution that the
target alone would have given it. Only the time differs.

One round. The text so far is t1 .. t5, and the draft guesses G = 4 tokens, d1 .. d4. Each model
has a cache of the tokens it has read. Between rounds the target has yet to read the last token of
the text, and the draft the last two:

                       text                  the target has read    the draft has read
    before             t1 t2 t3 t4 t5        t1 t2 t3 t4            t1 t2 t3
    propose            the draft reads t4 t5, then d1, d2, d3:      t1 .. t5 d1 d2 d3
    decide             the target reads t5 d1 d2 d3 d4:
                                             t1 .. t5 d1 d2 d3 d4
    after, n = 0       t1 .. t5 x            t1 .. t5               t1 .. t4
    or     n = 2       t1 .. t5 d1 d2 x      t1 .. t5 d1 d2         t1 .. t5 d1
    or     n = G = 4   t1 .. t5 d1 .. d4 x   t1 .. t5 d1 .. d4      t1 .. t5 d1 d2 d3

The first n guesses are accepted, and x is a token that the target draws itself, so a round gives 1
to G + 1 tokens. What a cache holds of rejected guesses is forgotten by moving its position back
(model.Cache). The draft never reads its last guess, d4. After full acceptance it has to catch up on
it, and that is why it begins every round with two tokens instead of one.

The rule, at one place in the text and with a vocabulary of three tokens:

    token                                          a      b      c     sum
    the target's probabilities, p                0.60   0.30   0.10   1.00
    the draft's, q: its guess is drawn from them 0.30   0.20   0.50   1.00
    the guess is accepted with min(1, p/q)       1.00   1.00   0.20
    guessed and accepted: min(p, q)              0.30   0.20   0.10   0.60 = alpha
    residual, what p still lacks: max(0, p - q)  0.30   0.10   0.00   0.40 = 1 - alpha
    after a rejection, x: residual / its sum     0.75   0.25   0.00   1.00
    rejected and replaced: 0.40 * the row above  0.30   0.10   0.00   0.40
    guessed and accepted, or replaced            0.60   0.30   0.10   1.00 = p

It comes out as p for any q, since min(p, q) + max(0, p - q) = p: a draft that guesses badly costs
time, never quality. (After full acceptance x is drawn from the target's p after the last guess.)

Symbols are those of Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding": p the target's distribution, q the draft's, G the draft length (gamma), alpha the
probability of acceptance. B, T, S, V as in model.py. u holds uniform random numbers in [0, 1), and
`sampling` is (temperature, top_k, top_p), the arguments of warp().

Try it:  python speculative.py        (after `python train.py`; decodes plainly and speculatively)
"""
import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data import Corpus, Tokenizer, check_writable, load_tokenizer, write_whole
from model import Cache, Linear, RMSNorm, Transformer, load_checkpoint, resolve_device


# ---------------------------------------------------------------------- distributions and the rule

def warp(logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that tokens are drawn from: logits (..., V) -> probabilities, float32 or
    wider.

    Temperature 0 puts all mass on the best token (the first of equals), so that greedy decoding
    needs no code of its own below. The three apply in this order, as in Hugging Face transformers.
    The draft's distributions are made here as well: the rule needs the very q that a guess was
    drawn from.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The greatest logit becomes 0, and a temperature counts as at least a millionth, so that no
    # quotient overflows.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-6)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)           # what ties with it stays
    p = logits.softmax(-1)
    if top_p < 1:
        best, order = p.sort(dim=-1, descending=True, stable=True)
        mass_before = best.cumsum(-1) - best        # 0 for the best token, which always stays
        best = best.masked_fill(mass_before >= max(top_p, 1e-6), 0.0)
        p = p.scatter(-1, order, best / best.sum(-1, keepdim=True))
    return p


def sample(p: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: for p (B, V), u (B,) the first token whose running sum exceeds u * sum(p).

    p need not be normalised. Sums are float64: in float32 a running sum over 32,000 entries is
    wrong by more than the probability of the least likely tokens.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)                             # (B, V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), (B, V): what replaces a rejected guess is drawn from it (section 2.3).

    If p and q are equal, nothing is left of it. Then a guess is rejected only through rounding, and
    p itself stands in.
    """
    excess = (p - q).clamp(min=0)
    return torch.where(excess.sum(-1, keepdim=True) > 0, excess, p)


class Verdict(NamedTuple):
    """What a round gives: row b gains tokens[b, :n[b] + 1], its n accepted guesses and x. What
    follows them is meaningless."""
    tokens: Tensor                  # (B, G+1)
    n: Tensor                       # (B,)


def verify(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> Verdict:
    """Leviathan et al. 2023, Algorithm 1, for every row at once and without a branch.

    p (B, G+1, V), q (B, G, V or fewer), drafted (B, G), u (B, G+1): G to accept with, one to draw
    x with.
    """
    B, G = drafted.shape
    # q gets zeros for the tokens that only the target knows (F.pad takes the last dimension first),
    # and a zero row at place G: after full acceptance, n = G, the residual p - 0 is p itself.
    q = F.pad(q, (0, p.shape[-1] - q.shape[-1], 0, 1))                  # (B, G+1, V)
    guess = drafted[..., None]
    p_guess = p[:, :G].gather(-1, guess)[..., 0]                        # (B, G)
    q_guess = q[:, :G].gather(-1, guess)[..., 0]
    accepted = u[:, :G] * q_guess < p_guess                             # u < p/q, undivided
    n = accepted.cumprod(-1).sum(-1)                                    # (B,): up to a rejection
    rows = torch.arange(B, device=p.device)
    x = sample(residual(p[rows, n], q[rows, n]), u[:, G])               # (B,)
    return Verdict(F.pad(drafted, (0, 1)).scatter(1, n[:, None], x[:, None]), n)


FIRST_GAMMA, MAX_GAMMA = 5, 64      # gamma "auto" starts at 5; the caches have room for 64 guesses


def next_gamma(gamma: int, accepted: int) -> int:
    """gamma "auto": the next draft length is G + 2 if all G guesses were accepted, else G - 1.

    This is the schedule of Hugging Face transformers 4.37, with which AMD measured AMD-135M as a
    draft: it starts at 5 for every prompt. A length is chosen before its tokens are drawn and all
    of them are judged, so the text keeps the target's distribution.
    """
    return min(gamma + 2, MAX_GAMMA) if accepted == gamma else max(gamma - 1, 1)


# --------------------------------------------------------------------------------------- one round

# `last_two` (B, 2) holds the last two tokens of each row's text: those that the draft has yet to
# read. The target has yet to read the second of them.

class Drafts(NamedTuple):
    tokens: Tensor                  # (B, G), the guesses d_1 .. d_G
    q: Tensor                       # (B, G, V or fewer), the distributions they were drawn from


def plain_step(target: Transformer, cache: Cache, last_two: Tensor, u: Tensor,
               sampling: tuple) -> Verdict:
    """Plain decoding: the target reads the last token and draws one more. u (B, 1)."""
    p = warp(target(last_two[:, 1:], cache)[:, 0], *sampling)           # (B, V)
    x = sample(p, u[:, 0])                                              # (B,)
    return Verdict(x[:, None], torch.zeros_like(x))


def propose(draft: Transformer, cache: Cache, last_two: Tensor, u: Tensor, sampling: tuple,
            vocab_size: int) -> Drafts:
    """The draft continues the text by G guesses, one for each column of u (B, G).

    vocab_size is the target's. If the draft's is larger, its further logits are cut off; if it is
    smaller, it reads each token that it does not know as the last one that it knows.
    """
    tokens, guesses, distributions = last_two, [], []
    for u_i in u.unbind(1):
        tokens = tokens.clamp(max=draft.config.vocab_size - 1)
        # Only the last token read needs logits.
        logits = draft.lm_head(draft.hidden(tokens, cache)[:, -1])      # (B, V)
        cache.advance(tokens.shape[1])
        q_i = warp(logits[:, :vocab_size], *sampling)
        d_i = sample(q_i, u_i)                                          # (B,)
        distributions.append(q_i)
        guesses.append(d_i)
        tokens = d_i[:, None]
    return Drafts(torch.stack(guesses, 1), torch.stack(distributions, 1))


def decide(target: Transformer, cache: Cache, last_two: Tensor, drafts: Drafts, u: Tensor,
           sampling: tuple) -> Verdict:
    """The target reads the last token and all guesses in one pass, and they are judged.
    u (B, G+1)."""
    logits = target(torch.cat((last_two[:, 1:], drafts.tokens), 1), cache)
    p = warp(logits, *sampling)                                         # (B, G+1, V)
    return verify(p, drafts.q, drafts.tokens, u)


def settle(verdict: Verdict, last_two: Tensor, active: Tensor, target_cache: Cache,
           draft_cache: Cache | None = None) -> None:
    """Each row gains its n + 1 tokens, or none if it has ended (active is 0): the last step of the
    picture above. What the caches hold of rejected guesses stays beyond their positions."""
    gained = (verdict.n + 1) * active                                   # (B,)
    target_cache.advance(gained)            # decide() has read, and has not moved it
    if draft_cache:                         # propose() has moved it by G + 1, mostly too far
        draft_cache.rollback(verdict.tokens.shape[1] - gained)
    # The new tokens follow the two old ones: the last two begin `gained` places further on.
    places = gained[:, None] + torch.arange(2, device=gained.device)    # (B, 2)
    last_two.copy_(torch.cat((last_two, verdict.tokens), 1).gather(1, places))


# -------------------------------------------------------------------------------------- statistics

Tokens = list[int]


class Round(NamedTuple):
    """A Verdict on the host, cut at each row's end. A row that had ended before has no tokens."""
    tokens: list[Tokens]            # the accepted guesses and x, but nothing after a row's end
    accepted: list[int]             # n, which counts all accepted guesses, also those after the end
    gamma: int                      # G, how many guesses each row had


@dataclass
class Stats:
    """Counts of a run, and the figures that papers report."""
    rounds: int = 0                 # rounds of single rows
    emitted: int = 0                # tokens handed out (not the prompt's)
    drafted: int = 0
    seconds: float = 0.0            # of decoding, with the reading of the prompts
    # For each position in the draft, how often a guess was tested there, and how often accepted. A
    # guess is tested if all guesses before it were accepted.
    tested: Counter = field(default_factory=Counter)
    accepted: Counter = field(default_factory=Counter)

    def count(self, outcome: Round) -> None:
        for tokens, n in zip(outcome.tokens, outcome.accepted):
            if tokens:
                self.rounds += 1
                self.emitted += len(tokens)
                self.drafted += outcome.gamma
                self.tested.update(range(min(n + 1, outcome.gamma)))    # and the rejected one
                self.accepted.update(range(n))

    @property
    def accepted_per_drafted(self) -> float:
        """As AMD counts: guesses after a rejection stay in the denominator."""
        return self.accepted.total() / max(self.drafted, 1)

    @property
    def alpha(self) -> float:
        """Leviathan's: accepted over tested, which estimates E[sum min(p, q)] (Corollary 3.6)."""
        return self.accepted.total() / max(self.tested.total(), 1)

    @property
    def tokens_per_round(self) -> float:
        return self.emitted / self.rounds

    @property
    def tokens_per_s(self) -> float:
        return self.emitted / self.seconds


# ---------------------------------------------------------------------------------------- the loop

class Decoder:
    """Decodes a batch of prompts with a target, alone or with the help of a draft.

    A round is run_propose() and run_decide(), and generate() is the loop around them. gamma is a
    number or "auto" (next_gamma). `length` is how many tokens a row may hold: at most, and by
    default, the target's context. With `graphs` a round on a GPU is two launches (record). Raises
    ValueError for impossible settings.
    """

    def __init__(self, target: Transformer, draft: Transformer | None = None,
                 gamma: int | str = 5, temperature: float = 0.0, top_k: int = 0,
                 top_p: float = 1.0, batch: int = 1, length: int = 2**31, graphs: bool = False):
        self.sampling, device = (temperature, top_k, top_p), target.device
        check_settings(gamma, self.sampling, graphs, device)
        self.models = self.forms = [target, draft] if draft else [target]
        self.gamma = gamma if draft else 0                  # 0: each round is a plain step
        longest = MAX_GAMMA if self.gamma == "auto" else self.gamma
        self.length = max(1, min(length, target.config.max_position_embeddings))
        # All tensors that a round changes are made here, once, because graphs need fixed places.
        # More places than tokens: the last round may draft beyond the end, and a row that has ended
        # is still computed, from there. In steps of 64: graphs are compiled again for each size.
        places = -(-(self.length + 2 * longest) // 64) * 64
        self.caches = [Cache(model.config, batch, places, device, model.dtype)
                       for model in self.models]
        self.last_two = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self.active = torch.ones(batch, dtype=torch.int64, device=device)       # 0: row has ended
        # G to draw guesses with, G to accept them with, one for the target's own token.
        self.u = torch.zeros(batch, 2 * longest + 1, dtype=torch.float64, device=device)
        self.graphs = graphs and record(self)

    @torch.inference_mode()
    def read(self, prompts: list[Tokens]) -> None:
        """Each row's text is now its prompt. All of it is read, and then the positions are set as
        if its last token (by the target) or last two (by the draft) were not: a round reads them.

        A prompt of one token counts as that token twice, which makes the draft's position -1: see
        model.Cache.lookup.
        """
        self.last_two.copy_(torch.tensor([[*prompt, *prompt][-2:] for prompt in prompts]))
        self.active.fill_(1)
        padded = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        lengths = self.active.new_tensor([*map(len, prompts)])
        for unread, model, cache in zip((1, 2), self.models, self.caches):
            cache.position.zero_()
            tokens = padded.clamp(max=model.config.vocab_size - 1)
            model.hidden(tokens.to(model.device), cache)
            cache.advance(lengths - unread)             # what lies beyond is not seen

    def run_propose(self, G: int) -> Drafts | None:
        """propose() with this decoder's tensors; without a draft there is nothing to do."""
        if G:
            return propose(self.forms[1], self.caches[1], self.last_two, self.u[:, :G],
                           self.sampling, self.models[0].config.vocab_size)

    def run_decide(self, drafts: Drafts | None) -> Verdict:
        """decide() or plain_step(), and settle()."""
        tensors = self.forms[0], self.caches[0], self.last_two
        if drafts:
            G = drafts.tokens.shape[1]
            verdict = decide(*tensors, drafts, self.u[:, G:2 * G + 1], self.sampling)
        else:
            verdict = plain_step(*tensors, self.u, self.sampling)
        settle(verdict, self.last_two, self.active, *self.caches)
        return verdict

    @torch.inference_mode()
    def generate(self, prompts: list[Tokens], max_new_tokens: int, eos_id: int | None = None,
                 seed: int = 0, stats: Stats | None = None,
                 stop: Callable[[Tokens], bool] | None = None) -> Iterator[Round]:
        """Yield a Round at a time until each row has max_new_tokens, has met EOS, has filled the
        context, or stop(its new tokens) is true.

        Row b draws from a random stream of its own, seeded by seed + b: its text is what it would
        be alone, up to rounding (except that with gamma "auto" all rows have one draft length). One
        run at a time: a new one takes over what the Decoder holds. `stats` counts and times the
        run, without the time that the caller takes between rounds.
        """
        check_request(self, prompts, max_new_tokens)
        stats, start = stats or Stats(), time.perf_counter()
        generators = [torch.Generator().manual_seed((seed + b) % 2**63)
                      for b in range(len(prompts))]
        new, running = [[] for _ in prompts], set(range(len(prompts)))
        G = FIRST_GAMMA if self.gamma == "auto" else self.gamma
        self.read(prompts)
        while running:
            u = [torch.rand(2 * G + 1, generator=g, dtype=torch.float64) for g in generators]
            self.u[:, :2 * G + 1] = torch.stack(u)
            outcome = to_host(self.run_decide(self.run_propose(G)))
            if self.gamma == "auto":                    # a batch goes by its median row
                G = next_gamma(G, statistics.median_low(outcome.accepted[b] for b in running))
            for b, tokens in enumerate(outcome.tokens):
                if b not in running:
                    tokens.clear()                      # it has ended in an earlier round
                for i, token in enumerate(tokens, 1):
                    new[b].append(token)
                    if (token == eos_id or len(new[b]) == max_new_tokens or stop and stop(new[b])
                            or len(prompts[b]) + len(new[b]) == self.length):
                        del tokens[i:]                  # nothing follows the end
                        running.remove(b)
                        self.active[b] = 0
                        break
            stats.count(outcome)
            stats.seconds += time.perf_counter() - start
            yield outcome
            start = time.perf_counter()


def to_host(verdict: Verdict) -> Round:
    """The one transfer of a round: all that the host has to know, in one tensor."""
    rows = torch.cat((verdict.n[:, None], verdict.tokens), 1).tolist()
    return Round([tokens[:n + 1] for n, *tokens in rows], [n for n, *_ in rows],
                 verdict.tokens.shape[1] - 1)


def complete(target: Transformer, prompts: list[Tokens], max_new_tokens: int, eos_id=None,
             seed=0, stats=None, stop=None, **settings) -> list[Tokens]:
    """The new tokens of each prompt, all in one batch; settings as for Decoder."""
    length = max(map(len, prompts)) + max_new_tokens
    decoder = Decoder(target, batch=len(prompts), length=length, **settings)
    rounds = decoder.generate(prompts, max_new_tokens, eos_id, seed, stats, stop)
    return [sum(row, []) for row in zip(*(outcome.tokens for outcome in rounds))]


# ======================= From here on: what makes it practical. You can stop reading. =============

def check_settings(gamma: int | str, sampling: tuple, graphs: bool, device: torch.device) -> None:
    temperature, top_k, top_p = sampling
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected "
                         "temperature >= 0, top_k >= 0 (0 is off) and 0 < top_p <= 1")
    if gamma not in ("auto", *range(1, MAX_GAMMA + 1)):
        raise ValueError(f"gamma is {gamma!r}: expected auto, or 1 to {MAX_GAMMA} drafted tokens "
                         "a round")
    if graphs and (gamma == "auto" or device.type != "cuda"):
        raise ValueError(f"graphs are for a GPU and for one draft length, not for {device} and "
                         f"gamma {gamma}: choose others, or leave --graphs out")


def check_request(decoder: Decoder, prompts: list[Tokens], max_new_tokens: int) -> None:
    lengths, batch = [*map(len, prompts)], len(decoder.active)
    if max_new_tokens < 1 or len(lengths) != batch or not all(
            1 <= length < decoder.length for length in lengths):
        raise ValueError(f"got prompts of {lengths} tokens and max_new_tokens {max_new_tokens}: "
                         f"expected {batch} prompts of 1 to {decoder.length - 1} tokens, so that "
                         "the context has room for a new token, and max_new_tokens of at least 1")


# -------------------------------------------------------------------- speed: products of a few rows

@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs matrices of this type here: in bfloat16 that takes AVX-512, and some
    builds of PyTorch lack oneDNN. One small product tells."""
    ones = torch.ones(6, 16, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 16, dtype=dtype), 6)
        y = torch.ops.mkldnn._linear_pointwise(ones, packed, None, "none", [], "")
        return bool((y == 16).all())
    except (RuntimeError, AttributeError):
        return False


class FewRowsLinear(nn.Module):
    """norm(x) W^T for a few rows of x, where W is one matrix or several that read the same x: a
    product that should take no longer than reading W.

    On a CPU, PyTorch's own product has a fast path for one row and none for two; with W packed by
    oneDNN (laid out in blocks), six rows take 0.9 to 1.2 times as long as one. On a GPU,
    compiled, one row or two (a draft's first step) take sums() instead. A machine that can do
    neither takes the plain product.
    """

    def __init__(self, *linears: Linear, norm: RMSNorm | None = None):
        super().__init__()
        self.norm = norm
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.packed = weight.device.type == "cpu" and can_pack(weight.dtype)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 6)     # laid out for six rows
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.shape[:-1].numel() <= 2:
            return self.sums(x)
        x = self.norm(x) if self.norm else x
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)

    def sums(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), each output a sum over `in`, as the mean in its norm is. Sums
        over the same index compile into one kernel, which reads W at the memory's speed. That each
        output computes the mean of the squares again costs less than a kernel of its own."""
        if x.shape[-1] > 4096:
            # Has the compiler store x, say a SwiGLU's product, instead of computing it for every
            # output. It pays for CodeLlama's 11008 inputs, and does not for AMD-135M's 2048.
            x = x.as_strided(x.shape, x.stride())
        wide, scale = x.to(torch.promote_types(x.dtype, torch.float32))[..., None, :], 1.0
        if self.norm:
            squares = wide.square().expand(*x.shape[:-1], *self.weight.shape)   # (..., out, in)
            scale = torch.rsqrt(squares.mean(-1) + self.norm.eps)
            wide = wide * self.norm.weight
        return ((self.weight * wide).sum(-1) * scale).to(x.dtype)


class Part(nn.Module):
    """Some columns of what a FewRowsLinear returns, in the place of the matrix that made them."""

    def __init__(self, columns: slice):
        super().__init__()
        self.columns = columns

    def forward(self, y: Tensor) -> Tensor:
        return y[..., self.columns]


def join(layer: nn.Module, norm: str, owner: nn.Module, *names: str) -> None:
    """Put the product of all matrices that read a norm into that norm's place."""
    linears, end = [getattr(owner, name) for name in names], 0
    setattr(layer, norm, FewRowsLinear(*linears, norm=getattr(layer, norm)))
    for name, linear in zip(names, linears):
        start, end = end, end + linear.out_features
        setattr(owner, name, Part(slice(start, end)))


def prepare_for_decoding(model: Transformer) -> Transformer:
    """Give a model, in place, products that are fast for few rows. Its layers compute the same:
    input_layernorm now returns all of q, k and v, and q_proj takes its part out of that. It neither
    trains nor saves any more."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        join(layer, "input_layernorm", attention, "q_proj", "k_proj", "v_proj")
        join(layer, "post_attention_layernorm", mlp, "gate_proj", "up_proj")
        attention.o_proj = FewRowsLinear(attention.o_proj)
        mlp.down_proj = FewRowsLinear(mlp.down_proj)
    model.lm_head = FewRowsLinear(model.lm_head)
    model.named_parameters = None           # save_checkpoint would lose the matrices: let it fail
    return model


# ----------------------------------------------------------------------- speed: compiled, as graphs

class Compiled(Transformer):
    """A second form of a prepared model, on the same weights: its layers fuse what is element-wise,
    turn products of one row into sums that run at the memory's speed, and let each kernel start
    while the one before it ends (Hopper's PDL). Layer by layer, because all layers share one
    compilation; a whole model would take minutes. The model itself stays as it is, for prompts:
    they have any length, and compiling for each would take longer than reading it.
    """

    def __init__(self, model: Transformer):
        with torch.device("meta"):
            super().__init__(model.config)
        torch._dynamo.config.recompile_limit = 64       # a few shapes for each of two models
        fuse = functools.partial(torch.compile, dynamic=False, options={
            "coordinate_descent_tuning": True, "triton.enable_pdl": True})
        self.model = nn.ModuleDict({
            "embed_tokens": model.model.embed_tokens, "norm": fuse(model.model.norm),
            "layers": nn.ModuleList(map(fuse, model.model.layers))})
        self.lm_head = fuse(model.lm_head)
        self.lookup = fuse(Cache.lookup)

    def hidden(self, tokens: Tensor, cache: Cache) -> Tensor:
        x = self.model.embed_tokens(tokens)                                 # (B, T, C)
        return self.run_layers(x, *self.lookup(cache, tokens.shape[1]))


@torch.inference_mode()
def record(decoder: Decoder) -> bool:
    """Make CUDA graphs of a decoder's two steps; returns whether that worked.

    Launching the hundreds of kernels of a forward pass one by one takes a GPU's host longer than a
    small model takes to compute. All that a step reads and writes has its fixed place in the
    decoder, so a recording can be replayed as it is. It must give the tokens of the steps it was
    made from. If it does not, or if there is no compiler, the decoder stays as it was.
    """
    def run(step: Callable, argument):
        """From the same state each time."""
        decoder.read([[1, 0, 1]] * len(decoder.active))
        decoder.u.fill_(0.5)
        return step(argument)

    def recorded(step: Callable, argument) -> Callable:
        for _ in range(2):                      # compiles, and lets libraries allocate
            run(step, argument)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):           # records without running
            output = step(argument)
        return lambda _: graph.replay() or output

    G, propose, decide = decoder.gamma, decoder.run_propose, decoder.run_decide
    try:
        decoder.forms = [Compiled(model) for model in decoder.models]
        fast_propose = recorded(propose, G) if G else propose
        fast_decide = recorded(decide, run(fast_propose, G))
        if to_host(fast_decide(run(fast_propose, G))) != to_host(decide(run(propose, G))):
            raise RuntimeError("a replayed round gave other tokens")
        decoder.run_propose, decoder.run_decide = fast_propose, fast_decide
        return True
    except Exception as error:                  # compilers and drivers have errors of their own
        decoder.forms, reason = decoder.models, " ".join(str(error).split())
        print(f"graphs are off, they do not work here: {reason:.200}", file=sys.stderr)
        return False


# ------------------------------------------------------------------------ models, texts and prompts

def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): "
                         "convert it") from None


def load(folder: str, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    """(a checkpoint's model, prepared for decoding, and its tokenizer)."""
    model = load_checkpoint(folder, device, dtype)
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.n_vocab} entries, the model "
                         f"{model.config.vocab_size}: use the tokenizer that it was trained with")
    prepare_for_decoding(model)
    if not model(torch.tensor([[0]], device=device)).isfinite().all():
        raise ValueError(f"{folder}: the logits are not finite in {dtype}: the weights are "
                         "damaged, or too large for this --dtype")
    return model, tokenizer


def load_pair(target: str, draft: str, device: torch.device,
              dtype: torch.dtype) -> tuple[Transformer, Transformer, Tokenizer]:
    """(target, draft, tokenizer); the draft must know the target's first tokens by the same ids."""
    target_model, tokenizer = load(target, device, dtype)
    draft_model, other = load(draft, device, dtype)
    if any(a != b for a, b in zip(tokenizer.pieces, other.pieces)):
        raise ValueError(f"{draft} has another vocabulary than {target}: a draft must have the "
                         "target's tokenizer (it may lack some of the last entries)")
    return target_model, draft_model, tokenizer


def held_out_prompts(folder: str | Path, tokenizer: Tokenizer, count: int,
                     length: int) -> list[Tokens]:
    """Passages of `length` tokens, evenly spaced over the held-out part of a data set's source
    "code"."""
    corpus = Corpus(folder, "val", ["code"])
    if corpus.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(f"{folder} was prepared with another tokenizer than the checkpoint has: "
                         "give --prompt, or --data of the checkpoint's own")
    blocks = corpus.blocks("code", length)                              # (N, length + 1)
    if len(blocks) < count:
        raise ValueError(f"{folder} has {len(blocks)} held-out passages of {length} tokens, "
                         f"expected {count}: prepare more code, or give --prompt")
    return blocks[::len(blocks) // count][:count, :length].tolist()


# ------------------------------------------------------------------------------------ command line

def compare(decoders: list[Decoder], prompts: list[Tokens], new: int, seed=0,
            **request) -> list[tuple[Stats, list[Tokens]]]:
    """Decode each prompt with each decoder, in turns so that a drift of the machine's speed meets
    all alike; returns the statistics and texts of each."""
    results = [(Stats(), []) for _ in decoders]
    for decoder in decoders:
        list(decoder.generate(prompts[:1], min(new, 32)))       # warm up
    for i, prompt in enumerate(prompts):
        for decoder, (stats, texts) in zip(decoders, results):
            rounds = decoder.generate([prompt], new, seed=seed + i, stats=stats, **request)
            texts.append(sum((outcome.tokens[0] for outcome in rounds), []))
    return results


# The parameters after the star are the flags of the command line, with their defaults.
def run(graphs: bool, dtype: str, *, target="out/demo-target", draft="out/demo-draft",
        data="out/data-demo", prompt="", prompt_file="", max_new_tokens=64, gamma="4",
        temperature=0.0, top_k=0, top_p=1.0, stop="", seed=0, device="", json="") -> None:
    if json:
        check_writable(json)
    text = read_text(prompt_file) if prompt_file else prompt
    large, small, tokenizer = load_pair(target, draft, resolve_device(device),
                                        getattr(torch, dtype))
    prompts = ([tokenizer.prompt(text)] if prompt_file or prompt
               else held_out_prompts(data, tokenizer, 16, 64))
    gamma = int(gamma) if gamma.isdecimal() else gamma
    decoders = [Decoder(large, helper, gamma, temperature, top_k, top_p, graphs=graphs,
                        length=max(map(len, prompts)) + max_new_tokens)
                for helper in (None, small)]
    (plain, plain_texts), (fast, texts) = compare(
        decoders, prompts, max_new_tokens, seed, eos_id=tokenizer.eos_id,
        stop=stop and (lambda new: stop in tokenizer.decode(new)))
    equal, speedup = texts == plain_texts, fast.tokens_per_s / plain.tokens_per_s
    places = [f"{fast.accepted[i] / times:.2f} of {times}" for i, times in fast.tested.items()]
    if json:
        figures = {"temperature": temperature, "gamma": gamma,
                   "greedy_match": None if temperature else equal,
                   "plain_tokens_per_s": plain.tokens_per_s, "speedup": speedup,
                   "speculative_tokens_per_s": fast.tokens_per_s, "alpha": fast.alpha,
                   "accepted_per_drafted": fast.accepted_per_drafted,
                   "tokens_per_round": fast.tokens_per_round}
        write_whole(json, [dumps(figures, indent=2).encode()])
    print(f"""{tokenizer.decode(prompts[0] + texts[0])}

temperature {temperature:g}, {dtype}, {large.device}, {len(prompts)} prompts, {fast.emitted} tokens
  plain decoding             {plain.tokens_per_s:.1f} tokens/s
  speculative decoding       {fast.tokens_per_s:.1f} tokens/s
  speed-up                   {speedup:.2f}x
  accepted / drafted         {fast.accepted_per_drafted:.3f} with gamma {gamma}
  alpha (accepted / tested)  {fast.alpha:.3f}
  acceptance by position     {", ".join(places)}
  tokens a round             {fast.tokens_per_round:.2f}
  texts                      {"equal" if equal else "sampled" if temperature else "DIFFERENT"}""")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(
        "Continue texts with the target alone and with the draft's help, and compare. The text is "
        "--prompt, or is read from --prompt-file; without them, 16 passages of the held-out code "
        "of --data are continued. --gamma is the number of guesses a round, or auto. Temperature 0 "
        "is greedy decoding, top-k 0 and top-p 1 are off. A text ends after the string --stop. "
        "--graphs is for a GPU, where it compiles for minutes and then decodes fastest."))
    parser.error = lambda message: parser.exit(2, f"speculative.py: error: {message}\n")
    for name, default in run.__kwdefaults__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, type=type(default),
                            help="default: %(default)r")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--dtype", default="float32",
                        choices=["float32", "bfloat16", "float16", "float64"])
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")        # what a terminal cannot print becomes "?"
    try:
        run(**vars(args))
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "\nspeculative.py: interrupted\n")


if __name__ == "__main__":
    main()
