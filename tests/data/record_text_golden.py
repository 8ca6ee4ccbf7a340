"""Records what llama.cpp's own tokenizer says of a mixed corpus. Not a test; run by hand where llama-cpp-python is:

    python tests/data/record_text_golden.py smollm2=FILE.gguf gemma3=FILE.gguf

It reads the texts of tests/data/text_golden.json and writes the ids back into it, per model and text: with special
tokens parsed, and with special tokens as text, both without bos. Recorded with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).with_name("text_golden.json")


def main() -> None:
    from llama_cpp import Llama

    golden = json.loads(GOLDEN.read_text())
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        model = Llama(path, vocab_only=True, verbose=False)
        golden[name] = [
            [model.tokenize(text.encode(), add_bos=False, special=special) for special in (True, False)]
            for text in golden["texts"]
        ]
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
