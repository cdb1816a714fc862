"""Ranks that start in a tenth of a second: forked from a process that has imported everything."""
import multiprocessing
import os
import runpy
import socket
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["forked"])


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def script(file, args, env, log, cwd):
    """Become `python file args`, whose output goes to a file."""
    os.chdir(cwd)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ.update(env)
    sys.argv = [str(file), *map(str, args)]
    runpy.run_path(str(file), run_name="__main__")


def start(world, file, *args, log, cwd=".", **env):
    """The processes of a launch, as torchrun's on one machine; one alone is as python starts it. log: a file
    for what they say."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.path.dirname(HERE)])  # of the first one, and so of all
    envs = [env]
    if world > 1:
        env |= dict(WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
        envs = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    ranks = [context.Process(target=script, daemon=True, args=(file, args, env, log, cwd)) for env in envs]
    for rank in ranks:
        rank.start()
    os.environ.pop("PYTHONPATH")
    os.environ |= {"PYTHONPATH": path} if path else {}
    return ranks


def launch(world, file, *args, **how):
    """Start them and wait -> their exit codes. As torchrun does, one that fails ends the others."""
    ranks = start(world, file, *args, **how)
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.is_alive()], 600)
    for rank in ranks:
        if any(r.exitcode for r in ranks):
            rank.join(5)
            rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]
