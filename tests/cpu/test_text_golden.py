"""The two real models: ids as llama.cpp's own tokenizer gives them, prompts as their templates say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from septet.text.detokenize import Detokenizer
from septet.text.template import ChatTemplate
from septet.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "text_golden.json"
# Where a text holds bytes that a vocabulary has no piece for, both tokenizers drop them: decoding can't give them back.
LOSSY = ("controls ", "private ")


@cache
def golden() -> Any:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def gemma3(gemma3_path: Path) -> Tokenizer:
    return load_tokenizer(gemma3_path)


@pytest.fixture(params=["smollm2", "gemma3"])
def named(request: pytest.FixtureRequest) -> tuple[str, Tokenizer]:
    return request.param, request.getfixturevalue(request.param)


def test_ids_are_llama_cpps(named: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named
    assert len(golden()["texts"]) == len(golden()[name]) > 40
    for text, (parsed, plain) in zip(golden()["texts"], golden()[name], strict=True):
        assert tokenizer.encode(text, False) == parsed
        if not (name == "gemma3" and "</s>" in text):  # llama.cpp takes Gemma's strikethrough tag for a control token
            assert tokenizer.encode(text, False, False) == plain


def test_text_comes_back(named: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named
    for text in golden()["texts"]:
        if (name == "smollm2" and text.startswith(LOSSY)) or (name == "gemma3" and "\u2581" in text):
            continue
        ids = tokenizer.encode(text, False)
        assert tokenizer.decode(ids, False) == text
        detokenizer = Detokenizer(tokenizer, False)
        assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == text


def test_facts_of_smollm2(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2, 0)
    assert smollm2.encode("Hi") == smollm2.encode("Hi", False)  # add_bos_token is false
    template = ChatTemplate.of(smollm2)
    assert template is not None
    prompt = template.render([{"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [i for i in smollm2.encode(prompt, False) if i in smollm2.special_ids] == [1, 2, 1, 2, 1]


def test_facts_of_gemma3(gemma3: Tokenizer) -> None:
    assert gemma3.vocab_size == 262_144
    assert gemma3.bos_token_id == 2
    assert gemma3.eos_token_ids == (1, 106)
    assert gemma3.encode("")[:1] == [2]
    assert gemma3.chat_template is None  # the file has none; its family's format is used
    template = ChatTemplate.of(gemma3)
    assert template is not None
    prompt = template.render([{"role": "user", "content": "Hi<end_of_turn>"}])
    assert prompt == "<bos><start_of_turn>user\nHi<end_of_turn><end_of_turn>\n<start_of_turn>model\n"
    assert [i for i in gemma3.encode(prompt, False) if i in gemma3.special_ids] == [2, 105, 106, 105]


def test_loading_needs_no_heavy_library(smollm2_path: Path) -> None:
    code = (
        "import sys; from septet.text.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]);"
        "print(*{'torch', 'transformers', 'huggingface_hub', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(smollm2_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ.copy(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
