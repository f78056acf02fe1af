"""Run programs that a model wrote, without trusting them (ReFT's program chains of thought).

A program is a text that defines solution(). It runs whole, in one fresh namespace; then solution() is called, and the
number that it returns comes back as a short text.

    trainer ==program==> server, one a core: a clean Python with the usual modules loaded; no CUDA, no data, no gold
                           |  fork
                           v
                         child: one program, then gone  --"18.5", at most 255 bytes on a private pipe--> server

What a program may try, and what stands against it:

    read answers or data    The gold never leaves the trainer; a program goes past the server straight into its child,
                            and the server wipes each answer. No environment, no open file but /dev/null and the pipe.
    files, network, other   An allow-list of system calls (seccomp): a child can compute, take memory, sleep, use the
    processes, threads      files it holds, and end. It cannot open, connect, fork, start threads, signal or trace.
    run or grow for ever    Limits on CPU time, wall time and memory. The server kills at the deadline and reaps.
    forge a reward          The trainer unpickles and evaluates nothing: it takes up to 255 bytes that the grammar of
                            numbers fits. A program that writes to the pipe itself only names its own answer.
    harm the next program   Each starts as a fork of the same memory, random state and hash seed included.

Not guarded: holes in the kernel, in the little of it that a child can call; time (a program near a limit may end either
way, one that asks for the time gets it). With unsafe=True on a system without seccomp (macOS) the limits are
all there is: a program can read and delete your files.
"""

import atexit
import contextlib
import ctypes
import errno
import gc
import importlib.util
import math
import os
import platform
import random
import re
import signal
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import NamedTuple

from reward import InputError, read_number, score

WALL_SECONDS = 3
CPU_SECONDS = 2
MEMORY_BYTES = 1 << 30
MAX_PROGRAM = 1 << 16  # bytes; a longer program is an error
MAX_ANSWER = 255  # bytes
START_SECONDS = 120  # a server loads its modules
GRACE_SECONDS = 5  # a server that is silent for longer than WALL_SECONDS and this is killed

STATUSES = ("ok", "error", "timeout", "killed")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Outcome(NamedTuple):
    """How a program ended."""

    status: str  # "ok"; "error" (it raised, left, or returned no number); "timeout"; "killed" (a crash)
    answer: str | None  # the text of a number if status is "ok"


# ---- in the trainer ----


def execute(programs: list[str], unsafe: bool = False) -> list[Outcome]:
    """Run programs, one a core at a time. InputError where nothing holds them back, unless unsafe: then the limits do."""
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(lambda program: run_program(program, unsafe), programs))


def run_programs(programs: list[str], unsafe: bool = False) -> list[str | None]:
    """The number that each program returns, as text; None where there is none."""
    return [outcome.answer for outcome in execute(programs, unsafe)]


def score_programs(programs: list[str], golds: list[str], task: str, unsafe: bool = False) -> list[float]:
    """The reward of each program: 1.0 right, 0.1 another number, 0.0 no number."""
    pairs = zip(run_programs(programs, unsafe), golds, strict=True)
    return [0.0 if answer is None else score_result(answer, gold, task) for answer, gold in pairs]


def score_result(answer: str, gold: str, task: str, options: str | None = None) -> float:
    """reward.score, but a result that is not whole may miss gold by 1e-4 of it: ReFT's 8.99955 for 9, of 0.6667 for 2/3."""
    number, right = read_number(answer), read_number(gold)
    if right and number.value.denominator > 1 and abs(number.value - right.value) <= abs(right.value) / 10**4:
        return 1.0
    return score(f"#### {answer}", gold, task, options)


class Server(NamedTuple):
    """A running server. refusal: why programs are not held back in it, "" if they are."""

    process: subprocess.Popen
    refusal: str


IDLE: dict[tuple[int, str], list[Server]] = {}  # by owner (a fork of the trainer owns none of these) and kind


def run_program(program: str, unsafe: bool) -> Outcome:
    """Send a program to an idle server or a new one, wait, and check the reply."""
    text = program.encode("utf-8", "surrogatepass")
    if len(text) > MAX_PROGRAM:
        return Outcome("error", None)
    kind = "symbolic" if re.search("sympy|numpy|mpmath", program) else "plain"  # symbolic: slower to start and to fork
    idle = IDLE.setdefault((os.getpid(), kind), [])
    server = None
    with contextlib.suppress(IndexError):
        while (server := idle.pop()).process.poll() is not None:
            stop(server)
            server = None
    server = server or start_server(kind)
    if server.refusal and not unsafe:
        idle.append(server)
        way_out = "run on Linux with seccomp, or with --unsafe-exec let programs do to your files what they like"
        raise InputError(f"model-written programs cannot be held back here: {server.refusal}; {way_out}")
    reply = ask(server, struct.pack("<I", len(text)) + text, WALL_SECONDS + GRACE_SECONDS)
    if reply:
        idle.append(server)
    else:
        stop(server)
    status, answer = reply or ("killed", "")
    if status != "ok":
        return Outcome(status, None)
    is_number = re.fullmatch(r"[-+.0-9e/]{1,255}", answer) and read_number(answer)  # no words, units or second line
    return Outcome("ok", answer) if is_number else Outcome("error", None)


def ask(server: Server, request: bytes, seconds: float) -> tuple[str, str] | None:
    """Send a request and read the reply: a status and a text. None if the server ends, or is silent for too long."""
    timer = threading.Timer(seconds, server.process.kill)
    timer.start()
    try:
        server.process.stdin.write(request)
        server.process.stdin.flush()
        reply = server.process.stdout.read(len(REPLY))
    except OSError:
        reply = b""
    finally:
        timer.cancel()
    return (STATUSES[reply[0]], reply[1:].rstrip(b"\0").decode("latin-1")) if len(reply) == len(REPLY) else None


def start_server(kind: str) -> Server:
    """Start a server and wait until it is ready."""
    specs = [importlib.util.find_spec(name) for name in ("numpy", "mpmath", "sympy")]
    paths = sorted({str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin})
    # Not python -I: it ignores the hash seed, which fixes the order of a set of strings.
    environment = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")} | {"PYTHONHASHSEED": "0"}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-sS", "-Wignore", str(Path(__file__).resolve()), kind, seccomp_filter().hex(), *paths],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C in a terminal is for the trainer
    )
    ready = ask(Server(process, ""), b"", START_SECONDS)
    if ready is None:
        stop(Server(process, ""))
        raise InputError(f"no server for programs: {sys.executable} ended with {process.returncode} at its start")
    return Server(process, ready[1])


def stop(server: Server) -> None:
    """Kill a server; the kernel kills its child with it."""
    server.process.kill()
    with contextlib.suppress(OSError), server.process:
        pass  # closes its pipes and reaps it


@atexit.register
def stop_idle() -> None:
    """At exit: stop the servers of this process. One that is at work ends by itself, as its pipe closes."""
    for (owner, _), servers in IDLE.items():
        while owner == os.getpid() and servers:
            stop(servers.pop())


# ---- the limits ----

SYSCALLS = (  # all that a program may call: name, number on x86_64, number on aarch64
    "read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214,"
    "rt_sigreturn 15 139, mremap 25 216, exit 60 93, futex 202 98, restart_syscall 219 128, clock_gettime 228 113,"
    "clock_nanosleep 230 115, exit_group 231 94"
)
COLUMNS = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # machine: column of SYSCALLS, AUDIT_ARCH
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF instructions
KILL, FAIL, ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38


def seccomp_filter() -> bytes:
    """The allow-list as a BPF program: any other call fails with EPERM. Empty where there is none for the machine."""
    if sys.platform != "linux" or platform.machine() not in COLUMNS or sys.maxsize < 2**32:
        return b""
    column, arch = COLUMNS[platform.machine()]
    allowed = [int(entry.split()[column]) for entry in SYSCALLS.split(",")]
    rows = [  # instruction, rows to skip if true and if false, operand
        # in another mode of the machine, or with x32's bit, a number means another call
        *((LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL)),
        *((LOAD, 0, 0, 0), (IF_AT_LEAST, 0, 1, 1 << 30), (RETURN, 0, 0, KILL)),
        *((IF_EQUAL, len(allowed) - i, 0, number) for i, number in enumerate(allowed)),
        *((RETURN, 0, 0, FAIL), (RETURN, 0, 0, ALLOW)),
    ]
    return b"".join(struct.pack("=HBBI", *row) for row in rows)


def prctl(option: int, *arguments: int) -> None:
    """Linux's prctl(2)."""
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0)[:4]]
    if ctypes.CDLL(None, use_errno=True).prctl(option, *words):
        raise OSError(ctypes.get_errno(), "prctl")


def confine(seccomp: bytes) -> None:
    """Limit this process, for good."""
    import resource

    limits = {"CPU": CPU_SECONDS, "AS": MEMORY_BYTES, "STACK": 8 << 20, "NOFILE": 16, "NPROC": 0, "FSIZE": 0, "CORE": 0}
    for name, value in limits.items():
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(*(() if seccomp else (ValueError, OSError))):  # macOS refuses RLIMIT_AS
            resource.setrlimit(limit, (value, value))
    if seccomp:
        code = ctypes.create_string_buffer(seccomp)
        program = ctypes.create_string_buffer(struct.pack("@HP", len(seccomp) // 8, ctypes.addressof(code)))
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program))


# ---- in the server ----

PRELOAD = (  # what programs may import, for they cannot open files; the last two are for strptime and "\N{...}"
    "math cmath fractions decimal datetime itertools collections random re statistics functools operator string copy "
    "heapq bisect calendar time typing dataclasses enum numbers json textwrap _strptime unicodedata"
)
PRELOAD_SYMBOLIC = (
    "numpy numpy.fft numpy.linalg numpy.polynomial numpy.random sympy sympy.physics.units sympy.stats sympy.vector "
    "sympy.assumptions.handlers sympy.sets.handlers.issubset sympy.sets.handlers.functions"
)
WARM_UP = """
from sympy import *
x, y = symbols("x y")
solve(2**x - 8), solve([x * y - 6, x + y - 5]), solve(x**2 < 4), solveset(x**2 - 4, x, S.Reals), nsolve(cos(x) - x, 1)
integrate(x * exp(x)), integrate(x**2, (x, 0, 3)), Integral(sin(x) / x, (x, 1, 2)).evalf(), limit(sin(x) / x, x, 0)
summation(x, (x, 1, 10)), simplify(sin(x) ** 2 + cos(x) ** 2), sympify("2*x + 1"), lambdify(x, x**2)(3)
diophantine(2 * x + 3 * y - 5), satisfiable(Symbol("p") & Symbol("q"))
"""  # sympy puts off many imports until they are used
REPLY = bytearray(1 + MAX_ANSWER + 1)  # status and text; the last byte is there to show that an answer is too long


def serve(kind: str, seccomp: bytes, paths: list[str]) -> None:
    """Run the programs that come on stdin, each in a fork, and report each to stdout. Ends when the trainer does."""
    sys.path[:] = [*sys.path[1:], *paths]  # without the folder of this file
    if sys.platform == "linux":
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a program become children of its server
    preload(kind)
    os.environ.clear()  # not before: numpy reads how many threads it may start
    refusal = why_not(seccomp)
    os.write(1, (b"\0" + refusal.encode()).ljust(len(REPLY), b"\0")[: len(REPLY)])
    while len(header := read(0, 4)) == 4:
        run_forked(*struct.unpack("<I", header), b"" if refusal else seccomp)


def preload(kind: str) -> None:
    """Import what programs may import."""
    for name in (f"{PRELOAD} {PRELOAD_SYMBOLIC}" if kind == "symbolic" else PRELOAD).split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if "sympy" in sys.modules:
        exec(WARM_UP, {})
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    gc.collect()
    gc.freeze()  # the collector of a child would write to, and so copy, the memory that it shares with the server


def why_not(seccomp: bytes) -> str:
    """Why this system cannot hold programs back, "" if it can: a child tries it."""
    if not seccomp:
        return f"no system-call filter for {platform.system()} on {platform.machine()}"
    pid = os.fork()
    if pid == 0:
        code = errno.ENOSYS
        try:
            confine(seccomp)
            os.open(os.devnull, os.O_RDONLY)
        except OSError as error:
            code = error.errno
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "" if code == errno.EPERM else f"the kernel refuses the system-call filter ({os.strerror(abs(code))})"


def read(file: int, size: int) -> bytes:
    """The next size bytes, fewer only at the end of the file."""
    data = b""
    while len(data) < size and (more := os.read(file, size - len(data))):
        data += more
    return data


def run_forked(size: int, seccomp: bytes) -> None:
    """Run the program that is next on stdin in a child, and report."""
    inside, outside = os.pipe()
    os.set_blocking(outside, False)  # writing too much fails instead of waiting
    pid = os.fork()
    if pid == 0:
        run_child(size, outside, seccomp)
    os.close(outside)
    REPLY[0] = STATUSES.index(wait(pid))
    os.readv(inside, [memoryview(REPLY)[1:]])
    os.close(inside)
    os.write(1, REPLY)
    REPLY[:] = bytes(len(REPLY))  # the next child gets a copy of this memory


def wait(pid: int) -> str:
    """The status of a child, once it has ended, by itself or at the deadline, and all that descends from it is dead."""
    late = False

    def kill(*_: object) -> None:
        nonlocal late
        late = True
        os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    _, code, usage = os.wait4(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError, FileNotFoundError):  # the usual end: no child is left
        while os.waitpid(-1, os.WNOHANG):
            for orphan in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(orphan), signal.SIGKILL)
    if not os.WIFSIGNALED(code):
        return "error" if code else "ok"
    # what the kernel counts for the limit and what it reports differ on a busy virtual machine
    return "timeout" if late or usage.ru_utime + usage.ru_stime > CPU_SECONDS / 2 else "killed"


def run_child(size: int, outside: int, seccomp: bytes) -> None:
    """In the child: take the program, lock the doors, run it, write the answer, and end."""
    code = 1
    try:
        os.setsid()
        if sys.platform == "linux":
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        program = read(0, size).decode("utf-8", "surrogatepass")
        os.dup2(outside, 3)
        null = os.open(os.devnull, os.O_RDWR)
        for file in range(3):
            os.dup2(null, file)
        os.closerange(4, 1 << 16)
        random.seed(0)  # fork has seeded it anew
        confine(seccomp)
        namespace = {"__name__": "program"}
        exec(compile(program, "<program>", "exec"), namespace)
        os.write(3, result_text(namespace["solution"]()).encode("ascii"))
        code = 0
    finally:
        os._exit(code)


def result_text(value: object) -> str:
    """An int, float, Fraction, Decimal, numpy or sympy number as text, of up to MAX_ANSWER bytes. Raises on all else."""
    if isinstance(value, bool):
        raise TypeError("a truth value is no number")
    for kind in (int, float, Fraction, Decimal):
        if isinstance(value, kind):
            value = kind.__pos__(value)  # out of a subclass, past its own methods
    if isinstance(value, Integral):
        text = str(int(value))
    elif isinstance(value, Rational):
        text = f"{int(value.numerator)}/{int(value.denominator)}"
    else:
        if not isinstance(value, Decimal):
            if not isinstance(value, Real) and not (value.is_number and value.is_real):  # sympy: sqrt(2), pi / 2
                raise TypeError("no number")
            value = float(value)
        if not math.isfinite(value):
            raise ValueError("not finite")
        text = f"{value:.12g}"  # all digits but the dust of 0.1 + 0.2 = 0.30000000000000004
        if not math.isclose(float(text), value, rel_tol=1e-14):
            text = f"{value:.15g}"
        if abs(value) < 10**18 and value == int(value):
            text = f"{value:.0f}"
    if len(text) > MAX_ANSWER:
        raise ValueError("too long")
    return text


if __name__ == "__main__":
    serve(sys.argv[1], bytes.fromhex(sys.argv[2]), sys.argv[3:])
