"""Shared by the tests: golden files, tiny settings, and a way to run a script as a user does."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# before datasets and the hub's library are imported, which read it once: without, every test of a
# hub id tries the network
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import datasets  # noqa: E402
import pytest  # noqa: E402

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # else 5 s at the end of a shuffled stream
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"  # test_golden.py alone reads FACTOR_GOLDEN
TINY = {"codebook_size": 64, "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 2,
        "intermediate": 64, "vocab_size": 600, "alignment": "word", "steps": 6, "eval_every": 2,
        "warmup": 2, "lr": 1e-3, "accumulation": 2, "batch_size": 2}


def finish(process, seconds=240):
    """Wait for a process that was started with start_new_session=True. If that takes too long, end
    it and what it has started, and raise. Returns (stdout, stderr)."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, which are in sessions of their own
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.fixture
def run():
    """run("train.py", "key=value", processes=1) -> CompletedProcess; by torchrun if several."""
    def call(script, *words, processes=1, check=True):
        command = [sys.executable, str(ROOT / script), *map(str, words)]
        if processes > 1:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone",
                            f"--nproc_per_node={processes}"]
        process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        done = subprocess.CompletedProcess(command, None, *finish(process))
        done.returncode = process.returncode
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done
    return call


@pytest.fixture
def fails(run):
    """fails(message, script, words...): the script ends with one clear line that holds `message`,
    and no traceback."""
    def call(message, script, *words):
        done = run(script, *words, check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith(f"{script}: "), done.stderr[-2000:]
        assert message in last and "Traceback" not in done.stderr, done.stderr[-2000:]
    return call


def write_split(folder, dialogues, split, file=0, files=1):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}-{file:05d}-of-{files:05d}.parquet"
    datasets.Dataset.from_list(dialogues).to_parquet(path)


@pytest.fixture(scope="session")
def dialogues():
    return json.loads((GOLDEN / "dialogues.json").read_text())


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, dialogues):
    """The golden dialogues as a prepared data set."""
    folder = tmp_path_factory.mktemp("data")
    for split, part in (("train", dialogues), ("validation", dialogues[-3:]),
                        ("test", dialogues[:3])):
        write_split(folder, part, split)
    return folder


@pytest.fixture(scope="session")
def tiny():
    return [f"{key}={value}" for key, value in TINY.items()]
