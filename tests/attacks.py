"""Programs that attack runner.py, and what each of them would leave behind if it got through.

    python tests/attacks.py        # the table of this machine and user; standard library only

Every program solves nothing (`f` is wrong), so a pass is a forgery. An attack is contained if it does not
pass, ends in time, is stopped by what should stop it, and leaves no mark: no process, no file outside its
folder, no connection, no harm to the bystander, a process of the same user.
"""
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runner  # noqa: E402

SOLVES_NOTHING, TESTS = "def f():\n    return 2\n", "assert f() == 1\nassert callable(f)"
JUMP = """
import sys
def trace(frame, event, arg):
    if event == "line" and frame.f_lineno > HERE:  # the first test: go on with the second
        frame.f_lineno += 1
        sys.settrace(None)
        frame.f_trace = None
    return trace
HERE = sys._getframe().f_lineno + 3
sys._getframe().f_trace = trace
sys.settrace(trace)
"""
MONITOR = """
import sys
mon = sys.monitoring
def line(code, number):
    if code is HERE and number > LAST:  # the first test: go on with the second
        mon.set_events(4, 0)
        sys._getframe(1).f_lineno = number + 1
mon.use_tool_id(4, "x")
HERE, LAST = sys._getframe().f_code, sys._getframe().f_lineno + 2
mon.register_callback(4, mon.events.LINE, line)
mon.set_events(4, mon.events.LINE)
"""
HOOK = """
import gc
for one in gc.get_objects():
    if getattr(one, "__name__", "") == "shut":
        {}
"""
INTERPRETER = """
try:
    import _interpreters as other
except ImportError:
    import _xxsubinterpreters as other
"""
FORGE = """
import gc, os, re, sys, types
WORD = "(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])"
def forge(texts):
    texts = [t.decode(errors="replace") if isinstance(t, (bytes, bytearray)) else t for t in texts]
    words = {w for t in texts if isinstance(t, str) for w in re.findall(WORD, t)}
    for fd in range(1, 64):
        try:
            for word in list(words)[:1] or ["PASS"]:
                os.write(fd, word.encode())
        except OSError:
            pass
    os._exit(0)
def read(path):
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError:
        return b""
def frames():
    frame = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back
def walk(x, depth, seen, texts):
    if id(x) in seen or depth < 0:
        return
    seen.add(id(x))
    if isinstance(x, (str, bytes, bytearray)):
        texts.append(x)
    inner = ()
    if isinstance(x, dict):
        inner = x.values()
    elif isinstance(x, (list, tuple, set, frozenset)):
        inner = x
    elif isinstance(x, types.ModuleType):
        inner = [vars(x)]
    elif isinstance(x, types.FrameType):
        inner = [dict(x.f_locals), x.f_globals, x.f_builtins, x.f_code.co_consts]  # from 3.13 on no dict
    elif isinstance(x, types.FunctionType):
        inner = [x.__globals__, x.__code__.co_consts, x.__defaults__]
    for y in list(inner):
        walk(y, depth - 1, seen, texts)
"""
SLOW = r"took more than"
ENDED = r"ended before its tests, exit code 0"  # it left by itself, with whatever it had to say
SHUT = r"is not for a graded program|has no attribute 'monitoring'|AttributeError"
SAME = r"AssertionError|PermissionError|Operation not permitted"  # it may believe to have changed something
DENIED = r"PermissionError|Operation not permitted|Permission denied|BlockingIOError|temporarily unavailable"

# name: (program, what the verdict must say)
ATTACKS = {
    "infinite loop": ("while True: pass", SLOW),
    "sleep": ("import time; time.sleep(60)", SLOW),
    "2 GB of memory": ("import mmap\nx = mmap.mmap(-1, 2 << 30)", r"Cannot allocate memory"),
    "fork bomb": ("import os\nwhile True: os.fork()", DENIED),
    "thread bomb": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
        r"can't start new thread"),
    "sys.exit(0)": ("import sys; sys.exit(0)", r"SystemExit: 0"),
    "os._exit(0)": ("import os; os._exit(0)", ENDED),
    "prints PASS": ("import sys\nprint('PASS'); sys.stdout.flush(); raise SystemExit(0)", r"SystemExit"),
    "writes PASS to every descriptor": (FORGE + "forge(['PASS'])", ENDED),
    "floods what the runner reads": (
        "import os\nfor fd in range(1, 64):\n    try:\n        for _ in range(40):\n"
        "            os.write(fd, bytes(1 << 20))\n    except OSError:\n        pass", r"exit code 1"),
    "word from environment, arguments, files": (FORGE + (
        "forge([*os.environ.values(), *sys.argv, *sys.orig_argv, *map(read, os.listdir('.')), "
        "read(sys.modules['json'].__file__)])"), ENDED),
    "word from /proc": (FORGE + """
pids = ["self", str(os.getppid()), *map(str, range(1, 200))]
forge([read(f"/proc/{p}/{x}") for p in pids for x in ("cmdline", "environ", "stat", "fd/0", "fd/1", "mem")])
""", ENDED),
    "word from descriptors": (FORGE + """
texts = []
for fd in range(64):
    try:
        os.set_blocking(fd, False)
        texts.append(os.pread(fd, 1 << 16, 0) if fd else os.read(fd, 1 << 16))
    except OSError:
        pass
forge(texts)""", ENDED),
    "word from frames, modules, functions": (FORGE + """
texts = []
walk(list(frames()), 6, set(), texts)
walk(dict(sys.modules), 5, set(), texts)
forge(texts)""", ENDED),
    "word from gc": (FORGE + """
texts = [x for x in gc.get_objects() if isinstance(x, bytes)]
walk([gc.get_referents(frame) for frame in frames()], 3, set(), texts)
walk(gc.get_referrers(*frames()), 3, set(), texts)
forge(texts)""", ENDED),
    "changes the variables of waiting frames": (FORGE + """
for frame in list(frames())[1:]:
    for names in (frame.f_locals, frame.f_globals):
        for name in list(names):
            try:
                names[name] = lambda *a, **k: None
            except Exception:
                pass
""", r"exit code 1|AssertionError"),
    "word from other threads' frames": (FORGE + """
texts = []
walk(sys._current_frames(), 6, set(), texts)
forge(texts)""", ENDED),
    "jumps over tests with a tracer": (JUMP, r"settrace is not for"),
    "jumps, the audit hook attacked first": ("""
import builtins, sys
builtins.RuntimeError = builtins.str = builtins.tuple = lambda *a: None
try:
    sys.settrace(print)
except BaseException as e:
    for frame in (e.__traceback__.tb_frame, e.__traceback__.tb_next.tb_frame):
        for names in (frame.f_globals, frame.f_locals):
            try:
                names.update(shut=None, doors=(), error=None)
            except Exception:
                pass
""" + JUMP, r"settrace is not for"),
    "calls C through ctypes": ("import ctypes\nctypes.CDLL(None).getpid()\nctypes.pythonapi.Py_Exit(0)",
                               r"ctypes\.\S+ is not for"),
    "kills its parent and group": (
        "import os, signal\nfor p in (os.getppid(), 0, -1):\n    try:\n        os.kill(p, signal.SIGKILL)\n"
        "    except OSError:\n        pass\n", r"AssertionError|exit code (137|247)"),
    "kills a bystander": ("import os\nos.kill(BYSTANDER, 9)", r"ProcessLookupError|" + DENIED),
    "writes outside its folder": ("open('VICTIM/mark', 'w').write('x')", DENIED),
    "writes through a link": ("import os\nos.symlink('VICTIM/mark', 'x')\nopen('x', 'w').write('x')", DENIED),
    "empties a file outside": ("import os\nos.truncate('VICTIM/secret', 0)", DENIED),
    "removes a file outside": ("import os\nos.remove('VICTIM/secret')", DENIED),
    "reads a file outside": ("print(open('VICTIM/secret').read())", DENIED),
    "100 MB file": ("with open('big', 'wb') as f:\n    for _ in range(100):\n        f.write(bytes(1 << 20))",
                    r"File too large"),
    "200 MB in many files": ("for i in range(20):\n    open(str(i), 'wb').write(bytes(10 << 20))",
                             r"No space left"),
    "TCP to a listener": ("import socket\nsocket.create_connection(('127.0.0.1', PORT), 2).send(b'x')",
                          DENIED + "|unreachable|refused"),
    "UDP to a listener": ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', "
                          "('127.0.0.1', PORT))", DENIED + "|unreachable"),
    "Unix socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect('VICTIM/socket')", DENIED),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef g(): return max([1], key=lambda _: g())\ng()",
        r"RecursionError|MemoryError|exit code 139"),
    "daemon (two forks, setsid)": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(60)\n    os._exit(0)\nos._exit(0)", DENIED),
    "starts a shell": ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo > VICTIM/mark'])", DENIED),
    "becomes another program": ("import os\nos.execv('/bin/true', ['true'])", DENIED),
    "atexit": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)", r"SystemExit"),
    "excepthook leaves with 0": (
        "import os, sys\nsys.excepthook = sys.unraisablehook = lambda *a: os._exit(0)", r"AssertionError"),
    "patches builtins, os, sys": ("""
import builtins, os, sys
for name in ("print", "exec", "compile", "AssertionError", "BaseException", "Exception", "type", "id"):
    setattr(builtins, name, lambda *a, **k: None)
os.write = os._exit = sys.exit = lambda *a: os.system("true")
""", r"exit code|AssertionError|TypeError"),
    "a timer that raises SystemExit": ("""
import signal, sys
def leave(*_): raise SystemExit(0)
signal.signal(signal.SIGALRM, leave)
signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
while True: pass""", r"SystemExit|exit code|AssertionError"),
    "closes every descriptor": ("import os\nos.closerange(0, 64)", r"ended before its tests, exit code 1"),
    "puts its own file in every descriptor's place": (
        "import os\nfd = os.open('mine', os.O_RDWR | os.O_CREAT)\nfor i in range(63):\n    os.dup2(fd, i)",
        r"ended before its tests, exit code 1"),
    "replaces __main__ and solution": ("""
import sys, types
sys.modules["__main__"] = sys.modules["solution"] = sys.modules["builtins"] = types.ModuleType("x")
globals()["__builtins__"] = {"f": lambda: 1}
""", r"AssertionError"),
    # other tracers, other interpreters, memory that is a file
    "jumps with sys.monitoring": (MONITOR, SHUT),
    "jumps with sys.monitoring, by another name": (MONITOR.replace(
        "mon.register_callback", "register = mon.register_callback\nregister"), SHUT),
    "a profiler": ("import sys\nsys.setprofile(lambda *a: None)", SHUT),
    "a profiler's timer": ("import cProfile\ncProfile.Profile(lambda: 1).enable()", SHUT + "|SystemError"),
    "a debugger": ("import bdb\nbdb.Bdb().set_trace()\n", SHUT),
    "jumps with a tracer of all threads": (JUMP.replace("sys.settrace(trace)", (
        "import threading\ngetattr(threading, 'settrace_all_threads', sys.settrace)(trace)")).replace("+ 3", "+ 4"),
        SHUT + "|AssertionError"),  # it may be told of no error
    "jumps, the audit hook's code replaced": (HOOK.format("one.__code__ = (lambda *_: None).__code__") + JUMP,
                                              r"__setattr__ is not for"),
    "jumps, the audit hook's defaults replaced": (HOOK.format("one.__defaults__ = (print,)") + JUMP, r"TypeError"),
    "jumps, the list of audit hooks emptied": (HOOK.format(
        "[x.clear() for x in gc.get_referrers(one) if type(x) is list]") + JUMP, r"settrace is not for"),
    "another interpreter": (INTERPRETER + "other.run_string(other.create(), 'import os; os._exit(0)')",
                            r"import is not for"),
    "another interpreter, asked for by a text that lies": (
        "class Name(str):\n    def startswith(self, *_):\n        return False\n"
        "import importlib\nimportlib.import_module(Name('_testcapi')).run_in_subinterp('')\nimport os\nos._exit(0)",
        r"import is not for"),
    "another interpreter of the old kind": (
        "import _testcapi\n_testcapi.run_in_subinterp('import os; os._exit(0)')", r"import is not for"),
    "an object from an address": ("import _ctypes\n_ctypes.PyObj_FromPtr(id(f))", r"ctypes\.\S+ is not for"),
    "C from a library": ("import ctypes\nctypes.CDLL('libc.so.6').syscall(319, b'x', 0)",
                         r"ctypes\.\S+ is not for"),
    "a memory file": ("import os\nos.memfd_create('x')", DENIED),
    "2 GB in memory files": ("import os\nfor i in range(200):\n    os.write(os.memfd_create(str(i)), bytes(10 << 20))",
                             DENIED),
    "native code from a memory file": (
        "import ctypes, os\nfd = os.memfd_create('x')\nwith open(os.__file__, 'rb') as f:\n"
        "    os.write(fd, f.read())\nctypes.CDLL(f'/proc/self/fd/{fd}')", DENIED),
    "shared memory": ("from multiprocessing import shared_memory\n"
                      "shared_memory.SharedMemory('nanotraj', True, 9)", DENIED + "|FileNotFoundError"),
    "a semaphore": ("import multiprocessing\nmultiprocessing.Lock()", DENIED + "|FileNotFoundError|OSError"),
    "leaves its namespaces": ("import os\nos.setns(os.open('/proc/self/ns/net', os.O_RDONLY))",
                              DENIED + "|FileNotFoundError|AttributeError"),
    "makes namespaces": ("import os\nos.unshare(os.CLONE_NEWUSER)", DENIED + "|AttributeError"),
    # what Landlock does not know: mode, owner, times and attributes of the user's own files
    "changes a mode": ("import os\nos.chmod('VICTIM/secret', 0)", SAME),
    "changes a folder's mode": ("import os\nos.chmod('VICTIM', 0)", SAME),
    "changes a mode through a folder": (
        "import os\nos.chmod('secret', 0, dir_fd=os.open('VICTIM', os.O_PATH))", SAME),
    "changes times": ("import os\nos.utime('VICTIM/secret', (1, 1))", SAME),
    "changes an owner": ("import os\nos.chown('VICTIM/secret', os.getuid(), os.getgid())", SAME),
    "adds an attribute": ("import os\nos.setxattr('VICTIM/secret', 'user.mark', b'x')", SAME),
    "removes an attribute": ("import os\nos.removexattr('VICTIM/secret', 'user.old')", SAME),
    "links a file outside": ("import os\nos.link('VICTIM/secret', 'x')", DENIED + "|OSError"),
    "renames to outside": ("import os\nopen('x', 'w').close()\nos.rename('x', 'VICTIM/mark')",
                           DENIED + "|OSError"),
    "makes a pipe outside": ("import os\nos.mkfifo('VICTIM/mark')", DENIED),
    "ends a bystander by its descriptor": (
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(BYSTANDER), 9)",
        DENIED + "|ProcessLookupError"),
    "limits a bystander": ("import resource as r\nr.prlimit(BYSTANDER, r.RLIMIT_NOFILE, (3, 3))",
                           DENIED + "|ProcessLookupError"),
    "raises its limits": ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))",
                          r"ValueError|" + DENIED),
}

# What the runner does not and cannot stop, as docs/code-runner.md says: these do pass.
CANNOT_STOP = {
    "an object equal to everything": "class Any:\n    __eq__ = lambda *_: True\ndef f():\n    return Any()",
    "reads what the tests expect": "import sys\nexpected = sys._getframe().f_code.co_consts\ndef f():\n"
                                   "    return [x for x in expected if type(x) is int][-1]",
}

# What needs help of the system, and any of which suffices (on Linux); the rest holds everywhere.
FILES, FORKS = ("Landlock",), ("seccomp", "unprivileged user")
NEEDS = {
    "writes outside its folder": FILES, "writes through a link": FILES, "empties a file outside": FILES,
    "removes a file outside": FILES, "reads a file outside": FILES, "200 MB in many files": ("namespaces",),
    "TCP to a listener": ("namespaces", "Landlock", "seccomp"),
    "UDP to a listener": ("namespaces", "seccomp"), "Unix socket": ("seccomp",),
    "kills a bystander": ("namespaces", "Landlock"),
    "kills its parent and group": ("namespaces", "Landlock"), "fork bomb": FORKS, "thread bomb": FORKS,
    "daemon (two forks, setsid)": FORKS, "starts a shell": FORKS,
    "becomes another program": ("Landlock", "seccomp"), "links a file outside": FILES,
    "renames to outside": FILES, "makes a pipe outside": FILES, "shared memory": FILES, "a semaphore": FILES,
    "a memory file": ("seccomp",), "2 GB in memory files": ("seccomp",),
    "native code from a memory file": ("seccomp",), "makes namespaces": ("seccomp",),
    "leaves its namespaces": ("seccomp", "Landlock"),
    "ends a bystander by its descriptor": ("namespaces", "Landlock"),
    "limits a bystander": ("namespaces",),
    **dict.fromkeys(("changes a mode", "changes a folder's mode", "changes a mode through a folder",
                     "changes times", "changes an owner", "adds an attribute", "removes an attribute"),
                    ("seccomp",))}


class Scene:
    """A folder anyone may write to, listeners, and a bystander; `marks` says what an attack on the copied() runner
    `module` has left.
    """
    def __init__(self, module):
        self.module = module

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.victim = Path(self.folder.name)
        self.victim.chmod(0o777)
        (self.victim / "secret").write_text("secret")
        (self.victim / "secret").chmod(0o666)
        with suppress(OSError):  # not every file system has these
            os.setxattr(self.victim / "secret", "user.old", b"x")
        self.before = self.about()
        self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp.bind(("127.0.0.1", 0))
        self.udp.bind(self.tcp.getsockname())
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.victim / "socket"))
        (self.victim / "socket").chmod(0o777)
        self.bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        for s in (self.tcp, self.unix):
            s.listen()
        for s in (self.tcp, self.unix, self.udp):
            s.setblocking(False)
        return self

    def __exit__(self, *_):
        self.bystander.kill()
        self.bystander.wait()
        for s in (self.tcp, self.udp, self.unix):
            s.close()
        self.folder.cleanup()

    def fill(self, program):
        for word, value in (("VICTIM", self.victim), ("BYSTANDER", self.bystander.pid),
                            ("PORT", self.tcp.getsockname()[1])):
            program = program.replace(word, str(value))
        return program

    def about(self):
        """What may be changed of a file without writing into it."""
        said = [(s.st_mode, s.st_uid, s.st_gid) for s in map(os.stat, (self.victim, self.victim / "secret"))]
        with suppress(OSError):
            said += os.listxattr(self.victim / "secret")
        return said, os.stat(self.victim / "secret").st_mtime_ns

    def marks(self):
        found = []
        same = False
        with suppress(OSError):
            same = self.about() == self.before
        if not same:
            found.append("a changed mode, owner, time or attribute")
            for path, mode in ((self.victim, 0o777), (self.victim / "secret", 0o666)):
                with suppress(OSError):
                    path.chmod(mode)
        if sorted(p.name for p in self.victim.iterdir()) != ["secret", "socket"]:
            found.append("a file outside")
        if (self.victim / "secret").exists() and (self.victim / "secret").read_text() != "secret":
            found.append("a changed file")
        for s, take in ((self.tcp, "accept"), (self.unix, "accept"), (self.udp, "recv")):
            try:
                getattr(s, take)(*[9] * (take == "recv"))
                found.append("a connection")
            except BlockingIOError:
                pass
        if self.bystander.poll() is not None:
            found.append("a dead bystander")
        end = time.monotonic() + 1  # what was killed may take a moment to die
        while (left := survivors(self.module)) and time.monotonic() < end:
            time.sleep(0.02)
        if left:
            found.append(f"processes {left}")
        return ", ".join(found)


@contextmanager
def copied(changes=()):
    """runner.py with some text replaced, from a folder of its own: whose processes are its is told by the path, while
    other tests run programs, too.
    """
    source = Path(runner.__file__).read_text()
    for good, bad in changes:
        assert source.count(good) == 1, good
        source = source.replace(good, bad)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(os.path.realpath(folder)) / "copied_runner.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("copied_runner", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def survivors(module):
    """Processes of a copied() runner that are still there -> pids (Linux)."""
    script, found = module.__file__.encode(), []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if script in line.read_bytes().split(b"\0"):
                found.append(int(line.parent.name))
        except OSError:
            pass
    return found


def attack(module, name, scene):
    """-> (contained, what was seen). module: a copied() runner."""
    program, expected = ATTACKS[name]
    timeout = 1 if expected == SLOW else 5
    began = time.perf_counter()
    verdict = module.run_program(SOLVES_NOTHING + scene.fill(program), TESTS, timeout)
    spent, marks = time.perf_counter() - began, scene.marks()
    stopped = re.search(expected, verdict.why) and spent < timeout + 4
    seen = "passed" if verdict.passed else verdict.why
    return bool(not verdict.passed and stopped and not marks), seen + (f"; left {marks}" if marks else "")


def attack_all():
    """-> {uid, containment, attacks: {name: (contained, what was seen)}}; not what nothing would stop."""
    active = runner.containment()
    names = [n for n in ATTACKS if n not in NEEDS or any(active[measure] for measure in NEEDS[n])]
    with copied() as module, Scene(module) as scene:
        return dict(uid=os.getuid(), containment=active, attacks={n: attack(module, n, scene) for n in names})


if __name__ == "__main__":
    print(json.dumps(attack_all()))
