"""Text and model -> the perplexity of its words, phrases and sentences. Imports no other wing; only an explained text
that is shown imports pages.

calculator.py  the whole way: texts and a model -> the perplexity of each level
units.py       text -> sentences, words, phrases, as character offsets
word_breaks.py where Unicode has a word boundary
tokens.py      context and target -> ids, which of them are scored, their characters
decoding.py    sampled ids -> their text, and where in it each token begins
seams.py       the space that a completion lost when it was decoded by itself
batching.py    windows, shared prefixes, packs, batches: integers only
surprisal.py   the only forward pass: which way it goes, and what it gives each token
results.py     what the rows gave, a text's values put together
window.py      how many tokens a model takes at once
packed.py      rows end to end in one sequence, each blind to its neighbours
probe.py       the fixed text whose surprisals tell one scorer from another
scorer.py      what calculator and reward know of a scorer, in this process or behind an address
server.py      the scorer behind an address: a server of vLLM
padded.py      where a model cannot be packed: rows in a padded batch, behind a cache of their prefix
head.py        hidden states -> surprisals, a piece of the vocabulary at a time
devices.py     arrays to the device of a model
onednn.py      faster matrix products on an AMD CPU with AVX-512
nested.py      levels that condition on different things: a token in its phrase, its sentence, its text
explained.py   the units of one text, which a notebook shows coloured
levels.py      surprisals and units -> the perplexity of each level
"""
