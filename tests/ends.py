"""Does a run of several processes always end? A script, not a test of the suite: it takes long.

    python tests/ends.py [ends=200] [processes=4] [limit=60] [busy=2] [torchrun=true] [train=PATH]

Trains a tiny model on the golden dialogues `ends` times, to the last line of train.py, while `busy`
processes keep the machine busy. Every run that takes longer than `limit` seconds is ended from
outside and reported; one of these, or one that fails, makes the exit status 1. Ctrl-C or TERM stops
the loop, and what was seen until then is summed up.

torchrun=true starts every run by torchrun; most of the time then goes to four times the imports.
Without it this process imports everything once and forks, with torchrun's environment and store:
train.py still runs as __main__, and nothing of its end is left out.
"""
import json
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from conftest import GOLDEN, ROOT, TINY, write_split
from tqdm import tqdm

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@dataclass
class Config:
    ends: int = 200
    processes: int = 4
    limit: float = 60.0  # seconds; longer is a hang
    busy: int = 2  # processes that do nothing but work
    torchrun: bool = False
    train: str = str(ROOT / "train.py")  # another version's, to compare


def work_forever():
    while True:
        sum(range(100_000))


def start_torchrun(cfg, words, log):
    """One run, started as a user does. Returns its process ids: the launcher's."""
    return [subprocess.Popen([*LAUNCH, f"--nproc_per_node={cfg.processes}", cfg.train, *words],
                             stdout=log, stderr=log, start_new_session=True).pid]


def start_forked(cfg, words, log, port):
    """One run whose processes are forked from this one, with all that torchrun tells a process:
    its rank, and the launcher's store. Returns their process ids."""
    pids = []
    for rank in range(cfg.processes):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(cfg.processes),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True")
            sys.argv = [cfg.train, *words]
            try:
                runpy.run_path(cfg.train, run_name="__main__")
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    return pids


def wait(pids, limit):
    """Wait for processes, at most `limit` seconds together, then end them with their groups.
    Returns what to say of them: "" if all ended well in time."""
    deadline, problem, left = time.time() + limit, "", list(pids)
    try:
        while left and time.time() < deadline:
            for pid in list(left):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    left.remove(pid)
                    code = os.waitstatus_to_exitcode(status)
                    problem = problem or (f"exit status {code}" if code else "")
            time.sleep(0.05)
    finally:  # also where this script is stopped
        for pid in left:
            problem = f"{len(left)} of {len(pids)} processes still there after {limit:.0f} s"
            os.killpg(pid, signal.SIGTERM)  # on KILL, torchrun would leave its processes behind
        for pid in left:
            os.waitpid(pid, 0)
    return problem


def write_data(folder):
    """A data set of a few golden dialogues, and the settings of a run on it, as words."""
    dialogues = json.loads((GOLDEN / "dialogues.json").read_text())
    for split in ("train", "validation"):
        write_split(folder / "data", dialogues[:8], split)
    settings = TINY | {"steps": 2, "eval_every": 2, "accumulation": 1, "batch_size": 1,
                       "data": folder / "data"}
    return [f"{key}={value}" for key, value in settings.items()]


def one_end(cfg, words, log):
    """Start a run and wait for its end. Returns what to say of it, as `wait` does."""
    import torch.distributed as dist
    if cfg.torchrun:
        return wait(start_torchrun(cfg, words, log), cfg.limit)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return wait(start_forked(cfg, words, log, store.port), cfg.limit)


def summary(cfg, seconds, bad):
    middle = sorted(seconds)[len(seconds) // 2] if seconds else math.nan
    return (f"{len(seconds)} of {cfg.ends} ends of {cfg.processes} processes, {bad} of them bad; "
            f"seconds: median {middle:.1f}, longest {max(seconds, default=math.nan):.1f}; "
            f"load {os.getloadavg()[0]:.1f}")


def stop(number, frame):
    raise KeyboardInterrupt


def main(argv):
    sys.path.insert(0, str(Path(argv_train(argv)).parent))
    # so that the forked processes have them
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import train  # noqa: F401
    from config import load_settings
    cfg = load_settings(Config, argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads before the fork
    busy = [multiprocessing.Process(target=work_forever, daemon=True) for _ in range(cfg.busy)]
    for process in busy:
        process.start()
    signal.signal(signal.SIGTERM, stop)
    folder = Path(tempfile.mkdtemp())
    words, seconds, bad = write_data(folder), [], 0
    try:
        bar = tqdm(range(cfg.ends), unit="end", smoothing=0)
        for end in bar:
            began = time.time()
            with open(folder / f"{end}.log", "wb") as log:
                problem = one_end(cfg, [*words, f"out={folder}/{end}"], log)
            seconds.append(time.time() - began)
            if problem:
                bad += 1
                bar.write(f"end {end}: {problem}; see {folder}/{end}.log")
            bar.set_postfix(slowest=f"{max(seconds):.1f}s", bad=bad)
    except KeyboardInterrupt:
        bar.close()
    print(summary(cfg, seconds, bad))
    return bool(bad) or len(seconds) < cfg.ends


def argv_train(argv):
    """The version whose modules are to be imported, before anything of it is."""
    return next((word.partition("=")[2] for word in argv if word.startswith("train=")),
                str(ROOT / "train.py"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
