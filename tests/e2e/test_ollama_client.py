"""The `ollama` package, unmodified, against a real server of all pulled models; and the commands around it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import ollama
import pytest
from click.testing import CliRunner

from septet.cli.main import main
from septet.hub.store import Store
from tests.e2e.serving import Server, start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ASK: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
ANSWER = "The capital of France is Paris."
EXACT = {"temperature": 0, "num_predict": 16}
MADE = ("e2e-mario", "e2e-luigi", "e2e-file")


@pytest.fixture(scope="module")
def server(smollm2_path: Path, gemma3_path: Path) -> Iterator[Server]:
    """The same store as every test's; what is created here is removed again."""
    running = start("--kernels=native", "--max-model-len", "512", "--memory-budget", "4G")
    yield running
    assert running.stop() == 0
    store = Store()
    for name in MADE:
        if store.get(name):
            store.remove(name)


@pytest.fixture(scope="module")
def client(server: Server) -> ollama.Client:
    return ollama.Client(server.root, timeout=240)


def loaded(client: ollama.Client) -> dict[str, ollama.ProcessResponse.Model]:
    return {str(model.name): model for model in client.ps().models}


def test_what_is_here(client: ollama.Client) -> None:
    models = {model.model: model for model in client.list().models}
    assert {"smollm2:latest", "gemma3:270m"} <= set(models)
    details = models["smollm2:latest"].details
    assert details is not None
    assert (details.family, details.parameter_size, details.quantization_level) == ("llama", "134.5M", "Q4_1")
    shown = client.show("smollm2")
    assert shown.capabilities == ["completion", "tools"]
    assert "Apache License" in (shown.license or "")
    assert "im_start" in (shown.template or "")
    assert (shown.modelinfo or {})["llama.context_length"] == 8192


def test_chat_whole_and_streamed_say_the_same(client: ollama.Client) -> None:
    whole = client.chat("smollm2", ASK, options=EXACT)
    assert whole.message.content == ANSWER
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "stop", 8)
    assert (whole.total_duration or 0) >= (whole.eval_duration or 0) > 1_000_000
    parts = list(client.chat("smollm2:latest", ASK, options=EXACT, stream=True))
    assert "".join(part.message.content or "" for part in parts) == ANSWER
    assert len(parts) > 1  # the first token alone, the others a few at a time
    assert parts[-1].done_reason == "stop"
    assert parts[-1].prompt_eval_count == whole.prompt_eval_count


def test_two_models_in_turn(client: ollama.Client, server: Server) -> None:
    engines: list[set[int]] = []
    for _ in range(2):
        gemma = client.generate("gemma3:270m", "The capital of France is", raw=True, options=EXACT)
        assert gemma.response
        smollm = client.generate("smollm2", ASK[0]["content"], options=EXACT)
        assert smollm.response == ANSWER
        engines.append(set(server.children()))
    assert engines[0] == engines[1], "both were there the second time"
    assert {"smollm2:latest", "gemma3:270m"} <= set(loaded(client))
    assert gemma.load_duration is not None


def test_context_goes_on(client: ollama.Client) -> None:
    first = client.generate("smollm2", ASK[0]["content"], options=EXACT)
    assert first.context
    second = client.generate("smollm2", "And of Italy?", context=first.context, options=EXACT, stream=True)
    *_, last = second
    assert (last.prompt_eval_count or 0) > len(first.context)


def test_format_think_tools_and_errors(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    answer = client.chat("smollm2", ASK, format=schema, options={"temperature": 0, "num_predict": 60})
    assert set(json.loads(answer.message.content or "")) == {"city"}

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    called = client.chat("smollm2", ASK, tools=[add], options=EXACT)
    assert called.done
    for wrong, words in (
        ({"model": "nope"}, "no model 'nope' here"),
        ({"model": "smollm2", "think": True}, "does not support thinking"),
        ({"model": "smollm2", "options": {"temperature": -1}}, "temperature"),
    ):
        with pytest.raises(ollama.ResponseError, match=words):
            client.chat(messages=ASK, **wrong)  # type: ignore[arg-type]


def test_embeddings(client: ollama.Client) -> None:
    vectors = client.embed("smollm2", ["hello", "world"]).embeddings
    assert [len(vector) for vector in vectors] == [576, 576]
    assert client.embeddings("smollm2", "hello").embedding == pytest.approx(vectors[0], abs=1e-3)


def test_create_copy_delete(client: ollama.Client) -> None:
    told = [part.status for part in client.create(
        MADE[0], from_="smollm2", system="You are Mario.", parameters={"temperature": 0, "num_predict": 8}, stream=True
    )]  # fmt: skip
    assert told[-1] == "success"
    before = loaded(client)
    mario = client.chat(MADE[0], [{"role": "user", "content": "Who are you?"}])
    assert "Mario" in (mario.message.content or "")
    assert mario.eval_count == 8
    assert set(loaded(client)) == {*before, f"{MADE[0]}:latest"}  # over the same engine
    client.copy(MADE[0], MADE[1])
    assert client.chat(MADE[1], [{"role": "user", "content": "Who are you?"}]).message.content == mario.message.content
    for name in MADE[:2]:
        assert client.delete(name).status == "success"
    with pytest.raises(ollama.ResponseError, match="no model"):
        client.chat(MADE[0], ASK)
    assert client.pull("smollm2").status == "success"
    with pytest.raises(ollama.ResponseError, match="push is not supported"):
        client.push("smollm2")


def test_a_modelfile_ps_and_stop_on_the_command_line(client: ollama.Client, server: Server, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(
        'FROM smollm2\nTEMPLATE """{{ .System }} {{ .Prompt }}"""\nPARAMETER num_predict 3\nSYSTEM Once\n'
    )
    made = CliRunner().invoke(main, ["create", MADE[2], "-f", str(tmp_path / "Modelfile")])
    assert made.exit_code == 0, made.output
    answer = client.generate(MADE[2], "upon a", options={"temperature": 0})
    assert answer.eval_count == 3
    environment = {**os.environ, "SEPTET_SERVER": server.root}
    listed = CliRunner().invoke(main, ["ps"], env=environment)
    assert f"{MADE[2]} " in listed.output
    assert CliRunner().invoke(main, ["stop", MADE[2]], env=environment).exit_code == 0
    assert f"{MADE[2]}:latest" not in loaded(client)


def test_keep_alive_of_zero_unloads(client: ollama.Client, server: Server) -> None:
    client.generate("gemma3:270m", keep_alive="10m")
    n_engines = len(server.children())
    assert client.generate("gemma3:270m", keep_alive=0).done_reason == "unload"
    assert "gemma3:270m" not in loaded(client)
    assert len(server.children()) == n_engines - 1
