"""Every kernel that serves MegatronGPT2 345M compiles for the GPUs that it is served on, without one being there."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

# Shared memory that a program may have: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MOST_SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
KERNELS = {
    "add_and_norm",
    "adjust_logits",
    "barrier",
    "decode_attention",
    "drop_wrong",
    "embed",
    "fetch",
    "gather_and_norm",
    "pick_tokens",
    "prefill_attention",
    "put_logits",
    "scan_logits",
    "sum_and_norm",
    "write_kv",
}
PRODUCTS = {"tiled_product", "vector_logits", "vector_product"}
TARGETS = [(90, "bfloat16"), (80, "float16"), (80, "float32"), (89, "float16")]
TARGETS += [(80, "int8"), (89, "fp8"), (90, "fp8")]

Compilers = dict[tuple[int, str], subprocess.Popen[str]]


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    """One for each target, at work."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    started: Compilers = {}
    for capability, dtype in TARGETS:
        command = [sys.executable, "-m", "tests.model.kernels.compiling", str(capability), dtype]
        command.append(str(MOST_SHARED[capability]))
        started[capability, dtype] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_every_kernel_compiles_and_fits(compilers: Compilers, capability: int, dtype: str) -> None:
    """In every shape in which a step launches it: one token to 2,048, one row to 256, heads of 8 to 1,024."""
    output, errors = compilers[capability, dtype].communicate()
    assert 0 == compilers[capability, dtype].returncode, errors
    compiled = [line.split() for line in output.splitlines()]
    assert KERNELS | (PRODUCTS if dtype != "float32" else set()) == {name for name, _ in compiled}
    assert MOST_SHARED[capability] >= max(int(shared) for _, shared in compiled)
