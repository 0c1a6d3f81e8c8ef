"""Training: two processes as one, kill and resume, what is written, and the messages for bad settings."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train
from config import InputError
from model import load_checkpoint, save_checkpoint


def losses(folder):
    with open(folder / "log.csv") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def test_two_processes_are_one_with_twice_the_batch(run, tiny_data, tiny, tmp_path):
    run("train.py", *tiny, f"data={tiny_data}", f"out={tmp_path}/one")
    run("train.py", *tiny, f"data={tiny_data}", f"out={tmp_path}/two", "batch_size=1", processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one[6] < one[1]
    assert one == pytest.approx(two, abs=1e-4)


def test_kill_and_resume(run, tiny_data, tiny, tmp_path):
    """kill -9 in mid-training; resumed, the losses are those of a run that nobody killed."""
    words = [*tiny, f"data={tiny_data}", "steps=40"]
    run("train.py", *words, f"out={tmp_path}/whole")
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words, f"out={tmp_path}/killed"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "state.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= len(losses(tmp_path / "killed")) < 40
    run("train.py", *words, f"out={tmp_path}/killed", "resume=true")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = (load_checkpoint(tmp_path / name / "last")[0].state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_early_stopping_and_variants(run, tiny_data, tiny, tmp_path):
    done = run("train.py", *tiny, f"data={tiny_data}", f"out={tmp_path}/a", "lr=0.5", "min_lr=0.5", "steps=60", "warmup=1",
               "patience=2", "alignment=none", "speaker_embedding=false", "user_weight=0", "prompt_text=true",
               "first_frame=false", "delay=0")
    assert "stopped: no better validation loss in 2 evaluations" in done.stdout
    model, _, fmt, _ = load_checkpoint(tmp_path / "a" / "best")
    assert model.speaker_size == 0 and (fmt.alignment, fmt.delay) == ("none", 0)


def refuses(message, *words):
    with pytest.raises(InputError, match=re.escape(message)):
        train.main([str(word) for word in words])


def test_bad_settings(fails, tiny_data, tmp_path):
    (tmp_path / "unknown.yaml").write_text("learning_rate: 0.1\n")
    (tmp_path / "type.yaml").write_text("steps: many\n")
    fails("unknown setting 'learning_rate'", "train.py", tmp_path / "unknown.yaml")
    refuses("'steps' must be int, not 'many'", tmp_path / "type.yaml")
    refuses("did you mean 'batch_size'", "batch_sise=3")
    refuses("outside 0..9", f"data={tiny_data}", "codebook_size=10", f"out={tmp_path}/x")
    refuses("there is no", f"data={tiny_data}", "resume=true", f"out={tmp_path}/none")
    (tiny_data / "info.json").write_text('{"codebook_size": 64}')
    refuses("set codebook_size=64", f"data={tiny_data}", f"out={tmp_path}/x")
    (tiny_data / "info.json").unlink()


def test_codec_and_speaker_encoder_travel_with_the_checkpoint(tiny_data, tiny, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    made = {"codec_fingerprint": "a1", "speaker_encoder": "ecapa", "speaker_size": 192}
    info = {"codebook_size": 64, "codec": "x.nemo"} | made
    (tmp_path / "data" / "info.json").write_text(json.dumps(info))
    words = [*tiny, f"data={tmp_path}/data", "steps=1", "accumulation=1"]
    train.main([*words, f"out={tmp_path}/a"])
    assert made.items() <= json.loads((tmp_path / "a" / "best" / "config.json").read_text()).items()
    (tmp_path / "data" / "info.json").write_text(json.dumps(info | {"codec_fingerprint": "b2"}))
    refuses("trained with another codec_fingerprint a1 (now b2)", *words, f"out={tmp_path}/b", f"init={tmp_path}/a/best")


def test_checkpoint_that_does_not_fit(tmp_path, dialogues):
    from conftest import GOLDEN
    model, tokenizer, fmt, config = load_checkpoint(GOLDEN / "checkpoint")
    save_checkpoint(tmp_path / "saved", model, tokenizer, fmt, {})
    again = load_checkpoint(tmp_path / "saved")[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    text = (tmp_path / "saved" / "config.json").read_text()
    for old, new, message in (('"hidden_size": 64', '"hidden_size": 32', "do not fit config.json"),
                              ('"num_dsus": 4', '"num_dsus": 8', "says num_dsus=8"),
                              ('"num_hidden_layers": 2', '"num_hidden_layers": 3', "missing")):
        assert old in text
        (tmp_path / "saved" / "config.json").write_text(text.replace(old, new))
        with pytest.raises(InputError, match=message):
            load_checkpoint(tmp_path / "saved")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)
