"""compute_baselines_trl.py with a scorer that needs no model: python stub_baselines.py SECONDS_A_WINDOW [flags].

A row's numbers depend on its text alone, as a model's do.
"""

import hashlib
import sys
import time

import numpy as np

import compute_baselines_trl
from mlppl import cli
from mlppl.baselines.job import Scorer, compute
from mlppl.scoring.levels import Scores


def load(args, job, device, pause=0.0):
    def score(rows):
        time.sleep(pause)
        texts = [f"{row.prompt}|{row.reference}".encode() for row in rows]
        digits = np.array([list(hashlib.sha256(text).digest()[:3]) for text in texts])
        lengths = np.array([len(text) for text in texts])
        return Scores(1 + digits / 7, lengths, lengths + 1, int(lengths.max()) + 1)

    identity = {
        "target": args.target,
        "definitions": cli.reward_config(args).definitions,
        "prompt": job.form.identity,
        "tokenizer": "stub",
        "model": {"dtype": "float32", "quantization": "none", "weights": "stub", "name": args.model_name},
        "window": 512,
        "unsloth": False,
        "versions": {},
    }
    return Scorer(score, identity, "cpu")


def main(argv):
    pause = float(argv[0])
    args = compute_baselines_trl.parse_args(argv[1:])
    return cli.run(args, lambda args: compute(args, lambda *rest: load(*rest, pause=pause)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
