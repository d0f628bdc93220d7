"""Tiles of AMX in memory: functions in LLVM's language that do what the instructions do, for processors without them.

Intel, Architecture Instruction Set Extensions Programming Reference, chapter "Intel AMX": sums of the first and of the
second numbers of pairs are added up apart, with numbers below the normal ones as zeros, and both are added to the tile.
"""

import ctypes
import re
from functools import cache

from structlin.execution.compiled._ir import Code
from structlin.execution.compiled._target import AVX512_BF16, TILES, address, host, load, with_tiles

TILE = 1024  # bytes
STATE = (ctypes.c_uint8 * (64 + 8 * TILE))()  # the configuration, and eight tiles


class Tiles(Code):
    """The body of a function that emulates one instruction."""

    def __init__(self):
        super().__init__()
        self.state = f"inttoptr (i64 {ctypes.addressof(STATE)} to ptr)"

    def read(self, kind, pointer):
        return self.value(f"load {kind}, ptr {pointer}, align 1")

    def write(self, kind, value, pointer):
        self.put(f"store {kind} {value}, ptr {pointer}, align 1")

    def shape(self, tile):
        """Rows, and elements of 4 bytes in a row."""
        number = self.value(f"zext i8 {tile} to i64")
        rows = self.value(f"zext i8 {self.read('i8', self.at('i8', self.state, self.add(number, 48)))} to i64")
        place = self.at("i8", self.state, self.add(self.multiply(number, 2), 16))
        wide = self.value(f"zext i16 {self.read('i16', place)} to i64")
        return rows, self.value(f"lshr i64 {wide}, 2")

    def place(self, tile, row, column):
        start = self.add(self.multiply(self.value(f"zext i8 {tile} to i64"), TILE), 64)
        return self.at("i8", self.state, self.add(start, self.add(self.multiply(row, 64), self.multiply(column, 4))))

    def each(self, rows, columns, body):
        self.loop(0, rows, 1, lambda r, _: self.loop(0, columns, 1, lambda c, _: body(r, c)) and None)

    def clear(self, tile):
        self.each(16, 16, lambda r, c: self.write("i32", 0, self.place(tile, r, c)))

    def flushed(self, number):
        size = self.call("float", "llvm.fabs.f32", ("float", number))
        tiny = self.value(f"fcmp olt float {size}, 0x3810000000000000")
        zero = self.call("float", "llvm.copysign.f32", ("float", "0.0"), ("float", number))
        return self.value(f"select i1 {tiny}, float {zero}, float {number}")

    def half(self, pair, high):
        """One of the two numbers of a pair."""
        bits = self.value(f"and i32 {pair}, -65536") if high else self.value(f"shl i32 {pair}, 16")
        return self.flushed(self.value(f"bitcast i32 {bits} to float"))

    def sum(self, a, b):
        return self.flushed(self.value(f"fadd float {a}, {b}"))


def ldtilecfg(code):
    code.loop(
        0, 64, 1, lambda k, _: code.write("i8", code.read("i8", code.at("i8", "%a", k)), code.at("i8", code.state, k))
    )
    code.loop(64, len(STATE), 1, lambda k, _: code.write("i8", 0, code.at("i8", code.state, k)))


def tilerelease(code):
    """What is used after that finds tiles without rows."""
    code.loop(0, len(STATE), 1, lambda k, _: code.write("i8", 0, code.at("i8", code.state, k)))


def tilezero(code):
    code.clear("%a")


def tileloadd64(code):
    code.clear("%a")

    def move(r, c):
        source = code.at("i8", "%b", code.add(code.multiply(r, "%c"), code.multiply(c, 4)))
        code.write("i32", code.read("i32", source), code.place("%a", r, c))

    code.each(*code.shape("%a"), move)


def tilestored64(code):
    def move(r, c):
        to = code.at("i8", "%b", code.add(code.multiply(r, "%c"), code.multiply(c, 4)))
        code.write("i32", code.read("i32", code.place("%a", r, c)), to)

    code.each(*code.shape("%a"), move)


def tdpbf16ps(code):
    rows, columns = code.shape("%a")
    _, depth = code.shape("%b")

    def cell(r, c):
        def pair(k, sums):
            left, right = code.read("i32", code.place("%b", r, k)), code.read("i32", code.place("%c", k, c))
            found = []
            for held, high in zip(sums, (False, True), strict=True):
                operands = [("float", code.half(left, high)), ("float", code.half(right, high)), ("float", held)]
                found.append(code.flushed(code.call("float", "llvm.fma.f32", *operands)))
            return found

        sums = code.loop(0, depth, 1, pair, ["0.0", "0.0"], "float")
        place = code.place("%a", r, c)
        code.write("float", code.sum(code.flushed(code.read("float", place)), code.sum(*sums)), place)

    code.each(rows, columns, cell)


INSTRUCTIONS = {
    ldtilecfg: "ptr", tilerelease: "", tilezero: "i8", tileloadd64: "i8 ptr i64", tilestored64: "i8 ptr i64",
    tdpbf16ps: "i8 i8 i8",
}  # fmt: skip
TYPES = {"ptr": ctypes.c_void_p, "i8": ctypes.c_int8, "i64": ctypes.c_int64}


@cache
def functions():
    """By the name of the instruction; compiled once."""
    found = {}
    for write, kinds in INSTRUCTIONS.items():
        code = Tiles()
        write(code)
        parameters = ", ".join(f"{kind} %{name}" for kind, name in zip(kinds.split(), "abc", strict=False))
        text = code.function(write.__name__, parameters, AVX512_BF16.attributes)
        found[write.__name__] = load(text, write.__name__, host(), [TYPES[kind] for kind in kinds.split()])
    return found


def load_emulated(text, name, target, parameters):
    """As ``load``, for code whose tiles are emulated. One thread at a time may run it."""
    for instruction, function in functions().items():
        text = re.sub(rf"declare void @llvm\.x86\.{instruction}\(.*\)\n", "", text)
        text = text.replace(f"@llvm.x86.{instruction}(", f"inttoptr (i64 {address(function)} to ptr)(")
    return load(text, name, host() if target.tiles else target, parameters)


def emulated_target():
    """This machine as if it had tiles, None if it lacks what processors with tiles have besides."""
    found = host()
    return with_tiles(found) if found is not None and set(AVX512_BF16.features) <= set(found.features) else None


__all__ = ["STATE", "TILES", "emulated_target", "functions", "load_emulated"]
