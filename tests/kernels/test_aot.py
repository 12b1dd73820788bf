"""What is compiled for each architecture without a GPU: the shipped launches keep every rule, the
table in docs/ is theirs, and each rule finds what it is for, in the compiler's own output too.
"""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.aot import __main__ as command
from kernels.aot import machine, occupancy, ptx, readings, rules, table, variants
from kernels.aot.compile import compile_and_read
from kernels.aot.launch import Launch, record
from kernels.aot.readings import Readings
from kernels.aot.variants import ROWS, Variant
from kernels.triton import configs
from kernels.triton.configs import Config
from tests.conftest import ROOT

triton = pytest.importorskip("triton")
tl = triton.language

compiling = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="nothing compiles under TRITON_INTERPRET"
)
TABLE = ROOT / "docs" / "kernels.md"
BF16, F32 = torch.bfloat16, torch.float32
TILE = Config(128, 128, 64, num_warps=8, num_stages=3)


# --- the shipped launches -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of the command for all architectures; `readings` is its JSON."""
    output = tmp_path_factory.mktemp("aot") / "readings.json"
    done = subprocess.run(
        [sys.executable, "-m", "kernels.aot", "--check", str(TABLE), "--output", str(output)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert output.exists(), f"exit code {done.returncode}\n{done.stderr}"
    done.readings = json.loads(output.read_text())  # type: ignore[attr-defined]
    return done


def test_every_shipped_launch_keeps_every_rule(run: Any):
    found = [
        f"{v['operation']}, {v['size']}, {v['dtype']}, sm_{v['architecture']}: {message}"
        for v in run.readings["variants"]
        for message in v["violations"]
    ]
    assert not found, "\n".join(found)


def test_table_is_fresh(run: Any):
    fresh = run.stdout.rpartition("\n\n")[0] + "\n"
    different = table.difference(TABLE.read_text(encoding="utf-8"), fresh)
    assert not different, "in the tree (-), compiled now (+):\n" + "\n".join(different)


def test_exit_code(run: Any):
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_readings_have_what_the_rules_look_at(run: Any):
    for v in run.readings["variants"]:
        assert {field.name for field in dataclasses.fields(Readings)} <= set(v)
        constants = dict(v["launch"]["constants"])
        assert not v["error"]
        assert v["registers"] > 0
        assert v["loads"] or v["copies"]
        if "BLOCK_K" in constants:
            assert v["depths"]
            assert bool(v["tensor_core"]) == (v["dtype"] != "fp32")
            assert bool(v["pending"]) == (v["dtype"] != "fp32" and v["architecture"] == 90)
            assert v["shared"] > 0


def test_every_configuration_and_size_is_compiled(run: Any):
    compiled = run.readings["variants"]
    seen = {(v["architecture"], v["size"]) for v in compiled if v["dtype"] == "bf16"}
    assert {(a, s) for a in configs.ARCHITECTURES for s in configs.SIZES} <= seen
    launched = [dict(v["launch"]["constants"]) | dict(v["launch"]["options"]) for v in compiled]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    tiles = {tuple(launch.get(name) for name in names) for launch in launched}
    shipped = [value for value in vars(configs).values() if isinstance(value, Config)]
    assert len(shipped) >= 5
    for config in shipped:
        assert dataclasses.astuple(config) in tiles, config


# --- what is compiled follows from the table ----------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


@compiling
def test_variants_follow_the_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(configs, "SIZES", {"new": configs.Size(640, 64, 128)})
    found = {v.operation: v for v in variants.shipped((100,)) if v.size == "new"}
    assert {"norm_down", "up_rotary", "norm_qkv, rotated", "row_rstd", "unrotate"} <= set(found)
    down = dict(found["norm_down"].launch.constants)
    assert (down["N"], down["K"], down["BLOCK_N"]) == (192, 640, 64)
    up = dict(found["up_rotary"].launch.constants)
    assert (up["N"], up["K"], up["HEAD_DIM"], up["SCALED"]) == (640, 64, 128, False)
    assert dict(found["norm_down backward + residual"].launch.constants)["RESIDUAL"] is True
    assert dict(found["row_rstd"].launch.constants)["BLOCK_N"] == 1024


@compiling
def test_variants_follow_the_launches(monkeypatch: pytest.MonkeyPatch):
    from kernels.triton import launch

    blocks = {"BLOCK_M": 2, "BLOCK_N": 4096, "num_warps": 16}
    monkeypatch.setattr(launch, "_row_blocks", lambda columns: blocks)
    rows = [v for v in variants.shipped((90,)) if v.operation == "row_rstd"]
    assert rows
    assert {v.launch.shape for v in rows} == {"2×4096, 16 warps"}


@compiling
def test_a_size_without_configuration_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(configs, "SIZES", {"odd": configs.Size(200, 64, 64)})
    (variant,) = [v for v in variants.shipped((100,)) if v.operation == "up_rotary"]
    assert variant.launch is None
    (message,) = rules.violations(variant, Readings())
    assert message.startswith("compiles: no configuration: 200 columns")
    assert f"| sm_100 | up_rotary | odd | bf16 | {' | '.join('------')} |" in table.page(
        [(variant, Readings())]
    )


def product(
    config: Config = TILE, dtype: torch.dtype = BF16, rows: int = ROWS, stride: int = 1024
) -> Launch:
    """The launch of a scaled projection, 1024 to 768 features, x with a row stride."""
    from kernels.triton import launch

    x = torch.empty_strided((rows, 1024), (stride, 1), device="meta", dtype=dtype)
    weight, rstd = meta(768, 1024, dtype=dtype), meta(rows, dtype=F32)
    return record(lambda: launch.project(x, weight, rstd, None, None, 0, config))


@compiling
def test_launches_are_specialised_as_at_run_time():
    launch = product()
    assert (launch.module, launch.kernel) == ("kernels.triton.matmul", "project_kernel")
    signature = dict(launch.signature)
    assert signature["x_ptr"] == "*bf16"
    assert signature["rstd_ptr"] == "*fp32"
    assert signature["rows_total"] == signature["x_stride"] == "i32"
    assert signature["BLOCK_M"] == signature["positions"] == "constexpr"  # positions: 1, unused
    assert {"x_ptr", "weight_ptr", "y_ptr", "rstd_ptr", "x_stride"} <= set(launch.aligned)
    assert "rows_total" not in launch.aligned
    assert launch.options == (("num_stages", 3), ("num_warps", 8))
    assert launch.row_vectors
    assert "rows_total" in product(rows=4096).aligned
    assert "x_stride" not in product(stride=1032).aligned


@compiling
def test_recording_leaves_triton_as_it_was():
    before = triton.runtime.JITFunction.run
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0)
    assert triton.runtime.JITFunction.run is before


# --- each rule finds what it is for -------------------------------------------------------------

GOOD = Readings(
    registers=120,
    shared=98_304,
    tensor_core=64,
    depths=((3, 3),),
    loads={"128": 16},
    copies={"128": 12},
    pending=(1,),
)


def variant(architecture: int = 90, dtype: str = "bf16", **changes: Any) -> Variant:
    """A matrix product with 8 warps and 3 stages."""
    launch = Launch(
        module="kernels.triton.matmul",
        kernel="project_kernel",
        signature=(("x_ptr", "*bf16"),),
        constants=(("BLOCK_M", 128), ("BLOCK_N", 128), ("BLOCK_K", 64)),
        aligned=("x_ptr",),
        options=(("num_stages", 3), ("num_warps", 8)),
        row_vectors=False,
    )
    launch = dataclasses.replace(launch, **changes)
    return Variant(architecture, "norm_down", "370m", dtype, launch)


ROW_WISE = {"constants": (("BLOCK_M", 4),), "options": (("num_warps", 8),)}


def broken(variant: Variant, **changes: Any) -> set[str]:
    """The rules that good readings with these changes violate."""
    read = dataclasses.replace(GOOD, **changes)
    return {message.partition(":")[0] for message in rules.violations(variant, read)}


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_good_readings_keep_every_rule(architecture: int):
    assert broken(variant(architecture)) == set()


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("compiles", {"error": "PTXASError: ptxas fatal : (C7602) Insufficient registers"}),
        ("no_spills", {"stack": 8}),
        ("no_spills", {"spilled": 8}),
        ("shared_memory_fits", {"shared": 232_449}),
        ("registers_fit", {"registers": 257}),
        ("tensor_cores_used", {"tensor_core": 0}),
        ("not_serialised", {"warnings": ("(C7515) Potential Performance Loss",)}),
        ("buffers_are_deep_enough", {"depths": ((2, 3),)}),
        ("buffers_are_deep_enough", {"depths": ((3, 3), (3, 2))}),
        ("buffers_are_deep_enough", {"depths": ((2, 2),)}),  # equal, but the dots run on
        ("buffers_are_deep_enough", {"depths": ((0, 0),)}),
        ("buffers_are_deep_enough", {"depths": ()}),
        ("loads_are_vectorised", {"loads": {"128": 8, "16": 64}}),
        ("loads_are_vectorised", {"loads": {"128": 8, "32": 2}}),
        ("loads_are_vectorised", {"copies": {"128": 8, "32": 32}}),
        ("loads_are_vectorised", {"loads": {}, "copies": {}}),
        ("barrier_before_reuse", {"unguarded": 1}),
        ("dots_stay_asynchronous", {"pending": (1, 0)}),
        ("dots_stay_asynchronous", {"pending": ()}),
    ],
)
def test_each_rule_can_fail(rule: str, changes: dict[str, Any]):
    assert broken(variant(), **changes) == {rule}


def test_every_rule_is_asked_and_says_why():
    functions = [f for f in vars(rules).values() if inspect.isfunction(f)]
    found = [f for f in functions if [*inspect.signature(f).parameters] == ["variant", "read"]]
    found = [f for f in found if inspect.signature(f).return_annotation == str | None]
    assert set(found) == {rules.compiles, *rules.RULES}
    assert all(len(rule.__doc__) > 80 for rule in found)


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        (variant(80), {"depths": ((2, 2),), "pending": ()}),  # synchronous: a buffer less will do
        (variant(100), {"depths": ((2, 2),), "pending": ()}),
        (variant(90, "fp32"), {"tensor_core": 0, "depths": ((1, 1),), "pending": ()}),
        (variant(**ROW_WISE), {"tensor_core": 0, "depths": (), "pending": (), "copies": {}}),
        (variant(row_vectors=True), {"loads": {"128": 8, "32": 4}}),
    ],
)
def test_rules_ask_for_no_more_than_applies(where: Variant, changes: dict[str, Any]):
    assert broken(where, **changes) == set()


def test_the_limits_are_those_of_the_architecture():
    assert broken(variant(80), shared=166_912, depths=((2, 2),)) == set()
    assert broken(variant(80), shared=166_913, depths=((2, 2),)) == {"shared_memory_fits"}
    assert broken(variant(options=(("num_stages", 3), ("num_warps", 16))), registers=129) == {
        "registers_fit"
    }


@pytest.mark.parametrize(
    ("architecture", "read", "expected"),
    [
        (90, Readings(registers=98, shared=98_304), 2),  # 104 · 256 threads: 2.46; 99 of 228 KB
        (90, Readings(registers=129, shared=98_304), 1),  # 136 · 256: 1.88
        (80, Readings(registers=64, shared=65_536), 2),  # 65 of 164 KB: 2.5
        (80, Readings(registers=16, shared=64), 8),  # 64 warps
        (100, Readings(registers=64, shared=1024, tensor_memory=256), 2),  # 512 columns
    ],
)
def test_programs_of_a_multiprocessor(architecture: int, read: Readings, expected: int):
    assert occupancy.programs(variant(architecture), read) == expected


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'project_kernel' for 'sm_90a'
ptxas info    : Function properties for project_kernel
    616 bytes stack frame, 612 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 616 bytes cumulative stack size
"""


def test_the_assemblers_log_is_read():
    read = readings.read_log(LOG)
    assert (read["registers"], read["stack"], read["spilled"]) == (255, 616, 652)
    assert [warning[:7] for warning in read["warnings"]] == ["(C7515)"]
    with pytest.raises(AssertionError, match="no registers"):
        readings.read_log("")


# A main loop as the compiler makes it; {…} is where the tests change it.
LOOP = """
\t@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
$L__BB0_1:
\tcp.async.wait_group \t2;
\tbar.sync \t0;
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {{%r1}}, %rd1, %rd2, %p1, 1, 1, 0, 1;
\twgmma.commit_group.sync.aligned;
\twgmma.wait_group.sync.aligned {wait};
\t{barrier}
\t@%p2 cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, %r4;
\tcp.async.commit_group;
\t{late}
\t@%p3 bra \t$L__BB0_1;
\twgmma.wait_group.sync.aligned 0;
\t{last}
\tst.shared.v4.b32 \t[%r5], {{%r6, %r7, %r8, %r9}};
"""
SOUND = {"wait": "1", "barrier": "bar.sync \t0;", "late": "", "last": "bar.sync \t0;"}


@pytest.mark.parametrize(
    ("changes", "unguarded"),
    [
        ({}, 0),
        ({"barrier": ""}, 1),
        ({"last": ""}, 1),
        ({"barrier": "", "last": ""}, 2),
        ({"barrier": "bar.sync \t1, 128;"}, 1),  # of some warps
        ({"barrier": "barrier.sync \t0;"}, 0),
        ({"late": "wgmma.wait_group.sync.aligned 1;"}, 0),  # the next turn's barrier follows
        ({"barrier": "mbarrier.try_wait.shared.b64 %p4, [%r1], %r2;"}, 1),
        ({"last": "wgmma.fence.sync.aligned;\n\tstmatrix.sync.aligned.m8n8.x4.shared.b16"}, 2),
    ],
)
def test_a_missing_barrier_is_found(changes: dict[str, str], unguarded: int):
    assert ptx.unguarded_writes(LOOP.format(**SOUND | changes)) == unguarded


def test_a_missing_barrier_over_the_end_of_a_loop_is_found():
    text = "$L1:\n st.shared.b32 [%r1], %r2;\n wgmma.wait_group.sync.aligned 0;\n @%p1 bra $L1;\n"
    assert ptx.unguarded_writes(text) == 1
    assert ptx.unguarded_writes(text.replace(" @%p1", " bar.sync \t0;\n @%p1")) == 0


def test_pending_groups_are_those_of_loops():
    assert ptx.pending_groups(LOOP.format(**SOUND)) == (1,)
    assert ptx.pending_groups(LOOP.format(**SOUND | {"wait": "0"})) == (0,)
    assert ptx.pending_groups("wgmma.mma_async x;\nwgmma.wait_group.sync.aligned 1;\n") == ()


def test_widths_of_loads():
    text = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ld.shared.b32 %r1, [%r2];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4;
    cp.async.wait_group 0;
    """
    found = ptx.widths_of_loads(text)
    assert found["loads"] == {"128": 1, "16": 1, "64": 1}
    assert found["copies"] == {"128": 1, "32": 1}


def test_operand_depths_follow_the_operands():
    ttgir = """
    %x = ttg.local_alloc : () -> !ttg.memdesc<2x128x64xbf16, #s, #smem, mutable> loc(#l)
    %w = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #s, #smem, mutable> loc(#l)
    %x_1 = ttg.memdesc_index %x[%i] : !ttg.memdesc<2x128x64xbf16, #s> -> !ttg.memdesc<128x64xbf16>
    %w_1 = ttg.memdesc_index %w[%i] : !ttg.memdesc<3x64x128xbf16, #s> -> !ttg.memdesc<64x128xbf16>
    %1:2 = scf.for %i = %c0 to %c4 step %c1 iter_args(%acc = %cst, %carried = %x_1) -> (f32, f32) {
    %t = ttg.local_load %x_1 token %a : !ttg.memdesc<128x64xbf16> -> tensor<128x64xbf16>
    %l, %r = tt.split %t : tensor<128x32x2xbf16> -> tensor<128x32xbf16>
    %m = arith.mulf %l, %r : tensor<128x32xbf16>
    """

    def depths(dot: str) -> tuple[tuple[int, int], ...]:
        return readings.operand_depths(ttgir + dot)

    assert depths("%d = ttng.warp_group_dot %x_1, %w_1, %acc : x\n") == ((2, 3),)
    assert depths("%d = ttng.warp_group_dot %w_1, %w_1, %acc : x\n") == ((3, 3),)
    assert depths("%d = tt.dot %m, %w_1, %acc : x\n") == ((2, 3),)
    assert depths("ttng.tc_gen5_mma %carried, %w_1, %acc, %true : x\n") == ((2, 3),)
    assert depths("%d = ttng.warp_group_dot %somewhere, %w_1, %acc : x\n") == ((0, 3),)
    assert depths("") == ()


def test_tensor_cores_are_counted_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch):
    code = """
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0010*/                   MOV R1, c[0x0][0x28] ;
        /*0020*/              @!P1 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR5], UP1 ;
    """
    monkeypatch.setattr(machine, "_disassembled", lambda architecture, joined: code)
    assert machine.tensor_core_counts(90, [bytes(32), bytes(32)]) == [1, 2]
    assert machine.tensor_core_counts(90, [bytes(16), bytes(16), bytes(32)]) == [1, 0, 2]


def test_the_page_says_what_the_rules_refuse():
    said = table.page([(variant(), GOOD)])
    for rule in (rules.compiles, *rules.RULES):
        (line,) = [line for line in said.splitlines() if line.startswith(f"- `{rule.__name__}`: ")]
        assert len(line) > 60
        assert "Measured" not in line
    for used in table.versions().values():
        assert used in said


# --- the rules find it in real code too ---------------------------------------------------------

SIDE, BLOCK = tl.constexpr(1024), tl.constexpr(128)


@triton.jit
def sum_of_squares_kernel(x_ptr, w_ptr, y_ptr, BLOCK_K: tl.constexpr):  # noqa: N803
    """What no shipped kernel does: the tile that feeds the dot is also squared and summed."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(0, SIDE, BLOCK_K):
        x = tl.load(x_ptr + rows[:, None] * SIDE + k + inner[None, :])
        w = tl.load(w_ptr + columns[None, :] * SIDE + k + inner[:, None])
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        accumulator = tl.dot(x, w, accumulator)
    y = accumulator * tl.rsqrt(squares / SIDE)[:, None]
    tl.store(y_ptr + rows[:, None] * SIDE + columns[None, :], y.to(y_ptr.dtype.element_ty))


def sum_of_squares() -> Launch:
    x = meta(1024, 1024)
    kernel = sum_of_squares_kernel[(8, 8)]
    return record(lambda: kernel(x, x, x, BLOCK_K=64, num_warps=8, num_stages=3))


def gradient(config: Config) -> Launch:
    from kernels.triton import launch

    dhs, a, x = meta(ROWS, 768), meta(768, 1024), meta(ROWS, 1024)
    rstd = meta(ROWS, dtype=F32)
    return record(lambda: launch.norm_backward_matmul(dhs, a, x, rstd, x, config))


def few_registers() -> Launch:
    launch = product()
    return dataclasses.replace(launch, options=(*launch.options, ("maxnreg", 32)))


def found_in(launch: Launch, architecture: int = 90) -> tuple[dict[str, str], Readings]:
    read = compile_and_read(architecture, launch)
    messages = rules.violations(Variant(architecture, "x", "x", "bf16", launch), read)
    return dict(message.split(": ", 1) for message in messages), read


@compiling
def test_a_tile_with_two_uses_loses_a_buffer():
    """The race: two buffers for x, three stages, and the loop goes on while the dot reads."""
    found, read = found_in(sum_of_squares())
    assert read.depths == ((2, 3),)
    assert read.pending == (1,)
    assert set(found) == {"buffers_are_deep_enough"}


@compiling
@pytest.mark.parametrize(
    ("launch", "rules", "says"),
    [
        (lambda: gradient(Config(128, 256, 64, 8, 3)), {"no_spills"}, "bytes of stack"),
        (lambda: product(Config(128, 256, 64, 8, 6)), {"shared_memory_fits"}, "294912 bytes"),
        (
            lambda: product(Config(64, 64, 32, 8, 2), F32),
            {"tensor_cores_used", "buffers_are_deep_enough", "dots_stay_asynchronous"},
            "no tensor-core instruction",
        ),
        (lambda: product(Config(256, 256, 64, 4, 3)), {"no_spills", "not_serialised"}, "(C7511)"),
        (lambda: product(Config(128, 128, 64, 8, 1)), {"dots_stay_asynchronous"}, "its own dot"),
        (
            lambda: product(stride=1025),  # x is no longer copied past the registers
            {"loads_are_vectorised", "buffers_are_deep_enough", "dots_stay_asynchronous"},
            "load of 16 bits",
        ),
        (few_registers, {"compiles"}, "(C7602) Insufficient registers (32)"),
    ],
    ids=["spills", "shared", "float32", "serialised", "one-stage", "unaligned", "refused"],
)
def test_bad_launches_are_found(
    launch: Callable[[], Launch], rules: set[str], says: str, capfd: pytest.CaptureFixture[str]
):
    found, _ = found_in(launch())
    assert rules == set(found)
    assert any(says in message for message in found.values())
    assert all(len(message.splitlines()) == 1 for message in found.values())
    assert capfd.readouterr().out == ""  # Triton prints all of the PTX that ptxas refuses


@compiling
def test_a_barrier_taken_out_of_real_code_is_found(monkeypatch: pytest.MonkeyPatch):
    texts = []
    unguarded = ptx.unguarded_writes
    monkeypatch.setattr(ptx, "unguarded_writes", lambda ptx: texts.append(ptx) or unguarded(ptx))
    found, read = found_in(product())
    assert not found
    assert read.unguarded == 0
    before, wait, after = texts[0].partition("wgmma.wait_group.sync.aligned 1;")
    assert wait
    assert unguarded(before + wait + after.replace("bar.sync", "//", 1)) > 0


@compiling
def test_a_failing_disassembler_is_an_error_of_the_variant(monkeypatch: pytest.MonkeyPatch):
    def fail(architecture: int, code: bytes) -> str:
        raise subprocess.CalledProcessError(1, "nvdisasm")

    monkeypatch.setattr(machine, "_disassembled", fail)
    found, _ = found_in(product())
    assert set(found) == {"compiles"}
    assert "nvdisasm" in found["compiles"]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Variant, Readings]]:
    """Stands in for the compilations; a test changes the results."""
    results = [(variant(), GOOD)]
    monkeypatch.setattr(command, "shipped", lambda _: [v for v, _ in results])
    monkeypatch.setattr(command, "compile_all", lambda _: results)
    return results


@compiling
def test_a_violation_is_exit_code_1(compiled: Any, capsys: pytest.CaptureFixture[str]):
    assert command.main([]) == 0
    compiled[:] = [(variant(), dataclasses.replace(GOOD, stack=8))]
    assert command.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("violated: norm_down, 370m, bf16, sm_90: no_spills: 8 bytes of stack")


@compiling
def test_a_differing_table_is_exit_code_1(
    compiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "table.md"
    assert command.main(["--table", str(page)]) == 0
    assert command.main(["--check", str(page)]) == 0
    assert "sm_90" in page.read_text()
    compiled[:] = [(variant(), dataclasses.replace(GOOD, registers=99))]
    capsys.readouterr()
    assert command.main(["--check", str(page)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line[:2] for line in lines[1:]] == ["-|", "+|"]
    assert " 120 " in lines[1]
    assert " 99 " in lines[2]


@compiling
def test_a_dead_compiler_is_one_line(
    compiled: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def die(_: Any) -> None:
        raise command.BrokenProcessPool

    monkeypatch.setattr(command, "compile_all", die)
    assert command.main([]) == 1
    assert capsys.readouterr().err.startswith("a compiling process died")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arch", "75"], "75"),
        (["--arch", "ninety"], "ninety"),
        (["--arch"], "--arch"),
        (["--aim", "90"], "--aim"),
        (["--output", "{folder}/none/x.json"], "none does not exist"),
        (["--table", "{folder}/none/x.md"], "none does not exist"),
        (["--output", "{folder}"], "is a folder"),
        (["--output", "{folder}/file/x.json"], "does not exist"),
        (["--check", "{folder}/none.md"], "No such file"),
        (["--check", "{folder}"], "Is a directory"),
        (["--check", "{folder}/binary"], "is no text"),
        (["--arch", "90", "--check", "{folder}/file"], "leave out --arch"),
        (["--arch", "90", "--table", "{folder}/new.md"], "leave out --arch"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit) as left:
        command.main([argument.format(folder=tmp_path) for argument in arguments])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert says in said.err


def test_an_unwritable_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SystemExit) as left:
        command.main(["--output", str(tmp_path / "x.json")])
    assert left.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # what the variable comes to
    with pytest.raises(SystemExit) as left:
        command.main([])
    assert left.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
