"""What an outcome amounts to: percentiles, throughput, goodput under targets, hit rate, cost. Text and data.

Called by `septet simulate` and by the validation, which holds a prediction against a measurement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.advisor.simulate import Outcome

__all__ = ["Summary", "percentile", "summarise"]


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the closest ranks; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    requests: int
    refused: int
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    goodput_share: float  # of requests within both targets
    hit_rate: float
    busy: float  # share of the replicas' time in steps
    preemptions: int
    usd_per_million: float  # output tokens

    def data(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        def row(name: str, of: dict[str, float]) -> str:
            return f"  {name} ms   " + "   ".join(f"{k} {v:,.1f}" for k, v in of.items())

        return [
            f"{self.requests:,} requests in {self.seconds:,.1f} s, to the last answer: {self.requests_per_s:,.2f} "
            f"requests/s, {self.output_tokens_per_s:,.0f} output tokens/s"
            + (f", {self.refused} refused" if self.refused else ""),
            row("TTFT", self.ttft_ms),
            row("TPOT", self.tpot_ms),
            f"  goodput {self.goodput_share:.1%} within the targets, prefix hits {self.hit_rate:.1%}, replicas busy "
            f"{self.busy:.0%}, {self.preemptions} preemptions, ${self.usd_per_million:.3f} per million output tokens",
        ]


def summarise(outcome: Outcome, *, ttft_ms: float = 500.0, tpot_ms: float = 50.0, usd_per_hour: float = 0.0) -> Summary:
    """usd_per_hour: of one replica."""
    done = [s for s in outcome.served if s.end >= 0]
    firsts, laters = [1e3 * s.ttft for s in done], [1e3 * s.tpot for s in done if s.output > 1]
    good = sum(1 for s in done if 1e3 * s.ttft <= ttft_ms and 1e3 * s.tpot <= tpot_ms)
    tokens, seconds = sum(s.output for s in done), outcome.seconds or 1e-9

    def spread(values: list[float]) -> dict[str, float]:
        mean = sum(values) / len(values) if values else 0.0
        return {"mean": mean, **{f"p{round(100 * q)}": percentile(values, q) for q in (0.5, 0.9, 0.95, 0.99)}}

    return Summary(
        requests=len(outcome.served),
        refused=sum(1 for s in outcome.served if s.refused),
        seconds=outcome.seconds,
        requests_per_s=len(done) / seconds,
        output_tokens_per_s=tokens / seconds,
        ttft_ms=spread(firsts),
        tpot_ms=spread(laters),
        goodput_share=good / len(outcome.served) if outcome.served else 0.0,
        hit_rate=outcome.hit_rate,
        busy=outcome.busy_s / (outcome.replicas * seconds),
        preemptions=outcome.preemptions,
        usd_per_million=outcome.replicas * usd_per_hour * seconds / 3600 / tokens * 1e6 if tokens else 0.0,
    )
