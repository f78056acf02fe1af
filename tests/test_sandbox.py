"""Every program here runs for real. The hostile ones are bounded: where a defence fails, they end by themselves."""

import ast
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import sandbox
from reward import InputError, read_number
from sandbox import Outcome, execute, run_programs, score_programs

ROOT = Path(__file__).parents[1]
SVAMP = ROOT.parent / "shared/data/svamp/reft_python.jsonl"
HONEST = "def solution():\n    import math\n    return math.floor(abs(-42.5)) + len(str(10))"


@pytest.fixture(scope="module", autouse=True)
def filter_works():
    try:
        execute([HONEST])
    except InputError as error:
        pytest.skip(f"no seccomp: {error}")
    yield
    sandbox.stop_idle()


@pytest.fixture
def new_servers(monkeypatch):
    """Servers of this test alone."""
    monkeypatch.setattr(sandbox, "IDLE", {})
    yield
    sandbox.stop_idle()


def body(text: str) -> str:
    """A program whose solution() is the text."""
    return "def solution():\n" + "\n".join(f"    {line}" for line in text.strip().splitlines())


# ---- honest programs ----

NUMBERS = {
    "42": "42",
    "-3": "-3",
    "True + 1": "2",
    "10**200": "1" + "0" * 200,
    "84 / 2": "42",
    "2**53 + 1": "9007199254740993",
    "1234567890123.0": "1234567890123",
    "1234567890123456.0": "1234567890123456",  # more than the 15 that are sure
    "99999999999.99": "99999999999.99",
    "0.1 + 0.2": "0.3",
    "123456789012.5": "123456789012.5",  # all digits
    "0.1 * 3 * 10": "3",
    "-0.5": "-0.5",
    "1 / 3": "0.333333333333333",
    "1e300": "1e+300",
    "5e-324": "4.94065645841e-324",
    "Fraction(6, 4)": "3/2",
    "Fraction(-6, 3)": "-2/1",
    "Decimal('18.50')": "18.50",
    "Decimal('1E+3')": "1000",
    "Decimal(1) / 3": "0.333333333333333",
    "numpy.int64(7)": "7",
    "numpy.uint8(7)": "7",
    "numpy.float64(2.5)": "2.5",
    "numpy.float32(2.5)": "2.5",
    "numpy.mean([1, 2])": "1.5",
    "numpy.linalg.solve([[2.0]], [3.0])[0]": "1.5",
    "numpy.linalg.det(numpy.eye(200))": "1",
    "sympy.Integer(7)": "7",
    "sympy.Rational(-1, 3)": "-1/3",
    "sympy.Float('2.50')": "2.5",
    "sympy.sqrt(2)": "1.4142135623731",
    "sympy.solve(sympy.Symbol('x') * 2 - 7)[0]": "7/2",
    "sympy.integrate(sympy.Symbol('x') ** 2, (sympy.Symbol('x'), 0, 3))": "9",
}
NO_NUMBERS = [
    "None", "True", "(1==1)", "'forty'", "'42'", "''", "b'42'", "1j", "complex(42)", "[42]", "(42,)", "{42}", "{42:42}",
    "range(3)", "object()", "int", "math", "print", "(i for i in [4])", "float('nan')", "float('inf')", "-float('inf')",
    "1e400", "10**256", "10**5000", "Decimal('nan')", "Decimal('sNaN')", "Decimal('-Infinity')", "Decimal('1E+5000')",
    "Fraction(10**300,7)", "numpy.bool_(True)", "numpy.array(42)", "numpy.array([42])", "numpy.nan", "numpy.inf",
    "numpy.complex128(1)", "sympy.nan", "sympy.oo", "sympy.zoo", "sympy.I", "sympy.true", "sympy.Symbol('x')",
    "sympy.Symbol('x')+1", "[sympy.Integer(1)]", "datetime.timedelta(1)",
]  # fmt: skip


def expression(text: str) -> str:
    return (
        f"import math, numpy, sympy, datetime\nfrom decimal import Decimal\n"
        f"from fractions import Fraction\n{body(f'return {text}')}"
    )


def test_kinds_of_numbers():
    texts = run_programs([expression(number) for number in NUMBERS])
    assert dict(zip(NUMBERS, texts, strict=True)) == NUMBERS
    assert all(read_number(text) for text in texts)


def test_what_is_no_number_is_an_error():
    outcomes = dict(zip(NO_NUMBERS, execute([expression(text) for text in NO_NUMBERS]), strict=True))
    assert outcomes == dict.fromkeys(NO_NUMBERS, Outcome("error", None))


HONEST_PROGRAMS = {
    "helpers, constants, blank lines": "\n\nRATE = 3\n\n\ndef twice(x):\n\n    return 2 * x\n\n\n"
    "def solution():\n    '''Why\n\n    not.'''\n\n    result = twice(RATE)\n\n    return result\n\n\nAFTER = 1\n",
    "a class": "class Box:\n    size = 6\n\ndef solution():\n    return Box().size",
    "a dataclass": "from dataclasses import dataclass\n@dataclass\nclass Box:\n    size: int = 6\n"
    "def solution():\n    return Box().size",
    "the last definition counts": "def solution():\n    return 5\ndef solution():\n    return 6",
    "a module variable that changes": "n = 5\ndef solution():\n    global n\n    n += 1\n    return n",
    "recursion": "def f(n):\n    return n and n * f(n - 1) or 1\ndef solution():\n    return f(3)",
    "prints": body("print('The answer is 42')\nreturn 6"),
    "main guard": "def solution():\n    return 6\nif __name__ == '__main__':\n    print(solution())",
    "imports": body(
        "import math, cmath, fractions, decimal, itertools, collections, random, re, statistics, functools, operator\n"
        "import string, copy, heapq, bisect, calendar, time, typing, enum, numbers, json, os, sys\n"
        "return statistics.mean([5, 7])"
    ),
    "datetime": "from datetime import datetime, timedelta\n"
    + body("return (datetime.strptime('2024-03-05', '%Y-%m-%d') - datetime(2024, 2, 28)).days"),
    "sympy system": "from sympy import symbols, Eq, solve\n"
    + body("x, y = symbols('x y')\nreturn solve([Eq(x + y, 10), Eq(x - y, 2)], [x, y])[x]"),
    "sympy sums and matrices": "from sympy import *\n"
    + body(
        "x = Symbol('x', integer=True, positive=True)\n"
        "assert factorint(12) == {2: 2, 3: 1} and Matrix([[1, 2], [3, 4]]).det() == -2 and nsolve(cos(x) - x, 1) < 1\n"
        "return summation(x, (x, 1, 3))"
    ),
    "a short sleep": body("import time\ntime.sleep(0.01)\nreturn 6"),
    "an unused escape": body(r"s = '\d'; return 6"),
}


@pytest.mark.parametrize("name", HONEST_PROGRAMS)
def test_honest_program(name):
    answer = read_number(execute([HONEST_PROGRAMS[name]])[0].answer or "")
    assert answer is not None and answer.value == 6


def test_score():
    programs = [body("return 18"), body("return 19"), body("return 'x'"), body("return 36 / 2"), "", "def solution("]
    assert score_programs(programs, ["18"] * 6, "gsm8k") == [1.0, 0.1, 0.0, 1.0, 0.0, 0.0]
    assert run_programs(programs) == ["18", "19", None, "18", None, None]
    assert execute([]) == []


# Programs of ReFT with words that scorers replace or refuse. All stand in docstrings; nothing happens, they get 1.0.
ODD = {
    "svamp_308",  # the solar system
    "svamp_2447",  # his dad's entertainment system
    "svamp_2377",  # to open the cave doors
    "svamp_2585",  # the exit door will open
}


def test_near_a_whole_gold():
    results = {"8.99955": 1.0, "9.0": 1.0, "8.998": 0.1, "8": 0.1, "69999.99": 1.0, "70001": 0.1, "0.00001": 0.1}
    golds = ["9", "9", "9", "9", "70000", "70000", "0"]
    assert score_programs([body(f"return {result}") for result in results], golds, "svamp") == list(results.values())


def test_programs_of_reft_are_right():
    """One of each shape: its syntax without names, words and numbers."""
    if not SVAMP.exists():
        pytest.skip(f"{SVAMP} is not there")
    rows = [json.loads(line) for line in SVAMP.open()]
    odd = [row for row in rows if re.search(r"\b(open|\w*sys\w*)\b", row["answer_cot"])]
    assert len(rows) == 3043 and {row["item_id"] for row in odd} == ODD
    syntax = [ast.dump(ast.parse(row["answer_cot"])) for row in rows]
    shapes = [re.sub(r"value=-?[\d.]+|'[^']*'|\"[^\"]*\"", "", text) for text in syntax]
    rows = [*dict(zip(shapes, rows, strict=True)).values(), *odd]
    assert len(rows) > 200
    rewards = score_programs([row["answer_cot"] for row in rows], [row["answer_value"] for row in rows], "svamp")
    wrong = {row["item_id"]: reward for row, reward in zip(rows, rewards, strict=True) if reward != 1.0}
    assert wrong == {}


# ---- hostile programs ----

# {dir}: a folder that holds the file "keep" and must stay as it is. A program that gets what it wants returns 42.
ERROR, TIMEOUT, KILLED, NEVER_OK = {"error"}, {"timeout"}, {"killed"}, {"error", "timeout", "killed"}
HOSTILE = {
    "deadlock": (
        TIMEOUT,
        "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire(True, 20)\nreturn 42",
    ),
    "BaseException around a loop": (
        TIMEOUT,
        "import time\nend = time.time() + 20\nwhile time.time() < end:\n    try:\n"
        "        while time.time() < end: pass\n    except BaseException: pass\nreturn 42",
    ),
    "regex bomb": (TIMEOUT, "import re\nreturn 42 if re.match('(a*)*b', 'a' * 34) else 42"),
    "signals off": (
        ERROR,
        "import signal\n"
        "for s in (signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n"
        "return 42",
    ),
    "signals off, then a loop": (
        TIMEOUT,
        "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\n"
        "try: signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nexcept Exception: pass\nsignal.alarm(0)\n"
        "end = time.time() + 20\nwhile time.time() < end: pass\nreturn 42",
    ),
    "limits off": (ERROR, "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))\nreturn 42"),
    "memory at once": (ERROR, "x = bytearray(3 << 30)\nreturn 42"),
    "memory bit by bit": (ERROR, "x = []\nfor _ in range(48): x.append(bytes(64 << 20))\nreturn 42"),
    "memory, all errors caught": (
        NEVER_OK,
        "x = []\nwhile len(x) < 48:\n    try: x.append(b'x' * (64 << 20))\n    except BaseException: pass\nreturn 42",
    ),
    "fork": (ERROR, "import os\nif os.fork() == 0: os._exit(0)\nreturn 42"),
    "fork bomb": (
        ERROR,
        "import os\nfor _ in range(5):\n    os.fork()\nreturn 42",
    ),
    "fork by posix_spawn": (ERROR, "import os\nos.posix_spawn('/bin/touch', ['touch', '{dir}/new'], {{}})\nreturn 42"),
    "fork by ctypes": (
        ERROR,
        "import ctypes\npid = ctypes.CDLL(None).fork()\nif pid == 0: ctypes.CDLL(None)._exit(0)\n"
        "assert pid > 0\nreturn 42",
    ),
    "daemon": (
        ERROR,
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1)\n"
        "        open('{dir}/new', 'w')\n    os._exit(0)\ntime.sleep(0.3)\nreturn 42",
    ),
    "thread": (ERROR, "import threading\nthreading.Thread(target=print).start()\nreturn 42"),
    "exec": (ERROR, "import os\nos.execv('/bin/touch', ['touch', '{dir}/new'])"),
    "system": (ERROR, "import os\nassert os.system('touch {dir}/new') == 0\nreturn 42"),
    "deep recursion": (ERROR, "def f(n): return 1 + f(n)\nreturn f(0)"),
    "deeper recursion": (
        NEVER_OK,
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return 1 + f(n + 1) if n < 10**8 else 42\nreturn f(0)",
    ),
    "recursion in C": (
        NEVER_OK,
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nlen(repr(x))\nreturn 42",
    ),
    "huge integer": (NEVER_OK, "return 10**10**8"),
    "huge integer as text": (NEVER_OK, "import sys\nsys.set_int_max_str_digits(0)\nreturn len(str(7**10**7)) and 42"),
    "os._exit": (ERROR, "import os\nos._exit(0)"),
    "sys.exit": (ERROR, "import sys\nsys.exit(0)"),
    "abort": (KILLED, "import os\nos.abort()"),
    "null pointer": (KILLED, "import ctypes\nctypes.string_at(0)\nreturn 42"),
    "kill the server": (ERROR, "import os\nos.kill(os.getppid(), 9)\nreturn 42"),
    "kill everything": (ERROR, "import os\nos.killpg(0, 0)\nreturn 42"),
    "write a file": (ERROR, "open('{dir}/new', 'w').write('x')\nreturn 42"),
    "change a file": (ERROR, "open('{dir}/keep', 'a').write('x')\nreturn 42"),
    "delete a file": (ERROR, "import os\nos.remove('{dir}/keep')\nreturn 42"),
    "delete a folder": (ERROR, "import shutil\nshutil.rmtree('{dir}')\nreturn 42"),
    "read a file": (ERROR, "assert open('{dir}/keep').read()\nreturn 42"),
    "list a folder": (ERROR, "import os\nassert os.listdir('{dir}')\nreturn 42"),
    "is there a file": (ERROR, "import os\nos.stat('{dir}/keep')\nreturn 42"),
    "import from a file": (ERROR, "import sys\nsys.path.append('{dir}')\nimport leak\nreturn 42"),
    "socket": (ERROR, "import _socket, numpy\n_socket.socket()\nreturn 42"),
    "socket by ctypes": (ERROR, "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0\nreturn 42"),
    "file by ctypes": (
        ERROR,
        "import ctypes\nassert ctypes.CDLL(None).open(b'{dir}/new', 0o102, 0o600) >= 0\nreturn 42",
    ),
    "x32 system call": (KILLED, "import ctypes\nctypes.CDLL(None).syscall((1 << 30) + 39)\nreturn 42"),
    "__subclasses__": (
        ERROR,
        "for c in ().__class__.__base__.__subclasses__():\n    if c.__name__ == '_wrap_close':\n"
        "        assert c.__init__.__globals__['system']('touch {dir}/new') == 0\nreturn 42",
    ),
    "memory of the server": (ERROR, "import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb').seek(0)\nreturn 42"),
    "own memory map": (ERROR, "assert open('/proc/self/maps').read()\nreturn 42"),
    "random numbers of the system": (ERROR, "import os\nos.urandom(8)\nreturn 42"),
    "files of the trainer": (
        ERROR,
        "import os\nfor fd in range(4, 200):\n    try: os.lseek(fd, 0, 1)\n"
        "    except OSError as e:\n        if e.errno == 9: continue\n    return 42\n"
        "raise ValueError",
    ),
    "environment": (ERROR, "import os\nassert os.environ\nreturn 42"),
    "second answer line": (ERROR, "import os\nos.write(3, b'42\\n43')\nos._exit(0)"),
    "words on the pipe": (ERROR, "import os\nos.write(3, b'about 42 apples')\nos._exit(0)"),
    "a whole reply on the pipe": (ERROR, "import os\nos.write(3, b'\\0' + b'42'.ljust(256, b'\\0'))\nos._exit(0)"),
    "a flood on the pipe": (ERROR, "import os\nfor _ in range(1000): os.write(3, b'4' * 10**6)"),
    "a number too long": (ERROR, "import os\nos.write(3, b'4' * 256)\nos._exit(0)"),
    "answer, then a loop": (TIMEOUT, "import os\nos.write(3, b'42')\nos.close(3)\nwhile True: pass"),
    "answer, then a crash": (ERROR, "import os\nos.write(3, b'42')\nos._exit(1)"),
    "nothing is left to end it": (ERROR, "import os\nos._exit = os.write = print\nraise ValueError"),
    "str": (
        ERROR,
        "class Lie:\n    __repr__ = __str__ = lambda self: '42'\n"
        "    __float__ = __int__ = __index__ = lambda self: 42\n"
        "    __eq__ = lambda self, other: True\nreturn Lie()",
    ),
    "too deep to parse": (ERROR, "return " + "(" * 5000 + "42" + ")" * 5000),
    "too long": (ERROR, "return 42 #" + "x" * (1 << 16)),
    "null character": (ERROR, "return 42 #\0"),
    "half a character": (ERROR, "return len('\ud800') + 41"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "keep").write_text("kept")
    (folder / "leak.py").write_text("x = 1")
    programs = {}
    for name, (_, text) in HOSTILE.items():
        programs[name] = body(text.format(dir=folder) if "{dir}" in text or "{{" in text else text)
        programs["after " + name] = HONEST
    start = time.monotonic()
    outcomes = dict(zip(programs, execute(list(programs.values())), strict=True))
    outcomes["seconds"] = time.monotonic() - start
    time.sleep(1)  # a daemon would write now
    outcomes["files"] = {path.name: path.read_text() for path in folder.iterdir()}
    return outcomes


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program(name, outcomes):
    assert outcomes[name].status in HOSTILE[name][0]
    assert outcomes[name].answer is None


def test_hostile_programs_touch_nothing(outcomes):
    assert outcomes["files"] == {"keep": "kept", "leak.py": "x = 1"}
    assert {outcomes[f"after {name}"] for name in HOSTILE} == {Outcome("ok", "44")}
    assert outcomes["seconds"] < 60


def test_output_is_no_answer():
    program = body(
        "import os, sys\nprint(42)\nsys.__stdout__.write('42')\nos.write(1, b'\\x0042')\nos.write(2, b'42')\n"
        "for _ in range(1000): os.write(1, b'x' * 10**6)\nreturn 7"
    )
    assert execute([program]) == [Outcome("ok", "7")]


def test_a_program_can_only_name_its_own_answer():
    writer = body("import os\nos.write(3, b'42')\nos._exit(0)")
    assert run_programs([writer, HONEST] * 4) == ["42", "44"] * 4


@pytest.mark.parametrize("kind", ["int", "float", "Fraction", "Decimal"])
def test_lying_subclass(kind):
    lies = "\n".join(f"    __{name}__ = lambda *_: {value}" for name, value in LIES.items())
    program = f"from fractions import Fraction\nfrom decimal import Decimal\nclass Lie({kind}):\n{lies}\n" + body(
        "return Lie(7)"
    )
    assert score_programs([program], ["42"], "gsm8k")[0] < 1.0


LIES = dict.fromkeys(["str", "repr", "format"], "'42'") | dict.fromkeys(
    ["eq", "ne", "lt", "gt", "le", "ge", "bool"], "True"
)
LIES |= dict.fromkeys(["int", "index", "trunc", "round", "floor", "ceil"], "42") | {"float": "42.0", "hash": "42"}


def test_nothing_leaks_into_the_next_program():
    vandal = """
import builtins, math, random, sys, decimal, __main__
def solution():
    builtins.abs = lambda x: 99
    builtins.len = builtins.str = builtins.isinstance = None
    math.floor = lambda x: 99
    math.pi = 3
    random.seed(1)
    decimal.getcontext().prec = 1
    sys.setrecursionlimit(10**6)
    sys.modules["math"] = sys.modules["re"] = None
    __main__.call_solution = __main__.result_text = lambda *_: "99"
    __main__.STATUSES = ()
    return 1
"""
    witness = "import math, random, sys, decimal\n" + body(
        "known = math.floor(abs(-3)) + (math.pi > 3.1) + sys.getrecursionlimit() + decimal.getcontext().prec\n"
        "return known + random.random()"
    )
    before = run_programs([witness] * 4)
    after = run_programs([vandal, witness] * 20)[1::2]
    assert len(set(before)) == 1 and set(after) == set(before) != {None}


def test_no_answer_of_the_last_program_is_left():
    thief = "import __main__\n" + body("return int(bytes(__main__.REPLY[1:]).split(b'\\0')[0] or b'0')")
    assert run_programs([body("return 8675309"), thief] * 10)[1::2] == ["0"] * 10


def test_the_gold_never_enters():
    thief = "import gc, sys\n" + body(
        "gold, found = str(int('73519')), 0\nframe = sys._getframe()\nwhile frame:\n"
        "    found += str({k: v for k, v in frame.f_locals.items() if frame is not sys._getframe()}).count(gold) > 1\n"
        "    frame = frame.f_back\n"
        "found += sum(gold in o.values() for o in gc.get_objects() if type(o) is dict and o.get('gold') != gold)\n"
        "return found"
    )
    assert score_programs([body("return 73519"), thief] * 4, ["73519"] * 8, "gsm8k") == [1.0, 0.1] * 4
    assert set(run_programs([thief] * 4)) == {"0"}


def test_same_program_same_outcome(new_servers):
    """Also in new servers: random numbers, and the order of a set of strings."""
    programs = [
        body("import random\nreturn random.random()"),
        body("import numpy\nreturn numpy.random.rand()"),
        body("return hash('x')"),
        body("return int(''.join(sorted({str(i) for i in range(9)}, key=lambda s: 0)))"),
    ]
    first = [run_programs(programs) for _ in range(2)]
    sandbox.stop_idle()
    assert first[0] == first[1] == run_programs(programs) and None not in first[0]


def test_environment_stays_outside(new_servers, monkeypatch):
    monkeypatch.setenv("GOLD", "42")
    program = "import os, ctypes\n" + body(
        "getenv = ctypes.CDLL(None).getenv\ngetenv.restype = ctypes.c_char_p\n"
        "return int(os.environ.get('GOLD') or getenv(b'GOLD') or 0)"
    )
    assert run_programs([program]) == ["0"]


# ---- servers ----


def test_from_threads():
    results = {}
    programs = [[body(f"return {100 * i + j}") for j in range(20)] for i in range(4)]
    threads = [threading.Thread(target=lambda i=i: results.update({i: run_programs(programs[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [str(100 * i + j) for j in range(20)] for i in range(4)}


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import sandbox
print(sandbox.run_programs(["def solution(): return 18"] * 5))
print([server.process.pid for servers in sandbox.IDLE.values() for server in servers])
"""


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("end", ["", "import os; os.kill(os.getpid(), 9)"])
def test_script_without_main_guard_leaves_no_server(end, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)) + "sys.stdout.flush()\n" + end)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    answers, pids = map(json.loads, done.stdout.replace("'", '"').splitlines())
    assert answers == ["18"] * 5 and pids and done.stderr == ""
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_dead_servers_are_replaced(new_servers):
    assert run_programs([HONEST] * 4) == ["44"] * 4
    for servers in sandbox.IDLE.values():
        for server in servers:
            server.process.kill()
            server.process.wait()
    assert run_programs([HONEST] * 4) == ["44"] * 4


def test_server_that_dies_at_work(new_servers, monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 0.2)
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 0.1)
    assert execute([body("import time\ntime.sleep(2)\nreturn 42")]) == [Outcome("killed", None)]
    assert run_programs([HONEST]) == ["44"]


def test_server_holds_neither_torch_nor_files(new_servers):
    with open(__file__, "rb"):
        run_programs([HONEST])
    ((server,),) = sandbox.IDLE.values()
    files = {os.readlink(file) for file in Path(f"/proc/{server.process.pid}/fd").iterdir()}
    assert not any(__file__ in file for file in files) and len(files) <= 3
    assert "torch" not in Path(f"/proc/{server.process.pid}/maps").read_text()


def test_refusal_and_unsafe(new_servers, monkeypatch, tmp_path):
    """Without a filter: refused; with unsafe, limits hold and descendants die."""
    for seccomp in (b"nonsense", b""):
        sandbox.stop_idle()
        monkeypatch.setattr(sandbox, "seccomp_filter", lambda seccomp=seccomp: seccomp)
        with pytest.raises(InputError, match=r"cannot be held back here: .*filter.*--unsafe-exec"):
            execute([HONEST])
    daemon = HOSTILE["daemon"][1].format(dir=tmp_path)
    bomb = "import os, time\nfor _ in range(3): os.fork()\ntime.sleep(20)"
    programs = [HONEST, daemon and body(daemon), body("while True: pass"), body("x = bytearray(3 << 30)"), body(bomb)]
    statuses = [outcome.status for outcome in execute(programs, unsafe=True)]
    assert statuses[0] == "ok" and statuses[2:4] == ["timeout", "error"] and statuses[4] in ("timeout", "error")
    time.sleep(1.2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError):
        execute([HONEST])


def test_result_text_is_small_enough_for_a_reply():
    assert sandbox.result_text(-(10**253)) == str(-(10**253))
    for value in (10**255, -math.inf, math.nan, "42", None, True):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            sandbox.result_text(value)
