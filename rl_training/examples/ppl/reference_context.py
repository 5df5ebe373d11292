"""What stands before a reference that is scored: prompt and completion, put together by a template."""

import string

import regex

from .definitions import DEFAULT_TEMPLATE
from .errors import InputError

SECONDS = 2.0  # for one completion; a pattern that backtracks for longer would hold up the training


class ReferenceContext:
    """Context of a reference: its prompt and a completion, put together.

    extract: a regular expression (`.` also matches line breaks); of a completion only the first match's first group
        counts, or the match if it has none. A completion without a match counts whole, as in VR-CLI
        (https://arxiv.org/abs/2503.22828), where it is what follows the last "In summary:" or "In summary,", stripped:
        that is the expression of the example.
    template: a format string with {prompt}, {completion} and {reference} once each and in this order, {reference} last;
        what stands between is context. For models that need turns marked.
    target: what the reward measures; both belong to "reference" alone.

    Raises `InputError` for an expression or a template that is none, or with another target.

    >>> template = "{prompt}\\nPlan: {completion}\\nChapter: {reference}"
    >>> joined = ReferenceContext(extract=r".*In summary[:,]\\s*(.*?)\\s*$", template=template)
    >>> joined.context("A fox.", joined.extracted("In summary: what? Let me think. In summary, it runs.")[0])
    'A fox.\\nPlan: it runs.\\nChapter: '
    """

    def __init__(self, extract: str | None = None, template: str = DEFAULT_TEMPLATE, target: str = "reference") -> None:
        if target != "reference" and (extract or template != DEFAULT_TEMPLATE):
            raise InputError(
                "--extract and --template say what stands before a reference: they need --target reference (in Python "
                "they need target='reference')"
            )
        try:
            self._pattern = regex.compile(extract, regex.DOTALL) if extract else None
        except regex.error as error:
            raise InputError(f"extract is {extract!r}, expected a regular expression: {error}") from error
        self.extracts = self._pattern is not None
        self.template = template
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise InputError(f"template is {template!r}: {error}; a brace that is text is written twice") from error
        fields = [name + (conversion or "") + (form or "") for _, name, form, conversion in parts if name is not None]
        if fields != ["prompt", "completion", "reference"] or parts[-1][1] != "reference":
            raise InputError(
                f"template is {template!r}, expected {{prompt}}, {{completion}} and {{reference}} once each, in this "
                "order, and nothing behind {reference}"
            )
        self._context = template.removesuffix("{reference}")

    def extracted(self, completion: str) -> tuple[str, bool]:
        """(the part of a completion that counts, whether there was one). Raises `InputError` if it takes too long."""
        if self._pattern is None:
            return completion, True
        try:
            match = self._pattern.search(completion, timeout=SECONDS)
        except TimeoutError as error:
            raise InputError(
                f"extract {self._pattern.pattern!r} takes more than {SECONDS:g} s for one completion: write it so that "
                "it does not try the same text in many ways"
            ) from error
        if match is None:
            return completion, False
        return match.group(1 if self._pattern.groups else 0) or "", True

    def context(self, prompt: str, completion: str = "") -> str:
        """What the reference's perplexity is conditioned on."""
        return self._context.format(prompt=prompt, completion=completion)
