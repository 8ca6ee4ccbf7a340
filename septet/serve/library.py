"""The models that a pool can serve, and how one is loaded: the hub's store on one side, an engine on the other.

Used by `septet serve`. `StoreShelf`: all that are pulled, as they come and go; `NamedShelf`: those asked for at start.
`EngineLoader` does the sums before it loads, from the header of the model's file. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import septet
from septet.engine.sizing import CPU_SEQS, CPU_STEP_TOKENS, GPU_RESERVE, GPU_SEQS, GPU_STEP_TOKENS
from septet.errors import InvalidRequest, ModelNotFound
from septet.geometry import activation_bytes, kv_bytes_per_token, row_state_bytes, weight_bytes
from septet.hub.catalog import CATALOG
from septet.hub.footprint import loaded_bytes
from septet.hub.model_config import read_model_config
from septet.hub.modelfile import Recipe
from septet.hub.pull import canonical
from septet.hub.store import LocalModel, Store
from septet.machine import available_memory
from septet.serve.models import ModelCard, not_found
from septet.serve.pool import Need
from septet.session.preset import preset
from septet.session.start import engine_config, start_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from septet.config import EngineConfig, ModelConfig
    from septet.engine.messages import EngineInfo
    from septet.session.session import Session

__all__ = ["BUDGET_SHARE", "EngineLoader", "NamedShelf", "StoreShelf", "default_budget"]

NATIVE_LIBRARY = Path(septet.__file__).parent / "kernels" / "native" / "libseptet_native.so"
BUDGET_SHARE = 0.75  # of the memory that is free at start: the rest is the machine's
KV_SHARE = 0.125  # of the budget that the weights leave, for one model's KV pool: half of what an only model takes
CPU_RUNTIME = 192 << 20  # a process with torch in it
CPU_WORKSPACE = 128 << 20  # a step's temporaries
PACKED = 1.1  # what is made of packed weights beside them


# -- which models there are -------------------------------------------------------------------------------------------
class StoreShelf:
    """Every model in the store; the catalogue's come first."""

    def __init__(self, home: Path | None = None) -> None:
        self.store = Store(home)

    def cards(self) -> Sequence[ModelCard]:
        names = [manifest.name for manifest in self.store.all()]
        order = {entry.name: i for i, entry in enumerate(CATALOG)}
        names.sort(key=lambda name: (order.get(name, len(order)), name))
        return [ModelCard(name=n, root=n, created=int(self.store.modified(n))) for n in names]

    def find(self, name: str | None) -> LocalModel:
        if name is None:
            cards = self.cards()
            if not cards:
                raise ModelNotFound("no model is pulled yet; run: septet pull smollm2", param="model")
            name = cards[0].name
        with suppress(ModelNotFound):
            manifest = self.store.get(canonical(name, self.store))
            if manifest is not None and (local := self.store.local(manifest)):
                return local
        raise not_found(name, [card.name for card in self.cards()])


class NamedShelf:
    """The models of the command line, under the names they were given by."""

    def __init__(self, models: Sequence[LocalModel]) -> None:
        self.models = {model.name: model for model in models}
        if len(self.models) != len(models):
            raise InvalidRequest("two of these models have the same name; create one under another", param="model")

    def cards(self) -> Sequence[ModelCard]:
        return [ModelCard(name=m.name, root=m.name, created=_modified(m.path)) for m in self.models.values()]

    def find(self, name: str | None) -> LocalModel:
        if name is None:
            return next(iter(self.models.values()))
        model = self.models.get(name) or self.models.get(name.removesuffix(":latest"))
        if model is None:
            raise not_found(name, list(self.models))
        return model


def _modified(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0


# -- memory -----------------------------------------------------------------------------------------------------------
def has_gpu(options: dict[str, Any]) -> bool:
    """Whether engines of these options run on a GPU: asked without torch, which this process never loads."""
    device = options.get("device", "auto")
    return device == "cuda" or (device == "auto" and any(Path("/proc/driver/nvidia/gpus").glob("*")))


def default_budget(options: dict[str, Any]) -> int:
    """A share of the memory that is free now. InvalidRequest where that can't be found out."""
    if not has_gpu(options):
        return int(available_memory() * BUDGET_SHARE)
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(int(found.split()[0]) * 2**20 * options.get("memory_utilization", 0.9))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        raise InvalidRequest(
            "the GPU's free memory is not known; give --memory-budget", param="memory_budget"
        ) from None


class EngineLoader:
    """`options`: of every engine; `parsers`: of every session."""

    def __init__(self, options: dict[str, Any], parsers: dict[str, str], on_loaded: Callable[[Session], None]) -> None:
        self.options = options
        self.parsers = parsers
        self.on_loaded = on_loaded
        self.gpu = has_gpu(options)

    async def need(self, model: LocalModel, budget: int) -> Need:
        return await asyncio.to_thread(self._need, model, budget)

    async def load(self, model: LocalModel, need: Need) -> tuple[Session, int]:
        options = self.options | need.options | self.parsers
        session = await start_session(str(model.path), served_name=model.name, **options)
        self.on_loaded(session)
        return session, self._taken(session.client.info, need)

    def view(self, session: Session, model: LocalModel) -> Session:
        if model.recipe is not None:
            return preset(session, model.name, model.recipe, **self.parsers)
        if session.model_name == model.name:
            return session
        return preset(session, model.name, Recipe(parent=model.name), **self.parsers)

    def _need(self, model: LocalModel, budget: int) -> Need:
        config = read_model_config(model.path)
        asked = engine_config(str(model.path), self.options)
        length = min(asked.max_model_len or config.max_position, config.max_position)
        seqs = asked.max_num_seqs or (GPU_SEQS if self.gpu else CPU_SEQS)
        weights, fixed, kv_dtype = self._weights(model, config, asked, seqs)
        per_token = kv_bytes_per_token(config, kv_dtype)
        kv = asked.num_kv_slots * per_token or asked.kv_cache_memory
        if not kv:
            room = max(0, budget - weights - fixed)
            least = length * per_token if asked.max_model_len else 0
            kv = min(seqs * length * per_token, max(int(room * KV_SHARE), least))
        # The engine shortens the context to what the pool holds, but not one that was asked for.
        options = {"kv_cache_memory": kv} | ({"max_model_len": length} if asked.max_model_len else {})
        return Need(weights + fixed + kv + row_state_bytes(seqs, length), options)

    def _weights(self, model: LocalModel, config: ModelConfig, asked: EngineConfig, seqs: int) -> tuple[int, int, str]:
        """Bytes of the weights, of what comes with any engine, and the type of the KV pool's values."""
        if self.gpu:
            dtype = asked.dtype if asked.dtype != "auto" else "bfloat16"
            step = asked.max_num_batched_tokens or GPU_STEP_TOKENS
            return weight_bytes(config, dtype), GPU_RESERVE + activation_bytes(config, step, seqs, dtype), dtype
        fixed = CPU_RUNTIME + CPU_WORKSPACE + activation_bytes(config, CPU_STEP_TOKENS, 0, "float32")
        native = asked.kernels == "native" or (asked.kernels == "auto" and NATIVE_LIBRARY.exists())
        if native and asked.load_format == "auto":
            packed = loaded_bytes(model.path, config, config.dtype, native=True)
            return int(packed * PACKED), fixed, asked.dtype if asked.dtype != "auto" else "float16"
        dtype = asked.dtype if asked.dtype != "auto" else "float32"
        return weight_bytes(config, dtype), fixed, dtype

    def _taken(self, info: EngineInfo, need: Need) -> int:
        """What the engine has taken: measured where the system tells; pages of the KV pool come as they are used."""
        resident = _anonymous_bytes(info.pid) if not self.gpu else None
        if resident is None:
            return need.n_bytes
        return resident + info.num_kv_slots * info.kv_bytes_per_token + CPU_WORKSPACE


def _anonymous_bytes(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(kib) * 1024 if kib else None
