"""Every architecture of transformers' causal mapping that can be had as a toy has the numbers of the model alone."""

import os
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import toys
import zoo

from mlppl.errors import InputError
from mlppl.files import write_text
from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import Encoded

PARTS = 6
RANDOM = np.random.default_rng(0)
PREFIX = RANDOM.integers(3, toys.VOCABULARY, 40)


def text(ids, context):
    scored = np.arange(context, len(ids))
    return Encoded(np.array(ids), scored, scored)


# Short and long ones, and completions of one prompt, long enough to be worth sharing.
TEXTS = [text(RANDOM.integers(3, toys.VOCABULARY, size), 1) for size in (2, 5, 17)]
TEXTS += [text([*PREFIX, *RANDOM.integers(3, toys.VOCABULARY, size)], len(PREFIX)) for size in (3, 8, 8, 12)]


def result(name) -> str:
    """What becomes of an architecture. Fails for numbers that are not the model's own."""
    try:
        model = zoo.toy(name)
    except Exception as error:  # configurations that need more than sizes, or packages
        return f"not built: {type(error).__name__}"
    scorer, cached = SurprisalScorer(model), []
    getattr(model, model.base_model_prefix, model).register_forward_pre_hook(
        lambda module, args, kwargs: cached.append(bool(kwargs.get("use_cache"))), with_kwargs=True
    )
    try:
        together = scorer.score(TEXTS)
    except InputError as error:
        assert "is not causal" in str(error)
        return "refused"
    shared = sum(cached) > 2  # a probe takes two passes with a cache
    for found, one in zip(together, TEXTS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(one.ids[None]), use_cache=False).logits[0].float().log_softmax(-1)
        expected = -logits[one.positions - 1, one.ids[one.positions]].double().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=name)
    return f"{scorer.way}, prefix shared" if shared else scorer.way


@pytest.fixture(scope="module")
def result_of(tmp_path_factory) -> Callable[[str], str]:
    """`result` of a name; all processes of pytest-xdist share what one has tried."""
    own = tmp_path_factory.getbasetemp()
    tried = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "architectures"
    tried.mkdir(exist_ok=True)

    def once(name: str) -> str:
        path = tried / name
        if not path.exists():
            write_text(path, result(name))
        return path.read_text(encoding="utf-8")

    return once


@pytest.mark.parametrize("part", range(PARTS))
def test_a_mixed_batch_has_the_numbers_of_each_text_alone(part, result_of):
    for name in sorted(zoo.NAMES)[part::PARTS]:
        result_of(name)


def test_how_many_architectures_go_which_way(capsys, result_of):
    """The numbers that the README has; later versions of transformers bring more."""
    results = {name: result_of(name) for name in zoo.NAMES}
    counts = Counter(one.partition(":")[0] for one in results.values())
    built = len(results) - counts["not built"]
    exact = built - counts["refused"]
    with capsys.disabled():
        print(f"\n{len(results)} types, {built} built as toys: {exact} exact, {counts['refused']} refused")
        for name, count in counts.most_common():
            print(f"  {count:4} {name}: {', '.join(sorted(one for one in results if results[one].startswith(name)))}")
    assert built >= 150 and exact >= 143 and counts["packed"] >= 58
    assert counts["by its own logits"] <= 15 and counts["row by row"] <= 2 and counts["refused"] <= 8
