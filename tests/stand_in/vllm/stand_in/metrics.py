"""The metrics, with the names, labels and help of a real vLLM: a scrape of it, in which what this server counts stands in."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

RECORDED = Path(__file__).with_name("metrics.prom")
LINE = re.compile(r"^([a-zA-Z_:]+)(\{.*\})? (\S+)$")


class Metrics:
    """What was served, and how it is told."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.counted: Counter[str] = Counter()
        # As the engine told them after its last step: one that hangs takes none, whoever comes and goes.
        self.running = self.waiting = 0
        self.kv = 0.0

    def text(self) -> str:
        """The answer for /metrics."""
        values: dict[str, float] = {
            "vllm:num_requests_running": self.running,
            "vllm:num_requests_waiting": self.waiting,
            "vllm:kv_cache_usage_perc": self.kv,
            "vllm:iteration_tokens_total_count": self.counted["iterations"],
            "vllm:prompt_tokens_total": self.counted["prompt"],
            "vllm:generation_tokens_total": self.counted["generated"],
            'vllm:request_success_total{finished_reason="length"}': self.counted["requests"],
        }
        told = []
        for line in RECORDED.read_text().splitlines():
            found = LINE.match(line)
            if found and line.startswith("vllm:"):
                labels = re.sub(r'model_name="[^"]*"', f'model_name="{self.model}"', found[2] or "")
                reason = re.search(r'finished_reason="\w+"', labels)
                key = f"{found[1]}{{{reason[0]}}}" if reason else found[1]
                line = f"{found[1]}{labels} {float(values[key]) if key in values else found[3]}"
            told.append(line)
        return "\n".join(told) + "\n"
