"""What is gone is refused by its name, with what to use instead: as a flag, in a YAML file, as a Python keyword."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from written_down import MODEL, TOKENIZER, levels

import compute_baselines_trl
import multi_level_ppl_trl
import train_grpo_multilevel_unsloth
from mlppl.baselines.file import Baselines, check_meta
from mlppl.baselines.job import prepare
from mlppl.errors import BaselineError, InputError
from mlppl.reward.configured import read_settings
from multi_level_ppl_trl import MultiLevelPPLCalculator, MultiLevelPPLRewardFunction

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


# name, values that ask for what is gone, the one that never asked for anything
SETTINGS = [
    ("reference_tokens", ["hard", "group"], "all"),
    ("interpolate", [True], False),
    ("normalize_rewards", [True], False),
    ("openings", [True], False),
]


@pytest.mark.parametrize(("name", "asking", "usual"), SETTINGS)
def test_settings_that_are_gone(capsys, tmp_path, name, asking, usual):
    for value in asking:
        words = [f"--{name}"] if value is True else [f"--{name}", value]
        for script in SCRIPTS:
            assert f"--{name}: retired in 0.2: " in refused(capsys, script, *words)
        assert f"--{name}: retired in 0.2: " in refused(capsys, TRAINING, "--config", config(tmp_path, **{name: value}))
        for make in (
            lambda value=value: MultiLevelPPLRewardFunction(MODEL, TOKENIZER, **{name: value}),
            lambda value=value: read_settings(config(tmp_path, model_name="tiny-stories", **{name: value})),
        ):
            with pytest.raises(InputError, match=rf"{name} is {value!r}: retired in 0\.2: "):
                make()


@pytest.mark.parametrize(("name", "asking", "usual"), SETTINGS)
def test_a_file_of_before_that_asked_for_nothing_is_read(tmp_path, name, asking, usual):
    """Every `training_config.yaml` of before holds every setting."""
    assert not hasattr(TRAINING.parse_args(["--config", str(config(tmp_path, **{name: usual}))])[0], name)
    assert name not in read_settings(config(tmp_path, model_name="tiny-stories", **{name: usual}))
    MultiLevelPPLRewardFunction(MODEL, TOKENIZER, **{name: usual})


def test_baselines_of_a_part_of_the_references_tokens_are_refused_and_of_all_of_them_read():
    identity = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, target="reference").identity
    assert "reference_tokens" not in identity["definitions"]

    def made_of(tokens):
        meta = {**identity, "definitions": {**identity["definitions"], "reference_tokens": tokens}}
        return Baselines({"a": levels(9.0)}, meta, "b.pkl")

    check_meta(made_of("all"), identity)
    with pytest.raises(BaselineError, match=r"with reference_tokens hard;.*has reference_tokens all: make the right"):
        check_meta(made_of("hard"), identity)


def test_baselines_as_parquet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b.parquet").write_bytes(b"PAR1")
    said = r"b\.parquet'?: retired in 0\.2: use \.pkl or \.json, or a data set .*--output_dataset"
    for refuse in (
        lambda: Baselines.load("b.parquet"),
        lambda: MultiLevelPPLRewardFunction(MODEL, TOKENIZER, "b.parquet"),
        lambda: read_settings(config(tmp_path, model_name="tiny-stories", baselines="b.parquet")),
        lambda: prepare(compute_baselines_trl.parse_args(["--output_path", "b.parquet"])),
    ):
        with pytest.raises(InputError, match=said):
            refuse()
