"""What is gone is refused by its name, with what to use instead: as a flag, in a YAML file, as a Python keyword."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from written_down import MODEL, TOKENIZER

import compute_baselines_trl
import multi_level_ppl_trl
import train_grpo_multilevel_unsloth
from multi_level_ppl_trl import MultiLevelPPLCalculator, MultiLevelPPLRewardFunction
from ppl.errors import InputError
from ppl.reward.config import read_settings

SCRIPTS = [compute_baselines_trl, train_grpo_multilevel_unsloth, multi_level_ppl_trl]
TRAINING = train_grpo_multilevel_unsloth
AGGREGATION = "retired in 0.2: use nested (or geometric)"


def refused(capsys, script, *words) -> str:
    with pytest.raises(SystemExit) as exit:
        script.parse_args(list(map(str, words)))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def config(tmp_path, **settings) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("name", ["selective", "arithmetic"])
def test_aggregations_that_nested_replaces(capsys, tmp_path, name):
    for script in SCRIPTS:
        assert AGGREGATION in refused(capsys, script, "--aggregation", name)
    assert AGGREGATION in refused(capsys, TRAINING, "--config", config(tmp_path, aggregation=name))
    for make in (
        lambda: MultiLevelPPLCalculator(TOKENIZER, aggregation=name),
        lambda: MultiLevelPPLRewardFunction(MODEL, TOKENIZER, aggregation=name),
        lambda: read_settings(config(tmp_path, model_name="tiny-stories", aggregation=name)),
    ):
        with pytest.raises(InputError, match=rf"aggregation is '{name}': retired in 0\.2: use nested \(or geometric\)"):
            make()


def test_a_script_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, compute_baselines_trl.__file__, "--aggregation", "selective", "--output_path", "b.pkl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert AGGREGATION in done.stderr and not list(tmp_path.iterdir())
