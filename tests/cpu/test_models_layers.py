"""Layers and registry by themselves: merged weights of mixed formats, rotary tables, errors, and that a forward pass
touches tensors through `Ops` alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from septet.config import RopeConfig
from septet.errors import ModelFileError, UnsupportedModel
from septet.kernels.reference import ReferenceOps
from septet.layers.build import Build
from septet.layers.linear import MergedLinear
from septet.layers.rope import RopeTables, inverse_frequencies
from septet.models.registry import MODELS, load_model
from septet.quant.none import Dense
from septet.quant.scheme import PackedWeight
from tests.families import FAMILIES, LLAMA3, make
from tests.forward import StateSource

if TYPE_CHECKING:
    from septet.kernels.ops import Ops


class Doubled(Dense):
    """A format of its own: stores half the weight. Does not stack with others."""

    def linear(self, ops: Ops, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return ops.linear(x, 2 * weight.tensors["weight"], bias)

    def concat(self, weights: list[PackedWeight]) -> PackedWeight | None:
        if not all(isinstance(w.scheme, Doubled) for w in weights):
            return None
        return doubled(2 * torch.cat([w.tensors["weight"] for w in weights]))


class Plain(Dense):
    """Dense that stacks with its own kind alone."""

    def concat(self, weights: list[PackedWeight]) -> PackedWeight | None:
        if not all(isinstance(w.scheme, Plain) for w in weights):
            return None
        return plain(torch.cat([w.tensors["weight"] for w in weights]))


def doubled(weight: torch.Tensor) -> PackedWeight:
    return PackedWeight(Doubled(), {"weight": weight / 2}, tuple(weight.shape))


def plain(weight: torch.Tensor) -> PackedWeight:
    return PackedWeight(Plain(), {"weight": weight}, tuple(weight.shape))


class MixedSource(StateSource):
    """Packs each matrix by the first letter of its name: p(lain) or d(oubled)."""

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        return {"p": plain, "d": doubled}[name[0]](self.vector(name, shape))


def build(source: StateSource, **config: Any) -> Build:
    return Build(
        replace(make("llama").config, **config), ReferenceOps(), source, torch.device("cpu"), torch.float32, 256
    )


# -- merged linear ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("formats", "n_weights"), [("ppp", 1), ("ddd", 1), ("ppd", 2), ("dpp", 2), ("pdp", 3), ("d", 1)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_merged_linear_of_any_formats(formats: str, n_weights: int, bias: bool) -> None:
    names = [f"{letter}{i}" for i, letter in enumerate(formats)]
    n_outs = [8, 4, 12][: len(formats)]
    state = {f"{name}.weight": torch.randn(n, 16) for name, n in zip(names, n_outs, strict=True)}
    state |= {f"{name}.bias": torch.randn(n) for name, n in zip(names, n_outs, strict=True)}
    layer = MergedLinear(build(MixedSource(state)), names, 16, n_outs, bias=bias)
    assert len(layer.weights) == n_weights
    x = torch.randn(5, 16)
    want = torch.cat([x @ state[f"{n}.weight"].T + (state[f"{n}.bias"] if bias else 0) for n in names], dim=-1)
    torch.testing.assert_close(layer(x), want)


# -- rotary tables ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
@pytest.mark.parametrize(("theta", "dim"), [(10_000.0, 64), (500_000.0, 128), (1_000_000.0, 256)])
def test_frequencies_are_those_of_transformers(kind: str, theta: float, dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "llama3": {**LLAMA3, "factor": 32.0, "low_freq_factor": 1.5, "original_max_position_embeddings": 8192},
    }[kind]
    config = LlamaConfig(head_dim=dim, rope_parameters={**scaling, "rope_theta": theta})
    want = LlamaRotaryEmbedding(config).inv_freq.numpy()
    factor = scaling.get("factor", 1.0)
    rope = RopeConfig(theta=theta, kind=kind, factor=factor, low_freq_factor=1.5, original_max_position=8192)
    torch.testing.assert_close(inverse_frequencies(rope, dim), want, rtol=1e-6, atol=0.0)


def test_factors_of_a_checkpoint_say_llama3_too() -> None:
    """GGUF stores unscaled / scaled per frequency; a file that also names the scaling means it once."""
    llama3 = RopeConfig(kind="llama3", factor=8.0, original_max_position=64)
    want = inverse_frequencies(llama3, 64)
    factors = inverse_frequencies(RopeConfig(), 64) / want
    assert factors.max() > 7.9
    for rope in (RopeConfig(), llama3):
        torch.testing.assert_close(inverse_frequencies(rope, 64, factors), want)


def test_one_table_per_rope_config_shared() -> None:
    source = StateSource({"rope_freqs.weight": torch.full((8,), 2.0)})
    tables = RopeTables(build(source))
    table = tables.table(RopeConfig())
    assert table.shape == (256, 16)
    assert table.dtype == torch.float32
    assert tables.table(RopeConfig(theta=10_000.0)) is table
    assert tables.table(RopeConfig(theta=5.0)) is not table
    # pair 0 turns by 1 radian a position, halved by its factor
    assert table[3, 0].item() == pytest.approx(torch.tensor(1.5).cos().item())
    assert table[3, 8].item() == pytest.approx(torch.tensor(1.5).sin().item())


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (RopeConfig(kind="yarn"), "rope scaling 'yarn' is not supported; supported: default, linear, llama3"),
        (RopeConfig(kind="llama3"), "original_max_position_embeddings > 0"),
        (RopeConfig(kind="llama3", original_max_position=9, low_freq_factor=4.0), "high_freq_factor > low_freq_factor"),
    ],
)
def test_unknown_or_senseless_scaling_is_refused(rope: RopeConfig, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        inverse_frequencies(rope, 64)


# -- registry ---------------------------------------------------------------------------------------------------------
def test_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(
        UnsupportedModel, match="'mamba' is not supported; supported: gemma3, llama, mistral, qwen2, qwen3"
    ):
        load_model(build(StateSource({}), architecture="mamba"))


def test_every_registered_model_is_tested_for_parity() -> None:
    assert {family.architecture for family in FAMILIES.values()} == set(MODELS)


def test_left_over_and_missing_tensors_are_errors() -> None:
    state = make("llama").hf.state_dict()
    load_model(build(StateSource(state)))
    with pytest.raises(ModelFileError, match=r"took: model.layers.1.self_attn.q_norm.weight"):
        load_model(build(StateSource({**state, "model.layers.1.self_attn.q_norm.weight": torch.ones(16)})))
    with pytest.raises(ModelFileError, match=r"no tensor model.layers.3.mlp.down_proj.weight"):
        load_model(build(StateSource({n: t for n, t in state.items() if n != "model.layers.3.mlp.down_proj.weight"})))


# -- a forward is a list of ops ---------------------------------------------------------------------------------------
class Recorder:
    """Ops that write down each call; `inside` while one computes."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.inside = False

    def __getattr__(self, name: str) -> Any:
        op = getattr(ReferenceOps(), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            self.inside = True
            try:
                return op(*args, **kwargs)
            finally:
                self.inside = False

        return call


class NothingOutside(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert self.recorder.inside, f"{func} was called outside of Ops"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_touches_tensors_through_ops_alone(name: str) -> None:
    pair, recorder = make(name), Recorder()
    gemma = pair.config.architecture == "gemma3"
    state = {k: t + 1 if gemma and "norm" in k else t for k, t in pair.hf.state_dict().items()}
    if pair.config.tie_embeddings:
        state.pop("lm_head.weight", None)
    model = load_model(replace(build(StateSource(state)), config=pair.config, ops=recorder))  # type: ignore[arg-type]
    pair.model = model
    batch = pair.harness().batch({0: [1, 2, 3], 4: [5]})
    recorder.calls.clear()
    with torch.no_grad(), NothingOutside(recorder):
        logits = model.forward(batch)
    assert logits.shape == (4, 199)
    attention, mlp = ["linear", "qkv_write", "attention", "linear"], ["linear", "gated_act", "linear"]
    post = ["rms_norm"] if gemma else []
    layer = ["add_rms_norm", *attention, *post, "add_rms_norm", *mlp, *post]
    tail = ["add_rms_norm", "take_rows", "linear", *(["soft_cap"] if gemma else [])]
    called = [name for name in recorder.calls if name != "value"]  # of a reference: what it is given
    assert called == ["embed", "rms_norm", *layer[1:], *layer * (pair.config.num_layers - 1), *tail]


def test_hidden_is_what_the_head_reads() -> None:
    pair = make("gemma3")
    harness = pair.harness()
    ids = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        ours = pair.model.hidden(harness.batch({0: ids}))
        theirs = pair.hf.model(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0.0)


def test_logits_only_where_wanted() -> None:
    pair = make("qwen3")
    batch = pair.harness().batch({0: [3, 1, 4], 1: [1, 5]})
    batch.logits_at = torch.tensor([4, 2])
    with torch.inference_mode():
        logits = pair.model.forward(batch)
    want = torch.stack((pair.logits([1, 5])[-1], pair.logits([3, 1, 4])[-1]))
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0.0)
