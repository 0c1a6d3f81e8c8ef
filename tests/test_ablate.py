"""The ablations: rows, budget, going on, tables; listening is made up."""
import json
from pathlib import Path

import pytest

import evaluate
import generate
from config import InputError, load_settings
from data import StreamFormat
from model import load_checkpoint
from train import Config
from world import ablate


@pytest.fixture
def words(tmp_path, tiny, tiny_data, monkeypatch):
    """Words for ablate.main with a tiny recipe; generate.main and evaluate.main write down what
    they were asked for, and the right speaker starts ever more often."""
    (tmp_path / "tiny.yaml").write_text("\n".join(word.replace("=", ": ") for word in tiny))
    made, scored = [], []

    def score(argv):
        scored.append(argv[0])
        folder, out = argv[0], ablate.Path(argv[1].removeprefix("out="))
        value = 10.0 * len(scored)
        figure = {"value": value, "low": value - 1, "high": value + 1}
        rows = {f"{folder}, unseen situations (n=1)": {"wer": 77.7},
                f"{folder} (n=2)": {"correct_start": figure, "r_backchannels": figure}}
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(generate, "main", made.append)
    monkeypatch.setattr(evaluate, "main", score)
    monkeypatch.setattr(evaluate, "draw_table", lambda lines, title, path: path.touch())
    settings = [f"config={tmp_path}/tiny.yaml", f"data={tiny_data}", f"out={tmp_path}/out"]
    return made, scored, [*settings, "steps=2", "n=3"]


def test_rows_are_made_once(words, tmp_path, tiny_data):
    _, scored, words = words
    ablate.main([*words, "rows=no text"])
    assert load_checkpoint(tmp_path / "out" / "no_text" / "model" / "last")[2].alignment == "none"
    ablate.main([*words, "rows=no text, word 2"])
    assert scored == [f"{tmp_path}/out/{name}/dialogues" for name in ("no_text", "word_2")]
    text = (tmp_path / "out" / "ablate.md").read_text()
    assert "| with text the right speaker starts" in text and "77.7" not in text
    assert text.count("| yes ") == 1 and "| paper: no text" in text and "[9.0, 11.0]" in text
    assert (tmp_path / "out" / "table_2.png").exists()
    with pytest.raises(InputError, match="holds rows with another steps; give another out="):
        ablate.main([*words, "steps=3"])
    info = Path(tiny_data) / "info.json"
    info.write_text("{\"seed\": 7}")
    with pytest.raises(InputError, match="holds rows with another data; give another out="):
        ablate.main(words)
    info.unlink()


def test_what_failed_before_its_first_row_locks_nothing(words, tmp_path):
    words = words[-1]
    with pytest.raises(InputError, match="1 of 1 rows were not made"):
        ablate.main([*words, "rows=no text", f"data={tmp_path}/none"])
    ablate.main([*words, "rows=no text", "steps=1"])
    assert (tmp_path / "out" / "no_text" / "results.json").exists()


def test_temperatures_take_the_base_row_model(words, tmp_path):
    made, _, words = words
    ablate.main([*words, "rows=temperature 0.6"])
    assert made[0][0] == f"model={tmp_path}/out/word_2/model/last"
    assert "temperature=0.6" in made[0] and not any("word_temperature" in word for word in made[0])


def test_every_row_is_known_to_train_and_generate():
    for changed in ablate.TRAINED.values():
        cfg = load_settings(Config, ["configs/nano.yaml", *changed.split()])
        StreamFormat(cfg.alignment, cfg.delay, cfg.behaviour_tokens)
    for changed in ablate.SAMPLED.values():
        assert load_settings(generate.Config, changed.split()).temperature > 0
    recipe = load_settings(Config, ["configs/nano.yaml"])
    assert (recipe.alignment, recipe.delay, recipe.user_weight, recipe.behaviour_tokens) == (
        "word", 2, 0, "count_down")  # what BASE says
    headers = {key for part in evaluate.TABLES.values() for key in part}
    names = {*ablate.TRAINED, *ablate.SAMPLED}
    for rows, _, columns in ablate.TABLES.values():
        assert set(rows) <= names and set(columns) <= headers
    for _, metric, less, more, _ in ablate.FINDINGS:
        assert {less, more} <= names and metric in headers
    assert all(len(row) == len(ablate.COLUMNS) for row in ablate.PAPER.values())


def test_a_row_that_fails_costs_no_other(words, monkeypatch):
    words = words[-1]

    def fail(argv):
        if "no_text" in argv[0]:
            raise InputError("no dialogue")
    monkeypatch.setattr(evaluate, "main", fail)
    with pytest.raises(InputError, match="1 of 2 rows were not made: no text: no dialogue"):
        ablate.main([*words, "steps=1", "rows=no text,word 2"])
    with pytest.raises(InputError, match="there is no 'word 3'"):
        ablate.main([*words, "rows=word 3"])


def test_verdicts():
    low, high = {"low": 1, "high": 2}, {"low": 3, "high": 4}
    assert ablate.verdict(low, high) == "yes"
    assert ablate.verdict(high, low) == "no, the other way round"
    assert ablate.verdict(low, {"low": 2, "high": 4}) == "not told apart"
    assert ablate.verdict(low, {"low": None, "high": None}) == "too few dialogues"
