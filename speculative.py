"""Speculative decoding: a small draft model proposes, the large target verifies, nothing is lost.

Decoding one token reads every weight of the target once; verifying G + 1 tokens in one pass reads
them once as well. So a draft guesses G tokens cheaply, the target scores them all at once, and
a rule accepts or replaces them so that the output has exactly the target's distribution.

A round, for rows that hold L tokens each:
    propose   the draft continues the last two tokens by d_1 .. d_G, each drawn from its own q_i
    decide    the target reads the last token and the G drafts, which gives p_1 .. p_{G+1};
              verify() accepts n drafts and draws one token more
    advance   the row now holds L + n + 1 tokens, the target's cache all of them but the last, the
              draft's all but two: rolling back is setting a position (model.Cache)

Symbols are those of Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding": p the target's distribution, q the draft's, G the draft length (gamma), alpha the
probability of acceptance. B, T, S, V as in model.py. u are uniform random numbers in [0, 1).

Try it:  python speculative.py        (after `python train.py`; decodes plainly and speculatively)
"""
import argparse
import codecs
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Corpus, Tokenizer, load_tokenizer
from model import (Cache, Transformer, prepare_for_decoding, resolve_device, writable,
                   write_atomically)


# ---------------------------------------------------------------------- distributions and the rule

def warp(logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that is sampled: logits (..., V) -> probabilities, at least float32.

    Temperature 0 puts all mass on the best token (the first of equals), so that greedy decoding
    needs no code of its own below. top_k 0 and top_p 1 are off; the order is transformers'.
    Every distribution of draft and target is made here: the rule needs the q that was sampled.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Near 0 nothing overflows: differences are divided, and by a number that float32 can hold.
    temperature, top_p = (max(x, torch.finfo(torch.float32).tiny) for x in (temperature, top_p))
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))        # ties with it are kept
    p = logits.softmax(-1)
    if top_p < 1:
        best, order = p.sort(dim=-1, descending=True, stable=True)
        best = best.masked_fill(best.cumsum(-1) - best >= top_p, 0.0)   # mass before it suffices
        p = torch.zeros_like(p).scatter_(-1, order, best)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(p: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: for p (B, V), u (B,) the first token whose running sum exceeds u * sum(p).

    p need not be normalised. Sums are float64: in float32 a running sum over 32,000 entries is
    wrong by more than the least likely tokens have.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)                             # (B, V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]


def verify(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Leviathan et al. 2023, Algorithm 1, for every row at once and without a branch.

    p (B, G+1, V), q (B, G, V or fewer), drafted (B, G), u (B, G+1): G to accept with, one to draw
    with. Returns tokens (B, G+1) and n (B,): row b emits tokens[b, :n[b] + 1], its n accepted
    drafts and one more; what follows is meaningless.
    """
    B, G = drafted.shape
    # q gets a zero for each token that only the target knows, and a zero row: after full
    # acceptance the residual p - q is then p itself, and the bonus token is no special case.
    q = F.pad(q, (0, p.shape[-1] - q.shape[-1], 0, 1))                  # (B, G+1, V)
    at_draft = drafted[..., None]
    p_d = p[:, :G].gather(-1, at_draft)[..., 0]                         # (B, G)
    q_d = q[:, :G].gather(-1, at_draft)[..., 0]
    accepted = u[:, :G] * q_d < p_d                                     # u < p/q, not divided
    n = accepted.cumprod(-1).sum(-1)                                    # (B,) before a rejection
    rows = torch.arange(B, device=p.device)
    p_n = p[rows, n]                                                    # (B, V)
    residual = (p_n - q[rows, n]).clamp(min=0)
    # Where p and q agree up to rounding nothing may be left: then p is the limit.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_n)
    bonus = sample(residual, u[:, G])
    return F.pad(drafted, (0, 1)).scatter(1, n[:, None], bonus[:, None]), n


# -------------------------------------------------------------------------------------- statistics

@dataclass
class Stats:
    """Counts of a run, and what the field reports from them."""
    rounds: int = 0                 # rounds of single rows
    emitted: int = 0                # tokens handed out (not the prompt's)
    drafted: int = 0
    accepted: int = 0               # counted before EOS or the limit cuts a round short
    overlap: float = 0.0            # sum over tested drafts of sum_x min(p(x), q(x))
    seconds: float = 0.0
    tested_at: list[int] = field(default_factory=list)      # by position in the draft: how often
    accepted_at: list[int] = field(default_factory=list)    # it was reached, and accepted

    def count(self, gamma: int, n: int, overlap: list[float], emitted: int) -> None:
        self.rounds, self.emitted = self.rounds + 1, self.emitted + emitted
        self.drafted, self.accepted = self.drafted + gamma, self.accepted + n
        grow = [0] * (gamma - len(self.tested_at))
        self.tested_at, self.accepted_at = self.tested_at + grow, self.accepted_at + grow
        for i in range(min(n + 1, gamma)):
            self.tested_at[i] += 1
            self.accepted_at[i] += i < n
            self.overlap += overlap[i]

    @property
    def tested(self) -> int:
        return sum(self.tested_at)

    @property
    def accepted_per_drafted(self) -> float:
        """AMD's acceptance: drafts after a rejection stay in the denominator."""
        return self.accepted / max(self.drafted, 1)

    @property
    def alpha(self) -> float:
        """Leviathan's: accepted over tested, which estimates E[sum min(p, q)] (Corollary 3.6)."""
        return self.accepted / max(self.tested, 1)

    @property
    def alpha_overlap(self) -> float:
        """The same from sum min(p, q), which does not depend on the dice: less variance."""
        return self.overlap / max(self.tested, 1)

    @property
    def tokens_per_round(self) -> float:
        return self.emitted / max(self.rounds, 1)

    @property
    def tokens_per_s(self) -> float:
        return self.emitted / max(self.seconds, 1e-9)


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens a round if each draft is accepted with probability alpha (Leviathan, eq. 1)."""
    return sum(alpha**i for i in range(gamma + 1))


def predicted_speedup(alpha: float, gamma: int, draft_cost: float, verify_cost: float) -> float:
    """From the costs of drafting a token and of verifying gamma + 1, in steps of plain decoding
    (Leviathan, Theorem 3.8, where a verification costs one step). Reading the prompt, which takes
    both ways as long, is not in it."""
    return expected_tokens(alpha, gamma) / (gamma * draft_cost + verify_cost)


# --------------------------------------------------------------------------------- the draft length

MAX_AUTO_GAMMA = 12


class DraftLength:
    """gamma "auto": the draft length that what was measured so far predicts as fastest.

    Seconds a round follow a line in G, fitted to the last rounds, the latest most; alpha is a
    running mean of the overlap sum min(p, q). A length is chosen from earlier rounds alone and all
    its drafts are verified, so the choice cannot depend on the tokens it concerns: the output
    keeps the target's distribution.
    """

    def __init__(self):
        self.alpha, self.rounds = 0.7, 0
        self.sums = [0.0] * 5                       # of 1, G, G^2, seconds, G * seconds

    def choose(self) -> int:
        self.rounds += 1
        if self.rounds <= 4:                        # it takes two lengths to fit a line
            return 6 if self.rounds % 2 else 2
        n, g, gg, s, gs = self.sums
        slope = max((n * gs - g * s) / (n * gg - g * g), 1e-9)
        base = max(s / n - slope * g / n, slope)    # no round is cheaper than its drafts alone
        best = max(range(1, MAX_AUTO_GAMMA + 1),
                   key=lambda G: expected_tokens(self.alpha, G) / (base + slope * G))
        if self.rounds % 8:
            return best
        # One round in eight tries another length, lest the line comes to rest on one alone.
        longer = best < 3 or self.rounds % 16 == 0 and best + 2 <= MAX_AUTO_GAMMA
        return best + 2 if longer else best - 2

    def learn(self, gamma: int, seconds: float, overlap: list[float]) -> None:
        if self.rounds > 1:                         # the first one warms up
            n, _, _, s, _ = self.sums
            seconds = min(seconds, 2 * s / n) if n else seconds     # a slow moment says little
            row = (1.0, gamma, gamma * gamma, seconds, gamma * seconds)
            self.sums = [0.97 * total + x for total, x in zip(self.sums, row)]  # 33 rounds count
        for x in overlap:
            self.alpha += 0.05 * (x - self.alpha)


# ------------------------------------------------------------------------------------- the decoder

@dataclass
class Round:
    """What a round gave each row. A row that had ended has nothing in any of the three."""
    tokens: list[list[int]]         # accepted drafts, then one token of the target's own, but
                                    # nothing after what ended the row (EOS, say)
    accepted: list[int]             # how many of `tokens` are drafts
    drafted: list[list[int]]        # all drafts, kept or not


def compile_for_decoding(model: Transformer) -> None:
    """Fuse each block's element-wise work, turn products with one row into reductions that run at
    memory speed, and let each kernel start while the one before it ends (Hopper's PDL). Block by
    block: all share one compilation, a whole model would take minutes."""
    if model.compiled:
        return                                      # for another decoder of this model
    if getattr(model.lm_head, "packed", False):
        raise ValueError("graphs are for a GPU, and this model was prepared for a CPU: leave "
                         "--graphs out, or choose another --device")
    torch._dynamo.config.recompile_limit = 64       # a few shapes for each of two models
    how = {"dynamic": False, "options": {"coordinate_descent_tuning": True,
                                         "triton.enable_pdl": True}}
    for module in (*model.model.layers, model.model.norm, model.lm_head):
        module.compile(**how)
    model.enter = torch.compile(model.enter, **how)


class Decoder:
    """Decodes a batch of prompts with a target, alone or helped by a draft.

    Everything that a round touches is allocated here, once. Without a draft the draft length is 0
    and a round is one plain step. gamma is a number or "auto". `length` is how many tokens a row
    may hold, at most (and by default) the target's context. With `graphs` a round on a GPU is two
    launches (see record). Raises ValueError for settings that cannot be.
    """

    def __init__(self, target: Transformer, draft: Transformer | None = None,
                 gamma: int | str = 5, temperature: float = 0.0, top_k: int = 0,
                 top_p: float = 1.0, batch: int = 1, length: int | None = None,
                 graphs: bool = False):
        if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected "
                             "temperature >= 0, top_k >= 0 (0 is off) and 0 < top_p <= 1")
        context = target.config.max_position_embeddings
        if draft is not None and gamma != "auto" and not (
                isinstance(gamma, int) and 1 <= gamma <= context):
            raise ValueError(f"gamma is {gamma!r}: expected 1 drafted token a round to {context} "
                             "(the target's context), or auto")
        self.target, self.draft = target, draft
        self.auto = DraftLength() if draft is not None and gamma == "auto" else None
        self.gamma = 0 if draft is None else MAX_AUTO_GAMMA if gamma == "auto" else gamma
        self.warp = lambda logits: warp(logits, temperature, top_k, top_p)
        self.length = min(length or context, context)
        self.models = [target] if draft is None else [target, draft]
        # gamma + 1 more places than tokens: a last round may draft beyond the end.
        places = -(-(self.length + self.gamma + 1) // 64) * 64      # few different shapes
        self.caches = [Cache(model.config, batch, places, model.device, model.dtype)
                       for model in self.models]
        device = target.device
        self.tail = torch.zeros(batch, 2, dtype=torch.int64, device=device)     # last two tokens
        self.active = torch.ones(batch, dtype=torch.int64, device=device)       # 0: row has ended
        # (B, 2G+1): G to draw drafts with, G to accept them with, one for the target's own token.
        self.u = torch.zeros(batch, 2 * self.gamma + 1, dtype=torch.float64, device=device)
        self.graphs = {} if graphs and device.type == "cuda" else None      # by draft length
        if graphs:
            for model in self.models:
                compile_for_decoding(model)

    @torch.inference_mode()
    def start(self, prompts: list[list[int]]) -> None:
        """Read all of each prompt but its last token (the draft: but its last two)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in zip(padded, prompts):
            row[:len(prompt)] = torch.tensor(prompt)                            # (B, T)
        last = lengths[:, None] - torch.tensor([2, 1])
        self.tail.copy_(padded.gather(1, last.clamp(min=0)))    # a lone token stands twice
        self.active.fill_(1)
        padded, lengths = padded.to(self.tail.device), lengths.to(self.tail.device)
        for back, model, cache in zip((1, 2), self.models, self.caches):
            cache.position.zero_()
            if padded.shape[1] > 1:
                # Prompts have any length: compiling for each would take longer than reading it.
                with model.uncompiled():
                    model.hidden(padded[:, :-1].clamp(max=model.config.vocab_size - 1), cache)
            cache.position.copy_(lengths - back)        # the padding behind it is now unseen

    def pick(self, logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, V), u (B,) -> the distribution (B, V) and the token (B,) drawn from it."""
        q = self.warp(logits)
        return q, sample(q, u)

    def propose(self, G: int) -> tuple[Tensor, Tensor]:
        """Draft G tokens: drafted (B, G) and the q (B, G, V) that each was drawn from."""
        # Feeding the last two tokens, not one, fills the gap that full acceptance leaves in the
        # draft's cache (its last draft was never read): no case distinction, one row more.
        tokens, drafted, q = self.tail, [], []
        for i in range(G):
            # The target may know tokens that the draft has no embedding for, and the reverse.
            tokens = tokens.clamp(max=self.draft.config.vocab_size - 1)
            hidden = self.draft.hidden(tokens, self.caches[1])[:, -1]           # (B, C)
            logits = self.draft.lm_head(hidden)[:, :self.target.config.vocab_size]
            q_i, token = self.pick(logits, self.u[:, i])
            q.append(q_i)
            drafted.append(token)
            tokens = token[:, None]
        return torch.stack(drafted, 1), torch.stack(q, 1)

    def decide(self, drafted: Tensor, q: Tensor) -> Tensor:
        """Verify and advance. Returns the one tensor that the host reads, (B, 2G + 2) float64:
        the G drafts, the target's own token, n, and the overlap sum min(p, q) of each draft."""
        G = drafted.shape[1]
        logits = self.target(torch.cat((self.tail[:, 1:], drafted), 1), self.caches[0])
        p = self.warp(logits)                                                   # (B, G+1, V)
        tokens, n = verify(p, q, drafted, self.u[:, G:2 * G + 1])
        overlap = torch.minimum(p[:, :G, :q.shape[-1]], q).sum(-1)              # (B, G)
        step = (n + 1) * self.active            # tokens that a row gains
        self.caches[0].position += step - (G + 1)       # the pass has moved every row by G + 1
        self.caches[1].position.copy_(self.caches[0].position - 1)
        self.tail.copy_(torch.cat((self.tail, tokens), 1).gather(       # (B, 2 + G+1) -> (B, 2)
            1, step[:, None] + torch.arange(2, device=step.device)))
        bonus = tokens.gather(1, n[:, None])
        return torch.cat((drafted, bonus, n[:, None], overlap.double()), 1)

    def plain_step(self) -> Tensor:
        """One token of the target alone, in the form of decide(): the token, and n = 0."""
        logits = self.target(self.tail[:, 1:], self.caches[0])
        token = self.pick(logits[:, -1], self.u[:, 0])[1][:, None]              # (B, 1)
        self.caches[0].position += self.active - 1
        self.tail.copy_(torch.cat((self.tail, token), 1)[:, 1:])
        return F.pad(token, (0, 1))

    def round(self, G: int) -> Tensor:
        """One round of G drafts, or with 0 a plain step: what decide() returns."""
        if self.graphs is None:
            return self.decide(*self.propose(G)) if G else self.plain_step()
        graphs, output = self.graphs[G]
        for graph in graphs:
            graph.replay()
        return output

    def record(self, G: int) -> None:
        """The same round as CUDA graphs: one launch starts all of propose(), one all of decide().

        Launching the hundreds of kernels of a forward pass one by one takes a GPU's host longer
        than a small model takes to compute. Everything a round reads and writes has its fixed
        place in this object, so a recording can be replayed as it is.
        """
        state = [self.tail, *(cache.position for cache in self.caches)]
        saved = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, value in zip(state, saved):
                tensor.copy_(value)

        def capture(step: Callable, *inputs):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):         # compiles, and lets libraries allocate
                for _ in range(2):
                    step(*inputs)
                    restore()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):           # records without running
                output = step(*inputs)
            graph.replay()                          # the next step reads this one's output
            return graph, output

        try:
            if G:
                propose, drafts = capture(self.propose, G)
                decide, output = capture(self.decide, *drafts)
                graphs, eager = [propose, decide], lambda: self.decide(*self.propose(G))
            else:
                graph, output = capture(self.plain_step)
                graphs, eager = [graph], self.plain_step
            replayed = output.clone()
            restore()
            if not torch.equal(replayed[:, :G + 2], eager()[:, :G + 2]):
                raise RuntimeError("a replayed round gave other tokens")
            self.graphs[G] = graphs, output
        except RuntimeError as error:
            print(f"graphs are off: they misbehave here ({error})", file=sys.stderr)
            self.graphs = None
        restore()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, eos_id: int | None = None,
                 seed: int = 0, stats: Stats | None = None,
                 stop: Callable[[list[int]], bool] | None = None) -> Iterator[Round]:
        """Yield a Round at a time until every row has its tokens, met EOS or filled the context.

        EOS is emitted. A row also ends with the first token after which stop(its new tokens) is
        true. Row b draws from a random stream of its own, seeded by seed + b: it is what it would
        have been alone (but not with gamma "auto": there the clock has a say in draft lengths).
        One run at a time: a new one takes over what the Decoder holds.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
        if not 0 <= seed < 2**63 - len(prompts):
            raise ValueError(f"the seed is {seed}: expected 0 or more, and less than 2^63")
        room = [self.length - len(prompt) for prompt in prompts]
        if len(prompts) != len(self.tail) or not all(prompts) or min(room, default=0) < 1:
            raise ValueError(
                f"got {len(prompts)} prompts of {[len(p) for p in prompts]} tokens, expected "
                f"{len(self.tail)} of 1 to {self.length - 1}: the context must hold the prompt and "
                "a new token, so shorten the prompt, or give one that is not empty")
        V = self.target.config.vocab_size
        if not all(0 <= token < V for prompt in prompts for token in prompt):
            raise ValueError(f"a prompt has tokens outside of 0 to {V - 1}, the target's "
                             "vocabulary: encode it with the target's tokenizer")
        stats = stats if stats is not None else Stats()
        generators = [torch.Generator().manual_seed(seed + b) for b in range(len(prompts))]
        new = [[] for _ in prompts]
        left = [min(max_new_tokens, space) for space in room]       # 0: the row has ended
        began = time.perf_counter()
        self.start(prompts)
        if self.auto:
            synchronize(self.tail.device)       # lest the first round's time holds the prompt's
        while any(left):
            G = self.auto.choose() if self.auto else self.gamma
            self.u[:, :2 * G + 1] = torch.stack([
                torch.rand(2 * G + 1, generator=g, dtype=torch.float64) for g in generators])
            round_began = time.perf_counter()
            if self.graphs is not None and G not in self.graphs:
                self.record(G)
                began += time.perf_counter() - round_began      # start-up is not decoding
                round_began = time.perf_counter()
            rows = self.round(G).tolist()       # the one synchronisation of a round
            round_took = time.perf_counter() - round_began
            given = Round([[] for _ in prompts], [0] * len(prompts), [[] for _ in prompts])
            overlaps = []
            for b, row in enumerate(rows):
                if not left[b]:
                    continue
                drafted, bonus, n = [int(t) for t in row[:G]], int(row[G]), int(row[G + 1])
                for token in (drafted[:n] + [bonus])[:left[b]]:
                    given.tokens[b].append(token)
                    new[b].append(token)
                    left[b] -= 1
                    if token == eos_id or (stop and stop(new[b])):
                        left[b] = 0
                        break
                emitted = len(given.tokens[b])
                given.drafted[b], given.accepted[b] = drafted, min(n, emitted)
                stats.count(G, n, row[G + 2:], emitted)
                overlaps += row[G + 2:][:n + 1]
                if not left[b]:
                    self.active[b] = 0
                    for cache in self.caches:
                        cache.position[b] = 0           # the row idles where there is room
            if self.auto:
                self.auto.learn(G, round_took, overlaps)
            stats.seconds += time.perf_counter() - began
            yield given
            began = time.perf_counter()     # what the caller did meanwhile is not decoding


def generate(target: Transformer, prompts: list[list[int]], max_new_tokens: int,
             draft: Transformer | None = None, gamma: int | str = 5, temperature: float = 0.0,
             top_k: int = 0, top_p: float = 1.0, **settings) -> Iterator[Round]:
    """Decoder(...).generate(...) in one call, its caches just long enough."""
    length = max(map(len, prompts), default=0) + max(max_new_tokens, 1)
    decoder = Decoder(target, draft, gamma, temperature, top_k, top_p, len(prompts), length)
    return decoder.generate(prompts, max_new_tokens, **settings)


def complete(target: Transformer, prompts: list[list[int]], max_new_tokens: int,
             **settings) -> list[list[int]]:
    """The new tokens of each prompt; settings as for generate()."""
    new = [[] for _ in prompts]
    for done in generate(target, prompts, max_new_tokens, **settings):
        for row, tokens in zip(new, done.tokens):
            row += tokens
    return new


# ----------------------------------------------------------------------------------- the comparison

def step_costs(plain: Decoder, fast: Decoder, prompt: list[int], G: int) -> tuple[float, ...]:
    """Seconds of a plain step, of drafting a token, and of verifying G + 1: medians of 30."""
    with torch.inference_mode():
        plain.start([prompt])
        fast.start([prompt])
        if fast.graphs is not None and G not in fast.graphs:    # gamma "auto" never chose it
            fast.record(G)
        if plain.graphs and fast.graphs:
            graphs = plain.graphs[0][0] + fast.graphs[G][0]
            steps = [graph.replay for graph in graphs]
        else:
            drafts = fast.propose(G)
            steps = [plain.plain_step, lambda: fast.propose(G), lambda: fast.decide(*drafts)]
        times = [[], [], []]
        for _ in range(30):             # in turns: a drift of the machine's speed meets all three
            for took, decoder, step in zip(times, (plain, fast, fast), steps):
                for cache in decoder.caches:
                    cache.position.fill_(len(prompt))
                synchronize(decoder.target.device)
                began = time.perf_counter()
                step()
                synchronize(decoder.target.device)
                took.append(time.perf_counter() - began)
    one, propose, decide = map(statistics.median, times)
    return one, propose / G, decide


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(target: Transformer, draft: Transformer, prompts: list[list[int]], max_new_tokens: int,
            gamma: int | str, eos_id: int | None = None, seed: int = 0, graphs: bool = False,
            stop: Callable | None = None, watch: Callable | None = None, **sampling) -> dict:
    """Decode each prompt plainly and speculatively, in turns so that a drift of the machine's
    speed meets both; returns the figures. watch(side, prompt's index, Round) sees every round."""
    length = max(map(len, prompts)) + max_new_tokens
    decoders = [Decoder(target, None, length=length, graphs=graphs, **sampling),
                Decoder(target, draft, gamma, length=length, graphs=graphs, **sampling)]
    for decoder in decoders:                                    # warm up
        list(decoder.generate(prompts[:1], min(32, max_new_tokens)))
    stats, texts = [Stats(), Stats()], [[], []]
    for i, prompt in enumerate(prompts):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            texts[side].append([])
            for done in decoders[side].generate([prompt], max_new_tokens, eos_id, seed + i,
                                                stats[side], stop):
                texts[side][-1] += done.tokens[0]
                if watch:
                    watch(side, i, done)
    plain, fast = stats
    figures = {
        "plain_tokens_per_s": plain.tokens_per_s, "speculative_tokens_per_s": fast.tokens_per_s,
        "speedup": fast.tokens_per_s / plain.tokens_per_s,
        "accepted_per_drafted": fast.accepted_per_drafted,
        "alpha": fast.alpha, "alpha_overlap": fast.alpha_overlap,
        "tested_at": fast.tested_at, "accepted_at": fast.accepted_at,
        "tokens_per_round": fast.tokens_per_round, "gamma": gamma,
        "mean_gamma": fast.drafted / fast.rounds, "prompts": len(prompts), "tokens": fast.emitted,
        "greedy_match": texts[0] == texts[1] if not sampling.get("temperature") else None}
    G = round(figures["mean_gamma"])
    one, draft_step, verification = step_costs(*decoders, prompts[0], G)
    costs = {"draft_cost": draft_step / one, "verify_cost": verification / one}
    return figures | costs | {
        "predicted_speedup": predicted_speedup(fast.alpha_overlap, G, *costs.values())}


# ------------------------------------------------------------------------------------ command line

def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): "
                         "convert it") from None


def load(folder: str, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    model = Transformer.from_pretrained(folder, device, dtype)
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.n_vocab} entries, the model "
                         f"{model.config.vocab_size}: use the tokenizer that it was trained with")
    prepare_for_decoding(model)
    if not model(torch.zeros(1, 1, dtype=torch.int64, device=device)).isfinite().all():
        raise ValueError(f"{folder}: the logits are not finite in {dtype}: the weights are "
                         "damaged, or too large for this --dtype")
    return model, tokenizer


def load_pair(target: str, draft: str, device: torch.device, dtype: torch.dtype):
    """(target, draft, tokenizer); the draft must know the target's first tokens by the same ids."""
    model, tokenizer = load(target, device, dtype)
    helper, other = load(draft, device, dtype)
    if any(a != b for a, b in zip(tokenizer.pieces, other.pieces)):
        raise ValueError(f"{draft} speaks another vocabulary than {target}: a draft must have the "
                         "target's tokenizer (it may lack some of the last entries)")
    return model, helper, tokenizer


def held_out_prompts(folder: Path, tokenizer: Tokenizer, count: int,
                     length: int) -> list[list[int]]:
    """Prompts of at most `length` tokens that end with the head of a function, each from another
    held-out file of a data set's source "code": the function's body is left to be written."""
    corpus, prompts = Corpus(folder, "val", ["code"]), []
    if corpus.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(f"{folder} was prepared with another tokenizer than the checkpoint has: "
                         "give --prompt, or --data of the checkpoint's own")
    tokens = corpus.tokens("code")[:2**20]
    ends = (tokens == tokenizer.eos_id).nonzero()[0]            # documents are closed by EOS
    for start, end in zip([0, *(ends + 1)], ends):
        document = tokens[start:end].tolist()
        text = tokenizer.decode_bytes(document)
        heads = [m.end() for m in re.finditer(rb"^ *def \w+\(.*\):\n", text, re.M)]
        if heads:
            # Cut where a token ends: ":" and the indentation of the next line may be one.
            reached = tokenizer.byte_lengths[document].cumsum() >= heads[len(heads) // 2]
            prompts.append(document[:int(reached.argmax()) + 1][-length:])
    if len(prompts) < count:
        raise ValueError(f"{folder} has {len(prompts)} held-out files with functions, expected "
                         f"{count}: prepare more code, or give --prompt")
    return prompts[::len(prompts) // count][:count]


class Display:
    """Prints the first row of rounds as text while they come, accepted drafts green on a terminal.
    """

    def __init__(self, tokenizer: Tokenizer, verbose: bool = False):
        self.tokenizer, self.verbose, self.colour = tokenizer, verbose, sys.stdout.isatty()
        # A token may end in the middle of a UTF-8 sequence: its bytes wait for the rest.
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def begin(self, title: str) -> None:
        """Print a title, and before it what the text so far kept back."""
        print(self.decode(b"", final=True) + title, flush=True)

    def write(self, tokens: list[int], green: bool = False) -> None:
        text = self.decode(self.tokenizer.decode_bytes(tokens))
        print(f"\033[32m{text}\033[0m" if green and self.colour and text else text, end="",
              flush=True)

    def show(self, given: Round) -> None:
        n, tokens, drafted = given.accepted[0], given.tokens[0], given.drafted[0]
        if self.verbose:
            accepted, rejected, own = (
                [self.tokenizer.decode_bytes([token]).decode(errors="replace") for token in part]
                for part in (tokens[:n], drafted[n:] if len(tokens) > n else [], tokens[n:]))
            print(f"accepted {accepted} rejected {rejected} then {own}")
        else:
            self.write(tokens[:n], green=True)
            self.write(tokens[n:])


def print_table(title: str, figures: dict) -> None:
    f = figures
    agree = {True: "equal", False: "DIFFERENT", None: "not compared (sampled)"}[f["greedy_match"]]
    rows = [("plain decoding", f"{f['plain_tokens_per_s']:.1f} tokens/s"),
            ("speculative decoding", f"{f['speculative_tokens_per_s']:.1f} tokens/s"),
            ("speed-up", f"{f['speedup']:.2f}x (predicted {f['predicted_speedup']:.2f}x: a draft "
                         f"costs {f['draft_cost']:.3f}, verifying {f['verify_cost']:.2f} steps)"),
            ("accepted / drafted", f"{f['accepted_per_drafted']:.3f} with gamma {f['gamma']}" + (
                f" (mean {f['mean_gamma']:.1f})" if f["gamma"] == "auto" else "")),
            ("alpha (accepted / tested)", f"{f['alpha']:.3f}; by sum min(p, q) "
                                          f"{f['alpha_overlap']:.3f}"),
            ("acceptance by position", ", ".join(
                f"{a / t:.2f} of {t}" for a, t in zip(f["accepted_at"], f["tested_at"]) if t)),
            ("tokens a round", f"{f['tokens_per_round']:.2f}"),
            ("outputs", agree)]
    print(f"\n{title}, {f['prompts']} prompts, {f['tokens']} tokens")
    for name, value in rows:
        print(f"  {name:26} {value}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode plainly and speculatively, and compare.")
    parser.error = lambda message: parser.exit(2, f"speculative.py: error: {message}\n")
    add = parser.add_argument
    add("--target", default="out/demo-target", help="checkpoint folder (default: %(default)s)")
    add("--draft", default="out/demo-draft", help="checkpoint folder (default: %(default)s)")
    add("--data", default="out/data-demo", help="data set whose held-out files give the prompts")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", help="text to continue (default: 16 held-out functions)")
    texts.add_argument("--prompt-file", help="file with the text to continue")
    add("--max-new-tokens", type=int, default=64)
    add("--gamma", default="4", help="drafted tokens a round, or auto (default: %(default)s)")
    add("--temperature", type=float, help="default: greedy, and 0.8 beside it without --prompt")
    add("--top-k", type=int, default=0, help="0: off")
    add("--top-p", type=float, default=1.0, help="1: off")
    add("--stop", action="append", help="string that ends the text; can be repeated")
    add("--seed", type=int, default=0)
    add("--device", help="cpu or cuda (also ROCm); default: the best there is")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    add("--graphs", action="store_true", help="compiled, as CUDA graphs; starts up for minutes")
    add("--verbose", action="store_true", help="list each round's drafts, accepted and rejected")
    add("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"speculative.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nspeculative.py: interrupted\n")


def run(args: argparse.Namespace) -> None:
    if args.gamma != "auto" and not args.gamma.isdecimal():
        raise ValueError(f"--gamma is {args.gamma!r}: expected a number or auto")
    gamma = args.gamma if args.gamma == "auto" else int(args.gamma)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}: expected at least 1")
    if "" in (args.stop or ()):
        raise ValueError("--stop is empty, which every text contains: give a string to stop at")
    path = args.json and writable(args.json)
    device = resolve_device(args.device)
    target, draft, tokenizer = load_pair(args.target, args.draft, device,
                                         getattr(torch, args.dtype))
    text = read_text(args.prompt_file) if args.prompt_file else args.prompt
    prompts = (held_out_prompts(Path(args.data), tokenizer, 16, 64) if text is None
               else [tokenizer.encode(text)])
    if text is not None and target.config.bos_token_id is not None:
        prompts[0].insert(0, target.config.bos_token_id)
    stop = args.stop and (lambda new: any(
        string.encode() in tokenizer.decode_bytes(new) for string in args.stop))
    results, display = {}, Display(tokenizer, args.verbose)
    titles = [f"prompt: {tokenizer.decode(prompts[0])}\n\n--- plain decoding",
              "\n--- speculative decoding"]

    def watch(side: int, i: int, given: Round) -> None:
        """Stream the first prompt's text, once from each side."""
        if i == 0 and not results:
            if titles[side]:
                display.begin(titles[side])
                titles[side] = ""
            display.show(given)

    temperatures = [args.temperature] if args.temperature is not None else (
        [0.0] if text is not None else [0.0, 0.8])
    for temperature in temperatures:
        figures = compare(target, draft, prompts, args.max_new_tokens, gamma, tokenizer.eos_id,
                          args.seed, args.graphs, stop, watch, temperature=temperature,
                          top_k=args.top_k, top_p=args.top_p)
        figures |= {"temperature": temperature, "top_k": args.top_k, "top_p": args.top_p,
                    "seed": args.seed, "dtype": args.dtype, "device": str(device)}
        mode = "greedy" if temperature == 0 else f"temperature {temperature}"
        if not results:
            display.begin("")
        print_table(f"{mode}, {args.dtype}, {device}", figures)
        if results:
            results["sampled"] = figures
        else:
            results = figures
    if path:
        write_atomically(path, [json.dumps(results, indent=2).encode() + b"\n"])


if __name__ == "__main__":
    main()
