"""The project against numbers of the authors' own program and of NeMo (golden/README.md), taken
from FACTOR_GOLDEN."""
import csv
import json
import math
import os
import random
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import write_split
from safetensors import safe_open
from safetensors.torch import load_file

import generate
import prepare
import train
from codec import MiniCodec, load_codec, save_minicodec
from config import InputError
from data import StreamFormat, collate, epoch_batches, instruction, streams, text_stream
from generate import Sampler, stream_words, talk
from model import load_checkpoint, save_checkpoint
from turns import count_events, label_segments, merge_words, turn_taking

GOLDEN = Path(os.environ.get("FACTOR_GOLDEN", Path(__file__).parent / "golden"))


def test_codec():
    """NanoCodec: codes exactly, quantised numbers and audio to 1e-4."""
    expected = load_file(GOLDEN / "codec.safetensors")
    codec = load_codec(GOLDEN / "codec.nemo")
    codes, frames = codec.encode(expected["audio_in"][None])
    assert torch.equal(codes[0], expected["codes"].long())
    assert frames.tolist() == [expected["codes"].shape[1]]
    assert torch.allclose(codec.fsq.decode(codes)[0], expected["dequantized"], atol=1e-4)
    audio, samples = codec.decode(expected["codes"][None])
    assert samples.tolist() == [len(expected["audio_out"])]
    assert torch.allclose(audio[0], expected["audio_out"], atol=1e-4)


def test_codec_cut_off(tmp_path):
    """Half of the archive: one clear message."""
    content = (GOLDEN / "codec.nemo").read_bytes()
    (tmp_path / "half.nemo").write_bytes(content[:len(content) // 2])
    with pytest.raises(InputError, match="half.nemo: not a whole .nemo archive"):
        load_codec(tmp_path / "half.nemo")


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(GOLDEN / "checkpoint")


@pytest.fixture(scope="module")
def by_index():
    dialogues = json.loads((GOLDEN / "dialogues.json").read_text())
    return {dialogue["soda_index"]: dialogue for dialogue in dialogues}


def golden_format(variant, max_frames, codebook_size):
    alignment, delay, *tokens = variant.split("_")
    return StreamFormat(alignment, int(delay.removeprefix("delay")), "plain" if tokens else "none",
                        max_frames, True, codebook_size)


def test_streams(checkpoint, by_index):
    """Prompts, dropped dialogues, overflows, audio and text rows: all equal."""
    model, tokenizer, _, _ = checkpoint
    for case in json.loads((GOLDEN / "streams.json").read_text()):
        dialogue, side = by_index[case["soda_index"]], case["system_speaker"]
        fmt = golden_format(case["variant"], case["max_length"], model.codebook_size)
        assert instruction(dialogue, side, fmt) == case["prompt"]
        assert text_stream(dialogue, side, tokenizer, fmt)[1] == case["overflow_words"]
        item = streams(dialogue, side, tokenizer, fmt)
        assert (item is None) == case["skip"]
        if item:
            assert item["audio"].tolist() == case["audio"] and item["text"].tolist() == case["text"]


def test_forward(checkpoint, by_index):
    """Logits and losses of the authors' program to 1e-4, with the two settings that make the loss
    theirs."""
    model, tokenizer, _, _ = checkpoint
    logits = safe_open(GOLDEN / "logits.safetensors", "pt")
    for i, case in enumerate(json.loads((GOLDEN / "forward.json").read_text())):
        fmt = golden_format(case["variant"], 2048, model.codebook_size)
        item = streams(by_index[case["soda_index"]], case["system_speaker"], tokenizer, fmt)
        assert item["prompt"].tolist() == case["prompt_ids"]
        batch = collate([item], tokenizer.eos_token_id, fmt)
        with torch.inference_mode():
            hidden = model(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"],
                           batch["speaker"])
            losses = model.loss(hidden, batch, first_frame=False, prompt_text=True)
            audio, text = (logits.get_tensor(f"{i}.{name}_logits") for name in ("audio", "text"))
            frames = hidden[0, 1 + len(item["prompt"]):][:len(audio)]
            torch.testing.assert_close(model.audio_logits(frames), audio, atol=1e-4, rtol=0)
            torch.testing.assert_close(model.text_logits(hidden[0, :len(text)]), text, atol=1e-4,
                                       rtol=0)
        both = (losses["audio_system"] + losses["audio_user"]) / 2
        for found, key in ((losses["audio_system"], "audio_loss_system"),
                           (losses["text"], "text_loss"), (both, "train_audio_loss_both"),
                           (losses["loss"], "train_total_loss")):
            assert abs(found.item() - case[key]) < 1e-4, key


def test_greedy(checkpoint, by_index):
    """Two-instance generation: every id equal, all dialogues in one batch (prompts of several
    lengths) and one alone."""
    model, tokenizer, fmt, _ = checkpoint
    cases = json.loads((GOLDEN / "greedy.json").read_text())
    for part in (cases, cases[:1]):
        prompts = [case[key] for case in part for key in ("prompt_1", "prompt_2")]
        speakers = torch.tensor([by_index[case["soda_index"]][key] for case in part
                                 for key in ("spk_emb_c1", "spk_emb_c2")])
        text = []  # as made, the frames of the delay included
        results = talk(model, tokenizer, fmt, prompts, speakers, Sampler([0] * len(part), 0, 0, 1),
                       len(part[0]["text"][0]), on_frame=lambda t, ids, text=text: text.append(ids))
        text = torch.tensor(text).T.tolist()
        for i, case in enumerate(part):
            audio = torch.cat([results[2 * i][0], results[2 * i + 1][0]])
            assert audio.tolist() == [row[fmt.delay:] for row in case["audio"]]
            assert text[2 * i:2 * i + 2] == case["text"]


def test_turn_taking():
    """Segments, labels and counts exactly; seconds per minute to 1e-4 (they agree to rounding)."""
    for case in json.loads((GOLDEN / "turn_taking.json").read_text()):
        names = list(case["words"])
        segments = label_segments(merge_words(list(case["words"].values())))
        named = [{**segment, "speaker": names[segment["speaker"]]} for segment in segments]
        assert named == case["segments"]
        for name, counts in zip(names, count_events(segments)):
            assert counts == [case["counts"][f"{name}_{kind}"]
                              for kind in ("backchannels", "interruptions")]
        for key, value in turn_taking(list(case["speech"].values()), case["duration"]).items():
            assert value == pytest.approx(case[f"{key}_per_min"], abs=1e-4)


def test_command_generate(checkpoint, by_index, tmp_path):
    """`generate.py temperature=0` on the golden checkpoint: the golden dialogues' codes and
    words."""
    model, tokenizer, fmt, _ = checkpoint
    cases = json.loads((GOLDEN / "greedy.json").read_text())
    write_split(tmp_path, [by_index[case["soda_index"]] for case in cases], "test")
    codec = MiniCodec([model.codebook_size], model.num_codebooks, 8, (4, 4), (1, 1), 8, (1, 1))
    save_minicodec(codec, tmp_path / "codec.safetensors")  # any of this shape: codes are compared
    generate.main([f"model={GOLDEN}/checkpoint", f"codec={tmp_path}/codec.safetensors",
                   f"data={tmp_path}", "temperature=0", f"n={len(cases)}", f"out={tmp_path}/out",
                   f"max_frames={len(cases[0]['text'][0])}"])
    for i, case in enumerate(cases):
        made = json.loads((tmp_path / "out" / f"dialogue_{i:04d}.json").read_text())
        codes = [row for codes in made["codes"] for row in codes]
        assert codes == [row[fmt.delay:] for row in case["audio"]]
        for side, speaker in enumerate(made["speakers"]):
            assert speaker["prompt"] == case[f"prompt_{side + 1}"]
            text = case["text"][side]
            assert speaker["words"] == stream_words(text[:len(text) - fmt.delay], tokenizer)


def test_command_train(checkpoint, by_index, tmp_path):
    """`train.py init=` the golden checkpoint with the authors' two settings: the first logged loss
    is theirs."""
    model, tokenizer, _, _ = checkpoint
    for i, case in enumerate(json.loads((GOLDEN / "forward.json").read_text())):
        fmt, folder = golden_format(case["variant"], 2048, model.codebook_size), tmp_path / str(i)
        dialogue, side = by_index[case["soda_index"]], case["system_speaker"]
        save_checkpoint(folder / "model", model, tokenizer, fmt, {})
        write_split(folder, [dialogue], "train")
        write_split(folder, list(by_index.values()), "validation")
        # a stored dialogue is kept if both sides can be laid out, a streamed one is laid out from
        # the side that is drawn
        if streaming := streams(dialogue, 1 - side, tokenizer, fmt) is None:
            drawn = [random.Random(f"{s}/{dialogue['soda_index']}").randrange(2) for s in range(99)]
        else:
            drawn = [epoch_batches([1], 1, 0, s)[0][0][1] for s in range(99)]
        train.main([f"init={folder}/model", f"data={folder}", f"out={folder}/run",
                    f"streaming={streaming}", "steps=1", "accumulation=1", "prompt_text=true",
                    "first_frame=false", f"seed={drawn.index(side)}", f"delay={fmt.delay}",
                    f"alignment={fmt.alignment}", f"behaviour_tokens={fmt.behaviour_tokens}",
                    f"codebook_size={model.codebook_size}"])
        with open(folder / "run" / "log.csv") as file:
            (row,) = csv.DictReader(file)
        assert abs(float(row["loss"]) - case["train_total_loss"]) < 1e-4
        assert abs(math.log(float(row["ppl_text"])) - case["text_loss"]) < 1e-4
        assert abs(math.log(float(row["ppl_audio_system"])) - case["audio_loss_system"]) < 1e-4


def test_command_prepare(tmp_path, monkeypatch):
    """`prepare.py codec=` the golden codec: a recording of the golden audio becomes the golden
    codes."""
    expected, codec = load_file(GOLDEN / "codec.safetensors"), load_codec(GOLDEN / "codec.nemo")
    # the sound is no speech: it has no voice, no level of speech, and words fit it nowhere
    monkeypatch.setattr(prepare, "speaker_encoder", lambda *_: (None, 8))
    monkeypatch.setattr(prepare, "embed", lambda *_: [0.1] * 8)
    monkeypatch.setattr(prepare, "misfit", lambda *_: ("", 0))
    seconds = len(expected["audio_in"]) / codec.sample_rate
    turns = ("Ann", 0.1, seconds / 2), ("Bob", seconds / 2 + 0.1, seconds)
    said = [{"uttr_idx": i, "uttr_type": None, "speaker_idx": i, "speaker": name, "tts_text": "yes",
             "backchannels": [], "start_time": begin, "end_time": end,
             "words": [{"word": "yes", "start": begin, "dur": end - begin}]}
            for i, (name, begin, end) in enumerate(turns)]
    (tmp_path / "raw" / "train").mkdir(parents=True)
    (tmp_path / "raw" / "train" / "a.json").write_text(json.dumps({
        "soda_index": 1, "file_name": "a", "narrative": "They agree.",
        "new_narrative_s1": "You agree.", "new_narrative_s2": "You agree.",
        "speakers": ["Ann", "Bob"], "behaviors": [{}, {}], "num_turns": 2, "utterances": said,
        "tts_speaker_ids": ["a", "b"], "tts_genders": ["f", "m"], "statistics": {}}))
    stereo = torch.stack([expected["audio_in"]] * 2, 1).numpy()
    soundfile.write(tmp_path / "raw" / "train" / "a.wav", stereo, codec.sample_rate,
                    subtype="FLOAT")
    prepare.main([f"raw={tmp_path}/raw", f"out={tmp_path}/out", f"codec={GOLDEN}/codec.nemo",
                  "level=0", "workers=1"])
    (row,) = train.load_dialogues(tmp_path / "out", "train")
    for key in ("dsu_c1_path", "dsu_c2_path"):
        assert row[key] == expected["codes"].tolist()
