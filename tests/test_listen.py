"""listen.py: what is missing or unknown is said in one line."""
import sys

import pytest

from config import InputError
from listen import recognise, speaker_encoder


def test_a_missing_package_is_one_line(monkeypatch):
    for name in ("nemo", "nemo.collections.asr.models", "speechbrain", "speechbrain.inference.classifiers"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for call, file in ((lambda: speaker_encoder("ecapa_tdnn"), "full"), (lambda: recognise(None, asr="parakeet"), "full"),
                       (lambda: speaker_encoder("spkrec-ecapa-voxceleb"), "speechbrain")):
        with pytest.raises(InputError, match=f"pip install -r requirements-{file}.txt") as error:
            call()
        assert "\n" not in str(error.value)


def test_unknown_speaker_encoder():
    with pytest.raises(InputError, match="not known; known: resemblyzer, ecapa_tdnn, spkrec-ecapa-voxceleb"):
        speaker_encoder("titanet")
