"""The handler that XLA calls to run passes: one for all chains, batch sizes and directions.

XLA has a typed foreign function interface (``c_api.h`` among the headers of jaxlib). A call names the handler and
carries attributes. Ours has one, a text that describes the passes. XLA hands each call to the handler in two stages:

- *Instantiate*, once for each call in an executable, when it is compiled or read from a file. Python makes the plan of
  the call from its attribute, and XLA keeps it until the executable is gone.
- *Execute*, for each run. Machine code compares the arrays with the plan and then runs the plan's stages one after the
  other, each shared among XLA's own threads. It holds no lock of Python's.

A plan is a table of 64-bit words: how many operands, results and stages it has, the most entries of the tables of a
stage, the most shares of one, and of each array its type and number of elements. Then come the stages: the function,
its shares, the entries of a table, the total, where the shares start with the end of the last, and of each entry an
array and bytes from its start. The last array is scratch memory, which is used from its first whole cache line on.

The shares of a stage are claimed one at a time, by the thread that XLA called and by tasks in its pool. A task may
start after all shares are done, if the pool is busy. It then finds nothing to claim. The last task of a stage frees its
record. So no thread waits for a task to start.
"""

from __future__ import annotations

import ctypes
import platform
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from structlin.execution.compiled._ir import Code, Int, Values
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._target import CompileError, address, host, load

TARGET = "structlin_chain"
TYPES = {"uint8": 6, "float32": 11, "float64": 12, "bfloat16": 16}  # XLA_FFI_DataType
# Minor versions of the interface whose structs are read here, of version 0; and what the arguments of its functions
# for states have between the context and the type: since version 3 the stage that made the state, which is the first.
VERSIONS: dict[int, tuple[int, ...]] = {2: (), 3: (0,)}
# Places of functions in XLA_FFI_Api, in words.
_ERROR_CREATE, _ERROR_DESTROY, _TYPE_REGISTER, _STATE_SET, _STATE_GET, _SCHEDULE = 6, 8, 11, 13, 14, 17
_FAILED = 9  # XLA_FFI_Error_Code_FAILED_PRECONDITION
_INSTANTIATE = 0  # XLA_FFI_ExecutionStage
_METADATA = 1  # XLA_FFI_Extension_Type
_STRING = 4  # XLA_FFI_AttrType

Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
# Makes a plan of a text: its words, and the functions that they have addresses of.
Prepare = Callable[[str], tuple[Sequence[int], object]]

_LOCK = threading.Lock()


def _kept(found: Any) -> Any:
    """Return the same object, which is never freed, because XLA may call it after Python has ended."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(found))
    return found


# Of calls in executables: a state that is known to XLA, [whether XLA is done with it, the plan], and what it refers to.
STATES: dict[int, tuple[Any, Any, object]] = _kept({})
_TYPE = _kept(ctypes.c_int64(0))  # of the states; XLA says which number it is
_MISMATCH = _kept(
    b"structlin: the arrays of a call are not those that its passes were compiled for. The program has to be compiled "
    b"again."
)


@cache
def version() -> int | None:
    """Return the minor version of the interface of this jaxlib; None where it is one that is not known here."""
    import jax.ffi

    try:
        text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [re.search(rf"#define XLA_FFI_API_{name} (\d+)", text) for name in ("MAJOR", "MINOR")]
    major, minor = (None if match is None else int(match[1]) for match in found)
    return minor if major == 0 and minor in VERSIONS else None


# -- in Python: plans of calls ----------------------------------------------------------------------------------------


def _words(place: int, count: int) -> Any:
    return (ctypes.c_int64 * count).from_address(place)


def _api(api: int, function: int, *words: int) -> int | None:
    """Call a function of XLA's interface; what it returns is an error or None."""
    given = (ctypes.c_int64 * (2 + len(words)))(8 * (2 + len(words)), 0, *words)
    return Handler(_words(api, function + 1)[function])(ctypes.addressof(given))


def _handle(frame: int) -> int | None:
    """All but runs: what XLA asks of a handler before it takes it, and a state for each call of an executable."""
    _, extension, api, context, stage = _words(frame, 5)
    if extension and ctypes.c_int32.from_address(extension + 8).value == _METADATA:
        answer = _words(extension, 4)[3]
        numbers = (ctypes.c_int32 * 3).from_address(answer + 24)
        numbers[:] = [0, version() or 0, 0]  # of the interface, and no traits
        _words(answer, 6)[5] = 0  # XLA_FFI_UNKNOWN_TYPE_ID
        return None
    try:
        reason = unsupported()
        if reason is not None:
            raise CompileError(f"a program calls compiled passes, which are not available in this process: {reason}")
        if ctypes.c_int32(stage).value != _INSTANTIATE:
            raise CompileError("XLA called a handler at an unknown stage")
        words, functions = _PREPARE[0](_attribute(frame))
        return _keep_state(api, context, (ctypes.c_int64 * len(words))(*words), functions)
    except BaseException as error:  # nothing can be raised through XLA
        message = ctypes.create_string_buffer(f"structlin: {error}.".encode())
        return _api(api, _ERROR_CREATE, ctypes.addressof(message), _FAILED)


_PYTHON = _kept(Handler(_handle))
_PREPARE: list[Prepare] = []
_REFUSED: list[str] = []


def _attribute(frame: int) -> str:
    count, kinds, _, places = _words(frame, 21)[17:]
    if count != 1 or ctypes.c_int32.from_address(kinds).value != _STRING:
        raise CompileError("a call has other attributes than this version of structlin writes")
    start, size = _words(_words(places, 1)[0], 2)
    return ctypes.string_at(start, size).decode()


def _keep_state(api: int, context: int, words: Any, functions: object) -> int | None:
    state = (ctypes.c_int64 * 2)(0, ctypes.addressof(words))
    place = ctypes.addressof(state)
    between = VERSIONS[version() or 0]
    with _LOCK:
        for done in [key for key, (old, *_) in STATES.items() if old[0]]:
            del STATES[done]
        if not _TYPE.value:
            name, info = ctypes.create_string_buffer(b"structlin_plan"), _kept((ctypes.c_int64 * 3)(24, 0, 0))
            info[2] = address(_native()[1])
            given = (ctypes.addressof(name), len(name.value), ctypes.addressof(_TYPE), ctypes.addressof(info))
            error = _api(api, _TYPE_REGISTER, *given)
            if error is not None:
                return error
        STATES[place] = state, words, functions
        error = _api(api, _STATE_SET, context, *between, ctypes.addressof(_TYPE), place)
        if error is not None:
            del STATES[place]
        return error


def register(prepare: Prepare) -> None:
    """Register the handler with XLA; without a compiler, it returns an error that states the reason."""
    import jax.ffi

    if version() is None:
        return  # XLA's own error names the handler
    _PREPARE[:] = [prepare]
    run = _PYTHON if unsupported() is not None else _native()[0]
    stages = {"instantiate": _PYTHON, "execute": run}
    capsules = {stage: jax.ffi.pycapsule(address(made)) for stage, made in stages.items()}
    try:
        jax.ffi.register_ffi_target(TARGET, capsules, platform="cpu")
    except Exception as error:  # a user's product must not fail for it
        _REFUSED.append(f"XLA did not take the handler: {error}")
        unsupported.cache_clear()


@cache
def unsupported() -> str | None:
    """Return why there is no handler that runs plans; None if there is one."""
    if host() is None:
        return "llvmlite is missing or too old, or the processor is not one that is known"
    if platform.machine().lower() not in ("x86_64", "amd64"):  # threads share records in the order of stores of x86
        return "the processor is not x86-64"
    if version() is None:
        known = " or ".join(f"0.{minor}" for minor in VERSIONS)
        return f"jaxlib has no header of its foreign function interface, or not version {known} of it"
    try:
        _native()
    except CompileError as error:
        return str(error)
    return next(iter(_REFUSED), None)


# -- in machine code: runs ---------------------------------------------------------------------------------------------


@cache
def _native() -> tuple[Any, Any]:
    """Return what XLA calls to run a plan, and when it is done with a state."""
    target = host()
    assert target is not None
    try:
        library = ctypes.CDLL(None)
        names = {name: address(getattr(library, name)) for name in ("malloc", "free", "sched_yield")}
    except (TypeError, AttributeError, OSError) as error:
        raise CompileError("the system has no threads as POSIX has them") from error
    pointer = [ctypes.c_void_p]
    deleter = "define void @done(ptr %state) {\n  store atomic i64 1, ptr %state release, align 8\n  ret void\n}"
    execute = "\n".join([*_shared(names), _execute()])
    # They contain addresses.
    functions = load(execute, "execute", target, pointer, False), load(deleter, "done", target, pointer, False)
    return _kept(functions[0]), _kept(functions[1])


class _Writer(Code):
    """Words of tables, labels, and calls of XLA's interface."""

    def word(self, table: str, at: Int, kind: str = "i64") -> str:
        return self.value(f"load {kind}, ptr {self.at('i64', table, at)}")

    def write(self, table: str, at: Int, value: Int, kind: str = "i64") -> None:
        self.put(f"store {kind} {value}, ptr {self.at('i64', table, at)}")

    def label(self, name: str) -> None:
        self._open(name)

    def branch(self, test: str, yes: str, no: str) -> None:
        """Go to one of two labels, of which the first follows."""
        self.put(f"br i1 {self.value(f'icmp {test}')}, label %{yes}, label %{no}")
        self.label(yes)

    def api(self, function: int, *operands: str) -> tuple[str, str]:
        """Return a function of ``%api``, and the table of what it is given."""
        size = 2 + len(operands)
        given = self.value(f"alloca [{size} x i64]")
        for at, operand in enumerate((f"i64 {8 * size}", "i64 0", *operands)):
            self.put(f"store {operand}, ptr {self.at('i64', given, at)}")
        return self.word("%api", function, "ptr"), given

    def call_api(self, function: str, given: str) -> str:
        """Return an error or null."""
        return self.value(f"call ptr {function}(ptr {given})")

    def define(self, declaration: str, end: str = "ret void") -> str:
        return "\n".join([f"define {declaration} nounwind {{", "entry:", *self.lines, f"  {end}", "}", ""])


def _to(place: int) -> str:
    return f"inttoptr (i64 {place} to ptr)"


# Words of the record of a stage: the next share, shares that are done, threads that know of it; then what is constant.
_DONE, _KNOWN, _SHARES, _FUNCTION, _TOTAL, _TABLES, _CUTS, _RECORD = range(1, 9)


def _shared(names: dict[str, int]) -> list[str]:
    """Functions that run the shares of a stage: in a thread, in a task of XLA's pool, and in all threads."""
    work = _Writer()  # while there are shares to claim
    done, shares = work.at("i64", "%stage", _DONE), work.word("%stage", _SHARES)
    work.put("br label %claim")
    work.label("claim")
    k = work.value("atomicrmw add ptr %stage, i64 1 acq_rel")
    work.branch(f"slt i64 {k}, {shares}", "run", "end")
    function, tables, cuts = (work.word("%stage", at, "ptr") for at in (_FUNCTION, _TABLES, _CUTS))
    ends = f"i64 {work.word(cuts, k)}, i64 {work.word(cuts, work.add(k, 1))}, i64 {work.word('%stage', _TOTAL)}"
    work.put(f"call void {function}(ptr {work.word(tables, k, 'ptr')}, {ends})")
    work.put(f"atomicrmw add ptr {done}, i64 1 acq_rel")
    work.put("br label %claim")
    work.label("end")

    forget = _Writer()  # the last one frees the record
    known = forget.value(f"atomicrmw sub ptr {forget.at('i64', '%stage', _KNOWN)}, i64 1 acq_rel")
    forget.branch(f"eq i64 {known}, 1", "free", "end")
    forget.put(f"call void {_to(names['free'])}(ptr %stage)")
    forget.put("br label %end")
    forget.label("end")

    task = _Writer()
    task.put("call void @work(ptr %stage)")
    task.put("call void @forget(ptr %stage)")

    well = _Writer()  # whether there was no error
    well.branch("ne ptr %error, null", "destroy", "end")
    destroy, given = well.api(_ERROR_DESTROY, "ptr %error")
    well.put(f"call void {destroy}(ptr {given})")
    well.put("br label %end")
    well.label("end")

    run = _Writer()
    record = run.value(f"call ptr {_to(names['malloc'])}(i64 {8 * _RECORD})")
    run.write(record, 0, 0)
    run.write(record, _DONE, 0)
    for at, (kind, name) in enumerate(_STAGE, _SHARES):
        run.write(record, at, name, kind)
    run.write(record, _KNOWN, "%shares")
    schedule = run.api(_SCHEDULE, "ptr %context", "ptr @task", f"ptr {record}")

    def put(_: Int, __: Values) -> None:
        taken = run.value(f"call i1 @well(ptr %api, ptr {run.call_api(*schedule)})")
        none = run.value(f"select i1 {taken}, i64 0, i64 1")
        run.put(f"atomicrmw sub ptr {run.at('i64', record, _KNOWN)}, i64 {none} acq_rel")

    run.loop(1, "%shares", 1, put)
    run.put(f"call void @work(ptr {record})")
    run.put("br label %wait")
    run.label("wait")
    finished = run.value(f"load atomic i64, ptr {run.at('i64', record, _DONE)} acquire, align 8")
    run.branch(f"slt i64 {finished}, %shares", "again", "end")
    run.put(f"call i32 {_to(names['sched_yield'])}()")
    run.put("br label %wait")
    run.label("end")
    run.put(f"call void @forget(ptr {record})")
    return [
        work.define("internal void @work(ptr %stage)"),
        forget.define("internal void @forget(ptr %stage)"),
        task.define("internal void @task(ptr %stage)"),
        well.define("internal i1 @well(ptr %api, ptr %error)", f"ret i1 {well.value('icmp eq ptr %error, null')}"),
        run.define(f"internal void @run(ptr %api, ptr %context, {', '.join(f'{k} {n}' for k, n in _STAGE)})"),
    ]


_STAGE = (("i64", "%shares"), ("ptr", "%function"), ("i64", "%total"), ("ptr", "%tables"), ("ptr", "%cuts"))


def _execute() -> str:
    """Compare the arrays of a frame with the plan of the call, and run the stages."""
    code = _Writer()
    code.branch(f"ne ptr {code.word('%frame', 1, 'ptr')}, null", "ask", "run")
    code.put(f"ret ptr {code.value(f'call ptr {_to(address(_PYTHON))}(ptr %frame)')}")
    code.label("run")
    for name, at in (("api", 2), ("context", 3)):
        code.put(f"%{name} = load ptr, ptr {code.at('i64', '%frame', at)}")
    between = [f"i64 {word}" for word in VERSIONS[version() or 0]]
    kind = f"ptr {_to(ctypes.addressof(_TYPE))}"
    function, given = code.api(_STATE_GET, "ptr %context", *between, kind, "ptr null")
    error = code.call_api(function, given)
    code.branch(f"ne ptr {error}, null", "failed", "found")
    code.put(f"ret ptr {error}")
    code.label("found")
    plan = code.word(code.word(given, 4 + len(between), "ptr"), 1, "ptr")
    operands, results, stages, entries, shares = (code.word(plan, k) for k in range(5))
    there = [code.word("%frame", at) for at in (7, 12)]
    differ = [code.value(f"xor i64 {a}, {b}") for a, b in zip(there, (operands, results), strict=True)]
    code.branch(f"eq i64 {code.value(f'or i64 {differ[0]}, {differ[1]}')}, 0", "counted", "mismatch")
    count = code.add(operands, results)
    bases, words, tables = (code.value(f"alloca i64, i64 {n}") for n in (count, entries, shares))
    differ = ["0"]
    for first, number, at in ((0, operands, 9), (operands, results, 14)):
        list_ = code.word("%frame", at, "ptr")

        def array(k: Int, carried: Values, first: Int = first, list_: str = list_) -> Values:
            buffer, place = code.word(list_, k, "ptr"), code.add(first, k)
            code.write(bases, place, code.word(buffer, 3))
            dims, wanted = code.word(buffer, 5, "ptr"), code.add(code.multiply(place, 2), 5)
            kind = code.value(f"zext i32 {code.word(buffer, 2, 'i32')} to i64")
            (numel,) = code.loop(
                0, code.word(buffer, 4), 1, lambda d, n: [str(code.multiply(n[0], code.word(dims, d)))], ["1"], "i64"
            )
            for shift, found in enumerate((kind, numel)):
                other = code.value(f"xor i64 {found}, {code.word(plan, code.add(wanted, shift))}")
                carried = [code.value(f"or i64 {carried[0]}, {other}")]
            return carried

        differ = code.loop(0, number, 1, array, differ, "i64")
    code.branch(f"eq i64 {differ[0]}, 0", "same", "mismatch")
    last = code.subtract(count, 1)
    code.write(bases, last, code.value(f"and i64 {code.add(code.word(bases, last), LINE - 1)}, {-LINE}"))

    def stage(_: Int, carried: Values) -> Values:
        (start,) = carried
        function, number, width, total = code.word(start, 0, "ptr"), *(code.word(start, k) for k in range(1, 4))
        cuts = code.at("i64", start, 4)
        listed = code.at("i64", cuts, code.add(number, 1))
        many = code.multiply(number, width)

        def entry(k: Int, _: Values) -> None:
            place = code.at("i64", listed, code.multiply(k, 2))
            code.write(words, k, code.add(code.word(bases, code.word(place, 0)), code.word(place, 1)))

        def table(k: Int, _: Values) -> None:
            code.write(tables, k, code.at("i64", words, code.multiply(k, width)), "ptr")

        code.loop(0, many, 1, entry)
        code.loop(0, number, 1, table)
        names = zip(_STAGE, (number, function, total, tables, cuts), strict=True)
        code.put(f"call void @run(ptr %api, ptr %context, {', '.join(f'{kind} {n}' for (kind, _), n in names)})")
        return [code.at("i64", listed, code.multiply(many, 2))]

    code.loop(0, stages, 1, stage, [code.at("i64", plan, code.add(code.multiply(count, 2), 5))], "ptr")
    code.put("ret ptr null")
    code.label("mismatch")
    message = ctypes.cast(_MISMATCH, ctypes.c_void_p).value or 0
    error = code.call_api(*code.api(_ERROR_CREATE, f"ptr {_to(message)}", f"i64 {_FAILED}"))
    return code.define("ptr @execute(ptr %frame)", f"ret ptr {error}")
