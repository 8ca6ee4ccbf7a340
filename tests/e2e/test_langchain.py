"""`langchain-openai`, unmodified, against a real server with the default model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

if TYPE_CHECKING:
    from tests.e2e.serving import Server

ASK = [HumanMessage("What is the capital of France? Answer in one sentence.")]


class City(BaseModel):
    """A city"""

    name: Literal["Paris", "Rome", "Oslo"]


def model(server: Server, **more: Any) -> ChatOpenAI:
    key = SecretStr("none")
    return ChatOpenAI(base_url=server.url, api_key=key, model="smollm2", temperature=0, max_retries=0, **more)


@pytest.mark.parametrize("responses", [False, True])
def test_whole_equals_stream(server: Server, responses: bool) -> None:
    chat = model(server, use_responses_api=responses, max_completion_tokens=20)
    whole = chat.invoke(ASK)
    assert "Paris" in whole.text
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 3
    parts = list(chat.stream(ASK))
    assert len(parts) > 1  # the first token alone, the others a few at a time
    assert "".join(part.text for part in parts) == whole.text


def test_tools_and_schema(server: Server) -> None:
    chat = model(server, max_completion_tokens=80)
    called = chat.bind_tools([City], tool_choice="any").invoke("Name a city.")
    assert called.tool_calls[0]["name"] == "City"
    assert isinstance(chat.with_structured_output(City).invoke("Name a city."), City)


def test_embeddings(server: Server) -> None:
    key = SecretStr("none")
    embeddings = OpenAIEmbeddings(
        base_url=server.url, api_key=key, model="smollm2", check_embedding_ctx_length=False, max_retries=0
    )
    vectors = embeddings.embed_documents(["one", "two"])
    assert [math.fsum(v * v for v in vector) for vector in vectors] == pytest.approx([1.0, 1.0], abs=1e-5)
