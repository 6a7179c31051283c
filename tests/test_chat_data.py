"""Conversations and preferences: read to the letter, tokenised by a template."""

import json
from pathlib import Path

import numpy as np
import pytest

import jlora
from jlora import data
from jlora.data import Conversation, Message

ASSETS = Path(__file__).parents[1] / "examples" / "assets"
# Marks no answers; like Llama 3's, but for the words.
UNMARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Writes an answer otherwise once more messages follow, as those do that hide thinking.
LAST = "'!' if loop.last and m['role'] == 'assistant' else ''"
FICKLE = UNMARKED.replace("m['content']", f"({LAST}) + m['content']")
REFUSING = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture(scope="module")
def fresh():
    """Make tokenizers of which each test may change the template."""
    made = data.load_tokenizer(ASSETS / "tiny-chat")
    own = made.chat_template

    def make(template=own):
        made.chat_template = template
        return made

    return make


def jsonl(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def message(role, content):
    return {"role": role, "content": content}


HI = message("user", "Hello!")
ANSWER = message("assistant", "Hello to you!")
TALK = Conversation(
    tuple(
        Message(*x)
        for x in (
            ("system", "Be brief."),
            ("user", "What is the capital of Peru?"),
            ("assistant", "Lima."),
            ("user", "And of Spain?"),
            ("assistant", "\nMadrid."),  # its line's end and the template's are one
        )
    )
)


def test_the_forms_of_a_conversation(tmp_path):
    said = [Message("user", "Hello!"), Message("assistant", "Hello to you!")]
    whole = jsonl(tmp_path / "a.jsonl", {"messages": [HI, ANSWER], "source": 1})
    halves = {"prompt": [HI], "completion": [ANSWER]}
    texts = {"prompt": "Hello!", "completion": "Hello to you!"}
    parts = jsonl(tmp_path / "b.jsonl", halves, texts)
    found = data.read_conversations([whole, parts])
    assert found == [
        Conversation(tuple(said)),
        *[Conversation(tuple(said), first=1)] * 2,
    ]
    assert found[2].place == f"{parts}, line 2"


def test_parquet_gives_every_message_all_fields(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [[{**HI, "name": None}, {**ANSWER, "name": None}]]
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "a.parquet")
    (talk,) = data.read_conversations(tmp_path / "a.parquet")
    assert [m.role for m in talk.messages] == ["user", "assistant"]


def test_the_forms_of_a_preference(tmp_path):
    other = message("assistant", "What do you want?")
    same = {"prompt": "Hello!", "chosen": "Hello to you!",
            "rejected": "What do you want?"}  # fmt: skip
    messages = {"prompt": [HI], "chosen": [ANSWER], "rejected": [other]}
    repeated = {"prompt": "Hello!", "chosen": [HI, ANSWER], "rejected": [HI, other]}
    file = jsonl(tmp_path / "a.jsonl", same, messages, repeated)
    found = data.read_preferences(file)
    del repeated["prompt"]
    found += data.read_preferences(jsonl(tmp_path / "b.jsonl", repeated))
    assert len({*found}) == 1
    assert found[0].rejected == (Message("assistant", "What do you want?"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "columns text; expected are messages"),
        ({"messages": "x"}, "line 2, column messages: 'x' is no list"),
        ({"messages": [HI]}, "no message is the assistant's"),
        ({"messages": [HI, {"role": "assistant"}]}, "message 2: .* no object with"),
        ({"messages": [HI, message("bot", "x")]}, "role 'bot' is none of"),
        ({"messages": [HI, message("assistant", " ")]}, "content is empty"),
        ({"messages": [HI, message("assistant", ["x"])]}, "is no text"),
        ({"messages": [HI, {**ANSWER, "tool_calls": ["f"]}]}, "has tool_calls beside"),
        ({"prompt": "x", "completion": [HI]}, "column completion: no message is"),
        ({"prompt": "x", "completion": None}, "line 2, column completion: None is no"),
    ],
)
def test_conversations_that_are_none(tmp_path, row, message):
    key = next(iter(row))
    fill = dict.fromkeys(row, "x") if "messages" not in row else {}
    first = {"messages": [HI, ANSWER]} if key == "messages" else fill
    with pytest.raises(jlora.DataError, match=message):
        data.read_conversations(jsonl(tmp_path / "a.jsonl", first, row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "y"}, "expected are prompt, chosen and rejected"),
        ({"chosen": [HI, ANSWER], "rejected": [ANSWER]}, "do not begin with the same"),
        ({"prompt": "x", "chosen": [HI], "rejected": "z"}, "column chosen: beyond"),
    ],
)
def test_preferences_that_are_none(tmp_path, row, message):
    with pytest.raises(jlora.DataError, match=message):
        data.read_preferences(jsonl(tmp_path / "a.jsonl", row))


def labelled(tokens, tokenizer):
    """What is learned of the first conversation, a text a run of labels."""
    (ids, *_), (labels, *_) = tokens.columns["input_ids"], tokens.columns["labels"]
    on = labels >= 0
    np.testing.assert_array_equal(labels[on], ids[on])
    begins = np.flatnonzero(on & ~np.pad(on, (1, 0))[:-1])
    ends = np.flatnonzero(on & ~np.pad(on, (0, 1))[1:]) + 1
    return [tokenizer.decode(ids[a:b]) for a, b in zip(begins, ends, strict=True)]


def test_labels_are_on_the_answers_by_either_kind_of_template(fresh):
    marked = fresh()
    got = data.tokenise_chats(marked, [TALK], 99)
    assert labelled(got, marked) == ["Lima.<|end|>", "\nMadrid.<|end|>"]
    last = data.tokenise_chats(marked, [TALK], 99, answers="last")
    assert labelled(last, marked) == ["\nMadrid.<|end|>"]
    after = Conversation(TALK.messages, first=3)
    assert labelled(data.tokenise_chats(marked, [after], 99), marked) == [
        "\nMadrid.<|end|>"
    ]
    text = marked.decode(got.columns["input_ids"][0])
    assert text.startswith("<|system|>Be brief.<|end|><|user|>What is the capital")

    compared = fresh(UNMARKED)
    got = data.tokenise_chats(compared, [TALK], 99)
    first, second = labelled(got, compared)
    assert first == "Lima.<|end|>"
    assert second.lstrip("\n") == "Madrid.<|end|>"
    assert len(labelled(data.tokenise_chats(compared, [TALK], 99, answers="last"),
                        compared)) == 1  # fmt: skip


def test_the_plain_template_needs_no_tokens_of_its_own(fresh):
    tokenizer = data.with_template(fresh(), "plain")
    tokens = data.tokenise_chats(tokenizer, [TALK], 99)
    assert tokenizer.decode(tokens.columns["input_ids"][0]) == (
        "System: Be brief.\nUser: What is the capital of Peru?\n"
        "Assistant: Lima.<|end|>\nUser: And of Spain?\n"
        "Assistant: \nMadrid.<|end|>\n"
    )
    assert labelled(tokens, tokenizer) == [" Lima.<|end|>", " \nMadrid.<|end|>"]
    prompt = data.chat_prompt(tokenizer, TALK.messages[:2])
    assert tokenizer.decode(prompt).endswith("Peru?\nAssistant:")
    # What follows the prompt in training is what is to be generated.
    whole = tokens.columns["input_ids"][0]
    np.testing.assert_array_equal(whole[: len(prompt)], prompt)


def test_what_is_cut_lost_or_endless_is_said(fresh):
    long = data.tokenise_chats(fresh(), [TALK], 25, stops=[1])
    assert (long.cut, long.lost, long.endless) == (1, 0, 0)
    assert [len(x) for x in long.columns["input_ids"]] == [25]
    short = Conversation(TALK.messages[3:])
    both = data.tokenise_chats(fresh(), [TALK, short], 14, stops=[2])
    assert (both.kept, both.cut, both.lost, both.endless) == ([1], 1, 1, 2)
    said = " ".join(both.remarks("train"))
    for words in ("ends were cut", "were left out", "eos_token_id differ"):
        assert words in said


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (FICKLE, "line 7: the chat template writes messages otherwise once more"),
        (REFUSING, "line 7: the chat template refuses .* must alternate"),
    ],
)
def test_templates_that_do_not_serve(fresh, template, message):
    talk = Conversation(TALK.messages, "line 7")
    with pytest.raises(jlora.DataError, match=message):
        data.tokenise_chats(data.with_template(fresh(template), None), [talk], 99)


def test_a_fickle_template_serves_for_last_answers(fresh):
    tokenizer = fresh(FICKLE)
    got = data.tokenise_chats(tokenizer, [TALK], 99, answers="last")
    assert "".join(labelled(got, tokenizer)) == "!\nMadrid.<|end|>"


def test_both_answers_behind_their_prompt(fresh):
    pair = data.Preference(TALK.messages[:2], TALK.messages[2:3],
                           (Message("assistant", "Paris."),))  # fmt: skip
    same = data.Preference(pair.prompt, pair.chosen, pair.chosen)
    tokens = data.tokenise_preferences(fresh(), [pair, same], 99, vocabulary=768)
    assert (tokens.kept, tokens.same) == ([0], 1)
    assert "two equal answers" in tokens.remarks("train")[0]
    for side, answer in (("chosen", "Lima."), ("rejected", "Paris.")):
        ids, labels = (
            tokens.columns[f"{side}_{x}"][0] for x in ("input_ids", "labels")
        )
        assert fresh().decode(ids[labels >= 0]) == f"{answer}<|end|>"
    with pytest.raises(jlora.DataError, match="beyond the model's vocabulary of 300"):
        data.tokenise_preferences(fresh(), [pair], 99, vocabulary=300)


def test_batches_of_pairs_have_their_own_masks_and_fillings():
    rows = [np.full(n, 7, np.int32) for n in (3, 5, 4)]
    columns = {"chosen_input_ids": rows, "chosen_labels": rows}
    batches = data.Batches(columns, [(8, 8)], size=2, pad=9)
    first, last = list(batches)
    assert first["chosen_attention_mask"].sum(1).tolist() == [3, 5]
    assert first["chosen_input_ids"][0].tolist() == [7] * 3 + [9] * 5
    assert first["chosen_labels"][0].tolist() == [7] * 3 + [data.IGNORED] * 5
    assert (last["chosen_labels"][1] == data.IGNORED).all()
