"""The page to listen to, made of the golden dialogues by a random model."""
import json
import re
import shutil

import pytest
import soundfile
from conftest import GOLDEN, write_split

import generate
from codec import load_codec
from config import InputError
from data import SILENCE_PAD
from model import FActor, load_checkpoint, save_checkpoint
from world import page


@pytest.fixture(scope="module")
def parts(tmp_path_factory, dialogues):
    """Words for page.main: a random model that fits the golden codec, and a data set that names
    voices and situations."""
    folder = tmp_path_factory.mktemp("page")
    codec = load_codec(GOLDEN / "codec.nemo")
    small, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint")
    model = FActor(small.backbone, codec.num_codebooks, codec.codebook_size, 192)
    fmt.codebook_size = codec.codebook_size
    save_checkpoint(folder / "model", model, tokenizer, fmt, {})
    new = sorted(page.new_situations())[0]
    rows = []
    for i, dialogue in enumerate(dialogues[:4]):
        codes = {f"dsu_c{k}_path": [row[:20] for row in dialogue[f"dsu_c{k}_path"]] for k in (1, 2)}
        voices = ["a", "b"] if i % 2 else ["c", "d"]
        rows.append(dialogue | codes | {"tts_speaker_ids": voices,
                                        "situation": new if i == 0 else "lost_thing"})
    write_split(folder / "data", rows, "test")
    (folder / "data" / "voices.json").write_text(json.dumps(dict.fromkeys("abcd", [0.1] * 192)))
    return folder, [f"model={folder}/model", f"codec={GOLDEN}/codec.nemo", f"data={folder}/data",
                    f"dialogues={folder}/made", f"out={folder}/docs", "n=2", "max_frames=12"]


def test_the_page_holds_every_dialogue(parts, monkeypatch, capsys):
    folder, words = parts
    monkeypatch.setattr(generate, "draw_timeline", lambda *_: None)  # takes a second
    page.main(words)
    text = (folder / "docs" / "index.html").read_text()
    sounds = sorted(path.name for path in (folder / "docs" / "audio").iterdir())
    assert [name[:-9] for name in sounds] == ["answer", "counts_0", "counts_2", "counts_5", "test",
                                              "test", "voices", "voices"]
    assert sorted(re.findall(r'src="audio/([^"]+)"', text)) == sounds
    assert "http" not in text and text.count("a situation that training has not") == 1
    assert text.count("<svg") == len(sounds) + 2 and SILENCE_PAD not in text
    asked = [json.loads((folder / "made" / f"counts_{n}" / "dialogue_0000.json").read_text())
             ["speakers"] for n in page.COUNTS]
    assert [pair[0]["backchannels"] for pair in asked] == [0, 2, 5]
    assert len({json.dumps(pair[1]["prompt"]) for pair in asked}) == 1
    before = [path.read_bytes() for path in sorted((folder / "docs" / "audio").iterdir())]
    page.main([*words, "make=false"])
    assert (folder / "docs" / "index.html").read_text() == text
    assert len(before) == 8 and "8 dialogues" in capsys.readouterr().out


def test_what_was_made_before_is_not_shown(parts, tmp_path, monkeypatch):
    """Neither dialogues beyond n, nor, where the model ends one at once, another model's."""
    folder, words = parts
    monkeypatch.setattr(generate, "draw_timeline", lambda *_: None)
    words = [*words, f"dialogues={tmp_path}/made", f"out={tmp_path}/docs", "max_frames=6"]
    made, audio = tmp_path / "made" / "test", tmp_path / "docs" / "audio"
    page.main(words)
    for kind in ("json", "wav"):
        shutil.copy(made / f"dialogue_0001.{kind}", made / f"dialogue_0003.{kind}")
    for name in ("music", "test_0003"):  # one is not of the page
        (audio / f"{name}.ogg").touch()
    page.main([*words, "make=false"])
    names = sorted(path.stem for path in audio.iterdir())
    assert names[4:] == ["music", "test_0000", "test_0001", "voices_0002", "voices_0003"]
    save = generate.save_dialogue
    monkeypatch.setattr(generate, "save_dialogue", lambda stem, *parts: (
        save(stem, *parts) if stem != made / "dialogue_0000" else None))
    page.main(words)
    assert [path.name for path in made.glob("*.json")] == ["dialogue_0001.json"]


def test_a_dialogue_shows_what_was_asked_and_made(parts):
    """Words inside the other's turn are a backchannel; text is escaped."""
    speakers = [{"name": "A<b>", "narrative": "You & I.", "backchannels": 0, "interruptions": 0,
                 "starts": True, "voice": "a", "prompt": "p", "words":
                 [{"word": "long", "start": 0.1, "end": 1.9, "kind": ""}]},
                {"name": "B", "narrative": "x", "backchannels": 3, "interruptions": 0,
                 "starts": False, "voice": "b", "prompt": "p", "words":
                 [{"word": "yeah", "start": 0.5, "end": 0.8, "kind": "[BC3]"}]}]
    audio = page.torch.zeros(2, 48000)
    text = page.figure("test_0000", "", speakers, audio)
    assert "A&lt;b&gt; and B" in text and "You &amp; I." in text and "A<b>" not in text
    assert '<rect class="backchannel" x="42" y="80"' in text
    assert "<td>no</td><td>3</td><td>1</td><td>1</td><td>0</td><td>0</td><td>0</td>" in text
    assert page.exact_counts([("", speakers, audio)]) == (3, 4)


def test_audio_is_small(tmp_path, monkeypatch):
    """As good as the limit allows, never more."""
    monkeypatch.setattr(page, "LARGEST", 8000)
    noise = page.torch.rand(2, 24000 * 2) - 0.5
    page.write_ogg(tmp_path / "a.ogg", noise)
    assert (tmp_path / "a.ogg").stat().st_size <= page.LARGEST
    assert (tmp_path / "a.ogg").stat().st_size > page.LARGEST // 2
    assert soundfile.info(tmp_path / "a.ogg").channels == 2


def test_bad_input(parts, tmp_path):
    folder, words = parts
    for message, more in ((r"n=4: .* has 4 test dialogues", ["n=4"]),
                          ("holds no dialogue", ["make=false", f"dialogues={tmp_path}"])):
        with pytest.raises(InputError, match=message):
            page.main([*words, *more])
