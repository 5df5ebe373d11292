"""Made-up files and flags are read or refused; `fuzzed.py` makes a hundred thousand of them."""

import fuzzed


def test_made_up_files_and_flags_are_read_or_refused():
    outcomes, wrong = fuzzed.fuzz(500, seed=1)
    assert wrong == []
    assert outcomes.total() == 500
    for kind in ("flags", "pickle", "json", "meta"):
        assert outcomes[kind, "read"] and outcomes[kind, "refused"], kind
