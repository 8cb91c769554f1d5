"""The planner: its figures by hand for a small model, its choice, and broken options.

That arguments and bytes are those of compiled programs is checked on devices, by
`sharded_checks.py plan`.
"""

import json
import math

import jax
import numpy as np
import pytest

from jaxformers import MixtureOfExperts, TransformerEncoder, TransformerLM, scan_layers
from jaxformers.__main__ import main
from jaxformers.cli.model_sizes import find_model, read_sizes
from jaxformers.cli.plan import read_batch, read_mesh
from jaxformers.sharding.chips import CHIPS, Chip, find_chip
from jaxformers.sharding.choice import choose_mesh, divisors, fits, meshes
from jaxformers.sharding.duration import REACHED, around, duration, seconds_of
from jaxformers.sharding.plan import Plan, Transfer
from jaxformers.sharding.workload import Workload

pytestmark = pytest.mark.usefixtures("no_shape_checker")

# Sizes of a small model like Llama: width, layers, heads, features of a head, feed-forward, tokens.
D, L, N, G, H, F, V = 32, 3, 8, 4, 4, 48, 72
SIZES = f"d_model={D},num_layers={L},num_heads={N},num_kv_heads={G},d_ff={F},vocab_size={V}"
LAYER = 2 * D * N * H + 2 * D * G * H + 3 * D * F
GAINS = L * 2 * D + D
B, T = 8, 16
# One operation, byte and second of everything, on hosts of four.
UNIT = Chip("unit", 1.0, 1e9, 1.0, 1.0, 0.125, 4)


@pytest.fixture
def work():
    return Workload(find_model(SIZES), B, T, "float32")


def test_what_a_step_does(work):
    assert work.numbers == L * LAYER + 2 * V * D + GAINS
    assert work.scanned and not work.tied
    assert work.map_operations == B * T * 2 * (L * LAYER + V * D)
    assert work.attention_operations == B * L * 4 * N * H * T * (T + 1) // 2
    assert work.operations == 3 * (work.map_operations + work.attention_operations)
    assert work.output_operations == 2 * B * T * V * D


def test_a_window_hides_pairs():
    model = TransformerLM(V, D, N, 1, F, T, window=3, key=jax.random.key(0))
    found = Workload(model, B, T)
    assert found.attention_operations == B * 4 * D * (1 + 2 + (T - 2) * 3)
    longer = Workload(TransformerLM(V, D, N, 1, F, T, window=99, key=jax.random.key(0)), B, T)
    assert longer.attention_operations == B * 4 * D * T * (T + 1) // 2


def test_memory(work):
    """Over data each device has all; fsdp divides what is no vector, tensor what it can."""
    numbers = L * LAYER + 2 * V * D
    for mesh, weights in {
        "data=8": numbers + GAINS,
        "fsdp=8": numbers / 8 + GAINS,
        "fsdp=2,tensor=4": numbers / 8 + GAINS,
        "sequence=4": numbers + GAINS,
    }.items():
        sizes = read_mesh(mesh)
        rows = sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("sequence", 1)
        memory = Plan(work, sizes).memory
        assert memory.weights == 4 * weights and memory.moments == 8 * weights
        arrays = 4 if "sequence" in sizes else 2
        assert memory.batch == arrays * 4 * B * T / rows
        assert memory.arguments == memory.weights + memory.moments + memory.batch
        assert memory.total == memory.arguments + memory.temporaries
        assert memory.narrow_weights == 0  # float32


def test_activations():
    """What JAX keeps of a layer: norms in float32, and what maps make and read, in 16 bits."""
    work = Workload(find_model(SIZES), B, T)
    every, one = work.kept(1)
    assert every == L * one
    # Two norms keep three arrays each in float32, and five arrays are in the stream's own type.
    least = 2 * 3 * 4 * D + 5 * 2 * D + 2 * 2 * N * H + 2 * 2 * G * H + 6 * 2 * F
    assert least <= one <= 1.2 * least
    # Over tensor all but the stream is divided.
    _, half = work.kept(2)
    divided = 2 * 2 * N * H + 2 * 2 * G * H + 6 * 2 * F
    assert divided / 2 <= one - half <= 0.6 * divided
    kept = Plan(work, {"fsdp": 8}, rematerialized=False).memory.activations
    assert kept == B * T / 8 * (L + 1) * one
    again = Plan(work, {"fsdp": 8}, rematerialized=True).memory.activations
    assert again == B * T / 8 * (L * 2 * D + one)


def test_traffic(work):
    weights = 4 * (L * LAYER + 2 * V * D)
    stream = 4 * B * T * D
    assert Plan(work, {}).traffic() == {}
    assert Plan(work, {"data": 8}).traffic() == {"all-reduce": weights + 4 * GAINS}
    fsdp = Plan(work, {"fsdp": 8}).traffic()
    assert fsdp["all-gather"] == weights + 4 * L * LAYER  # those of layers twice
    assert fsdp["all-reduce"] == weights + 4 * GAINS
    # Forward after attention and feed-forward, backward before q, k, v, gate and up; both ends.
    sums = (7 * L + 2) * stream + 3 * 4 * B * T
    tensor = {"tensor": 4}
    assert Plan(work, tensor, rematerialized=False).traffic() == {"all-reduce": sums}
    assert Plan(work, tensor).traffic() == {"all-reduce": sums + L * stream}
    ring = Plan(work, {"sequence": 4}, rematerialized=False).traffic()
    keys = 4 * B * T / 4 * 2 * G * H  # of a device, keys and values
    places = 2 * 4 * B * T / 4
    assert ring["collective-permute"] == 4 * (L * 3 * keys + (L + 1) * places)
    both = Plan(work, {"data": 2, "sequence": 4}).traffic()["all-reduce"]
    assert both == 2 * (weights + 4 * GAINS)  # over rows, then over positions


def test_a_tied_table_has_two_gradients():
    tied = Workload(find_model(SIZES + ",tied=1"), B, T, "float32")
    weights = 4 * (L * LAYER + V * D)
    assert Plan(tied, {"data": 2}).traffic()["all-reduce"] == weights + 4 * (GAINS + V * D)
    assert Plan(tied, {"fsdp": 2}).traffic()["all-gather"] == weights + 4 * L * LAYER
    sums = (8 * L + 2) * 4 * B * T * D + 3 * 4 * B * T
    assert Plan(tied, {"tensor": 2}).traffic()["all-reduce"] == sums


def test_layers_one_by_one_are_gathered_once():
    model = TransformerLM(V, D, N, 2, F, T, use_bias=False, key=jax.random.key(0))
    one_by_one, scanned = (Workload(x, B, T, "float32") for x in (model, scan_layers(model)))
    layers = 4 * 2 * (4 * D * D + 2 * D * F)
    first, second = (Plan(x, {"fsdp": 8}) for x in (one_by_one, scanned))
    assert second.traffic()["all-gather"] - first.traffic()["all-gather"] == layers
    assert first.memory.arguments == second.memory.arguments
    assert first.memory.gathered_weights == 4 * (2 * V * D) + layers


def test_experts():
    """Of four experts a token has the work of two, and the weights are those of all."""
    from functools import partial

    experts = partial(MixtureOfExperts, num_experts=4, top_k=2)
    options = {"feed_forward": experts, "use_bias": False}
    model = TransformerLM(V, D, N, 1, F, T, 0.0, **options, key=jax.random.key(0))
    work = Workload(model, B, T)
    assert work.map_operations == B * T * 2 * (4 * D * D + 2 * 3 * D * F + 4 * D + V * D)
    assert Plan(work, {"fsdp": 2}).memory.weights > 4 * 4 * 3 * D * F / 2
    with pytest.raises(ValueError, match="no plan for a mixture of experts over tensor=2"):
        Plan(work, {"tensor": 2})
    scanned = Workload(scan_layers(model), B, T, "float32")
    once, twice = (Plan(scanned, {"fsdp": 2}, again) for again in (False, True))
    kept = 4 * (4 * 3 * D * F + 4 * D)  # experts and router
    assert twice.traffic()["all-gather"] - once.traffic()["all-gather"] == kept
    assert choose_mesh(work, 8, CHIPS["h100"]).plan.mesh["tensor"] == 1


def test_seconds_of_transfers():
    """A host has four devices; a byte takes a second there, and 8 between hosts."""
    mesh = {"data": 2, "fsdp": 8, "tensor": 2, "sequence": 1}
    # Two of the eight members are on a host, whose two links bring what six others have.
    assert around(("fsdp",), mesh, UNIT) == 6 / 8 * 8 / 2
    assert around(("tensor",), mesh, UNIT) == 1 / 2
    assert around(("data",), mesh, UNIT) == 1 / 2 * 8
    assert around(("sequence",), mesh, UNIT) == 0
    gathered = Transfer("all-gather", "weights of layers", ("fsdp",), 10)
    assert seconds_of(gathered, mesh, UNIT) == 10 * 3
    gradients = Transfer("all-reduce", "gradients", ("data", "fsdp"), 16)
    assert seconds_of(gradients, mesh, UNIT) == 16 * 3 + 2 * 16 / 8 * 4
    sums = Transfer("all-reduce", "activations", ("tensor",), 10)
    assert seconds_of(sums, mesh, UNIT) == 10
    ring = Transfer("collective-permute", "keys and values", ("sequence",), 10)
    assert seconds_of(ring, mesh | {"sequence": 4}, UNIT) == 10
    assert seconds_of(ring, mesh | {"sequence": 8}, UNIT) == 80


def test_the_time_of_a_step(work):
    quick = UNIT._replace(near=math.inf, far=math.inf, bandwidth=math.inf)
    once, twice = (Plan(work, {"data": 8}, again) for again in (False, True))
    seconds = duration(once, quick)
    assert seconds.total == seconds.computing == pytest.approx(work.operations / 8 / REACHED)
    more = work.map_operations - work.output_operations + work.attention_operations
    assert duration(twice, quick).total == pytest.approx((work.operations + more) / 8 / REACHED)
    # What moves beside the layers takes the time by which it lasts longer.
    slow = quick._replace(near=once.traffic()["all-reduce"] / seconds.total, island=8)
    found = duration(once, slow)
    assert found.waiting_for_weights == pytest.approx((2 * 7 / 8 - 1) * seconds.total)
    assert found.total == pytest.approx(seconds.total * 2 * 7 / 8)
    numbers = work.numbers
    assert duration(once, quick._replace(bandwidth=10.0)).updating == 7 * 4 * numbers / 10


def test_published_figures():
    """The one constant of the model of time lies between them."""
    llama_2 = "d_model=4096,num_layers=32,num_heads=32,d_ff=11008,vocab_size=32000"
    for sizes, length, least, most in ((llama_2, 4096, 0.38, 0.52), ("8b", 8192, 0.33, 0.50)):
        work = Workload(find_model(sizes), 8, length)
        for again in (False, True):
            seconds = duration(Plan(work, {"fsdp": 8}, again), CHIPS["h100"]).total
            assert least - 0.03 < work.operations / 8 / seconds / 989e12 < most


def test_the_choice(work):
    roomy = choose_mesh(work, 8, UNIT._replace(flops=1e-3))
    assert roomy.fits and roomy.plan.mesh["data"] == 8  # the simplest of those that are as quick
    everywhere = [Plan(work, mesh_of(x)) for x in meshes(work, 8)]
    least = min(plan.memory.total for plan in everywhere)
    tight = choose_mesh(work, 8, UNIT._replace(memory=1.3 * least))
    assert tight.fits and tight.plan.mesh["data"] < 8 and tight.plan.rematerialized
    assert fits(tight.plan, UNIT._replace(memory=1.3 * least))
    none = choose_mesh(work, 8, UNIT._replace(memory=1.0))
    assert not none.fits and none.plan.memory.total <= least and none.tried >= 10
    with pytest.raises(ValueError, match=r"any mesh of 7 devices. .*tensor|any mesh of 7 devices"):
        choose_mesh(work, 7, UNIT)


def mesh_of(sizes):
    return dict(zip(("data", "fsdp", "tensor", "sequence"), sizes, strict=True))


def test_meshes_multiply_to_the_devices(work):
    found = list(meshes(work, 16))
    assert len(set(found)) == len(found) and {math.prod(x) for x in found} == {16}
    assert (8, 1, 2, 1) in found and (1, 2, 4, 2) in found
    assert (16, 1, 1, 1) not in found  # of 8 rows
    assert not any(x[2] > G or x[3] > T // 2 for x in found)
    for number in (1, 2, 36, 97, 1024):
        assert divisors(number) == [i for i in range(1, number + 1) if number % i == 0]


def test_what_cannot_be_divided(work):
    for mesh, words in {
        "data=3": "8 rows cannot be divided over data=3 x fsdp=1. Use a multiple of 3",
        "sequence=16": "16 tokens cannot be divided over sequence=16",
        "tensor=8": r"self_attention.wk has 4 along its axis 'g', .* over tensor=8. Use make_mesh",
        "fsdp=0": "fsdp must be an integer of at least 1, got 0",
        "model=2": "a mesh has the axes data, fsdp, tensor, sequence, got model",
    }.items():
        name, size = mesh.split("=")
        with pytest.raises(ValueError, match=words):
            Plan(work, {name: int(size)})


def test_other_models_are_refused():
    encoder = TransformerEncoder(V, D, N, 1, F, T, key=jax.random.key(0))
    with pytest.raises(ValueError, match="decoder-only model .* got TransformerEncoder"):
        Workload(encoder, B, T)
    learned = TransformerLM(V, D, N, 1, F, 10, learnable_pos=True, key=jax.random.key(0))
    with pytest.raises(ValueError, match="a table of 10 positions, got rows of 16 tokens"):
        Workload(learned, B, T)


def test_chips():
    assert find_chip("H100") == CHIPS["h100"]
    own = find_chip("flops=1e15,memory=8e10,bandwidth=3e12,near=4e11,far=5e10,island=4")
    assert own[1:] == (1e15, 8e10, 3e12, 4e11, 5e10, 4)
    assert find_chip("a100,island=16")[1:] == (*CHIPS["a100"][1:-1], 16)
    for text, words in {
        "h10": "Did you mean 'h100'",
        "": "a chip must be one of a100, h100",
        "h100,fast=1": "a chip has the numbers flops, memory, .* got 'fast=1'",
        "h100,a100": "got 'a100'",
        "flops=1e15": "has no memory and no bandwidth",
        "h100,near=nan": "near of a chip must be a number above 0",
        "h100,near=inf": "above 0",
        "h100,far=-1": "above 0",
        "h100,far=": "above 0",
        "h100,island=1.5": "island of a chip must be a whole number above 0",
        "h100,island=0": "whole number above 0",
    }.items():
        with pytest.raises(ValueError, match=words):
            find_chip(text)


def test_sizes():
    assert read_sizes("8B")["d_model"] == 4096
    assert read_sizes("70b, num_layers=2")["num_layers"] == 2
    published = {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}
    for name, numbers in published.items():
        assert Workload(find_model(name), 8, 8192).numbers == numbers
    for text, words in {
        "8b,layers=3": "sizes of a model are .* got 'layers=3'",
        "8b,d_ff=0": "d_ff must be a whole number from 1",
        "8b,d_ff=-5": "d_ff must be a whole number",
        "8b,d_ff=1.5": "d_ff must be a whole number",
        "8b,d_ff=nan": "d_ff must be a whole number",
        "8b,d_ff=": "d_ff must be a whole number",
        "8b,d_ff=٣": "d_ff must be a whole number",
        f"8b,d_ff={10**30}": "d_ff must be a whole number from 1 to 100000000",
        "8b,d_ff=8,d_ff=9": "each once",
        "d_model=64": "no num_layers and no num_heads",
        "8b,num_kv_heads=5": "num_heads must be a multiple of num_kv_heads",
        "8b,num_heads=33,num_kv_heads=33": "d_model must be divisible by num_heads",
        "8b,tied=2": "tied must be a whole number from 0 to 1",
    }.items():
        with pytest.raises(ValueError, match=words):
            find_model(text)


def test_a_checkpoint_and_a_config_alone(tmp_path):
    model = TransformerLM(V, D, N, 2, F, 96, learnable_pos=True, tie_embeddings=True,
                          embedding_scale=1.0, key=jax.random.key(0))  # fmt: skip
    model.save_pretrained(tmp_path)
    numbers = sum(x.size for x in jax.tree.leaves(model) if hasattr(x, "size"))
    found = find_model(str(tmp_path))
    assert Workload(found, B, T).numbers == numbers and Workload(found, B, T).scanned
    (tmp_path / "model.safetensors").unlink()
    for path in (tmp_path, tmp_path / "config.json"):
        alone = Workload(find_model(str(path)), B, T)
        assert alone.numbers == numbers and alone.tied and alone.scanned
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="describes a bert, a model of shape 'encoder'"):
        find_model(str(tmp_path))


def run(capsys, *arguments):
    status = main(["plan", *arguments])
    return status, *capsys.readouterr()


def test_the_command(capsys):
    options = "--model", SIZES, "--batch", f"{B}x{T}"
    status, out, errors = run(capsys, *options, "--mesh", "data=2,fsdp=4", "--json")
    found = json.loads(out)
    assert (status, errors) == (0, "")
    plan = Plan(Workload(find_model(SIZES), B, T), {"data": 2, "fsdp": 4}, False)
    assert found["memory_total"] == round(plan.memory.total) == sum(found["memory"].values())
    assert found["traffic"] == {name: round(x) for name, x in plan.traffic().items()}
    assert sum(found["traffic"].values()) == sum(found["traffic_of"].values())
    assert found["seconds_total"] == pytest.approx(sum(found["seconds"].values()))
    assert found["tokens_per_second"] == pytest.approx(B * T / found["seconds_total"])
    assert found["choice"]["fits"] and np.prod(list(found["choice"]["mesh"].values())) == 8
    status, out, errors = run(capsys, *options, "--devices", "8")
    assert status == 0 and "assumed:" in out and "(an estimate)" in out
    name = ",".join(f"{axis}={n}" for axis, n in found["choice"]["mesh"].items() if n > 1)
    assert out.count(name) == 2  # the plan is that of the choice
    assert max(map(len, out.splitlines())) <= 100
    tight = "h100,memory=1000"
    status, out, _ = run(capsys, *options, "--devices", "8", "--chip", tight)
    assert status == 0 and "does NOT fit" in out and "None fits" in out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--mesh", "data=3", "8 rows cannot be divided"),
        ("--mesh", "tensor=8", "cannot be divided over tensor=8"),
        ("--mesh", "data=2,data=4", "each once"),
        ("--mesh", "data=0", "--mesh must be sizes above 0"),
        ("--mesh", "data", "--mesh must be sizes"),
        ("--mesh", "", "--mesh must be sizes"),
        ("--mesh", "data=nan", "--mesh must be sizes"),
        ("--mesh", "data=-2", "--mesh must be sizes"),
        ("--devices", "0", "devices must be an integer of at least 1"),
        ("--devices", "-8", "devices must be an integer of at least 1"),
        ("--devices", "7", "any mesh of 7 devices"),
        ("--devices", f"{10**30}", "at most 1,000,000 devices"),
        ("--batch", "8", "--batch must be rows and tokens"),
        ("--batch", "0x16", "--batch must be rows and tokens"),
        ("--batch", "8x16x2", "--batch must be rows and tokens"),
        ("--batch", "8x1e3", "--batch must be rows and tokens"),
        ("--batch", "nanx16", "--batch must be rows and tokens"),
        ("--chip", "h1000", "a chip must be one of"),
        ("--chip", "h100,far=nan", "far of a chip"),
        ("--model", "nowhere", "nowhere"),
        ("--model", "8b,d_ff=x", "d_ff must be"),
    ],
)
def test_errors_are_one_line(capsys, option, value, words):
    options = {"--model": SIZES, "--mesh": "data=8", "--batch": f"{B}x{T}"}
    if option == "--devices":
        del options["--mesh"]
    words_of = [x for pair in (options | {option: value}).items() for x in pair]
    status, out, errors = run(capsys, *words_of)
    assert (status, out, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: ") and words in errors, errors


def test_meshes_and_batches_are_read():
    assert read_mesh("data=2, tensor=4") == {"data": 2, "tensor": 4}
    assert read_batch("512X8192") == (512, 8192)


def test_the_loss_has_few_parts_on_many_devices():
    """For each, the gradient of the output layer is added up over all devices."""
    work = Workload(find_model("8b"), 64, 8192)
    chunk = 2**28 // 128256
    for mesh, devices in ({"fsdp": 8}, 8), ({"data": 8, "tensor": 8}, 64), ({"sequence": 2}, 2):
        least = math.ceil(64 * 8192 / (devices * chunk))
        # Divided positions have a few more, since each device cuts as many of its own.
        assert least <= Plan(work, mesh).chunks <= least + (2 if "sequence" in mesh else 0)
    plan, again = (Plan(work, {"data": n}) for n in (32, 64))
    assert plan.memory.loss > 4 * 128256 * 4096  # the sum
    parts = [x.size for x in plan.transfers() if x.what == "gradients of parts of the loss"]
    assert parts == [plan.chunks * 4 * 128256 * 4096] and again.chunks < plan.chunks
