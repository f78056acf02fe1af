"""Every program here runs for real.

The hostile ones are bounded: where a defence fails, they end by themselves.
"""

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
from sandbox import (
    Outcome,
    execute,
    judge_result,
    program_text,
    run_programs,
    score_programs,
)

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


# ---- honest programs -----------------------------------------------------------------------------

NUMBERS = {
    "42": "42",
    "-3": "-3",
    "True + 1": "2",
    "10**200": "1" + "0" * 200,
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
    "Fraction(-6, 3)": "-2",
    "Fraction(1, 11)": "1/11",
    "Decimal('18.50')": "18.50",
    "Decimal('1E+3')": "1000",
    "numpy.int64(7)": "7",
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
    "None", "True", "(1 == 1)", "'forty'", "'42'", "b'42'", "1j", "[42]",
    "(42,)", "{42: 42}", "range(3)", "object()", "int", "math",
    "float('nan')", "float('inf')", "-float('inf')", "1e400", "10**256", "10**5000",
    "Decimal('nan')", "Decimal('sNaN')", "Decimal('-Infinity')", "Decimal('1E+5000')",
    "Fraction(10**300, 7)", "numpy.bool_(True)", "numpy.array([42])",
    "numpy.nan", "numpy.complex128(1)", "sympy.nan", "sympy.oo", "sympy.zoo",
    "sympy.I", "sympy.true", "sympy.Symbol('x') + 1", "[sympy.Integer(1)]",
    "datetime.timedelta(1)",
]  # fmt: skip


def expression(text: str) -> str:
    return (
        "import math, numpy, sympy, datetime\nfrom decimal import Decimal\n"
        f"from fractions import Fraction\n{body(f'return {text}')}"
    )


def test_kinds_of_numbers():
    texts = run_programs([expression(number) for number in NUMBERS])
    assert dict(zip(NUMBERS, texts, strict=True)) == NUMBERS
    assert all(read_number(text) for text in texts)


def test_what_is_no_number_is_an_error():
    outcomes = execute([expression(text) for text in NO_NUMBERS])
    wrong = dict.fromkeys(NO_NUMBERS, Outcome("error", None))
    assert dict(zip(NO_NUMBERS, outcomes, strict=True)) == wrong


HONEST_PROGRAMS = {
    "helpers, constants, blank lines": """

RATE = 3


def twice(x):

    return 2 * x


def solution():
    '''Why

    not.'''

    result = twice(RATE)

    return result


AFTER = 1
""",
    "a class": """
class Box:
    size = 6

def solution():
    return Box().size
""",
    "a future import, a dataclass, types as text": """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Box:
    size: int = 6

def solution() -> int:
    return Box().size
""",
    "a module variable that changes": """
n = 5
def solution():
    global n
    n += 1
    return n
""",
    "recursion": """
def factorial(n):
    return n * factorial(n - 1) if n else 1
def solution():
    return factorial(3)
""",
    "main guard": body("return 6") + "\nif __name__ == '__main__':\n    print(solution())",
    "prints": body("print('The answer is 42')\nreturn 6"),
    "imports": """
import abc, array, bisect, calendar, cmath, collections.abc, contextlib, copy, dataclasses
import datetime, decimal, difflib, enum, fractions, functools, graphlib, heapq, itertools, json
import numbers, operator, os, pprint, random, re, statistics, string, stringprep, sys, textwrap
import time, timeit, types, typing, unicodedata, weakref
def solution():
    return statistics.mean([5, 7])
""",
    "dates": """
from datetime import datetime
def solution():
    return (datetime.strptime('2024-03-05', '%Y-%m-%d') - datetime(2024, 2, 28)).days
""",
    "names of symbols": """
from sympy.abc import x
from sympy import solve
def solution():
    return solve(x - 6, x)[0]
""",
    "sympy": """
from sympy import *
def solution():
    x = Symbol('x', integer=True, positive=True)
    y, z = symbols('y z')
    assert factorint(12) == {2: 2, 3: 1} and Matrix([[1, 2], [3, 4]]).det() == -2
    assert nsolve(cos(y) - y, 1) < 1 and solve([Eq(y + z, 10), Eq(y - z, 2)], [y, z])[y] == 6
    assert ask(Q.positive(x)) and Sum(KroneckerDelta(x, 2), (x, 1, 3)).doit() == 1
    return summation(x, (x, 1, 3))
""",
    "a short sleep": body("import time\ntime.sleep(0.01)\nreturn 6"),
    "an unused escape": body(r"s = '\d'; return 6"),
}


@pytest.mark.parametrize("name", HONEST_PROGRAMS)
def test_honest_program(name):
    answer = read_number(execute([HONEST_PROGRAMS[name]])[0].answer or "")
    assert answer is not None and answer == 6


# ---- programs in the prose of a chat -------------------------------------------------------------

CHATS = {
    "python": "```python\nPROGRAM\n```",
    "Python3": "``` Python3 \nPROGRAM\n``` \n",
    "py": "~~~py\nPROGRAM\n~~~",
    "no language": "```\nPROGRAM\n```",
    "more marks": "````python\nPROGRAM\n````",
    "line ends": "```python\r\nPROGRAM\r\n```\r\n",
    "prose": "# Solution\n\nHere it is:\n\n```python\n\nPROGRAM\n```\n\nThe answer is 44.",
    "prose in the lines of the fence": "So: ```python\nPROGRAM\n```It is `44`, not ```18```.",
    "no end": "```python\nPROGRAM\n",
    "end in a line of the program": "```python\nPROGRAM```\n\nThe answer is 44.",
    "other blocks": """
First ```pip install sympy```, or
```bash
pip install sympy
```
then
```python
PROGRAM
```
```python
print(solution())
```
prints
```
44
```
""",
    "fence in a docstring": "```\nPROGRAM\n\ndef f():\n    '''\n    ```\n    '''\n```",
    "thought": "<think>\nLet me see.\n</think>\n\nPROGRAM",
    "thought of programs": "<think>\nPROGRAM\n```\nPROGRAM\n```\n</think>\n```\nPROGRAM\n```",
    "thought that the prompt opened": "I try this.\n</think>\n\n```python\nPROGRAM\n```",
    "imports and helpers": "```\nimport math\n\ndef f():\n    pass\n\nPROGRAM\n\nsolution()\n```",
    "defined twice": "```python\ndef solution():\n    return 5\n\nPROGRAM\n```",
    "a blank": " PROGRAM",
    "a blank, and a line without": " PROGRAM\n\nAFTER = 1",
    "indented": "\n\n    import math\n    def solution():\n        return 44\n",
    "tabs": "\tdef solution():\n\t\tx = 44\n\t\treturn x",
    "list": "1. Run:\n   ```python\n\n   def solution():\n       return 44\n   ```\n2. See.",
    "list mark": "- ```python\n  def solution():\n      return 44\n  ```\n- See.",
}
PLAIN = [
    HONEST,
    body("'''Do\n```python\nx\n```\n'''\nreturn 44"),
    "def solution():\n    '''Do\n```python\ndef solution():\n    return 5\n```\n'''\n    return 44",
    "'''Do\n```\nx\n```\n'''\ndef solution():\n    return 44",
    body("'''<think> or </think>'''\nreturn 44"),
    "def solution():\n    text = '''a\n   \nb'''\n    return len(text) + 37",
    "solution = lambda: 44",
]
NO_PROGRAMS = [
    "",
    " \n",
    "```python\n```",
    "The solution is 44.",
    "def solution() is 44",
    "Here it is:\nPROGRAM",
    "PROGRAM\n\nThe answer is 44.",
    "```\nprint(44)\n```",
    "```\nsolution()\n```",
    "<think>PROGRAM</think> 44",
    "<think>\n```\nPROGRAM\n```",
    "```\nPROGRAM\n```\nPROGRAM",
    "PROGRAM\n```\nPROGRAM\n```",
    "```\nPROGRAM\n```\nor\n```\nPROGRAM\n```",
]


def test_a_program_in_a_chat_is_found():
    programs = [text.replace("PROGRAM", HONEST) for text in CHATS.values()]
    answers = dict(zip(CHATS, run_programs(programs), strict=True))
    assert answers == dict.fromkeys(CHATS, "44")


def test_a_plain_program_stays_as_it_is():
    assert [program_text(text) for text in PLAIN] == PLAIN
    assert run_programs(PLAIN) == ["44"] * len(PLAIN)


def test_what_is_no_program_is_an_error():
    programs = [text.replace("PROGRAM", HONEST) for text in NO_PROGRAMS]
    assert execute(programs) == [Outcome("error", None)] * len(programs)
    assert program_text(programs[-1]) is program_text("44") is None


@pytest.mark.parametrize("text", ["`", "```x ", "```\n", "```\n def solution(\n", " ", "<think>"])
def test_a_program_is_looked_for_in_linear_time(text):
    start = time.monotonic()
    program_text(text * 30_000)
    assert time.monotonic() - start < 2


# ---- rewards -------------------------------------------------------------------------------------


def test_score():
    programs = ["return 18", "return 19", "return 'x'", "return 36 / 2", "return ("]
    programs = list(map(body, programs))
    assert score_programs(programs, ["18"] * 5, "gsm8k") == [1.0, 0.1, 0.0, 1.0, 0.0]
    assert run_programs(programs) == ["18", "19", None, "18", None]
    assert execute([]) == []


def test_near_a_whole_gold():
    for right, gold in (("8.99955", "9"), ("9.0", "9"), ("9", "9"), ("69999.99", "70000")):
        assert judge_result(right, gold, "svamp") == "right"
    for wrong, gold in (("8.998", "9"), ("8", "9"), ("70001", "70000"), ("0.00001", "0")):
        assert judge_result(wrong, gold, "svamp") == "wrong"
    assert judge_result(None, "9", "svamp") == judge_result("x", "9", "svamp") == "no_answer"
    assert judge_result("30", "c", "mathqa", "a ) 38 , b ) 27 , c ) 30 , d ) 9 , e ) 8") == "right"


def test_programs_of_reft_are_right():
    """One of each shape: its syntax without names, words and numbers."""
    if not SVAMP.exists():
        pytest.skip(f"{SVAMP} is not there")
    shapes = {}
    for row in map(json.loads, SVAMP.open()):
        syntax = ast.dump(ast.parse(row["answer_cot"]))
        shapes[re.sub(r"value=-?[\d.]+|'[^']*'|\"[^\"]*\"", "", syntax)] = row
    assert len(shapes) > 200
    programs = [row["answer_cot"] for row in shapes.values()]
    golds = [row["answer_value"] for row in shapes.values()]
    assert [program_text(program) for program in programs] == programs
    assert score_programs(programs, golds, "svamp") == [1.0] * len(shapes)


# ---- hostile programs ----------------------------------------------------------------------------

# A program that gets what it wants returns 42. DIR: a folder that must stay as it is.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1)
        open('DIR/new', 'w')
    os._exit(0)
time.sleep(0.3)
return 42
"""
TIMEOUTS = {
    "deadlock": """
import _thread
lock = _thread.allocate_lock()
lock.acquire()
lock.acquire(True, 20)
return 42
""",
    "BaseException around a loop": """
import time
end = time.time() + 20
while time.time() < end:
    try:
        while time.time() < end: pass
    except BaseException: pass
return 42
""",
    "regex bomb": "import re\nreturn 42 if re.match('(a*)*b', 'a' * 34) else 42",
    "signals off, then a loop": """
import signal, time
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except Exception: pass
try: signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
except Exception: pass
signal.alarm(0)
end = time.time() + 20
while time.time() < end: pass
return 42
""",
    "answer, then a loop": "import os\nos.write(3, b'42')\nos.close(3)\nwhile True: pass",
}
CRASHES = {
    "abort": "import os\nos.abort()",
    "null pointer": "import ctypes\nctypes.string_at(0)\nreturn 42",
    "x32 system call": "import ctypes\nctypes.CDLL(None).syscall((1 << 30) + 39)\nreturn 42",
}
NEVER_OK = {
    "memory, all errors caught": """
x = []
while len(x) < 48:
    try: x.append(b'x' * (64 << 20))
    except BaseException: pass
return 42
""",
    "deeper recursion": """
import sys
sys.setrecursionlimit(10**9)
def f(n): return 1 + f(n + 1) if n < 10**8 else 42
return f(0)
""",
    "recursion in C": """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
len(repr(x))
return 42
""",
    "huge integer": "return 10**10**8",
    "huge integer as text": """
import sys
sys.set_int_max_str_digits(0)
return len(str(7**10**7)) and 42
""",
}
ERRORS = {
    "daemon": DAEMON,
    "signals off": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nreturn 42",
    "limits off": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))\nreturn 42",
    "memory at once": "x = bytearray(3 << 30)\nreturn 42",
    "memory bit by bit": "x = []\nfor _ in range(48): x.append(bytes(64 << 20))\nreturn 42",
    "fork": "import os\nif os.fork() == 0: os._exit(0)\nreturn 42",
    "fork by posix_spawn": """
import os
os.posix_spawn('/bin/touch', ['touch', 'DIR/new'], {})
return 42
""",
    "fork by ctypes": """
import ctypes
pid = ctypes.CDLL(None).fork()
if pid == 0: ctypes.CDLL(None)._exit(0)
assert pid > 0
return 42
""",
    "thread": "import threading\nthreading.Thread(target=print).start()\nreturn 42",
    "exec": "import os\nos.execv('/bin/touch', ['touch', 'DIR/new'])",
    "system": "import os\nassert os.system('touch DIR/new') == 0\nreturn 42",
    "deep recursion": "def f(n): return 1 + f(n)\nreturn f(0)",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "kill the server": "import os\nos.kill(os.getppid(), 9)\nreturn 42",
    "kill everything": "import os\nos.killpg(0, 0)\nreturn 42",
    "write a file": "open('DIR/new', 'w').write('x')\nreturn 42",
    "change a file": "open('DIR/keep', 'a').write('x')\nreturn 42",
    "delete a file": "import os\nos.remove('DIR/keep')\nreturn 42",
    "read a file": "assert open('DIR/keep').read()\nreturn 42",
    "list a folder": "import os\nassert os.listdir('DIR')\nreturn 42",
    "is there a file": "import os\nos.stat('DIR/keep')\nreturn 42",
    "import from a file": "import sys\nsys.path.append('DIR')\nimport leak\nreturn 42",
    "import the trainer": "import rollout\nreturn 42",
    "socket": "import _socket, numpy\n_socket.socket()\nreturn 42",
    "socket by ctypes": "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0\nreturn 42",
    "file by ctypes": """
import ctypes
assert ctypes.CDLL(None).open(b'DIR/new', 0o102, 0o600) >= 0
return 42
""",
    "__subclasses__": """
for c in ().__class__.__base__.__subclasses__():
    if c.__name__ == '_wrap_close':
        assert c.__init__.__globals__['system']('touch DIR/new') == 0
return 42
""",
    "memory of the server": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').seek(0)\nreturn 42",
    "own memory map": "assert open('/proc/self/maps').read()\nreturn 42",
    "random numbers of the system": "import os\nos.urandom(8)\nreturn 42",
    "files of the trainer": """
import os
for fd in range(4, 200):
    try: os.lseek(fd, 0, 1)
    except OSError as e:
        if e.errno == 9: continue
    return 42
raise ValueError
""",
    "environment": "import os\nassert os.environ\nreturn 42",
    "second answer line": "import os\nos.write(3, b'42\\n43')\nos._exit(0)",
    "words on the pipe": "import os\nos.write(3, b'about 42 apples')\nos._exit(0)",
    "a whole reply": "import os\nos.write(3, b'\\0' + b'42'.ljust(256, b'\\0'))\nos._exit(0)",
    "a flood on the pipe": "import os\nfor _ in range(1000): os.write(3, b'4' * 10**6)",
    "a number too long": "import os\nos.write(3, b'4' * 256)\nos._exit(0)",
    "answer, then a crash": "import os\nos.write(3, b'42')\nos._exit(1)",
    "nothing is left to end it": "import os\nos._exit = os.write = print\nraise ValueError",
    "lies about itself": """
class Lie:
    __repr__ = __str__ = lambda self: '42'
    __float__ = __int__ = __index__ = lambda self: 42
    __eq__ = lambda self, other: True
return Lie()
""",
    "too deep to parse": "return " + "(" * 5000 + "42" + ")" * 5000,
    "too long": "return 42 #" + "x" * (1 << 16),
    "null character": "return 42 #\0",
    "half a character": "return len('\ud800') + 41",
}
HOSTILE = TIMEOUTS | CRASHES | NEVER_OK | ERRORS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "keep").write_text("kept")
    (folder / "leak.py").write_text("x = 1")
    programs = {}
    for name, text in HOSTILE.items():
        programs[name] = body(text.replace("DIR", str(folder)))
        programs["after " + name] = HONEST
    start = time.monotonic()
    outcomes = dict(zip(programs, execute(list(programs.values())), strict=True))
    outcomes["seconds"] = time.monotonic() - start
    time.sleep(1)  # a daemon would write now
    outcomes["files"] = {path.name: path.read_text() for path in folder.iterdir()}
    return outcomes


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program(name, outcomes):
    status, answer = outcomes[name]
    assert answer is None and status != "ok"
    assert (status == "timeout") == (name in TIMEOUTS) or name in NEVER_OK
    assert (status == "killed") == (name in CRASHES) or name in NEVER_OK


def test_hostile_programs_touch_nothing(outcomes):
    assert outcomes["files"] == {"keep": "kept", "leak.py": "x = 1"}
    assert {outcomes[f"after {name}"] for name in HOSTILE} == {Outcome("ok", "44")}
    assert outcomes["seconds"] < 60


def test_output_is_no_answer():
    program = """
import os, sys
print(42)
sys.__stdout__.write('42')
os.write(1, b'\\x0042')
os.write(2, b'42')
for _ in range(1000): os.write(1, b'x' * 10**6)
return 7
"""
    assert execute([body(program)]) == [Outcome("ok", "7")]


def test_a_program_can_only_name_its_own_answer():
    writer = body("import os\nos.write(3, b'42')\nos._exit(0)")
    assert run_programs([writer, HONEST] * 4) == ["42", "44"] * 4


LIES = """
    __str__ = __repr__ = __format__ = lambda *_: '42'
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = lambda *_: True
    __int__ = __index__ = __trunc__ = __round__ = __floor__ = __ceil__ = __hash__ = lambda *_: 42
    __float__ = lambda *_: 42.0
"""


@pytest.mark.parametrize("number", ["int", "float", "Fraction", "Decimal"])
def test_lying_subclass(number):
    imports = "from fractions import Fraction\nfrom decimal import Decimal\n"
    program = f"{imports}class Lie({number}):{LIES}{body('return Lie(7)')}"
    assert score_programs([program], ["42"], "gsm8k")[0] < 1.0


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
    __main__.run_child = __main__.result_text = lambda *_: "99"
    __main__.STATUSES = ()
    return 1
"""
    witness = """
import math, random, sys, decimal
def solution():
    known = math.floor(abs(-3)) + (math.pi > 3.1) + decimal.getcontext().prec
    return known + sys.getrecursionlimit() + random.random()
"""
    before = run_programs([witness] * 4)
    after = run_programs([vandal, witness] * 20)[1::2]
    assert len(set(before)) == 1 and set(after) == set(before) != {None}


def test_no_answer_of_the_last_program_is_left():
    left = "int(bytes(__main__.answer_buffer[1:]).split(b'\\0')[0] or b'0')"
    thief = body(f"import __main__\nreturn {left}")
    assert run_programs([body("return 8675309"), thief] * 10)[1::2] == ["0"] * 10


def test_the_gold_never_enters():
    thief = body("""
import gc, sys
gold, found = str(int('73519')), 0
frame = sys._getframe().f_back
while frame:
    found += str(frame.f_locals).count(gold) > 1  # once: in the text of this program
    frame = frame.f_back
dicts = [o for o in gc.get_objects() if type(o) is dict and o.get('gold') != gold]
return found + sum(gold in o.values() for o in dicts)
""")
    programs = [body("return 73519"), thief] * 4
    assert score_programs(programs, ["73519"] * 8, "gsm8k") == [1.0, 0.1] * 4
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
    program = """
import os, ctypes
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
return int(os.environ.get('GOLD') or getenv(b'GOLD') or 0)
"""
    assert run_programs([body(program)]) == ["0"]


# ---- servers -------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import sandbox
print(sandbox.run_programs(["def solution(): return 18"] * 5))
print([server.process.pid for servers in sandbox.IDLE.values() for server in servers])
sys.stdout.flush()
"""


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("end", ["", "import os; os.kill(os.getpid(), 9)"])
def test_script_without_main_guard_leaves_no_server(end, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)) + end)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
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


def test_a_sigterm_to_the_whole_job_fails_no_program(new_servers):
    assert run_programs([HONEST]) == ["44"]
    servers = [server for idle in sandbox.IDLE.values() for server in idle]
    timers = [threading.Timer(0.3, server.process.terminate) for server in servers]
    for timer in timers:
        timer.start()
    assert run_programs([body("import time\ntime.sleep(1)\nreturn 42")]) == ["42"]
    assert timers and all(server.process.poll() is None for server in servers)


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
    allow_all = b"\x06\0\0\0\0\0\xff\x7f"
    for seccomp in (b"nonsense", allow_all, b""):
        sandbox.stop_idle()
        monkeypatch.setattr(sandbox, "seccomp_filter", lambda seccomp=seccomp: seccomp)
        with pytest.raises(InputError, match=r"cannot be held back here: .*filter.*--unsafe-exec"):
            execute([HONEST])
    programs = [
        "return 44",
        DAEMON.replace("DIR", str(tmp_path)),
        "while True: pass",
        "x = bytearray(3 << 30)",
        "import os, time\nfor _ in range(3): os.fork()\ntime.sleep(20)",
    ]
    outcomes = execute(list(map(body, programs)), unsafe=True)
    statuses = [outcome.status for outcome in outcomes]
    assert statuses[0] == "ok" and statuses[2:4] == ["timeout", "error"]
    assert statuses[4] in ("timeout", "error")
    time.sleep(1.2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError):
        execute([HONEST])


def test_result_text_takes_numbers_only():
    assert sandbox.result_text(-(10**253)) == str(-(10**253))
    for value in (-math.inf, math.nan, "42", None, True):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            sandbox.result_text(value)
