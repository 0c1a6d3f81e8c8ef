"""bench.py: what it computes, and that every part runs."""
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN
from transformers import LlamaConfig

import bench
from codec import MiniCodec, save_minicodec
from config import InputError, keep_memory, use_threads

SMALL = {"hidden": 64, "layers": 2, "heads": 2, "intermediate": 128, "vocab": 500, "prompt": 5,
         "codebook_size": 50, "frames": 100, "batch": 1}


def test_memory_is_computed(tmp_path):
    """Without a GPU: weights, gradients and AdamW's averages are 16 bytes a parameter, activations
    grow with the frames."""
    cfg = bench.Config(**SMALL)
    config = bench.backbone_config(cfg)
    parameters = sum(p.numel() for p in bench.random_model(cfg, config).parameters())
    small, large, again = (
        bench.computed_memory(bench.Config(**SMALL | change), config)
        for change in ({}, {"frames": 400}, {"frames": 400, "checkpointing": True}))
    assert small["Parameter"] == 4 * parameters
    assert 8 * parameters <= small["Optstate"] < 8.1 * parameters
    assert large["Total"] - small["Total"] > 2 * (small["Total"] - 16 * parameters) > 0
    assert again["Total"] < large["Total"]


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives memory back")
def test_memory_is_kept_for_the_next_step():
    def held():
        return int(Path("/proc/self/statm").read_text().split()[1])  # pages of 4 kB
    keep_memory()
    piece = torch.ones(2 ** 25)  # 128 MB
    before = held()
    del piece
    assert held() > before - 1000


def test_threads_are_the_cores_less_the_load(monkeypatch):
    """Also after a script that ran in this process, as world.ablate's do, has set one thread."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for load in (2.6, 9.0):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        use_threads(0)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "getloadavg", lambda: (0, 0, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    use_threads(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's word
    use_threads(0)
    assert found == [5, 1, 6]


def test_products_are_counted():
    """FLOPs of a step as torch counts them, attention apart, which it does not count on a CPU."""
    cfg = bench.Config(**SMALL)
    model = bench.random_model(cfg, bench.backbone_config(cfg))
    batch = bench.random_batch(cfg, 500)
    with bench.FlopCounterMode(display=False) as counter:
        bench.train.losses_of(model, batch, bench.train.Config(), False)["loss"].backward()
    attention = 3 * 2 * 2 * 64 * 2 * 108 * 109 / 2
    ours = bench.training_flops(model, batch) - attention
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_every_part_runs(tmp_path, capsys):
    save_minicodec(MiniCodec([64], 4, 8, (4, 4), (1, 1), 8, (1, 1)), tmp_path / "c.safetensors")
    words = [f"{key}={value}" for key, value in SMALL.items()]
    bench.main([*words, "seconds=0.01", "pairs=1 2", f"model={GOLDEN}/checkpoint",
                f"codec={tmp_path}/c.safetensors"])
    printed = capsys.readouterr().out
    for line in ("CPU, 1 thread", "training, 1 x 108 positions", "computed for bfloat16",
                 "generation, 2 dialogue", "codec, encode, frame by frame", "codec, decode",
                 "99th percentile"):
        assert line in printed, line
    bench.main(["parts=long", "long=20", "seconds=0.01", f"model={GOLDEN}/checkpoint"])
    assert re.search("frames 18 to 20: median .* ms, peak memory", capsys.readouterr().out)
    floors = re.findall(r"floor +([\d.,]+)  ", printed)  # of the table's columns
    assert len(floors) >= 8 and all(float(number.replace(",", "")) > 0 for number in floors)


def test_the_floor_counts_what_the_median_frame_looks_at(monkeypatch):
    """Of frames that begin at age 0, not the positions of a talk at its end."""
    contexts, cfg = [], bench.Config(**SMALL | {"prompt": 5}, seconds=0, pairs="1")
    monkeypatch.setattr(bench, "step_floor",
                        lambda model, rows, context, machine: contexts.append(context) or 1)
    machine = bench.Machine(torch.device("cpu"), torch.float32, "")
    bench.bench_generation(cfg, bench.backbone_config(cfg), machine)
    assert contexts == [6 + 6 // 2]  # speaker and prompt; 2 frames of delay and 1 + 3 steps
    memory = SimpleNamespace(prefix_size=6, frames=102, ages=[1000])  # the ring is full
    assert bench.looked_at(SimpleNamespace(memory=memory)) == 6 + 102


def test_bad_settings(tmp_path):
    with pytest.raises(InputError, match="there is no speed; use training, generation"):
        bench.main(["parts=speed"])
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="long=5: must be 10 or more"):
        bench.main(["parts=long", "long=5"])
    for pairs in ("0", "one", ""):
        with pytest.raises(InputError, match=f"pairs={pairs}: give numbers of dialogues"):
            bench.main([f"pairs={pairs}"])
    for word in ("layers=0", "seconds=0.0", "threads=-1"):
        with pytest.raises(InputError, match=f"{word}: must be more"):
            bench.main([word])
    for hidden in (512, 390, 4):  # 390: rotation takes the numbers of a head in pairs
        with pytest.raises(InputError, match=f"hidden={hidden}: must be an even multiple"):
            bench.main([f"hidden={hidden}"])
    with pytest.raises(InputError, match="its config.json cannot be read"):
        bench.main([f"backbone={tmp_path}/none"])
