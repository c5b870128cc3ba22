"""Arms of an adaptation: mode, start and loss of each, and the data that replaces the source's in a control."""

from dataclasses import asdict, dataclass, replace

from tmjax.recipes.adapt import AdaptRecipe
from tmjax.recipes.sources import SOURCE, WITHOUT
from tmjax.transfer.controls import random_source, shuffled_rows

ADAPTED = "adapted"
SFT = "control:sft"
#: The model of the source's architecture with fresh random weights.
RANDOM_MODEL = random_source.__name__
SHUFFLED, RANDOM = f"control:{shuffled_rows.__name__}", f"control:{RANDOM_MODEL}"
TARGET_WRITTEN = "control:target_written"
#: Several sources, as the models that generate texts.
ALL_SOURCES = "sources"
#: Not a control: next-token training on the same texts, those of the source included.
SOURCE_WRITTEN = "source_written"


#: Attributes of few arms, which the keys of others leave out.
_UNUSUAL = ("metric", "anneal", "without")


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        mode: Selects the trained arrays: `sft`, `residual-frozen` or `lora`.
        start: Initial model: `target` or `merged`.
        terms: Terms of the loss and further texts, beside the next tokens of the given texts.
        texts_by: Model that generates further texts: `source`, ALL_SOURCES, `target`, RANDOM_MODEL or None.
        teacher: Model of the features and probabilities: `source` or RANDOM_MODEL; each of several sources has one.
        shuffled: Whether features and probabilities are those of other pieces of text.
        metric: Metric of guidance; the recipe's unless given, for ablations.
        anneal: Annealing of the terms' weights; the recipe's unless given, for ablations.
        without: The one of several sources that the arm has nothing of.
    """

    mode: str
    start: str
    terms: frozenset[str] = frozenset()
    texts_by: str | None = None
    teacher: str = "source"
    shuffled: bool = False
    metric: str | None = None
    anneal: float | None = None
    without: str | None = None

    def description(self) -> str:
        """Returns the part of a stage's key that identifies the arm; the run's key covers the recipe's options."""
        own = {name: value for name in _UNUSUAL if (value := getattr(self, name)) is not None}
        common = {name: value for name, value in asdict(self).items() if name not in _UNUSUAL}
        return str(common | {"terms": sorted(self.terms)} | own)

    @property
    def merge_control(self) -> str | None:
        """Name of the merge's control whose transported weights the arm has; None for the merge itself."""
        if self.shuffled:
            return SHUFFLED
        return RANDOM if self.teacher == RANDOM_MODEL else None


def data_name(model: str, arm: Arm) -> str:
    """Returns the name of a stage of a model on an arm's texts."""
    return f"{model}-on-{texts_name(arm)}" if arm.texts_by else model


def texts_name(arm: Arm) -> str:
    """Returns the name of an arm's generated texts."""
    return f"{arm.texts_by}-without-{arm.without}" if arm.without else str(arm.texts_by)


def stand_in(teacher: str, source: str) -> str:
    """Returns the model that a source is in an arm: itself, or the random model of its architecture."""
    return teacher + source.removeprefix(SOURCE)


def source_of(model: str) -> str:
    """Returns the source whose architecture a model of `stand_in` has."""
    return SOURCE + model.removeprefix(RANDOM_MODEL).removeprefix(SOURCE)


def arms_of(recipe: AdaptRecipe) -> dict[str, Arm]:
    """Returns every arm of a recipe by its name, the adapted one first.

    Generated texts are a term too. In controls their replacements carry no knowledge of the source: a random source
    generates them, or the target where rows are shuffled. Of several sources each has an arm that leaves it out.
    """
    trained = "sft" if recipe.terms else recipe.mode
    generated = "generated" in recipe.terms
    all_sources = ALL_SOURCES if recipe.sources else SOURCE
    main = Arm(trained, recipe.start, recipe.terms, all_sources if generated else None)
    arms = {ADAPTED: main}
    if not recipe.controls:
        return arms
    plain = Arm("sft", "target")
    if main != plain:
        arms[SFT] = plain
    if recipe.terms & {"guidance", "distillation"} or recipe.mode == "residual-frozen":
        arms[SHUFFLED] = replace(main, shuffled=True, texts_by="target" if generated else None)
    if recipe.terms or recipe.mode == "residual-frozen":
        arms[RANDOM] = replace(main, teacher=RANDOM_MODEL, texts_by=RANDOM_MODEL if generated else None)
    if recipe.sources and recipe.terms:
        arms |= {f"{WITHOUT}{name}": replace(main, without=name) for name in recipe.named_sources}
    if generated:
        arms[TARGET_WRITTEN] = replace(plain, terms=frozenset({"generated"}), texts_by="target")
        by_source = replace(plain, terms=frozenset({"generated"}), texts_by=all_sources)
        if by_source != main:
            arms[SOURCE_WRITTEN] = by_source
    return arms
