"""The rows of the paper's tables 1, 2 and 6 at the small size, and the shipped recipe's worth.

    python -m world.ablate                                 every row: hours on two cores (the data
                                                           set of the recipe, runs/world, is there)
    python -m world.ablate rows="word 2,no text" steps=200 n=20 out=runs/try
    python -m world.ablate rows="marks plain"              later, one more: finished rows are kept

A row is the shipped recipe (`config`) with one thing changed, trained for the same number of steps
by train.py; then generate.py makes `n` dialogues of test prompts and evaluate.py scores them. What
is finished stays: the same command goes on where it was ended. `out` gets a folder a row and, from
all rows that are there, a Markdown file and a PNG a table, beside the paper's numbers.

Unlike the paper there is no early stopping: all rows have `steps` steps and their last weights.
"""
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import evaluate
import generate
import train
from config import (
    InputError,
    load_settings,
    make_folder,
    read_text,
    write_atomically,
    write_json,
)
from data import data_info

BASE = "word 2"  # the recipe as it is: by word, two frames ahead, loss s, marks that count down
TRAINED = {  # row: what train.py gets
    BASE: "",
    "no text": "alignment=none delay=0 behaviour_tokens=none",
    "utterance 0": "alignment=utterance delay=0",
    "utterance 1": "alignment=utterance delay=1",
    "utterance 2": "alignment=utterance delay=2",
    "word 0": "alignment=word delay=0",
    "word 0 without first frame": "alignment=word delay=0 first_frame=false",
    "word 1": "alignment=word delay=1",
    "no speaker": "speaker_embedding=false",
    "loss s+u": "user_weight=1",
    "marks none": "behaviour_tokens=none",
    "marks plain": "behaviour_tokens=plain",
    "marks up": "behaviour_tokens=count_up",
    "text weight 1": "text_weight=1",
    "listening weight 1": "listening_weight=1",
    "prompt word weight 1": "prompt_word_weight=1",
    "AdamW": "muon=false lr=1.2e-3",
    "true history": "wrong_history=0",
    "paper's recipe": "behaviour_tokens=none user_weight=1 text_weight=1 listening_weight=1 "
                      "prompt_word_weight=1 wrong_history=0 muon=false lr=1.2e-3",
    "250 dialogues": "limit=250",
    "1000 dialogues": "limit=1000",
    "4000 dialogues": "limit=4000",
}
SAMPLED = {  # row, of BASE's model: what generate.py gets instead of `sampling`
    f"temperature {value}": f"temperature={value}" for value in ("0.6", "0.8", "0.9", "1.0")}
ALIGNED = (*list(TRAINED)[:13], "paper's recipe")
SPOKEN = ("ppl_audio", "ppl_text", "quality", "wer", "time_difference")
FOLLOWED = ("correct_start", "similarity", "drift", "narrative", "narrative_mrr",
            "r_backchannels", "exact_backchannels", "r_interruptions", "exact_interruptions")
TABLES = {  # title: (our rows, which of PAPER, columns)
    "table 1, general": (ALIGNED, slice(0, 10), SPOKEN),
    "table 2, instruction following": (ALIGNED, slice(0, 10), FOLLOWED),
    "table 6, temperatures": ((*SAMPLED, BASE), slice(10, None), SPOKEN[2:] + FOLLOWED),
    "what the recipe is worth": ((BASE, "AdamW", "true history", "text weight 1",
                                  "listening weight 1", "prompt word weight 1", "loss s+u",
                                  "marks none", "paper's recipe"), slice(0),
                                 (*SPOKEN, "known_threes", "names", "slots", *FOLLOWED)),
    "remembering": (("250 dialogues", "1000 dialogues", "4000 dialogues", BASE), slice(0),
                    ("ppl_audio", "ppl_text", "wer", "known_threes", "names", "slots",
                     "narrative_mrr", "r_backchannels", "r_interruptions")),
}
# the paper's tables 1 and 2, then 6, in the order of their columns; None: not given. Its word 2 has
# loss s+u and no marks
COLUMNS = ("ppl_audio", "ppl_text", "quality", "wer", "time_difference", "correct_start",
           "similarity", "drift", "narrative", "r_backchannels", "r_interruptions")
PAPER = {
    "no text": (25.23, None, 3.20, None, 10.69, 54.0, 0.52, 0.66, 1.94, 0.56, 0.21),
    "utterance 0": (22.85, 1.48, 3.33, 23.19, 11.50, 88.76, 0.52, 0.67, 2.12, 0.31, 0.13),
    "utterance 1": (22.85, 1.51, 3.39, 7.35, 12.25, 99.0, 0.54, 0.63, 2.20, 0.40, 0.22),
    "utterance 2": (22.43, 1.51, 3.41, 5.18, 11.30, 99.6, 0.53, 0.61, 2.23, 0.36, 0.16),
    "word 0": (25.47, 1.33, 3.17, 33.40, 12.21, 89.8, 0.52, 0.66, 2.00, 0.53, 0.23),
    "word 1": (24.71, 1.47, 3.31, 9.53, 14.00, 99.6, 0.54, 0.63, 2.15, 0.54, 0.28),
    "word 2": (23.22, 1.57, 3.40, 8.35, 13.93, 99.8, 0.54, 0.61, 2.39, 0.54, 0.25),
    "no speaker": (24.14, 1.57, 3.47, 7.16, 13.77, 99.4, 0.36, 0.64, 2.20, 0.50, 0.19),
    "loss s": (21.45, 1.55, 3.41, 7.59, 13.42, 99.6, 0.54, 0.64, 2.27, 0.57, 0.17),
    "marks plain": (23.38, 1.56, 3.39, 9.19, 14.75, 100, 0.54, 0.62, 2.36, 0.48, 0.28),
    "temperature 0.6": (None, None, 3.48, 6.20, 24.29, 100, 0.54, 0.59, 2.57, 0.30, 0.13),
    "temperature 0.8": (None, None, 3.44, 7.50, 16.12, 100, 0.54, 0.63, 2.26, 0.47, 0.22),
    "temperature 0.9": (None, None, 3.42, 8.49, 14.62, 100, 0.54, 0.60, 3.00, 0.50, 0.30),
    "temperature 1.0": (None, None, 3.38, 10.09, 12.07, 99.4, 0.53, 0.63, 2.08, 0.52, 0.22),
}
FINDINGS = (  # of the paper: the metric is less in the first row than in the second; its numbers
    ("with text the right speaker starts", "correct_start", "no text", BASE, "54.0 < 99.8"),
    ("with text the story is told", "narrative_mrr", "no text", BASE, "1.94 < 2.39 (judge)"),
    ("text that leads is spoken better", "wer", BASE, "word 0", "8.35 < 33.4"),
    ("where text leads, the right speaker starts", "correct_start", "word 0", BASE, "89.8 < 99.8"),
    ("by utterance it is spoken better", "wer", "utterance 2", BASE, "5.18 < 8.35"),
    ("by word it follows counts better", "r_backchannels", "utterance 2", BASE, "0.36 < 0.54"),
    ("the embedding gives the voice", "similarity", "no speaker", BASE, "0.36 < 0.54"),
    ("loss s predicts the system better", "ppl_audio", BASE, "loss s+u", "21.45 < 23.22"),
    ("plain marks: fewer right backchannels", "r_backchannels", "marks plain", "marks none",
     "0.48 < 0.54"),
    ("plain marks: more right interruptions", "r_interruptions", "marks none", "marks plain",
     "0.25 < 0.28"),
    ("a low temperature loses backchannels", "r_backchannels", "temperature 0.6",
     "temperature 1.0", "0.30 < 0.52"),
    ("a low temperature is spoken better", "wer", "temperature 0.6", "temperature 1.0",
     "6.20 < 10.09"),
)


@dataclass
class Settings:
    out: str = "runs/ablate"
    config: str = "configs/nano.yaml"  # of train.py: what the rows have in common
    common: str = ""  # more settings of train.py for all rows, with spaces between
    data: str = ""  # data set; "": the config's
    codec: str = generate.Config.codec
    rows: str = ""  # only these, with commas between; "": all
    steps: int = 400  # of every model
    n: int = 60  # test prompts a row; those of situations that training has are in the tables
    batch: int = 20  # dialogues made at a time
    seed: int = 0
    sampling: str = "decision_temperature=1.0 word_temperature=0.3 audio_temperature=0.2"
    asr: str = evaluate.Settings.asr
    jobs: int = 0  # processes that listen; 0: one a core


def chosen_rows(settings):
    """The rows to be made, BASE before those that need its model."""
    known = [*TRAINED, *SAMPLED]
    asked = [name.strip() for name in settings.rows.split(",") if name.strip()] or known
    if unknown := [name for name in asked if name not in known]:
        raise InputError(f"rows: there is no '{unknown[0]}'; known are {', '.join(known)}")
    if settings.steps < 1 or settings.n < 1:
        raise InputError("steps and n are at least 1")
    return [name for name in known if name in asked]


def claim(settings, data):
    """Raises InputError if `out` holds rows of another budget or data set; else writes down this
    one."""
    path, apart = Path(settings.out) / "settings.json", ("out", "rows", "batch", "jobs", "data")
    mark = {key: value for key, value in asdict(settings).items() if key not in apart}
    mark |= {"config": read_text(settings.config), "data": data_info(data)}
    if path.exists() and any(path.parent.glob("*/*")):  # a row's model or results
        before = json.loads(read_text(path))
        if differs := [key for key, value in mark.items() if before.get(key) != value]:
            raise InputError(f"{settings.out}: holds rows with another {', '.join(differs)}; give "
                             "another out=")
    make_folder(path.parent)
    write_json(path, mark, indent=1)


def shared(settings):
    """What all rows give train.py, as words."""
    return [settings.config, *settings.common.split()]


def folder_of(settings, name):
    return Path(settings.out) / name.replace(" ", "_").replace("'", "")


def train_row(settings, name, data):
    """Trains the row's model, or goes on with it. Returns its checkpoint's folder."""
    folder = folder_of(settings, name) / "model"
    words = [*shared(settings), *TRAINED[name].split(), f"data={data}", f"out={folder}",
             f"steps={settings.steps}", f"patience={settings.steps}", f"seed={settings.seed}"]
    config = folder / "last" / "config.json"
    done = json.loads(read_text(config))["trained_steps"] if config.exists() else 0
    if done < settings.steps:
        train.main([*words, f"resume={str((folder / 'state.pt').exists()).lower()}"])
    return config.parent


def make_row(settings, name, recipe):
    """Trains, generates, scores; results.json, which evaluate.py writes last, means a whole row."""
    folder, data = folder_of(settings, name), settings.data or recipe.data
    model = train_row(settings, name if name in TRAINED else BASE, data)
    generate.main([f"model={model}", f"codec={settings.codec}", f"data={data}", f"n={settings.n}",
                   f"batch={settings.batch}", f"seed={settings.seed}", f"out={folder}/dialogues",
                   f"max_frames={recipe.max_frames}", "resume=true",
                   *SAMPLED.get(name, settings.sampling).split()])
    evaluate.main([f"{folder}/dialogues", f"out={folder}", f"n={settings.n}",
                   f"seed={settings.seed}", f"asr={settings.asr}", f"jobs={settings.jobs}"])


def read_rows(settings):
    """{row: its figures} of all rows that are finished, in the situations that training has."""
    rows = {}
    for name in (*TRAINED, *SAMPLED):
        folder = folder_of(settings, name)
        if (folder / "results.json").exists():
            found = json.loads(read_text(folder / "results.json"))["rows"]
            rows[name] = next((row for key, row in found.items()
                               if key.startswith(f"{folder}/dialogues (")), {})
    return rows


def verdict(less, more):
    """Whether the first of two {value, low, high} is less than the second."""
    if None in (less["low"], more["low"]):
        return "too few dialogues"
    if less["high"] < more["low"]:
        return "yes"
    if more["high"] < less["low"]:
        return "no, the other way round"
    return "not told apart"


def compare(rows):
    """The paper's findings as cells of a table, those for which both rows are there."""
    lines = [["the paper finds", "by", "paper", "here", "holds here"]]
    for text, metric, less, more, paper in FINDINGS:
        a, b = rows.get(less, {}).get(metric), rows.get(more, {}).get(metric)
        if a and b:
            here = f"{less}: {evaluate.cell(a, 2)}; {more}: {evaluate.cell(b, 2)}"
            lines.append([text, metric, paper, here, verdict(a, b)])
    return lines


def write_tables(settings):
    """ablate.md and a PNG a table, of all rows that are finished."""
    rows, out = read_rows(settings), Path(settings.out)
    headers = {key: form for part in evaluate.TABLES.values() for key, form in part.items()}
    paper = [(f"paper: {name}", dict(zip(COLUMNS, row))) for name, row in PAPER.items()]
    tables = {}
    for title, (names, part, columns) in TABLES.items():
        shown = {name: rows[name] for name in names if name in rows} | dict(paper[part])
        tables[title] = evaluate.table(shown, {key: headers[key] for key in columns})
    tables["does it hold"] = compare(rows)
    text = [f"{' '.join(shared(settings))}, {settings.steps} steps a model, {settings.n} test "
            "prompts a row, of which those in situations that training has; [95 % intervals]. The "
            "paper's rows come from other models, data and instruments: for orientation only."]
    for title, lines in tables.items():
        if len(lines) > 1:
            text.append(f"## {title[0].upper()}{title[1:]}\n\n{evaluate.markdown(lines)}")
            name = title.split(",")[0].replace(" ", "_")
            evaluate.draw_table(lines, title, out / f"{name}.png")
    page = "\n\n".join(text) + "\n"
    write_atomically(out / "ablate.md", lambda path: path.write_text(page, encoding="utf-8"))
    print(f"\n{page}\n{out}/ablate.md")


def main(argv):
    settings = load_settings(Settings, argv)
    names, failed = chosen_rows(settings), {}
    recipe = load_settings(train.Config, shared(settings))
    claim(settings, settings.data or recipe.data)
    for i, name in enumerate(names, 1):
        finished = (folder_of(settings, name) / "results.json").exists()
        note = ", finished before" if finished else ""
        print(f"\nrow {i} of {len(names)}: {name}{note}", flush=True)
        try:
            if not finished:
                make_row(settings, name, recipe)
        except InputError as e:  # one row that cannot be made must not cost the others
            failed[name] = e
    write_tables(settings)
    if failed:
        reasons = "; ".join(f"{name}: {e}" for name, e in failed.items())
        raise InputError(f"{len(failed)} of {len(names)} rows were not made: {reasons}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ImportError as e:
        sys.exit(f"ablate.py: {e}; python -m pip install -r requirements-corpus.txt")
    except InputError as e:
        sys.exit(f"ablate.py: {e}")
