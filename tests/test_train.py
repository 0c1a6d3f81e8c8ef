"""Training: several processes as one, kill and resume, what is written, and the messages for bad
settings."""
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
import unittest.mock

import huggingface_hub
import pytest
import torch
from conftest import GOLDEN, ROOT, finish, write_split
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import train
from codec import load_codec
from config import InputError
from model import load_checkpoint, save_checkpoint


def losses(folder):
    with open(folder / "log.csv") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def test_two_processes_are_one_with_twice_the_batch(run, tiny_data, tiny, tmp_path):
    """Gloo on the CPU: two processes, and two "machines" of two, give the losses of one process
    with all their dialogues."""
    words = [*tiny, f"data={tiny_data}", "steps=3", "limit=6", "wrong_history=0.5"]
    train.main([*words, f"out={tmp_path}/one", "batch_size=4"])
    run("train.py", *words, f"out={tmp_path}/two", "batch_size=2", processes=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machine = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
               str(ROOT / "train.py"), *words, f"out={tmp_path}/four", "batch_size=1"]
    both = [subprocess.Popen(machine, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True, start_new_session=True) for _ in range(2)]
    printed = [finish(process)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "".join(printed)[-4000:]
    assert "parameters on 4 x cpu" in "".join(printed)
    one, two, four = (losses(tmp_path / name) for name in ("one", "two", "four"))
    assert len(one) == 3 and one[3] < one[1]
    assert one == pytest.approx(two, abs=1e-4) and one == pytest.approx(four, abs=1e-4)


def test_what_cannot_be_compiled_runs_as_it_is(tiny_data, tiny, tmp_path, monkeypatch):
    """compile=true where the compiler fails, as without a C++ compiler: the same losses."""
    def fails(*_, **__):
        raise RuntimeError("no compiler")
    tried = unittest.mock.Mock(side_effect=fails)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", tried)
    monkeypatch.setattr("torch._dynamo.config.suppress_errors", False)  # is put back afterwards
    words = [*tiny, f"data={tiny_data}", "steps=2", "limit=4"]
    train.main([*words, f"out={tmp_path}/as_it_is"])
    train.main([*words, f"out={tmp_path}/compiled", "compile=true"])
    assert tried.called and losses(tmp_path / "as_it_is") == losses(tmp_path / "compiled")
    config = json.loads((tmp_path / "compiled" / "last" / "config.json").read_text())
    assert config["longest_prompt"] > 50


def test_streamed_run_resumes(tiny_data, tiny, tmp_path):
    """A streamed run that goes on has the losses of one in one go, also inside an epoch."""
    words = [*tiny, f"data={tiny_data}", "streaming=true", "accumulation=1", "warmup=0",
             "min_lr=1e-3"]
    train.main([*words, f"out={tmp_path}/whole", "steps=8"])
    train.main([*words, f"out={tmp_path}/part", "steps=4"])
    train.main([*words, f"out={tmp_path}/part", "steps=8", "resume=true"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "part")
    assert len(losses(tmp_path / "part")) == 8


def test_kill_and_resume(run, tiny_data, tiny, tmp_path):
    """kill -9 in mid-training; resumed, the losses are those of a run that nobody killed."""
    words = [*tiny, f"data={tiny_data}", "steps=40"]
    train.main([*words, f"out={tmp_path}/whole"])
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words,
                                f"out={tmp_path}/killed"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 600  # for busy machines
    while not (tmp_path / "killed" / "state.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= len(losses(tmp_path / "killed")) < 40
    train.main([*words, f"out={tmp_path}/killed", "resume=true"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = (load_checkpoint(tmp_path / name / "last")[0].state_dict()
                     for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_muon_and_wrong_history_resume(tiny_data, tiny, tmp_path):
    """With both optimizers and an input that is spoiled, a run that goes on equals one in one go;
    the input's mistakes and Muon's steps make it another run than without."""
    plain = [*tiny, f"data={tiny_data}", "warmup=0", "min_lr=1e-3"]
    words = [*plain, "muon=true", "wrong_history=0.5"]
    train.main([*words, f"out={tmp_path}/whole", "steps=6"])
    train.main([*words, f"out={tmp_path}/part", "steps=4"])
    train.main([*words, f"out={tmp_path}/part", "steps=6", "resume=true"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "part")
    train.main([*plain, f"out={tmp_path}/muon", "muon=true", "steps=1"])
    train.main([*plain, f"out={tmp_path}/plain", "steps=1"])
    whole, muon, adamw = (losses(tmp_path / name)[1] for name in ("whole", "muon", "plain"))
    assert muon == adamw != whole  # the first step's loss is before the step
    weights = [load_checkpoint(tmp_path / name / "last")[0] for name in ("muon", "plain")]
    differ = [not torch.equal(a, b) for a, b in zip(*(model.parameters() for model in weights))]
    assert any(differ)


def test_fsdp_gives_the_same_losses(run, tiny_data, tiny, tmp_path):
    """Weights split over two processes: the losses of one process, also when it goes on."""
    words = [*tiny, f"data={tiny_data}", "limit=6"]
    train.main([*words, f"out={tmp_path}/one", "batch_size=4", "steps=4"])
    split = [*words, f"out={tmp_path}/split", "batch_size=2", "fsdp=true"]
    run("train.py", *split, "steps=2", processes=2)
    run("train.py", *split, "steps=4", "resume=true", processes=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "split"), abs=1e-4)
    one, other = (load_checkpoint(tmp_path / name / "last")[0] for name in ("one", "split"))
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.allclose(a, b, atol=1e-4)
    train.main([*split, "steps=6", "resume=true"])  # one process takes it up, and two do again
    run("train.py", *split, "steps=8", "resume=true", processes=2)
    assert list(losses(tmp_path / "split")) == list(range(1, 9))
    averages = torch.load(tmp_path / "split" / "state.pt", weights_only=True)["optimizers"]["state"]
    assert {int(value["step"]) for value in averages.values()} == {8}


@pytest.fixture
def small_run(tiny, dialogues, tmp_path):
    """A run of two steps on a data set of its own: (words for going on to step 4, data, out)."""
    data, out = tmp_path / "data", tmp_path / "run"
    for split in ("train", "validation"):
        write_split(data, dialogues[:6], split)
    made = {"codebook_size": 64, "codec_fingerprint": "a1", "speaker_encoder": "ecapa"}
    (data / "info.json").write_text(json.dumps(made))
    words = [*tiny, f"out={out}", "accumulation=1", "warmup=0", "min_lr=1e-3"]
    train.main([*words, f"data={data}", "steps=2"])
    return [*words, "steps=4", "resume=true"], data, out


def test_going_on_with_other_data(small_run, dialogues, tmp_path, capsys):
    """A moved data set goes on; another codec or encoder is refused; other dialogues are said, and
    keep the tokenizer that the model was trained with."""
    words, data, out = small_run
    moved = shutil.copytree(data, tmp_path / "moved")
    shutil.copytree(out, tmp_path / "copy")
    capsys.readouterr()
    train.main([*words, f"data={moved}"])
    assert "note" not in capsys.readouterr().out and len(losses(out)) == 4

    words = [word.replace(f"out={out}", f"out={tmp_path}/copy") for word in words]
    info = json.loads((moved / "info.json").read_text())
    for key in ("codec_fingerprint", "speaker_encoder"):
        (moved / "info.json").write_text(json.dumps(info | {key: "b2"}))
        refuses(f"copy/last was trained with another {key}", *words, f"data={moved}")
    (moved / "info.json").write_text(json.dumps(info))
    corrected = json.loads(json.dumps(dialogues[:6]))
    corrected[0]["utterances"][0]["words"][0]["word"] = "quizzically"
    write_split(moved, corrected[:5], "train")
    before = AutoTokenizer.from_pretrained(tmp_path / "copy" / "last").get_vocab()
    train.main([*words, f"data={moved}"])
    assert "not those of before (5 then, 4 now)" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "copy" / "last").get_vocab() == before


def test_damaged_files_of_a_run(small_run):
    """Rows of log.csv that cannot be read are left out; a state.pt that cannot is one line; what
    kills while writing it left is removed."""
    words, data, out = small_run
    (out / "state.pt.1.tmp").write_text("cut off")
    whole = (out / "log.csv").read_text()
    (out / "log.csv").write_bytes(whole.encode() + b"\0" * 64 + b"\n2,0.5,3.")
    train.main([*words, f"data={data}"])
    assert not [*out.glob("*.tmp")]
    assert list(losses(out)) == [1, 2, 3, 4] and (out / "log.csv").read_text().startswith(whole)
    with open(out / "state.pt", "r+b") as file:
        file.truncate(2000)
    refuses("state.pt cannot be read (RuntimeError), so this run cannot go on; start a new one "
            f"from its last weights: init={out}/last", *words, f"data={data}")


def test_early_stopping_and_variants(tiny_data, tiny, tmp_path, capsys):
    train.main([*tiny, f"data={tiny_data}", f"out={tmp_path}/a", "lr=0.5", "min_lr=0.5", "steps=60",
                "warmup=1", "patience=2", "alignment=none", "speaker_embedding=false",
                "user_weight=0", "prompt_text=true", "first_frame=false", "delay=0",
                "sampling=--word-temperature=0.4 top_k=0"])
    assert "stopped: no better validation loss in 2 evaluations" in capsys.readouterr().out
    model, _, fmt, config = load_checkpoint(tmp_path / "a" / "best")
    assert config["sampling"] == {"word_temperature": 0.4, "top_k": 0}
    assert model.speaker_size == 0 and (fmt.alignment, fmt.delay) == ("none", 0)


def test_loop_draws_nothing_from_the_global_generator(small_run):
    words, data, _ = small_run
    run = train.setup(train.load_settings(train.Config, [*words, f"data={data}"]))
    train.resume(run)
    before = torch.get_rng_state()
    train.loop(run)
    assert run.step == 4 and torch.equal(torch.get_rng_state(), before)


def refuses(message, *words):
    with pytest.raises(InputError, match=re.escape(message)):
        train.main([str(word) for word in words])


@pytest.mark.parametrize("sampling, message", [
    ("words=0.4", "unknown"), ("word_temperature=-3", "sampling: "), ("n=3", "sampling: "),
    ("word_temperature=hot", "float")])
def test_sampling_that_generation_would_refuse(tiny_data, tiny, tmp_path, sampling, message):
    refuses(message, *tiny, f"data={tiny_data}", f"out={tmp_path}/a", f"sampling={sampling}")


@pytest.mark.parametrize("word, message", [
    ("lr=0", "lr=0.0: must be more than 0"), ("lr=nan", "lr=nan: must be a number"),
    ("min_lr=-1", "min_lr=-1.0: must be at least 0"),
    ("min_lr=0.01", "lr=0.001: must be at least min_lr=0.01, where it ends; lower min_lr too"),
    ("patience=0", "patience=0: must be at least 1"),
    ("user_weight=-0.5", "user_weight=-0.5: must be at least 0"),
    ("text_weight=inf", "text_weight=inf: must be a number"),
    ("wrong_history=1.5", "wrong_history=1.5: must be between 0 and 1"),
    ("batch_size=0", "batch_size=0: must be at least 1"),
    ("heads=0", "heads=0: must be at least 1"),
    ("kv_heads=3", "heads one of kv_heads"), ("limit=-1", "limit=-1: must be at least 0"),
    ("behaviour_tokens=some", "use none, plain"), ("save_dtype=int8", "use float32 or bfloat16"),
    ("batch_sise=3", "did you mean 'batch_size'"), ("resume=true", "there is no"),
    ("codebook_size=10", "outside 0..9"),
])
def test_settings_out_of_range(word, message, tiny, tiny_data, tmp_path):
    refuses(message, *tiny, f"data={tiny_data}", f"out={tmp_path}/none", word)


def test_bfloat16_is_used_only_where_the_gpu_computes_in_it(monkeypatch):
    """Older ones emulate it, slower than float32."""
    asked = unittest.mock.Mock(return_value=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    assert not train.Run.bf16.fget(unittest.mock.Mock(device=torch.device("cuda")))
    asked.assert_called_once_with(including_emulation=False)


def test_muon_needs_whole_matrices(tiny, tiny_data, tmp_path):
    refuses("leave fsdp=true out", *tiny, f"data={tiny_data}", f"out={tmp_path}/none", "muon=true",
            "fsdp=true")


def test_bad_settings_files(fails, tiny_data, tmp_path):
    (tmp_path / "unknown.yaml").write_text("learning_rate: 0.1\n")
    (tmp_path / "type.yaml").write_text("steps: many\n")
    fails("unknown setting 'learning_rate'", "train.py", tmp_path / "unknown.yaml")
    refuses("'steps' must be int, not 'many'", tmp_path / "type.yaml")
    (tmp_path / "mark.yaml").write_text("steps: 5\n", encoding="utf-8-sig")
    read = train.load_settings(train.Config, [str(tmp_path / "mark.yaml"), "behaviour_tokens=true"])
    assert (read.steps, read.behaviour_tokens) == (5, "true")
    (tmp_path / "latin.yaml").write_bytes("out: caf\u00e9\n".encode("latin-1"))
    refuses("latin.yaml: is not UTF-8 text (byte 8); save it as UTF-8", tmp_path / "latin.yaml")
    (tiny_data / "info.json").write_text('{"codebook_size": 64}')
    refuses("set codebook_size=64", f"data={tiny_data}", f"out={tmp_path}/x")
    (tiny_data / "info.json").unlink()


@pytest.mark.parametrize("change", [
    {"utterances": []}, {"dsu_c1_path": []}, "end_time", "backchannels"])
def test_a_dialogue_that_cannot_be_used_is_left_out(change, dialogues, tiny, tmp_path, capsys):
    """Also of what a new Llama's tokenizer learns on, and as the first one."""
    bad = json.loads(json.dumps(dialogues[1]))
    for utterance in bad["utterances"] if type(change) is str else ():
        utterance[change] = None
    bad |= change if type(change) is dict else {}
    write_split(tmp_path, [bad, *dialogues[:5]], "train")
    words = [*tiny, f"data={tmp_path}", "val_split=train", "steps=1"]
    train.main([*words, f"out={tmp_path}/a"])
    assert "2 of 6 dialogues are dropped" in capsys.readouterr().out
    refuses("none of the 1 dialogues can be used", *words, f"out={tmp_path}/b", "limit=1")


def test_lengths_are_compared_with_what_the_model_knows(tiny_data, tiny, tmp_path, capsys):
    """What max_frames cuts off is said; what the backbone has no position for, refused."""
    words = [*tiny, f"data={tiny_data}", "steps=1"]
    train.main([*words, f"out={tmp_path}/a", "max_frames=20"])
    assert re.search(r"train: \d+\.\d s of \d+\.\d s are used, the rest is behind max_frames",
                     capsys.readouterr().out)
    config = tmp_path / "a" / "last" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"max_position_embeddings": 100}))
    refuses("but the backbone knows 100; set a smaller max_frames", *words, "max_frames=20",
            f"init={tmp_path}/a/last", f"out={tmp_path}/b")


def test_codec_and_speaker_encoder_travel_with_the_checkpoint(tiny_data, tiny, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    made = {"codec_fingerprint": "a1", "speaker_encoder": "ecapa", "speaker_size": 192}
    info = {"codebook_size": 64, "codec": "x.nemo"} | made
    (tmp_path / "data" / "info.json").write_text(json.dumps(info))
    words = [*tiny, f"data={tmp_path}/data", "steps=1", "accumulation=1"]
    train.main([*words, f"out={tmp_path}/a"])
    saved = json.loads((tmp_path / "a" / "best" / "config.json").read_text())
    assert made.items() <= saved.items()
    (tmp_path / "data" / "info.json").write_text(json.dumps(info | {"codec_fingerprint": "b2"}))
    refuses("trained with another codec_fingerprint a1 (now b2)", *words, f"out={tmp_path}/b",
            f"init={tmp_path}/a/best")


def test_checkpoint_that_does_not_fit(tmp_path, dialogues):
    model, tokenizer, fmt, config = load_checkpoint(GOLDEN / "checkpoint")
    save_checkpoint(tmp_path / "saved", model, tokenizer, fmt, {})
    golden, ours = (load_file(folder / "model.safetensors")
                    for folder in (GOLDEN / "checkpoint", tmp_path / "saved"))
    assert ({name: tensor.shape for name, tensor in ours.items()}
            == {name: tensor.shape for name, tensor in golden.items()})
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    settings["transformers_version"] = config["transformers_version"]  # ours is the installed one
    assert all(settings[key] == value for key, value in config.items()
               if value is not None)  # the authors' program reads it
    again = load_checkpoint(tmp_path / "saved")[0]
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    text = (tmp_path / "saved" / "config.json").read_text()
    for old, new, message in (
            ('"hidden_size": 64', '"hidden_size": 32', "do not fit config.json"),
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
        part = {name: tensor for name, tensor in tensors.items() if where[name] == shard}
        save_file(part, tmp_path / shard)
    (tmp_path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    again = load_checkpoint(tmp_path)[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match="not a readable checkpoint .*model-00002-of-00002"):
        load_checkpoint(tmp_path)


def hub_error(kind):
    """An error as the hub's library raises it (those about an answer of the server want one)."""
    plain = issubclass(kind, (FileNotFoundError, ConnectionError))
    return kind("said so") if plain else kind.__new__(kind)


@pytest.mark.parametrize("kind, message", [
    (errors.GatedRepoError, "it is gated: accept its terms on its page of the hub, then set "),
    (errors.RepositoryNotFoundError, "neither a path here nor a repository of the hub, or a "),
    (errors.RemoteEntryNotFoundError, "lacks a file that is needed"),
    (errors.LocalEntryNotFoundError, "the hub cannot be reached: check the path, the network and "),
    (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
])
def test_what_the_hub_refuses(kind, message, monkeypatch, tmp_path):
    """Checkpoint, codec, data set and backbone: every case of failure has a line of its own that
    says what to do."""
    def refuse(*_, **__):
        try:
            raise hub_error(kind)
        except Exception as e:
            raise OSError("wrapped, as transformers and datasets do") from e
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr(train.AutoTokenizer, "from_pretrained", refuse)
    for load in (lambda: load_checkpoint("maikezu/f-actor"),
                 lambda: load_codec("nvidia/nemo-nano-codec"),
                 lambda: train.load_dialogues("maikezu/data", "train"),
                 lambda: train.load_backbone(train.Config(backbone="a/b"))):
        with pytest.raises(InputError, match=re.escape(message)):
            load()


def test_no_network():
    """The hub's own libraries, told that there is no network."""
    for load in (lambda: load_checkpoint("maikezu/f-actor"),
                 lambda: load_codec("nvidia/nemo-nano-codec"),
                 lambda: train.load_dialogues("maikezu/data", "train"),
                 lambda: train.load_dialogues("maikezu/data", "train", True)):
        with pytest.raises(InputError, match="the hub cannot be reached"):
            load()
