"""What `MultiLevelPPLCalculator.explain` gives: a dict of units that a notebook shows as a coloured text."""


class Explained(dict):
    """`{level: [unit, ...]}` of one text. `perplexities`: `{level: float}`, as `compute_all_levels` gives them.

    A notebook shows it as the page that `multi_level_ppl_trl.py --html` writes. text, context, language: as explained.
    """

    def __init__(self, perplexities: dict[str, float], text: str, context: str, language: str) -> None:
        super().__init__()
        self.perplexities = perplexities
        self.text = text
        self.context = context
        self.language = language

    def _repr_html_(self) -> str:
        from ..pages import heatmap, notebook  # scoring needs no page; a notebook asks what it shows itself

        fragment = heatmap.heatmap(self, self.text, self.perplexities, context=self.context, language=self.language)
        return notebook.Framed(heatmap.page("Multi-level perplexity", [fragment]))._repr_html_()
