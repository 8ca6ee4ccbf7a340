"""`llama-index-llms-openai-like`, unmodified, against a real server with the default model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

if TYPE_CHECKING:
    from tests.e2e.serving import Server


@pytest.fixture
def llm(server: Server) -> OpenAILike:
    return OpenAILike(
        model="smollm2",
        api_base=server.url,
        api_key="none",
        is_chat_model=True,
        context_window=1024,
        max_tokens=30,
        temperature=0.0,
        max_retries=0,
    )


def test_chat_and_stream(llm: OpenAILike) -> None:
    ask = [ChatMessage(role="user", content="What is the capital of France? Answer in one sentence.")]
    whole = llm.chat(ask).message.content
    assert whole == "The capital of France is Paris."
    parts = list(llm.stream_chat(ask))
    assert len(parts) > 1  # the first token alone, the others a few at a time
    assert parts[-1].message.content == whole


def test_complete_on_plain_completions(server: Server) -> None:
    llm = OpenAILike(
        model="smollm2", api_base=server.url, api_key="none", context_window=1024, max_tokens=4, temperature=0.0
    )
    assert "Paris" in llm.complete("The capital of France is").text
    assert "".join(part.delta or "" for part in llm.stream_complete("The capital of France is")) == (
        llm.complete("The capital of France is").text
    )
