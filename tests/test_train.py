"""Training: several processes as one, kill and resume, what is written, and the messages for bad settings."""
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
from conftest import GOLDEN, ROOT
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import train
from codec import load_codec
from config import InputError
from model import load_checkpoint, save_checkpoint


def losses(folder):
    with open(folder / "log.csv") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def test_two_processes_are_one_with_twice_the_batch(run, tiny_data, tiny, tmp_path):
    """Gloo on the CPU: two processes, and two "machines" of two, give the losses of one process with all their dialogues."""
    words = [*tiny, f"data={tiny_data}", "steps=3", "limit=6"]
    train.main([*words, f"out={tmp_path}/one", "batch_size=4"])
    run("train.py", *words, f"out={tmp_path}/two", "batch_size=2", processes=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machine = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", str(ROOT / "train.py"), *words, f"out={tmp_path}/four",
               "batch_size=1"]
    both = [subprocess.Popen(machine, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    assert "parameters on 4 x cpu" in "".join(printed)
    one, two, four = (losses(tmp_path / name) for name in ("one", "two", "four"))
    assert len(one) == 3 and one[3] < one[1]
    assert one == pytest.approx(two, abs=1e-4) and one == pytest.approx(four, abs=1e-4)


def test_streamed_run_resumes(tiny_data, tiny, tmp_path):
    """A streamed run that goes on has the losses of one that was not interrupted, also in the middle of an epoch."""
    words = [*tiny, f"data={tiny_data}", "streaming=true", "accumulation=1", "warmup=0", "min_lr=1e-3"]
    train.main([*words, f"out={tmp_path}/whole", "steps=8"])
    train.main([*words, f"out={tmp_path}/part", "steps=4"])
    train.main([*words, f"out={tmp_path}/part", "steps=8", "resume=true"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "part") and len(losses(tmp_path / "part")) == 8


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
    model, tokenizer, fmt, config = load_checkpoint(GOLDEN / "checkpoint")
    save_checkpoint(tmp_path / "saved", model, tokenizer, fmt, {})
    golden, ours = load_file(GOLDEN / "checkpoint" / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in golden.items()}
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert all(settings[key] == value for key, value in config.items() if value is not None)  # the authors' program reads it
    again = load_checkpoint(tmp_path / "saved")[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    text = (tmp_path / "saved" / "config.json").read_text()
    for old, new, message in (('"hidden_size": 64', '"hidden_size": 32', "do not fit config.json"),
                              ('"num_dsus": 4', '"num_dsus": 8', "says num_dsus=8"),
                              ('"num_hidden_layers": 2', '"num_hidden_layers": 3', "9 of .* tensors are missing")):
        assert old in text
        (tmp_path / "saved" / "config.json").write_text(text.replace(old, new))
        with pytest.raises(InputError, match=message):
            load_checkpoint(tmp_path / "saved")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)


def test_checkpoint_in_several_files(tmp_path):
    """As transformers splits a large one: shards and an index that says which tensor is where."""
    model, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint")
    save_checkpoint(tmp_path, model, tokenizer, fmt, {})
    tensors = load_file(tmp_path / "model.safetensors")
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({name: tensors[name] for name in tensors if where[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    again = load_checkpoint(tmp_path)[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match="not a readable checkpoint .*model-00002-of-00002"):
        load_checkpoint(tmp_path)


def hub_error(kind):
    """An error as the hub's library raises it (those about an answer of the server want that answer)."""
    return kind("said so") if issubclass(kind, (FileNotFoundError, ConnectionError)) else kind.__new__(kind)


@pytest.mark.parametrize("kind, message", [
    (errors.GatedRepoError, "it is gated: accept its terms on its page of the hub, then set HF_TOKEN"),
    (errors.RepositoryNotFoundError, "neither a path here nor a repository of the hub, or a private one"),
    (errors.RemoteEntryNotFoundError, "lacks a file that is needed"),
    (errors.LocalEntryNotFoundError, "the hub cannot be reached: check the path, the network and HF_HUB_OFFLINE"),
    (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
])
def test_what_the_hub_refuses(kind, message, monkeypatch, tmp_path):
    """Checkpoint, codec, data set and backbone: every case of failure has a line of its own that says what to do."""
    def refuse(*_, **__):
        try:
            raise hub_error(kind)
        except Exception as e:
            raise OSError("wrapped, as transformers and datasets do") from e
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr(train.AutoTokenizer, "from_pretrained", refuse)
    for load in (lambda: load_checkpoint("maikezu/f-actor"), lambda: load_codec("nvidia/nemo-nano-codec"),
                 lambda: train.load_dialogues("maikezu/data", "train"),
                 lambda: train.load_backbone(train.Config(backbone="a/b"))):
        with pytest.raises(InputError, match=re.escape(message)):
            load()


def test_no_network():
    """The hub's own libraries, told that there is no network."""
    for load in (lambda: load_checkpoint("maikezu/f-actor"), lambda: load_codec("nvidia/nemo-nano-codec"),
                 lambda: train.load_dialogues("maikezu/data", "train"),
                 lambda: train.load_dialogues("maikezu/data", "train", True)):
        with pytest.raises(InputError, match="the hub cannot be reached"):
            load()
