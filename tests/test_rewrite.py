"""rewrite.py: what a chat model writes is checked, tried again, kept out if wrong, and gone on
with after a kill."""
import json

import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prepare
import rewrite
from config import InputError
from data import load_dialogues

ANN = "Ann lost her keys in the park and asked Bob for help."
GOOD = {"Ann": "You lost your keys in the park and asked Bob for help.",
        "Bob": "Ann lost her keys in the park and asked you for help."}


@pytest.fixture
def folder(tmp_path, dialogues):
    """A prepared data set of two shards, with ANN as the narrative of its three dialogues."""
    rows = [dialogue | {"speakers": ["Ann", "Bob"], "narrative": ANN + " " * i}
            for i, dialogue in enumerate(dialogues[:3])]
    write_split(tmp_path / "data", rows[:2], "train")
    write_split(tmp_path / "data", rows[2:], "test")
    (tmp_path / "data" / "info.json").write_text('{"codec": "x"}')
    return tmp_path


def answers(monkeypatch, answer):
    """Puts answer(prompt, temperature) in the place of the chat model. Returns the list of
    (prompts, temperature) asked."""
    asked = []
    monkeypatch.setattr(rewrite, "load_chat_model", lambda name: (None, None))

    def write(model, tokenizer, prompts, words, temperature):
        asked.append((prompts, temperature))
        return [answer(prompt, temperature) for prompt in prompts]
    monkeypatch.setattr(rewrite, "write", write)
    return asked


def speaker(prompt):
    return "Ann" if "Replace Ann" in prompt else "Bob"


def run(folder, *words):
    prepare.main(["rewrite", f"data={folder}/data", f"out={folder}/out", "model=stub", *words])


def test_good_answers_take_the_narratives_place(folder, monkeypatch, capsys):
    asked = answers(monkeypatch, lambda prompt, temperature: (
        f'**Output Narrative:**\n\n"{GOOD[speaker(prompt)]}"\n'))
    run(folder, "batch=4")
    assert [len(prompts) for prompts, _ in asked] == [4, 2] and {t for _, t in asked} == {0}
    assert "6 of 6 narratives rewritten" in capsys.readouterr().out
    for split, count in (("train", 2), ("test", 1)):
        new, old = (load_dialogues(str(folder / name), split) for name in ("out", "data"))
        assert new["new_narrative_s1"][:] == [GOOD["Ann"]] * count
        assert new["new_narrative_s2"][:] == [GOOD["Bob"]] * count
        for key in old.column_names:
            assert new[key][:] == old[key][:] or key.startswith("new_")
        assert new.features == old.features
    assert (folder / "out" / "info.json").read_text() == '{"codec": "x"}'


def test_wrong_answers_are_tried_again_then_listed_and_left_out(folder, monkeypatch, capsys):
    def answer(prompt, temperature):  # Ann's are right when sampled; Bob's never are
        return GOOD["Ann"] if temperature and speaker(prompt) == "Ann" else ANN

    asked = answers(monkeypatch, answer)
    run(folder, "tries=3", "temperature=0.5")
    assert [(len(prompts), heat) for prompts, heat in asked] == [(6, 0), (6, 0.5), (3, 0.5)]
    new, old = (load_dialogues(str(folder / name), "train") for name in ("out", "data"))
    assert new["new_narrative_s1"][:] == [GOOD["Ann"]] * 2
    assert new["new_narrative_s2"][:] == old["new_narrative_s2"][:]
    printed = capsys.readouterr().out
    for line in ("3 of 6 narratives rewritten", "3 kept as they were", "still names Bob"):
        assert line in printed
    _, *report = map(json.loads, (folder / "out" / "rewritten.jsonl").read_text().splitlines())
    assert sorted((r["name"], r["tries"], bool(r["flaw"])) for r in report) == (
        3 * [("Ann", 2, False)] + 3 * [("Bob", 3, True)])


def test_goes_on_where_it_was_cut_off(folder, monkeypatch):
    def dies(prompt, temperature, calls=[]):  # noqa: B006
        calls.append(prompt)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return GOOD[speaker(prompt)]

    answers(monkeypatch, dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "batch=2")
    journal = folder / "out" / "rewritten.jsonl"
    with open(journal, "a") as file:
        file.write("\0" * 64 + '\n{"name": "An')  # a power cut's; cut off in the middle of a line
    asked = answers(monkeypatch, lambda prompt, temperature: GOOD[speaker(prompt)])
    run(folder, "batch=2")
    assert [len(prompts) for prompts, _ in asked] == [2, 2]
    assert len(journal.read_text().splitlines()) == 7
    assert load_dialogues(str(folder / "out"), "test")["new_narrative_s1"][:] == [GOOD["Ann"]]
    with pytest.raises(InputError, match="style was narrative and is goal; give another out="):
        run(folder, "style=goal")


def test_shards_of_another_data_set_are_not_mixed_in(folder, monkeypatch):
    answers(monkeypatch, lambda prompt, temperature: GOOD[speaker(prompt)])
    run(folder)
    run(folder)  # the same ones are written again
    (folder / "data" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="already holds test-00000-of-00001.parquet, which "):
        run(folder)


def test_goals(folder, monkeypatch):
    asked = answers(monkeypatch, lambda prompt, temperature: (
        "You want to find your keys, and Bob may help." if "of Ann, who talks to Bob" in prompt
        else "Help."))
    run(folder, "style=goal", "tries=1")
    assert all("Write the goals of" in prompt for prompts, _ in asked for prompt in prompts)
    assert load_dialogues(str(folder / "out"), "test")["new_narrative_s1"][0].startswith("You want")


@pytest.mark.parametrize("text, flaw", [
    (GOOD["Ann"], ""), (ANN, "still names Ann"),
    ("You lost your keys in the park and asked him for help.", "lost Bob"),
    ("She lost her keys in the park and asked Bob for help.", "does not address Ann"),
    ("You asked Bob.", "has 3 words"),
    ("You played your music loudly, and Bob and Yoseph felt annoyed.", "speaks of Yoseph"),
    (GOOD["Ann"] + " The rewritten narrative addresses the speaker as you.", "has 20 words"),
    ("", "lost Bob")])
def test_flaws(text, flaw):
    assert rewrite.flaw(text, "Ann", "Bob", ANN, rewrite.RewriteSettings()).startswith(flaw)
    assert bool(flaw) == bool(rewrite.flaw(text, "Ann", "Bob", ANN, rewrite.RewriteSettings()))


@pytest.mark.parametrize("name, narrative, told", [
    ("Jerred", "Jerred was mad. Ann took Jerred's car; Jerred isn't glad.",
     "You were mad. Ann took your car; you aren't glad."),
    ("James", "James' car is red. James's dog sat.", "Your car is red. Your dog sat."),
    ("Ann", "Ann met Ann-Marie and Mary-Ann.", "You met Ann-Marie and Mary-Ann."),
    ("O'Neil", "O’Neil lost O’Neil's keys.", "You lost your keys."),
    ("José", "Jose\u0301 was late.", "You were late."), ("ann", "Ann was late.", "You were late."),
    ("Sam", "Sam doesn't know. Does Sam like it? Isn’t Sam glad? \"Sam was here.\"",
     "You don't know. Do you like it? Aren’t you glad? \"You were here.\""),
    ("Sam", "The problem is Sam, who is late.", "The problem is you, who is late."),
    ("Sam", "Samuel is here.", "Samuel is here."),
    ("Will", "Will was late. Then Will left.", "You were late. Then you left.")])
def test_plain_rule(name, narrative, told):
    assert rewrite.from_the_side_of(name, narrative) == told
    assert rewrite.flaw(told, name, "Bob", narrative, rewrite.RewriteSettings()) == ""


def test_a_name_that_may_be_a_verb_stays_and_is_told():
    narrative = "Will Ann wait? Will was late."
    told = rewrite.from_the_side_of("Will", narrative)
    assert told == "Will Ann wait? You were late."
    flaw = rewrite.flaw(told, "Will", "Ann", narrative, rewrite.RewriteSettings())
    assert flaw == "still names Will"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tiny random chat model of transformers, as a folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, "<end>"])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end>"
                               "{% endfor %}assistant: ")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, eos_token_id=tokenizer.eos_token_id))
    folder = tmp_path_factory.mktemp("chat")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_any_chat_model_of_transformers(folder, chat_model, capsys):
    """Random weights write nothing of use: every narrative is tried, reported, and kept as it
    was."""
    run(folder, f"model={chat_model}", "tries=2", "batch=6")
    assert "0 of 6 narratives rewritten" in capsys.readouterr().out
    for name in ("train", "test"):
        new, old = (pq.read_table(folder / part / f"{name}-00000-of-00001.parquet")
                    for part in ("out", "data"))
        assert new.to_pylist() == old.to_pylist()


def test_answers_do_not_depend_on_the_batch(chat_model):
    model, tokenizer = rewrite.load_chat_model(str(chat_model))
    prompts = ["Hello there, Ann.", "Hi."]  # of different length: the shorter one is padded
    alone = [rewrite.write(model, tokenizer, [prompt], 4, 0)[0] for prompt in prompts]
    assert rewrite.write(model, tokenizer, prompts, 4, 0) == alone and all(alone)
    assert rewrite.write(model, tokenizer, prompts, 4, 5.0) != alone  # by sampling


def test_bad_settings(folder, chat_model, tmp_path):
    for word, message in (("style=poem", "must be one of"), ("temperature=nan", "above 0"),
                          ("longest=0.1", "below longest"), (f"data={tmp_path}/none", "SPLIT"),
                          (f"model={tmp_path}/none", "cannot be loaded"),
                          (f"out={folder}/data", "another one")):
        with pytest.raises(InputError, match=message):
            run(folder, word)
    plain = PreTrainedTokenizerFast.from_pretrained(chat_model)
    plain.chat_template = None
    LlamaForCausalLM.from_pretrained(chat_model).save_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="no chat template"):
        run(folder, f"model={tmp_path}/plain")
