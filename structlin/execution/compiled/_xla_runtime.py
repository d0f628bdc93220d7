"""What a custom call of XLA's runs: the stages of a pass one after the other, each shared among XLA's own threads.

XLA calls a handler with a frame that says where the arrays are (its typed foreign function interface, ``c_api.h`` among
the headers of jaxlib). A handler of ours hands that on to one function, with a plan: a table of numbers that lists the
stages, and for each what it calls and where in the arrays its operands start. Nothing of it holds Python's lock.

The shares of a stage are claimed one at a time, by the thread that XLA called and by tasks in its pool. A task may
start when all is done, as the pool may have other things to do: it finds nothing to claim, and the last one that knows
of a stage frees the words that it is claimed by. So no thread waits for a task to start.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from structlin.execution.compiled._ir import Code, Int, Values
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._target import Target, address, load

# Versions of the interface whose structs are those that are read here (minor ones of version 0).
VERSIONS = (2, 3)

# Words of a stage that is shared: next share, shares that are done, threads that know of it; then what @work reads.
_POOL = """
define internal void @work(ptr %stage) nounwind {{
entry:
  %done.at = getelementptr i64, ptr %stage, i64 1
  %shares.at = getelementptr i64, ptr %stage, i64 3
  %shares = load i64, ptr %shares.at
  br label %claim
claim:
  %k = atomicrmw add ptr %stage, i64 1 acq_rel
  %mine = icmp slt i64 %k, %shares
  br i1 %mine, label %run, label %end
run:
  %function.at = getelementptr i64, ptr %stage, i64 4
  %function = load ptr, ptr %function.at
  %total.at = getelementptr i64, ptr %stage, i64 5
  %total = load i64, ptr %total.at
  %tables.at = getelementptr i64, ptr %stage, i64 6
  %tables = load ptr, ptr %tables.at
  %cuts.at = getelementptr i64, ptr %stage, i64 7
  %cuts = load ptr, ptr %cuts.at
  call void @share(ptr %function, ptr %tables, ptr %cuts, i64 %total, i64 %k)
  %before = atomicrmw add ptr %done.at, i64 1 acq_rel
  br label %claim
end:
  ret void
}}

define internal void @share(ptr %function, ptr %tables, ptr %cuts, i64 %total, i64 %k) nounwind {{
entry:
  %table.at = getelementptr ptr, ptr %tables, i64 %k
  %table = load ptr, ptr %table.at
  %first.at = getelementptr i64, ptr %cuts, i64 %k
  %first = load i64, ptr %first.at
  %last.at = getelementptr i64, ptr %first.at, i64 1
  %last = load i64, ptr %last.at
  call void %function(ptr %table, i64 %first, i64 %last, i64 %total)
  ret void
}}

define internal void @forget(ptr %stage) nounwind {{
entry:
  %known.at = getelementptr i64, ptr %stage, i64 2
  %known = atomicrmw sub ptr %known.at, i64 1 acq_rel
  %last = icmp eq i64 %known, 1
  br i1 %last, label %free, label %end
free:
  call void inttoptr (i64 {free} to ptr)(ptr %stage)
  br label %end
end:
  ret void
}}

define internal void @task(ptr %stage) nounwind {{
entry:
  call void @work(ptr %stage)
  call void @forget(ptr %stage)
  ret void
}}

define internal i64 @threads(ptr %api, ptr %context) nounwind {{
entry:
  %found = alloca i64
  store i64 1, ptr %found
  %given = alloca [4 x i64]
  store i64 32, ptr %given
  %w1 = getelementptr i64, ptr %given, i64 1
  store i64 0, ptr %w1
  %w2 = getelementptr i64, ptr %given, i64 2
  store ptr %context, ptr %w2
  %w3 = getelementptr i64, ptr %given, i64 3
  store ptr %found, ptr %w3
  %ask.at = getelementptr i64, ptr %api, i64 18
  %ask = load ptr, ptr %ask.at
  %error = call ptr %ask(ptr %given)
  %well = call i1 @well(ptr %api, ptr %error)
  %count = load i64, ptr %found
  %used = select i1 %well, i64 %count, i64 1
  ret i64 %used
}}

define internal i1 @schedule(ptr %api, ptr %context, ptr %stage) nounwind {{
entry:
  %given = alloca [5 x i64]
  store i64 40, ptr %given
  %w1 = getelementptr i64, ptr %given, i64 1
  store i64 0, ptr %w1
  %w2 = getelementptr i64, ptr %given, i64 2
  store ptr %context, ptr %w2
  %w3 = getelementptr i64, ptr %given, i64 3
  store ptr @task, ptr %w3
  %w4 = getelementptr i64, ptr %given, i64 4
  store ptr %stage, ptr %w4
  %put.at = getelementptr i64, ptr %api, i64 17
  %put = load ptr, ptr %put.at
  %error = call ptr %put(ptr %given)
  %well = call i1 @well(ptr %api, ptr %error)
  ret i1 %well
}}

define internal i1 @well(ptr %api, ptr %error) nounwind {{
entry:
  %well = icmp eq ptr %error, null
  br i1 %well, label %end, label %destroy
destroy:
  %given = alloca [3 x i64]
  store i64 24, ptr %given
  %w1 = getelementptr i64, ptr %given, i64 1
  store i64 0, ptr %w1
  %w2 = getelementptr i64, ptr %given, i64 2
  store ptr %error, ptr %w2
  %function.at = getelementptr i64, ptr %api, i64 8
  %function = load ptr, ptr %function.at
  call void %function(ptr %given)
  br label %end
end:
  ret i1 %well
}}

define internal void @stage(
  ptr %api, ptr %context, ptr %function, i64 %shares, ptr %tables, ptr %cuts, i64 %total
) nounwind {{
entry:
  %alone = icmp eq i64 %shares, 1
  br i1 %alone, label %here, label %ask
ask:
  %threads = call i64 @threads(ptr %api, ptr %context)
  %one = icmp slt i64 %threads, 2
  br i1 %one, label %here, label %shared
here:
  %k = phi i64 [ 0, %entry ], [ 0, %ask ], [ %next, %here ]
  call void @share(ptr %function, ptr %tables, ptr %cuts, i64 %total, i64 %k)
  %next = add i64 %k, 1
  %more = icmp slt i64 %next, %shares
  br i1 %more, label %here, label %end
shared:
  %stage = call ptr inttoptr (i64 {malloc} to ptr)(i64 64)
  store i64 0, ptr %stage
  %done.at = getelementptr i64, ptr %stage, i64 1
  store i64 0, ptr %done.at
  %known.at = getelementptr i64, ptr %stage, i64 2
  %shares.at = getelementptr i64, ptr %stage, i64 3
  store i64 %shares, ptr %shares.at
  %function.at = getelementptr i64, ptr %stage, i64 4
  store ptr %function, ptr %function.at
  %total.at = getelementptr i64, ptr %stage, i64 5
  store i64 %total, ptr %total.at
  %tables.at = getelementptr i64, ptr %stage, i64 6
  store ptr %tables, ptr %tables.at
  %cuts.at = getelementptr i64, ptr %stage, i64 7
  store ptr %cuts, ptr %cuts.at
  %least = call i64 @llvm.smin.i64(i64 %threads, i64 %shares)
  store i64 %least, ptr %known.at
  %tasks = sub i64 %least, 1
  br label %put
put:
  %i = phi i64 [ 0, %shared ], [ %following, %refused ], [ %following, %taken ]
  %all = icmp sge i64 %i, %tasks
  br i1 %all, label %run, label %another
another:
  %following = add i64 %i, 1
  %well = call i1 @schedule(ptr %api, ptr %context, ptr %stage)
  br i1 %well, label %taken, label %refused
taken:
  br label %put
refused:
  %known = atomicrmw sub ptr %known.at, i64 1 acq_rel
  br label %put
run:
  call void @work(ptr %stage)
  br label %wait
wait:
  %done = load atomic i64, ptr %done.at acquire, align 8
  %finished = icmp eq i64 %done, %shares
  br i1 %finished, label %leave, label %again
again:
  %yielded = call i32 inttoptr (i64 {sched_yield} to ptr)()
  br label %wait
leave:
  call void @forget(ptr %stage)
  br label %end
end:
  ret void
}}

define ptr @execute(ptr %frame, ptr %plan) nounwind {{
entry:
  %extension.at = getelementptr i64, ptr %frame, i64 1
  %extension = load ptr, ptr %extension.at
  %plain = icmp eq ptr %extension, null
  br i1 %plain, label %run, label %extended
extended:
  %type.at = getelementptr i64, ptr %extension, i64 1
  %type = load i32, ptr %type.at
  %asked = icmp eq i32 %type, 1
  br i1 %asked, label %metadata, label %run
metadata:
  %answer.at = getelementptr i64, ptr %extension, i64 3
  %answer = load ptr, ptr %answer.at
  %major.at = getelementptr i32, ptr %answer, i64 6
  store i32 0, ptr %major.at
  %minor.at = getelementptr i32, ptr %answer, i64 7
  store i32 {minor}, ptr %minor.at
  %traits.at = getelementptr i32, ptr %answer, i64 8
  store i32 0, ptr %traits.at
  %state.at = getelementptr i64, ptr %answer, i64 5
  store i64 0, ptr %state.at
  ret ptr null
run:
  call void @stages(ptr %frame, ptr %plan)
  ret ptr null
}}
"""


def _stages() -> Code:
    """The words of a plan: operands, results, stages, the most entries that the tables of a stage have, and shares.

    Then of each stage: its function, shares, entries of each table, the total, where the shares start with the end of
    the last, and of each entry an array and a number of bytes from its start. Of the last array, which is scratch
    memory, the start is that of the next cache line.
    """
    code = Code()

    def word(pointer: str, at: Int, kind: str = "i64") -> str:
        return code.value(f"load {kind}, ptr {code.at('i64', pointer, at)}")

    def put(value: Int, pointer: str, at: Int) -> None:
        code.put(f"store i64 {value}, ptr {code.at('i64', pointer, at)}")

    operands, results, stages, entries, shares = (word("%plan", k) for k in range(5))
    count = code.add(operands, results)
    bases, words, tables = (code.value(f"alloca i64, i64 {n}") for n in (count, entries, shares))
    api, context = word("%frame", 2, "ptr"), word("%frame", 3, "ptr")
    for first, number, list_ in (
        (0, operands, word("%frame", 9, "ptr")),
        (operands, results, word("%frame", 14, "ptr")),
    ):

        def base(k: Int, _: Values, first: Int = first, list_: str = list_) -> None:
            put(word(word(list_, k, "ptr"), 3), bases, code.add(first, k))

        code.loop(0, number, 1, base)
    last = code.subtract(count, 1)
    put(code.value(f"and i64 {code.add(word(bases, last), LINE - 1)}, {-LINE}"), bases, last)

    def stage(_: Int, carried: Values) -> Values:
        (start,) = carried
        function, number, width, total = word(start, 0, "ptr"), *(word(start, k) for k in range(1, 4))
        cuts = code.at("i64", start, 4)
        listed = code.at("i64", cuts, code.add(number, 1))
        many = code.multiply(number, width)

        def entry(k: Int, _: Values) -> None:
            place = code.at("i64", listed, code.multiply(k, 2))
            put(code.add(word(bases, word(place, 0)), word(place, 1)), words, k)

        def table(k: Int, _: Values) -> None:
            place = code.at("i64", words, code.multiply(k, width))
            code.put(f"store ptr {place}, ptr {code.at('i64', tables, k)}")

        code.loop(0, many, 1, entry)
        code.loop(0, number, 1, table)
        given = f"ptr {api}, ptr {context}, ptr {function}, i64 {number}, ptr {tables}, ptr {cuts}, i64 {total}"
        code.put(f"call void @stage({given})")
        return [code.at("i64", listed, code.multiply(many, 2))]

    code.loop(0, stages, 1, stage, [code.at("i64", "%plan", 5)], "ptr")
    return code


@cache
def version() -> int | None:
    """Of the interface of this jaxlib, the minor number; None where it is one that is not known here."""
    import jax.ffi

    try:
        text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [re.search(rf"#define XLA_FFI_API_{name} (\d+)", text) for name in ("MAJOR", "MINOR")]
    major, minor = (None if match is None else int(match[1]) for match in found)
    return minor if major == 0 and minor in VERSIONS else None


@cache
def _execute(target: Target) -> Callable[..., Any] | None:
    """What handlers call; None where there are no threads as on POSIX systems."""
    try:
        library = ctypes.CDLL(None)
        names = {name: address(getattr(library, name)) for name in ("malloc", "free", "sched_yield")}
    except (TypeError, AttributeError, OSError):
        return None
    code = _stages()
    code.declarations.add("declare i64 @llvm.smin.i64(i64, i64)")
    text = code.function("stages", "ptr %frame, ptr %plan", "nounwind") + _POOL.format(minor=version(), **names)
    return load(text, "execute", target, [ctypes.c_void_p] * 2)


def supported(target: Target) -> bool:
    """Whether there can be handlers."""
    return version() is not None and _execute(target) is not None


def handler(plan: list[int], target: Target) -> Callable[..., Any]:
    """A handler for XLA that runs a plan, which lives as long as the handler."""
    execute = _execute(target)
    words = ", ".join(f"i64 {word}" for word in plan)
    text = f"""
@plan = private constant [{len(plan)} x i64] [{words}]
define ptr @handler(ptr %frame) nounwind {{
  %error = call ptr inttoptr (i64 {address(execute)} to ptr)(ptr %frame, ptr @plan)
  ret ptr %error
}}
"""
    return load(text, "handler", target, [ctypes.c_void_p])


@cache
def fill(target: Target) -> Callable[..., None]:
    """Clear bytes ``first`` to ``last`` of an array."""
    code = Code()
    start = code.at("i8", code.value("load ptr, ptr %table"), "%first")
    size = code.subtract("%last", "%first")
    code.call("void", "llvm.memset.p0.i64", ("ptr", start), ("i8", 0), ("i64", size), ("i1", "false"))
    text = code.function("fill", "ptr %table, i64 %first, i64 %last, i64 %total", "nounwind")
    return load(text, "fill", target, [ctypes.c_void_p, *[ctypes.c_int64] * 3])


@lru_cache(maxsize=64)
def add(parts: int, element: str, target: Target) -> Callable[..., None]:
    """The sum of numbers ``first`` to ``last`` of arrays; the table: the sum, which may be one of them, and these."""
    code, lanes = Code(), target.width // BYTES[element]
    to, *given = (code.value(f"load ptr, ptr {code.at('ptr', '%table', k)}") for k in range(1 + parts))

    def write(kind: str) -> Callable[[Int, Values], None]:
        def sums(k: Int, _: Values) -> None:
            total = ""
            for pointer in given:
                part = code.value(f"load {kind}, ptr {code.at(element, pointer, k)}, align {BYTES[element]}")
                total = code.value(f"fadd {kind} {total}, {part}") if total else part
            code.put(f"store {kind} {total}, ptr {code.at(element, to, k)}, align {BYTES[element]}")

        return sums

    whole = code.add("%first", code.whole(code.subtract("%last", "%first"), lanes))
    code.loop("%first", whole, lanes, write(f"<{lanes} x {element}>"))
    code.loop(whole, "%last", 1, write(element))
    text = code.function("add", "ptr %table, i64 %first, i64 %last, i64 %total", target.attributes)
    return load(text, "add", target, [ctypes.c_void_p, *[ctypes.c_int64] * 3])
