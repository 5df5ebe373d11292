"""Run by test_surprisal.py: python score_beside_unsloth.py alone|beside FOLDERS prints what models of transformers
give, alone or in one process with a policy of Unsloth's that is being trained."""

import json
import sys

import torch
import toys

torch.set_num_threads(1)


def main(where: str, *folders: str) -> None:
    if where == "beside":
        import unsloth  # noqa: F401  before what it patches
    from mlppl.models import add_lora, load_model
    from mlppl.scoring.surprisal import SurprisalScorer
    from mlppl.scoring.tokens import TextEncoder

    if where == "beside":
        policy, _, reason = load_model("tiny-stories", load_in_4bit=True, unsloth=True)
        assert reason is None, reason
        policy = add_lora(policy, 4, 8, 0, unsloth=True).train()
        ids = torch.tensor([[5, 6, 7, 8]])
        policy(input_ids=ids, labels=ids).loss.backward()
    found = {}
    for folder in folders:
        model, tokenizer, _ = load_model(folder)
        scorer = SurprisalScorer(model, tokenizer=tokenizer)
        contexts = [" ".join(toys.SENTENCES)] * 4 + [""] * 4
        encoded = TextEncoder(tokenizer).encode(contexts, [f" {text}" for text in toys.SENTENCES] * 2)
        surprisals = [one.tolist() for one in scorer.score(encoded)]
        found[folder] = {"surprisals": surprisals, "way": scorer.way, "identity": scorer.identity}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
