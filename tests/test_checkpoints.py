"""Claims about checkpoints: what the ecosystem writes loads here, and what we write loads there.

The tests against transformers and safetensors need the extra `peers` and are skipped without it.

    pytest tests/test_checkpoints.py
"""
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import model as model_script
from model import (DTYPES, Cache, ModelConfig, Transformer, load_checkpoint, read_config,
                   read_safetensors, rope, save_checkpoint, write_safetensors)

HEADS = {"MHA": {}, "grouped": {"num_key_value_heads": 2}, "tied": {"tie_word_embeddings": True},
         "grouped-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True}}


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("transformers", reason="needs the extra `peers` (transformers)")
    library.logging.set_verbosity_error()
    return library


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(found: Transformer, wanted: Transformer) -> None:
    assert found.config == wanted.config, "the config changed on its way through the folder"
    mine, other = found.state_dict(), wanted.state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name].dtype == other[name].dtype, f"{name} changed its type"
        assert torch.equal(mine[name], other[name]), f"{name} changed on its way"


def refusal(folder: Path) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises(ValueError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000, f"not one sentence: {message[:500]}"
    return message


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_shards(folder: Path, suffix: str) -> list[str]:
    """Replace a folder's model.safetensors by three shards and their index."""
    tensors = {name: tensor.clone() for name, tensor in
               read_safetensors(folder / "model.safetensors")}
    (folder / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    shards, weight_map = [f"{stem}-0000{i}-of-00003.{suffix}" for i in (1, 2, 3)], {}
    for i, shard in enumerate(shards):
        part = dict(list(tensors.items())[i::3])
        weight_map |= dict.fromkeys(part, shard)
        write_safetensors(folder / shard, part) if suffix == "safetensors" else torch.save(
            part, folder / shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return shards


# ------------------------------------------------------------------------------------- config.json

# As transformers 4.57 writes AMD-Llama-135m's and CodeLlama-7b's, and 5.23 the latter.
V4 = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
      "bos_token_id": 1, "eos_token_id": 2, "head_dim": 64, "hidden_act": "silu",
      "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 2048,
      "max_position_embeddings": 2048, "mlp_bias": False, "model_type": "llama",
      "num_attention_heads": 12, "num_hidden_layers": 12, "num_key_value_heads": 12,
      "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
      "tie_word_embeddings": False, "dtype": "bfloat16", "transformers_version": "4.57.6",
      "use_cache": True, "vocab_size": 32000}
CODE = {"head_dim": 128, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32016,
        "max_position_embeddings": 16384, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rope_theta": 1000000}
V5 = V4 | CODE | {"pad_token_id": None, "transformers_version": "5.23.0", "rope_parameters":
                  {"rope_theta": 1000000.0, "rope_type": "default"}}
del V5["rope_theta"], V5["rope_scaling"]


@pytest.mark.parametrize("written, preset", [(V4, "amd-135m"), (V4 | CODE, "codellama-7b"),
                                             (V5, "codellama-7b")])
def test_published_configs_are_the_presets(written, preset):
    assert read_config(dict(written)) == model_script.PRESETS[preset]


def test_absent_fields_have_transformers_defaults(transformers):
    few = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
           "num_attention_heads": 4}
    ours = read_config(few | {"model_type": "llama"})
    theirs = transformers.LlamaConfig(**few)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id",
                 "eos_token_id", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), f"another default of {name}"


@pytest.mark.parametrize("name, value", [
    ("factor 2.0", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("rope_type 'llama3'", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    ("rope_type 'yarn'", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
    ("partial_rotary_factor", {"rope_parameters": {"rope_theta": 1e4,
                                                   "partial_rotary_factor": 0.5}}),
    ("attention_bias", True), ("mlp_bias", True), ("model_type", "mistral"),
    ("hidden_act", "gelu"), ("sliding_window", 4096), ("head_dim", 16),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq", "bits": 4}})])
def test_what_is_not_computed_is_refused_by_name(tiny, tmp_path, name, value):
    save_checkpoint(tiny(), tmp_path)
    edit_config(tmp_path, **(value if isinstance(value, dict) else {name: value}))
    message = refusal(tmp_path)
    assert name in message and "not supported" in message, f"{name} is not named: {message}"


@pytest.mark.parametrize("text, message", [
    (None, "No such file"), ("{", "Expecting"), ("[]", "list"), ("{}", "lacks"),
    ('{"model_type": "llama"}', "lacks 'hidden_size'"),
    (json.dumps(V4 | {"num_key_value_heads": 5}), "multiple of num_key_value_heads 5"),
    (json.dumps(V4 | {"num_attention_heads": 0}), "division"),
    (json.dumps(V4 | {"hidden_size": "768"}), "unsupported operand")])
def test_broken_configs_say_what_is_wrong(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    found = refusal(tmp_path)
    assert message in found and "config.json" in found


@pytest.mark.parametrize("changes", [
    {"eos_token_id": [2, 7]}, {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 1.0}}, {"hidden_act": "swish"},
    {"rope_theta": 10000}, {"sliding_window": None, "quantization_config": None}])
def test_what_changes_nothing_loads(tmp_path, changes):
    assert read_config(V4 | changes) == model_script.PRESETS["amd-135m"], (
        f"{changes} computes what AMD-135M computes")


# ------------------------------------------------------------------------------------- the weights

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
def test_what_is_saved_loads_bit_for_bit(tiny, tmp_path, heads, dtype):
    model = tiny(dtype, bos_token_id=3, rope_theta=1e6, **HEADS[heads])
    save_checkpoint(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    loaded = load_checkpoint(tmp_path)
    assert_same(loaded, model)
    shared = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert shared == model.config.tie_word_embeddings, "a tied head must stay one parameter"
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    other = load_checkpoint(tmp_path, dtype=torch.float32)
    assert_same(other, model.float())


@pytest.mark.parametrize("form", ["safetensors shards", "bin", "bin shards"])
def test_every_form_of_weights_loads(tiny, tmp_path, form):
    model = tiny(torch.bfloat16, num_key_value_heads=2)
    save_checkpoint(model, tmp_path)
    if form == "bin":
        torch.save(weights(model), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    else:
        as_shards(tmp_path, form.split()[0])
    assert_same(load_checkpoint(tmp_path), model)


def test_redundant_tensors_of_old_checkpoints_are_passed_over(tiny, tmp_path):
    model = tiny(tie_word_embeddings=True)
    save_checkpoint(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    torch.save(model.state_dict() | frequencies, tmp_path / "pytorch_model.bin")   # with lm_head
    assert_same(load_checkpoint(tmp_path), model)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(tiny, tmp_path, form):
    model = tiny(torch.float32)                                 # head and embedding differ
    save_checkpoint(model, tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    if form == "bin":
        torch.save(weights(model), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    loaded = load_checkpoint(tmp_path)
    assert_same(loaded, model)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_pickles_from_before_zip_load(tiny, tmp_path):
    model = tiny(torch.float32)
    save_checkpoint(model, tmp_path)
    torch.save(weights(model), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "model.safetensors").unlink()
    assert_same(load_checkpoint(tmp_path), model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 268\n",
    b"/annex/objects/SHA256E-s268--1234.safetensors\n", None])
def test_pointers_are_called_pointers(tiny, tmp_path, name, content):
    save_checkpoint(tiny(torch.float32), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if content is None:             # git-annex's other form, before the file is fetched
        (tmp_path / name).symlink_to(".git/annex/objects/SHA256E-s268--1234")
    else:
        (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path)
    assert "Git LFS or Git-annex pointer" in message and name in message, message


def test_a_quantised_file_is_called_by_its_type(tiny, tmp_path):
    save_checkpoint(tiny(torch.float32), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F8" '))
    message = refusal(tmp_path)
    assert "F8" in message and "BF16" in message, message


def test_mixed_types_become_the_embeddings(tiny, tmp_path):
    model = tiny(torch.bfloat16)
    save_checkpoint(model, tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {
        name: tensor.float() if "norm" in name else tensor for name, tensor in
        weights(model).items()})
    loaded = load_checkpoint(tmp_path)
    assert_same(loaded, model)
    loaded(torch.tensor([[1, 2]]))      # one type throughout, or this would not run


def test_missing_surplus_and_misshaped_tensors_stand_in_one_error(tiny, tmp_path):
    model = tiny()
    save_checkpoint(model, tmp_path)
    tensors = weights(model)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(32, 48)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    message = refusal(tmp_path)
    for part in ('Missing key(s) in state_dict: "model.norm.weight"',
                 'Unexpected key(s) in state_dict: "model.layers.2.mlp.up_proj.weight"',
                 "size mismatch for model.layers.1.mlp.up_proj.weight", "[32, 48]", "[48, 32]"):
        assert part in message, f"{part!r} is not in: {message}"
    edit_config(tmp_path, num_hidden_layers=100)
    refusal(tmp_path)               # hundreds of names do not belong in one sentence


def test_shards_that_do_not_fit_are_refused(tiny, tmp_path):
    model = tiny()
    save_checkpoint(model, tmp_path)
    shards = as_shards(tmp_path, "safetensors")
    whole = (tmp_path / shards[1]).read_bytes()
    (tmp_path / shards[1]).unlink()
    assert "Missing key(s)" in refusal(tmp_path), "a shard is missing"
    (tmp_path / shards[1]).write_bytes((tmp_path / shards[0]).read_bytes())     # twice the same
    assert "Missing key(s)" in refusal(tmp_path)
    (tmp_path / shards[1]).write_bytes(whole[:-4])
    assert f"{shards[1]} cannot be used" in refusal(tmp_path), "a cut file is not named"
    for shard in shards:
        (tmp_path / shard).unlink()
    assert "none of model.safetensors" in refusal(tmp_path)


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_a_pickle_may_hold_tensors_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    save_checkpoint(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    for content in (weights(model) | {"model.norm.weight": Dangerous()}, Dangerous(), [1, 2],
                    weights(model) | {"model.norm.weight": 1.5}):
        torch.save(content, path)
        assert "pytorch_model.bin cannot be used" in refusal(tmp_path)
    assert not Path("it-ran").exists(), "loading a checkpoint ran code that came with it"
    torch.save(weights(model), path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "pytorch_model.bin cannot be used" in refusal(tmp_path), f"cut to {size} bytes"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_each_shard_is_opened_once(tiny, tmp_path, monkeypatch, suffix):
    save_checkpoint(tiny(torch.bfloat16), tmp_path)
    shards, opened = as_shards(tmp_path, suffix), []
    read = {"safetensors": "read_safetensors", "bin": "read_pickle"}[suffix]
    real = getattr(model_script, read)
    monkeypatch.setattr(model_script, read, lambda path: opened.append(path.name) or real(path))
    load_checkpoint(tmp_path)
    assert opened == shards, f"expected each shard once, opened {opened}"


MEASURE = """
import sys
import torch
from model import load_checkpoint

def status(key):        # in bytes
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status")
                if line.startswith(key))

before = status("VmRSS")
model = load_checkpoint(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
for parameter in model.parameters():        # a mapped page counts once it was read
    parameter.detach().flatten()[::512].sum()
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()), "sympy" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
@pytest.mark.parametrize("suffix, dtype", [("safetensors", "bfloat16"), ("safetensors", "float32"),
                                           ("bin", "bfloat16")])
def test_loading_takes_the_memory_of_the_weights(tmp_path, suffix, dtype):
    """CodeLlama-7b's proportions at a quarter of its width and depth: 235 MB in bf16."""
    config = ModelConfig(vocab_size=8004, hidden_size=1024, intermediate_size=2752,
                         num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    with torch.device("meta"):
        names = Transformer(config).named_parameters()
    write_safetensors(tmp_path / "model.safetensors", {
        name: torch.ones(p.shape, dtype=torch.bfloat16) for name, p in names})
    (tmp_path / "config.json").write_text(json.dumps(asdict(config) | {"model_type": "llama"}))
    as_shards(tmp_path, suffix)
    result = subprocess.run([sys.executable, "-c", MEASURE, tmp_path, dtype], text=True,
                            capture_output=True, check=True,
                            cwd=Path(model_script.__file__).parent)
    peak, size = map(int, result.stdout.split()[:2])
    assert 0.9 * size < peak < 1.1 * size, (
        f"loading took {peak / size:.2f} times the memory of the weights")
    assert result.stdout.split()[2] == "False", (
        "loading imports sympy, for over a second: something draws numbers on the meta device")


# ------------------------------------------------------------------------------------ safetensors

def one_of_each_type() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.{shape}": torch.randint(0, 100, shape, generator=generator).to(dtype)
            for name, dtype in DTYPES.items() for shape in ((), (3,), (2, 5), (1, 2, 3))}


def assert_equal_tensors(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name].dtype, found[name].shape) == (wanted[name].dtype, wanted[name].shape)
        assert torch.equal(found[name], wanted[name]), f"{name} came back with other values"


def test_safetensors_reads_what_we_write_and_the_reverse(tmp_path):
    library = pytest.importorskip("safetensors.torch",
                                  reason="needs the extra `peers` (safetensors)")
    tensors = one_of_each_type()
    write_safetensors(tmp_path / "ours", tensors)
    assert_equal_tensors(library.load_file(tmp_path / "ours"), tensors)
    with library.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers 4 opens no file without it"
    library.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt", "any": "thing"})
    assert_equal_tensors(dict(read_safetensors(tmp_path / "theirs")), tensors)


BYTES = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize("problem, header, size", [
    ("overlap", {"a": BYTES, "b": BYTES}, 4),
    ("hole", {"a": BYTES, "b": BYTES | {"data_offsets": [8, 12]}}, 12),
    ("hole at the start", {"a": BYTES | {"data_offsets": [4, 8]}}, 8),
    ("bytes left over", {"a": BYTES}, 5), ("cut", {"a": BYTES}, 3),
    ("offset beyond the end", {"a": BYTES | {"shape": [2**39], "data_offsets": [0, 2**40]}}, 4),
    ("end before start", {"a": BYTES | {"shape": [-2], "data_offsets": [0, -4]}}, 0),
    ("negative lengths", {"a": BYTES | {"shape": [-2, -1]}}, 4),
    ("a length that is no integer", {"a": BYTES | {"shape": [2.0]}}, 4),
    ("an offset that is no integer", {"a": BYTES | {"data_offsets": [0, 4.0]}}, 4),
    ("three offsets", {"a": BYTES | {"data_offsets": [0, 2, 4]}}, 4),
    ("another type's size", {"a": BYTES | {"dtype": "F32"}}, 4),
    ("unknown type", {"a": BYTES | {"dtype": "F8_E4M3"}}, 4),
    ("type of a wrong type", {"a": BYTES | {"dtype": ["F16"]}}, 4),
    ("no offsets", {"a": {"dtype": "F16", "shape": [2]}}, 4),
    ("no object", [BYTES], 4), ("no entry", {"a": None}, 4)])
def test_headers_that_do_not_describe_the_data_are_refused(tmp_path, problem, header, size):
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(ValueError, match="file cannot be used") as caught:
        with model_script.reading(tmp_path / "file"):
            list(read_safetensors(tmp_path / "file"))
    assert len(str(caught.value)) < 1000, f"{problem}: not one sentence"
    assert problem != "unknown type" or "F8_E4M3" in str(caught.value), "the type is not named"


@pytest.mark.parametrize("spaces", range(9))
def test_a_header_of_any_length_is_read(tmp_path, spaces):
    """Data that is out of alignment is legal, though no known writer makes it."""
    tensors = one_of_each_type()
    write_safetensors(tmp_path / "file", tensors)
    blob = (tmp_path / "file").read_bytes()
    n = int.from_bytes(blob[:8], "little")
    (tmp_path / "file").write_bytes((n + spaces).to_bytes(8, "little") + blob[8:8 + n]
                                    + b" " * spaces + blob[8 + n:])
    found = dict(read_safetensors(tmp_path / "file"))
    assert_equal_tensors(found, tensors)
    for name, tensor in found.items():
        assert tensor.data_ptr() % tensor.itemsize == 0, f"{name} lies across its alignment"


def test_changing_a_loaded_model_leaves_its_file_alone(tiny, tmp_path):
    model = tiny()
    save_checkpoint(model, tmp_path)
    with torch.no_grad():
        for parameter in load_checkpoint(tmp_path).parameters():
            parameter.zero_()
    assert_same(load_checkpoint(tmp_path), model)


def test_a_model_can_be_saved_over_the_file_it_is_mapped_from(tiny, tmp_path):
    save_checkpoint(tiny(), tmp_path)
    model = load_checkpoint(tmp_path)
    with torch.no_grad():
        model.model["norm"].weight.add_(1)
    save_checkpoint(model, tmp_path)
    assert_same(load_checkpoint(tmp_path), model)


# ------------------------------------------------------------------------------------ transformers

def peer(transformers, dtype: torch.dtype, rope_theta: float, **changes):
    """A random model of transformers, its weights large enough for every term to count."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, **{"num_key_value_heads": 4} | changes, bos_token_id=None,
        eos_token_id=None, max_position_embeddings=256, rms_norm_eps=1e-5, use_cache=True,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta})
    theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(float("norm" in name), 0.15, generator=generator)
    return theirs


@pytest.mark.parametrize("rope_theta", [1e4, 1e6])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_equal_transformers(transformers, tmp_path, monkeypatch, heads, rope_theta, dtype,
                                   tolerance):
    theirs = peer(transformers, dtype, rope_theta, **HEADS[heads])
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert ours.dtype == dtype
    if dtype == torch.float64:
        # transformers computes RoPE's angles and RMSNorm in float32 whatever the model's type is,
        # which alone is 3e-5 off. To compare all the rest to 1e-10, both are lent a float64 form.
        from transformers.models.llama import modeling_llama as llama

        def angles(self, x, position_ids):
            exponents = torch.arange(0, 16, 2, dtype=torch.float64) / 16
            half = position_ids[..., None] * rope_theta ** -exponents
            return torch.cat((half, half), -1).cos(), torch.cat((half, half), -1).sin()

        monkeypatch.setattr(llama.LlamaRotaryEmbedding, "forward", angles)
        monkeypatch.setattr(llama.LlamaRMSNorm, "forward", lambda self, x: self.weight * x / (
            x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt())
    tokens = torch.randint(97, (2, 256), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = theirs(tokens).logits          # 256 positions are the full context
        error = float((ours(tokens) - wanted).abs().max())
    assert wanted.std() > 0.3, "logits this small would agree by themselves"
    assert error < tolerance, f"{heads}, base {rope_theta:g}: logits are {error:.1e} off"


@pytest.mark.parametrize("rope_theta", [1e4, 1e6])
def test_rope_equals_transformers_bit_for_bit(transformers, rope_theta):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}))
    config = ModelConfig(hidden_size=256, num_attention_heads=2, num_key_value_heads=2,
                         rope_theta=rope_theta)
    positions = torch.arange(16384)[None]       # CodeLlama's whole context
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = rope(positions, config, dtype)
        sin = sin * torch.tensor([-1, 1]).repeat_interleave(64).to(dtype)   # ours has the signs in
        for ours, other in zip((cos, sin), theirs(torch.zeros(1, dtype=dtype), positions)):
            assert torch.equal(ours[:, :, 0], other), "at high positions 1 ulp of angle is a lot"


@pytest.mark.parametrize("heads", HEADS)
def test_transformers_opens_what_we_save_and_decodes_alike(transformers, tiny, tmp_path, heads):
    model = tiny(torch.float32, rope_theta=1e6, **HEADS[heads])
    save_checkpoint(model, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report.values()), f"transformers found fault with our folder: {report}"
    assert theirs.dtype == torch.float32
    for length in (1, 5):
        tokens = prompt = torch.arange(length)[None] + 7
        cache = Cache(model.config, 1, 60, dtype=torch.float32)
        with torch.no_grad():
            wanted = theirs.generate(prompt, max_new_tokens=40, do_sample=False,
                                     attention_mask=torch.ones_like(prompt))
            while tokens.shape[1] < length + 40:
                following = model(tokens[:, int(cache.position):], cache)[:, -1:].argmax(-1)
                cache.advance(tokens.shape[1] - cache.position)
                tokens = torch.cat((tokens, following), 1)
        assert tokens.tolist() == wanted.tolist(), "greedy decoding differs from transformers'"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_folders_of_transformers_load(transformers, tmp_path, dtype, shards):
    theirs = peer(transformers, dtype, 1e6, num_key_value_heads=2)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    ours = load_checkpoint(tmp_path)
    assert ours.config.rope_theta == 1e6 and ours.dtype == dtype
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), f"{name} differs"
    save_checkpoint(ours, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == dtype and again.config.rope_parameters["rope_theta"] == 1e6
    for name, tensor in again.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), f"{name} differs after a round trip"
