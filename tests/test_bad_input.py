"""Every script, driven through what people get wrong: exit code 2, one line that names it, no traceback, no file."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from baseline_files import write

import compute_baselines_trl

COMPUTE = "compute_baselines_trl"

# (script, flags, words of the message). The files are those of the fixture `place`.
CASES = [
    (COMPUTE, "--num_sample 5", "unrecognized arguments: --num_sample 5"),
    (COMPUTE, "--batch_size 0", "--batch_size: '0', expected a whole number of at least 1"),
    (COMPUTE, "--batch_size nan", "--batch_size: 'nan', expected a whole number"),
    (COMPUTE, "--num_samples -3", "--num_samples: '-3', expected a whole number"),
    (COMPUTE, "--max_phrase_words 1.5", "max_phrase_words is '1.5', expected a whole number"),
    (COMPUTE, "--max_seq_length 0", "--max_seq_length: '0'"),
    (COMPUTE, "--max_seq_length 1", "--max_seq_length: '1', expected a whole number of at least 2"),
    (COMPUTE, "--max_phrase_words 999999999999999999999", "at most 1,000,000,000"),
    (COMPUTE, "--generate 1 --temperature 0", "--temperature: '0', expected a number above 0"),
    (COMPUTE, "--generate 1 --temperature nan", "--temperature: 'nan', expected a number above 0"),
    (COMPUTE, "--generate 1 --temperature inf", "--temperature: 'inf', expected a number above 0"),
    (COMPUTE, "--generate 1 --top_p 2", "--top_p is 2.0, expected a number from 0 to 1"),
    (COMPUTE, "--generate 1 --top_k few", "--top_k: invalid int value: 'few'"),
    (COMPUTE, '--generate 1 --generation_kwargs {"num_beams":2}', "--generation_kwargs holds 'num_beams'"),
    (COMPUTE, "--generate 1 --generation_kwargs min_p", "--generation_kwargs: 'min_p', expected a JSON object"),
    (COMPUTE, "--generate 1 --seed -1", "--seed: '-1', expected a whole number of at least 0"),
    (COMPUTE, "--generate 1 --seed 99999999999", "--seed: '99999999999'", "at most 4,294,967,295"),
    (COMPUTE, "--dtype float", "invalid choice: 'float'"),
    (COMPUTE, "--target prompt", "target is 'prompt', expected one of completion, reference"),
    (COMPUTE, "--aggregation mean", "aggregation is 'mean', expected one of geometric, nested"),
    (COMPUTE, "--output_path b.txt", "--output_path is 'b.txt', expected a file ending in .pkl, .json"),
    (COMPUTE, "--output_path nowhere/b.pkl", "the folder nowhere does not exist: make it first"),
    (COMPUTE, "--output_path folder.pkl", "folder.pkl is a folder"),
    (COMPUTE, "--output_path good.jsonl/b.pkl", "the folder good.jsonl does not exist"),
    (COMPUTE, "--output_path /proc/b.pkl", "cannot write in /proc"),
    (COMPUTE, "--output_path there.pkl", "there.pkl exists: replace it with --overwrite"),
    (COMPUTE, "--plot plot.bmp", "--plot is 'plot.bmp', expected a file ending in .png, .pdf, .svg"),
    (COMPUTE, "--plot nowhere/plot.png", "the folder nowhere does not exist"),
    (COMPUTE, "--output_dataset good.jsonl", "--output_dataset good.jsonl is a file: expected a folder"),
    (COMPUTE, "--output_dataset data", "--output_dataset data holds train.json, which is no part of it"),
    (COMPUTE, "--dataset_name nowhere.jsonl", "data set 'nowhere.jsonl' does not exist"),
    (COMPUTE, "--dataset_name ./nowhere", "data set './nowhere' does not exist"),
    (COMPUTE, "--dataset_name some/where", "Couldn't reach 'some/where' on the Hub", "without a network use a folder"),
    (COMPUTE, "--dataset_name folder.pkl", "doesn't contain any data files"),
    (COMPUTE, "--dataset_name rows.txt", "expected a file ending in .json, .jsonl, .csv or .parquet"),
    (COMPUTE, "--dataset_name damaged.json", "cannot load split 'train' of data set 'damaged.json'"),
    (COMPUTE, "--dataset_name scalar.json", "cannot load split 'train' of data set 'scalar.json'"),
    (COMPUTE, "--dataset_name damaged.parquet", "cannot load split 'train' of data set 'damaged.parquet'"),
    (COMPUTE, "--dataset_name damaged.json --streaming", "cannot read the data set: "),
    (COMPUTE, "--dataset_split dev", "tiny-stories has no split 'dev', it has train, test"),
    (COMPUTE, "--dataset_name data --dataset_split dev", 'Unknown split "dev"', "['train']"),
    (COMPUTE, "--dataset_name configs", "name one with --dataset_config: ['one', 'two']"),
    (COMPUTE, "--dataset_name configs --dataset_config three", "'three' not found", "['one', 'two']"),
    (COMPUTE, "--dataset_name empty.jsonl", "it holds no row"),
    (COMPUTE, "--dataset_name blank.jsonl", "none of the 2 rows", "has text in column completion"),
    (COMPUTE, "--dataset_name blank.jsonl --streaming", "none of the 2 rows"),
    (
        COMPUTE,
        "--prompt_column story",
        "--prompt_column is 'story', the data set has the columns id",
    ),
    (COMPUTE, "--reference_column answer", "--reference_column is 'answer', the data set has the columns"),
    (COMPUTE, "--id_column number", "--id_column is 'number', the data set has the columns"),
    (COMPUTE, "--dataset_name columns.jsonl", "no column prompt, query, text, input", "has story, number"),
    (COMPUTE, "--dataset_name columns.jsonl --prompt_column number", "row 0: column number holds 1, expected a string"),
    (
        COMPUTE,
        "--dataset_name columns.jsonl --prompt_column story --target reference",
        "--target reference needs a text",
    ),
    (COMPUTE, "--dataset_name twice.jsonl", "row 2 has the id 'a', as an earlier row has"),
    (COMPUTE, "--dataset_name no_id.jsonl", "row 1: column id holds None"),
    (COMPUTE, "--dataset_name chat.jsonl", "row 0: column prompt holds", "expected a string or chat messages"),
    (COMPUTE, "--model_name nowhere/at/all/", "'nowhere/at/all/'"),
    (COMPUTE, "--model_name smolm2", "no model folder is named 'smolm2': did you mean smollm2?"),
    (COMPUTE, "--model_name Tiny_Stories", "did you mean tiny-stories?"),
    (COMPUTE, "--model_name damaged_weight", "cannot load model 'damaged_weight': no such folder", "damaged_weights"),
    (COMPUTE, "--model_name ./nowhere", "model folder './nowhere' does not exist"),
    (COMPUTE, "--model_name folder.pkl", "'folder.pkl' is no model: expected a folder with config.json"),
    (COMPUTE, "--model_name without_weights", "model folder 'without_weights' holds no weights"),
    (COMPUTE, "--model_name damaged_weights", "cannot load model 'damaged_weights'"),
    (COMPUTE, "--model_name list_config", "list_config/config.json holds [], expected a JSON object"),
    (COMPUTE, "--model_name cut_generation_config", "cut_generation_config/generation_config.json is damaged"),
    (COMPUTE, "--model_name number_tokenizer_config", "tokenizer_config.json holds 3, expected a JSON object"),
    (COMPUTE, "--model_name nameless", "says base_model_name_or_path is None, expected the name of its model"),
    (COMPUTE, "--model_name slow", "'slow' has a slow tokenizer, CTRLTokenizer"),
    (COMPUTE, "--model_name more_tokens", "'more_tokens' has more tokens", "'<more 119>' is number 515", "0 to 511"),
    (COMPUTE, "--model_name model --dataset_name messages.jsonl", "the tokenizer has no chat template"),
    (COMPUTE, "--device cuda", "--device is 'cuda', which PyTorch has not here: leave it out"),
    (COMPUTE, "--device meta", "--device is 'meta', which PyTorch has not here"),
    (COMPUTE, "--device gpu", "--device is 'gpu', expected cpu, cuda or cuda:N"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    row = {"prompt": "Once", "completion": " upon a time"}

    def rows(name, *rows):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    rows("good.jsonl", row)
    rows("rows.txt", row)
    rows("data/train.json", row)
    rows("configs/one/train.jsonl", row)
    rows("configs/two/train.jsonl", row)
    configs = [
        f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/train.jsonl\n" for n in ("one", "two")
    ]
    (folder / "configs" / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    rows("empty.jsonl")
    rows("blank.jsonl", {"prompt": "Once", "completion": " \n"}, {"prompt": "upon", "completion": None})
    rows("columns.jsonl", {"story": "Once", "number": 1})
    rows("twice.jsonl", {**row, "id": "a"}, {**row, "id": "b"}, {"prompt": "Another", "completion": "row", "id": "a"})
    rows("no_id.jsonl", {**row, "id": "a"}, {**row, "id": None})
    rows("chat.jsonl", {"prompt": [{"role": "user", "text": "Hello"}], "completion": "Hi"})
    rows("messages.jsonl", {"prompt": [{"role": "user", "content": "Hello"}], "completion": "Hi"})
    (folder / "damaged.json").write_text('[{"prompt": "Once", "completion": "upon')
    (folder / "scalar.json").write_text("3")
    (folder / "damaged.parquet").write_bytes(b"PAR1" + bytes(100))
    (folder / "folder.pkl").mkdir()
    write(folder / "there.pkl", {"a": {"word": 1.0, "phrase": 1.0, "sentence": 1.0}}, {})

    toys.llama().save_pretrained(folder / "model")
    toys.byte_level().save_pretrained(folder / "model")
    for name in ("without_weights", "damaged_weights", "slow", "more_tokens"):
        shutil.copytree(folder / "model", folder / name)
    of_settings = {"list_config": "[]", "cut_generation_config": '{"eos_token_id": 2', "number_tokenizer_config": "3"}
    for name, text in of_settings.items():
        shutil.copytree(folder / "model", folder / name)
        (folder / name / f"{name.partition('_')[2]}.json").write_text(text)
    shutil.copytree(folder / "model", folder / "nameless")
    (folder / "nameless" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    toys.with_tokens(120).save_pretrained(folder / "more_tokens")
    (folder / "without_weights" / "model.safetensors").unlink()
    (folder / "damaged_weights" / "model.safetensors").write_bytes(b"\x10" + bytes(200))
    (folder / "slow" / "tokenizer.json").unlink()
    (folder / "slow" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    (folder / "slow" / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (folder / "slow" / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture
def folder(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return files


def listing(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[:2]))
def test_is_refused_in_one_line(folder, capfd, case):
    script, flags, *words = case
    before = listing(folder)
    module = importlib.import_module(script)
    try:
        code = module.main(flags.split())
    except SystemExit as error:  # argparse
        code = error.code
    output, error = capfd.readouterr()
    assert code == 2, output + error
    # With transformers imported by another test, its own progress bars cannot be silenced any more.
    lines = [line for line in error.splitlines() if line and not line.startswith("Loading weights")]
    assert len(lines) == 1 and lines[0].startswith("error: "), error
    for word in words:
        assert word in lines[0]
    assert output == "" and listing(folder) == before


def test_debug_shows_the_traceback(folder):
    from mlppl.errors import InputError

    with pytest.raises(InputError):
        compute_baselines_trl.main(["--dataset_name", "twice.jsonl", "--debug"])


@pytest.mark.parametrize("flags", [["--dataset_name", "damaged.json"], ["--model_name", "slow"]])
def test_as_a_user_runs_it(folder, flags):
    """In a process of its own, where nothing has been imported: what libraries print on their own is seen, too."""
    script = Path(compute_baselines_trl.__file__)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
