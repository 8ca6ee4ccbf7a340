"""What no route takes: 404 and 405 in the words of the API that the path belongs to, and calls known to be absent.

Asked by `app.py` after the key was checked. A path that clients of an engine know and that is not served is 501 by
name. Knows paths and error styles alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.serve.anthropic import ANTHROPIC
from septet.serve.dialect import OPENAI_ERRORS
from septet.serve.errors import HttpError
from septet.serve.ollama import OLLAMA
from septet.serve.tgi import TGI

if TYPE_CHECKING:
    from collections.abc import Mapping

    from septet.serve.dialect import ErrorStyle

__all__ = ["ABSENT", "refusal", "style_of"]

_RERANK = "this server ranks nothing; /v1/embeddings gives vectors to compare"
_POOLED = "this server classifies and scores nothing; /v1/embeddings gives vectors"
_MEDIA = "this server knows text alone"
ABSENT: Mapping[str, str] = {
    "/infill": "filling in between two texts is not supported; POST /completion continues one",
    "/vertex": "Vertex AI's envelope is not supported; POST / and /invocations take TGI's body",
    "/load": "not supported; /metrics has vllm:num_requests_running and vllm:num_requests_waiting",
    "/api/status": "there is no cloud to be signed in to",
    "/api/me": "there is no cloud to be signed in to",
    "/api/signout": "there is no cloud to be signed in to",
    **dict.fromkeys(("/rerank", "/reranking", "/v1/rerank", "/v1/reranking", "/v2/rerank"), _RERANK),
    **dict.fromkeys(("/score", "/v1/score", "/classify", "/v1/classify", "/pooling", "/v1/moderations"), _POOLED),
    **dict.fromkeys(("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech"), _MEDIA),
    **dict.fromkeys(("/v1/images/generations", "/v1/images/edits", "/v1/realtime"), _MEDIA),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), "adapters are not supported"),
    **dict.fromkeys(("/sleep", "/wake_up", "/is_sleeping"), "not supported; idle models unload by --keep-alive"),
}

_TGI_PATHS = ("/generate", "/generate_stream", "/info", "/chat_tokenize", "/invocations", "/vertex")


def style_of(path: str) -> ErrorStyle:
    """Whose clients ask there."""
    if path.startswith("/api/"):
        return OLLAMA.errors
    if path.startswith("/v1/messages"):
        return ANTHROPIC.errors
    return TGI.errors if path in _TGI_PATHS else OPENAI_ERRORS


def refusal(path: str, status: int, detail: str) -> HttpError:
    """`status`: what the router said."""
    if status == 404 and path in ABSENT:
        return HttpError(501, f"{path}: {ABSENT[path]}", code="not_supported")
    words = {
        404: "no such route; GET /openapi.json lists what there is",
        405: "this route does not take that method; GET /openapi.json lists what there is",
    }
    return HttpError(status, words.get(status, detail))
