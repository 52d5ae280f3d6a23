"""Speculative decoding: a small draft model guesses, the large target checks, and nothing is lost.

A language model writes one token at a time, and for each token the machine fetches all of the
model's weights from memory, which takes most of the time. To run over six tokens in one pass takes
hardly longer than over one, because the weights are fetched once either way. So a small model, the
draft, guesses a few tokens; the large one, the target, reads all of them in one pass; and a rule
accepts or replaces them in such a way that the text has exactly the distribution that the target
alone would have given it. Only a clock can tell the difference.

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

The rule, at one place of the text and with a vocabulary of three tokens:

    token                                          a      b      c     sum
    the target's probabilities, p                0.60   0.30   0.10   1.00
    the draft's, q: its guess is drawn from them 0.30   0.20   0.50   1.00
    the guess is accepted with min(1, p/q)       1.00   1.00   0.20
    guessed and accepted: min(p, q)              0.30   0.20   0.10   0.60 = alpha
    residual, what p still lacks: max(0, p - q)  0.30   0.10   0.00   0.40 = 1 - alpha
    after a rejection, x is drawn from it / sum  0.75   0.25   0.00   1.00
    rejected and replaced: 0.40 times that       0.30   0.10   0.00   0.40
    guessed and accepted, or replaced            0.60   0.30   0.10   1.00 = p

It comes out as p for any q, since min(p, q) + max(0, p - q) = p: a draft that guesses badly costs
time, never quality. (After full acceptance x is drawn from the target's p behind the last guess.)

Symbols are those of Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding": p the target's distribution, q the draft's, G the draft length (gamma), alpha the
probability of acceptance. B, T, S, V as in model.py. u are uniform random numbers in [0, 1).

Try it:  python speculative.py        (after `python train.py`; decodes plainly and speculatively)
"""
import argparse
import codecs
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data import Corpus, Tokenizer, check_writable, load_tokenizer, write_whole
from model import Cache, Linear, RMSNorm, Transformer, load_checkpoint, resolve_device


# ---------------------------------------------------------------------- distributions and the rule

class Sampling(NamedTuple):
    """How a distribution is made of logits; the defaults are greedy decoding."""
    temperature: float = 0.0
    top_k: int = 0                  # 0: off
    top_p: float = 1.0              # 1: off


def warp(logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that tokens are drawn from: logits (..., V) -> probabilities, float32 or
    wider.

    Temperature 0 puts all mass on the best token (the first of equals), so that greedy decoding
    needs no code of its own below. The order of the three is that of transformers. The draft's
    distributions are made here as well: the rule needs the very q that a guess was drawn from.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Near 0 nothing overflows: differences are divided, and by a number that float32 can hold.
    smallest = torch.finfo(torch.float32).tiny
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, smallest)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)           # ties with it are kept
    p = logits.softmax(-1)
    if top_p < 1:
        best, order = p.sort(dim=-1, descending=True, stable=True)
        mass_before = best.cumsum(-1) - best
        best = best.masked_fill(mass_before >= max(top_p, smallest), 0.0)
        p = p.scatter(-1, order, best / best.sum(-1, keepdim=True))
    return p


def sample(p: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: for p (B, V), u (B,) the first token whose running sum exceeds u * sum(p).

    p need not be normalised. Sums are float64: in float32 a running sum over 32,000 entries is
    wrong by more than the least likely tokens have.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)                             # (B, V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), which replaces a rejected guess (section 2.3): (B, V), to be sampled from.

    Where p and q agree up to rounding nothing may be left of it: then p is the limit.
    """
    excess = (p - q).clamp(min=0)
    return torch.where(excess.sum(-1, keepdim=True) > 0, excess, p)


def verify(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Leviathan et al. 2023, Algorithm 1, for every row at once and without a branch.

    p (B, G+1, V), q (B, G, V or fewer), drafted (B, G), u (B, G+1): G to accept with, one to draw
    with. Returns tokens (B, G+1) and n (B,): row b gets tokens[b, :n[b] + 1], its n accepted
    guesses and one token more; what follows is meaningless.
    """
    B, G = drafted.shape
    # q gets a zero for each token that only the target knows, and a zero row: after full
    # acceptance the residual p - q is then p itself, and the last token is no special case.
    q = F.pad(q, (0, p.shape[-1] - q.shape[-1], 0, 1))                  # (B, G+1, V)
    guess = drafted[..., None]
    p_guess = p[:, :G].gather(-1, guess)[..., 0]                        # (B, G)
    q_guess = q[:, :G].gather(-1, guess)[..., 0]
    accepted = u[:, :G] * q_guess < p_guess                             # u < p/q, not divided
    n = accepted.cumprod(-1).sum(-1)                                    # (B,) before a rejection
    rows = torch.arange(B, device=p.device)
    x = sample(residual(p[rows, n], q[rows, n]), u[:, G])               # (B,)
    return F.pad(drafted, (0, 1)).scatter(1, n[:, None], x[:, None]), n


FIRST_GAMMA, MAX_GAMMA = 5, 64      # of gamma "auto": transformers has no maximum, caches need one


def next_gamma(gamma: int, accepted: int) -> int:
    """gamma "auto": the next draft length is G + 2 if all G guesses were accepted, else G - 1.

    This is the schedule of transformers 4.37, which AMD's table was measured with: it starts at 5
    with every prompt. A length is chosen before its tokens are drawn and all of them are judged, so
    the text keeps the target's distribution.
    """
    return min(gamma + 2, MAX_GAMMA) if accepted == gamma else max(gamma - 1, 1)


# --------------------------------------------------------------------------------------- one round

class Drafts(NamedTuple):
    tokens: Tensor                  # (B, G), the guesses d_1 .. d_G
    q: Tensor                       # (B, G, V or fewer), the distributions they were drawn from


class Verdict(NamedTuple):
    drafted: Tensor                 # (B, G), the guesses
    tokens: Tensor                  # (B, G+1), of which each row gets the first n + 1
    n: Tensor                       # (B,), how many guesses were accepted


def plain_step(target: Transformer, cache: Cache, last_two: Tensor, u: Tensor,
               sampling: Sampling) -> Verdict:
    """Plain decoding: the target reads the last token and draws one more. u (B, 1)."""
    logits = target(last_two[:, 1:], cache)[:, 0]                       # (B, V)
    tokens = sample(warp(logits, *sampling), u[:, 0])[:, None]          # (B, 1)
    return Verdict(tokens[:, :0], tokens, torch.zeros_like(tokens[:, 0]))


def propose(draft: Transformer, cache: Cache, last_two: Tensor, u: Tensor, sampling: Sampling,
            vocab_size: int) -> Drafts:
    """The draft continues the last two tokens by G guesses, one for each column of u (B, G).

    vocab_size is the target's. Either model may know tokens that the other lacks: the draft's
    surplus is cut off, and what it has no embedding for it reads as the last one that it has.
    """
    tokens, guesses, distributions = last_two, [], []
    for u_i in u.unbind(1):
        tokens = tokens.clamp(max=draft.config.vocab_size - 1)
        logits = draft.lm_head(draft.hidden(tokens, cache)[:, -1])      # (B, V)
        cache.advance(tokens.shape[1])
        q_i = warp(logits[:, :vocab_size], *sampling)
        d_i = sample(q_i, u_i)                                          # (B,)
        distributions.append(q_i)
        guesses.append(d_i)
        tokens = d_i[:, None]
    return Drafts(torch.stack(guesses, 1), torch.stack(distributions, 1))


def decide(target: Transformer, cache: Cache, last_two: Tensor, drafts: Drafts, u: Tensor,
           sampling: Sampling) -> Verdict:
    """The target reads the last token and all guesses in one pass, and they are judged.
    u (B, G+1)."""
    logits = target(torch.cat((last_two[:, 1:], drafts.tokens), 1), cache)
    p = warp(logits, *sampling)                                         # (B, G+1, V)
    return Verdict(drafts.tokens, *verify(p, drafts.q, drafts.tokens, u))


def advance(verdict: Verdict, last_two: Tensor, active: Tensor, target_cache: Cache,
            draft_cache: Cache | None = None) -> None:
    """Each row gains its n + 1 tokens, or none if it has ended (active is 0): the last step of the
    picture above. The caches still hold the rest, but beyond their positions."""
    gained = (verdict.n + 1) * active                                   # (B,)
    target_cache.advance(gained)            # it held all but the last token, and does again
    if draft_cache:                         # propose() has moved it by G + 1
        draft_cache.rollback(verdict.tokens.shape[1] - gained)
    places = gained[:, None] + torch.arange(2, device=gained.device)    # (B, 2)
    last_two.copy_(torch.cat((last_two, verdict.tokens), 1).gather(1, places))


# -------------------------------------------------------------------------------------- statistics

Tokens = list[int]


class Round(NamedTuple):
    """What a round gave each row. Where `tokens` is empty the row had ended before."""
    tokens: list[Tokens]            # the accepted guesses and x, but nothing after a row's end
    accepted: list[int]             # n, which counts all accepted guesses, also those after the end
    drafted: list[Tokens]           # all guesses


@dataclass
class Stats:
    """Counts and times of a run, and what the field reports from them."""
    rounds: int = 0                 # rounds of single rows
    emitted: int = 0                # tokens handed out (not the prompt's)
    drafted: int = 0
    accepted: int = 0               # counted before EOS or the limit cuts a round short
    seconds: float = 0.0            # of decoding, and within it of reading prompts and of drafting
    reading: float = 0.0
    drafting: float = 0.0
    tested_at: list[int] = field(default_factory=list)      # by position in the draft: how often
    accepted_at: list[int] = field(default_factory=list)    # it was reached, and accepted

    def count(self, outcome: Round) -> None:
        for tokens, n, drafted in zip(*outcome):
            if not tokens:
                continue
            self.rounds += 1
            self.emitted += len(tokens)
            self.drafted += len(drafted)
            self.accepted += n
            more = [0] * (len(drafted) - len(self.tested_at))
            self.tested_at += more
            self.accepted_at += more
            for i in range(len(drafted)):
                self.tested_at[i] += i <= n         # it was reached if all before it were accepted
                self.accepted_at[i] += i < n

    def timed(self, name: str, function: Callable, *args):
        """Call a function and add the seconds that it takes to the field of that name."""
        began = time.perf_counter()
        result = function(*args)
        if torch.cuda.is_initialized():         # a GPU goes on when the call has returned
            torch.cuda.synchronize()
        setattr(self, name, getattr(self, name) + time.perf_counter() - began)
        return result

    @property
    def accepted_per_drafted(self) -> float:
        """AMD's acceptance: guesses after a rejection stay in the denominator."""
        return self.accepted / max(self.drafted, 1)

    @property
    def alpha(self) -> float:
        """Leviathan's: accepted over tested, which estimates E[sum min(p, q)] (Corollary 3.6)."""
        return self.accepted / max(sum(self.tested_at), 1)

    @property
    def tokens_per_round(self) -> float:
        return self.emitted / max(self.rounds, 1)

    @property
    def tokens_per_s(self) -> float:
        return self.emitted / max(self.seconds, 1e-9)


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens a round if each guess is accepted with probability alpha (Leviathan, eq. 1)."""
    return sum(alpha**i for i in range(gamma + 1))


def predicted_speedup(alpha: float, gamma: int, draft_cost: float, verify_cost: float,
                      tokens=1e9, plain_reading=0.0, reading=0.0) -> float:
    """Leviathan, Theorem 3.8, from the costs of drafting a token and of verifying gamma + 1 (one,
    in the theorem). When few tokens are written, two things count that the theorem leaves out:
    reading the prompt, by the target alone and by both models, and that the last round is cut off,
    in its middle on average. All costs are in steps of plain decoding."""
    a_round = expected_tokens(alpha, gamma)
    rounds = (tokens + (a_round - 1) / 2) / a_round
    round_cost = gamma * draft_cost + verify_cost
    return (plain_reading + tokens) / (reading + rounds * round_cost)


# ---------------------------------------------------------------------------------------- the loop

def until_end(old: Tokens, new: Tokens, limit: int, eos_id: int | None,
              stop: Callable[[Tokens], bool] | None) -> tuple[Tokens, bool]:
    """What a row that has the tokens `old` keeps of `new`, and whether it ends with it: at its
    limit, with EOS (which is kept), or with the first token after which stop(tokens) is true."""
    for i, token in enumerate(new, 1):
        if len(old) + i == limit or token == eos_id or stop and stop(old + new[:i]):
            return new[:i], True
    return new, False


class Decoder:
    """Decodes a batch of prompts with a target, alone or with the help of a draft.

    All tensors that a round changes are made here, once. gamma is a number or "auto" (next_gamma);
    without a draft a round is one plain step. `length` is how many tokens a row may hold: at most,
    and by default, the target's context. With `graphs` a round on a GPU is two launches (record).
    Raises ValueError for settings that cannot be.
    """

    def __init__(self, target: Transformer, draft: Transformer | None = None,
                 gamma: int | str = 5, temperature: float = 0.0, top_k: int = 0,
                 top_p: float = 1.0, batch: int = 1, length: int | None = None,
                 graphs: bool = False):
        self.target, self.draft, self.gamma = target, draft, gamma if draft else 0
        self.sampling = Sampling(temperature, top_k, top_p)
        check_settings(self, graphs)
        self.models = self.fast = [target] if self.gamma == 0 else [target, draft]
        longest = MAX_GAMMA if self.gamma == "auto" else self.gamma
        context, device = target.config.max_position_embeddings, target.device
        self.length = min(length or context, context)
        # G + 1 more places than tokens: the last round may draft beyond the end.
        # In steps of 64, because graphs are compiled again for each size.
        places = -(-(self.length + longest + 1) // 64) * 64
        self.caches = [Cache(model.config, batch, places, device, model.dtype)
                       for model in self.models]
        self.last_two = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self.active = torch.ones(batch, dtype=torch.int64, device=device)       # 0: row has ended
        # G to draw guesses with, G to accept them with, one for the target's own token.
        self.u = torch.zeros(batch, 2 * longest + 1, dtype=torch.float64, device=device)
        self.graphs = graphs and record(self)

    @torch.inference_mode()
    def read(self, prompts: list[Tokens]) -> None:
        """Each row's text is now its prompt: the target has yet to read its last token, the draft
        its last two. A prompt of one token, x, stands as x x there: see model.Cache."""
        self.last_two.copy_(torch.tensor([(2 * prompt)[-2:] for prompt in prompts]))
        self.active.fill_(1)
        padded = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        lengths = self.active.new_tensor([len(prompt) for prompt in prompts])
        for unread, model, cache in zip((1, 2), self.models, self.caches):
            cache.position.zero_()
            tokens = padded.clamp(max=model.config.vocab_size - 1)
            model.hidden(tokens.to(model.device), cache)
            cache.advance(lengths - unread)             # what is behind it stays unseen

    def run_propose(self, G: int) -> Drafts | None:
        """propose() with this decoder's tensors; without a draft there is nothing to do."""
        if G:
            return propose(self.fast[1], self.caches[1], self.last_two, self.u[:, :G],
                           self.sampling, self.target.config.vocab_size)

    def run_decide(self, drafts: Drafts | None) -> Verdict:
        """decide() or plain_step(), and advance()."""
        tensors = self.fast[0], self.caches[0], self.last_two
        if drafts:
            G = drafts.tokens.shape[1]
            verdict = decide(*tensors, drafts, self.u[:, G:2 * G + 1], self.sampling)
        else:
            verdict = plain_step(*tensors, self.u, self.sampling)
        advance(verdict, self.last_two, self.active, *self.caches)
        return verdict

    def generate(self, prompts: list[Tokens], max_new_tokens: int, eos_id: int | None = None,
                 seed: int = 0, stats: Stats | None = None,
                 stop: Callable[[Tokens], bool] | None = None) -> Iterator[Round]:
        """Yield a Round at a time until all rows have their tokens, met EOS or filled the context.

        A row also ends with the first token after which stop(its new tokens) is true. Row b draws
        from a random stream of its own, seeded by seed + b: it is what it would have been alone
        (except that with gamma "auto" all rows have one draft length). One run at a time: a new one
        takes over what the Decoder holds. `stats` counts and times the run, without the time that
        the caller takes between rounds.
        """
        check_request(self, prompts, max_new_tokens)
        stats = stats or Stats()
        rounds = self.rounds(prompts, max_new_tokens, eos_id, seed, stats, stop)
        while outcome := stats.timed("seconds", next, rounds, None):
            stats.count(outcome)
            yield outcome

    @torch.inference_mode()
    def rounds(self, prompts, max_new_tokens, eos_id, seed, stats, stop) -> Iterator[Round]:
        """The loop itself: read the prompts, then play rounds until every row has ended."""
        generators = [torch.Generator().manual_seed((seed + b) % 2**63)
                      for b in range(len(prompts))]
        new, running = [[] for _ in prompts], set(range(len(prompts)))
        G = FIRST_GAMMA if self.gamma == "auto" else self.gamma
        stats.timed("reading", self.read, prompts)
        while running:
            u = [torch.rand(2 * G + 1, generator=g, dtype=torch.float64) for g in generators]
            self.u[:, :2 * G + 1] = torch.stack(u)
            drafts = stats.timed("drafting", self.run_propose, G)
            outcome = to_host(self.run_decide(drafts))
            if self.gamma == "auto":                    # a batch goes by its median row
                G = next_gamma(G, statistics.median_low(outcome.accepted[b] for b in running))
            for b, tokens in enumerate(outcome.tokens):
                outcome.tokens[b] = []
                if b not in running:
                    continue
                limit = min(max_new_tokens, self.length - len(prompts[b]))
                outcome.tokens[b], ended = until_end(new[b], tokens, limit, eos_id, stop)
                new[b] += outcome.tokens[b]
                if ended:
                    running.remove(b)
                    self.active[b] = 0
                    for cache in self.caches:
                        cache.position[b] = 0           # the row idles where there is room
            yield outcome


def to_host(verdict: Verdict) -> Round:
    """The one transfer of a round: all that the host has to know, in one tensor."""
    G = verdict.drafted.shape[1]
    table = torch.cat((verdict.n[:, None], verdict.drafted, verdict.tokens), 1).tolist()
    return Round(tokens=[row[G + 1:G + 2 + row[0]] for row in table],
                 accepted=[row[0] for row in table], drafted=[row[1:G + 1] for row in table])


def complete(target: Transformer, prompts: list[Tokens], max_new_tokens: int, eos_id=None,
             seed=0, stats=None, stop=None, **settings) -> list[Tokens]:
    """The new tokens of each prompt, all in one batch; settings as for Decoder."""
    length = max(map(len, prompts), default=0) + max(max_new_tokens, 1)
    decoder = Decoder(target, batch=len(prompts), length=length, **settings)
    new = [[] for _ in prompts]
    for outcome in decoder.generate(prompts, max_new_tokens, eos_id, seed, stats, stop):
        for row, tokens in zip(new, outcome.tokens):
            row += tokens
    return new


# ======================= From here on: what makes it practical. You can stop reading. =============

def check_settings(decoder: Decoder, graphs: bool) -> None:
    (temperature, top_k, top_p), gamma = decoder.sampling, decoder.gamma
    context = decoder.target.config.max_position_embeddings
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected "
                         "temperature >= 0, top_k >= 0 (0 is off) and 0 < top_p <= 1")
    if decoder.draft and gamma != "auto" and gamma not in range(1, context + 1):
        raise ValueError(f"gamma is {gamma!r}: expected auto, or 1 to {context} drafted tokens a "
                         "round (the target's context)")
    if graphs and gamma == "auto":
        raise ValueError("gamma is auto, and a graph is recorded for one draft length: give a "
                         "number as --gamma, or leave --graphs out")
    if graphs and decoder.target.device.type != "cuda":
        raise ValueError("graphs are for a GPU, and this model is not on one: leave --graphs out, "
                         "or choose another --device")


def check_request(decoder: Decoder, prompts: list[Tokens], max_new_tokens: int) -> None:
    batch, most, lengths = len(decoder.active), decoder.length - 1, [*map(len, prompts)]
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    if not lengths or len(lengths) != batch or not 1 <= min(lengths) <= max(lengths) <= most:
        raise ValueError(f"got {len(prompts)} prompts of {lengths} tokens, expected {batch} of 1 "
                         f"to {most}: the context must hold the prompt and a new token, so shorten "
                         "the prompt, or give one that is not empty")


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

    On a CPU, PyTorch's own product has a fast path for one row and falls off it at two; with W
    packed by oneDNN (laid out in blocks), six rows take 0.9 to 1.2 times as long as one. On a GPU,
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
            # Has the compiler store x, a SwiGLU's product say, instead of computing it for every
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
        start, end = end, end + len(linear.weight)
        setattr(owner, name, Part(slice(start, end)))


@torch.no_grad()
def prepare_for_decoding(model: Transformer) -> Transformer:
    """Give a model, in place, products that are fast for few rows. Its layers compute the same:
    input_layernorm now returns all of q, k and v, and q_proj takes its part out of that. It neither
    trains nor saves any more."""
    if isinstance(model.lm_head, FewRowsLinear):
        return model                        # it was prepared before
    model.requires_grad_(False)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        join(layer, "input_layernorm", attention, "q_proj", "k_proj", "v_proj")
        join(layer, "post_attention_layernorm", mlp, "gate_proj", "up_proj")
        attention.o_proj = FewRowsLinear(attention.o_proj)
        mlp.down_proj = FewRowsLinear(mlp.down_proj)
    model.lm_head = FewRowsLinear(model.lm_head)
    model.named_parameters = refuse_to_save
    return model


def refuse_to_save(*args, **kwargs):
    raise ValueError("this model was prepared for decoding and no longer has its matrices apart: "
                     "save it before, or load it again")


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
    """Make CUDA graphs of a decoder's two steps; says whether it went well.

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
        decoder.fast = [Compiled(model) for model in decoder.models]
        fast_propose = recorded(propose, G) if G else propose
        fast_decide = recorded(decide, run(fast_propose, G))
        if to_host(fast_decide(run(fast_propose, G))) != to_host(decide(run(propose, G))):
            raise RuntimeError("a replayed round gave other tokens")
        decoder.run_propose, decoder.run_decide = fast_propose, fast_decide
        return True
    except Exception as error:                  # compilers and drivers have errors of their own
        decoder.fast, reason = decoder.models, " ".join(str(error).split())
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
    if not model(torch.zeros(1, 1, dtype=torch.int64, device=device)).isfinite().all():
        raise ValueError(f"{folder}: the logits are not finite in {dtype}: the weights are "
                         "damaged, or too large for this --dtype")
    return model, tokenizer


def load_pair(target: str, draft: str, device: torch.device,
              dtype: torch.dtype) -> tuple[Transformer, Transformer, Tokenizer]:
    """(target, draft, tokenizer); the draft must know the target's first tokens by the same ids."""
    target_model, tokenizer = load(target, device, dtype)
    draft_model, other = load(draft, device, dtype)
    if any(a != b for a, b in zip(tokenizer.pieces, other.pieces)):
        raise ValueError(f"{draft} speaks another vocabulary than {target}: a draft must have the "
                         "target's tokenizer (it may lack some of the last entries)")
    return target_model, draft_model, tokenizer


def held_out_prompts(folder: str | Path, tokenizer: Tokenizer, count: int,
                     length: int) -> list[Tokens]:
    """Prompts of at most `length` tokens that end with the head of a function, each from another
    held-out file of a data set's source "code": the function's body is left to be written."""
    corpus, prompts = Corpus(folder, "val", ["code"]), []
    if corpus.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(f"{folder} was prepared with another tokenizer than the checkpoint has: "
                         "give --prompt, or --data of the checkpoint's own")
    tokens = corpus.tokens("code")[:2**20]
    for document in np.split(tokens, (tokens == tokenizer.eos_id).nonzero()[0]):
        text = tokenizer.decode(document.tolist())
        heads = [match.end() for match in re.finditer(r"^ *def \w+\(.*\):\n", text, re.M)]
        if heads:
            prompts.append(tokenizer.encode(text[:heads[len(heads) // 2]])[-length:])
    if len(prompts) < count:
        raise ValueError(f"{folder} has {len(prompts)} held-out files with functions, expected "
                         f"{count}: prepare more code, or give --prompt")
    return prompts[::len(prompts) // count][:count]


# ------------------------------------------------------------------------------------ command line

def show(tokenizer: Tokenizer, verbose: bool, rounds: Iterator[Round],
         side: int = 0) -> Iterator[Round]:
    """The same rounds; the first row is printed as it comes, accepted guesses green on a terminal.
    """
    # A token may end in the middle of a UTF-8 sequence: its bytes wait for the rest.
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    green, black = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n--- {('plain', 'speculative')[side]} decoding")
    for outcome in rounds:
        tokens, n, drafted = (rows[0] for rows in outcome)
        if verbose:
            rejected = drafted[n:] if len(tokens) > n else []
            accepted, rejected, own = ([*map(tokenizer.decode, zip(part))]
                                       for part in (tokens[:n], rejected, tokens[n:]))
            print(f"accepted {accepted} rejected {rejected} then {own}")
        else:
            accepted, own = (decode(tokenizer.decode_bytes(part))
                             for part in (tokens[:n], tokens[n:]))
            print(f"{green}{accepted}{black}{own}", end="", flush=True)
        yield outcome
    print(decode(b"", final=True))


def compare(decoders: list[Decoder], prompts: list[Tokens], new: int, seed: int = 0,
            display: Callable | None = None, **request) -> tuple[list[Stats], list[list[Tokens]]]:
    """Decode each prompt with each decoder, in turns so that a drift of the machine's speed meets
    all; returns their statistics and texts. The first prompt's rounds go through `display`."""
    stats, texts = [Stats() for _ in decoders], [[] for _ in decoders]
    for decoder in decoders:
        list(decoder.generate(prompts[:1], min(new, 32)))       # warm up
    for i, prompt in enumerate(prompts):
        for side in sorted(range(len(decoders)), reverse=i % 2 == 1):
            rounds = decoders[side].generate([prompt], new, seed=seed + i, stats=stats[side],
                                             **request)
            if display and i == 0:
                rounds = display(rounds, side)
            texts[side].append([token for outcome in rounds for token in outcome.tokens[0]])
    return stats, texts


def figures(plain: Stats, fast: Stats, prompts: int) -> dict:
    step = (plain.seconds - plain.reading) / plain.rounds       # seconds of a plain step
    draft_cost = fast.drafting / fast.drafted / step
    verify_cost = (fast.seconds - fast.reading - fast.drafting) / fast.rounds / step
    mean_gamma = fast.drafted / fast.rounds
    predicted = predicted_speedup(fast.alpha, round(mean_gamma), draft_cost, verify_cost,
                                  fast.emitted / prompts, plain.reading / prompts / step,
                                  fast.reading / prompts / step)
    names = ("alpha", "accepted_per_drafted", "tested_at", "accepted_at", "tokens_per_round")
    return {name: getattr(fast, name) for name in names} | {
        "plain_tokens_per_s": plain.tokens_per_s, "speculative_tokens_per_s": fast.tokens_per_s,
        "speedup": fast.tokens_per_s / plain.tokens_per_s, "predicted_speedup": predicted,
        "draft_cost": draft_cost, "verify_cost": verify_cost, "mean_gamma": mean_gamma,
        "tokens": fast.emitted}


def print_table(f: dict) -> None:
    mode = f"temperature {f['temperature']}" if f["temperature"] else "greedy"
    agree = {True: "equal", False: "DIFFERENT", None: "not compared (sampled)"}[f["greedy_match"]]
    gamma = f"auto, {f['mean_gamma']:.1f} on average" if f["gamma"] == "auto" else f["gamma"]
    positions = [f"{a / t:.2f} of {t}" for a, t in zip(f["accepted_at"], f["tested_at"]) if t]
    print(f"""
{mode}, {f["dtype"]}, {f["device"]}, {f["prompts"]} prompts, {f["tokens"]} tokens
  plain decoding             {f["plain_tokens_per_s"]:.1f} tokens/s
  speculative decoding       {f["speculative_tokens_per_s"]:.1f} tokens/s
  speed-up                   {f["speedup"]:.2f}x (predicted {f["predicted_speedup"]:.2f}x: a guess \
costs {f["draft_cost"]:.3f}, verifying {f["verify_cost"]:.2f} steps)
  accepted / drafted         {f["accepted_per_drafted"]:.3f} with gamma {gamma}
  alpha (accepted / tested)  {f["alpha"]:.3f}
  acceptance by position     {", ".join(positions)}
  tokens a round             {f["tokens_per_round"]:.2f}
  outputs                    {agree}""")


FLAGS = (       # name, default, help
    ("--target", "out/demo-target", "checkpoint folder (default: %(default)s)"),
    ("--draft", "out/demo-draft", "checkpoint folder (default: %(default)s)"),
    ("--data", "out/data-demo", "data set whose held-out files give the prompts"),
    ("--max-new-tokens", 64, "default: %(default)s"),
    ("--gamma", "4", "drafted tokens a round, or auto (default: %(default)s)"),
    ("--top-k", 0, "0: off"),
    ("--top-p", 1.0, "1: off"),
    ("--seed", 0, "default: %(default)s"),
    ("--json", "", "file to write the figures to"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode plainly and speculatively, and compare.")
    parser.error = lambda message: parser.exit(2, f"speculative.py: error: {message}\n")
    add, texts = parser.add_argument, parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", help="text to continue (default: 16 held-out functions)")
    texts.add_argument("--prompt-file", help="file with the text to continue")
    for name, default, text in FLAGS:
        add(name, default=default, type=type(default), help=text)
    add("--device", help="cpu or cuda (also ROCm); default: the best there is")
    add("--temperature", type=float, help="default: greedy, and 0.8 as well without --prompt")
    add("--stop", action="append", default=[], help="string that ends the text; can be repeated")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    add("--graphs", action="store_true", help="compiled, as CUDA graphs; starts up for minutes")
    add("--verbose", action="store_true", help="list each round's guesses, accepted and rejected")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"speculative.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nspeculative.py: interrupted\n")


def run(args: argparse.Namespace) -> None:
    if "" in args.stop:
        raise ValueError("--stop is empty, which every text contains: give a string to stop at")
    path = args.json and check_writable(args.json)
    text = read_text(args.prompt_file) if args.prompt_file else args.prompt
    gamma = int(args.gamma) if args.gamma.isdecimal() else args.gamma
    device = resolve_device(args.device)
    target, draft, tokenizer = load_pair(args.target, args.draft, device,
                                         getattr(torch, args.dtype))
    prompts = (held_out_prompts(args.data, tokenizer, 16, 64) if text is None
               else [tokenizer.prompt(text)])
    length, results = max(map(len, prompts)) + max(args.max_new_tokens, 1), []
    strings = [string.encode() for string in args.stop]
    display = functools.partial(show, tokenizer, args.verbose)
    request = {"eos_id": tokenizer.eos_id, "stop": lambda new: any(
        string in tokenizer.decode_bytes(new) for string in strings)}
    print(f"prompt: {tokenizer.decode(prompts[0])}")
    default = [0.0, 0.8] if text is None else [0.0]
    for temperature in default if args.temperature is None else [args.temperature]:
        settings = {"temperature": temperature, "top_k": args.top_k, "top_p": args.top_p}
        decoders = [Decoder(target, helper, gamma, length=length, graphs=args.graphs, **settings)
                    for helper in (None, draft)]
        stats, texts = compare(decoders, prompts, args.max_new_tokens, args.seed,
                               None if results else display, **request)
        results.append(figures(*stats, len(prompts)) | settings | {
            "gamma": gamma, "prompts": len(prompts), "seed": args.seed, "dtype": args.dtype,
            "device": str(device), "greedy_match": None if temperature else texts[0] == texts[1]})
        print_table(results[-1])
    if path:
        sampled = {"sampled": results[1]} if results[1:] else {}
        write_whole(path, [json.dumps(results[0] | sampled, indent=2).encode() + b"\n"])


if __name__ == "__main__":
    main()
