"""One prompt per domain of mosaic, for demonstrations and the model card."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoPrompt:
    """A text to continue, and the domain of mosaic that it belongs to."""

    domain: str
    text: str


DEMO_PROMPTS = (
    DemoPrompt("english", "Holmes leaned back in his chair and"),
    DemoPrompt("chinese", "话说宋江"),
    DemoPrompt("python", 'def read_file(path):\n    """'),
    DemoPrompt("arithmetic", "Question: 4728 + 3965 = ?\n"),
)
