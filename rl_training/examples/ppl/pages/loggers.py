"""The report in what else shows the run: a file in Weights & Biases and trackio, its name in TensorBoard."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

NAME = "report"


def hand_over(path: Path, reporters: Sequence[str], step: int) -> None:
    """The finished page: an artifact of the run of Weights & Biases, a text of TensorBoard's run.

    path: of the page, in the run's output folder. reporters: GRPOConfig's `report_to`. step: the last one.
    """
    wandb = sys.modules.get("wandb")
    if "wandb" in reporters and wandb is not None and wandb.run is not None:
        artifact = wandb.Artifact(f"{NAME}-{wandb.run.id}", type=NAME)
        artifact.add_file(str(path))
        wandb.run.log_artifact(artifact)
    if "tensorboard" in reporters:
        from torch.utils.tensorboard import SummaryWriter

        logs = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or path.with_name("runs"))
        newest = max(logs.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
        with SummaryWriter(str(newest.parent)) as writer:  # a page of its own is more than its texts can show
            writer.add_text(NAME, f"Open [{path.name}]({path.resolve().as_uri()}) in a browser.", step)


def hand_to_trackio(path: Path, reporters: Sequence[str]) -> None:
    """The page as it is when training ends, an artifact of trackio's run: that is over before held-out prompts are
    measured again."""
    if "trackio" in reporters:
        import trackio

        trackio.log_artifact(path, name=NAME, type=NAME)
