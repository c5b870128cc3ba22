"""The arms of an adaptation: what is trained, on which terms, and what each control has in place of the source."""

from dataclasses import asdict, dataclass, replace

from tmjax.recipes.adapt import AdaptRecipe

ADAPTED = "adapted"
SFT = "control:sft"
SHUFFLED, RANDOM = "control:shuffled_rows", "control:random_source"
TARGET_WRITTEN = "control:target_written"
#: Not a control: the same texts, the next token alone.
SOURCE_WRITTEN = "source_written"


@dataclass(frozen=True)
class Arm:
    """One training: mode and start, the terms of its loss, who writes further texts, whose word is taken for what.

    `writer` is `source`, `target`, `random_source` or None. `teacher` is the model whose features and probabilities are
    learnt from, `source` or `random_source`; `shuffled` gives them to other pieces of text. `metric` and `anneal` are
    the recipe's unless the arm has its own, for ablations.
    """

    mode: str
    start: str
    terms: frozenset[str] = frozenset()
    writer: str | None = None
    teacher: str = "source"
    shuffled: bool = False
    metric: str | None = None
    anneal: float | None = None

    def told(self) -> str:
        """What the arm is, as part of a stage's key; options that are the recipe's are in the recipe's."""
        own = {name: value for name in ("metric", "anneal") if (value := getattr(self, name)) is not None}
        common = {name: value for name, value in asdict(self).items() if name not in ("metric", "anneal")}
        return str(common | {"terms": sorted(self.terms)} | own)


def arms_of(recipe: AdaptRecipe) -> dict[str, Arm]:
    """Every arm by its name, the adapted one first.

    Texts that the source writes are a term too. What the controls have in its place carries no knowledge of the source:
    texts of a random source, or of the target where rows are shuffled.
    """
    trained = "sft" if recipe.terms else recipe.mode
    written = "written" in recipe.terms
    main = Arm(trained, recipe.start, recipe.terms, "source" if written else None)
    arms = {ADAPTED: main}
    if not recipe.controls:
        return arms
    plain = Arm("sft", "target")
    if main != plain:
        arms[SFT] = plain
    if recipe.terms & {"guidance", "distillation"} or recipe.mode == "residual-frozen":
        arms[SHUFFLED] = replace(main, shuffled=True, writer="target" if written else None)
    if recipe.terms or recipe.mode == "residual-frozen":
        arms[RANDOM] = replace(main, teacher="random_source", writer="random_source" if written else None)
    if written:
        arms[TARGET_WRITTEN] = replace(plain, terms=frozenset({"written"}), writer="target")
        by_source = replace(plain, terms=frozenset({"written"}), writer="source")
        if by_source != main:
            arms[SOURCE_WRITTEN] = by_source
    return arms
