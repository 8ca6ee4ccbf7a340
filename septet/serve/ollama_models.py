"""Ollama's HTTP API, the part about models: what is here, what is loaded, show, create, copy, delete, pull, blobs.

What changes the store is allowed only where `service.models.manages`. A name that comes over the network is never a
path. Long work runs as a `Job`, its progress as lines of a stream. Listed by `ollama.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import septet
from septet.errors import InvalidRequest, ModelNotFound
from septet.hub.create import Upload, copy, create, create_from_uploads, new_name, uploaded
from septet.hub.describe import describe
from septet.hub.modelfile import Recipe, checked_recipe, parameter_lines, parse, written
from septet.hub.pull import canonical, pull
from septet.hub.store import Store
from septet.serve.body import body_of
from septet.serve.context import may_manage
from septet.serve.errors import ClientGone, HttpError
from septet.serve.fields import Fields, only, schema_of, table
from septet.serve.jobs import Job
from septet.serve.ollama_shape import timestamp
from septet.serve.sse import until_gone
from septet.session.preset import check_template
from septet.text.parsers.dialects import reasoning_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope

    from septet.hub.describe import Description
    from septet.hub.store import LocalModel
    from septet.serve.dialect import Route
    from septet.serve.service import Service
    from septet.serve.sse import Reply

__all__ = ["MODEL_ROUTES", "MODEL_SCHEMAS", "check_key", "ollama_name", "typed"]

API_LEVEL = "0.12.6"  # the Ollama whose API this follows: clients ask before they use a field
FOR_EVER_S = 100 * 365 * 86400.0
MAX_UPLOAD = 2**36
MAX_NOTICE = 2**18
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")

_NAME = table({"string": "model name", "boolean": "stream"}, "insecure username password")
_SHOW = table({"string": "model name", "boolean": "verbose"}, "options", {"system": only(""), "template": only("")})
_COPY = table({"string": "source destination"})
_CREATE = table(
    {
        "string": "model name from template system modelfile",
        "boolean": "stream",
        "object": "files parameters",
        "array": "messages",
        "": "license",
    },
    "requires info",
    {
        "adapters": only({}, why="LoRA adapters are not supported; merge the adapter into the weights"),
        "quantize": only("", why="quantising is not supported; pull a file that is quantised already"),
        "quantization": only("", why="quantising is not supported; pull a file that is quantised already"),
        "renderer": only("", why="built-in renderers are not supported; give template"),
        "parser": only("", why="built-in parsers are not supported; the template shows how the model writes"),
        "draft_files": only({}, why="draft models are not supported yet"),
        "draft_quantize": only("", why="draft models are not supported yet"),
        "path": only("", why="files of the server are not read for a client; send them to /api/blobs"),
    },
)


def typed(scope: Scope) -> Scope:
    """Ollama takes JSON under any type: curl's default, a browser's. Pages of another origin are refused before."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
    given = {value for name, value in scope["headers"] if name.lower() == b"content-type"}
    media = {value.split(b";")[0].strip().lower() for value in given}
    if media <= {b"application/x-www-form-urlencoded", b"text/plain"}:
        return {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
    return scope


def ollama_name(name: str) -> str:
    """With a tag, as Ollama's clients expect it."""
    return name if ":" in name else f"{name}:latest"


def _name(fields: Fields) -> str:
    name = fields.string("model", "") or fields.string("name", "")
    if not name:
        raise InvalidRequest("model is required", param="model")
    return name


def _check_manages(service: Service) -> None:
    if not service.models.manages:
        raise HttpError(
            403,
            "clients may not change this server's models; start it without naming one (with --manage beyond loopback)",
        )
    check_key()


def check_key() -> None:
    """Raises HttpError where the request's key may not manage models."""
    if not may_manage():
        raise HttpError(403, 'this API key may not manage models; a key with role = "admin" may', code="not_an_admin")


# -- what is here -----------------------------------------------------------------------------------------------------
async def tags(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    listed = []
    for card in service.models.cards():
        try:
            model = service.models.find(card.name)
        except ModelNotFound:  # gone, or damaged
            continue
        found = await asyncio.to_thread(describe, model.path)
        listed.append(_listed(card.name, model, found) | {"modified_at": timestamp(card.created)})
    await reply.json({"models": listed})


async def ps(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    listed = []
    for run in service.models.running():
        try:
            model = service.models.find(run.name)
        except ModelNotFound:  # removed, and in use until it is idle
            continue
        found = await asyncio.to_thread(describe, model.path)
        left_s = FOR_EVER_S if run.left_s is None else min(run.left_s, FOR_EVER_S)
        on_gpu = run.session.client.info.device.startswith("cuda")
        listed.append(
            _listed(run.name, model, found)
            | {
                "size": run.n_bytes,
                "size_vram": run.n_bytes if on_gpu else 0,
                "expires_at": timestamp(time.time() + left_s),
                "context_length": run.session.limits.max_model_len,
                "users": run.users,
            }
        )
    await reply.json({"models": listed})


def _listed(name: str, model: LocalModel, found: Description) -> dict[str, Any]:
    shown = ollama_name(name)
    return {
        "name": shown,
        "model": shown,
        "size": model.n_bytes,
        "digest": _digest(model),
        "details": _details(model, found),
    }


def _details(model: LocalModel, found: Description) -> dict[str, Any]:
    return {
        "parent_model": model.recipe.parent if model.recipe else "",
        "format": found.format,
        "family": found.family,
        "families": [found.family] if found.family else [],
        "parameter_size": _parameter_size(found.parameters),
        "quantization_level": found.quantization,
        "context_length": found.context_length,
        "embedding_length": found.embedding_length,
    }


def _parameter_size(n: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return str(n) if n else ""


def _digest(model: LocalModel) -> str:
    """Of the weights and, where it is a created model, of what was added."""
    if model.recipe is None:
        return model.digest or ""
    added = json.dumps(asdict(model.recipe), sort_keys=True)
    return hashlib.sha256(f"{model.digest}\n{added}".encode()).hexdigest()


async def show(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    fields = Fields(await body_of(service, typed(scope), receive), _SHOW)
    model = service.models.find(_name(fields))
    found = await asyncio.to_thread(describe, model.path)
    recipe = model.recipe or Recipe(parent=model.name)
    created = next((card.created for card in service.models.cards() if card.name == model.name), 0)
    template = recipe.template if recipe.template is not None else found.template or ""
    plain = {key: value for key, value in found.metadata.items() if key != "tokenizer.chat_template"}
    await reply.json(
        {
            "license": recipe.license or await asyncio.to_thread(_license, model),
            "modelfile": written(recipe),
            "parameters": "\n".join(parameter_lines(recipe.parameters)),
            "template": template,
            "system": recipe.system or "",
            "messages": [{"role": role, "content": content} for role, content in recipe.messages],
            "details": _details(model, found),
            "model_info": {**plain, "general.parameter_count": found.parameters},
            "capabilities": _capabilities(template),
            "modified_at": timestamp(created),
        }
    )


def _license(model: LocalModel) -> str:
    texts = []
    for path in model.notices:
        with path.open("rb") as stream:
            texts.append(stream.read(MAX_NOTICE).decode("utf-8", "replace"))
    return "\n\n".join(texts) or model.license or ""


def _capabilities(template: str) -> list[str]:
    tools = ["tools"] if template else []  # a template that knows none gets them as text
    return ["completion", *tools, *(["thinking"] if reasoning_of(template) else [])]


async def version(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await reply.json({"version": API_LEVEL, "septet": septet.__version__})


# -- what changes the store -------------------------------------------------------------------------------------------
async def pull_model(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    fields = Fields(await body_of(service, typed(scope), receive), _NAME)
    _check_manages(service)
    name = canonical(_name(fields), Store())
    work = Job(lambda tell: pull(name, progress=tell, paths=False))
    await until_gone(receive, _told(work, fields.boolean("stream", True), reply, ["pulling manifest"]))


async def create_model(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    fields = Fields(await body_of(service, typed(scope), receive), _CREATE)
    _check_manages(service)
    name = new_name(_name(fields))
    base, files, recipe = _recipe(fields)
    if recipe.template is not None:
        check_template(recipe.template)
    make: Callable[..., LocalModel] = (
        partial(create_from_uploads, name, files, recipe) if files else partial(create, name, base, recipe, paths=False)
    )
    work = Job(lambda tell: make() if files else make(progress=tell))
    await until_gone(receive, _told(work, fields.boolean("stream", True), reply, ["reading model metadata"]))


def _recipe(fields: Fields) -> tuple[str, dict[str, str], Recipe]:
    """What to make the model from: a name, or uploaded files; and what to add."""
    if fields.given("modelfile"):
        modelfile = parse(fields.string("modelfile", ""))
        return modelfile.base, {}, modelfile.recipe
    base, files = fields.string("from", ""), _files(fields)
    if bool(base) == bool(files):
        raise InvalidRequest("either from or files must say what the model is made of", param="from")
    licenses = fields.raw("license", [])
    texts = [licenses] if isinstance(licenses, str) else licenses
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("license must be a string or an array of strings", param="license")
    recipe = Recipe(
        parent=base or next(iter(files)),
        template=fields.string("template", "") or None,
        system=fields.string("system", "") or None,
        parameters=fields.object("parameters"),
        messages=_messages(fields),
        license="\n\n".join(texts) or None,
    )
    return base, files, checked_recipe(recipe)


def _files(fields: Fields) -> dict[str, str]:
    files = {}
    for name, digest in fields.object("files").items():
        files[name] = _sha256(digest if isinstance(digest, str) else "")
    return files


def _messages(fields: Fields) -> tuple[tuple[str, str], ...]:
    pairs = []
    for i, message in enumerate(fields.array("messages")):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise InvalidRequest(f"messages[{i}] must have a role and a content, both strings", param="messages")
        pairs.append((role, content))
    return tuple(pairs)


async def _told(work: Job[Any], stream: bool, reply: Reply, opening: list[str]) -> None:
    """The job's progress in Ollama's words, and its end."""
    told: set[str] = set()
    try:
        if stream:
            for status in opening:
                await reply.line({"status": status})
            async for what, done, total in work.progress():
                if what == "verifying":
                    if what not in told:
                        await reply.line({"status": "verifying sha256 digest"})
                    told.add(what)
                    continue
                part = what.removeprefix("downloading ")
                await reply.line({"status": f"pulling {part}", "digest": part, "total": total, "completed": done})
        await work.result()
    finally:
        work.stop()
    if stream:
        await reply.line({"status": "writing manifest"})
        await reply.line({"status": "success"})
        await reply.end()
    else:
        await reply.json({"status": "success"})


async def copy_model(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    fields = Fields(await body_of(service, typed(scope), receive), _COPY)
    _check_manages(service)
    source, destination = fields.string("source", ""), fields.string("destination", "")
    await Job(lambda tell: copy(source, destination)).result()
    await reply.raw(b"", "text/plain")


async def delete_model(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Its engine goes on for the requests that use it, and is unloaded then."""
    fields = Fields(await body_of(service, typed(scope), receive), _NAME)
    _check_manages(service)
    store = Store()
    name = canonical(_name(fields), store)
    if store.get(name) is None:
        raise ModelNotFound(f"{name} is not in the store", param="model")
    await service.models.unload(name)
    await Job(lambda tell: store.remove(name)).result()
    await reply.raw(b"", "text/plain")


async def push_model(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await body_of(service, typed(scope), receive)
    raise InvalidRequest("push is not supported: models are never sent anywhere", param="model")


# -- uploads ----------------------------------------------------------------------------------------------------------
def _sha256(digest: str) -> str:
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise InvalidRequest("digest must be sha256: and 64 hexadecimal digits in lower case", param="digest")
    return match[1]


async def has_blob(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    _check_manages(service)
    found = uploaded(Store(), _sha256(scope["path_params"]["digest"]))
    await reply.raw(b"", "text/plain", 200 if found else 404)


PART = 2**20  # bytes that are written at once


async def upload_blob(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """The body as it comes, in parts, each within the time of a body."""
    _check_manages(service)
    sha256 = _sha256(scope["path_params"]["digest"])
    if uploaded(Store(), sha256):
        await reply.raw(b"", "text/plain")
        return
    upload, held = Upload(Store(), sha256, MAX_UPLOAD), bytearray()
    try:
        more = True
        while more:
            try:
                async with asyncio.timeout(service.settings.body_timeout_s):
                    message = await receive()
            except TimeoutError:
                raise HttpError(408, "the file stopped arriving") from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            held += message.get("body", b"")
            more = message.get("more_body", False)
            if len(held) >= PART or not more:
                await asyncio.to_thread(upload.write, bytes(held))  # hashing and the disk take their time
                held.clear()
        await asyncio.to_thread(upload.finish)
    finally:
        upload.close()
    await reply.raw(b"", "text/plain", 201)


MODEL_ROUTES: tuple[Route, ...] = (
    ("GET", "/api/tags", tags),
    ("GET", "/api/ps", ps),
    ("GET", "/api/version", version),
    ("POST", "/api/show", show),
    ("POST", "/api/pull", pull_model),
    ("POST", "/api/create", create_model),
    ("POST", "/api/copy", copy_model),
    ("DELETE", "/api/delete", delete_model),
    ("POST", "/api/push", push_model),
    ("HEAD", "/api/blobs/{digest}", has_blob),
    ("POST", "/api/blobs/{digest}", upload_blob),
)
MODEL_SCHEMAS: dict[str, dict[str, Any]] = {
    "/api/show": schema_of(_SHOW),
    "/api/pull": schema_of(_NAME),
    "/api/create": schema_of(_CREATE),
    "/api/copy": schema_of(_COPY, "source destination"),
    "/api/delete": schema_of(_NAME),
    "/api/push": schema_of(_NAME),
}
