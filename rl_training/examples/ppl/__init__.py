"""What the four scripts share: one concern a file, none of them imports a script.

scoring/     text and model -> perplexities
baselines/   a data set -> the file that the reward compares with
reward/      perplexities and baselines -> the reward
training/    what the training script wires
pages/       what a person looks at

Each wing's __init__.py is its map. A wing imports those above it; training and pages import all three above them, and
pages shows what training has measured. What several wings share stands in this folder:

definitions.py        tables of choices and defaults; imports nothing
retired.py            what is gone, and what to use instead
errors.py             the exception that is the user's to mend
files.py              the only place that writes a file
cli.py                the flags that scripts share, and how a script ends
notebooks.py          a script's main called in a notebook
data.py               a data set -> rows of prompt, reference and id
splits.py             what datasets gives: text as it is written, slices, no images
chat.py               chat messages -> text: prompts, and completions of several messages
sentences.py          text -> where its sentences start; codes of languages
models.py             model and tokenizer from Unsloth, transformers or the embedded folder
gguf.py               a GGUF file -> a folder that they load
gguf_tokenizer.py     the tokenizer of such a file
frozen.py             adapters off, eval mode, no gradient, and back
sampling.py           completions of the model as it stands
sampling_settings.py  how completions are sampled, in training as for baselines
processes.py          several processes of one run, weights spread over them
identity.py           what two numbers must share to be compared
reference_context.py  what stands before a reference that is scored
variety.py            how often a text says the same again
checks.py             the checks of the test script: uses scoring and reward as a script does
"""
