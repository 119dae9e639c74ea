"""The report of the GPU tests: results.json as a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

# What people ask for when they bring a model of this size (first token p50, a token, tokens a second, requests at a time, GPU busy).
TARGETS = (
    "first token p50 < 500 ms, < 50 ms for each token after it, > 1,000 tokens/s, > 100 at a time, GPU busy > 80 %"
)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, least and most; one value by itself."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratio(rows: Sequence[dict[str, Any]], streams: int, way: str, to: str) -> float | None:
    """The median of the throughputs of one way over that of another."""

    def throughputs(of: str) -> list[float]:
        return [row["output_throughput"] for row in rows if row["way"] == of and row["streams"] == streams]

    if not throughputs(way) or not throughputs(to):
        return None
    return statistics.median(throughputs(way)) / statistics.median(throughputs(to))


def changed_text(found: dict[str, Any]) -> str:
    """What a change of the instance took."""
    said = [f"The role took {found['seconds']:.0f} s."]
    if "compiled" in found:
        said.append(f"A kernel was compiled in the sandbox of the unit in {found['compiled']:.1f} s.")
    if "proof" in found:
        said.append(f"The tiny model answered after {found['proof']:.0f} s.")
    said.append(f"vLLM started in {found['startup']:.0f} s; KV cache: {found['kv_cache_tokens']:,} tokens.")
    if "sampler" in found:
        said.append(f"It {'took' if found['sampler'] else 'did not take'} FlashInfer's sampler.")
    return " ".join(said)


def throughput_table(rows: Sequence[dict[str, Any]]) -> str:
    """Throughput of the unit by number of streams, one run each."""
    return "\n".join(
        ["| streams | tokens/s | first token p50, ms | each token p50, ms |", "|---|---|---|---|"]
        + [
            f"| {row['streams']} | {row['output_throughput']:,.0f} | {row['median_ttft_ms']:.2f} | {row['median_tpot_ms']:.2f} |"
            for row in rows
        ]
    )


def shared_table(shared: dict[str, Any]) -> str:
    """When two engines on one GPU started, one line for each way to start them."""
    lines = [
        "| started by | the first served | the second's first line of vLLM | the second served |",
        "|---|---|---|---|",
    ]
    for how, name in (("role", "the role"), ("restart", "systemd, both at once")):
        if how not in shared:
            continue
        first, second = shared[how]
        begun = min(first["begun"], second["begun"])
        moments = [first["complete"], second.get("turn", second["begun"]), second["complete"]]
        lines.append(f"| {name} | " + " | ".join(f"{moment - begun:.0f}" for moment in moments) + " |")
    return "\n".join(lines)


def render(results: dict[str, Any]) -> str:
    """The page."""
    deploy = results.get("deploy", {})
    parts = [
        "# vLLM on a real GPU",
        "    make gpu",
        f"{deploy.get('os', '')}, systemd {deploy.get('systemd', '')}, {deploy.get('processors', '')} processors; GPUs: "
        f"{'; '.join(deploy.get('gpus', []))}. vLLM {deploy.get('vllm', '')}, torch {deploy.get('torch', '')}. The model has the shape of "
        "Llama 3.1 8B in bfloat16 and random weights. Client, gateway and vLLM share the machine.",
    ]
    if deploy:
        parts += [
            "## Deployment",
            f"site.yml from the bare machine to a completion through the gateway: {deploy['seconds']:.0f} s, of which vLLM started for "
            f"{deploy['startup']:.0f} s, without any cache. A second run changed nothing and took {deploy['seconds_again']:.0f} s. "
            f"The driver: {(deploy['decision'] or ['nothing was to be decided'])[0]}. CUDA compilers on the host: "
            f"{', '.join(deploy.get('compilers', [])) or 'none'}. KV cache: {deploy.get('kv_cache_tokens', 0):,} tokens.",
        ]
    if unit := results.get("unit"):
        names = {what: [path for path, how in unit["devices"] if how == what] for what in ("refused", "works")}
        parts += [
            "## The unit",
            f"`systemd-analyze security` says {unit['score']} (0 is best). On cgroup v{unit['cgroup']}, a program run by the unit was refused "
            f"all {unit['refused']} things that it tried: files, sockets, privileges, and the devices {', '.join(names['refused'])}. It could open "
            f"{', '.join(names['works']) or 'no GPU'}.",
        ]
    if recover := results.get("recover"):
        parts += [
            "## kill -9 of the engine",
            f"All its processes were gone after {recover['gone']:.1f} s, with {recover['mib_after_kill']:,} of {recover['mib_before']:,} MiB of GPU "
            f"memory in use then, and it served again after {recover['served_again']:.0f} s.",
        ]
    if proof := results.get("proof"):
        parts += [
            "## The proof of a start",
            f"The instance was to be restarted with what no start survives: `{proof['reason'].strip()}`. That was refused after {proof['refused']:.0f} s, "
            f"and {proof['answered']} of the {proof['asked']} requests meanwhile were answered by what ran.",
        ]
        if passed := proof.get("passed"):
            parts[-1] += (
                f" With a harmless change the tiny model answered after {passed['proof']:.0f} s, and then the instance was restarted, which took "
                f"{passed['startup']:.0f} s (warm)."
            )
    if judgement := results.get("judgement"):
        before, most = judgement["mib"]
        parts += [
            "## vLLM's judgement, and a new internal key",
            f"vLLM judged its first configuration, of a release that nobody had run, in {spread(deploy.get('judged', []), 1)} s, and "
            f"{len(judgement['judged'])} others later in {spread(judgement['judged'], 1)} s. It took "
            f"{f'{most - before:,} MiB' if most > before else 'no memory'} of the GPU for it ({before:,} MiB were in use before, {most:,} at most). "
            f"An option that it refuses (`{judgement['reason'].strip()}`) was told after {judgement['refused']:.0f} s. "
            f"{judgement['requests'][1]} of the {judgement['requests'][0]} requests during all that were answered. With a new internal key site.yml "
            f"took {judgement['rotated']:.0f} s and restarted nothing: {judgement['rotation'][1]} of {judgement['rotation'][0]} requests were "
            "answered, and the former key was refused afterwards.",
        ]
    if shared := results.get("shared"):
        parts += [
            "## Two engines on one GPU",
            f"A second instance beside the first one, each with its share of the memory; the role took {shared['seconds']:.0f} s. One of them waits "
            "until the other answers. Seconds after the first process was started:",
            shared_table(shared),
        ]
        if "mib" in shared:
            tokens = " and ".join(f"{number:,}" for number in shared["kv_cache_tokens"])
            parts += [f"KV caches: {tokens} tokens; {shared['mib']:,} MiB of GPU memory in use."]
    for name, title in (("parallel", "Two GPUs, tensor-parallel-size 2"), ("toolkit", "With a CUDA toolkit")):
        if found := results.get(name):
            parts += [f"## {title}", changed_text(found), throughput_table(found.get("throughput", []))]
    if starts := results.get("starts"):
        warm = statistics.median(starts["warm"])
        rows = [
            ("cold: no caches", starts["cold"]),
            ("warm", starts["warm"]),
            ("a new release that inherits the caches", starts["inherited"]),
        ]
        parts += [
            "## Starts",
            "Seconds from the start of the process to `Application startup complete`; median, least and most.",
            "\n".join(
                ["| start | seconds | to warm |", "|---|---|---|"]
                + [
                    f"| {name} | {spread(values, 1)} | {statistics.median(values) / warm:.2f} |"
                    for name, values in rows
                    if values
                ]
            ),
        ]
    if throughput := results.get("throughput"):
        streams = sorted({row["streams"] for row in throughput})
        lines = [
            "| streams | way | tokens/s | first token p50, ms | p99, ms | each token p50, ms |",
            "|---|---|---|---|---|---|",
        ]
        for number in streams:
            for way, name in (
                ("bare", "bare process"),
                ("unit", "hardened unit"),
                ("gateway", "unit, through the gateway"),
            ):
                rows_of = [row for row in throughput if row["way"] == way and row["streams"] == number]
                if not rows_of:
                    continue
                columns = [spread([row["output_throughput"] for row in rows_of])]
                columns += [
                    spread([row[key] for row in rows_of], 2)
                    for key in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
                ]
                lines.append(f"| {number} | {name} | {' | '.join(columns)} |")
        ratios = [
            f"{name} at {number}: {value:.3f}"
            for name, way, to in (("hardened / bare", "unit", "bare"), ("gateway / straight", "gateway", "unit"))
            for number in streams
            if (value := ratio(throughput, number, way, to)) is not None
        ]
        parts += [
            "## Throughput and first token",
            "`vllm bench serve`, random prompts of 512 tokens and answers of 128, taken in turns; median, least and most of the runs. Bare process "
            "and unit are on the GPU at the same time, with 42 % of its memory each, and one is idle while the other is measured.",
            "\n".join(lines),
            "Ratios of the medians of tokens/s: " + "; ".join(ratios) + ".",
        ]
    if rate := results.get("rate"):
        parts += [
            "## At a steady rate",
            f"Requests that arrive at {rate['requests_per_second']:.1f} a second, at random moments, for {rate['duration']:.0f} s, through the gateway: "
            "the rate that a client with 128 requests at a time had reached. The targets that people bring: "
            + TARGETS
            + ".",
            "\n".join(
                [
                    "| at a time | first token p50, ms | p99, ms | each token p50, ms | tokens/s | GPU busy |",
                    "|---|---|---|---|---|---|",
                    f"| {rate['running']:.0f} | {rate['median_ttft_ms']:.0f} | {rate['p99_ttft_ms']:.0f} | {rate['median_tpot_ms']:.1f} | "
                    f"{rate['output_throughput']:,.0f} | {rate['busy']:.0f} % |",
                ]
            ),
        ]
    return "\n\n".join(parts) + "\n"
