"""Run programs that a model wrote, without trusting them (ReFT's program chains of thought).

A program is a text that defines solution(), alone or in the prose of a chat. It runs whole, in a
fresh module; then solution() is called, and the number that it returns comes back as a short text.

    trainer --program--> server, one a core: a clean Python with the usual modules loaded;
                           |          no CUDA, no data, no gold
                           |  fork
                           v
                         child: one program, then gone
                                --"18.5", at most 255 bytes on a private pipe--> server --> trainer

What a program may try, and what stands against it:

    read answers or data    The gold never leaves the trainer. A program goes past the server
                            straight into its child, and the server wipes each answer. A child has
                            no environment and no open file but /dev/null and its pipe.
    files, network, other   An allow-list of system calls (seccomp): a child can compute, take
    processes, threads      memory, sleep, use the files it holds, and end. It cannot open,
                            connect, fork, start threads, signal or trace.
    run or grow for ever    Limits on CPU time, wall time and memory. The server kills a child at
                            its deadline and reaps it.
    forge a reward          The trainer unpickles and evaluates nothing: it takes up to 255 bytes
                            that the grammar of numbers fits. A program that writes to the pipe
                            itself only names its own answer.
    harm the next program   Each starts as a fork of the same memory, random state and hash seed
                            included.

Not guarded: holes in the kernel, in the little of it that a child can call; and time (a program
near a limit may end either way, one that asks for the time gets it). With unsafe=True on a system
without seccomp (macOS) the limits are all there is: a program can read and delete your files.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import math
import os
import platform
import random
import re
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from numbers import Rational, Real
from pathlib import Path
from typing import NamedTuple

from reward import InputError, judge, read_number, reward_of

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
STATUSES = ("ok", "error", "timeout", "killed")


class Outcome(NamedTuple):
    """How a program ended.

    status: one of STATUSES. "error": it raised, exited, returned no number, or is no program;
    "timeout": it met a limit on time; "killed": it crashed, or its server did.
    answer: the text of a number if status is "ok", else None.
    """

    status: str
    answer: str | None


def execute(programs: list[str], unsafe: bool = False) -> list[Outcome]:
    """Run programs, one a core at a time; each may stand in the prose of a chat (program_text).

    InputError on a system without seccomp, unless unsafe: there only the limits hold them back.
    """
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(lambda text: run_program(text, unsafe), programs))


def run_programs(programs: list[str], unsafe: bool = False) -> list[str | None]:
    """The number that each program returns, as text; None where there is none."""
    return [outcome.answer for outcome in execute(programs, unsafe)]


def score_programs(
    programs: list[str], golds: list[str], task: str, unsafe: bool = False
) -> list[float]:
    """The reward of each program, eq. (3): 1.0 right, 0.1 another number, 0.0 no number."""
    return [
        reward_of(judge_result(answer, gold, task))
        for answer, gold in zip(run_programs(programs, unsafe), golds, strict=True)
    ]


def judge_result(answer: str | None, gold: str, task: str, options: str | None = None) -> str:
    """The outcome of a result, as reward.judge has it: "right", "wrong" or "no_answer".

    A result that is not whole may miss gold by 1e-4 of it: the programs of ReFT that are right
    return 8.99955 for 9, or 0.6667 for 2/3.
    """
    if answer is None:
        return "no_answer"
    result, right = read_number(answer), read_number(gold)
    if None not in (result, right) and result.denominator > 1:
        error = abs(result - right)
        if error <= abs(right) / 10**4:
            return "right"
    return judge(f"#### {answer}", gold, task, options)[0]


# ---- the program in a completion -----------------------------------------------------------------

# A block in a Markdown fence. It ends where the mark of the fence comes again: at the left edge of
# the block, or behind the last word of a line; without one, where the text ends.
FENCED = re.compile(
    r"""(?xms) (?<![`~]) (?P<fence>`{3,}+|~{3,}+) [ \t]* [\w.+#-]* [ \t\r]* \n
        (?:[ \t\r]*\n)*
        (?P<code> (?P<indent>[ \t]*) .*?)
        (?: ^ (?:(?P=indent))? (?P=fence) | (?<=\S) (?P=fence) [ \t\r]* $ | \Z )"""
)
# Where the prompt has opened the thought, a completion shows only its end. A text that starts with
# code has no thought: what looks like one stands in a docstring.
THOUGHT = re.compile(r"(?s)\A(?!\s*(?:def|import|from)\s)(?:.*</think>|\s*<think>.*)")
DEFINITION = re.compile(r"(?m)^[ \t]*def[ \t]+solution[ \t]*\(")


def program_text(text: str) -> str | None:
    """The program in a completion, None where there is none, or more than one in fences.

    A thought is left out. Where the only definitions of solution() stand in one fence, its content
    is the program; otherwise the text is, whole. What is indented as a whole moves to the left.
    Examples, with / for a line break:

        def solution(): / return 18                                the same
        Here it is: / ```python / def solution(): ... / ``` / Ok.  def solution(): ...
        <think>I add.</think> / def solution(): ...                def solution(): ...
        The answer is 18.                                          None
        ``` / def solution(): ... / ``` / or / ``` / def solution(): ... / ```    None
    """
    text = THOUGHT.sub("", text).strip("\r\n")
    programs = [
        block["code"] for block in FENCED.finditer(text) if DEFINITION.search(block["code"])
    ]
    if programs and not DEFINITION.search(FENCED.sub("", text)):
        text = programs[0] if len(programs) == 1 else ""
    if "solution" not in text:
        return None
    return textwrap.dedent(text).lstrip() if text[0].isspace() else text


# ---- the servers, seen from the trainer ----------------------------------------------------------

MAX_PROGRAM = 1 << 16  # characters; a longer program is an error
START_SECONDS = 120  # a server loads its modules
GRACE_SECONDS = 5  # a server that is silent for longer than WALL_SECONDS and this is killed


class Server(NamedTuple):
    """A running server. is_confined: whether the system-call filter works there."""

    process: subprocess.Popen
    is_confined: bool


# By owner, since a fork of the trainer owns none of these, and by needs_sympy.
IDLE: dict[tuple[int, bool], list[Server]] = {}


def run_program(text, unsafe):
    """Send a program to an idle server or a new one, wait, and check the reply."""
    program = program_text(text)
    if program is None or len(program) > MAX_PROGRAM:
        return Outcome("error", None)
    source = program.encode("utf-8", "surrogatepass")
    # A server that holds these is slower to start and to fork.
    needs_sympy = bool(re.search("sympy|numpy|mpmath", program))
    idle = IDLE.setdefault((os.getpid(), needs_sympy), [])
    server = take_idle(idle) or start_server(needs_sympy)
    if not server.is_confined and not unsafe:
        idle.append(server)
        raise InputError(
            "model-written programs cannot be held back here: no system-call filter works on "
            f"{platform.system()} {platform.machine()}; run on Linux with seccomp, or with "
            "--unsafe-exec let programs do to your files what they like"
        )
    request = len(source).to_bytes(4) + source
    status, answer = ask(server.process, request, WALL_SECONDS + GRACE_SECONDS)
    idle.append(server)
    # read_number alone would take words, units and a second line, too.
    is_plain = re.fullmatch(r"[-+.0-9e/]{1,255}", answer)
    if status == "ok" and (not is_plain or read_number(answer) is None):
        status = "error"
    return Outcome(status, answer if status == "ok" else None)


def take_idle(idle):
    """Take a server that still runs out of the list. None where there is none."""
    while True:
        try:
            server = idle.pop()
        except IndexError:  # no test before: another thread may take the last one in between
            return None
        if server.process.poll() is None:
            return server
        stop(server.process)


def ask(process, request, seconds):
    """Send a request and read the reply: a status and a text.

    A server that ends, or is silent for too long, is stopped: "killed".
    """
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    reply = b""
    with contextlib.suppress(OSError):  # it has ended
        process.stdin.write(request)
        process.stdin.flush()
        reply = process.stdout.read(REPLY_BYTES)
    timer.cancel()
    if len(reply) < REPLY_BYTES:
        stop(process)
        return "killed", ""
    return STATUSES[reply[0]], reply[1:].rstrip(b"\0").decode("latin-1")


def start_server(needs_sympy):
    """Start a server and wait until it is ready."""
    command = [sys.executable, "-sS", "-Wignore", __file__]  # not -I, which ignores the hash seed
    process = subprocess.Popen(
        [*command, str(needs_sympy), seccomp_filter().hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            "PYTHONHASHSEED": "0",  # fixes the order of a set of strings
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",  # OpenBLAS and MKL heed it, too
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        },
        start_new_session=True,  # Ctrl-C in a terminal is for the trainer
    )
    status, _ = ask(process, b"", START_SECONDS)
    if status == "killed":
        raise InputError(
            f"no server for programs: {sys.executable} ended with {process.returncode} at its start"
        )
    return Server(process, is_confined=status == "ok")


def stop(process):
    """Kill a server; the kernel kills its child with it."""
    process.kill()
    with contextlib.suppress(OSError), process:
        pass  # closes its pipes and reaps it


@atexit.register
def stop_idle():
    """At exit: stop the servers of this process. One that is at work ends as its pipe closes."""
    for (owner, _), servers in IDLE.items():
        while owner == os.getpid() and servers:
            stop(servers.pop().process)


# ---- the limits ----------------------------------------------------------------------------------

WALL_SECONDS = 3
CPU_SECONDS = 2
MEMORY_BYTES = 1 << 30
# All that a program may call: read, write, close, fstat, lseek, mmap, mprotect, munmap, brk,
# rt_sigreturn, mremap, exit, futex, restart_syscall, clock_gettime, clock_nanosleep, exit_group.
SYSCALLS = {
    "x86_64": (0, 1, 3, 5, 8, 9, 10, 11, 12, 15, 25, 60, 202, 219, 228, 230, 231),
    "aarch64": (63, 64, 57, 80, 62, 222, 226, 215, 214, 139, 216, 93, 98, 128, 113, 115, 94),
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF instructions
KILL, FAIL, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # FAIL: with errno 1, EPERM
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38


def seccomp_filter():
    """The allow-list as a BPF program: any other call fails with EPERM.

    Empty where there is none for the machine.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in SYSCALLS:
        return b""
    instructions = [  # each: instruction, how many to skip if it is true and if not, operand
        # In another mode of the machine, or with x32's bit, a number means another call.
        (LOAD, 0, 0, 4),
        (IF_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (IF_AT_LEAST, 0, 1, 1 << 30),
        (RETURN, 0, 0, KILL),
    ]
    for number in SYSCALLS[machine]:
        instructions += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    instructions.append((RETURN, 0, 0, FAIL))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def prctl(option, value, pointer=0):
    """Linux's prctl(2); elsewhere nothing."""
    if sys.platform == "linux":
        words = map(ctypes.c_ulong, (value, pointer, 0, 0))
        if ctypes.CDLL(None).prctl(option, *words):
            raise OSError(f"prctl({option}) failed")


def confine(seccomp):
    """Limit this process, for good."""
    import resource  # not on Windows, where this file can still be imported

    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        if 0 <= hard < value:  # no limit is -1 on Linux
            value = hard
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            if seccomp:
                raise
    if seccomp:
        code = ctypes.create_string_buffer(seccomp)
        header = struct.pack("@HP", len(seccomp) // 8, ctypes.addressof(code))
        program = ctypes.create_string_buffer(header)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program))


# ---- the server ----------------------------------------------------------------------------------

REPLY_BYTES = 257  # a status, up to 255 bytes of text, and one that shows that a text is too long
answer_buffer = bytearray(REPLY_BYTES)  # all that a server keeps of a program, until it is sent

# A child cannot open files: what programs may import is loaded before. This is what the standard
# library has for text, data types, arithmetic and dates; _strptime is what strptime needs.
PRELOAD = """
    __future__ _strptime abc array base64 binascii bisect calendar cmath codecs collections
    collections.abc contextlib copy csv dataclasses datetime decimal difflib enum fractions
    functools graphlib heapq html inspect io itertools json keyword locale math numbers operator
    pprint random re reprlib statistics string stringprep struct textwrap time timeit traceback
    types typing unicodedata warnings weakref
"""
# sympy puts off many imports until they are used.
PRELOAD_SYMPY = """
    numpy numpy.fft numpy.linalg numpy.ma numpy.matlib numpy.polynomial numpy.random
    sympy sympy.abc sympy.assumptions.handlers.matrices sympy.assumptions.lra_satask
    sympy.assumptions.predicates.matrices sympy.assumptions.satask sympy.combinatorics.galois
    sympy.combinatorics.group_numbers sympy.combinatorics.homomorphisms sympy.concrete.delta
    sympy.concrete.guess sympy.crypto sympy.discrete.recurrences sympy.integrals.intpoly
    sympy.integrals.quadrature sympy.logic.algorithms.dpll sympy.matrices.expressions.applyfunc
    sympy.matrices.normalforms sympy.ntheory.bbp_pi sympy.ntheory.elliptic_curve
    sympy.physics.units sympy.physics.units.systems.cgs sympy.physics.wigner
    sympy.polys.dispersion sympy.polys.distributedmodules sympy.polys.domains.quotientring
    sympy.polys.multivariate_resultants sympy.polys.numberfields.resolvent_lookup
    sympy.polys.subresultants_qq_zz sympy.series.acceleration sympy.series.kauers
    sympy.sets.handlers.add sympy.sets.handlers.functions sympy.sets.handlers.issubset
    sympy.sets.handlers.mul sympy.sets.handlers.power sympy.stats sympy.stats.compound_rv
    sympy.stats.error_prop sympy.stats.sampling.sample_numpy sympy.tensor.array.array_derivatives
    sympy.tensor.array.expressions sympy.vector
"""
WARM_UP = """
from sympy import *
x, y = symbols("x y")
solve(2**x - 8), solve([x * y - 6, x + y - 5]), solve(x**2 < 4), solveset(x**2 - 4, x, S.Reals)
integrate(x * exp(x)), integrate(x**2, (x, 0, 3)), Integral(sin(x) / x, (x, 1, 2)).evalf()
nsolve(cos(x) - x, 1), limit(sin(x) / x, x, 0), summation(x, (x, 1, 10)), lambdify(x, x**2)(3)
simplify(sin(x) ** 2 + cos(x) ** 2), sympify("2*x + 1"), diophantine(2 * x + 3 * y - 5)
satisfiable(Symbol("p") & Symbol("q"))

import numpy
numpy.random.seed(0)
"""  # more of what sympy puts off, its caches, and numpy's random numbers


def serve(needs_sympy, seccomp):
    """Run the programs that come on stdin, each in a fork, and report each to stdout.

    A request: 4 bytes, the size of a program, and the program. A reply: answer_buffer. The first
    one, unasked, is "ok" where the filter works. Ends when the trainer does.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one to the whole job may fail no program
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a program become children of its server
    preload(needs_sympy)
    os.environ.clear()  # not before: numpy reads how many threads it may start
    if not can_confine(seccomp):
        seccomp = b""
    report("ok" if seccomp else "error")
    while header := os.read(0, 4):
        run_forked(int.from_bytes(header), seccomp)


def preload(needs_sympy):
    """Import what programs may import."""
    names = PRELOAD + PRELOAD_SYMPY if needs_sympy else PRELOAD
    for name in names.split():
        with contextlib.suppress(ImportError):  # other versions may lack some
            importlib.import_module(name)
    if needs_sympy:
        exec(WARM_UP, {})
    gc.collect()
    gc.freeze()  # the collector of a child would write to, and so copy, the memory it shares


def can_confine(seccomp):
    """Whether the filter works on this system: a child under it must not see any file."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            confine(seccomp)
            code = int(os.path.exists(os.devnull))
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def run_forked(size, seccomp):
    """Run the program that is next on stdin in a child, and report."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # writing too much fails instead of waiting
    pid = os.fork()
    if pid == 0:
        run_child(size, writer, seccomp)
    os.close(writer)
    status = wait(pid)
    os.readv(reader, [memoryview(answer_buffer)[1:]])
    os.close(reader)
    report(status)


def report(status):
    """Send the answer buffer to the trainer, and wipe it: the next child gets a copy of it."""
    answer_buffer[0] = STATUSES.index(status)
    os.write(1, answer_buffer)
    answer_buffer[:] = bytes(REPLY_BYTES)


def wait(pid):
    """Wait until a child ends, or end it at the deadline: its status.

    What descends from it is dead, too, when this returns.
    """
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(WALL_SECONDS)
    _, status = os.waitpid(pid, 0)
    signal.alarm(0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError, FileNotFoundError):  # usually no child is left
        while os.waitpid(-1, os.WNOHANG):
            children = Path("/proc/thread-self/children").read_text()
            for orphan in children.split():
                os.kill(int(orphan), signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGKILL, -signal.SIGXCPU):  # at the deadline; at the limit of CPU time
        return "timeout"
    if code < 0:
        return "killed"
    return "error" if code else "ok"


# ---- the child -----------------------------------------------------------------------------------


def run_child(size, writer, seccomp):
    """Take the program, lock the doors, run it, write the answer, and end."""
    code = 1
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with open(0, "rb") as stdin:
            source = stdin.read(size).decode()
        os.dup2(writer, 3)
        null = os.open(os.devnull, os.O_RDWR)
        for file in range(3):
            os.dup2(null, file)
        os.closerange(4, 1 << 16)
        random.seed(0)  # fork has seeded it anew
        confine(seccomp)
        # dataclasses and typing look a module up by its name
        program = sys.modules["program"] = types.ModuleType("program")
        exec(source, vars(program))
        os.write(3, result_text(program.solution()).encode("ascii"))
        code = 0
    finally:
        os._exit(code)


def result_text(value):
    """An int, float, Fraction, Decimal, numpy or sympy number as text. Raises on all else."""
    if isinstance(value, bool):
        raise TypeError("a truth value is no number")
    for number_type in (int, float, Fraction, Decimal):
        if isinstance(value, number_type):
            value = number_type.__pos__(value)  # out of a subclass, past its own methods
    if isinstance(value, Rational):
        return f"{value.numerator}/{value.denominator}".removesuffix("/1")
    return decimal_text(value)


def decimal_text(value):
    """A real number with all its digits, but without the dust of 0.1 + 0.2."""
    if not isinstance(value, Decimal):
        # sympy's sqrt(2) and pi / 2 are no Real
        if not isinstance(value, Real) and not (value.is_number and value.is_real):
            raise TypeError("no number")
        value = float(value)
    if not math.isfinite(value):
        raise ValueError("not finite")
    if abs(value) < 10**18 and value == int(value):
        return f"{value:.0f}"
    text = f"{value:.12g}"
    return text if math.isclose(float(text), value, rel_tol=1e-14) else f"{value:.15g}"


if __name__ == "__main__":
    serve(sys.argv[1] == "True", bytes.fromhex(sys.argv[2]))
