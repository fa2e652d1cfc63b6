"""CUDA C++ to machine code by NVRTC, a library that torch for CUDA depends on; the code is kept in a folder.

The caller says for which GPU: this needs none.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_BEFORE = ("link.cuh", "sums.cuh", "softmax.cuh")  # each source
_DIGEST = 32  # bytes: SHA-256


class CompilerError(Exception):
    """NVRTC is not here, or refuses a source."""


@dataclass(frozen=True, slots=True)
class Source:
    """A `.cu` of this folder with what it is to be compiled for."""

    file: str
    defines: tuple[tuple[str, int], ...]

    @property
    def text(self) -> bytes:
        return b"".join((_FOLDER / name).read_bytes() for name in (*_BEFORE, self.file))

    @property
    def options(self) -> list[bytes]:
        return [b"-std=c++17", *(f"-D{name}={value}".encode() for name, value in self.defines)]


@dataclass(frozen=True, slots=True)
class Target:
    """What the code is for; other code is kept for another."""

    architecture: str  # sm_90a
    driver: int  # its version


def compile_all(sources: Sequence[Source], target: Target, *, folder: Path | None) -> list[bytes]:
    """The cubin of each, from `folder` where it is there, which keeps it. Raises CompilerError."""
    nvrtc = _library()
    different = list(dict.fromkeys(sources))
    with ThreadPoolExecutor(max(1, min(len(different), os.cpu_count() or 1))) as threads:
        made = threads.map(partial(_cubin, nvrtc, target=target, folder=folder), different)
        cubins = dict(zip(different, made, strict=True))
    return [cubins[source] for source in sources]


def _library() -> Any:
    """The module of NVRTC's functions, loaded."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads it
    except (ImportError, RuntimeError) as error:
        raise CompilerError(f"NVRTC is not here ({error})") from error
    return nvrtc


def _cubin(nvrtc: Any, source: Source, *, target: Target, folder: Path | None) -> bytes:
    options = [f"--gpu-architecture={target.architecture}".encode(), *source.options]
    if folder is None:
        return _compiled(nvrtc, source, options)
    version = nvrtc.nvrtcVersion()[1:]
    key = hashlib.sha256(repr((version, target.driver, options, source.text)).encode()).hexdigest()
    path = folder / f"{Path(source.file).stem}-{key[:24]}.cubin"
    kept = _kept(path)
    if kept is None:
        kept = _compiled(nvrtc, source, options)
        _keep(path, kept)
    return kept


def _compiled(nvrtc: Any, source: Source, options: list[bytes]) -> bytes:
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.text, source.file.encode(), 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            said = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, said))
            raise CompilerError(f"{source.file}: {said.decode(errors='replace').strip(chr(0)).strip()}")
        cubin = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    result, *values = answer
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompilerError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result)[1].decode()}")
    return values[0] if values else None


def _kept(path: Path) -> bytes | None:
    """What was kept there, if it is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:_DIGEST], content[_DIGEST:]
    if cubin and hashlib.sha256(cubin).digest() == digest:
        return cubin
    log.warning("%s is damaged, and compiled again", path)
    return None


def _keep(path: Path, cubin: bytes) -> None:
    """All of it or nothing: other engines may read or write there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, 0o644)  # others may use the folder, too
                file.write(hashlib.sha256(cubin).digest() + cubin)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        log.warning("compiled kernels are not kept: %s", error)
