"""Records llama.cpp's perplexity of tests/data/alice_chapter_1.txt per block type. Not a test; run by hand:

    python -m tests.data.record_perplexity .venv-peers/bin/python

The text is chapter I of Lewis Carroll's "Alice's Adventures in Wonderland" (1865), in the public domain. Files of each
type are made from the catalogue's smollm2 by tests/requantize.py; "file" is that file as it comes, "begin" the same on
the text's first windows alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from septet.bench.perplexity import WINDOW, cut, of_llama_cpp
from septet.hub.pull import resolve
from septet.text.tokenizer import load_tokenizer
from tests.requantize import KINDS, requantize

BEGIN = 2  # windows of the quick test
DATA = Path(__file__).parent
TEXT, RECORD = DATA / "alice_chapter_1.txt", DATA / "perplexity_llama_cpp.json"


def main() -> None:
    peer_python = sys.argv[1]
    source = Path(resolve("smollm2").path)
    windows = cut(load_tokenizer(source), TEXT.read_text())
    found = {"file": of_llama_cpp(peer_python, str(source), windows)}
    found["begin"] = of_llama_cpp(peer_python, str(source), windows[:BEGIN])
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            target = requantize(source, Path(folder) / "other.gguf", kind)
            found[kind] = of_llama_cpp(peer_python, str(target), windows)
            print(kind, found[kind], flush=True)
    record = {
        "text": f"{TEXT.name}: Lewis Carroll, Alice's Adventures in Wonderland (1865), chapter I; public domain",
        "recorded": "llama-cpp-python 0.3.36 on an AVX2 CPU, by tests/data/record_perplexity.py",
        "window": WINDOW,
        "tokens": sum(map(len, windows)),
        "begin_windows": BEGIN,
        "perplexity": {kind: round(value, 4) for kind, value in found.items()},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
