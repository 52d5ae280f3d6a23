"""Folders that transformers writes for Llama's relatives evaluate and decode here as they do there.

SmolLM2-, TinyLlama- and Llama-3-shaped: small, with random weights and the kind of tokenizer that
each family has (GPT-2's byte-level BPE, Llama-2's SentencePiece, tiktoken's).
"""
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
from test_tokenizer import known_kind

transformers = pytest.importorskip("transformers", reason="transformers (the extra `peers`) is not "
                                   "installed")
FAMILIES = {
    "smollm2": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 100000.0},
    "tinyllama": {"num_key_value_heads": 1, "tie_word_embeddings": False, "rope_theta": 10000.0},
    "llama3": {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_theta": 500000.0},
}
ROWS = [{"goal": f"Cut {i} slices\nof an aubergine", "sol1": "Use a saw.", "sol2": "Use the knife,"
         " don't saw.", "label": i % 2} for i in range(4)]
PROBLEM = {"task_id": "T/0", "prompt": "def f(x):\n    ", "test": "", "entry_point": "f"}


def tokenizer_of(family: str, folder: Path):
    """What transformers opens; its files lie in the folder."""
    if family == "tinyllama":
        if "LLAMA2_TOKENIZER" not in os.environ:
            pytest.skip("LLAMA2_TOKENIZER is not set: a tokenizer.model of SentencePiece")
        shutil.copy(os.environ["LLAMA2_TOKENIZER"], folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
             "add_bos_token": True}))
    else:
        known_kind(family, folder)
        config = folder / "tokenizer_config.json"
        ends = json.loads(config.read_text()) if config.exists() else {
            "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        config.write_text(json.dumps(ends | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """(a folder that transformers wrote, its model, its tokenizer, text -> ids without BOS)"""
    (tmp_path / "tokenizer").mkdir()
    tokenizer = tokenizer_of(request.param, tmp_path / "tokenizer")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        **FAMILIES[request.param])).eval()
    folder = tmp_path / request.param
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if request.param != "tinyllama":
        return folder, model, tokenizer, lambda text: tokenizer.encode(
            text, add_special_tokens=False)
    # TinyLlama's repository has the tokenizer.model, which transformers 5 does not save. What it
    # makes of one is not SentencePiece's: "\n  sum" becomes "\n", "  ", "sum".
    file = shutil.copy(tmp_path / "tokenizer" / "tokenizer.model", folder)
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece (the extra `peers`)")
    return folder, model, tokenizer, spm.SentencePieceProcessor(str(file)).encode


def test_a_folder_of_transformers_gets_the_likelihoods_of_transformers(family, tmp_path):
    folder, model, _, encode = family
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "val.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    evaluate.main([str(folder), "--tasks", "piqa", "--data", str(tmp_path), "--json",
                   str(tmp_path / "run.json")])
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    for row, record in zip(ROWS, rows):
        for solution, ours in zip((row["sol1"], row["sol2"]), record["log_likelihoods"]):
            context = f"Question: {row['goal']}\nAnswer:"
            start = len(encode(context))
            ids = torch.tensor([encode(f"{context} {solution}")])
            with torch.no_grad():
                logp = model(ids).logits.log_softmax(-1)
            theirs = logp[0, start - 1:-1].gather(-1, ids[0, start:, None]).sum()
            # float32 sums of some ten terms, in another order
            assert abs(ours - float(theirs)) < 1e-3 * max(1.0, abs(ours)), "another likelihood"


def test_a_folder_of_transformers_decodes_what_transformers_does(family, tmp_path):
    folder, model, tokenizer, encode = family
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(
        gzip.compress(json.dumps(PROBLEM).encode()))
    evaluate.main(["humaneval", "--target", str(folder), "--draft", str(folder), "--data",
                   str(tmp_path), "--max-new-tokens", "12", "--json", str(tmp_path / "run.json")])
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    bos = [tokenizer.bos_token_id] * (folder.name != "smollm2")     # as each family does it
    ids = torch.tensor([bos + encode(evaluate.ONE_SHOT + PROBLEM["prompt"])])
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    theirs = tokenizer.decode(new[ids.shape[1]:], clean_up_tokenization_spaces=False)
    expected = evaluate.amd_cut(theirs)
    texts = {row["task"]: row["completion"] for row in rows}
    assert texts["greedy alone"] == texts["greedy speculative"] == expected
