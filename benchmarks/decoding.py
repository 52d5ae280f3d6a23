"""How fast is speculative decoding? Ours, and with --peers transformers' beside it.

A target and one or more drafts, from presets with random weights or from checkpoint folders,
continue the same prompts in several ways: the target alone, then helped by the draft with each
--gamma, greedily or sampled. The ways take turns, prompt by prompt, so that a drift of the
machine's speed meets all of them. The tables say what comes out a second, what each part costs,
and what speed-up the parts predict.

--embed-in gives a trained model the cost of a large one: its checkpoint's function in a larger
shape, with the same logits (see embed_in). Small models that share a training run can then show
what speculative decoding gains for a 7B model at their rate of acceptance.

    python benchmarks/decoding.py --target codellama-7b --draft amd-135m --graphs --dtype bfloat16
    python benchmarks/decoding.py --target out/demo-target --draft out/demo-draft --peers
    python benchmarks/decoding.py --target out/amd-135m-code --embed-in codellama-7b \\
        --draft out/amd-135m --gamma 5 3 8 auto --sampling greedy 0.1,10,0.95 --peers --graphs
"""
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import check_writable, load_tokenizer, write_whole
from model import PRESETS, ModelConfig, Transformer, load_checkpoint, resolve_device
from speculative import Decoder, Stats, held_out_prompts, prepare_for_decoding


# ------------------------------------------------------------------------------------- the models

def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)          # a 7B model in float32 first would need twice the room
    try:
        with device:
            return Transformer(config)
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def embed_in(model: Transformer, shape: ModelConfig) -> Transformer:
    """The function of `model` in a larger shape: the same logits at the larger shape's cost.

    With C = 768 channels in a width of W = 4096, the residual stream is the small model's in its
    first C channels and zero in the others:

        embed_tokens, o_proj, down_proj     new entries are zero: nothing is written beyond channel
                                            C, and further heads and layers add nothing
        norms                               the mean square is over W instead of C channels, so C/W
                                            times as large. With eps times C/W, the norm's result is
                                            sqrt(W/C) too large, so its weights get sqrt(C/W). In
                                            bfloat16 that rounds them again.

    All other new entries multiply zeros, or make numbers that zeros multiply. They are random, so
    that the arithmetic is that of any model. The size of a head stays, because RoPE turns pairs of
    its channels: there are W / D heads, with as many query heads to a key head as before.
    """
    small, D = model.config, model.config.head_dim
    C, W = small.hidden_size, shape.hidden_size
    group = small.num_attention_heads // small.num_key_value_heads
    if (W % (D * group) or W < C or shape.intermediate_size < small.intermediate_size
            or shape.num_hidden_layers < small.num_hidden_layers):
        raise ValueError(
            f"a model of {small.num_hidden_layers} layers, {C} channels in heads of {D} and "
            f"{small.intermediate_size} hidden channels does not fit into {shape.num_hidden_layers}"
            f" layers, {W} and {shape.intermediate_size}: choose a larger --embed-in, whose width "
            f"is a multiple of {D * group}")
    large = random_model(replace(
        small, hidden_size=W, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=W // D,
        num_key_value_heads=W // D // group, rms_norm_eps=small.rms_norm_eps * C / W),
        model.device, model.dtype)
    weights = dict(model.named_parameters())
    for name, parameter in large.named_parameters():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        if name in weights:                                 # not in a further layer
            weight = weights[name] * (C / W) ** 0.5 if "norm" in name else weights[name]
            parameter[tuple(map(slice, weight.shape))] = weight
    return large


def load(name: str, device: torch.device, dtype: torch.dtype, embed: str = "") -> Transformer:
    if name in PRESETS:
        if embed:
            raise ValueError(f"--target {name} is a preset, and --embed-in {embed} needs the "
                             "folder of a checkpoint: give one, or leave --embed-in out")
        return random_model(PRESETS[name], device, dtype)
    model = load_checkpoint(name, device, dtype)
    return embed_in(model, PRESETS[embed]) if embed else model


# --------------------------------------------------------------------------------- transformers'

def peer(model: Transformer, vocab_size: int):
    """The same weights, not a copy of them, in transformers' LlamaForCausalLM.

    It helps only a target of its own vocab_size: the tokens that a draft lacks get rows of zeros.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ValueError("--peers needs transformers: pip install -e '.[peers]'") from None
    config = LlamaConfig(**asdict(model.config) | {"vocab_size": vocab_size},
                         attn_implementation="sdpa")
    with torch.device("meta"):
        other = LlamaForCausalLM(config)
    tensors = dict(model.state_dict())
    if missing := vocab_size - model.config.vocab_size:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = F.pad(tensors[name], (0, 0, 0, missing))
    other.load_state_dict(tensors, assign=True)
    # Angles are no parameter: made on the meta device they hold nothing yet.
    other.model.rotary_emb = type(other.model.rotary_emb)(config).to(model.device)
    other.generation_config.eos_token_id = None
    return other.eval()


# ------------------------------------------------------------------- ways to decode, taking turns

@dataclass
class Way:
    """One way to continue a prompt, and a row of the table."""
    name: str
    decode: Callable            # (prompt, new tokens, seed, Stats to count in) -> the new tokens
    prompts: int                # how many of the prompts it continues
    plain: "Way | None" = None  # plain decoding of its kind, which its speed-up is measured against
    gamma: int | str = 0
    draft: str = ""
    decoder: Decoder | None = None
    stats: Stats = field(default_factory=Stats)
    texts: list[list[int]] = field(default_factory=list)


def report(text: str) -> None:
    """A large target takes minutes to compile: say how far a run is, apart from its tables."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def our_way(name: str, decoder: Decoder, prompts: int, **fields) -> Way:
    report(f"{name} {fields.get('draft', '')}: ready")

    def decode(prompt: list[int], new: int, seed: int, stats: Stats) -> list[int]:
        return [token for outcome in decoder.generate([prompt], new, seed=seed, stats=stats)
                for token in outcome.tokens[0]]
    return Way(name, decode, prompts, decoder=decoder, **fields)


def peer_way(name: str, target, helper, prompts: int, sampling: dict, **fields) -> Way:
    settings = {"do_sample": False, "pad_token_id": 0}
    if sampling["temperature"]:
        settings |= sampling | {"do_sample": True}
    if helper is not None:
        settings["assistant_model"] = helper

    def decode(prompt: list[int], new: int, seed: int, stats: Stats) -> list[int]:
        if helper is not None:
            auto = fields["gamma"] == "auto"
            helper.generation_config.num_assistant_tokens = 5 if auto else fields["gamma"]
            helper.generation_config.num_assistant_tokens_schedule = (
                "heuristic" if auto else "constant")
            helper.generation_config.assistant_confidence_threshold = 0.0
        torch.manual_seed(seed)
        inputs = torch.tensor([prompt], device=target.device)
        began = time.perf_counter()
        text = target.generate(inputs, max_new_tokens=new, **settings)[0, len(prompt):].tolist()
        stats.seconds += time.perf_counter() - began
        stats.emitted += len(text)
        return text
    return Way(name, decode, prompts, **fields)


def all_ways(args: argparse.Namespace, sampling: dict, target: Transformer,
             drafts: dict[str, Transformer], peers: list, length: int) -> list[Way]:
    """The first draft helps with every --gamma, and further drafts with the first --gamma. With
    --graphs, gamma "auto" and a plain decoding to compare it with run without them."""
    fast = {"length": length, "graphs": args.graphs} | sampling
    eager = {"length": length} | sampling
    ways = [our_way("plain", Decoder(target, **fast), args.prompts)]
    for draft, model in drafts.items():
        for gamma in args.gamma if draft == args.draft[0] else args.gamma[:1]:
            name = f"gamma {gamma}"
            if gamma != "auto" or not args.graphs:
                ways.append(our_way(name, Decoder(target, model, gamma, **fast), args.prompts,
                                    plain=ways[0], gamma=gamma, draft=draft))
                continue
            ways.append(plain := our_way("plain, eager", Decoder(target, **eager),
                                         args.eager_prompts))
            ways.append(our_way(f"{name}, eager", Decoder(target, model, gamma, **eager),
                                args.eager_prompts, plain=plain, gamma=gamma, draft=draft))
    if peers:
        number = args.eager_prompts
        plain = peer_way("transformers' generate", peers[0], None, number, sampling)
        ways.append(plain)
        for gamma in dict.fromkeys((args.gamma[0], *("auto" for g in args.gamma if g == "auto"))):
            ways.append(peer_way(f"assisted generation, {gamma}", *peers, number, sampling,
                                 plain=plain, gamma=gamma, draft=args.draft[0]))
    return ways


def take_turns(ways: list[Way], prompts: list[list[int]], new: int) -> None:
    for way in [*ways]:                                 # warm up, and forget
        try:
            way.decode(prompts[0], min(new, 16), 0, Stats())
        except Exception as error:
            if way.decoder:                             # ours: to be mended here
                raise
            ways.remove(way)
            report(f"{way.name} is left out: {' '.join(str(error).split()):.200}")
    for i, prompt in enumerate(prompts):
        report(f"prompt {i + 1} of {len(prompts)}")
        for way in ways:
            if i < way.prompts:
                way.texts.append(way.decode(prompt, new, i, way.stats))


# ------------------------------------------------------------------------------ what parts cost

def seconds_of(device: torch.device, step: Callable) -> float:
    """Seconds of one call, to the end of what it asked a GPU for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()                                      # what was asked for before is done now
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


@torch.inference_mode()
def step_costs(plain: Decoder, fast: Decoder, prompts: list[list[int]], G: int) -> dict[str, float]:
    """Seconds of a plain step, of drafting G tokens and of verifying them: medians of 30, taken in
    turns. Then those of reading a prompt, by the target alone and by both models: means, taken in
    turns as well."""
    device, prompt = plain.models[0].device, prompts[0]
    plain.read([prompt])
    fast.read([prompt])
    drafts = fast.run_propose(G)
    parts = {"token_s": (plain, lambda: plain.run_decide(None)),
             "drafts_s": (fast, lambda: fast.run_propose(G)),
             "verify_s": (fast, lambda: fast.run_decide(drafts))}
    times = {name: [] for name in parts}
    for _ in range(30):
        for name, (decoder, step) in parts.items():
            for cache in decoder.caches:
                cache.position.fill_(len(prompt))
            times[name].append(seconds_of(device, step))
    costs = {name: statistics.median(values) for name, values in times.items()}
    readings = [[seconds_of(device, lambda: decoder.read([prompt])) for decoder in (plain, fast)]
                for prompt in prompts]
    return costs | dict(zip(("read_plain_s", "read_s"), map(statistics.mean, zip(*readings))))


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


# ------------------------------------------------------------------------------------ the report

def figures_of(way: Way, sampling: dict, first: Way, prompts: list, new: int) -> dict:
    """The figures of one way, for its row of the table and for --json."""
    stats, plain = way.stats, way.plain or way
    compared = way.plain or first
    row = {**sampling, "way": way.name, "draft": way.draft, "gamma": way.gamma,
           "prompts": way.prompts, "tokens_per_s": stats.tokens_per_s,
           "speedup": stats.tokens_per_s / plain.stats.tokens_per_s,
           "texts_as_plain": None if sampling["temperature"] else sum(
               map(list.__eq__, way.texts, compared.texts))}
    if way.decoder is None or not way.gamma:
        return row
    row |= {"accepted_per_drafted": stats.accepted_per_drafted, "alpha": stats.alpha,
            "tokens_per_round": stats.tokens_per_round, "mean_gamma": stats.drafted / stats.rounds}
    if way.gamma != "auto":
        costs = step_costs(plain.decoder, way.decoder, prompts[:way.prompts], way.gamma)
        token, drafts, verify, read_plain, read = (part / costs["token_s"]
                                                   for part in costs.values())
        row |= costs | {"graphs": way.decoder.graphs, "predicted_speedup": predicted_speedup(
            stats.alpha, way.gamma, drafts / way.gamma, verify, new, read_plain, read)}
    return row


def print_tables(rows: list[dict]) -> None:
    def number(row: dict, name: str, form: str) -> str:
        return format(row[name], form) if name in row else ""

    print("| sampling | way | draft | tokens/s | speed-up | predicted | accepted/drafted | tokens "
          "a round | texts as plain |\n|---|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        sampled = f"{row['temperature']}, {row['top_k']}, {row['top_p']}"
        mean = f" (mean {row['mean_gamma']:.1f})" if "mean_gamma" in row else ""
        print(" | ".join(["| " + (sampled if row["temperature"] else "greedy"),
                          row["way"] + mean * (row["gamma"] == "auto"),
                          row["draft"], f"{row['tokens_per_s']:.1f}", f"{row['speedup']:.2f}",
                          number(row, "predicted_speedup", ".2f"),
                          number(row, "accepted_per_drafted", ".3f"),
                          number(row, "tokens_per_round", ".2f"),
                          "" if row["texts_as_plain"] is None else
                          f"{row['texts_as_plain']} of {row['prompts']}"]) + " |")
    print("\n| milliseconds | target, a token | draft, a token | verifying gamma + 1 | a round | "
          "reading a prompt, plain and with the draft |\n|---|---:|---:|---:|---:|---:|")
    for row in rows:
        if "token_s" in row:
            token, drafts, verify, alone, both = (1e3 * row[name] for name in (
                "token_s", "drafts_s", "verify_s", "read_plain_s", "read_s"))
            print(f"| {row['draft']}, {row['way']}{', sampled' * bool(row['temperature'])} | "
                  f"{token:.2f} | {drafts / row['gamma']:.3f} | {verify:.2f} | "
                  f"{drafts + verify:.2f} | {alone:.1f}, {both:.1f} |")


# ---------------------------------------------------------------------------------- command line

def gamma_flag(text: str) -> int | str:
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of drafts nor auto")
    return text if text == "auto" else int(text)


def sampling_flag(text: str) -> dict:
    try:
        temperature, top_k, top_p = text.split(",") if text != "greedy" else (0, 0, 1)
        return {"temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither greedy nor TEMPERATURE,TOP_K,TOP_P "
                                         "(AMD's is 0.1,10,0.95)") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--target", default="out/demo-target", help="preset or checkpoint folder")
    add("--embed-in", default="", choices=list(PRESETS), metavar="PRESET",
        help="give the target's checkpoint this shape, and its cost, without changing its logits")
    add("--draft", action="append", help="preset or checkpoint folder; can be repeated: further "
                                         "drafts are run with the first --gamma alone")
    add("--data", default="out/data-demo", help="held-out prompts for checkpoints")
    add("--prompts", type=int, default=8)
    add("--prompt-tokens", type=int, default=64, help="length of a prompt, at most")
    add("--eager-prompts", type=int, help="prompts for what is slow: ways without --graphs, and "
                                          "--peers (default: all)")
    add("--max-new-tokens", type=int, default=96)
    add("--gamma", type=gamma_flag, nargs="+", default=[5], help="numbers, or auto")
    add("--sampling", type=sampling_flag, nargs="+", default=[sampling_flag("greedy")],
        help="greedy, or TEMPERATURE,TOP_K,TOP_P")
    add("--device")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--graphs", action="store_true", help="compiled, as CUDA graphs")
    add("--peers", action="store_true", help="transformers beside it, on the first draft")
    add("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    args.draft = args.draft or ["out/demo-draft"]
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"decoding.py: error: {error}\n")


def open_prompts(args: argparse.Namespace) -> list[list[int]]:
    if args.target in PRESETS:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(256, (args.prompts, args.prompt_tokens), generator=generator).tolist()
    return held_out_prompts(Path(args.data), load_tokenizer(args.target), args.prompts,
                            args.prompt_tokens)


def run(args: argparse.Namespace) -> None:
    args.eager_prompts = args.eager_prompts or args.prompts
    for name in ("prompts", "prompt_tokens", "max_new_tokens", "eager_prompts"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: expected at "
                             "least 1")
    path = args.json and check_writable(args.json)
    device, dtype = resolve_device(args.device), getattr(torch, args.dtype)
    prompts, new = open_prompts(args), args.max_new_tokens
    target = load(args.target, device, dtype, args.embed_in)
    drafts = {name: load(name, device, dtype) for name in args.draft}
    length, context = max(map(len, prompts)) + new, target.config.max_position_embeddings
    if length > context:
        raise ValueError(f"prompts of up to {length - new} tokens and --max-new-tokens {new} do "
                         f"not fit into the target's context of {context}: ask for fewer")
    # All decoders round length + gamma + 1 up to the same number of places: each is compiled for.
    longest = max((gamma for gamma in args.gamma if gamma != "auto"), default=0)
    length = min(-(-(length + longest + 1) // 64) * 64 - longest - 1, context)
    peers = [peer(model, target.config.vocab_size)
             for model in (target, drafts[args.draft[0]]) if args.peers]
    for model in (target, *drafts.values()):
        prepare_for_decoding(model)
    rows, texts = [], {}
    for sampling in args.sampling:
        ways = all_ways(args, sampling, target, drafts, peers, length)
        take_turns(ways, prompts, new)
        rows += [figures_of(way, sampling, ways[0], prompts, new) for way in ways]
        for way, row in zip(ways, rows[-len(ways):]):
            row["tokens"] = way.texts
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads")
    report("done")
    facts = {"target": args.target, "embed_in": args.embed_in, "dtype": args.dtype,
             "device": where, "torch": torch.__version__, "prompts": prompts, "new_tokens": new}
    print(f"{args.target}{f' in the shape of {args.embed_in}' * bool(args.embed_in)}, {args.dtype}"
          f", {where}, torch {torch.__version__}, {'graphs' if ways[0].decoder.graphs else 'eager'}"
          f"; {len(prompts)} prompts x {new} tokens\n")
    print_tables(rows)
    if path:
        write_whole(path, [json.dumps(facts | {"rows": rows}).encode() + b"\n"])


if __name__ == "__main__":
    main()
