"""What tells one scorer from another: every weight, however it is kept, what its configuration does to logits, and the
surprisals of a fixed text; and nothing else."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
import toys
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from training_runs import EXAMPLES
from transformers import LlamaForCausalLM

from mlppl.baselines.file import Baselines
from mlppl.data import TINY_STORIES
from mlppl.errors import BaselineError, InputError
from mlppl.models import load_model
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.scoring.differences import FLOAT32_NATS, PROBE_NATS, differences
from mlppl.scoring.identity import describe_model
from mlppl.scoring.surprisal import SurprisalScorer, as_scorer


def weights(model) -> str:
    return describe_model(model)["weights"]


def apart(one, other) -> set:
    """What differs between two models, by name."""
    return set(differences(*({"model": SurprisalScorer(a, tokenizer=TOKENIZER).identity} for a in (one, other))))


TOKENIZER = toys.byte_level()
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def in_4bit():
    return load_model("tiny-stories", load_in_4bit=True)[0]


def test_the_last_value_of_the_last_tensor_counts_as_the_first_does():
    model = toys.llama()
    seen = {weights(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            for index in ((0,) * parameter.dim(), (-1,) * parameter.dim()):
                parameter[index] += 1e-3
                seen.add(weights(model))
    assert len(seen) == 1 + 2 * len(list(model.parameters()))


def test_a_change_of_4bit_weights_alone_is_seen(in_4bit):
    changed = copy.deepcopy(in_4bit)
    data = changed.model.layers[-1].mlp.down_proj.weight.data
    data.view(-1)[-1] ^= 1  # one code, by one step
    assert weights(changed) != weights(in_4bit)


def test_another_models_4bit_weights_are_another_models(tmp_path, in_4bit):
    """As a merged adapter leaves them: linear layers moved a little, everything else as it was."""
    model, tokenizer, _ = load_model("tiny-stories")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert weights(load_model(str(tmp_path), load_in_4bit=True)[0]) != weights(in_4bit)


def test_4bit_weights_repacked_for_a_cpu_are_the_same_weights(in_4bit):
    before, repacked = weights(in_4bit), load_model("tiny-stories", load_in_4bit=True)[0]
    packed = 0
    for parameter in repacked.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and not getattr(state, "packing_format_for_cpu", False):
            parameter.data, parameter.quant_state = _convert_weight_packed_for_cpu(parameter.data, state)
            packed += 1
    assert packed and weights(repacked) == before
    with torch.no_grad():  # where the CPU has the instructions, the first pass packs them
        in_4bit(input_ids=torch.tensor([[1, 2, 3]]))
    assert weights(in_4bit) == before


@pytest.mark.slow
def test_unsloth_and_transformers_make_the_same_4bit_model(in_4bit):
    asked = (
        "import json; from mlppl.models import *; from mlppl.scoring.surprisal import as_scorer; "
        "model, tokenizer, _ = load_model('tiny-stories', load_in_4bit=True, unsloth=True); "
        "print(json.dumps(as_scorer(model, tokenizer).identity))"
    )
    done = subprocess.run([sys.executable, "-c", asked], cwd=EXAMPLES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_unsloth = json.loads(done.stdout.splitlines()[-1])
    identity = as_scorer(in_4bit, load_model("tiny-stories")[1]).identity
    assert of_unsloth.keys() == identity.keys() and of_unsloth["config"].keys() == identity["config"].keys()
    assert differences({"model": of_unsloth}, {"model": identity}) == {}


def test_norms_cast_for_training_are_the_same_norms():
    model = toys.llama().to(torch.bfloat16)
    before = weights(model)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    assert model.model.norm.weight.dtype == torch.float32 and weights(model) == before


# --- the same model --------------------------------------------------------------------------------------------------


def reloaded(model, folder):
    """Saved in shards and loaded under another name."""
    model.save_pretrained(folder / "another name", max_shard_size="100KB")
    assert len(list((folder / "another name").glob("*.safetensors"))) > 1
    return type(model).from_pretrained(folder / "another name", dtype="auto")


def untied(model, folder):
    """A copy with an LM head of its own, as it was when it was one with the embedding."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    found = type(model)(config)
    found.to(model.dtype).load_state_dict(
        {**model.state_dict(), "lm_head.weight": model.model.embed_tokens.weight.clone()}
    )
    assert found.lm_head.weight is not found.model.embed_tokens.weight
    return found.eval()


def with_adapter(model, folder):
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=["lm_head"])).train()


def with_adapter_in_place(model, folder):
    return peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model)


def behind_a_prompt(model, folder):
    return peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


def eager(model, folder):
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [reloaded, untied, with_adapter, with_adapter_in_place, behind_a_prompt, eager])
def test_the_same_model_is_the_same(make, dtype, tmp_path):
    tied = make in (untied, reloaded)
    model, other = (toys.llama(tie_word_embeddings=tied).to(dtype) for _ in range(2))
    assert apart(model, make(other, tmp_path)) == set()


@pytest.mark.parametrize("scaling", [{}, {"factor": 2.0}], ids=["default", "linear"])
def test_a_rope_scaling_is_the_same_in_the_old_words_and_in_the_new(scaling, tmp_path):
    kind = "linear" if scaling else "default"
    toys.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    made = []
    for written in (
        {"rope_theta": 10000, "rope_scaling": {"type": kind, **scaling}},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": kind, **scaling}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **scaling}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **written}))
        made.append(LlamaForCausalLM.from_pretrained(tmp_path))
    assert [apart(made[0], one) for one in made] == [set()] * 3


def test_a_model_with_a_smaller_window_reads_the_beginning_of_the_text():
    model, smaller, other = (toys.llama(max_position_embeddings=size) for size in (512, 64, 64))
    with torch.no_grad():
        other.model.norm.weight *= 1.1
    sizes = [len(SurprisalScorer(one, tokenizer=TOKENIZER).identity["probe"]) for one in (model, smaller)]
    assert sizes == [511, 63]  # BOS is not scored
    assert apart(model, smaller) == set()
    assert apart(model, other) == {"weights", "probe"}


def test_what_it_costs():
    """One forward pass, of at most 512 tokens."""
    model, passes = toys.llama(max_position_embeddings=4096), []
    model.model.register_forward_pre_hook(lambda *args, **kwargs: passes.append(kwargs), with_kwargs=True)
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: passes.append(args[0].numel()))
    assert len(SurprisalScorer(model, tokenizer=TOKENIZER).identity["probe"]) == 511
    assert passes[1:] == [511]  # what the last token would predict is not read


# --- another one -----------------------------------------------------------------------------------------------------

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}, {"rope_parameters", "probe"}),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
         {"rope_parameters", "probe"}),
        ({"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, {"rope_parameters"}),
        ({"rope_parameters": {**ROPE, "rope_theta": 11000.0}}, {"rope_parameters", "probe"}),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps"}),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16},
         {"num_attention_heads", "num_key_value_heads", "head_dim", "probe"}),
        ({"hidden_act": "gelu"}, {"hidden_act", "probe"}),
    ],
)  # fmt: skip
def test_another_configuration_is_another_model(change, names, tmp_path):
    """In config.json, as model cards tell people to write it; the weights are as they were."""
    model, tokenizer, _ = load_model("tiny-stories")
    for file in TINY_STORIES.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    if "rope_scaling" in change:
        config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    other = load_model(str(tmp_path))[0]
    made = Baselines({"a": {"word": 2.0, "phrase": 2.0, "sentence": 2.0}}, None, "b.pkl")
    made.meta = MultiLevelPPLRewardFunction(model, tokenizer).identity
    here = MultiLevelPPLRewardFunction(other, tokenizer).identity
    assert set(differences(made.meta, here)) == names
    with pytest.raises(BaselineError) as caught:
        MultiLevelPPLRewardFunction(other, tokenizer, made)
    for name in names - {"probe"}:
        for side in (made.meta, here):
            assert f"{name} {side['model']['config'][name]}" in str(caught.value)


def swap(one, other):
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def rows(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.copy_(weight.roll(1, 0))


def conversion(model):
    """The classic mistake: the two halves of each head's dimensions are interleaved."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.copy_(weight.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64))


def values(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    swap(weight[0, 0], weight[-1, -1])


def values_far_apart(model):
    weight = model.model.embed_tokens.weight
    swap(weight[0], weight[1024])  # each first of as many values as are summed at a time


def signs(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    swap(weight[0, 0], weight[0, 1])  # which is minus the first


def tensors(model):
    swap(model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.gate_proj.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [rows, conversion, values, values_far_apart, signs, tensors])
def test_the_same_values_elsewhere_are_another_model(change, dtype):
    model = toys.llama().to(dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight.data = torch.randn(2048, 64, dtype=dtype)
        model.model.layers[1].mlp.up_proj.weight[0, 1] = -model.model.layers[1].mlp.up_proj.weight[0, 0]
        before = weights(model)
        change(model)
    assert weights(model) != before


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float16], ids=str)
def test_quantised_weights_in_buffers_count(dtype):
    """As GPTQ and AWQ keep them: no parameter of the layer is left."""
    seen = set()
    for place in (0, 1, -1, None):
        model = toys.llama()
        layer = model.model.layers[0].mlp.down_proj
        del layer.weight
        layer.register_buffer("qweight", torch.arange(64 * 16).reshape(64, 16).to(dtype))
        layer.register_buffer("scratch", torch.zeros(3), persistent=False)
        if place is not None:
            layer.qweight.view(-1)[place] += 1
        seen.add(weights(model))
        layer.scratch += 1  # what is not saved is no part of the model
        seen.add(weights(model))
    assert len(seen) == 4


def test_a_scale_of_4bit_weights_counts_and_so_does_where_codes_stand(in_4bit):
    codes = in_4bit.model.layers[0].mlp.down_proj.weight.data.view(-1)
    other = int((codes != codes[0]).nonzero()[0])

    def scale(weight):
        weight.quant_state.absmax = weight.quant_state.absmax.clone()
        weight.quant_state.absmax.view(-1)[-1] ^= 64

    def offset(weight):
        weight.quant_state.offset = weight.quant_state.offset * 1.01

    def places(weight):
        swap(weight.data.view(-1)[0], weight.data.view(-1)[other])

    seen = {weights(in_4bit)}
    for change in (scale, offset, places):
        changed = copy.deepcopy(in_4bit)
        change(changed.model.layers[0].mlp.down_proj.weight)
        seen.add(weights(changed))
    assert len(seen) == 4


def test_a_scale_of_8bit_weights_counts_before_and_after_the_first_pass(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    toys.llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    model, other = (AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config) for _ in range(2))
    before = weights(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert weights(model) == before
    other.model.layers[0].mlp.down_proj.weight.SCB[-1] *= 1.01
    assert weights(other) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_no_weight_and_no_field_shows_shows_in_the_text(dtype):
    model, other = (toys.llama().to(dtype) for _ in range(2))
    for layer in other.model.layers:
        layer.self_attn.scaling *= 8
    assert apart(model, other) == {"probe"}


def test_how_far_the_text_may_be_off():
    for dtype, nats in (("float32", FLOAT32_NATS), ("bfloat16", PROBE_NATS)):
        made = {"dtype": dtype, "quantization": "none", "probe": [1.0, float("inf"), 3.0]}
        for factor, names in ((0.9, set()), (1.1, {"probe"})):
            now = {**made, "probe": [1.0 + factor * nats, float("inf"), 3.0 - 2 * factor * nats]}
            assert set(differences({"model": made}, {"model": now})) == names
        for wrong in ([1.0, 2.0, 3.0], [1.0, float("nan"), 3.0], []):
            assert set(differences({"model": made}, {"model": {**made, "probe": wrong}})) == {"probe"}


def test_a_model_without_numbers_is_refused_in_one_line():
    model = toys.llama().half()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(InputError, match=r"LlamaForCausalLM in float16 are NaN for a plain text.*--dtype float32"):
        SurprisalScorer(model, tokenizer=TOKENIZER).identity  # noqa: B018
