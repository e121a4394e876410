"""Block choices: counts against published figures and independent arithmetic, and what the blocks do."""

import csv
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from foreign_networks import CASES, IMAGE, RESIDUAL

from nnopt.core import Example, Glob, ResidualBlocks, fingerprint, rewrite, select, sites
from nnopt.costs import macs, parameters
from nnopt.errors import ChoiceError, GenotypeError, SelectionError
from nnopt.layers import PreActivationBlock, TrainingFlag
from nnopt.networks import NAMES, WideResNet, named
from nnopt.rewrites import (
    CODE_CHOICES,
    PAPER_CHOICES,
    AddGate,
    Configure,
    Genotype,
    ReplaceBlock,
    choice,
    load_genotype,
    save_genotype,
)

CIFAR = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
LARGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
WRN = WideResNet(40, 2.0)
ALL_CHOICES = tuple(dict.fromkeys((*PAPER_CHOICES, *CODE_CHOICES)))


def counts(net, example=CIFAR):
    return parameters(net, example), macs(net, example)


@pytest.fixture(scope="module")
def published(data_dir):
    with (data_dir / "reference" / "block_choice_counts_wrn40_2.csv").open(newline="") as file:
        return {row["conv_name"]: row for row in csv.DictReader(file)}


def test_single_choice_networks(published):
    """Every row of the table; the sum over blocks is the network, which a few rows check as a whole."""
    blocks = list(select(wrn_sites(), ResidualBlocks()))
    in_blocks = [sum(counts_of_block(b.module, b)[i] for b in blocks) for i in (0, 1)]
    around = [total - inside for total, inside in zip(counts(WRN), in_blocks, strict=True)]
    assert around == [1978, 432 * 32 * 32 + 1280]
    checked = 0
    for name, row in published.items():
        try:
            kind = choice(name)
        except ChoiceError:  # kinds of the released code that no genotype uses, such as MBConv6
            continue
        assert row["paper_name"] in ("", "-", kind.name) or choice(row["paper_name"]) == kind
        want = (int(row["wrn40_2_params"]), int(row["wrn40_2_macs"]))
        edits = Genotype((kind,) * 18)(wrn_sites())
        made = [counts_of_block(edits[b.path], b) for b in blocks]
        assert tuple(around[i] + sum(m[i] for m in made) for i in (0, 1)) == want, name
        if kind.name in ("G(4)", "BG(2,M/2)"):
            assert counts(rewrite(WRN, Genotype((kind,) * 18), example=CIFAR)) == want
        checked += 1
    assert checked >= 23


_COUNTED: dict[Any, tuple[int, int]] = {}


def counts_of_block(module, site) -> tuple[int, int]:
    """Parameters and MACs of a block where it stands; equal blocks are counted once."""
    key = fingerprint(module), site.inputs[0].shape
    if key not in _COUNTED:
        _COUNTED[key] = counts(module, Example(*site.inputs))
    return _COUNTED[key]


@pytest.mark.parametrize(
    ("name", "count", "work"),
    [
        ("bs150k", 162_202, 33_453_312),
        ("bs200k", 217_050, 38_380_800),
        ("bs250k", 289_226, 65_389_824),
        ("bs400k", 404_250, 92_161_280),
        ("bs500k", 555_962, 88_876_288),
        ("bs800k", 811_370, 131_876_096),
        ("bs1.6m", 1_645_018, 239_518_976),
        ("bs_imagenet_1", 3_080_488, 806_965_760),
        ("bs_imagenet_2", 8_190_888, 1_200_671_744),
    ],
)
def test_published_genotypes(data_dir, name, count, work):
    genotype = load_genotype(data_dir / "blockswap" / "genotypes" / f"{name}.csv")
    large = "imagenet" in name
    base = named("preact-resnet-34-imagenet", 1000) if large else WRN
    example = LARGE if large else CIFAR
    assert counts(rewrite(base, genotype, example=example), example) == (count, work)


@pytest.mark.parametrize(
    ("kind", "count"), [("S", 21_794_984), ("G(4)", 8_143_912), ("G(N)", 3_129_832)]
)
def test_resnet34_for_imagenet_of_one_choice(kind, count):
    net = named("preact-resnet-34-imagenet", 1000)
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    new = rewrite(net, Genotype((choice(kind),) * 16), example=example)
    assert parameters(new, example) == count


def test_reduced_networks(data_dir):
    with (data_dir / "reference" / "reduced_wrn_counts.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["family"] == "WRN-preact"]
    assert len(rows) > 10
    for row in rows:
        net = WideResNet(
            int(row["depth"]), float(row["width_or_growth"]), inner=float(row["bottle_mult"])
        )
        assert counts(net) == (int(row["params"]), int(row["conv_fc_macs"])), row


# Facts of the paper, restated: (in, out) -> parameters of an operator; None where it cannot be.
def operator_parameters(name: str, cin: int, cout: int) -> int | None:
    inside, _, rest = name.partition("(")
    arguments = rest.rstrip(")").split(",") if rest else []

    def groups(text: str, channels: int) -> int | None:
        if text[0] in "NM":
            size = int(text[2:] or 1)
            return channels // size if channels % size == 0 else None
        return int(text) if channels % int(text) == 0 else None

    if inside == "S":
        return 9 * cin * cout
    if inside == "G":
        g = groups(arguments[0], cin)
        return None if g is None else 9 * cin * cin // g + 2 * cin + cin * cout
    m = cout // int(arguments[0])
    g = 1 if inside == "B" else groups(arguments[1], m)
    return None if g is None else cin * m + 9 * m * m // g + m * cout + 4 * m


def block_parameters(name: str, cin: int, cout: int) -> int | None:
    first, second = operator_parameters(name, cin, cout), operator_parameters(name, cout, cout)
    if first is None:
        return None
    shortcut = cin * cout if cin != cout else 0
    if name[0] == "B":
        return 2 * cin + first + shortcut
    return None if second is None else 2 * cin + first + 2 * cout + second + shortcut


POSITIONS = [(16 if i == 0 else 32, 32) for i in range(6)]
POSITIONS += [(32 if i == 0 else 64, 64) for i in range(6)]
POSITIONS += [(64 if i == 0 else 128, 128) for i in range(6)]


@functools.cache
def wrn_sites():
    return sites(WRN, CIFAR)


@pytest.mark.parametrize("kind", ALL_CHOICES, ids=str)
def test_parameters_at_every_position(kind):
    blocks = select(wrn_sites(), ResidualBlocks())
    assert len(blocks) == 18
    for block, (cin, cout) in zip(blocks, POSITIONS, strict=True):
        expected = block_parameters(kind.name, cin, cout)
        rule = ReplaceBlock("/".join(block.path), kind)
        if expected is None:
            with pytest.raises(ChoiceError, match=r"do not divide|needs"):
                rule(wrn_sites())
            continue
        module = rule(wrn_sites())[block.path]
        assert counts_of_block(module, block)[0] == expected, block.path


def test_the_choices_are_those_of_the_paper_and_of_the_code():
    assert len(PAPER_CHOICES) == len(set(PAPER_CHOICES)) == 21
    assert len(CODE_CHOICES) == len(set(CODE_CHOICES)) == 23


@pytest.mark.parametrize("kind", ALL_CHOICES, ids=str)
def test_names_round_trip(kind):
    assert choice(kind.name) == kind
    assert choice(kind.genotype_name) == kind
    assert str(kind) == kind.name
    assert choice(f" {kind.name} ") == kind


@pytest.mark.parametrize(
    "name", ["", "X", "G(0)", "B(0)", "A4", "BG(2)", "DConvA", "G(-1)", "B(2,4"]
)
def test_unknown_names(name):
    with pytest.raises(ChoiceError, match="unknown block choice"):
        choice(name)


@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ("stage1_block0", "G(5)", "at 'stage1_block0': G\\(5\\) needs 5 groups, which 16 channels"),
        ("stage1_block1", "BG(4,M/16)", "groups of 16, which 8 channels"),
        ("stage1_block1", "B(64)", "at least 64 channels, the block has 32"),
        ("head", "S", "select residual blocks"),
    ],
)
def test_impossible_choices(where, kind, message):
    with pytest.raises(ChoiceError, match=message):
        rewrite(WRN, ReplaceBlock(where, choice(kind)), example=CIFAR)


def test_a_module_without_a_training_flag():
    with pytest.raises(ChoiceError, match="cannot tell how Conv learns whether it is training"):
        rewrite(WRN, ReplaceBlock("stem", choice("S")), example=CIFAR)


def test_genotypes_of_another_depth():
    with pytest.raises(GenotypeError, match="holds 3 choices, but WideResNet has 18"):
        rewrite(WRN, Genotype((None,) * 3), example=CIFAR)
    assert rewrite(WRN, Genotype((None,) * 18), example=CIFAR) is WRN


def test_genotype_files_round_trip(tmp_path):
    path = tmp_path / "genotype.csv"
    save_genotype(ALL_CHOICES, path, 1.5)
    assert load_genotype(path) == Genotype(ALL_CHOICES)
    assert path.read_text().endswith(",1.5\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no genotype file"),
        ("a,b\n1,2\n", "is no genotype file"),
        ("convs\n\"['Conv', 'Cnov']\"\n", "unknown block choice 'Cnov'"),
        ("convs\n\"['Conv'\"\n", "must hold a list"),
        ("convs\n\"'Conv'\"\n", "not a list of names"),
        ("convs\n__import__('os').getcwd()\n", "must hold a list"),
        (None, "cannot read genotype file"),
    ],
)
def test_malformed_genotype_files(tmp_path, text, message):
    path = tmp_path / "genotype.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GenotypeError, match=message):
        load_genotype(path)


@pytest.mark.parametrize("network", RESIDUAL)
@pytest.mark.parametrize("first", ["train", "eval"])
def test_replaced_blocks_tell_training_from_inference(network, first):
    case = CASES[network]
    flags = case.train if first == "train" else case.eval
    example = Example(*case.inputs, **flags)
    blocks = RESIDUAL[network]
    # Rewritten more than once: the flag must survive it.
    net = rewrite(
        case.net,
        ReplaceBlock("**/" + blocks[0], choice("G(2)")),
        ReplaceBlock(Glob(blocks[0][:-1] + "*"), choice("G(4)")),
        AddGate(Glob(blocks[0][:-1] + "*")),
        example=example,
    )
    norms = sites(net, example).where(lambda s: isinstance(s.module, nn.BatchNorm))
    assert len(norms.where(lambda s: s.path[0] in blocks)) == 4 * len(blocks)
    variables = jax.eval_shape(net.init, jax.random.key(0), *case.inputs)

    def statistics(flags):
        found = sites(net, Example(*case.inputs, **flags))
        return {s.module.use_running_average for s in found if isinstance(s.module, nn.BatchNorm)}

    assert statistics(case.train) == {False}
    assert statistics(case.eval) == {True}
    if first == "eval":
        values = jax.tree.map(lambda s: jnp.full(s.shape, 0.1, s.dtype), variables)
        run = jax.jit(
            lambda v, x, flags: net.apply(v, x, **dict(flags), mutable=["batch_stats"])[1],
            static_argnums=2,
            compiler_options={"xla_backend_optimization_level": 0},
        )
        x = case.arrays()[0]
        before = values["batch_stats"]
        for flags, moves in ((case.train, True), (case.eval, False)):
            after = run(values, x, tuple(flags.items()))["batch_stats"]
            same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
            moved = [not s for b in blocks for s in jax.tree.leaves(same[b])]
            assert all(moved) if moves else not any(moved)


class OptionalFlagBlock(nn.Module):
    """A block that is told only when it is training."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return x + nn.Conv(x.shape[-1], (3, 3))(y)


class OptionalFlag(nn.Module):
    by_name: bool

    @nn.compact
    def __call__(self, x, train=False):
        block = OptionalFlagBlock(name="block")
        if not train:
            return block(x)
        return block(x, train=True) if self.by_name else block(x, True)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_flag_that_a_call_leaves_out(by_name, first):
    x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    rule = ReplaceBlock("block", choice("G(2)"))
    net = rewrite(OptionalFlag(by_name), rule, example=Example(x, train=first))
    for train in (True, False):
        found = sites(net, Example(x, train=train))
        norms = found.where(lambda s: isinstance(s.module, nn.BatchNorm))
        assert {s.module.use_running_average for s in norms} == {not train}


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("kind", ["S", "G(4)", "B(2)", "BG(2,M)"])
def test_odd_sizes_with_a_stride(size, kind):
    case = CASES["residual_positional"]
    image = jax.ShapeDtypeStruct((2, size, size + 3, 3), jnp.float32)
    example = Example(image, train=False)
    net = rewrite(case.net, ReplaceBlock("block1", choice(kind)), example=example)
    old, new = sites(case.net, example)["block1"], sites(net, example)["block1"]
    assert isinstance(new.module, PreActivationBlock)
    assert new.module.stride == 2
    assert old.outputs.shape == new.outputs.shape == (2, -(-size // 2), -(-(size + 3) // 2), 16)


def test_blocks_compute_what_they_say():
    """A block of two grouped operators, written out with plain operations."""
    op1 = choice("G(2)").operator(4, 6, 2)
    op2 = choice("G(2)").operator(6, 6)
    block = PreActivationBlock(6, 2, op1, op2, TrainingFlag(running_when=False, position=1))
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    variables = block.init(jax.random.key(1), x, False)
    p = variables["params"]

    def conv(x, kernel, stride=1, groups=1):
        pad = kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((pad, pad),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def active(x):
        return nn.relu(x / np.sqrt(1 + 1e-5, dtype=np.float32))

    def operator(x, p, stride):
        x = conv(x, p["spatial"]["kernel"], stride, 2)
        return conv(active(x), p["pointwise"]["kernel"])

    a = active(x)
    y = operator(active(operator(a, p["op1"], 2)), p["op2"], 1)
    expected = y + conv(a, p["shortcut"]["kernel"], 2)
    np.testing.assert_allclose(block.apply(variables, x, False), expected, rtol=1e-4, atol=1e-4)


BLOCKS = {
    "wrn-40-2": 18, "wrn-40-1": 18, "wrn-16-2": 6, "wrn-16-1": 6,
    "resnet-18": 8, "resnet-34": 16, "resnet-50": 16,
    "resnet-18-imagenet": 8, "resnet-34-imagenet": 16, "resnet-50-imagenet": 16,
    "preact-resnet-18": 8, "preact-resnet-34": 16,
    "preact-resnet-18-imagenet": 8, "preact-resnet-34-imagenet": 16,
    "resnext-29": 9, "resnext-29-2x64d": 9,
    "mobilenet-v2": 10, "mobilenet-v2-imagenet": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_residual_blocks_are_found(name):
    size = 64 if name.endswith("-imagenet") else 32
    found = sites(named(name), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    if name not in BLOCKS:
        with pytest.raises(SelectionError, match="name the blocks to replace by their paths"):
            select(found, ResidualBlocks())
        return
    blocks = select(found, ResidualBlocks())
    assert len(blocks) == BLOCKS[name]
    assert len({type(b.module) for b in blocks}) == 1
    names = {type(b.module).__name__ for b in blocks}
    assert names <= {
        *[
            "WideBlock",
            "BasicBlock",
            "Bottleneck",
            "PreActBlock",
            "ResNeXtBlock",
            "InvertedResidual",
        ]
    }


@pytest.mark.parametrize("network", RESIDUAL)
def test_residual_blocks_of_foreign_networks(network):
    found = select(sites(CASES[network].net, IMAGE), ResidualBlocks())
    assert tuple("/".join(p) for p in found.paths) == RESIDUAL[network]
    assert rewrite(CASES[network].net, Configure.of(RESIDUAL[network][0]), example=IMAGE)
