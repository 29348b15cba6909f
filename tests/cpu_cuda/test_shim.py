"""The CPU machine: what a GPU does is done, and each planted bug is found by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_cuda import MODES, KernelError, RawModule, why_not

pytestmark = pytest.mark.skipif(why_not("fast") is not None, reason=str(why_not("fast")))


def run(
    body: str,
    mode: str = "fast",
    args: tuple[Any, ...] | None = None,
    params: str = "float* x",
    grid: tuple[int, ...] = (1,),
    block: tuple[int, ...] = (64,),
    preamble: str = "",
    **options: Any,
) -> Any:
    """Run a kernel of this body and return its first argument."""
    if why_not(mode):
        pytest.skip(str(why_not(mode)))
    code = f'{preamble}extern "C" __global__ void k({params}) {{ {body} }}'
    args = (np.zeros(64, "f4"),) if args is None else args
    RawModule(code, mode=mode).get_function("k")(grid, block, args, **options)
    return args[0]


REVERSE = (
    "__shared__ float s[64]; s[threadIdx.x] = threadIdx.x; %s x[threadIdx.x] = s[63 - threadIdx.x];"
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [0, 1, 5])
def test_barrier(mode, order):
    result = run(REVERSE % "__syncthreads();", mode, order=order)
    np.testing.assert_array_equal(result, np.arange(64)[::-1])


def test_missing_barrier_changes_the_result():
    assert np.isnan(run(REVERSE % "")).any()  # shared memory starts as NaN


def test_missing_barrier_is_a_race():
    with pytest.raises(KernelError, match="data race"):
        run(REVERSE % "", "tsan")


def test_missing_barrier_hidden_by_the_schedule_is_still_a_race():
    body = (
        "__shared__ float s[64]; s[threadIdx.x] = 1;"
        "x[threadIdx.x] = threadIdx.x ? s[threadIdx.x - 1] : 0;"
    )
    assert run(body).sum() == 63  # right by luck: threads run in index order
    assert np.isnan(run(body, order=1)).any()
    with pytest.raises(KernelError, match="data race"):
        run(body, "tsan")


def test_shuffle_orders_no_memory():
    body = (
        "__shared__ float s[32]; s[threadIdx.x] = 1; %s"
        "x[threadIdx.x] = s[31 - threadIdx.x] + __shfl_xor_sync(0xffffffffu, 1.0f, 1);"
    )
    with pytest.raises(KernelError, match="data race"):
        run(body % "float v = __shfl_sync(0xffffffffu, 1.0f, 0);", "tsan", block=(32,))
    run(body % "__syncwarp();", "tsan", block=(32,))


def test_blocks_are_not_ordered():
    with pytest.raises(KernelError, match="data race"):
        run("if (threadIdx.x == 0) x[0] += 1;", "tsan", grid=(2,))
    assert run("if (threadIdx.x == 0) atomicAdd(x, 1.0f);", "tsan", grid=(2,))[0] == 2


@pytest.mark.parametrize(
    "body",
    [
        "x[threadIdx.x + 1] = 1;",
        "__shared__ float s[63]; s[threadIdx.x] = 1;",
        "extern __shared__ float d[]; d[threadIdx.x] = 1;",
    ],
)
def test_out_of_bounds(body):
    with pytest.raises(KernelError, match=r"heap-buffer-overflow|out of bounds"):
        run(body, "asan", shared_mem=63 * 4)


def test_misaligned_vector():
    with pytest.raises(KernelError, match="misaligned address"):
        run("float4 v = *reinterpret_cast<float4*>(x + 1); x[0] = v.x;", "asan")


def test_misaligned_array_stays_misaligned():
    memory = np.zeros(72, "f4")
    aligned = memory[-memory.ctypes.data % 16 // 4 :]
    body = "float4 v = *reinterpret_cast<float4*>(x); x[0] = v.x;"
    run(body, "asan", args=(aligned[:4],))
    with pytest.raises(KernelError, match="misaligned address"):
        run(body, "asan", args=(aligned[1:5],))
    with pytest.raises(KernelError, match="AddressSanitizer"):  # before its start, too
        run("x[0] = x[-4];", "asan", args=(aligned[5:9],))


def test_int_overflow():
    with pytest.raises(KernelError, match="signed integer overflow"):
        run("x[0] = float((int)gridDim.x * 2000000000 * (int)blockDim.x);", "asan")


def test_divergent_barriers():
    with pytest.raises(KernelError, match=r"line 2, while others wait at line 1"):
        run("if (threadIdx.x < 32) __syncthreads();\nelse __syncthreads();")


def test_exited_threads_do_not_block_a_barrier():
    assert run("if (threadIdx.x >= 40) return; __syncthreads(); x[threadIdx.x] = 1;").sum() == 40


def test_deadlock():
    with pytest.raises(KernelError, match=r"deadlock, 32 threads wait.*at __syncthreads"):
        run(
            "if (threadIdx.x == 0) __syncthreads();\n"
            "float v = __shfl_sync(0xffffffffu, 1.0f, 0); x[0] = v;",
            block=(32,),
        )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x[0] = __shfl_sync(0x0000ffffu, 1.0f, 0);", "not in its own mask"),
        ("if (threadIdx.x < 16) x[0] = __shfl_sync(0x0000ffffu, 1.0f, 20);", "takes no part"),
        (
            "if (threadIdx.x >= 8) return; x[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 16);",
            "takes no part",
        ),
    ],
)
def test_shuffle_misuse(body, message):
    with pytest.raises(KernelError, match=message):
        run(body, block=(32,))


def test_shuffles_votes_and_segments():
    body = """const unsigned all = 0xffffffffu; const int t = threadIdx.x; float* y = x + t * 8;
    y[0] = __shfl_sync(all, float(t), 3);
    y[1] = __shfl_up_sync(all, float(t), 2);
    y[2] = __shfl_down_sync(all, float(t), 2);
    y[3] = __shfl_xor_sync(all, float(t), 5);
    y[4] = __shfl_down_sync(all, float(t), 1, 8);
    y[5] = __popc(__ballot_sync(all, t & 1));
    y[6] = __any_sync(all, t == 9);
    y[7] = __syncthreads_count(t < 5);"""
    y = run(body, args=(np.zeros((32, 8), "f4"),), block=(32,))
    t = np.arange(32)
    want = [
        t * 0 + 3,
        np.where(t >= 2, t - 2, t),
        np.where(t < 30, t + 2, t),
        t ^ 5,
        np.where(t % 8 < 7, t + 1, t),
        t * 0 + 16,
        t * 0 + 1,
        t * 0 + 5,
    ]
    np.testing.assert_array_equal(y, np.stack(want, 1))


@pytest.mark.parametrize("args", [(1, np.float32(2)), (np.int32(1), 2.0), (np.zeros(1), None)])
def test_wrong_scalar_types(args):
    with pytest.raises(TypeError, match="argument"):
        _multiply(args)


def test_right_scalar_types():
    assert _multiply((np.int32(1), np.float32(2)))[0] == 2


def _multiply(args):
    params = "float* x, int a, float b"
    return run("x[0] = a * b;", args=(np.zeros(1, "f4"), *args), params=params, block=(1,))


@pytest.mark.parametrize("mode", ["fast", "asan"])
def test_array_of_no_dimensions_is_a_pointer(mode):
    args = (np.zeros(1, "f4"), np.array(3.0))
    assert run("x[0] = *a;", mode, args, "float* x, const double* a", block=(1,))[0] == 3


@pytest.mark.parametrize("mode", MODES)
def test_none_is_a_null_pointer(mode):
    args = (np.zeros(1, "f4"), None)
    assert run("x[0] = a == nullptr;", mode, args, "float* x, float* a", block=(1,))[0] == 1


@pytest.mark.parametrize("mode", ["fast", "asan"])
def test_write_to_a_read_only_array(mode):
    x = np.zeros(64, "f4")
    x.flags.writeable = False
    with pytest.raises(KernelError, match="wrote to argument 0, which is read-only"):
        run("x[threadIdx.x] = 1;", mode, (x,))


def test_strided_array_is_refused():
    with pytest.raises(TypeError, match="argument 0 is not contiguous"):
        run("x[0] = 1;", args=(np.zeros(64, "f4")[::2],))


@pytest.mark.parametrize(
    "options",
    [{"block": (2048,)}, {"block": (1, 1, 65)}, {"grid": (1, 70000)}, {"shared_mem": 228 << 10}],
)
def test_impossible_launches(options):
    with pytest.raises(KernelError, match="no GPU launches"):
        run("x[0] = 1;", **options)


def test_too_much_static_shared_memory():
    with pytest.raises(KernelError, match="static shared memory"):
        run("__shared__ float s[128][97]; s[0][0] = 1; x[0] = s[0][0];")


@pytest.mark.parametrize("mode", ["fast", "tsan"])
def test_grid_barrier(mode):
    body = """auto g = cooperative_groups::this_grid();
    x[g.thread_rank()] = 1; g.sync();
    float sum = 0; for (int i = 0; i < int(g.size()); ++i) sum += x[i];
    g.sync(); x[g.thread_rank()] = sum;"""
    launch = {"grid": (4,), "block": (16,), "preamble": "#include <cooperative_groups.h>\n"}
    assert (run(body, mode, resident=0, **launch) == 64).all()
    with pytest.raises(KernelError, match=r"deadlock, 16 threads wait.*grid barrier"):
        run(body, **launch)  # not launched as cooperative


def test_multiply_high():
    a, b = 0xD2E7470EE14C6C93, 0xFEDCBA9876543210
    out = np.zeros(1, "u8")
    args = (out, np.uint64(a), np.uint64(b))
    params = "unsigned long long* out, unsigned long long a, unsigned long long b"
    run("out[0] = __umul64hi(a, b);", args=args, params=params, block=(1,))
    assert int(out[0]) == a * b >> 64


@pytest.mark.parametrize("function", ["exp", "log", "sqrt"])
def test_functions_of_a_float_stay_float(function):
    """As on the GPU: with the double overloads a kernel would be more precise here than there."""
    assert run(f"x[0] = sizeof({function}(x[0]));", block=(1,))[0] == 4


def test_skipped_blocks():
    x = run("x[blockIdx.x * 2 + threadIdx.x] = 1;", grid=(4,), block=(2,), skip=3)
    np.testing.assert_array_equal(np.flatnonzero(x), [6, 7])
