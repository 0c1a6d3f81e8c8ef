"""A page to listen to: docs/index.html and docs/audio/, made from what generate.py writes.

    python -m world.page               the shipped model's dialogues, then the page
    python -m world.page make=false    the page alone, of dialogues made before

Nothing is picked by ear: the first prompts of the test set; the first of them in a situation that
training has, with other counts; the next ones that hold all voices; and one whose partner is the
test set's recording. The page loads nothing from elsewhere and needs no server.
"""
import functools
import html
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

import soundfile
import torch

import generate
from codec import fingerprint, load_codec, read_audio, write_audio
from config import InputError, load_settings, make_folder, read_text, write_atomically
from data import KINDS, check_codec, load_dialogues, mark_kind, segments
from turns import count_events, label_segments, merge_words
from world import corpus

COUNTS = (0, 2, 5)  # backchannels asked in the same prompt
LARGEST = 100_000  # bytes of a dialogue's audio
LEVELS = (0.95, 0.96, 0.97, 0.98, 0.99)  # libsndfile's for Opus: about 36 to 16 kbit/s
SECOND, LANE = 84, 78  # pixels: of a second, and the height of a speaker's lane


@dataclass
class Settings:
    dialogues: str = "runs/page"  # generate.py's output, a folder a section
    out: str = "docs"  # folder of index.html and audio/
    make: bool = True  # false: the dialogues are there already
    n: int = 8  # dialogues of the first section
    model: str = generate.Config.model
    codec: str = generate.Config.codec
    data: str = generate.Config.data  # its test split: prompts and the recording
    max_frames: int = 450
    seed: int = generate.Config.seed


@functools.cache
def new_situations():
    """The situations that only the test set has."""
    situations = corpus.read_situations(corpus.Settings.situations)["situations"]
    return {name for name, situation in situations.items() if situation["test_only"]}


def seen(row):
    """Whether training has the situation of a data set's row; True where it names none."""
    return row.get("situation") not in new_situations()


def with_all_voices(rows, first):
    """Numbers of dialogues from `first` on, in situations of training, that have all voices, each
    once."""
    chosen, heard = [], set()
    for i, voices in enumerate(rows["tts_speaker_ids"]):
        if i >= first and not heard & set(voices) and seen(rows[i]):
            chosen.append(i)
            heard |= set(voices)
    return chosen


def numbers_of(settings, rows):
    """{section: numbers of its dialogues}: all that the page shows."""
    answer = next((i for i in range(settings.n, len(rows)) if seen(rows[i])), settings.n)
    return {"test": range(settings.n), "voices": with_all_voices(rows, settings.n),
            "answer": [answer], **{f"counts_{count}": [0] for count in COUNTS}}


def make_dialogues(settings):
    """Everything that the page shows, by generate.main, in one folder a section; what was there
    before goes, since it may be another model's."""
    rows, folder = load_dialogues(settings.data, "test"), Path(settings.dialogues)
    if not 0 < settings.n < len(rows):
        raise InputError(f"n={settings.n}: {settings.data} has {len(rows)} test dialogues; the "
                         "page needs at least one more than n")
    check_codec(settings.data, settings.codec, fingerprint(settings.codec))
    same = [f"{key}={getattr(settings, key)}"
            for key in ("model", "codec", "data", "max_frames", "seed")]
    same.append(f"voices={settings.data}/voices.json")
    numbers = numbers_of(settings, rows)
    for path in itertools.chain(*((folder / name).glob("dialogue_*") for name in numbers)):
        path.unlink()
    generate.main([*same, f"n={settings.n}", f"out={folder}/test"])
    base = next((i for i in range(settings.n) if seen(rows[i])), 0)
    made = json.loads(read_text(folder / "test" / f"dialogue_{base:04d}.json"))
    pair = [{key: speaker[key] for key in generate.SPEAKER_KEYS} for speaker in made["speakers"]]
    for count in COUNTS:  # one file each, so that all have the same seed
        pair[0]["backchannels"] = count
        prompts = folder / f"prompt_{count}.json"
        prompts.write_text(json.dumps([pair]))
        generate.main([*same, f"prompts={prompts}", f"out={folder}/counts_{count}"])
    for i in numbers["voices"]:
        generate.main([*same, f"first={i}", f"out={folder}/voices"])
    i = numbers["answer"][0]
    write_partner(rows[i], folder, settings)
    generate.main([*same, f"first={i}", f"user={folder}/partner.wav", f"out={folder}/answer"])


def write_partner(row, folder, settings):
    """The second speaker of a data set's dialogue as a recording, partner.wav, and its words."""
    codec = load_codec(settings.codec)
    codes = torch.tensor(row["dsu_c2_path"])[None]  # (1, K, T)
    write_audio(folder / "partner.wav", codec.decode(codes)[0], codec.sample_rate)
    words = [{"word": word["word"], "start": word["start"], "end": word["start"] + word["dur"],
              "kind": ""} for part, _, _ in segments(row, 1) for word in part["words"]]
    partner = {"name": row["speakers"][1], "words": words, "voice": row["tts_speaker_ids"][1]}
    (folder / "partner.json").write_text(json.dumps(partner))


def read_section(settings, name, numbers):
    """[(name of the audio file, two speakers, audio (2, samples) at 24 kHz)] of those of a folder's
    dialogues that have these numbers; a model may have ended one at once."""
    folder, found = Path(settings.dialogues), []
    paths = [folder / name / f"dialogue_{number:04d}.json" for number in numbers]
    for path in filter(Path.exists, paths):
        try:
            speakers = json.loads(read_text(path))["speakers"]
            if "recording" in speakers[1]:
                speakers[1] |= json.loads(read_text(folder / "partner.json"))
        except (ValueError, KeyError) as e:
            raise InputError(f"{path}: is no JSON of generate.py ({e!r})") from e
        audio = read_audio(path.with_suffix(".wav"), channels=2, sample_rate=24000)
        found.append((f"{name}_{path.stem[-4:]}", speakers, audio))
    if not found:
        raise InputError(f"{folder / name}: holds no dialogue; leave out make=false")
    return found


def write_ogg(path, audio):
    """Audio (2, samples) at 24 kHz as Opus, as good as fits in LARGEST bytes."""
    for level in LEVELS:
        soundfile.write(path, audio.T.numpy(), 24000, "OPUS", format="OGG",
                        compression_level=level)
        if path.stat().st_size <= LARGEST:
            return
    raise InputError(f"{path}: {audio.shape[1] / 24000:.0f} s do not fit in {LARGEST} bytes; give "
                     "a smaller max_frames")


def loudness(samples, base):
    """The outline of a speaker's loudness, frame by frame, around the height `base`."""
    peaks = samples.abs().unfold(0, 1920, 1920).amax(1)
    heights = (20 * peaks / peaks.max().clamp(min=1e-4)).tolist()
    upper = [f"{0.08 * i * SECOND:.0f},{base - h:.0f}" for i, h in enumerate(heights)]
    lower = [f"{0.08 * i * SECOND:.0f},{base + h:.0f}" for i, h in enumerate(heights)]
    return " ".join([*upper, *reversed(lower)])


def timeline(speakers, events, audio):
    """Who spoke when, as SVG: a lane a speaker, loudness, words; events shaded by their label."""
    width = round(audio.shape[1] / 24000 * SECOND)
    names = " and ".join(html.escape(speaker["name"]) for speaker in speakers)
    parts = [f'<svg width="{width}" height="{2 * LANE + 16}" role="img" '
             f'aria-label="Timeline of {names}">']
    for event in events:
        x, y = event["start"] * SECOND, event["speaker"] * LANE
        parts.append(f'<rect class="{event["label"]}" x="{x:.0f}" y="{y + 2}" rx="4" width='
                     f'"{(event["end"] - event["start"]) * SECOND:.0f}" height="{LANE - 4}">'
                     f'<title>{event["label"]}: {html.escape(event["text"])}</title></rect>')
    for side, speaker in enumerate(speakers):
        base, name = side * LANE, html.escape(speaker["name"])
        parts.append(f'<text class="s" x="4" y="{base + LANE - 6}">{name}</text>')
        parts.append(f'<polygon class="s{side}" points="{loudness(audio[side], base + 54)}"/>')
        for i, word in enumerate(speaker["words"]):
            parts.append(f'<text x="{word["start"] * SECOND:.0f}" y="{base + 15 + 13 * (i % 2)}">'
                         f'{html.escape(word["word"])}</text>')
    for second in range(width // SECOND + 1):
        parts.append(f'<text class="s" x="{second * SECOND}" y="{2 * LANE + 13}">{second} s</text>')
    return "\n".join([*parts, f'<line x1="0" x2="0" y1="0" y2="{2 * LANE}"/></svg>'])


def count_row(speaker, counts):
    """What is asked of a speaker and what was made of it, as a row of the table."""
    marks = [mark_kind(word["kind"]) for word in speaker["words"]]
    cells = [html.escape(speaker["name"]), html.escape(speaker.get("voice") or "")]
    if "recording" in speaker:
        cells += ["a recording", *[""] * 6]
    else:
        cells.append("yes" if speaker["starts"] else "no")
        for (key, kind), made in zip(KINDS.items(), counts):
            cells += [speaker[key], marks.count(kind), made]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def figure(name, note, speakers, audio):
    """A dialogue: what is asked and made, audio, timeline, and both prompts."""
    names = " and ".join(speaker["name"] for speaker in speakers)
    events = label_segments(merge_words([speaker["words"] for speaker in speakers]))
    rows = list(map(count_row, speakers, count_events(events)))
    told = [speaker for speaker in speakers if "prompt" in speaker]  # not a recording
    narratives = [f'<p><b>{html.escape(speaker["name"])}</b> reads: '
                  f'{html.escape(speaker["narrative"])}</p>' for speaker in told]
    prompts = [f'<pre>{html.escape(speaker["prompt"])}</pre>' for speaker in told]
    return Template(FIGURE).substitute(
        name=name, title=html.escape(names + note), narratives="\n".join(narratives),
        rows="\n".join(rows), timeline=timeline(speakers, events, audio),
        prompts="\n".join(prompts))


FIGURE = """<figure id="$name"><h3>$title</h3>
$narratives
<table><tr><th rowspan="2">speaker<th rowspan="2">voice<th rowspan="2">starts<th colspan="3">
backchannels<th colspan="3">interruptions</tr>
<tr><th>asked<th>marked<th>made<th>asked<th>marked<th>made</tr>
$rows</table>
<audio controls preload="none" src="audio/$name.ogg"></audio>
<div class="scroll" tabindex="0">$timeline</div>
<details><summary>The prompts, word for word</summary>$prompts</details></figure>
"""


def exact_counts(dialogues):
    """(counts that were made as asked, counts asked), of all speakers and both kinds."""
    right = asked = 0
    for _, speakers, _ in dialogues:
        events = label_segments(merge_words([speaker["words"] for speaker in speakers]))
        for speaker, counts in zip(speakers, count_events(events)):
            for key, made in zip(KINDS, counts):
                right, asked = right + (speaker[key] == made), asked + 1
    return right, asked


def write_page(settings):
    out, rows = Path(settings.out), load_dialogues(settings.data, "test")
    make_folder(out / "audio")
    found = {name: read_section(settings, name, numbers)
             for name, numbers in numbers_of(settings, rows).items()}
    sections = {name: found[name] for name in ("test", "voices", "answer")}
    sections["counts"] = [found[f"counts_{count}"][0] for count in COUNTS]
    right, asked = exact_counts(sections["test"])
    values = {"right": right, "asked": asked}
    for section, dialogues in sections.items():
        values[section] = ""
        for name, speakers, audio in dialogues:
            write_ogg(out / "audio" / f"{name}.ogg", audio)
            note = f": {speakers[0]['backchannels']} asked of {speakers[0]['name']}"
            if section != "counts":
                new = not seen(rows[int(name[-4:])])
                note = ", in a situation that training has not" if new else ""
            values[section] += figure(name, note, speakers, audio)
    page = Template(read_text(Path(__file__).with_name("page.html"))).substitute(values)
    write_atomically(out / "index.html", lambda path: path.write_text(page, encoding="utf-8"))
    shown = {name for dialogues in sections.values() for name, _, _ in dialogues}
    for path in (out / "audio").glob("*.ogg"):  # of a page before this one
        if path.stem not in shown and path.stem[:-5] in found:
            path.unlink()
    print(f"{out}/index.html: {sum(map(len, sections.values()))} dialogues; of the first "
          f"{settings.n}'s counts {right} of {asked} are made as asked")


def main(argv):
    settings = load_settings(Settings, argv)
    if settings.make:
        make_dialogues(settings)
    write_page(settings)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"page.py: {e}")
