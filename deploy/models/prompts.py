"""One prompt per domain of mosaic, for demonstrations and the model card."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoPrompt:
    """A text to continue, and the domain of mosaic that it belongs to."""

    domain: str
    text: str


DEMO_PROMPTS = (
    DemoPrompt("english", "Bingley replied that he did, and made his congratulations"),
    DemoPrompt("chinese", "大家又说了一回闲话。至晚饭后又往贾母处"),
    DemoPrompt("python", "def parse_args(args):\n"),
    DemoPrompt(
        "arithmetic",
        "Question: Ada has 48 apples. Ben gives Ada 17 more, and then Ada loses 9 of them. "
        "How many apples does Ada have now?\n",
    ),
)
