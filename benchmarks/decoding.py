"""How fast is a round of speculative decoding? Ours, and with --peers transformers' beside it.

Two models, from presets with random weights or from checkpoint folders, continue the same prompts
greedily: plainly, and with the draft's help. The table gives what one step of each part costs and
what comes out a second; --peers runs transformers' generate and assisted generation on the same
weights and prompts, in turns with ours, so that a drift of the machine's speed meets all alike.

    python benchmarks/decoding.py --target codellama-7b --draft amd-135m --graphs --dtype bfloat16
    python benchmarks/decoding.py --target out/demo-target --draft out/demo-draft --peers
"""
import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import load_tokenizer
from model import PRESETS, Transformer, prepare_for_decoding, resolve_device
from speculative import Decoder, Stats, held_out_prompts, predicted_speedup, step_costs


def load(name: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    if name not in PRESETS:
        return Transformer.from_pretrained(name, device, dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)          # a 7B model in float32 first would need twice the room
    try:
        with device:
            return Transformer(PRESETS[name])
    finally:
        torch.set_default_dtype(default)


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


def peer_run(target, draft, prompt: list[int], tokens: int, gamma: int) -> tuple[list[int], float]:
    settings = dict(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    if draft is not None:
        draft.generation_config.num_assistant_tokens = gamma
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        settings["assistant_model"] = draft
    inputs = torch.tensor([prompt], device=target.device)
    began = time.perf_counter()
    new = target.generate(inputs, **settings)[0, len(prompt):].tolist()
    return new, time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="out/demo-target", help="preset or checkpoint folder")
    parser.add_argument("--draft", default="out/demo-draft", help="preset or checkpoint folder")
    parser.add_argument("--data", default="out/data-demo", help="held-out prompts for checkpoints")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--gamma", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--graphs", action="store_true", help="compiled, as CUDA graphs")
    parser.add_argument("--peers", action="store_true", help="transformers beside it")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"decoding.py: error: {error}\n")


def run(args: argparse.Namespace) -> None:
    if min(args.gamma, args.prompts, args.max_new_tokens) < 1:
        raise ValueError(f"--gamma {args.gamma}, --prompts {args.prompts}, --max-new-tokens "
                         f"{args.max_new_tokens}: expected at least 1 of each")
    device, G, new = resolve_device(args.device), args.gamma, args.max_new_tokens
    target, draft = (load(name, device, getattr(torch, args.dtype))
                     for name in (args.target, args.draft))
    if args.target in PRESETS:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(256, (args.prompts, 64), generator=generator).tolist()
    else:
        prompts = held_out_prompts(Path(args.data), load_tokenizer(args.target), args.prompts, 64)
    length, context = max(map(len, prompts)) + new, target.config.max_position_embeddings
    if length > context:
        raise ValueError(f"prompts of up to {length - new} tokens and --max-new-tokens {new} do "
                         f"not fit into the target's context of {context}: ask for fewer")
    others = [peer(model, target.config.vocab_size) for model in (target, draft) if args.peers]
    prepare_for_decoding(target)
    prepare_for_decoding(draft)

    decoders = {"plain": Decoder(target, length=length, graphs=args.graphs),
                "speculative": Decoder(target, draft, G, length=length, graphs=args.graphs)}
    stats = {name: Stats() for name in decoders}
    seconds = {"generate": 0.0, "assisted generation": 0.0} if args.peers else {}
    texts: dict[str, list] = {name: [] for name in (*decoders, *seconds)}
    for i in range(-1, len(prompts)):                   # -1: warm up, and forget
        for name, decoder in decoders.items():
            kept = stats[name] if i >= 0 else Stats()
            texts[name].append([t for done in decoder.generate([prompts[i]], new, stats=kept)
                                for t in done.tokens[0]])
        for name in seconds:
            helper = others[1] if name == "assisted generation" else None
            text, spent = peer_run(others[0], helper, prompts[i], new, G)
            texts[name].append(text)
            seconds[name] += spent if i >= 0 else 0
    plain, fast = stats["plain"], stats["speculative"]
    rates = {name: s.tokens_per_s for name, s in stats.items()} | {
        name: len(prompts) * new / spent for name, spent in seconds.items()}

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads")
    print(f"{args.target} with {args.draft}, gamma {G}, {args.dtype}, {where}, torch "
          f"{torch.__version__}, {'graphs' if decoders['speculative'].graphs else 'eager'}; "
          f"{len(prompts)} prompts x {new} tokens\n\n| | tokens/s | beside plain | texts as plain |"
          "\n|---|---:|---:|---:|")
    for name, rate in rates.items():
        same = sum(map(list.__eq__, texts[name][1:], texts["plain"][1:]))
        print(f"| {name} | {rate:.1f} | {rate / rates['plain']:.2f} | {same} of {len(prompts)} |")
    one, step, check = step_costs(decoders["plain"], decoders["speculative"], prompts[0], G)
    predicted = predicted_speedup(fast.alpha_overlap, G, step / one, check / one)
    print(f"\ntarget, one token {1e3 * one:.2f} ms; draft, one token {1e3 * step:.3f} ms (c = "
          f"{step / one:.3f}); verifying {G + 1} tokens {1e3 * check:.2f} ms (t({G + 1})/t(1) = "
          f"{check / one:.2f}); a round {1e3 * (G * step + check):.2f} ms\naccepted/drafted "
          f"{fast.accepted_per_drafted:.3f}, alpha {fast.alpha_overlap:.3f}, tokens a round "
          f"{fast.tokens_per_round:.2f}; speed-up {rates['speculative'] / rates['plain']:.2f}, "
          f"predicted {predicted:.2f}")


if __name__ == "__main__":
    main()
