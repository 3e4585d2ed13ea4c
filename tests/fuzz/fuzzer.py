"""Coverage-guided fuzzing of the request path; needs atheris.

    python -m tests.fuzz.fuzzer DIRECTORY [libFuzzer's options, e.g. -max_total_time=600]

DIRECTORY begins with the inputs of corpus.txt and gathers those that reach something new; with `--save`
they are written back to corpus.txt. An input that does harm ends the run and is left as crash-*.
"""

import base64
import sys
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus.txt")


def read_corpus() -> list[bytes]:
    """One input per line, in base64."""
    return [base64.b64decode(line) for line in CORPUS.read_text().split()]


def write_corpus(inputs: list[bytes]) -> None:
    lines = sorted({base64.b64encode(data).decode() for data in inputs}, key=lambda s: (len(s), s))
    CORPUS.write_text("\n".join(lines) + "\n")


def main(arguments: list[str]) -> None:
    directory = Path(arguments[0])
    if arguments[1:] == ["--save"]:
        write_corpus([file.read_bytes() for file in directory.iterdir()])
        return
    import atheris

    with atheris.instrument_imports(include=["cluster"]):
        from tests.fuzz.request_path import RequestPath
    directory.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(read_corpus()):
        (directory / f"seed-{number}").write_bytes(data)
    path = RequestPath()
    atheris.Setup([sys.argv[0], str(directory), "-max_len=400", *arguments[1:]], path.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
