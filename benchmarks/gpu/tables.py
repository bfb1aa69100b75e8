"""The findings as tables in Markdown, for docs/performance.md."""

import statistics

PHASES = ("rollout", "reference", "training", "optimizer")
DEMOS, RANKS = ("demo on the CPU", "demo"), ("one rank", "ranks")  # parts that are compared


def markdown(report: dict) -> str:
    """report: as __main__.py writes it."""
    parts, sections = report["parts"], [about(report)]
    makers = {
        "Right?": right(parts) + demo(parts) + ranks(parts),
        "Fast?": fast(parts, report["expected"], report["rates"]),
        "Fits?": fits(parts),
        "Beside TRL": beside(parts),
    }
    for title, lines in makers.items():
        if lines:
            sections.append(f"## {title}\n\n" + "\n".join(lines))
    sections.append("## Parts\n\n" + "\n".join(status(parts)))
    return "\n\n".join(sections) + "\n"


def about(report: dict) -> str:
    card, rates = report["card"], report["rates"]
    if not card:
        return "The device did not answer."
    name = f"{card['count']} x {card['name']}"
    if "gb" in card:
        name += f", {card['gb']:.1f} GB, compute capability {card['capability']}"
    libraries = ", ".join(card["libraries"]) or "none of triton, flash_attn, bitsandbytes"
    said = f"{name}; torch {card['torch']}, CUDA {card['cuda']}; {libraries}; "
    said += f"{report['shapes']} shapes"
    if rates:
        said += (
            f". Measured: {rates['flops'] / 1e12:.3g} TFLOP/s in bfloat16, "
            f"{rates['bandwidth'] / 1e12:.3g} TB/s, {1e6 * rates['launch']:.1f} microseconds a "
            f"launch, {1e6 * rates['wait']:.0f} a wait"
        )
    return said + "."


def table(*titles: str) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]


def line(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


# ---- right? -------------------------------------------------------------------------------------


def checks(parts: dict) -> list[dict]:
    """The findings with an error and what is allowed of it."""
    found = [f for part in parts.values() for f in part["found"].values() if isinstance(f, dict)]
    return [finding for finding in found if "allowed" in finding] + compared(parts)


def compared(parts: dict) -> list[dict]:
    """The demo's rewards beside the CPU's, and several devices' beside one's. A token whose draw
    rounding decides changes a completion, one of 16 of a step."""
    found = {name: parts.get(name, {}).get("found", {}) for name in (*DEMOS, *RANKS)}
    pairs = [
        (f"demo, {run}", found[DEMOS[0]].get("float32"), x) for run, x in found[DEMOS[1]].items()
    ]
    pairs += [(f"ranks, {run}", found[RANKS[0]].get(run), x) for run, x in found[RANKS[1]].items()]
    rows = []
    for what, one, other in pairs:
        if one is None:
            continue
        rewards = [found["reward"] for found in (one, other)]
        first = abs(rewards[0][0] - rewards[1][0])
        mean = abs(statistics.mean(rewards[0]) - statistics.mean(rewards[1]))
        for which, value in (("of the first step", first), ("of all steps", mean)):
            row = {"what": f"{what}: reward {which}, apart", "error": value, "allowed": 0.15}
            rows.append(row | {"ok": value <= row["allowed"]})
    return rows


def right(parts: dict) -> list[str]:
    rows = [
        line(f["what"], f"{f['error']:.2g}", f"{f['allowed']:.2g}", "yes" if f["ok"] else "**NO**")
        for f in checks(parts)
    ]
    return table("against float64", "error", "allowed", "right") + rows if rows else []


def demo(parts: dict) -> list[str]:
    """The demo's mean rewards on the device beside the CPU's."""
    names = [name for name in DEMOS if name in parts]
    rows = []
    for name in names:
        for run, found in parts[name]["found"].items():
            rewards = found["reward"]
            cells = [f"{rewards[0]:.3f}", f"{statistics.mean(rewards):.3f}", f"{rewards[-1]:.3f}"]
            seconds = statistics.median(found["seconds"][1:] or found["seconds"])
            rows.append(line(f"{name}, {run}", len(rewards), *cells, number(seconds)))
    titles = ("flowers", "steps", "reward of the first", "of all", "of the last", "s a step")
    return ["", *table(*titles), *rows] if rows else []


def ranks(parts: dict) -> list[str]:
    """Several devices beside one: rewards and gradient norms of each step, as differences."""
    one, many = (parts.get(name, {}).get("found", {}) for name in RANKS)
    rows = []
    for name in [name for name in many if name in one]:
        apart = [
            max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(*pair, strict=True))
            for pair in ((one[name][k], many[name][k]) for k in ("reward", "grad_norm"))
        ]
        seconds = [statistics.median(found[name]["seconds"]) for found in (one, many)]
        rows.append(line(name, *(f"{value:.2g}" for value in apart), *map(number, seconds)))
    titles = ("several devices against one", "reward, apart", "gradient norm, apart")
    return ["", *table(*titles, "s a step on one", "on several"), *rows] if rows else []


# ---- fast? fits? --------------------------------------------------------------------------------


def cases(parts: dict) -> dict[str, dict]:
    """The findings of each case that was measured to its end."""
    return {name: part["found"] for name, part in parts.items() if "step" in part["found"]}


def fast(parts: dict, expected: dict, rates: dict) -> list[str]:
    rows = []
    for name, found in cases(parts).items():
        predicted, cells = expected.get(name, {}), []
        for phase in PHASES:
            seconds = found["seconds"].get(phase)
            cells.append(f"{number(seconds)} / {number(predicted.get('seconds', {}).get(phase))}")
        whole = sum(predicted["seconds"][p] for p in PHASES) if predicted else None
        cells.append(f"{number(found['step'])} / {number(whole)}")
        perf, waits = found["perf"], found.get("waits", {})
        cells.append(f"{perf['perf/completion_tokens_per_s']:,.0f}")
        mfu = perf.get("perf/mfu")
        cells.append("-" if mfu is None else f"{100 * mfu:.1f} %")
        cells.append(bandwidth(found, predicted, rates))
        cells.append(", ".join(f"{n} {count}" for n, count in waits.items()) or "none")
        cells.append(f"{found['drift']:.2g}")
        rows.append(line(name, *cells))
    skipped = [
        line(name, part["found"]["skipped"], *[""] * 9)
        for name, part in parts.items()
        if "skipped" in part["found"] and "work" in part["found"]
    ]
    titles = ("measured / predicted, s", *PHASES, "step", "completion tokens/s", "MFU")
    titles += ("decoding, of the bandwidth", "waits", "drift, nats")
    return table(*titles) + rows + skipped if rows or skipped else []


def bandwidth(found: dict, predicted: dict, rates: dict) -> str:
    """What decode steps must read and write, at the rate that it took, as a share of a copy's."""
    if not predicted or not rates or "decode" not in found:
        return "-"
    return f"{100 * predicted['decode_bytes'] / found['decode'] / rates['bandwidth']:.0f} %"


def fits(parts: dict) -> list[str]:
    rows = []
    for name, found in cases(parts).items():
        cells = []
        for phase in PHASES:
            plan, peak = found["plan"].get(phase), found["gb"].get(phase)
            ratio = f" = {plan / peak:.2f}" if plan and peak else ""
            cells.append(f"{number(plan, 4)} / {number(peak, 4)}{ratio}")
        graphs = "yes" if found["graphs"] else "no"
        rows.append(line(name, *cells, number(found.get("used"), 4), graphs))
    titles = ("planned / allocated, GB", *PHASES, "of the device, at the end", "graphs")
    return table(*titles) + rows if rows else []


# ---- beside TRL ---------------------------------------------------------------------------------


def beside(parts: dict) -> list[str]:
    def steps(*names: str) -> list[float]:
        found = [parts[name]["found"] for name in names if name in parts]
        return [s for f in found for s in f.get("seconds", []) if not isinstance(s, str)]

    ours = [parts[n]["found"]["step"] for n in parts if n.startswith("ours ") and
            "step" in parts[n]["found"]]  # fmt: skip
    rows = []
    for name, trl in (("TRL", steps("TRL 1", "TRL 2")), ("TRL, vLLM", steps("TRL with vLLM"))):
        if trl and ours:
            a, b = statistics.median(ours), statistics.median(trl)
            rows.append(line(name, number(a), number(b), f"{a / b:.3f}", len(trl)))
    return table("a step, s", "ours", "the peer's", "ratio", "its steps") + rows if rows else []


def status(parts: dict) -> list[str]:
    rows = [
        line(name, part["status"], part["seconds"],
             part.get("why") or part["found"].get("skipped") or "")
        for name, part in parts.items()
    ]  # fmt: skip
    return table("part", "", "s", "") + [row.replace("\n", " ") for row in rows]
