"""Tables that many files need: what there is to choose from, and what is chosen where nobody says. Imports nothing."""

LEVELS = ("word", "phrase", "sentence")
BASELINE_COLUMNS = tuple(f"baseline_{level}" for level in LEVELS)  # of a data set that carries its baselines

# Choices
AGGREGATIONS = ("geometric", "nested")
TARGETS = ("completion", "reference")
FORMS = ("thresholds", "nats")  # of the reward
MISSING = ("error", "skip")  # what to do with a row without a baseline
DTYPES = ("auto", "float32", "bfloat16", "float16")

# What two numbers must share, where nobody says otherwise
DEFAULT_PHRASE_WORDS = 4
DEFAULT_LANGUAGE = "en"
DEFAULT_AGGREGATION = "geometric"
DEFAULT_TARGET = "completion"
DEFAULT_TEMPLATE = "{prompt}{completion}{reference}"
DEFAULT_PROMPT_TEMPLATE = "{prompt}"

# From improvement to reward
# By aggregation, of word, phrase and sentence. Nested levels are alike: a weight above another one pays for words that
# surprise by themselves (studies/README.md).
DEFAULT_WEIGHTS = {name: (1.0, 1.0, 1.0) if name == "nested" else (0.2, 0.3, 0.5) for name in AGGREGATIONS}
# (improvement in %, reward), as the guide that this project began with has them. Those of VR-CLI (Gurung & Lapata,
# https://arxiv.org/abs/2503.22828) are (0.05, 0.5), (1, 0.9), (2, 1).
DEFAULT_THRESHOLDS = ((0.05, 0.2), (0.5, 0.5), (1.0, 0.7), (2.0, 0.9), (3.0, 1.0))

NATS_CLIP = 0.5  # how far form="nats" goes from 0: a perplexity that is 39 % lower or 65 % higher

# Of sampling, for baselines as in training
DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_TEMPERATURE = 1.0
DEFAULT_SEED = 42

# In plots. Distinguishable by people who see red and green alike, and in grey.
COLORS = {"word": "#0072b2", "phrase": "#e69f00", "sentence": "#444444"}
