"""The command `jaxformers plan`."""

import argparse
import textwrap
from collections import Counter
from typing import Any

from jaxformers.cli.text_model import to_json

EXAMPLES = """examples:
  jaxformers plan --model 8b --mesh fsdp=8 --batch 8x8192
  jaxformers plan --model 70b --devices 512 --batch 512x8192 --chip h200 --json
  jaxformers plan --model 8b,num_layers=16 --mesh data=4,tensor=2 --batch 64x4096 --chip a100
  jaxformers plan --model SmolLM2-135M-Instruct --devices 4 --batch 64x32
"""


def add_plan(commands: argparse._SubParsersAction) -> None:
    """Adds the command `plan`."""
    parser = commands.add_parser(
        "plan",
        help="memory, traffic and time of training on a mesh of devices, without any of them",
        description="Print what a step of training takes on each device of a mesh: memory, bytes "
        "between devices and an estimate of the time; and which mesh it would choose.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a checkpoint, a config.json, or sizes: 8b, 70b, 405b, 8b,num_layers=16 or "
        "d_model=...,num_layers=...,num_heads=...,d_ff=...,vocab_size=...",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mesh", metavar="SIZES", help="such as data=8,fsdp=16,tensor=4,sequence=2")
    where.add_argument("--devices", type=int, metavar="N", help="choose a mesh of so many devices")
    parser.add_argument(
        "--batch", required=True, metavar="ROWSxTOKENS", help="of all devices, such as 512x8192"
    )
    parser.add_argument(
        "--chip",
        default="h100",
        metavar="NAME",
        help="a100, h100, h200, b200, v4, v5e, v5p, v6e, with numbers of your own such as "
        "h100,far=25e9 (default: h100)",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    from jaxformers.cli.model_sizes import find_model
    from jaxformers.sharding.chips import find_chip
    from jaxformers.sharding.choice import best_of, choose_mesh
    from jaxformers.sharding.workload import Workload

    mesh = None if options.mesh is None else read_mesh(options.mesh)
    rows, length = read_batch(options.batch)
    chip = find_chip(options.chip)
    work = Workload(find_model(options.model), rows, length)
    if mesh is None:
        chosen = choose_mesh(work, options.devices, chip)
        plan = chosen.plan
    else:
        plan = best_of(work, mesh, chip)
        chosen = choose_mesh(work, plan.devices, chip)
    found = figures(plan, chip) | {"choice": choice_of(chosen, chip)}
    print(to_json(found) if options.json else "\n".join(table(found)))
    return 0


def read_mesh(text: str) -> dict[str, int]:
    """Returns the sizes of a mesh by axis.

    Raises:
        ValueError: if an axis is unknown or there twice, or a size is no whole number above 0.

    Example:
        >>> read_mesh("data=2,fsdp=4")
        {'data': 2, 'fsdp': 4}
    """
    from jaxformers.sharding.mesh import AXES

    found: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (x.strip() for x in part.partition("="))
        if axis not in AXES or axis in found or not _is_size(size):
            raise ValueError(
                f"--mesh must be sizes above 0 of some of {', '.join(AXES)}, each once, such as "
                f"data=2,fsdp=4, got {text!r:.80}."
            )
        found[axis] = int(size)
    return found


def read_batch(text: str) -> tuple[int, int]:
    """Returns the rows and the tokens of a row.

    Raises:
        ValueError: if these are not two whole numbers above 0.

    Example:
        >>> read_batch("512x8192")
        (512, 8192)
    """
    rows, _, length = text.lower().partition("x")
    if not (_is_size(rows) and _is_size(length)):
        raise ValueError(
            f"--batch must be rows and tokens of a row, such as 512x8192, got {text!r:.80}."
        )
    return int(rows), int(length)


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12 and int(text) > 0


def figures(plan: Any, chip: Any) -> dict[str, Any]:
    """Returns the figures of a plan; bytes and operations are those of each device."""
    from jaxformers.sharding.choice import fits
    from jaxformers.sharding.duration import duration

    work, memory, seconds = plan.work, plan.memory, duration(plan, chip)
    operations = work.operations / plan.devices
    return {
        "parameters": work.numbers,
        "chip": chip._asdict(),
        "devices": plan.devices,
        "mesh": plan.mesh,
        "rows": work.rows,
        "tokens_per_row": work.length,
        "tokens": work.tokens,
        "rematerialized": plan.rematerialized,
        "scanned": work.scanned,
        "memory": {name: round(x) for name, x in memory._asdict().items()},
        "memory_arguments": round(memory.arguments),
        "memory_temporaries_estimate": round(memory.temporaries),
        "memory_total": round(memory.total),
        "fits": fits(plan, chip),
        "traffic": {kind: round(x) for kind, x in plan.traffic().items()},
        "traffic_of": moved(plan),
        "operations": round(operations),
        "seconds": seconds._asdict(),
        "seconds_total": seconds.total,
        "tokens_per_second": work.tokens / seconds.total,
        "mfu": operations / seconds.total / chip.flops,
        "assumptions": assumptions(work),
    }


def moved(plan: Any) -> dict[str, int]:
    """Returns the bytes by what they are."""
    found: Counter[str] = Counter()
    for transfer in plan.transfers():
        found[transfer.what] += round(transfer.size)
    return dict(found)


def choice_of(chosen: Any, chip: Any) -> dict[str, Any]:
    """Returns which mesh was chosen, and its main figures."""
    from jaxformers.sharding.duration import duration

    return {
        "mesh": chosen.plan.mesh,
        "rematerialized": chosen.plan.rematerialized,
        "fits": chosen.fits,
        "tried": chosen.tried,
        "memory_total": round(chosen.plan.memory.total),
        "seconds_total": duration(chosen.plan, chip).total,
    }


def assumptions(work: Any) -> list[str]:
    """Returns what the figures rest on."""
    from jaxformers.sharding.duration import REACHED, USABLE

    layers = "scanned" if work.scanned else "run one by one, since they differ"
    return [
        "numbers are computed with in bfloat16; weights, gradients and two moments are float32",
        f"layers are {layers}; they are computed again for the gradient if memory is short",
        "a backward pass has twice the operations of a forward pass; attention counts the pairs "
        "that a causal mask shows, which is half of all",
        "MFU counts no operation that is done again",
        f"matrix products and attention reach {REACHED:.0%} of the chip's most operations; "
        "MaxText has 50 % with 7B, torchtitan 33-39 % with 8B, on 8 H100",
        "weights and gradients of layers move while layers compute, keys and values while "
        "attention does; other traffic does not overlap; there are no latencies",
        "gradients are scattered, which moves half of the all-reduce that is shown",
        "all arguments and bytes are as XLA compiles them; temporaries and times are estimates",
        f"a step fits if it takes at most {USABLE:.0%} of the memory",
    ]


def table(found: dict[str, Any]) -> list[str]:
    """Returns the figures in lines for a reader."""
    chip, again = found["chip"], "computed twice" if found["rematerialized"] else "computed once"
    lines = [
        f"{found['parameters']:,} parameters on {found['devices']:,} {chip['name']}, "
        f"{name_of(found['mesh'])}",
        f"{found['rows']:,} rows of {found['tokens_per_row']:,} tokens, layers {again}",
        "",
        "memory of each device",
    ]
    lines += [row(x, name.replace("_", " ")) for name, x in found["memory"].items()]
    lines += [
        row(found["memory_arguments"], "arguments: weights, moments and batch"),
        row(found["memory_temporaries_estimate"], "temporaries (an estimate)"),
        row(found["memory_total"], "in all" if found["fits"] else "in all, which does NOT fit"),
        "",
        "bytes of a step between devices, of the results on each",
        *(row(x, kind) for kind, x in found["traffic"].items()),
        *(row(x, f"  {what}") for what, x in found["traffic_of"].items()),
        "",
        "time of a step (an estimate)",
    ]
    lines += [f"{x:>14.4f} s  {name.replace('_', ' ')}" for name, x in found["seconds"].items()]
    choice = found["choice"]
    lines += [
        f"{found['seconds_total']:>14.4f} s  in all: {found['tokens_per_second']:,.0f} tokens per "
        f"second, MFU {found['mfu']:.1%}",
        "",
        f"choice of {choice['tried']} meshes: {name_of(choice['mesh'])}, "
        f"{choice['seconds_total']:.4f} s, {choice['memory_total'] / 1e9:,.1f} GB"
        + ("" if choice["fits"] else ". None fits; this one needs least memory"),
        "",
        "assumed:",
    ]
    folded = (textwrap.wrap(x, 77) for x in found["assumptions"])
    return lines + [
        f"{'  ' if i else '- '}{line}" for part in folded for i, line in enumerate(part)
    ]


def row(size: int, name: str) -> str:
    return f"{size / 1e9:>14,.3f} GB  {name}"


def name_of(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"
