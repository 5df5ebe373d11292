"""Rows for the studies: the beginning of a story, what comes next in it, and the whole of it."""

import common  # noqa: F401 (with it, mlppl is found)


def story_rows(dataset_name: str, split: str = "train", begin: int = 2, follow: int = 2) -> list[dict[str, str]]:
    """`{"id", "prompt", "reference", "document"}` of each text of a data set, in its order.

    prompt: the first `begin` sentences of a text; reference: the next `follow`; document: all of it. Where the data set
    has prompts and continuations, a text is both together. Texts with nothing after their prompt are left out.

    >>> rows = [row for split in ("train", "test") for row in story_rows("tiny-stories", split)]
    >>> len(rows), rows[-1]["prompt"]
    (240, 'My name is Tilly, and I am a sheep. I want to tell you about the day I saw the lake.')
    >>> rows[-1]["reference"]
    'From our field you can see something blue, far away. "It is a piece of sky that fell down," said my mother.'
    """
    from mlppl.data import PromptForm, find_columns, load_split, message_text, prepare_rows, split_sentences

    dataset = load_split(dataset_name, None, split)
    rows = []
    for row in prepare_rows(dataset, find_columns(dataset.column_names, None, None, None, False), PromptForm()):
        document = (message_text(row["prompt"]) + message_text(row["reference"])).strip()
        prompt, rest = split_sentences(document, begin, "en")
        reference = split_sentences(rest, follow, "en")[0].strip()
        if reference:
            rows.append({"id": str(row["id"]), "prompt": prompt, "reference": reference, "document": document})
    return rows
