"""Tokenizers and templates against transformers, on tiny tokenizers and on well-known templates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import text_tiny

from septet.errors import InvalidRequest
from septet.text.template import ChatTemplate
from septet.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = [
    *text_tiny.CORPUS[:3],
    "",
    " ",
    "  two  spaces \n\n\n lines\r\n\ttab",
    "I'm DON'T we'LL 1234567 3.14",
    "<|im_start|>user\nhi<|im_end|><tool> </s> <s>",
    "😀 é e\u0301 日本語 \x00\x07 \ufffd",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def fast(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


def saved_sentencepiece(home: Path) -> Path:
    """As transformers converts a SentencePiece model: merges of its own making, a Prepend and Replace normaliser."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    pieces, scores, kinds = text_tiny.sentencepiece_vocabulary()
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    ordinary = {piece: scores[i] for piece, i in vocabulary.items() if kinds[i] == 1}
    merges = generate_merges({piece: vocabulary[piece] for piece in ordinary}, ordinary)
    backend = Backend(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", "\n\n")])
    PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL, add_bos_token=True).save_pretrained(home / "spm")
    return home / "spm"


@pytest.mark.parametrize("kind", ["byte", "spm"])
def test_ids_and_text_are_transformers(home: Path, kind: str) -> None:
    directory = text_tiny.byte_level(home)[0] if kind == "byte" else saved_sentencepiece(home)
    ours, theirs = load_tokenizer(directory), fast(directory)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == expected
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.special_ids >= set(theirs.all_special_ids)


def test_sentencepiece_as_checkpoint_and_as_gguf_agree(home: Path) -> None:
    directory = load_tokenizer(saved_sentencepiece(home))
    gguf = load_tokenizer(text_tiny.sentencepiece_gguf(home / "spm.gguf", add_space_prefix=True), home=home)
    for text in TEXTS:
        assert gguf.encode(text) == directory.encode(text)
        assert gguf.decode(gguf.encode(text)) == directory.decode(directory.encode(text))


# -- templates, written from the formats' descriptions
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson if message.content is mapping else message.content }}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model
'}}{%- endif -%}
"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set reasoning_content = '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last_query_index and reasoning_content %}
        {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
        {{- '\\n</think>\\n\\n' + content }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "qwen3": QWEN3}

CHATS = {
    "one": [{"role": "user", "content": " Hi there "}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "1 < 2 & é?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": "Sure?\n"},
    ],
    "wrong order": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
}
TOOLS = [
    {"type": "function", "function": {"name": "wétter", "parameters": {"properties": {"city": {"type": "string"}}}}}
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, "<é>"], "y": None}}}


@pytest.fixture(scope="module")
def theirs(home: Path) -> Any:
    return fast(text_tiny.byte_level(home)[0])


def both(theirs: Any, source: str, chat: list[dict[str, Any]], **options: Any) -> tuple[str | None, str | None]:
    """-> (ours, transformers'), None for a refusal."""
    ours: str | None
    try:
        ours = str(
            ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}).render(chat, **options)
        )
    except InvalidRequest:
        ours = None
    options = {"add_generation_prompt": not options.get("continue_final_message", False)} | options
    try:
        return ours, theirs.apply_chat_template(chat, chat_template=source, tokenize=False, **options)
    except Exception:
        return ours, None


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_prompts_are_transformers(theirs: Any, source: str, chat: list[dict[str, Any]]) -> None:
    variants: list[dict[str, Any]] = [{}, {"add_generation_prompt": False}, {"tools": TOOLS}]
    variants += [{"continue_final_message": True}] if chat[-1]["role"] == "assistant" else []
    for options in variants:
        ours, expected = both(theirs, source, chat, **options)
        assert ours == expected, options


def test_the_templates_do_render(theirs: Any) -> None:
    for source in TEMPLATES.values():
        assert both(theirs, source, CHATS["one"])[0]
    assert both(theirs, MISTRAL, CHATS["wrong order"]) == (None, None)


@pytest.mark.parametrize("source", [LLAMA3, QWEN3])
def test_tool_calls_are_transformers(theirs: Any, source: str) -> None:
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "42"},
    ]
    ours, expected = both(theirs, source, chat, tools=TOOLS)
    assert ours == expected
    assert ours is not None
    text = json.dumps(CALL["function"]["arguments"])  # type: ignore[index]
    chat[1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": text}}]
    assert both(theirs, source, chat, tools=TOOLS)[0] == expected


def test_a_variable_of_the_template(theirs: Any) -> None:
    ours, expected = both(theirs, QWEN3, CHATS["one"], enable_thinking=False)
    assert ours == expected
    assert ours is not None
    assert ours.endswith("</think>\n\n")


def test_the_real_templates(theirs: Any, smollm2_path: Path, gemma3_path: Path) -> None:
    for path in (smollm2_path, gemma3_path):
        tokenizer: Tokenizer = load_tokenizer(path)
        template = ChatTemplate.of(tokenizer)
        assert template is not None
        for chat in CHATS.values():
            try:
                ours: str | None = str(template.render(chat))
            except InvalidRequest:
                ours = None
            # Gemma's file has no template: ours is held against the format's own
            source = GEMMA if tokenizer.chat_template is None else tokenizer.chat_template
            theirs.bos_token = tokenizer.special_texts["bos_token"]
            try:
                expected = theirs.apply_chat_template(
                    chat, chat_template=source, tokenize=False, add_generation_prompt=True
                )
            except Exception:
                expected = None
            assert ours == expected
