"""Whatever happens to a checkpoint's files, loading gives a model or one sentence.

    pytest tests/robustness/test_tampered_checkpoints.py
"""
import json
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from model import DTYPES, load_checkpoint, save_checkpoint

LONG, DEEP = "<a number of 5000 digits>", "<a list within lists>"      # json.dumps makes neither
JUNK = [None, True, False, 0, 1, -1, 2, 7, 1.5, 1e308, float("nan"), float("inf"), 2**31, 2**63,
        2**64, 10**400, "", "x" * 100_000, "F32", "F8_E4M3", "BOOL", "\ud800", "a\nb", [], {},
        [0], [0, 0], [0, 1, 2], [2**40, 2**40], [-1, -1], [0, 2**62], ["a"], [None], {"a": 1},
        {"rope_type": "linear"}, [[]], LONG, DEEP]


def dump(value, rng: random.Random) -> bytes:
    depth = rng.choice([50, 500, *range(900, 1000), 5000, 200_000])
    return (json.dumps(value).replace(json.dumps(LONG), "9" * 5000)
            .replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode())


def flip(blob: bytes, rng: random.Random, end: int) -> bytes:
    changed = bytearray(blob)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(min(end, len(blob)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def tamper_json(blob: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(["cut", "flip", "field", "field", "field", "drop", "nest"])
    if kind == "cut":
        return blob[:rng.randrange(len(blob))]
    if kind == "flip":
        return flip(blob, rng, len(blob))
    value = json.loads(blob)
    if kind == "nest":
        return dump(rng.choice([DEEP, {"a": DEEP}, LONG, *JUNK]), rng)
    name = rng.choice([*value, "rope_parameters", "rope_scaling", "head_dim"])
    value.pop(name, None)
    if kind == "field":
        value[name] = rng.choice(JUNK)
    return dump(value, rng)


def tamper_safetensors(blob: bytes, rng: random.Random) -> bytes:
    n = int.from_bytes(blob[:8], "little")
    text, data = blob[8:8 + n], blob[8 + n:]
    kind = rng.choice(["cut", "grow", "flip", "flip", "length", "json", "dtype", "shape", "offset",
                       "offset", "overlap", "junk", "junk"])
    if kind == "cut":
        return blob[:rng.choice([rng.randrange(16), rng.randrange(n + 8), rng.randrange(len(blob)),
                                 len(blob) - 1])]
    if kind == "grow":
        return blob + rng.randbytes(rng.choice([1, 8, 5000]))
    if kind == "flip":
        return flip(blob, rng, rng.choice([8, 8 + n, len(blob)]))
    if kind == "length":
        claimed = rng.choice([0, 1, n - 1, n + 1, len(blob) - 8, len(blob), 10**8, 10**8 + 1,
                              2**31, 2**63, 2**64 - 1])
        return claimed.to_bytes(8, "little") + blob[8:]
    if kind == "json":
        text = tamper_json(text, rng)
        return len(text).to_bytes(8, "little") + text + data
    header = json.loads(text)
    name = rng.choice([*header])
    entry = header[name]
    if kind == "dtype":
        entry["dtype"] = rng.choice([*DTYPES, "F8_E4M3", "f32", 3])
    elif kind == "shape":
        entry["shape"] = rng.choice([[n for n in entry.get("shape", [])][::-1], [0], [], [1] * 1000,
                                     [2**62, 4], entry.get("shape", []) + [0], *JUNK])
    elif kind == "offset":
        offsets = list(entry.get("data_offsets", [0, 0]))
        offsets[rng.randrange(2)] += rng.choice([-1, 1, 2, 64, -64, len(data), 2**40, 10**30])
        entry["data_offsets"] = offsets
    elif kind == "overlap":
        entry["data_offsets"] = header[rng.choice([*header])].get("data_offsets")
    else:
        (entry if rng.random() < 0.5 else header)[rng.choice([*entry])] = rng.choice(JUNK)
    text = dump(header, rng)
    return len(text).to_bytes(8, "little") + text + data


@contextmanager
def bounded_memory(extra: int = 2**29):
    """No more than half a gigabyte may be allocated within, where Linux does the counting."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file, tamper", [("model.safetensors", tamper_safetensors),
                                          ("config.json", tamper_json)])
def test_tampered_files_load_or_give_one_sentence(tiny, tmp_path, file, tamper, count):
    save_checkpoint(tiny(
        torch.float32, vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2), tmp_path)
    whole, loaded, refused = (tmp_path / file).read_bytes(), 0, 0
    for seed in range(count):
        (tmp_path / file).write_bytes(tamper(whole, random.Random(seed)))
        try:
            with bounded_memory():
                load_checkpoint(tmp_path)
            loaded += 1
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 2000, f"seed {seed}: {message[:300]}"
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{file} tampered with by seed {seed}: expected a ValueError, got "
                                 f"{type(error).__name__}") from error
    # Some changes harm nothing (a flipped weight, a field that is not ours); most must be seen.
    assert loaded > count / 50 and refused > count / 2, f"{loaded} loaded, {refused} refused"
