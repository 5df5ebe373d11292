"""A fixed text, whose surprisals tell one scorer from another. `ppl.identity.differences` compares them."""

from .batching import Row, windows
from .tokens import Encoded, TextEncoder

# Of hundreds of tokens that refer to one another from afar, so that how a model counts positions shows.
PROBE = (
    'Once upon a time, in the year 1850, there was a small fox. "Why," she asked, "is the sea so far from here?" '
    "Nobody knew, so she packed bread and cheese, and walked north until the river became a road.\n\n"
    "On the third day she met an old miller named Thomas, who had 12 sacks of flour and no horse. The fox offered to "
    'carry one sack to the market if he would tell her the way. "Follow the river," said Thomas, "because every '
    'river ends in the sea." But the fox had lost the river two days ago, and she was too proud to say so.\n\n'
    "At the market a woman sold maps for 3 coins each. The fox had no coins; she had only bread, cheese and one sack "
    "of flour that belonged to Thomas. So she walked back to the mill, gave Thomas his flour, and asked him for work. "
    "In spring she bought a map, followed the river, as Thomas had told her, and in the summer of 1851 she stood "
    "before the sea."
)
_MOST = 512  # tokens, for tokenizers that cut a text into small pieces


def encode_probe(tokenizer) -> Encoded:
    """The text as a model with this tokenizer reads it."""
    return TextEncoder(tokenizer, eos_for_bos=True).encode([""], [PROBE])[0]


def probe_row(probe: Encoded, window: int | None) -> Row:
    """The beginning of it, as one row for a model that takes at most `window` tokens (None: no limit).

    What a small window leaves of the text is the beginning of what a larger one does.
    """
    return next(windows(probe, min(_MOST, window or _MOST), 0))
