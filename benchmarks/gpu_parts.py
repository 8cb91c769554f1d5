"""The parts of gpu.py: what is measured, at which sizes, and beside what."""

from dataclasses import dataclass, field

from decode import GPT, LLAMA, XL

PUBLISHED = "nanoGPT's README: the best is 1.4697, in about 3 minutes on an A100"


@dataclass
class Part:
    """Contenders, by the names of their columns, and the settings that each is measured on."""

    name: str
    contenders: dict[str, str]
    settings: dict[str, dict]
    config: dict = field(default_factory=dict)
    rounds: int = 5
    remark: str = ""

    @property
    def title(self) -> str:
        return " ".join([self.name, *self.config.get("called", [])])


def all_parts(tiny: bool, text: str) -> list[Part]:
    """Returns the parts in the order in which they are measured."""
    dtype = "float32" if tiny else "bfloat16"
    products = {
        f"product in {name}": {"n": 64 if tiny else 8192, "dtype": kind, "precision": precision}
        for name, kind, precision in (
            ("bfloat16", "bfloat16", "default"),
            ("float32, default precision (TF32)", "float32", "default"),
            ("float32, highest precision", "float32", "highest"),
        )
    }
    copy = {"copy": {"size": 2**20 if tiny else 2**32}}
    heads = {"heads": 4, "groups": 4} if tiny else {"heads": 12, "groups": 12}
    shape = heads | {"features": 64, "batch": 1}
    grouped = shape | {"groups": 4 if not tiny else 2}
    lengths = (33,) if tiny else (1024, 1023, 4096, 4097)
    kernels = {f"t {t}": shape | {"t": t} for t in lengths}
    odd = 33 if tiny else 1151
    kernels |= {
        f"t {odd}, grouped heads": grouped | {"t": odd},
        f"t {odd}, window": shape | {"t": odd, "window": 100},
    }
    if not tiny:
        kernels["batch 16, t 1024"] = shape | {"t": 1024, "batch": 16}
    small = dict(vocab=65, d_model=32, layers=2, heads=2)
    odd_model = small | {"t": 15} if tiny else GPT | {"layers": 2, "t": 1023}
    kernels["a model of 2 layers"] = {"model": odd_model | {"batch": 2}}
    gpt, llama, xl = (small, small | {"d_ff": 48}, small) if tiny else (GPT, LLAMA, XL)
    task = gpt | ({"t": 16, "batch": 2} if tiny else {"t": 1024, "batch": 16, "dtype": dtype})
    characters = dict(d_model=384, layers=6, heads=6, t=256, batch=64, dropout=0.2)
    characters |= {"steps": 5000, "eval_every": 250}
    if tiny:
        characters |= dict(d_model=32, layers=1, heads=2, steps=2, eval_every=1)
    attention = {
        f"t {t}, {'forward' if forward else 'forward and backward'}": {
            "t": t,
            "forward_only": forward,
        }
        for t in ((32,) if tiny else (2**10, 2**12, 2**14, 2**16))
        for forward in (True, False)
    }
    batches = {f"batch {b}": {"batch": b} for b in ((1, 2) if tiny else (1, 64, 8))}
    decoders = {"ours": "decoding", "ours, int8": "decoding, int8", "Hugging Face": "Hugging Face"}
    long = {"new": 8, "fewer": 2}
    return [
        Part("card", {"ours": "card"}, copy | products),
        Part("cudnn", {"ours": "cudnn"}, kernels, {"tolerance": 0.03}),
        Part(
            "train",
            {"ours": "training", "torch.compile": "torch training"},
            {f"{task['batch']} x {task['t']}": {}},
            task | {"compiled": not tiny},
        ),
        Part(
            "attention",
            {"ours": "attention", "torch": "torch attention"},
            attention,
            {"dtype": dtype},
        ),
        Part(
            "shakespeare",
            {"ours": "shakespeare"},
            {"10.6M": {}},
            characters | {"dtype": dtype, "text": text},
            remark=PUBLISHED,
        ),
        *(
            # Both counts must be in one bucket of sizes, so that they are one program.
            Part(
                "decode",
                decoders,
                batches,
                shape | {"dtype": dtype, "called": [name]} | (long if tiny else counts),
            )
            for name, shape, counts in (
                ("124M", gpt, {"new": 512, "fewer": 388}),
                ("Llama 2 7B", llama, {"new": 128, "fewer": 97}),
                ("1.5B", xl, {"new": 128, "fewer": 97}),
            )
        ),
    ]
