"""The machine that runs PTX: instructions have the results of the PTX ISA, and what would hang or be lost is told."""

import math
import struct
from types import ModuleType

import pytest
import torch

from prosocial_ext import ops
from prosocial_ext.ops import _cuda, _cuda_projection, _cuda_sampling, _cuda_topm
from prosocial_ext.ops import sampling as public
from tests.asserts import assert_same_bits

HEAD = ".version 8.4\n.target sm_90\n.address_size 64\n"


def kernel(body: str, *, threads: int = 32) -> str:
    """PTX of a kernel of one parameter, an address that %rd1 gets; %r1 is the thread, %rd2 its own 8 bytes there."""
    return f"""{HEAD}
.visible .entry k(.param .u64 k_0)
.maxntid {threads}, 1, 1
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .b64 %rd<9>; .reg .f32 %f<9>; .reg .f64 %fd<9>;
    .shared .align 16 .b8 tile[4096];
    ld.param.u64 %rd1, [k_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 8;
    add.s64 %rd2, %rd2, %rd1;
    {body}
    ret;
}}
"""


def run(ptx: ModuleType, body: str, *, blocks: int = 1, threads: int = 32, size: int = 1, seed: int = 0) -> list[int]:
    """What `body` leaves in the 8 bytes of each thread of a block, which start as zeros."""
    memory = torch.zeros(threads, dtype=torch.int64)
    ptx.run(kernel(body, threads=threads), blocks, threads, [memory.data_ptr()], size, seed)
    return memory.tolist()


def f32(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex()


def f64(x: float) -> str:
    return "0d" + struct.pack(">d", x).hex()


NAN, INF = math.nan, math.inf
TILE = "mov.u32 %r6, tile; cvt.u64.u32 %rd4, %r6; cvta.shared.u64 %rd5, %rd4;"
COPY, COMMIT = "cp.async.cg.shared.global [tile], [%rd1], 16, 16;", "cp.async.commit_group;"
# One instruction that writes %rd3, %r3, %f3, %fd3, %rs3 or %p3, and the bits that it must leave.
INSTRUCTIONS = [
    ("add.s32 %r3, -1, 1;", 0),
    ("sub.s64 %rd3, 0, 1;", -1),
    ("mul.lo.s32 %r3, 65536, 65536;", 0),
    ("mul.wide.s32 %rd3, -2, 3;", -6),
    ("mul.wide.u32 %rd3, -1, 2;", 2 * (2**32 - 1)),
    ("mul.wide.u16 %r3, 65535, 65535;", 65535**2),
    ("mul.hi.u64 %rd3, -1, -1;", -2),
    ("mad.lo.s32 %r3, 3, 5, -16;", 2**32 - 1),
    ("div.s32 %r3, -7, 2;", 2**32 - 3),
    ("rem.s32 %r3, -7, 2;", 2**32 - 1),
    ("div.u32 %r3, -1, 2;", 2**31 - 1),
    ("div.s64 %rd3, -7, -1;", 7),
    ("mov.u64 %rd3, -9223372036854775808; div.s64 %rd3, %rd3, -1;", -(2**63)),
    ("div.s32 %r3, -2147483648, -1;", 2**31),
    ("neg.s32 %r3, 5;", 2**32 - 5),
    ("not.b64 %rd3, 5;", -6),
    ("shl.b32 %r3, 1, 31;", 2**31),
    ("shl.b32 %r3, 1, 32;", 0),
    ("shr.s64 %rd3, -8, 1;", -4),
    ("shr.s64 %rd3, -8, 64;", -1),
    ("shr.u32 %r3, -1, 40;", 0),
    ("min.s64 %rd3, -1, 1;", -1),
    ("min.u64 %rd3, -1, 1;", 1),
    ("max.s32 %r3, -1, 1;", 1),
    ("popc.b64 %r3, -1;", 64),
    ("clz.b32 %r3, 1;", 31),
    ("clz.b64 %r3, 0;", 64),
    ("bfi.b32 %r3, 5, 0, 1, 2;", 2),
    ("bfi.b32 %r3, 1, -1, 32, 8;", 2**32 - 1),
    ("bfi.b64 %rd3, 0, -1, 32, 32;", 2**32 - 1),
    ("mov.b64 %rd3, {%r4, %r5};", 5 << 32 | 4),
    ("mov.b64 {%r3, %r6}, 21474836484;", 4),
    ("mov.b32 {%rs4, %rs3}, 65537;", 1),
    ("selp.b32 %r3, 7, 8, 0;", 8),
    ("setp.lt.u64 %p3, 1, -1;", 1),
    ("setp.lt.s64 %p3, 1, -1;", 0),
    (f"setp.lt.f32 %p3, {f32(NAN)}, {f32(1)};", 0),
    (f"setp.geu.f64 %p3, {f64(NAN)}, {f64(1)};", 1),
    (f"setp.neu.f32 %p3, {f32(NAN)}, {f32(NAN)};", 1),
    (f"setp.nan.f32 %p3, {f32(1)}, {f32(NAN)};", 1),
    (f"setp.num.f32 %p3, {f32(1)}, {f32(2)};", 1),
    ("xor.pred %p3, 1, 1;", 0),
    # NaNs of fp32 arithmetic have one form, whatever went in
    (f"add.rn.f32 %f3, {f32(INF)}, {f32(-INF)};", 0x7FFFFFFF),
    ("sub.rn.f32 %f3, 0f7f800001, 0f00000000;", 0x7FFFFFFF),
    ("mov.f32 %f3, 0f7f800001;", 0x7F800001),
    (f"max.f32 %f3, {f32(NAN)}, {f32(-1)};", 0xBF800000),
    (f"max.f32 %f3, {f32(-0.0)}, {f32(0.0)};", 0),
    (f"fma.rn.f32 %f3, {f32(1 + 2**-12)}, {f32(1 + 2**-12)}, {f32(-1)};", 0x3A000400),
    ("mul.rn.f32 %f3, 0f00000001, 0f3f800000;", 1),
    (f"cvt.rzi.s32.f32 %r3, {f32(-1.9)};", 2**32 - 1),
    (f"cvt.rzi.s32.f32 %r3, {f32(3e9)};", 2**31 - 1),
    (f"cvt.rzi.s32.f32 %r3, {f32(NAN)};", 0),
    (f"cvt.rzi.s64.f32 %rd3, {f32(NAN)};", -(2**63)),
    (f"cvt.rzi.s64.f32 %rd3, {f32(-INF)};", -(2**63)),
    ("cvt.s64.s32 %rd3, -5;", -5),
    ("cvt.u64.u32 %rd3, -5;", 2**32 - 5),
    ("cvt.s32.s16 %r3, -5;", 2**32 - 5),
    (f"cvt.rn.f32.f64 %f3, {f64(1 + 2**-24)};", 0x3F800000),
    ("cvt.f32.f16 %f3, 15361;", 0x3F802000),
    (f"cvt.rn.f16x2.f32 %r3, {f32(1)}, {f32(65520)};", 0x3C007C00),
    (f"cvt.rn.bf16x2.f32 %r3, {f32(NAN)}, {f32(1 + 2**-8)};", 0x7FFF3F80),
    # shared memory: an array's address, generic and not
    ("st.shared.u32 [tile+8], 9; ld.shared.u32 %r3, [tile+8];", 9),
    (f"{TILE} st.u8 [%rd5+3], 7; ld.shared.u8 %r3, [%r6+3];", 7),
    ("st.shared.v2.u32 [tile], {5, 6}; ld.shared.u64 %rd3, [tile];", 6 << 32 | 5),
    ("st.shared.u32 [tile], 0; atom.shared.add.u32 %r6, [tile], 2; ld.shared.u32 %r3, [tile];", 64),
    ("st.shared.u32 [tile], 0; red.shared.or.b32 [tile], %r1; ld.shared.u32 %r3, [tile];", 31),
    ("st.shared.u32 [tile], 4; atom.shared.max.s32 %r6, [tile], -2; ld.shared.u32 %r3, [tile];", 4),
    # a copy is there once it is waited for
    (f"{COPY} {COMMIT} cp.async.wait_group 0; ld.shared.u32 %r3, [tile];", 0),
    (f"{COPY} {COMMIT} ld.shared.u32 %r3, [tile]; cp.async.wait_group 0;", 0xCBCBCBCB),
    (f"{COPY} {COMMIT} {COMMIT} cp.async.wait_group 1; ld.shared.u64 %rd3, [tile];", 0),
    (f"{COPY} {COMMIT} cp.async.wait_group 1; ld.shared.u32 %r3, [tile]; cp.async.wait_group 0;", 0xCBCBCBCB),
]
STORES = {
    "%rd3": "st.global.u64 [%rd2], %rd3;",
    "%r3": "cvt.u64.u32 %rd3, %r3; st.global.u64 [%rd2], %rd3;",
    "%rs3": "cvt.u64.u16 %rd3, %rs3; st.global.u64 [%rd2], %rd3;",
    "%f3": "mov.b32 %r3, %f3; cvt.u64.u32 %rd3, %r3; st.global.u64 [%rd2], %rd3;",
    "%p3": "selp.u64 %rd3, 1, 0, %p3; st.global.u64 [%rd2], %rd3;",
}


@pytest.mark.parametrize(("text", "expected"), INSTRUCTIONS, ids=[text.split(";")[0] for text, _ in INSTRUCTIONS])
def test_an_instruction_has_the_result_of_the_isa(ptx: ModuleType, text: str, expected: int) -> None:
    (result,) = [store for name, store in STORES.items() if f"{name}," in text or f"{name}}}" in text]
    assert run(ptx, f"mov.u32 %r4, 4; mov.u32 %r5, 5; {text} {result}") == [expected] * 32


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "sources"),
    [
        ("idx", 5, 31, [5] * 32),
        ("bfly", 1, 31, [lane ^ 1 for lane in range(32)]),
        ("up", 3, 0, [lane if lane < 3 else lane - 3 for lane in range(32)]),
        ("down", 3, 31, [lane if lane > 28 else lane + 3 for lane in range(32)]),
        # segments of 8 lanes: the mask in bits 8 to 12
        ("down", 3, 24 << 8 | 31, [lane if lane % 8 > 4 else lane + 3 for lane in range(32)]),
        ("idx", 2, 24 << 8 | 31, [lane // 8 * 8 + 2 for lane in range(32)]),
    ],
)
def test_a_shuffle_reads_the_lane_of_the_isa(
    ptx: ModuleType, mode: str, by: int, clamp: int, sources: list[int]
) -> None:
    text = f"shfl.sync.{mode}.b32 %r3|%p3, %r1, {by}, {clamp}, -1;"
    assert run(ptx, f"{text} {STORES['%r3']}") == sources
    inside = [int(source != lane or mode in ("idx", "bfly")) for lane, source in enumerate(sources)]
    assert run(ptx, f"{text} {STORES['%p3']}") == inside


@pytest.mark.parametrize("rows", [8, 16])
def test_a_product_of_tiles_is_laid_out_as_in_the_isa(ptx: ModuleType, rows: int) -> None:
    """Fragments of mma.m8n8k4 and mma.m16n8k4 in fp64, as the ISA's figures have them."""
    a, b = torch.arange(rows * 4.0).view(rows, 4), torch.arange(32.0).view(4, 8) - 7
    halves = rows // 8
    registers = range(2 * halves)
    shape = "m16n8k4" if rows == 16 else "m8n8k4"
    memory = torch.zeros(rows * 8 + rows * 4 + 32, dtype=torch.float64)
    memory[rows * 8 :] = torch.cat([a.flatten(), b.flatten()])
    first_a, first_b = rows * 64, rows * 64 + rows * 32
    d = ", ".join(f"%fd{i}" for i in registers)
    left = ", ".join(f"%fd{4 + i}" for i in range(halves))
    # %r2: lane / 4, %r3: lane % 4
    body = f"""
    shr.u32 %r2, %r1, 2; and.b32 %r3, %r1, 3;
    shl.b32 %r4, %r2, 2; add.s32 %r4, %r4, %r3; mul.wide.u32 %rd3, %r4, 8; add.s64 %rd3, %rd3, %rd1;
    shl.b32 %r5, %r3, 3; add.s32 %r5, %r5, %r2; mul.wide.u32 %rd4, %r5, 8; add.s64 %rd4, %rd4, %rd1;
    shl.b32 %r6, %r4, 1; mul.wide.u32 %rd5, %r6, 8; add.s64 %rd5, %rd5, %rd1;
    ld.global.f64 %fd4, [%rd3+{first_a}]; ld.global.f64 %fd6, [%rd4+{first_b}];
    {f"ld.global.f64 %fd5, [%rd3+{first_a + 256}];" if rows == 16 else ""}
    {" ".join(f"mov.f64 %fd{i}, {f64(1)};" for i in registers)}
    mma.sync.aligned.{shape}.row.col.f64.f64.f64.f64 {{{d}}}, {{{left}}}, {{%fd6}}, {{{d}}};
    {" ".join(f"st.global.f64 [%rd5+{i % 2 * 8 + i // 2 * 512}], %fd{i};" for i in registers)}
    """
    ptx.run(kernel(body), 1, 32, [memory.data_ptr()])
    assert torch.equal(memory[: rows * 8].view(rows, 8), 1 + a.double() @ b.double())


def test_lanes_part_and_meet_again(ptx: ModuleType) -> None:
    body = f"""
    and.b32 %r2, %r1, 1; setp.eq.s32 %p1, %r2, 0; mov.u32 %r3, 0;
    @%p1 bra $even;
    add.s32 %r3, %r3, 100;
    bra.uni $met;
    $even:
    add.s32 %r3, %r3, 200;
    $met:
    shfl.sync.bfly.b32 %r3|%p2, %r3, 1, 31, -1;
    {STORES["%r3"]}
    """
    assert run(ptx, body) == [100, 200] * 16


def test_a_loop_of_as_many_turns_as_a_lane_says(ptx: ModuleType) -> None:
    body = f"""
    mov.u32 %r3, 0; mov.u32 %r2, %r1;
    $again:
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra $done;
    add.s32 %r3, %r3, 2; add.s32 %r2, %r2, -1;
    bra.uni $again;
    $done:
    {STORES["%r3"]}
    """
    assert run(ptx, body) == [2 * lane for lane in range(32)]


EXCHANGE = """
    shl.b32 %r2, %r1, 2; mov.u32 %r3, tile; add.s32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1;
    {barrier}
    mov.u32 %r5, %ntid.x; sub.s32 %r5, %r5, %r1; add.s32 %r5, %r5, -1; shl.b32 %r5, %r5, 2; add.s32 %r5, %r3, %r5;
    ld.shared.u32 %r3, [%r5];
"""


def test_a_barrier_is_what_makes_an_exchange_through_shared_memory_whole(ptx: ModuleType) -> None:
    whole = EXCHANGE.format(barrier="bar.sync 0;") + STORES["%r3"]
    assert run(ptx, whole, threads=96) == list(range(95, -1, -1))
    torn = EXCHANGE.format(barrier="") + STORES["%r3"]
    assert any(run(ptx, torn, threads=96, seed=seed) != list(range(95, -1, -1)) for seed in range(4))


def test_blocks_of_a_cluster_read_each_other_after_a_barrier(ptx: ModuleType) -> None:
    body = f"""
    mov.u32 %r2, %cluster_ctarank; add.s32 %r2, %r2, 40; st.shared.u32 [tile], %r2;
    barrier.cluster.arrive; barrier.cluster.wait;
    mov.u32 %r3, tile; cvt.u64.u32 %rd3, %r3; cvta.shared.u64 %rd3, %rd3;
    and.b32 %r4, %r1, 3; mapa.u64 %rd4, %rd3, %r4; ld.u32 %r3, [%rd4];
    barrier.cluster.arrive; barrier.cluster.wait;
    {STORES["%r3"]}
    """
    assert run(ptx, body, blocks=4, size=4) == [40, 41, 42, 43] * 8
    assert run(ptx, "mov.u32 %r3, %ctaid.x;" + STORES["%r3"], blocks=5)[0] in range(5)


WRONG = {
    "a barrier in a branch": ("@%p1 bra $on; bar.sync 0; $on:", "a barrier that others do not reach"),
    "two barriers": (
        "@%p1 bra $on; bar.sync 0; bra.uni $met; $on: bar.sync 0; $met:",
        "diverged: warps wait at different barriers",
    ),
    "half a warp at a barrier": (
        "@%p2 bra $on; bar.sync 0; bra.uni $met; $on: bar.sync 0; $met:",
        "diverged: lanes of one warp",
    ),
    "a shuffle of half a warp": (
        "@%p2 bra $on; shfl.sync.idx.b32 %r3|%p3, %r1, 0, 31, -1; $on: bar.sync 0;",
        "diverged: lanes of one warp wait at different places",
    ),
    "a shuffle of those who stay": (
        "@%p2 ret; shfl.sync.idx.b32 %r3|%p3, %r1, 0, 31, -1;",
        "a collective that lanes which have left the kernel cannot reach",
    ),
    "a shuffle from a lane outside": (
        "@!%p2 bra $on; shfl.sync.idx.b32 %r3|%p3, %r1, 0, 31, -65536; $on:",
        "a shuffle from lane 0, which takes no part",
    ),
    "members that differ": (
        "mov.u32 %r2, -1; @%p2 mov.u32 %r2, -2; bar.warp.sync %r2;",
        "a collective whose lanes name different members",
    ),
    "shared memory beyond the end": ("ld.shared.u32 %r3, [tile+4096];", "shared memory at 4096 of 4096 bytes"),
    "a crooked vector": ("st.shared.v4.u32 [tile+8], {1, 1, 1, 1};", "an access of 16 bytes at an address"),
    "not a member": ("bar.warp.sync -2;", "a collective of a lane that is not a member"),
    "a wait for a cluster without an arrival": (
        "barrier.cluster.wait;",
        "a cluster barrier that lanes have not arrived at",
    ),
    "two arrivals": ("barrier.cluster.arrive; barrier.cluster.arrive;", "a second arrival at a cluster barrier"),
    "an arrival and no wait": ("barrier.cluster.arrive;", "the kernel is left between the halves of a cluster barrier"),
    "a copy of another size": ("cp.async.cg.shared.global [tile], [%rd1], 16, 8;", "a copy that fills up with zeros"),
    "no memory": ("ld.global.u32 %r3, [%rd7];", "global memory at 0"),
    "a loop without an end": ("$again: add.s32 %r3, %r3, 1; bra.uni $again;", "it does not come to an end"),
    "copies left behind": (
        "cp.async.ca.shared.global [tile], [%rd1], 4, 4;",
        "the kernel is left without waiting for its copies",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_told_with_the_kernel_and_the_place(ptx: ModuleType, name: str) -> None:
    body, message = WRONG[name]
    head = "setp.gt.s32 %p1, %r1, 31; and.b32 %r2, %r1, 16; setp.ne.s32 %p2, %r2, 0; mov.u64 %rd7, 0;"
    with pytest.raises(RuntimeError, match=rf"k, block 0, warp [01], `.*`: ({message})"):
        run(ptx, head + body, threads=64)


def test_a_table_of_constants_is_read(ptx: ModuleType) -> None:
    table = ".global .align 8 .b8 table[6] = {1, 2, 0, 0, 255, 7};\n"
    body = f"mov.u64 %rd4, table; cvta.global.u64 %rd4, %rd4; ld.u16 %rs3, [%rd4+4]; {STORES['%rs3']}"
    memory = torch.zeros(32, dtype=torch.int64)
    ptx.run(kernel(body).replace(HEAD, HEAD + table), 1, 32, [memory.data_ptr()])
    assert memory.tolist() == [7 << 8 | 255] * 32


def test_an_error_names_the_instruction(ptx: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"`ld\.shared\.u32 %r3, \[tile\+4096\]`: shared memory at 4096"):
        run(ptx, "add.s32 %r3, %r3, 1; ld.shared.u32 %r3, [tile+4096];")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "global memory before griddepcontrol.wait"),
        ("griddepcontrol.wait;", None),
        ("griddepcontrol.launch_dependents;", "global memory before griddepcontrol.wait"),
        ("setp.eq.s32 %p1, %r1, 5; @%p1 ret; griddepcontrol.wait;", "the kernel is left without griddepcontrol.wait"),
    ],
)
def test_a_launch_that_overlaps_others_waits_for_them(ptx: ModuleType, body: str, message: str | None) -> None:
    memory = torch.zeros(32, dtype=torch.int64)
    arguments = (kernel(f"{body} mov.u32 %r3, 1; {STORES['%r3']}"), 1, 32, [memory.data_ptr()])
    ptx.run(*arguments)
    if message is None:
        ptx.run(*arguments, overlapping=True)
    else:
        with pytest.raises(RuntimeError, match=message):
            ptx.run(*arguments, overlapping=True)


def test_a_block_that_has_left_the_kernel_is_not_read(ptx: ModuleType) -> None:
    body = """
    mov.u32 %r2, %cluster_ctarank; st.shared.u32 [tile], 40;
    barrier.cluster.arrive; barrier.cluster.wait;
    mov.u32 %r3, tile; cvt.u64.u32 %rd3, %r3; cvta.shared.u64 %rd3, %rd3;
    xor.b32 %r4, %r2, 1; mapa.u64 %rd4, %rd3, %r4; ld.u32 %r3, [%rd4];
    """
    last = "barrier.cluster.arrive; barrier.cluster.wait;"
    assert run(ptx, f"{body} {last} {STORES['%r3']}", blocks=2, size=2) == [40] * 32
    assert run(ptx, f"{body} {STORES['%r3']}", blocks=2, size=2) != [40] * 32


@pytest.mark.parametrize(
    "text",
    [
        "add.sat.s32 %r3, %r4, %r5;",
        "cvt.rni.s32.f32 %r3, %f4;",
        "cvt.rmi.f32.f32 %f3, %f4;",
        "cvt.rz.f32.f64 %f3, %fd4;",
        "mul.rn.ftz.f32 %f3, %f4, %f5;",
        "min.NaN.f32 %f3, %f4, %f5;",
        "shfl.sync.idx.b32 %r3, %r4, 0, 31, -1;",
        "setp.lt.s32 %p3|%p4, %r4, %r5;",
        "ld.local.u32 %r3, [%rd1];",
        "ld.volatile.global.u32 %r3, [%rd1];",
        "bar.sync 1;",
        "bar.sync 0, 32;",
        "cvta.local.u64 %rd3, %rd4;",
        "atom.relaxed.gpu.global.add.u32 %r3, [%rd1], 1;",
    ],
)
def test_what_is_asked_for_in_an_opcode_is_not_passed_over(ptx: ModuleType, text: str) -> None:
    with pytest.raises(RuntimeError, match="is not known"):
        run(ptx, text)


def test_an_instruction_that_is_not_known_is_named(ptx: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"`sin\.approx\.f32 %f3, %f4` is not known"):
        run(ptx, "sin.approx.f32 %f3, %f4;")


def test_a_card_takes_what_its_compute_capability_has(ptx: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ptx.capabilities == [90, 80, 75]
    assert ptx.cuda.sampling_fits_cluster(128_256, 0, 0)
    assert not ptx.cuda.sampling_fits_cluster(1, 0, 1)
    monkeypatch.setattr(_cuda, "launchers", ptx.cuda)
    expected = torch.full((2, 2), 8.0, dtype=torch.float64)
    for device in (0, 1):
        monkeypatch.setattr(_cuda, "target", lambda tensor, device=device: (device, 0))
        assert torch.equal(_cuda_projection.gram(torch.ones(2, 8)), expected)
        assert ptx.current_device() == 0  # as it was before
    monkeypatch.setattr(_cuda, "target", lambda tensor: (2, 0))
    with pytest.raises(RuntimeError, match="no kernels for this GPU"):
        _cuda_projection.gram(torch.ones(2, 8))


# ---- the kernels as a card would run them: sizes, chunks and blocks of real use, which the harness is too slow for

MULTIPROCESSORS = 132


@pytest.fixture(params=[0, 1], ids=["9.0", "8.0"])
def device(request: pytest.FixtureRequest, ptx: ModuleType, monkeypatch: pytest.MonkeyPatch) -> int:
    """A device of the machine that the CUDA implementations run on; they get CPU tensors."""
    index: int = request.param
    ptx.set_schedule(7)
    monkeypatch.setattr(_cuda, "launchers", ptx.cuda)
    monkeypatch.setattr(_cuda, "target", lambda tensor: (index, 0))
    monkeypatch.setattr(_cuda_topm, "_blocks", lambda tensor: _cuda_topm.BLOCKS * MULTIPROCESSORS)
    return index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("in_place", "undo", "density"), [(True, False, 0.1), (False, True, 0.1), (False, False, 0.01)]
)
def test_an_edit_of_a_million_entries(
    device: int, dtype: torch.dtype, in_place: bool, undo: bool, density: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    base, tuned, params = (torch.randn(1_000_003, generator=generator) for _ in range(3))
    base, tuned = (base * 0.02).to(dtype), (base * 0.02 + tuned * 1e-3).to(dtype)
    params = base if in_place else (params * 0.02).to(dtype)
    edited, m = params.clone(), int(density * base.numel())
    expected = ops.topm_subtract_(edited, edited if in_place else base, tuned, m=m, scale=0.7, undo=undo)
    outputs = _cuda_topm.subtract_cuda([params], [base], [tuned], (), [m], False, 0.7, True, undo)
    assert_same_bits(params, edited)
    assert_same_bits(outputs[0], expected.threshold)
    if expected.undo is not None:
        assert_same_bits(outputs[4], expected.undo.indices)
        assert_same_bits(outputs[5], expected.undo.bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "n"), [(5, 500_000), (16, 200_000), (64, 60_000)])
def test_a_gram_matrix_of_long_gradients(device: int, dtype: torch.dtype, k: int, n: int) -> None:
    grads = torch.randn(k, n, generator=torch.Generator().manual_seed(k)).to(dtype)
    assert_same_bits(_cuda_projection.gram(grads), ops.gradient_gram(grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.95}, {"top_k": 50, "top_p": 0.95}, {"min_p": 0.02, "temperature": 0.6}], ids=str
)
def test_a_draw_from_a_real_vocabulary(
    device: int, monkeypatch: pytest.MonkeyPatch, filters: dict[str, float], dtype: torch.dtype
) -> None:
    """In one launch of clusters, which 8.0 does not have, and in several."""
    generator = torch.Generator().manual_seed(11)
    base, guide = ((3 * torch.randn(3, 128_256, generator=generator)).to(dtype) for _ in range(2))

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.guided_sample(base, guide, guidance=0.7, seed=3, return_logprobs=True, **filters)

    tokens, logprobs = draw()
    monkeypatch.setattr(public, "_sample", _cuda_sampling.sample)
    monkeypatch.setattr(public, "_sample_rows", _cuda_sampling.sample_rows)
    for clusters in (True, False)[device:]:
        monkeypatch.setattr(_cuda_sampling, "in_clusters", clusters)
        own_tokens, own_logprobs = draw()
        assert_same_bits(own_tokens, tokens)
        assert_same_bits(own_logprobs, logprobs)
