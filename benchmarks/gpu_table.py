"""The page that gpu.py writes, and the formulas of its figures."""

import subprocess

import train

FORMULAS = {
    "share of bandwidth": "bytes of a step / seconds / bandwidth of the copy above",
    "bytes of a new token": "all weights but tables of which one row is read, and keys and values",
    "share of peak (MFU)": "batch t (6 parameters + 12 layers d_model t) / seconds / peak of the "
    "card's data sheet in bfloat16 (SXM, dense); parameters = 12 layers d_model^2 + vocab d_model",
    "operations of attention": "2 t^2 heads features forward, 3.5 times that with backward",
    "ms": "median time of a step; for card that of ten; for decode that of one more token for each "
    "row of the batch, (long - short run) / tokens",
}
CARD_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


def result(row: dict, bandwidth: float | None, peak: float | None) -> str:
    """Returns what a row of the table says besides times."""
    for name in ("failed", "skipped"):
        if name in row:
            return f"{name}: {row[name]}"
    rates, told = row.get("rates", {}), []
    if "tokens" in rates:
        told.append(f"{rates['tokens']:,.0f} tokens/s")
    if "flops" in rates:
        share = f" ({rates['flops'] / peak:.1%} of bfloat16's peak)" if peak else ""
        told.append(f"{rates['flops'] / 1e12:,.1f} TFLOP/s{share}")
    if "bytes" in rates:
        share = f" ({rates['bytes'] / bandwidth:.1%} of bandwidth)" if bandwidth else ""
        told.append(f"{rates['bytes'] / 1e9:,.0f} GB/s{share}")
    return "; ".join([*told, *filter(None, (row["facts"].get("remark"), row["remark"]))])


def table(record: dict) -> str:
    """Returns the page of a measurement in Markdown."""
    rows, gpu = record["rows"], record["gpu"]
    copies = [x for x in rows if x["setting"] == "copy" and "rates" in x]
    bandwidth = copies[0]["rates"]["bytes"] if copies else None
    lines = [f"# {gpu or 'No GPU: sizes to try the program, and no measurement'}", ""]
    about = {"machine": record["machine"], "card": record["card"]} | record["versions"]
    lines += [", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += ["| part | setting | contender | ms | ours / it | first run, s | result |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["part"], row["setting"], row["contender"]]
        for name, scale, style in (("seconds", 1e3, ".3f"), ("ratio", 1, ".2f")):
            cells.append(f"{scale * row[name]:{style}}" if name in row else "")
        cells.append(f"{row['first_seconds']:.1f}" if "first_seconds" in row else "")
        cells.append(result(row, bandwidth, train.peak_flops(gpu)).replace("|", "/"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {k}: {v}" for k, v in FORMULAS.items()), ""])


def card() -> str:
    """Returns what nvidia-smi says of the card."""
    command = ["nvidia-smi", f"--query-gpu={CARD_QUERY}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not run: {error}"
    return " / ".join(run.stdout.strip().splitlines()) or run.stderr.strip()
