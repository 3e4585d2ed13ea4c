"""The reference of all options names every one of them, and is what the options are now."""

from cluster.config import ServeConfig
from deploy.config_reference import PAGE, page, undescribed


def options(tree: dict, path: str = "") -> list[str]:
    return [
        dotted
        for name, value in tree.items()
        for dotted in (
            options(value, f"{path}{name}.")
            if isinstance(value, dict) and name != "presets"
            else [f"{path}{name}"]
        )
    ]


def test_the_page_has_a_row_for_every_option_in_its_section():
    text = page()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    for option in options(ServeConfig.from_dict({"model": "x"}).model_dump()):
        section, _, name = option.rpartition(".")
        heading = section or "The model, and the cluster as a whole"
        assert f"\n| `{name}` |" in sections[heading], option


def test_every_row_says_what_its_option_means_and_what_is_allowed():
    assert undescribed() == []
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) >= len(options(ServeConfig.from_dict({"model": "x"}).model_dump()))
    assert all(len(row) == 4 and row[2].strip() and len(row[3].strip(" |")) > 8 for row in rows)


def test_the_page_in_the_repository_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == page()
