"""The reward as a YAML file describes it, for programs that only take the name of a function: TRL's command line, and
other engines through `engines/reward.py`. The environment variable PPL_REWARD_CONFIG names the file."""

import os
import threading
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import yaml

from .. import cli
from ..config import ALIASES, DTYPES, RewardConfig, did_you_mean
from ..data import read_shown
from ..errors import SETTINGS as RETIRED
from ..errors import InputError, one_of, without_retired
from ..models import load_model, load_tokenizer, model_path
from ..prompts import read_template, read_tools
from .function import MultiLevelPPLRewardFunction

VARIABLE = "PPL_REWARD_CONFIG"
LOADING = ("load_in_4bit", "dtype", "device", "max_seq_length")  # how a model is loaded in this process
REWARD = [one.name for one in fields(RewardConfig)]
# Every name that a file may hold.
NAMES = ["model_name", "scorer_url", "policy", "baselines", "use_cache", "chat_template_path", *LOADING, *REWARD]
NAMES += ["batch_size", "max_batch_tokens", "chat_template_kwargs", "tools", "examples", "others", "prompt_template"]

_loading = threading.Lock()
_loaded: dict[str, MultiLevelPPLRewardFunction] = {}


def multi_level_ppl(prompts, completions, **columns) -> list[float | None]:
    """The reward that PPL_REWARD_CONFIG describes, as a function in TRL's calling convention.

        trl grpo --reward_funcs multi_level_ppl_trl.multi_level_ppl ...

    See `MultiLevelPPLRewardFunction`. The model is loaded at the first call, once a process.
    """
    return reward_from_config()(prompts, completions, **columns)


def reward_from_config(path: str | Path | None = None) -> MultiLevelPPLRewardFunction:
    """The reward that the file describes: made at the first call in a process, whatever the thread, then the same one.

    path: the YAML file; None: what PPL_REWARD_CONFIG names. Raises `InputError` if it describes none.
    """
    key = os.path.realpath(config_path(path))
    with _loading:
        if key not in _loaded:
            _loaded[key] = _make(key)
        return _loaded[key]


def config_path(path: str | Path | None = None) -> str:
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise InputError(f"the environment variable {VARIABLE} is not set: expected the name of the reward's YAML file")
    return str(path)


def read_settings(path: str | Path | None = None) -> dict:
    """The settings in the YAML file, names and values checked as far as that goes without the model.

    Paths in it are relative to the file's folder. `model_name` is `load_model`'s name; `load_in_4bit`, `dtype`,
    `device` and `max_seq_length` are its keywords, all others those of `MultiLevelPPLRewardFunction`. With
    `scorer_url`, the address of a server of vLLM, `model_name` is what it serves, and only its tokenizer is loaded.
    `policy` is the model that is trained where that is another one: its tokenizer is loaded, and what ends its texts.
    """
    path = Path(config_path(path))
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{VARIABLE} {path}: {' '.join(str(error).split())}: expected a YAML file") from error
    if not isinstance(settings, dict) or "model_name" not in settings:
        raise InputError(f"{path}: expected 'name: value' lines, model_name among them, found {settings!r:.80}")
    aliases = {**ALIASES, "baselines_path": "baselines"}
    settings = {aliases.get(name, name): value for name, value in settings.items()}
    others = [name for name in settings if name not in NAMES and name not in RETIRED]
    known = _of_scripts() if others else set()
    if unknown := [name for name in others if name not in known]:
        raise InputError(f"{path}: unknown setting {unknown[0]!r}{did_you_mean(unknown[0], NAMES)}")
    try:
        RewardConfig.of({name: value for name, value in settings.items() if name in REWARD or name in RETIRED})
        for name in ("load_in_4bit", "use_cache"):
            if not isinstance(settings.get(name) or False, bool):
                raise InputError(f"{name} is {settings[name]!r}, expected true or false")
        settings = {name: value for name, value in without_retired(settings).items() if name in NAMES}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    settings = {name: value for name, value in settings.items() if value is not None}
    one_of(f"{path}: dtype", settings.get("dtype", "auto"), DTYPES)
    if isinstance(settings.get("baselines"), str):
        settings["baselines"] = str(path.parent / settings["baselines"])
        if not os.path.exists(settings["baselines"]):
            raise InputError(f"{path}: baselines {settings['baselines']} do not exist: see compute_baselines_trl.py")
    if isinstance(settings.get("chat_template_path"), str):
        settings["chat_template_path"] = str(path.parent / settings["chat_template_path"])
        read_template(settings["chat_template_path"])
    if isinstance(settings.get("tools"), str):  # a file, as --tools names it
        settings["tools"] = read_tools(str(path.parent / settings["tools"]))
    for name in ("examples", "others"):
        if isinstance(settings.get(name), str) and not settings[name].isdecimal():
            settings[name] = read_shown(path.parent / settings[name])
        elif name in settings and name == "others":
            raise InputError(f"{path}: {name} is {settings[name]!r:.40}, expected the name of a file of rows")
    if not isinstance(settings.get("examples", []), list):  # a number, for the scripts, which have the data set
        raise InputError(
            f"{path}: examples is {settings['examples']!r}, expected the name of the file of rows that "
            "compute_baselines_trl.py wrote beside the baselines"
        )
    served = settings.get("scorer_url") is not None
    if served and (idle := [name for name in LOADING if name in settings]):
        raise InputError(
            f"{path}: scorer_url scores with the model as its server loaded it: leave out {', '.join(idle)}"
        )
    for name in ("model_name", "policy"):
        if str(settings.get(name, "")).startswith("."):
            settings[name] = str(path.parent / settings[name])
    if not served:
        try:
            model_path(settings["model_name"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return settings


def _of_scripts() -> set[str]:
    """What else a file may hold that the scripts read with --config: it is passed over here."""
    flags = cli.flags_of(cli.add_training_flags) | cli.flags_of(cli.add_baseline_flags)
    return {flag.removeprefix("--") for flag in flags} | cli.grpo_fields()


def _make(path: str) -> MultiLevelPPLRewardFunction:
    settings = read_settings(path)
    if url := settings.pop("scorer_url", None):
        from ..scoring.server import connect

        model, tokenizer = connect(str(url), str(settings.pop("model_name")), settings.pop("chat_template_path", None))
        return _of(path, model, tokenizer, settings)
    loading = {name: settings.pop(name) for name in (*LOADING, "chat_template_path") if name in settings}
    model, tokenizer, _ = load_model(settings.pop("model_name"), **loading)
    return _of(path, model, tokenizer, settings)


def _of(path: str, model, tokenizer, settings: dict) -> MultiLevelPPLRewardFunction:
    try:
        if name := settings.pop("policy", None):
            written_by, generation_config = load_tokenizer(str(name), "of the model that is trained")
            settings["policy"] = SimpleNamespace(generation_config=generation_config), written_by
        return MultiLevelPPLRewardFunction(model, tokenizer, **settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
