"""Shared by the tests: the golden files, tiny settings, and a way to run a script as a user does."""
import json
import os
import subprocess
import sys
from pathlib import Path

# before datasets and the hub's library are imported, which read it once: without, every test of a hub id tries the network
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import datasets  # noqa: E402
import pytest  # noqa: E402

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # else 5 s at the end of every shuffled epoch of a stream
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"  # test_golden.py alone reads FACTOR_GOLDEN
TINY = {"codebook_size": 64, "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate": 64, "vocab_size": 600,
        "alignment": "word", "steps": 6, "eval_every": 2, "warmup": 2, "lr": 1e-3, "accumulation": 2, "batch_size": 2}


@pytest.fixture
def run():
    """run("train.py", "key=value", ...) -> CompletedProcess; launcher="torchrun" for several processes."""
    def call(script, *words, processes=1, check=True):
        launch = (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [])
        done = subprocess.run([sys.executable, *launch, str(ROOT / script), *map(str, words)], cwd=ROOT,
                              capture_output=True, text=True, timeout=240)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done
    return call


@pytest.fixture
def fails(run):
    """fails(message, script, words...): the script ends with one clear line that holds `message`, and no traceback."""
    def call(message, script, *words):
        done = run(script, *words, check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith(f"{script}: ") and message in last, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
    return call


def write_split(folder, dialogues, split, file=0, files=1):
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(dialogues).to_parquet(folder / f"{split}-{file:05d}-of-{files:05d}.parquet")


@pytest.fixture(scope="session")
def dialogues():
    return json.loads((GOLDEN / "dialogues.json").read_text())


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, dialogues):
    """The golden dialogues as a prepared data set."""
    folder = tmp_path_factory.mktemp("data")
    for split, part in (("train", dialogues), ("validation", dialogues[-3:]), ("test", dialogues[:3])):
        write_split(folder, part, split)
    return folder


@pytest.fixture(scope="session")
def tiny():
    return [f"{key}={value}" for key, value in TINY.items()]
