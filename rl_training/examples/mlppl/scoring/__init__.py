"""Text and model -> the perplexity of its words, phrases and sentences. Imports no other wing.

calculator.py  the whole way: texts and a model -> the perplexity of each level
contexts.py    what stands before a text: its prompt, examples, other rows in its place
units.py       text -> sentences, words, phrases, as character offsets
tokens.py      ids <-> characters: what is scored of a text, and which text sampled ids are
batching.py    which tokens go through the model together: windows, shared prefixes, packs, batches; integers only
packing.py     rows end to end in one sequence, each blind to its neighbours; else in a padded batch
surprisal.py   the only forward pass: which way it goes, and what it gives each token
levels.py      surprisals and units -> the perplexity of each level, nested levels included
identity.py    what two numbers must share to be compared
differences.py where two identities differ
frozen.py      adapters off, eval mode, no gradient, and back
sampling.py    completions of the model as it stands
heatmap.py     a text coloured by surprisal, with heatmap.html.j2; what all pages share, with frame.html.j2
server.py      the scorer behind an address: a server of vLLM
"""
