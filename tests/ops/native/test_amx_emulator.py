"""The software tiles of amx_emulator.cpp compute what Intel's manual says, and fault where it says so.

The truth is numpy; where the machine has tiles of its own, they are a second one.
"""

import os
import re
import signal
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
from numpy.lib.stride_tricks import as_strided
from ops.native import compilers

HERE = Path(__file__).parent
TILES = ("-mamx-tile", "-mamx-bf16")
NO_TILES = 2  # what the program returns where neither the machine nor the emulator has any

# The ways in which a tile's address can be encoded: every register as base and as index, all scales and displacements.

REGISTERS = ["rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"]
CALLEE_SAVED = ["rbx", "rbp", "r12", "r13", "r14", "r15"]
CONFIGURATION = ".byte 1, 0\n.zero 14\n.value 64\n.zero 30\n.byte 16\n.zero 15"
CONFIGURE = ("ldtilecfg shape(%rip)", "ldtilecfg %fs:shape_of_thread@tpoff")


def form(configure: str, base: str, index: str, scale: int, displacement: int) -> list[str]:
    """Assembly for void (const void* first_row [rdi], long stride [rsi], void* out [rdx])."""
    return [
        configure,
        *(f"push %{name}" for name in CALLEE_SAVED),
        "push %rdx",
        f"lea {-displacement}(%rdi), %rdi",
        f"sar ${scale.bit_length() - 1}, %rsi",
        "push %rsi",
        "push %rdi",
        f"pop %{base}",
        f"pop %{index}",
        f"tileloadd {displacement}(%{base}, %{index}, {scale}), %tmm0",
        "pop %rdx",
        "mov $64, %ecx",
        "tilestored %tmm0, (%rdx, %rcx)",
        *(f"pop %{name}" for name in reversed(CALLEE_SAVED)),
        "tilerelease",
        "ret",
    ]


def special_form(load: list[str]) -> list[str]:
    return [CONFIGURE[0], *load, "mov $64, %ecx", "tilestored %tmm0, (%rdx, %rcx)", "tilerelease", "ret"]


FORMS = [
    form(CONFIGURE[i % 2], base, REGISTERS[(i + 4) % 15], 1 << i % 4, (0, -8, 127, 4096, -70000)[i % 5])
    for i, base in enumerate(REGISTERS)
]
NO_BASE = special_form([f"tileloadd {0x10000000 + 2048}(, %rsi), %tmm0"])
ON_THE_STACK = special_form(
    [
        *("mov %rdx, %r8", "mov %rsi, %r9", "lea -2048(%rdi), %rsi", "mov $4096, %ecx", "sub $4096, %rsp"),
        *("mov %rsp, %rdi", "rep movsb", "tileloadd 2048(%rsp, %r9), %tmm0", "add $4096, %rsp", "mov %r8, %rdx"),
    ]
)
NO_INDEX = special_form(["tileloadd (%rdi), %tmm0"])


def forms_in_assembly() -> str:
    forms = [*FORMS, NO_BASE, ON_THE_STACK, NO_INDEX]
    lines = [".text"]
    for i, body in enumerate(forms):
        lines += [f"form{i}:", *body]
    lines += ['.section .data.rel.ro, "aw"', ".globl addressing_forms, addressing_form_count", "addressing_forms:"]
    lines += [f".quad form{i}" for i in range(len(forms))]
    lines += ["addressing_form_count:", f".quad {len(forms)}", ".section .rodata", "shape:", CONFIGURATION]
    lines += ['.section .tdata, "awT", @progbits', "shape_of_thread:", CONFIGURATION]
    return "\n".join([*lines, '.section .note.GNU-stack, "", @progbits', ""])


@dataclass(frozen=True)
class Programs:
    """The emulator, and the program twice: as it is, and with tile instructions that trap on every machine."""

    emulator: Path
    plain: Path
    trapping: Path

    def run(self, name: str, *arguments: object, given: bytes = b"", emulated: bool = True):
        preload = {"LD_PRELOAD": str(self.emulator)} if emulated else {}
        command = [str(getattr(self, name)), *map(str, arguments)]
        return subprocess.run(command, input=given, capture_output=True, timeout=60, env=os.environ | preload)


@pytest.fixture(scope="module")
def programs(amx_emulator, tmp_path_factory) -> Programs:
    folder = tmp_path_factory.mktemp("amx")
    assembly, forms = folder / "program.s", folder / "forms.s"
    compilers.run(
        ["g++", "-std=c++17", *compilers.WARNINGS, "-O2", *TILES, "-S", HERE / "amx_program.cpp", "-o", assembly]
    )
    forms.write_text(forms_in_assembly())
    for source in (assembly, forms):
        # A LOCK prefix is illegal here, so that the instruction traps where there are tiles as well.
        lines = re.sub(r"^\s*((ld|st)tilecfg|tile|tdp)", r".byte 0xf0; \g<0>", source.read_text(), flags=re.M)
        source.with_stem(f"trapping-{source.stem}").write_text(lines)
    for prefix in ("", "trapping-"):
        parts = [folder / f"{prefix}{source.name}" for source in (assembly, forms)]
        compilers.run(["g++", *parts, "-pthread", "-o", folder / f"{prefix}program"])
    return Programs(amx_emulator, folder / "program", folder / "trapping-program")


# Products.


@dataclass(frozen=True)
class Product:
    """out [M, N] float32 += left [M, 2K] times right [2K, N] bfloat16, the rows lying a stride of bytes apart."""

    out: numpy.ndarray
    left: numpy.ndarray
    right: numpy.ndarray
    strides: tuple[int, int, int] = (64, 64, 64)  # of left, right (in pairs of rows) and out
    repetitions: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.left.shape[0], self.left.shape[1] // 2, self.right.shape[1]

    def given(self) -> bytes:
        pairs, columns = self.shape[1:]
        interleaved = bits(self.right).reshape(pairs, 2, columns).transpose(0, 2, 1).reshape(pairs, 2 * columns)
        operands = zip((bits(self.left), interleaved, self.out), self.strides, strict=True)
        header = numpy.array([*self.shape, *self.strides, self.repetitions], numpy.int32).tobytes()
        return header + b"".join(spread(rows, stride).tobytes() for rows, stride in operands)


@dataclass(frozen=True)
class Answer:
    """Bytes: the product added, the product alone in a tile that is new or zeroed, the configuration read back."""

    out: numpy.ndarray
    from_new: numpy.ndarray
    from_zero: numpy.ndarray
    configuration: numpy.ndarray


def spread(rows: numpy.ndarray, stride: int) -> numpy.ndarray:
    """Rows as bytes, a stride apart; what lies between is filled with 0xCD."""
    width = rows.shape[1] * rows.itemsize
    place = numpy.full((len(rows) - 1) * stride + width, 0xCD, numpy.uint8)
    as_strided(place, (len(rows), width), (stride, 1))[:] = numpy.ascontiguousarray(rows).view(numpy.uint8)
    return place


def bits(x: numpy.ndarray) -> numpy.ndarray:
    return (x.view(numpy.uint32) >> 16).astype(numpy.uint16)


def bfloat16(x) -> numpy.ndarray:
    """float32 without the digits that bfloat16 has not."""
    return (numpy.asarray(x, numpy.float32).view(numpy.uint32) & 0xFFFF0000).view(numpy.float32)


def normal(x: numpy.ndarray) -> numpy.ndarray:
    """Denormals as zeros of their sign."""
    return numpy.where(abs(x) < numpy.finfo(numpy.float32).tiny, numpy.copysign(numpy.float32(0), x), x)


def by_the_manual(out, left, right, repetitions=1):
    """The manual's pseudo-code: sums of the even and of the odd elements, their sum, the old value plus it."""
    left, right = normal(left), normal(right)
    for _ in range(repetitions):
        even = odd = numpy.zeros_like(out)
        for i in range(0, left.shape[1], 2):
            even = normal(even + left[:, i, None] * right[i])
            odd = normal(odd + left[:, i + 1, None] * right[i + 1])
        out = normal(normal(out) + normal(even + odd))
    return out


def drawn(generator, rows, pairs, columns, **layout) -> Product:
    operands = (generator.standard_normal(shape) for shape in ((rows, 2 * pairs), (2 * pairs, columns)))
    return Product(generator.standard_normal((rows, columns)).astype(numpy.float32), *map(bfloat16, operands), **layout)


def single(out: float, *products: tuple[float, float]) -> Product:
    """One entry: out + the sum of products."""
    left, right = bfloat16(products).T
    return Product(numpy.array([[out]], numpy.float32), left[None, :].copy(), right[:, None].copy())


def random_products() -> list[Product]:
    generator = numpy.random.default_rng(0)
    whole = [drawn(generator, 16, 16, 16, repetitions=n) for n in (1, 3)]
    strided = [
        drawn(generator, 16, 16, 16, strides=(67, 129, 331)),
        drawn(generator, 16, 16, 16, strides=(2048, 96, 77)),
    ]
    partial = [drawn(generator, *generator.integers(1, 17, 3), strides=(65, 81, 67)) for _ in range(40)]
    return [*whole, *strided, *partial]


EXACT = {
    "even elements, then odd ones, then the old value": single(-(2.0**24), (2.0**24, 1), (1, 1)),
    "ties go to the even number below": single(1, (2.0**-24, 1), (0, 1)),
    "ties go to the even number above": single(1 + 2.0**-23, (2.0**-24, 1), (0, 1)),
    "denormal factors are zero": single(1, (2.0**-130, 2.0**127), (2.0**127, -(2.0**-127))),
    "a denormal old value is zero": single(2.0**-127, (2.0**-126, 1), (0, 0)),
    "a denormal result is zero": single(-1.5 * 2.0**-126, (2.0**-126, 1), (0, 0)),
    "infinity stays": single(1, (numpy.inf, 1), (1, 1)),
}


def answers(programs: Programs, name: str, products: list[Product], emulated: bool = True) -> list[Answer]:
    given = numpy.int32(len(products)).tobytes() + b"".join(product.given() for product in products)
    done = programs.run(name, "products", given=given, emulated=emulated)
    assert done.returncode == 0, done
    if emulated:
        assert int(done.stderr) == sum(12 + product.repetitions for product in products)
    found, read = [], memoryview(done.stdout)
    for product in products:
        size = len(spread(product.out, product.strides[2]))
        end = size + 1024 + 1024 + 64
        parts = numpy.split(numpy.frombuffer(read[:end], numpy.uint8), [size, size + 1024, size + 2048])
        found.append(Answer(*parts))
        read = read[end:]
    assert not read
    return found


def check_products(programs, name):
    products = [*random_products(), *EXACT.values()]
    for product, answer in zip(products, answers(programs, name, products), strict=True):
        rows, pairs, columns = product.shape
        truth = by_the_manual(product.out, product.left, product.right, product.repetitions)
        assert (answer.out == spread(truth, product.strides[2])).all(), product
        from_zero = numpy.full((16, 64), 0xAB, numpy.uint8)
        zeros = numpy.zeros_like(product.out)
        from_zero[:rows, : 4 * columns] = by_the_manual(zeros, product.left, product.right).view(numpy.uint8)
        assert (answer.from_zero == from_zero.reshape(-1)).all(), product
        assert (answer.from_new == answer.from_zero).all(), product
        shapes = [columns, pairs, columns, columns], [rows, rows, pairs, rows]
        row_bytes = numpy.array([4 * count for count in shapes[0]] + [0] * 12, numpy.uint16).tobytes()
        assert answer.configuration.tobytes() == bytes([1] + [0] * 15) + row_bytes + bytes(shapes[1] + [0] * 12)


@pytest.mark.parametrize("name", ["plain", "trapping"])
def test_products_are_those_of_the_manual(programs, name):
    check_products(programs, name)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [compilers.GCC, compilers.CLANG], ids=lambda compiler: compiler.command)
@pytest.mark.parametrize(
    "flags", [("-O0",), ("-O2",), ("-O2", "-march=native"), ("-O3", "-ffp-contract=off")], ids=" ".join
)
def test_products_do_not_depend_on_how_the_emulator_was_compiled(programs, tmp_path, compiler, flags):
    flags = ("-std=c++17", "-Wpedantic", "-Wconversion", *flags)
    compilers.require(compiler, flags)
    library = compilers.shared_library(compiler, [HERE / "amx_emulator.cpp"], tmp_path / "emulator.so", flags)
    check_products(replace(programs, emulator=library), "plain")


def test_products_are_close_to_float64(programs):
    products = random_products()
    for product, answer in zip(products, answers(programs, "plain", products), strict=True):
        left, right = product.left.astype(numpy.float64), product.right.astype(numpy.float64)
        size = abs(product.out) + product.repetitions * (abs(left) @ abs(right))
        found = as_strided(answer.out, (len(left), 4 * right.shape[1]), (product.strides[2], 1))
        error = numpy.ascontiguousarray(found).view(numpy.float32) - product.out - product.repetitions * (left @ right)
        assert (abs(error) <= 2.0**-22 * size).all()


@pytest.mark.parametrize("name", ["plain", "trapping"])
@pytest.mark.parametrize("stride", [72, -72, 104])
def test_every_way_of_addressing(programs, name, stride):
    data = numpy.random.default_rng(0).integers(0, 256, 4096, numpy.uint8)
    done = programs.run(name, "forms", given=numpy.int64(stride).tobytes() + data.tobytes())
    assert done.returncode == 0, done
    found = numpy.frombuffer(done.stdout, numpy.uint8).reshape(-1, 16, 64)
    assert len(found) == len(FORMS) + 3
    expected = as_strided(data[2048:], (16, 64), (stride, 1))
    assert (found[:-1] == expected).all()
    assert (found[-1] == expected[0]).all()  # no index is a stride of zero


# Faults.


def configuration(shapes, palette=1, **bytes_at) -> bytes:
    """The 64 bytes of LDTILECFG for (rows, bytes a row) of tile 0, 1, ..."""
    found = bytearray(64)
    found[0] = palette
    for tile, (rows, row_bytes) in enumerate(shapes):
        found[16 + 2 * tile : 18 + 2 * tile] = row_bytes.to_bytes(2, "little")
        found[48 + tile] = rows
    for name, value in bytes_at.items():
        found[int(name.removeprefix("byte"))] = value
    return bytes(found)


FULL = [(16, 64)] * 3
PROTECTION, UNDEFINED = -signal.SIGSEGV, -signal.SIGILL  # what Linux makes of #GP and #UD
FAULTS = {
    "there are 0 and 1": (configuration(FULL, palette=2), "", PROTECTION),
    "the reserved byte 7 is not 0": (configuration(FULL, byte7=1), "", PROTECTION),
    "tmm0 has 17 rows: at most 16": (configuration([(17, 64)]), "", PROTECTION),
    "tmm1 has 68 bytes a row: at most 64": (configuration([(16, 64), (16, 68)]), "", PROTECTION),
    "tmm2 has 16 rows of 0 bytes": (configuration([(16, 64), (16, 64), (16, 0)]), "", PROTECTION),
    "tmm8 of 8 is configured": (configuration([(16, 64)] * 9), "", PROTECTION),
    "TILEZERO at 0x": (configuration([], palette=255), "zero", UNDEFINED),
    "the thread has no tile configuration": (configuration(FULL), "release", UNDEFINED),
    "tmm5 is not configured": (configuration(FULL), "zero 5", UNDEFINED),
    "three different tiles are needed": (configuration(FULL), "square", UNDEFINED),
    "tmm0 (8 rows of 64 bytes)": (configuration([(8, 64), (16, 64), (16, 64)]), "multiply", UNDEFINED),
    "tmm2 (16 of 32): the shapes do not fit": (configuration([(16, 64), (16, 64), (16, 32)]), "multiply", UNDEFINED),
    "tmm1 (16 of 60)": (configuration([(16, 64), (16, 60), (16, 64)]), "multiply", UNDEFINED),
    "tmm1 has 62 bytes a row: no multiple of 4": (configuration([(16, 64), (16, 62), (16, 64)]), "multiply", UNDEFINED),
}


@pytest.mark.parametrize("name", ["plain", "trapping"])
@pytest.mark.parametrize("message", FAULTS)
def test_what_the_processor_faults_on_is_told(programs, name, message):
    given, action, exception = FAULTS[message]
    done = programs.run(name, "fault", action, given=given)
    assert done.returncode == -signal.SIGABRT
    assert message in done.stderr.decode()
    assert ("#GP" if exception == PROTECTION else "#UD") in done.stderr.decode()


def test_other_illegal_instructions_go_where_they_went(programs):
    done = programs.run("plain", "fault", "other", given=configuration(FULL))
    assert done.returncode == -signal.SIGILL
    assert not done.stderr
    done = programs.run("plain", "chained", given=configuration(FULL))
    assert done.returncode == 7


OVERRUN = """
#include <immintrin.h>
#include <cstdlib>
alignas(64) static unsigned char shape[64] = {1};
int main(int, char** arguments) {
    shape[16] = 64, shape[48] = 16;
    auto* memory = static_cast<char*>(malloc(1024));
    asm volatile("" ::: "memory");
    _tile_loadconfig(shape);
    _tile_loadd(0, memory + atoi(arguments[1]), 64);
    _tile_stored(0, memory + atoi(arguments[2]), 64);
    _tile_release();
    free(memory);
}
"""


def test_address_sanitizer_sees_what_tiles_load_and_store(amx_emulator, tmp_path):
    sanitized = ("-fsanitize=address", "-g", *TILES)
    compilers.require(compilers.GCC, sanitized)
    (tmp_path / "overrun.cpp").write_text(OVERRUN)
    compilers.run(["g++", *sanitized, tmp_path / "overrun.cpp", "-o", tmp_path / "overrun"])
    environment = os.environ | {"LD_PRELOAD": str(amx_emulator), "ASAN_OPTIONS": "verify_asan_link_order=0"}

    def run(load: int, store: int):
        command = [str(tmp_path / "overrun"), str(load), str(store)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert run(0, 0).returncode == 0
    assert "READ of size 64" in run(4, 0).stderr
    assert "WRITE of size 64" in run(0, -4).stderr


# The machine's own tiles.


@pytest.fixture
def hardware(programs) -> None:
    given = numpy.int32(0).tobytes()
    if programs.run("plain", "products", given=given, emulated=False).returncode == NO_TILES:
        pytest.skip("this processor has no tiles of its own (AMX) to compare with")


@pytest.mark.usefixtures("hardware")
def test_the_processor_agrees(programs):
    products = random_products()
    runs = (answers(programs, "plain", products, emulated=False), answers(programs, "trapping", products))
    for product, own, ours in zip(products, *runs, strict=True):
        assert (own.configuration == ours.configuration).all()
        size = abs(product.out) + product.repetitions * (abs(product.left) @ abs(product.right))
        found = [as_strided(x.out, (len(size), 4 * size.shape[1]), (product.strides[2], 1)) for x in (own, ours)]
        own_out, our_out = (numpy.ascontiguousarray(x).view(numpy.float32) for x in found)
        assert (abs(own_out - our_out) <= 2.0**-22 * size).all()


@pytest.mark.usefixtures("hardware")
def test_the_processor_faults_there_too(programs):
    for message, (given, action, exception) in FAULTS.items():
        done = programs.run("plain", "fault", action, given=given, emulated=False)
        assert done.returncode == exception, message
