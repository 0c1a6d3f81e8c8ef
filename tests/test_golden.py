"""The project against numbers of the authors' own program and of NeMo (golden/README.md), taken from FACTOR_GOLDEN."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from codec import load_codec
from config import InputError
from data import StreamFormat, collate, instruction, streams, text_stream
from evaluate import count_events, label_segments, merge_words, turn_taking
from generate import Sampler, talk
from model import load_checkpoint

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
    return {dialogue["soda_index"]: dialogue for dialogue in json.loads((GOLDEN / "dialogues.json").read_text())}


def golden_format(variant, max_frames, codebook_size):
    alignment, delay, *tokens = variant.split("_")
    return StreamFormat(alignment, int(delay.removeprefix("delay")), bool(tokens), max_frames, True, codebook_size)


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
    """Logits and losses of the authors' program to 1e-4, with the two settings that make the loss theirs."""
    model, tokenizer, _, _ = checkpoint
    logits = safe_open(GOLDEN / "logits.safetensors", "pt")
    for i, case in enumerate(json.loads((GOLDEN / "forward.json").read_text())):
        fmt = golden_format(case["variant"], 2048, model.codebook_size)
        item = streams(by_index[case["soda_index"]], case["system_speaker"], tokenizer, fmt)
        assert item["prompt"].tolist() == case["prompt_ids"]
        batch = collate([item], tokenizer.eos_token_id, fmt)
        with torch.inference_mode():
            hidden = model(batch["audio"][..., :-1], batch["text"][:, :-1], batch["prompt"], batch["speaker"])
            losses = model.loss(hidden, batch, first_frame=False, prompt_text=True)
            expected = {name: logits.get_tensor(f"{i}.{name}_logits") for name in ("audio", "text")}
            frames = hidden[0, 1 + len(item["prompt"]):][:len(expected["audio"])]
            torch.testing.assert_close(model.audio_logits(frames), expected["audio"], atol=1e-4, rtol=0)
            torch.testing.assert_close(model.text_logits(hidden[0, :len(expected["text"])]), expected["text"], atol=1e-4,
                                       rtol=0)
        both = (losses["audio_system"] + losses["audio_user"]) / 2
        for found, key in ((losses["audio_system"], "audio_loss_system"), (losses["text"], "text_loss"),
                           (both, "train_audio_loss_both"), (losses["loss"], "train_total_loss")):
            assert abs(found.item() - case[key]) < 1e-4, key


def test_greedy(checkpoint, by_index):
    """Two-instance generation: every id equal, all dialogues in one batch (prompts of several lengths) and one alone."""
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
        assert [{**segment, "speaker": names[segment["speaker"]]} for segment in segments] == case["segments"]
        for name, counts in zip(names, count_events(segments)):
            assert counts == [case["counts"][f"{name}_backchannels"], case["counts"][f"{name}_interruptions"]]
        for key, value in turn_taking(list(case["speech"].values()), case["duration"]).items():
            assert value == pytest.approx(case[f"{key}_per_min"], abs=1e-4)
