"""NVRTC's use: what is kept and what is compiled again, with a stand-in; and every source, where torch brought NVRTC.

CI has torch for CPUs, which brings none, so that there the last is skipped.
"""

import logging
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from bench.attention import SHAPES
from bench.random_model import CONFIG_345M, gpt2_345m
from service.model.formats import Plain
from service.model.gpt2 import GPT2
from service.model.kernels.cuda import compiler, decode, head
from service.model.kernels.cuda.chain import sources
from service.model.kernels.cuda.compiler import CompilerError, Source, Target, compile_all
from service.model.kernels.plans import CHAINS, CUDA_DECODES, WIDES
from service.model.kernels.products import ACTIVATIONS

TARGET = Target("sm_90a", 13000)
SOURCE = Source("attention.cu", (("HEADS", 16),))
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NVDISASM = CUOBJDUMP.with_name("nvdisasm")


def _has_nvrtc() -> bool:
    try:
        compiler._library()
    except CompilerError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not _has_nvrtc(), reason="this torch brings no NVRTC")


class FakeNvrtc:
    """Compiles to the options; of a source with BAD, to nothing."""

    nvrtcResult = SimpleNamespace(NVRTC_SUCCESS=0)

    def __init__(self) -> None:
        self.compiled: list[list[bytes]] = []

    def nvrtcVersion(self) -> tuple[int, int, int]:
        return 0, 13, 0

    def nvrtcCreateProgram(self, text: bytes, *_: Any) -> tuple[int, list[bytes]]:
        assert b"griddepcontrol" in text
        return 0, []

    def nvrtcCompileProgram(self, program: list[bytes], count: int, options: list[bytes]) -> tuple[int]:
        program += options
        self.compiled.append(options)
        return (int(b"-DBAD=1" in options),)

    def nvrtcGetCUBINSize(self, program: list[bytes]) -> tuple[int, int]:
        return 0, len(b" ".join(program))

    nvrtcGetProgramLogSize = nvrtcGetCUBINSize

    def nvrtcGetCUBIN(self, program: list[bytes], into: bytearray) -> tuple[int]:
        into[:] = b" ".join(program)
        return (0,)

    nvrtcGetProgramLog = nvrtcGetCUBIN

    def nvrtcDestroyProgram(self, program: list[bytes]) -> tuple[int]:
        return (0,)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    fake = FakeNvrtc()
    monkeypatch.setattr(compiler, "_library", lambda: fake)
    return fake


def test_what_was_compiled_is_kept(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    """In a folder that is made, while source, options, architecture and driver stay; nothing else lies there."""
    folder = tmp_path / "kernels"
    first = compile_all([SOURCE], TARGET, folder=folder)
    assert first == compile_all([SOURCE], TARGET, folder=folder)
    assert 1 == len(nvrtc.compiled)
    changed = [
        (replace(SOURCE, defines=(("HEADS", 8),)), TARGET),
        (replace(SOURCE, file="product.cu"), TARGET),
        (SOURCE, replace(TARGET, architecture="sm_100a")),
        (SOURCE, replace(TARGET, driver=13010)),
    ]
    for number, (source, target) in enumerate(changed, 2):
        compile_all([source], target, folder=folder)
        assert number == len(nvrtc.compiled) == len(list(folder.iterdir()))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:40] + b"x" + b[41:], lambda _: b"", lambda b: b[:32]]
)
def test_what_is_damaged_is_compiled_again(
    nvrtc: FakeNvrtc, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    whole = compile_all([SOURCE], TARGET, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert whole == compile_all([SOURCE], TARGET, folder=tmp_path)
    assert "damaged" in caplog.text
    assert whole == compile_all([SOURCE], TARGET, folder=tmp_path)
    assert 2 == len(nvrtc.compiled)


def test_a_folder_that_cannot_be_written_is_told_and_no_error(
    nvrtc: FakeNvrtc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        compile_all([SOURCE], TARGET, folder=tmp_path / "file" / "kernels")
    assert "not kept" in caplog.text


def test_several_are_answered_in_their_order(nvrtc: FakeNvrtc) -> None:
    wanted = [replace(SOURCE, defines=(("HEADS", number),)) for number in range(8)]
    cubins = compile_all(wanted, TARGET, folder=None)
    assert [True] * 8 == [f"-DHEADS={number}".encode() in cubin for number, cubin in enumerate(cubins)]


def test_what_the_compiler_says_is_the_error(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    with pytest.raises(CompilerError, match=r"attention.cu: .*-DBAD=1"):
        compile_all([replace(SOURCE, defines=(("BAD", 1),))], TARGET, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(_has_nvrtc(), reason="this torch brings NVRTC")
def test_without_nvrtc_an_error_says_so() -> None:
    with pytest.raises(CompilerError, match="NVRTC is not here"):
        compile_all([SOURCE], TARGET, folder=None)


@needs_nvrtc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_source_compiles_and_stays_in_registers(activation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In so few that the blocks of five kernels are on a multiprocessor at once."""
    named = sources(replace(CONFIG_345M, activation=activation), dtype, CHAINS[1], block_size=16)
    for name, (registers, _) in compiled(named, tmp_path).items():
        assert registers <= {"attention": 80, "down": 56}.get(name, 48), name


@needs_nvrtc
@pytest.mark.parametrize("num_tokens", [num for num in CHAINS if num > 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sources_of_few_tokens_use_tensor_cores_and_whole_words(
    dtype: torch.dtype, num_tokens: int, tmp_path: Path
) -> None:
    """Two products a tile of 32 columns and eight tokens, for 16 rows of the matrix or what there is of them.

    Of 24 tokens and more a few words are not in registers, which is faster than fewer blocks on a multiprocessor.
    """
    named = sources(CONFIG_345M, dtype, CHAINS[num_tokens], block_size=16, num_tokens=num_tokens)
    for name, (registers, code) in compiled(named, tmp_path, most_local=0 if num_tokens < 24 else 32).items():
        assert registers <= (80 if name == "attention" else 2**16 // 256 // CHAINS[num_tokens].resident), name
        if name != "attention":
            shape = dict(named[name].defines)
            tiles, groups = shape["K"] // 256, shape["ROWS"] // 8  # tiles of a warp
            assert code.count("HMMA.16816.F32") == 2 * tiles * -(-groups // 2) * -(-num_tokens // 8), name
            assert code.count("LDS.128") >= tiles * groups, name


@needs_nvrtc
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 4096), (torch.float16, 4096), (torch.bfloat16, 2048), (torch.bfloat16, 1024)]
)
@pytest.mark.parametrize("num_tokens", WIDES)
def test_sources_of_many_tokens_multiply_by_warpgroups(
    num_tokens: int, dtype: torch.dtype, size: int, tmp_path: Path
) -> None:
    """Both operands are in shared memory, where copies put them that one thread asks for."""
    config = replace(CONFIG_345M, intermediate_size=size)
    named = sources(config, dtype, WIDES[num_tokens], block_size=16, num_tokens=num_tokens)
    for name, (registers, code) in compiled(named, tmp_path).items():
        shape = dict(named[name].defines)
        assert registers <= 128, name
        assert code.count(f"HGMMA.64x{shape['ROWS']}x16.F32") == shape["STEP"] // 16, name
        assert "UTMALDG.3D" in code, name


@needs_nvrtc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_compiles_and_stays_in_registers(dtype: torch.dtype, tmp_path: Path) -> None:
    """In so few that three blocks are on a multiprocessor with up to 16 rows, and two with more."""
    named = {str(num): head.source(CONFIG_345M, dtype, num_rows=num, most_blocks=132)[0] for num in CHAINS}
    for name, (registers, code) in compiled(named, tmp_path).items():
        num_rows = int(name)
        assert registers <= (64 if num_rows <= 8 else 80 if num_rows <= 16 else 128), name
        assert code.count("HMMA.16816.F32") == 8 * -(-num_rows // 8), name
        assert code.count("UBLKCP") == head.Ring().stages + 1, name  # each stage's first, and one for all later ones


def compiled(named: dict[str, Source], folder: Path, *, most_local: int = 0) -> dict[str, tuple[int, str]]:
    """Registers, and code; it uses no more than so many bytes of a thread's own memory."""
    found = {}
    for name, cubin in zip(named, compile_all(list(named.values()), TARGET, folder=None), strict=True):
        (folder / name).write_bytes(cubin)
        used = subprocess.run([CUOBJDUMP, "-res-usage", folder / name], check=True, capture_output=True, text=True)
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used.stdout)}
        assert max(numbers["STACK"], numbers["LOCAL"]) <= most_local, name
        code = subprocess.run([NVDISASM, "-c", folder / name], check=True, capture_output=True, text=True)
        found[name] = (numbers["REG"], code.stdout)
    return found


@needs_nvrtc
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_attention_compiles_and_stays_in_registers(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """As served, and in the shapes that bench/attention.py compares; on a rank, too, which has some of the heads."""
    shapes = [*SHAPES, *(cuda for _, cuda in CUDA_DECODES)]
    for num_heads in (16, 2):
        model = random_345m(dtype)
        model.attention_width = 64 * num_heads
        model.format = Plain(dtype, cache_dtype=cache_dtype)
        named = decode.sources(model, shapes, block_size=16)
        by_name = {f"{warps} warps, {passes} passes": source for (warps, passes), source in named.items()}
        for (_, passes), (registers, _) in zip(named, compiled(by_name, tmp_path).values(), strict=True):
            assert registers <= {2: 64, 4: 80}[passes], passes


def random_345m(dtype: torch.dtype) -> GPT2:
    """Without its numbers."""
    return gpt2_345m(lambda _, shape: torch.empty(shape, dtype=dtype, device="meta"), num_layers=1)
