"""Run a program that a model wrote, and its tests, in a contained child process.
Run as a script this file is that child: it imports nothing of ours. What contains it: docs/code-runner.md.
A pass is exit code 0 and a random word that the child says after the last test. While the program runs it is
only on the value stack of a suspended expression (see `run`), in no file, argument, descriptor, module or
frame; an audit hook shuts out tracers and ctypes, and each function loads the C library for itself."""
import ast
import ctypes
import json
import os
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import types
from collections import namedtuple
from contextlib import suppress

Verdict = namedtuple("Verdict", "passed why")
LIMITS = dict(AS=1 << 30, FSIZE=16 << 20, NOFILE=64, CORE=0, NPROC=0)  # bytes, bytes, and counts
ENV = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # all there is: a program may not start threads
NOBODY = 65534
WORD = 32  # characters
TIMED_OUT = 124  # exit code
TIMEOUT = 10  # seconds a program and its tests may take, of wall time and of CPU time
LINUX = sys.platform == "linux"
NAMESPACES, NEWUSER = 0x68020000, 0x10000000  # CLONE_NEWNET, NEWPID, NEWIPC and NEWNS
# refused: fork vfork clone clone3 execve execveat socket (a Unix one leaves a network namespace) ptrace
# process_vm_readv process_vm_writev open_by_handle_at io_uring_setup memfd_create memfd_secret unshare setns
# keyctl add_key request_key bpf perf_event_open userfaultfd; pretended: all chmod chown utime setxattr
SYSCALLS = {
    "x86_64": (0xC000003E,
        "57 58 56 435 59 322 41 101 310 311 304 425 319 447 272 308 250 248 249 321 298 323",
        "90 91 268 452 92 93 94 260 132 235 261 280 188 189 190 197 198 199 463 466 469"),
    "aarch64": (0xC00000B7,
        "220 435 221 281 198 117 270 271 265 425 279 447 97 268 219 217 218 280 241 282",
        "52 53 452 54 55 88 5 6 7 14 15 16 463 466 469"),
}


def run_program(program, tests, timeout=TIMEOUT):
    """Run a program (the first of a list that compiles), then tests in its module -> Verdict(passed, why)."""
    if not tests.strip():
        return Verdict(False, "no test checks anything")
    word = secrets.token_hex(WORD // 2)
    programs = [program] if isinstance(program, str) else program
    code, said = child_says(dict(programs=programs, tests=tests, timeout=timeout), timeout, word)
    if said == word and code == 0:
        return Verdict(True, "")
    if code == TIMED_OUT:
        return Verdict(False, f"took more than {timeout} s")
    why = "".join(c if c.isprintable() else " " for c in said)[:200].strip()
    return Verdict(False, why if why and code == 1 else f"ended before its tests, exit code {code}")


def containment():
    """What contains a program on this machine -> {measure: True, False or words}: a child tells."""
    return json.loads(child_says(dict(report=True, timeout=TIMEOUT), TIMEOUT)[1])


def child_says(task, timeout, word=""):
    """Start this file as a process -> (exit code, the first 4096 characters that it says)."""
    with (tempfile.TemporaryDirectory(prefix="nanotraj-", ignore_cleanup_errors=True) as cwd,
          tempfile.TemporaryFile() as said):  # not a pipe, which a program could flood or keep open
        env = ENV | {k: v for k, v in os.environ.items() if k == "SYSTEMROOT"}  # Windows needs it
        command = [sys.executable, "-I", "-B", "-Xutf8", os.path.abspath(__file__)]
        line = json.dumps(task)  # ASCII
        try:  # the child keeps the time; what it forked dies with it (PR_SET_PDEATHSIG)
            child = subprocess.run(command, cwd=cwd, env=env, stdout=said, stderr=said, timeout=timeout + 5,
                                   input=f"{len(line):8}{line}{word}".encode(), start_new_session=True)
        except subprocess.TimeoutExpired:
            return TIMED_OUT, ""
        said.seek(0)
        return child.returncode, said.read(4096).decode(errors="replace")


def child():
    task = json.loads(take(int(take(8))))  # the word stays in the pipe
    said, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    active = {"own process, empty environment and folder": True, "time limit": f"{task['timeout']} s"}
    if os.name == "posix":
        active["namespaces"] = LINUX and enter_namespaces()
        pid = os.fork()  # a pid namespace begins with the next process, and someone has to keep the time
        if pid:
            os._exit(watch(pid, task["timeout"]))
        os.setsid()
        active["unprivileged user"] = drop_root()
        active["limits"] = set_limits(task["timeout"])
        active["Landlock"], active["seccomp"] = LINUX and landlock(), LINUX and forbid_syscalls()
    if task.get("report"):
        os.write(said, json.dumps(active).encode())
        os._exit(0)
    run(task["programs"], task["tests"], said)


def take(n):
    """n bytes of standard input, unbuffered."""
    got = b""
    while len(got) < n:
        got += os.read(0, n - len(got)) or sys.exit("runner.py is run by itself only: import it")
    return got


def watch(pid, timeout):
    """Wait for a process and end its group -> its exit code, 128 + the signal that ended it, or TIMED_OUT."""
    def kill(*_, end=os.kill):
        with suppress(OSError):
            end(pid, signal.SIGKILL)
    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    kill(end=os.killpg)
    return TIMED_OUT if not left else code if code >= 0 else 128 - code


def shut(event, args, error=RuntimeError):
    """The audit hook: Python code cannot take it off, nor change its code. What it compares are constants."""
    closed = event.startswith(("ctypes.", "sys.settrace", "sys.setprofile", "sys.monitoring."))
    if event == "import":  # no other interpreter; a str of the program's own kind becomes a plain one
        closed = "".join(args[:1]).startswith(("_interp", "_xx", "_test"))
    if event == "object.__setattr__":  # asyncio sets that of other functions
        closed = args[1] == "__code__" and args[0].__code__.co_name == "shut"
    if closed and event != "ctypes.dlopen":  # that is needed to import ctypes (pandas does)
        raise error(f"{event} is not for a graded program")


def is_words(node):
    """Whether a statement is prose behind a program: 'Done', 'Time: O(1)', '- O(1)'; no docstring."""
    if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        idle = {ast.Call, ast.NamedExpr}.isdisjoint(map(type, ast.walk(node)))
        return idle or isinstance(node.value, ast.UnaryOp)
    return isinstance(node, ast.AnnAssign) and not node.value


def run(programs, tests, said):
    """Run the first program that compiles and its tests; say the word, or what went wrong. Never returns."""
    try:
        for program in programs:
            with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
                compile(program, "solution.py", "exec")
                break
        compile(program, "solution.py", "exec")
        compile(tests, "tests.py", "exec")  # on their own, lest they become part of the program's last block
        solution = types.ModuleType("solution")
        sys.modules["__main__"] = sys.modules["solution"] = solution
        scope = vars(solution)
        tree = ast.parse(f"{program}\n{tests}")
        tree.body = [node for node in tree.body if not is_words(node)]
        code = compile(tree, "solution.py", "exec")
        leave, write, execute = os._exit, os.write, exec
        sys.addaudithook(shut)
        # All names are looked up before the program starts. take(WORD) reads the word, which waits on the
        # value stack, unseen by frames and gc, until execute() returns None and word[None:] is written.
        leave(write(said, take(WORD)[execute(code, scope):]) - WORD)
    except BaseException as e:  # the word is gone with the expression
        os.write(said, f"{type(e).__name__}: {e}".encode(errors="replace"))
    finally:
        os._exit(1)


def enter_namespaces():
    """No network, no other process in sight, a folder in 64 MB of memory -> words, False if not permitted."""
    libc = ctypes.CDLL(None)
    uid, gid = os.getuid(), os.getgid()
    names = "network, pid, ipc, mount"
    if libc.unshare(NAMESPACES):  # root may do so at once, anyone else inside a user namespace
        if libc.unshare(NAMESPACES | NEWUSER):
            return False
        names += ", user"
        for file, line in dict(setgroups="deny", uid_map=f"{uid} {uid} 1", gid_map=f"{gid} {gid} 1").items():
            with suppress(OSError), open(f"/proc/self/{file}", "w") as f:
                f.write(line)
    private, plain, cwd = 0x44000, 0xE, os.getcwd().encode()  # recursively; plain: no suid, device, exec
    if not (libc.mount(None, b"/", None, private, None)
            or libc.mount(b"tmpfs", cwd, b"tmpfs", plain, b"size=64m,mode=700")):
        os.chdir(cwd)
        names += "; 64 MB folder"
    return names


def drop_root():
    """Root becomes nobody, and every capability goes -> True, or False where root has to stay root."""
    keep, libc = 0, LINUX and ctypes.CDLL(None)  # keep: the right to read any file, for a Python in /root
    if os.geteuid() == 0:
        for path in map(os.path.realpath, (os.__file__, sys.prefix + "/lib")):
            while (path := os.path.dirname(path)) != os.path.dirname(path):
                keep = keep if os.stat(path).st_mode & 0o5 == 0o5 else 4  # CAP_DAC_READ_SEARCH
        with suppress(OSError):
            if LINUX:
                libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
            os.setgroups([])
            os.setgid(NOBODY)
            os.chown(".", NOBODY, NOBODY)
            os.setuid(NOBODY)
    if LINUX:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with whoever keeps the time
        libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self/mem is root's
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        libc.capset(struct.pack("2I", 0x20080522, 0), struct.pack("2I16x", keep, keep))
    return os.geteuid() != 0


def set_limits(timeout):
    """-> the limits that hold, in words. NPROC 0: no new process or thread, which does not bind root."""
    import resource
    held = []
    for name, value in {**LIMITS, "CPU": int(timeout) + 1}.items():
        with suppress(AttributeError, ValueError, OSError):  # not every system has every limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
            held.append(f"{name} {value}")
    return ", ".join(held)


def landlock():
    """Write only in the folder, read only there and in libraries -> words, or False: the kernel has none."""
    libc = ctypes.CDLL(None)
    create, add, restrict = 444, 445, 446  # the same numbers on every architecture
    abi = libc.syscall(create, None, 0, 1)
    if abi < 1:
        return False
    files = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1  # every right that this version knows
    rules = struct.pack("QQQ", files, 3, 3)[:8 + 8 * (abi >= 4) + 8 * (abi >= 6)]  # files, TCP, signals out
    ruleset = libc.syscall(create, rules, len(rules), 0)
    run_file, write_file, read_file, read_dir = 1, 2, 4, 8
    libraries = {"/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)}
    allowed = {**dict.fromkeys(libraries, read_file | read_dir), ".": files & ~run_file,
               "/etc/ld.so.cache": read_file, "/etc/localtime": read_file, "/dev/urandom": read_file,
               "/dev/null": read_file | write_file}
    for path, rights in allowed.items():
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH)
            if libc.syscall(add, ruleset, 1, struct.pack("=Qi", rights, fd), 0):
                return False
            os.close(fd)
    restricted = libc.syscall(restrict, ruleset, 0) == 0
    os.close(ruleset)
    return restricted and f"ABI {abi}"


def forbid_syscalls():
    """A seccomp filter: what SYSCALLS lists fails with 'not permitted', for root as well -> bool."""
    arch, *calls = SYSCALLS.get(os.uname().machine, [None])
    if not calls:
        return False
    load, equal, greater, ret = 0x20, 0x15, 0x35, 0x06
    kill, deny, pretend, allow = 0x80000000, 0x00050001, 0x00050000, 0x7FFF0000
    lines = [(load, 0, 0, 4), (equal, 1, 0, arch), (ret, 0, 0, kill), (load, 0, 0, 0)]
    rules = [(greater, 1 << 30, deny)]  # x86's second table of calls
    for numbers, verdict in zip(calls, (deny, pretend)):
        rules += [(equal, int(n), verdict) for n in numbers.split()]
    for test, n, verdict in rules:
        lines += [(test, 0, 1, n), (ret, 0, 0, verdict)]
    lines.append((ret, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HP", len(lines), ctypes.addressof(code))  # struct sock_fprog
    return ctypes.CDLL(None).prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    child()
