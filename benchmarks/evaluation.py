"""How fast is evaluate.py? Beside lm-evaluation-harness, on the same rows, in turns.

Both load the same checkpoint, tokenize the same requests and return their log-likelihoods, which
the table compares: a faster answer counts only if it is the same one. The harness is lm_eval's
HFLM over transformers (extra `peers`), at the batch size that is given.

    python benchmarks/evaluation.py CHECKPOINT --data DIR --tasks sciq,piqa --batch-size 64
"""
import argparse
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import encode, grade, positive, read_questions, score
from model import resolve_device
from speculative import load


def harness(folder: str, device: torch.device, dtype: str, batch_size: int):
    """A function from (context, continuation) pairs to their (log-likelihood, is greedy)."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ValueError("lm_eval is not installed: pip install -e '.[peers]'") from None
    model = HFLM(pretrained=folder, device=str(device), dtype=dtype, batch_size=batch_size,
                 add_bos_token=False)
    return lambda pairs: model.loglikelihood(
        [Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time evaluate.py beside the harness.")
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="folder with a folder of rows for each task")
    parser.add_argument("--tasks", default="sciq,winogrande,piqa,lambada_openai,arc_easy")
    parser.add_argument("--limit", type=positive, help="only the first rows")
    parser.add_argument("--batch-size", type=positive, default=64, help="of the harness")
    parser.add_argument("--repeats", type=positive, default=2, help="the best of these counts")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.error = lambda message: parser.exit(2, f"evaluation.py: error: {message}\n")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluation.py: error: {error}\n")


def run(args: argparse.Namespace) -> None:
    device = resolve_device(args.device)
    model, tokenizer = load(args.checkpoint, device, getattr(torch, args.dtype))
    theirs = harness(args.checkpoint, device, args.dtype, args.batch_size)
    max_len = model.config.max_position_embeddings
    print(f"{args.checkpoint}, {args.dtype}, " + (
        torch.cuda.get_device_name(device) if device.type == "cuda" else
        f"CPU, {torch.get_num_threads()} threads") + f", torch {torch.__version__}, the harness in "
        f"batches of {args.batch_size}\n| task | requests | harness s | ours s | ratio | largest "
        "difference of a log-likelihood | accuracies |\n|---|---:|---:|---:|---:|---:|---|")
    for name in args.tasks.split(","):
        questions = read_questions(Path(args.data), name)[:args.limit]
        pairs = [pair for question in questions for pair in question.requests]
        ours_best = theirs_best = float("inf")
        for repeat in range(args.repeats):
            began = time.perf_counter()
            ours = score(model, [request for question in questions
                                 for request in encode(question, tokenizer, False, max_len)])
            synchronize(device)
            middle = time.perf_counter()
            other = theirs(pairs)
            synchronize(device)
            ours_best = min(ours_best, middle - began)
            theirs_best = min(theirs_best, time.perf_counter() - middle)
        apart = max(abs(a - b) for (a, _), (b, _) in zip(ours, other))
        scores = [grade(questions, results)[0]["acc"] for results in (ours, other)]
        print(f"| {name} | {len(pairs)} | {theirs_best:.2f} | {ours_best:.2f} | "
              f"{theirs_best / ours_best:.2f} | {apart:.1e} | "
              + (f"{scores[0]:.4f}, equal" if scores[0] == scores[1] else
                 f"{scores[0]:.4f}, theirs {scores[1]:.4f}") + " |", flush=True)


if __name__ == "__main__":
    main()
